"""Pictures that come from outside: reading them safely, and the one that links to the page show."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16 * 1024**2
MIN_EDITOR_SIDE = 512  # pixels; smaller pictures are enlarged for the mask brush


def open_picture(file: str | Path | BinaryIO) -> Image.Image:
    """Open an untrusted picture, and read all of it.

    Raises:
        ValueError: unless it is a whole picture in one of `FORMATS` with at most `MAX_PIXELS`.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        raise ValueError(f"This is not a picture that can be read; accepted: {', '.join(FORMATS)}.") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"The picture has {image.width} x {image.height} pixels; accepted: at most {MAX_PIXELS // 10**6} million."
        )
    try:
        image.load()
    except Exception:  # a damaged file raises many kinds of errors
        raise ValueError("The picture is damaged: it cannot be read to its end.") from None
    return image


def enlarge(image: Image.Image) -> Image.Image:
    """Return a picture with a side of at least `MIN_EDITOR_SIDE`, each pixel as a square of equal pixels."""
    factor = -(-MIN_EDITOR_SIDE // max(image.size))
    return image if factor <= 1 else image.resize([factor * side for side in image.size], Image.Resampling.NEAREST)


def share_image(files: Sequence[str]) -> bytes:
    """Return example pictures side by side, as the PNG of 1200 x 630 pixels that links to the page show."""
    sheet = Image.new("RGB", (1200, 630), "#312e81")
    side, gap = 280, 30
    for index, file in enumerate(files[:6]):
        picture = open_picture(file).convert("RGB")
        smooth = max(picture.size) > side
        picture = picture.resize((side, side), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
        column, row = index % 3, index // 3
        left = (1200 - 3 * side - 2 * gap) // 2 + column * (side + gap)
        sheet.paste(picture, (left, (630 - 2 * side - gap) // 2 + row * (side + gap)))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
