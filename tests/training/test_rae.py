"""Training in the latents of a representation autoencoder: it resumes, and has one image size."""

import pytest
import torch

import runs
import zoo
from diffusers_prx import PRXPipeline
from diffusers_prx.training.preflight import meta_networks
from diffusers_prx.training.recipes import parse_config


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Settings of a run in the latents of a tiny autoencoder."""
    folder = tmp_path_factory.mktemp("networks")
    zoo.vae_rae(size=32).save_pretrained(folder / "rae")
    changes = {
        "vae_name_or_path": str(folder / "rae"), "prediction_type": "velocity", "train_text_encoder": False,
        "transformer_config": runs.TRANSFORMER | {"patch_size": 1, "bottleneck_size": None},
        "num_validation_samples": 2, "shift": (64 * 8 * 8 / 4096) ** 0.5,
    }  # fmt: skip
    return runs.settings(folder / "run", runs.save_text_encoder(folder / "text_encoder"), **changes)


def test_a_run_in_its_latents_resumes(values, tmp_path):
    whole = runs.train(values)
    assert whole.nets.transformer.config["in_channels"] == 64
    runs.copy_checkpoint(whole, 2, tmp_path)
    resumed = runs.train(values | {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"})
    one, other = (run.nets.transformer.state_dict() for run in (whole, resumed))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert resumed.state.validation_history == whole.state.validation_history
    pipeline = PRXPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red circle", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)
    assert images.std() > 0.01


@pytest.mark.parametrize("changes", [{"resolution": 64}, {"aspect_ratio_buckets": "computed"}])
def test_other_sizes_are_refused_before_weights_are_loaded(changes, values):
    data = {"dataset_name": None, "train_data_dir": "photos"}
    with pytest.raises(ValueError, match=r"`resolution`.*32 x 32"):
        meta_networks(runs.TrainingConfig(**values | data | changes))


def test_the_planner_knows_the_recipe():
    flags = ["--config", str(runs.ROOT / "training" / "recipes" / "rae.yaml"), "--dataset_name", "photos"]
    cfg = parse_config(flags)
    networks = meta_networks(cfg, tables=True)
    assert networks.transformer.config["in_channels"] == 768
    assert networks.pixels_per_token == 16
    assert cfg.shift == pytest.approx((768 * 16 * 16 / 4096) ** 0.5, abs=0.01)
