"""Report of a study, written from its records: Markdown, one self-contained HTML file, and figures."""

import base64
import html
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt

from .figures import draw_curves, draw_differences, draw_samples
from .results import FindingResult, Ratio, StudyResults
from .spec import (
    PLAN_FILE,
    TRAINING,
    VALIDATION_LOSS,
    Finding,
    Study,
    describe_changes,
    plan_text,
    runs_before_finding,
    scores,
)
from .statistics import LEVEL, MIN_SEEDS, Difference, paired_difference, seeds_needed

# Settings that differ between the runs of an arm.
SETTINGS_PER_RUN = ("seed", "output_dir", "resume_from_checkpoint", "pretrained_model_name_or_path")
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#1f2328}"
    "table{border-collapse:collapse;font-size:14px;display:block;overflow-x:auto}"
    "th,td{border:1px solid #d1d9e0;padding:4px 8px;text-align:left;vertical-align:top}th{background:#f6f8fa}"
    "img{max-width:100%}"
    "pre{overflow-x:auto;font-size:12px;background:#f6f8fa;padding:1em;white-space:pre-wrap}"
)


def write_report(study: Study, report_dir: Path) -> Path:
    """Write report.md, report.html and `pictures/` into the report folder, from the records in it.

    Args:
        study: definition of the study.
        report_dir: folder with plan.json and `runs/`.

    Returns:
        Path of report.md.

    Raises:
        ValueError: if the folder has no plan.json, because the study was not started there.

    Example:
        >>> from pathlib import Path
        >>> from diffusers_prx.study.report import write_report
        >>> from diffusers_prx.study.spec import load_study
        >>> write_report(load_study(Path("training/studies/scenes.yaml")), Path("training/studies/scenes"))
    """
    path = report_dir / PLAN_FILE
    if not path.is_file():
        raise ValueError(f"`report_dir` {report_dir} has no {PLAN_FILE}. Pass the report folder of a started study.")
    plan = json.loads(path.read_text())
    results, page = StudyResults(study, report_dir), Page(f"Study {study.name}")
    pictures = report_dir / "pictures"
    pictures.mkdir(exist_ok=True)
    add_introduction(page, results, plan)
    add_explanation(page, study)
    add_overview(page, results, runs_before_finding(plan))
    if draw_differences(results, pictures / "differences.png"):
        page.text(
            "Dots are means, bars are intervals, ticks are single seeds. Green: agrees, or better. Red: disagrees, or "
            "worse. Gray: neither. Where a bar nearly touches zero, the table is exact."
        )
        page.picture(pictures / "differences.png", "differences with intervals")
    page.heading(2, "Each finding")
    for result in results.findings:
        add_finding(page, results, result)
    if draw_curves(results, pictures / "curves.png"):
        page.heading(2, "Learning curves")
        page.text("Loss on held-out images over the steps. Thin lines are seeds, thick lines their mean.")
        page.picture(pictures / "curves.png", "learning curves")
    if prompts := draw_samples(results, pictures / "samples.png"):
        add_samples(page, pictures / "samples.png", prompts, study.seeds[0])
    add_runs(page, results)
    page.heading(2, "Plan")
    page.code(plan_text(study, plan))
    return page.write(report_dir, "report")


class Page:
    """A document that is written as Markdown and as one HTML file with its pictures inside."""

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
        """Add a PNG file that is in a subfolder of the report folder."""
        self.markdown.append(f"![{alt}]({path.parent.name}/{path.name})\n")

    def code(self, text: str) -> None:
        self.markdown.append(f"```\n{text.rstrip()}\n```\n")

    def write(self, folder: Path, name: str) -> Path:
        """Write NAME.md and NAME.html, and return the path of the former."""
        text = "\n".join(self.markdown)
        # HTML is off, because captions and names may contain any text
        body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
        body = re.sub(r'src="([^"]+\.png)"', lambda match: f'src="{_data_url(folder / match[1])}"', body)
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{STYLE}</style>'
        (folder / f"{name}.md").write_text(text)
        (folder / f"{name}.html").write_text(f"<!doctype html>{head}\n{body}")
        return folder / f"{name}.md"


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


# --- parts of the report


