"""Images and captions in tars of the WebDataset format: local ones by index, any of them as streams.

Members that follow each other and share their path up to the first dot are one sample: `000/12.jpg`, `000/12.txt`.
We read tars with Python's `tarfile`: `datasets` and `webdataset` decode captions while they read, so that one broken
caption ends the whole tar, and neither gives access by index.
"""

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import tarfile
import time
import urllib.request
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
from diffusers.utils import logging
from tqdm.auto import tqdm

from ..files import atomic_write, is_remote, open_regular
from .captioned import StoredImages
from .captions import find_caption, require_column
from .images import UnreadableSample, image_endings, unreadable_endings

logger = logging.get_logger(__name__)

LOOKED_AT = 16  # samples in which columns are looked for at the start
ATTEMPTS = 4  # to go on with a remote tar whose connection broke
LARGEST_MEMBER = 1 << 30  # bytes
LARGEST_EXTENSION = 1 << 14  # bytes of the extension of a header: long names, PAX records
EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
FIRST_WAIT = 1.0  # seconds before the second attempt, twice as long before each further one
TIMEOUT = 60.0  # seconds without an answer

# image (bytes, path, or why there is none) and captions by column, as they are stored
Stored = tuple[bytes | str | UnreadableSample | None, dict[str, Any]]


class _Header(tarfile.TarInfo):
    """Tells a broken or missing header from the end of the tar: `tarfile` silently takes each for the end. Refuses
    sizes that no data set has: `tarfile` reads a negative one for ever, and skips or allocates any other one."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        _check_size(header.size, LARGEST_EXTENSION if header.type in EXTENSIONS else LARGEST_MEMBER)
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            header = super().fromtarfile(archive)
        except (tarfile.EOFHeaderError, tarfile.ReadError, OSError):  # type: ignore[attr-defined]
            raise
        except Exception as error:  # a malformed extension raises many kinds
            raise tarfile.ReadError(f"{error!r} at byte {archive.offset}") from error
        _check_size(header.size, LARGEST_MEMBER)  # as an extension may have changed it
        return header


def _check_size(size: int, largest: int) -> None:
    if not 0 <= size <= largest:
        raise tarfile.ReadError(f"a header states a size of {size} bytes, accepted: 0 to {largest}")


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key of the sample, ending, header) of the files in a tar, hidden ones left out."""
    for member in archive:
        archive.members = []  # type: ignore[attr-defined] # or it would remember all headers
        folder, name = os.path.split(member.name)
        key, _, ending = name.partition(".")
        if member.isreg() and not member.issparse() and key and ending and not key.startswith("__"):
            yield f"{folder}/{key}", ending.lower(), member


def image_ending(image_column: str, endings: Collection[str]) -> str | None:
    """Which member holds the image: the one with that ending; for the column `image`, any kind of picture."""
    if image_column in endings:
        return image_column
    kinds = image_endings()
    return next((ending for ending in sorted(endings) if ending in kinds), None) if image_column == "image" else None


def check_columns(
    where: str, image_column: str, caption_columns: Sequence[str], endings: Collection[str], jsons: Iterable[bytes]
) -> None:
    """Refuse columns that are neither among the endings of members nor among the keys of the first .json members.

    Raises:
        ValueError: with what is there.
    """
    if image_ending(image_column, endings) is None:
        if image_column == "image" and (foreign := sorted(unreadable_endings().keys() & set(endings))):
            raise ValueError(
                f"{where} has pictures in a format that cannot be read here (.{foreign[0]}): "
                f"{unreadable_endings()[foreign[0]]}."
            )
        require_column("image_column", image_column, sorted(endings), where)
    there = {*endings} | ({"text"} if "txt" in endings else set())
    for text in jsons:
        with contextlib.suppress(ValueError):  # a broken one is counted when its sample is read
            values = json.loads(text)
            there.update(values if isinstance(values, dict) else {})
    for column in caption_columns:
        require_column("caption_column", column, sorted(there), where)


# By index


