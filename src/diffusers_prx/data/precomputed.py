"""Precomputed data: outputs of frozen networks for a whole data set, stored in shards, and training samples from them.

A folder holds one data set at one resolution:

| file | content |
|---|---|
| settings.json | settings and networks of the computation; written first |
| empty_text.safetensors | embedding of the empty caption, for dropped captions and guidance |
| shard-<rank>-<number>.safetensors | samples; each process writes its own shards, atomically |
| index.json | hashes of the shards; written last, when every sample of the data set is in a shard |

A shard has three tensors per column: `name`, the flattened values of all samples, one after the other;
`name.shape` (n, dimensions), their shapes; and `name.hash` (n, 16), their hashes. Nothing is padded, and one sample
can be read and verified without the others. The metadata of a shard contain a hash of its tables (shapes, hashes,
skipped samples), and index.json contains the hashes of all shards. Reading therefore finds any damage.

Columns of a sample with k captions of T tokens in total:

| column | shape | content |
|---|---|---|
| index | () | int64, index in the data set |
| size | (2,) | int64, height and width in pixels |
| image_hash | (16,) | uint8, hash of the image's bytes as they are stored |
| upscaled | () | bool, True if the image was enlarged |
| latent_mean, latent_std | (C, h, w) | float32, distribution from which training draws latents |
| pixels_uint8 | (3, H, W) | uint8, without a VAE or for losses on pixels |
| teacher_features | (N, E) | float16: for the cosine of the alignment it is 8 times as exact as bfloat16 |
| text | (T, E) | bfloat16, embeddings of all captions without padding |
| text_lengths, cut | (k,) | int64, bool: tokens of each caption, and True if it was truncated |
| caption_hash | (k, 16) | uint8, hash of each caption |
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
from .buckets import Buckets, resize_scale_and_crop
from .captioned import ListedImages
from .images import UnfitSample, UnreadableSample
from .samplers import Position
from .samples import TrainingSamples, collate_metadata, fit_image, image_to_tensor

SETTINGS_FILE, EMPTY_TEXT_FILE, INDEX_FILE = "settings.json", "empty_text.safetensors", "index.json"
OPTIONAL_SETTINGS = ("teacher_features", "pixels")  # a cache may contain these although a run does not need them
IMAGES_COMPARED = 16  # images of the data set that are compared with the cache when a run starts
OPEN_SHARDS = 256  # shards that a process keeps mapped into memory; opening another one takes about a millisecond
RECOMPUTE = (
    "Run training/precompute_prx.py with the settings of this run: it replaces damaged, changed and missing data."
)


def hash_to_tensor(digest: bytes) -> torch.Tensor:
    """Convert a hash to uint8 (16,)."""
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def caption_hash(caption: str) -> torch.Tensor:
    """Hash of a caption before cleaning: uint8 (16,)."""
    return hash_to_tensor(hashlib.blake2b(caption.encode(), digest_size=16).digest())


def caption_hashes(captions: Mapping[str, str]) -> torch.Tensor:
    """Hashes of the unique captions of a sample, given by column: uint8 (k, 16)."""
    return torch.stack([caption_hash(caption) for caption in unique_captions(captions)])


def unique_captions(captions: Mapping[str, str]) -> list[str]:
    """Captions of a sample without repetitions."""
    return list(dict.fromkeys(captions.values()))


def value_hash(value: torch.Tensor) -> torch.Tensor:
    """Hash of the type, shape and bytes of a tensor: uint8 (16,)."""
    digest = xxhash.xxh3_128()
    hash_tensors(digest, {"": value})
    return hash_to_tensor(digest.digest())


@contextmanager
def _explain_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise OSError(
            f"{path} cannot be written ({error}). Files written before are complete and kept. Free some space and run "
            "the same command again: it computes what is missing."
        ) from error


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a cache; raises OSError."""
    path = folder / SETTINGS_FILE
    with _explain_write_errors(path):
        write_hashed_json(path, settings, sync=True)


def write_empty_text(folder: Path, text: torch.Tensor) -> None:
    """Write the embedding (T, E) of the empty caption; raises OSError."""
    path = folder / EMPTY_TEXT_FILE
    with _explain_write_errors(path):
        write_hashed_tensors(path, {"text": text}, sync=True)


