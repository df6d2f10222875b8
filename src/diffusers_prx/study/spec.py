"""A study: arms (kinds of runs), seeds, and findings (an arm against another one, judged by one metric).

What is decided by what is stated before the first run, in `plan.md`, and kept there: see `register`.
"""

import dataclasses
import itertools
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_yaml, write_json

# The scores of the training itself, named like those of an evaluation: `training/validation_loss`.
TRAINING = "training"
VALIDATION_LOSS = "validation_loss"

PLAN_FILE, PLAN_TEXT = "plan.json", "plan.md"


@dataclass(frozen=True)
class Need:
    """What runs need and do not make: a vision teacher, an autoencoder.

    Args:
        makes: the folder; it is there when it has a training.json.
        command: a Python script with its arguments, that makes it.
    """

    makes: str
    command: str


@dataclass(frozen=True)
class Metric:
    """A number of the evaluation's report.json, by its key there.

    Args:
        better: "higher" or "lower" values are.
        label: its name in the report; none: the key.
    """

    better: str
    label: str | None = None

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(f"`better` must be higher or lower, got {self.better!r}.")


@dataclass(frozen=True)
class Arm:
    """One kind of run.

    Args:
        recipe: of training/train_prx.py, relative to the study's file; none: the study's.
        settings: over the recipe's and the study's.
        step_shares: settings that are shares of the study's steps, over the study's.
        evaluation: flags of training/evaluate_prx.py, over the study's.
        starts_from: an arm whose saved pipeline of the same seed this one starts from.
        needs: names of what has to be made first.
        text: what it is, for the report.
        comparable_loss: whether its validation loss measures the same as that of the arms it is compared with; it
            does not in other latents or with other captions.
    """

    recipe: str | None = None
    settings: dict = field(default_factory=dict)
    step_shares: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    starts_from: str | None = None
    needs: list = field(default_factory=list)
    text: str = ""
    comparable_loss: bool = True


@dataclass(frozen=True)
class Finding:
    """A claim about an arm, and how it is judged.

    Args:
        text: the claim in one sentence.
        arm, reference: whose difference is judged: arm minus reference.
        expected: the arm is "better" or "worse"; none: the claim has no direction.
        metric: the primary one, as `key` (of the first evaluation) or `evaluation/key`; none: the study's.
        reference_metric: where the reference is judged by another evaluation; none: the same.
        published: name of a published figure -> [without, with].
        note: what a reader must know about how this differs from what was published.
        at_this_size: why a study of this size may not decide it, or may come out the other way.
    """

    text: str
    arm: str
    reference: str = "baseline"
    expected: str | None = None
    metric: str | None = None
    reference_metric: str | None = None
    published: dict = field(default_factory=dict)
    note: str = ""
    at_this_size: str = ""

    def __post_init__(self) -> None:
        if self.expected not in ("better", "worse", None):
            raise ValueError(f"`expected` must be better, worse or null, got {self.expected!r}.")
        if self.arm == self.reference:
            raise ValueError(f"`arm` and `reference` are both {self.arm!r}.")
        for name, pair in self.published.items():
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"`published` must be [without, with] for {name!r}, got {pair!r}.")


