"""Plan of a run and checks before weights are loaded, from configurations, data and captions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, T5GemmaModuleConfig

from ..config.data_sources import data_sources_of
from ..config.training_config import TrainingConfig
from ..data.captions import CaptionStatistics, caption_statistics
from ..data.mixing import ENDLESS
from ..data.precomputed import require_complete
from ..hub.publishing import UNPUBLISHED_BASE, hub_id, require_token
from ..latents import VAE, latent_channels, vae_scale_factor
from ..models.transformer_prx import PRXTransformer2DModel
from ..pipelines.pipeline_prx import PRXPipeline
from ..prompt_cleaning import CLEANERS
from ..techniques.ema import TRAINING_ONLY
from ..techniques.lora import add_adapter
from ..techniques.optimizers import muon_weights, trainable_parameters
from ..techniques.teachers import build_teacher
from .network_configs import meta_autoencoder, meta_teacher, text_config
from .networks import check_dino_size, check_fit, check_positions, new_transformer, pipeline_class_of
from .stages import Stage
from .validation_metrics import check_metrics

BYTES = {"float32": 4, "bf16": 2}
INDENT = 14


@dataclass(frozen=True)
class MetaNetworks:
    """Networks of a run without weights.

    Args:
        transformer: transformer on the meta device.
        vae: autoencoder on the meta device; None in pixel space.
        pixels_per_token: see `Nets.pixels_per_token`.
    """

    transformer: PRXTransformer2DModel
    vae: VAE
    pixels_per_token: int


def meta_networks(cfg: TrainingConfig, device: str = "meta", tables: bool = False) -> MetaNetworks:
    """Make the networks of a run from their configurations, without weights.

    Args:
        cfg: configuration of the run.
        device: device of the parameters; other devices than meta initialize them.
        tables: True to use the tables of `network_configs` instead of the Hub.

    Raises:
        ValueError: the class of the autoencoder is not supported, `transformer_config` has an unknown key,
            `lora_layers` has an unknown layer, or settings do not fit the networks.

    Example:
        >>> networks = meta_networks(cfg)
        >>> sum(weight.numel() for weight in networks.transformer.parameters())
    """
    vae, saved = None, cfg.pretrained_model_name_or_path
    source: dict[str, Any] = {"subfolder": "transformer", "revision": cfg.revision}
    stored = {} if saved is None else dict(PRXTransformer2DModel.load_config(saved, **source))
    with torch.device(device):
        if cfg.vae_name_or_path is not None:
            vae = meta_autoencoder(cfg.vae_name_or_path, tables=tables)
        elif saved is not None and pipeline_class_of(cfg) is PRXPipeline:
            vae = meta_autoencoder(saved, cfg.revision)
        if cfg.transformer_config:
            # the text encoder of a saved pipeline fits its transformer
            width = stored["context_in_dim"] if _keeps_text_encoder(cfg) else _text_width(cfg, tables)
            transformer = new_transformer(cfg.transformer_config, latent_channels(vae), width)
        else:
            transformer = PRXTransformer2DModel.from_config(stored)
        if cfg.lora_rank is not None:
            add_adapter(cfg, transformer)
    check_fit(transformer.config, vae, cfg.stage_configs())
    return MetaNetworks(transformer, vae, transformer.config["patch_size"] * vae_scale_factor(vae))


def check_techniques(cfg: TrainingConfig, aligns: bool) -> None:
    """Validate that files for auxiliary losses, precomputed data, metrics and the upload exist.

    Only the encoders of metrics are loaded, and released again.

    Args:
        cfg: configuration of the run.
        aligns: False if the alignment is over, so that its teacher is not needed.

    Raises:
        ValueError: something is missing or does not fit.
    """
    for stage in cfg.stage_configs():
        with torch.device("meta"):
            if stage.repa_weight and aligns:
                meta_teacher("repa_teacher", str(stage.repa_teacher))
            if stage.dino_weight:
                name = str(stage.dino_teacher)
                teacher = build_teacher(meta_teacher("dino_teacher", name), [0.0] * 3, [1.0] * 3, name)
                check_dino_size(stage, teacher.patch_size)
        if stage.lpips_backbone is not None and not Path(stage.lpips_backbone).is_file():
            raise ValueError(f"`lpips_backbone` is {stage.lpips_backbone!r}, which is not a file.")
        if stage.precomputed_dir is not None:
            require_complete(stage.precomputed_folder)
        if stage.validation_metrics:
            check_metrics(stage)
    if cfg.push_to_hub:
        require_token()


def _keeps_text_encoder(cfg: TrainingConfig) -> bool:
    return not cfg.text_encoder_config and cfg.text_encoder_name_or_path is None


def _text_width(cfg: TrainingConfig, tables: bool) -> int:
    """Return the width of the text encoder's hidden states; T5Gemma nests the configuration of its encoder."""
    if cfg.text_encoder_config:
        return T5GemmaModuleConfig(**cfg.text_encoder_config).hidden_size
    config = text_config(str(cfg.text_encoder_name_or_path), tables=tables)
    config = getattr(config, "text_config", config)
    check_positions(cfg, config)
    return getattr(config, "encoder", config).hidden_size


