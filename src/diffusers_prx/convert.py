"""Conversion of training checkpoints of Photoroom/PRX to pipelines: `python -m diffusers_prx.convert --help`.

The original trainer saves the whole run: the network under `state.model.denoiser.`, its moving average under
`state.model.ema_denoiser.model.`, the optimizer, losses and more. This module finds the network, renames its tensors
to the names of diffusers and this package, infers its configuration from their shapes, and saves a pipeline.
`checkpoint_files.py` reads the files without running code that they may contain.
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline

from .checkpoint_files import check_stored, list_tensors, read_tensors
from .cli import exit_with_error, parse_flags, path
from .files import expand_path
from .latents import latent_channels, load_vae
from .models.transformer_prx import PRXTransformer2DModel
from .pipelines.pipeline_prx import PRXPipeline
from .pipelines.pipeline_prx_pixel import PRXPixelPipeline
from .prompt_cleaning import CAPTION_CLEANINGS, CaptionCleaning
from .schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from .schedulers.diffusers_compat import PREDICTION_TYPES
from .text import load_text_encoder

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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Options that have no effect with --transformer_only.
PIPELINE_OPTIONS = (
    "vae_name_or_path",
    "text_encoder_name_or_path",
    "components_from",
    "prediction_type",
    "shift",
    "noise_scale",
    "resolution",
    "max_sequence_length",
    "token_route",
    "caption_cleaning",
)


# --- names


def find_network(listed: Mapping[str, Any], ema: bool = False, prefix: str | None = None) -> dict[str, str]:
    """Find one network in a checkpoint. Return its tensors: name in the original's network -> name in the checkpoint.

    Args:
        listed: return value of `list_tensors`.
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
        raise ValueError(f"`checkpoint_path` contains no PRX; it has {len(listed)} entries: {sorted(listed)[:8]} ...")
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
        target = next((re.sub(old, new, name) for old, new in RENAMES if re.fullmatch(old, name)), name)
        if target in renamed:
            raise ValueError(f"{renamed[target]} and {name} are the same tensor ({target}); remove one of them.")
        renamed[target] = name
    return renamed


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


# --- network


def convert_transformer(
    path: str | Path, ema: bool = False, prefix: str | None = None, dtype: torch.dtype | None = None, **given: Any
) -> PRXTransformer2DModel:
    """Convert the network of an original checkpoint.

    Args:
        path: checkpoint folder, .pt or .safetensors file, see `list_tensors`.
        ema: convert the moving average instead of the trained weights.
        prefix: prefix of the network's names, see `find_network`.
        dtype: float32, bfloat16 or float16; None: as stored.
        given: configuration that shapes do not determine, see `read_config`.

    Raises:
        ValueError: if the checkpoint cannot be read or is not exactly a PRX. The message lists every tensor that is
            missing, unknown or has another shape or type.

    Example:
        >>> from diffusers_prx.convert import convert_transformer
        >>> transformer = convert_transformer("checkpoints/ep0-ba100000", ema=True, in_channels=16)
    """
    path = Path(path)
    listed = list_tensors(path)
    stored_names = find_network(listed, ema, prefix)
    stored_as = {name: stored_names[original] for name, original in rename_tensors(stored_names).items()}
    tensors = {name: tensor for name, stored in stored_as.items() if (tensor := listed[stored]) is not None}
    if len(tensors) < len(stored_as):
        others = [stored for name, stored in stored_as.items() if name not in tensors]
        raise ValueError(f"The network has entries that are not tensors: {others}.")
    check_stored(path, {stored_as[name]: tensor for name, tensor in tensors.items()})
    if ema:
        _check_ema_is_active(path, listed)

    shapes = {name: tuple(_reshape(name, tensor).shape) for name, tensor in tensors.items()}
    with torch.device("meta"):
        transformer = PRXTransformer2DModel(**read_config(shapes, given))
    _check_shapes({name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}, shapes, stored_as)
    _check_dtypes(tensors, dtype)

    loaded = read_tensors(path, listed, stored_as.values())
    weights = {name: _own_memory(_reshape(name, loaded[stored]), dtype) for name, stored in stored_as.items()}
    if broken := [stored_as[name] for name, weight in weights.items() if not weight.isfinite().all()]:
        precision = "" if dtype is None else f" in {dtype}"
        raise ValueError(
            f"{len(broken)} tensors of the network are NaN or infinite{precision}: {broken[:8]}. Convert an earlier "
            "checkpoint, or pass another `dtype`."
        )
    transformer.load_state_dict(weights, assign=True)
    _report(transformer, listed, stored_as)
    not_averaged = [stored for stored in stored_as.values() if ema and EMA_PREFIX not in stored]
    if not_averaged:
        print(f"the resolution embedder has no moving average: using the trained one ({len(not_averaged)} tensors)")
    return transformer.eval()


def _check_ema_is_active(path: Path, listed: Mapping[str, torch.Tensor | None]) -> None:
    """Refuse a moving average that has not begun: until then, it is the untrained network, marked by a flag."""
    flags = [name for name in listed if name.endswith(EMA_PREFIX.removesuffix("model.") + "_is_active")]
    for name, flag in read_tensors(path, listed, flags).items():
        if not flag.any():
            raise ValueError(
                f"`ema` is set, but the moving average had not begun in this checkpoint ({name}). Omit it."
            )