@dataclass(frozen=True)
class Study:
    """Everything that a study file says.

    Args:
        name: of the study.
        steps: optimizer steps of every run, unless its `step_shares` have `max_train_steps`.
        seeds: the runs of every arm.
        arms: name -> arm, in the order in which they run.
        findings: name -> finding, in the order of the report.
        metrics: name -> metric; a finding's must be among them.
        metric: the primary one of findings that name none.
        recipe: the baseline's, for arms that name none.
        settings: over every recipe.
        step_shares: settings that are shares of `steps`, rounded, at least 1: so that schedules follow it.
        evaluation: flags of training/evaluate_prx.py.
        evaluations: name -> flags over them. Every run is evaluated with the first, and with those that a finding
            about it names.
        needs: name -> what has to be made first.
        threads: CPU threads of a run.
        about: what this is, for the report's reader.
        path: the file that it comes from.
    """

    name: str
    steps: int
    seeds: list
    arms: dict
    findings: dict
    metrics: dict
    metric: str
    recipe: str | None = None
    settings: dict = field(default_factory=dict)
    step_shares: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    evaluations: dict = field(default_factory=lambda: {"default": {}})
    needs: dict = field(default_factory=dict)
    threads: int = 1
    about: str = ""
    path: Path = Path()

    def __post_init__(self) -> None:
        if self.steps < 1 or self.threads < 1:
            raise ValueError(f"`steps` and `threads` must be at least 1, got {self.steps} and {self.threads}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must be different numbers, at least one, got {self.seeds}.")
        if TRAINING in self.evaluations or not self.evaluations:
            raise ValueError(f"`evaluations` must be at least one, and none of them {TRAINING!r}.")
        seen: set[str] = set()
        for name, arm in self.arms.items():
            if arm.recipe is None and self.recipe is None:
                raise ValueError(f"`arms`: {name} has no `recipe`, and neither has the study.")
            if arm.starts_from is not None and arm.starts_from not in seen:
                raise ValueError(
                    f"`arms`: {name} has `starts_from` {arm.starts_from!r}; accepted: an arm before it, "
                    f"{sorted(seen)}."
                )
            if missing := sorted(set(arm.needs) - set(self.needs)):
                raise ValueError(f"`arms`: {name} needs {missing}; `needs` has {sorted(self.needs)}.")
            shares = self.step_shares | arm.step_shares
            if not all(
                isinstance(share, (int, float)) and share > 0 for share in shares.values() if share is not None
            ):
                raise ValueError(f"`step_shares` of {name} must be positive numbers, or null for none, got {shares}.")
            seen.add(name)
        for name, finding in self.findings.items():
            for arm in (finding.arm, finding.reference):
                if arm not in self.arms:
                    raise ValueError(f"`findings`: {name} names the arm {arm!r}; `arms` has {sorted(self.arms)}.")
            for metric in self.metrics_of(finding):
                key = self.split_metric(metric)[1]
                if key not in self.metrics:
                    raise ValueError(
                        f"`findings`: {name} names the metric {key!r}; `metrics` has {list(self.metrics)}."
                    )

    def split_metric(self, metric: str) -> tuple[str, str]:
        """The evaluation that a metric is of, and its key there."""
        evaluation, slash, key = metric.partition("/")
        if slash and evaluation in (TRAINING, *self.evaluations):
            return evaluation, key
        return next(iter(self.evaluations)), metric

    def metrics_of(self, finding: Finding) -> tuple[str, str]:
        """By what the arm and by what the reference is judged."""
        metric = finding.metric or self.metric
        return metric, finding.reference_metric or metric

    def evaluations_of(self, arm: str) -> list[str]:
        """The evaluations that a run of this arm needs."""
        needed = {next(iter(self.evaluations))}
        for finding in self.findings.values():
            metric, reference_metric = self.metrics_of(finding)
            needed |= {self.split_metric(metric)[0]} if finding.arm == arm else set()
            needed |= {self.split_metric(reference_metric)[0]} if finding.reference == arm else set()
        return [name for name in self.evaluations if name in needed]

    def recipe_of(self, arm: str) -> Path:
        return self.path.parent / (self.arms[arm].recipe or str(self.recipe))

    def settings_of(self, arm: str) -> dict[str, Any]:
        """What a run of this arm sets over its recipe, but for seed and folders."""
        shares = {"max_train_steps": 1.0} | self.step_shares | self.arms[arm].step_shares
        in_steps = {
            name: None if share is None else max(1, round(share * self.steps)) for name, share in shares.items()
        }
        return self.settings | in_steps | self.arms[arm].settings

    def evaluation_of(self, arm: str, evaluation: str) -> dict[str, Any]:
        """The flags of one evaluation of a run of this arm."""
        return self.evaluation | self.evaluations[evaluation] | self.arms[arm].evaluation

    def select(self, names: list[str]) -> list[str]:
        """The arms that rows or arms of these names need, in the study's order.

        Raises:
            ValueError: for a name that is neither.
        """
        wanted: set[str] = set()
        for name in names:
            if name not in self.findings and name not in self.arms:
                known = sorted({*self.findings, *self.arms})
                raise ValueError(f"`only` names {name!r}, which is no finding and no arm; there are {known}.")
            if name in self.findings:
                wanted |= {self.findings[name].arm, self.findings[name].reference}
            else:
                wanted.add(name)
        while more := {self.arms[name].starts_from for name in wanted} - wanted - {None}:
            wanted |= {name for name in more if name is not None}
        return [name for name in self.arms if name in wanted]

    def plan(self) -> dict[str, Any]:
        """What is stated before the first run."""
        return {
            "seeds": list(self.seeds),
            "arms": {
                name: {
                    "recipe": self.recipe_of(name).name,
                    "settings": self.settings_of(name),
                    "starts_from": arm.starts_from,
                    "threads": self.threads,
                    "evaluations": {which: self.evaluation_of(name, which) for which in self.evaluations_of(name)},
                }
                for name, arm in self.arms.items()
            },
            "findings": {
                name: {
                    "text": finding.text,
                    "arm": finding.arm,
                    "reference": finding.reference,
                    "metrics": list(self.metrics_of(finding)),
                    "better": self.metrics[self.split_metric(self.metrics_of(finding)[0])[1]].better,
                    "expected": finding.expected,
                }
                for name, finding in self.findings.items()
            },
        }


