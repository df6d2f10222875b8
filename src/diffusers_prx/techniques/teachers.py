"""Vision teachers: frozen vision networks whose features are alignment targets or define perceptual losses.

Shapes in this file: B batch, H x W height and width in pixels, (rows, columns) requested grid of patches, p side of a
patch in pixels, E width of the features.
"""

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel

from ..files import hash_tensors
from ..fingerprints import IGNORED_CONFIG_KEYS, read_normalization

# Parts of transformers' models after the patch features; checkpoints often lack them.
AFTER_FEATURES = ("pooler.", "head.")
# Side in pixels of the image that measures the stride of a convolutional network: a multiple of the usual strides.
PROBE_SIZE = 224


def feature_map(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Return the feature map (B, E, h, w) of a convolutional network of transformers.

    Args:
        model: network whose `last_hidden_state` is a feature map (ResNetModel), or a list of feature maps, of which
            the last is used (TimmWrapperModel with `features_only`).
        pixels: normalized images (B, 3, H, W).

    Raises:
        ValueError: if the model returns something else.
    """
    output = model(pixels).last_hidden_state
    features = output[-1] if isinstance(output, (list, tuple)) else output
    if features.ndim != 4:
        raise ValueError(
            f"{type(model).__name__} has no `patch_size`, and its `last_hidden_state` of shape "
            f"{tuple(features.shape)} is not a feature map (B, E, h, w)."
        )
    return features


class VisionTeacher(nn.Module, ABC):
    """Frozen vision network as a function from images to the features of a grid of patches.

    Weights are frozen and the module stays in evaluation mode, but gradients flow to the pixels. The network runs in
    autocast's type; resizing and normalization are always float32.

    Args:
        model: network of transformers.
        mean: mean of the network's own normalization, per channel, for pixels in [0, 1].
        std: standard deviation of the network's own normalization.
        name: name in messages.

    Attributes:
        patch_size: side p of a patch in pixels.
        hidden_size: width E of the features.

    Example:
        >>> teacher = load_teacher("facebook/dinov2-with-registers-base")
        >>> teacher(pixels_pm1, (16, 16)).shape
        torch.Size([2, 256, 768])
    """

    mean: torch.Tensor
    std: torch.Tensor
    patch_size: int
    hidden_size: int

    def __init__(self, model: PreTrainedModel, mean: Sequence[float], std: Sequence[float], name: str):
        super().__init__()
        self.name = name
        self.model = model.requires_grad_(False)
        for key, values in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "VisionTeacher":
        """Keep the evaluation mode: in training mode DINOv3 shifts its positions at random."""
        return super().train(False)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the features: weights, configuration and normalization."""
        digest = hashlib.blake2b(digest_size=16)
        settings = {
            key: value for key, value in self.model.config.to_diff_dict().items() if key not in IGNORED_CONFIG_KEYS
        }
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        weights = {k: v for k, v in self.model.state_dict().items() if not k.startswith(AFTER_FEATURES)}
        hash_tensors(digest, weights | {"mean": self.mean, "std": self.std})
        return digest.hexdigest()

    def forward(self, pixels_pm1: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return the features of all patches of a grid.

        Args:
            pixels_pm1: images (B, 3, H, W) in [-1, 1]. They are resized, antialiased, to (rows * p, columns * p),
                which distorts them unless the grid has their aspect ratio.
            grid: (rows, columns).

        Returns:
            (B, rows * columns, E), float32, row by row.

        Raises:
            ValueError: for another shape of pixels, or if the network returns another number of features.
        """
        if pixels_pm1.ndim != 4 or pixels_pm1.shape[1] != 3:
            raise ValueError(f"`pixels_pm1` must have the shape (B, 3, H, W), got {tuple(pixels_pm1.shape)}.")
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        pixels = (pixels_pm1.float() + 1) / 2  # (B, 3, H, W) in [0, 1]
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)  # (B, 3, rows * p, columns * p)
        pixels = (pixels - self.mean) / self.std  # (B, 3, rows * p, columns * p)
        return self.features(pixels, grid).float()  # (B, rows * columns, E)

    @abstractmethod
    def features(self, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return the features (B, rows * columns, E) of normalized images (B, 3, rows * p, columns * p)."""


class TransformerTeacher(VisionTeacher):
    """Vision transformer: DINOv2 with or without registers, DINOv3 ViT, ViT, SigLIP, or others with their token order.

    `last_hidden_state` must contain at most one class token, then the registers of the configuration, then the patches
    row by row. The arguments are those of VisionTeacher.

    Raises:
        ValueError: if the model has no square patches.
    """

    def __init__(self, model: PreTrainedModel, mean: Sequence[float], std: Sequence[float], name: str):
        patch_size: Any = getattr(model.config, "patch_size", None)
        sides = set(patch_size) if isinstance(patch_size, (list, tuple)) else {patch_size}
        if len(sides) != 1 or None in sides:
            raise ValueError(
                f"The teacher {name!r} is a {type(model).__name__} with `patch_size` {patch_size}; accepted: vision "
                "transformers with square patches."
            )
        super().__init__(model, mean, std, name)
        self.patch_size = sides.pop()
        self.hidden_size = model.config.hidden_size
        self.registers: int = getattr(model.config, "num_register_tokens", 0)
        # DINOv2 always interpolates its positions and DINOv3 has rotary ones; ViT and SigLIP need the argument
        has_option = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if has_option else {}

    def features(self, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        patches = grid[0] * grid[1]
        tokens = self.model(pixels, **self.options).last_hidden_state  # (B, leading + rows * columns, E)
        leading = tokens.shape[1] - patches
        if leading not in (self.registers, self.registers + 1):
            raise ValueError(
                f"The teacher {self.name!r} returns {tokens.shape[1]} tokens for a grid of {grid[0]} x {grid[1]}; "
                f"expected: {patches} patches after {self.registers} registers and at most one class token."
            )
        return tokens[:, leading:]  # (B, rows * columns, E)


class ConvTeacher(VisionTeacher):
    """Convolutional network; its features are those of one stage, which its configuration selects (see `feature_map`).

    The arguments are those of VisionTeacher.

    Raises:
        ValueError: if the model returns no feature map.
    """

    def __init__(self, model: PreTrainedModel, mean: Sequence[float], std: Sequence[float], name: str):
        super().__init__(model, mean, std, name)
        with torch.no_grad():
            probe = torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=next(model.parameters()).device)
            _, self.hidden_size, side, _ = feature_map(model, probe).shape
        self.patch_size = PROBE_SIZE // side

    def features(self, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        features = feature_map(self.model, pixels)  # (B, E, rows, columns)
        if features.shape[-2:] != grid:
            raise ValueError(
                f"The teacher {self.name!r} returns a feature map of {features.shape[2]} x {features.shape[3]} for a "
                f"grid of {grid[0]} x {grid[1]}."
            )
        return features.flatten(2).transpose(1, 2)  # (B, rows * columns, E)


def build_teacher(model: PreTrainedModel, mean: Sequence[float], std: Sequence[float], name: str) -> VisionTeacher:
    """Build the teacher of a network: a TransformerTeacher if its configuration has `patch_size`, else a ConvTeacher.

    Args:
        model: network of transformers.
        mean: mean of its own normalization, per channel, for pixels in [0, 1].
        std: standard deviation of its own normalization.
        name: name in messages.

    Raises:
        ValueError: if neither class accepts the network.
    """
    has_patches = getattr(model.config, "patch_size", None) is not None
    return (TransformerTeacher if has_patches else ConvTeacher)(model, mean, std, name)


def load_teacher(name_or_path: str | Path, revision: str | None = None) -> VisionTeacher:
    """Load a vision network in float32 on the CPU, or the image half of an image-text model (SigLIP).

    Args:
        name_or_path: folder in transformers' format with a preprocessor_config.json
            (`training/tools/fetch_networks.py` writes one), or Hub id such as `facebook/dinov2-with-registers-large`
            or `facebook/dinov3-vitl16-pretrain-lvd1689m` (gated).
        revision: revision on the Hub.

    Raises:
        ValueError: if the model has neither patches nor a feature map, weights are missing, or the normalization is
            missing.

    Example:
        >>> load_teacher("facebook/dinov2-with-registers-base").hidden_size
        768
    """
    name = str(name_or_path)
    mean, std = read_normalization(name, revision, "teacher")
    model, report = AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32, output_loading_info=True)
    prefix = "vision_model." if hasattr(model, "vision_model") else ""
    keys = [key.removeprefix(prefix) for key in report["missing_keys"] if key.startswith(prefix)]
    missing = sorted(key for key in keys if not key.startswith(AFTER_FEATURES))
    if missing:  # transformers initializes them at random with a warning
        raise ValueError(f"The checkpoint of the teacher {name!r} lacks the weights {missing}.")
    return build_teacher(model.vision_model if prefix else model, mean, std, name)
