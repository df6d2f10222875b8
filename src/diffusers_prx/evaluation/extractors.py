"""Networks that turn images into the features that metrics compare.

| name | network | features | what it is for |
|---|---|---|---|
| `inception` | Inception-v3 of torch-fidelity, 299 pixels | the 2048 of the last pooling | FID |
| `clip` | CLIP ViT-L/14 at 336 pixels | the projected image embedding, of unit length | CMMD |
| `dinov2` | DINOv2 ViT-L/14 with registers at 518 pixels | the class token, of unit length | DINO-MMD |
| folder or Hub id | a vision transformer of transformers at its own size | as `clip` or `dinov2` | |
| file ending in .pth | weights for `inception` | as `inception` | |

B images of H x W pixels in a batch, E features of each. Every extractor takes what its `forward` is given through
`check_images`, so that floats, or images in another range or layout, end in an error and not in a number.
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
from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

from ..files import hash_tensors
from ..fingerprints import fingerprint, read_normalization

# name -> Hub id, side in pixels at which the study looks at images
NAMED = {
    "clip": ("openai/clip-vit-large-patch14-336", 336),
    "dinov2": ("facebook/dinov2-with-registers-large", 518),
}
INCEPTION = "inception"
# how the SHA-256 of torch-fidelity's weights begins, as the name of their file says
INCEPTION_SHA256 = "6726825d"


def check_images(images: Any) -> None:
    """The one door for images: uint8 (B, 3, H, W), 0 to 255.

    Raises:
        ValueError: for anything else; the message says what came.
    """
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"`images` must be a torch tensor of uint8, got {type(images).__name__}.")
    if images.dtype != torch.uint8:
        raise ValueError(
            f"`images` must be uint8 from 0 to 255, got {images.dtype}. Of floats in [0, 1] make "
            "(images * 255).round().clamp(0, 255).to(torch.uint8)."
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"`images` must have the shape (B, 3, H, W), got {tuple(images.shape)}.")
    if 0 in images.shape:
        raise ValueError(f"`images` has the shape {tuple(images.shape)}: there is no pixel in it.")


def wrap_colors(images: torch.Tensor) -> torch.Tensor:
    """What the study's public code gives to Inception: uint8 images times 255, which wraps to 256 - x (0 stays 0).

    It tells `FrechetInceptionDistance` that images are in [0, 1], and gives it 0 to 255: they come out inverted.
    """
    check_images(images)
    return (images * 255).to(torch.uint8)


def resize_and_crop(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize images so that the shorter side is `size`, antialiased and bicubic, and cut out the middle.

    As CLIP's own processor does: uint8 in, and rounded to whole values again.

    Args:
        images: uint8 (B, 3, H, W).
        size: in pixels.

    Returns:
        (B, 3, size, size) float32, whole numbers from 0 to 255.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    shape = int(size * height / short), int(size * width / short)
    pixels = images.float()  # (B, 3, H, W)
    # First the rows, then the columns, each rounded and clamped (bicubic weights overshoot), as in Pillow.
    for step in ((height, shape[1]), shape):
        if step != tuple(pixels.shape[2:]):
            pixels = F.interpolate(pixels, step, mode="bicubic", antialias=True).round().clamp(0, 255)  # (B, 3, h, w)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pixels[:, :, top : top + size, left : left + size]  # (B, 3, size, size)


class FeatureExtractor(nn.Module, ABC):
    """A frozen network from uint8 images to features, and all that a report has to say of it.

    Attributes:
        name: what stands in the names of metrics.
        source: where the weights are from.
        size: side in pixels of what the network sees.
        resizing: how images get there, in words.
        num_features: E.
        fingerprint: a hash of all that the features depend on.
    """

    name: str
    source: str
    size: int
    resizing: str
    num_features: int

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that the features depend on."""

    @abstractmethod
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, E), float32, of uint8 images (B, 3, H, W). Raises `ValueError` as `check_images` does."""

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    def describe(self) -> dict[str, Any]:
        """For reports."""
        return {
            "name": self.name,
            "source": self.source,
            "size": self.size,
            "resizing": self.resizing,
            "num_features": self.num_features,
            "fingerprint": self.fingerprint,
        }


class InceptionExtractor(FeatureExtractor):
    """Inception-v3 with the weights of the original FID, by torch-fidelity; resized as torchmetrics does, antialiased.

    Args:
        weights: the file weights-inception-2015-12-05-6726825d.pth; None: torch.hub's cache, or a download of 91 MB.

    Raises:
        ValueError: without torch-fidelity, or if the weights are not there.
    """

    size, num_features = 299, 2048
    resizing = "bilinear, antialiased, to 299 x 299"

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        from torchmetrics.image.fid import _TORCH_FIDELITY_AVAILABLE, NoTrainInceptionV3

        if not _TORCH_FIDELITY_AVAILABLE:
            raise ValueError("FID with Inception needs torch-fidelity: pip install -e '.[evaluation]'.")
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"`weights` is {str(weights)!r}, which is no file.")
        try:
            self.network = NoTrainInceptionV3(
                "inception-v3-compat", ["2048"], None if weights is None else str(weights), antialias=True
            )
        except OSError as error:
            raise ValueError(
                f"Inception's weights could not be downloaded ({error}). On a machine with a network get "
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-"
                "6726825d.pth, and give its path in place of `inception`."
            ) from error
        except RuntimeError as error:  # what load_state_dict raises
            raise ValueError(f"`weights` {str(weights)!r} holds no Inception-v3 of torch-fidelity: {error}") from error
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
    """A vision transformer of transformers, in float32: one vector of unit length per image.

    Args:
        model: one that gives `image_embeds` (CLIPVisionModelWithProjection), which are taken; or one whose
            `last_hidden_state` begins with a class token (DINOv2, DINOv3, ViT), which is taken; or one without class
            token but with a `pooler_output` (the vision half of SigLIP).
        mean, std: the model's own normalization, per channel, for pixels in [0, 1].
        size: side in pixels of what it is given; more or less than in training, its positions are interpolated.
        name: what stands in the names of metrics.
        source: where it is from.

    Raises:
        ValueError: if the size is no multiple of the model's patches.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: Any, mean: Sequence[float], std: Sequence[float], size: int, name: str, source: str = "memory"
    ):
        super().__init__()
        patch: Any = getattr(model.config, "patch_size", None)
        if not isinstance(patch, int) or size < patch or size % patch:
            raise ValueError(
                f"`size` is {size}, the patches of {source!r} ({type(model).__name__}) have {patch} pixels: accepted "
                "are vision transformers with square patches, and multiples of them."
            )
        self.name, self.source, self.size = name, source, size
        self.resizing = f"bicubic, antialiased, shorter side to {size}, center crop"
        self.patches = (size // patch) ** 2
        self.registers: int = getattr(model.config, "num_register_tokens", 0)
        asks = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        changed = size != getattr(model.config, "image_size", size)
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if asks and changed else {}
        self.model = model.requires_grad_(False)
        for key, values in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)
        projected = isinstance(model, CLIPVisionModelWithProjection)
        self.num_features = model.config.projection_dim if projected else model.config.hidden_size
        self.eval()

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(f"{fingerprint(self.model)} {self.size}".encode(), digest_size=16)
        hash_tensors(digest, {"mean": self.mean, "std": self.std})
        return digest.hexdigest()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """As above; raises `ValueError` also if the model has neither embedding, class token nor pooled output."""
        check_images(images)
        with torch.autocast(images.device.type, enabled=False):
            pixels = resize_and_crop(images, self.size) / 255  # (B, 3, size, size) in [0, 1]
            pixels = (pixels - self.mean) / self.std  # (B, 3, size, size)
            features = self._pick(self.model(pixels, **self.options))  # (B, E)
            return F.normalize(features.float(), dim=-1)  # (B, E)

    def _pick(self, output: Any) -> torch.Tensor:
        if (embeds := getattr(output, "image_embeds", None)) is not None:
            return embeds  # (B, E)
        leading = output.last_hidden_state.shape[1] - self.patches
        if leading == self.registers + 1:
            return output.last_hidden_state[:, 0]  # (B, E), the class token
        if leading == self.registers and (pooled := getattr(output, "pooler_output", None)) is not None:
            return pooled  # (B, E)
        raise ValueError(
            f"The encoder {self.source!r} gives {output.last_hidden_state.shape[1]} tokens for {self.patches} patches "
            f"and {self.registers} registers, and nothing that stands for the whole image."
        )


