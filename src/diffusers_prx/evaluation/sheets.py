"""Labelled sheets of pictures: what was asked for, what was drawn, and the verdict."""

import textwrap
from pathlib import Path

import matplotlib.figure

from .scene_accuracy import GradedScene

RIGHT, WRONG = "#1a7f37", "#cf222e"


def scene_sheet(graded: list[GradedScene], title: str, path: Path, columns: int = 4) -> None:
    """A sheet of graded pictures, each under its prompt; a green frame is right, a red one is not."""
    rows = -(-len(graded) // columns)
    figure = matplotlib.figure.Figure(figsize=(2.6 * columns, 3.0 * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    for place, scene in enumerate(graded):
        axes = figure.add_subplot(rows, columns, place + 1, xticks=[], yticks=[])
        axes.imshow(scene.image, interpolation="nearest")
        verdict, colour = ("right", RIGHT) if scene.right else ("wrong", WRONG)
        axes.set_title(f"{textwrap.fill(scene.prompt, 44)}\n[{verdict}]", fontsize=6.5, color=colour)
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=3)
    figure.savefig(path, dpi=130)
