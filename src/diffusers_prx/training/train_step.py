"""One training step, whole: what goes in, every random draw, the forward, the losses."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..latents import encode
from ..text import count_cut, encode_text, tokenize_prompts, trim_tokens
from .config import TrainingConfig
from .nets import Nets
from .rng import StepRandom


@dataclass
class StepOutput:
    """What a step hands to the loop.

    Args:
        loss: the weighted sum of `losses`, a scalar to go backward from.
        losses: every loss by name, before its weight.
        timestep: (B,) noise levels in [0, 1].
        loss_per_sample: (B,) the flow-matching loss of each sample.
        truncated: how many captions were longer than the token limit.
    """

    loss: torch.Tensor
    losses: dict[str, torch.Tensor]
    timestep: torch.Tensor
    loss_per_sample: torch.Tensor
    truncated: int


def train_step(
    batch: dict[str, Any], nets: Nets, cfg: TrainingConfig, rng: StepRandom, timestep: torch.Tensor | None = None
) -> StepOutput:
    """The loss of one micro-batch.

    Args:
        batch: "pixels_uint8" (B, 3, H, W) on the device of the networks, and "captions", B strings.
        nets: the networks, prepared for training.
        cfg: the run's configuration.
        rng: all random numbers of this micro-batch.
        timestep: (B,) noise levels in [0, 1] to use instead of drawing them: for the validation loss.
    """
    # encode the images
    pixels_pm1 = batch["pixels_uint8"].float() / 127.5 - 1  # (B, 3, H, W)
    clean = pixels_pm1
    if nets.vae is not None:
        with torch.no_grad():
            latents = encode(nets.vae, pixels_pm1)
        clean = latents.draw(rng.normal("latents", latents.mean.shape[1:]))  # (B, C, h, w)

    # drop captions, for guidance; encode the others
    dropped = (rng.uniform("caption_dropout") < cfg.caption_dropout).tolist()
    captions = ["" if drop else caption for drop, caption in zip(dropped, batch["captions"])]
    ids, mask = tokenize_prompts(nets.tokenizer, captions, cfg.max_sequence_length, nets.clean_caption)
    full = [caption for caption, row in zip(captions, mask) if row.all()]
    truncated = count_cut(nets.tokenizer, full, cfg.max_sequence_length, nets.clean_caption) if full else 0
    ids, mask = trim_tokens(ids, mask)  # (B, L), L the longest caption's
    text_mask = None if mask.all() else mask.to(clean.device)
    with torch.set_grad_enabled(cfg.train_text_encoder and torch.is_grad_enabled()):
        text = encode_text(nets.text_encoder, ids.to(clean.device), mask.to(clean.device))  # (B, L, E)

    # draw timesteps and noise
    if timestep is None:
        generators = rng.generators("timestep")
        timestep = torch.cat([nets.scheduler.sample_timesteps(1, generator=g) for g in generators])  # (B,)
    noise = cfg.noise_scale * rng.normal("noise", clean.shape[1:])  # (B, C, h, w)
    t = timestep[:, None, None, None]
    noisy = (1 - t) * clean + t * noise

    # one forward
    prediction = nets.transformer(noisy, timestep, text, text_mask, return_dict=False)[0]

    # velocity, predicted and wanted
    predicted_velocity = nets.scheduler.velocity(prediction, noisy, timestep)
    velocity = noise - clean
    if nets.scheduler.prediction_type == "x_prediction":
        velocity = nets.scheduler.velocity(clean, noisy, timestep)  # with the clamp of the prediction's

    # the losses and their weighted sum
    loss_per_sample = F.mse_loss(predicted_velocity, velocity, reduction="none").mean(dim=(1, 2, 3))  # (B,)
    losses = {"flow": loss_per_sample.mean()}
    weights = {"flow": 1.0}
    loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
    return StepOutput(loss, losses, timestep, loss_per_sample.detach(), truncated)