def add_introduction(page: Page, results: StudyResults, plan: list[dict[str, Any]]) -> None:
    """Add what was run and when it was planned, changes of the plan, and the versions and machines of the runs."""
    study, records = results.study, results.records.values()
    failed = sum(record["status"] == "failed" for record in records)
    retried = sum(bool(record["failures"]) for record in records) - failed
    page.text(study.about)
    page.text(
        f"{len(records)} of {len(study.arms) * len(study.seeds)} planned runs were made ({len(study.arms)} arms, "
        f"seeds {', '.join(map(str, study.seeds))}). {failed} failed, and {retried} continued after a failure "
        f"with the same seed. The plan was stated on {plan[0]['date']} (commit `{plan[0]['commit']}`), "
        "before the first run. It is at the end of this report, with its later changes."
    )
    for before, entry in itertools.pairwise(plan):
        changes = describe_changes(before["plan"], entry["plan"])
        page.text(f"**Changed** on {entry['date']}, after {entry['runs_so_far']} runs: {changes}.")

    def counted(label: str, value_of: Callable[[dict[str, Any]], str | None]) -> str:
        counts = Counter(value_of(record) or "unknown" for record in records)
        values = [f"{value} ({n} runs)" if len(counts) > 1 else value for value, n in counts.items()]
        return f"{label}: {'; '.join(values)}"

    page.items(
        [
            counted("commit", lambda record: record.get("commit")),
            counted("machine", lambda record: _pairs_text(record["machine"])),
            counted("versions", lambda record: _pairs_text(record.get("versions") or {})),
            counted("runs at once", lambda record: f"{record['jobs']}, threads of each: {record['threads']}"),
        ]
    )
    for arm in study.arms:
        if not _same_settings(results.records_of(arm).values()):
            page.text(f"**Warning**: the runs of {arm} do not have the same settings.")


