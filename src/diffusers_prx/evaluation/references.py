"""The images that generated ones are compared with: read, fitted, hashed; and what is kept of them for next time."""

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
from torch.utils.data import DataLoader, Dataset

from ..data.captioned import ListedImages
from ..data.images import UnreadableSample
from ..data.samples import fit_image
from ..files import read_hashed_tensors, write_hashed_tensors
from .generation import PictureFolder, Prompt, share_batches
from .metrics import FeatureDistance

logger = logging.get_logger(__name__)

FITTING = "resized to cover the resolution of the generated images (Lanczos, antialiased), center crop"


class ReferenceImages(Dataset):
    """The first images of a source as uint8 (3, resolution, resolution), or the reason why not, as text.

    Args:
        source: captioned images.
        resolution: side in pixels, that of the generated images.
        size: how many of the source's samples; None: all.
    """

    def __init__(self, source: ListedImages, resolution: int, size: int | None = None):
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
        """The first `count` captions with their indices, and a message for every sample that has none."""
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
            raise ValueError(f"None of {len(unreadable)} samples of the reference has a caption; the first: "
                             f"{unreadable[0] if unreadable else 'there is none'}.")  # fmt: skip
        return prompts, unreadable


class GeneratedImages(Dataset):
    """Pictures of a folder by the place of their prompt, uint8 (3, H, W)."""

    def __init__(self, pictures: PictureFolder, prompts: Sequence[Prompt]):
        self.pictures = pictures
        self.all_prompts = prompts

    def __len__(self) -> int:
        return len(self.all_prompts)

    def __getitem__(self, place: int) -> torch.Tensor:
        return torch.from_numpy(self.pictures.read(self.all_prompts[place])).permute(2, 0, 1)  # (3, H, W)


def image_batches(
    images: ReferenceImages | GeneratedImages, batch_size: int, num_workers: int, label: str
) -> Iterator[tuple[list[int], torch.Tensor, list[str]]]:
    """This process's share of some images, each once: places, uint8 (B, 3, H, W), and messages of unreadable ones.

    A batch of which nothing can be read has no image; it is left out, but for its messages.
    """
    batches = share_batches(range(len(images)), batch_size, PartialState())
    loader = DataLoader(
        _Numbered(images), batch_sampler=[list(batch) for batch in batches], collate_fn=list, num_workers=num_workers
    )
    for samples in tqdm(loader, desc=label, unit="batch"):
        read = [(place, image) for place, image in samples if isinstance(image, torch.Tensor)]
        unreadable = [image for _, image in samples if isinstance(image, str)]
        tensor = torch.stack([image for _, image in read]) if read else torch.empty(0, dtype=torch.uint8)
        yield [place for place, _ in read], tensor, unreadable


class _Numbered(Dataset):
    def __init__(self, images: Dataset):
        self.images = images

    def __getitem__(self, place: int) -> tuple[int, Any]:
        return place, self.images[place]


def content_hash(images: ReferenceImages, batch_size: int, num_workers: int) -> tuple[str, list[str]]:
    """A hash of the fitted pixels of all images, in whatever order and on however many processes, and the messages of
    those that cannot be read."""
    total, count, unreadable = 0, 0, []
    for _, batch, messages in image_batches(images, batch_size, num_workers, "Hashing the reference"):
        for image in batch:
            pixels = image.contiguous().numpy()
            total += int.from_bytes(hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes()).digest(), "big")
        count += len(batch)
        unreadable += messages
    gathered = gather_object([(total, count, unreadable)])
    # a sum, not the exclusive or: two equal images must not cancel
    total, count = sum(part[0] for part in gathered) % 2**512, sum(part[1] for part in gathered)
    digest = hashlib.blake2b(f"{count} {total:x}".encode(), digest_size=16).hexdigest()
    return digest, [message for part in gathered for message in part[2]]


class ReferenceCache:
    """What metrics keep of a reference, on disk, by all that it depends on.

    Args:
        folder: of the cache; made when something is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, metric: FeatureDistance, content: str) -> Path:
        """The file for a metric and a reference with this `content_hash`."""
        extractor = metric.extractor
        treated = metric.compat if metric.kind == "moments" else None  # an MMD's images are not changed
        key = f"{content} {extractor.fingerprint} {extractor.resizing} {treated}"
        return self.folder / f"{metric.kind}-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"

    def load(self, metric: FeatureDistance, content: str) -> bool:
        """Whether the metric's reference is there; then one process has it."""
        path, state = self.path(metric, content), PartialState()
        found: list[dict[str, torch.Tensor] | None] = [None]
        if state.is_main_process and path.is_file():
            try:
                found = [read_hashed_tensors(path)]
            except ValueError as error:
                logger.warning(f"{error} The statistics of the reference are computed anew.")
        if found[0] is not None:
            metric.load_reference_state(found[0])
        # every process has to take the same way, whatever its own view of the disk is
        return any(gather_object([found[0] is not None]))

    def save(self, metric: FeatureDistance, content: str) -> None:
        """Write what all processes know of the reference, once."""
        state = metric.reference_state()
        if PartialState().is_main_process:
            write_hashed_tensors(self.path(metric, content), state)