def read_empty_text(folder: Path) -> torch.Tensor:
    """Read the embedding (T, E) of the empty caption.

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
    """Write a shard atomically.

    Args:
        path: file to write.
        samples: values by column, all samples with the same columns; on the CPU.
        skipped: unusable samples by index in the data set: "unreadable" or "unfit", the reason, and the
            `sample_fingerprint`.

    Raises:
        OSError: if the file cannot be written, for example on a full disk.
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
    with _explain_write_errors(path), atomic_write(path, sync=True) as file:
        save_file(tensors, file, metadata)


def _is_table(name: str) -> bool:
    """True if a tensor of a shard is always read whole: it locates or verifies the values of the samples."""
    return name in ("index", "size") or name.endswith((".shape", ".hash"))


def _tables_hash(metadata: Mapping[str, str], tables: Mapping[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128(json.dumps([metadata["skipped"], metadata["bytes"]]).encode())
    hash_tensors(digest, tables)
    return digest.hexdigest()


class ShardWriter:
    """Writer that collects the samples of a process and writes a shard whenever it is full.

    Args:
        folder: folder of the cache.
        rank: rank of the process.
        number: number of its first shard.
        shard_samples: samples per shard. An interruption loses less than one shard per process.
    """

    def __init__(self, folder: Path, rank: int, number: int, shard_samples: int):
        self.folder, self.rank, self.number, self.shard_samples = folder, rank, number, shard_samples
        self.samples: list[dict[str, torch.Tensor]] = []
        self.skipped: dict[int, tuple[str, str, str]] = {}

    def add(self, sample: dict[str, torch.Tensor]) -> None:
        """Add a sample, and write the shard if it is full; raises OSError if it cannot be written."""
        self.samples.append(sample)
        if len(self.samples) == self.shard_samples:
            self.write()

    def skip(self, index: int, kind: str, reason: str, fingerprint: str) -> None:
        """Record an unusable sample, see `write_shard`."""
        self.skipped[index] = (kind, reason, fingerprint)

    def write(self) -> None:
        """Write the collected samples; raises OSError if they cannot be written."""
        if self.samples or self.skipped:
            write_shard(shard_path(self.folder, self.rank, self.number), self.samples, self.skipped)
            self.number, self.samples, self.skipped = self.number + 1, [], {}


def shard_path(folder: Path, rank: int, number: int) -> Path:
    """Path of a shard."""
    return folder / f"shard-{rank:05d}-{number:06d}.safetensors"


def shard_files(folder: Path) -> list[Path]:
    """Completed shards of a folder."""
    return sorted(folder.glob("shard-*.safetensors"))


def next_shard_number(folder: Path) -> int:
    """Smallest number above those of all shards of all processes."""
    return max((int(path.stem.rpartition("-")[2]) + 1 for path in shard_files(folder)), default=0)


def processed_samples(folder: Path, count: int) -> np.ndarray:
    """True for each of the `count` samples of the data set that is in a shard or known as unusable: bool (count,)."""
    processed = np.zeros(count, dtype=bool)
    for path in shard_files(folder):
        shard = Shard(path)
        processed[[*shard.indices, *shard.skipped]] = True
    return processed


def skipped_samples(folder: Path) -> dict[int, tuple[str, str]]:
    """Unusable samples by index in the data set: "unreadable" or "unfit", and the reason."""
    skipped: dict[int, tuple[str, str]] = {}
    for path in shard_files(folder):
        skipped |= {index: (kind, reason) for index, (kind, reason, _) in Shard(path).skipped.items()}
    return skipped


def write_index(folder: Path, settings: dict[str, Any], made_from: dict[str, Any]) -> dict[str, Any]:
    """Complete a cache: write index.json from the headers of all shards.

    Args:
        folder: folder of the cache.
        settings: settings that a run must share.
        made_from: names of the networks and the data, for messages.

    Returns:
        The index, with "shards", "samples", "skipped" (number of each kind) and "bytes" by column.
    """
    hashes: dict[str, str] = {}
    sizes: dict[str, int] = {}
    skipped = {"unreadable": 0, "unfit": 0}
    samples = 0
    for path in shard_files(folder):
        shard = Shard(path)
        hashes[path.name] = shard.hash
        samples += len(shard.indices)
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
    with _explain_write_errors(path):
        write_hashed_json(path, index, sync=True)
    return index


def read_settings(folder: Path) -> dict[str, Any]:
    """Read "settings" and "made_from" of an unfinished cache.

    A damaged settings.json is restored from index.json.

    Raises:
        ValueError: if both files are damaged or missing.
    """
    try:
        return read_hashed_json(folder / SETTINGS_FILE)
    except (ValueError, OSError) as error:
        try:
            index = read_hashed_json(folder / INDEX_FILE)
        except (ValueError, OSError):
            raise ValueError(
                f"{error} Without it the settings of the shards in {folder} are unknown. Remove that folder and run "
                "the same command again, which computes everything anew."
            ) from error
        settings = {name: index[name] for name in ("settings", "made_from")}
        write_settings(folder, settings)
        return settings


def sample_fingerprint(source: ListedImages, index: int) -> str:
    """Hash of a sample's image and captions as they are stored, without the unreadable ones."""
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
        path: file of the shard.
        rows: rows that are undamaged and unchanged in the data set.
        skipped: unusable samples that are unchanged in the data set.
        damaged: message for each damage.
        changed: message for each change in the data set.
    """

    path: Path
    rows: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def remove_invalid(self) -> None:
        """Remove damaged and changed samples from the shard, or the shard if none remains; raises OSError."""
        if not self.rows and not self.skipped:
            self.path.unlink()
            return
        shard = Shard(self.path)
        samples = [shard.sample(row) for row in self.rows]
        write_shard(self.path, samples, {index: shard.skipped[index] for index in self.skipped})


class ShardCheckDataset(Dataset):
    """Data set of `ShardCheck`s. Every value is compared with its hash and every sample with the data set, undecoded.

    Args:
        paths: shards to check.
        source: data set of the cache.
        buckets: buckets of its images.
    """

    def __init__(self, paths: Sequence[Path], source: ListedImages, buckets: Buckets):
        self.paths, self.source = list(paths), source
        self.sizes = np.zeros((len(source), 2), dtype=np.int64)  # (N, 2), size of the bucket; 0 for those in none
        for size, members in zip(buckets.sizes, buckets.members):
            self.sizes[np.asarray(members)] = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> ShardCheck:
        check = ShardCheck(self.paths[number])
        try:
            shard = Shard(check.path)
        except ValueError as error:
            check.damaged.append(str(error))
            return check
        for row, index in enumerate(shard.indices):
            try:
                values = shard.sample(row)
            except ValueError as error:
                check.damaged.append(str(error))
                continue
            if change := self._describe_change(index, values):
                check.changed.append(f"sample {index}: {change}")
            else:
                check.rows.append(row)
        for index, (_, _, fingerprint) in shard.skipped.items():
            if sample_fingerprint(self.source, index) != fingerprint:
                check.changed.append(f"sample {index}, which was unusable: its image or caption")
            else:
                check.skipped.append(index)
        return check

    def _describe_change(self, index: int, values: Mapping[str, torch.Tensor]) -> str:
        """Describe the change of a sample's image, captions or bucket; an empty text if there is none."""
        try:
            digest, captions = self.source.image_hash(index), self.source.captions(index)
        except UnreadableSample as error:
            return str(error)
        if not torch.equal(hash_to_tensor(digest), values["image_hash"]):
            return "its image"
        if not torch.equal(caption_hashes(captions), values["caption_hash"]):
            return "its captions"
        if self.sizes[index].any() and values["size"].tolist() != self.sizes[index].tolist():
            return f"its bucket, which was {values['size'].tolist()} and is {self.sizes[index].tolist()}"
        return ""


class ImagesToEncode(Dataset):
    """Data set of inputs to the networks: the center of each image, never flipped.

    The index of an item is (index in the source, bucket). An item has "index", "size", "image_hash", "upscaled" and
    "caption_hash" as in the table above, "pixels_uint8" (3, H, W) and "captions", the unique captions. The item of an
    unusable sample has "index" and "skipped": "unreadable" or "unfit", the reason, and the `sample_fingerprint`.

    Args:
        source: data set to encode.
        buckets: buckets of its images.
    """

    def __init__(self, source: ListedImages, buckets: Buckets):
        self.source, self.buckets = source, buckets

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, bucket = key
        try:
            sample = self.source[index]
        except UnreadableSample as error:
            return {"index": index, "skipped": ("unreadable", str(error), sample_fingerprint(self.source, index))}
        image, size = sample["image"], self.buckets.sizes[bucket]
        rejection = self.buckets.rejection_reason(image.width, image.height, bucket)
        if rejection is not None:
            return {"index": index, "skipped": ("unfit", rejection, sample_fingerprint(self.source, index))}
        fitted = fit_image(image, size, center_crop=True, random_flip=False, rng=random.Random(0))
        return {
            "index": torch.tensor(index),
            "size": torch.tensor(size),
            "image_hash": hash_to_tensor(self.source.image_hash(index)),
            "upscaled": torch.tensor(bool(resize_scale_and_crop(image.width, image.height, size)[0] > 1)),
            "caption_hash": caption_hashes(sample["captions"]),
            "pixels_uint8": image_to_tensor(fitted),  # (3, H, W)
            "captions": unique_captions(sample["captions"]),
        }


class Shard:
    """Memory-mapped shard. Its tables are verified when it is opened, its values when they are read.

    Args:
        path: file of the shard.

    Attributes:
        indices: indices of its samples in the data set.
        skipped: unusable samples by index in the data set: "unreadable" or "unfit", the reason, and the
            `sample_fingerprint`.
        bytes: stored bytes by tensor.
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
        self.indices: list[int] = tables["index"].tolist() if "index" in tables else []
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}  # see `_table`

    def _table(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return shapes (n, dimensions), offsets (n + 1,) and hashes (n, 16) of a column's values."""
        if name not in self._tables:
            shapes, hashes = self.file.get_tensor(f"{name}.shape"), self.file.get_tensor(f"{name}.hash")
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), shapes.prod(1).cumsum(0)])
            self._tables[name] = shapes, offsets, hashes
        return self._tables[name]

    def value(self, name: str, row: int) -> torch.Tensor:
        """Return a copy of the value of one sample.

        Raises:
            ValueError: if it does not match its hash.
        """
        shapes, offsets, hashes = self._table(name)
        flat = self.file.get_slice(name)[int(offsets[row]) : int(offsets[row + 1])]
        value = flat.reshape(shapes[row].tolist()).clone()
        if not torch.equal(value_hash(value), hashes[row]):
            raise ValueError(
                f"The shard {self.path} of the precomputed data is damaged: `{name}` of sample {self.indices[row]} "
                f"does not match its hash. {RECOMPUTE}"
            )
        return value

    def sample(self, row: int) -> dict[str, torch.Tensor]:
        """Return copies of all values of one sample; raises ValueError if one does not match its hash."""
        return {name: self.value(name, row) for name in self.bytes if not name.endswith((".shape", ".hash"))}


