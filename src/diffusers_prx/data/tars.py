"""Tars in the WebDataset format: random access to local tars, streams of any tars.

Consecutive members with the same path up to the first dot form a sample: `000/12.jpg`, `000/12.txt`. Tars are read
with Python's `tarfile`: `datasets` and `webdataset` decode captions while they read, so that one broken caption ends
the whole tar, and neither offers random access.
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

SAMPLES_INSPECTED = 16  # at the start, to find the available columns
ATTEMPTS = 4  # for a remote tar whose connection breaks
FIRST_WAIT = 1.0  # seconds before the second attempt; doubles for each further one
TIMEOUT = 60.0  # seconds without an answer
MAX_MEMBER_BYTES = 1 << 30
MAX_EXTENSION_BYTES = 1 << 14  # of header extensions: long names, PAX records
GNU_EXTENSIONS = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
PAX_EXTENSIONS = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
# errors of a broken tar or connection
TAR_READ_ERRORS = (OSError, http.client.HTTPException, tarfile.ReadError, EOFError)

# image (bytes, path, or the reason why there is none) and captions by column, undecoded
StoredSample = tuple[bytes | str | UnreadableSample | None, dict[str, Any]]


class _CheckedHeader(tarfile.TarInfo):
    """Tar header that reports damage.

    `tarfile` silently takes a broken header for the end of the tar. It reads a negative size forever, and allocates or
    skips any other size.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_CheckedHeader":
        header = super().frombuf(buf, encoding, errors)
        is_extension = header.type in GNU_EXTENSIONS | PAX_EXTENSIONS
        _check_size(header.size, MAX_EXTENSION_BYTES if is_extension else MAX_MEMBER_BYTES)
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_CheckedHeader":
        try:
            header = super().fromtarfile(archive)
        except (tarfile.EOFHeaderError, tarfile.ReadError, OSError):  # type: ignore[attr-defined]
            raise
        except Exception as error:  # a malformed extension raises many types
            raise tarfile.ReadError(f"{error!r} at byte {archive.offset}") from error
        _check_size(header.size, MAX_MEMBER_BYTES)  # an extension may have changed it
        return header


def _check_size(size: int, maximum: int) -> None:
    if not 0 <= size <= maximum:
        raise tarfile.ReadError(f"a header states a size of {size} bytes, accepted: 0 to {maximum}")


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (key of the sample, ending, header) for the files of a tar, without hidden files."""
    for member in archive:
        archive.members = []  # type: ignore[attr-defined] # otherwise it keeps all headers in memory
        folder, name = os.path.split(member.name)
        key, _, ending = name.partition(".")
        if member.isreg() and not member.issparse() and key and ending and not key.startswith("__"):
            yield f"{folder}/{key}", ending.lower(), member


def image_ending(image_column: str, endings: Collection[str]) -> str | None:
    """Return the ending of a sample's image, or None: `image_column`, or any image format if that is `image`."""
    if image_column in endings:
        return image_column
    formats = image_endings()
    return next((ending for ending in sorted(endings) if ending in formats), None) if image_column == "image" else None


def check_columns(
    tars: str, image_column: str, caption_columns: Sequence[str], endings: Collection[str], jsons: Iterable[bytes]
) -> None:
    """Raise an error if tars lack a column.

    Args:
        tars: name of the tars, for the message.
        image_column: see `TarImages`.
        caption_columns: see `TarImages`.
        endings: endings of their members.
        jsons: some of their .json members, whose keys are columns too.

    Raises:
        ValueError: if a column is missing; the message lists the available ones.
    """
    if image_ending(image_column, endings) is None:
        if image_column == "image" and (unsupported := sorted(unreadable_endings().keys() & set(endings))):
            raise ValueError(
                f"{tars} has images in a format that cannot be read here (.{unsupported[0]}): "
                f"{unreadable_endings()[unsupported[0]]}."
            )
        require_column("image_column", image_column, sorted(endings), tars)
    available = {*endings} | ({"text"} if "txt" in endings else set())
    for text in jsons:
        with contextlib.suppress(ValueError):  # a broken one is counted when its sample is read
            values = json.loads(text)
            available.update(values if isinstance(values, dict) else {})
    for column in caption_columns:
        require_column("caption_column", column, sorted(available), tars)


