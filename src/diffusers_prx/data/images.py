"""From the bytes of one picture to RGB, or the reason why not."""

import functools
import hashlib
import io
from typing import IO, Any

import fsspec
import numpy as np
import PIL.Image
import PIL.ImageOps

_ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height change places


class UnreadableSample(Exception):
    """A sample whose image or caption cannot be read: it is skipped and counted."""


class UnfitSample(Exception):
    """A sample whose image would be enlarged or cropped too much: it is left out and counted."""


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as a viewer shows it: the first frame, turned as its EXIF data say, on white where it is
    transparent, and with 16-bit grey scaled to 8 bits (Pillow's own conversion cuts it off at 255).

    Raises:
        ValueError: for pixels without a stated range (32-bit integers, floats).
    """
    kind = image.format  # what turning an image forgets
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):  # "I" with older Pillow
        return PIL.Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no stated range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _open(source: bytes | str) -> IO[bytes]:
    return io.BytesIO(source) if isinstance(source, bytes) else fsspec.open(source, "rb").open()


def read_image(source: bytes | str | None) -> PIL.Image.Image:
    """Decode a picture to RGB.

    Args:
        source: the bytes of a file, or where it is: a path or an address that fsspec opens (hf://...).

    Raises:
        UnreadableSample: whatever a decoder raised. A decompression bomb is refused before it is unpacked: from twice
            `PIL.Image.MAX_IMAGE_PIXELS` on (179 million pixels), with their number in the message.
    """
    if source is None:
        raise UnreadableSample("no image")
    try:
        with _open(source) as file, PIL.Image.open(file) as opened:
            return to_rgb(opened)
    except PIL.UnidentifiedImageError as error:  # its own message names an object in memory
        raise UnreadableSample("no readable image: no format that Pillow knows") from error
    except Exception as error:  # decoders raise nearly anything on a corrupt file
        raise UnreadableSample(f"no readable image: {error!r}") from error


def image_size(source: bytes | str | None) -> tuple[int, int]:
    """(width, height) in pixels of what `read_image` gives, from the header alone.

    Raises:
        UnreadableSample: if the header cannot be read.
    """
    if source is None:
        raise UnreadableSample("no image")
    try:
        with _open(source) as file, PIL.Image.open(file) as opened:
            # Pillow has turned a TIFF already, and decodes a whole PNG to look for EXIF data behind the pixels.
            known = opened.format != "TIFF" and (opened.format != "PNG" or "exif" in opened.info)
            turned = known and opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return opened.size[::-1] if turned else opened.size
    except Exception as error:
        raise UnreadableSample(f"no readable image: {error!r}") from error


def image_hash(source: bytes | str | None) -> bytes:
    """A hash (16 bytes) of a picture as it is stored.

    Raises:
        UnreadableSample: if there is none.
    """
    if source is None:
        raise UnreadableSample("no image")
    with _open(source) as file:
        return hashlib.blake2b(file.read(), digest_size=16).digest()


def image_value(value: Any) -> bytes | str | None:
    """The bytes or the path in a cell of an image column: {"bytes", "path"}, bytes alone, or a path alone."""
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    return value if isinstance(value, (bytes, str)) else None


@functools.cache
def image_endings() -> frozenset[str]:
    """Endings of files that Pillow opens as pictures, in lower case and without the dot."""
    PIL.Image.init()
    return frozenset(end[1:] for end, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN)
