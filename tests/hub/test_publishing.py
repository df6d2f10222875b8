"""What is published arrives as it was saved; what cannot be is said before a training, and loses nothing after it.

The other side is `hub.py`, a server on this machine. huggingface_hub reads the Hub's address once, so that everything
here runs in processes of its own; those that train are one, since starting takes longer than they do.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard
from safetensors.torch import load_file

import runs
from diffusers_prx import PRXPixelPipeline
from diffusers_prx.hub.publishing import (
    ADAPTER_LOADED_FROM,
    CARD_MARKER,
    EXIT_NOT_UPLOADED,
    KINDS,
    LOADED_FROM,
    OF_A_RUN,
    UNPUBLISHED_BASE,
    check_name,
    kind_of,
)
from diffusers_prx.schedulers import PRXXPredictionScheduler
from hub import READER, TOKEN, Hub, hub
from runs import save_study
from training import ablate_prx

# Calls scripts one after the other and tells how each ended; "draws" is what a pipeline does by itself.
DRIVER = """
import contextlib, io, json, os, sys
from importlib import import_module
for step in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = step["token"]
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            if step["script"] == "pipeline.push_to_hub":
                from diffusers_prx import PRXPixelPipeline
                pipeline = PRXPixelPipeline.from_pretrained(step["argv"][0])
                pipeline.save_pretrained(step["argv"][1])
                pipeline.push_to_hub(step["argv"][2])
            else:
                import_module(step["script"]).main(step["argv"])
        except SystemExit as end:
            code = end.code
    ended = {"code": code, "out": out.getvalue(), "errors": errors.getvalue()[-2000:]}
    print("ENDED " + json.dumps(ended), flush=True)
"""


def drive(server: Hub, home: Path, *steps: tuple[str, list[str], str]) -> list[dict]:
    """Call scripts with arguments and a token, in one new process."""
    listed = [{"script": script, "argv": list(map(str, argv)), "token": token} for script, argv, token in steps]
    environment = server.environment(home) | {"PYTHONPATH": f"{runs.ROOT / 'src'}:{runs.ROOT}"}
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, json.dumps(listed)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("ENDED ")]
    return [json.loads(line.removeprefix("ENDED ")) for line in lines]


def publish(server: Hub, home: Path, *flags: str, token: str = TOKEN) -> dict:
    (ended,) = drive(server, home, ("training.publish_prx", list(flags), token))
    return ended


def contents(folder: Path, *left_out: str) -> dict[str, bytes]:
    """What has to arrive: every file of a folder, but for some that are named by how they begin."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if not name.startswith(left_out)}


@pytest.fixture
def server():
    with hub() as running:
        yield running


