"""How an image of a source becomes a training sample, and samples a batch."""

import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset

from .buckets import Buckets, Size, cover
from .captioned import CaptionedImages
from .captions import choose_caption
from .images import UnfitSample, UnreadableSample
from .samplers import Position

# after so many samples in a row that cannot be used, something is wrong with all of them
MAX_REPLACEMENTS = 1000


def fit_image(
    image: PIL.Image.Image, size: Size, center_crop: bool, random_flip: bool, rng: random.Random
) -> PIL.Image.Image:
    """Resize an image so that it covers `size` (antialiased, never distorted), crop the rest, and perhaps flip it.

    Args:
        image: RGB.
        size: (height, width) of the result in pixels.
        center_crop: crop the center, not a random place.
        random_flip: mirror half of the images from left to right.
        rng: of the place of the crop and of the flip.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = covering[0] - width, covering[1] - height
    left, top = (left // 2, top // 2) if center_crop else (rng.randint(0, left), rng.randint(0, top))
    # only what is kept is resized: the whole of a very long image, enlarged, would fill the memory
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


class TrainingSamples(Dataset):
    """What the data loader reads: positions of the stream in, samples of a batch out.

    A sample that cannot be read, or that does not fit its bucket, is replaced by the next one of the bucket, and
    counted.

    Args:
        source: captioned images.
        buckets: the sizes of the samples, and which images may replace each other.
        center_crop, random_flip: see `fit_image`.
        derive_seed: (step, sample_index, purpose) -> seed of the sample's crop, flip and choice of the caption.
        caption_weights: of the captions, by column, where samples have several: {"captions": {column: text}}.
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

    def _caption(self, sample: dict[str, Any], position: Position) -> str:
        if self.caption_weights is None:
            return sample["caption"]
        return choose_caption(
            sample["captions"], dict(self.caption_weights), self._rng(position, "caption_choice").random()
        )

    def __getitem__(self, position: Position) -> dict[str, Any]:
        size = self.buckets.sizes[position.bucket]
        members = self.buckets.members[position.bucket]
        place = bisect_left(members, position.dataset_index)
        unreadable: list[str] = []
        unfit: list[str] = []
        for offset in range(min(len(members), MAX_REPLACEMENTS)):
            index = int(members[(place + offset) % len(members)])
            try:
                return {
                    **self._read(index, position),
                    "unreadable": unreadable,
                    "unfit": len(unfit),
                }
            except UnreadableSample as error:
                unreadable.append(str(error))
            except UnfitSample as error:
                unfit.append(f"sample {index}: {error}")
        raise ValueError(
            f"None of {len(unreadable) + len(unfit)} samples in a row can be used: {len(unreadable)} cannot be "
            f"read and {len(unfit)} do not fit {size[0]} x {size[1]} pixels (height x width); the first: "
            f"{(unreadable + unfit)[0]}."
        )

    def _read(self, index: int, position: Position) -> dict[str, Any]:
        """The sample of a batch that stands at a place of the source; raises as `make` does."""
        return self.make(self.source[index], position)

    def make(self, sample: dict[str, Any], position: Position) -> dict[str, Any]:
        """The sample of a batch that a sample of the source makes at a position of the stream.

        Raises:
            UnreadableSample: if it has no caption of those that are drawn from.
            UnfitSample: if its image would be enlarged or cropped too much.
        """
        caption, image = self._caption(sample, position), sample["image"]
        misfit = self.buckets.misfit(image.width, image.height, position.bucket)
        if misfit is not None:
            raise UnfitSample(misfit)
        size = self.buckets.sizes[position.bucket]
        fitted = fit_image(image, size, self.center_crop, self.random_flip, self._rng(position, "crop"))
        return {
            "pixels_uint8": torch.from_numpy(np.array(fitted, dtype=np.uint8)).permute(2, 0, 1),  # (3, H, W)
            "caption": caption,
            "sample_index": position.sample_index,
            "upscaled": int(cover(image.width, image.height, size)[0] > 1),
        }


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put samples of one size together.

    Returns:
        "pixels_uint8" (B, 3, H, W); "captions" and "sample_index", B of each; "unreadable": a message for every sample
        that could not be read; "unfit" and "upscaled": how many did not fit their bucket, and how many were enlarged.
    """
    return {
        "pixels_uint8": torch.stack([sample["pixels_uint8"] for sample in samples]),
        **collate_record(samples),
    }


def collate_record(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a batch says beside its tensors, wherever these come from; see `collate`."""
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
    """A loader over batches of positions; what it gives does not depend on the number of workers."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
