"""Replacement of data workers that die, for example when the system runs out of memory."""

import signal
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from tqdm.auto import tqdm

from .stages import Stage

# A worker that dies this often without delivering a batch will die again.
MAX_LOSSES_IN_A_ROW = 3


def batches_despite_lost_workers(
    stage: Stage, start_step: int, rank: int, processes: int, device: torch.device, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield `Stage.training_batches`; if a data worker dies, restart the workers without losing or repeating samples.

    Args:
        stage: stage to read.
        start_step: first optimizer step of the run to read.
        rank: rank of this process.
        processes: number of processes.
        device: device of the batches.
        counts: counter whose entry "lost_workers" is increased.

    Raises:
        RuntimeError: a worker was lost more than `MAX_LOSSES_IN_A_ROW` times without a batch in between. OSError and
            EOFError are raised for the same reason. Errors that a worker raises are passed on.
    """
    accumulation = stage.cfg.gradient_accumulation_steps
    delivered, losses = 0, 0
    stream_positions = list(stage.stream_positions)  # at the beginning of the step
    while True:
        step, skip = start_step + delivered // accumulation, delivered % accumulation
        stage.stream_positions = list(stream_positions)
        batches = _open_loader(stage.training_batches(step, rank, processes, device))
        try:
            for batch in islice(batches, skip, None):
                yield batch
                delivered, losses = delivered + 1, 0
                if delivered % accumulation == 0:
                    stream_positions = list(stage.stream_positions)
            return
        except (RuntimeError, OSError, EOFError) as error:
            can_restart = stage.cfg.dataloader_num_workers > 0 and losses < MAX_LOSSES_IN_A_ROW
            if not can_restart or not _is_lost_worker(error):
                raise
            losses += 1
            counts["lost_workers"] += 1
            step = start_step + delivered // accumulation
            tqdm.write(f"a data worker was lost at step {step} and is replaced: {error}")


def _is_lost_worker(error: Exception) -> bool:
    """True if an error of a loader means that a worker died, and not that a worker raised an error."""
    if str(error).startswith("Caught "):  # how PyTorch passes on errors of workers
        return False
    # the exception types occur if a worker dies after it has announced a batch
    return "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError, FileNotFoundError))


def _open_loader(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the batches of a loader without its side effects on this process."""
    with torch.random.fork_rng(devices=[]):  # the loader draws the seed of its workers from the global generator
        first = next(batches, None)
    # the loader's SIGCHLD handler would raise in the middle of an optimizer step; without it, the loss of a worker is
    # noticed at the next batch
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if first is not None:
        yield first
        yield from batches
