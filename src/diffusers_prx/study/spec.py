"""Study files: arms (training configurations), seeds, and findings (an arm against a reference, judged by one metric).

`register` writes the plan of a study before its first run, and refuses later changes to anything that has been run.
"""

import dataclasses
import itertools
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_yaml, write_json

# Metrics of the training itself are addressed like those of an evaluation: `training/validation_loss`.
TRAINING = "training"
VALIDATION_LOSS = "validation_loss"

PLAN_FILE, PLAN_TEXT = "plan.json", "plan.md"


@dataclass(frozen=True)
class Prerequisite:
    """A network that must exist before runs start: a vision teacher or an autoencoder.

    Args:
        makes: output folder; complete once it contains training.json.
        command: Python script with its arguments.
    """

    makes: str
    command: str


@dataclass(frozen=True)
class Metric:
    """A number in an evaluation's report.json, identified by its key.

    Args:
        better: "higher" or "lower".
        label: name in the report; None: the key.
    """

    better: str
    label: str | None = None

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(f"`better` must be higher or lower, got {self.better!r}.")


@dataclass(frozen=True)
class Arm:
    """One training configuration.

    Args:
        recipe: recipe of training/train_prx.py, relative to the study file; None: the study's.
        settings: settings that override those of the recipe and the study.
        step_shares: settings given as shares of the study's steps; they override the study's.
        evaluation: flags of training/evaluate_prx.py that override the study's.
        starts_from: arm whose saved pipeline of the same seed initializes this one.
        needs: names of prerequisites.
        text: description for the report.
        comparable_loss: False if the validation loss cannot be compared with that of other arms, because latents or
            captions differ.
    """

    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    step_shares: dict[str, float | None] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    starts_from: str | None = None
    needs: list[str] = field(default_factory=list)
    text: str = ""
    comparable_loss: bool = True


