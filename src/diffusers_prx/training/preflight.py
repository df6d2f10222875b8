"""What a run would be, told before any weights are loaded: from configurations, data and captions alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, T5GemmaModuleConfig

from ..config.training_config import TrainingConfig, cache_folder, sources_of
from ..data.captions import CaptionStatistics, caption_statistics
from ..data.mixing import ENDLESS
from ..data.precomputed import require_complete
from ..hub.publishing import UNPUBLISHED_BASE, hub_id, require_token
from ..latents import latent_channels, vae_scale_factor
from ..models.transformer_prx import PRXTransformer2DModel
from ..pipelines.pipeline_prx import PRXPipeline
from ..prompt_cleaning import CLEANERS
from ..techniques.lora import add_adapter
from ..techniques.optimizers import muon_weights, trainable_parameters
from ..techniques.teachers import build_teacher
from .network_configs import meta_autoencoder, meta_teacher, text_config
from .networks import check_dino_size, check_fit, check_positions, new_transformer, pipeline_class_of
from .stages import Stage

BYTES = {"float32": 4, "bf16": 2}
INDENT = 14


@dataclass(frozen=True)
class MetaNetworks:
    """The networks of a run without their weights.

    Args:
        transformer, vae: on the device that was asked for; no autoencoder in pixel space.
        pixels_per_token: see `Nets.pixels_per_token`.
    """

    transformer: Any
    vae: Any
    pixels_per_token: int


def meta_networks(cfg: TrainingConfig, device: str = "meta", tables: bool = False) -> MetaNetworks:
    """Read the configurations of the networks, and no weights.

    Args:
        cfg: of the run.
        device: where the weights would be; they are drawn there, so take one that keeps none.
        tables: take from `network_configs` what is there, instead of asking the Hub.

    Raises:
        ValueError: for an autoencoder of a class that `latents.py` does not know, an unknown key of
            `transformer_config`, an unknown layer in `lora_layers`, or settings that do not fit the networks.
    """
    vae, saved = None, cfg.pretrained_model_name_or_path
    where: dict[str, Any] = {"subfolder": "transformer", "revision": cfg.revision}
    stored = {} if saved is None else dict(PRXTransformer2DModel.load_config(saved, **where))
    with torch.device(device):
        if cfg.vae_name_or_path is not None:
            vae = meta_autoencoder(cfg.vae_name_or_path, tables=tables)
        elif saved is not None and pipeline_class_of(cfg) is PRXPipeline:
            vae = meta_autoencoder(saved, cfg.revision)
        transformer: Any
        if cfg.transformer_config:
            # a saved pipeline's text encoder is as wide as its transformer says
            width = stored["context_in_dim"] if _keeps_text_encoder(cfg) else _text_width(cfg, tables)
            transformer = new_transformer(cfg.transformer_config, latent_channels(vae), width)
        else:
            transformer = PRXTransformer2DModel.from_config(stored)
        if cfg.lora_rank is not None:
            add_adapter(cfg, transformer)
    check_fit(transformer.config, vae, cfg.stage_configs())
    return MetaNetworks(transformer, vae, transformer.config["patch_size"] * vae_scale_factor(vae))


def check_techniques(cfg: TrainingConfig, aligns: bool) -> None:
    """Look for what the auxiliary losses and a cache need, without loading it.

    Args:
        cfg: of the run.
        aligns: whether the teacher of the alignment is needed, where there is one.

    Raises:
        ValueError: if something is not there, or does not fit.
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
            raise ValueError(f"`lpips_backbone` is {stage.lpips_backbone!r}, which is no file.")
        if stage.precomputed_dir is not None:
            require_complete(cache_folder(stage))
    if cfg.push_to_hub:
        require_token()


def _keeps_text_encoder(cfg: TrainingConfig) -> bool:
    return not cfg.text_encoder_config and cfg.text_encoder_name_or_path is None