# Runs of training/train_prx.py, in one process


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Five runs and what the server then had: a token that is none, one that may only read, a namespace of others, one
    whose upload fails half-way, and that one again, which is finished and only exports; then `push_to_hub`, and an
    adapter of a pipeline."""
    folder = tmp_path_factory.mktemp("trained")
    values = runs.settings(
        "unused", text_encoder_config=runs.TEXT_ENCODER, tokenizer_vocab_size=300, max_train_steps=2,
        validation_prompts=runs.CAPTIONS, validation_inference_steps=2, num_validation_samples=2,
        report_to="tensorboard", push_to_hub=True,
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(values))

    def train(name: str, repo_id: str, token: str) -> tuple[str, list[str], str]:
        flags = ["--output_dir", str(folder / name), "--hub_model_id", repo_id, "--resume_from_checkpoint", "latest"]
        return "training.train_prx", ["--config", str(folder / "recipe.yaml"), *flags], token

    # not `run`, whose blocks change nothing yet after two steps: no adapter of theirs would learn
    base = runs.nets(PRXXPredictionScheduler(shift=2.0)).pipeline(runs.config(max_sequence_length=40))
    base.save_pretrained(folder / "base")
    adapter = [
        "--pretrained_model_name_or_path", folder / "base", "--dataset_name", "scenes", "--rank", 2,
        "--max_train_steps", 2, "--validation_steps", 2, "--num_validation_samples", 2, "--mixed_precision", "no",
        "--report_to", "none", "--output_dir", folder / "lora", "--push_to_hub", "--hub_model_id", "our-lab/lora",
    ]  # fmt: skip
    with hub() as server:
        server.fails_after = 1
        ended = drive(
            server,
            folder / "home",
            train("no_token", "me/prx", "hf_of_nobody"),
            train("reader", "me/prx", READER),
            train("others", "nobody/prx", TOKEN),
            train("run", "prx", TOKEN),
            train("run", "prx", TOKEN),
            ("pipeline.push_to_hub", [folder / "run", folder / "saved", "me/direct"], TOKEN),
            ("training.train_prx_lora", adapter, TOKEN),
        )
        yield folder, server, ended


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        (0, "no_token", "error: The Hub was asked whose token this is: Invalid user token"),
        (1, "reader", "'me/prx' cannot be written to with this token, whose namespaces are ['me', 'our-lab']"),
        (2, "others", "rights to create a model under the namespace 'nobody'"),
    ],
)
def test_what_cannot_be_written_to_is_said_before_any_training(trained, number, name, message):
    folder, _, ended = trained
    assert message in ended[number]["code"]  # sys.exit with a text: exit code 1
    assert not [file for file in (folder / name).rglob("*") if file.suffix in (".safetensors", ".json")]


def test_an_upload_that_fails_loses_nothing_and_says_how_to_go_on(trained):
    folder, _, ended = trained
    assert ended[3]["code"] == EXIT_NOT_UPLOADED
    assert f"saved to {folder / 'run'}" in ended[3]["out"]
    command = f"python training/publish_prx.py --folder {folder / 'run'} --repo_id me/prx"
    assert "the storage is going down" in ended[3]["errors"]
    assert command in ended[3]["errors"]
    assert (folder / "run" / "checkpoint-2" / "complete.json").is_file()


def test_the_same_run_again_completes_the_upload_byte_for_byte(trained):
    folder, server, ended = trained
    assert ended[4]["code"] == 0
    assert f"uploaded to {server.url}/me/prx" in ended[4]["out"]
    left_out = ("checkpoint-2", "logs/", "validation/", ".")
    wanted = contents(folder / "run", *left_out)
    assert {"README.md", "training.json", "loss_curve.png", "widget/1.png", "model_index.json"} <= wanted.keys()
    assert server.repositories["model", "me/prx"] == wanted
    assert "transformer/diffusion_pytorch_model.safetensors" in server.large
    assert {"README.md", "model_index.json"} <= server.regular
    assert ModelCard(wanted["README.md"].decode()).text.count('from_pretrained("me/prx")') == 1
    # large files went over the line once, those of the first attempt too
    assert server.sent == sum(map(len, server.objects.values()))


def test_a_pipeline_pushes_itself(trained):
    folder, server, ended = trained
    assert ended[5]["code"] == 0
    arrived = dict(server.repositories["model", "me/direct"])
    assert b"library_name: diffusers" in arrived.pop("README.md")
    assert arrived == contents(folder / "saved")


def test_an_adapter_arrives_as_it_was_trained(trained, tmp_path):
    """Without its base, which is said before the training."""
    folder, server, ended = trained
    assert ended[6]["code"] == 0, ended[6]
    warned, trained_by_then = ended[6]["out"].index(UNPUBLISHED_BASE), ended[6]["out"].index(f"saved to {folder}/lora")
    assert warned < trained_by_then
    assert f"uploaded to {server.url}/our-lab/lora" in ended[6]["out"]
    arrived = server.repositories["model", "our-lab/lora"]
    assert arrived == contents(folder / "lora", "checkpoint-2", ".")
    assert arrived.keys() == {"README.md", "training.json", "loss_curve.png", "pytorch_lora_weights.safetensors"}
    assert "pytorch_lora_weights.safetensors" in server.large
    card = arrived["README.md"].decode()
    assert ADAPTER_LOADED_FROM.findall(card) == ["our-lab/lora"]
    assert LOADED_FROM.findall(card) == [str(folder / "base")]
    # what arrived is an adapter of that pipeline, and has learnt
    for name, content in arrived.items():
        (tmp_path / name).write_bytes(content)
    pipeline = PRXPixelPipeline.from_pretrained(folder / "base")
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="mine")
    assert pipeline.get_list_adapters() == {"transformer": ["mine"]}
    learnt = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(value.abs().max() > 0 for name, value in learnt.items() if ".lora_B." in name)  # zero at the start


# training/publish_prx.py


def test_a_space_a_report_and_a_lora(server, tmp_path):
    """What each of them is is seen by its files; what was left behind by running it stays here."""
    space = tmp_path / "space"
    (space / "__pycache__").mkdir(parents=True)
    (space / "README.md").write_text("---\ntitle: PRX\nsdk: gradio\napp_file: app.py\n---\n")
    (space / "app.py").write_text("import gradio\n")
    (space / "requirements.txt").write_text("gradio\n")
    (space / "picture.png").write_bytes(bytes(range(256)) * 20)
    (space / "__pycache__" / "app.pyc").write_bytes(b"0")
    report = tmp_path / "report"
    (report / "pictures").mkdir(parents=True)
    (report / "plan.json").write_text("{}")
    (report / "report.md").write_text("# Study of nothing\n\n![curves](pictures/curves.png)\n")
    (report / "pictures" / "curves.png").write_bytes(bytes(range(256)) * 30)
    lora = tmp_path / "lora"
    (lora / "checkpoint-5").mkdir(parents=True)
    (lora / "pytorch_lora_weights.safetensors").write_bytes(bytes(range(256)) * 40)
    (lora / "checkpoint-5" / "run.json").write_text("{}")
    (lora / "README.md").write_text('---\nlicense: mit\n---\n\nMine: x.from_pretrained("somewhere")\n')

    def step(*flags: str) -> tuple[str, list[str], str]:
        return "training.publish_prx", list(flags), TOKEN

    ended = drive(
        server,
        tmp_path / "home",
        step("--folder", str(space), "--repo_id", "our-lab/prx", "--private"),
        step("--folder", str(report), "--repo_id", "study"),
        step("--folder", str(lora)),
        step("--folder", str(report), "--repo_id", "study"),  # nothing has changed
        step("--folder", str(tmp_path)),
    )
    assert [end["code"] for end in ended[:4]] == [0] * 4, ended
    assert ended[0]["out"] == f"uploaded to {server.url}/spaces/our-lab/prx\n"
    assert server.created["space", "our-lab/prx"]["sdk"] == "gradio"
    assert server.created["space", "our-lab/prx"]["visibility"] == "private"
    assert server.repositories["space", "our-lab/prx"] == contents(space, "__pycache__")
    assert server.repositories["dataset", "me/study"] == contents(report)
    card = DatasetCard((report / "README.md").read_text())
    assert (card.data.pretty_name, card.data.viewer) == ("Study of nothing", False)
    assert "![curves](pictures/curves.png)" in card.text
    assert server.repositories["model", "me/lora"] == contents(lora, "checkpoint-5")  # somebody's own card stays
    assert server.large == {"picture.png", "pictures/curves.png", "pytorch_lora_weights.safetensors"}
    assert server.calls.count("POST /api/datasets/me/study/commit/main") == 1
    assert ended[2]["out"].startswith(f"warning: {UNPUBLISHED_BASE}\n")  # which names no base
    assert "holds nothing that is published. Known by their files: pipeline: model_index.json; " in ended[4]["code"]


def test_a_pipeline_that_is_there_already(server, tmp_path):
    """Only a card that we wrote is changed to load from the repository; an upload that fails is tried again."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text(f'x = PRXPipeline.from_pretrained("{folder}")\n{CARD_MARKER}\n')
    for number in range(3):
        (folder / f"{number}.safetensors").write_bytes(bytes([number]) * 3000)
    server.fails_after = 2
    failed = publish(server, tmp_path / "home", "--folder", str(folder), "--repo_id", "our-lab/prx")
    assert failed["code"] == EXIT_NOT_UPLOADED
    assert f"--folder {folder} --repo_id our-lab/prx" in failed["errors"]
    assert server.repositories["model", "our-lab/prx"] == {}  # one commit or none
    before = server.sent
    done = publish(server, tmp_path / "home", "--folder", str(folder), "--repo_id", "our-lab/prx")
    assert done["code"] == 0
    assert server.sent == 9000 > before
    assert server.repositories["model", "our-lab/prx"] == contents(folder)
    assert (folder / "README.md").read_text().startswith('x = PRXPipeline.from_pretrained("our-lab/prx")\n')


