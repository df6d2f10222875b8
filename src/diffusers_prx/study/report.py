"""The report of a study, from the files that its runs left: Markdown, one HTML file, small pictures."""

import base64
import html
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import PIL.Image
import PIL.ImageDraw
from markdown_it import MarkdownIt

from ..config.training_config import warmup_of
from ..evaluation.image_grids import pictures_of_grid
from .spec import (
    PLAN_FILE,
    TRAINING,
    VALIDATION_LOSS,
    Finding,
    Study,
    describe_changes,
    plan_text,
    read_record,
    runs_before_finding,
    scores,
)
from .statistics import (
    MIN_SEEDS,
    Difference,
    equal_time_steps,
    holm,
    mean_ratio,
    paired_difference,
    seeds_needed,
    value_at,
    verdict,
)

THROUGHPUT_FILE = "throughput.json"
TILE, LABEL, HEAD = 64, 180, 18  # pixels, of the sheet of pictures
ARM_COLOR, REFERENCE_COLOR = "#0969da", "#8c959f"
# what every run sets for itself
OF_A_RUN = ("seed", "output_dir", "resume_from_checkpoint", "pretrained_model_name_or_path")

Curve = list[tuple[float, float]]


class Page:
    """A report as Markdown, part after part, and at the end as one HTML file with its pictures inside."""

    def __init__(self, title: str):
        self.title = title
        self.markdown = [f"# {title}\n"]

    def heading(self, level: int, text: str) -> None:
        self.markdown.append(f"{'#' * level} {text}\n")

    def text(self, text: str) -> None:
        self.markdown.append(f"{text}\n")

    def items(self, items: list[str], numbered: bool = False) -> None:
        self.markdown.append("".join(f"{f'{n}.' if numbered else '-'} {item}\n" for n, item in enumerate(items, 1)))

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
        self.markdown.append("".join(f"| {' | '.join(line)} |\n" for line in lines))

    def picture(self, path: Path, alt: str) -> None:
        """Add a PNG that is in a subfolder of the report's folder."""
        self.markdown.append(f"![{alt}]({path.parent.name}/{path.name})\n")

    def code(self, text: str) -> None:
        self.markdown.append(f"```\n{text.rstrip()}\n```\n")

    def write(self, folder: Path, name: str) -> Path:
        style = (
            "body{font:16px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#1f2328}"
            "table{border-collapse:collapse;font-size:14px}th,td{border:1px solid #d1d9e0;padding:4px 8px;"
            "text-align:left;vertical-align:top}th{background:#f6f8fa}table{display:block;overflow-x:auto}img{max-width:100%}"
            "pre{overflow-x:auto;font-size:12px;background:#f6f8fa;padding:1em;white-space:pre-wrap}"
        )
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{style}</style>'
        text = "\n".join(self.markdown)
        # captions and names may hold anything: HTML in them is text
        parser = MarkdownIt("commonmark", {"html": False}).enable("table")
        body = re.sub(
            r'src="([^"]+\.png)"', lambda found: f'src="{_data_url(folder / found[1])}"', parser.render(text)
        )
        (folder / f"{name}.md").write_text(text)
        (folder / f"{name}.html").write_text(f"<!doctype html>{head}\n{body}")
        return folder / f"{name}.md"


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


@dataclass
class Row:
    """Everything about one finding."""

    name: str
    finding: Finding
    better: str
    label: str
    arm: dict[int, float]
    reference: dict[int, float]
    difference: Difference | None
    verdict: str
    failures: list[str]
    ratio: tuple[float, float | None, float | None] | None
    equal_time: Difference | None
    equal_time_steps: tuple[float, float] | None


