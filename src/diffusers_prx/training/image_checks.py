"""Counts of the samples that a run will leave out, before anything is trained, with the flags that change them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..config.training_config import TrainingConfig
from ..data.buckets import Size, assign_bucket, resize_scale_and_crop
from ..data.captioned import IndexedView
from ..data.images import UnreadableSample
from ..files import NAMES_SHOWN, printable, shown
from ..resolution_bins import RESOLUTION_BINS

# Of larger data sets so many images and captions are looked at, spread over them.
IMAGES_CHECKED = 50_000
CAPTIONS_CHECKED = 10_000


class Spread(IndexedView):
    """At most `count` samples of a source, spread evenly over it."""

    def __init__(self, source: Any, count: int):
        super().__init__([source])
        self.indices = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> tuple[int, int]:
        return 0, int(self.indices[index])


def check_images(
    cfg: TrainingConfig, source: Any, image_sizes: np.ndarray, sizes: Sequence[Size], multiple: int
) -> list[str]:
    """Count images that cannot be used, and captions that cannot be read.

    Args:
        cfg: configuration of the stage.
        source: images, `ListedImages`.
        image_sizes: their sizes, (N, 2) width and height in pixels, 0 where the header cannot be read.
        sizes: (height, width) in pixels that images are resized and cropped to; each goes to the nearest.
        multiple: pixels that heights and widths are multiples of, for the networks.

    Returns:
        A message for each reason, with names and the flag that changes it.

    Raises:
        ValueError: if no image can be used.
    """
    readable = (image_sizes > 0).all(axis=1)
    width, height = np.maximum(image_sizes, 1).T.astype(np.float64)
    scale, crop = resize_scale_and_crop(width, height, np.array(sizes)[assign_bucket(width, height, sizes)].T)
    most = np.inf if cfg.max_upscale is None else cfg.max_upscale
    elongated = readable & (crop > cfg.max_crop)
    small = readable & ~elongated & (scale > most)
    total = len(image_sizes)
    nothing_left = bool((elongated | small | ~readable).all())

    def named(indices: np.ndarray, describe: Callable[[int], str]) -> str:
        return shown(map(describe, indices[:NAMES_SHOWN].tolist()), len(indices))

    def sized(index: int) -> str:
        return f"{source.location(index)} ({image_sizes[index, 0]} x {image_sizes[index, 1]})"

    found = []
    if small.any():
        largest = image_sizes[small][image_sizes[small].min(axis=1).argmax()]
        if 2 * small.sum() < total:
            remedy = f"Pass `--max_upscale {np.ceil(scale[small].max() * 100 - 1e-6) / 100:g}` to enlarge them."
        else:
            remedy = f"Pass {_smaller(cfg, scale, small, multiple)}`--max_upscale none` to enlarge them."
        found.append(
            f"`resolution` is {cfg.resolution}, but {small.sum()} of {total} images are smaller (the largest: "
            f"{largest[0]} x {largest[1]}). {remedy} {named(np.flatnonzero(small), sized)}."
        )
    if elongated.any():
        needed = np.ceil(crop[elongated].max() * 100 - 1e-6) / 100
        buckets = ", or `--aspect_ratio_buckets computed`" if cfg.aspect_ratio_buckets == "none" else ""
        found.append(
            f"`max_crop` is {cfg.max_crop:g}, but of {elongated.sum()} of {total} images a larger share would be "
            f"cropped. Pass `--max_crop {needed:g}` to crop them{buckets}. {named(np.flatnonzero(elongated), sized)}."
        )
    if not readable.all():
        reasons = named(np.flatnonzero(~readable), lambda index: _reason(source.size, index))
        found.append(f"{(~readable).sum()} of {total} images cannot be read: {reasons}.")
    if nothing_left:
        raise ValueError(" ".join(found))
    return found + _check_captions(source)


def _smaller(cfg: TrainingConfig, scale: np.ndarray, small: np.ndarray, multiple: int) -> str:
    """The flag for a resolution that half of the images that are too small have, or nothing."""
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


def _check_captions(source: Any) -> list[str]:
    looked_at = Spread(source, CAPTIONS_CHECKED)
    reasons = [reason for index in range(len(looked_at)) if (reason := _reason(looked_at.captions, index))]
    if not reasons:
        return []
    return [f"{len(reasons)} of {len(looked_at)} captions cannot be read: {shown(reasons, len(reasons))}."]


def _reason(read: Callable[[int], Any], index: int) -> str:
    """Return the reason why a sample cannot be read, or an empty text."""
    try:
        read(index)
    except UnreadableSample as error:
        return printable(str(error))
    return ""
