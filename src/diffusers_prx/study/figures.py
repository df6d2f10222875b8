"""Figures of a study's report: learning curves, differences with intervals, and validation images."""

from pathlib import Path

import matplotlib.figure
import numpy as np
import PIL.Image
import PIL.ImageDraw

from ..evaluation.image_grids import GRID_COLUMNS
from .results import FindingResult, StudyResults

# pixels, in the figure of validation images
TILE_SIZE, LABEL_WIDTH, HEADER_HEIGHT, LINE_GAP = 64, 180, 18, 2
ARM_COLOR, REFERENCE_COLOR, NEUTRAL_COLOR = "#0969da", "#8c959f", "#57606a"
VERDICT_COLORS = {"agrees": "#1a7f37", "better": "#1a7f37", "disagrees": "#cf222e", "worse": "#cf222e"}


def draw_curves(results: StudyResults, path: Path) -> bool:
    """Draw the validation loss of arm and reference for every finding with comparable losses.

    Returns:
        True if there was anything to draw.
    """
    shown = [
        result
        for result in results.findings
        if results.has_comparable_loss(result.finding) and results.curves_of(result.finding.arm)
    ]
    if not shown:
        return False
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = matplotlib.figure.Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
    for index, result in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1, yscale="log")
        axes.set_title(result.name, fontsize=9, parse_math=False)
        axes.tick_params(labelsize=7, which="both")
        axes.grid(alpha=0.3)
        for arm, color in ((result.finding.reference, REFERENCE_COLOR), (result.finding.arm, ARM_COLOR)):
            curves = list(results.curves_of(arm).values())
            for curve in curves:
                axes.plot(*zip(*curve), color=color, lw=0.6, alpha=0.6)
            complete = [curve for curve in curves if len(curve) == max(map(len, curves))]
            if complete:
                steps = [step for step, _ in complete[0]]
                means = np.mean([[loss for _, loss in curve] for curve in complete], axis=0)
                axes.plot(steps, means, color=color, label=arm)
        for text in axes.legend(fontsize=7, frameon=False).get_texts():
            text.set_parse_math(False)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("loss on held-out images (logarithmic)", fontsize=9)
    figure.savefig(path, dpi=90)
    return True


def draw_differences(results: StudyResults, path: Path) -> bool:
    """Draw every difference of a primary metric with its interval, in one panel per metric.

    Returns:
        True if there was anything to draw.
    """
    panels: dict[str, list[FindingResult]] = {}
    for result in results.findings:
        if result.difference is not None:
            panels.setdefault(result.label, []).append(result)
    if not panels:
        return False
    heights = [len(panel) + 1 for panel in panels.values()]
    figure = matplotlib.figure.Figure(figsize=(8, 0.3 * sum(heights) + 0.7 * len(panels)), layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for index, (label, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[index])
        axes.axvline(0, color=REFERENCE_COLOR, lw=1)
        for y, result in enumerate(reversed(panel)):
            difference = result.difference
            assert difference is not None
            color = VERDICT_COLORS.get(result.verdict, NEUTRAL_COLOR)
            if difference.low is not None and difference.high is not None:
                axes.plot([difference.low, difference.high], [y, y], color=color, lw=2)
            axes.plot(difference.mean, y, "o", color=color, ms=5)
            axes.plot(list(difference.per_seed.values()), [y] * difference.n, "|", color=color, ms=7, alpha=0.6)
        axes.set_yticks(range(len(panel)), [result.name for result in reversed(panel)], fontsize=8, parse_math=False)
        axes.set_ylim(-0.7, len(panel) - 0.3)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(f"difference of {label}; {panel[0].better} is better", fontsize=9, parse_math=False)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=90)
    return True


def draw_samples(results: StudyResults, path: Path) -> dict[str, list[str]]:
    """Draw one line of validation images per arm, for the study's first seed.

    Returns:
        arm -> prompts of its line; empty if there was nothing to draw.
    """
    seed = results.study.seeds[0]
    prompts: dict[str, list[str]] = {}
    lines: dict[str, PIL.Image.Image] = {}
    for arm in results.study.arms:
        file = results.report_dir / "runs" / arm / f"seed_{seed}.png"
        record = results.records.get((arm, seed))
        if file.is_file() and record is not None and record["config"]["validation_prompts"]:
            all_prompts = record["config"]["validation_prompts"]
            prompts[arm] = all_prompts[:GRID_COLUMNS]
            with PIL.Image.open(file) as grid:
                first_row = (0, 0, grid.width, grid.height // -(-len(all_prompts) // GRID_COLUMNS))
                lines[arm] = grid.convert("RGB").crop(first_row)
    if not lines:
        return {}
    columns, step = max(map(len, prompts.values())), TILE_SIZE + LINE_GAP
    sheet = PIL.Image.new(
        "RGB", (LABEL_WIDTH + columns * TILE_SIZE, HEADER_HEIGHT + len(lines) * step), REFERENCE_COLOR
    )
    draw = PIL.ImageDraw.Draw(sheet)
    draw.rectangle((0, 0, sheet.width, HEADER_HEIGHT - LINE_GAP), fill="white")
    draw.rectangle((0, 0, LABEL_WIDTH - LINE_GAP, sheet.height), fill="white")
    for index, (arm, line) in enumerate(lines.items()):
        top = HEADER_HEIGHT + index * step
        note = "" if prompts[arm] == prompts[next(iter(lines))] else " (own prompts)"
        draw.text((4, top + TILE_SIZE // 2 - 6), arm + note, fill="black")
        size = (TILE_SIZE * len(prompts[arm]), TILE_SIZE)
        sheet.paste(line.resize(size, PIL.Image.Resampling.NEAREST), (LABEL_WIDTH, top))
    for column in range(columns):
        left = LABEL_WIDTH + column * TILE_SIZE
        draw.text((left + TILE_SIZE // 2 - 3, 3), str(column + 1), fill="black")
        draw.line((left, HEADER_HEIGHT, left, sheet.height), fill=REFERENCE_COLOR)  # separates images on white
    sheet.quantize(256).save(path, optimize=True)
    return prompts