def _text_width(cfg: TrainingConfig, tables: bool) -> int:
    """Width of the text encoder's hidden states; T5Gemma keeps it in the configuration of its encoder half."""
    if cfg.text_encoder_config:
        return T5GemmaModuleConfig(**cfg.text_encoder_config).hidden_size
    config = text_config(str(cfg.text_encoder_name_or_path), tables=tables)
    config = getattr(config, "text_config", config)
    check_positions(cfg, config)
    return getattr(config, "encoder", config).hidden_size


def memory(cfg: TrainingConfig, trained: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that a process keeps for what it trains, without activations and other networks.

    Args:
        cfg: of the run.
        trained: modules with parameters, on any device, by their names in the run (see `Nets.trainable`).
    """
    kept: Counter[str] = Counter()
    with_momentum = muon_weights(trained, cfg.muon_fused) if cfg.optimizer == "muon" else {}
    for name, module in trained.items():
        size = BYTES[cfg.weights_dtype if name == "transformer" else "float32"]
        trainable = list(trainable_parameters(module).values())
        frozen = size * sum(weight.numel() for weight in module.parameters() if not weight.requires_grad)
        if cfg.lora_rank is not None:
            size = BYTES["float32"]
        values = size * sum(weight.numel() for weight in trainable)
        # Muon keeps a momentum and no second moment
        second = size * sum(weight.numel() for weight in trainable if weight not in with_momentum)
        kept.update(weights=frozen + values, gradients=values, optimizer=values + second)
        if cfg.use_ema and name != "projector":
            kept["average"] += values
    return dict(kept)


def caption_figures(cfg: TrainingConfig, stage: Stage) -> CaptionStatistics | None:
    """Statistics of a stage's captions; None where they are not asked for, where they are those of scenes or one and
    the same, and where the tokenizer does not exist yet."""
    given = all(source.name == "scenes" or source.instance_prompt is not None for source in sources_of(stage.cfg))
    if not cfg.caption_statistics_samples or given or cfg.text_encoder_config:
        return None
    if cfg.text_encoder_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(cfg.text_encoder_name_or_path)
    else:
        where: dict[str, Any] = {"subfolder": "tokenizer"} | ({"revision": cfg.revision} if cfg.revision else {})
        tokenizer = AutoTokenizer.from_pretrained(str(cfg.pretrained_model_name_or_path), **where)
    captions = stage.captions(cfg.caption_statistics_samples)
    first = next(captions, None)
    if first is None:
        return None  # training will say which samples cannot be read
    return caption_statistics(
        chain([first], captions), tokenizer, cfg.max_sequence_length, CLEANERS[cfg.caption_cleaning]
    )


def report(
    cfg: TrainingConfig,
    stages: Sequence[Stage],
    transformer: Any,
    captions: Sequence[CaptionStatistics | None],
    processes: int,
) -> str:
    """What the run would be, in lines of a name and its value.

    Args:
        cfg: of the run.
        stages: sorted into buckets.
        transformer: a module with parameters, on any device.
        captions: from `caption_figures`, one per stage.
        processes: of the run.
    """
    count = sum(weight.numel() for weight in transformer.parameters())
    trainable = sum(weight.numel() for weight in trainable_parameters(transformer).values())
    parts = memory(cfg, {"transformer": transformer})
    shown = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items())
    rows = [
        (
            "transformer",
            f"{count:,} parameters" + (f", of which {trainable:,} are trained" if trainable < count else ""),
        ),
        ("types", f"weights {cfg.weights_dtype}, computation {_computation(cfg)}"),
        ("memory", f"{sum(parts.values()) / 1e9:.3g} GB ({shown}), besides activations and other networks"),
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
    cfg, step_size, sources = stage.cfg, stage.step_size(processes), sources_of(stage.cfg)
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
                f"{held_out} samples, since {cfg.num_validation_samples} (`num_validation_samples`) would be more "
                "than half of the data: pass a smaller --num_validation_samples, or 0 for no validation loss",
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
        rows.append(("  epoch", f"{samples / step_size:.1f} steps; the stage has {epochs:.3g} epochs"))
    if figures is not None:
        rows.append(("  captions", figures.summary()))
        if all(source.name != "scenes" for source in sources):
            rows += [("  warning", warning) for warning in figures.warnings()]
    return rows
