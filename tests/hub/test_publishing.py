"""Uploads arrive byte for byte, invalid repositories are refused before training, and failed uploads lose nothing.

`hub.py` is a local Hub server. huggingface_hub reads the Hub's address once per process, so the tests run scripts in
child processes; all trainings share one, because starting a process takes longer than they do.
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
    CARD_MARKER,
    EXIT_NOT_UPLOADED,
    FOLDER_KINDS,
    RUN_FILES,
    UNPUBLISHED_BASE,
    check_repo_id,
    kind_of,
)
from diffusers_prx.schedulers import PRXXPredictionScheduler
from hub import READER, TOKEN, Hub, hub
from runs import save_study

# Calls scripts one after the other and prints how each ended.
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
    """Call scripts with arguments and a token in one new process."""
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


def contents(folder: Path, *excluded: str) -> dict[str, bytes]:
    """Return every file of a folder by name, except names that start with an excluded prefix."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if not name.startswith(excluded)}


@pytest.fixture
def server():
    with hub() as running:
        yield running


# --- training/train_prx.py


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs with an invalid token, a read-only token, a foreign namespace, an upload that fails half-way and its
    repetition, which only exports; then `push_to_hub` of a pipeline, and the training of an adapter."""
    folder = tmp_path_factory.mktemp("trained")
    text = {"text_encoder_config": runs.TEXT_ENCODER, "tokenizer_vocab_size": 300}
    validation = {"validation_inference_steps": 2, "num_validation_samples": 2, "validation_prompts": runs.CAPTIONS}
    options = {"max_train_steps": 2, "report_to": "tensorboard", "push_to_hub": True}
    values = runs.settings("unused", **text, **validation, **options)
    (folder / "recipe.yaml").write_text(json.dumps(values))

    def train(name: str, repo_id: str, token: str) -> tuple[str, list[str], str]:
        flags = ["--output_dir", str(folder / name), "--hub_model_id", repo_id, "--resume_from_checkpoint", "latest"]
        return "training.train_prx", ["--config", str(folder / "recipe.yaml"), *flags], token

    # not `run`: after two steps its blocks are still the identity, and no adapter would learn
    base = runs.nets(PRXXPredictionScheduler(shift=2.0)).pipeline(runs.config(max_sequence_length=40))
    base.save_pretrained(folder / "base")
    adapter = f"--pretrained_model_name_or_path {folder / 'base'} --dataset_name scenes --rank 2 --report_to none "
    adapter += "--max_train_steps 2 --validation_steps 2 --num_validation_samples 2 --mixed_precision no "
    adapter += f"--output_dir {folder / 'lora'} --push_to_hub --hub_model_id our-lab/lora"
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
            ("training.train_prx_lora", adapter.split(), TOKEN),
        )
        yield folder, server, ended


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        (0, "no_token", "Invalid user token"),
        (1, "reader", "`repo_id` is 'me/prx'"),
        (2, "others", "under the namespace 'nobody'"),
    ],
)
def test_repositories_without_write_access_are_refused_before_training(trained, number, name, message):
    folder, _, ended = trained
    assert message in ended[number]["code"]  # sys.exit with a text: exit code 1
    assert not [file for file in (folder / name).rglob("*") if file.suffix in (".safetensors", ".json")]


def test_failed_upload_keeps_all_files_and_names_the_command_to_retry(trained):
    folder, _, ended = trained
    assert ended[3]["code"] == EXIT_NOT_UPLOADED
    assert f"saved to {folder / 'run'}" in ended[3]["out"]
    command = f"python training/publish_prx.py --folder {folder / 'run'} --repo_id me/prx"
    assert "the storage is going down" in ended[3]["errors"]
    assert command in ended[3]["errors"]
    assert (folder / "run" / "checkpoint-2" / "complete.json").is_file()


def test_repeated_run_completes_the_upload_byte_for_byte(trained):
    folder, server, ended = trained
    assert ended[4]["code"] == 0
    assert f"uploaded to {server.url}/me/prx" in ended[4]["out"]
    expected = contents(folder / "run", "checkpoint-2", "logs/", "validation/", ".")
    assert {"README.md", "training.json", "loss_curve.png", "widget/1.png", "model_index.json"} <= expected.keys()
    assert server.repositories["model", "me/prx"] == expected
    assert "transformer/diffusion_pytorch_model.safetensors" in server.large
    assert {"README.md", "model_index.json"} <= server.regular
    assert ModelCard(expected["README.md"].decode()).text.count('from_pretrained("me/prx")') == 1
    # large files are sent once, including those of the failed attempt
    assert server.sent == sum(map(len, server.objects.values()))


def test_push_to_hub_of_a_pipeline(trained):
    folder, server, ended = trained
    assert ended[5]["code"] == 0
    arrived = dict(server.repositories["model", "me/direct"])
    assert b"library_name: diffusers" in arrived.pop("README.md")
    assert arrived == contents(folder / "saved")


def test_adapter_is_uploaded_without_its_base(trained, tmp_path):
    folder, server, ended = trained
    assert ended[6]["code"] == 0, ended[6]
    warned, trained_by_then = ended[6]["out"].index(UNPUBLISHED_BASE), ended[6]["out"].index(f"saved to {folder}/lora")
    assert warned < trained_by_then
    assert f"uploaded to {server.url}/our-lab/lora" in ended[6]["out"]
    arrived = server.repositories["model", "our-lab/lora"]
    assert arrived == contents(folder / "lora", "checkpoint-2", ".")
    assert arrived.keys() == {"README.md", "training.json", "loss_curve.png", "pytorch_lora_weights.safetensors"}
    assert "pytorch_lora_weights.safetensors" in server.large
    card = ModelCard(arrived["README.md"].decode())
    assert card.data["load_from"] == "our-lab/lora"
    assert '"our-lab/lora", weight_name' in card.text
    assert f'from_pretrained("{folder / "base"}")' in card.text
    # the uploaded files are a trained adapter of that pipeline
    for name, content in arrived.items():
        (tmp_path / name).write_bytes(content)
    pipeline = PRXPixelPipeline.from_pretrained(folder / "base")
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="mine")
    assert pipeline.get_list_adapters() == {"transformer": ["mine"]}
    learned = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(value.abs().max() > 0 for name, value in learned.items() if ".lora_B." in name)  # zero before training


# --- training/publish_prx.py


def test_spaces_reports_and_loras_are_recognized_and_published(server, tmp_path):
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
    assert server.repositories["model", "me/lora"] == contents(lora, "checkpoint-5")  # the user's card is kept
    assert server.large == {"picture.png", "pictures/curves.png", "pytorch_lora_weights.safetensors"}
    assert server.calls.count("POST /api/datasets/me/study/commit/main") == 1
    assert ended[2]["out"].startswith(f"warning: {UNPUBLISHED_BASE}\n")  # the card names no base
    assert "`folder`" in ended[4]["code"]


def test_published_pipeline_loads_from_its_repository(server, tmp_path):
    """The generated card is updated, and a failed upload can be repeated."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text(
        f'---\nload_from: {folder}\n---\nx = PRXPipeline.from_pretrained("{folder}")\n{CARD_MARKER}\n'
    )
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
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nload_from: our-lab/prx\n---\nx = PRXPipeline.from_pretrained("our-lab/prx")\n')


