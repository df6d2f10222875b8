"""Training samples: crop and flip images, choose captions, replace unusable samples, and collate batches."""

import functools
import itertools
import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset

from .buckets import Buckets, Size, resize_scale_and_crop
from .captioned import CaptionedImages
from .captions import choose_caption
from .images import UnfitSample, UnreadableSample
from .samplers import Position

# After this many unusable samples in a row the data as a whole are taken to be unusable.
MAX_REPLACEMENTS = 1000


def fit_image(
    image: PIL.Image.Image, size: Size, center_crop: bool, random_flip: bool, rng: random.Random
) -> PIL.Image.Image:
    """Resize an image so that it covers `size` (antialiased, undistorted), crop the rest, and optionally flip it.

    Args:
        image: RGB image.
        size: (height, width) of the result in pixels.
        center_crop: True crops the center, False a random position.
        random_flip: True mirrors half of the images horizontally.
        rng: generator of the crop's position and of the flip.

    Example:
        >>> fit_image(image, (512, 512), center_crop=True, random_flip=False, rng=random.Random(0)).size
        (512, 512)
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = covering[0] - width, covering[1] - height
    left, top = (left // 2, top // 2) if center_crop else (rng.randint(0, left), rng.randint(0, top))
    # only the kept part is resized: the whole of a very long image, enlarged, would fill the memory
    box = (
        left * image.width / covering[0],
        top * image.height / covering[1],
        (left + width) * image.width / covering[0],
        (top + height) * image.height / covering[1],
    )
    image = image.resize((width, height), PIL.Image.Resampling.LANCZOS, box)
    if random_flip and rng.random() < 0.5:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def image_to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """Convert an RGB image to uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def first_usable(attempts: Iterable[Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Return the first sample that can be used.

    Args:
        attempts: functions that return a sample, or raise `UnreadableSample` or `UnfitSample`.

    Returns:
        The sample, with the messages of the unreadable samples before it as "unreadable" and the number of those that
        did not fit their bucket as "unfit".

    Raises:
        ValueError: if no attempt succeeds, or `MAX_REPLACEMENTS` fail in a row.
    """
    unreadable: list[str] = []
    unfit: list[str] = []
    for attempt in itertools.islice(attempts, MAX_REPLACEMENTS):
        try:
            return {**attempt(), "unreadable": unreadable, "unfit": len(unfit)}
        except UnreadableSample as error:
            unreadable.append(str(error))
        except UnfitSample as error:
            unfit.append(str(error))
    raise ValueError(
        f"None of {len(unreadable) + len(unfit)} samples in a row is usable: {len(unreadable)} are unreadable and "
        f"{len(unfit)} do not fit their bucket. The first: {(unreadable + unfit)[0]}."
    )


class TrainingSamples(Dataset):
    """Data set for a data loader: maps a `Position` to the training sample at that position.

    A sample that is unreadable or does not fit its bucket is replaced by the next sample of the bucket, and counted.

    Args:
        source: captioned images.
        buckets: sizes of the samples, and the images that may replace each other.
        center_crop, random_flip: see `fit_image`.
        derive_seed: function (step, sample_index, purpose) -> seed of the sample's crop, flip and caption choice.
        caption_weights: probability of each caption column; None uses the sample's "caption".

    Example:
        >>> samples = TrainingSamples(source, Buckets.square(256, len(source)), True, False, derive_seed)
        >>> samples[Position(step=0, sample_index=0, dataset_index=3)]["pixels_uint8"].shape
        torch.Size([3, 256, 256])
    """

    def __init__(
        self,
        source: CaptionedImages,
        buckets: Buckets,
        center_crop: bool,
        random_flip: bool,
        derive_seed: Callable[[int, int, str], int],
        caption_weights: Mapping[str, float] | None = None,
    ):
        self.source = source
        self.buckets = buckets
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.derive_seed = derive_seed
        self.caption_weights = caption_weights

    def __len__(self) -> int:
        return len(self.source)

    def _rng(self, position: Position, purpose: str) -> random.Random:
        return random.Random(self.derive_seed(position.step, position.sample_index, purpose))

    def _caption(self, sample: Mapping[str, Any], position: Position) -> str:
        if self.caption_weights is None:
            return sample["caption"]
        uniform = self._rng(position, "caption_choice").random()
        return choose_caption(sample["captions"], self.caption_weights, uniform)

    def __getitem__(self, position: Position) -> dict[str, Any]:
        members = self.buckets.members[position.bucket]
        first = bisect_left(members, position.dataset_index)

        def attempt(offset: int) -> dict[str, Any]:
            index = int(members[(first + offset) % len(members)])
            try:
                return self._read(index, position)
            except UnfitSample as error:
                raise UnfitSample(f"sample {index}: {error}") from error

        return first_usable(functools.partial(attempt, offset) for offset in range(len(members)))

    def _read(self, index: int, position: Position) -> dict[str, Any]:
        return self.make(self.source[index], position)

    def make(self, sample: Mapping[str, Any], position: Position) -> dict[str, Any]:
        """Make the training sample of a source's sample at a position.

        Raises:
            UnreadableSample: if the sample has none of the weighted captions.
            UnfitSample: if its image would be enlarged or cropped too much.
        """
        caption, image = self._caption(sample, position), sample["image"]
        rejection = self.buckets.rejection_reason(image.width, image.height, position.bucket)
        if rejection is not None:
            raise UnfitSample(rejection)
        size = self.buckets.sizes[position.bucket]

        def fitted(picture: PIL.Image.Image) -> torch.Tensor:
            crop = self._rng(position, "crop")  # the same for both images of a pair
            return image_to_tensor(fit_image(picture, size, self.center_crop, self.random_flip, crop))

        pair = {"rejected_uint8": fitted(sample["rejected"])} if "rejected" in sample else {}
        return {
            "pixels_uint8": fitted(image),  # (3, H, W)
            **pair,
            "caption": caption,
            "sample_index": position.sample_index,
            "upscaled": int(resize_scale_and_crop(image.width, image.height, size)[0] > 1),
        }


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate samples of one size.

    Returns:
        "pixels_uint8" (B, 3, H, W), and of pairs of images also "rejected_uint8" of the same shape; "captions" and
        "sample_index", lists of length B; "unreadable", the messages of all unreadable samples; "unfit" and
        "upscaled", the numbers of samples that did not fit and that were enlarged.
    """
    images = [name for name in ("pixels_uint8", "rejected_uint8") if name in samples[0]]
    return {
        **{name: torch.stack([sample[name] for sample in samples]) for name in images},
        **collate_metadata(samples),
    }


def collate_metadata(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate everything but the tensors, see `collate`."""
    return {
        "captions": [sample["caption"] for sample in samples],
        "sample_index": [sample["sample_index"] for sample in samples],
        "unreadable": [message for sample in samples for message in sample["unreadable"]],
        "unfit": sum(sample["unfit"] for sample in samples),
        "upscaled": sum(sample["upscaled"] for sample in samples),
    }


def build_loader(
    samples: TrainingSamples,
    batches: Iterable[list[Position]],
    num_workers: int,
    collate_fn: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] = collate,
) -> DataLoader:
    """Build a loader over batches of positions. The batches do not depend on the number of workers."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
