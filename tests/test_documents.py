"""Pages, READMEs and model cards: Python snippets run, commands have their flags, named files exist."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
import yaml

import tiny
from diffusers_prx import PRXPixelPipeline
from diffusers_prx.config.training_config import TrainingConfig
from model_cards import check_card

ROOT = Path(__file__).resolve().parents[1]
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
# pages that docs/generate.py writes are checked when they are written
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if "reference" not in page.parts)
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "training" / "README.md",
    *PAGES,
    *sorted((ROOT / "spaces").glob("*/README.md")),
    *CARDS,
]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
SCRIPT = re.compile(r"(?:training|spaces)/[\w/]+\.py")
# scripts that give what they do not know to training/train_prx.py
PASS_ON = {"training.plan_prx"}
# stands for settings in general: `[--flag value ...]`
PLACEHOLDER = "--flag"


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def blocks(file: Path, *languages: str) -> list[tuple[str, str]]:
    """(where, text) of the fenced blocks of a document in these languages."""
    text = file.read_text(encoding="utf-8")
    return [
        (f"{name_of(file)}:{text.count(chr(10), 0, match.start()) + 1}", match[2])
        for match in FENCED.finditer(text)
        if match[1] in languages
    ]


@pytest.mark.parametrize("file", [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *DOCUMENTS], ids=name_of)
def test_tests_that_are_named_are_there(file):
    text, files = file.read_text(encoding="utf-8"), sorted((ROOT / "tests").rglob("*.py"))
    paths = {name_of(path) for path in files}
    assert set(re.findall(r"tests/[\w/]+\.py", text)) <= paths
    known = {path.name for path in files} | {path.stem for path in files}
    known |= {name for path in files for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))}
    assert set(re.findall(r"\btest_\w+(?:\.py)?", text)) <= known


# Python. A snippet is run as it stands in an empty folder. Of the names that it loads, tiny pipelines of the same
# class lie there under the same relative paths, where `from_pretrained` finds them before it asks the Hub; a model
# released with this repository is loaded itself. The one word that is changed is "cuda", where there is none. What is
# written for several processes is run on two.

TINY = {"PRXPipeline": tiny.latent_pipeline, "PRXPixelPipeline": tiny.pixel_pipeline}


def made_by_make() -> tuple[str, str]:
    """The Python that `make quickstart` prints at its end."""
    lines = re.findall(r"^\t@echo '    (.*)'$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return "Makefile", "\n".join(lines)


# the Space's own snippet needs a page that is served: tests/spaces/test_app.py runs it
IN_PYTHON = [file for file in DOCUMENTS if "spaces" not in file.parts]
SNIPPETS = [snippet for file in IN_PYTHON for snippet in blocks(file, "python", "py")] + [made_by_make()]


def save_what_it_loads(code: str, folder: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    methods = [(call.func, call.args) for call in calls if isinstance(call.func, ast.Attribute)]
    bases = [(ast.literal_eval(args[0]), func.value.id) for func, args in methods if func.attr == "from_pretrained"]
    for name, cls in bases:
        target = folder / name
        if target.exists():
            continue
        if (ROOT / "model_cards" / target.name / "model_index.json").is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(ROOT / "model_cards" / target.name)
        else:
            TINY[cls]().save_pretrained(target)
    for func, args in methods:
        if func.attr == "load_lora_weights":
            save_adapter(folder / ast.literal_eval(args[0]), folder / bases[0][0])


def save_adapter(folder: Path, base: Path) -> None:
    """An adapter of a pipeline in pixels."""
    layer = PRXPixelPipeline.from_pretrained(base).transformer.blocks[0].gate_proj
    parts = {"lora_A": torch.ones(2, layer.in_features), "lora_B": torch.ones(layer.out_features, 2)}
    layers = {f"blocks.0.gate_proj.{part}.weight": value for part, value in parts.items()}
    PRXPixelPipeline.save_lora_weights(folder, transformer_lora_layers=layers)


@pytest.mark.parametrize(("where", "code"), SNIPPETS, ids=[where for where, _ in SNIPPETS])
def test_python_snippets_run(where, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_what_it_loads(code, tmp_path)
    if not torch.cuda.is_available():
        code = code.replace('"cuda"', '"cpu"').replace("torch.cuda.", "torch.cpu.")
        code = code.replace("torch.bfloat16", "torch.float32")
    if "init_process_group" in code:
        (tmp_path / "snippet.py").write_text(code)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "snippet.py",
        ]
        subprocess.run(command, check=True, timeout=300)
    else:
        exec(compile(code, where, "exec"), {"__name__": "__main__"})
    saved = re.findall(r'\.save\("([^"]+)"\)', code)
    assert saved, f"{where} leaves nothing that could be looked at"
    for file in saved:
        with PIL.Image.open(tmp_path / file) as image:
            assert image.size == ((64, 64) if "prx-emoji-small" in code else (32, 32))


def test_there_are_snippets():
    assert len(SNIPPETS) >= 5
    assert made_by_make()[1].count("\n") == 2


# Commands


def join_lines(text: str) -> list[str]:
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def commands(file: Path) -> list[tuple[str, list[str]]]:
    """(where, words) of every command of a document, in blocks and inline; shell variables are put in."""
    found = []
    for where, text in blocks(file, "bash", "sh"):
        variables: dict[str, str] = {}
        for line in join_lines(text):
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if words and (match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0], re.DOTALL)):
                variables[match[1]] = match[2]
            elif words:
                found.append((where, words))
    text = FENCED.sub("", file.read_text(encoding="utf-8"))
    for match in INLINE.finditer(text):
        if SCRIPT.search(match[1]) and " " in match[1]:
            found.append((f"{name_of(file)}, {match[1][:40]!r}", shlex.split(" ".join(match[1].split()))))
    # [--weights trained] is a flag that may be left out; a quoted list has spaces
    return [(where, [word if " " in word else word.strip("[]") for word in words]) for where, words in found]


@pytest.fixture(scope="module")
def options():
    """Module of a script -> its flags, as its --help lists them."""
    known: dict[str, set[str]] = {}

    def of(module: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> set[str]:
        if module not in known:
            monkeypatch.setattr(sys, "argv", [module, "--help"])
            with pytest.raises(SystemExit):
                importlib.import_module(module).main()
            shown = capsys.readouterr().out  # "  -h, --help", "  --lora_rank VALUE, --rank VALUE"
            lines = re.findall(r"^  ((?:-\w, )?--\w+.*)", shown, re.MULTILINE)
            known[module] = {name for line in lines for name in re.findall(r"(?:^|, )(--\w+)", line)}
            assert "--help" in known[module]
        if module in PASS_ON:
            return known[module] | of("training.train_prx", capsys, monkeypatch)
        return known[module]

    return of


def split(words: list[str]) -> tuple[list[str], str | None, list[str]]:
    """What starts a script, its module, and its arguments."""
    for place, word in enumerate(words):
        if SCRIPT.fullmatch(word):
            return words[:place], word.removesuffix(".py").replace("/", "."), words[place + 1 :]
        if word == "-m" and words[place + 1].startswith("diffusers_prx"):
            return words[:place], words[place + 1], words[place + 2 :]
    return words, None, []


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_commands_have_their_flags_and_files(file, options, capsys, monkeypatch):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for where, words in commands(file):
        launcher, module, arguments = split(words)
        if words[0] == "make":
            wanted = {word for word in words[1:] if "=" not in word}
            assert wanted <= targets, f"{where}: make has no {sorted(wanted - targets)}"
        elif module is None:
            known = ("pip", "hf", "source", "python3", ".venv/bin/pytest", ".venv/bin/pre-commit")
            assert words[0] in known, f"{where}: {words[0]} is not known here"
        else:
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file() or module.startswith("diffusers_prx"), where
            given = {word.partition("=")[0] for word in arguments if word.startswith("--")} - {PLACEHOLDER}
            unknown = given - options(module, capsys, monkeypatch)
            assert not unknown, f"{where}: {module} has no {sorted(unknown)}"
        for word in [*launcher, *arguments]:  # folders may be made by the command
            if word.startswith(("training/", "tests/", "model_cards/")) and Path(word).suffix:
                assert (ROOT / word).exists(), f"{where}: there is no {word}"


def test_flags_in_the_text_are_those_of_a_script(options, capsys, monkeypatch):
    known: set[str] = set()
    for script in [*(ROOT / "training").glob("*.py"), *(ROOT / "training" / "tools").glob("*.py")]:
        module = ".".join(script.relative_to(ROOT).with_suffix("").parts)
        known |= options(module, capsys, monkeypatch)
    known |= options("diffusers_prx.convert", capsys, monkeypatch)
    for file in (ROOT / "README.md", ROOT / "training" / "README.md", *PAGES):
        for code in INLINE.findall(FENCED.sub("", file.read_text(encoding="utf-8"))):
            if SCRIPT.search(code) is None and not code.startswith(("accelerate", "torchrun", ".venv", "make", "pip")):
                unknown = set(re.findall(r"(?<!\S)--\w+", code)) - known
                assert not unknown, f"{name_of(file)}: no script has {sorted(unknown)}"


LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
NAMED_FILE = re.compile(r"(?:src|training|tests|docs|spaces|model_cards)/[\w./-]+\.(?:py|yaml|md|json|txt|png)")


@pytest.mark.parametrize("file", [ROOT / "CONTRIBUTING.md", *DOCUMENTS], ids=name_of)
def test_links_and_named_files_exist(file):
    text = FENCED.sub("", file.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        # the last two are written by docs/generate.py, and pages of the host of the repository
        if not target.startswith(("https://", "reference/", "../reference/", "../../actions/")):
            assert (file.parent / target).exists(), f"{name_of(file)}: {target} does not exist"
    for code in INLINE.findall(text):
        if NAMED_FILE.fullmatch(code):
            assert (ROOT / code).exists(), f"{name_of(file)}: {code} does not exist"


def test_the_readme_fits_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert len((ROOT / "training" / "README.md").read_text().splitlines()) <= 40


def test_the_check_of_commands_sees_what_is_wrong(tmp_path, options, capsys, monkeypatch):
    text = (
        "```bash\nFLAGS='--modle x'\npython training/publish_prx.py \\\n  $FLAGS --folder y  # why\n```\n"
        "and `python training/export_prx.py\n--checkpoint C [--weigths trained]`"
    )
    document = tmp_path / "README.md"
    document.write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (_, one), (_, other) = commands(document)
    assert one == ["python", "training/publish_prx.py", "--modle", "x", "--folder", "y"]
    assert other == ["python", "training/export_prx.py", "--checkpoint", "C", "--weigths", "trained"]
    assert "--folder" in options("training.publish_prx", capsys, monkeypatch)
    assert "--modle" not in options("training.publish_prx", capsys, monkeypatch)


# Cards


@pytest.mark.parametrize("file", CARDS, ids=name_of)
def test_cards_of_released_models(file):
    card = check_card(file)
    assert card.data.license != "unknown"
    assert card.data.get("widget"), "a released model shows what it draws"
    assert str(Path.home()) not in card.content
    assert "/tmp/" not in card.content
    # a recipe that the trainer takes
    ((_, recipe),) = blocks(file, "yaml")
    assert TrainingConfig(**yaml.safe_load(recipe)).max_train_steps > 0


def test_every_released_model_has_a_card():
    folders = [folder for folder in (ROOT / "model_cards").iterdir() if folder.is_dir()]
    assert {card.parent for card in CARDS} == set(folders) != set()
