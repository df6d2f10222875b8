"""Conversion of training checkpoints of Photoroom/PRX to pipelines: `python -m diffusers_prx.convert --help`.

The original trainer saves the whole run: the network under `state.model.denoiser.`, its moving average under
`state.model.ema_denoiser.model.`, the optimizer, losses and more. This module finds the network, renames its tensors
to the names of diffusers and this package, infers its configuration from their shapes, and saves a pipeline.
`--to original` is the way back: one file with the network under the original's names.
`checkpoint_files.py` reads the files without running code that they may contain.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline

from .checkpoint_files import check_stored, list_tensors, read_tensors
from .cli import exit_with_error, parse_flags, path
from .files import expand_path
from .latents import latent_channels, load_vae
from .models.single_file import (
    CONFIG_KEY,
    EMA_PREFIX,
    check_shapes,
    find_network,
    original_name,
    read_config,
    rename_tensors,
    unpack_mask_token,
)
from .models.transformer_prx import PRXTransformer2DModel
from .pipelines.pipeline_prx import PRXPipeline
from .pipelines.pipeline_prx_pixel import PRXPixelPipeline
from .prompt_cleaning import CAPTION_CLEANINGS, CaptionCleaning
from .schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler
from .schedulers.diffusers_compat import PREDICTION_TYPES
from .text import load_text_encoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEADER_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # names in .safetensors files

# Configuration of PRXTransformer2DModel that the original has too.
ORIGINAL_OPTIONS = {"in_channels", "patch_size", "context_in_dim", "hidden_size", "mlp_ratio", "num_heads", "depth"}
ORIGINAL_OPTIONS |= {"axes_dim", "theta", "time_factor", "time_max_period", "bottleneck_size", "fusion_range"}
ORIGINAL_OPTIONS |= {"resolution_embeds", "resolution_tokens"}

# Flags of configuration that shapes may not determine.
CONFIG_FLAGS = ("in_channels", "patch_size", "axes_dim", "fusion_range", "theta", "time_factor", "time_max_period")

_CHECKPOINT_HELP = "Checkpoint folder, .pt file or .safetensors file; with --to original, folder of a pipeline or "
_CHECKPOINT_HELP += "transformer, or .safetensors file."

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

    shapes = {name: tuple(unpack_mask_token(name, tensor).shape) for name, tensor in tensors.items()}
    with torch.device("meta"):
        transformer = PRXTransformer2DModel(**read_config(shapes, given))
    check_shapes({name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}, shapes, stored_as)
    _check_dtypes(tensors, dtype)

    loaded = read_tensors(path, listed, stored_as.values())
    weights = {name: _own_memory(unpack_mask_token(name, loaded[stored]), dtype) for name, stored in stored_as.items()}
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


def _own_memory(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor in `dtype`, contiguous and without shared memory, as safetensors requires."""
    tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


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


# --- the way back


def original_tensors(transformer: PRXTransformer2DModel) -> dict[str, torch.Tensor]:
    """Return the tensors of a transformer under the original's names.

    Raises:
        ValueError: if the transformer has options that the original does not have.

    Example:
        >>> from diffusers_prx.convert import original_tensors
        >>> tensors = original_tensors(PRXTransformer2DModel.from_pretrained("my-prx", subfolder="transformer"))
    """
    options = {key: value for key, value in transformer.config.items() if value and not key.startswith("_")}
    if unknown := sorted(options.keys() - ORIGINAL_OPTIONS):
        raise ValueError(f"The transformer has the options {unknown}, which the original does not have.")
    if {"resolution_embeds", "resolution_tokens"} <= options.keys():
        raise ValueError("The transformer has `resolution_embeds` and `resolution_tokens`; the original has only one.")
    return {
        original_name(name): tensor[None, None] if name == "fusion.mask_token" else tensor
        for name, tensor in transformer.state_dict().items()
    }


def save_original(args: argparse.Namespace) -> None:
    """Write `denoiser.safetensors` with the original's names and, in its header, the configuration."""
    source = args.checkpoint_path
    folder = source / "transformer" if (source / "model_index.json").is_file() else source
    files = sorted(folder.glob("*.safetensors")) if source.is_dir() else [source]
    stored: set[str] = set()
    for file in files:
        with safetensors.safe_open(file, "pt") as opened:
            stored |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    if args.dtype is None and (len(stored) != 1 or not stored <= _HEADER_DTYPES.keys()):
        raise ValueError(f"`checkpoint_path` {source} has tensors of the types {sorted(stored)}. Pass `--dtype`.")
    dtype = DTYPES[args.dtype] if args.dtype else _HEADER_DTYPES[stored.pop()]
    if source.is_dir():
        transformer = PRXTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
    else:
        given = {key: getattr(args, key) for key in CONFIG_FLAGS if getattr(args, key) is not None}
        transformer = PRXTransformer2DModel.from_single_file(source, torch_dtype=dtype, **given)
    tensors = {name: _own_memory(tensor, None) for name, tensor in original_tensors(transformer).items()}
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", CONFIG_KEY: json.dumps(config)}
    safetensors.torch.save_file(tensors, args.output_dir / "denoiser.safetensors", metadata=header)
    print(f"network: {len(tensors)} tensors, {transformer.dtype}; configuration: {config}")


# --- pipeline


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line, and check its combinations."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_prx.convert",
        description="Convert an original PRX training checkpoint to a pipeline.",
    )
    add = parser.add_argument
    add("--to", choices=("diffusers", "original"), default="diffusers", help="Format to write. Default: diffusers.")
    add("--checkpoint_path", type=path, required=True, help=_CHECKPOINT_HELP)
    add("--output_dir", type=path, required=True, help="New or empty folder.")
    add("--ema", action="store_true", help="Convert the moving average instead of the trained weights.")
    add("--prefix", help="Prefix of the network's names. Default: it is searched for.")
    add("--dtype", choices=list(DTYPES), help="Type of the network's weights. Default: as in the checkpoint.")
    _add_component_flags(parser.add_argument_group("components and settings of the training"))
    _add_config_flags(parser.add_argument_group("configuration that the checkpoint may not determine"))
    args = parse_flags(parser, argv)
    sources = [bool(args.vae_name_or_path), args.pixel_space, bool(args.components_from)]
    if args.to == "original":
        used = {"to", "checkpoint_path", "output_dir", "dtype", *CONFIG_FLAGS}
        unused = [f"--{name}" for name, value in vars(args).items() if name not in used and value not in (None, False)]
        if unused:
            parser.error(f"--to original saves only the network, so {', '.join(unused)} have no effect")
    elif args.transformer_only:
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
        if args.to == "original":
            save_original(args)
            print(f"saved to {args.output_dir}")
            return
        components = None if args.transformer_only else load_components(args)
        given = {key: getattr(args, key) for key in CONFIG_FLAGS}
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
