"""Preference tuning (Flow-DPO): the loss against its formula, runs on pairs, exact resume, two processes."""

import json
import math
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate import debug_launcher

import runs
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from diffusers_prx.training.networks import Nets
from diffusers_prx.training.preference_step import preference_step
from diffusers_prx.training.rng import StepRandom

SCHEDULERS = {"velocity": PRXFlowMatchScheduler, "x_prediction": PRXXPredictionScheduler}
BETA = 30.0
PAIRS = {
    "objective": "dpo", "rejected_image_column": "rejected", "dpo_beta": BETA, "train_text_encoder": False,
    "pretrained_model_name_or_path": "unused", "transformer_config": {},
}  # fmt: skip


def make(prediction: str) -> tuple[Nets, TrainingConfig]:
    """Return networks whose reference differs from the trained transformer, and a configuration."""
    cfg = runs.config(prediction_type=prediction, **PAIRS | {"dataset_name": "pairs"})
    nets = runs.nets(SCHEDULERS[prediction](shift=2.0))
    runs.add_other_reference(nets)
    return nets, cfg


def pairs() -> dict:
    batch = runs.batch()
    return batch | {"rejected_uint8": batch["pixels_uint8"].flip(0)}


@pytest.mark.parametrize("prediction", ["velocity", "x_prediction"])
def test_loss_is_that_of_the_formula(prediction):
    """One pair at a time, without padding: -log s(-beta/2 ((e_w - e_w^ref) - (e_l - e_l^ref)))."""
    nets, cfg = make(prediction)
    batch, rng = pairs(), StepRandom(42, 3, [10, 11, 12, 13])
    output = preference_step(batch, nets, cfg, rng)
    wanted, shares = [], []
    for row, caption in enumerate(batch["captions"]):
        text = nets.text_encoder(**nets.tokenizer(caption, return_tensors="pt", return_token_type_ids=False))[0]
        t = nets.scheduler.timesteps_from_uniforms(rng.uniform("timestep", (3,))[row : row + 1])
        noise, gains = rng.normal("noise", (3, 16, 16))[row], []
        for images in (batch["pixels_uint8"], batch["rejected_uint8"]):
            clean = images[row].float() / 127.5 - 1
            noisy = (1 - t) * clean + t * noise
            errors = []
            for transformer in (nets.transformer, nets.reference):
                predicted = transformer(noisy[None], t, text, return_dict=False)[0][0]
                error = predicted - (noise - clean) if prediction == "velocity" else (predicted - clean) / max(t, 0.05)
                errors.append((error**2).mean().item())
            gains.append(errors[0] - errors[1])
        wanted.append(math.log1p(math.exp(0.5 * BETA * (gains[0] - gains[1]))))
        shares.append(gains[0] < gains[1])
    assert max(wanted) - min(wanted) > 0.1  # a tolerance that can fail
    assert output.loss_per_sample.tolist() == pytest.approx(wanted, rel=1e-4)
    assert output.loss.item() == pytest.approx(sum(wanted) / 4, rel=1e-4)
    assert output.losses["preferred"].item() == sum(shares) / 4
    output.loss.backward()
    assert all(weight.grad is None for weight in nets.reference.parameters())


def save_pairs(folder: Path, count: int = 8) -> Path:
    """Save bright preferred and dark rejected pictures with one caption file for both."""
    folder.mkdir()
    rows = []
    for number in range(count):
        for name, level in (("good", 200), ("bad", 40)):
            PIL.Image.new("RGB", (32, 32), (level, level, 10 * number)).save(folder / f"{name}{number}.png")
        names = {"image_file_name": f"good{number}.png", "rejected_file_name": f"bad{number}.png"}
        rows.append(json.dumps(names | {"text": runs.CAPTIONS[number % 2]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    return runs.save_pretrained(tmp_path_factory)


def run_settings(pretrained: str, data: Path, output_dir: Path, **changes) -> dict:
    values = PAIRS | {
        "pretrained_model_name_or_path": pretrained, "dataset_name": str(data), "max_train_steps": 12, "max_crop": 0.0,
        "checkpointing_steps": 4, "lr_warmup_steps": 0, "max_grad_norm": 10.0, "adam_epsilon": 1e-4,
    }  # fmt: skip
    return runs.settings(output_dir, **values | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pretrained):
    data = save_pairs(tmp_path_factory.mktemp("data") / "pairs")
    return runs.train(run_settings(pretrained, data, tmp_path_factory.mktemp("whole"))), data


def test_run_starts_at_the_reference_and_learns_the_preference(whole):
    history = whole[0].state.history
    assert history[0]["loss/dpo"] == pytest.approx(math.log(2), rel=1e-6)
    assert history[-1]["loss/dpo"] < 0.6
    assert history[-1]["loss/preferred"] == 1


def test_run_resumes_bitwise(whole, tmp_path):
    run, _ = whole
    runs.copy_checkpoint(run, 4, tmp_path)
    resumed = runs.train(run.cfg.to_dict() | {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"})
    runs.assert_same(*(runs.saved_state(each.output_dir / "checkpoint-12") for each in (resumed, run)))


def test_two_processes_equal_one(whole, tmp_path):
    run, _ = whole
    debug_launcher(
        runs.train_on_a_rank,
        (run.cfg.to_dict() | {"output_dir": str(tmp_path), "train_batch_size": 2},),
        num_processes=2,
    )
    history = json.loads((tmp_path / "training.json").read_text())["history"]
    for entry, wanted in zip(history, run.state.history, strict=True):
        assert entry["loss/dpo"] == pytest.approx(wanted["loss/dpo"], rel=1e-3)


def test_both_images_of_a_pair_get_the_same_crop(pretrained, tmp_path):
    data = save_pairs(tmp_path / "pairs", 1)
    gradient = PIL.Image.linear_gradient("L").resize((64, 32)).rotate(90).convert("RGB")
    for name in ("good0", "bad0"):
        gradient.save(data / f"{name}.png")
    values = run_settings(pretrained, data, tmp_path / "run", max_crop=0.6, random_flip=True, train_batch_size=1)
    (stage,) = runs.start(values).stages
    batches = [next(iter(stage.training_batches(step, 0, 1, torch.device("cpu")))) for step in range(4)]
    assert all(torch.equal(batch["pixels_uint8"], batch["rejected_uint8"]) for batch in batches)
    assert not torch.equal(batches[0]["pixels_uint8"], batches[1]["pixels_uint8"])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rejected_image_column": None}, "rejected_image_column"),
        ({"streaming": True}, "streaming"),
        ({"dataset_name": "scenes"}, "dataset_name"),
        ({"objective": "flow"}, "dpo_beta"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, name):
    runs.config(**PAIRS | {"dataset_name": "pairs"})
    with pytest.raises(ValueError, match=f"`{name}`"):
        runs.config(**PAIRS | {"dataset_name": "pairs"} | changes)
