"""One training step: inputs, random draws, forward pass and losses."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..config.training_config import TrainingConfig
from ..data.precomputed import cached_latents, cached_text
from ..latents import EncodedImages, decode, encode
from ..models.token_routing import TokenRoute, sample_route
from ..techniques.alignment import alignment_loss, spatial_normalize, teacher_features
from ..techniques.losses import contrastive_loss, dino_perceptual_loss, masked_mean
from ..text import encode_text, find_truncated, tokenize_prompts, trim_tokens
from .networks import Nets
from .rng import StepRandom


class StepOutput(NamedTuple):
    """Result of a training step; a tuple, so that DDP and FSDP2 find the tensors with gradients.

    Args:
        loss: weighted sum of `losses`, a scalar.
        losses: unweighted scalar losses by name.
        loss_per_sample: flow-matching loss of each sample (B,).
        truncated: number of truncated captions.
    """

    loss: torch.Tensor
    losses: dict[str, torch.Tensor]
    loss_per_sample: torch.Tensor
    truncated: int


@dataclass(frozen=True)
class StepInputs:
    """Encoded micro-batch with all random draws, the input of `compute_losses`.

    Args:
        clean: latents, or pixels in [-1, 1], (B, C, h, w).
        noise: noise times the run's noise scale, (B, C, h, w).
        timestep: noise levels in [0, 1], (B,).
        text: encoded captions (B, L, E).
        text_mask: bool mask (B, L), or None without padding.
        captions: B captions; dropped ones are empty.
        route: tokens that skip blocks, or None.
        pixels_pm1: images in [-1, 1] (B, 3, H, W) for the perceptual losses, or None.
        teacher_features: features (B, N, E) for the alignment, or None.
        dino_crop: random crop positions in [0, 1) (B, 2) for the DINO loss, or None.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor | None
    captions: list[str]
    route: TokenRoute | None = None
    pixels_pm1: torch.Tensor | None = None
    teacher_features: torch.Tensor | None = None
    dino_crop: torch.Tensor | None = None


def train_step(
    batch: dict[str, Any], nets: Nets, cfg: TrainingConfig, rng: StepRandom, timestep: torch.Tensor | None = None
) -> StepOutput:
    """Compute the loss of one micro-batch: encode it, draw all random numbers, and evaluate the losses.

    Args:
        batch: "pixels_uint8" (B, 3, H, W) on the device of the networks and "captions", B strings; or a precomputed
            batch of `data.precomputed.collate_precomputed`.
        nets: networks, prepared for training.
        cfg: configuration of the stage.
        rng: random numbers of this micro-batch.
        timestep: noise levels in [0, 1] (B,) for the validation loss; None draws them.

    Example:
        >>> rng = StepRandom(cfg.seed, step, batch["sample_index"], device)
        >>> train_step(batch, nets, cfg, rng).loss.backward()
    """
    # encode the images, or use precomputed latents
    pixels_pm1: Any = batch["pixels_uint8"].float() / 127.5 - 1 if "pixels_uint8" in batch else None  # (B, 3, H, W)
    latents = cached_latents(batch) if "latent_mean" in batch else encode_images(pixels_pm1, nets)
    clean = draw_latents(latents, rng)  # (B, C, h, w)

    # drop captions for guidance; encode the others, or use precomputed text
    dropped = (rng.uniform("caption_dropout", on_host=True) < cfg.caption_dropout).tolist()
    captions = ["" if drop else caption for drop, caption in zip(dropped, batch["captions"])]
    if "text" in batch:
        text, text_mask, truncated = cached_text(batch, dropped)  # (B, L, E), L the longest caption's
    else:
        text, text_mask, truncated = encode_captions(captions, nets, cfg, clean.device)  # (B, L, E)

    # draw timesteps and noise
    if timestep is None:
        timestep = draw_timesteps(nets, rng)  # (B,)
    noise = cfg.noise_scale * rng.normal("noise", clean.shape[1:])  # (B, C, h, w)

    # draw the route
    rows, columns = nets.token_grid(clean)
    route = None
    if cfg.route_ratio > 0:
        scores = rng.uniform("route", (rows * columns,))  # (B, N)
        route = sample_route(scores, cfg.route_ratio, *cfg.route_range)

    # compute the teacher's features, or use precomputed ones; draw the crop
    features = batch["teacher_features"].float() if "teacher_features" in batch else None  # (B, N, E)
    if nets.projector is not None and features is None:
        features = teacher_features(nets.teacher, batch["pixels_uint8"], (rows, columns), nets.teacher_cache)
    dino_crop = rng.uniform("dino_crop", (2,)) if nets.dino is not None and cfg.dino_crop else None  # (B, 2)

    inputs = StepInputs(clean, noise, timestep, text, text_mask, captions, route, pixels_pm1, features, dino_crop)
    with rng.seeded("lora_dropout") if cfg.lora_dropout > 0 else nullcontext():
        losses, loss_per_sample = compute_losses(inputs, nets, cfg)
    return StepOutput(weighted_sum(losses, cfg), losses, loss_per_sample.detach(), truncated)