# a module-level cache, so that `PrecomputedImages` can be pickled for the workers of a loader
@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(path: Path, expected_hash: str) -> Shard:
    shard = Shard(path)
    if shard.hash != expected_hash:
        raise ValueError(f"The shard {path} is not the one that {INDEX_FILE} lists. {RECOMPUTE}")
    return shard


def check_settings(
    cached: dict[str, Any],
    expected: dict[str, Any],
    folder: Path,
    made_from: dict[str, Any],
    optional: Sequence[str] = (),
) -> None:
    """Raise an error if a cache was made with other settings.

    Args:
        cached: settings of the cache.
        expected: settings of this run.
        folder: folder of the cache.
        made_from: names of the networks and data of the cache, for the message.
        optional: settings that are not compared where `expected` has None.

    Raises:
        ValueError: if a setting differs; the message lists all differences.
    """
    compared = {name: value for name, value in expected.items() if value is not None or name not in optional}
    differences = [
        f"`{name}` is {cached.get(name)!r} there and {value!r} here"
        for name, value in compared.items()
        if cached.get(name) != value
    ]
    if differences:
        remedy = "Use the same settings, or precompute into another `--precomputed_dir`."
        if cached.get("samples") != expected.get("samples"):
            remedy += " `samples` changes if images were added or removed, and with `num_validation_samples`."
        raise ValueError(
            f"The precomputed data in {folder} do not belong to this run: {'; '.join(differences)}. They were made "
            f"from {made_from}. {remedy}"
        )


