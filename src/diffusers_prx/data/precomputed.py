"""What frozen networks make of a data set, computed once: shards on disk, and training samples read from them.

A folder holds one data set at one resolution:

| file | what |
|---|---|
| settings.json | what was computed, and with which networks; written first |
| empty_text.safetensors | the empty caption, for dropped captions and guidance |
| shard-<rank>-<number>.safetensors | samples; each process writes its own, under another name until it is whole |
| index.json | the shards; written last, when every sample of the data set is in one |

A shard has three tensors per column: `name`, the values of all its samples, flattened, one sample after the other;
`name.shape` (n, dimensions), their shapes; and `name.hash` (n, 16), their hashes. So nothing is padded, and one sample
is read, and verified, without the others. The metadata of a shard hold a hash of its tables (the shapes, the hashes,
what was skipped), and index.json holds those of all shards: damage is found wherever it is, when it is read.
The columns of a sample (k captions, T tokens of all of them together):

| column | shape | type |
|---|---|---|
| index | () | int64, its place in the data set |
| size | (2,) | int64, height and width in pixels |
| image_hash | (16,) | uint8, of the image's bytes as they are stored |
| upscaled | () | bool, whether the image was enlarged |
| latent_mean, latent_std | (C, h, w) | float32: the distribution, from which training draws |
| pixels_uint8 | (3, H, W) | uint8, where there is no VAE or a loss looks at pixels |
| teacher_features | (N, E) | float16: a cosine is compared, for which it is 8 times as exact as bfloat16 |
| text | (T, E) | bfloat16, only real tokens |
| text_lengths, cut | (k,) | int64, bool: tokens of each caption, and whether the limit has cut it |
| caption_hash | (k, 16) | uint8, of each caption |
"""

import contextlib
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..files import (
    HASH_KEY,
    atomic_write,
    hash_tensors,
    read_hashed_json,
    read_hashed_tensors,
    write_hashed_json,
    write_hashed_tensors,
)
from ..latents import EncodedImages
from .buckets import Buckets, cover
from .captioned import ListedImages
from .images import UnfitSample, UnreadableSample
from .samplers import Position
from .samples import TrainingSamples, collate_record, fit_image

SETTINGS_FILE, EMPTY_TEXT_FILE, INDEX_FILE = "settings.json", "empty_text.safetensors", "index.json"
# A cache may have these although a run does not need them.
OPTIONAL_SETTINGS = ("teacher_features", "pixels")
# So many images of the data set are compared with the cache when a run starts.
IMAGES_COMPARED = 16
# Shards that a process keeps mapped into memory; another one is opened in about a millisecond.
OPEN_SHARDS = 256
RECOMPUTE = (
    "Start training/precompute_prx.py with the settings of this run: it computes what is damaged, changed or missing."
)


def as_tensor(digest: bytes) -> torch.Tensor:
    """A hash as uint8 (16,)."""
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def caption_hash(caption: str) -> torch.Tensor:
    """A hash (16,) of a caption, before it is cleaned: uint8."""
    return as_tensor(hashlib.blake2b(caption.encode(), digest_size=16).digest())


def caption_hashes(captions: Mapping[str, str]) -> torch.Tensor:
    """The hashes (k, 16) of the different captions of a sample, by column: uint8."""
    return torch.stack([caption_hash(caption) for caption in unique_captions(captions)])


def unique_captions(captions: Mapping[str, str]) -> list[str]:
    """The captions of a sample, each once."""
    return list(dict.fromkeys(captions.values()))


def value_hash(value: torch.Tensor) -> torch.Tensor:
    """A hash (16,) of the type, the shape and the bytes of a value: uint8."""
    digest = xxhash.xxh3_128()
    hash_tensors(digest, {"": value})
    return as_tensor(digest.digest())


# --- writing


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """An error of what is written says how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors turns a full disk into an error of its own
        raise OSError(
            f"{path} cannot be written ({error}). What was written before is whole and kept: when there is room, "
            "start the same command again, which computes what is missing."
        ) from error


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep what is computed, and with what; raises OSError."""
    path = folder / SETTINGS_FILE
    with _writing(path):
        write_hashed_json(path, settings, sync=True)


