"""A tiny emoji data set of the layout that `training/tools/fetch_emoji.py` writes: every drawing is of its own."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

COLORS = {"red": (210, 30, 40), "green": (40, 150, 60), "blue": (40, 70, 210), "purple": (130, 40, 160)}
SHAPES = ("disc", "box", "bar")
NAMES = tuple(f"{color}-{shape}" for color, shape in itertools.product(COLORS, SHAPES))
STYLES = ("noto", "twemoji", "fluent-3d")
UNSEEN = "purple-bar"
TONED = "red-disc-dark-skin-tone"


def split_of(name: str, style: str) -> str:
    """One name is unseen, and every style lacks another one of each three names."""
    if name == UNSEEN:
        return "unseen_names"
    return "heldout_pairs" if NAMES.index(name) % 4 == STYLES.index(style) else "train"


def draw(name: str, style: str, size: int) -> Image.Image:
    """A colored shape with an outline of the style's shade, transparent around it."""
    color, shape = name.split("-")[:2]
    big = Image.new("RGBA", (4 * size, 4 * size), (0, 0, 0, 0))
    rim = {"noto": (20, 20, 20), "twemoji": (240, 200, 60), "fluent-3d": (150, 220, 230)}[style]
    low, high = 0.4 * size, 3.6 * size
    box = (low, 1.4 * size, high, 2.6 * size) if shape == "bar" else (low, low, high, high)
    pen = ImageDraw.Draw(big)
    (pen.ellipse if shape == "disc" else pen.rectangle)(box, COLORS[color], rim, round(0.35 * size))
    return big.resize((size, size), Image.Resampling.BOX)


def save_emoji(folder: Path, sizes: Sequence[int] = (32,), names: Sequence[str] = NAMES) -> Path:
    """Write the data set: the names in all styles, and one drawing that differs from another by its skin tone."""
    pairs = list(itertools.product(names, STYLES))
    for size in sizes:
        (folder / str(size)).mkdir(parents=True)
        for split in ("train", "heldout_pairs", "unseen_names", "skin_tones"):
            own = [(name, style, "") for name, style in pairs if split_of(name, style) == split]
            own += [(TONED, "noto", "dark")] if split in ("skin_tones", "unseen_names") else []
            rows = []
            for name, style, tone in own:
                draw(name, style, size).save(png := io.BytesIO(), "PNG")
                label = name.replace("-", " ")
                rows.append(
                    {
                        "image": {"bytes": png.getvalue(), "path": f"{style}-{name}.png"},
                        "name": name,
                        "style": style,
                        "group": "shapes",
                        "skin_tone": tone,
                        "label": label,
                        "text": f"{label} in the {style} style",
                        "long": f"An emoji of a {label} in the {style} style.",
                    }
                )
            pq.write_table(pa.Table.from_pylist(rows), folder / str(size) / f"{split}-00000-of-00001.parquet")
    return folder


def found_at(image: Image.Image, box: tuple[int, int, int]) -> np.ndarray:
    """The pixels (side, side, 3) in a box (top, left, side) of an image."""
    top, left, side = box
    return np.asarray(image)[top : top + side, left : left + side]
