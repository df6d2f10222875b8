"""Run ablation studies: train and evaluate every arm with every seed, and keep a record of each run.

Each script runs in its own process. The record of a run is a small JSON file in the report folder. It is written after
the training and after each evaluation, so that an interrupted study resumes with the same command.
"""

import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ..files import write_json
from ..hub.publishing import kind_of, repository, upload, write_report_card
from ..training.export import REPORT_FILE, commit_of_this_package
from ..training.recipes import parse_config
from ..training.watchdog import EXIT_HUNG
from .report import write_report
from .results import THROUGHPUT_FILE
from .spec import TRAINING, Study, load_study, read_record, record_path, register, scores

TQDM_LINE = re.compile(r"\d%\|")
# Steps of a throughput run that are not timed: they include allocations and lazy initialization.
WARMUP_STEPS = 3


@dataclass(frozen=True)
class StudyOptions:
    """Options of one call of `run_study`; the names are those of the flags of training/ablate_prx.py.

    Args:
        study: study file.
        output_dir: folder of the runs; None: outputs/studies/NAME.
        report_dir: folder of records and report; None: `report` in `output_dir`.
        only: names of findings or arms; only the arms that these need are run.
        seeds: subset of the study's seeds.
        jobs: number of runs at the same time.
        time_limit: minutes after which no new run starts.
        remove_checkpoints: delete the checkpoints of finished runs; their pipelines stay.
        retry_failed: continue failed runs.
        collect: write the report from existing records and run nothing.
        dry_run: print the commands of missing runs and run nothing.
        measure_throughput: time steps of arms and references instead of running the study.
        throughput_steps: steps of a timed run.
        throughput_repeats: timed pairs per finding.
        push_to_hub: upload the report folder.
        hub_model_id: data set repository; None: the study's name.

    Raises:
        ValueError: if a number is too small, or `hub_model_id` is given without `push_to_hub`.
    """

    study: Path
    output_dir: Path | None = None
    report_dir: Path | None = None
    only: list[str] | None = None
    seeds: list[int] | None = None
    jobs: int = 1
    time_limit: float | None = None
    remove_checkpoints: bool = False
    retry_failed: bool = False
    collect: bool = False
    dry_run: bool = False
    measure_throughput: bool = False
    throughput_steps: int = 12
    throughput_repeats: int = 3
    push_to_hub: bool = False
    hub_model_id: str | None = None

    def __post_init__(self) -> None:
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError(f"`hub_model_id` is {self.hub_model_id!r}, but `push_to_hub` is not set.")
        for name, minimum in (("jobs", 1), ("throughput_steps", WARMUP_STEPS + 2), ("throughput_repeats", 1)):
            if getattr(self, name) < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(self, name)}.")


def run_study(options: StudyOptions, scripts_dir: Path) -> None:
    """Run what is missing of a study and write its report.

    Args:
        options: study file and what to do with it.
        scripts_dir: folder of train_prx.py and evaluate_prx.py.

    Raises:
        ValueError: if the study file, a setting, a seed or a Hub repository is invalid (before the first run), or if
            an evaluation lacks a metric that a finding needs.
        UploadError: if the upload fails; the report is on disk.
        Stopped: if the study was interrupted.

    Example:
        >>> from pathlib import Path
        >>> from diffusers_prx.study.runner import StudyOptions, run_study
        >>> run_study(StudyOptions(Path("training/studies/scenes.yaml"), dry_run=True), Path("training"))
    """
    study = load_study(options.study)
    seeds = study.seeds if options.seeds is None else [seed for seed in study.seeds if seed in options.seeds]
    if unknown := sorted(set(options.seeds or []) - set(study.seeds)):
        raise ValueError(f"`seeds` has {unknown}; {options.study} accepts {study.seeds}. Add new seeds to that file.")
    arms = list(study.arms) if options.only is None else study.select(options.only)
    output_dir = options.output_dir or Path("outputs/studies") / study.name
    report_dir = options.report_dir or output_dir / "report"
    if options.collect:
        _finish(study, report_dir, _repository(study, options))
        return
    runner = StudyRunner(study, output_dir, report_dir, options, scripts_dir)
    with runner.processes.lock:
        check_settings(runner, arms)
        if options.dry_run:
            runner.print_commands(arms, seeds)
            return
        repo_id = _repository(study, options)  # before the first run, so that a wrong token does not cost a study
        register(study, report_dir, utc_now(), commit_of_this_package())
        if options.measure_throughput:
            runner.measure_throughput(arms)
        else:
            runner.run_all(arms, seeds)
    _finish(study, report_dir, repo_id)