def write_empty_text(folder: Path, text: torch.Tensor) -> None:
    """Keep the embedding (T, E) of the empty caption; raises OSError."""
    path = folder / EMPTY_TEXT_FILE
    with _writing(path):
        write_hashed_tensors(path, {"text": text}, sync=True)


def read_empty_text(folder: Path) -> torch.Tensor:
    """The embedding (T, E) of the empty caption.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    try:
        return read_hashed_tensors(folder / EMPTY_TEXT_FILE)["text"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder / EMPTY_TEXT_FILE} is missing. {RECOMPUTE}") from error
    except ValueError as error:
        raise ValueError(f"{error} {RECOMPUTE}") from error


def write_shard(
    path: Path, samples: Sequence[Mapping[str, torch.Tensor]], skipped: Mapping[int, tuple[str, str, str]]
) -> None:
    """Write a shard whole or not at all.

    Args:
        path: where.
        samples: by column, all with the same columns; on the CPU.
        skipped: samples of the data set that cannot be used: "unreadable" or "unfit", why, and `stored_identity`.

    Raises:
        OSError: if there is no room.
    """
    tensors = {}
    for name in samples[0] if samples else ():
        values = [sample[name] for sample in samples]
        tensors[name] = torch.cat([value.reshape(-1) for value in values])
        tensors[f"{name}.shape"] = torch.tensor([list(value.shape) for value in values], dtype=torch.int64)
        tensors[f"{name}.hash"] = torch.stack([value_hash(value) for value in values])
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    metadata = {"skipped": json.dumps(skipped), "bytes": json.dumps(sizes)}
    metadata[HASH_KEY] = _tables_hash(metadata, {name: tensors[name] for name in tensors if _is_table(name)})
    with _writing(path), atomic_write(path, sync=True) as file:
        save_file(tensors, file, metadata)


def _is_table(name: str) -> bool:
    """True if a tensor of a shard is read whole: it says where the samples are, and what their values must be."""
    return name in ("index", "size") or name.endswith((".shape", ".hash"))


def _tables_hash(metadata: Mapping[str, str], tables: Mapping[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128(json.dumps([metadata["skipped"], metadata["bytes"]]).encode())
    hash_tensors(digest, tables)
    return digest.hexdigest()


class ShardWriter:
    """Collects the samples of a process and writes a shard whenever it has enough.

    Args:
        folder: where the shards go.
        rank: of the process.
        number: of its first shard.
        shard_samples: samples of a shard; what a kill loses is less than one shard per process.
    """

    def __init__(self, folder: Path, rank: int, number: int, shard_samples: int):
        self.folder, self.rank, self.number, self.shard_samples = folder, rank, number, shard_samples
        self.samples: list[dict[str, torch.Tensor]] = []
        self.skipped: dict[int, tuple[str, str, str]] = {}

    def add(self, sample: dict[str, torch.Tensor]) -> None:
        """Add a sample; raises OSError if a shard is full and there is no room for it."""
        self.samples.append(sample)
        if len(self.samples) == self.shard_samples:
            self.write()

    def skip(self, index: int, kind: str, reason: str, identity: str) -> None:
        """Note a sample that cannot be used; `identity`: see `stored_identity`."""
        self.skipped[index] = (kind, reason, identity)

    def write(self) -> None:
        """Write what there is; raises OSError if there is no room for it."""
        if self.samples or self.skipped:
            write_shard(shard_path(self.folder, self.rank, self.number), self.samples, self.skipped)
            self.number, self.samples, self.skipped = self.number + 1, [], {}


def shard_path(folder: Path, rank: int, number: int) -> Path:
    return folder / f"shard-{rank:05d}-{number:06d}.safetensors"


def shard_files(folder: Path) -> list[Path]:
    """The whole shards of a folder."""
    return sorted(folder.glob("shard-*.safetensors"))


def next_number(folder: Path) -> int:
    """A number that no shard of any process has."""
    return max((int(path.stem.rpartition("-")[2]) + 1 for path in shard_files(folder)), default=0)


def done_samples(folder: Path, count: int) -> np.ndarray:
    """Which of the `count` samples of the data set are in a shard, or noted there as not usable: bool (count,)."""
    done = np.zeros(count, dtype=bool)
    for path in shard_files(folder):
        shard = Shard(path)
        done[[*shard.indices(), *shard.skipped]] = True
    return done


def skipped_samples(folder: Path) -> dict[int, tuple[str, str]]:
    """The samples noted as not usable, by place in the data set: "unreadable" or "unfit", and why."""
    found: dict[int, tuple[str, str]] = {}
    for path in shard_files(folder):
        found |= {index: (kind, reason) for index, (kind, reason, _) in Shard(path).skipped.items()}
    return found


def write_index(folder: Path, settings: dict[str, Any], made_from: dict[str, Any]) -> dict[str, Any]:
    """Say that the cache is complete: index.json, from the headers of all shards.

    Args:
        folder: of the cache.
        settings: what a run must agree with.
        made_from: the names of the networks, for people and messages.

    Returns:
        What was written: also "shards", "samples", "skipped" (how many of each kind) and "bytes" by column.
    """
    hashes: dict[str, str] = {}
    sizes: dict[str, int] = {}
    skipped = {"unreadable": 0, "unfit": 0}
    samples = 0
    for path in shard_files(folder):
        shard = Shard(path)
        hashes[path.name] = shard.hash
        samples += len(shard.indices())
        for kind, *_ in shard.skipped.values():
            skipped[kind] += 1
        for name, size in shard.bytes.items():
            sizes[name] = sizes.get(name, 0) + size
    index = {
        "settings": settings,
        "made_from": made_from,
        "samples": samples,
        "skipped": skipped,
        "bytes": sizes,
        "shards": hashes,
    }
    path = folder / INDEX_FILE
    with _writing(path):
        write_hashed_json(path, index, sync=True)
    return index


def read_begun(folder: Path) -> dict[str, Any]:
    """The "settings" and "made_from" of a cache that was begun, from settings.json or, if that is damaged, index.json.

    Raises:
        ValueError: if both are damaged.
    """
    try:
        return read_hashed_json(folder / SETTINGS_FILE)
    except (ValueError, OSError) as error:
        try:
            index = read_hashed_json(folder / INDEX_FILE)
        except (ValueError, OSError):
            raise ValueError(
                f"{error} Without it nothing tells what the shards of {folder} were computed with: remove that folder "
                "and start the same command again, which computes everything anew."
            ) from error
        begun = {name: index[name] for name in ("settings", "made_from")}
        write_settings(folder, begun)
        return begun


# --- what is not to be kept


def stored_identity(source: ListedImages, index: int) -> str:
    """A hash of a sample's image and captions as they are stored; of those of them that can be read."""
    parts = []
    with contextlib.suppress(UnreadableSample):
        parts.append(source.image_hash(index).hex())
    with contextlib.suppress(UnreadableSample):
        parts += [f"{column} {text}" for column, text in source.captions(index).items()]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@dataclass
