"""Reference images: reading, resizing and hashing them, and a cache of their statistics."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm
from diffusers.utils import logging
from huggingface_hub import constants
from torch.utils.data import DataLoader, Dataset

from ..data.captioned import CaptionedImages
from ..data.images import UnreadableSample
from ..data.samples import fit_image
from ..files import read_hashed_tensors, write_hashed_tensors
from .generation import PictureFolder, Prompt, batches_of_process
from .metrics import FeatureDistance

logger = logging.get_logger(__name__)

# Folder of features and statistics that several evaluations and runs need.
REFERENCE_CACHE = Path(constants.HF_HOME) / "diffusers_prx" / "references"
FITTING = "resized to cover the resolution of the generated images (Lanczos, antialiased), center crop"


class ReferenceImages(Dataset):
    """The first images of a source as uint8 (3, resolution, resolution); an error message for unreadable images.

    Args:
        source: captioned images.
        resolution: side length of the generated images in pixels.
        size: number of samples; None: all.
    """

    def __init__(self, source: CaptionedImages, resolution: int, size: int | None = None):
        self.source = source
        self.resolution = resolution
        self.size = len(source) if size is None else min(size, len(source))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            image = self.source[index]["image"]
        except UnreadableSample as error:
            return str(error)
        fitted = fit_image(image, (self.resolution, self.resolution), True, False, random.Random(0))
        return torch.from_numpy(np.array(fitted, dtype=np.uint8)).permute(2, 0, 1)  # (3, H, W)

    def prompts(self, count: int) -> tuple[list[Prompt], list[str]]:
        """Return the first `count` captions with their indices, and a message for every sample without a caption.

        Raises:
            ValueError: if no sample has a caption.
        """
        prompts: list[Prompt] = []
        unreadable: list[str] = []
        for index in range(len(self.source)):
            if len(prompts) == count:
                break
            try:
                prompts.append((index, next(iter(self.source.captions(index).values()))))
            except UnreadableSample as error:
                unreadable.append(str(error))
        if not prompts:
            first = unreadable[0] if unreadable else "the reference is empty"
            raise ValueError(f"`reference`: none of {len(unreadable)} samples has a caption. First message: {first}.")
        return prompts, unreadable


class GeneratedImages(Dataset):
    """Generated images of a list of prompts, uint8 (3, H, W)."""

    def __init__(self, pictures: PictureFolder, prompts: Sequence[Prompt]):
        self.pictures = pictures
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.pictures.read(self.prompts[index])).permute(2, 0, 1)  # (3, H, W)


def image_batches(
    images: ReferenceImages | GeneratedImages, batch_size: int, num_workers: int, label: str
) -> Iterator[tuple[list[int], torch.Tensor, list[str]]]:
    """Yield this process's share of the images: indices, images uint8 (B, 3, H, W), and messages of unreadable images.

    A batch without a readable image is an empty tensor.
    """
    batches = batches_of_process(range(len(images)), batch_size, PartialState())
    loader = DataLoader(
        _Indexed(images), batch_sampler=[list(batch) for batch in batches], collate_fn=list, num_workers=num_workers
    )
    for samples in tqdm(loader, desc=label, unit="batch"):
        readable = [(index, image) for index, image in samples if isinstance(image, torch.Tensor)]
        unreadable = [image for _, image in samples if isinstance(image, str)]
        tensor = torch.stack([image for _, image in readable]) if readable else torch.empty(0, dtype=torch.uint8)
        yield [index for index, _ in readable], tensor, unreadable


class _Indexed(Dataset):
    """Dataset of (index, sample)."""

    def __init__(self, images: Dataset):
        self.images = images

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.images[index]


def content_hash(images: ReferenceImages, batch_size: int, num_workers: int) -> tuple[str, list[str]]:
    """Return a hash of the pixels of all images, and the messages of unreadable ones.

    The hash does not depend on the order of the images or the number of processes.
    """
    total, count, unreadable = 0, 0, []
    for _, batch, messages in image_batches(images, batch_size, num_workers, "Hashing the reference"):
        for image in batch:
            pixels = image.contiguous().numpy()
            total += int.from_bytes(hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes()).digest(), "big")
        count += len(batch)
        unreadable += messages
    gathered = gather_object([(total, count, unreadable)])
    # a sum, not XOR: two equal images must not cancel
    total, count = sum(part[0] for part in gathered) % 2**512, sum(part[1] for part in gathered)
    digest = hashlib.blake2b(f"{count} {total:x}".encode(), digest_size=16).hexdigest()
    return digest, [message for part in gathered for message in part[2]]


class ReferenceCache:
    """Cache of reference statistics on disk, keyed by everything that they depend on.

    Args:
        folder: folder of the cache, created on the first write.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, metric: FeatureDistance, content: str) -> Path:
        """Return the cache file for a metric and a reference with this `content_hash`."""
        extractor = metric.extractor
        compat = metric.compat if metric.kind == "moments" else None  # it does not change the images of an MMD
        key = f"{content} {extractor.fingerprint} {extractor.resizing} {compat}"
        return self.folder / f"{metric.kind}-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"

    def load(self, metric: FeatureDistance, content: str) -> bool:
        """Load the reference of a metric on the main process. Return True on all processes if it was cached."""
        path, state = self.path(metric, content), PartialState()
        statistics: dict[str, torch.Tensor] | None = None
        if state.is_main_process and path.is_file():
            try:
                statistics = read_hashed_tensors(path)
            except ValueError as error:
                logger.warning(f"{error} The statistics of the reference are computed again.")
        if statistics is not None:
            metric.load_reference_state(statistics)
        return any(gather_object([statistics is not None]))

    def save(self, metric: FeatureDistance, content: str) -> None:
        """Write the reference statistics of all processes on the main process."""
        state = metric.reference_state()
        if PartialState().is_main_process:
            write_hashed_tensors(self.path(metric, content), state)