class Results:
    """The records of a study, and what is computed from them."""

    def __init__(self, study: Study, report_dir: Path):
        self.study, self.report_dir = study, report_dir
        found = {(arm, seed): read_record(report_dir, arm, seed) for arm in study.arms for seed in study.seeds}
        self.records = {key: record for key, record in found.items() if record is not None}
        throughput = report_dir / THROUGHPUT_FILE
        self.throughput = json.loads(throughput.read_text()) if throughput.is_file() else []
        self.rows = [self.row(name, finding) for name, finding in study.findings.items()]
        p_values = {row.name: row.difference.p for row in self.rows if row.difference is not None and decidable(row)}
        self.adjusted = holm({name: p for name, p in p_values.items() if p is not None})

    def of(self, arm: str) -> dict[int, dict[str, Any]]:
        """The records of an arm by seed."""
        return {seed: record for (name, seed), record in self.records.items() if name == arm}

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """A metric of an arm's runs that have it, by seed."""
        evaluation, key = self.study.split_metric(metric)
        found = {seed: scores(self.study, record, evaluation) for seed, record in self.of(arm).items()}
        return {seed: values[key] for seed, values in found.items() if key in values}

    def row(self, name: str, finding: Finding) -> Row:
        metric, reference_metric = self.study.metrics_of(finding)
        key = self.study.split_metric(metric)[1]
        definition = self.study.metrics[key]
        arm, reference = self.values(finding.arm, metric), self.values(finding.reference, reference_metric)
        difference = paired_difference(arm, reference)
        failures = [
            f"{which}, seed {seed}: {record['failures'][-1]['message']}"
            for which in (finding.arm, finding.reference)
            for seed, record in self.of(which).items()
            if record["status"] == "failed"
        ]
        said = verdict(difference, definition.better, finding.expected)
        if difference is None and failures:
            said = "failed"
        ratio = self.ratio(finding)
        return Row(
            name, finding, definition.better, definition.label or key, arm, reference, difference, said, failures,
            ratio, *self.at_equal_time(finding, sorted(set(arm) & set(reference)), ratio),
        )  # fmt: skip

    def ratio(self, finding: Finding) -> tuple[float, float | None, float | None] | None:
        """Steps per second of the arm over those of the reference, from the pairs that were timed in turns: seconds of
        whole runs, hours apart, tell more about what else the machine did (once, 2.1 for a change that costs time)."""
        pairs = [m for m in self.throughput if (m["arm"], m["reference"]) == (finding.arm, finding.reference)]
        return mean_ratio([pair["seconds_reference"] / pair["seconds_arm"] for pair in pairs]) if pairs else None

    def curve(self, record: dict[str, Any]) -> Curve:
        return [(step, loss) for step, loss in record.get("curve", [])]

    def comparable(self, finding: Finding) -> bool:
        return all(self.study.arms[arm].comparable_loss for arm in (finding.arm, finding.reference))

    def at_equal_time(
        self, finding: Finding, seeds: list[int], ratio: tuple[float, float | None, float | None] | None
    ) -> tuple[Difference | None, tuple[float, float] | None]:
        """The difference of the validation losses after the same time, and the steps of arm and reference then.

        While the learning rate is constant: a run that stops earlier would have decayed its rate earlier, so that of
        two decayed curves only the ends mean something.
        """
        if not seeds or ratio is None or not self.comparable(finding):
            return None, None
        arms, references = self.of(finding.arm), self.of(finding.reference)
        last_arm = min(constant_until(arms[seed]) for seed in seeds)
        last_reference = min(constant_until(references[seed]) for seed in seeds)
        steps = equal_time_steps(1 / ratio[0], 1.0, last_arm, last_reference)
        found = [
            {seed: value_at(self.curve(records[seed]), step) for seed in seeds}
            for records, step in ((arms, steps[0]), (references, steps[1]))
        ]
        known = [{seed: value for seed, value in values.items() if value is not None} for values in found]
        return paired_difference(*known), steps


def decidable(row: Row) -> bool:
    return row.difference is not None and row.difference.n >= MIN_SEEDS


def constant_until(record: dict[str, Any]) -> int:
    """Return the step at which the decay of the learning rate begins."""
    cfg = record["config"]
    steps, decay = cfg["max_train_steps"], cfg["lr_decay_steps"]
    if cfg["lr_scheduler"] == "constant":
        return steps
    return warmup_of(cfg["lr_warmup_steps"], None, steps) if decay is None else steps - decay


# --- words and numbers


def mean_text(values: dict[int, float]) -> str:
    return f"{np.mean(list(values.values())):.4g}" if values else ""


def signed(difference: Difference | None) -> str:
    """`+0.031 [-0.010, +0.072]`."""
    if difference is None:
        return ""
    if difference.low is None:
        return f"{difference.mean:+.3g} [one seed: no interval]"
    return f"{difference.mean:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]"