class ShardCheck:
    """Result of comparing a shard with its hashes and with the data set.

    Args:
        path: the shard.
        rows: rows that are neither damaged nor changed in the data set since.
        skipped: samples noted as not usable that have not changed since.
        damaged: a message for everything that is damaged.
        changed: a message for everything that has changed in the data set.
    """

    path: Path
    rows: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def drop_rest(self) -> None:
        """Remove what cannot be kept from the shard, and the shard if nothing can; raises OSError."""
        if not self.rows and not self.skipped:
            self.path.unlink()
            return
        shard = Shard(self.path)
        names = [name for name in shard.bytes if not name.endswith((".shape", ".hash"))]
        samples = [{name: shard.value(name, row) for name in names} for row in self.rows]
        write_shard(self.path, samples, {index: shard.skipped[index] for index in self.skipped})


class ShardChecks(Dataset):
    """Compares every value of some shards with its hash, and every sample with the data set; nothing is decoded.

    Args:
        paths: shards to compare.
        source: the data set.
        buckets: its images, sorted.
    """

    def __init__(self, paths: Sequence[Path], source: ListedImages, buckets: Buckets):
        self.paths, self.source = list(paths), source
        self.sizes = np.zeros((len(source), 2), dtype=np.int64)  # (N, 2), of the bucket; 0 for those in none
        for size, members in zip(buckets.sizes, buckets.members):
            self.sizes[np.asarray(members)] = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> ShardCheck:
        check = ShardCheck(self.paths[place])
        try:
            shard = Shard(check.path)
        except ValueError as error:
            check.damaged.append(str(error))
            return check
        names = [name for name in shard.bytes if not name.endswith((".shape", ".hash"))]
        for row, index in enumerate(shard.indices()):
            try:
                values = {name: shard.value(name, row) for name in names}
            except ValueError as error:
                check.damaged.append(str(error))
                continue
            if change := self._change(index, values):
                check.changed.append(f"sample {index}: {change}")
            else:
                check.rows.append(row)
        for index, (_, _, identity) in shard.skipped.items():
            if stored_identity(self.source, index) != identity:
                check.changed.append(f"sample {index}, which could not be used: its image or caption")
            else:
                check.skipped.append(index)
        return check

    def _change(self, index: int, values: Mapping[str, torch.Tensor]) -> str:
        """Say in words whether the image, the captions or the bucket of a sample has changed; empty if none has."""
        try:
            digest, captions = self.source.image_hash(index), self.source.captions(index)
        except UnreadableSample as error:
            return str(error)
        if not torch.equal(as_tensor(digest), values["image_hash"]):
            return "its image"
        if not torch.equal(caption_hashes(captions), values["caption_hash"]):
            return "its captions"
        if self.sizes[index].any() and values["size"].tolist() != self.sizes[index].tolist():
            return f"its bucket, which was {values['size'].tolist()} and is {self.sizes[index].tolist()}"
        return ""