def _pairs_text(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _same_settings(records: Any) -> bool:
    """True if all runs of an arm agree in every setting that the code of each of them had."""
    configs = [record["config"] for record in records if "config" in record]
    names = set(configs[0]).intersection(*configs) - set(SETTINGS_PER_RUN) if configs else set()
    return all(config[name] == configs[0][name] for config in configs for name in names)


def add_explanation(page: Page, study: Study) -> None:
    """Add how the numbers are computed and what the verdicts mean."""
    evaluations = "; ".join(f"{name}: {evaluation_text(study, name)}" for name in study.evaluations)
    page.heading(2, "How to read this")
    page.items(
        [
            "Every finding compares one arm with a reference arm after the same number of steps. Runs with the same "
            "seed share initial weights where their networks are equal, and samples and noise where their data are "
            "equal. They are therefore compared seed by seed.",
            f"The difference is arm minus reference, averaged over the seeds, with its {LEVEL:.0%} interval "
            "(Student's t over the seeds). The interval says how much another seed might change the result. It does "
            "not contain the spread over the prompts or images of one run.",
            "**agrees**: the interval excludes zero, and the sign is the expected one: that of the published number "
            "or, without one, of the published advice. **disagrees**: the interval excludes zero, and the sign is the "
            f"other one. **undecided**: the interval contains zero. **too few seeds**: fewer than {MIN_SEEDS}; "
            "nothing is concluded. Findings without an expected direction are better, worse or undecided.",
            f"The brackets after a metric name its evaluation. {evaluations}; {TRAINING}: the run itself.",
            "Throughput is the arm's steps per second over the reference's; above 1 is faster. It is timed in short "
            "runs of arm and reference in turns, without other runs of the study at the same time. Its interval is "
            "over the timed pairs. The duration of whole runs is not used, because they were made at different times "
            "and some shared the machine.",
            "The loss at equal time is the difference of the losses on held-out images (the same images and, at one "
            "resolution, the same noise for all runs of a seed): the faster of the two at the step where its learning "
            "rate begins to decay, the slower one after the same time. Later points are not used, because a shorter "
            "run would have decayed earlier. The throughput ratio is taken as exact.",
            "Published numbers belong to networks hundreds of times as large and to other data. Compare their signs "
            "with ours, not their sizes.",
        ]
    )


def add_overview(page: Page, results: StudyResults, runs_before: dict[str, int]) -> None:
    """Add the verdicts, the correction for several questions, and the table of findings."""
    findings = results.findings
    page.heading(2, "Findings")
    counts = Counter(result.verdict for result in findings)
    page.text(f"{len(findings)} findings. " + ", ".join(f"{name}: {n}" for name, n in counts.most_common()) + ".")
    tested = [result for result in findings if result.has_enough_seeds]
    if tested:
        decided = [result.name for result in tested if result.is_decided]
        remaining = [name for name in decided if results.adjusted_p.get(name, 1.0) < 0.05]
        reference, sharing = Counter(result.finding.reference for result in findings).most_common(1)[0]
        page.text(
            f"If no change had any effect, about {len(tested) / 20:.1f} of {len(tested)} intervals would "
            f"exclude zero by chance; {len(decided)} do. After Holm's correction for {len(tested)} questions, "
            f"{len(remaining)} remain{': ' + ', '.join(remaining) if remaining else ''}. {sharing} findings share the "
            f"runs of {reference} as their reference, and so its luck."
        )
    header = ["finding", "arm against reference", "primary metric", "reference", "arm", f"difference [{LEVEL:.0%}]"]
    header += ["seeds", "throughput ratio", "held-out loss at equal time", "expected: published", "verdict"]
    page.table(header, [overview_row(results, result, runs_before.get(result.name, 0)) for result in findings])


def overview_row(results: StudyResults, result: FindingResult, runs_before: int) -> list[str]:
    """Return the row of a finding in the table of findings."""
    finding = result.finding
    seeds, planned = 0 if result.difference is None else result.difference.n, len(results.study.seeds)
    return [
        f"`{result.name}`: {finding.text}",
        f"{finding.arm} against {finding.reference}",
        f"{result.label}, {result.better} is better",
        mean_text(result.reference_values),
        mean_text(result.arm_values),
        difference_text(result.difference),
        f"{seeds}" if seeds == planned else f"{seeds} of {planned}",
        ratio_text(result.throughput_ratio) or "not timed",
        equal_time_text(results, result),
        f"{finding.expected or 'no direction'}: {published_text(finding)}",
        verdict_text(result, runs_before, results.adjusted_p.get(result.name, 1.0)),
    ]


def add_finding(page: Page, results: StudyResults, result: FindingResult) -> None:
    """Add the section of one finding."""
    study, finding = results.study, result.finding
    page.heading(3, f"{result.name}: {result.verdict}")
    page.text(finding.text)
    if not results.records_of(finding.arm):
        page.text(f"No run of {finding.arm} was made.")
        return
    page.items(finding_facts(results, result))
    if finding.note:
        page.text(finding.note)
    for failure in result.failures:
        page.text(f"**Failed**: {failure}")
    per_seed = result.difference.per_seed if result.difference is not None else {}
    rows = []
    for seed in study.seeds:
        values = [
            f"{by_seed[seed]:.4g}" if seed in by_seed else ""
            for by_seed in (result.reference_values, result.arm_values)
        ]
        rows.append([str(seed), *values, f"{per_seed[seed]:+.3g}" if seed in per_seed else ""])
    means = [mean_text(result.reference_values), mean_text(result.arm_values)]
    rows.append(["**mean**", *means, difference_text(result.difference)])
    page.table(["seed", "reference", "arm", "difference"], rows)
    if result.verdict == "undecided":
        page.text(f"Why undecided: {undecided_text(result)}")
    elif result.verdict == "disagrees" and finding.at_this_size:
        page.text(f"Possible reason at this size: {finding.at_this_size}")
    if result.throughput_ratio is not None:
        page.text(f"Throughput: {ratio_text(result.throughput_ratio)} times the reference's.")
    if result.equal_time is not None and result.equal_time_steps is not None:
        page.text(
            f"At equal time (arm at step {result.equal_time_steps[0]:.0f}, reference at step "
            f"{result.equal_time_steps[1]:.0f}), the held-out losses differ by {difference_text(result.equal_time)}; "
            "lower is better."
        )
    add_secondary_metrics(page, results, result)


def finding_facts(results: StudyResults, result: FindingResult) -> list[str]:
    """Return published numbers, arm, reference, primary metric, and the settings that differ."""
    study, finding = results.study, result.finding
    facts = [f"published: {published_text(finding)}"]
    for role, arm in (("arm", finding.arm), ("reference", finding.reference)):
        facts.append(f"{role}: {arm}. {study.arms[arm].text}".rstrip())
    metric, reference_metric = study.metrics_of(finding)
    metric_text = metric_name(study, metric)
    if metric != reference_metric:
        metric_text += f", of the reference {metric_name(study, reference_metric)}"
    facts.append(f"primary metric: {metric_text}; {result.better} is better")
    arm_config, reference_config = results.config_of(finding.arm), results.config_of(finding.reference)
    if arm_config is not None and reference_config is not None:
        facts += settings_that_differ(arm_config, reference_config)
    return facts


def add_secondary_metrics(page: Page, results: StudyResults, result: FindingResult) -> None:
    """Add the table of all other metrics that arm and reference have in common."""
    study, finding = results.study, result.finding
    primary, primary_of_reference = study.metrics_of(finding)
    rows = []
    for evaluation in (*study.evaluations, TRAINING):
        for key, metric in study.metrics.items():
            name = f"{evaluation}/{key}"
            is_primary = study.split_metric(primary) == (evaluation, key) and primary == primary_of_reference
            if is_primary or (key == VALIDATION_LOSS and not results.has_comparable_loss(finding)):
                continue
            arm_values, reference_values = results.values(finding.arm, name), results.values(finding.reference, name)
            difference = paired_difference(arm_values, reference_values)
            if difference is not None:
                label = f"{metric_name(study, name)}, {metric.better} is better"
                rows.append([label, mean_text(reference_values), mean_text(arm_values), difference_text(difference)])
    if rows:
        page.text("Secondary metrics. Nothing was stated about them before, so nothing is concluded:")
        page.table(["metric", "reference", "arm", f"difference [{LEVEL:.0%}]"], rows)


def add_samples(page: Page, picture: Path, prompts: dict[str, list[str]], seed: int) -> None:
    """Add validation images of every arm, with their prompts."""
    page.heading(2, "Pictures")
    page.text(
        f"The first validation prompts, seed {seed}, not selected. Within a column the noise is the same where "
        "networks and sizes allow it."
    )
    page.picture(picture, "pictures of every arm")
    first = next(iter(prompts.values()))
    page.items(first, numbered=True)
    for arm, own in prompts.items():
        if own != first:
            page.text(f"{arm} has its own prompts:")
            page.items(own, numbered=True)


def add_runs(page: Page, results: StudyResults) -> None:
    """Add a table with every planned run and its outcome."""
    study = results.study
    page.heading(2, "All runs")
    page.text("Seconds per step depend on what else the machine did; throughput is measured separately.")
    rows = []
    evaluation, key = study.split_metric(study.metric)
    for (arm, seed), record in results.records.items():
        score = scores(record, evaluation).get(key)
        failed = record["status"] == "failed"
        outcome = record["status"] + (f": {record['failures'][-1]['message']}" if failed else "")
        if retried := len(record["failures"]) - failed:
            outcome += f" (after {retried} failures)"
        rows.append(
            [
                arm,
                str(seed),
                outcome,
                str(record.get("steps", "")),
                f"{record['seconds_per_step']:.3f}" if "seconds_per_step" in record else "",
                "" if score is None else f"{score:.4g}",
                str(record.get("commit", ""))[:7],
            ]
        )
    missing = [(arm, seed) for arm in study.arms for seed in study.seeds if (arm, seed) not in results.records]
    rows += [[arm, str(seed), "not run", "", "", "", ""] for arm, seed in missing]
    header = ["arm", "seed", "outcome", "steps", "seconds per step", metric_name(study, study.metric), "commit"]
    page.table(header, rows)


# --- numbers and settings as text


def mean_text(values: dict[int, float]) -> str:
    """Return the mean over the seeds with four digits; empty without values."""
    return f"{np.mean(list(values.values())):.4g}" if values else ""


def difference_text(difference: Difference | None) -> str:
    """Return a difference as `+0.031 [-0.010, +0.072]`."""
    if difference is None:
        return ""
    if difference.low is None:
        return f"{difference.mean:+.3g} [one seed: no interval]"
    return f"{difference.mean:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]"


def ratio_text(ratio: Ratio | None) -> str:
    """Return a ratio as `0.93 [0.88, 0.98]`; empty if it is unknown."""
    if ratio is None:
        return ""
    return f"{ratio[0]:.2f}" + ("" if ratio[1] is None else f" [{ratio[1]:.2f}, {ratio[2]:.2f}]")


def equal_time_text(results: StudyResults, result: FindingResult) -> str:
    """Return the difference of the losses at equal time, or the reason why there is none."""
    if not results.has_comparable_loss(result.finding):
        return "not comparable"
    if result.throughput_ratio is None:
        return "not timed"
    return difference_text(result.equal_time) or "no curves"


def published_text(finding: Finding) -> str:
    """Return the published numbers as `FID 18.2 → 14.64 (-3.56)`; rates (`.../s`) with their ratio."""
    parts = []
    for name, (without, with_it) in finding.published.items():
        if without is None or with_it is None:
            parts.append(f"{name}: {with_it if without is None else without}")
        else:
            change = f"{with_it / without:.2f}x" if name.endswith("/s") else f"{with_it - without:+.2f}"
            parts.append(f"{name} {without:g} → {with_it:g} ({change})")
    return "; ".join(parts) or "no number"


def published_direction(finding: Finding) -> str:
    """Return the direction of the first published number. Lower is better in all published metrics."""
    for name, (without, with_it) in finding.published.items():
        if without is not None and with_it is not None and without != with_it and not name.endswith("/s"):
            return f"{name} {'better' if with_it < without else 'worse'}"
    return "no number"


def verdict_text(result: FindingResult, runs_before: int, adjusted_p: float) -> str:
    """Return the verdict, with everything that qualifies it."""
    parts = [f"**{result.verdict}**"]
    if adjusted_p < 0.05:
        parts.append("also after Holm's correction")
    if result.verdict in ("better", "worse"):
        parts.append(f"published: {published_direction(result.finding)}")
    if runs_before:
        parts.append(f"stated after {runs_before} runs")
    if result.failures:
        parts.append("runs failed")
    return "; ".join(parts)


def undecided_text(result: FindingResult) -> str:
    """Return what an interval that contains zero leaves open."""
    difference = result.difference
    if difference is None or difference.low is None or difference.high is None:
        return ""
    half = (difference.high - difference.low) / 2
    needed = seeds_needed(difference)
    outlook = (
        f"With the same mean and spread, about {needed} seeds would decide it."
        if needed is not None
        else "With the same mean and spread, 1000 seeds would not decide it."
    )
    return (
        f"the interval reaches {half:.2g} to either side of the measured {difference.mean:+.2g}, so only a larger "
        f"difference would have been visible. {outlook} {result.finding.at_this_size}".rstrip()
    )


def metric_name(study: Study, metric: str) -> str:
    """Return a metric's label with its evaluation in brackets."""
    evaluation, key = study.split_metric(metric)
    return f"{study.metrics[key].label or key} ({evaluation})"


def evaluation_text(study: Study, evaluation: str) -> str:
    """Return the flags of an evaluation, except lists."""
    flags = study.evaluation | study.evaluations[evaluation]
    return ", ".join(f"{name} {_short(value)}" for name, value in flags.items() if not isinstance(value, list)) or "-"


def settings_that_differ(arm: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Return the settings in which two runs differ, as `name`: reference → arm.

    Mappings are compared by key. Settings that only one of the runs has, because its code was newer, are left out.
    """
    lines = []
    for name in arm:
        if name not in reference or arm[name] == reference[name] or name in SETTINGS_PER_RUN:
            continue
        old, new = reference[name], arm[name]
        if isinstance(old, dict) and isinstance(new, dict) and old and new:
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            lines += [f"`{name}.{key}`: {_short(old.get(key))} → {_short(new.get(key))}" for key in keys]
        else:
            lines.append(f"`{name}`: {_short(old)} → {_short(new)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
