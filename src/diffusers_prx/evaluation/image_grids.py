"""Sheets of images: labeled sheets of scenes and pairs, and plain grids."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
import PIL.Image

from .emoji_accuracy import GradedEmoji
from .scene_accuracy import GradedScene

RIGHT, WRONG = "#1a7f37", "#cf222e"
GRID_COLUMNS = 8


def image_grid(images: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """Return images of one size as a grid with `GRID_COLUMNS` columns."""
    width, height = images[0].size
    columns = min(GRID_COLUMNS, len(images))
    grid = PIL.Image.new("RGB", (width * columns, height * -(-len(images) // columns)))
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid


def graded_sheet(graded: Sequence[GradedScene | GradedEmoji], title: str, path: Path, columns: int = 4) -> None:
    """Draw a sheet of graded images with their prompts.

    A green frame means correct, a red one wrong. The label under a wrong image says what was read instead.
    """
    rows = -(-len(graded) // columns)
    figure = matplotlib.figure.Figure(figsize=(2.6 * columns, 3.0 * rows + 0.5), layout="constrained")
    figure.suptitle(textwrap.fill(title, 24 * columns), parse_math=False)
    for index, scene in enumerate(graded):
        axes = figure.add_subplot(rows, columns, index + 1, xticks=[], yticks=[])
        axes.imshow(scene.image, interpolation="nearest")
        verdict, color = ("right", RIGHT) if scene.right else ("wrong", WRONG)
        text = f"{textwrap.fill(scene.prompt, 44)}\n[{verdict}]"
        axes.set_title(text, fontsize=6.5, color=color, parse_math=False)
        if not scene.right:
            axes.set_xlabel(
                textwrap.fill(f"read: {scene.read_instead}", 44), fontsize=6.5, color=color, parse_math=False
            )
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=3)
    figure.savefig(path, dpi=130)


def prompt_sheet(drawn: Sequence[tuple[str, PIL.Image.Image]], path: Path, columns: int = 6) -> None:
    """Draw a sheet of images with their prompts under them.

    Args:
        drawn: (prompt, image).
        path: PNG file.
        columns: images in a row.
    """
    rows = -(-len(drawn) // columns)
    figure = matplotlib.figure.Figure(figsize=(1.5 * columns, 1.75 * rows), layout="constrained")
    for index, (prompt, image) in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, index + 1, xticks=[], yticks=[])
        axes.imshow(image, interpolation="nearest")
        axes.set_xlabel(textwrap.fill(prompt, 26), fontsize=7, parse_math=False)
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)


def pair_sheet(pairs: Sequence[tuple[str, np.ndarray | None, np.ndarray]], title: str, path: Path) -> None:
    """Draw a sheet of prompts with their reference and generated images.

    Args:
        pairs: (prompt, reference, generated), images uint8 (H, W, 3); unreadable references are None.
        title: title of the sheet.
        path: PNG file.
    """
    columns = len(pairs)
    figure = matplotlib.figure.Figure(figsize=(2.1 * columns, 5.2), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for column, (prompt, *images) in enumerate(pairs):
        for row, (label, image) in enumerate(zip(("reference", "generated"), images)):
            axes = figure.add_subplot(2, columns, row * columns + column + 1, xticks=[], yticks=[])
            if image is not None:
                axes.imshow(image, interpolation="nearest")
            if row == 0:
                axes.set_title(textwrap.fill(textwrap.shorten(prompt, 150), 34), fontsize=6.5, parse_math=False)
            if column == 0:
                axes.set_ylabel(label, fontsize=8)
    figure.savefig(path, dpi=130)