# --- what is to be computed


class ImagesToEncode(Dataset):
    """Reads the samples that the networks are to see: always the center of the image, never flipped.

    An item is asked for as (index in the source, bucket). It has "index", "size", "image_hash", "upscaled" and
    "caption_hash" as in the table above, "pixels_uint8" (3, H, W) and "captions", the different ones of the sample; or
    "index" and "skipped", ("unreadable" or "unfit", the reason, `stored_identity`).
    """

    def __init__(self, source: ListedImages, buckets: Buckets):
        self.source, self.buckets = source, buckets

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        index, bucket = place
        try:
            sample = self.source[index]
        except UnreadableSample as error:
            return {"index": index, "skipped": ("unreadable", str(error), stored_identity(self.source, index))}
        image, size = sample["image"], self.buckets.sizes[bucket]
        misfit = self.buckets.misfit(image.width, image.height, bucket)
        if misfit is not None:
            return {"index": index, "skipped": ("unfit", misfit, stored_identity(self.source, index))}
        pixels_uint8 = center(image, size)  # (3, H, W)
        return {
            "index": torch.tensor(index),
            "size": torch.tensor(size),
            "image_hash": as_tensor(self.source.image_hash(index)),
            "upscaled": torch.tensor(bool(cover(image.width, image.height, size)[0] > 1)),
            "caption_hash": caption_hashes(sample["captions"]),
            "pixels_uint8": pixels_uint8,
            "captions": unique_captions(sample["captions"]),
        }


def center(image: Any, size: tuple[int, int]) -> torch.Tensor:
    """The center of an image as `fit_image` gives it: uint8 (3, H, W)."""
    fitted = fit_image(image, size, center_crop=True, random_flip=False, rng=random.Random(0))
    return torch.from_numpy(np.array(fitted, dtype=np.uint8)).permute(2, 0, 1)


# --- reading


