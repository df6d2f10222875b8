"""A training checkpoint of Photoroom/PRX as a pipeline: `python -m diffusers_prx.convert --help`.

The original trainer writes the whole run: under `state.model.denoiser.` the network, under
`state.model.ema_denoiser.model.` its moving average, beside it the optimizer, losses and much else. This module finds
the network, gives its tensors the names that diffusers and this package use, reads its configuration off their shapes,
and saves it as every pipeline of this package is saved. No code that a checkpoint might carry is run: files are read
with `weights_only=True`, and the index of a checkpoint folder, a pickle by design, with an unpickler that knows the
classes of such an index and nothing else.
"""

import argparse
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
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from diffusers import AutoencoderKLFlux2, DiffusionPipeline
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from .cli import end, parse_flags, path
from .files import expand_path
from .latents import latent_channels, load_vae
from .models.transformer_prx import PRXTransformer2DModel
from .pipelines.pipeline_prx import PRXPipeline
from .pipelines.pipeline_prx_pixel import PRXPixelPipeline
from .prompt_cleaning import CAPTION_CLEANINGS, CaptionCleaning
from .schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from .schedulers.diffusers_compat import PREDICTION_TYPES
from .text import load_text_encoder

# A tensor of every PRX, whatever its options, by which a network is found among everything else in a checkpoint.
LANDMARKS = ("txt_in.weight", "final_layer.linear.weight", "blocks.0.gate_proj.weight")
TRAINED, AVERAGED, RESOLUTION = "denoiser.", "ema_denoiser.model.", "resolution_embedder."

# The original's names, in full -> ours; what is not here is called the same. Norms are `scale` in the original and
# `weight` in a later version of it.
_BLOCK = r"(blocks\.\d+\.)"
RENAMES = (
    (rf"{_BLOCK}(img_qkv_proj|txt_kv_proj)\.weight", r"\1attention.\2.weight"),
    (rf"{_BLOCK}attn_out\.weight", r"\1attention.to_out.0.weight"),
    (rf"{_BLOCK}qk_norm\.query_norm\.(?:scale|weight)", r"\1attention.norm_q.weight"),
    (rf"{_BLOCK}qk_norm\.key_norm\.(?:scale|weight)", r"\1attention.norm_k.weight"),
    (rf"{_BLOCK}k_norm\.(?:scale|weight)", r"\1attention.norm_added_k.weight"),
    (r"resolution_embedder\.h_embedder\.(.+)", r"resolution_token_embedder.height.\1"),
    (r"resolution_embedder\.w_embedder\.(.+)", r"resolution_token_embedder.width.\1"),
    (r"sprint_fuse\.(.+)", r"fusion.linear.\1"),
    (r"sprint_mask_token", r"fusion.mask_token"),
)

# More than any checkpoint has: dictionaries in each other, and entries in all of them.
MAX_DEPTH, MAX_ENTRIES = 64, 1_000_000

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Options that no network alone has a use for.
OF_THE_PIPELINE = (
    "vae_name_or_path", "text_encoder_name_or_path", "components_from", "prediction_type", "shift", "noise_scale",
    "resolution", "max_sequence_length", "token_route", "caption_cleaning",
)  # fmt: skip

# What the index of a checkpoint folder is made of: none of it does anything but hold what it is given.
_INDEX_CLASSES: tuple[Any, ...] = (
    metadata.Metadata, metadata.StorageMeta, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata, metadata.TensorProperties, metadata.MetadataIndex, metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo, torch.Size, OrderedDict,
)  # fmt: skip
_INDEX_GLOBALS: dict[tuple[str, str], Any] = {
    **{(known.__module__, known.__qualname__): known for known in _INDEX_CLASSES},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PurePosixPath,  # the folder's name when it was written
    ("pathlib._local", "PosixPath"): PurePosixPath,  # the same, written by Python 3.13
}


# Reading.


