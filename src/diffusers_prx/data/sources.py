"""Where captioned images come from, and how one becomes a training sample. All sources answer the same calls."""

import io
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.utils import logging
from torch.utils.data import DataLoader, Dataset

from .stream import Position

logger = logging.get_logger(__name__)


class CaptionedImages(Protocol):
    """A map-style source: `source[i]` is {"image": PIL image, "caption": str, ...}."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class UnreadableSample(Exception):
    """A sample whose image or caption cannot be read."""


class HubImages:
    """Captioned images of a `datasets` data set: from the Hub, from disk, or a folder with a metadata.jsonl.

    Args:
        dataset: the data set.
        image_column, caption_column: its columns. Images are decoded here, one by one, so that a corrupt file is an
            `UnreadableSample` and not the end of the run. Of several captions (a list) the first is taken.

    Raises:
        ValueError: if a column is missing, with the columns that are there.
    """

    def __init__(self, dataset: datasets.Dataset, image_column: str, caption_column: str):
        for option, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column not in dataset.column_names:
                raise ValueError(f"`{option}` is {column!r}, but the data set has {dataset.column_names}.")
        self.rows = dataset.select_columns(list(dict.fromkeys([image_column, caption_column])))
        self.rows = self.rows.cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.caption_column = caption_column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image, caption = row[self.image_column], row[self.caption_column]
        caption = caption[0] if isinstance(caption, list) and caption else caption
        if not isinstance(caption, str):
            raise UnreadableSample(f"sample {index} has no caption: {caption!r}")
        if image is None:
            raise UnreadableSample(f"sample {index} has no image")
        try:
            source = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
            with PIL.Image.open(source) as opened:
                return {"image": to_rgb(opened), "caption": caption}
        except Exception as error:  # decoders raise nearly anything on a corrupt file
            raise UnreadableSample(f"sample {index} has no readable image: {error!r}") from error


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as a viewer shows it: turned as its EXIF data say, on white where it is transparent, and with
    16-bit grey scaled to 8 bits (Pillow's own conversion cuts it off at 255).

    Raises:
        ValueError: for pixels without a stated range (32-bit integers, floats).
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return PIL.Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no stated range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


class Slice:
    """Samples [start, stop) of another source."""

    def __init__(self, source: CaptionedImages, start: int, stop: int):
        self.source = source
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.start + index]


def load_images(
    dataset_name: str | None,
    dataset_config_name: str | None,
    dataset_split: str,
    train_data_dir: str | None,
    image_column: str,
    caption_column: str,
) -> HubImages:
    """Open a data set by name or path, or a folder of images with a metadata.jsonl.

    Raises:
        ValueError: if the folder is not there or has no metadata, or a split or column is missing.
    """
    if train_data_dir is not None:
        folder = Path(train_data_dir)
        if not folder.is_dir():
            raise ValueError(f"`train_data_dir` is no folder: {train_data_dir}.")
        if not any(folder.rglob("metadata.jsonl")):
            raise ValueError(f"`train_data_dir` {train_data_dir} has no metadata.jsonl with file_name and captions.")
        listed = sum(len(split) for split in datasets.load_dataset("imagefolder", data_dir=str(folder)).values())
        found = sum(path.suffix.lower() in PIL.Image.registered_extensions() for path in folder.rglob("*"))
        if found > listed:
            logger.warning(f"{found - listed} images in {folder} are in no metadata.jsonl and are not used.")
        rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split=dataset_split)
    elif dataset_name is not None and (Path(dataset_name) / "state.json").is_file():
        if dataset_split != "train":
            raise ValueError(f"`dataset_split` is {dataset_split!r}, but {dataset_name} has no splits: leave it out.")
        rows = datasets.load_from_disk(dataset_name)
    elif dataset_name is not None and (Path(dataset_name) / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(dataset_name)
        if dataset_split not in splits:
            raise ValueError(f"`dataset_split` is {dataset_split!r}, but {dataset_name} has {sorted(splits)}.")
        rows = splits[dataset_split]
    else:
        rows = datasets.load_dataset(dataset_name, dataset_config_name, split=dataset_split)
    return HubImages(rows, image_column, caption_column)


def fit_image(
    image: PIL.Image.Image, resolution: int, center_crop: bool, random_flip: bool, rng: random.Random
) -> PIL.Image.Image:
    """Resize so that the shorter side is `resolution` (antialiased), crop to a square, and perhaps flip."""
    width, height = image.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if size != image.size:
        image = image.resize(size, PIL.Image.Resampling.LANCZOS)
    left, top = size[0] - resolution, size[1] - resolution
    left, top = (left // 2, top // 2) if center_crop else (rng.randint(0, left), rng.randint(0, top))
    image = image.crop((left, top, left + resolution, top + resolution))
    if random_flip and rng.random() < 0.5:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return image


class TrainingSamples(Dataset):
    """What the data loader reads: positions of the stream in, samples of a batch out.

    A sample that cannot be read is replaced by the next readable one of the source and counted.

    Args:
        source: captioned images.
        resolution: height and width of the samples in pixels.
        center_crop, random_flip: see `fit_image`.
        derive_seed: (step, sample_index, purpose) -> seed of the sample's crop and flip.
    """

    def __init__(
        self,
        source: CaptionedImages,
        resolution: int,
        center_crop: bool,
        random_flip: bool,
        derive_seed: Callable[[int, int, str], int],
    ):
        self.source = source
        self.resolution = resolution
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.derive_seed = derive_seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: Position) -> dict[str, Any]:
        unreadable: list[str] = []
        for offset in range(len(self.source)):
            try:
                sample = self.source[(position.dataset_index + offset) % len(self.source)]
                break
            except UnreadableSample as error:
                unreadable.append(str(error))
        else:
            raise ValueError(f"None of the {len(self.source)} samples can be read; the first: {unreadable[0]}")
        image = sample["image"]
        rng = random.Random(self.derive_seed(position.step, position.sample_index, "crop"))
        fitted = fit_image(image, self.resolution, self.center_crop, self.random_flip, rng)
        return {
            "pixels_uint8": torch.from_numpy(np.array(fitted, dtype=np.uint8)).permute(2, 0, 1),  # (3, H, W)
            "caption": sample["caption"],
            "sample_index": position.sample_index,
            "unreadable": unreadable,
            "upscaled": int(min(image.size) < self.resolution),
        }


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put samples together: {"pixels_uint8": (B, 3, H, W), "captions", "sample_index", "unreadable", "upscaled"}."""
    return {
        "pixels_uint8": torch.stack([sample["pixels_uint8"] for sample in samples]),
        "captions": [sample["caption"] for sample in samples],
        "sample_index": [sample["sample_index"] for sample in samples],
        "unreadable": [message for sample in samples for message in sample["unreadable"]],
        "upscaled": sum(sample["upscaled"] for sample in samples),
    }


def build_loader(samples: TrainingSamples, batches: Iterable[list[Position]], num_workers: int) -> DataLoader:
    """A loader over batches of positions; what it gives does not depend on the number of workers."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