def compute_losses(
    inputs: StepInputs, nets: Nets, cfg: TrainingConfig
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Evaluate all losses of a micro-batch with one forward pass. The function is deterministic.

    Args:
        inputs: encoded batch and random draws.
        nets: networks, prepared for training; those of unused losses are None.
        cfg: configuration of the stage.

    Returns:
        Unweighted scalar losses by name, and the flow-matching loss of each sample (B,).
    """
    clean, noise, timestep = inputs.clean, inputs.noise, inputs.timestep
    t = timestep[:, None, None, None]
    noisy = (1 - t) * clean + t * noise  # (B, C, h, w)

    # one forward pass; `block_features` are the features (B, K, D) of a block and their indices (B, K) or None
    prediction, *block_features = nets.transformer(
        noisy,
        timestep,
        inputs.text,
        inputs.text_mask,
        return_dict=False,
        route=inputs.route,
        feature_block=cfg.repa_block if nets.projector is not None else None,
    )  # (B, C, h, w)

    # predicted and target velocity
    predicted_velocity = nets.scheduler.velocity(prediction, noisy, timestep)
    velocity = noise - clean
    if nets.scheduler.prediction_type == "x_prediction":
        velocity = nets.scheduler.velocity(clean, noisy, timestep)  # clamped like the prediction

    # the losses
    loss_per_sample = F.mse_loss(predicted_velocity, velocity, reduction="none").mean(dim=(1, 2, 3))  # (B,)
    losses = {"flow": loss_per_sample.mean()}
    if cfg.contrastive_weight > 0:
        captions = [nets.clean_caption(caption) for caption in inputs.captions]
        losses["contrastive"] = contrastive_loss(predicted_velocity, velocity, captions)
    if nets.projector is not None:
        assert inputs.teacher_features is not None
        features, indices = block_features
        grid = nets.token_grid(clean)
        losses["alignment"] = alignment(features, indices, inputs.teacher_features, nets, cfg, grid)
    if nets.lpips is not None or nets.dino is not None:
        assert inputs.pixels_pm1 is not None
        predicted_pm1 = decode(nets.vae, nets.scheduler.clean(prediction, noisy, timestep))  # (B, 3, H, W)
        counted = timestep <= cfg.perceptual_max_timestep  # (B,)
        if nets.lpips is not None:
            losses["lpips"] = masked_mean(nets.lpips(predicted_pm1, inputs.pixels_pm1), counted)
        if nets.dino is not None:
            distance = dino_perceptual_loss(
                nets.dino, predicted_pm1, inputs.pixels_pm1, cfg.dino_size, inputs.dino_crop
            )  # (B,)
            losses["dino"] = masked_mean(distance, counted)
    return losses, loss_per_sample


def alignment(
    features: torch.Tensor,
    indices: torch.Tensor | None,
    target: torch.Tensor,
    nets: Nets,
    cfg: TrainingConfig,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Compute the REPA loss (arXiv 2410.06940).

    Args:
        features: features of a block (B, K, D).
        indices: indices of their tokens (B, K); None for all tokens.
        target: features of the teacher (B, N, E).
        nets: networks with a projector.
        cfg: configuration of the stage.
        grid: (rows, columns) of the image tokens.
    """
    if cfg.repa_spatial_gamma is not None:
        target = spatial_normalize(target, cfg.repa_spatial_gamma)  # (B, N, E)
    projected = nets.projector(features, indices, grid)  # (B, K, E)
    return alignment_loss(projected, target, indices).mean()


def weighted_sum(losses: dict[str, torch.Tensor], cfg: TrainingConfig) -> torch.Tensor:
    """Return the sum of losses with the weights of a stage, a scalar."""
    weights = {"flow": 1.0, "contrastive": -cfg.contrastive_weight, "alignment": cfg.repa_weight}
    weights |= {"lpips": cfg.lpips_weight, "dino": cfg.dino_weight}
    return torch.stack([weights[name] * value for name, value in losses.items()]).sum()


def draw_latents(latents: EncodedImages, rng: StepRandom) -> torch.Tensor:
    """Draw a sample (B, C, h, w) of the distribution of latents."""
    return latents.draw(None if latents.std is None else rng.normal("latents", latents.std.shape[1:]))


def draw_timesteps(nets: Nets, rng: StepRandom) -> torch.Tensor:
    """Draw the noise level of each sample from the scheduler's distribution, (B,)."""
    levels = nets.scheduler.timesteps_from_uniforms(rng.uniform("timestep", (3,), on_host=True))  # (B,)
    return levels.to(rng.device, non_blocking=True)


@torch.no_grad()
def encode_images(pixels_pm1: torch.Tensor, nets: Nets) -> EncodedImages:
    """Return the distribution of the latents of images (B, 3, H, W) in [-1, 1], or the pixels without a VAE."""
    return encode(nets.vae, pixels_pm1)


def encode_captions(
    captions: list[str], nets: Nets, cfg: TrainingConfig, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Encode captions, with gradients only if the text encoder is trained.

    Returns:
        Text (B, L, E) with the length L of the longest caption, its bool mask (B, L) or None without padding, and the
        number of truncated captions.
    """
    ids, mask = tokenize_prompts(nets.tokenizer, captions, cfg.max_sequence_length, nets.clean_caption)
    truncated = sum(find_truncated(nets.tokenizer, captions, mask, nets.clean_caption))
    ids, mask = trim_tokens(ids, mask)  # (B, L)
    with torch.set_grad_enabled(cfg.train_text_encoder and torch.is_grad_enabled()):
        text = encode_text(nets.text_encoder, ids.to(device), mask.to(device))  # (B, L, E)
    return text, None if mask.all() else mask.to(device), truncated
