"""Checkpoints: atomic writing, removal of old ones, detection of damage, and resuming."""

import copy
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import runs
import tiny
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.files import HASH_NAME, hash_file, read_hashed_json, write_hashed_json
from diffusers_prx.techniques.optimizers import MuonAdamW
from diffusers_prx.training import checkpoints
from diffusers_prx.training.checkpoints import (
    CheckpointWriter,
    RunState,
    assign_files,
    find_checkpoint,
    find_damage,
    generator_states,
    list_checkpoints,
    load_tensors,
    named_tensors,
    read_run_file,
    remove_checkpoint,
    restore_generators,
)
from diffusers_prx.training.distributed import ObjectCommunicator
from disks import full_disk

SETTINGS = runs.config().to_dict()
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def make(folder: Path, *steps: int) -> None:
    """Make checkpoints with the minimal content."""
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        entries = {}
        for name in ("run.json", SHARD):
            (checkpoint / name).write_bytes(b"{}")
            entries[name] = {"bytes": 2, "hash": hash_file(checkpoint / name)}
        write_hashed_json(checkpoint / "complete.json", {"algorithm": HASH_NAME, "files": entries})


def flip(file: Path, place: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def new_writer(folder: Path, total_limit: int | None = None, **options) -> CheckpointWriter:
    AcceleratorState._reset_state(reset_partial_state=True)
    return CheckpointWriter(folder, total_limit, ObjectCommunicator(Accelerator(cpu=True), 60), **options)


def tensors(value: float, size: int = 3) -> dict[str, torch.Tensor]:
    return {"weights.a": torch.full((size, 2), value), "optimizer.a.step": torch.tensor(value)}


def save(writer: CheckpointWriter, step: int, **changes) -> None:
    writer.save(step, tensors(float(step), **changes), {"step": step})
    writer.wait()


def state(**changes) -> RunState:
    values = {"settings": SETTINGS, "stages": [stage()], "step": 1}
    return RunState(**values | changes)


def stage(first_step=0, stop_step=100, dataset_size=50, global_batch_size=4) -> dict[str, int]:
    return {
        "first_step": first_step,
        "stop_step": stop_step,
        "dataset_size": dataset_size,
        "global_batch_size": global_batch_size,
    }


def test_checkpoints_are_listed_by_step_without_unfinished_ones(tmp_path):
    make(tmp_path, 1000, 20, 300)
    (tmp_path / "checkpoint-4000.unfinished").mkdir()
    (tmp_path / "checkpoint-5000").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-300", "checkpoint-1000"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1000"


@pytest.mark.parametrize("limit", [None, 2])
def test_total_limit_keeps_the_newest(tmp_path, limit):
    writer = new_writer(tmp_path, limit)
    for step in (5, 10, 100):
        save(writer, step)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-10", "checkpoint-100"][-(limit or 3) :]
    assert sorted(os.listdir(tmp_path)) == sorted(names(tmp_path))


def test_complete_json_lists_all_files(tmp_path):
    writer = new_writer(tmp_path)
    save(writer, 7)
    folder = tmp_path / "checkpoint-7"
    listed = json.loads((folder / "complete.json").read_text())["files"]
    assert sorted([*listed, "complete.json"]) == sorted(os.listdir(folder))
    assert {Path(name).suffix for name in listed} == {".json", ".safetensors"}
    for name, entry in listed.items():
        assert entry == {"bytes": (folder / name).stat().st_size, "hash": hash_file(folder / name)}
    assert read_run_file(folder) == {"step": 7}
    found = runs.saved_state(folder)
    assert torch.equal(found["weights.a"], torch.full((3, 2), 7.0))
    assert torch.equal(found["optimizer.a.step"], torch.tensor(7.0))


def test_large_files_are_hashed_completely(tmp_path):
    content = os.urandom(3 * 2**20 + 5)  # more than one piece, and the last one shorter
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content)


def in_shard(folder: Path) -> Path:
    return next(folder.glob("shard-*.safetensors"))


def rewrite_marker(folder: Path, change) -> None:
    write_hashed_json(folder / "complete.json", change(read_hashed_json(folder / "complete.json")))


