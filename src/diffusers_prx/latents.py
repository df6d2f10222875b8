"""Latents of each VAE: compression, patches, scale and shift.

Everywhere in the package, `latents` are the input of the transformer: (z - shift) * scale of a VAE's codes z.

| VAE | scale and shift |
|---|---|
| AutoencoderKL, AutoencoderDC, AutoencoderTiny | `scaling_factor` and `shift_factor` of its configuration |
| AutoencoderKLFlux2 | its batch-norm statistics, one of each per channel of z, patchified 2 x 2 |
| AutoencoderRAE | its own statistics, which its `encode` and `decode` apply; it has one image size |
| None: no VAE | 1 and 0: latents are pixels in [-1, 1] |
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderRAE, AutoencoderTiny

from .compat import DiagonalGaussianDistribution, unwrap_compiled

VAE_CLASSES: tuple[Any, ...] = (AutoencoderKL, AutoencoderKLFlux2, AutoencoderDC, AutoencoderTiny, AutoencoderRAE)
VAE: TypeAlias = Any  # one of VAE_CLASSES or None; diffusers' decorators hide the attributes from mypy


@dataclass
class EncodedImages:
    """Latents of images, one Gaussian per value.

    Args:
        mean: (B, C, h, w), float32.
        std: (B, C, h, w), float32; None for a deterministic encoder: all but AutoencoderKL and AutoencoderKLFlux2.

    Example:
        >>> encoded = encode(vae, pixels_pm1)
        >>> latents = encoded.draw(torch.randn_like(encoded.mean))
    """

    mean: torch.Tensor
    std: torch.Tensor | None

    def draw(self, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return latents (B, C, h, w): mean + std * noise, or the mean without noise or for a deterministic encoder.

        Args:
            noise: standard normal draw in the shape of the mean.
        """
        return self.mean if noise is None or self.std is None else self.mean + self.std * noise.to(self.mean)


def find_vae(name_or_path: str, revision: str | None = None) -> tuple[Any, dict[str, Any], str | None]:
    """Return class, configuration and subfolder of a stored autoencoder; the subfolder is `vae` or None.

    Args:
        name_or_path: folder or Hub id of an autoencoder or of a pipeline.
        revision: revision on the Hub.

    Raises:
        ValueError: if its class is not one of `VAE_CLASSES`.

    Example:
        >>> vae_class, config, subfolder = find_vae("Photoroom/prx-512-t2i-sft")
    """
    classes = {vae_class.__name__: vae_class for vae_class in VAE_CLASSES}
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
    """Load an autoencoder in float32, from its own folder or the `vae` subfolder of a pipeline.

    Args:
        name_or_path: folder or Hub id.

    Raises:
        ValueError: if its class is not one of `VAE_CLASSES`, or weights are missing.

    Example:
        >>> vae = load_vae("Photoroom/prx-512-t2i-sft")
    """
    vae_class, _, subfolder = find_vae(name_or_path)
    vae, info = vae_class.from_pretrained(
        name_or_path, subfolder=subfolder, dtype=torch.float32, output_loading_info=True
    )
    not_in_shards = {name for name, weight in vae.state_dict().items() if weight.is_meta}  # only the index names them
    if missing := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"]), *not_in_shards}):
        raise ValueError(f"`vae_name_or_path` {name_or_path} lacks weights of its {vae_class.__name__}: {missing}.")
    return vae.eval()


def vae_scale_factor(vae: VAE) -> int:
    """Return the number of pixels per latent along one side.

    Raises:
        ValueError: if the VAE's class is not one of `VAE_CLASSES`, or its configuration has no scale.

    Example:
        >>> vae_scale_factor(AutoencoderKL.from_pretrained("black-forest-labs/FLUX.1-dev", subfolder="vae"))
        8
    """
    if vae is None:
        return 1
    vae = _checked_vae(vae)
    if isinstance(vae, AutoencoderDC):
        return int(vae.spatial_compression_ratio)
    if isinstance(vae, AutoencoderRAE):
        return int(vae.config["patch_size"])
    return 2 ** (len(vae.config["block_out_channels"]) - 1) * _patch_size(vae)


def latent_channels(vae: VAE) -> int:
    """Return the number of channels C of the latents.

    Raises:
        ValueError: as in `vae_scale_factor`.

    Example:
        >>> latent_channels(None)
        3
    """
    if vae is None:
        return 3
    vae = _checked_vae(vae)
    if isinstance(vae, AutoencoderRAE):
        return int(vae.config["encoder_hidden_size"])
    return int(vae.config["latent_channels"]) * _patch_size(vae) ** 2