def check_settings(runner: "StudyRunner", arms: list[str]) -> None:
    """Validate the training settings of arms before anything runs.

    Raises:
        ValueError: names the first invalid arm and its setting.
    """
    for arm in arms:
        try:
            parse_config(runner.training_flags(arm, runner.study.seeds[0]))
        except ValueError as error:
            raise ValueError(f"arm {arm}: {error}") from error


def _repository(study: Study, options: StudyOptions) -> str | None:
    return repository(options.hub_model_id or study.name, "dataset") if options.push_to_hub else None


def _finish(study: Study, report_dir: Path, repo_id: str | None) -> None:
    print(f"report: {write_report(study, report_dir)}", flush=True)
    if repo_id is not None:
        write_report_card(report_dir)
        print(f"uploaded to {upload(report_dir, repo_id, kind_of(report_dir), 'Report of the study ' + study.name)}")


# --- flags of the scripts


def training_flag(name: str, value: Any) -> list[str]:
    """Return a setting as a flag of training/train_prx.py, which parses values as YAML."""
    if isinstance(value, str):
        return [f"--{name}", value]
    return [f"--{name}", yaml.safe_dump(value, default_flow_style=True, width=float("inf")).split("\n...")[0].strip()]


def evaluation_flag(name: str, value: Any) -> list[str]:
    """Return a setting as a flag of training/evaluate_prx.py: a switch has no value, a list has several."""
    if value is None or value is False:
        return []
    values = value if isinstance(value, list) else [] if value is True else [value]
    return [f"--{name}", *map(str, values)]


# --- processes


class Stopped(Exception):
    """The study was interrupted; runs in progress have no result."""


class ScriptProcesses:
    """Child processes that run scripts, can be stopped together, and keep the output folder locked.

    Args:
        output_dir: folder of the runs, created if necessary.

    Raises:
        ValueError: if another study, or a run that it started, is active in the folder.
    """

    def __init__(self, output_dir: Path):
        self.stopping = threading.Event()
        self.running: set[subprocess.Popen] = set()
        output_dir.mkdir(parents=True, exist_ok=True)
        self.lock = open(output_dir / "lock", "w")  # noqa: SIM115 - held as long as the process, and by its children
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"`output_dir` {output_dir} is in use by another study or by a run that it started. Wait for it, stop "
                "it, or pass another `--output_dir`."
            ) from None

    def call(self, script: Path, arguments: list[str], log: Path, threads: int) -> int:
        """Run a script to its end and append its output to `log`.

        Returns:
            Exit code, or minus the signal that ended the script.

        Raises:
            Stopped: if the study is being stopped.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(script), *arguments]
        with log.open("a") as output:
            output.write(f"\n$ {shlex.join(command)}\n")
            output.flush()
            if self.stopping.is_set():
                raise Stopped
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C reaches only this process, which stops the others
                pass_fds=[self.lock.fileno()],  # a run that outlives this process keeps the folder locked
            )
            self.running.add(process)
            if self.stopping.is_set():
                process.terminate()
            code = process.wait()
            self.running.discard(process)
        if self.stopping.is_set():
            raise Stopped
        return code

    def stop(self) -> None:
        """Terminate all running scripts and refuse new ones."""
        self.stopping.set()
        for process in list(self.running):
            process.terminate()


def utc_now() -> str:
    """Return the current time as `2026-11-26 16:50 UTC`."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def machine_info() -> dict[str, Any]:
    """Return CPU model, number of cores, operating system and Python version."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (model := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        cpu = model[1]
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def last_line(log: Path) -> str:
    """Return the last line of a log that is not a progress bar: the error of a failed script."""
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()]
    return next((line for line in reversed(lines) if line and not TQDM_LINE.search(line)), "")[:500]


def failure_of(stage: str, code: int, log: Path) -> dict[str, Any]:
    """Return the entry of a record's `failures` for a script that failed."""
    message = f"killed by signal {-code}" if code < 0 else last_line(log).removeprefix("error: ")
    if code == EXIT_HUNG:
        message = "a step did not end in time"
    return {"stage": stage, "exit_code": code, "message": message}


# --- runs


