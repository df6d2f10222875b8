"""The reward step: draw images of each caption, score them, and move towards the better ones (DiffusionNFT).

DiffusionNFT (arXiv 2509.16117) learns in the forward process: it needs neither the probabilities of a stochastic
sampler nor one evaluation per step of a drawing, as Flow-GRPO (arXiv 2505.05470) does. The images are drawn with the
present weights in every step. There, the loss of the paper has the gradient of `reward_losses`, times its beta.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..config.training_config import TrainingConfig
from ..evaluation.scene_checker import read_scene
from ..evaluation.scorers import SCENES_SCORER, RankedPrompt, total_scores
from ..latents import decode, latent_channels, vae_scale_factor
from .distill_step import few_step_levels, mix, step_to
from .networks import Nets
from .rng import StepRandom
from .step import StepOutput, draw_timesteps, encode_captions


@dataclass(frozen=True)
class RewardInputs:
    """Drawn images of a micro-batch, K of each caption, with all random draws: the input of `reward_losses`.

    Args:
        clean: drawn latents, or pixels in [-1, 1], (B * K, C, h, w), the K of the first caption first.
        noise: noise times the run's noise scale, (B * K, C, h, w).
        timestep: noise levels in [0, 1], (B * K,).
        advantage: how much better an image is than the others of its caption, in [-1, 1], (B * K,).
        text: encoded captions (B * K, L, E).
        text_mask: bool mask (B * K, L), or None without padding.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    timestep: torch.Tensor
    advantage: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor | None