class Shard:
    """A shard, mapped into memory; its tables are verified when it is opened, its values when they are read.

    Attributes:
        skipped: by place in the data set, ("unreadable" or "unfit", the reason, `stored_identity`).
        bytes: stored, by tensor.
        hash: hash of its tables.

    Raises:
        ValueError: if the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file: Any = safe_open(path, "pt")
            metadata = self.file.metadata() or {}
            self.hash: str = metadata.get(HASH_KEY, "")
            names = self.file.keys()
            tables = {name: self.file.get_tensor(name) for name in names if _is_table(name)}
            if not {"skipped", "bytes"} <= metadata.keys() or self.hash != _tables_hash(metadata, tables):
                raise ValueError("its tables do not match their hash")
            self.bytes: dict[str, int] = json.loads(metadata["bytes"])
            if self.bytes.keys() != set(names):
                raise ValueError(f"it has the tensors {sorted(names)}, not {sorted(self.bytes)}")
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"The shard {path} of the precomputed data is damaged or cannot be read ({error}). {RECOMPUTE}"
            ) from error
        self.skipped: dict[int, tuple[str, str, str]] = {
            int(index): tuple(why) for index, why in json.loads(metadata["skipped"]).items()
        }
        self._indices: list[int] = tables["index"].tolist() if "index" in tables else []
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}  # see `_table`

    def has(self, name: str) -> bool:
        """True if there is such a column."""
        return name in self.bytes

    def indices(self) -> list[int]:
        """The places in the data set of its samples."""
        return self._indices

    def _table(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The shapes (n, dimensions) of a column's values, where each begins (n + 1,), and their hashes (n, 16)."""
        if name not in self._tables:
            shapes, hashes = self.file.get_tensor(f"{name}.shape"), self.file.get_tensor(f"{name}.hash")
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), shapes.prod(1).cumsum(0)])
            self._tables[name] = shapes, starts, hashes
        return self._tables[name]

    def value(self, name: str, row: int) -> torch.Tensor:
        """The value of one sample, copied.

        Raises:
            ValueError: if it is not what was written.
        """
        shapes, starts, hashes = self._table(name)
        flat = self.file.get_slice(name)[int(starts[row]) : int(starts[row + 1])]
        value = flat.reshape(shapes[row].tolist()).clone()
        if not torch.equal(value_hash(value), hashes[row]):
            raise ValueError(
                f"The shard {self.path} of the precomputed data is damaged: `{name}` of sample {self._indices[row]} "
                f"does not match its hash. {RECOMPUTE}"
            )
        return value


# outside of the data set, so that this can be sent to the workers of a loader
@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(path: Path, stated: str) -> Shard:
    """A shard whose hash is the stated one; raises ValueError."""
    shard = Shard(path)
    if shard.hash != stated:
        raise ValueError(f"The shard {path} is not the one that {INDEX_FILE} lists. {RECOMPUTE}")
    return shard


def check_settings(
    there: dict[str, Any],
    wanted: dict[str, Any],
    folder: Path,
    made_from: dict[str, Any],
    optional: Sequence[str] = (),
) -> None:
    """Refuse a cache that was made with other settings.

    Args:
        there: the settings of the cache.
        wanted: those of this run.
        folder: of the cache.
        made_from: the names of what the cache was made from, for the message.
        optional: where `wanted` has None, the cache may have anything.

    Raises:
        ValueError: with every difference.
    """
    needed = {name: value for name, value in wanted.items() if value is not None or name not in optional}
    differences = [
        f"`{name}` is {there.get(name)!r} there and {value!r} here"
        for name, value in needed.items()
        if there.get(name) != value
    ]
    if differences:
        remedy = "Use the same settings, or precompute into another `precomputed_dir`."
        if there.get("samples") != wanted.get("samples"):
            remedy += " `samples` changes if images were added or removed, and with `num_validation_samples`."
        raise ValueError(
            f"The precomputed data in {folder} are not those of this run: {'; '.join(differences)}. They were made "
            f"from {made_from}. {remedy}"
        )


def require_complete(folder: Path) -> None:
    """Refuse a folder that holds no cache, or one that is not finished.

    Raises:
        ValueError: with what is there.
    """
    if not (folder / INDEX_FILE).is_file():
        begun = len(shard_files(folder))
        raise ValueError(
            f"`precomputed_dir`: {folder} has no {INDEX_FILE}"
            + (f", only the {begun} shards of a cache that is not finished" if begun else "")
            + ". Start training/precompute_prx.py with the settings of this run."
        )


