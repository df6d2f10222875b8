"""Image files and tars for tests."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image

COLORS = [(250, 10, 20), (10, 240, 30), (20, 30, 230), (200, 200, 10)]


def encode(image: PIL.Image.Image, kind: str = "png", **options) -> bytes:
    """Encode an image."""
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def plain_png(color: tuple[int, int, int], size: tuple[int, int] = (24, 16)) -> bytes:
    """Encode an image of one color; `size` is (width, height)."""
    return encode(PIL.Image.new("RGB", size, color))


def noise(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    """Generate an RGB image of random pixels."""
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], mode: str = "w", **options) -> str:
    """Write (name, content) pairs to a tar, and return its path."""
    with tarfile.open(path, mode, **options) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)