def times(ratio: tuple[float, float | None, float | None] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio[0]:.2f}" + ("" if ratio[1] is None else f" [{ratio[1]:.2f}, {ratio[2]:.2f}]")


def published(finding: Finding) -> str:
    """`FID 18.2 → 14.64 (-3.56)`; of rates their ratio."""
    parts = []
    for name, (without, with_it) in finding.published.items():
        if without is None or with_it is None:
            parts.append(f"{name}: {with_it if without is None else without}")
        else:
            change = f"{with_it / without:.2f}x" if name.endswith("/s") else f"{with_it - without:+.2f}"
            parts.append(f"{name} {without:g} → {with_it:g} ({change})")
    return "; ".join(parts) or "no figure"


def published_sign(finding: Finding) -> str:
    """What the first published figure says of a change; all that we know of are better when they are lower."""
    for name, (without, with_it) in finding.published.items():
        if without is not None and with_it is not None and without != with_it and not name.endswith("/s"):
            return f"{name} {'better' if with_it < without else 'worse'}"
    return "no figure"


def metric_name(study: Study, metric: str) -> str:
    """A metric as the report names it: its label, and in brackets the evaluation that it is of."""
    evaluation, key = study.split_metric(metric)
    return f"{study.metrics[key].label or key} ({evaluation})"


def equal_time_text(results: Results, row: Row) -> str:
    """The difference of the held-out losses after the same time, or why there is none."""
    if not results.comparable(row.finding):
        return "not comparable"
    if row.ratio is None:
        return "not timed"
    return signed(row.equal_time) or "no curves"


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def settings_that_differ(arm: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """`name`: of the reference → of the arm; inside mappings by key. Of settings that the code of both runs knew."""
    found = []
    for name in arm:
        if name not in reference or arm[name] == reference[name] or name in OF_A_RUN:
            continue
        old, new = reference[name], arm[name]
        if isinstance(old, dict) and isinstance(new, dict) and old and new:
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            found += [f"`{name}.{key}`: {short(old.get(key))} → {short(new.get(key))}" for key in keys]
        else:
            found.append(f"`{name}`: {short(old)} → {short(new)}")
    return found


def why_undecided(row: Row) -> str:
    """In words, what an interval that contains zero leaves open."""
    difference = row.difference
    if difference is None or difference.low is None or difference.high is None:
        return ""
    half = (difference.high - difference.low) / 2
    needed = seeds_needed(difference)
    more = (
        f"If mean and spread stayed as they are, it would take about {needed} seeds."
        if needed is not None
        else "No number of seeds up to 1000 would decide a difference as small as this one."
    )
    return (
        f"The interval reaches {half:.2g} to either side, so that only a difference beyond that would have been seen; "
        f"what was measured is {difference.mean:+.2g}. {more} {row.finding.at_this_size}".rstrip()
    )


# --- pictures


def curves_picture(results: Results, path: Path) -> bool:
    """The validation loss of arm and reference of every finding whose losses can be compared; False: there is none."""
    rows = [
        row
        for row in results.rows
        if results.comparable(row.finding)
        and any(record.get("curve") for record in results.of(row.finding.arm).values())
    ]
    if not rows:
        return False
    columns = min(4, len(rows))
    height = -(-len(rows) // columns)
    figure = matplotlib.figure.Figure(figsize=(3.4 * columns, 2.5 * height), layout="constrained")
    for place, row in enumerate(rows):
        axes = figure.add_subplot(height, columns, place + 1, yscale="log")
        axes.set_title(row.name, fontsize=9, parse_math=False)
        axes.tick_params(labelsize=7, which="both")
        axes.grid(alpha=0.3)
        for arm, color in ((row.finding.reference, REFERENCE_COLOR), (row.finding.arm, ARM_COLOR)):
            curves = [results.curve(record) for record in results.of(arm).values() if record.get("curve")]
            for curve in curves:
                axes.plot(*zip(*curve), color=color, lw=0.6, alpha=0.6)
            same = [curve for curve in curves if len(curve) == max(map(len, curves))]
            if same:
                axes.plot(
                    [s for s, _ in same[0]], np.mean([[v for _, v in c] for c in same], 0), color=color, label=arm
                )
        for text in axes.legend(fontsize=7, frameon=False).get_texts():
            text.set_parse_math(False)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("loss on held-out images (logarithmic)", fontsize=9)
    figure.savefig(path, dpi=90)
    return True


def differences_picture(results: Results, path: Path) -> bool:
    """Every difference of a primary metric with its interval, one panel per metric; False: there is none."""
    panels: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.difference is not None:
            panels.setdefault(row.label, []).append(row)
    if not panels:
        return False
    heights = [len(rows) + 1 for rows in panels.values()]
    figure = matplotlib.figure.Figure(figsize=(8, 0.3 * sum(heights) + 0.7 * len(panels)), layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    colors = {"agrees": "#1a7f37", "better": "#1a7f37", "disagrees": "#cf222e", "worse": "#cf222e"}
    for place, (label, rows) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[place])
        axes.axvline(0, color="#8c959f", lw=1)
        for y, row in enumerate(reversed(rows)):
            difference = row.difference
            assert difference is not None
            color = colors.get(row.verdict, "#57606a")
            if difference.low is not None and difference.high is not None:
                axes.plot([difference.low, difference.high], [y, y], color=color, lw=2)
            axes.plot(difference.mean, y, "o", color=color, ms=5)
            axes.plot(list(difference.per_seed.values()), [y] * difference.n, "|", color=color, ms=7, alpha=0.6)
        axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)], fontsize=8, parse_math=False)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(f"difference of {label}; {rows[0].better} is better", fontsize=9, parse_math=False)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=90)
    return True