class StudyRunner:
    """Trains and evaluates the arms of a study.

    Args:
        study: study to run.
        output_dir: folder of the runs.
        report_dir: folder of the records.
        options: limits and switches; `study`, `output_dir` and `report_dir` in it are not read here.
        scripts_dir: folder of train_prx.py and evaluate_prx.py.

    Raises:
        ValueError: if another study is active in `output_dir`.
    """

    def __init__(self, study: Study, output_dir: Path, report_dir: Path, options: StudyOptions, scripts_dir: Path):
        self.study, self.output_dir, self.report_dir, self.options = study, output_dir, report_dir, options
        self.train_script, self.evaluate_script = scripts_dir / "train_prx.py", scripts_dir / "evaluate_prx.py"
        self.deadline = None if options.time_limit is None else time.monotonic() + 60 * options.time_limit
        self.processes = ScriptProcesses(output_dir)
        self.futures: dict[tuple[str, int], Future] = {}

    def folder(self, arm: str, seed: int) -> Path:
        return self.output_dir / arm / f"seed_{seed}"

    def has_pipeline(self, arm: str, seed: int) -> bool:
        return (self.folder(arm, seed) / "model_index.json").is_file()

    def past_deadline(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def training_flags(self, arm: str, seed: int) -> list[str]:
        settings = self.study.settings_of(arm)
        start = self.study.arms[arm].starts_from
        if start is not None:
            settings["pretrained_model_name_or_path"] = str(self.folder(start, seed))
        settings |= {"seed": seed, "output_dir": str(self.folder(arm, seed)), "resume_from_checkpoint": "latest"}
        flags = [part for name, value in settings.items() for part in training_flag(name, value)]
        return ["--config", str(self.study.recipe_of(arm)), *flags]

    def evaluation_flags(self, arm: str, seed: int, evaluation: str) -> list[str]:
        folder = self.folder(arm, seed)
        settings = self.study.evaluation_of(arm, evaluation)
        flags = [part for name, value in settings.items() for part in evaluation_flag(name, value)]
        return ["--model", str(folder), "--output_dir", str(folder / f"evaluation_{evaluation}"), *flags]

    def make_prerequisites(self, arms: list[str]) -> None:
        """Make the missing networks that arms need (`needs` in the study file), with all cores.

        Raises:
            ValueError: if a command fails.
        """
        for name in dict.fromkeys(name for arm in arms for name in self.study.arms[arm].needs):
            prerequisite, log = self.study.needs[name], self.output_dir / "needs" / f"{name}.log"
            report = Path(prerequisite.makes) / REPORT_FILE
            if not report.is_file():
                print(f"making {name}: {prerequisite.command}", flush=True)
                script, *arguments = shlex.split(prerequisite.command)
                code = self.processes.call(Path(script), arguments, log, os.cpu_count() or 1)
                if code != 0 or not report.is_file():
                    raise ValueError(f"`needs`: making {name} failed (exit code {code}): {last_line(log)}; see {log}.")
            record = {"command": prerequisite.command, "training": json.loads(report.read_text())}
            write_json(self.report_dir / "needs" / f"{name}.json", record)

    def is_done(self, arm: str, seed: int) -> bool:
        """True if a run has all its evaluations, or has failed and `retry_failed` is off."""
        record = read_record(self.report_dir, arm, seed)
        if record is None or (record["status"] == "failed" and self.options.retry_failed):
            return False
        missing = set(self.study.evaluations_of(arm)) - set(record["evaluations"])
        return record["status"] == "failed" or not missing

    def run(self, arm: str, seed: int) -> str:
        """Train and evaluate one run, writing its record after each part. Return the outcome as a message."""
        if self.past_deadline():
            return "not started: --time_limit"
        start = self.study.arms[arm].starts_from
        if start is not None and (start, seed) in self.futures:
            self.futures[start, seed].result()
        record = read_record(self.report_dir, arm, seed)
        failure = None
        if record is None or not record["trained"]:
            record = self.new_record(arm, seed, [] if record is None else record["failures"])
            failure = self.train(arm, seed, record)
        elif not self.has_pipeline(arm, seed):
            return f"not evaluated further: {self.folder(arm, seed)} no longer contains a pipeline"
        for evaluation in self.study.evaluations_of(arm):
            if failure is None and evaluation not in record["evaluations"]:
                failure = self.evaluate(arm, seed, evaluation, record)
        record["status"] = "finished" if failure is None else "failed"
        record["ended"] = utc_now()
        if failure is not None:
            record["failures"].append(failure | {"date": utc_now()})
        write_json(record_path(self.report_dir, arm, seed), record)
        if failure is None and self.options.remove_checkpoints:
            for checkpoint in self.folder(arm, seed).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        return "finished" if failure is None else f"failed: {failure['message']}"

    def new_record(self, arm: str, seed: int, earlier_failures: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "arm": arm,
            "seed": seed,
            "status": "failed",
            "trained": False,
            "started": utc_now(),
            "jobs": self.options.jobs,
            "threads": self.study.threads,
            "machine": machine_info(),
            "evaluations": {},
            "failures": earlier_failures,
        }

    def train(self, arm: str, seed: int, record: dict[str, Any]) -> dict[str, Any] | None:
        """Train a run and add the results to its record. Return the failure, or None."""
        folder, start = self.folder(arm, seed), self.study.arms[arm].starts_from
        log = folder / "log.txt"
        if start is not None and not self.has_pipeline(start, seed):
            message = f"{self.folder(start, seed)}, from which it starts, contains no pipeline"
            return {"stage": TRAINING, "exit_code": None, "message": message}
        code = self.processes.call(self.train_script, self.training_flags(arm, seed), log, self.study.threads)
        if (folder / REPORT_FILE).is_file():
            training = json.loads((folder / REPORT_FILE).read_text())
            copied = ("steps", "seconds", "parameters", "device", "commit", "versions", "sessions", "config")
            record |= {name: training[name] for name in (*copied, "alignment_history")}
            record["seconds_per_step"] = training["seconds"] / max(1, training["steps"])
            record["training_loss"] = [[entry["step"], entry["loss/flow"]] for entry in training["history"]]
            validated = [entry for entry in training["validation_history"] if "validation/loss" in entry]
            record["curve"] = [[entry["step"], entry["validation/loss"]] for entry in validated]
        if code != 0:
            return failure_of(TRAINING, code, log)
        record["trained"] = True
        if grids := sorted((folder / "validation").glob("step-*.png")):
            kept = record_path(self.report_dir, arm, seed).with_suffix(".png")
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(grids[-1], kept)
        write_json(record_path(self.report_dir, arm, seed), record | {"status": "trained"})
        return None

    def evaluate(self, arm: str, seed: int, evaluation: str, record: dict[str, Any]) -> dict[str, Any] | None:
        """Evaluate a run and add the report to its record. Return the failure, or None.

        Raises:
            ValueError: if the report lacks a metric of a finding, which would be missing in every run.
        """
        folder = self.folder(arm, seed)
        flags, log = self.evaluation_flags(arm, seed, evaluation), folder / "log.txt"
        code = self.processes.call(self.evaluate_script, flags, log, self.study.threads)
        if code != 0:
            return failure_of(evaluation, code, log)
        report = json.loads((folder / f"evaluation_{evaluation}" / "report.json").read_text())
        of_training = ("steps", "seconds", "commit", "versions", "config")  # already in the record
        record["evaluations"][evaluation] = {key: value for key, value in report.items() if key not in of_training}
        write_json(record_path(self.report_dir, arm, seed), record | {"status": "trained"})
        self.require_metrics(arm, evaluation, record)
        return None

    def require_metrics(self, arm: str, evaluation: str, record: dict[str, Any]) -> None:
        found = scores(record, evaluation)
        for finding in self.study.findings.values():
            for metric in self.study.metrics_of(finding):
                source, key = self.study.split_metric(metric)
                if source == evaluation and arm in (finding.arm, finding.reference) and key not in found:
                    raise ValueError(
                        f"`metrics` has {key!r}, which report.json of the evaluation {evaluation} lacks; accepted: "
                        f"{list(found)}."
                    )

    def print_commands(self, arms: list[str], seeds: list[int]) -> None:
        """Print the commands that `run_all` would run, in their order."""
        for seed in seeds:
            for arm in [arm for arm in arms if not self.is_done(arm, seed)]:
                print(shlex.join(["python", "training/train_prx.py", *self.training_flags(arm, seed)]))
                for evaluation in self.study.evaluations_of(arm):
                    flags = self.evaluation_flags(arm, seed, evaluation)
                    print(shlex.join(["python", "training/evaluate_prx.py", *flags]))

    def run_all(self, arms: list[str], seeds: list[int]) -> None:
        """Run all arms with the first seed, then with the second, and so on: arms can be dropped before seeds are.

        Raises:
            ValueError: for an error that would affect every run; active runs are stopped.
        """
        missing = [(arm, seed) for seed in seeds for arm in arms if not self.is_done(arm, seed)]
        print(f"{len(missing)} runs to do, {len(arms) * len(seeds) - len(missing)} done", flush=True)
        self.make_prerequisites([arm for arm, _ in missing])
        with ThreadPoolExecutor(self.options.jobs) as pool, tqdm(total=len(missing), unit="run") as progress:

            def run_one(arm: str, seed: int) -> None:
                if self.processes.stopping.is_set():
                    raise Stopped
                outcome = self.run(arm, seed)
                progress.update()
                progress.write(f"{utc_now()}  {arm}, seed {seed}: {outcome}")

            try:
                for arm, seed in missing:
                    self.futures[arm, seed] = pool.submit(run_one, arm, seed)
                for future in self.futures.values():
                    future.result()
            except BaseException:  # including Ctrl-C: active runs stop, and nothing is recorded for them
                self.processes.stop()
                pool.shutdown(cancel_futures=True)
                raise

    # --- throughput

    def measure_throughput(self, arms: list[str]) -> None:
        """Time a few steps of the arm and the reference of every finding, one run at a time."""
        path = self.report_dir / THROUGHPUT_FILE
        measured = json.loads(path.read_text()) if path.is_file() else []
        done = {(entry["arm"], entry["reference"], entry["repeat"]) for entry in measured}
        findings = self.study.findings.values()
        pairs = dict.fromkeys((finding.arm, finding.reference) for finding in findings if finding.arm in arms)
        self.make_prerequisites([arm for pair in pairs for arm in pair])
        for repeat in range(self.options.throughput_repeats):
            for pair in pairs:
                if (*pair, repeat) in done:
                    continue
                if self.past_deadline():
                    print("--time_limit: the remaining pairs are not timed")
                    return
                # alternating order, because the load of the machine drifts
                seconds = {arm: self.time_steps(arm) for arm in (pair if repeat % 2 else pair[::-1])}
                arm_seconds, reference_seconds = seconds[pair[0]], seconds[pair[1]]
                if arm_seconds is None or reference_seconds is None:
                    continue
                entry = {"arm": pair[0], "reference": pair[1], "repeat": repeat, "date": utc_now()}
                entry |= {"steps": self.options.throughput_steps, "threads": self.study.threads}
                entry |= {"load": os.getloadavg()[0], "machine": machine_info()}
                measured.append(entry | {"seconds_arm": arm_seconds, "seconds_reference": reference_seconds})
                write_json(path, measured)
                ratio = reference_seconds / arm_seconds
                print(f"{utc_now()}  {pair[0]} against {pair[1]}: {ratio:.3f} times its steps per second", flush=True)

    def time_steps(self, arm: str) -> float | None:
        """Return the median seconds of a training step, or None if the run cannot start or fails."""
        steps, seed = self.options.throughput_steps, self.study.seeds[0]
        start = self.study.arms[arm].starts_from
        if start is not None and not self.has_pipeline(start, seed):
            print(f"{arm} was not timed: it starts from {start}, which has not been run", flush=True)
            return None
        with tempfile.TemporaryDirectory(dir=self.output_dir) as folder:
            settings = {
                "output_dir": folder,
                "max_train_steps": steps,
                "lr_scheduler": "constant",
                "lr_warmup_steps": 0,
                "lr_decay_steps": None,
                "num_validation_samples": 0,
                "validation_prompts": [],
                "validation_steps": steps,
                "logging_steps": 1,
                "repa_until_step": None,
                "checkpointing_steps": steps,
            }
            overrides = [part for name, value in settings.items() for part in training_flag(name, value)]
            flags = [*self.training_flags(arm, seed), *overrides]  # the last of repeated flags counts
            log = self.output_dir / "throughput.log"
            if self.processes.call(self.train_script, flags, log, self.study.threads) != 0:
                print(f"{arm} was not timed: {last_line(log)}", flush=True)
                return None
            training = json.loads((Path(folder) / REPORT_FILE).read_text())
        ends = [entry["seconds"] for entry in training["history"]]
        return statistics.median(end - begin for begin, end in zip(ends[WARMUP_STEPS - 1 :], ends[WARMUP_STEPS:]))
