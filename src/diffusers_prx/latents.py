"""The one place that knows each VAE's latents: how much smaller they are, and how they are scaled and shifted.

Here and everywhere in the package `latents` are what the transformer works on. Between them and a VAE's own codes z
stands latents = (z - shift_factor) * scaling_factor, with both factors from the VAE's configuration.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL

VAE: TypeAlias = Any  # AutoencoderKL or AutoencoderDC; the decorators of diffusers hide their attributes from mypy


@dataclass
class EncodedImages:
    """Images as a VAE encodes them: one Gaussian for each value of the latents.

    Args:
        mean (`torch.Tensor` of shape (B, C, h, w)): float32.
        std (`torch.Tensor` of shape (B, C, h, w) or None): float32; None for a VAE without randomness.
    """

    mean: torch.Tensor
    std: torch.Tensor | None

    def draw(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Latents (B, C, h, w): mean + std noise, or the mean when no noise is given or the VAE has no randomness.

        Args:
            noise: a standard normal draw of the shape of the mean; training draws it per sample.
        """
        return self.mean if noise is None or self.std is None else self.mean + self.std * noise.to(self.mean)


def vae_scale_factor(vae: VAE) -> int:
    """Pixels per latent, along one side.

    Raises:
        ValueError: a class of VAE that PRX does not know.
    """
    vae = _known(vae)
    has_ratio = isinstance(vae, AutoencoderDC)
    if not has_ratio:
        return 2 ** (len(vae.config["block_out_channels"]) - 1)
    return int(vae.spatial_compression_ratio)


def latent_channels(vae: VAE) -> int:
    """Channels C of the latents.

    Raises:
        ValueError: a class of VAE that PRX does not know.
    """
    return int(_known(vae).config["latent_channels"])


def encode(vae: VAE, pixels_pm1: torch.Tensor) -> EncodedImages:
    """Encode images (B, 3, H, W) in [-1, 1], in the VAE's dtype; the result is float32.

    Raises:
        ValueError: a class of VAE that PRX does not know, or one that states no scale.
    """
    scale, shift = _scale_and_shift(vae)
    encoded = vae.encode(pixels_pm1.to(vae.dtype))
    if isinstance(_known(vae), AutoencoderDC):
        return EncodedImages((encoded.latent.float() - shift) * scale, None)
    gaussian = encoded.latent_dist
    return EncodedImages((gaussian.mean.float() - shift) * scale, gaussian.std.float() * scale)


def decode(vae: VAE, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, C, h, w) to images (B, 3, H, W), float32, about in [-1, 1] (not clamped).

    Raises:
        ValueError: a class of VAE that PRX does not know, or one that states no scale.
    """
    scale, shift = _scale_and_shift(vae)
    return vae.decode((latents.float() / scale + shift).to(vae.dtype), return_dict=False)[0].float()


def _scale_and_shift(vae: VAE) -> tuple[float, float]:
    config = _known(vae).config
    scale = config.get("scaling_factor")
    if scale is None:
        # a default would be silently wrong: the scale of Stable Diffusion's VAE fits no other
        raise ValueError(
            f"The configuration of `vae` ({type(vae).__name__}) has no `scaling_factor`; set it to 1 / (standard"
            " deviation of the VAE's codes)."
        )
    return float(scale), float(config.get("shift_factor") or 0.0)


def _known(vae: VAE) -> Any:
    """The VAE itself, out of the wrapper that torch.compile puts around it."""
    vae = getattr(vae, "_orig_mod", vae)
    if not isinstance(vae, (AutoencoderKL, AutoencoderDC)):
        raise ValueError(f"`vae` is a {type(vae).__name__}; accepted are AutoencoderKL and AutoencoderDC.")
    return vae