def memory(cfg: TrainingConfig, trained: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes that a process needs for trained networks, without activations and frozen networks.

    Args:
        cfg: configuration of the run.
        trained: trainable modules on any device, by name (see `Nets.trainable`).

    Returns:
        Bytes of "weights", "gradients", "optimizer" and, with a moving average, "average".
    """
    sizes: Counter[str] = Counter()
    with_momentum = muon_weights(trained, cfg.muon_fused) if cfg.optimizer == "muon" else {}
    for name, module in trained.items():
        size = BYTES[cfg.weights_dtype if name == "transformer" else "float32"]
        trainable = list(trainable_parameters(module).values())
        frozen = size * sum(weight.numel() for weight in module.parameters() if not weight.requires_grad)
        if cfg.lora_rank is not None:
            size = BYTES["float32"]
        values = size * sum(weight.numel() for weight in trainable)
        # Muon has no second moment
        second = size * sum(weight.numel() for weight in trainable if weight not in with_momentum)
        sizes.update(weights=frozen + values, gradients=values, optimizer=values + second)
        if cfg.use_ema and name not in TRAINING_ONLY:
            sizes["average"] += values
    return dict(sizes)


def caption_statistics_of(cfg: TrainingConfig, stage: Stage) -> CaptionStatistics | None:
    """Return statistics of a stage's captions; None if off, for drawn or constant captions, or without tokenizer."""
    is_known = all(
        source.name == "scenes" or source.instance_prompt is not None for source in data_sources_of(stage.cfg)
    )
    if not cfg.caption_statistics_samples or is_known or cfg.text_encoder_config:
        return None
    if cfg.text_encoder_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(cfg.text_encoder_name_or_path)
    else:
        source: dict[str, Any] = {"subfolder": "tokenizer"} | ({"revision": cfg.revision} if cfg.revision else {})
        tokenizer = AutoTokenizer.from_pretrained(str(cfg.pretrained_model_name_or_path), **source)
    captions = stage.captions(cfg.caption_statistics_samples)
    first = next(captions, None)
    if first is None:
        return None  # training reports unreadable samples
    return caption_statistics(
        chain([first], captions), tokenizer, cfg.max_sequence_length, CLEANERS[cfg.caption_cleaning]
    )


def describe_plan(
    cfg: TrainingConfig,
    stages: Sequence[Stage],
    transformer: PRXTransformer2DModel,
    captions: Sequence[CaptionStatistics | None],
    processes: int,
) -> str:
    """Return the plan of a run as lines with a name and a value.

    Args:
        cfg: configuration of the run.
        stages: stages with buckets.
        transformer: transformer on any device.
        captions: results of `caption_statistics_of`, one per stage.
        processes: number of processes.
    """
    count = sum(weight.numel() for weight in transformer.parameters())
    trainable = sum(weight.numel() for weight in trainable_parameters(transformer).values())
    parts = memory(cfg, {"transformer": transformer})
    memory_parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items())
    rows = [
        (
            "transformer",
            f"{count:,} parameters" + (f", of which {trainable:,} are trained" if trainable < count else ""),
        ),
        ("types", f"weights {cfg.weights_dtype}, computation {_computation(cfg)}"),
        ("memory", f"{sum(parts.values()) / 1e9:.3g} GB ({memory_parts}), without activations and frozen networks"),
    ]
    if cfg.push_to_hub:
        rows.append(("upload to", cfg.repo_id))
        if cfg.lora_rank is not None and hub_id(cfg.pretrained_model_name_or_path) is None:
            rows.append(("warning", UNPUBLISHED_BASE))
    for number, (stage, figures) in enumerate(zip(stages, captions)):
        rows.append((f"stage {number}", f"steps {stage.first_step} to {stage.stop_step}"))
        rows += _stage_rows(stage, figures, processes)
    return "\n".join(f"{name:<{INDENT}}{value}".rstrip() for name, value in rows)


def _computation(cfg: TrainingConfig) -> str:
    return "float32" if cfg.mixed_precision == "no" else cfg.mixed_precision


def _stage_rows(stage: Stage, figures: CaptionStatistics | None, processes: int) -> list[tuple[str, str]]:
    cfg, step_size, sources = stage.cfg, stage.step_size(processes), data_sources_of(stage.cfg)
    assert stage.buckets is not None
    rows = []
    if stage.stream is not None:
        sizes = [f"{len(shards)} shards, streamed" for shards in stage.stream.sources]
    else:
        sizes = [f"{size} samples" for size in stage.sizes]
    for source, size in zip(sources, sizes):
        share = "" if source.weight is None or len(sources) == 1 else f", weight {source.weight:g}"
        rows.append(("  data", f"{source.name}: {size}{share}"))
    held_out = 0 if stage.held_out is None else len(stage.held_out)
    if held_out < cfg.num_validation_samples:
        rows.append(
            (
                "  held out",
                f"{held_out} samples, because `num_validation_samples` {cfg.num_validation_samples} is more than half "
                "of the data: pass a smaller number, or 0 for no validation loss",
            )
        )
    elif held_out:
        rows.append(("  held out", f"{held_out} samples"))
    rows.append(("  resolution", f"{cfg.resolution} pixels"))
    if cfg.aspect_ratio_buckets != "none":
        first, *others = stage.buckets.summary().splitlines()
        rows += [("  buckets", first), *(("", line) for line in others)]
    rows += [("  left out", message) for message in stage.left_out]
    rows.append(
        (
            "  batch",
            f"{step_size}: {cfg.train_batch_size} x {cfg.gradient_accumulation_steps} accumulated x {processes} "
            f"process{'es' if processes > 1 else ''}",
        )
    )
    samples = sum(map(len, stage.buckets.members))
    if 0 < samples < ENDLESS:
        epochs = cfg.max_train_steps * step_size / samples
        rows.append(("  epoch", f"{samples / step_size:.1f} steps; {epochs:.3g} epochs in this stage"))
    if figures is not None:
        rows.append(("  captions", figures.summary()))
        if all(source.name != "scenes" for source in sources):
            rows += [("  warning", warning) for warning in figures.warnings()]
    return rows