class _IndexUnpickler(pickle._Unpickler):
    """Reads the index of a checkpoint folder; a pickle can do nothing without globals, and gets only these.

    The one written in Python: the other allocates 16 bytes for every number up to the largest that a pickle names.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _INDEX_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such index needs")
        return _INDEX_GLOBALS[module, name]


def _read_index(folder: Path) -> metadata.Metadata:
    path = folder / ".metadata"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no .metadata; accepted is a folder that torch.distributed.checkpoint wrote, a .safetensors"
            " file or a file of torch.save."
        )
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        _check_index(index)
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"{path} is broken or not the index of a checkpoint: {error}.") from error
    return index


def _check_index(index: Any) -> None:
    if not isinstance(index, metadata.Metadata):
        raise pickle.UnpicklingError(f"it is a {type(index).__name__}")
    for file in {PurePosixPath(info.relative_path) for info in index.storage_data.values()}:
        if len(file.parts) != 1 or file.name == "..":
            raise pickle.UnpicklingError(f"it names {file}, which is not inside the folder")
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(name, str):
            raise pickle.UnpicklingError(f"it names an entry with a {type(name).__name__}")
        if not isinstance(entry, metadata.TensorStorageMetadata):
            continue
        if not isinstance(entry.properties.dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{name} has no type, but {type(entry.properties.dtype).__name__}")
        for sizes in (entry.size, *(chunk.sizes for chunk in entry.chunks)):
            if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
                raise pickle.UnpicklingError(f"{name} has the impossible size {tuple(sizes)!r:.100}")
        if math.prod(entry.size) >= 2**60:
            raise pickle.UnpicklingError(f"{name} has the impossible size {tuple(entry.size)}")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise pickle.UnpicklingError(f"it does not list the whole of {name}")


class _Reader(dcp.FileSystemReader):
    """torch's reader of checkpoint folders, but for the index, which `_read_index` reads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        index = _read_index(Path(self.path))
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


def list_tensors(path: Path) -> dict[str, torch.Tensor | None]:
    """What a checkpoint holds, by its name there; None for what is not a tensor.

    Args:
        path: a folder that torch.distributed.checkpoint wrote (its tensors come on the meta device, see
            `read_tensors`), a .safetensors file, or a file of torch.save with dictionaries in any depth.

    Raises:
        ValueError: no such file, one that is broken, or one that holds objects which could run code.
    """
    if path.is_dir():
        listed: dict[str, torch.Tensor | None] = {}
        for name, entry in _read_index(path).state_dict_metadata.items():
            listed[name] = None
            if isinstance(entry, metadata.TensorStorageMetadata):
                listed[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        return listed
    if not path.is_file():
        raise ValueError(f"`checkpoint_path` {path} does not exist.")
    if path.suffix == ".safetensors":
        try:
            return dict(safetensors.torch.load_file(path))
        except Exception as error:  # types that torch does not have are a KeyError
            raise ValueError(f"{path} is broken or not a safetensors file: {error}.") from error
    return _flat(_load_file(path))


def _load_file(path: Path) -> Any:
    """What torch.save wrote, read without running anything; of a zip (its format since 1.6) only what is used."""
    # the state of NumPy's generator lies beside the model in a checkpoint of Composer: an array of uint32
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
                f"{path} is broken or not a file of torch.save with tensors and plain values: {error}."
            ) from error
        raise ValueError(
            f"{path} holds a {refused[1]}. Only tensors and plain values are read: anything else could run code. Where"
            " the checkpoint can be trusted, save its model alone and convert that file:"
            " torch.save(torch.load(path, weights_only=False)['state']['model'], 'model.pt')."
        ) from error


