"""Run an ablation study: `python training/ablate_prx.py --study training/studies/scenes.yaml`.

Every arm of the study file is trained with every seed (training/train_prx.py) and evaluated
(training/evaluate_prx.py); all arms at the first seed, then all at the second. What a run gave is kept in a small file
when it ends, so that the same command goes on where a study stopped. At the end, or from these files alone with
--collect, the report is written: report.md, report.html and pictures, in the report folder. --push_to_hub then uploads
that folder; that the token may write to the repository is made sure of before anything runs.

One row of the report again, with its reference, somewhere else:
`python training/ablate_prx.py --study training/studies/scenes.yaml --only repa --output_dir outputs/again`.
"""

import argparse
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from diffusers_prx.cli import end, parse_flags, path
from diffusers_prx.files import write_json
from diffusers_prx.hub.publishing import (
    EXIT_NOT_UPLOADED,
    UploadError,
    kind_of,
    repository,
    upload,
    write_report_card,
)
from diffusers_prx.study.report import THROUGHPUT_FILE, write_report
from diffusers_prx.study.spec import (
    TRAINING,
    Study,
    load_study,
    read_record,
    record_path,
    register,
    scores,
)
from diffusers_prx.training.export import REPORT_FILE, commit_of_this_package
from diffusers_prx.training.faults import EXIT_HUNG
from diffusers_prx.training.recipes import parse_config

