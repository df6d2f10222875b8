"""The distillation step: a student learns to draw in one or a few evaluations what its guided teacher draws in many.

The teacher is the frozen model that the run starts from (`Nets.reference`). Three objectives:

- `guidance_distillation` (arXiv 2210.03142): at any noise level, predict what the teacher predicts with guidance.
- `mean_velocity`: at each of the student's few noise levels, predict the mean velocity (arXiv 2505.13447) of the
  guided teacher on its way to the next of these levels. The student's own steps lead to the level (backward
  simulation, DMD2, arXiv 2405.14867), so that it learns where it will be when it draws.
- `ladd` (arXiv 2403.12015): predict images whose features in the teacher's blocks, at a random noise level, cannot be
  told from those of the data.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..config.training_config import TrainingConfig
from ..data.precomputed import cached_latents, cached_text
from ..techniques.discriminator import adversarial_losses
from .networks import Nets
from .rng import StepRandom
from .step import StepOutput, draw_latents, draw_timesteps, encode_captions, encode_images


@dataclass(frozen=True)
class DistillationInputs:
    """Encoded micro-batch with all random draws, the input of `distillation_losses`.

    Args:
        clean: latents, or pixels in [-1, 1], (B, C, h, w).
        noise: noise times the run's noise scale, (B, C, h, w).
        timestep: noise levels in [0, 1] of `guidance_distillation`, (B,).
        level: index, from 0, of one of the student's few noise levels, (B,).
        text: encoded captions (B, L, E).
        text_mask: bool mask (B, L), or None without padding.
        negative_text: encoded empty caption (B, T, E).
        judged_timestep: noise levels at which the discriminator compares, (B,).
        judged_noise: noise of these levels, (B, C, h, w).
        guidance: guidance scales of the teacher that the student takes as an input, (B,), or None.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    timestep: torch.Tensor
    level: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor | None
    negative_text: torch.Tensor
    judged_timestep: torch.Tensor
    judged_noise: torch.Tensor
    guidance: torch.Tensor | None = None


def distill_step(batch: dict[str, Any], nets: Nets, cfg: TrainingConfig, rng: StepRandom) -> StepOutput:
    """Compute the loss of one micro-batch of distillation; the arguments are those of `train_step`.

    Example:
        >>> rng = StepRandom(cfg.seed, step, batch["sample_index"], device)
        >>> distill_step(batch, nets, cfg, rng).loss.backward()
    """
    # encode the images and captions, or use precomputed ones; the empty caption is the teacher's negative prompt
    if "latent_mean" in batch:
        latents = cached_latents(batch)
    else:
        latents = encode_images(batch["pixels_uint8"].float() / 127.5 - 1, nets)
    clean = draw_latents(latents, rng)  # (B, C, h, w)
    size = len(clean)
    if "text" in batch:
        text, text_mask, truncated = cached_text(batch, [False] * size)  # (B, L, E)
        negative_text, _, _ = cached_text(batch, [True] * size)  # (B, T, E)
    else:
        text, text_mask, truncated = encode_captions(batch["captions"], nets, cfg, clean.device)  # (B, L, E)
        negative_text = encode_captions([""], nets, cfg, clean.device)[0].expand(size, -1, -1)  # (B, T, E)

    # draw the noise, the student's noise levels, and those at which the discriminator compares
    noise = cfg.noise_scale * rng.normal("noise", clean.shape[1:])  # (B, C, h, w)
    timestep = draw_timesteps(nets, rng)  # (B,)
    level = (rng.uniform("level") * cfg.distill_steps).long()  # (B,)
    judged = torch.sigmoid(cfg.ladd_noise_mean + cfg.ladd_noise_std * rng.normal("judged_timestep"))  # (B,)
    judged_noise = cfg.noise_scale * rng.normal("judged_noise", clean.shape[1:])  # (B, C, h, w)

    guidance = None
    if cfg.distill_guidance_max is not None:
        guidance = 1 + (cfg.distill_guidance_max - 1) * rng.uniform("guidance")  # (B,)

    inputs = DistillationInputs(
        clean, noise, timestep, level, text, text_mask, negative_text, judged, judged_noise, guidance
    )
    with rng.seeded("lora_dropout") if cfg.lora_dropout > 0 else nullcontext():
        losses, loss_per_sample = distillation_losses(inputs, nets, cfg)
    return StepOutput(torch.stack(list(losses.values())).sum(), losses, loss_per_sample.detach(), truncated)