def _check_zip(path: Path) -> None:
    """Refuse a zip that torch.save does not write: compressed entries, which may become as large as they like."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed or claims {entry.file_size} bytes")


def _flat(tree: Any) -> dict[str, torch.Tensor | None]:
    """The leaves of nested dictionaries under the names that lead to them, joined by dots.

    Raises:
        ValueError: dictionaries that contain themselves, or more of them in each other, or more entries, than a
            checkpoint has; two entries of one name.
    """
    leaves: dict[str, torch.Tensor | None] = {}
    for name, leaf in _walk(tree, "", 0):
        if name in leaves:
            raise ValueError(f"The checkpoint has two entries of one name: {name:.200}.")
        leaves[name] = leaf if isinstance(leaf, torch.Tensor) else None
        if len(leaves) > MAX_ENTRIES:
            raise ValueError(f"The checkpoint has more than {MAX_ENTRIES:,} entries, which no PRX has.")
    return leaves


def _walk(tree: Any, parent: str, depth: int) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield parent, tree
        return
    if depth == MAX_DEPTH:
        raise ValueError(
            f"The checkpoint has dictionaries that contain themselves, or more than {MAX_DEPTH} in each other: under "
            f"{parent:.200}."
        )
    for key, value in tree.items():
        if not isinstance(key, str | int):
            raise ValueError(f"The checkpoint names an entry under {parent:.200} by a {type(key).__name__}.")
        yield from _walk(value, f"{parent}.{key}" if parent else str(key), depth + 1)


def _check_stored(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that claim more values than the file has, which a file of torch.save can state.

    Raises:
        ValueError: also for tensors that are sparse or have no values.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{name} of {path} is no plain tensor: {tensor.layout}, {tensor.device}, {tensor.dtype}.")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{name} of {path} claims the shape {list(tensor.shape)}, of which only "
                f"{tensor.untyped_storage().nbytes():,} bytes are stored."
            )


def _check_folder(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors whose files are missing or smaller than the index says, before memory is taken for them."""
    stored: Counter[str] = Counter()
    for place, info in _read_index(folder).storage_data.items():
        if place.fqn in tensors:
            file = folder / info.relative_path
            if not file.is_file() or file.stat().st_size < info.offset + info.length:
                raise ValueError(f"A file of {folder} is missing or broken: {info.relative_path}.")
            stored[place.fqn] += info.length
    for name, tensor in tensors.items():
        if stored[name] < tensor.numel() * tensor.itemsize:
            raise ValueError(
                f"{name} of {folder} claims the shape {list(tensor.shape)}, of which only {stored[name]:,} bytes are "
                "stored."
            )


