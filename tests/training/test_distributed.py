"""Runs on several processes (DDP, FSDP2, HSDP) equal the run on one; checkpoints fit any layout."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import runs
from diffusers_prx import PRXPixelPipeline
from diffusers_prx.training.distributed import shard_count, split_evenly
from diffusers_prx.training.run import Run
from diffusers_prx.training.trainer import train
from training import export_prx

# everything that has to do with weights: Muon and AdamW, averages, SPRINT's fusion, REPA that ends, validation; smooth
# functions of the gradient, to compare sums in another order
EVERYTHING = {
    "optimizer": "muon", "muon_newton_schulz_dtype": "fp32", "adam_epsilon": 1e-4, "max_grad_norm": 1.0,
    "use_ema": True, "ema_update_every": 1, "ema_decay": 0.3, "max_train_steps": 5, "checkpointing_steps": 1,
    "transformer_config": runs.TRANSFORMER | {"fusion_range": [0, 1]}, "route_range": [0, 1], "route_ratio": 0.75,
    "repa_weight": 0.5, "repa_block": 1, "repa_projector": "attention", "repa_until_step": 4,
    "num_validation_samples": 3, "validation_prompts": ["a red circle", "a blue square", "a cross"],
    "validation_steps": 2, "validation_inference_steps": 2, "gradient_checkpointing": True,
    "prediction_type": "velocity",  # whose pictures are full of their noise
}  # fmt: skip
NOT_VALIDATED = {"validation_prompts": [], "num_validation_samples": 0, "validation_metrics": []}
LAYOUTS = {
    "two copies": (2, {}),
    "two shards": (2, {"sharding": "full"}),
    "two copies of two shards": (4, {"sharding": "hybrid", "sharding_size": 2}),
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    return {
        "text_encoder": runs.save_text_encoder(folder / "text_encoder"),
        "teacher": runs.save_teacher(folder / "teacher"),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory, networks) -> Run:
    """Finished run on one process."""
    changes = EVERYTHING | {"repa_teacher": str(networks["teacher"])}
    changes |= {"validation_metrics": [f"mmd:{networks['teacher']}"], "validation_metrics_samples": 3}
    return runs.train(runs.settings(tmp_path_factory.mktemp("alone"), networks["text_encoder"], **changes))


def train_on_a_rank(values: dict) -> None:
    torch.set_num_threads(1)
    os.environ.pop("ACCELERATE_USE_CPU")  # the launcher's help; torchrun does not give it
    run = runs.start(values)
    whole = [name for name, p in run.trained.named_parameters() if not isinstance(p, DTensor)]
    assert (not whole) == (values["sharding"] != "none")
    assert isinstance(run.nets.transformer.blocks[0], FSDPModule) == (values["sharding"] != "none")
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in run.parameters)
    everything = sum(p.numel() for p in run.parameters)
    train(run)
    if run.accelerator.is_main_process:
        (run.output_dir / "held.json").write_text(json.dumps(held / everything))


# four processes on two cores take most of the time of this file
PARAMS = [
    pytest.param(name, id=name.replace(" ", "-"), marks=[pytest.mark.slow] if LAYOUTS[name][0] > 2 else [])
    for name in LAYOUTS
]


@pytest.fixture(scope="module", params=PARAMS)
def together(request, tmp_path_factory, alone) -> tuple[int, Path]:
    """Number of processes and folder of the same run in one of the layouts."""
    processes, changes = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("together")
    values = alone.cfg.to_dict() | {"output_dir": str(folder), "train_batch_size": 4 // processes} | changes
    debug_launcher(train_on_a_rank, (values,), num_processes=processes)
    return processes, folder


def assert_close(one: dict, other: dict, start: dict) -> None:
    assert one.keys() == other.keys() == start.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=key)  # measured: 1e-7
    assert max((value - start[key]).abs().max() for key, value in one.items()) > 5e-4  # it can fail


def test_losses_norms_and_rates_equal_those_of_one_process(alone, together):
    history = json.loads((together[1] / "training.json").read_text())["history"]
    assert len(history) == len(alone.state.history) == 5
    for entry, wanted in zip(history, alone.state.history):
        assert entry.keys() == wanted.keys()
        assert entry["lr"] == wanted["lr"]
        for name in entry.keys() & {"loss/flow", "loss/alignment", "grad_norm"}:
            assert entry[name] == pytest.approx(wanted[name], rel=1e-4)


@pytest.mark.parametrize("kind", ["weights", "average"])
@pytest.mark.parametrize("network", ["transformer", "text_encoder", "projector"])
def test_weights_and_averages_equal_those_of_one_process(alone, together, network, kind):
    if (network, kind) == ("projector", "average"):
        return  # it has none
    start = runs.saved_weights(alone.output_dir / "checkpoint-1", network, kind)
    one, other = (runs.saved_weights(d / "checkpoint-5", network, kind) for d in (alone.output_dir, together[1]))
    assert_close(one, other, start)


def test_each_process_holds_its_shards(together):
    processes, folder = together
    record = json.loads((folder / "training.json").read_text())
    shards = record["sharded_over"]
    assert record["processes"] == processes
    assert shards == {"none": 1, "full": 2, "hybrid": 2}[record["config"]["sharding"]]
    assert json.loads((folder / "held.json").read_text()) == pytest.approx(1 / shards, rel=0.02)


def test_validation_equals_that_of_one_process(alone, together):
    """Three prompts and three held-out samples do not divide evenly."""
    record = json.loads((together[1] / "training.json").read_text())
    assert [entry["step"] for entry in record["validation_history"]] == [2, 4, 5]
    assert all("validation/MMD (teacher)" in entry for entry in record["validation_history"])
    for entry, wanted in zip(record["validation_history"], alone.state.validation_history):
        assert entry == pytest.approx(wanted, rel=1e-4)
    for step in (2, 4, 5):
        name = f"validation/step-{step:07d}.png"
        one, other = (runs.read_pixels(folder / name) for folder in (alone.output_dir, together[1]))
        assert (one - other).abs().max() <= 1  # of 255; measured: 0
        assert one.std() > 10


def test_pipeline_equals_that_of_one_process(alone, together):
    for name in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (alone.output_dir, together[1]))
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-5)
    pipeline = PRXPixelPipeline.from_pretrained(together[1])
    assert type(pipeline.transformer).__name__ == "PRXTransformer2DModel"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=1, output_type="pt").images.isfinite().all()


def test_checkpoint_contains_only_safetensors_and_json(together):
    files = list((together[1] / "checkpoint-5").rglob("*"))
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert len(shards) == together[0]  # every process has written its part


@pytest.mark.parametrize("weights", ["average", "trained"])
def test_checkpoints_of_any_layout_are_exported(together, tmp_path, weights):
    checkpoint = together[1] / "checkpoint-3"
    export_prx.main(["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path), "--weights", weights])
    saved = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    kinds = {"average": "average", "trained": "weights"}
    runs.assert_same(saved, runs.saved_weights(checkpoint, "transformer", kinds[weights]))
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 3
    assert PRXPixelPipeline.from_pretrained(tmp_path).scheduler.shift == 1.0


def test_export_in_bf16(together, tmp_path):
    checkpoint = together[1] / "checkpoint-3"
    export_prx.main(["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path), "--dtype", "bf16"])
    rounded = {
        name: value.bfloat16() for name, value in runs.saved_weights(checkpoint, "transformer", "average").items()
    }
    runs.assert_same(load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"), rounded)
    assert re.search(r"\| files \| [\d.]+ MB of safetensors, bf16 \|", (tmp_path / "README.md").read_text())
    assert PRXPixelPipeline.from_pretrained(tmp_path).transformer.dtype == torch.float32  # of what is loaded


# Resuming


def resume(values: dict, source: Path, folder: Path, processes: int, **changes) -> dict:
    """Resume step 2 of a run in another layout, and return its final weights."""
    shutil.copytree(source / "checkpoint-2", folder / "checkpoint-2")
    changes |= {"output_dir": str(folder), "train_batch_size": 4 // processes, "resume_from_checkpoint": "latest"}
    values = values | NOT_VALIDATED | changes
    if processes == 1:
        runs.train(values)
    else:
        debug_launcher(train_on_a_rank, (values,), num_processes=processes)
    return runs.saved_state(folder / "checkpoint-5")


def tensors_of(state: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


# from a layout to others; the fixture has the former
OTHER_LAYOUTS = {"none": [(2, "full")], "full": [(1, "none"), (2, "none")], "hybrid": [(2, "full")]}


def test_checkpoint_resumes_with_another_layout(alone, together, tmp_path):
    before = json.loads((together[1] / "training.json").read_text())["config"]["sharding"]
    one, start = (runs.saved_state(alone.output_dir / f"checkpoint-{step}") for step in (5, 2))
    for processes, sharding in OTHER_LAYOUTS[before]:
        folder = tmp_path / f"{processes} {sharding}"
        found = resume(alone.cfg.to_dict(), together[1], folder, processes, sharding=sharding, sharding_size=None)
        tensors = [
            {name: value for name, value in state.items() if ".json" not in name} for state in (one, found, start)
        ]
        assert_close(*tensors)  # moments and averages too
        record = json.loads((folder / "training.json").read_text())
        assert [entry["step"] for entry in record["history"]] == [1, 2, 3, 4, 5]
        assert record["samples_read"] == 20


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, alone) -> Path:
    """Folder of a repetition of the sharded run, for bitwise comparison."""
    folder = tmp_path_factory.mktemp("sharded")
    values = alone.cfg.to_dict() | {"output_dir": str(folder), "train_batch_size": 2, "sharding": "full"}
    debug_launcher(train_on_a_rank, (values | NOT_VALIDATED,), 2)
    return folder


def test_sharded_run_resumes_bitwise(alone, sharded, tmp_path):
    resumed = resume(alone.cfg.to_dict(), sharded, tmp_path, 2, sharding="full")
    runs.assert_same(resumed, runs.saved_state(sharded / "checkpoint-5"))


# Any split of the work


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (1, 4), (2, 2), (4, 1)])
def test_split_of_a_step_does_not_change_it(alone, tmp_path, processes, accumulation):
    changes = {"gradient_accumulation_steps": accumulation, "train_batch_size": 4 // processes // accumulation}
    changes |= {"output_dir": str(tmp_path)} | NOT_VALIDATED
    changes |= {"sharding": "full" if (processes, accumulation) == (2, 2) else "none"}
    values = alone.cfg.to_dict() | changes
    if processes == 1:
        runs.train(values)
    else:
        debug_launcher(train_on_a_rank, (values,), num_processes=processes)
    history = json.loads((tmp_path / "training.json").read_text())["history"]
    for entry, wanted in zip(history, alone.state.history):
        assert entry["lr"] == wanted["lr"]
        for name in entry.keys() & {"loss/flow", "loss/alignment", "grad_norm"}:
            assert entry[name] == pytest.approx(wanted[name], rel=1e-4)
    start, one, other = (
        runs.saved_weights(folder / f"checkpoint-{step}", "transformer")
        for folder, step in ((alone.output_dir, 1), (alone.output_dir, 5), (tmp_path, 5))
    )
    assert_close(one, other, start)


def test_work_is_split_evenly():
    for count in range(1, 8):
        for processes in range(1, 6):
            shares = [split_evenly("abcdefg"[:count], rank, processes) for rank in range(processes)]
            assert len({len(share) for share in shares}) == 1
            assert sorted({place for share in shares for place, _ in share}) == list(range(count))
            assert all("abcdefg"[place] == thing for share in shares for place, thing in share)


# What is refused


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"sharding": "full"}, 1, "`sharding` is full"),
        ({"sharding": "hybrid", "sharding_size": 2}, 1, "`sharding` is hybrid"),
        ({"sharding": "hybrid", "sharding_size": 3}, 8, "`sharding_size` is 3.* 8 processes"),
        ({"sharding": "hybrid", "sharding_size": 8}, 8, "`sharding_size` is 8.*`--sharding full`"),
        ({"sharding": "hybrid"}, 8, "`sharding_size` is 0"),
    ],
)
def test_impossible_sharding_is_rejected(monkeypatch, changes, processes, message):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=message):
        shard_count(runs.config(**changes), processes)


def test_hybrid_sharding_defaults_to_one_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert shard_count(runs.config(sharding="hybrid"), 32) == 8
    assert shard_count(runs.config(sharding="full"), 32) == 32
    assert shard_count(runs.config(), 32) == 1


def test_sharding_with_one_process_is_rejected(networks, tmp_path):
    with pytest.raises(ValueError, match="`sharding` is full"):
        runs.start(runs.settings(tmp_path, networks["text_encoder"], sharding="full"))


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED"])
def test_accelerate_plugins_are_rejected(networks, tmp_path, monkeypatch, plugin):
    """On a CPU, accelerate would silently ignore FSDP."""
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(ValueError, match=f"{plugin}.*`--sharding full`"):
        runs.start(runs.settings(tmp_path, networks["text_encoder"]))


# The launch files


@pytest.mark.parametrize(("name", "processes", "machines"), [("1_gpu", 1, 1), ("8_gpus", 8, 1), ("4x8_gpus", 32, 4)])
def test_launch_files_are_valid(name, processes, machines):
    config = load_config_from_file(str(runs.ROOT / "training" / "accelerate_configs" / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.distributed_type == ("NO" if processes == 1 else "MULTI_GPU")
    assert not config.use_cpu
    assert not config.fsdp_config