def fixed_image_size(vae: VAE) -> int | None:
    """Return the side in pixels of the only images that the VAE takes and makes; None: any multiple of its scale.

    Raises:
        ValueError: as in `vae_scale_factor`.

    Example:
        >>> fixed_image_size(AutoencoderRAE.from_pretrained("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"))
        256
    """
    if vae is None or not isinstance(vae := _checked_vae(vae), AutoencoderRAE):
        return None
    config = vae.config  # the encoder sees the image at `encoder_input_size`
    return int(config["patch_size"] * (config["encoder_input_size"] // config["encoder_patch_size"]))


def has_one_scale(vae: VAE) -> bool:
    """True if all channels have the same scale and shift, and images are in [-1, 1], as stock diffusers' pipeline
    assumes.

    Raises:
        ValueError: as in `vae_scale_factor`.

    Example:
        >>> has_one_scale(None)
        True
    """
    return vae is None or not isinstance(_checked_vae(vae), (AutoencoderKLFlux2, AutoencoderRAE))


def encode(vae: VAE, pixels_pm1: torch.Tensor) -> EncodedImages:
    """Encode images to latents, in the VAE's dtype; the result is float32.

    Args:
        vae: autoencoder, or None for pixel space.
        pixels_pm1: (B, 3, H, W) in [-1, 1]; H and W are multiples of `vae_scale_factor`, or `fixed_image_size`.

    Raises:
        ValueError: as in `vae_scale_factor`, or for images that are not as described.

    Example:
        >>> latents = encode(vae, pixels_pm1).mean
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
    size = fixed_image_size(vae)
    if size is not None:
        if (height, width) != (size, size):
            raise ValueError(
                f"`pixels_pm1` is {height} x {width}; this `vae` ({type(vae).__name__}) takes only {size} x {size}."
            )
        pixels_01 = pixels_pm1.to(vae.dtype) / 2 + 0.5
        return EncodedImages(vae.encode(pixels_01, return_dict=False)[0].float(), None)
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
        ValueError: as in `vae_scale_factor`, or for latents of another shape or of integers.

    Example:
        >>> pixels_pm1 = decode(vae, latents)
    """
    _check_tensor("latents", latents, latent_channels(vae))
    if vae is None:
        return latents.float()
    size = fixed_image_size(vae)
    if size is not None:
        side = size // vae_scale_factor(vae)
        if latents.shape[-2:] != (side, side):
            raise ValueError(
                f"`latents` is {tuple(latents.shape)}; this `vae` ({type(vae).__name__}) takes only {side} x {side}."
            )
        pixels_01 = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()  # (B, 3, H, W)
        return pixels_01 * 2 - 1
    shift, scale = _shift_and_scale(vae, latents.device)
    codes = F.pixel_shuffle(latents.float() / scale + shift, _patch_size(vae))
    return vae.decode(codes.to(vae.dtype), return_dict=False)[0].float()


def check_floating(name: str, tensor: Any) -> None:
    """Raise a ValueError unless an argument is a tensor of floating-point numbers."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        received = f"of {tensor.dtype}" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
        raise ValueError(f"`{name}` is {received}; it must be a floating-point tensor.")


def _check_tensor(name: str, tensor: Any, channels: int) -> None:
    check_floating(name, tensor)
    if tensor.ndim != 4 or tensor.shape[1] != channels:
        raise ValueError(f"`{name}` is {tuple(tensor.shape)}; it must be (B, {channels}, height, width).")


def _shift_and_scale(vae: VAE, device: torch.device) -> tuple[Any, Any]:
    """Return shift and scale: two numbers, or two tensors (C, 1, 1) on `device` (an offloaded VAE is elsewhere)."""
    vae = _checked_vae(vae)
    if isinstance(vae, AutoencoderKLFlux2):
        # calling `bn` instead would update its statistics in training mode
        mean = vae.bn.running_mean.float().to(device)[:, None, None]
        var = vae.bn.running_var.float().to(device)[:, None, None]
        return mean, 1 / torch.sqrt(var + vae.config["batch_norm_eps"])
    return float(vae.config.get("shift_factor") or 0.0), float(vae.config["scaling_factor"])


def _patch_size(vae: VAE) -> int:
    """Return the side of the patch of codes that becomes one latent, in the order of `pixel_unshuffle`."""
    vae = _checked_vae(vae)
    return int(vae.config["patch_size"][0]) if isinstance(vae, AutoencoderKLFlux2) else 1


def _checked_vae(vae: VAE) -> Any:
    """Unwrap a compiled VAE and check that its class and configuration define its latents."""
    vae = unwrap_compiled(vae)
    name = type(vae).__name__
    if not isinstance(vae, VAE_CLASSES):
        raise ValueError(
            f"`vae` is a {name}; accepted are {[vae_class.__name__ for vae_class in VAE_CLASSES]} and None."
        )
    if isinstance(vae, AutoencoderKLFlux2):
        return vae
    if isinstance(vae, AutoencoderRAE):
        if not vae.config["reshape_to_2d"]:
            raise ValueError(
                f"The configuration of `vae` ({name}) has `reshape_to_2d` False; latents need rows and columns: set"
                " it to True in the VAE's config.json."
            )
        return vae
    # AutoencoderKL's default, 0.18215, fits only Stable Diffusion. AutoencoderTiny's always fits: it is trained to
    # encode to scaled latents.
    defaults = () if isinstance(vae, AutoencoderTiny) else vae.config.get("_use_default_values", ())
    scale, shift = vae.config.get("scaling_factor"), vae.config.get("shift_factor") or 0.0
    for key, value in {"scaling_factor": scale, "shift_factor": shift}.items():
        is_finite = isinstance(value, (int, float)) and math.isfinite(value)
        if value is not None and (not is_finite or (key == "scaling_factor" and value == 0)):
            raise ValueError(
                f"The configuration of `vae` ({name}) has the `{key}` {value!r}; it must be a finite number, and the"
                " scale not 0."
            )
    if scale is None or "scaling_factor" in defaults:
        raise ValueError(
            f"The configuration of `vae` ({name}) has no `scaling_factor`, 1 / (standard deviation of its codes):"
            " write it into the VAE's config.json, or pass it to the VAE's `from_pretrained`."
        )
    if vae.config.get("latents_mean") is not None or vae.config.get("latents_std") is not None:
        raise ValueError(
            f"The configuration of `vae` ({name}) has `latents_mean` or `latents_std`; accepted are one"
            " `scaling_factor` and one `shift_factor`."
        )
    return vae
