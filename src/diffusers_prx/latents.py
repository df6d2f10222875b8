"""The one place that knows each VAE's latents: how much smaller they are, how they are patchified, scaled and shifted.

Here and everywhere in the package `latents` are what the transformer works on. Between them and a VAE's own codes z
stands latents = (z - shift) * scale, and both come from the VAE itself:

| VAE | scale and shift |
|---|---|
| AutoencoderKL, AutoencoderDC, AutoencoderTiny | `scaling_factor` and `shift_factor` of its configuration |
| AutoencoderKLFlux2 | its batch-norm statistics: for each channel of z, patchified 2 x 2, one of each |
| None: no VAE | 1 and 0: latents are pixels in [-1, 1] |
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny

from .compat import DiagonalGaussianDistribution, unwrap_compiled

VAE_CLASSES: tuple[Any, ...] = (AutoencoderKL, AutoencoderKLFlux2, AutoencoderDC, AutoencoderTiny)
VAE: TypeAlias = Any  # one of VAE_CLASSES or None; the decorators of diffusers hide their attributes from mypy


@dataclass
class EncodedImages:
    """Images as a VAE encodes them: one Gaussian for each value of the latents.

    Args:
        mean (`torch.Tensor` of shape (B, C, h, w)): float32.
        std (`torch.Tensor` of shape (B, C, h, w) or None): float32; None where there is no randomness: with
            AutoencoderDC, AutoencoderTiny and without a VAE.
    """

    mean: torch.Tensor
    std: torch.Tensor | None

    def draw(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Latents (B, C, h, w): mean + std noise, or the mean when no noise is given or the VAE has no randomness.

        Args:
            noise: a standard normal draw of the shape of the mean; training draws it per sample.
        """
        return self.mean if noise is None or self.std is None else self.mean + self.std * noise.to(self.mean)


def find_vae(name_or_path: str, revision: str | None = None) -> tuple[Any, dict[str, Any], str | None]:
    """The class of an autoencoder, its configuration, and its subfolder: `vae` in a pipeline, else None.

    Raises:
        ValueError: if it is of a class that is not known here.
    """
    classes = {known.__name__: known for known in VAE_CLASSES}
    config: Any
    subfolder: str | None = "vae"
    try:
        config = AutoencoderKL.load_config(name_or_path, subfolder=subfolder, revision=revision)
    except OSError:
        config, subfolder = AutoencoderKL.load_config(name_or_path, revision=revision), None
    if config.get("_class_name") not in classes:
        raise ValueError(f"`vae_name_or_path` is a {config.get('_class_name')}; accepted: {sorted(classes)}.")
    return classes[config["_class_name"]], config, subfolder


def load_vae(name_or_path: str) -> VAE:
    """An autoencoder in float32, from its own folder or the `vae` subfolder of a pipeline.

    Raises:
        ValueError: see `find_vae`; or weights that are not all there.
    """
    vae_class, _, subfolder = find_vae(name_or_path)
    vae, info = vae_class.from_pretrained(
        name_or_path, subfolder=subfolder, dtype=torch.float32, output_loading_info=True
    )
    unread = {name for name, weight in vae.state_dict().items() if weight.is_meta}  # named by an index, in no shard
    if lacking := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"]), *unread}):
        raise ValueError(f"`vae_name_or_path` {name_or_path} lacks weights of its {vae_class.__name__}: {lacking}.")
    return vae.eval()


def vae_scale_factor(vae: VAE) -> int:
    """Pixels per latent, along one side.

    Raises:
        ValueError: a class of VAE that PRX does not know, or one that states no scale.
    """
    if vae is None:
        return 1
    vae = _known(vae)
    if isinstance(vae, AutoencoderDC):
        return int(vae.spatial_compression_ratio)
    return 2 ** (len(vae.config["block_out_channels"]) - 1) * _patch_size(vae)


def latent_channels(vae: VAE) -> int:
    """Channels C of the latents.

    Raises:
        ValueError: a class of VAE that PRX does not know, or one that states no scale.
    """
    if vae is None:
        return 3
    vae = _known(vae)
    return int(vae.config["latent_channels"]) * _patch_size(vae) ** 2


def has_one_scale(vae: VAE) -> bool:
    """Whether one number scales and one number shifts all of the latents; stock diffusers' pipeline knows no more.

    Raises:
        ValueError: a class of VAE that PRX does not know, or one that states no scale.
    """
    return vae is None or not isinstance(_known(vae), AutoencoderKLFlux2)


