"""Rewards (DiffusionNFT): the loss against drawings of the pipeline, learning, exact resume, two processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import debug_launcher

import emoji
import runs
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.data.scenes import ScenesDataset
from diffusers_prx.evaluation import scorers
from diffusers_prx.evaluation.scorers import score_scenes
from diffusers_prx.pipelines import PRXPixelPipeline
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from diffusers_prx.training.networks import Nets
from diffusers_prx.training.reward_step import advantages, describe_prompts, reward_step
from diffusers_prx.training.rng import StepRandom

SCHEDULERS = {"velocity": PRXFlowMatchScheduler, "x_prediction": PRXXPredictionScheduler}
BRIGHTNESS = "runs:brightness"
REWARDS = {
    "objective": "nft", "reward_scorers": {BRIGHTNESS: 2.0}, "reward_images_per_prompt": 3, "reward_steps": 2,
    "train_text_encoder": False, "pretrained_model_name_or_path": "unused", "transformer_config": {},
}  # fmt: skip


def make(prediction: str, **changes) -> tuple[Nets, TrainingConfig]:
    cfg = runs.config(prediction_type=prediction, **REWARDS | changes)
    nets = runs.nets(SCHEDULERS[prediction](shift=2.0))
    runs.add_other_reference(nets)
    nets.scorers = {BRIGHTNESS: runs.brightness}
    return nets, cfg


@pytest.mark.parametrize(("prediction", "scale"), [("velocity", 1.0), ("x_prediction", 2.5)])
def test_loss_is_that_of_drawings_of_the_pipeline(prediction, scale):
    """One image at a time: drawn and scored by the pipeline, compared within its caption, then learned."""
    nets, cfg = make(prediction, reward_guidance_scale=scale, reward_kl_weight=0.3)
    batch = runs.batch()
    output = reward_step(batch, nets, cfg, StepRandom(42, 3, [10, 11, 12, 13]))
    draws = StepRandom(42, 3, [3 * index + image for index in (10, 11, 12, 13) for image in range(3)])
    start, noise = (draws.normal(name, (3, 16, 16)) for name in ("reward_start", "noise"))
    pipe = nets.pipeline(cfg)
    pipe.set_progress_bar_config(disable=True)
    wanted, distances, scores = [], [], []
    for row, caption in enumerate(batch["captions"]):
        text = nets.text_encoder(**nets.tokenizer(caption, return_tensors="pt", return_token_type_ids=False))[0]
        errors, rewards = [], []
        for image in range(3 * row, 3 * row + 3):
            call = {"latents": start[image : image + 1], "num_inference_steps": 2, "guidance_scale": scale}
            call |= {"height": 16, "width": 16}
            clean = pipe(caption, **call, output_type="latent").images[0]
            rewards.append(2 * np.asarray(pipe(caption, **call).images[0]).mean() / 255)
            t = nets.scheduler.timesteps_from_uniforms(draws.uniform("timestep", (3,))[image : image + 1])
            noisy = (1 - t) * clean + t * noise[image]
            own, other = (
                network(noisy[None], t, text, return_dict=False)[0][0]
                for network in (nets.transformer, nets.reference)
            )
            divisor = t.clamp_min(0.05) if prediction == "x_prediction" else 1.0
            perfect = clean if prediction == "x_prediction" else noise[image] - clean
            errors.append((((own - perfect) / divisor) ** 2).mean().item())
            distances.append((((own - other) / divisor) ** 2).mean().item())
        better = np.clip((np.asarray(rewards) - np.mean(rewards)) / np.std(rewards), -1, 1)
        wanted.append(float(np.mean(better * errors)))
        scores += rewards
    assert output.loss_per_sample.tolist() == pytest.approx(wanted, rel=2e-3)
    assert output.losses["nft"].item() == pytest.approx(np.mean(wanted), rel=2e-3)
    assert output.losses["kl"].item() == pytest.approx(np.mean(distances), rel=1e-4)
    assert output.loss.item() == pytest.approx(np.mean(wanted) + 0.3 * np.mean(distances), rel=2e-3)
    assert output.losses["reward"].item() == pytest.approx(np.mean(scores), rel=1e-4)
    output.loss.backward()
    assert all(weight.grad is None for weight in nets.reference.parameters())


def test_equal_rewards_teach_nothing():
    nets, cfg = make("x_prediction")
    nets.scorers = {BRIGHTNESS: lambda images, prompts: [0.5] * len(images)}
    reward_step(runs.batch(), nets, cfg, StepRandom(42, 3, [10, 11, 12, 13])).loss.backward()
    assert all(not weight.grad.any() for weight in nets.transformer.parameters() if weight.grad is not None)


def test_advantages_are_those_of_each_caption():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0], [-1.0, -1.0, 8.0]])
    low, high = -(1.5**0.5), 1.5**0.5
    wanted = torch.tensor([[low, 0, high], [0, 0, 0], [-0.5 * 2**0.5, -0.5 * 2**0.5, 2**0.5]]).clamp(-1, 1)
    torch.testing.assert_close(advantages(rewards), wanted)


def test_scenes_are_scored_against_the_image_of_the_data():
    """The scene in the batch's image gets full marks, another one less."""
    cfg = runs.config(**REWARDS | {"reward_scorers": {"scenes": 1.0}})
    scenes = ScenesDataset("easy", 32, 0, split="train", size=4)
    images = [np.asarray(scenes[n]["image"]) for n in range(4)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    prompts = describe_prompts({"captions": ["a", "b", "c", "d"], "pixels_uint8": pixels}, cfg)
    assert score_scenes(images, prompts) == [2.0] * 4
    assert max(score_scenes(images[1:] + images[:1], prompts)) < 1


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    return runs.save_pretrained(tmp_path_factory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pretrained):
    values = REWARDS | {
        "pretrained_model_name_or_path": pretrained, "max_train_steps": 16, "checkpointing_steps": 4,
        "lr_warmup_steps": 0, "learning_rate": 1e-3, "adam_epsilon": 1e-4, "reward_images_per_prompt": 16,
        "reward_kl_weight": 0.1,
    }  # fmt: skip
    return runs.train(runs.settings(tmp_path_factory.mktemp("whole"), **values))


def test_rewards_rise(whole, pretrained):
    """The trained model draws brighter images than the first one does, from the same noise."""
    brightness = []
    for folder in (pretrained, whole.output_dir):
        pipe = PRXPixelPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
        images = pipe(runs.CAPTIONS * 32, **call, generator=torch.Generator().manual_seed(0)).images  # (64, H, W, 3)
        brightness.append(images.mean(axis=(1, 2, 3)))
    gains = brightness[1] - brightness[0]  # (64,)
    assert gains.mean() > 5 * gains.std() / len(gains) ** 0.5


def test_run_learns_from_emoji_that_are_read(pretrained, tmp_path, monkeypatch):
    """The reward of the log is the mean score of what the step has drawn."""
    monkeypatch.setattr(scorers, "REFERENCE_CACHE", tmp_path / "references")
    (tmp_path / "eyes").mkdir()
    name = f"emoji={runs.save_teacher(tmp_path / 'eyes', patch_size=16)}"
    folder = emoji.save_emoji(tmp_path / "emoji")
    changes = {"reward_scorers": {name: 1.0}, "emoji_dir": str(folder), "dataset_name": str(folder / "32")}
    values = REWARDS | {"pretrained_model_name_or_path": pretrained, "max_train_steps": 2, "lr_warmup_steps": 0}
    run = runs.train(runs.settings(tmp_path / "run", **values | changes))
    for entry in run.state.history:
        assert 0 < entry["loss/reward"] < 2
    weights = runs.saved_state(run.output_dir / "checkpoint-2")
    assert any(tensor.abs().sum() > 0 for key, tensor in weights.items() if "exp_avg" in key)


def test_run_resumes_bitwise(whole, tmp_path):
    runs.copy_checkpoint(whole, 8, tmp_path)
    resumed = runs.train(whole.cfg.to_dict() | {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"})
    runs.assert_same(*(runs.saved_state(each.output_dir / "checkpoint-16") for each in (resumed, whole)))


def test_two_processes_equal_one(whole, tmp_path):
    values = {"output_dir": str(tmp_path), "train_batch_size": 2, "max_train_steps": 4}
    debug_launcher(runs.train_on_a_rank, (whole.cfg.to_dict() | values,), num_processes=2)
    history = json.loads((Path(tmp_path) / "training.json").read_text())["history"]
    for entry, wanted in zip(history, whole.state.history):
        assert entry["loss/reward"] == pytest.approx(wanted["loss/reward"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"reward_scorers": {}}, "reward_scorers"),
        ({"reward_scorers": {"scenes": -1.0}}, "reward_scorers"),
        ({"reward_scorers": {"scenes": 1.0}, "scenes_caption": "short"}, "reward_scorers"),
        ({"reward_scorers": {"emoji=eyes": 1.0}}, "reward_scorers"),
        ({"reward_scorers": {"emoji=eyes": 1.0}, "dataset_name": "emoji/64"}, "reward_scorers"),
        ({"reward_scorers": {"emoji=eyes": 1.0}, "emoji_dir": "emoji"}, "reward_scorers"),
        ({"reward_images_per_prompt": 1}, "reward_images_per_prompt"),
        ({"precomputed_dir": "cache"}, "precomputed_dir"),
        ({"objective": "flow"}, "reward_scorers"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, name):
    runs.config(**REWARDS)
    with pytest.raises(ValueError, match=f"`{name}`"):
        runs.config(**REWARDS | changes)
