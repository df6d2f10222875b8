"""Fault handling: lost data workers, steps that never end, signals that ask the run to go, and losses that are not
finite. What a run does about each is in `trainer.py` and `bookkeeping.py`; here is how it notices."""

import faulthandler
import fcntl
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from tqdm.auto import tqdm

from .stages import Stage

# "temporary failure, try again" of sysexits.h: a scheduler can requeue a job that ends with it
EXIT_PREEMPTED = 75
EXIT_HUNG = 70  # "internal software error" of the same
PREEMPTED_FILE = "preempted.json"
LOCK_FILE = ".run.lock"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# more steps in a row than this without a finite loss, and it is the weights that are broken, not the data
SKIPPED_IN_A_ROW = 10
# a data worker that is lost so often without a batch in between will be lost again
LOST_IN_A_ROW = 3


def steady_batches(
    stage: Stage, start_step: int, rank: int, processes: int, device: torch.device, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """`Stage.training_batches`, with workers that are started again where they were lost: no sample is lost or twice.

    Args:
        stage: what is read.
        start_step, rank, processes, device: see there.
        counts: "lost_workers" is counted in it.

    Raises:
        RuntimeError, OSError, EOFError: once workers are lost more than `LOST_IN_A_ROW` times without a batch in
            between; and what a worker raises.
    """
    accumulation = stage.cfg.gradient_accumulation_steps
    done, lost = 0, 0
    places = list(stage.places)  # where a stream stood at the beginning of the step
    while True:
        step, begun = start_step + done // accumulation, done % accumulation
        stage.places = list(places)
        batches = _opened(stage.training_batches(step, rank, processes, device))
        try:
            for batch in islice(batches, begun, None):
                yield batch
                done, lost = done + 1, 0
                if done % accumulation == 0:
                    places = list(stage.places)
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not stage.cfg.dataloader_num_workers or not _is_loss(error) or lost == LOST_IN_A_ROW:
                raise
            lost += 1
            counts["lost_workers"] += 1
            tqdm.write(f"a data worker was lost at step {start_step + done // accumulation}, and is replaced: {error}")


def _is_loss(error: Exception) -> bool:
    """Whether a loader's error says that a worker is gone, and not what a worker has raised."""
    if str(error).startswith("Caught "):  # how PyTorch hands on the latter
        return False
    # the others are of a batch that the worker had announced and cannot hand over
    return "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError, FileNotFoundError))


def _opened(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches of a loader that leaves the process as it was."""
    with torch.random.fork_rng(devices=[]):  # it draws a seed for its workers from the generator of the training
        first = next(batches, None)
    # it also has the loss of a worker raised wherever the main thread is, in the middle of an optimizer step; without
    # that the loss is noticed when the next batch is asked for
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if first is not None:
        yield first
        yield from batches


# how long a process that has written its stacks waits for others to write theirs; at most as long as its own limit
GRACE_SECONDS = 30.0


class FolderLock:
    """One run per folder: a lock of the system (flock) on `.run.lock`, which names who holds it.

    The system releases it when the process ends, in whatever way. A run's other processes and its data workers do not
    hold it. On a network drive it sees runs of other machines only where the drive has locks: NFS does unless it is
    mounted with `nolock` or `local_lock=flock`; Lustre needs `flock`, and on its `localflock`, as on drives of object
    stores (s3fs, gcsfuse), the runs of one machine see each other, and those of several do not.

    Args:
        folder: output folder of the run; it is made where it is not there.

    Raises:
        ValueError: if another run holds it, with its host and process; or if the folder cannot be made.
    """

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"`output_dir` is {folder}, a folder that cannot be made ({error.strerror}). Pass another "
                "`--output_dir`."
            ) from error
        self.path = folder / LOCK_FILE
        while True:
            self.file: Any = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.file.seek(0)
                holder = self.file.read().strip() or "another process"
                self.file.close()
                raise ValueError(
                    f"`output_dir` {folder} is in use by another run: {holder}. Wait until it has ended, or give "
                    "another `output_dir`."
                ) from error
            except OSError as error:  # a drive without locks
                tqdm.write(f"`output_dir` {folder} cannot be locked, take care that no other run uses it: {error}")
            if self._is_there():
                break
            self.file.close()  # the run that held it has removed it on leaving
        HELD.add(self)
        self.file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        self.file.flush()

    def _is_there(self) -> bool:
        """True if the open file is the one that the name means."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file and give up the lock; nothing happens the second time."""
        if self in HELD:
            HELD.discard(self)
            self.path.unlink(missing_ok=True)
            self.file.close()


HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()  # by this process


def _close_in_child() -> None:
    # a lock of flock is held by every process that has the open file: by a worker, too, that outlives its run
    for lock in list(HELD):
        lock.file.close()
    HELD.clear()


os.register_at_fork(after_in_child=_close_in_child)


class Watchdog:
    """Notices what ends a run from outside: signals, and a step that does not end. To be used as a context.

    A process whose step takes longer than the limit, be it that it hangs itself or that it waits for another one,
    writes the stacks of all its threads to its standard error and ends with exit code `EXIT_HUNG`. A thread of its own
    sees to that: faulthandler's timer would do it even where Python's lock is held, but does not survive a fork. Time
    in which the process was stopped (SIGSTOP: how some schedulers suspend a job) does not count.

    Args:
        rank: of this process.
        seconds: the limit.

    Attributes:
        received: the number of the signal of `STOP_SIGNALS` that has come, or 0. A second SIGINT ends the process.
    """

    def __init__(self, rank: int, seconds: float):
        self.rank, self.seconds = rank, seconds
        self.received = 0
        self.pid = os.getpid()
        self.steps_begun = 0
        self.over = threading.Event()
        self.limit_reached = False

    def __enter__(self) -> "Watchdog":
        self.begin()
        self.over.clear()
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self.thread.start()
        # a shell that starts a job in the background has it ignore the Ctrl-C that is meant for others
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        numbers = [number for number in STOP_SIGNALS if not (ignored and number == signal.SIGINT)]
        self.before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # past the limit a collective times out or loses its peer; that error must not change the exit code
        if self.limit_reached and isinstance(error, Exception):
            self.thread.join()  # ends the process
        self.over.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From here on the time runs anew."""
        self.steps_begun += 1

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:  # Ctrl-C; the next one ends the process at once, whatever it waits for
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self.rank == 0 and os.getpid() == self.pid:  # and not in a data worker, which has inherited this
                # not by print, which may be what the signal has interrupted
                os.write(2, b"\nCtrl-C: finishing this step and saving; a second Ctrl-C ends at once, unsaved\n")

    def _watch(self) -> None:
        tick = min(1.0, self.seconds / 10)
        step, spent, before = self.steps_begun, 0.0, time.monotonic()
        while not self.over.wait(tick):
            now = time.monotonic()
            if step != self.steps_begun:
                step, spent = self.steps_begun, 0.0
            spent, before = spent + min(now - before, 5 * tick), now  # longer ticks are those of a stopped process
            if spent < self.seconds:
                continue
            self.limit_reached = True
            where = f"process {os.getpid()} on {socket.gethostname()}"
            errors = sys.__stderr__ or sys.stderr
            errors.write(f"\nrank {self.rank} ({where}): no end of a step after {self.seconds} s; its stacks:\n")
            errors.flush()
            faulthandler.dump_traceback(errors, all_threads=True)
            # the end of this process breaks its connections: the others, whose steps began a little later, would end
            # by that error and not write their stacks
            time.sleep(min(self.seconds, GRACE_SECONDS))
            os._exit(EXIT_HUNG)


def samples_of_step(
    rank: int, batches: Iterable[tuple[dict[str, Any], torch.Tensor]], dataset_indices: dict[int, int]
) -> list[dict[str, Any]]:
    """What one process knows of the samples of a step, as plain data.

    Args:
        rank: of the process.
        batches: the micro-batches with the flow-matching loss of each of their samples.
        dataset_indices: place in the run's stream -> place in the data set, where there is one.
    """
    return [
        {
            "rank": rank,
            "sample_index": index,
            "dataset_index": dataset_indices.get(index),
            "caption": caption,
            "loss": _plain(loss),
        }
        for batch, losses in batches
        for index, caption, loss in zip(batch["sample_index"], batch["captions"], losses.tolist())
    ]


def write_non_finite(path: Path, step: int, grad_norm: float, samples: list[dict[str, Any]]) -> None:
    """Write down the samples of a step whose loss or gradient is not finite; numbers that are none as words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"step": step, "grad_norm": _plain(grad_norm), "samples": samples}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
