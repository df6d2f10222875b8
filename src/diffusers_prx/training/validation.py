"""What a run is watched by: the loss per noise level on fixed noise, and pictures of fixed prompts."""

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

# the middles of ten equal bins of [0, 1]
TIMESTEP_BINS = tuple((k + 0.5) / 10 for k in range(10))


@torch.no_grad()
def losses_by_sample(nets: Nets, cfg: TrainingConfig, batches: Iterable[dict[str, Any]]) -> dict[int, list[float]]:
    """The flow-matching loss at ten noise levels on the same images and the same noise every time.

    Args:
        batches: held-out batches, on the device of the networks.

    Returns:
        The place of each sample among the held-out ones -> its losses at `TIMESTEP_BINS`.
    """
    cfg = replace(cfg, caption_dropout=0.0, route_ratio=0.0, contrastive_weight=0.0)
    nets = replace(nets, projector=None, lpips=None, dino=None)
    found: dict[int, list[float]] = {}
    for batch in batches:
        rng = StepRandom(cfg.seed, -1, batch["sample_index"], batch["pixels_uint8"].device)  # no training step is -1
        timesteps = [torch.full((len(batch["captions"]),), t, device=rng.device) for t in TIMESTEP_BINS]
        levels = [train_step(batch, nets, cfg, rng, timestep).loss_per_sample for timestep in timesteps]
        found |= zip(batch["sample_index"], torch.stack(levels, dim=1).tolist())  # (B, 10)
    return found


def validation_loss(losses: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """The mean of what `losses_by_sample` has given, on all processes: exactly summed, so in any order.

    Returns:
        {"validation/loss_t0.05": ..., ..., "validation/loss": the mean over the levels}.
    """
    means = [math.fsum(level) / len(losses) for level in zip(*losses.values())]
    by_level = {f"validation/loss_t{t:.2f}": mean for t, mean in zip(TIMESTEP_BINS, means)}
    return {**by_level, "validation/loss": math.fsum(means) / len(means)}


def validation_images(nets: Nets, cfg: TrainingConfig, rank: int, processes: int) -> dict[int, PIL.Image.Image]:
    """This process's share of one picture per validation prompt, by the prompt's place, from which its noise follows.

    All processes call the networks equally often.
    """
    pipeline = nets.pipeline(cfg)
    pipeline.set_progress_bar_config(disable=True)
    places, prompts = zip(*split_evenly(cfg.validation_prompts, rank, processes))
    device = nets.transformer.device
    output: Any = pipeline(
        list(prompts),
        height=cfg.resolution,
        width=cfg.resolution,
        use_resolution_binning=False,
        guidance_scale=cfg.validation_guidance_scale,
        num_inference_steps=cfg.validation_inference_steps,
        generator=[torch.Generator(device).manual_seed(cfg.seed + place) for place in places],
    )
    return dict(zip(places, output.images))
