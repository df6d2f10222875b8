"""Auxiliary losses of a step: contrastive flow matching, and the perceptual losses on the predicted clean image.

Gradients flow through the prediction only: targets are detached, networks are frozen.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .teachers import VisionTeacher


def below(timestep: torch.Tensor, limit: float) -> torch.Tensor:
    """Which samples a loss with a timestep limit counts: (B,) bool, t <= limit.

    Args:
        timestep: (B,) noise levels in [0, 1], 0 the clean image.
        limit: the largest noise level that still counts; with 1 all do.
    """
    return timestep <= limit


def mean_of(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The mean of the values that count, a scalar; 0 where none does.

    Args:
        values: (B,) one loss per sample.
        counts: (B,) bool.
    """
    return values.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1)


def negatives(captions: Sequence[str]) -> torch.Tensor:
    """The sample whose target each sample is pushed away from: the next one of the micro-batch, cyclic, that has
    another caption.

    An empty caption, given or dropped, takes no part on either side: every image is a right answer to it, and an image
    whose caption was dropped may be one that the other caption describes.

    Args:
        captions: B captions as the network saw them, after dropping and cleaning.

    Returns:
        (B,) int64 indices into the micro-batch, -1 where there is no such sample.
    """
    count = len(captions)
    partner = [-1] * count
    for i, caption in enumerate(captions):
        following = [j % count for j in range(i + 1, i + count)]
        if caption:
            partner[i] = next((j for j in following if captions[j] not in ("", caption)), -1)
    return torch.tensor(partner, dtype=torch.long)


def contrastive_loss(
    predicted_velocity: torch.Tensor, velocity: torch.Tensor, captions: Sequence[str]
) -> torch.Tensor:
    """Contrastive flow matching (arXiv 2506.05350): the squared error to the target of another sample.

    The paper subtracts it: its weight in the step is negative, -0.05 in the study. Pairs are made within the
    micro-batch (see `negatives`), so the loss depends on how a step is split into micro-batches; alone, a sample has
    no negative. The mean is over the samples that have one (all with a caption, or none at all), as in the authors'
    code where it leaves out dropped classes.

    Args:
        predicted_velocity: (B, C, h, w), carries the gradient.
        velocity: (B, C, h, w) targets, detached here.
        captions: B captions as the network saw them, after dropping and cleaning.

    Returns:
        A scalar, at least 0; 0 where no sample has a negative.
    """
    partner = negatives(captions).to(velocity.device)  # (B,)
    other = velocity.detach()[partner.clamp(min=0)]  # (B, C, h, w)
    error = F.mse_loss(predicted_velocity.float(), other.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    return mean_of(error, partner >= 0)


class LPIPSLoss(nn.Module):
    """LPIPS (arXiv 1801.03924) on the VGG-16 backbone, frozen and in float32: torchmetrics' network with its linear
    heads. It does not clamp: a prediction outside [-1, 1] has a gradient as well.

    Args:
        scale: images are resized by this factor in (0, 1] first; the study uses 0.5. Ours are antialiased, which the
            original's are not: without it fine texture becomes coarse patterns that the loss would then ask for.
        backbone: a file with torchvision's VGG-16 weights (vgg16-397923af.pth), or the weights themselves; by default
            torchvision finds it in its cache or downloads it, 528 MB.

    Raises:
        ValueError: for a scale outside (0, 1], a backbone that is no such file, or a download that fails.
    """

    def __init__(self, scale: float = 0.5, backbone: str | Path | Mapping[str, torch.Tensor] | None = None):
        super().__init__()
        # here, not above: a torchvision that does not fit torch fails at import, and only this loss needs it
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        if not 0 < scale <= 1:
            raise ValueError(f"`scale` is a factor in (0, 1], got {scale}.")
        self.scale = scale
        weights = backbone if isinstance(backbone, Mapping) else _vgg16_weights(backbone)
        # The public class downloads a backbone and takes none. This one is filled with random weights first; what it
        # draws is nobody else's: switching the loss on leaves the other new networks as they are.
        with torch.random.fork_rng(devices=[]):
            self.net = _NoTrainLpips(net="vgg", pnet_rand=True)
        # "slice3.10.weight" is torchvision's "features.10.weight"
        theirs = {key: f"features.{key.partition('.')[2]}" for key in self.net.net.state_dict()}
        missing = sorted(set(theirs.values()) - set(weights))
        if missing:
            raise ValueError(f"`backbone` {str(backbone)!r} holds no VGG-16 of torchvision: {missing} are missing.")
        self.net.net.load_state_dict({key: weights[name] for key, name in theirs.items()})

    def forward(self, predicted_pm1: torch.Tensor, pixels_pm1: torch.Tensor) -> torch.Tensor:
        """The distance of each prediction from its image.

        Args:
            predicted_pm1: (B, 3, H, W), carries the gradient.
            pixels_pm1: (B, 3, H, W) in [-1, 1], detached here.

        Returns:
            (B,) float32, 0 for equal images.

        Raises:
            ValueError: if an image is less than 16 pixels high or wide after the resizing.
        """
        height, width = (round(side * self.scale) for side in pixels_pm1.shape[2:])
        if min(height, width) < 16:  # four poolings by 2
            raise ValueError(
                f"`pixels_pm1` of {pixels_pm1.shape[2]}x{pixels_pm1.shape[3]} pixels are {height}x{width} at `scale` "
                f"{self.scale}; LPIPS needs at least 16x16."
            )
        with torch.autocast(predicted_pm1.device.type, enabled=False):
            predicted, pixels = (
                F.interpolate(image.float(), (height, width), mode="bilinear", antialias=True)  # (B, 3, h, w)
                for image in (predicted_pm1, pixels_pm1.detach())
            )
            return self.net(predicted, pixels).flatten()  # (B,)


def _vgg16_weights(file: str | Path | None) -> dict[str, torch.Tensor]:
    """torchvision's VGG-16 as a state dict, from a file or through torchvision's cache."""
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"`backbone` is {str(file)!r}, which is no file; accepted: vgg16-397923af.pth.")
        return torch.load(file, map_location="cpu", weights_only=True)

    from torchvision.models import VGG16_Weights

    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(
            f"LPIPS needs the VGG-16 backbone, and it could not be downloaded ({error}). On a machine with a network "
            f"get {weights.url} and put it into {folder}, or give its path as `backbone`."
        ) from error


