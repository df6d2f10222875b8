"""Output of an evaluation: report.json, a Markdown table, and sheets of images."""

import json
from pathlib import Path
from typing import Any

from .emoji_accuracy import EMOJI_SHARES, TOP_SHARE
from .evaluate import NUM_SHOWN, Evaluation
from .image_grids import graded_sheet, pair_sheet

REPORT_JSON, REPORT_MARKDOWN = "report.json", "report.md"
SCENES_SHEET, EMOJI_SHEET, PAIRS_SHEET = "samples.png", "emoji.png", "comparison.png"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(interval: list[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def markdown_table(report: dict[str, Any]) -> str:
    """Return the scores of a report as a Markdown table, followed by the settings that affect them.

    Args:
        report: report of `evaluate.Evaluation`.
    """
    rows = [_row("metric", "value", "95% interval", "images", "better"), _row(*["---"] * 5)]
    if "scene_accuracy" in report:
        for name in ("scene_accuracy", "scene_accuracy_novel"):
            interval = _interval(report[f"{name}_interval"])
            rows.append(_row(name, f"{report[name]:.4f}", interval, str(report["num_prompts"]), "higher"))
    for group, graded in report.get("emoji_accuracy", {}).items():
        rows += _emoji_rows(group, graded)
    for name, found in report.get("metrics", {}).items():
        images = str(found["num_images"])
        images += f" and {found['num_reference']} of the reference" if "num_reference" in found else ""
        better = "higher" if found["higher_is_better"] else "lower"
        rows.append(_row(name, f"{found['value']:.5g}", _interval(found["interval"]), images, better))
        if "unbiased_value" in found:
            interval = _interval(found["unbiased_interval"])
            rows.append(_row(f"{name}, unbiased", f"{found['unbiased_value']:.5g}", interval, images, better))
    made = report["evaluation"]
    drawn = made["drawn"]
    notes = [
        f"Model: `{made['model']}`, {drawn['pipeline']}, {drawn['pipeline_fingerprint']}",
        f"Pictures: {drawn['resolution']} pixels, {drawn['num_inference_steps']} steps, guidance "
        f"{drawn['guidance_scale']}, seed {drawn['seed']}, batches of {drawn['batch_size']}",
    ]
    if "reference" in report:
        reference = report["reference"]
        note = f"Reference: `{reference['name']}`"
        if "content_hash" in reference:
            note += (
                f", {reference['images']} images ({reference['unreadable_images']} unreadable), "
                f"{reference['fitting']}, {reference['content_hash']}"
            )
        notes.append(note)
    for name, found in report.get("metrics", {}).items():
        encoder = found["encoder"]
        note = f"{name}: `{encoder['source']}`, {encoder['resizing']}, {encoder['fingerprint']}"
        notes.append(note + (f"; {found['captions_cut']} captions truncated" if "captions_cut" in found else ""))
    if made["compat"] is not None:
        notes.append(f"Computed like {made['compat']}'s public code: not comparable with other numbers")
    if made["bootstrap"]:
        notes.append(f"Intervals: over images ({made['bootstrap']} resamples), not over training runs")
    notes.append("Versions: " + ", ".join(f"{name} {number}" for name, number in made["versions"].items()))
    return "\n".join([*rows, "", *(f"- {note}" for note in notes), ""])


def _emoji_rows(group: str, graded: dict[str, Any]) -> list[str]:
    """Rows of the table for one group of emoji prompts."""
    rows = []
    for network, found in graded["networks"].items():
        for name in EMOJI_SHARES:
            label = (
                f"emoji {group}, {name} by {network} (real pictures {found['real'][name]:.4f}, "
                f"shuffled prompts {found['shuffled'][name]:.4f})"
            )
            interval = _interval(found[f"{name}_interval"])
            rows.append(_row(label, f"{found[name]:.4f}", interval, str(graded["num_drawings"]), "higher"))
    if "ground" in graded:
        interval = _interval(graded["ground_interval"])
        label = f"emoji {group}, ground"
        rows.append(_row(label, f"{graded['ground']:.4f}", interval, str(graded["num_prompts"]), "higher"))
    return rows


def write_reports(evaluation: Evaluation, output_dir: Path) -> None:
    """Write report.json, report.md, samples.png (scenes), emoji.png (emoji) and comparison.png (generated and
    reference images)."""
    report = evaluation.report
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / REPORT_JSON).write_text(json.dumps(report, indent=2) + "\n")
    (output_dir / REPORT_MARKDOWN).write_text(markdown_table(report))
    graded, novel = evaluation.scenes
    if graded:
        half = NUM_SHOWN
        title = (
            f"first {half} held-out and first {half} novel prompts; of {report['num_prompts']} each, "
            f"{report['scene_accuracy']:.3f} and {report['scene_accuracy_novel']:.3f} are correct"
        )
        graded_sheet(graded[:half] + novel[:half], title, output_dir / SCENES_SHEET)
    if evaluation.emoji:
        first = [emoji for group in evaluation.emoji.values() for emoji in group[:NUM_SHOWN]]
        scores = ", ".join(
            f"{name} {next(iter(found['networks'].values()))[TOP_SHARE]:.3f}"
            for name, found in report["emoji_accuracy"].items()
        )
        title = f"first {NUM_SHOWN} of each group; {TOP_SHARE}: {scores}"
        graded_sheet(first, title, output_dir / EMOJI_SHEET)
    if evaluation.pairs:
        scores = ", ".join(f"{name} {found['value']:.4g}" for name, found in report["metrics"].items())
        pair_sheet(evaluation.pairs, scores, output_dir / PAIRS_SHEET)
