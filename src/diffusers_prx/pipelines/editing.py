"""Images and masks that an editing call starts from: read, check, resize and crop them, and paste the result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..latents import check_floating
from ..schedulers.scheduling_prx import check_count, check_number, is_number
from .check_finite import check_finite_input

ImageInput: TypeAlias = (
    Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image] | Sequence[np.ndarray] | Sequence[torch.Tensor]
)
Box: TypeAlias = tuple[int, int, int, int]  # left, top, right, bottom in pixels

MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class Paste:
    """Images that the drawn region goes back into.

    Args:
        images_01: (N, 3, H, W) in [0, 1].
        masks: (N, 1, H, W), weight of the drawn image, in [0, 1].
        boxes: region of each image that is drawn.
    """

    images_01: torch.Tensor
    masks: torch.Tensor
    boxes: list[Box]


@dataclass(frozen=True)
class Edit:
    """Images that a call starts from, N of them: one for all prompts, or one for each.

    Args:
        strength: noise level in [0, 1] at which the call starts.
        size: (height, width) to draw at, in pixels.
        images: (N, 3, H, W) in [0, 1] of this size, or latents (N, C, h, w).
        is_latent: True if `images` are latents.
        masks: (N, 1, H, W) in [0, 1] of this size, 1 where to draw; None: everywhere.
        target: images to paste the result into, or None.
    """

    strength: float
    size: tuple[int, int]
    images: torch.Tensor
    is_latent: bool = False
    masks: torch.Tensor | None = None
    target: Paste | None = None

    def check_count(self, num_prompts: int) -> None:
        """Raise a ValueError unless there is one image, or one for each prompt."""
        if len(self.images) not in (1, num_prompts):
            name = "`image`" if self.masks is None else "`image` or `mask_image`"
            raise ValueError(
                f"{name} has {len(self.images)} entries, and there are {num_prompts} prompts; accepted are one entry,"
                " and one for each prompt."
            )

    def latent_mask(self, factor: int) -> torch.Tensor | None:
        """Return the mask of latents, bool (N, 1, h, w): true if any of its pixels is to be drawn.

        Args:
            factor: pixels per latent along one side.
        """
        if self.masks is None:
            return None
        return F.max_pool2d((self.masks >= MASK_THRESHOLD).float(), factor) > 0

    def paste(self, drawn_01: torch.Tensor) -> torch.Tensor:
        """Return drawn images (B, 3, H, W) inside the images that they belong to. Pixels outside the mask stay."""
        if self.target is None:
            return drawn_01
        target, repeats = self.target, len(drawn_01) // len(self.target.images_01)
        pasted = target.images_01.to(drawn_01).repeat_interleave(repeats, dim=0)  # (B, 3, H, W)
        masks = target.masks.to(drawn_01).repeat_interleave(repeats, dim=0)  # (B, 1, H, W)
        for row, drawn in enumerate(drawn_01):
            left, top, right, bottom = target.boxes[row // repeats]
            region = (row, slice(None), slice(top, bottom), slice(left, right))
            resized = _resize(drawn[None], bottom - top, right - left)[0]
            pasted[region] = torch.lerp(pasted[region], resized, masks[region])  # exact for weights of 0 and 1
        return pasted


@dataclass(frozen=True)
class KnownLatents:
    """Latents of the images of a call, one per row of the batch, at any noise level.

    Args:
        clean: (B, C, h, w), latents of the images.
        noise: (B, C, h, w), noise of the call, scaled by `noise_scale`.
        mask: bool (B, 1, h, w), true where to draw; None: everywhere.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def expand(cls, clean: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor | None) -> "KnownLatents":
        """Repeat latents and mask of N images for a batch of B rows, in the order of the prompts."""
        size = len(noise)
        clean = clean.repeat_interleave(size // len(clean), dim=0)
        if mask is not None:
            mask = mask.to(noise.device).repeat_interleave(size // len(mask), dim=0)
        return cls(clean, noise, mask)

    def at(self, level: float | torch.Tensor) -> torch.Tensor:
        """Return the images at a noise level in [0, 1], (B, C, h, w)."""
        return (1 - level) * self.clean + level * self.noise

    def restore(self, latents: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Return latents (B, C, h, w) of a noise level, with those of the images outside the mask."""
        return latents if self.mask is None else torch.where(self.mask, latents, self.at(level))


def make_edit(
    image: Any,
    strength: Any,
    height: int | None,
    width: int | None,
    mask_image: Any,
    padding_mask_crop: Any,
    latent_channels: int,
    vae_scale_factor: int,
) -> Edit:
    """Check and read the arguments of an editing call.

    Args:
        image, strength, height, width, mask_image, padding_mask_crop: see the calls of the editing pipelines.
        latent_channels: C of the latents.
        vae_scale_factor: pixels per latent along one side.

    Raises:
        ValueError: if an argument is not as described.
    """
    strength = float(check_number("strength", strength, 0, 1, closed=True))
    crop = padding_mask_crop
    if crop is not None and not (is_number(crop) and crop >= 0 and crop == int(crop)):
        raise ValueError(f"`padding_mask_crop` is {crop!r}; it has to be a whole number of at least 0, or None.")
    masks = None if mask_image is None else _read_images("mask_image", mask_image, 1)  # (N, 1, H, W)
    latents = _as_latents(image, latent_channels)  # (N, C, h, w)
    if latents is None:
        pixels = _read_images("image", image, 3)  # (N, 3, H, W)
        own_height, own_width = pixels.shape[-2:]
    else:
        own_height, own_width = (side * vae_scale_factor for side in latents.shape[-2:])
    height = own_height if height is None else check_count("height", height)
    width = own_width if width is None else check_count("width", width)
    if masks is not None and masks.shape[-2:] != (own_height, own_width):
        raise ValueError(
            f"`mask_image` has the size {tuple(masks.shape[-2:])}; it has to be that of `image`,"
            f" {(own_height, own_width)} (height, width)."
        )
    if latents is not None:
        if (height, width) != (own_height, own_width) or crop is not None:
            raise ValueError(
                f"`image` holds latents, for a size of {(own_height, own_width)}: leave out `height`, `width` and"
                " `padding_mask_crop`, or pass the image itself."
            )
        if masks is not None:
            latents, masks = _pair(latents, masks)
        return Edit(strength, (height, width), latents, is_latent=True, masks=masks)
    if masks is None:
        return Edit(strength, (height, width), _resize(pixels, height, width))
    pixels, masks = _pair(pixels, masks)
    if crop is None:
        pixels, masks = _resize(pixels, height, width), _resize(masks, height, width)
        boxes = [(0, 0, width, height)] * len(masks)
    else:
        boxes = [_crop_box(mask, height, width, int(crop)) for mask in masks]
    return Edit(
        strength,
        (height, width),
        _crop(pixels, boxes, height, width),
        masks=_crop(masks, boxes, height, width),
        target=Paste(pixels, masks, boxes),
    )


def _read_images(name: str, value: Any, channels: int) -> torch.Tensor:
    """Return images of any form as one tensor (N, channels, H, W), float32, in [0, 1]."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items:
        raise ValueError(f"`{name}` is an empty list.")
    images = [_read_image(name, item, channels) for item in items]
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) > 1:
        raise ValueError(f"`{name}` has images of the sizes {sorted(sizes)} (height, width); resize them to one size.")
    return torch.cat(images)


def _read_image(name: str, value: Any, channels: int) -> torch.Tensor:
    """Return an image, or a batch in one array, as (N, channels, H, W), float32, in [0, 1]."""
    forms = "(3, H, W) or (N, 3, H, W)" if channels == 3 else "(H, W), (N, H, W) or (N, 1, H, W)"
    if isinstance(value, Image.Image):
        array = np.asarray(value.convert("RGB" if channels == 3 else "L"), dtype=np.float32) / 255
        return torch.from_numpy(array.reshape(1, *array.shape[:2], channels)).permute(0, 3, 1, 2).contiguous()
    if not isinstance(value, (np.ndarray, torch.Tensor)):
        raise ValueError(f"`{name}` is a {type(value).__name__}; accepted are PIL images, arrays, tensors and lists.")
    image = torch.as_tensor(value)
    if channels == 1 and image.dtype == torch.bool:
        image = image.float()
    if not image.is_floating_point():
        raise ValueError(f"`{name}` is of {image.dtype}; it has to be floating-point, in [0, 1], or a PIL image.")
    if isinstance(value, np.ndarray) and image.ndim >= 3 and image.shape[-1] == channels:
        image = image.movedim(-1, -3)  # (..., channels, H, W)
    if channels == 1 and (image.ndim == 2 or (image.ndim == 3 and image.shape[0] != 1)):
        image = image.unsqueeze(-3)
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[1] != channels or 0 in image.shape:
        raise ValueError(f"`{name}` is {tuple(value.shape)}; it has to be {forms}, with channels last in an array.")
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError(f"`{name}` has values outside [0, 1] or NaN; it has to be in [0, 1].")
    return image.float()


def _as_latents(value: Any, channels: int) -> torch.Tensor | None:
    """Return a tensor, or a list of tensors, as latents (N, C, h, w) if it has their channels; else None."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, torch.Tensor) for item in value):
        value = torch.cat([item[None] if item.ndim == 3 else item for item in value])
    if channels == 3 or not isinstance(value, torch.Tensor) or value.ndim < 3 or value.shape[-3] != channels:
        return None
    check_floating("image", value)
    check_finite_input("image", value)
    return value[None] if value.ndim == 3 else value


def _pair(images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return as many images as masks: one of either serves all of the other."""
    count = max(len(images), len(masks))
    if {len(images), len(masks)} - {1, count}:
        raise ValueError(
            f"`image` has {len(images)} entries and `mask_image` {len(masks)}; accepted are one, and equally many."
        )
    return images.expand(count, -1, -1, -1), masks.expand(count, -1, -1, -1)


def _resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return images (N, C, H, W) in [0, 1] at another size, filtered; those of this size as they are."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def _crop_box(mask: torch.Tensor, height: int, width: int, padding: int) -> Box:
    """Return the box around a mask (1, H, W), `padding` wider on each side, if possible with the ratio of a size."""
    if not bool(mask.any()):
        return (0, 0, mask.shape[-1], mask.shape[-2])
    marked = Image.fromarray((mask[0] > 0).cpu().numpy())
    return VaeImageProcessor.get_crop_region(marked, width, height, pad=padding)


def _crop(images: torch.Tensor, boxes: list[Box], height: int, width: int) -> torch.Tensor:
    """Return the boxes of images (N, C, H, W), resized to one size."""
    crops = [image[:, top:bottom, left:right] for image, (left, top, right, bottom) in zip(images, boxes)]
    return torch.cat([_resize(crop[None], height, width) for crop in crops])
