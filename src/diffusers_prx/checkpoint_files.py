"""Safe reading of checkpoint files: nothing that a file contains is executed.

Files of torch.save are read with `weights_only=True`. The index of a checkpoint folder is a pickle by design; it is
read with an unpickler that knows only the classes of such an index.
"""

import importlib
import math
import pickle
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

# Limits that no checkpoint reaches: nesting of dictionaries, and number of entries.
MAX_DEPTH, MAX_ENTRIES = 64, 1_000_000

# Classes in the index of a checkpoint folder. All of them are plain containers.
_INDEX_CLASSES: tuple[Any, ...] = (
    metadata.Metadata,
    metadata.StorageMeta,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata.MetadataIndex,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    torch.Size,
    OrderedDict,
)
_INDEX_GLOBALS: dict[tuple[str, str], Any] = {
    **{(known.__module__, known.__qualname__): known for known in _INDEX_CLASSES},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PurePosixPath,  # the folder's name when it was written
    ("pathlib._local", "PosixPath"): PurePosixPath,  # the same, written by Python 3.13
}


class _IndexUnpickler(pickle._Unpickler):
    """Unpickler for the index of a checkpoint folder: a pickle needs globals to do harm, and gets only these.

    It is the Python implementation, because the C one allocates 16 bytes for every index up to the largest in the
    file.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _INDEX_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of an index")
        return _INDEX_GLOBALS[module, name]


def _read_index(folder: Path) -> metadata.Metadata:
    path = folder / ".metadata"
    if not path.is_file():
        raise ValueError(
            f"`checkpoint_path` {folder} has no .metadata; accepted: a folder of torch.distributed.checkpoint, a "
            ".safetensors file or a file of torch.save."
        )
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        _check_index(index)
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"`checkpoint_path`: {path} is broken or not an index of a checkpoint: {error}.") from error
    return index


def _check_index(index: Any) -> None:
    if not isinstance(index, metadata.Metadata):
        raise pickle.UnpicklingError(f"it contains a {type(index).__name__}")
    for file in {PurePosixPath(info.relative_path) for info in index.storage_data.values()}:
        if len(file.parts) != 1 or file.name == "..":
            raise pickle.UnpicklingError(f"{file} is not inside the folder")
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(name, str):
            raise pickle.UnpicklingError(f"the name of an entry is a {type(name).__name__}")
        if not isinstance(entry, metadata.TensorStorageMetadata):
            continue
        if not isinstance(entry.properties.dtype, torch.dtype):
            raise pickle.UnpicklingError(f"the dtype of {name} is a {type(entry.properties.dtype).__name__}")
        for sizes in (entry.size, *(chunk.sizes for chunk in entry.chunks)):
            if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
                raise pickle.UnpicklingError(f"{name} has the impossible size {tuple(sizes)!r:.100}")
        if math.prod(entry.size) >= 2**60:
            raise pickle.UnpicklingError(f"{name} has the impossible size {tuple(entry.size)}")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise pickle.UnpicklingError(f"parts of {name} are missing")


class _Reader(dcp.FileSystemReader):
    """torch's reader of checkpoint folders, with `_read_index` for the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        index = _read_index(Path(self.path))
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


