"""Auxiliary losses: contrastive flow matching, and perceptual losses on the predicted clean image.

Gradients flow through the prediction only: targets are detached and networks are frozen.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .teachers import VisionTeacher

MIN_LPIPS_SIDE = 16  # pixels; VGG-16 halves the image four times


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of the selected values, a scalar; 0 if none is selected.

    Args:
        values: (B,) one loss per sample.
        mask: (B,) bool.
    """
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def negative_indices(captions: Sequence[str]) -> torch.Tensor:
    """Return the negative of each sample: the next sample of the micro-batch, cyclically, with another caption.

    Samples with an empty caption neither have nor are a negative. Every image matches an empty caption, and an
    image whose caption was dropped may match the other caption.

    Args:
        captions: B captions as the network saw them, after dropping and cleaning.

    Returns:
        (B,) int64 indices into the micro-batch, -1 for samples without a negative.
    """
    count = len(captions)
    negatives = [-1] * count
    for i, caption in enumerate(captions):
        following = [j % count for j in range(i + 1, i + count)]
        if caption:
            negatives[i] = next((j for j in following if captions[j] not in ("", caption)), -1)
    return torch.tensor(negatives, dtype=torch.long)


def contrastive_loss(
    predicted_velocity: torch.Tensor, velocity: torch.Tensor, captions: Sequence[str]
) -> torch.Tensor:
    """Contrastive flow matching (arXiv 2506.05350): the squared error to the target of another sample.

    The paper subtracts it: its weight in the step is negative, -0.05 in the study. Pairs are formed within the
    micro-batch (see `negative_indices`), so the loss depends on how a step is divided into micro-batches; a single
    sample has no negative. The mean is over the samples with a negative, as in the authors' code for dropped classes.

    Args:
        predicted_velocity: (B, C, h, w), carries the gradient.
        velocity: (B, C, h, w) targets, detached here.
        captions: B captions as the network saw them, after dropping and cleaning.

    Returns:
        A scalar, at least 0; 0 if no sample has a negative.

    Example:
        >>> loss = flow_loss - 0.05 * contrastive_loss(predicted_velocity, velocity, captions)
    """
    negatives = negative_indices(captions).to(velocity.device)  # (B,)
    other = velocity.detach()[negatives.clamp(min=0)]  # (B, C, h, w)
    error = F.mse_loss(predicted_velocity.float(), other.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    return masked_mean(error, negatives >= 0)


class LPIPSLoss(nn.Module):
    """LPIPS (arXiv 1801.03924) with a frozen float32 VGG-16 backbone: torchmetrics' network with its linear heads.

    It does not clamp: predictions outside [-1, 1] have a gradient too.

    Args:
        scale: factor in (0, 1] by which images are resized first; 0.5 in the study. The resizing is antialiased,
            unlike the original's, because fine texture would otherwise become coarse patterns that the loss rewards.
        backbone: file with torchvision's VGG-16 weights (vgg16-397923af.pth), or the weights themselves. Default:
            torchvision's cache or download, 528 MB.

    Raises:
        ValueError: for a scale outside (0, 1], an invalid backbone, or a failed download.

    Example:
        >>> lpips = LPIPSLoss(scale=0.5)
        >>> lpips(predicted_pm1, pixels_pm1).mean().backward()
    """

    def __init__(self, scale: float = 0.5, backbone: str | Path | Mapping[str, torch.Tensor] | None = None):
        super().__init__()
        # imported here, because a torchvision that does not match torch fails at import, and only this loss needs it
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        if not 0 < scale <= 1:
            raise ValueError(f"`scale` is a factor in (0, 1], got {scale}.")
        self.scale = scale
        weights = backbone if isinstance(backbone, Mapping) else _vgg16_weights(backbone)
        # torchmetrics' public class always downloads a backbone. This one is initialized at random first; the fork
        # keeps the weights of other new networks independent of this loss.
        with torch.random.fork_rng(devices=[]):
            self.net = _NoTrainLpips(net="vgg", pnet_rand=True)
        # "slice3.10.weight" is torchvision's "features.10.weight"
        torchvision_keys = {key: f"features.{key.partition('.')[2]}" for key in self.net.net.state_dict()}
        missing = sorted(set(torchvision_keys.values()) - set(weights))
        if missing:
            raise ValueError(f"`backbone` {str(backbone)!r} is not torchvision's VGG-16: it lacks {missing}.")
        self.net.net.load_state_dict({key: weights[name] for key, name in torchvision_keys.items()})

    def forward(self, predicted_pm1: torch.Tensor, pixels_pm1: torch.Tensor) -> torch.Tensor:
        """Return the distance of each prediction from its image.

        Args:
            predicted_pm1: (B, 3, H, W), carries the gradient.
            pixels_pm1: (B, 3, H, W) in [-1, 1], detached here.

        Returns:
            (B,) float32, 0 for equal images.

        Raises:
            ValueError: if an image has fewer than 16 pixels in height or width after the resizing.
        """
        height, width = (round(side * self.scale) for side in pixels_pm1.shape[2:])
        if min(height, width) < MIN_LPIPS_SIDE:
            raise ValueError(
                f"`pixels_pm1` of {pixels_pm1.shape[2]}x{pixels_pm1.shape[3]} pixels are {height}x{width} at `scale` "
                f"{self.scale}; LPIPS needs at least {MIN_LPIPS_SIDE}x{MIN_LPIPS_SIDE}."
            )
        with torch.autocast(predicted_pm1.device.type, enabled=False):
            predicted, pixels = (
                F.interpolate(image.float(), (height, width), mode="bilinear", antialias=True)  # (B, 3, h, w)
                for image in (predicted_pm1, pixels_pm1.detach())
            )
            return self.net(predicted, pixels).flatten()  # (B,)


def _vgg16_weights(file: str | Path | None) -> dict[str, torch.Tensor]:
    """Load torchvision's VGG-16 as a state dict, from a file or through torchvision's cache."""
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"`backbone` is {str(file)!r}, which is not a file; accepted: vgg16-397923af.pth.")
        return torch.load(file, map_location="cpu", weights_only=True)

    from torchvision.models import VGG16_Weights

    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(
            f"LPIPS needs the VGG-16 `backbone`, which could not be downloaded ({error}). Download {weights.url} on "
            f"another machine and put it into {folder}, or pass `--lpips_backbone` with its path."
        ) from error