def _reshape(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the mask token (1, 1, D) of the original as (D,), and other tensors unchanged."""
    return tensor[0, 0] if name == "fusion.mask_token" and tuple(tensor.shape[:-1]) == (1, 1) else tensor


def _own_memory(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor in `dtype`, contiguous and without shared memory, as safetensors requires."""
    tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], stored_as: Mapping[str, str]
) -> None:
    """Raise a ValueError that lists all missing and unknown tensors and wrong shapes."""
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


def _check_dtypes(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    if not set(counts) <= set(DTYPES) or dtype not in (None, *DTYPES.values()):
        raise ValueError(f"The tensors are {dict(counts)} and `dtype` is {dtype}; accepted: {list(DTYPES)}.")
    if dtype is None and len(counts) > 1:  # the original adds float32 modules to bfloat16 networks
        raise ValueError(f"The network has tensors of several types, {dict(counts)}. Pass `dtype`.")


def _report(transformer: Any, listed: Mapping[str, Any], stored_as: Mapping[str, str]) -> None:
    """Print what was converted and what was left out, grouped by the first parts of the names."""
    count = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"network: {len(stored_as)} tensors, {count:,} parameters, {transformer.dtype}")
    converted = set(stored_as.values())
    rest = Counter(".".join(name.split(".")[:3]) for name in listed if name not in converted)
    for group, number in rest.most_common(20):
        print(f"left out: {number} entries under {group}")
    if len(rest) > 20:
        print(f"left out: {sum(rest.values()) - sum(n for _, n in rest.most_common(20))} entries elsewhere")
    print("configuration:", {key: value for key, value in transformer.config.items() if not key.startswith("_")})


# --- pipeline


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line, and check its combinations."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_prx.convert",
        description="Convert an original PRX training checkpoint to a pipeline.",
    )
    add = parser.add_argument
    add("--checkpoint_path", type=path, required=True, help="Checkpoint folder, .pt file or .safetensors file.")
    add("--output_dir", type=path, required=True, help="New or empty folder.")
    add("--ema", action="store_true", help="Convert the moving average instead of the trained weights.")
    add("--prefix", help="Prefix of the network's names. Default: it is searched for.")
    add("--dtype", choices=list(DTYPES), help="Type of the network's weights. Default: as in the checkpoint.")
    _add_component_flags(parser.add_argument_group("components and settings of the training"))
    _add_config_flags(parser.add_argument_group("configuration that the checkpoint may not determine"))
    args = parse_flags(parser, argv)
    sources = [bool(args.vae_name_or_path), args.pixel_space, bool(args.components_from)]
    if args.transformer_only:
        unused = [f"--{name}" for name in PIPELINE_OPTIONS if getattr(args, name) is not None]
        if unused:
            parser.error(f"--transformer_only saves no pipeline, so {', '.join(unused)} have no effect")
    elif sum(sources) != 1:
        parser.error("pass one of --vae_name_or_path, --pixel_space, --components_from and --transformer_only")
    elif bool(args.text_encoder_name_or_path) == bool(args.components_from):
        parser.error("pass either --text_encoder_name_or_path or --components_from")
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        parser.error(f"--output_dir is {args.output_dir}; accepted: a new or empty folder")
    if args.max_sequence_length is not None and args.max_sequence_length < 1:
        parser.error(f"--max_sequence_length must be at least 1, got {args.max_sequence_length}")
    return args


def _add_component_flags(group: Any) -> None:
    """Add the flags of components (Hub ids or folders) and of the settings of the training."""
    prediction = "Default: x_prediction in pixel space, velocity in latents. The original calls them "
    prediction += "`x_prediction_flow_matching` and `flow_matching`."
    cleaning = "Cleaning of captions; light is the original's `skip_text_cleaning`. Default: light for Qwen3-VL, full "
    cleaning += "for other text encoders."
    route = "TREAD or SPRINT, for self-guidance: the original's `route_start`, `route_end` + 1, and share of tokens."
    components = "PRX pipeline (saved or published) whose text encoder, tokenizer and VAE are used."
    add = group.add_argument
    add("--vae_name_or_path", type=expand_path, help="VAE, or pipeline with one (black-forest-labs/FLUX.1-dev).")
    add(
        "--pixel_space", action="store_true", help="The network was trained without a VAE (the original's `identity`)."
    )
    add("--text_encoder_name_or_path", type=expand_path, help="Text encoder and tokenizer (google/t5gemma-2b-2b-ul2).")
    add("--components_from", type=expand_path, help=components)
    add("--transformer_only", action="store_true", help="Save only the network.")
    add("--prediction_type", choices=PREDICTION_TYPES, help=prediction)
    add("--shift", type=float, help="Shift of the noise levels (the original's `timestep_shift`). Default: 3.")
    add("--noise_scale", type=float, help="Scale of the noise in training. Default: 1, as in the original's code.")
    add("--resolution", type=int, help="Default side length of images in pixels. Default: that of the pipeline.")
    add("--max_sequence_length", type=int, help="Number of text tokens. Default: 256.")
    add("--caption_cleaning", choices=CAPTION_CLEANINGS, help=cleaning)
    add("--token_route", nargs=3, type=float, metavar=("START", "STOP", "RATIO"), help=route)


