"""Feature extractors: frozen networks whose features metrics compare.

| name | network | features | metric |
|---|---|---|---|
| `inception` | Inception-v3 of torch-fidelity, 299 pixels | 2048 features of the last pooling | FID |
| `clip` | CLIP ViT-L/14 at 336 pixels | projected image embedding, normalized | CMMD |
| `dinov2` | DINOv2 ViT-L/14 with registers at 518 pixels | class token, normalized | DINO-MMD |
| folder or Hub id | vision transformer of transformers at its own size | as `clip` or `dinov2` | |
| folder or Hub id | convolutional network of transformers at its own size | mean of one stage, normalized | |
| file ending in .pth | weights for `inception` | as `inception` | |

Shapes: B images of H x W pixels, E features each. Every extractor checks its input with `check_images`, so that floats
and other ranges or layouts raise an error instead of giving a wrong number.
"""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection, PreTrainedConfig, PreTrainedModel

from ..files import hash_tensors
from ..fingerprints import fingerprint, read_normalization
from ..techniques.teachers import feature_map

# name -> (Hub id, image size of the study in pixels)
NAMED_EXTRACTORS = {
    "clip": ("openai/clip-vit-large-patch14-336", 336),
    "dinov2": ("facebook/dinov2-with-registers-large", 518),
}
INCEPTION = "inception"
# Start of the SHA-256 of torch-fidelity's weights, which is part of their file name.
INCEPTION_SHA256 = "6726825d"


def check_images(images: Any) -> None:
    """Check that images are uint8 (B, 3, H, W) in [0, 255].

    Raises:
        ValueError: for any other type, dtype or shape.
    """
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"`images` must be a torch tensor of uint8, got {type(images).__name__}.")
    if images.dtype != torch.uint8:
        raise ValueError(
            f"`images` must be uint8 from 0 to 255, got {images.dtype}. Convert floats in [0, 1] with "
            "(images * 255).round().clamp(0, 255).to(torch.uint8)."
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"`images` must have the shape (B, 3, H, W), got {tuple(images.shape)}.")
    if 0 in images.shape:
        raise ValueError(f"`images` is empty, with the shape {tuple(images.shape)}; pass at least one image.")


def wrap_colors(images: torch.Tensor) -> torch.Tensor:
    """Invert images as the study's public code does for FID: uint8 times 255 wraps around to 256 - x (0 stays 0).

    That code declares images in [0, 1] to `FrechetInceptionDistance`, but passes values from 0 to 255.
    """
    check_images(images)
    return (images * 255).to(torch.uint8)


