"""Aspect-ratio buckets: training sizes of about equal area, and which image of a source is trained at which.

All pictures of a step have the size of one bucket. An image goes to the bucket of the nearest aspect ratio, is resized
until it covers that size, and what stands over is cropped. What would have to be enlarged or cropped too much is left
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
# so many images of a cache of sizes are compared with the images themselves
IMAGES_COMPARED = 64


def study_buckets(resolution: int, multiple: int = 1) -> list[Size]:
    """The sizes (height, width) that PRX was trained on at 256, 512 or 1024 pixels, from wide to tall.

    Args:
        resolution: side of the square with about the same area, in pixels.
        multiple: heights and widths that the networks take, in pixels.

    Raises:
        ValueError: if there are no such sizes for the resolution, or they are no multiples of `multiple`.
    """
    if resolution not in RESOLUTION_BINS:
        raise ValueError(
            f"`resolution` is {resolution}; the study has buckets for {list(RESOLUTION_BINS)}. For other resolutions "
            "they can be computed."
        )
    sizes = list(RESOLUTION_BINS[resolution].values())
    wrong = [size for size in sizes if size[0] % multiple or size[1] % multiple]
    if wrong:
        raise ValueError(
            f"The study's buckets for `resolution` {resolution} have sizes that are no multiples of {multiple}, which "
            f"these networks need: {wrong}. They can be computed instead."
        )
    return sizes


def compute_buckets(resolution: int, multiple: int, max_ratio: float = 2.0) -> list[Size]:
    """Sizes (height, width) for any resolution, from wide to tall.

    For every short side, the longest long side with which the area is not above that of the square: no bucket takes
    more memory than the square, and each has at least `1 - multiple / long side` of its area.

    Args:
        resolution: side of the square, in pixels; a multiple of `multiple`.
        multiple: of all heights and widths, in pixels: the VAE's factor x the transformer's patch size.
        max_ratio: of the longer side to the shorter one, at least 1.

    Raises:
        ValueError: for a resolution that is no multiple, or a ratio below 1.
    """
    if multiple < 1 or resolution < multiple or resolution % multiple:
        raise ValueError(f"`resolution` must be a multiple of {multiple} (for these networks), got {resolution}.")
    if not 1 <= max_ratio < math.inf:
        raise ValueError(
            f"`max_ratio` is the longer side over the shorter one, finite and at least 1; got {max_ratio}."
        )
    wide = []
    for height in range(resolution - multiple, 0, -multiple):
        width = resolution**2 // height // multiple * multiple
        if width > max_ratio * height:
            break
        wide.append((height, width))
    return [*reversed(wide), (resolution, resolution), *((width, height) for height, width in wide)]


def assign_bucket(width: Any, height: Any, sizes: Sequence[Size]) -> np.ndarray:
    """The bucket whose height / width is nearest on a logarithmic scale, so that 2:1 and 1:2 are treated alike.

    Args:
        width, height: in pixels; numbers, or arrays of one shape.
        sizes: (height, width) of the buckets, in any order.

    Returns:
        Places in `sizes`, int64, in the shape of `width`.
    """
    ratios = np.log([bucket_height / bucket_width for bucket_height, bucket_width in sizes])
    order = np.argsort(ratios, kind="stable")
    between = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(between, np.log(height) - np.log(width))]


def cover(width: Any, height: Any, size: Any) -> tuple[Any, Any]:
    """How an image covers a size: the factor of its enlargement, and the share of it that is cropped.

    Args:
        width, height: of the image in pixels; numbers or arrays.
        size: (height, width) to cover, in pixels.
    """
    by_height, by_width = size[0] / height, size[1] / width
    scale = np.maximum(by_height, by_width)
    return scale, 1 - np.minimum(by_height, by_width) / scale


@dataclass(frozen=True)
class Buckets:
    """Which images of a source are trained at which size.

    Args:
        sizes: (height, width) in pixels of each bucket.
        members: of each bucket, the images in it as ascending places in the source.
        max_upscale: an image is enlarged by at most this factor.
        max_crop: at most this share of an image is cropped.
        left_out: how many images are in no bucket, by reason.
        closed: sizes that had too few images, with their number; these images went to the nearest other bucket.
    """

    sizes: Sequence[Size]
    members: Sequence[Sequence[int]]
    max_upscale: float = 1.0
    max_crop: float = 1.0
    left_out: dict[str, int] = field(default_factory=dict)
    closed: dict[Size, int] = field(default_factory=dict)

    @classmethod
    def square(cls, resolution: int, count: int, max_upscale: float = 1.0, max_crop: float = 1.0) -> "Buckets":
        """All `count` images of a source in one square bucket, without asking for their sizes."""
        return cls([(resolution, resolution)], [range(count)], max_upscale, max_crop)

    def misfit(self, width: int, height: int, bucket: int) -> str | None:
        """Why an image of this size in pixels cannot be used in a bucket, in words, or `None`."""
        scale, crop = cover(width, height, self.sizes[bucket])
        if crop > self.max_crop:
            return f"{width} x {height} pixels are too elongated: {crop:.1%} would be cropped"
        if scale > self.max_upscale:
            return f"{width} x {height} pixels are too small: they would be enlarged {scale:.2f} times"
        return None

    def counts(self) -> dict[Size, int]:
        """Images of each bucket, by (height, width)."""
        return {size: len(members) for size, members in zip(self.sizes, self.members)}

    def summary(self) -> str:
        """Images of each bucket and what is left out, one line each."""
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

    Buckets with fewer than `minimum` images are closed, the smallest first, and their images go to the nearest that
    stays: in a step of more images than the bucket has, one image would come several times.

    Args:
        image_sizes: (N, 2), width and height in pixels, 0 where an image cannot be read.
        sizes: (height, width) of the buckets.
        minimum: images of a bucket; the images of an optimizer step over all processes.
        max_upscale: images that would be enlarged more are left out; infinite: none is.
        max_crop: images of which a larger share would be cropped are left out.

    Raises:
        ValueError: for limits outside their range, or if no image fits.
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
        scale, crop = cover(width, height, np.array(sizes)[bucket].T)
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
    members = [readable[bucket == place] for place in range(len(sizes))]
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
    """The size of every image of a source, by reading all headers once.

    Args:
        source: its `size` is asked for every image.
        num_workers: processes that read; 0: this one.
        cache_file: an .npz file, which has checksums, to keep the sizes in. One that is there is used if it is
            undamaged, its length is right and some images spread over the source have the sizes that it states; else
            it is written anew.

    Returns:
        (N, 2) int32, width and height in pixels as shown; 0 for an image that cannot be read.
    """
    if cache_file is not None and Path(cache_file).is_file():
        sizes = _cached_sizes(source, Path(cache_file))
        if sizes is not None:
            return sizes
        logger.warning(f"{cache_file} does not belong to these images: their sizes are read again.")
    loader = DataLoader(_Sizes(source), IMAGES_PER_READ, num_workers=num_workers, collate_fn=np.array)
    found = []
    with tqdm(total=len(source), desc="sizes of the images", unit="image") as progress:
        for batch in loader:
            found.append(batch)
            progress.update(len(batch))
    sizes = np.concatenate(found).astype(np.int32)
    if cache_file is not None:
        _save_sizes(sizes, Path(cache_file))
    return sizes


def _cached_sizes(source: ListedImages, cache_file: Path) -> np.ndarray | None:
    try:
        with np.load(cache_file) as file:
            sizes = file["sizes"]
    except Exception:  # damaged: numpy and zipfile raise many kinds
        return None
    if sizes.shape != (len(source), 2):
        return None
    some = np.linspace(0, len(source) - 1, min(IMAGES_COMPARED, len(source))).astype(int)
    read = _Sizes(source)
    return sizes if all(tuple(sizes[index]) == read[int(index)] for index in some) else None


def _save_sizes(sizes: np.ndarray, cache_file: Path) -> None:
    with atomic_write(cache_file) as path, path.open("wb") as file:
        np.savez(file, sizes=sizes)