def distillation_losses(
    inputs: DistillationInputs, nets: Nets, cfg: TrainingConfig
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Evaluate the losses of a micro-batch of distillation. The function is deterministic.

    Returns:
        Scalar losses by name, whose sum is trained, and the loss of each sample (B,).
    """
    levels = few_step_levels(nets.scheduler, cfg.distill_steps).to(inputs.clean)  # (n + 1,)
    if cfg.objective == "ladd":
        timestep = levels[inputs.level]  # (B,)
        noisy = mix(inputs.clean, inputs.noise, timestep)  # (B, C, h, w)
        return ladd_losses(inputs, noisy, timestep, nets)
    if cfg.objective == "mean_velocity":
        timestep = levels[inputs.level]  # (B,)
        noisy = simulate(inputs, levels, nets)  # (B, C, h, w)
        end = draw_with_teacher(noisy, inputs, nets, cfg)  # (B, C, h, w)
        span = timestep - levels[inputs.level + 1]  # (B,)
        target = (noisy - end) / span[:, None, None, None]  # (B, C, h, w), the mean velocity
    else:
        timestep = inputs.timestep  # (B,)
        noisy = mix(inputs.clean, inputs.noise, timestep)  # (B, C, h, w)
        scale: Any = cfg.distill_guidance_scale
        if inputs.guidance is not None:
            scale = inputs.guidance[:, None, None, None]  # (B, 1, 1, 1)
        guided = guided_prediction(noisy, timestep, inputs, nets, scale)  # (B, C, h, w)
        target = nets.scheduler.velocity(guided, noisy, timestep)  # (B, C, h, w)
    prediction = student(noisy, timestep, inputs, nets)  # (B, C, h, w)
    velocity = nets.scheduler.velocity(prediction, noisy, timestep)  # (B, C, h, w)
    loss_per_sample = F.mse_loss(velocity, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
    return {cfg.objective: loss_per_sample.mean()}, loss_per_sample


def ladd_losses(
    inputs: DistillationInputs, noisy: torch.Tensor, timestep: torch.Tensor, nets: Nets
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Evaluate the losses of student and discriminator; see `adversarial_losses`."""
    drawn = nets.scheduler.clean(student(noisy, timestep, inputs, nets), noisy, timestep)  # (B, C, h, w)
    blocks, judged = nets.discriminator.blocks, inputs.judged_timestep
    with nets.reference_model() as teacher:

        def features(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            """Return the teacher's features (B, N, D) of each block for images at the judged noise level."""
            judged_images = mix(images, inputs.judged_noise, judged)  # (B, C, h, w)
            text = (inputs.text, inputs.text_mask)
            return teacher(judged_images, judged, *text, return_dict=False, feature_block=blocks)[1]

        fake = features(drawn)
        with torch.no_grad():
            real = features(inputs.clean)
    generator, discriminator = adversarial_losses(
        nets.discriminator, fake, real, (judged, inputs.text, inputs.text_mask)
    )
    per_sample = (drawn - inputs.clean).detach().square().mean(dim=(1, 2, 3))  # (B,), only to name broken samples
    return {"generator": generator, "discriminator": discriminator}, per_sample


def few_step_levels(scheduler: Any, steps: int) -> torch.Tensor:
    """Return the noise levels of a schedule of `steps` steps, from 1 down to 0, (steps + 1,)."""
    scheduler = copy.copy(scheduler)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def mix(clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return x_t = (1 - t) clean + t noise, (B, C, h, w), for noise levels t (B,)."""
    t = timestep[:, None, None, None]
    return (1 - t) * clean + t * noise


def student(noisy: torch.Tensor, timestep: torch.Tensor, inputs: DistillationInputs, nets: Nets) -> torch.Tensor:
    """Return the student's prediction (B, C, h, w)."""
    guidance = {} if inputs.guidance is None else {"guidance": inputs.guidance}
    return nets.transformer(noisy, timestep, inputs.text, inputs.text_mask, return_dict=False, **guidance)[0]


def step_to(
    prediction: torch.Tensor, noisy: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, nets: Nets
) -> torch.Tensor:
    """Take the scheduler's step between two noise levels (B,), x_stop = x_0 + (stop / start) (x_start - x_0)."""
    clean = nets.scheduler.clean(prediction, noisy, start)  # (B, C, h, w)
    return clean + (stop / start)[:, None, None, None] * (noisy - clean)


@torch.no_grad()
def guided_prediction(
    noisy: torch.Tensor,
    timestep: torch.Tensor,
    inputs: DistillationInputs,
    nets: Nets,
    guidance_scale: float | torch.Tensor,
) -> torch.Tensor:
    """Return the prediction of the teacher with guidance of one scale, or (B, 1, 1, 1) scales, (B, C, h, w)."""
    with nets.reference_model() as teacher:
        positive = teacher(noisy, timestep, inputs.text, inputs.text_mask, return_dict=False)[0]  # (B, C, h, w)
        if isinstance(guidance_scale, float) and guidance_scale == 1:
            return positive
        negative = teacher(noisy, timestep, inputs.negative_text, return_dict=False)[0]  # (B, C, h, w)
    return negative + guidance_scale * (positive - negative)


@torch.no_grad()
def simulate(inputs: DistillationInputs, levels: torch.Tensor, nets: Nets) -> torch.Tensor:
    """Draw from noise to each sample's level in the student's own steps, (B, C, h, w)."""
    noisy = inputs.noise
    for index in range(len(levels) - 2):
        start, stop = (level.expand(len(noisy)) for level in levels[index : index + 2])  # (B,)
        stepped = step_to(student(noisy, start, inputs, nets), noisy, start, stop, nets)  # (B, C, h, w)
        noisy = torch.where((inputs.level > index)[:, None, None, None], stepped, noisy)  # (B, C, h, w)
    return noisy


@torch.no_grad()
def draw_with_teacher(
    noisy: torch.Tensor, inputs: DistillationInputs, nets: Nets, cfg: TrainingConfig
) -> torch.Tensor:
    """Draw with the guided teacher from each sample's level to the student's next one, (B, C, h, w).

    The teacher takes the steps of its own schedule of `distill_teacher_steps`, which passes the student's levels.
    """
    levels = few_step_levels(nets.scheduler, cfg.distill_teacher_steps).to(noisy)  # (teacher's steps + 1,)
    substeps = cfg.distill_teacher_steps // cfg.distill_steps
    for substep in range(substeps):
        index = inputs.level * substeps + substep  # (B,)
        start, stop = levels[index], levels[index + 1]  # (B,)
        prediction = guided_prediction(noisy, start, inputs, nets, cfg.distill_guidance_scale)  # (B, C, h, w)
        noisy = step_to(prediction, noisy, start, stop, nets)  # (B, C, h, w)
    return noisy