def index_tar(path: str) -> tuple[list[str], np.ndarray, str]:
    """Find the members of a local tar by reading its headers.

    Returns:
        The E endings; byte offset and size of each member, int64 (samples, E, 2), size -1 for missing members; and a
        description of any damage, else an empty text. Members before the damage are listed.

    Raises:
        ValueError: if nothing of the file is readable as an uncompressed tar.
    """
    samples: list[dict[str, tuple[int, int]]] = []
    damage, last_key = "", None
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_CheckedHeader) as archive:
            total = os.path.getsize(path)
            for key, ending, member in _members(archive):
                if member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"{member.name} is truncated")
                if key != last_key or ending in samples[-1]:
                    samples.append({})
                samples[-1][ending] = (member.offset_data, member.size)
                last_key = key
    except (tarfile.ReadError, OSError) as error:
        damage = str(error)
    if damage and not samples:
        raise ValueError(f"{path} is not an uncompressed tar, which random access needs: {damage}")
    endings = sorted({ending for sample in samples for ending in sample})
    members = np.full((len(samples), len(endings), 2), -1, dtype=np.int64)
    for row, sample in zip(members, samples):
        for column, ending in enumerate(endings):
            row[column] = sample.get(ending, (-1, -1))
    return endings, members, damage


def cached_index(path: str, cache_dir: str | None) -> tuple[list[str], np.ndarray, str]:
    """Return `index_tar(path)`, cached in `cache_dir` until the size or the modification time of the tar changes.

    An unreadable cache is computed again. If the cache cannot be written (full disk), a warning says so.
    """
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
    except Exception as error:  # numpy and zipfile raise many types
        logger.warning(f"The index {file} cannot be read and is computed again: {error!r}")
    endings, members, damage = index_tar(path)
    index: dict[str, Any] = {"endings": np.array(endings, dtype=str), "members": members, "problem": np.array(damage)}
    try:
        with atomic_write(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, stamp=stamp, **index)
    except OSError as error:
        logger.warning(f"The index of {path} is not cached: {cache_dir} cannot be written ({error}).")
    return endings, members, damage


class TarImages(StoredImages):
    """Captioned images of local tars, with random access.

    The part of a tar before a truncation or a broken header is used, with a warning.

    Args:
        paths: uncompressed tars.
        image_column: ending of the image members; `image` means any image format.
        caption_columns: endings of members, or keys of the .json members; see `captions.find_caption`.
        cache_dir: folder that keeps the indices. Default: they are computed at every start.

    Raises:
        ValueError: if a file is not an uncompressed tar, or the tars lack a column.

    Example:
        >>> images = TarImages(["000.tar", "001.tar"], "image", ["text"])
        >>> images[0]["caption"]
    """

    def __init__(
        self, paths: Sequence[str], image_column: str, caption_columns: Sequence[str], cache_dir: str | None = None
    ):
        self.paths = list(paths)
        self.image_column = image_column
        self.caption_columns = tuple(caption_columns)
        indices = []
        for path in tqdm(self.paths, desc="indexing tars", disable=len(self.paths) < 10):
            endings, members, damage = cached_index(path, cache_dir)
            if damage:
                logger.warning(f"{path} is damaged: {damage}. The {len(members)} samples before the damage are used.")
            indices.append((endings, members))
        lengths = [len(members) for _, members in indices]
        self.tar = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # (samples,)
        needed = {image_column, *caption_columns, "txt", "json"} | image_endings()
        available = sorted({ending for endings, _ in indices for ending in endings})
        self.members = {}  # ending: offset and size in the tar, (samples, 2)
        for ending in available:
            if ending in needed:
                columns = [
                    members[:, endings.index(ending)]
                    if ending in endings
                    else np.full((len(members), 2), -1, dtype=np.int64)
                    for endings, members in indices
                ]
                self.members[ending] = np.concatenate(columns)
        self._check(available)

    def _check(self, endings: list[str]) -> None:
        if not len(self):
            raise ValueError(f"The {len(self.paths)} tars ({self.paths[0]}, ...) have no samples.")
        with_json = np.flatnonzero(self.members["json"][:, 1] >= 0).tolist() if "json" in endings else []
        jsons = (self._read(index, "json") for index in with_json[:SAMPLES_INSPECTED])
        tars = f"{self.paths[0]} (of {len(self.paths)})"
        check_columns(tars, self.image_column, self.caption_columns, endings, jsons)

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

    def location(self, index: int) -> str:
        offsets = [members[index, 0] for members in self.members.values() if members[index, 1] >= 0]
        return f"{self.paths[self.tar[index]]}, byte {min(offsets, default=0)}"