FOLDER = Path(__file__).resolve().parent
PROGRESS = re.compile(r"\d%\|")  # of tqdm
# steps of a throughput run that are not counted: allocations, and whatever is made on first use
WARM_UP = 3


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=path, required=True, help="The study file.")
    parser.add_argument("--output_dir", type=path, help="Folder of the runs; default: outputs/studies/NAME.")
    parser.add_argument("--report_dir", type=path, help="Folder of what is kept; default: report in --output_dir.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Only what these findings or arms need.")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="Only these of the study's seeds.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at once, each with the study's threads.")
    parser.add_argument("--time_limit", type=float, metavar="MINUTES", help="Start no new run after this time.")
    parser.add_argument("--remove_checkpoints", action="store_true", help="Of runs that are done; pipelines stay.")
    parser.add_argument("--retry_failed", action="store_true", help="Go on with runs that failed, with their seed.")
    parser.add_argument("--collect", action="store_true", help="Write the report from what was kept, run nothing.")
    parser.add_argument("--dry_run", action="store_true", help="Print the commands of the missing runs and stop.")
    parser.add_argument(
        "--measure_throughput", action="store_true",
        help="Time steps of arm and reference in turns, alone, instead of running the study.",
    )  # fmt: skip
    parser.add_argument("--throughput_steps", type=int, default=12, help="Steps of a timed run.")
    parser.add_argument("--throughput_repeats", type=int, default=3, help="Timed pairs of each finding.")
    parser.add_argument("--push_to_hub", action="store_true", help="Upload the report folder once it is written.")
    parser.add_argument(
        "--hub_model_id", metavar="REPO_ID",
        help="Data set repository to upload to, as name or namespace/name. Default: the study's name.",
    )  # fmt: skip
    args = parse_flags(parser, argv)
    if args.hub_model_id is not None and not args.push_to_hub:
        parser.error(f"--hub_model_id is {args.hub_model_id!r}, but --push_to_hub is not set")
    for name, least in (("jobs", 1), ("throughput_steps", WARM_UP + 2), ("throughput_repeats", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    return args


def flag(name: str, value: Any) -> list[str]:
    """A setting as a flag of training/train_prx.py, which reads values as YAML."""
    if isinstance(value, str):
        return [f"--{name}", value]
    return [f"--{name}", yaml.safe_dump(value, default_flow_style=True, width=float("inf")).split("\n...")[0].strip()]


def evaluation_flag(name: str, value: Any) -> list[str]:
    """A setting as a flag of training/evaluate_prx.py: switches without a value, lists with several."""
    if value is None or value is False:
        return []
    values = value if isinstance(value, list) else [] if value is True else [value]
    return [f"--{name}", *map(str, values)]


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def machine() -> dict[str, Any]:
    """What the runs were made on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def last_line(log: Path) -> str:
    """What a script said last, but for progress bars: its error."""
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()]
    return next((line for line in reversed(lines) if line and not PROGRESS.search(line)), "")[:500]


class Stopped(Exception):
    """The study is being stopped: what was going on is not a result."""


class Runner:
    """Runs the scripts of a study, each in a process of its own.

    Args:
        study: what to run.
        output_dir: of the runs.
        report_dir: of what is kept.
        args: of this script.
    """

    def __init__(self, study: Study, output_dir: Path, report_dir: Path, args: argparse.Namespace):
        self.study, self.output_dir, self.report_dir, self.args = study, output_dir, report_dir, args
        self.deadline = None if args.time_limit is None else time.monotonic() + 60 * args.time_limit
        self.stopping = threading.Event()
        self.processes: set[subprocess.Popen] = set()
        self.futures: dict[tuple[str, int], Future] = {}
        output_dir.mkdir(parents=True, exist_ok=True)
        self.lock = open(output_dir / "lock", "w")  # noqa: SIM115 - held as long as the process, and by its children
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"Another study, or a run that it started, is still at work in {output_dir}.") from None

    # --- scripts

    def call(self, script: Path, arguments: list[str], log: Path, threads: int) -> int:
        """Run a script to its end; what it prints goes to `log`. Its exit code; negative: the signal that ended it."""
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
                start_new_session=True,  # Ctrl-C reaches this process only, which stops the others
                pass_fds=[self.lock.fileno()],  # a run that outlives this process keeps the folder locked
            )
            self.processes.add(process)
            if self.stopping.is_set():
                process.terminate()
            code = process.wait()
            self.processes.discard(process)
        if self.stopping.is_set():
            raise Stopped
        return code

    def stop(self) -> None:
        self.stopping.set()
        for process in list(self.processes):
            process.terminate()

    def folder(self, arm: str, seed: int) -> Path:
        return self.output_dir / arm / f"seed_{seed}"

    def training_flags(self, arm: str, seed: int) -> list[str]:
        settings = self.study.settings_of(arm)
        start = self.study.arms[arm].starts_from
        if start is not None:
            settings["pretrained_model_name_or_path"] = str(self.folder(start, seed))
        settings |= {"seed": seed, "output_dir": str(self.folder(arm, seed)), "resume_from_checkpoint": "latest"}
        flags = [part for name, value in settings.items() for part in flag(name, value)]
        return ["--config", str(self.study.recipe_of(arm)), *flags]

    def evaluation_flags(self, arm: str, seed: int, evaluation: str) -> list[str]:
        folder = self.folder(arm, seed)
        flags = [
            part
            for name, value in self.study.evaluation_of(arm, evaluation).items()
            for part in evaluation_flag(name, value)
        ]
        return ["--model", str(folder), "--output_dir", str(folder / f"evaluation_{evaluation}"), *flags]

    # --- what is made once

    def make_needs(self, arms: list[str]) -> None:
        """Make what these arms need and is not there yet, with all cores.

        Raises:
            ValueError: if a command fails.
        """
        for name in dict.fromkeys(name for arm in arms for name in self.study.arms[arm].needs):
            need, log = self.study.needs[name], self.output_dir / "needs" / f"{name}.log"
            made = Path(need.makes) / REPORT_FILE
            if not made.is_file():
                print(f"making {name}: {need.command}", flush=True)
                script, *arguments = shlex.split(need.command)
                code = self.call(Path(script), arguments, log, os.cpu_count() or 1)
                if code != 0 or not made.is_file():
                    raise ValueError(f"`needs`: {name} was not made (exit code {code}): {last_line(log)}; see {log}.")
            kept = self.report_dir / "needs" / f"{name}.json"
            write_json(kept, {"command": need.command, "training": json.loads(made.read_text())})

    # --- one run

    def is_done(self, arm: str, seed: int) -> bool:
        """Nothing is left to do of a run, or it failed and is not to be tried again."""
        record = read_record(self.report_dir, arm, seed)
        if record is None or (record["status"] == "failed" and self.args.retry_failed):
            return False
        missing = set(self.study.evaluations_of(arm)) - set(record["evaluations"])
        return record["status"] == "failed" or not missing

    def run(self, arm: str, seed: int) -> str:
        """Train and evaluate; what it gave is kept after each. Returns what to print."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            return "not started: --time_limit"
        start = self.study.arms[arm].starts_from
        if (start, seed) in self.futures:
            self.futures[start, seed].result()
        old = read_record(self.report_dir, arm, seed)
        if old is None or not old["trained"]:
            record = {
                "arm": arm,
                "seed": seed,
                "status": "failed",
                "trained": False,
                "started": now(),
                "jobs": self.args.jobs,
                "threads": self.study.threads,
                "machine": machine(),
                "evaluations": {},
                "failures": [] if old is None else old["failures"],
            }
            failure = self.train(arm, seed, record)
        elif not (self.folder(arm, seed) / "model_index.json").is_file():
            return f"not evaluated further: {self.folder(arm, seed)} holds no pipeline any more"
        else:
            record, failure = old, None
        for evaluation in self.study.evaluations_of(arm):
            if failure is None and evaluation not in record["evaluations"]:
                failure = self.evaluate(arm, seed, evaluation, record)
        record["status"] = "finished" if failure is None else "failed"
        record["ended"] = now()
        if failure is not None:
            record["failures"].append(failure | {"date": now()})
        write_json(record_path(self.report_dir, arm, seed), record)
        if failure is None and self.args.remove_checkpoints:
            for checkpoint in self.folder(arm, seed).glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        return "finished" if failure is None else f"failed: {failure['message']}"

    def failure(self, stage: str, code: int, log: Path) -> dict[str, Any]:
        ended = f"killed by signal {-code}" if code < 0 else last_line(log).removeprefix("error: ")
        if code == EXIT_HUNG:
            ended = "a step did not end in time"
        return {"stage": stage, "exit_code": code, "message": ended}

    def train(self, arm: str, seed: int, record: dict[str, Any]) -> dict[str, Any] | None:
        """Train a run and put what it wrote into its record; what went wrong, if something did."""
        folder, start = self.folder(arm, seed), self.study.arms[arm].starts_from
        log = folder / "log.txt"
        if start is not None and not (self.folder(start, seed) / "model_index.json").is_file():
            message = f"{self.folder(start, seed)}, which it starts from, holds no pipeline"
            return {"stage": TRAINING, "exit_code": None, "message": message}
        code = self.call(FOLDER / "train_prx.py", self.training_flags(arm, seed), log, self.study.threads)
        if (folder / REPORT_FILE).is_file():
            training = json.loads((folder / REPORT_FILE).read_text())
            kept = ("steps", "seconds", "parameters", "device", "commit", "versions", "sessions", "config")
            record |= {name: training[name] for name in (*kept, "alignment_history")}
            record["seconds_per_step"] = training["seconds"] / max(1, training["steps"])
            record["training_loss"] = [[entry["step"], entry["loss/flow"]] for entry in training["history"]]
            record["curve"] = [[entry["step"], entry["validation/loss"]] for entry in training["validation_history"]]
        if code != 0:
            return self.failure(TRAINING, code, log)
        record["trained"] = True
        pictures = sorted((folder / "validation").glob("step-*.png"))
        if pictures:
            kept_picture = record_path(self.report_dir, arm, seed).with_suffix(".png")
            kept_picture.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pictures[-1], kept_picture)
        write_json(record_path(self.report_dir, arm, seed), record | {"status": "trained"})
        return None

    def evaluate(self, arm: str, seed: int, evaluation: str, record: dict[str, Any]) -> dict[str, Any] | None:
        """Evaluate a run and put the report into its record.

        Raises:
            ValueError: if the report lacks a metric that a finding is judged by: it would be missing everywhere.
        """
        folder = self.folder(arm, seed)
        flags, log = self.evaluation_flags(arm, seed, evaluation), folder / "log.txt"
        code = self.call(FOLDER / "evaluate_prx.py", flags, log, self.study.threads)
        if code != 0:
            return self.failure(evaluation, code, log)
        report = json.loads((folder / f"evaluation_{evaluation}" / "report.json").read_text())
        of_training = ("steps", "seconds", "commit", "versions", "config")  # in the record already
        record["evaluations"][evaluation] = {key: value for key, value in report.items() if key not in of_training}
        write_json(record_path(self.report_dir, arm, seed), record | {"status": "trained"})
        found = scores(self.study, record, evaluation)
        for finding in self.study.findings.values():
            for metric in self.study.metrics_of(finding):
                which, key = self.study.split_metric(metric)
                if which == evaluation and arm in (finding.arm, finding.reference) and key not in found:
                    raise ValueError(
                        f"The evaluation {evaluation} has no {key!r} in its report.json; it has {list(found)}."
                    )
        return None

    # --- all runs

    def print_commands(self, arms: list[str], seeds: list[int]) -> None:
        """What `run_all` would run, in its order."""
        for seed in seeds:
            for arm in [arm for arm in arms if not self.is_done(arm, seed)]:
                print(shlex.join(["python", "training/train_prx.py", *self.training_flags(arm, seed)]))
                for evaluation in self.study.evaluations_of(arm):
                    flags = self.evaluation_flags(arm, seed, evaluation)
                    print(shlex.join(["python", "training/evaluate_prx.py", *flags]))

    def run_all(self, arms: list[str], seeds: list[int]) -> None:
        """All arms with the first seed, then with the second: so that arms can be left out before seeds are.

        Raises:
            ValueError: for what would spoil every run; running ones are stopped.
        """
        missing = [(arm, seed) for seed in seeds for arm in arms if not self.is_done(arm, seed)]
        print(f"{len(missing)} runs to do, {len(arms) * len(seeds) - len(missing)} are there", flush=True)
        self.make_needs([arm for arm, _ in missing])
        with ThreadPoolExecutor(self.args.jobs) as pool, tqdm(total=len(missing), unit="run") as progress:

            def one(arm: str, seed: int) -> None:
                if self.stopping.is_set():
                    raise Stopped
                said = self.run(arm, seed)
                progress.update()
                progress.write(f"{now()}  {arm}, seed {seed}: {said}")

            try:
                for arm, seed in missing:
                    self.futures[arm, seed] = pool.submit(one, arm, seed)
                for future in self.futures.values():
                    future.result()
            except BaseException:  # also Ctrl-C: what is running stops, and nothing is recorded of it
                self.stop()
                pool.shutdown(cancel_futures=True)
                raise

    def measure_throughput(self, arms: list[str]) -> None:
        """Time a few steps of every finding's arm and reference, one after the other and nothing beside them."""
        path = self.report_dir / THROUGHPUT_FILE
        measured = json.loads(path.read_text()) if path.is_file() else []
        pairs = dict.fromkeys(
            (finding.arm, finding.reference) for finding in self.study.findings.values() if finding.arm in arms
        )
        self.make_needs([arm for pair in pairs for arm in pair])
        for repeat in range(self.args.throughput_repeats):
            for pair in pairs:
                if any((old["arm"], old["reference"], old["repeat"]) == (*pair, repeat) for old in measured):
                    continue
                if self.deadline is not None and time.monotonic() > self.deadline:
                    print("--time_limit: the rest of the throughput is not measured")
                    return
                # in turns: what the machine does beside this changes slowly
                order = pair if repeat % 2 else pair[::-1]
                seconds = {arm: self.time_steps(arm) for arm in order}
                if None not in seconds.values():
                    entry = {"arm": pair[0], "reference": pair[1], "repeat": repeat, "date": now()}
                    entry |= {"steps": self.args.throughput_steps, "threads": self.study.threads}
                    entry |= {"load": os.getloadavg()[0], "machine": machine()}
                    measured.append(entry | {"seconds_arm": seconds[pair[0]], "seconds_reference": seconds[pair[1]]})
                    write_json(path, measured)
                    ratio = seconds[pair[1]] / seconds[pair[0]]
                    print(f"{now()}  {pair[0]} against {pair[1]}: {ratio:.3f} times its steps per second", flush=True)

    def time_steps(self, arm: str) -> float | None:
        """The median seconds of a training step; None where the run does not start or fails."""
        steps, seed = self.args.throughput_steps, self.study.seeds[0]
        start = self.study.arms[arm].starts_from
        if start is not None and not (self.folder(start, seed) / "model_index.json").is_file():
            print(f"{arm} starts from {start}, which has not been run: not timed", flush=True)
            return None
        with tempfile.TemporaryDirectory(dir=self.output_dir) as folder:
            settings = {
                "output_dir": folder, "max_train_steps": steps, "lr_scheduler": "constant", "lr_warmup_steps": 0,
                "lr_decay_steps": None, "num_validation_samples": 0, "validation_prompts": [], "logging_steps": 1,
                "validation_steps": steps, "repa_until_step": None, "checkpointing_steps": steps,
            }  # fmt: skip
            flags = [part for name, value in settings.items() for part in flag(name, value)]
            log = self.output_dir / "throughput.log"
            # of a flag that is given twice, the last one counts
            code = self.call(
                FOLDER / "train_prx.py", [*self.training_flags(arm, seed), *flags], log, self.study.threads
            )
            if code != 0:
                print(f"{arm} was not timed: {last_line(log)}", flush=True)
                return None
            training = json.loads((Path(folder) / REPORT_FILE).read_text())
        ends = [entry["seconds"] for entry in training["history"]]
        return statistics.median(end - begin for begin, end in zip(ends[WARM_UP - 1 :], ends[WARM_UP:]))


def check_settings(runner: Runner, arms: list[str]) -> None:
    """Refuse a study of which a run would be refused.

    Raises:
        ValueError: with the arm's name and what is wrong.
    """
    for arm in arms:
        try:
            parse_config(runner.training_flags(arm, runner.study.seeds[0]))
        except ValueError as error:
            raise ValueError(f"arm {arm}: {error}") from error


def repository_of(study: Study, args: argparse.Namespace) -> str | None:
    """The repository that the report is to go to, created where it is not there; see `publishing.repository`."""
    return repository(args.hub_model_id or study.name, "dataset") if args.push_to_hub else None


def finish(study: Study, report_dir: Path, repo_id: str | None) -> None:
    """Write the report from what was kept, and upload the folder where it has a repository.

    Raises:
        UploadError: if sending fails; the report is written.
    """
    print(f"report: {write_report(study, report_dir)}", flush=True)
    if repo_id is not None:
        write_report_card(report_dir)
        print(f"uploaded to {upload(report_dir, repo_id, kind_of(report_dir), 'Report of the study ' + study.name)}")


def run(args: argparse.Namespace) -> None:
    study = load_study(args.study)
    seeds = study.seeds if args.seeds is None else [seed for seed in study.seeds if seed in args.seeds]
    if args.seeds is not None and (unknown := sorted(set(args.seeds) - set(study.seeds))):
        raise ValueError(
            f"`seeds` {unknown} are not the study's, which are {study.seeds}: put them into {args.study}."
        )
    arms = list(study.arms) if args.only is None else study.select(args.only)
    output_dir = args.output_dir or Path("outputs/studies") / study.name
    report_dir = args.report_dir or output_dir / "report"
    if args.collect:
        finish(study, report_dir, repository_of(study, args))
        return
    runner = Runner(study, output_dir, report_dir, args)
    with runner.lock:
        check_settings(runner, arms)
        if args.dry_run:
            runner.print_commands(arms, seeds)
            return
        repo_id = repository_of(study, args)  # now: neither a wrong token nor a wrong name may cost a study
        register(study, report_dir, now(), commit_of_this_package())
        if args.measure_throughput:
            runner.measure_throughput(arms)
        else:
            runner.run_all(arms, seeds)
    finish(study, report_dir, repo_id)


def interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        run(args)
    except ValueError as error:
        end(error)
    except UploadError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_NOT_UPLOADED)
    except (KeyboardInterrupt, Stopped, CancelledError):
        sys.exit("stopped; the same command goes on")
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    main()