def test_a_repository_that_is_there_but_may_only_be_read(server, tmp_path):
    """`create_repo` with `exist_ok` would take it."""
    (tmp_path / "model_index.json").write_text("{}")
    server.repositories["model", "me/there"] = {}
    ended = publish(server, tmp_path / "home", "--folder", str(tmp_path), "--repo_id", "me/there", token=READER)
    assert "This token may only read" in ended["code"]
    assert "POST /api/models/me/there/preupload/main" not in server.calls


@pytest.mark.slow
def test_a_server_that_goes_away(tmp_path):
    """In the middle of an upload, and before it: huggingface_hub tries for half a minute each."""
    (tmp_path / "model_index.json").write_text("{}")
    for number in range(2):
        (tmp_path / f"{number}.safetensors").write_bytes(bytes([number]) * 3000)
    flags = ["--folder", str(tmp_path), "--repo_id", "me/prx"]
    with hub() as server:
        server.fails_after, server.silent = 1, True
        broken = publish(server, tmp_path / "home", *flags)
        assert broken["code"] == EXIT_NOT_UPLOADED
        assert "Try again with `python training/publish_prx.py" in broken["errors"]
        assert publish(server, tmp_path / "home", *flags)["code"] == 0
        assert server.repositories["model", "me/prx"] == contents(tmp_path, "home")
    assert "error: The Hub was asked whose token this is: " in publish(server, tmp_path / "home", *flags)["code"]