def require_complete(folder: Path) -> None:
    """Raise an error if a folder has no cache or an unfinished one.

    Raises:
        ValueError: if index.json is missing.
    """
    if not (folder / INDEX_FILE).is_file():
        count = len(shard_files(folder))
        raise ValueError(
            f"`precomputed_dir`: {folder} has no {INDEX_FILE}"
            + (f", only the {count} shards of an unfinished cache" if count else "")
            + ". Run training/precompute_prx.py with the settings of this run."
        )


class PrecomputedImages:
    """Complete cache of a data set, with random access.

    Args:
        folder: folder of the cache.
        settings: settings of this run.
        columns: columns that the run needs besides the text.

    Attributes:
        columns: those of the columns that the cache has; a VAE without randomness has no "latent_std".
        skipped: unusable samples by index in the data set: "unreadable" or "unfit", and the reason.
        sizes: (N, 2) height and width in pixels of each sample, 0 for skipped samples.
        empty_text: (T, E) bfloat16, embedding of the empty caption.

    Raises:
        ValueError: if the cache is unfinished, damaged, or made with other settings.

    Example:
        >>> cache = PrecomputedImages("cache/256", settings, ["latent_mean", "latent_std"])
        >>> cache.value(0, "latent_mean").shape
        torch.Size([16, 32, 32])
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
        self.shards = [(self.folder / name, digest) for name, digest in index["shards"].items()]
        self.skipped: dict[int, tuple[str, str]] = {}
        self.sizes = np.zeros((count, 2), dtype=np.int32)
        self._shard, self._row = np.full(count, -1, dtype=np.int32), np.zeros(count, dtype=np.int32)
        for number, (path, digest) in enumerate(self.shards):
            shard = _open_shard(path, digest)
            self._shard[shard.indices], self._row[shard.indices] = number, np.arange(len(shard.indices))
            if shard.indices:
                self.sizes[shard.indices] = shard.file.get_tensor("size").view(-1, 2).numpy()
            self.skipped |= {index: (kind, reason) for index, (kind, reason, _) in shard.skipped.items()}

    def value(self, index: int, name: str) -> torch.Tensor:
        """Return a stored value of sample `index` of the data set."""
        return _open_shard(*self.shards[self._shard[index]]).value(name, int(self._row[index]))

    def text_embedding(self, index: int, caption: str) -> tuple[torch.Tensor, bool]:
        """Return the embedding (T, E) of a caption of a sample, and True if the caption was truncated.

        Raises:
            ValueError: if the caption is not among those that were embedded with this sample.
        """
        hashes = self.value(index, "caption_hash")  # (k, 16)
        matches = (hashes == caption_hash(caption)).all(1).nonzero().flatten()
        if not len(matches):
            raise ValueError(
                f"The caption of sample {index} is not the one that was embedded in {self.folder}: it has changed, or "
                f"the data have another order or other `caption_column`s. It is now {caption[:80]!r}. {RECOMPUTE}"
            )
        number, lengths = int(matches[0]), self.value(index, "text_lengths").tolist()
        start = sum(lengths[:number])
        text = self.value(index, "text")[start : start + lengths[number]]  # (T, E)
        return text, bool(self.value(index, "cut")[number])

    def verify_sample(self, source: ListedImages, index: int) -> dict[str, str]:
        """Compare the stored image of a sample with the encoded one, and return the captions of the sample.

        Raises:
            ValueError: if the image differs or has become unreadable.
        """
        try:
            digest, captions = source.image_hash(index), source.captions(index)
        except UnreadableSample as error:
            raise ValueError(f"{error}. It was readable when {self.folder} was made.") from error
        if not torch.equal(hash_to_tensor(digest), self.value(index, "image_hash")):
            raise ValueError(
                f"The image of sample {index} is not the one that {self.folder} was made from: the data have "
                f"changed, or have another order. {RECOMPUTE}"
            )
        return captions

    def verify(self, source: ListedImages, buckets: Buckets) -> None:
        """Compare the cache with the data set.

        Every sample must be in the cache in its size. Images and captions are compared for some samples here, and for
        the others when they are read.

        Raises:
            ValueError: if they differ.
        """
        cached = self._shard >= 0
        for size, bucket_members in zip(buckets.sizes, buckets.members):
            members = np.asarray(bucket_members)
            missing = [index for index in members[~cached[members]].tolist() if index not in self.skipped]
            if missing:
                raise ValueError(
                    f"{len(missing)} of {len(cached)} samples are not in {self.folder} (the first is sample "
                    f"{missing[0]}). Run training/precompute_prx.py again: it computes what is missing."
                )
            moved = members[cached[members] & (self.sizes[members] != size).any(1)]
            if len(moved):
                height, width = self.sizes[moved[0]]
                raise ValueError(
                    f"{len(moved)} samples are in another bucket than in {self.folder} (sample {moved[0]}: {height} x "
                    f"{width} pixels there, {size[0]} x {size[1]} here). Buckets close depending on the images of an "
                    "optimizer step over all processes: precompute with as many."
                )
        indices = np.flatnonzero(cached)
        for number in np.linspace(0, len(indices) - 1, min(IMAGES_COMPARED, len(indices))).astype(int):
            index = int(indices[number])
            for caption in self.verify_sample(source, index).values():
                self.text_embedding(index, caption)
            for name in self.columns:
                self.value(index, name)


class PrecomputedSamples(TrainingSamples):
    """`TrainingSamples` from a cache. Images and captions are compared with the encoded ones and not decoded.

    Args:
        images: cache of the data set.
        source: data set of the cache.
        buckets: see `TrainingSamples`.
        derive_seed: see `TrainingSamples`.
        caption_weights: see `TrainingSamples`.
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
        self.listed_source = source

    def _read(self, index: int, position: Position) -> dict[str, Any]:
        if index in self.images.skipped:
            kind, reason = self.images.skipped[index]
            raise {"unreadable": UnreadableSample, "unfit": UnfitSample}[kind](reason)
        captions = self.images.verify_sample(self.listed_source, index)
        caption = self._caption({"captions": captions, "caption": next(iter(captions.values()))}, position)
        text, cut = self.images.text_embedding(index, caption)
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
    """Collate samples of one size.

    Returns:
        The columns of the cache, (B, ...) each; "text" (B, L, E), padded to the longest caption; "text_lengths" and
        "cut", lists of length B; "empty_text" (T, E); and the metadata of `samples.collate`.
    """
    texts = [sample["text"] for sample in samples]
    columns = samples[0]["columns"]
    return {
        **{name: torch.stack([sample["columns"][name] for sample in samples]) for name in columns},
        "text": pad_sequence(texts, batch_first=True),
        "text_lengths": [len(text) for text in texts],
        "cut": [sample["cut"] for sample in samples],
        "empty_text": samples[0]["empty_text"],
        **collate_metadata(samples),
    }


def cached_latents(batch: dict[str, Any]) -> EncodedImages:
    """Return the latent distribution of a batch from the cache."""
    return EncodedImages(batch["latent_mean"], batch.get("latent_std"))


def cached_text(batch: dict[str, Any], dropped: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Return the text of a batch from the cache.

    Args:
        batch: result of `collate_precomputed`, on its device.
        dropped: B flags; True replaces a caption by the empty one.

    Returns:
        (B, L, E) float32 with the length L of the longest caption; its bool mask (B, L), or None without padding; and
        the number of truncated captions among those that were not dropped.
    """
    captions = zip(dropped, batch["text"], batch["text_lengths"])
    rows = [batch["empty_text"] if drop else text[:length] for drop, text, length in captions]  # (T, E) each
    text = pad_sequence(rows, batch_first=True).float()  # (B, L, E)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(text.shape[1]) < lengths[:, None]  # (B, L)
    truncated = sum(cut and not drop for drop, cut in zip(dropped, batch["cut"]))
    return text, None if mask.all() else mask.to(text.device), truncated