def test_existing_repository_without_write_access_is_refused(server, tmp_path):
    """`create_repo` with `exist_ok` would accept it."""
    (tmp_path / "model_index.json").write_text("{}")
    server.repositories["model", "me/there"] = {}
    ended = publish(server, tmp_path / "home", "--folder", str(tmp_path), "--repo_id", "me/there", token=READER)
    assert "This token may only read" in ended["code"]
    assert "POST /api/models/me/there/preupload/main" not in server.calls


@pytest.mark.slow
def test_server_that_disappears(tmp_path):
    """It disappears during an upload, and before one; huggingface_hub retries for half a minute each time."""
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


# --- training/ablate_prx.py


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
    assert "`repo_id` is 'our-lab/mine'" in refused["code"]
    assert not (tmp_path / "refused" / "report").exists()  # no plan was registered
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
    assert dry["code"] == 0  # does not contact the Hub
    assert server.repositories.keys() == {("dataset", "our-lab/mine"), ("dataset", "me/tiny")}


# --- without a server


def test_repository_names_are_checked_offline():
    check_repo_id("me/prx-512")
    for name in ("a/b/c", "-prx", "me/prx..1", "a name"):
        with pytest.raises(ValueError, match="not a valid repository name"):
            check_repo_id(name)
    with pytest.raises(ValueError, match="'a name'"):
        runs.config(push_to_hub=True, hub_model_id="a name")
    with pytest.raises(ValueError, match="'--x'"):
        runs.config(push_to_hub=True).__class__(**runs.settings("runs/--x", "unused", push_to_hub=True))


def test_folder_kinds_are_distinguished_by_their_files(tmp_path):
    for number, kind in enumerate(FOLDER_KINDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in kind.files:
            (folder / file).touch()
        assert kind_of(folder) is kind
    assert {kind.repo_type for kind in FOLDER_KINDS} == {"model", "dataset", "space"}
    assert "checkpoint-*" in RUN_FILES