class PrecomputedImages:
    """A complete cache of a data set, for reading at random.

    Args:
        folder: of the cache.
        settings: of this run.
        columns: those beside the text that the run needs; a VAE without randomness has no "latent_std".

    Attributes:
        columns: those of them that the cache has.
        skipped: samples that cannot be used, by place in the data set: "unreadable" or "unfit", and why.
        sizes: (N, 2) height and width in pixels of each sample, 0 for those skipped.
        empty_text: (T, E) bfloat16, the empty caption.

    Raises:
        ValueError: if the cache is not complete, damaged, or made with other settings.
    """

    def __init__(self, folder: Path | str, settings: dict[str, Any], columns: Sequence[str]):
        self.folder = Path(folder)
        require_complete(self.folder)
        try:
            index = read_hashed_json(self.folder / INDEX_FILE)
        except ValueError as error:
            raise ValueError(f"{error} {RECOMPUTE}") from error
        check_settings(index["settings"], settings, self.folder, index["made_from"], OPTIONAL_SETTINGS)
        self.columns = tuple(name for name in columns if name in index["bytes"])
        self.empty_text = read_empty_text(self.folder)
        count = settings["samples"]
        self.shards = [(self.folder / name, stated) for name, stated in index["shards"].items()]
        self.skipped: dict[int, tuple[str, str]] = {}
        self.sizes = np.zeros((count, 2), dtype=np.int32)
        self._shard, self._row = np.full(count, -1, dtype=np.int32), np.zeros(count, dtype=np.int32)
        for number, listed in enumerate(self.shards):
            shard = _open_shard(*listed)
            indices = shard.indices()
            self._shard[indices], self._row[indices] = number, np.arange(len(indices))
            if indices:
                self.sizes[indices] = shard.file.get_tensor("size").view(-1, 2).numpy()
            self.skipped |= {index: (kind, reason) for index, (kind, reason, _) in shard.skipped.items()}

    def value(self, index: int, name: str) -> torch.Tensor:
        """What is stored of one sample, by its place in the data set."""
        return _open_shard(*self.shards[self._shard[index]]).value(name, int(self._row[index]))

    def caption(self, index: int, caption: str) -> tuple[torch.Tensor, bool]:
        """The embedding (T, E) of a caption of a sample, and whether the limit of tokens has cut it.

        Raises:
            ValueError: if the caption is none of those that were embedded with this sample.
        """
        known = (self.value(index, "caption_hash") == caption_hash(caption)).all(1).nonzero().flatten()  # of (k, 16)
        if not len(known):
            raise ValueError(
                f"The caption of sample {index} is not the one that was embedded in {self.folder}: it was changed, or "
                f"the data are in another order or have other `caption_column`s. It is now {caption[:80]!r}. "
                f"{RECOMPUTE}"
            )
        place, lengths = int(known[0]), self.value(index, "text_lengths").tolist()
        start = sum(lengths[:place])
        text = self.value(index, "text")[start : start + lengths[place]]  # (T, E)
        return text, bool(self.value(index, "cut")[place])

    def check_sample(self, source: ListedImages, index: int) -> dict[str, str]:
        """The captions of a sample, after comparing its image, as it is stored, with the one that was encoded.

        Raises:
            ValueError: if it is another one, or cannot be read any more.
        """
        try:
            digest, captions = source.image_hash(index), source.captions(index)
        except UnreadableSample as error:
            raise ValueError(f"{error}; when {self.folder} was made, it could be read.") from error
        if not torch.equal(as_tensor(digest), self.value(index, "image_hash")):
            raise ValueError(
                f"The image of sample {index} is not the one that {self.folder} was made from: the data have "
                f"changed, or are in another order. {RECOMPUTE}"
            )
        return captions

    def check(self, source: ListedImages, buckets: Buckets) -> None:
        """Compare the cache with the data set: that every sample is there in its size, and images and captions of
        some, spread over it; those of the others are compared when they are read.

        Raises:
            ValueError: with what is different.
        """
        used = self._shard >= 0
        for size, places in zip(buckets.sizes, buckets.members):
            members = np.asarray(places)
            missing = [index for index in members[~used[members]].tolist() if index not in self.skipped]
            if missing:
                raise ValueError(
                    f"{len(missing)} of {len(used)} samples are not in {self.folder} (the first: sample {missing[0]}"
                    "): start training/precompute_prx.py again, which computes what is missing."
                )
            wrong = members[used[members] & (self.sizes[members] != size).any(1)]
            if len(wrong):
                height, width = self.sizes[wrong[0]]
                raise ValueError(
                    f"{len(wrong)} samples are in another bucket than in {self.folder} (sample {wrong[0]}: {height} x "
                    f"{width} pixels there, {size[0]} x {size[1]} here). Which buckets are closed depends on the "
                    "images of an optimizer step over all processes: precompute with as many."
                )
        readable = np.flatnonzero(used)
        for place in np.linspace(0, len(readable) - 1, min(IMAGES_COMPARED, len(readable))).astype(int):
            index = int(readable[place])
            for caption in self.check_sample(source, index).values():
                self.caption(index, caption)
            for name in self.columns:
                self.value(index, name)