def samples_picture(results: Results, path: Path) -> dict[str, list[str]]:
    """One line of pictures per arm, of the study's first seed; the prompts of each arm, in order."""
    prompts, lines = {}, {}
    for arm in results.study.arms:
        file = results.report_dir / "runs" / arm / f"seed_{results.study.seeds[0]}.png"
        record = results.records.get((arm, results.study.seeds[0]))
        if file.is_file() and record is not None and record["config"]["validation_prompts"]:
            prompts[arm] = record["config"]["validation_prompts"][:8]
            with PIL.Image.open(file) as opened:
                lines[arm] = pictures_of_grid(opened.convert("RGB"), len(record["config"]["validation_prompts"]))[:8]
    if not lines:
        return {}
    columns = max(map(len, lines.values()))
    step = TILE + 2  # grey between the tiles, which may be white themselves
    sheet = PIL.Image.new("RGB", (LABEL + columns * step, HEAD + len(lines) * step), REFERENCE_COLOR)
    draw = PIL.ImageDraw.Draw(sheet)
    draw.rectangle((0, 0, sheet.width, HEAD - 2), fill="white")
    draw.rectangle((0, 0, LABEL - 2, sheet.height), fill="white")
    for x in range(columns):
        draw.text((LABEL + x * step + TILE // 2 - 3, 3), str(x + 1), fill="black")
    for y, (arm, pictures) in enumerate(lines.items()):
        own = "" if prompts[arm] == prompts[next(iter(lines))] else " (own prompts)"
        draw.text((4, HEAD + y * step + TILE // 2 - 6), arm + own, fill="black")
        for x, picture in enumerate(pictures):
            tile = picture.resize((TILE, TILE), PIL.Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL + x * step, HEAD + y * step))
    sheet.quantize(256).save(path, optimize=True)
    return prompts


# --- the parts of the report


def introduction(page: Page, results: Results, plan: list[dict[str, Any]]) -> None:
    study, records = results.study, results.records
    page.text(study.about)
    failed = sum(record["status"] == "failed" for record in records.values())
    retried = sum(bool(record["failures"]) for record in records.values()) - failed
    page.text(
        f"Of {len(study.arms) * len(study.seeds)} planned runs ({len(study.arms)} kinds, seeds "
        f"{', '.join(map(str, study.seeds))}) {len(records)} were made; {failed} of them failed, {retried} "
        "went on after a failure with the seed they had. What is judged by "
        f"what was stated on {plan[0]['date']} (commit `{plan[0]['commit']}`), before the first run; the plan stands "
        "at the end, with whatever changed since."
    )
    for before, entry in itertools.pairwise(plan):
        changes = describe_changes(before["plan"], entry["plan"])
        page.text(f"**Changed** on {entry['date']}, after {entry['runs_so_far']} runs: {changes}.")
    facts = []
    for what, of in (
        ("commit", lambda r: r.get("commit")),
        ("machine", lambda r: ", ".join(f"{k} {v}" for k, v in r["machine"].items())),
        ("versions", lambda r: ", ".join(f"{k} {v}" for k, v in (r.get("versions") or {}).items())),
        ("runs at once", lambda r: f"{r['jobs']}, each with {r['threads']} thread{'s' * (r['threads'] > 1)}"),
    ):
        counts = Counter(of(record) or "unknown" for record in records.values())
        facts.append(f"{what}: " + "; ".join(f"{v} ({n} runs)" if len(counts) > 1 else v for v, n in counts.items()))
    page.items(facts)
    for arm in study.arms:
        configs = [record["config"] for record in results.of(arm).values() if "config" in record]
        known = set(configs[0]).intersection(*configs) - set(OF_A_RUN) if configs else set()  # by the code of each
        if any(config[name] != configs[0][name] for config in configs for name in known):
            page.text(f"**Warning**: the runs of {arm} do not have the same settings.")
    page.heading(2, "How to read this")
    page.items(
        [
            "Every finding compares one kind of runs, the arm, with another, the reference, after the same number of "
            "steps. Runs of one seed start from the same weights, where their networks are the same, and see the same "
            "samples and noise where their data are, so they are compared seed by seed.",
            "The difference is arm minus reference, averaged over the seeds, with its 95% interval (Student's t over "
            "the seeds). It says how much another seed might change the result. The spread over the prompts or images "
            "of one run is another matter, and is in no interval here.",
            "**agrees**: the interval excludes zero and the sign is the expected one: that of the published figure "
            "or, where there is none, of what was advised or assumed. **disagrees**: it excludes zero and the sign is "
            f"the other one. **undecided**: it contains zero. **too few seeds**: fewer than {MIN_SEEDS}, nothing is "
            "concluded. For findings stated without a direction: better, worse or undecided.",
            "In brackets behind a metric stands what it was computed from: "
            + "; ".join(f"{name}: {evaluation_text(study, name)}" for name in study.evaluations)
            + f"; {TRAINING}: the run itself.",
            "Throughput is steps per second of the arm over those of the reference, above 1 is faster. It is timed in "
            "short runs, arm and reference in turns with nothing of the study beside them; its interval is over the "
            "timed pairs. What other programs did meanwhile is not known. The seconds of the runs themselves are not "
            "used: they were made at different times, and some shared the machine.",
            "At equal time: the difference of the losses on held-out images (for all runs of one seed the same images "
            "and, at one resolution, the same noise), of the faster of the two where its learning rate begins to "
            "decay, and of the slower one after the same time. Later points of the curves cannot be used, since a "
            "shorter run would have decayed earlier. The ratio of the throughputs is taken as exact.",
            "Published figures are of networks hundreds of times as large and of other data: their signs can be "
            "compared with ours, their sizes cannot.",
        ]
    )


def evaluation_text(study: Study, evaluation: str) -> str:
    """The flags of an evaluation, as far as they are no list."""
    flags = study.evaluation | study.evaluations[evaluation]
    return ", ".join(f"{name} {short(value)}" for name, value in flags.items() if not isinstance(value, list)) or "-"


def verdict_cell(row: Row, runs_before: int, adjusted: float) -> str:
    said = [f"**{row.verdict}**"]
    if adjusted < 0.05:
        said.append("also after Holm's correction")
    if row.verdict in ("better", "worse"):
        said.append(f"published: {published_sign(row.finding)}")
    if runs_before:
        said.append(f"stated after {runs_before} runs")
    if row.failures:
        said.append("runs failed")
    return "; ".join(said)


def overview(page: Page, results: Results, added: dict[str, int]) -> None:
    rows = results.rows
    page.heading(2, "Findings")
    counts = Counter(row.verdict for row in rows)
    page.text(f"Of {len(rows)} findings: " + ", ".join(f"{n} {what}" for what, n in counts.most_common()) + ".")
    decided = [row for row in rows if decidable(row) and row.difference is not None and row.difference.excludes_zero]
    tested = sum(map(decidable, rows))
    if tested:
        shared = Counter(row.finding.reference for row in rows).most_common(1)[0]
        kept = [row.name for row in decided if results.adjusted.get(row.name, 1.0) < 0.05]
        page.text(
            f"With {tested} intervals of 95%, about {tested / 20:.1f} would exclude zero by chance alone if no change "
            f"had any effect; {len(decided)} do. After Holm's correction for asking {tested} questions, {len(kept)} "
            f"of them remain{': ' + ', '.join(kept) if kept else ''}."
            f" {shared[1]} findings have the runs of {shared[0]} as their reference, and share its luck."
        )
    header = [
        "finding", "arm against reference", "primary metric", "reference", "arm", "difference [95%]", "seeds",
        "throughput ratio", "held-out loss at equal time", "expected: published", "verdict",
    ]  # fmt: skip
    body = []
    for row in rows:
        seeds = 0 if row.difference is None else row.difference.n
        of = len(results.study.seeds)
        body.append(
            [
                f"`{row.name}`: {row.finding.text}",
                f"{row.finding.arm} against {row.finding.reference}",
                f"{row.label}, {row.better} is better",
                mean_text(row.reference),
                mean_text(row.arm),
                signed(row.difference),
                f"{seeds}" if seeds == of else f"{seeds} of {of}",
                times(row.ratio) or "not timed",
                equal_time_text(results, row),
                f"{row.finding.expected or 'no direction'}: {published(row.finding)}",
                verdict_cell(row, added.get(row.name, 0), results.adjusted.get(row.name, 1.0)),
            ]
        )
    page.table(header, body)


def details(page: Page, results: Results) -> None:
    study = results.study
    page.heading(2, "Each finding")
    for row in results.rows:
        finding = row.finding
        page.heading(3, f"{row.name}: {row.verdict}")
        page.text(finding.text)
        if not results.of(finding.arm):
            page.text(f"No run of {finding.arm} was made.")
            continue
        facts = [f"published: {published(finding)}"]
        for role, arm in (("arm", finding.arm), ("reference", finding.reference)):
            facts.append(f"{role}: {arm}. {study.arms[arm].text}".rstrip())
        metric, reference_metric = study.metrics_of(finding)
        judged = metric_name(study, metric)
        if metric != reference_metric:
            judged += f", of the reference {metric_name(study, reference_metric)}"
        facts.append(f"primary metric: {judged}; {row.better} is better")
        records = [
            next(iter(r for r in results.of(a).values() if "config" in r), None)
            for a in (finding.arm, finding.reference)
        ]
        if records[0] is not None and records[1] is not None:
            facts += settings_that_differ(records[0]["config"], records[1]["config"])
        page.items(facts)
        if finding.note:
            page.text(finding.note)
        for failure in row.failures:
            page.text(f"**Failed**: {failure}")
        per_seed = [
            [str(seed), *(f"{of[seed]:.4g}" if seed in of else "" for of in (row.reference, row.arm)),
             f"{row.difference.per_seed[seed]:+.3g}" if row.difference and seed in row.difference.per_seed else ""]
            for seed in study.seeds
        ]  # fmt: skip
        page.table(
            ["seed", "reference", "arm", "difference"],
            [*per_seed, ["**mean**", mean_text(row.reference), mean_text(row.arm), signed(row.difference)]],
        )
        if row.verdict == "undecided":
            page.text(f"Why undecided: {why_undecided(row)}")
        elif row.verdict == "disagrees" and finding.at_this_size:
            page.text(f"What may be behind it at this size: {finding.at_this_size}")
        if row.ratio is not None:
            page.text(f"Throughput: {times(row.ratio)} times the reference's.")
        if row.equal_time is not None and row.equal_time_steps is not None:
            page.text(
                f"At equal time (arm at step {row.equal_time_steps[0]:.0f}, reference at step "
                f"{row.equal_time_steps[1]:.0f}), the held-out losses differ by {signed(row.equal_time)}; lower is "
                "better."
            )
        others(page, results, row)


def others(page: Page, results: Results, row: Row) -> None:
    """What else was measured of arm and reference alike."""
    study, finding, body = results.study, row.finding, []
    primary = study.metrics_of(finding)
    names = [*study.evaluations, TRAINING]
    for evaluation in names:
        for key, metric in study.metrics.items():
            full = f"{evaluation}/{key}"
            if study.split_metric(primary[0]) == (evaluation, key) and primary[0] == primary[1]:
                continue
            if key == VALIDATION_LOSS and not results.comparable(finding):
                continue
            arm, reference = results.values(finding.arm, full), results.values(finding.reference, full)
            difference = paired_difference(arm, reference)
            if difference is not None:
                label = f"{metric_name(study, full)}, {metric.better} is better"
                body.append([label, mean_text(reference), mean_text(arm), signed(difference)])
    if body:
        page.text("Also measured, with nothing stated before and so nothing concluded:")
        page.table(["metric", "reference", "arm", "difference [95%]"], body)


def runs_table(page: Page, results: Results) -> None:
    page.heading(2, "All runs")
    page.text("Seconds per step are those of the run, whatever else the machine did; throughput is measured apart.")
    body = []
    for (arm, seed), record in results.records.items():
        metric = results.study.metric
        evaluation, key = results.study.split_metric(metric)
        score = scores(results.study, record, evaluation).get(key)
        message = record["failures"][-1]["message"] if record["status"] == "failed" else ""
        retried = len(record["failures"]) - (record["status"] == "failed")
        body.append(
            [
                arm,
                str(seed),
                record["status"]
                + (f": {message}" if message else "")
                + (f" (after {retried} failures)" if retried else ""),
                str(record.get("steps", "")),
                f"{record['seconds_per_step']:.3f}" if "seconds_per_step" in record else "",
                "" if score is None else f"{score:.4g}",
                str(record.get("commit", ""))[:7],
            ]
        )
    missing = [(a, s) for a in results.study.arms for s in results.study.seeds if (a, s) not in results.records]
    body += [[arm, str(seed), "not run", "", "", "", ""] for arm, seed in missing]
    header = ["arm", "seed", "outcome", "steps", "seconds per step", metric_name(results.study, results.study.metric)]
    page.table([*header, "commit"], body)


def write_report(study: Study, report_dir: Path) -> Path:
    """Write report.md, report.html and pictures into the report's folder, from what is there.

    Raises:
        ValueError: if the study was never started: without a plan there is nothing to judge by.
    """
    path = report_dir / PLAN_FILE
    if not path.is_file():
        raise ValueError(f"{report_dir} has no {PLAN_FILE}: the study was not started there.")
    plan = json.loads(path.read_text())
    results, page = Results(study, report_dir), Page(f"Study {study.name}")
    pictures = report_dir / "pictures"
    pictures.mkdir(exist_ok=True)
    introduction(page, results, plan)
    overview(page, results, runs_before_finding(plan))
    if differences_picture(results, pictures / "differences.png"):
        page.text(
            "Dots are means, bars the intervals, ticks the single seeds. Green: agrees, or better; red: disagrees, or "
            "worse; grey: neither. Where a bar only just reaches or misses zero, the table tells."
        )
        page.picture(pictures / "differences.png", "differences with intervals")
    details(page, results)
    if curves_picture(results, pictures / "curves.png"):
        page.heading(2, "Learning curves")
        page.text("Loss on held-out images over the steps: thin lines are seeds, thick ones their mean.")
        page.picture(pictures / "curves.png", "learning curves")
    if prompts := samples_picture(results, pictures / "samples.png"):
        page.heading(2, "Pictures")
        page.text(
            f"The first prompts of the list, seed {study.seeds[0]}; in a column the noise is the same where networks "
            "and sizes allow it. None was picked."
        )
        page.picture(pictures / "samples.png", "pictures of every arm")
        first = next(iter(prompts.values()))
        page.items(first, numbered=True)
        for arm, own in prompts.items():
            if own != first:
                page.text(f"{arm} was given its own prompts:")
                page.items(own, numbered=True)
    runs_table(page, results)
    page.heading(2, "Plan")
    page.code(plan_text(study, plan))
    return page.write(report_dir, "report")
