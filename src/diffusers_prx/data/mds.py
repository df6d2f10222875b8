"""MDS shards, the data format of the original trainer, read without the package that writes them.

The writer's package, mosaicml-streaming (0.13), needs transformers below 5 and cannot be installed beside this one. A
folder holds `index.json`, which names columns and shards, and the shards. A shard holds the number of its samples n,
n + 1 offsets, a copy of the configuration, and the samples; a sample the sizes of its columns of variable size, then
the columns. Numbers are little-endian uint32. A shard may be compressed as a whole.
"""

import bz2
import gzip
import io
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image

from ..files import open_regular, printable
from .captioned import StoredImages
from .captions import require_column
from .images import UnreadableSample
from .tars import StoredSample

INDEX_FILE = "index.json"
MAX_INDEX_BYTES = 1 << 28
MAX_SHARD_BYTES = 1 << 31  # of a compressed shard once it is decompressed, in memory; written shards have 64 MiB
IMAGE_ENCODINGS = ("jpeg", "png", "bytes", "pil")
CAPTION_ENCODINGS = ("str", "json")
# Modes of raw images whose values are bytes, with the number of bands; a palette is not stored with them.
RAW_MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


@dataclass(frozen=True)
class MdsShard:
    """One shard.

    Args:
        path: uncompressed file.
        size: number of its bytes.
        samples: number of samples.
        columns: encoding and fixed size in bytes by name of each column; a size of None is stored in the samples.
        compression: algorithm of `zipped_path`; None if there is only the uncompressed file.
        zipped_path: compressed file.
    """

    path: str
    size: int
    samples: int
    columns: dict[str, tuple[str, int | None]]
    compression: str | None = None
    zipped_path: str = ""

    @property
    def is_compressed(self) -> bool:
        """True if only the compressed file exists."""
        return self.compression is not None and not os.path.isfile(self.path)

    def open(self) -> IO[bytes]:
        """Open the shard, decompressed.

        Raises:
            ValueError: if the file does not have the size that the index states, or its compression is not supported.
            OSError: if the file cannot be read.
        """
        if not self.is_compressed:
            file = open_regular(self.path)
            size = os.fstat(file.fileno()).st_size
        else:
            with open_regular(self.zipped_path) as zipped:
                content = _decompressor(str(self.compression))(zipped).read(self.size + 1)
            file, size = io.BytesIO(content), len(content)
        if size != self.size:
            file.close()
            raise ValueError(f"it does not have the {self.size} bytes that {INDEX_FILE} states")
        return file

    def offsets(self, file: IO[bytes]) -> np.ndarray:
        """Read where the samples begin and end, (samples + 1,).

        Raises:
            ValueError: if the shard has another number of samples than the index states.
        """
        head = file.read(4 * (self.samples + 2))
        numbers = np.frombuffer(head[: len(head) // 4 * 4], dtype="<u4")
        if len(numbers) != self.samples + 2 or numbers[0] != self.samples:
            raise ValueError(f"it does not have the {self.samples} samples that {INDEX_FILE} states")
        return numbers[1:]

    def read(self, file: IO[bytes], begin: int, end: int) -> dict[str, bytes]:
        """Read one sample, undecoded by column.

        Raises:
            UnreadableSample: if the offsets or sizes contradict each other.
        """
        if not 4 * (self.samples + 2) <= begin <= end <= self.size:
            raise UnreadableSample(f"its offsets {begin} and {end} are outside the shard's {self.size} bytes")
        file.seek(begin)
        content = file.read(end - begin)
        variable = [name for name, (_, size) in self.columns.items() if size is None]
        if len(content) < 4 * len(variable):
            raise UnreadableSample("it is shorter than the sizes of its columns")
        stated = dict(zip(variable, struct.unpack_from(f"<{len(variable)}I", content)))
        sizes = [stated[name] if size is None else size for name, (_, size) in self.columns.items()]
        stops = list(itertools.accumulate(sizes, initial=4 * len(variable)))
        if stops[-1] != len(content):
            raise UnreadableSample(f"its columns have {stops[-1]} bytes, but it has {len(content)}")
        return {name: content[first:stop] for name, first, stop in zip(self.columns, stops, stops[1:])}


def _decompressor(compression: str) -> Callable[[IO[bytes]], Any]:
    """Return a function that opens a compressed file as a stream of its content."""
    name = compression.partition(":")[0]
    if name == "zstd":
        try:
            import zstandard
        except ImportError as error:
            raise ValueError("it is compressed with zstd: run pip install -e '.[mds]'") from error
        return zstandard.ZstdDecompressor().stream_reader
    if name in ("gz", "bz2"):
        return gzip.open if name == "gz" else bz2.open
    raise ValueError(f"it is compressed with {compression!r}; accepted: zstd, gz, bz2. Decompress it first")


def is_mds(folder: Path) -> bool:
    """True if a folder holds MDS shards; a picture's captions may be in a file of the same name as their index."""
    return (folder / INDEX_FILE).is_file() and any(folder.glob("**/shard.*.mds*"))


def read_index(folder: str) -> list[MdsShard]:
    """Read the index of a folder.

    Raises:
        ValueError: if it is not a valid index, or names a file outside the folder or one that does not exist.
    """
    path = Path(folder) / INDEX_FILE
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{printable(path)} has more than {MAX_INDEX_BYTES} bytes.")
    try:
        with open_regular(path) as file:
            shards = [_shard(folder, entry) for entry in json.load(file)["shards"]]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{printable(path)} is not an index of MDS shards: {error!r}.") from error
    if not sum(shard.samples for shard in shards):
        raise ValueError(f"{printable(path)} lists no samples.")
    for shard in shards:
        if shard.columns != shards[0].columns:
            raise ValueError(f"{printable(shard.path)} has other columns than {printable(shards[0].path)}.")
        file_path = shard.zipped_path if shard.is_compressed else shard.path
        if not os.path.isfile(file_path):
            raise ValueError(f"{printable(file_path)} does not exist, but {printable(path)} lists it.")
    return [shard for shard in shards if shard.samples]


def _shard(folder: str, entry: dict[str, Any]) -> MdsShard:
    raw, zipped = entry["raw_data"], entry.get("zip_data") or {}
    if entry["format"] != "mds":
        raise ValueError(f"`format` is {entry['format']!r}; accepted: 'mds'")
    for name in filter(None, (raw["basename"], zipped.get("basename"))):
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise ValueError(f"`basename` is {name!r}, which is not inside the folder")
    sizes = [None if size is None else int(size) for size in entry["column_sizes"]]
    columns = dict(zip(entry["column_names"], zip(entry["column_encodings"], sizes, strict=True), strict=True))
    shard = MdsShard(
        os.path.join(folder, raw["basename"]),
        int(raw["bytes"]),
        int(entry["samples"]),
        columns,
        entry.get("compression"),
        os.path.join(folder, zipped.get("basename", "")),
    )
    if shard.samples < 0 or min([size for size in sizes if size is not None], default=0) < 0:
        raise ValueError("a number is negative")
    if not 4 * (shard.samples + 2) <= shard.size <= MAX_SHARD_BYTES:
        raise ValueError(f"`bytes` is {shard.size} for {shard.samples} samples; accepted: up to {MAX_SHARD_BYTES}")
    return shard


class MdsColumns:
    """The image and the captions in the samples of an index.

    Args:
        shards: shards of the index.
        image_column: column of the images.
        caption_columns: columns of the captions.

    Raises:
        ValueError: if a column is missing, or has an encoding that is not supported.
    """

    def __init__(self, shards: Sequence[MdsShard], image_column: str, caption_columns: Sequence[str]):
        self.image_column, self.caption_columns = image_column, tuple(caption_columns)
        self.columns = shards[0].columns
        for option, column, accepted in (
            ("image_column", image_column, IMAGE_ENCODINGS),
            *(("caption_column", column, CAPTION_ENCODINGS) for column in caption_columns),
        ):
            require_column(option, column, list(self.columns), printable(shards[0].path))
            encoding = self.columns[column][0]
            if encoding not in accepted:
                raise ValueError(f"`{option}` is {column!r}, which is encoded as {encoding!r}; accepted: {accepted}.")

    def image(self, sample: dict[str, bytes]) -> bytes:
        """Return the image of a sample as a file. Raises `UnreadableSample` for raw pixels that are invalid."""
        content = sample[self.image_column]
        return _encode_raw(content) if self.columns[self.image_column][0] == "pil" else content

    def captions(self, sample: dict[str, bytes]) -> dict[str, Any]:
        """Return the captions of a sample by column, undecoded."""
        return {column: self._caption(column, sample[column]) for column in self.caption_columns}

    def _caption(self, column: str, content: bytes) -> Any:
        if self.columns[column][0] == "str":
            return content
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            return error  # `read_caption` rejects it


def _encode_raw(content: bytes) -> bytes:
    """Encode an image that is stored as width, height, length of the mode, mode and pixels."""
    if len(content) < 12:
        raise UnreadableSample("its pixels are truncated")
    width, height, length = struct.unpack_from("<3I", content)
    mode, pixels = content[12 : 12 + length].decode("ascii", "replace"), content[12 + length :]
    if len(pixels) != width * height * RAW_MODES.get(mode, 0) or not pixels:
        raise UnreadableSample(f"its {len(pixels)} bytes are not {width} x {height} pixels of mode {mode!r:.20}")
    file = io.BytesIO()
    PIL.Image.frombytes(mode, (width, height), pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


class MdsImages(StoredImages):
    """Captioned images of uncompressed MDS shards, with random access.

    Args:
        shards: return value of `read_index`.
        image_column: column of the images.
        caption_columns: columns of the captions.

    Raises:
        ValueError: as in `MdsColumns`, or if a shard is compressed.

    Example:
        >>> images = MdsImages(read_index("photos"), "image", ["caption"])
        >>> images[0]["caption"]
    """

    def __init__(self, shards: Sequence[MdsShard], image_column: str, caption_columns: Sequence[str]):
        compressed = next((shard for shard in shards if shard.is_compressed), None)
        if compressed is not None:
            raise ValueError(f"{printable(compressed.path)} exists only compressed: pass `--streaming`.")
        self.shards, self.columns = shards, MdsColumns(shards, image_column, caption_columns)
        self.stops = np.cumsum([shard.samples for shard in shards])

    def __len__(self) -> int:
        return int(self.stops[-1])

    def _locate(self, index: int) -> tuple[MdsShard, int]:
        number = int(np.searchsorted(self.stops, index, side="right"))
        return self.shards[number], index - int(self.stops[number] - self.shards[number].samples)

    def _read(self, index: int) -> dict[str, bytes]:
        shard, row = self._locate(index)
        try:
            with shard.open() as file:
                begin, end = (int(offset) for offset in shard.offsets(file)[row : row + 2])
                return shard.read(file, begin, end)
        except ValueError as error:
            raise UnreadableSample(f"{printable(shard.path)}: {error}") from error

    def stored_image(self, index: int) -> bytes:
        return self.columns.image(self._read(index))

    def stored_captions(self, index: int) -> dict[str, Any]:
        return self.columns.captions(self._read(index))

    def location(self, index: int) -> str:
        shard, row = self._locate(index)
        return f"{shard.path}, sample {row}"


class MdsShards:
    """MDS shards read from beginning to end; compressed ones are decompressed in memory.

    Args:
        shards: return value of `read_index`.
        image_column: column of the images.
        caption_columns: columns of the captions.

    Raises:
        ValueError: as in `MdsColumns`, or if the first shard cannot be read.

    Example:
        >>> image, captions = next(MdsShards(read_index("photos"), "image", ["caption"]).rows(0, 0))
    """

    def __init__(self, shards: Sequence[MdsShard], image_column: str, caption_columns: Sequence[str]):
        self.shards, self.columns = shards, MdsColumns(shards, image_column, caption_columns)
        next(self.rows(0, 0))

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, shard: int) -> str:
        return self.shards[shard].path

    def rows(self, shard: int, start: int) -> Iterator[StoredSample]:
        """Yield the samples of a shard from number `start` on.

        Raises:
            ValueError: if the shard cannot be read.
        """
        opened = self.shards[shard]
        try:
            file = opened.open()
            offsets = opened.offsets(file)
        except Exception as error:  # decompressors raise many types
            raise ValueError(f"The shard {printable(opened.path)} cannot be read: {error}.") from error
        with file:
            for begin, end in itertools.pairwise(offsets[start:].tolist()):
                captions: dict[str, Any] = {}
                try:
                    sample = opened.read(file, begin, end)
                    captions = self.columns.captions(sample)
                    yield self.columns.image(sample), captions
                except UnreadableSample as error:
                    yield error, captions or dict.fromkeys(self.columns.caption_columns, "unreadable")
