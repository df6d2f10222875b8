"""Tiny training runs for tests: seconds each, in this process, with all parts of a real run."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import tiny
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.evaluation.scorers import RankedPrompt
from diffusers_prx.training import trainer
from diffusers_prx.training.checkpoints import read_tensors
from diffusers_prx.training.folder_lock import HELD_LOCKS
from diffusers_prx.training.networks import Nets, new_text_encoder, train_tokenizer
from diffusers_prx.training.run import Run
from diffusers_prx.training.setup import set_up_run

ROOT = Path(__file__).resolve().parents[1]
CARD_TEMPLATE = ROOT / "model_cards" / "template.md"

TRANSFORMER = {
    "patch_size": 8,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "axes_dim": [8, 8],
    "bottleneck_size": 16,
}
TEXT_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "query_pre_attn_scalar": 8,
}
CAPTIONS = ["a large red circle at the top left on a black background.", "a small blue square on a white background."]


def settings(output_dir: Path | str, text_encoder: Path | str | None = None, **changes: Any) -> dict[str, Any]:
    """Return settings for 4 steps of 4 scenes in pixel space; the saved `text_encoder` is trained too."""
    values = {
        "output_dir": str(output_dir),
        "dataset_name": "scenes",
        "resolution": 32,
        "prediction_type": "x_prediction",
        "transformer_config": TRANSFORMER,
        "text_encoder_name_or_path": None if text_encoder is None else str(text_encoder),
        "train_text_encoder": True,
        "max_sequence_length": 48,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 1,
        "checkpointing_steps": 2,
        "validation_steps": 100,
        "logging_steps": 1,
        "mixed_precision": "no",
        "report_to": "none",
    }
    return values | changes


def config(**changes: Any) -> TrainingConfig:
    """Return a valid configuration for tests that load nothing."""
    return TrainingConfig(**settings("unused", "unused", **changes))


def start(values: dict[str, Any], in_a_new_process: bool = True) -> Run:
    """Everything up to the first step; accelerate keeps its state in the process, so it is forgotten first, and so are
    the folders of earlier runs, as if each were `in_a_new_process`."""
    for lock in list(HELD_LOCKS) if in_a_new_process else ():
        lock.release()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return set_up_run(TrainingConfig(**values), CARD_TEMPLATE)


def train(values: dict[str, Any]) -> Run:
    run = start(values)
    trainer.train(run)
    return run


def save_study(folder: Path, **changes: Any) -> Path:
    """Three arms of seconds: the baseline, one that fails, and one that goes on from the baseline's pipeline."""
    recipe = settings(
        "unused", text_encoder_config=TEXT_ENCODER, tokenizer_vocab_size=300, num_validation_samples=2,
        caption_statistics_samples=0, validation_prompts=CAPTIONS, validation_inference_steps=1,
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    values = {
        "name": "tiny",
        "steps": 3,
        "seeds": [1, 2],
        "recipe": "recipe.yaml",
        "metric": "training/validation_loss",
        "step_shares": {"lr_warmup_steps": 0.3, "validation_steps": 0.3},
        "evaluation": {"scenes": True, "num_prompts": 2, "num_inference_steps": 1},
        "metrics": {"scene_accuracy": {"better": "higher"}, "validation_loss": {"better": "lower"}},
        "arms": {
            "baseline": {},
            "diverging": {"settings": {"learning_rate": 1e30}},
            "tuned": {"starts_from": "baseline", "settings": {"transformer_config": {}, "text_encoder_config": {}}},
        },
        "findings": {
            "divergence": {"text": "A high learning rate is good.", "arm": "diverging", "expected": "better"},
            "tuning": {"text": "More steps help.", "arm": "tuned", "expected": "better"},
        },
    }
    (folder / "study.yaml").write_text(json.dumps(values | changes))
    return folder / "study.yaml"


def save_text_encoder(folder: Path) -> Path:
    """Save an untrained text encoder with a tokenizer for `CAPTIONS`."""
    tokenizer = train_tokenizer(CAPTIONS * 20, 300, 48)
    torch.manual_seed(0)
    new_text_encoder(TEXT_ENCODER, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_teacher(folder: Path, patch_size: int = 4) -> Path:
    """Save a random DINOv2 model of width 16."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**sizes, image_size=16, patch_size=patch_size, num_register_tokens=2)
    )
    tiny.randomize(model)
    model.save_pretrained(folder)
    normalization = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalization))
    return folder


def save_vgg16(folder: Path) -> Path:
    """A random VGG-16 as torchvision stores it, for LPIPS, in a file of 0.2 MB: the filters of a layer are windows of
    one row of random numbers, and the classifier, which LPIPS leaves out, is not there."""
    generator = torch.Generator().manual_seed(0)
    weights, channels, index = {}, 3, 0
    for width in [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512]:
        if width:
            size = 9 * channels
            row = torch.randn(size + width - 1, generator=generator) * (2 / size) ** 0.5  # keeps activations near 1
            weights[f"features.{index}.weight"] = row.unfold(0, size, 1).unflatten(1, (channels, 3, 3))
            weights[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
            channels = width
        index += 2 if width else 1
    torch.save(weights, folder / "vgg16.pth")
    return folder / "vgg16.pth"


def save_pretrained(factory: Any) -> str:
    """Save the pipeline of one training step from scratch, and return its folder."""
    text_encoder, folder = save_text_encoder(factory.mktemp("text_encoder")), factory.mktemp("pretrained")
    train(settings(folder, text_encoder, train_text_encoder=False, max_train_steps=1, lr_warmup_steps=0))
    return str(folder)


def train_on_a_rank(values: dict[str, Any]) -> None:
    """Train in one of several processes, with one thread."""
    torch.set_num_threads(1)
    train(values)


def brightness(images: list[np.ndarray], prompts: list[RankedPrompt]) -> list[float]:
    """Score images by their mean; a scorer of rewards by its name `runs:brightness`."""
    return [image.mean() / 255 for image in images]


def copy_checkpoint(run: Run, step: int, folder: Path) -> None:
    shutil.copytree(run.output_dir / f"checkpoint-{step}", folder / f"checkpoint-{step}")


def read_pixels(file: Path) -> torch.Tensor:
    """Return an image as an array (H, W, 3) of numbers in [0, 255]."""
    return torch.from_numpy(np.array(PIL.Image.open(file))).float()


def saved_state(folder: Path) -> dict[str, Any]:
    """Return all tensors and JSON files of a checkpoint by name."""
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    found: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()
    }
    read_tensors(folder, found)
    files = [*folder.glob("generators-*.json"), folder / "run.json"]
    return found | {file.name: json.loads(file.read_text()) for file in files}


def saved_weights(folder: Path, network: str, kind: str = "weights") -> dict[str, torch.Tensor]:
    """Return the weights of one network in a checkpoint, or their "average"."""
    prefix = f"{kind}.{network}."
    return {name.removeprefix(prefix): value for name, value in saved_state(folder).items() if name.startswith(prefix)}


# depends on the clock, on the folder, and on where a run was interrupted
MAY_DIFFER = {"seconds", "seconds_waiting", "images_per_second", "waiting_share", "settings", "sessions"}


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """Assert that nested values are bitwise equal, except for `MAY_DIFFER`."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - MAY_DIFFER:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for place, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{path}/{place}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def nets(scheduler: Any, vae: Any = None, randomize: bool = True, **changes: Any) -> Nets:
    """Make networks for a training step on the CPU, with changes of the transformer's configuration."""
    tokenizer = train_tokenizer(CAPTIONS * 20, 300, 48)
    torch.manual_seed(0)
    text_encoder = new_text_encoder(TEXT_ENCODER, tokenizer).eval()
    transformer = tiny.PRXTransformer2DModel(
        **TRANSFORMER | {"in_channels": 3 if vae is None else 4, "context_in_dim": 16, "patch_size": 4} | changes
    )
    if randomize:
        tiny.randomize(transformer)
    return Nets(transformer, text_encoder, tokenizer, vae, scheduler, transformer.config["patch_size"])


def add_other_reference(nets: Nets) -> None:
    """Keep a frozen copy of the transformer as the reference of post-training, and change the transformer a little."""
    nets.reference = copy.deepcopy(nets.transformer).requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in nets.transformer.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)


def batch(size: int = 4, resolution: int = 16) -> dict[str, Any]:
    """Make a batch of random images."""
    generator = torch.Generator().manual_seed(5)
    return {
        "pixels_uint8": torch.randint(
            0, 256, (size, 3, resolution, resolution), dtype=torch.uint8, generator=generator
        ),
        "captions": [CAPTIONS[i % 2] + " and a star" * i for i in range(size)],
        "sample_index": [10 + i for i in range(size)],
    }
