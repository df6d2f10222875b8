"""From the bytes of one picture to RGB, or the reason why not."""

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

# Formats that are read. Others that Pillow knows are of no use here, or start another program (EPS: Ghostscript).
FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "HEIF", "JXL", "JPEG2000", "TIFF", "GIF", "BMP", "DIB", "ICO", "PCX", "PPM", "QOI",
    "SGI", "TGA",
)  # fmt: skip
# Formats that a package adds to Pillow: the package to install by its module.
PLUGINS = {"pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin"}
# Endings of pictures that may not be readable, with what would make them so.
CONVERT = "convert them to PNG or JPEG"
FOREIGN_ENDINGS = {
    **dict.fromkeys(("heic", "heics", "heif", "heifs", "hif"), f"`pip install {PLUGINS['pillow_heif']}`"),
    "jxl": f"`pip install {PLUGINS['pillow_jxl']}`",
    "avif": "`pip install -U pillow`",
    **dict.fromkeys(
        ("ai", "arw", "cr2", "cr3", "dds", "dng", "emf", "eps", "exr", "hdr", "nef", "orf", "ps", "psd", "raf", "raw",
         "rw2", "svg", "wmf", "xcf"),
        CONVERT,
    ),
}  # fmt: skip

SRGB_ROUNDING = 2  # a profile that changes no color by more is sRGB, stored with fewer digits
ARCHIVES = r"(zip|tar|gzip|bz2|xz|lz4|zstd)://"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height change places


class UnreadableSample(Exception):
    """A sample whose image or caption cannot be read: it is skipped and counted."""


class UnfitSample(Exception):
    """A sample whose image would be enlarged or cropped too much: it is left out and counted."""


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as a viewer shows it: the first frame, turned as its EXIF data say, in sRGB if it has another ICC
    profile, on white where it is transparent, and with 16-bit gray scaled to 8 bits (Pillow's own conversion cuts it
    off at 255).

    Raises:
        ValueError: for pixels without a stated range (32-bit integers, floats).
    """
    kind, profile = image.format, image.info.get("icc_profile")  # turning an image forgets the first
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):  # "I" with older Pillow
        image = PIL.Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no stated range")
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
    """The picture with the colors of its ICC profile converted to sRGB, as viewers do (perceptual intent). A broken
    profile, one of another color model, and one that is sRGB within rounding change nothing."""
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
    """Open what a source stores of an image: its bytes, a regular file, or an address that fsspec opens (`hf://...`).

    Raises:
        OSError: if there is no such file, or it is not a regular one.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    source = source.removeprefix("file://")
    return fsspec.open(source, "rb").open() if is_remote(source) else open_regular(source)


def _decode(source: bytes | str, use: Callable[[PIL.Image.Image], T]) -> T:
    """Open a picture and return `use(picture)`. A PNG whose text is larger than Pillow reads is opened without it."""
    with open_stored(source) as file:
        try:
            with PIL.Image.open(file, formats=image_formats()) as opened:
                return use(opened)
        except ValueError:
            file.seek(0)
            plain = _without_text(file.read())
            if plain is None:
                raise
    with PIL.Image.open(io.BytesIO(plain), formats=["PNG"]) as opened:
        return use(opened)


def _without_text(data: bytes) -> bytes | None:
    """A PNG without its text chunks, but those that may hold its orientation; None if it is no PNG or has none."""
    if not data.startswith(PNG_SIGNATURE):
        return None
    kept, place, found = [PNG_SIGNATURE], len(PNG_SIGNATURE), False
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind, keyword = data[place + 4 : place + 8], data[place + 8 : place + 88].partition(b"\0")[0]
        if kind in (b"tEXt", b"zTXt", b"iTXt") and not keyword.startswith(PNG_ORIENTATION):
            found = True
        else:
            kept.append(data[place:end])
        place = end
    return b"".join(kept) if found else None


def read_image(source: bytes | str | None) -> PIL.Image.Image:
    """Decode a picture to RGB.

    Args:
        source: bytes of a file, its path, or an address that fsspec opens (`hf://...`).

    Raises:
        UnreadableSample: for any error of a decoder, and for a format that is not in `FORMATS`. A decompression bomb
            is refused before it is unpacked: from twice `PIL.Image.MAX_IMAGE_PIXELS` on (179 million pixels), with
            their number in the message.
    """
    return _read(source, to_rgb)