def _add_config_flags(group: Any) -> None:
    fusion = "Blocks of SPRINT: the original's `route_start` and `route_end` + 1."
    axes = "Features per axis of the position embedding. Default: half of the head dimension each."
    add = group.add_argument
    add("--in_channels", type=int, help="Channels of the latents. Default: those of the VAE.")
    add("--patch_size", type=int, help="Side length of a patch in latents or pixels. Default: inferred.")
    add("--axes_dim", nargs=2, type=int, metavar=("ROWS", "COLUMNS"), help=axes)
    add("--fusion_range", nargs=2, type=int, metavar=("START", "STOP"), help=fusion)
    add("--theta", type=int, help="Base of the position embedding. Default: 10000.")
    add("--time_factor", type=float, help="Factor of the timestep embedding. Default: 1000.")
    add("--time_max_period", type=int, help="Period of timestep and resolution embeddings. Default: 10000.")


def load_components(args: argparse.Namespace) -> dict[str, Any]:
    """Load text encoder, tokenizer, and the VAE or None."""
    if args.components_from:
        name = DiffusionPipeline.load_config(args.components_from).get("_class_name")
        if name not in ("PRXPipeline", "PRXPixelPipeline"):
            raise ValueError(f"`components_from` {args.components_from} is a {name}; accepted: a PRX pipeline.")
        pipeline_class: Any = PRXPipeline if name == "PRXPipeline" else PRXPixelPipeline
        unused: dict[str, Any] = {"transformer": None, "scheduler": None, "token_route": None}
        dtypes: Any = {"text_encoder": "auto", "default": torch.float32}  # as `load_text_encoder` and `load_vae`
        pipeline = pipeline_class.from_pretrained(args.components_from, dtype=dtypes, **unused)
        parts = {"text_encoder": pipeline.text_encoder, "tokenizer": pipeline.tokenizer}
        return parts | {"vae": getattr(pipeline, "vae", None)}
    text_encoder, tokenizer = load_text_encoder(args.text_encoder_name_or_path)
    vae = load_vae(args.vae_name_or_path) if args.vae_name_or_path else None
    return {"text_encoder": text_encoder, "tokenizer": tokenizer, "vae": vae}


def cleaning_of(text_encoder: Any) -> CaptionCleaning:
    """Return the cleaning that the original uses for a text encoder: light for Qwen3-VL, full for T5Gemma."""
    return "light" if text_encoder.config.model_type.startswith("qwen") else "full"


def channels_of(vae: Any) -> int:
    """Return the number of latent channels, or 3 without a VAE.

    Raises:
        ValueError: for FLUX.2's VAE, whose 32 x 2 x 2 values have the size of 128 channels, but another meaning.
    """
    if isinstance(vae, AutoencoderKLFlux2):
        raise ValueError(
            "`vae_name_or_path` is FLUX.2's VAE. The original loads it as an AutoencoderKL with 32 channels times "
            "0.18215, which differs from the normalized latents of AutoencoderKLFlux2. Save the VAE as an "
            "AutoencoderKL with this `scaling_factor`, or pass `in_channels` 128 if the network was "
            "trained on normalized latents."
        )
    return latent_channels(vae)


def build_pipeline(
    transformer: PRXTransformer2DModel, components: Mapping[str, Any], args: argparse.Namespace
) -> PRXPipeline | PRXPixelPipeline:
    """Build a pipeline from a converted network; without a VAE, a pixel-space pipeline.

    Raises:
        ValueError: if components do not fit each other, or a setting is invalid.
    """
    parts: dict[str, Any] = dict(components)
    vae, text_encoder, tokenizer = parts.pop("vae"), parts["text_encoder"], parts["tokenizer"]
    width = text_encoder.get_input_embeddings().embedding_dim
    if width != transformer.config["context_in_dim"]:
        raise ValueError(
            f"`text_encoder_name_or_path`: the text encoder has the width {width}; accepted: "
            f"{transformer.config['context_in_dim']}, that of the network."
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
            raise ValueError(f"`token_route` has the blocks {start} and {stop}; accepted: integers.")
        parts["token_route"] = (int(start), int(stop), ratio)
    pipeline = pipeline_class(
        transformer=transformer,
        scheduler=scheduler_class(shift=shift),
        noise_scale=noise_scale,
        caption_cleaning=args.caption_cleaning or cleaning_of(text_encoder),
        **parts,
    )
    print(
        f"not in the checkpoint, please check: {prediction_type}, shift {shift}, noise_scale {noise_scale}, {tokens} "
        f"text tokens, caption_cleaning {pipeline.caption_cleaning}"
    )
    return pipeline


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
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
    except (ValueError, OSError, safetensors.SafetensorError) as error:  # the last one if the disk is full
        exit_with_error(error)
    print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
