"""What every source of captioned images answers, and sources made of sources."""

import bisect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from .captions import read_captions
from .images import UnreadableSample, image_hash, image_size, read_image


class CaptionedImages(Protocol):
    """A map-style source: `source[i]` is {"image": PIL image in RGB, "captions": {column: text}, "caption": the first
    of them, ...}, or raises `UnreadableSample`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class ListedImages(CaptionedImages, Protocol):
    """A source that also gives captions, sizes, hashes (16 bytes) and places (paths or the like, for messages) of its
    samples without decoding an image."""

    def captions(self, index: int) -> dict[str, str]: ...

    def size(self, index: int) -> tuple[int, int]: ...

    def image_hash(self, index: int) -> bytes: ...

    def place(self, index: int) -> str: ...


def read_sample(image: bytes | str | UnreadableSample | None, captions: dict[str, Any]) -> dict[str, Any]:
    """A sample of what a source stores: its image (bytes, path, or why there is none) and its captions by column.

    Raises:
        UnreadableSample: if the image or every caption cannot be read.
    """
    texts = read_captions(captions)
    if isinstance(image, UnreadableSample):
        raise image
    return {"image": read_image(image), "captions": texts, "caption": next(iter(texts.values()))}


class StoredImages(ABC):
    """A source whose samples are stored: a subclass says where the image and the captions of a sample are."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def stored_image(self, index: int) -> bytes | str | None:
        """The image's bytes, or its path."""

    @abstractmethod
    def stored_captions(self, index: int) -> dict[str, Any]:
        """The captions by column, as they are stored."""

    @abstractmethod
    def place(self, index: int) -> str:
        """Where the sample is, for messages."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self._reading(index):
            return read_sample(self.stored_image(index), self.stored_captions(index))

    def captions(self, index: int) -> dict[str, str]:
        """The captions by column; the image is not read."""
        with self._reading(index):
            return read_captions(self.stored_captions(index))

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels, from the image's header."""
        with self._reading(index):
            return image_size(self.stored_image(index))

    def image_hash(self, index: int) -> bytes:
        """A hash (16 bytes) of the image as it is stored; nothing is decoded."""
        with self._reading(index):
            return image_hash(self.stored_image(index))

    @contextmanager
    def _reading(self, index: int) -> Iterator[None]:
        """Errors of a sample that cannot be read say which it is."""
        try:
            yield
        except (UnreadableSample, OSError, UnicodeDecodeError) as error:
            reason = error if isinstance(error, UnreadableSample) else f"no readable data: {error!r}"
            raise UnreadableSample(f"sample {index} has {reason} ({self.place(index)})") from error


class OneCaption(StoredImages):
    """Images of another source that all have the same caption; its own are not read.

    Args:
        images: the source.
        caption: the caption.
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

    def place(self, index: int) -> str:
        return self.images.place(index)


class IndexedView(ABC):
    """Samples of other sources, in another order: a subclass says which stands where.

    Args:
        sources: that they are of.
    """

    def __init__(self, sources: Sequence[ListedImages]):
        self.sources = sources

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def locate(self, index: int) -> tuple[int, int]:
        """(source, index in it) of a sample."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, inside = self.locate(index)
        return self.sources[source][inside]

    def captions(self, index: int) -> dict[str, str]:
        source, inside = self.locate(index)
        return self.sources[source].captions(inside)

    def size(self, index: int) -> tuple[int, int]:
        source, inside = self.locate(index)
        return self.sources[source].size(inside)

    def image_hash(self, index: int) -> bytes:
        source, inside = self.locate(index)
        return self.sources[source].image_hash(inside)

    def place(self, index: int) -> str:
        source, inside = self.locate(index)
        return self.sources[source].place(inside)


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
    """Several sources one after another: every sample of each, once."""

    def __init__(self, sources: Sequence[ListedImages]):
        super().__init__(sources)
        self.stops = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self.stops[-1]

    def locate(self, index: int) -> tuple[int, int]:
        place = bisect.bisect_right(self.stops, index)
        return place, index - (self.stops[place - 1] if place else 0)
