"""Validation: loss per noise level with fixed noise, and images of fixed prompts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import PIL.Image
import torch

from ..config.training_config import TrainingConfig
from .distributed import split_evenly
from .networks import Nets
from .rng import StepRandom
from .step import train_step

# Centers of ten equal bins of [0, 1].
TIMESTEP_BINS = tuple((k + 0.5) / 10 for k in range(10))


@torch.no_grad()
def losses_by_sample(nets: Nets, cfg: TrainingConfig, batches: Iterable[dict[str, Any]]) -> dict[int, list[float]]:
    """Compute the flow-matching loss of held-out images at ten noise levels, always with the same noise.

    Args:
        nets: networks of the run.
        cfg: configuration of the stage.
        batches: held-out batches on the device of the networks.

    Returns:
        Losses at `TIMESTEP_BINS` by index of the held-out sample.
    """
    cfg = replace(cfg, caption_dropout=0.0, route_ratio=0.0, contrastive_weight=0.0)
    nets = replace(nets, projector=None, lpips=None, dino=None)
    found: dict[int, list[float]] = {}
    for batch in batches:
        rng = StepRandom(
            cfg.seed, -1, batch["sample_index"], batch["pixels_uint8"].device
        )  # training steps start at 0
        timesteps = [torch.full((len(batch["captions"]),), t, device=rng.device) for t in TIMESTEP_BINS]
        levels = [train_step(batch, nets, cfg, rng, timestep).loss_per_sample for timestep in timesteps]
        found |= zip(batch["sample_index"], torch.stack(levels, dim=1).tolist())  # (B, 10)
    return found


def validation_loss(losses: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """Average the losses of `losses_by_sample` from all processes; the exact sum does not depend on their order.

    Returns:
        {"validation/loss_t0.05": ..., ..., "validation/loss": mean over all noise levels}.
    """
    means = [math.fsum(level) / len(losses) for level in zip(*losses.values())]
    by_level = {f"validation/loss_t{t:.2f}": mean for t, mean in zip(TIMESTEP_BINS, means)}
    return {**by_level, "validation/loss": math.fsum(means) / len(means)}


def validation_images(nets: Nets, cfg: TrainingConfig, rank: int, processes: int) -> dict[int, PIL.Image.Image]:
    """Draw the validation prompts of this process.

    All processes call the networks equally often, which FSDP requires.

    Returns:
        Images by index of the prompt, which also determines the noise.
    """
    pipeline = nets.pipeline(cfg)
    pipeline.set_progress_bar_config(disable=True)
    indices, prompts = zip(*split_evenly(cfg.validation_prompts, rank, processes))
    device = nets.transformer.device
    output: Any = pipeline(
        list(prompts),
        height=cfg.resolution,
        width=cfg.resolution,
        use_resolution_binning=False,
        guidance_scale=cfg.validation_guidance_scale,
        num_inference_steps=cfg.validation_inference_steps,
        generator=[torch.Generator(device).manual_seed(cfg.seed + index) for index in indices],
    )
    return dict(zip(indices, output.images))