@dataclass(frozen=True)
class Finding:
    """A claim about an arm, judged by the difference arm minus reference.

    Args:
        text: claim in one sentence.
        arm: arm under test.
        reference: arm to compare with.
        expected: "better" or "worse"; None: the claim has no direction.
        metric: primary metric, as `key` (first evaluation) or `evaluation/key`; None: the study's.
        reference_metric: metric of the reference if it differs; None: the same.
        published: name of a published number -> [without, with].
        note: differences from the published experiment that a reader must know.
        at_this_size: reason why a study of this size may be inconclusive or reverse the effect.
    """

    text: str
    arm: str
    reference: str = "baseline"
    expected: str | None = None
    metric: str | None = None
    reference_metric: str | None = None
    published: dict[str, list[float | None]] = field(default_factory=dict)
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
    """Contents of a study file.

    Args:
        name: name of the study.
        steps: optimizer steps of every run whose `step_shares` lack `max_train_steps`.
        seeds: seeds of every arm.
        arms: name -> arm, in the order in which they run.
        findings: name -> finding, in the order of the report.
        metrics: name -> metric; contains every metric of a finding.
        metric: primary metric of findings that name none.
        recipe: recipe of arms that name none.
        settings: settings that override those of every recipe.
        step_shares: settings given as shares of `steps`; they are rounded to at least 1.
        evaluation: flags of training/evaluate_prx.py.
        evaluations: name -> additional flags. Every run has the first evaluation, and those that its findings name.
        needs: name -> prerequisite.
        threads: CPU threads of a run.
        about: introduction of the report.
        path: study file.
    """

    name: str
    steps: int
    seeds: list[int]
    arms: dict[str, Arm]
    findings: dict[str, Finding]
    metrics: dict[str, Metric]
    metric: str
    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    step_shares: dict[str, float | None] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=lambda: {"default": {}})
    needs: dict[str, Prerequisite] = field(default_factory=dict)
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
            for role in (finding.arm, finding.reference):
                if role not in self.arms:
                    raise ValueError(f"`findings`: {name} names the arm {role!r}; `arms` has {sorted(self.arms)}.")
            for metric in self.metrics_of(finding):
                key = self.split_metric(metric)[1]
                if key not in self.metrics:
                    raise ValueError(
                        f"`findings`: {name} names the metric {key!r}; `metrics` has {list(self.metrics)}."
                    )

    def split_metric(self, metric: str) -> tuple[str, str]:
        """Return (evaluation, key) of a metric written as `key` or `evaluation/key`."""
        evaluation, slash, key = metric.partition("/")
        if slash and evaluation in (TRAINING, *self.evaluations):
            return evaluation, key
        return next(iter(self.evaluations)), metric

    def metrics_of(self, finding: Finding) -> tuple[str, str]:
        """Return the primary metrics of arm and reference."""
        metric = finding.metric or self.metric
        return metric, finding.reference_metric or metric

    def evaluations_of(self, arm: str) -> list[str]:
        """Return the names of the evaluations that a run of an arm needs."""
        needed = {next(iter(self.evaluations))}
        for finding in self.findings.values():
            metric, reference_metric = self.metrics_of(finding)
            needed |= {self.split_metric(metric)[0]} if finding.arm == arm else set()
            needed |= {self.split_metric(reference_metric)[0]} if finding.reference == arm else set()
        return [name for name in self.evaluations if name in needed]

    def recipe_of(self, arm: str) -> Path:
        return self.path.parent / (self.arms[arm].recipe or str(self.recipe))

    def settings_of(self, arm: str) -> dict[str, Any]:
        """Return the settings that an arm puts over its recipe, except seed and folders."""
        shares = {"max_train_steps": 1.0} | self.step_shares | self.arms[arm].step_shares
        in_steps = {
            name: None if share is None else max(1, round(share * self.steps)) for name, share in shares.items()
        }
        return self.settings | in_steps | self.arms[arm].settings

    def evaluation_of(self, arm: str, evaluation: str) -> dict[str, Any]:
        """Return the flags of one evaluation of an arm."""
        return self.evaluation | self.evaluations[evaluation] | self.arms[arm].evaluation

    def select(self, names: list[str]) -> list[str]:
        """Return the arms that these findings and arms need, in the study's order.

        Raises:
            ValueError: for an unknown name.
        """
        selected: set[str] = set()
        for name in names:
            if name not in self.findings and name not in self.arms:
                known = sorted({*self.findings, *self.arms})
                raise ValueError(f"`only` has {name!r}, which is not a finding or an arm; accepted: {known}.")
            if name in self.findings:
                selected |= {self.findings[name].arm, self.findings[name].reference}
            else:
                selected.add(name)
        while more := {self.arms[name].starts_from for name in selected} - selected - {None}:
            selected |= {name for name in more if name is not None}
        return [name for name in self.arms if name in selected]

    def plan(self) -> dict[str, Any]:
        """Return everything that the plan states before the first run."""
        return {
            "seeds": list(self.seeds),
            "arms": {
                name: {
                    "recipe": self.recipe_of(name).name,
                    "settings": self.settings_of(name),
                    "starts_from": arm.starts_from,
                    "threads": self.threads,
                    "evaluations": {key: self.evaluation_of(name, key) for key in self.evaluations_of(name)},
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
    """Build a dataclass from a mapping. Error messages start with `where`."""
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
        hint = hints[name]
        alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted = tuple(typing.get_origin(one) or one for one in alternatives)
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
        ValueError: if the file does not exist, or has unknown, missing or invalid entries.

    Example:
        >>> from pathlib import Path
        >>> from diffusers_prx.study.spec import load_study
        >>> study = load_study(Path("training/studies/scenes.yaml"))
        >>> list(study.arms)
    """
    if not path.is_file():
        raise ValueError(f"`study` is {str(path)!r}, which is not a file. Pass the path of a study file.")
    values = read_yaml(path, path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping, got {type(values).__name__}.")
    for key, kind in (("arms", Arm), ("findings", Finding), ("metrics", Metric), ("needs", Prerequisite)):
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
    """Return the path of the record of a run."""
    return report_dir / "runs" / arm / f"seed_{seed}.json"


def read_record(report_dir: Path, arm: str, seed: int) -> dict[str, Any] | None:
    """Read the record of a run; None if there is none."""
    path = record_path(report_dir, arm, seed)
    return json.loads(path.read_text()) if path.is_file() else None


def flatten_numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return every number of a report by its key; nested keys are joined as `outer.inner`."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten_numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = float(value)
    return flat


def scores(record: dict[str, Any], evaluation: str) -> dict[str, float]:
    """Return the numbers of one evaluation of a run by key; empty if it is missing or the training failed."""
    if evaluation == TRAINING:
        curve = record.get("curve") or []
        return {VALIDATION_LOSS: curve[-1][1]} if curve and record["trained"] else {}
    return flatten_numbers(record.get("evaluations", {}).get(evaluation, {}))


# --- the plan


def changed_names(before: dict[str, Any], plan: dict[str, Any], kind: str) -> list[str]:
    """Return the names of arms or findings (`kind`) that were added, removed or changed between two plans."""
    names = dict.fromkeys([*before[kind], *plan[kind]])
    return [name for name in names if before[kind].get(name) != plan[kind].get(name)]


def describe_changes(before: dict[str, Any], plan: dict[str, Any]) -> str:
    """Return one phrase that names what differs between two plans; plan.json holds both in full."""
    changes = [
        f"{kind} {', '.join(names)}" for kind in ("arms", "findings") if (names := changed_names(before, plan, kind))
    ]
    if before["seeds"] != plan["seeds"]:
        changes.append(f"seeds {before['seeds']} became {plan['seeds']}")
    return "; ".join(changes)


def _keeps_results(old: dict[str, Any] | None, new: dict[str, Any] | None) -> bool:
    """True if runs made for the old version of an arm or finding are valid for the new one."""
    if old is None:
        return True
    if new is None:
        return False
    if "evaluations" in old:  # an arm: evaluations may be added
        evaluations = new["evaluations"]
        return new == old | {"evaluations": evaluations} and evaluations.items() >= old["evaluations"].items()
    return new == old | {"text": new["text"]}


def register(study: Study, report_dir: Path, date: str, commit: str | None) -> None:
    """Append the plan of a study to plan.json and plan.md if it is new or has changed.

    Args:
        study: study about to run.
        report_dir: folder of the records.
        date: current date.
        commit: commit of the code.

    Raises:
        ValueError: if an arm, a finding or a seed that has been run was changed, or if runs exist without a plan.
    """
    path = report_dir / PLAN_FILE
    entries = json.loads(path.read_text()) if path.is_file() else []
    plan = json.loads(json.dumps(study.plan()))  # with the types that reading it back gives
    runs = sorted((report_dir / "runs").glob("*/seed_*.json"))
    run_arms = {run.parent.name for run in runs}
    if runs and not entries:
        raise ValueError(f"{report_dir} has {len(runs)} runs but no {PLAN_FILE}. Restore it, or use another folder.")
    if removed := sorted({run.stem for run in runs} - {f"seed_{seed}" for seed in study.seeds}):
        raise ValueError(f"`seeds` is {study.seeds}, but {removed} have been run. Add them to the study file.")
    before = entries[-1]["plan"] if entries else plan
    for kind in ("arms", "findings"):
        for name in changed_names(before, plan, kind):
            old, new = before[kind].get(name), plan[kind].get(name)
            arm = name if kind == "arms" else (old or new)["arm"]
            if arm in run_arms and not _keeps_results(old, new):
                raise ValueError(
                    f"`{kind}`: {name} has been run with other settings than the study file has now; see {path}. Pass "
                    "another --output_dir and --report_dir, or restore the study file."
                )
    if before != plan or not entries:
        entries.append({"date": date, "commit": commit, "runs_so_far": len(runs), "plan": plan})
        write_json(path, entries)
        (report_dir / PLAN_TEXT).write_text(plan_text(study, entries))


def runs_before_finding(entries: list[dict[str, Any]]) -> dict[str, int]:
    """Return how many runs existed when each finding of the last plan was first stated."""
    return {
        name: next(entry["runs_so_far"] for entry in entries if name in entry["plan"]["findings"])
        for name in entries[-1]["plan"]["findings"]
    }


def plan_text(study: Study, entries: list[dict[str, Any]]) -> str:
    """Return the plan as Markdown: when it was stated and changed, the findings, and the settings of the arms."""
    first, last = entries[0], entries[-1]["plan"]
    lines = [
        f"# Plan of the study {study.name}",
        "",
        f"Stated on {first['date']} at commit {first['commit']}, after {first['runs_so_far']} runs. Each finding is "
        "judged by its primary metric alone: the difference arm minus reference, paired by seed, with a 95% Student "
        "interval over the seeds. If the interval excludes zero, the finding agrees or disagrees; otherwise it is "
        "undecided. Runs are not repeated with other seeds because of their result, and failed runs are reported.",
    ]
    for before, entry in itertools.pairwise(entries):
        lines += [
            "",
            f"Changed on {entry['date']} at commit {entry['commit']}, after {entry['runs_so_far']} runs: "
            f"{describe_changes(before['plan'], entry['plan'])} (both versions: {PLAN_FILE}).",
        ]
    lines += [
        "",
        "| finding | arm | reference | primary metric | better | expected | steps | seeds |",
        "|" + "---|" * 8,
    ]
    for finding in last["findings"].values():
        metric, reference_metric = finding["metrics"]
        cells = [
            finding["text"],
            finding["arm"],
            finding["reference"],
            metric if metric == reference_metric else f"{metric} against {reference_metric}",
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