def index_tar(path: str) -> tuple[list[str], np.ndarray, str]:
    """Where the members of a local tar are; only headers are read.

    Returns:
        The endings, E of them; byte offset and size of each, int64 (samples, E, 2), with size -1 where a sample has no
        such member; and what is broken, or an empty text. What stands before a broken place is listed.

    Raises:
        ValueError: if nothing of the file can be read as a plain tar.
    """
    samples: list[dict[str, tuple[int, int]]] = []
    problem, last = "", None
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
            total = os.path.getsize(path)
            for key, ending, member in _members(archive):
                if member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                if key != last or ending in samples[-1]:
                    samples.append({})
                samples[-1][ending] = (member.offset_data, member.size)
                last = key
    except (tarfile.ReadError, OSError) as error:
        problem = str(error)
    if problem and not samples:
        raise ValueError(f"{path} is no tar that can be indexed (a compressed one cannot): {problem}")
    endings = sorted({ending for sample in samples for ending in sample})
    members = np.full((len(samples), len(endings), 2), -1, dtype=np.int64)
    for row, sample in zip(members, samples):
        for place, ending in enumerate(endings):
            row[place] = sample.get(ending, (-1, -1))
    return endings, members, problem


def cached_index(path: str, cache_dir: str | None) -> tuple[list[str], np.ndarray, str]:
    """`index_tar`, kept in a file of `cache_dir` until size or time of the tar change. A cache that cannot be written
    (a full disk) is reported and done without; one that cannot be read is made anew."""
    if cache_dir is None:
        return index_tar(path)
    status = os.stat(path)
    stamp = np.array([status.st_size, status.st_mtime_ns])
    digest = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    file = Path(cache_dir) / f"{Path(path).stem}-{digest}.npz"
    try:
        with np.load(file) as saved:
            if np.array_equal(saved["stamp"], stamp):
                return [str(ending) for ending in saved["endings"]], saved["members"], str(saved["problem"])
    except FileNotFoundError:
        pass
    except Exception as error:  # numpy and zipfile raise many kinds
        logger.warning(f"The index {file} cannot be read and is made anew: {error!r}")
    endings, members, problem = index_tar(path)
    found: dict[str, Any] = {"endings": np.array(endings, dtype=str), "members": members, "problem": np.array(problem)}
    try:
        with atomic_write(file) as path_aside, path_aside.open("wb") as aside:
            np.savez(aside, stamp=stamp, **found)
    except OSError as error:
        logger.warning(f"The index of {path} is not kept: {cache_dir} cannot be written ({error}).")
    return endings, members, problem


class TarImages(StoredImages):
    """Captioned images of local tars, by index.

    Of a tar with a broken place (truncated, or a broken header) the part before it is used, and a warning says so.

    Args:
        paths: of the tars, uncompressed.
        image_column: ending of the member that holds the image; `image`: any kind of picture.
        caption_columns: endings of members, or keys of the .json member; see `captions.find_caption`.
        cache_dir: where the indices are kept; none: they are made at every start.

    Raises:
        ValueError: if a file is no plain tar, or the tars have no such columns.
    """

    def __init__(
        self, paths: Sequence[str], image_column: str, caption_columns: Sequence[str], cache_dir: str | None = None
    ):
        self.paths = list(paths)
        self.image_column = image_column
        self.caption_columns = tuple(caption_columns)
        indices = []
        for path in tqdm(self.paths, desc="index of tars", disable=len(self.paths) < 10):
            endings, members, problem = cached_index(path, cache_dir)
            if problem:
                logger.warning(f"{path} is broken: {problem}. The {len(members)} samples before that place are used.")
            indices.append((endings, members))
        lengths = [len(members) for _, members in indices]
        self.tar = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # (samples,)
        needed = {image_column, *caption_columns, "txt", "json"} | image_endings()
        found = sorted({ending for endings, _ in indices for ending in endings})
        self.members = {}  # ending: offset and size in the tar, (samples, 2)
        for ending in found:
            if ending in needed:
                absent = [np.full((length, 2), -1, dtype=np.int64) for length in lengths]
                self.members[ending] = np.concatenate(
                    [
                        members[:, endings.index(ending)] if ending in endings else none
                        for (endings, members), none in zip(indices, absent)
                    ]
                )
        self._check(found)

    def _check(self, found: list[str]) -> None:
        if not len(self):
            raise ValueError(f"There is no sample in the {len(self.paths)} tars ({self.paths[0]}, ...).")
        jsons: Iterable[int] = (self.members["json"][:, 1] >= 0).nonzero()[0][:LOOKED_AT] if "json" in found else []
        check_columns(
            f"{self.paths[0]} (of {len(self.paths)})",
            self.image_column,
            self.caption_columns,
            found,
            (self._read(index, "json") for index in jsons),
        )

    def __len__(self) -> int:
        return len(self.tar)

    def _endings(self, index: int) -> list[str]:
        return [ending for ending, members in self.members.items() if members[index, 1] >= 0]

    def _read(self, index: int, ending: str) -> bytes:
        offset, size = (int(number) for number in self.members[ending][index])
        with open(self.paths[self.tar[index]], "rb") as file:
            file.seek(offset)
            return file.read(size)

    def stored_image(self, index: int) -> bytes | None:
        ending = image_ending(self.image_column, self._endings(index))
        return None if ending is None else self._read(index, ending)

    def stored_captions(self, index: int) -> dict[str, Any]:
        endings = self._endings(index)
        return {
            column: find_caption(column, endings, lambda ending: self._read(index, ending))
            for column in self.caption_columns
        }

    def place(self, index: int) -> str:
        starts = [members[index, 0] for members in self.members.values() if members[index, 1] >= 0]
        return f"{self.paths[self.tar[index]]}, byte {min(starts, default=0)}"


