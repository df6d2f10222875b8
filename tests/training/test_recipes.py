"""Recipes load, name their source, have the stated size, and have small versions that run."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import runs
import tiny
import zoo
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.models.transformer_prx import PRXTransformer2DModel
from diffusers_prx.training.recipes import load_recipe, parse_config
from image_files import encode, noise

FOLDER = runs.ROOT / "training" / "recipes"
# not of the study
EXAMPLE_NAMES = ("quickstart", "scenes_small", "scenes_turbo", "emoji_small", "emoji_base")
EXAMPLES = [FOLDER / f"{name}.yaml" for name in EXAMPLE_NAMES]
FULL_SCALE = sorted(path for path in FOLDER.glob("*.yaml") if path not in EXAMPLES)
FROM_SCRATCH = [path for path in FULL_SCALE if "pretrained_model_name_or_path" not in load_recipe(path)]
CPU_RECIPES = sorted((FOLDER / "cpu").glob("*.yaml"))
EVERY = [*FULL_SCALE, *EXAMPLES, *CPU_RECIPES]

# what the networks on the Hub are like: channels of the latents, width of the text (from their configurations)
LATENT_CHANNELS = {
    "black-forest-labs/FLUX.1-dev": 16,
    "black-forest-labs/FLUX.2-dev": 128,
    "REPA-E/e2e-flux-vae": 16,
    "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": 32,
    "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08": 768,
    None: 3,
}
TEXT_WIDTH = {"google/t5gemma-2b-2b-ul2": 2304, "Qwen/Qwen3-VL-Embedding-2B": 2048}
# Parameters of the transformer alone, without text encoder and autoencoder: what "1.2B" and "7B" stand for.
BASELINE = 1_170_691_648
PIXEL_1024 = 1_177_215_744
FUSION = 1792 * (2 * 1792) + 1792 + 1792  # a linear layer and the mask token
PARAMETERS = {
    "dc_ae": 1_170_576_928,
    "flux2_ae": 1_170_921_088,
    "qwen3vl": 1_170_232_896,
    "rae": 1_173_215_488,
    "resolution_aware": BASELINE + 2 * (128 * 1792 + 1792 + 1792 * 1792 + 1792),
    "sprint": BASELINE + FUSION,
    "sprint_1024": PIXEL_1024 + FUSION,
    "prx_7b_pixel": 7_003_535_872,
    **dict.fromkeys(["pixel_1024", "lpips", "dino_perceptual", "tread_1024", "speedrun"], PIXEL_1024),
}


def flags(path: Path) -> list[str]:
    """Return flags for data and text encoder that a recipe lacks."""
    recipe, missing = load_recipe(path), []
    if not any(recipe.get(name) for name in ("dataset_name", "train_data_dir")):
        missing += ["--dataset_name", "some/images"]
    text = ("text_encoder_name_or_path", "text_encoder_config", "pretrained_model_name_or_path")
    if not any(recipe.get(name) for name in text):
        missing += ["--text_encoder_name_or_path", "some/encoder"]
    return ["--config", str(path), *missing]


def comment(path: Path) -> str:
    """Return the comment at the head of a recipe as one line."""
    lines = path.read_text().splitlines()
    head = lines[: next(place for place, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in head)


def identity(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


@pytest.mark.parametrize("path", EVERY, ids=identity)
def test_recipes_load_and_name_their_source(path):
    cfg = parse_config(flags(path))
    assert TrainingConfig(**cfg.to_dict()) == cfg
    assert cfg.stage_configs()
    head = comment(path)
    if path in FULL_SCALE:
        assert re.search(r"https://(huggingface\.co|github\.com)/(blog/)?Photoroom", head)
    elif path in CPU_RECIPES:
        version_of = re.match(r"CPU version of (\w+)", head)
        assert version_of is not None
        assert (FOLDER / f"{version_of[1]}.yaml") in FULL_SCALE
        assert path.stem in (version_of[1], "adamw")


def test_recipes_have_different_output_dirs():
    folders = Counter(parse_config(flags(path)).output_dir for path in EVERY)
    assert [folder for folder, count in folders.items() if count > 1] == []
    assert all(folder == f"outputs/{identity(path)}" for path, folder in zip(EVERY, folders))


def test_study_recipes_have_small_versions():
    assert {path.stem for path in FULL_SCALE} <= {path.stem for path in CPU_RECIPES}
    assert len(FULL_SCALE) >= 27


def parameters_of(config: dict[str, Any]) -> int:
    """Count the parameters of a PRX transformer by hand."""
    width, depth, text = config["hidden_size"], config["depth"], config["context_in_dim"]
    values = config["in_channels"] * config["patch_size"] ** 2
    head = width // config["num_heads"]
    mlp = int(width * config["mlp_ratio"])
    attention = 3 * width**2 + 2 * width**2 + width**2 + 3 * head  # image, text, out, norms of q, k and text k
    block = attention + 3 * width * mlp + (width + 1) * 6 * width
    narrow = config.get("bottleneck_size")
    into = (values + 1) * width if narrow is None else (values + 1) * narrow + (narrow + 1) * width
    time = (256 + 1) * width + (width + 1) * width
    resolution = time if config.get("resolution_embeds") else 0
    size_tokens = 2 * ((128 + 1) * width + (width + 1) * width) if config.get("resolution_tokens") else 0
    fusion = (2 * width + 1) * width + width if config.get("fusion_range") else 0
    final = (width + 1) * 2 * width + (width + 1) * values
    return depth * block + into + time + (text + 1) * width + final + resolution + size_tokens + fusion


@pytest.mark.parametrize("path", FROM_SCRATCH, ids=identity)
def test_transformer_has_the_parameter_count_of_its_name(path):
    recipe = load_recipe(path)
    config = {
        "in_channels": LATENT_CHANNELS[recipe["vae_name_or_path"]],
        "context_in_dim": TEXT_WIDTH[recipe["text_encoder_name_or_path"]],
        **recipe["transformer_config"],
    }
    with torch.device("meta"):
        transformer = PRXTransformer2DModel(**config)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert count == parameters_of(config) == PARAMETERS.get(path.stem, BASELINE)
    assert round(count / 1e8) == (70 if path.stem == "prx_7b_pixel" else 12)
    for stage in parse_config(flags(path)).stage_configs():
        assert not stage.route_ratio or stage.route_range[1] <= config["depth"]
        assert not stage.repa_weight or stage.repa_block < config["depth"]
        pixels = config["patch_size"] * {3: 1, 16: 8, 128: 16, 32: 32, 768: 16}[config["in_channels"]]
        assert stage.resolution % pixels == 0


# The CPU recipes, for three steps


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> dict[str, str]:
    """Tiny networks in place of those that small recipes name, by that name."""
    folder = tmp_path_factory.mktemp("tools")
    vaes = {"dc": tiny.vae_dc(), "flux2": zoo.vae_flux2(), "repa_e": tiny.vae_kl(), "rae": zoo.vae_rae(size=32)}
    for name, vae in vaes.items():
        vae.save_pretrained(folder / f"autoencoder_{name}")
    runs.save_teacher(folder / "scenes_teacher")
    found = {f"outputs/tools/{path.name}": str(path) for path in folder.iterdir()}
    shorter = few_steps("quickstart.yaml", folder / "quickstart")
    flags = [part for setting, value in shorter.items() for part in (f"--{setting}", str(value))]
    quickstart = ["--config", str(FOLDER / "quickstart.yaml"), *flags]
    runs.train(parse_config(quickstart).to_dict())
    pairs = {name: [encode(noise(32, 32, row)) for row in range(8)] for name in ("image_win", "image_lose")}
    pq.write_table(pa.table(pairs | {"caption": runs.CAPTIONS * 4}), folder / "pairs.parquet")
    found["outputs/pairs/pairs.parquet"] = str(folder / "pairs.parquet")
    return found | {"outputs/quickstart": str(folder / "quickstart"), "vgg16": str(runs.save_vgg16(folder))}


def few_steps(name: str, output_dir: Path) -> dict[str, Any]:
    """Return settings that shorten a recipe to three steps."""
    recipe = load_recipe(FOLDER / name)
    shorter = {
        "max_train_steps": 3, "train_batch_size": 4, "lr_warmup_steps": 1,
        "num_validation_samples": 2 if recipe.get("objective", "flow") == "flow" else 0,
        "tokenizer_vocab_size": 320, "validation_inference_steps": 2, "report_to": "none", "logging_steps": 1,
        "output_dir": str(output_dir),
    }  # fmt: skip
    if recipe.get("lr_scheduler", "constant") != "constant":
        shorter["lr_decay_steps"] = 1
    if recipe.get("use_ema"):
        shorter["ema_update_every"] = 1
    if "repa_check_steps" in recipe:
        shorter["repa_check_steps"] = 1
    return shorter


def with_tools(value: Any, tools: dict[str, str]) -> Any:
    """Replace the folders in settings and stages by tiny networks."""
    if isinstance(value, dict):
        return {key: with_tools(part, tools) for key, part in value.items()}
    if isinstance(value, list):
        return [with_tools(part, tools) for part in value]
    return tools.get(value, value) if isinstance(value, str) else value


def run_for_three_steps(path: Path, tools: dict[str, str], output_dir: Path) -> None:
    name = str(path.relative_to(FOLDER))
    values = with_tools(parse_config(["--config", str(path)]).to_dict() | few_steps(name, output_dir), tools)
    for stage in values["stages"]:  # what they set is over the rest
        stage |= {"max_train_steps": 3, "train_batch_size": 2, "lr_warmup_steps": 0}
        stage |= {"lr_decay_steps": 1} if "lr_decay_steps" in stage else {}
    if values["lpips_weight"]:
        values["lpips_backbone"] = tools["vgg16"]
    run = runs.train(values)
    assert run.state.step == 3 * max(1, len(values["stages"]))
    assert len(run.state.history) == run.state.step
    assert all(np.isfinite(value) for entry in run.state.history for value in entry.values())
    losses = {name.removeprefix("loss/") for entry in run.state.history for name in entry if name.startswith("loss/")}
    settings = {name for stage in run.cfg.stage_configs() for name, value in stage.to_dict().items() if value}
    weights = {"contrastive": "contrastive_weight", "alignment": "repa_weight", "lpips": "lpips_weight"}
    weights |= {"dino": "dino_weight"}
    of_objective = {"mean_velocity": {"mean_velocity"}, "ladd": {"generator", "discriminator"}}
    of_objective |= {"dpo": {"dpo", "preferred"}}
    main = of_objective.get(run.cfg.objective, {"flow"})
    assert losses == main | {loss for loss, weight in weights.items() if weight in settings}
    pipeline = type(run.nets.pipeline(run.cfg)).from_pretrained(output_dir)
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.config["default_sample_size"]
    images = pipeline("a red circle", num_inference_steps=1, height=size, width=size, output_type="pt",
                      use_resolution_binning=False).images  # fmt: skip
    assert images.shape == (1, 3, size, size)
    assert images.isfinite().all()


# of these nothing has to be made first, and each changes another part of the run
QUICK = ("baseline", "sprint", "prx_7b_pixel")


@pytest.mark.parametrize("name", QUICK)
def test_small_recipes_without_downloads_run(name, tmp_path):
    run_for_three_steps(FOLDER / "cpu" / f"{name}.yaml", {}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in CPU_RECIPES if path.stem not in QUICK], ids=identity)
def test_other_small_recipes_run(path, tools, tmp_path):
    run_for_three_steps(path, tools, tmp_path)


@pytest.mark.parametrize("file", FULL_SCALE, ids=identity)
def test_recipes_clean_captions_as_in_the_study(file):
    """`full` for T5Gemma and `light` for Qwen3-VL."""
    settings = load_recipe(file)
    encoder = settings.get("text_encoder_name_or_path") or ""
    expected = "light" if "Qwen3-VL" in encoder else "full"
    assert settings.get("caption_cleaning", "full") == expected
    assert settings["ema_warmup"] is False


@pytest.mark.parametrize("file", [*EXAMPLES, *CPU_RECIPES], ids=identity)
def test_measured_recipes_keep_their_settings(file):
    settings = load_recipe(file)
    assert settings["caption_cleaning"] == ("full_v1" if settings.get("vae_name_or_path") else "light")
    assert settings.get("ema_warmup", True) is True