def _open(path: str) -> IO[bytes]:
    if path.startswith(("http://", "https://")):
        return urllib.request.urlopen(path, timeout=TIMEOUT)  # fsspec would need aiohttp
    return fsspec.open(path, "rb").open() if is_remote(path) else open_regular(path)


class TarShards:
    """Tars read from beginning to end, local or remote (http, https, and fsspec's protocols: hf, s3, ...).

    Args:
        paths: tars, which may be compressed.
        image_column: see `TarImages`.
        caption_columns: see `TarImages`.

    Raises:
        ValueError: if the first samples lack a column, or the first tar cannot be read.

    Example:
        >>> shards = TarShards(["https://example.com/000.tar"], "image", ["text"])
        >>> image, captions = next(shards.rows(0, 0))
    """

    def __init__(self, paths: Sequence[str], image_column: str, caption_columns: Sequence[str]):
        self.paths = list(paths)
        self.image_column = image_column
        self.caption_columns = tuple(caption_columns)
        try:
            first = list(itertools.islice(self._samples(0), SAMPLES_INSPECTED))
        except TAR_READ_ERRORS as error:
            raise ValueError(f"The tar {self.paths[0]} cannot be read: {error!r}.") from error
        if not first:
            raise ValueError(f"{self.paths[0]} has no samples.")
        endings = {ending for sample in first for ending in sample}
        jsons = (sample["json"] for sample in first if "json" in sample)
        check_columns(self.paths[0], image_column, caption_columns, endings, jsons)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, shard: int) -> str:
        return self.paths[shard]

    def _samples(self, shard: int) -> Iterator[dict[str, bytes]]:
        sample: dict[str, bytes] = {}
        last_key = None
        with (
            _open(self.paths[shard]) as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_CheckedHeader) as archive,
        ):
            for key, ending, member in _members(archive):
                if sample and (key != last_key or ending in sample):
                    yield sample
                    sample = {}
                content = archive.extractfile(member)
                assert content is not None  # `_members` yields regular files only
                sample[ending] = content.read()
                last_key = key
        if sample:
            yield sample

    def rows(self, shard: int, start: int) -> Iterator[StoredSample]:
        """Yield the samples of a tar from number `start` on. A remote tar is opened again if its connection breaks.

        Raises:
            ValueError: if a local tar breaks off, or a remote one `ATTEMPTS` times at the same sample.
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
            except TAR_READ_ERRORS as error:
                path = self.paths[shard]
                if attempt == ATTEMPTS or not is_remote(path):
                    raise ValueError(
                        f"The tar {path} cannot be read beyond sample {row}: {error!r}. Repair it or remove it."
                    ) from error
                logger.warning(f"{path} broke off at sample {row}, attempt {attempt} of {ATTEMPTS}: {error!r}")
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
                attempt += 1

    def _stored(self, sample: dict[str, bytes]) -> StoredSample:
        ending = image_ending(self.image_column, list(sample))
        captions = {column: find_caption(column, sample, sample.get) for column in self.caption_columns}
        return None if ending is None else sample[ending], captions
