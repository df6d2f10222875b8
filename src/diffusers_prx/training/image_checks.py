"""Checks before training: number of images and captions that cannot be used, and the flags that change it."""

from collections.abc import Callable, Sequence

import numpy as np

from ..config.training_config import TrainingConfig
from ..data.buckets import Size, assign_bucket, resize_scale_and_crop
from ..data.captioned import IndexedView, ListedImages
from ..data.images import UnreadableSample
from ..files import NAMES_SHOWN, printable, shown
from ..resolution_bins import RESOLUTION_BINS

# Larger data sets are sampled at even distances.
MAX_IMAGES_CHECKED = 50_000
MAX_CAPTIONS_CHECKED = 10_000


class EvenSubset(IndexedView):
    """At most `count` samples of a source at even distances."""

    def __init__(self, source: ListedImages, count: int):
        super().__init__([source])
        self.indices = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> tuple[int, int]:
        return 0, int(self.indices[index])


def check_images(
    cfg: TrainingConfig, source: ListedImages, image_sizes: np.ndarray, sizes: Sequence[Size], multiple: int
) -> list[str]:
    """Count images that cannot be used and captions that cannot be read.

    Args:
        cfg: configuration of the stage.
        source: indexed images.
        image_sizes: (N, 2) widths and heights in pixels; 0 for unreadable images.
        sizes: (height, width) in pixels of the buckets; each image belongs to the closest aspect ratio.
        multiple: number of pixels that heights and widths must be multiples of.

    Returns:
        One message per reason, with file names and the flag that changes the count.

    Raises:
        ValueError: no image can be used.
    """
    readable = (image_sizes > 0).all(axis=1)
    width, height = np.maximum(image_sizes, 1).T.astype(np.float64)
    scale, crop = resize_scale_and_crop(width, height, np.array(sizes)[assign_bucket(width, height, sizes)].T)
    max_upscale = np.inf if cfg.max_upscale is None else cfg.max_upscale
    elongated = readable & (crop > cfg.max_crop)
    small = readable & ~elongated & (scale > max_upscale)
    total = len(image_sizes)
    none_usable = bool((elongated | small | ~readable).all())

    def list_names(indices: np.ndarray, describe: Callable[[int], str]) -> str:
        return shown(map(describe, indices[:NAMES_SHOWN].tolist()), len(indices))

    def describe_size(index: int) -> str:
        return f"{source.location(index)} ({image_sizes[index, 0]} x {image_sizes[index, 1]})"

    messages = []
    if small.any():
        largest = image_sizes[small][image_sizes[small].min(axis=1).argmax()]
        if 2 * small.sum() < total:
            remedy = f"Pass `--max_upscale {np.ceil(scale[small].max() * 100 - 1e-6) / 100:g}` to enlarge them."
        else:
            remedy = f"Pass {_suggest_resolution(cfg, scale, small, multiple)}`--max_upscale none` to enlarge them."
        messages.append(
            f"`resolution` is {cfg.resolution}, but {small.sum()} of {total} images are smaller (largest: "
            f"{largest[0]} x {largest[1]}). {remedy} "
            f"{list_names(np.flatnonzero(small), describe_size)}."
        )
    if elongated.any():
        needed = np.ceil(crop[elongated].max() * 100 - 1e-6) / 100
        buckets = ", or `--aspect_ratio_buckets computed`" if cfg.aspect_ratio_buckets == "none" else ""
        messages.append(
            f"`max_crop` is {cfg.max_crop:g}, but {elongated.sum()} of {total} images would lose more. Pass "
            f"`--max_crop {needed:g}` to crop them{buckets}. "
            f"{list_names(np.flatnonzero(elongated), describe_size)}."
        )
    if not readable.all():
        reasons = list_names(np.flatnonzero(~readable), lambda index: _reason(source.size, index))
        messages.append(f"{(~readable).sum()} of {total} images cannot be read: {reasons}.")
    if none_usable:
        raise ValueError(" ".join(messages))
    return messages + _check_captions(source)


def _suggest_resolution(cfg: TrainingConfig, scale: np.ndarray, small: np.ndarray, multiple: int) -> str:
    """Return text with a resolution that suits half of the small images, or an empty string."""
    largest = cfg.resolution * (cfg.max_upscale or 1) / np.median(scale[small])
    if cfg.aspect_ratio_buckets == "study":
        resolution = max((known for known in RESOLUTION_BINS if known <= largest), default=0)
    else:
        resolution = int(largest + 1e-6) // multiple * multiple
    if not resolution:
        return ""
    kept = (scale * resolution / cfg.resolution <= (cfg.max_upscale or 1) + 1e-9).sum()
    share = "" if kept == len(scale) else f" ({kept} of {len(scale)} are large enough)"
    return f"`--resolution {resolution}`{share}, or "


def _check_captions(source: ListedImages) -> list[str]:
    subset = EvenSubset(source, MAX_CAPTIONS_CHECKED)
    reasons = [reason for index in range(len(subset)) if (reason := _reason(subset.captions, index))]
    if not reasons:
        return []
    return [f"{len(reasons)} of {len(subset)} captions cannot be read: {shown(reasons, len(reasons))}."]


def _reason(read: Callable[[int], object], index: int) -> str:
    """Return the reason why a sample cannot be read, or an empty string."""
    try:
        read(index)
    except UnreadableSample as error:
        return printable(str(error))
    return ""