def random_crop(images: torch.Tensor, size: int, draws: torch.Tensor) -> torch.Tensor:
    """Cut a square from each image: with the same draws, at the same place.

    Args:
        images: (B, C, H, W).
        size: height and width of the square in pixels.
        draws: (B, 2) random numbers in [0, 1): from the top, from the left.

    Returns:
        (B, C, size, size).

    Raises:
        ValueError: if the images are smaller than the square.
    """
    height, width = images.shape[2:]
    if min(height, width) < size:
        raise ValueError(f"`size` of the crop is {size}, but the images are {height}x{width}: it must fit in them.")
    rooms = torch.tensor([height - size + 1, width - size + 1], device=draws.device)
    corners = (draws.double() * rooms).long()  # (B, 2)
    inside = torch.arange(size, device=draws.device)
    rows, columns = (corners[:, axis, None] + inside for axis in (0, 1))  # (B, size) each
    images = images.movedim(1, -1)  # (B, H, W, C)
    samples = torch.arange(len(images), device=draws.device)[:, None, None]
    return images[samples, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)  # (B, C, size, size)


def dino_perceptual_loss(
    teacher: VisionTeacher,
    predicted_pm1: torch.Tensor,
    pixels_pm1: torch.Tensor,
    size: int = 224,
    crop: torch.Tensor | None = None,
) -> torch.Tensor:
    """1 - the mean cosine over patches between a teacher's features of the prediction and of the image.

    Without a crop the teacher sees the whole image, resized by antialiased bicubic interpolation. (The original's is
    bilinear without antialiasing: of 1024 rows it reads 448.) An image that is not square keeps its aspect, up to
    whole patches, and about as many patches as a square of `size` has. Predictions are clamped to [-1, 1] as in the
    study: the teacher knows no other values, and the flow loss pulls back what is outside.

    Args:
        teacher: a frozen VisionTeacher; the study uses DINOv2 ViT-B/14 with registers.
        predicted_pm1: (B, 3, H, W), carries the gradient.
        pixels_pm1: (B, 3, H, W) in [-1, 1], takes no gradient.
        size: side of the square that the teacher sees, in pixels.
        crop: (B, 2) random numbers in [0, 1) to cut a square of `size` by, at one place in both images, instead of
            resizing.

    Returns:
        (B,) float32 in [0, 2].

    Raises:
        ValueError: if `size` is no multiple of the teacher's patch, or the images are smaller than the crop.
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