def load_extractor(name_or_path: str | Path, revision: str | None = None) -> FeatureExtractor:
    """An extractor by the table above, on the CPU.

    Args:
        name_or_path: see there; a folder is in transformers' format, with its preprocessor_config.json.
        revision: on the Hub.

    Raises:
        OSError: if there is no such folder or repository.
        ValueError: if it is no vision transformer, weights are missing, or its normalization is not stated.
    """
    name = str(name_or_path)
    if name == INCEPTION:
        return InceptionExtractor()
    if name.endswith(".pth"):
        return InceptionExtractor(name)
    source, size = NAMED.get(name, (name, None))
    mean, std = read_normalization(source, revision, "encoder")
    config = AutoConfig.from_pretrained(source, revision=revision)
    # AutoModel would make a CLIPVisionModel of it and drop the projection
    cls: Any = CLIPVisionModelWithProjection if config.model_type in ("clip", "clip_vision_model") else AutoModel
    model, report = cls.from_pretrained(
        source, revision=revision, dtype=torch.float32, output_loading_info=True, **projection_width(config)
    )
    siglip = cls is AutoModel and hasattr(model, "vision_model")
    prefix = "vision_model." if siglip else ""
    keys = [key for key in report["missing_keys"] if key.startswith(prefix)]
    missing = sorted(
        key for key in keys if not key.startswith("pooler.")
    )  # the pooler after a class token is not used
    if missing:  # transformers draws them at random and only warns
        raise ValueError(f"The checkpoint of the encoder {source!r} lacks the weights {missing}.")
    model = model.vision_model if siglip else model
    if size is None:
        size = getattr(model.config, "image_size", None)
    if not isinstance(size, int):
        raise ValueError(f"The encoder {source!r} states no square `image_size`, but {size}.")
    label = name if name in NAMED or not Path(name).is_dir() else Path(name).resolve().name
    return VisionExtractor(model, mean, std, size, label, source)


def projection_width(config: Any) -> dict[str, int]:
    """What the halves of a whole CLIP have to be told: the width of its projections stands outside of their parts."""
    return {"projection_dim": config.projection_dim} if config.model_type == "clip" else {}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
