"""Watchdog for signals that stop a run and for steps that hang."""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType

# Exit codes of sysexits.h: EX_TEMPFAIL, with which a scheduler can requeue the job, and EX_SOFTWARE.
EXIT_PREEMPTED = 75
EXIT_HUNG = 70
PREEMPTED_FILE = "preempted.json"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Seconds that a process waits, after printing its stack traces, for others to print theirs.
GRACE_SECONDS = 30.0


class Watchdog:
    """Context manager that records stop signals and ends the process if a step exceeds its time limit.

    If a step takes longer than the limit, the process prints the stack traces of all threads to standard error and
    ends with `EXIT_HUNG`. It does so too if it waits for another process that hangs. A thread of this class measures
    the time, because the timer of faulthandler does not survive a fork. Time during which the process was suspended
    (SIGSTOP) does not count.

    Args:
        rank: rank of this process.
        seconds: time limit of a step.

    Attributes:
        received: number of the last of `STOP_SIGNALS` that was received, or 0. A second SIGINT ends the process.

    Example:
        >>> with Watchdog(rank=0, seconds=1800) as watchdog:
        ...     for batch in batches:
        ...         watchdog.begin_step()
        ...         train(batch)
    """

    def __init__(self, rank: int, seconds: float):
        self.rank, self.seconds = rank, seconds
        self.received = 0
        self.pid = os.getpid()
        self.steps_begun = 0
        self.stopped = threading.Event()
        self.limit_reached = False

    def __enter__(self) -> "Watchdog":
        self.begin_step()
        self.stopped.clear()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        # a shell makes background jobs ignore SIGINT, because Ctrl-C is meant for the foreground job
        is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        numbers = [number for number in STOP_SIGNALS if not (is_ignored and number == signal.SIGINT)]
        self.previous_handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # past the limit, a collective times out or loses its peer; that error must not change the exit code
        if self.limit_reached and isinstance(error, Exception):
            self.thread.join()  # ends the process
        self.stopped.set()
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def begin_step(self) -> None:
        """Restart the time limit."""
        self.steps_begun += 1

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next Ctrl-C ends the process immediately
            if self.rank == 0 and os.getpid() == self.pid:  # data workers inherit the handler
                # os.write instead of print, which the signal may have interrupted
                os.write(2, b"\nCtrl-C: finishing this step and saving. Press Ctrl-C again to end without saving.\n")

    def _watch(self) -> None:
        tick = min(1.0, self.seconds / 10)
        step, elapsed, previous = self.steps_begun, 0.0, time.monotonic()
        while not self.stopped.wait(tick):
            now = time.monotonic()
            if step != self.steps_begun:
                step, elapsed = self.steps_begun, 0.0
            # a much longer tick means that the process was suspended
            elapsed, previous = elapsed + min(now - previous, 5 * tick), now
            if elapsed < self.seconds:
                continue
            self.limit_reached = True
            process = f"process {os.getpid()} on {socket.gethostname()}"
            stderr = sys.__stderr__ or sys.stderr
            stderr.write(f"\nrank {self.rank} ({process}): a step exceeded {self.seconds} s; stack traces:\n")
            stderr.flush()
            faulthandler.dump_traceback(stderr, all_threads=True)
            # the end of this process breaks connections, and other processes would fail before they print theirs
            time.sleep(min(self.seconds, GRACE_SECONDS))
            os._exit(EXIT_HUNG)