# As a stream


# what reading a broken tar or a broken connection raises
BREAKS = (OSError, http.client.HTTPException, tarfile.ReadError, EOFError)


def _open(path: str) -> IO[bytes]:
    if path.startswith(("http://", "https://")):
        return urllib.request.urlopen(path, timeout=TIMEOUT)  # fsspec would need aiohttp
    return fsspec.open(path, "rb").open() if is_remote(path) else open_regular(path)


class TarShards:
    """Tars to be read from beginning to end, local or remote (http, https, and what fsspec opens: hf, s3, ...).

    Args:
        paths, image_column, caption_columns: see `TarImages`; compressed tars do as well.

    Raises:
        ValueError: if the first sample has no such columns, or the first tar cannot be read.
    """

    def __init__(self, paths: Sequence[str], image_column: str, caption_columns: Sequence[str]):
        self.paths = list(paths)
        self.image_column = image_column
        self.caption_columns = tuple(caption_columns)
        try:
            first = list(itertools.islice(self._samples(0), LOOKED_AT))
        except BREAKS as error:
            raise ValueError(f"The tar {self.paths[0]} cannot be read: {error!r}.") from error
        if not first:
            raise ValueError(f"There is no sample in {self.paths[0]}.")
        endings = {ending for sample in first for ending in sample}
        jsons = (sample["json"] for sample in first if "json" in sample)
        check_columns(self.paths[0], image_column, caption_columns, endings, jsons)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, shard: int) -> str:
        return self.paths[shard]

    def _samples(self, shard: int) -> Iterator[dict[str, bytes]]:
        sample: dict[str, bytes] = {}
        last = None
        with _open(self.paths[shard]) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as archive:
            for key, ending, member in _members(archive):
                if sample and (key != last or ending in sample):
                    yield sample
                    sample = {}
                content = archive.extractfile(member)
                assert content is not None  # of a regular member
                sample[ending] = content.read()
                last = key
        if sample:
            yield sample

    def rows(self, shard: int, start: int) -> Iterator[Stored]:
        """The samples of a tar from number `start` on. When a remote tar breaks off, it is opened anew.

        Raises:
            ValueError: if the tar breaks off at the same sample again and again, or is local.
        """
        attempt, row = 1, start
        while True:
            reached = 0
            try:
                for sample in self._samples(shard):
                    reached += 1
                    if reached > row:
                        row += 1
                        attempt = 1
                        yield self._stored(sample)
                return
            except BREAKS as error:
                path = self.paths[shard]
                if attempt == ATTEMPTS or not is_remote(path):
                    raise ValueError(
                        f"The tar {path} cannot be read beyond its sample {row}: {error!r}. Repair it or leave it out."
                    ) from error
                logger.warning(f"{path} broke off at sample {row}, attempt {attempt} of {ATTEMPTS}: {error!r}")
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
                attempt += 1

    def _stored(self, sample: dict[str, bytes]) -> Stored:
        ending = image_ending(self.image_column, list(sample))
        captions = {column: find_caption(column, sample, sample.get) for column in self.caption_columns}
        return None if ending is None else sample[ending], captions