T = typing.TypeVar("T")


def _build(kind: type[T], where: str, values: Any, **more: Any) -> T:
    """A dataclass from a mapping, with errors that say where."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping, got {values!r}.")
    fields = {option.name: option for option in dataclasses.fields(typing.cast(Any, kind)) if option.name not in more}
    if unknown := sorted(map(str, set(values) - set(fields))):
        raise ValueError(f"{where} has unknown keys {unknown}; known: {sorted(fields)}.")
    missing = [
        name
        for name, option in fields.items()
        if name not in values
        and option.default is dataclasses.MISSING
        and option.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {missing}.")
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        accepted = typing.get_args(hints[name]) or (hints[name],)
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            names = " | ".join("null" if one is type(None) else one.__name__ for one in accepted)
            raise ValueError(f"{where}: `{name}` got {value!r}; accepted: {names}.")
    try:
        return kind(**values, **more)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def load_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        ValueError: if there is no such file, or for whatever in it is unknown, missing or of no use.
    """
    if not path.is_file():
        raise ValueError(f"`study` is {str(path)!r}, which is no file.")
    values = read_yaml(path, path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping, got {type(values).__name__}.")
    for key, kind in (("arms", Arm), ("findings", Finding), ("metrics", Metric), ("needs", Need)):
        entries = values.get(key, {})
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: `{key}` must be a mapping, got {entries!r}.")
        built = {str(name): _build(kind, f"{path}: `{key}`: {name}", entry) for name, entry in entries.items()}
        values = values | {key: built}
    for name, flags in (values.get("evaluations") or {}).items():
        if not isinstance(flags, dict):
            raise ValueError(f"{path}: `evaluations`: {name} must be a mapping of flags, got {flags!r}.")
    return _build(Study, str(path), values, path=path)


# --- records of runs


def record_path(report_dir: Path, arm: str, seed: int) -> Path:
    return report_dir / "runs" / arm / f"seed_{seed}.json"


def read_record(report_dir: Path, arm: str, seed: int) -> dict[str, Any] | None:
    path = record_path(report_dir, arm, seed)
    return json.loads(path.read_text()) if path.is_file() else None


def numbers(values: dict[str, Any], above: str = "") -> dict[str, float]:
    """Every number of a report by its key, those of mappings inside it by `outer.inner`."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{above}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[above + key] = float(value)
    return found


def scores(study: Study, record: dict[str, Any], evaluation: str) -> dict[str, float]:
    """The numbers of one evaluation of a run, by key; empty where it is missing, and of a training that failed."""
    if evaluation == TRAINING:
        curve = record.get("curve") or []
        return {VALIDATION_LOSS: curve[-1][1]} if curve and record["trained"] else {}
    return numbers(record.get("evaluations", {}).get(evaluation, {}))


# --- the plan


def what_changed(old: dict[str, Any] | None, new: dict[str, Any] | None) -> tuple[str, bool]:
    """What became of an arm or a finding of a plan, in words; and whether runs that were made by then still hold."""
    if old is None:
        return "added", True
    if new is None:
        return "taken out", False
    if "evaluations" in old:
        more = [name for name in new["evaluations"] if name not in old["evaluations"]]
        if (
            new == old | {"evaluations": new["evaluations"]}
            and new["evaluations"].items() >= old["evaluations"].items()
        ):
            return f"also evaluated as {', '.join(more)}", True
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    details = "; ".join(f"{name} {json.dumps(old.get(name))} became {json.dumps(new.get(name))}" for name in differing)
    return details, differing == ["text"]


def plan_changes(before: dict[str, Any], plan: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Kind and name of every arm and finding that two plans do not have in common, and `what_changed` of it."""
    return [
        (kind[:-1], name, *what_changed(before[kind].get(name), plan[kind].get(name)))
        for kind in ("arms", "findings")
        for name in dict.fromkeys([*before[kind], *plan[kind]])
        if before[kind].get(name) != plan[kind].get(name)
    ]


def describe_changes(before: dict[str, Any], plan: dict[str, Any]) -> str:
    """In one sentence, what changed from a plan to the next."""
    changes = [f"{kind} {name}: {change}" for kind, name, change, _ in plan_changes(before, plan)]
    if before["seeds"] != plan["seeds"]:
        changes.append(f"seeds {before['seeds']} became {plan['seeds']}")
    return "; ".join(changes)


def register(study: Study, report_dir: Path, date: str, commit: str | None) -> None:
    """State in `report_dir` what is going to be judged by what, before it is run; keep what was stated before.

    A plan that changes later is kept too: with its date, and how many runs were there by then.

    Raises:
        ValueError: where the change is of an arm, a finding or a seed that has been run, or where there are runs and
            what was stated before them is gone.
    """
    path = report_dir / PLAN_FILE
    entries = json.loads(path.read_text()) if path.is_file() else []
    plan = json.loads(json.dumps(study.plan()))  # as it is read back
    runs = sorted((report_dir / "runs").glob("*/seed_*.json"))
    run_arms = {run.parent.name for run in runs}
    if runs and not entries:
        raise ValueError(f"{report_dir} has {len(runs)} runs and no {PLAN_FILE}: what was stated before them is gone.")
    if lost := sorted({run.stem for run in runs} - {f"seed_{seed}" for seed in study.seeds}):
        raise ValueError(f"`seeds` is {study.seeds}, but {lost} have been run: they stay part of the study.")
    before = entries[-1]["plan"] if entries else plan
    for kind, name, change, holds in plan_changes(before, plan):
        arm = name if kind == "arm" else before["findings"].get(name, plan["findings"].get(name))["arm"]
        if arm in run_arms and not holds:
            raise ValueError(
                f"{kind} {name} has been run as {path} states it, and is now another one ({change}): give another "
                "--output_dir and --report_dir, or leave it as it was."
            )
    if before != plan or not entries:
        entry = {"date": date, "commit": commit, "runs_so_far": len(runs), "plan": plan}
        write_json(path, [*entries, entry])
        (report_dir / PLAN_TEXT).write_text(plan_text(study, [*entries, entry]))


def runs_before_finding(entries: list[dict[str, Any]]) -> dict[str, int]:
    """How many runs there were when a finding was first stated, for each that the last plan has."""
    return {
        name: next(entry["runs_so_far"] for entry in entries if name in entry["plan"]["findings"])
        for name in entries[-1]["plan"]["findings"]
    }


def plan_text(study: Study, entries: list[dict[str, Any]]) -> str:
    """The plan for a reader: the first one in full, and what changed since."""
    first, last = entries[0], entries[-1]["plan"]
    lines = [
        f"# Plan of the study {study.name}",
        "",
        f"Stated on {first['date']} at commit {first['commit']}, when {first['runs_so_far']} runs had been made. A "
        "finding is judged by its primary metric alone: the difference arm minus reference, paired by seed, with a "
        "95% Student interval over the seeds. The interval excludes zero: agrees or disagrees; else undecided. Runs "
        "are not repeated with other seeds because of their result, and runs that fail are reported as such.",
    ]
    for before, entry in itertools.pairwise(entries):
        lines += [
            "",
            f"Changed on {entry['date']} at commit {entry['commit']}, when {entry['runs_so_far']} runs had been made: "
            f"{describe_changes(before['plan'], entry['plan'])}.",
        ]
    lines += [
        "",
        "| finding | arm | reference | primary metric | better | expected | steps | seeds |",
        "|" + "---|" * 8,
    ]
    for finding in last["findings"].values():
        metric, reference_metric = finding["metrics"]
        judged = metric if metric == reference_metric else f"{metric} against {reference_metric}"
        cells = [
            finding["text"],
            finding["arm"],
            finding["reference"],
            judged,
            finding["better"],
            finding["expected"] or "no direction",
            str(last["arms"][finding["arm"]]["settings"]["max_train_steps"]),
            ", ".join(map(str, last["seeds"])),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |")
    lines += ["", "Settings of the arms over their recipes, and flags of their evaluations:", ""]
    for name, arm in last["arms"].items():
        start = f", from the pipeline of {arm['starts_from']}" if arm["starts_from"] else ""
        lines.append(
            f"- {name}: {arm['recipe']}{start}; {json.dumps(arm['settings'])}; {json.dumps(arm['evaluations'])}"
        )
    return "\n".join(lines) + "\n"
