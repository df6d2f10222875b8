"""Aspect-ratio buckets: training sizes of about equal area, and the assignment of images to them.

All images of a step have the size of one bucket. An image belongs to the bucket of the nearest aspect ratio; it is
resized until it covers that size, and the rest is cropped. Images that would be enlarged or cropped too much are left
out and counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import logging
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..files import atomic_write
from ..resolution_bins import RESOLUTION_BINS
from .captioned import ListedImages
from .images import UnreadableSample

logger = logging.get_logger(__name__)

Size = tuple[int, int]  # (height, width) in pixels

IMAGES_PER_READ = 256
IMAGES_COMPARED = 64  # of a cache of sizes, with the images themselves


def study_buckets(resolution: int, multiple: int = 1) -> list[Size]:
    """Return the sizes (height, width) on which PRX was trained at 256, 512 or 1024 pixels, from wide to tall.

    Args:
        resolution: side of the square with about the same area, in pixels.
        multiple: divisor that the networks require of heights and widths, in pixels.

    Raises:
        ValueError: for another resolution, or sizes that are not multiples of `multiple`.

    Example:
        >>> (256, 256) in study_buckets(256, multiple=32)
        True
    """
    if resolution not in RESOLUTION_BINS:
        raise ValueError(
            f"`resolution` is {resolution}, but the study has buckets only for {list(RESOLUTION_BINS)}. Pass "
            "`--aspect_ratio_buckets computed` for other resolutions."
        )
    sizes = list(RESOLUTION_BINS[resolution].values())
    wrong = [size for size in sizes if size[0] % multiple or size[1] % multiple]
    if wrong:
        raise ValueError(
            f"The study's buckets for `resolution` {resolution} have sizes that are not multiples of {multiple}, "
            f"which these networks require: {wrong}. Pass `--aspect_ratio_buckets computed`."
        )
    return sizes


def compute_buckets(resolution: int, multiple: int, max_ratio: float = 2.0) -> list[Size]:
    """Compute sizes (height, width) for any resolution, from wide to tall.

    Each short side gets the longest long side whose area does not exceed that of the square. No bucket needs more
    memory than the square, and each has at least `1 - multiple / long side` of its area.

    Args:
        resolution: side of the square, in pixels; a multiple of `multiple`.
        multiple: divisor of all heights and widths, in pixels: the VAE's factor x the transformer's patch size.
        max_ratio: largest ratio of the longer side to the shorter one, at least 1.

    Raises:
        ValueError: for a resolution that is not a multiple of `multiple`, or a ratio below 1.

    Example:
        >>> compute_buckets(64, 16, max_ratio=2)
        [(48, 80), (64, 64), (80, 48)]
    """
    if multiple < 1 or resolution < multiple or resolution % multiple:
        raise ValueError(f"`resolution` must be a multiple of {multiple} for these networks, got {resolution}.")
    if not 1 <= max_ratio < math.inf:
        raise ValueError(
            f"`max_ratio`, the longer side over the shorter one, must be finite and at least 1, got {max_ratio}."
        )
    wide = []
    for height in range(resolution - multiple, 0, -multiple):
        width = resolution**2 // height // multiple * multiple
        if width > max_ratio * height:
            break
        wide.append((height, width))
    return [*reversed(wide), (resolution, resolution), *((width, height) for height, width in wide)]


def assign_bucket(width: int | np.ndarray, height: int | np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
    """Assign images to the nearest aspect ratio on a logarithmic scale, which treats 2:1 and 1:2 alike.

    Args:
        width, height: sizes in pixels; numbers, or arrays of one shape.
        sizes: (height, width) of the buckets, in any order.

    Returns:
        Indices into `sizes`, int64, in the shape of `width`.
    """
    ratios = np.log([bucket_height / bucket_width for bucket_height, bucket_width in sizes])
    order = np.argsort(ratios, kind="stable")
    boundaries = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(boundaries, np.log(height) - np.log(width))]


def resize_scale_and_crop(
    width: int | np.ndarray, height: int | np.ndarray, size: Size | np.ndarray
) -> tuple[Any, Any]:
    """Return the factor by which an image is enlarged to cover a size, and the share of it that is then cropped.

    Args:
        width, height: size of the image in pixels; numbers or arrays.
        size: (height, width) to cover, in pixels.
    """
    by_height, by_width = size[0] / height, size[1] / width
    scale = np.maximum(by_height, by_width)
    return scale, 1 - np.minimum(by_height, by_width) / scale


@dataclass(frozen=True)
class Buckets:
    """Assignment of a source's images to sizes.

    Args:
        sizes: (height, width) of each bucket in pixels.
        members: for each bucket, the ascending indices of its images in the source.
        max_upscale: largest factor by which an image is enlarged.
        max_crop: largest share of an image that is cropped.
        left_out: number of images in no bucket, by reason.
        closed: number of images by size of buckets that had too few of them; these images moved to the nearest other
            bucket.

    Example:
        >>> Buckets.square(256, count=1000).counts()
        {(256, 256): 1000}
    """

    sizes: Sequence[Size]
    members: Sequence[Sequence[int]]
    max_upscale: float = 1.0
    max_crop: float = 1.0
    left_out: dict[str, int] = field(default_factory=dict)
    closed: dict[Size, int] = field(default_factory=dict)

    @classmethod
    def square(cls, resolution: int, count: int, max_upscale: float = 1.0, max_crop: float = 1.0) -> "Buckets":
        """Put all `count` images of a source into one square bucket, without reading their sizes."""
        return cls([(resolution, resolution)], [range(count)], max_upscale, max_crop)

    def rejection_reason(self, width: int, height: int, bucket: int) -> str | None:
        """Return why an image of this size in pixels does not fit a bucket, or None if it fits."""
        scale, crop = resize_scale_and_crop(width, height, self.sizes[bucket])
        if crop > self.max_crop:
            return f"{width} x {height} pixels are too elongated: {crop:.1%} would be cropped"
        if scale > self.max_upscale:
            return f"{width} x {height} pixels are too small: they would be enlarged {scale:.2f} times"
        return None

    def counts(self) -> dict[Size, int]:
        """Number of images in each bucket, by (height, width)."""
        return {size: len(members) for size, members in zip(self.sizes, self.members)}

    def summary(self) -> str:
        """Images in each bucket and images left out, one line each."""
        total = sum(self.counts().values())
        lines = [f"{total} images in {len(self.sizes)} buckets (height x width):"]
        lines += [f"  {h} x {w}: {n} images ({n / total:.1%})" for (h, w), n in self.counts().items()]
        lines += [f"  {h} x {w}: closed, its {n} images are too few for a step" for (h, w), n in self.closed.items()]
        lines += [f"  left out: {n} {reason}" for reason, n in self.left_out.items()]
        return "\n".join(lines)


def sort_into_buckets(
    image_sizes: np.ndarray, sizes: Sequence[Size], minimum: int, max_upscale: float = 1.0, max_crop: float = 0.5
) -> Buckets:
    """Put every image into the bucket of the nearest aspect ratio.

    Buckets with fewer than `minimum` images are closed, the smallest first, and their images move to the nearest
    remaining bucket. Otherwise an image would repeat within a step.

    Args:
        image_sizes: (N, 2), width and height in pixels, 0 for unreadable images.
        sizes: (height, width) of the buckets.
        minimum: smallest number of images in a bucket: the images of an optimizer step over all processes.
        max_upscale: largest factor by which an image may be enlarged; infinity allows any.
        max_crop: largest share of an image that may be cropped.

    Raises:
        ValueError: for limits out of range, or if no image fits.

    Example:
        >>> buckets = sort_into_buckets(image_sizes(source), compute_buckets(256, 32), minimum=64)
        >>> print(buckets.summary())
    """
    if not max_upscale >= 1:
        raise ValueError(f"`max_upscale` must be at least 1 (nothing is enlarged), got {max_upscale}.")
    if not 0 <= max_crop <= 1:
        raise ValueError(f"`max_crop` is a share in [0, 1], got {max_crop}.")
    readable = np.flatnonzero((image_sizes > 0).all(axis=1))
    width, height = image_sizes[readable].T.astype(np.float64)
    closed = {}
    sizes = list(sizes)
    while True:
        bucket = assign_bucket(width, height, sizes)
        scale, crop = resize_scale_and_crop(width, height, np.array(sizes)[bucket].T)
        elongated, small = crop > max_crop, scale > max_upscale
        bucket[elongated | small] = -1
        counts = np.bincount(bucket[bucket >= 0], minlength=len(sizes))
        if len(sizes) == 1 or counts.min() >= minimum:
            break
        smallest = int(counts.argmin())
        closed[sizes.pop(smallest)] = int(counts[smallest])
    left_out = {
        f"too elongated (more than {max_crop:.0%} would be cropped)": int(elongated.sum()),
        f"too small (would be enlarged more than {max_upscale:g} times)": int((small & ~elongated).sum()),
        "unreadable": len(image_sizes) - len(readable),
    }
    left_out = {reason: count for reason, count in left_out.items() if count}
    if not counts.any():
        raise ValueError(
            f"None of the {len(image_sizes)} images fits any of the buckets {sizes}: {left_out}. Pass a smaller "
            "`--resolution`, or larger `--max_upscale` and `--max_crop`."
        )
    members = [readable[bucket == number] for number in range(len(sizes))]
    return Buckets(sizes, members, max_upscale, max_crop, left_out, {size: n for size, n in closed.items() if n})


class _Sizes(Dataset):
    def __init__(self, source: ListedImages):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, int]:
        try:
            return self.source.size(index)
        except UnreadableSample:
            return 0, 0


def image_sizes(source: ListedImages, num_workers: int = 0, cache_file: Path | str | None = None) -> np.ndarray:
    """Read the size of every image of a source from the headers.

    Args:
        source: source of the images.
        num_workers: processes that read; 0 reads in this one.
        cache_file: .npz file that keeps the sizes. An existing file is used if it is undamaged, has the right length
            and agrees with a sample of the images; otherwise it is replaced.

    Returns:
        (N, 2) int32, width and height in pixels as shown, 0 for unreadable images.

    Example:
        >>> image_sizes(load_source("photos"), num_workers=8).shape
        (1000, 2)
    """
    if cache_file is not None and Path(cache_file).is_file():
        sizes = _read_cached_sizes(source, Path(cache_file))
        if sizes is not None:
            return sizes
        logger.warning(f"{cache_file} does not belong to these images: their sizes are read again.")
    loader = DataLoader(_Sizes(source), IMAGES_PER_READ, num_workers=num_workers, collate_fn=np.array)
    batches = []
    with tqdm(total=len(source), desc="image sizes", unit="image") as progress:
        for batch in loader:
            batches.append(batch)
            progress.update(len(batch))
    sizes = np.concatenate(batches).astype(np.int32)
    if cache_file is not None:
        with atomic_write(Path(cache_file)) as path, path.open("wb") as file:
            np.savez(file, sizes=sizes)
    return sizes


def _read_cached_sizes(source: ListedImages, cache_file: Path) -> np.ndarray | None:
    try:
        with np.load(cache_file) as file:
            sizes = file["sizes"]
    except Exception:  # damaged: numpy and zipfile raise many types
        return None
    if sizes.shape != (len(source), 2):
        return None
    compared = np.linspace(0, len(source) - 1, min(IMAGES_COMPARED, len(source))).astype(int)
    actual = _Sizes(source)
    return sizes if all(tuple(sizes[index]) == actual[int(index)] for index in compared) else None