def image_size(source: bytes | str | None) -> tuple[int, int]:
    """(width, height) in pixels of what `read_image` gives, from the header alone.

    Raises:
        UnreadableSample: if the header cannot be read.
    """
    return _read(source, _shown_size)


def _shown_size(opened: PIL.Image.Image) -> tuple[int, int]:
    # Pillow has turned a TIFF already, and decodes a whole PNG to look for EXIF data behind the pixels.
    known = opened.format != "TIFF" and (opened.format != "PNG" or "exif" in opened.info)
    turned = known and opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return opened.size[::-1] if turned else opened.size


def _read(source: bytes | str | None, use: Callable[[PIL.Image.Image], T]) -> T:
    if source is None:
        raise UnreadableSample("no image")
    try:
        return _decode(source, use)
    except PIL.UnidentifiedImageError as error:  # its own message names an object in memory
        kinds = ", ".join(FORMATS[:3])
        raise UnreadableSample(f"no readable image: none of the formats that are read ({kinds}, ...)") from error
    except Exception as error:  # decoders raise nearly anything on a corrupt file
        raise UnreadableSample(f"no readable image: {error!r}") from error


def image_hash(source: bytes | str | None) -> bytes:
    """A hash (16 bytes) of a picture as it is stored.

    Raises:
        UnreadableSample: if there is none.
    """
    if source is None:
        raise UnreadableSample("no image")
    with open_stored(source) as file:
        return hashlib.blake2b(file.read(), digest_size=16).digest()


def image_value(value: Any) -> bytes | str | None:
    """The bytes or the path in a cell of an image column: {"bytes", "path"}, bytes alone, or a path alone."""
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    return value if isinstance(value, (bytes, str)) else None


@dataclass(frozen=True)
class Scope:
    """Places of the files of a data set: the only ones that its cells may name, whoever wrote them.

    Args:
        folders: folders of this machine; relative names are looked up in them.
        addresses: beginnings of addresses, as `hf://datasets/me/photos`.
    """

    folders: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    def locate(self, stored: bytes | str | None) -> bytes | str | None:
        """The path or address that a cell names; bytes as they are.

        Raises:
            UnreadableSample: if it names something outside of the data set.
        """
        if not isinstance(stored, str):
            return stored
        path = stored.removeprefix("file://")
        if is_remote(path):
            *outer, inner = path.split("::")
            inside = inner.startswith(self.addresses) if self.addresses else False
            if inside and ".." not in inner.split("/") and all(re.match(ARCHIVES, part) for part in outer):
                return path
        else:
            found = [
                os.path.normpath(os.path.join(folder, path))
                for folder in self.folders
                if _is_inside(os.path.join(folder, path), folder)
            ]
            if found:
                return next((file for file in found if os.path.exists(file)), found[0])
        raise UnreadableSample(
            f"an image {stored[:200]!r} that is not inside of its data set: cells may hold bytes, or name files of "
            "the data set"
        )


NOWHERE = Scope()


def _is_inside(path: str, folder: str) -> bool:
    path = os.path.abspath(path)
    return any(
        os.path.commonpath([path, root]) == root for root in (os.path.abspath(folder), os.path.realpath(folder))
    )


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Names of the formats that are read, as far as this Pillow and its plugins can."""
    PIL.Image.init()
    for name in PLUGINS:
        with contextlib.suppress(ImportError):
            plugin = importlib.import_module(name)
            if name == "pillow_heif":  # the other one registers itself
                plugin.register_heif_opener()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


@functools.cache
def image_endings() -> frozenset[str]:
    """Endings of files that are read as pictures, in lower case and without the dot."""
    formats = image_formats()
    return frozenset(end[1:].lower() for end, kind in PIL.Image.registered_extensions().items() if kind in formats)


@functools.cache
def unreadable_endings() -> dict[str, str]:
    """Endings of pictures that cannot be read here, in lower case, with what would make them readable."""
    return {ending: remedy for ending, remedy in FOREIGN_ENDINGS.items() if ending not in image_endings()}