def resize_and_crop(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize the shorter side to `size` (bicubic, antialiased) and crop the center, like CLIP's own processor.

    Args:
        images: images, uint8 (B, 3, H, W).
        size: target size in pixels.

    Returns:
        Images, float32 (B, 3, size, size), rounded to integers in [0, 255].
    """
    height, width = images.shape[2:]
    short = min(height, width)
    shape = int(size * height / short), int(size * width / short)
    pixels = images.float()  # (B, 3, H, W)
    # first the rows, then the columns, each rounded and clamped (bicubic weights overshoot), as in Pillow
    for step in ((height, shape[1]), shape):
        if step != tuple(pixels.shape[2:]):
            pixels = F.interpolate(pixels, step, mode="bicubic", antialias=True).round().clamp(0, 255)  # (B, 3, h, w)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pixels[:, :, top : top + size, left : left + size]  # (B, 3, size, size)


class FeatureExtractor(nn.Module, ABC):
    """A frozen network from uint8 images to features.

    Attributes:
        name: name in the names of metrics.
        source: origin of the weights.
        size: input size of the network in pixels.
        resizing: description of the resizing, for reports.
        num_features: number of features, E.
        fingerprint: hash of everything that the features depend on.
    """

    name: str
    source: str
    size: int
    resizing: str
    num_features: int

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that the features depend on."""

    @abstractmethod
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features, float32 (B, E), of images, uint8 (B, 3, H, W). Raises `ValueError` like `check_images`."""

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Keep evaluation mode, regardless of `mode`."""
        return super().train(False)

    def describe(self) -> dict[str, Any]:
        """Return the facts about the extractor for reports."""
        return {
            "name": self.name,
            "source": self.source,
            "size": self.size,
            "resizing": self.resizing,
            "num_features": self.num_features,
            "fingerprint": self.fingerprint,
        }


class InceptionExtractor(FeatureExtractor):
    """Inception-v3 with the weights of the original FID (torch-fidelity), and antialiased resizing as in torchmetrics.

    Args:
        weights: file weights-inception-2015-12-05-6726825d.pth; None: torch.hub's cache, or a download of 91 MB.

    Raises:
        ValueError: if torch-fidelity or the weights are missing.
    """

    size, num_features = 299, 2048
    resizing = "bilinear, antialiased, to 299 x 299"

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        from torchmetrics.image.fid import _TORCH_FIDELITY_AVAILABLE, NoTrainInceptionV3

        if not _TORCH_FIDELITY_AVAILABLE:
            raise ValueError("`metrics` has `fid`, which needs torch-fidelity. Run pip install -e '.[evaluation]'.")
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"`weights` is {str(weights)!r}, which is not a file.")
        try:
            self.network = NoTrainInceptionV3(
                "inception-v3-compat", ["2048"], None if weights is None else str(weights), antialias=True
            )
        except OSError as error:
            raise ValueError(
                f"Inception's weights could not be downloaded ({error}). On a machine with a network, download "
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-"
                "6726825d.pth, and pass `fid:PATH`."
            ) from error
        except RuntimeError as error:  # from load_state_dict
            raise ValueError(
                f"`weights` {str(weights)!r} is not an Inception-v3 of torch-fidelity: {error}"
            ) from error
        self.requires_grad_(False).eval()
        original = weights is None or _sha256(Path(weights)).startswith(INCEPTION_SHA256)
        self.name = INCEPTION if original else Path(str(weights)).stem
        self.source = "torch-fidelity" if weights is None else str(weights)

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(b"inception-v3-compat", digest_size=16)
        hash_tensors(digest, self.network.state_dict())
        return digest.hexdigest()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images)  # (B, 2048)


class VisionExtractor(FeatureExtractor):
    """A vision network of transformers in float32: one normalized vector per image.

    Args:
        model: network of transformers.
        mean: mean per channel of the model's normalization, for pixels in [0, 1].
        std: standard deviation per channel of the model's normalization, for pixels in [0, 1].
        size: input size in pixels.
        name: name in the names of metrics.
        source: origin of the weights.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        name: str,
        source: str = "memory",
    ):
        super().__init__()
        self.name, self.source, self.size = name, source, size
        self.resizing = f"bicubic, antialiased, shorter side to {size}, center crop"
        self.model = model.requires_grad_(False)
        for key, values in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.eval()

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(f"{fingerprint(self.model)} {self.size}".encode(), digest_size=16)
        hash_tensors(digest, {"mean": self.mean, "std": self.std})
        return digest.hexdigest()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (B, E). Also raises `ValueError` as `select_vector` does."""
        check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            pixels = resize_and_crop(images, self.size) / 255  # (B, 3, size, size) in [0, 1]
            pixels = (pixels - self.mean) / self.std  # (B, 3, size, size)
            return F.normalize(self.select_vector(pixels).float(), dim=-1)  # (B, E)

    @abstractmethod
    def select_vector(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the vectors (B, E) of normalized images (B, 3, size, size), before they are scaled to length 1."""


class TransformerExtractor(VisionExtractor):
    """A vision transformer of transformers.

    The vector is `image_embeds` if the model returns it (CLIPVisionModelWithProjection), else the class token (DINOv2,
    DINOv3, ViT), else `pooler_output` (SigLIP). Arguments are those of VisionExtractor; positions are interpolated if
    `size` differs from that of training.

    Raises:
        ValueError: if the size is not a multiple of the patch size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        name: str,
        source: str = "memory",
    ):
        patch: Any = getattr(model.config, "patch_size", None)
        if not isinstance(patch, int) or size < patch or size % patch:
            raise ValueError(
                f"`size` is {size}, and the patch size of {source!r} ({type(model).__name__}) is {patch}; accepted: "
                "vision transformers with square patches, and multiples of the patch size."
            )
        super().__init__(model, mean, std, size, name, source)
        self.patches = (size // patch) ** 2
        self.registers: int = getattr(model.config, "num_register_tokens", 0)
        has_option = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        is_changed = size != getattr(model.config, "image_size", size)
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if has_option and is_changed else {}
        projected = isinstance(model, CLIPVisionModelWithProjection)
        self.num_features = model.config.projection_dim if projected else model.config.hidden_size

    def select_vector(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raises `ValueError` without embedding, class token and pooled output."""
        output = self.model(pixels, **self.options)
        if (embeds := getattr(output, "image_embeds", None)) is not None:
            return embeds  # (B, E)
        leading = output.last_hidden_state.shape[1] - self.patches
        if leading == self.registers + 1:
            return output.last_hidden_state[:, 0]  # (B, E), the class token
        if leading == self.registers and (pooled := getattr(output, "pooler_output", None)) is not None:
            return pooled  # (B, E)
        raise ValueError(
            f"`metrics` has the encoder {self.source!r}, which returns {output.last_hidden_state.shape[1]} tokens for "
            f"{self.patches} patches and {self.registers} registers; accepted: encoders with a class token, a pooled "
            "output or an image embedding."
        )


class ConvExtractor(VisionExtractor):
    """A convolutional network of transformers.

    The vector is the mean over the feature map of the stage that the network's configuration names (see
    `techniques.teachers.feature_map`). Arguments are those of VisionExtractor.

    Raises:
        ValueError: if the network returns no feature map.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        name: str,
        source: str = "memory",
    ):
        super().__init__(model, mean, std, size, name, source)
        with torch.no_grad():
            self.num_features = feature_map(model, torch.zeros(1, 3, size, size)).shape[1]

    def select_vector(self, pixels: torch.Tensor) -> torch.Tensor:
        return feature_map(self.model, pixels).mean(dim=(2, 3))  # (B, E)