def reward_step(batch: dict[str, Any], nets: Nets, cfg: TrainingConfig, rng: StepRandom) -> StepOutput:
    """Compute the loss of one micro-batch of captions; the arguments are those of `train_step`.

    Of the images of the batch, only their size is used, and what the scorer of the built-in scenes reads in them.

    Example:
        >>> rng = StepRandom(cfg.seed, step, batch["sample_index"], device)
        >>> reward_step(batch, nets, cfg, rng).loss.backward()
    """
    count, device = cfg.reward_images_per_prompt, batch["pixels_uint8"].device
    text, text_mask, truncated = encode_captions(batch["captions"], nets, cfg, device)  # (B, L, E)
    text = text.repeat_interleave(count, dim=0)  # (B * K, L, E)
    text_mask = None if text_mask is None else text_mask.repeat_interleave(count, dim=0)  # (B * K, L)
    negative_text = None
    if cfg.reward_guidance_scale > 1:
        negative_text = encode_captions([""], nets, cfg, device)[0].expand(len(text), -1, -1)  # (B * K, T, E)

    # random numbers of each image, whatever the captions beside it
    indices = [index * count + image for index in rng.sample_index for image in range(count)]
    draws = StepRandom(rng.seed, rng.step, indices, rng.device)
    factor = vae_scale_factor(nets.vae)
    shape = (latent_channels(nets.vae), *(side // factor for side in batch["pixels_uint8"].shape[-2:]))
    start = cfg.noise_scale * draws.normal("reward_start", shape)  # (B * K, C, h, w)
    noise = cfg.noise_scale * draws.normal("noise", shape)  # (B * K, C, h, w)
    timestep = draw_timesteps(nets, draws)  # (B * K,)

    with rng.seeded("lora_dropout") if cfg.lora_dropout > 0 else nullcontext():
        clean = draw_images(start, text, text_mask, negative_text, nets, cfg)  # (B * K, C, h, w)
        rewards = score_images(clean, batch, nets, cfg)  # (B, K)
        advantage = advantages(rewards).flatten()  # (B * K,)
        inputs = RewardInputs(clean, noise, timestep, advantage, text, text_mask)
        losses, loss_per_image = reward_losses(inputs, nets, cfg)
    loss = losses["nft"] + cfg.reward_kl_weight * losses["kl"] if cfg.reward_kl_weight else losses["nft"]
    loss_per_sample = loss_per_image.detach().unflatten(0, (-1, count)).mean(dim=1)  # (B,)
    return StepOutput(loss, losses | {"reward": rewards.mean()}, loss_per_sample, truncated)


def reward_losses(
    inputs: RewardInputs, nets: Nets, cfg: TrainingConfig
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Evaluate the losses of a micro-batch of drawn images. The function is deterministic.

    Returns:
        {"nft": mean of advantage times the squared error of the velocity} and, with `reward_kl_weight`, {"kl": mean
        squared difference from the reference's velocity}, scalars; and the first of each image (B * K,).
    """
    noisy = mix(inputs.clean, inputs.noise, inputs.timestep)  # (B * K, C, h, w)
    is_clean = nets.scheduler.prediction_type == "x_prediction"
    perfect = inputs.clean if is_clean else inputs.noise - inputs.clean  # (B * K, C, h, w)

    def velocity(transformer: Any) -> torch.Tensor:
        """Return the velocity (B * K, C, h, w) that a transformer predicts."""
        prediction = transformer(noisy, inputs.timestep, inputs.text, inputs.text_mask, return_dict=False)[0]
        return nets.scheduler.velocity(prediction, noisy, inputs.timestep)

    predicted = velocity(nets.transformer)  # (B * K, C, h, w)
    target = nets.scheduler.velocity(perfect, noisy, inputs.timestep)  # (B * K, C, h, w)
    errors = F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))  # (B * K,)
    loss_per_image = inputs.advantage * errors  # (B * K,)
    losses = {"nft": loss_per_image.mean()}
    if cfg.reward_kl_weight:
        with torch.no_grad(), nets.reference_model() as reference:
            reference_velocity = velocity(reference)  # (B * K, C, h, w)
        losses["kl"] = F.mse_loss(predicted, reference_velocity)
    return losses, loss_per_image


@torch.no_grad()
def draw_images(
    start: torch.Tensor,
    text: torch.Tensor,
    text_mask: torch.Tensor | None,
    negative_text: torch.Tensor | None,
    nets: Nets,
    cfg: TrainingConfig,
) -> torch.Tensor:
    """Draw from noise with the present weights in `reward_steps` Euler steps, (B, C, h, w).

    Args:
        start: noise (B, C, h, w).
        text: encoded captions (B, L, E).
        text_mask: bool mask (B, L), or None without padding.
        negative_text: encoded empty caption (B, T, E) for guidance, or None.
        nets: networks, prepared for training.
        cfg: configuration of the stage.
    """
    noisy, levels = start, few_step_levels(nets.scheduler, cfg.reward_steps).to(start)  # (n + 1,)
    for index in range(cfg.reward_steps):
        level, next_level = (value.expand(len(start)) for value in levels[index : index + 2])  # (B,)
        prediction = nets.transformer(noisy, level, text, text_mask, return_dict=False)[0]  # (B, C, h, w)
        if negative_text is not None:
            negative = nets.transformer(noisy, level, negative_text, return_dict=False)[0]  # (B, C, h, w)
            prediction = negative + cfg.reward_guidance_scale * (prediction - negative)  # (B, C, h, w)
        noisy = step_to(prediction, noisy, level, next_level, nets)  # (B, C, h, w)
    return noisy


@torch.no_grad()
def score_images(clean: torch.Tensor, batch: dict[str, Any], nets: Nets, cfg: TrainingConfig) -> torch.Tensor:
    """Return the weighted sum of the scores of drawn latents (B * K, C, h, w), float32 (B, K)."""
    pixels = decode(nets.vae, clean).add(1).mul(127.5).round().clamp(0, 255)  # (B * K, 3, H, W)
    images = list(pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    prompts = [prompt for prompt in describe_prompts(batch, cfg) for _ in range(cfg.reward_images_per_prompt)]
    scores: Sequence[float] | np.ndarray = total_scores(nets.scorers, cfg.reward_scorers, images, prompts)
    return torch.as_tensor(scores, dtype=torch.float32, device=clean.device).unflatten(0, (len(batch["captions"]), -1))


def describe_prompts(batch: dict[str, Any], cfg: TrainingConfig) -> list[RankedPrompt]:
    """Return the captions of a batch for the scorers; those of built-in scenes with the scene in the batch's image."""
    if SCENES_SCORER not in cfg.reward_scorers:
        return [RankedPrompt(caption) for caption in batch["captions"]]
    images = batch["pixels_uint8"].permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [
        RankedPrompt(caption, read_scene(image, cfg.scenes_level)) for caption, image in zip(batch["captions"], images)
    ]


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Normalize the rewards (B, K) of each caption by their own mean and standard deviation, to [-1, 1].

    Images whose rewards are all equal have the advantage 0.
    """
    centered = rewards - rewards.mean(dim=1, keepdim=True)  # (B, K)
    spread = rewards.std(dim=1, keepdim=True, correction=0)  # (B, 1)
    return torch.where(spread > 0, centered / spread.clamp_min(1e-12), 0).clamp(-1, 1)
