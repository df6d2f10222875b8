"""The preference step: of two images of one caption, learn to prefer the first (Flow-DPO, arXiv 2501.13918)."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..config.training_config import TrainingConfig
from .networks import Nets
from .rng import StepRandom
from .step import StepOutput, draw_timesteps, encode_captions, encode_images


@dataclass(frozen=True)
class PreferenceInputs:
    """Encoded micro-batch of pairs with all random draws, the input of `preference_losses`.

    Args:
        clean: latents, or pixels in [-1, 1], (2B, C, h, w): the preferred images, then the rejected ones.
        noise: noise times the run's noise scale, (2B, C, h, w), the same for both images of a pair.
        timestep: noise levels in [0, 1], (2B,), the same for both.
        text: encoded captions (2B, L, E).
        text_mask: bool mask (2B, L), or None without padding.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor | None


def preference_step(batch: dict[str, Any], nets: Nets, cfg: TrainingConfig, rng: StepRandom) -> StepOutput:
    """Compute the loss of one micro-batch of pairs; the arguments are those of `train_step`.

    The batch has the rejected images as "rejected_uint8".

    Example:
        >>> rng = StepRandom(cfg.seed, step, batch["sample_index"], device)
        >>> preference_step(batch, nets, cfg, rng).loss.backward()
    """
    pixels_uint8 = torch.cat((batch["pixels_uint8"], batch["rejected_uint8"]))  # (2B, 3, H, W)
    latents = encode_images(pixels_uint8.float() / 127.5 - 1, nets)
    latent_noise = None if latents.std is None else twice(rng.normal("latents", latents.std.shape[1:]))
    clean = latents.draw(latent_noise)  # (2B, C, h, w)
    text, text_mask, truncated = encode_captions(batch["captions"], nets, cfg, clean.device)  # (B, L, E)
    noise = cfg.noise_scale * rng.normal("noise", clean.shape[1:])  # (B, C, h, w)
    timestep = draw_timesteps(nets, rng)  # (B,)

    mask = None if text_mask is None else twice(text_mask)
    inputs = PreferenceInputs(clean, twice(noise), twice(timestep), twice(text), mask)
    with rng.seeded("lora_dropout") if cfg.lora_dropout > 0 else nullcontext():
        losses, loss_per_sample = preference_losses(inputs, nets, cfg)
    return StepOutput(losses["dpo"], losses, loss_per_sample.detach(), truncated)


def preference_losses(
    inputs: PreferenceInputs, nets: Nets, cfg: TrainingConfig
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Evaluate the loss of a micro-batch of pairs. The function is deterministic.

    Returns:
        {"dpo": the loss, "preferred": share of pairs whose preferred image the model has come to fit better than the
        reference does, compared with the rejected one}, scalars; only the first is trained. And the loss of each pair
        (B,).
    """
    t = inputs.timestep[:, None, None, None]
    noisy = (1 - t) * inputs.clean + t * inputs.noise  # (2B, C, h, w)
    velocity = nets.scheduler.velocity(perfect_prediction(inputs, nets), noisy, inputs.timestep)  # (2B, C, h, w)

    def errors(transformer: Any) -> torch.Tensor:
        """Return the squared error of each image, (2B,)."""
        prediction = transformer(noisy, inputs.timestep, inputs.text, inputs.text_mask, return_dict=False)[0]
        predicted = nets.scheduler.velocity(prediction, noisy, inputs.timestep)  # (2B, C, h, w)
        return F.mse_loss(predicted, velocity, reduction="none").mean(dim=(1, 2, 3))

    own_errors = errors(nets.transformer)  # (2B,)
    with torch.no_grad(), nets.reference_model() as reference:
        reference_errors = errors(reference)  # (2B,)
    # below zero where the model fits an image better than the reference does
    preferred, rejected = (own_errors - reference_errors).chunk(2)  # (B,)
    loss_per_sample = -F.logsigmoid(-0.5 * cfg.dpo_beta * (preferred - rejected))  # (B,)
    share = (preferred < rejected).float().mean().detach()
    return {"dpo": loss_per_sample.mean(), "preferred": share}, loss_per_sample


def perfect_prediction(inputs: PreferenceInputs, nets: Nets) -> torch.Tensor:
    """Return what a perfect network predicts, (2B, C, h, w)."""
    return inputs.clean if nets.scheduler.prediction_type == "x_prediction" else inputs.noise - inputs.clean


def twice(values: torch.Tensor) -> torch.Tensor:
    """Repeat the rows of a tensor (B, ...) for the rejected images, (2B, ...)."""
    return torch.cat((values, values))
