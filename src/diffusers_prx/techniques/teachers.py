"""Frozen vision transformers that look at images beside the model: targets of alignment, and perceptual losses.

Shapes in this file: B batch, H x W height and width in pixels, (rows, columns) the grid of patches that is asked for,
p the teacher's patch size, E its width.
"""

import hashlib
import inspect
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from ..files import hash_tensors
from ..fingerprints import NOT_COMPUTED, read_normalization

# Parts of transformers' models that come after the patch features; checkpoints often lack them.
AFTER_FEATURES = ("pooler.", "head.")


class VisionTeacher(nn.Module):
    """A frozen vision transformer of transformers, as a function from images to patch features.

    Weights are frozen and the module stays in evaluation mode, but gradients flow to the pixels. It runs in whatever
    precision the caller's autocast says; resizing and normalizing are float32 always.

    Args:
        model: DINOv2, DINOv2 with registers, DINOv3 ViT, ViT, SigLIP, or another one whose `last_hidden_state` holds
            a class token or none, then the registers of its configuration, then the patches row by row.
        mean, std: the teacher's own normalization, per channel, for pixels in [0, 1].
        name: what it is called in messages.

    Attributes:
        patch_size: side p of a patch in pixels.
        hidden_size: width E of the features.

    Raises:
        ValueError: if the model has no square patches.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: Any, mean: Sequence[float], std: Sequence[float], name: str):
        super().__init__()
        patch_size: Any = getattr(model.config, "patch_size", None)
        sides = set(patch_size) if isinstance(patch_size, (list, tuple)) else {patch_size}
        if len(sides) != 1 or None in sides:
            raise ValueError(
                f"The teacher {name!r} is a {type(model).__name__} with the patch size {patch_size}; accepted are "
                "vision transformers with square patches."
            )
        self.name = name
        self.patch_size: int = sides.pop()
        self.hidden_size: int = model.config.hidden_size
        self.registers: int = getattr(model.config, "num_register_tokens", 0)
        # DINOv2 always interpolates its positions and DINOv3 has rotary ones; ViT and SigLIP have to be asked
        asks = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if asks else {}
        self.model = model.requires_grad_(False)
        for key, values in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "VisionTeacher":
        """Stays in evaluation mode whatever is asked: in training mode DINOv3 moves its positions at random."""
        return super().train(False)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that the features depend on: weights, configuration, normalization. Reads every weight."""
        digest = hashlib.blake2b(digest_size=16)
        settings = {key: value for key, value in self.model.config.to_diff_dict().items() if key not in NOT_COMPUTED}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        weights = {k: v for k, v in self.model.state_dict().items() if not k.startswith(AFTER_FEATURES)}
        hash_tensors(digest, weights | {"mean": self.mean, "std": self.std})
        return digest.hexdigest()

    def forward(self, pixels_pm1: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The features of every patch of the image, cut into a grid of patches.

        Args:
            pixels_pm1: images (B, 3, H, W) in [-1, 1]. They are resized, antialiased, to (rows * p, columns * p): give
                a grid of the image's own aspect ratio, unless a distorted view is wanted.
            grid: (rows, columns).

        Returns:
            (B, rows * columns, E), float32, row by row.

        Raises:
            ValueError: for another shape of pixels, or if the model gives another number of tokens.
        """
        if pixels_pm1.ndim != 4 or pixels_pm1.shape[1] != 3:
            raise ValueError(f"`pixels_pm1` must have the shape (B, 3, H, W), got {tuple(pixels_pm1.shape)}.")
        rows, columns = grid
        size = (rows * self.patch_size, columns * self.patch_size)
        pixels = (pixels_pm1.float() + 1) / 2  # (B, 3, H, W) in [0, 1]
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)  # (B, 3, rows * p, columns * p)
        pixels = (pixels - self.mean) / self.std  # (B, 3, rows * p, columns * p)
        tokens = self.model(pixels, **self.options).last_hidden_state  # (B, leading + rows * columns, E)
        leading = tokens.shape[1] - rows * columns
        if leading not in (self.registers, self.registers + 1):
            raise ValueError(
                f"The teacher {self.name!r} gives {tokens.shape[1]} tokens for a grid of {rows} x {columns}; expected "
                f"are {rows * columns} patches after {self.registers} registers and at most one class token."
            )
        return tokens[:, leading:].float()  # (B, rows * columns, E)


def load_teacher(name_or_path: str | Path, revision: str | None = None) -> VisionTeacher:
    """A vision transformer in float32 on the CPU; of a model of images and text (SigLIP), its image half.

    Args:
        name_or_path: a folder in transformers' format with its preprocessor_config.json, or a Hub id, as
            `facebook/dinov2-with-registers-large` or `facebook/dinov3-vitl16-pretrain-lvd1689m` (gated).
        revision: on the Hub.

    Raises:
        ValueError: if the model is no vision transformer, weights are missing, or its normalization is not stated.
    """
    name = str(name_or_path)
    mean, std = read_normalization(name, revision, "teacher")
    model, report = AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32, output_loading_info=True)
    prefix = "vision_model." if hasattr(model, "vision_model") else ""
    keys = [key.removeprefix(prefix) for key in report["missing_keys"] if key.startswith(prefix)]
    missing = sorted(key for key in keys if not key.startswith(AFTER_FEATURES))
    if missing:  # transformers draws them at random and only warns
        raise ValueError(f"The checkpoint of the teacher {name!r} lacks the weights {missing}.")
    return VisionTeacher(model.vision_model if prefix else model, mean, std, name)
