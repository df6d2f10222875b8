"""Results of a study: the records of its runs, and the statistics of each finding."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.settings import resolve_warmup_steps
from .spec import Finding, Study, read_record, scores
from .statistics import (
    MIN_SEEDS,
    Difference,
    equal_time_steps,
    holm,
    mean_ratio,
    paired_difference,
    value_at,
    verdict,
)

THROUGHPUT_FILE = "throughput.json"

Curve = list[tuple[float, float]]
# Geometric mean and the bounds of its interval; no bounds for a single value.
Ratio = tuple[float, float | None, float | None]


@dataclass
class FindingResult:
    """A finding with the values, statistics and verdict that its runs give.

    Args:
        name: name of the finding.
        finding: definition from the study file.
        better: "higher" or "lower" values of the primary metric.
        label: name of the primary metric.
        arm_values: seed -> primary metric of the arm.
        reference_values: seed -> primary metric of the reference.
        difference: arm minus reference; None without a common seed.
        verdict: see `statistics.verdict`; "failed" if there is no difference because runs failed.
        failures: one message per failed run.
        throughput_ratio: steps per second of the arm over those of the reference; None: not timed.
        equal_time: difference of the validation losses after equal time; None: unknown.
        equal_time_steps: steps of arm and reference at that time.
    """

    name: str
    finding: Finding
    better: str
    label: str
    arm_values: dict[int, float]
    reference_values: dict[int, float]
    difference: Difference | None
    verdict: str
    failures: list[str]
    throughput_ratio: Ratio | None
    equal_time: Difference | None
    equal_time_steps: tuple[float, float] | None

    @property
    def has_enough_seeds(self) -> bool:
        return self.difference is not None and self.difference.n >= MIN_SEEDS

    @property
    def is_decided(self) -> bool:
        """True if there are enough seeds and the interval excludes zero."""
        return self.difference is not None and self.has_enough_seeds and self.difference.excludes_zero


class StudyResults:
    """Records of a study and the results of its findings.

    Args:
        study: definition of the study.
        report_dir: folder of the records.

    Attributes:
        records: (arm, seed) -> record of each run that exists.
        throughput: timed pairs of arms and references.
        findings: results in the order of the study file.
        adjusted_p: name of a finding -> p value after Holm's correction.
    """

    def __init__(self, study: Study, report_dir: Path):
        self.study, self.report_dir = study, report_dir
        stored = {(arm, seed): read_record(report_dir, arm, seed) for arm in study.arms for seed in study.seeds}
        self.records = {run: record for run, record in stored.items() if record is not None}
        throughput = report_dir / THROUGHPUT_FILE
        self.throughput: list[dict[str, Any]] = json.loads(throughput.read_text()) if throughput.is_file() else []
        self.findings = [self._judge(name, finding) for name, finding in study.findings.items()]
        p_values = {
            result.name: result.difference.p
            for result in self.findings
            if result.has_enough_seeds and result.difference is not None and result.difference.p is not None
        }
        self.adjusted_p = holm(p_values)

    def records_of(self, arm: str) -> dict[int, dict[str, Any]]:
        """Return seed -> record of an arm."""
        return {seed: record for (name, seed), record in self.records.items() if name == arm}

    def config_of(self, arm: str) -> dict[str, Any] | None:
        """Return the training configuration of the first run of an arm that has one."""
        return next((record["config"] for record in self.records_of(arm).values() if "config" in record), None)

    def curves_of(self, arm: str) -> dict[int, Curve]:
        """Return seed -> validation losses as (step, loss), for the runs that have them."""
        return {
            seed: [(step, loss) for step, loss in record["curve"]]
            for seed, record in self.records_of(arm).items()
            if record.get("curve")
        }

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """Return seed -> metric of an arm, for the runs that have it."""
        evaluation, key = self.study.split_metric(metric)
        by_seed = {seed: scores(record, evaluation) for seed, record in self.records_of(arm).items()}
        return {seed: numbers[key] for seed, numbers in by_seed.items() if key in numbers}

    def has_comparable_loss(self, finding: Finding) -> bool:
        return all(self.study.arms[arm].comparable_loss for arm in (finding.arm, finding.reference))

    def _judge(self, name: str, finding: Finding) -> FindingResult:
        metric, reference_metric = self.study.metrics_of(finding)
        key = self.study.split_metric(metric)[1]
        definition = self.study.metrics[key]
        arm_values = self.values(finding.arm, metric)
        reference_values = self.values(finding.reference, reference_metric)
        difference = paired_difference(arm_values, reference_values)
        failures = [
            f"{arm}, seed {seed}: {record['failures'][-1]['message']}"
            for arm in (finding.arm, finding.reference)
            for seed, record in self.records_of(arm).items()
            if record["status"] == "failed"
        ]
        ratio = self._throughput_ratio(finding)
        equal_time, steps = self._at_equal_time(finding, sorted(set(arm_values) & set(reference_values)), ratio)
        return FindingResult(
            name=name,
            finding=finding,
            better=definition.better,
            label=definition.label or key,
            arm_values=arm_values,
            reference_values=reference_values,
            difference=difference,
            verdict="failed"
            if difference is None and failures
            else verdict(difference, definition.better, finding.expected),
            failures=failures,
            throughput_ratio=ratio,
            equal_time=equal_time,
            equal_time_steps=steps,
        )

    def _throughput_ratio(self, finding: Finding) -> Ratio | None:
        """Return the throughput ratio from the timed pairs only.

        The duration of whole runs depends on the load of the machine: it once gave 2.1 for a change that costs time.
        """
        arms = (finding.arm, finding.reference)
        pairs = [pair for pair in self.throughput if (pair["arm"], pair["reference"]) == arms]
        return mean_ratio([pair["seconds_reference"] / pair["seconds_arm"] for pair in pairs]) if pairs else None

    def _at_equal_time(
        self, finding: Finding, seeds: list[int], ratio: Ratio | None
    ) -> tuple[Difference | None, tuple[float, float] | None]:
        """Return the difference of the validation losses after equal time, and the steps of arm and reference then.

        Only the part of the curves with a constant learning rate is used. A shorter run would decay its rate earlier,
        so points within the decay cannot stand for the end of such a run.
        """
        if not seeds or ratio is None or not self.has_comparable_loss(finding):
            return None, None
        arms = (finding.arm, finding.reference)
        last_arm, last_reference = (min(constant_until(self.records_of(arm)[seed]) for seed in seeds) for arm in arms)
        steps = equal_time_steps(1 / ratio[0], 1.0, last_arm, last_reference)
        losses: list[dict[int, float]] = []
        for arm, step in zip(arms, steps):
            curves = self.curves_of(arm)
            values = {seed: value_at(curves.get(seed, []), step) for seed in seeds}
            losses.append({seed: value for seed, value in values.items() if value is not None})
        return paired_difference(*losses), steps


def constant_until(record: dict[str, Any]) -> int:
    """Return the step at which the learning rate of a run begins to decay."""
    cfg = record["config"]
    steps, decay = cfg["max_train_steps"], cfg["lr_decay_steps"]
    if cfg["lr_scheduler"] == "constant":
        return steps
    return resolve_warmup_steps(cfg["lr_warmup_steps"], None, steps) if decay is None else steps - decay