def random_crop(images: torch.Tensor, size: int, uniforms: torch.Tensor) -> torch.Tensor:
    """Cut a square from each image. The same random numbers give the same position.

    Args:
        images: (B, C, H, W).
        size: height and width of the square in pixels.
        uniforms: (B, 2) random numbers in [0, 1) that determine the top and left edge.

    Returns:
        (B, C, size, size).

    Raises:
        ValueError: if the images are smaller than the square.
    """
    height, width = images.shape[2:]
    if min(height, width) < size:
        raise ValueError(f"`size` of the crop is {size}, but the images are only {height}x{width}.")
    positions = torch.tensor([height - size + 1, width - size + 1], device=uniforms.device)
    corners = (uniforms.double() * positions).long()  # (B, 2)
    offsets = torch.arange(size, device=uniforms.device)
    rows, columns = (corners[:, axis, None] + offsets for axis in (0, 1))  # (B, size) each
    images = images.movedim(1, -1)  # (B, H, W, C)
    samples = torch.arange(len(images), device=uniforms.device)[:, None, None]
    return images[samples, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)  # (B, C, size, size)


def dino_perceptual_loss(
    teacher: VisionTeacher,
    predicted_pm1: torch.Tensor,
    pixels_pm1: torch.Tensor,
    size: int = 224,
    crop: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return 1 - the mean cosine over patches between a teacher's features of the prediction and of the image.

    Without a crop the teacher sees the whole image, resized by antialiased bicubic interpolation. (The original's is
    bilinear without antialiasing: of 1024 rows it reads 448.) An image that is not square keeps its aspect ratio, up
    to whole patches, with about as many patches as a square of `size`. Predictions are clamped to [-1, 1] as in the
    study: the teacher knows no other values, and the flow loss corrects the rest.

    Args:
        teacher: frozen VisionTeacher; the study uses DINOv2 ViT-B/14 with registers.
        predicted_pm1: (B, 3, H, W), carries the gradient.
        pixels_pm1: (B, 3, H, W) in [-1, 1], without gradient.
        size: side of the square that the teacher sees, in pixels.
        crop: (B, 2) random numbers in [0, 1). If given, a square of `size` is cut at the same position from both
            images, which are then not resized.

    Returns:
        (B,) float32 in [0, 2].

    Raises:
        ValueError: if `size` is not a multiple of the teacher's patch, or the images are smaller than the crop.

    Example:
        >>> teacher = load_teacher("facebook/dinov2-with-registers-base")
        >>> dino_perceptual_loss(teacher, predicted_pm1, pixels_pm1).mean().backward()
    """
    patch = teacher.patch_size
    if size < 1 or size % patch:
        raise ValueError(f"`size` must be a multiple of the teacher's patch of {patch} pixels, got {size}.")
    predicted, pixels = predicted_pm1.clamp(-1, 1), pixels_pm1  # (B, 3, H, W)
    if crop is not None:
        predicted, pixels = (random_crop(images, size, crop) for images in (predicted, pixels))  # (B, 3, size, size)
    aspect = math.sqrt(pixels.shape[2] / pixels.shape[3])
    side = size // patch
    grid = max(1, round(side * aspect)), max(1, round(side / aspect))  # rows, columns
    features = teacher(predicted, grid)  # (B, rows*columns, E)
    with torch.no_grad():
        target = teacher(pixels, grid)  # (B, rows*columns, E)
    return 1 - F.cosine_similarity(features.float(), target.float(), dim=-1).mean(dim=1)  # (B,)
