"""Interfaces of sources of captioned images, and views that reorder or join sources."""

import bisect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from .captions import read_captions
from .images import UnreadableSample, image_hash, image_size, read_image


class CaptionedImages(Protocol):
    """Map-style source of captioned images.

    `source[index]` is {"image": PIL image in RGB, "captions": {column: text}, "caption": the first of the captions} or
    raises `UnreadableSample`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def captions(self, index: int) -> dict[str, str]:
        """Captions by column."""


class ListedImages(CaptionedImages, Protocol):
    """Source that also gives sizes and hashes of its samples, and like its captions without decoding an image."""

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels."""

    def image_hash(self, index: int) -> bytes:
        """Hash (16 bytes) of the image."""

    def location(self, index: int) -> str:
        """Path or other description of where the sample is stored, for messages."""


def decode_sample(image: bytes | str | UnreadableSample | None, captions: dict[str, Any]) -> dict[str, Any]:
    """Decode a stored sample.

    Args:
        image: bytes or path of the image, or the reason why there is none.
        captions: stored captions by column.

    Returns:
        The sample, see `CaptionedImages`.

    Raises:
        UnreadableSample: if the image or every caption is unreadable.
    """
    texts = read_captions(captions)
    if isinstance(image, UnreadableSample):
        raise image
    return {"image": read_image(image), "captions": texts, "caption": next(iter(texts.values()))}


class DecodedImages(list[dict[str, Any]]):
    """Decoded samples in memory, see `CaptionedImages`."""

    def captions(self, index: int) -> dict[str, str]:
        """Captions by column."""
        return self[index]["captions"]


class StoredImages(ABC):
    """Source of stored samples. Subclasses locate the image and the captions of a sample."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def stored_image(self, index: int) -> bytes | str | None:
        """Bytes of the image, or its path."""

    @abstractmethod
    def stored_captions(self, index: int) -> dict[str, Any]:
        """Captions by column, undecoded."""

    @abstractmethod
    def location(self, index: int) -> str:
        """Path or other description of where the sample is stored, for messages."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self._locating_errors(index):
            return decode_sample(self.stored_image(index), self.stored_captions(index))

    def captions(self, index: int) -> dict[str, str]:
        """Captions by column; the image is not read."""
        with self._locating_errors(index):
            return read_captions(self.stored_captions(index))

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels, from the header of the image."""
        with self._locating_errors(index):
            return image_size(self.stored_image(index))

    def image_hash(self, index: int) -> bytes:
        """Hash (16 bytes) of the image as it is stored; nothing is decoded."""
        with self._locating_errors(index):
            return image_hash(self.stored_image(index))

    @contextmanager
    def _locating_errors(self, index: int) -> Iterator[None]:
        """Add the index and the location of a sample to its errors."""
        try:
            yield
        except (UnreadableSample, OSError, UnicodeDecodeError) as error:
            reason = error if isinstance(error, UnreadableSample) else f"it cannot be read: {error!r}"
            raise UnreadableSample(f"sample {index} ({self.location(index)}): {reason}") from error


class SingleCaptionImages(StoredImages):
    """Images of another source that all get the same caption.

    Args:
        images: source of the images; its captions are not read.
        caption: caption of every image.
    """

    def __init__(self, images: StoredImages, caption: str):
        self.images = images
        self.caption = caption

    def __len__(self) -> int:
        return len(self.images)

    def stored_image(self, index: int) -> bytes | str | None:
        return self.images.stored_image(index)

    def stored_captions(self, index: int) -> dict[str, Any]:
        return {"instance_prompt": self.caption}

    def location(self, index: int) -> str:
        return self.images.location(index)


class IndexedView(ABC):
    """Samples of other sources in another order. Subclasses define the order by `locate`.

    Args:
        sources: sources of the samples.
    """

    def __init__(self, sources: Sequence[ListedImages]):
        self.sources = sources

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, index in that source) of a sample."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, source_index = self.locate(index)
        return self.sources[source][source_index]

    def captions(self, index: int) -> dict[str, str]:
        source, source_index = self.locate(index)
        return self.sources[source].captions(source_index)

    def size(self, index: int) -> tuple[int, int]:
        source, source_index = self.locate(index)
        return self.sources[source].size(source_index)

    def image_hash(self, index: int) -> bytes:
        source, source_index = self.locate(index)
        return self.sources[source].image_hash(source_index)

    def location(self, index: int) -> str:
        source, source_index = self.locate(index)
        return self.sources[source].location(source_index)


class PreferencePairs(IndexedView):
    """Pairs of images of one caption: those of a source, and the rejected ones of another as "rejected".

    Args:
        preferred: preferred images with their captions.
        rejected: rejected images, in the same order.
    """

    def __init__(self, preferred: ListedImages, rejected: ListedImages):
        super().__init__([preferred])
        assert len(preferred) == len(rejected)
        self.rejected = rejected

    def __len__(self) -> int:
        return len(self.sources[0])

    def locate(self, index: int) -> tuple[int, int]:
        return 0, index

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.sources[0][index], "rejected": self.rejected[index]["image"]}


class Slice(IndexedView):
    """Samples [start, stop) of another source."""

    def __init__(self, source: ListedImages, start: int, stop: int):
        super().__init__([source])
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def locate(self, index: int) -> tuple[int, int]:
        return 0, self.start + index


class JoinedSource(IndexedView):
    """Concatenation of several sources: every sample of each, once."""

    def __init__(self, sources: Sequence[ListedImages]):
        super().__init__(sources)
        self.stops = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self.stops[-1]

    def locate(self, index: int) -> tuple[int, int]:
        source = bisect.bisect_right(self.stops, index)
        return source, index - (self.stops[source - 1] if source else 0)