def read_tensors(
    path: Path, listed: Mapping[str, torch.Tensor | None], names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Some of the tensors of `list_tensors`, by name, on the CPU.

    Raises:
        ValueError: a file of the folder is missing or broken.
    """
    tensors = {name: tensor for name in names if (tensor := listed[name]) is not None}
    if not path.is_dir():
        _check_stored(path, tensors)
        return tensors
    _check_folder(path, tensors)
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
    wanted: dict[str, Any] = dict(tensors)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what no_dist asks for
            dcp.load(wanted, storage_reader=_Reader(path), no_dist=True)
    except CheckpointException as error:  # not an Exception
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"A file of {path} is missing or broken: {type(cause).__name__}: {cause}.") from cause
    except Exception as error:  # an index that contradicts its files can raise anything
        raise ValueError(f"A file of {path} is missing or broken: {type(error).__name__}: {error}.") from error
    return tensors


# Names.


def find_network(listed: Mapping[str, Any], ema: bool = False, prefix: str | None = None) -> dict[str, str]:
    """The tensors of one network in a checkpoint: their names in the original's network -> in the checkpoint.

    Args:
        listed: names in the checkpoint.
        ema: the moving average, not the trained weights.
        prefix: what the names of the network begin with, where it cannot be found.

    Raises:
        ValueError: there is none, or more than one.
    """
    ends = [(name, mark) for name in listed for mark in LANDMARKS if name == mark or name.endswith("." + mark)]
    found = sorted({name.removesuffix(mark) for name, mark in ends})
    if prefix is not None:
        chosen = [prefix if not prefix or prefix.endswith(".") else prefix + "."]
    else:
        chosen = [start for start in found if start.endswith(AVERAGED) == ema]
    if not found:
        raise ValueError(
            f"There is no PRX in the checkpoint; it holds {len(listed)} entries: {sorted(listed)[:8]} ..."
        )
    if not chosen or not any(name.startswith(chosen[0]) for name in listed):
        asked = (
            f"`prefix` {prefix!r}" if prefix is not None else "moving average (`ema`)" if ema else "trained weights"
        )
        raise ValueError(f"The checkpoint has no {asked}; it has networks under {found}.")
    if len(chosen) > 1:
        raise ValueError(f"The checkpoint has several networks; `prefix` says which: one of {chosen}.")
    start = chosen[0]
    names = {name[len(start) :]: name for name in listed if name.startswith(start)}
    # The original hangs the resolution embedder beside the network, where its moving average does not see it: the
    # trained embedder is then part of both.
    beside = start.removesuffix(AVERAGED) if start.endswith(AVERAGED) else start.removesuffix(TRAINED)
    if beside != start:
        embedder = {name[len(beside) :]: name for name in listed if name.startswith(beside + RESOLUTION)}
        if embedder and any(name.startswith(RESOLUTION) for name in names):
            raise ValueError(f"The checkpoint has a resolution embedder under {start} and one under {beside}.")
        names |= embedder
    return names


def our_names(names: Iterable[str]) -> dict[str, str]:
    """The names of this package and of diffusers -> the original's.

    Raises:
        ValueError: two of the original's names stand for the same tensor.
    """
    renamed: dict[str, str] = {}
    for name in names:
        ours = next((re.sub(old, new, name) for old, new in RENAMES if re.fullmatch(old, name)), name)
        if ours in renamed:
            raise ValueError(f"{renamed[ours]} and {name} are the same tensor ({ours}); one of them has to go.")
        renamed[ours] = name
    return renamed


# Configuration.


def read_config(shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the network with tensors of these shapes.

    Args:
        shapes: by our names.
        given: what shapes do not tell, by the names of PRXTransformer2DModel's configuration. `in_channels` and
            `patch_size`: one of them, where several fit. `axes_dim`: equal halves where not given. `fusion_range`:
            needed with SPRINT's fusion. `theta`, `time_factor`, `time_max_period`: the original's defaults.

    Raises:
        ValueError: a tensor that tells the configuration is missing, or a configuration that is ambiguous or does not
            fit the shapes.
    """
    bottleneck = "img_in.0.weight" in shapes
    needed = {"txt_in.weight": 2, "final_layer.linear.weight": 2, "blocks.0.attention.norm_q.weight": 1,
              "blocks.0.gate_proj.weight": 2, "img_in.0.weight" if bottleneck else "img_in.weight": 2}  # fmt: skip
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(f"The network lacks tensors that tell its configuration: {missing}.")
    wrong = {name: shapes[name] for name, ndim in needed.items() if len(shapes[name]) != ndim or 0 in shapes[name]}
    if wrong:
        raise ValueError(f"The network has tensors of impossible shapes: {wrong}.")

    hidden_size, context_in_dim = shapes["txt_in.weight"]
    (head_dim,) = shapes["blocks.0.attention.norm_q.weight"]
    if hidden_size % head_dim:
        raise ValueError(f"The hidden size {hidden_size} is no multiple of the head dimension {head_dim}.")
    if given.get("axes_dim") is None and head_dim % 4:
        raise ValueError(f"Give `axes_dim`: the head dimension {head_dim} has no two even halves.")
    in_channels, patch_size = _channels_and_patch(
        shapes["final_layer.linear.weight"][0], given.get("in_channels"), given.get("patch_size")
    )
    if (given.get("fusion_range") is None) == ("fusion.linear.weight" in shapes):
        raise ValueError(
            "`fusion_range` is given, but the network has no fusion layer (SPRINT)."
            if given.get("fusion_range") is not None
            else "Give `fusion_range`: the network has SPRINT's fusion layer, and around which blocks is not in the"
            " checkpoint; START and STOP are the original's `route_start` and `route_end` + 1."
        )
    mlp_size = shapes["blocks.0.gate_proj.weight"][0]
    mlp_ratio = mlp_size / hidden_size
    if int(hidden_size * mlp_ratio) < mlp_size:  # the model cuts the product, which may fall just below
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    blocks = {int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match}
    if len(blocks) <= max(blocks):
        absent = next(number for number in range(max(blocks)) if number not in blocks)
        raise ValueError(
            f"The network has {len(blocks)} blocks, up to number {max(blocks)}: block {absent} is missing."
        )
    config = {
        "in_channels": in_channels,
        "patch_size": patch_size,
        "context_in_dim": context_in_dim,
        "hidden_size": hidden_size,
        "mlp_ratio": mlp_ratio,
        "num_heads": hidden_size // head_dim,
        "depth": len(blocks),
        "axes_dim": [head_dim // 2, head_dim // 2],
        "bottleneck_size": shapes["img_in.0.weight"][0] if bottleneck else None,
        "resolution_embeds": any(name.startswith("resolution_embedder.") for name in shapes),
        "resolution_tokens": any(name.startswith("resolution_token_embedder.") for name in shapes),
    }
    return config | {key: value for key, value in given.items() if value is not None}


def _channels_and_patch(values: int, in_channels: int | None, patch_size: int | None) -> tuple[int, int]:
    """The channels C and the patch size p with C * p * p = `values`, of which some may be given."""
    splits = [(values // p**2, p) for p in range(1, math.isqrt(values) + 1) if values % p**2 == 0]
    fits = [split for split in splits if in_channels in (None, split[0]) and patch_size in (None, split[1])]
    if len(fits) == 1:
        return fits[0]
    choices = ", ".join(f"{channels} x {p}^2" for channels, p in splits)
    if not fits:
        raise ValueError(
            f"`in_channels` {in_channels} and `patch_size` {patch_size} (None: any) do not fit a network whose tokens"
            f" stand for {values} values; channels x patch size^2 can be {choices}."
        )
    raise ValueError(
        f"A token stands for {values} values; channels x patch size^2 can be {choices}: give `in_channels` or"
        " `patch_size` (the VAE, or `pixel_space`, says the channels)."
    )


# The network and the pipeline.


def convert_transformer(
    path: str | Path, ema: bool = False, prefix: str | None = None, dtype: torch.dtype | None = None, **given: Any
) -> PRXTransformer2DModel:
    """The network of an original checkpoint.

    Args:
        path: a checkpoint folder, .pt or .safetensors file, see `list_tensors`.
        ema: the moving average, not the trained weights.
        prefix: see `find_network`.
        dtype: float32, bfloat16 or float16; None: as stored.
        given: see `read_config`.

    Raises:
        ValueError: the checkpoint cannot be read, or is not exactly a PRX: the message lists every tensor that is
            missing, unknown or of another shape or type.
    """
    path = Path(path)
    listed = list_tensors(path)
    in_original = find_network(listed, ema, prefix)
    stored_as = {ours: in_original[original] for ours, original in our_names(in_original).items()}
    tensors = {name: tensor for name, stored in stored_as.items() if (tensor := listed[stored]) is not None}
    if len(tensors) < len(stored_as):
        raise ValueError(f"Not tensors, of the network: {[s for n, s in stored_as.items() if n not in tensors]}.")
    (_check_folder if path.is_dir() else _check_stored)(path, {stored_as[name]: t for name, t in tensors.items()})
    if ema:
        _check_begun(path, listed)

    shapes = {name: tuple(_in_our_shape(name, tensor).shape) for name, tensor in tensors.items()}
    with torch.device("meta"):
        transformer = PRXTransformer2DModel(**read_config(shapes, given))
    _check_shapes({name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}, shapes, stored_as)
    _check_dtypes(tensors, dtype)

    read = read_tensors(path, listed, stored_as.values())
    weights = {name: _on_its_own(_in_our_shape(name, read[stored]), dtype) for name, stored in stored_as.items()}
    if broken := [stored_as[name] for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ValueError(
            f"{len(broken)} tensors of the network have values that are NaN or infinite{_in(dtype)}: {broken[:8]}. "
            "Convert an earlier checkpoint."
        )
    transformer.load_state_dict(weights, assign=True)
    _report(transformer, listed, stored_as)
    beside = [stored for stored in stored_as.values() if ema and AVERAGED not in stored]
    if beside:
        print(f"the checkpoint averages no resolution embedder: the trained one is taken ({len(beside)} tensors)")
    return transformer.eval()


def _check_begun(path: Path, listed: Mapping[str, torch.Tensor | None]) -> None:
    """The original's moving average exists from the start, of the untrained network; a flag says if it has begun."""
    flags = [name for name in listed if name.endswith(AVERAGED.removesuffix("model.") + "_is_active")]
    for name, flag in read_tensors(path, listed, flags).items():
        if not flag.any():
            raise ValueError(f"`ema`: the moving average had not begun when this checkpoint was written ({name}).")


def _in_our_shape(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The original's mask token is (1, 1, D), ours is (D,)."""
    return tensor[0, 0] if name == "fusion.mask_token" and tuple(tensor.shape[:-1]) == (1, 1) else tensor


def _in(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else f" in {dtype}"


def _on_its_own(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in `dtype`, contiguous, in memory that it shares with no other: as safetensors stores it."""
    tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], stored_as: Mapping[str, str]
) -> None:
    """Raise a ValueError with all that is missing, unknown or of another shape than the configuration says."""
    wrong = [
        *(f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in shapes),
        *(f"unknown: {stored_as[name]} {list(shape)}" for name, shape in shapes.items() if name not in expected),
        *(
            f"{stored_as[name]} ({name}) has the shape {list(shape)} instead of {list(expected[name])}"
            for name, shape in shapes.items()
            if name in expected and shape != expected[name]
        ),
    ]
    if wrong:
        raise ValueError("The network in the checkpoint is not exactly a PRX:\n  " + "\n  ".join(wrong))


def _check_dtypes(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    if not set(counts) <= set(DTYPES) or dtype not in (None, *DTYPES.values()):
        raise ValueError(f"The network's tensors are {dict(counts)}, `dtype` is {dtype}; accepted are {list(DTYPES)}.")
    if dtype is None and len(counts) > 1:  # modules that the original adds to a bfloat16 network are float32
        raise ValueError(f"The network's tensors are {dict(counts)}: say with `dtype` what all of them are to be.")


def _report(transformer: Any, listed: Mapping[str, Any], stored_as: Mapping[str, str]) -> None:
    """Print what was taken and what was left, by the first parts of its names."""
    count = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"network: {len(stored_as)} tensors, {count:,} parameters, {transformer.dtype}")
    taken = set(stored_as.values())
    left = Counter(".".join(name.split(".")[:3]) for name in listed if name not in taken)
    for group, number in left.most_common(20):
        print(f"left out: {number} entries under {group}")
    if len(left) > 20:
        print(f"left out: {sum(left.values()) - sum(n for _, n in left.most_common(20))} entries elsewhere")
    print("configuration:", {key: value for key, value in transformer.config.items() if not key.startswith("_")})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_prx.convert", description="Turn an original PRX training checkpoint into a pipeline."
    )
    add = parser.add_argument
    add("--checkpoint_path", type=path, required=True, help="A checkpoint folder, a .pt or a .safetensors file.")
    add("--output_dir", type=path, required=True, help="A new or empty folder.")
    add("--ema", action="store_true", help="Take the moving average, not the trained weights.")
    add("--prefix", help="What the network's names begin with; default: found.")
    add("--dtype", choices=list(DTYPES), help="Of the network's weights; default: as in the checkpoint.")

    parts = parser.add_argument_group("what the network was trained with; names are Hub ids or folders")
    add = parts.add_argument
    add("--vae_name_or_path", type=expand_path, help="The VAE, or a pipeline with one (black-forest-labs/FLUX.1-dev).")
    add("--pixel_space", action="store_true", help="There was no VAE (the original's `identity`).")
    add(
        "--text_encoder_name_or_path",
        type=expand_path,
        help="The text encoder and its tokenizer (google/t5gemma-2b-2b-ul2).",
    )
    add(
        "--components_from",
        type=expand_path,
        help="A saved or published PRX pipeline: its text encoder, tokenizer and VAE are taken.",
    )
    add("--transformer_only", action="store_true", help="Save the network alone.")
    add(
        "--prediction_type",
        choices=PREDICTION_TYPES,
        help="The original's `flow_matching` is velocity, its `x_prediction_flow_matching` x_prediction; default:"
        " x_prediction in pixel space, velocity in latents.",
    )
    add("--shift", type=float, help="Of the noise levels (the original's `timestep_shift`); default: 3.")
    add("--noise_scale", type=float, help="Of the noise in training; default: 1, as in the original's public code.")
    add("--resolution", type=int, help="Side in pixels of what is drawn by default; default: the pipeline's.")
    add("--max_sequence_length", type=int, help="Text tokens; default: 256.")
    add(
        "--caption_cleaning",
        choices=CAPTION_CLEANINGS,
        help="How captions were cleaned (light: the original's `skip_text_cleaning`); default: light for Qwen3-VL,"
        " full for other text encoders.",
    )
    add(
        "--token_route",
        nargs=3,
        type=float,
        metavar=("START", "STOP", "RATIO"),
        help="TREAD or SPRINT, for self-guidance: the original's `route_start`, `route_end` + 1, share of tokens.",
    )

    unseen = parser.add_argument_group("what shapes do not tell, or not always")
    add = unseen.add_argument
    add("--in_channels", type=int, help="Channels of the latents; default: the VAE's.")
    add("--patch_size", type=int)
    add("--axes_dim", nargs=2, type=int, metavar=("ROWS", "COLUMNS"), help="Default: half of the head dimension each.")
    add(
        "--fusion_range",
        nargs=2,
        type=int,
        metavar=("START", "STOP"),
        help="SPRINT: the original's `route_start` and `route_end` + 1.",
    )
    add("--theta", type=int, help="Default: 10000.")
    add("--time_factor", type=float, help="Default: 1000.")
    add("--time_max_period", type=int, help="Default: 10000; of the resolution embedder too.")

    args = parse_flags(parser, argv)
    sources = [bool(args.vae_name_or_path), args.pixel_space, bool(args.components_from)]
    if args.transformer_only:
        idle = [name for name in OF_THE_PIPELINE if getattr(args, name) is not None]
        if idle:
            parser.error(
                f"--transformer_only saves no pipeline, which {', '.join('--' + name for name in idle)} is for"
            )
    elif sum(sources) != 1:
        parser.error("give one of --vae_name_or_path, --pixel_space, --components_from and --transformer_only")
    elif bool(args.text_encoder_name_or_path) == bool(args.components_from):
        parser.error("give --text_encoder_name_or_path (or --components_from, which has one)")
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        parser.error(f"--output_dir {args.output_dir} must be a new or an empty folder")
    if args.max_sequence_length is not None and args.max_sequence_length < 1:
        parser.error(f"--max_sequence_length must be at least 1, got {args.max_sequence_length}")
    return args


def load_components(args: argparse.Namespace) -> dict[str, Any]:
    """Load the pipeline's parts other than transformer and scheduler: text encoder, tokenizer, and the VAE or None."""
    if args.components_from:
        name = DiffusionPipeline.load_config(args.components_from).get("_class_name")
        if name not in ("PRXPipeline", "PRXPixelPipeline"):
            raise ValueError(f"`components_from` {args.components_from} is a {name}, not a PRX pipeline.")
        pipeline_class: Any = PRXPipeline if name == "PRXPipeline" else PRXPixelPipeline
        not_needed: dict[str, Any] = {"transformer": None, "scheduler": None, "token_route": None}
        dtypes: Any = {"text_encoder": "auto", "default": torch.float32}  # as `load_text_encoder` and `load_vae`
        pipeline = pipeline_class.from_pretrained(args.components_from, dtype=dtypes, **not_needed)
        parts = {"text_encoder": pipeline.text_encoder, "tokenizer": pipeline.tokenizer}
        return parts | {"vae": getattr(pipeline, "vae", None)}
    text_encoder, tokenizer = load_text_encoder(args.text_encoder_name_or_path)
    vae = load_vae(args.vae_name_or_path) if args.vae_name_or_path else None
    return {"text_encoder": text_encoder, "tokenizer": tokenizer, "vae": vae}


def cleaning_of(text_encoder: Any) -> CaptionCleaning:
    """Return the cleaning that the original uses for a text encoder: light for Qwen3-VL, full for T5Gemma."""
    return "light" if text_encoder.config.model_type.startswith("qwen") else "full"


def channels_of(vae: Any) -> int:
    """The channels of what a network was trained on, 3 without a VAE.

    Raises:
        ValueError: FLUX.2's VAE, whose 32 x 2 x 2 values fit 128 channels without being them.
    """
    if isinstance(vae, AutoencoderKLFlux2):
        raise ValueError(
            "The original reads FLUX.2's VAE as an AutoencoderKL: 32 channels times 0.18215, which is not what"
            " AutoencoderKLFlux2 normalizes its latents to. Store the VAE as an AutoencoderKL with that"
            " `scaling_factor`, or, if the checkpoint was trained on normalized latents, give `in_channels` 128."
        )
    return latent_channels(vae)


def build_pipeline(
    transformer: PRXTransformer2DModel, components: Mapping[str, Any], args: argparse.Namespace
) -> PRXPipeline | PRXPixelPipeline:
    """The pipeline around a converted network; without a VAE one in pixel space.

    Raises:
        ValueError: the parts do not fit each other, or a setting is none.
    """
    parts: dict[str, Any] = dict(components)
    vae, text_encoder, tokenizer = parts.pop("vae"), parts["text_encoder"], parts["tokenizer"]
    width = text_encoder.get_input_embeddings().embedding_dim
    if width != transformer.config["context_in_dim"]:
        raise ValueError(
            f"The text encoder is {width} wide; the network was trained on text of width"
            f" {transformer.config['context_in_dim']}."
        )
    pipeline_class: Any = PRXPixelPipeline if vae is None else PRXPipeline
    prediction_type = args.prediction_type or pipeline_class.default_prediction_type
    scheduler_class = PRXFlowMatchScheduler if prediction_type == "velocity" else PRXXPredictionScheduler
    shift = 3.0 if args.shift is None else args.shift
    noise_scale = 1.0 if args.noise_scale is None else args.noise_scale
    tokens = 256 if args.max_sequence_length is None else args.max_sequence_length
    tokenizer.model_max_length = tokens
    parts |= {"prompt_max_tokens": tokens} if vae is None else {"vae": vae}
    if args.resolution is not None:
        parts["default_sample_size"] = args.resolution
    if args.token_route is not None:
        start, stop, ratio = args.token_route
        if start % 1 or stop % 1:
            raise ValueError(f"`token_route` goes from block {start} to {stop}; both have to be whole numbers.")
        parts["token_route"] = (int(start), int(stop), ratio)
    pipeline = pipeline_class(
        transformer=transformer,
        scheduler=scheduler_class(shift=shift),
        noise_scale=noise_scale,
        caption_cleaning=args.caption_cleaning or cleaning_of(text_encoder),
        **parts,
    )
    print(
        f"not in the checkpoint, check: {prediction_type}, shift {shift}, noise_scale {noise_scale}, {tokens} text"
        f" tokens, caption_cleaning {pipeline.caption_cleaning}"
    )
    return pipeline


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        components = None if args.transformer_only else load_components(args)
        given = {key: getattr(args, key) for key in ("patch_size", "axes_dim", "fusion_range", "theta", "time_factor")}
        given |= {"time_max_period": args.time_max_period, "in_channels": args.in_channels}
        if args.in_channels is None and components is not None:
            given["in_channels"] = channels_of(components["vae"])
        elif args.in_channels is None and args.pixel_space:
            given["in_channels"] = channels_of(None)
        dtype = None if args.dtype is None else DTYPES[args.dtype]
        transformer = convert_transformer(args.checkpoint_path, args.ema, args.prefix, dtype, **given)
        converted: Any = transformer if components is None else build_pipeline(transformer, components, args)
        converted.save_pretrained(args.output_dir)
    except (ValueError, OSError, safetensors.SafetensorError) as error:  # the last for a full disk
        end(error)
    print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