def list_tensors(path: Path) -> dict[str, torch.Tensor | None]:
    """Return the entries of a checkpoint by name; None for entries that are not tensors.

    Args:
        path: folder of torch.distributed.checkpoint (its tensors are on the meta device, see `read_tensors`),
            .safetensors file, or file of torch.save with nested dictionaries.

    Raises:
        ValueError: if the file does not exist, is broken, or contains objects that could run code.
    """
    if path.is_dir():
        listed: dict[str, torch.Tensor | None] = {}
        for name, entry in _read_index(path).state_dict_metadata.items():
            listed[name] = None
            if isinstance(entry, metadata.TensorStorageMetadata):
                listed[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        return listed
    if not path.is_file():
        raise ValueError(f"`checkpoint_path` is {str(path)!r}, which does not exist.")
    if path.suffix == ".safetensors":
        try:
            return dict(safetensors.torch.load_file(path))
        except Exception as error:  # a KeyError for dtypes that torch does not have
            raise ValueError(f"`checkpoint_path` {path} is broken or not a safetensors file: {error}.") from error
    return _flatten(_load_file(path))


def _load_file(path: Path) -> Any:
    """Read a file of torch.save without running code. A zip file (the format since 1.6) is memory-mapped."""
    # a checkpoint of Composer contains the state of NumPy's generator, an array of uint32
    multiarray: Any = importlib.import_module(
        "numpy.core.multiarray" if np.__version__ < "2" else "numpy._core.multiarray"
    )
    plain_arrays: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    plain_arrays += [(multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        if is_zip := zipfile.is_zipfile(path):
            _check_zip(path)
        with torch.serialization.safe_globals(plain_arrays):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a broken pickle can raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise ValueError(
                f"`checkpoint_path` {path} is broken or not a file of torch.save with plain values: {error}."
            ) from error
        raise ValueError(
            f"`checkpoint_path` {path} contains a {refused[1]}; accepted: tensors and plain values, because other "
            "objects could run code. If you trust the checkpoint, save its model alone and convert that file: "
            "torch.save(torch.load(path, weights_only=False)['state']['model'], 'model.pt')."
        ) from error


def _check_zip(path: Path) -> None:
    """Refuse compressed entries, which torch.save does not write and which may expand to any size."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed or claims {entry.file_size} bytes")


def _flatten(tree: Any) -> dict[str, torch.Tensor | None]:
    """Return the leaves of nested dictionaries by their keys, joined by dots.

    Raises:
        ValueError: if dictionaries contain themselves, nesting or number of entries exceed the limits, or two entries
            have the same name.
    """
    leaves: dict[str, torch.Tensor | None] = {}
    for name, leaf in _walk(tree, "", 0):
        if name in leaves:
            raise ValueError(f"`checkpoint_path` has two entries named {name:.200}.")
        leaves[name] = leaf if isinstance(leaf, torch.Tensor) else None
        if len(leaves) > MAX_ENTRIES:
            raise ValueError(f"`checkpoint_path` has more than {MAX_ENTRIES:,} entries; it is not a PRX checkpoint.")
    return leaves


def _walk(tree: Any, parent: str, depth: int) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield parent, tree
        return
    if depth == MAX_DEPTH:
        raise ValueError(
            f"`checkpoint_path` has dictionaries that contain themselves, or are nested deeper than {MAX_DEPTH}, "
            f"under {parent:.200}."
        )
    for key, value in tree.items():
        if not isinstance(key, str | int):
            raise ValueError(f"`checkpoint_path` has a key of type {type(key).__name__} under {parent:.200}.")
        yield from _walk(value, f"{parent}.{key}" if parent else str(key), depth + 1)


def check_stored(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are not completely stored, before memory is allocated for them.

    Raises:
        ValueError: if a tensor is sparse, quantized or without values, claims more values than are stored, or if a
            file of a folder is missing or too small.
    """
    (_check_folder if path.is_dir() else _check_file)(path, tensors)


def _check_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(
                f"{name} of {path} is not a plain tensor: {tensor.layout}, {tensor.device}, {tensor.dtype}."
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{name} of {path} has the shape {list(tensor.shape)}, but only {tensor.untyped_storage().nbytes():,} "
                "bytes are stored."
            )


def _check_folder(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    stored: Counter[str] = Counter()
    for entry, info in _read_index(folder).storage_data.items():
        if entry.fqn in tensors:
            file = folder / info.relative_path
            if not file.is_file() or file.stat().st_size < info.offset + info.length:
                raise ValueError(f"A file of {folder} is missing or broken: {info.relative_path}.")
            stored[entry.fqn] += info.length
    for name, tensor in tensors.items():
        if stored[name] < tensor.numel() * tensor.itemsize:
            raise ValueError(
                f"{name} of {folder} has the shape {list(tensor.shape)}, but only {stored[name]:,} bytes are stored."
            )


def read_tensors(
    path: Path, listed: Mapping[str, torch.Tensor | None], names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Read tensors on the CPU.

    Args:
        path: checkpoint.
        listed: return value of `list_tensors`.
        names: names of the tensors.

    Raises:
        ValueError: if a file is missing or broken.
    """
    tensors = {name: tensor for name in names if (tensor := listed[name]) is not None}
    check_stored(path, tensors)
    if not path.is_dir():
        return tensors
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
    destination: dict[str, Any] = dict(tensors)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as requested by no_dist
            dcp.load(destination, storage_reader=_Reader(path), no_dist=True)
    except CheckpointException as error:  # not an Exception
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"A file of {path} is missing or broken: {type(cause).__name__}: {cause}.") from cause
    except Exception as error:  # an index that contradicts its files can raise anything
        raise ValueError(f"A file of {path} is missing or broken: {type(error).__name__}: {error}.") from error
    return tensors