DAMAGES = {
    "truncated shard": (lambda f: os.truncate(in_shard(f), in_shard(f).stat().st_size // 2), "shard-00001"),
    "missing shard": (lambda f: in_shard(f).unlink(), "shard-00001"),
    "shard is a folder": (lambda f: (in_shard(f).unlink(), (f / SHARD).mkdir()), "shard-00001"),
    "flipped bit of a tensor": (lambda f: flip(in_shard(f), -1), "shard-00001"),
    "flipped bit of the header length": (lambda f: flip(in_shard(f), 7, 7), "shard-00001"),
    "run.json is null": (lambda f: (f / "run.json").write_text("null"), "run.json"),
    "missing run.json": (lambda f: (f / "run.json").unlink(), "run.json"),
    "missing marker": (lambda f: (f / "complete.json").unlink(), "complete.json"),
    "truncated marker": (lambda f: os.truncate(f / "complete.json", 40), "complete.json"),
    "marker not UTF-8": (lambda f: (f / "complete.json").write_bytes(b"\xff\xfe"), "complete.json"),
    "nested marker": (lambda f: (f / "complete.json").write_text("[" * 100_000), "complete.json"),
    "marker is null": (lambda f: (f / "complete.json").write_text("null"), "complete.json"),
    "marker without files": (lambda f: rewrite_marker(f, lambda m: {"algorithm": HASH_NAME}), "complete.json"),
    "marker of another hash": (lambda f: rewrite_marker(f, lambda m: m | {"algorithm": "md5"}), "complete.json"),
    "marker with a list": (lambda f: rewrite_marker(f, lambda m: m | {"files": [1]}), "complete.json"),
    "marker without a shard": (lambda f: rewrite_marker(f, lambda m: m | {"files": {}}), "complete.json"),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    writer = new_writer(folder, derived={"tokenizer.json": b"{}"})
    for step in (1, 2):
        save(writer, step)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_reported_and_the_previous_one_is_used(two_checkpoints, tmp_path, caplog, damage):
    folder = shutil.copytree(two_checkpoints, tmp_path / "run") / "checkpoint-2"
    do, named = DAMAGES[damage]
    assert find_damage(folder) is None
    do(folder)
    assert named in find_damage(folder)
    assert find_checkpoint(folder.parent, "latest").name == "checkpoint-1"
    assert "checkpoint-2" in caplog.text
    assert named in caplog.text
    for name in ("checkpoint-2", str(folder)):
        with pytest.raises(ValueError, match=rf"`resume_from_checkpoint`.*{named}.*\['checkpoint-1'\]"):
            find_checkpoint(folder.parent, name)
    save(new_writer(folder.parent), 2)  # the run reaches the step again
    assert find_checkpoint(folder.parent, "latest").name == "checkpoint-2"
    assert sorted(os.listdir(folder.parent)) == ["checkpoint-1", "checkpoint-2"]


def test_flipped_bits_are_found_in_all_files(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints / "checkpoint-2", tmp_path / "checkpoint-2")
    chance, files = random.Random(0), sorted(folder.iterdir())
    assert {"complete.json", "run.json", "tokenizer.json", SHARD} <= {file.name for file in files}
    for file in files:
        for _ in range(10):
            place, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
            flip(file, place, bit)
            assert file.name in find_damage(folder), (file.name, place, bit)
            flip(file, place, bit)
            assert find_damage(folder) is None


def test_latest_fails_if_all_checkpoints_are_damaged(tmp_path):
    """Starting at step 0 would overwrite them."""
    make(tmp_path, 3, 7)
    for step in (3, 7):
        flip(tmp_path / f"checkpoint-{step}" / SHARD, 0)
    with pytest.raises(ValueError, match=r"every checkpoint .* is damaged: checkpoint-7 \(.*; checkpoint-3 \(.*shard"):
        find_checkpoint(tmp_path, "latest")


def test_file_named_like_a_checkpoint_is_rejected(tmp_path):
    make(tmp_path, 3)
    (tmp_path / "checkpoint-6").write_text("notes")
    for resume_from in (None, "latest", "checkpoint-3"):
        with pytest.raises(ValueError, match=r"`output_dir` .*\['checkpoint-6'\]"):
            find_checkpoint(tmp_path, resume_from)
    assert (tmp_path / "checkpoint-6").read_text() == "notes"


def test_checkpoint_removed_meanwhile_is_ignored(tmp_path, monkeypatch):
    make(tmp_path, 3)
    glob = Path.glob

    def with_one_that_is_gone(folder, pattern):
        return [*glob(folder, pattern), folder / "checkpoint-2"]

    monkeypatch.setattr(Path, "glob", with_one_that_is_gone)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-3"


def test_unlisted_files_in_a_checkpoint_are_ignored(tmp_path):
    """macOS adds `._` files on network drives."""
    writer = new_writer(tmp_path)
    save(writer, 1)
    folder = tmp_path / "checkpoint-1"
    for stray in (f"._{SHARD}", "other.safetensors", ".DS_Store"):
        (folder / stray).write_bytes(b"\0\5")
    (folder / "notes").mkdir()
    assert find_checkpoint(tmp_path, "latest") == folder
    found = {"weights.a": torch.zeros(3, 2)}
    checkpoints.read_tensors(folder, found)
    assert torch.equal(found["weights.a"], torch.ones(3, 2))


def test_missing_tensors_raise_a_value_error(tmp_path):
    save(new_writer(tmp_path), 1)
    for name, size in (("weights.b", 3), ("weights.a", 4)):
        with pytest.raises(ValueError, match=rf"checkpoint-1 cannot be read: .*{name}"):
            checkpoints.read_tensors(tmp_path / "checkpoint-1", {name: torch.zeros(size, 2)})


def refuse(monkeypatch, method: str, named: str) -> None:
    """Make a method of Path fail for paths with this name."""
    original = getattr(Path, method)

    def refused(path: Path, *arguments, **options):
        if re.fullmatch(named, path.name):
            raise PermissionError(1, "Operation not permitted", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, method, refused)


@pytest.mark.parametrize("refused", [("rename", "shard.*"), ("rename", "complete.json"), ("rmdir", "checkpoint-1")])
def test_checkpoint_that_cannot_be_removed_stays_valid(tmp_path, monkeypatch, caplog, refused):
    writer = new_writer(tmp_path, 1)
    save(writer, 1)
    before = {file.name: file.read_bytes() for file in (tmp_path / "checkpoint-1").iterdir()}
    with monkeypatch.context() as patch:
        refuse(patch, *refused)
        save(writer, 2)
    assert "checkpoint-1 cannot be removed" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "checkpoint-1").iterdir()} == before
    assert find_damage(tmp_path / "checkpoint-1") is None
    save(writer, 3)  # now the system allows it
    assert os.listdir(tmp_path) == ["checkpoint-3"]


def test_failed_removal_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    writer = new_writer(tmp_path, 1)
    save(writer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        save(writer, 2)
        (tmp_path / "checkpoint-9.unfinished").mkdir()
        save(writer, 3)
    assert "checkpoint-9.unfinished" in caplog.text
    assert names(tmp_path) == ["checkpoint-3"]
    save(writer, 4)
    assert os.listdir(tmp_path) == ["checkpoint-4"]


def test_interrupted_removal_is_finished_later(tmp_path, monkeypatch):
    writer = new_writer(tmp_path)
    for step in (1, 2):
        save(writer, step)
    with monkeypatch.context() as patch:  # killed after `complete.json` was moved
        patch.setattr(Path, "rename", kill_after_one(Path.rename))
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1").is_dir()
    assert names(tmp_path) == ["checkpoint-2"]
    save(writer, 3)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-3"]


def kill_after_one(rename):
    calls = []

    def renamed(path: Path, target: Path):
        if calls:
            raise KeyboardInterrupt
        calls.append(path)
        return rename(path, target)

    return renamed


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    """The run resumed from checkpoint 3 because 9 is damaged. With a limit of one, the new checkpoint is kept."""
    writer = new_writer(tmp_path, 1)
    make(tmp_path, 3, 9)
    flip(tmp_path / "checkpoint-9" / SHARD, 0)
    save(writer, 4)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-9"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-4"


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    for step in (2, 4):
        left = tmp_path / f"checkpoint-{step}.unfinished"
        left.mkdir()
        (left / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"half")
    writer = new_writer(tmp_path)
    save(writer, 2)
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    assert not list((tmp_path / "checkpoint-2").glob("shard-00009*"))


def test_changes_after_save_are_not_in_the_checkpoint(tmp_path):
    writer = new_writer(tmp_path)
    values, run = tensors(1.0), {"history": [1]}
    gate, key = os.pipe()
    blocked = writer.thread.submit(os.read, gate, 1)  # the thread is busy
    writer.save(1, values, run)
    assert names(tmp_path) == []
    values["weights.a"].fill_(2.0)
    run["history"].append(2)
    torch.manual_seed(5)
    os.write(key, b"x")
    writer.wait()
    blocked.result()
    assert torch.equal(runs.saved_state(tmp_path / "checkpoint-1")["weights.a"], torch.full((3, 2), 1.0))
    assert read_run_file(tmp_path / "checkpoint-1") == {"history": [1]}
    before = torch.get_rng_state()
    restore_generators(tmp_path / "checkpoint-1", 0)
    assert not torch.equal(torch.get_rng_state(), before)


def test_save_waits_for_the_previous_checkpoint(tmp_path):
    writer = new_writer(tmp_path)
    for step in (1, 2, 3):
        assert names(tmp_path) == [f"checkpoint-{earlier}" for earlier in range(1, step - 1)] or step == 1
        writer.save(step, tensors(step), {})
        assert f"checkpoint-{step - 1}" in names(tmp_path) or step == 1
    writer.wait()
    assert len(names(tmp_path)) == 3


# Disks that fail


def test_write_error_keeps_the_previous_checkpoint(tmp_path):
    writer = new_writer(tmp_path, 1)
    save(writer, 1)
    with full_disk(40_000):
        writer.save(2, tensors(2.0, size=100_000), {})
        with pytest.raises(OSError, match=r"checkpoint-2.*\['checkpoint-1'\]"):
            writer.wait()
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
    save(writer, 2, size=100_000)
    assert os.listdir(tmp_path) == ["checkpoint-2"]


@pytest.fixture
def mounted(tmp_path) -> Iterator[Path]:
    """A file system of 512 kB."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_file_system_keeps_the_previous_checkpoint(mounted):
    writer = new_writer(mounted, 1)
    save(writer, 1)
    writer.save(2, tensors(2.0, size=100_000), {})
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written: .*No space left on device"):
        writer.wait()
    assert os.listdir(mounted) == ["checkpoint-1"]
    save(writer, 3)
    assert os.listdir(mounted) == ["checkpoint-3"]


def test_read_only_file_system_keeps_the_previous_checkpoint(mounted):
    writer = new_writer(mounted, 1)
    save(writer, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    writer.save(2, tensors(2.0), {})
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written: .*Read-only file system"):
        writer.wait()
    assert find_checkpoint(mounted, "latest").name == "checkpoint-1"


def test_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    writer = new_writer(tmp_path / "file")
    writer.save(1, tensors(1.0), {})
    with pytest.raises(OSError, match=r"checkpoint-1.*\[\]"):
        writer.wait()


# Content


def test_optimizer_state_is_restored_bitwise(tmp_path):
    """For Muon and AdamW; an unused parameter has no state."""

    def new() -> tuple[nn.Module, MuonAdamW]:
        torch.manual_seed(0)
        module = nn.ModuleDict({"a": nn.Linear(3, 4), "ab": nn.Linear(4, 2), "idle": nn.Linear(2, 2)})
        matrices = [p for p in module.parameters() if p.ndim == 2]
        others = [p for p in module.parameters() if p.ndim == 1]
        groups = [{"kind": "muon", "params": matrices}, {"kind": "adamw", "params": others}]
        return module, MuonAdamW(groups, lr=0.1)

    def train(module: nn.Module, optimizer: MuonAdamW, steps: range) -> None:
        for step in steps:
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            module["ab"](module["a"](x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    module, optimizer = new()
    average = {"a.weight": torch.full((4, 3), 0.5)}
    train(module, optimizer, range(3))
    writer = new_writer(tmp_path)
    writer.save(3, named_tensors(module, optimizer, average), {})
    writer.wait()
    train(module, optimizer, range(3, 5))

    again, resumed = new()
    averaged = {"a.weight": torch.zeros(4, 3)}
    load_tensors(tmp_path / "checkpoint-3", again, resumed, averaged)
    train(again, resumed, range(3, 5))
    runs.assert_same(averaged, average)
    runs.assert_same(named_tensors(again, resumed, {}), named_tensors(module, optimizer, {}))
    assert not any(name.startswith("optimizer.idle") for name in named_tensors(module, optimizer, {}))


def test_global_generators_are_restored(tmp_path):
    (tmp_path / "generators-0.json").write_text(json.dumps(generator_states()))

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    drawn = draw()
    assert draw() != drawn
    assert restore_generators(tmp_path, 0)
    assert draw() == drawn
    assert not restore_generators(tmp_path, 1)  # this rank did not exist


def test_large_checkpoints_have_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_FILE_BYTES", 50)
    values = {f"weights.{n}": torch.full((8,), float(n)) for n in range(5)}
    assert list(assign_files(values).values()) == [1, 1, 2, 2, 3]
    writer = new_writer(tmp_path)
    writer.save(1, values, {})
    writer.wait()
    assert len(list((tmp_path / "checkpoint-1").glob("*.safetensors"))) == 3
    found = runs.saved_state(tmp_path / "checkpoint-1")
    runs.assert_same({name: found[name] for name in values}, values)


# Resuming


def test_latest_without_checkpoints_starts_at_step_0(tmp_path):
    assert find_checkpoint(tmp_path / "new", "latest") is None
    assert find_checkpoint(tmp_path / "new", None) is None


def test_checkpoint_is_found_by_path_and_by_name(tmp_path):
    make(tmp_path / "run", 3, 7)
    make(tmp_path / "other", 2)
    assert find_checkpoint(tmp_path / "run", "checkpoint-7").name == "checkpoint-7"
    assert find_checkpoint(tmp_path / "run", str(tmp_path / "run" / "checkpoint-7")).parent.name == "run"
    assert find_checkpoint(tmp_path / "new", str(tmp_path / "other" / "checkpoint-2")).parent.name == "other"
    for wrong in ("checkpoint-5", str(tmp_path), "checkpoint"):
        with pytest.raises(ValueError, match=r"`resume_from_checkpoint`.*\['checkpoint-3', 'checkpoint-7'\]"):
            find_checkpoint(tmp_path / "run", wrong)


def test_later_checkpoints_of_another_run_are_rejected(tmp_path):
    make(tmp_path, 3, 7)
    for start, later in ((None, r"\['checkpoint-3', 'checkpoint-7'\]"), ("checkpoint-3", r"\['checkpoint-7'\]")):
        with pytest.raises(ValueError, match=f"`output_dir`.*{later}.*latest"):
            find_checkpoint(tmp_path, start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {**SETTINGS, "seed": 1}}, "`seed` is 42.* 1:"),
        ({"settings": {**SETTINGS, "optimizer": "muon"}}, "`optimizer` is adamw.* muon"),
        ({"stages": [stage(global_batch_size=8)]}, "`global_batch_size of stage 0` is 4.* 8"),
        ({"stages": [stage(dataset_size=49)]}, "`dataset_size of stage 0` is 50.* 49"),
        ({"stages": [stage(stop_step=5), stage(5, 100)], "step": 6}, "`stop_step of stage 0` is 100.* 5"),
        ({"stages": [stage(stop_step=200)], "step": 101}, "step 101.*`max_train_steps`.* 100"),
    ],
)
def test_checkpoint_of_a_different_run_is_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        state().load_state_dict(state(**changes).state_dict())


def test_other_settings_may_change_and_counts_are_restored():
    old = state(step=7, unreadable=3, history=[{"step": 7}])
    old.settings = {**old.settings, "train_batch_size": 1, "output_dir": "elsewhere", "learning_rate": 1.0}
    # the first stage is longer now, and the stage that had not begun differs
    old.stages = [stage(stop_step=7), stage(7, 9, dataset_size=3)]
    new = state()
    new.load_state_dict(old.state_dict())
    assert (new.step, new.unreadable, new.history) == (7, 3, [{"step": 7}])
    assert new.settings == state().settings


def test_checkpoint_of_a_version_with_fewer_settings_resumes(tmp_path):
    """What did not exist when it was saved has its default; a value other than the default is refused."""
    config = json.loads(json.dumps({k: v for k, v in tiny.transformer().config.items() if k[0] != "_"}))
    settings = TrainingConfig(**runs.settings(tmp_path, tmp_path)).to_dict()
    state = RunState(settings, [{"first_step": 0, "stop_step": 4}], {"transformer": config})
    saved = copy.deepcopy(state.state_dict())
    del saved["settings"]["noise_scale"], saved["networks"]["transformer"]["guidance_embeds"]
    state.load_state_dict(saved)
    state.networks["transformer"]["guidance_embeds"] = True
    with pytest.raises(ValueError, match="transformer"):
        state.load_state_dict(saved)
