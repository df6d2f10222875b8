"""One file with the weights of a transformer: names of the original and of this package, and its configuration.

The original, Photoroom/PRX, names some tensors otherwise, and its files hold no configuration. This module finds the
network among a file's tensors, renames them, and infers the configuration from their shapes.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import safetensors
import torch
from diffusers import GGUFQuantizationConfig
from diffusers.utils import logging
from torch import nn

from ..compat import fetch_weights_file, load_gguf, load_quantized

logger = logging.get_logger(__name__)

# Tensors of every PRX, by which a network is found in a checkpoint.
LANDMARKS = ("txt_in.weight", "final_layer.linear.weight", "blocks.0.gate_proj.weight")
WEIGHTS_PREFIX, EMA_PREFIX, RESOLUTION_PREFIX = "denoiser.", "ema_denoiser.model.", "resolution_embedder."

# Full names in the original -> names here; other names are equal. Norms are `scale` in the original and `weight` in a
# later version of it.
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
ORIGINAL_RENAMES = (
    (rf"{_BLOCK}attention\.(img_qkv_proj|txt_kv_proj)\.weight", r"\1\2.weight"),
    (rf"{_BLOCK}attention\.to_out\.0\.weight", r"\1attn_out.weight"),
    (rf"{_BLOCK}attention\.norm_q\.weight", r"\1qk_norm.query_norm.scale"),
    (rf"{_BLOCK}attention\.norm_k\.weight", r"\1qk_norm.key_norm.scale"),
    (rf"{_BLOCK}attention\.norm_added_k\.weight", r"\1k_norm.scale"),
    (r"resolution_token_embedder\.height\.(.+)", r"resolution_embedder.h_embedder.\1"),
    (r"resolution_token_embedder\.width\.(.+)", r"resolution_embedder.w_embedder.\1"),
    (r"fusion\.linear\.(.+)", r"sprint_fuse.\1"),
    (r"fusion\.mask_token", r"sprint_mask_token"),
)

CONFIG_KEY = "prx_config"  # in the header of a .safetensors file: the transformer's configuration, as JSON

# --- names


def find_network(listed: Mapping[str, Any], ema: bool = False, prefix: str | None = None) -> dict[str, str]:
    """Find one network in a checkpoint. Return its tensors: name in the original's network -> name in the checkpoint.

    Args:
        listed: tensors by name.
        ema: find the moving average instead of the trained weights.
        prefix: prefix of the network's names; None: it is searched for.

    Raises:
        ValueError: if there is no such network, or more than one.
    """
    matches = [(name, end) for name in listed for end in LANDMARKS if name == end or name.endswith("." + end)]
    prefixes = sorted({name.removesuffix(end) for name, end in matches})
    if prefix is not None:
        chosen = [prefix if not prefix or prefix.endswith(".") else prefix + "."]
    else:
        chosen = [start for start in prefixes if start.endswith(EMA_PREFIX) == ema]
    if not prefixes:
        raise ValueError(f"The checkpoint contains no PRX; it has {len(listed)} entries: {sorted(listed)[:8]} ...")
    if not chosen or not any(name.startswith(chosen[0]) for name in listed):
        requested = f"`prefix` is {prefix!r}" if prefix is not None else f"`ema` is {ema}"
        raise ValueError(f"{requested}, but the checkpoint has no such network; accepted prefixes: {prefixes}.")
    if len(chosen) > 1:
        raise ValueError(f"The checkpoint has several networks. Pass `prefix`; accepted: {chosen}.")
    start = chosen[0]
    names = {name[len(start) :]: name for name in listed if name.startswith(start)}
    # The original stores the resolution embedder next to the network, without a moving average: both networks use it.
    parent = start.removesuffix(EMA_PREFIX) if start.endswith(EMA_PREFIX) else start.removesuffix(WEIGHTS_PREFIX)
    if parent != start:
        embedder = {name[len(parent) :]: name for name in listed if name.startswith(parent + RESOLUTION_PREFIX)}
        if embedder and any(name.startswith(RESOLUTION_PREFIX) for name in names):
            raise ValueError(
                f"The checkpoint has resolution embedders under both {start!r} and {parent!r}; remove one."
            )
        names |= embedder
    return names


def rename_tensors(names: Iterable[str]) -> dict[str, str]:
    """Return name in this package and diffusers -> name in the original.

    Raises:
        ValueError: if two original names map to the same tensor.
    """
    renamed: dict[str, str] = {}
    for name in names:
        target = _rename(name, RENAMES)
        if target in renamed:
            raise ValueError(f"{renamed[target]} and {name} are the same tensor ({target}); remove one of them.")
        renamed[target] = name
    return renamed


def original_name(name: str) -> str:
    """Return the original's name of a tensor; the inverse of `rename_tensors`.

    Example:
        >>> original_name("blocks.0.attention.to_out.0.weight")
        'blocks.0.attn_out.weight'
    """
    return _rename(name, ORIGINAL_RENAMES)


def _rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    return next((re.sub(old, new, name) for old, new in renames if re.fullmatch(old, name)), name)


# --- configuration


def read_config(shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the configuration of a network from the shapes of its tensors.

    Args:
        shapes: shapes by the names of this package.
        given: entries of PRXTransformer2DModel's configuration that shapes do not determine. `in_channels` or
            `patch_size` is needed if several combinations fit, and `fusion_range` with SPRINT's fusion. Defaults:
            equal halves for `axes_dim`, and those of the original for `theta`, `time_factor`, `time_max_period`.

    Raises:
        ValueError: if a needed tensor is missing, or the configuration is ambiguous or does not fit the shapes.
    """
    bottleneck = "img_in.0.weight" in shapes
    needed = {
        "txt_in.weight": 2,
        "final_layer.linear.weight": 2,
        "blocks.0.attention.norm_q.weight": 1,
        "blocks.0.gate_proj.weight": 2,
        "img_in.0.weight" if bottleneck else "img_in.weight": 2,
    }
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(f"The network lacks the tensors {missing}, which determine its configuration.")
    wrong = {name: shapes[name] for name, ndim in needed.items() if len(shapes[name]) != ndim or 0 in shapes[name]}
    if wrong:
        raise ValueError(f"The network has tensors with impossible shapes: {wrong}.")

    hidden_size, context_in_dim = shapes["txt_in.weight"]
    (head_dim,) = shapes["blocks.0.attention.norm_q.weight"]
    if hidden_size % head_dim:
        raise ValueError(f"The hidden size is {hidden_size}; accepted: multiples of the head dimension {head_dim}.")
    if given.get("axes_dim") is None and head_dim % 4:
        raise ValueError(f"The head dimension {head_dim} has no two even halves. Pass `axes_dim`.")
    in_channels, patch_size = _channels_and_patch(
        shapes["final_layer.linear.weight"][0], given.get("in_channels"), given.get("patch_size")
    )
    if (given.get("fusion_range") is None) == ("fusion.linear.weight" in shapes):
        raise ValueError(
            "`fusion_range` is set, but the network has no fusion layer (SPRINT). Omit it."
            if given.get("fusion_range") is not None
            else "The network has SPRINT's fusion layer, but the checkpoint does not contain its blocks. Pass "
            "`fusion_range` START STOP: the original's `route_start` and `route_end` + 1."
        )
    mlp_size = shapes["blocks.0.gate_proj.weight"][0]
    mlp_ratio = mlp_size / hidden_size
    if int(hidden_size * mlp_ratio) < mlp_size:  # the model truncates the product, which may be slightly too small
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    blocks = {int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match}
    if len(blocks) <= max(blocks):
        absent = next(number for number in range(max(blocks)) if number not in blocks)
        raise ValueError(
            f"The network has {len(blocks)} blocks, up to number {max(blocks)}; block {absent} is missing."
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
    if any(name.startswith("guidance_embedder.") for name in shapes):
        config["guidance_embeds"] = True
    return config | {key: value for key, value in given.items() if value is not None}


def _channels_and_patch(values: int, in_channels: int | None, patch_size: int | None) -> tuple[int, int]:
    """Return (C, p), channels and patch size, with C * p * p = `values`."""
    splits = [(values // p**2, p) for p in range(1, math.isqrt(values) + 1) if values % p**2 == 0]
    fits = [split for split in splits if in_channels in (None, split[0]) and patch_size in (None, split[1])]
    if len(fits) == 1:
        return fits[0]
    choices = ", ".join(f"{channels} x {p}^2" for channels, p in splits)
    if not fits:
        raise ValueError(
            f"`in_channels` is {in_channels} and `patch_size` is {patch_size}; accepted for {values} values per token "
            f"(channels x patch size^2): {choices}."
        )
    raise ValueError(
        f"A token has {values} values; channels x patch size^2 can be {choices}. Pass `in_channels` or `patch_size` "
        "(the VAE, or `pixel_space`, determines the channels)."
    )


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], stored_as: Mapping[str, str]
) -> None:
    """Raise a ValueError that lists all missing and unknown tensors and wrong shapes.

    Args:
        expected: shapes of a transformer's tensors.
        shapes: shapes in the file, by the names of this package.
        stored_as: names in the file, by the names of this package.
    """
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
        raise ValueError("The network in the checkpoint differs from a PRX:\n  " + "\n  ".join(wrong))


# --- loading


class SingleFileMixin:
    """`from_single_file` for PRXTransformer2DModel; diffusers' own knows a fixed list of classes."""

    @classmethod
    def from_single_file(
        cls: Any,
        pretrained_model_link_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        *,
        config: str | os.PathLike | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        quantization_config: Any = None,
        config_revision: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        force_download: bool = False,
        proxies: dict[str, str] | None = None,
        local_files_only: bool = False,
        **given: Any,
    ) -> Any:
        """Load a transformer from one file with the original's names or those of this package and diffusers.

        The file's names may have any prefix; other tensors in it (optimizer, VAE, text encoder) are counted in a
        warning. The configuration is that of `config`, or that in the file's header, or follows from the shapes and
        the arguments.

        Args:
            pretrained_model_link_or_path_or_dict: .safetensors or .gguf file, its address on the Hub
                (https://huggingface.co/OWNER/NAME/blob/main/FILE), or tensors by name.
            config: folder or Hub id of a transformer or pipeline whose configuration the file's transformer has.
            subfolder: folder of the configuration. None: the transformer's folder in a pipeline.
            torch_dtype: float32, bfloat16 or float16. None: float32, or the `compute_dtype` of quantized weights.
            quantization_config: diffusers' GGUFQuantizationConfig, for quantized .gguf files; needs the package gguf.
            config_revision: revision of `config`.
            revision, token, cache_dir, force_download, proxies, local_files_only: as in `from_pretrained`.
            given: configuration that the shapes do not determine, such as `in_channels`, `patch_size`, `axes_dim`,
                `fusion_range`.

        Raises:
            ValueError: if the file is not exactly one PRX transformer, or its configuration is ambiguous; the message
                says what to pass.

        Example:
            >>> transformer = PRXTransformer2DModel.from_single_file("prx.safetensors", in_channels=16)
        """
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
        hub |= {"proxies": proxies, "local_files_only": local_files_only}
        source = pretrained_model_link_or_path_or_dict
        tensors, header = _read_file(source, hub | {"revision": revision})
        stored_names = find_network(tensors)
        stored_as = {name: stored_names[original] for name, original in rename_tensors(stored_names).items()}
        if len(stored_as) < len(tensors):
            logger.warning(
                f"{len(tensors) - len(stored_as)} of {len(tensors)} tensors do not belong to the transformer."
            )
        weights = {name: unpack_mask_token(name, tensors[stored]) for name, stored in stored_as.items()}
        # a quantized tensor of GGUF holds bytes; `quant_shape` is the shape of its values
        shapes = {name: tuple(getattr(value, "quant_shape", value.shape)) for name, value in weights.items()}
        if config is not None:
            is_folder = os.path.isfile(os.path.join(config, cls.config_name))
            folder = subfolder or (None if is_folder else "transformer")
            stored = cls.load_config(str(config), subfolder=folder, revision=config_revision, **hub)
            settings = cls.extract_init_dict(stored)[0] | given
        elif CONFIG_KEY in header:
            settings = json.loads(header[CONFIG_KEY]) | given
        else:
            settings = read_config(shapes, given)
        with torch.device("meta"):
            transformer = cls(**settings)
        check_shapes({name: tuple(value.shape) for name, value in transformer.state_dict().items()}, shapes, stored_as)
        quantized = [name for name in weights if hasattr(weights[name], "quant_type")]
        if quantized or quantization_config is not None:
            _check_quantization(transformer, quantized, quantization_config)
            load_quantized(transformer, weights, quantization_config, torch_dtype)
            return transformer.eval()
        if integers := [stored_as[name] for name, value in weights.items() if not value.is_floating_point()]:
            raise ValueError(f"The file has tensors without floating-point values: {integers[:8]}.")
        dtype = torch.float32 if torch_dtype is None else torch_dtype
        transformer.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
        return transformer.eval()


def unpack_mask_token(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the mask token (1, 1, D) of the original as (D,), and other tensors unchanged."""
    return tensor[0, 0] if name == "fusion.mask_token" and tuple(tensor.shape[:-1]) == (1, 1) else tensor


def _read_file(
    source: str | os.PathLike | Mapping[str, torch.Tensor], hub: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a file, and the texts in its header."""
    if isinstance(source, Mapping):
        return dict(source), {}
    suffix = os.path.splitext(os.fspath(source))[1]
    if suffix not in (".safetensors", ".gguf"):
        raise ValueError(
            f"`pretrained_model_link_or_path_or_dict` is {os.fspath(source)!r}; accepted are .safetensors and .gguf "
            "files. Convert a file of torch.save with `python -m diffusers_prx.convert`."
        )
    file = fetch_weights_file(source, **hub)
    if suffix == ".gguf":
        return load_gguf(file), {}
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{source} is not a .safetensors file that can be read: {error}.") from error


def _check_quantization(transformer: nn.Module, quantized: list[str], quantization_config: Any) -> None:
    if not isinstance(quantization_config, GGUFQuantizationConfig):
        raise ValueError(
            f"`quantization_config` is {quantization_config!r}; accepted for a quantized .gguf file is diffusers' "
            "GGUFQuantizationConfig(compute_dtype=torch.bfloat16). Quantize other files after loading."
        )
    linear = {f"{name}.weight" for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    if others := [name for name in quantized if name not in linear]:
        raise ValueError(f"The file has quantized tensors that are not weights of linear layers: {others[:8]}.")