# training/ablate_prx.py


def test_the_report_of_a_study(server, tmp_path):
    """A token that may only read, one whose upload fails and again from what was kept, a dry run, the default name. No
    run is started: what they gave is tested elsewhere."""
    study, out = save_study(tmp_path), tmp_path / "out"
    command = ["--study", str(study), "--output_dir", str(out), "--push_to_hub"]

    def step(*flags: str, token: str = TOKEN) -> tuple[str, list[str], str]:
        return "training.ablate_prx", [*command, *flags], token

    none, mine = ("--time_limit", "0"), ("--hub_model_id", "our-lab/mine")
    server.fails_after = 0
    refused, failed, collected, named, dry = drive(
        server,
        tmp_path / "home",
        step(*none, *mine, "--output_dir", str(tmp_path / "refused"), token=READER),
        step(*none, *mine),
        step("--collect", *mine),
        step(*none),
        step("--dry_run", "--hub_model_id", "nobody/mine"),
    )
    assert "error: The repository 'our-lab/mine' cannot be written to with this token" in refused["code"]
    assert not (tmp_path / "refused" / "report").exists()  # no plan: nothing has begun
    report = out / "report"
    assert failed["code"] == EXIT_NOT_UPLOADED
    assert f"report: {report / 'report.md'}" in failed["out"]
    again = f"python training/publish_prx.py --folder {report} --repo_id our-lab/mine"
    assert again in failed["errors"]
    assert collected["code"] == 0, collected
    assert f"uploaded to {server.url}/datasets/our-lab/mine\n" in collected["out"]
    arrived = contents(report)
    assert {"README.md", "report.md", "report.html", "plan.json"} <= arrived.keys()
    assert server.repositories["dataset", "our-lab/mine"] == arrived
    assert DatasetCard((report / "README.md").read_text()).data.viewer is False
    assert named["code"] == 0
    assert server.repositories["dataset", "me/tiny"].keys() == arrived.keys()  # the study's name
    assert dry["code"] == 0  # asks nobody
    assert server.repositories.keys() == {("dataset", "our-lab/mine"), ("dataset", "me/tiny")}


def test_a_repository_without_a_push_is_a_mistake(tmp_path, capsys):
    with pytest.raises(SystemExit):
        ablate_prx.parse_args(["--study", "x.yaml", "--hub_model_id", "me/mine"])
    assert "--hub_model_id is 'me/mine', but --push_to_hub is not set" in capsys.readouterr().err


# What needs no server


def test_names_are_looked_at_without_the_hub():
    check_name("me/prx-512")
    for name in ("a/b/c", "-prx", "me/prx..1", "a name"):
        with pytest.raises(ValueError, match="cannot be called so"):
            check_name(name)
    with pytest.raises(ValueError, match="'a name' cannot be called so"):
        runs.config(push_to_hub=True, hub_model_id="a name")
    with pytest.raises(ValueError, match="'--x' cannot be called so"):
        runs.config(push_to_hub=True).__class__(**runs.settings("runs/--x", "unused", push_to_hub=True))


def test_no_two_kinds_have_the_same_files(tmp_path):
    for number, kind in enumerate(KINDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in kind.files:
            (folder / file).touch()
        assert kind_of(folder) is kind
    assert {kind.repo_type for kind in KINDS} == {"model", "dataset", "space"}
    assert "checkpoint-*" in OF_A_RUN
