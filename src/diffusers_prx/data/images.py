"""Decoding of image files to RGB, and the errors for samples that cannot be used."""

import contextlib
import functools
import hashlib
import importlib
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import fsspec
import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps

from ..files import is_remote, open_regular

T = TypeVar("T")

# Formats that are read. Pillow's others hold no photos or drawings, or start another program (EPS: Ghostscript).
COMMON_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "HEIF", "JXL", "JPEG2000", "TIFF", "GIF")
FORMATS = (*COMMON_FORMATS, "BMP", "DIB", "ICO", "PCX", "PPM", "QOI", "SGI", "TGA")
# Modules that add formats to Pillow, and the packages to install for them.
PLUGINS = {"pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin"}
# Endings of images that may be unreadable, with the remedy.
CAMERA_ENDINGS = ("arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "raw", "rw2")
GRAPHICS_ENDINGS = ("ai", "dds", "emf", "eps", "exr", "hdr", "ps", "psd", "svg", "wmf", "xcf")
REMEDIES = {
    **dict.fromkeys(("heic", "heics", "heif", "heifs", "hif"), f"`pip install {PLUGINS['pillow_heif']}`"),
    "jxl": f"`pip install {PLUGINS['pillow_jxl']}`",
    "avif": "`pip install -U pillow`",
    **dict.fromkeys((*CAMERA_ENDINGS, *GRAPHICS_ENDINGS), "convert them to PNG or JPEG"),
}

SRGB_ROUNDING = 2  # a profile that changes no color by more is sRGB, stored with fewer digits
ARCHIVES = r"(zip|tar|gzip|bz2|xz|lz4|zstd)://"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")
EXIF_ORIENTATION = 0x0112


class UnreadableSample(Exception):
    """Error for a sample whose image or caption cannot be read. The sample is replaced and counted."""


class UnfitSample(Exception):
    """Error for a sample whose image would be enlarged or cropped too much. The sample is replaced and counted."""


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image to RGB as a viewer shows it.

    The result is the first frame, rotated by its EXIF orientation, converted from its ICC profile to sRGB, and on
    white where it is transparent. 16-bit gray is scaled to 8 bits; Pillow's own conversion clips it at 255.

    Raises:
        ValueError: for pixels without a defined range (32-bit integers, floats).

    Example:
        >>> to_rgb(PIL.Image.open("photo.png")).mode
        'RGB'
    """
    kind, profile = image.format, image.info.get("icc_profile")  # `exif_transpose` drops the format
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):  # "I" with older Pillow
        image = PIL.Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no defined range")
    if profile:
        image = _to_srgb(image, profile)
    if _is_transparent(image):
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _is_transparent(image: PIL.Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _to_srgb(image: PIL.Image.Image, profile: bytes) -> PIL.Image.Image:
    """Convert colors from an ICC profile to sRGB with perceptual intent, as viewers do.

    The image is unchanged if the profile is broken, belongs to another color model, or is sRGB within rounding.
    """
    transparent = _is_transparent(image)
    base = image.convert("RGBA") if transparent else image
    if image.mode in ("L", "LA", "La"):
        base = base.convert("L")
    elif base.mode != "CMYK":
        base = base.convert("RGB")
    transform = _srgb_transform(profile, base.mode)
    if transform is None:
        return image
    colors = transform.apply(base)
    if transparent:
        colors.putalpha(image.convert("RGBA").getchannel("A"))
    return colors


@functools.lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str) -> PIL.ImageCms.ImageCmsTransform | None:
    try:
        source = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = PIL.ImageCms.buildTransform(source, PIL.ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ValueError, TypeError, PIL.ImageCms.PyCMSError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    colors = PIL.Image.fromarray(grid) if mode == "RGB" else PIL.Image.fromarray(grid[..., 0])
    change = np.asarray(transform.apply(colors), dtype=int) - np.asarray(colors.convert("RGB"))
    return transform if np.abs(change).max() > SRGB_ROUNDING else None


def open_stored(source: bytes | str) -> IO[bytes]:
    """Open a stored image: its bytes, the path of a regular file, or an fsspec address (`hf://...`).

    Raises:
        OSError: if the file does not exist or is not a regular file.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    source = source.removeprefix("file://")
    return fsspec.open(source, "rb").open() if is_remote(source) else open_regular(source)


def _decode(source: bytes | str, use: Callable[[PIL.Image.Image], T]) -> T:
    """Open an image and return `use(image)`.

    Pillow refuses a PNG with more text than its limit; such a PNG is opened without its text.
    """
    with open_stored(source) as file:
        try:
            with PIL.Image.open(file, formats=image_formats()) as image:
                return use(image)
        except ValueError:
            file.seek(0)
            plain = _without_text(file.read())
            if plain is None:
                raise
    with PIL.Image.open(io.BytesIO(plain), formats=["PNG"]) as image:
        return use(image)


def _without_text(data: bytes) -> bytes | None:
    """Remove the text chunks of a PNG, except those that may hold its orientation; None if it has none to remove."""
    if not data.startswith(PNG_SIGNATURE):
        return None
    kept, offset, removed = [PNG_SIGNATURE], len(PNG_SIGNATURE), False
    while offset < len(data):
        end = offset + 12 + int.from_bytes(data[offset : offset + 4], "big")
        kind, keyword = data[offset + 4 : offset + 8], data[offset + 8 : offset + 88].partition(b"\0")[0]
        if kind in (b"tEXt", b"zTXt", b"iTXt") and not keyword.startswith(PNG_ORIENTATION):
            removed = True
        else:
            kept.append(data[offset:end])
        offset = end
    return b"".join(kept) if removed else None


def read_image(source: bytes | str | None) -> PIL.Image.Image:
    """Decode an image to RGB.

    Decompression bombs, images of at least twice `PIL.Image.MAX_IMAGE_PIXELS` (179 million pixels), are refused before
    they are unpacked.

    Args:
        source: contents of a file, its path, or an fsspec address (`hf://...`).

    Raises:
        UnreadableSample: for a missing image, a format that is not in `FORMATS`, and any error of a decoder.

    Example:
        >>> read_image("photo.jpg").size
        (640, 480)
    """
    return _read(source, to_rgb)


def image_size(source: bytes | str | None) -> tuple[int, int]:
    """Return (width, height) in pixels of the result of `read_image`, from the header alone.

    Raises:
        UnreadableSample: if the header cannot be read.
    """
    return _read(source, _size_as_shown)


def _size_as_shown(image: PIL.Image.Image) -> tuple[int, int]:
    # Pillow has rotated a TIFF already, and decodes a whole PNG to look for EXIF data behind the pixels.
    is_known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
    is_rotated = is_known and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    return image.size[::-1] if is_rotated else image.size


def _read(source: bytes | str | None, use: Callable[[PIL.Image.Image], T]) -> T:
    if source is None:
        raise UnreadableSample("the image is missing")
    try:
        return _decode(source, use)
    except PIL.UnidentifiedImageError as error:  # its own message names an object in memory
        raise UnreadableSample(f"the image is in none of the formats {', '.join(COMMON_FORMATS)}, ...") from error
    except Exception as error:  # decoders raise almost any type on a corrupt file
        raise UnreadableSample(f"the image cannot be decoded: {error!r}") from error


def image_hash(source: bytes | str | None) -> bytes:
    """Hash (16 bytes) of an image as it is stored; nothing is decoded.

    Raises:
        UnreadableSample: the image is missing.
    """
    if source is None:
        raise UnreadableSample("the image is missing")
    with open_stored(source) as file:
        return hashlib.blake2b(file.read(), digest_size=16).digest()


def image_value(value: Any) -> bytes | str | None:
    """Return the bytes or the path in a cell of an image column: {"bytes", "path"}, bytes alone, or a path alone."""
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    return value if isinstance(value, (bytes, str)) else None


@dataclass(frozen=True)
class AllowedFiles:
    """Files that the cells of a data set may name. A data set from a stranger must not read other files.

    Args:
        folders: local folders; relative names are looked up in them.
        addresses: prefixes of addresses, such as `hf://datasets/me/photos`.
    """

    folders: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    def resolve(self, stored: bytes | str | None) -> bytes | str | None:
        """Return the path or address that a cell names; bytes are returned unchanged.

        Raises:
            UnreadableSample: if the file is outside the data set.
        """
        if not isinstance(stored, str):
            return stored
        path = stored.removeprefix("file://")
        if is_remote(path):
            *archives, address = path.split("::")
            is_allowed = address.startswith(self.addresses) if self.addresses else False
            if is_allowed and ".." not in address.split("/") and all(re.match(ARCHIVES, part) for part in archives):
                return path
        else:
            candidates = [
                os.path.normpath(os.path.join(folder, path))
                for folder in self.folders
                if _is_inside(os.path.join(folder, path), folder)
            ]
            if candidates:
                return next((file for file in candidates if os.path.exists(file)), candidates[0])
        raise UnreadableSample(
            f"the image {stored[:200]!r} is not inside its data set; cells may hold bytes or name files of the data "
            "set"
        )


NO_FILES = AllowedFiles()


def _is_inside(path: str, folder: str) -> bool:
    path = os.path.abspath(path)
    return any(
        os.path.commonpath([path, root]) == root for root in (os.path.abspath(folder), os.path.realpath(folder))
    )


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow and its plugins can read."""
    PIL.Image.init()
    for name in PLUGINS:
        with contextlib.suppress(ImportError):
            plugin = importlib.import_module(name)
            if name == "pillow_heif":  # pillow_jxl registers itself
                plugin.register_heif_opener()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


@functools.cache
def image_endings() -> frozenset[str]:
    """Endings of readable image files, in lower case and without the dot."""
    formats = image_formats()
    return frozenset(end[1:].lower() for end, kind in PIL.Image.registered_extensions().items() if kind in formats)


@functools.cache
def unreadable_endings() -> dict[str, str]:
    """Map the endings of image files that cannot be read here, in lower case, to the remedy."""
    return {ending: remedy for ending, remedy in REMEDIES.items() if ending not in image_endings()}