class PrecomputedSamples(TrainingSamples):
    """As `TrainingSamples`, from a cache: images and captions are compared with those encoded, and not decoded.

    Args:
        images: the cache.
        source: the data set that it was made from.
        buckets, derive_seed, caption_weights: see `TrainingSamples`.
    """

    def __init__(
        self,
        images: PrecomputedImages,
        source: ListedImages,
        buckets: Buckets,
        derive_seed: Callable[[int, int, str], int],
        caption_weights: Mapping[str, float] | None = None,
    ):
        super().__init__(source, buckets, True, False, derive_seed, caption_weights)
        self.images = images
        self.stored = source

    def _read(self, index: int, position: Position) -> dict[str, Any]:
        if index in self.images.skipped:
            kind, reason = self.images.skipped[index]
            raise {"unreadable": UnreadableSample, "unfit": UnfitSample}[kind](reason)
        texts = self.images.check_sample(self.stored, index)
        caption = self._caption({"captions": texts, "caption": next(iter(texts.values()))}, position)
        text, cut = self.images.caption(index, caption)
        return {
            "columns": {name: self.images.value(index, name) for name in self.images.columns},
            "text": text,
            "cut": cut,
            "empty_text": self.images.empty_text,
            "caption": caption,
            "sample_index": position.sample_index,
            "upscaled": int(self.images.value(index, "upscaled")),
        }


def collate_precomputed(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put samples of one size together.

    Returns:
        The columns of the cache, (B, ...) each; "text" (B, L, E), padded to the longest, "text_lengths" and "cut", B
        of each, "empty_text" (T, E); and "captions", "sample_index", "unreadable", "unfit" and "upscaled" as
        `samples.collate` gives them.
    """
    texts = [sample["text"] for sample in samples]
    columns = samples[0]["columns"]
    return {
        **{name: torch.stack([sample["columns"][name] for sample in samples]) for name in columns},
        "text": pad_sequence(texts, batch_first=True),
        "text_lengths": [len(text) for text in texts],
        "cut": [sample["cut"] for sample in samples],
        "empty_text": samples[0]["empty_text"],
        **collate_record(samples),
    }


def cached_latents(batch: dict[str, Any]) -> EncodedImages:
    """The distribution of the latents of a batch from the cache."""
    return EncodedImages(batch["latent_mean"], batch.get("latent_std"))


def cached_text(batch: dict[str, Any], dropped: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """The text of a batch from the cache.

    Args:
        batch: from `collate_precomputed`, on its device.
        dropped: B, whose captions are replaced by the empty one.

    Returns:
        (B, L, E) float32, L the longest caption's; its bool mask (B, L), or None when nothing is padding; and how many
        of the captions that are left the limit of tokens has cut.
    """
    kept = zip(dropped, batch["text"], batch["text_lengths"])
    rows = [batch["empty_text"] if drop else text[:length] for drop, text, length in kept]  # (T, E) each
    text = pad_sequence(rows, batch_first=True).float()  # (B, L, E)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(text.shape[1]) < lengths[:, None]  # (B, L)
    cut = sum(cut and not drop for drop, cut in zip(dropped, batch["cut"]))
    return text, None if mask.all() else mask.to(text.device), cut
