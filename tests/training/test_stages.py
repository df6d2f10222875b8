"""Stages with different sizes, data, batches, schedules and techniques, and resuming at any step."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from safetensors.torch import load_file, save_file

import runs
from diffusers_prx import PRXPixelPipeline
from diffusers_prx.data.scenes import ScenesDataset
from diffusers_prx.schedulers import PRXXPredictionScheduler
from diffusers_prx.training.rng import StepRandom
from diffusers_prx.training.run import Run
from diffusers_prx.training.step import train_step
from diffusers_prx.training.trainer import train

BORDER, END = 3, 7
STAGES = [
    {"max_train_steps": 3, "lr_warmup_steps": 2, "route_ratio": 0.5, "route_range": [0, 1]},
    {
        "max_train_steps": 4, "resolution": 64, "train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 5e-4, "lr_scheduler": "linear", "lr_warmup_steps": 1, "lr_decay_steps": 2,
        "contrastive_weight": 0.05, "scenes_level": "medium", "caption_dropout": 0.0,
    },
]  # fmt: skip
RUN = {
    "stages": STAGES, "optimizer": "muon", "use_ema": True, "ema_update_every": 1, "ema_decay": 0.3,
    "caption_dropout": 0.3, "shift": 1.5, "shift_base_resolution": 32, "checkpointing_steps": 1,
    "num_validation_samples": 2, "validation_prompts": ["a red circle"], "validation_inference_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    return runs.save_text_encoder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text_encoder) -> Run:
    """Finished run with two stages."""
    return runs.train(runs.settings(tmp_path_factory.mktemp("whole"), text_encoder, **RUN))


def continued(run: Run, folder: Path, step: int, **changes) -> dict:
    """Return settings that resume a checkpoint of a run in another folder."""
    runs.copy_checkpoint(run, step, folder)
    return run.cfg.to_dict() | {"output_dir": str(folder), "resume_from_checkpoint": "latest"} | changes


def changed(number: int, **changes) -> list[dict]:
    """Return the stages with changes in one of them."""
    return [stage | (changes if place == number else {}) for place, stage in enumerate(STAGES)]


# What a stage is


def test_stages_train_with_their_settings(whole):
    history = {entry["step"]: entry for entry in whole.state.history}
    assert list(history) == list(range(1, END + 1))
    assert [step for step, entry in history.items() if "loss/contrastive" in entry] == [4, 5, 6, 7]
    assert whole.state.samples_read == 3 * 4 + 4 * 2 * 2
    assert [(stage.first_step, stage.stop_step) for stage in whole.stages] == [(0, 3), (3, 7)]
    assert all(np.isfinite(value) for entry in history.values() for value in entry.values())
    assert [entry["step"] for entry in whole.state.validation_history] == [3, 7]  # at the end of each


def test_each_stage_has_its_own_learning_rate_schedule(whole):
    """Log entries contain the rate of the next step."""
    rates = [entry["lr"] for entry in whole.state.history]
    first, second = 1e-3, 5e-4
    assert rates == pytest.approx([0.5 * first, first, first, second, second, 0.5 * second, 0.0])
    weights = [
        runs.saved_weights(whole.output_dir / f"checkpoint-{step}", "transformer") for step in range(1, END + 1)
    ]
    still = [all(torch.equal(a[key], b[key]) for key in a) for a, b in itertools.pairwise(weights)]
    # the first step of a warm-up has the rate 0, also that of the second stage
    assert still == [False, False, True, False, False, False]


def test_stage_starts_with_its_first_samples(whole, tmp_path):
    """The first step of the second stage, computed by hand: four scenes in two micro-batches."""
    run = runs.start(continued(whole, tmp_path, BORDER))
    nets = dataclasses.replace(run.nets, scheduler=PRXXPredictionScheduler(shift=3.0))  # 1.5 at 32 pixels, at 64
    scenes = ScenesDataset(split="train", level="medium", resolution=64, seed=42)
    cfg = dataclasses.replace(run.cfg, stages=[], caption_dropout=0.0, resolution=64, contrastive_weight=0.05)
    losses = []
    for index in ([0, 1], [2, 3]):
        samples = [scenes[place] for place in index]
        batch = {
            "pixels_uint8": torch.stack([torch.from_numpy(np.array(s["image"])).permute(2, 0, 1) for s in samples]),
            "captions": [s["caption"] for s in samples],
        }
        with torch.no_grad():
            losses.append(train_step(batch, nets, cfg, StepRandom(42, BORDER, index)).losses["flow"].item())
    assert whole.state.history[BORDER]["loss/flow"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert abs(losses[0] / losses[1] - 1) > 1e-3


def test_pipeline_has_size_and_shift_of_the_last_stage(whole):
    pipeline = PRXPixelPipeline.from_pretrained(whole.output_dir)
    assert pipeline.config["default_sample_size"] == 64
    assert pipeline.scheduler.shift == 3.0
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 64, 64)
    card = (whole.output_dir / "README.md").read_text()
    assert "| resolution | 64 px |" in card
    assert "| steps | 7, batch 4 |" in card
    record = json.loads((whole.output_dir / "training.json").read_text())
    assert record["config"]["stages"] == STAGES
    assert record["steps"] == END


def test_single_stage_equals_a_run_without_stages(whole, tmp_path, text_encoder):
    """The first stage as a run of its own."""
    alone = {name: value for name, value in RUN.items() if name != "stages"} | STAGES[0]
    run = runs.train(runs.settings(tmp_path, text_encoder, **alone))
    one, other = (runs.saved_state(r.output_dir / f"checkpoint-{BORDER}") for r in (whole, run))
    for state in (one, other):
        del state["run.json"]["state"]["stages"]
    runs.assert_same(other, one)


# Resuming


@pytest.mark.parametrize("step", [1, 2, BORDER, 4, 6])
def test_stages_resume_bitwise(whole, tmp_path, step):
    resumed = runs.train(continued(whole, tmp_path, step))
    one, other = (runs.saved_state(run.output_dir / f"checkpoint-{END}") for run in (whole, resumed))
    assert {name.partition(".")[0] for name in one} == {"weights", "optimizer", "average", "generators-0", "run"}
    runs.assert_same(other, one)
    pipelines = [load_file(r.output_dir / "transformer/diffusion_pytorch_model.safetensors") for r in (whole, resumed)]
    runs.assert_same(*pipelines)


@pytest.mark.parametrize("step", [BORDER, END])
def test_signal_in_the_last_step_of_a_stage_keeps_its_validation(whole, tmp_path, step):
    run = runs.start(continued(whole, tmp_path, step - 1))
    run.nets.transformer.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(run)
    assert run.state.step == step
    assert step not in [entry["step"] for entry in run.state.validation_history]
    resumed = runs.train(run.cfg.to_dict())
    assert resumed.state.validation_history == whole.state.validation_history
    assert [path.name for path in sorted((tmp_path / "validation").iterdir())][-1] == f"step-{END:07d}.png"


def test_finished_run_is_exported_again(whole, tmp_path):
    runs.train(continued(whole, tmp_path, END))
    pipeline = PRXPixelPipeline.from_pretrained(tmp_path)
    assert (pipeline.config["default_sample_size"], pipeline.scheduler.shift) == (64, 3.0)


@pytest.mark.parametrize(
    ("step", "stages"),
    [
        (2, changed(1, train_batch_size=3, max_train_steps=3)),
        (2, changed(0, max_train_steps=2)),  # what has begun may end now
        (2, [*STAGES, {"max_train_steps": 1}]),
        (BORDER, changed(1, gradient_accumulation_steps=1, resolution=48)),
        (BORDER, STAGES[:1]),
        (5, changed(1, max_train_steps=3)),
    ],
)
def test_stages_that_have_not_begun_may_change(whole, tmp_path, step, stages):
    run = runs.start(continued(whole, tmp_path, step, stages=stages))
    assert run.state.step == step
    assert run.state.stages == [stage.record(1) for stage in run.stages]


@pytest.mark.parametrize(
    ("step", "stages", "message"),
    [
        (2, changed(0, train_batch_size=3), "`global_batch_size of stage 0` is 3.* 4"),
        (2, changed(0, max_train_steps=1, lr_warmup_steps=0)[:1], "step 2.*`max_train_steps`.* 1"),
        (4, changed(0, max_train_steps=9), "`stop_step of stage 0` is 9.* 3"),
        (4, changed(1, gradient_accumulation_steps=1), "`global_batch_size of stage 1` is 2.* 4"),
        (END, STAGES[:1], "step 7.*`max_train_steps`.* 3"),
    ],
)
def test_stages_that_have_begun_must_not_change(whole, tmp_path, step, stages, message):
    with pytest.raises(ValueError, match=message):
        runs.start(continued(whole, tmp_path, step, stages=stages))


# Techniques of single stages


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> list[str]:
    return [str(runs.save_teacher(tmp_path_factory.mktemp(name))) for name in ("one", "other")]


def aligned(teacher: str, **changes) -> dict:
    values = {"repa_weight": 0.5, "repa_teacher": teacher, "repa_block": 0, "repa_projector": "conv"}
    return values | {"max_train_steps": 2, "lr_warmup_steps": 0} | changes


def test_alignment_in_one_of_two_stages(text_encoder, teachers, tmp_path):
    stages = [aligned(teachers[0]), {"max_train_steps": 2, "lr_warmup_steps": 0, "dino_weight": 0.01,
                                     "dino_teacher": teachers[0], "dino_size": 16}]  # fmt: skip
    values = runs.settings(tmp_path / "whole", text_encoder, stages=stages, checkpointing_steps=1)
    run = runs.start(values)
    assert run.nets.dino is run.nets.teacher  # one network for both
    calls: list[int] = []
    run.nets.projector.register_forward_pre_hook(lambda *_: calls.append(run.state.step))
    train(run)
    assert calls == [0, 1]
    names = [{name for name in entry if name.startswith("loss/")} for entry in run.state.history]
    assert names == [{"loss/flow", "loss/alignment"}] * 2 + [{"loss/flow", "loss/dino"}] * 2
    for step in (1, 3):
        resumed = runs.train(continued(run, tmp_path / str(step), step))
        runs.assert_same(*(runs.saved_state(r.output_dir / "checkpoint-4") for r in (run, resumed)))


@pytest.mark.parametrize("before", [False, True])
def test_later_stages_cannot_change_the_trainable_networks(text_encoder, teachers, tmp_path, before):
    """The optimizer and checkpoints contain the projector from the beginning."""
    plain = {"max_train_steps": 2, "lr_warmup_steps": 0}
    one, other = ([plain, plain], [plain, aligned(teachers[0])])[:: -1 if before else 1]
    run = runs.train(runs.settings(tmp_path / "whole", text_encoder, stages=one, checkpointing_steps=1))
    message = r"`trained_parameters` is \{'transformer': \d+.*\}, but .* \{'transformer': \d+"
    with pytest.raises(ValueError, match=message) as error:
        runs.start(continued(run, tmp_path / "resumed", 1, stages=other))
    assert str(error.value).count("'projector': ") == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"train_text_encoder": False}, "train_text_encoder"),
        ({"optimizer": "adamw"}, "optimizer"),
        ({"transformer_config": runs.TRANSFORMER | {"depth": 3}}, "trained_parameters"),
        ({"transformer_config": runs.TRANSFORMER | {"theta": 100}}, "transformer"),
    ],
)
def test_resume_rejects_another_network_or_optimizer(whole, tmp_path, changes, name):
    with pytest.raises(ValueError, match=f"^`{name}` is"):
        runs.start(continued(whole, tmp_path, 2, **changes))


def test_resume_rejects_another_frozen_network(text_encoder, tmp_path):
    values = {"train_text_encoder": False, "max_train_steps": 2, "checkpointing_steps": 1}
    run = runs.train(runs.settings(tmp_path / "whole", text_encoder, **values))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(text_encoder, elsewhere)
    runs.start(continued(run, tmp_path / "moved", 1, text_encoder_name_or_path=str(elsewhere)))
    weights = load_file(elsewhere / "model.safetensors")
    weights[next(iter(weights))] += 1e-3
    save_file(weights, elsewhere / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="`frozen_networks`"):
        runs.start(continued(run, tmp_path / "other", 1, text_encoder_name_or_path=str(elsewhere)))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"repa_teacher": "other"}, "repa_teacher"),
        ({"repa_until_step": 3}, "repa_until_step"),
    ],
)
def test_stages_must_share_alignment_settings(text_encoder, teachers, tmp_path, changes, name):
    changes = {key: teachers[1] if value == "other" else value for key, value in changes.items()}
    stages = [aligned(teachers[0]), aligned(teachers[0], **changes)]
    with pytest.raises(ValueError, match=f"`{name}`"):
        runs.start(runs.settings(tmp_path, text_encoder, stages=stages))


def test_every_stage_must_fit_the_networks(text_encoder, teachers, tmp_path):
    dino = {"max_train_steps": 2, "dino_weight": 0.01, "dino_teacher": teachers[0]}
    for stages, message in (
        (
            [{"max_train_steps": 2}, {"resolution": 36}],
            "`resolution` must be a multiple of 8 for these networks, got 36",
        ),
        ([dino | {"dino_size": 16}, dino | {"dino_size": 18}], "`dino_size`.* 4.* 18"),
        (
            [{"max_train_steps": 2}, {"route_ratio": 0.5}],
            r"`route_range` is \[2, 13\], but the transformer has 2 blocks",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            runs.start(runs.settings(tmp_path, text_encoder, stages=stages))


def _train_in_two_processes(values: dict) -> None:
    torch.set_num_threads(1)
    runs.train(values)


def test_sprint_and_alignment_on_two_processes_equal_one(text_encoder, teachers, tmp_path):
    """Also after the end of alignment and routing: no process waits for unused gradients."""
    dense = {"max_train_steps": 3}
    sprint = {
        "transformer_config": runs.TRANSFORMER | {"fusion_range": [0, 1]}, "route_range": [0, 1],
        "max_grad_norm": 10.0, "lr_warmup_steps": 0, "adam_epsilon": 1e-4, "learning_rate": 1e-2,
        "stages": [aligned(teachers[0], repa_projector="attention", repa_check_steps=1, route_ratio=0.75), dense],
    }  # fmt: skip
    one = runs.train(runs.settings(tmp_path / "one", text_encoder, **sprint))
    values = runs.settings(tmp_path / "two", text_encoder, **sprint | {"train_batch_size": 2})
    debug_launcher(_train_in_two_processes, (values,), num_processes=2)
    history = json.loads((tmp_path / "two" / "training.json").read_text())["history"]
    assert len(history) == len(one.state.history) == 5
    for entry, wanted in zip(history, one.state.history):
        assert entry.keys() == wanted.keys()
        for name in entry.keys() & {"loss/flow", "loss/alignment", "grad_norm"}:
            assert entry[name] == pytest.approx(wanted[name], rel=1e-3)
    before, *after = (
        runs.saved_weights(tmp_path / name / f"checkpoint-{step}", "transformer")
        for name, step in (("one", 2), ("one", 5), ("two", 5))
    )
    for key in before:
        torch.testing.assert_close(after[1][key], after[0][key], rtol=1e-3, atol=1e-4)
    moved = {key: (after[0][key] - before[key]).abs().max().item() for key in before}
    assert max(moved.values()) > 3e-3  # a tolerance that can fail
    assert moved["fusion.mask_token"] == 0  # without a route it is in no loss