def encode(vae: VAE, pixels_pm1: torch.Tensor) -> EncodedImages:
    """Encode images (B, 3, H, W) in [-1, 1], in the VAE's dtype; the result is float32.

    Raises:
        ValueError: a class of VAE that PRX does not know, one that states no scale, or images of another shape, of
            whole numbers, or of a size that is not a multiple of `vae_scale_factor`.
    """
    _check_tensor("pixels_pm1", pixels_pm1, 3)
    if vae is None:
        return EncodedImages(pixels_pm1.float(), None)
    factor, (height, width) = vae_scale_factor(vae), pixels_pm1.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"`pixels_pm1` is {height} x {width}; for this `vae` ({type(vae).__name__}) both have to be multiples of"
            f" {factor}."
        )
    shift, scale = _shift_and_scale(vae, pixels_pm1.device)
    patch_size = _patch_size(vae)
    codes = vae.encode(pixels_pm1.to(vae.dtype), return_dict=False)[0]
    if not isinstance(codes, DiagonalGaussianDistribution):
        return EncodedImages((F.pixel_unshuffle(codes.float(), patch_size) - shift) * scale, None)  # (B, C, h, w)
    mean = F.pixel_unshuffle(codes.mean.float(), patch_size)  # (B, C, h, w)
    std = F.pixel_unshuffle(codes.std.float(), patch_size)  # (B, C, h, w)
    return EncodedImages((mean - shift) * scale, std * scale)


def decode(vae: VAE, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents (B, C, h, w) to images (B, 3, H, W), float32, about in [-1, 1] (not clamped).

    Raises:
        ValueError: a class of VAE that PRX does not know, one that states no scale, or latents of another shape or of
            whole numbers.
    """
    _check_tensor("latents", latents, latent_channels(vae))
    if vae is None:
        return latents.float()
    shift, scale = _shift_and_scale(vae, latents.device)
    codes = F.pixel_shuffle(latents.float() / scale + shift, _patch_size(vae))
    return vae.decode(codes.to(vae.dtype), return_dict=False)[0].float()


def check_floating(name: str, tensor: Any) -> None:
    """Raise a ValueError unless an argument is a tensor of floating-point numbers."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        came = f"of {tensor.dtype}" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
        raise ValueError(f"`{name}` is {came}; it has to be a floating-point tensor.")


def _check_tensor(name: str, tensor: Any, channels: int) -> None:
    check_floating(name, tensor)
    if tensor.ndim != 4 or tensor.shape[1] != channels:
        raise ValueError(f"`{name}` is {tuple(tensor.shape)}; it has to be (B, {channels}, height, width).")


def _shift_and_scale(vae: VAE, device: torch.device) -> tuple[Any, Any]:
    """Two numbers, or two tensors (C, 1, 1) on `device` (an offloaded VAE waits on another)."""
    vae = _known(vae)
    if isinstance(vae, AutoencoderKLFlux2):
        # as numbers, not by calling `bn`: that would move its statistics in training mode
        mean = vae.bn.running_mean.float().to(device)[:, None, None]
        var = vae.bn.running_var.float().to(device)[:, None, None]
        return mean, 1 / torch.sqrt(var + vae.config["batch_norm_eps"])
    return float(vae.config.get("shift_factor") or 0.0), float(vae.config["scaling_factor"])


def _patch_size(vae: VAE) -> int:
    """Side of the squares of codes that become the channels of one latent, in the order of `pixel_unshuffle`."""
    vae = _known(vae)
    return int(vae.config["patch_size"][0]) if isinstance(vae, AutoencoderKLFlux2) else 1


def _known(vae: VAE) -> Any:
    """The VAE itself, out of the wrapper that torch.compile puts around it, if its latents are defined."""
    vae = unwrap_compiled(vae)
    name = type(vae).__name__
    if not isinstance(vae, VAE_CLASSES):
        raise ValueError(f"`vae` is a {name}; accepted are {[known.__name__ for known in VAE_CLASSES]} and None.")
    if isinstance(vae, AutoencoderKLFlux2):
        return vae
    # A default is silently wrong: 0.18215 of AutoencoderKL is Stable Diffusion's and fits no other. AutoencoderTiny's
    # is right: it is trained to encode to scaled latents.
    defaults = () if isinstance(vae, AutoencoderTiny) else vae.config.get("_use_default_values", ())
    scale, shift = vae.config.get("scaling_factor"), vae.config.get("shift_factor") or 0.0
    for key, value in {"scaling_factor": scale, "shift_factor": shift}.items():
        number = isinstance(value, (int, float)) and math.isfinite(value)
        if value is not None and (not number or (key == "scaling_factor" and value == 0)):
            raise ValueError(
                f"The configuration of `vae` ({name}) has the `{key}` {value!r}; it has to be a finite number, and the"
                " scale not 0."
            )
    if scale is None or "scaling_factor" in defaults:
        raise ValueError(
            f"The configuration of `vae` ({name}) has no `scaling_factor`; write it into the VAE's config.json, or"
            " pass it to the VAE's `from_pretrained`: 1 / (standard deviation of the VAE's codes)."
        )
    if vae.config.get("latents_mean") is not None or vae.config.get("latents_std") is not None:
        raise ValueError(
            f"The configuration of `vae` ({name}) has `latents_mean` or `latents_std`; accepted are one"
            " `scaling_factor` and one `shift_factor`."
        )
    return vae