def load_extractor(name_or_path: str | Path, revision: str | None = None) -> FeatureExtractor:
    """Load an extractor of the table above on the CPU.

    Args:
        name_or_path: name, file or Hub id of the table, or folder in transformers' format with
            preprocessor_config.json.
        revision: revision on the Hub.

    Raises:
        OSError: if the folder or repository does not exist.
        ValueError: if it is neither a vision transformer nor a convolutional network, or weights, normalization or
            size are missing.

    Example:
        >>> from diffusers_prx.evaluation.extractors import load_extractor
        >>> load_extractor("dinov2").num_features  # 1024
    """
    name = str(name_or_path)
    if name == INCEPTION:
        return InceptionExtractor()
    if name.endswith(".pth"):
        return InceptionExtractor(name)
    source, size = NAMED_EXTRACTORS.get(name, (name, None))
    mean, std = read_normalization(source, revision, "encoder")
    config = AutoConfig.from_pretrained(source, revision=revision)
    # AutoModel would load a CLIPVisionModel and drop the projection
    cls: Any = CLIPVisionModelWithProjection if config.model_type in ("clip", "clip_vision_model") else AutoModel
    model, report = cls.from_pretrained(
        source, revision=revision, dtype=torch.float32, output_loading_info=True, **projection_width(config)
    )
    is_siglip = cls is AutoModel and hasattr(model, "vision_model")
    prefix = "vision_model." if is_siglip else ""
    keys = [key for key in report["missing_keys"] if key.startswith(prefix)]
    # the pooler after a class token is not used
    missing = sorted(key for key in keys if not key.startswith("pooler."))
    if missing:  # transformers initializes them at random and only warns
        raise ValueError(f"`metrics` has the encoder {source!r}, whose checkpoint lacks the weights {missing}.")
    model = model.vision_model if is_siglip else model
    if size is None:
        size = getattr(model.config, "image_size", None)
    if not isinstance(size, int):
        raise ValueError(f"`metrics` has the encoder {source!r} with `image_size` {size}; accepted: one integer.")
    label = name if name in NAMED_EXTRACTORS or not Path(name).is_dir() else Path(name).resolve().name
    has_patches = getattr(model.config, "patch_size", None) is not None
    return (TransformerExtractor if has_patches else ConvExtractor)(model, mean, std, size, label, source)


def projection_width(config: PreTrainedConfig) -> dict[str, int]:
    """Return the projection width of a whole CLIP, which its parts do not have in their configurations."""
    return {"projection_dim": config.projection_dim} if config.model_type == "clip" else {}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
