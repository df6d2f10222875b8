"""A run: everything that one process of a training consists of, complete once `setup.set_up_run` has returned it."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ..config.training_config import TrainingConfig
from ..techniques.alignment import BurnIn
from ..techniques.ema import EMAWeights
from ..techniques.optimizers import trainable_parameters
from .checkpoints import CheckpointWriter, RunState
from .distributed import ObjectCommunicator, TrainableModules
from .faults import FolderLock, Watchdog
from .networks import Nets
from .precision import check_precision
from .stages import Stage
from .tracking import Tracking


@dataclass
class Run:
    """One training run on one process.

    Args:
        cfg: configuration of the run; each stage has its own.
        card_template: template of the model card, filled in at the end.
        accelerator: processes, precision and trackers.
        machine: number of processes, sharding and device, as they are recorded.
        communicator: messages between the processes.
        lock: hold on the output folder; None on all but the main process.
        repo_id: repository to upload to at the end, on the main process, or None.
        stages: data and settings, in order.
        nets: networks that the step computes with.
        modules: trainable networks by name.
        trained: the same as one module, and `model` as DDP or FSDP2 has wrapped it.
        optimizer: optimizer of the trainable parameters.
        averages: moving averages of the weights.
        burn_in: decides when the alignment ends.
        state: plain data of a checkpoint: counters, histories, settings.
        writer: writes checkpoints.
        watchdog: notices signals and steps that do not end.
        tracking: trackers.
        counts: counts of this process since they were last added to the state.

    Attributes:
        skipped_in_a_row: steps without a finite loss since the last good one.
        stop_signal: number of the signal that asked the run to end, or 0.
        precision_checked: True once the optimizer's state has been checked.
    """

    cfg: TrainingConfig
    card_template: Path
    accelerator: Accelerator
    machine: dict[str, Any]
    communicator: ObjectCommunicator
    lock: FolderLock | None
    repo_id: str | None
    stages: list[Stage]
    nets: Nets
    modules: dict[str, nn.Module]
    trained: TrainableModules
    model: Any
    optimizer: Any
    averages: EMAWeights
    burn_in: BurnIn
    state: RunState
    writer: CheckpointWriter
    watchdog: Watchdog
    tracking: Tracking
    counts: Counter[str]
    skipped_in_a_row: int = field(default=0, init=False)
    stop_signal: float = field(default=0.0, init=False)
    precision_checked: bool = field(default=False, init=False)

    @property
    def output_dir(self) -> Path:
        return Path(self.cfg.output_dir)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return list(trainable_parameters(self.trained).values())

    def print(self, text: str) -> None:
        """Print a line once, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def validation_is_due(self, stage: Stage) -> bool:
        """True if the current step is one to validate after and was not yet: a signal may have come first."""
        step = self.state.step
        due = step % stage.cfg.validation_steps == 0 or step == stage.stop_step
        return due and self.state.validated < step

    def release_teacher(self) -> None:
        """Drop the teacher once nothing will be aligned; the DINO loss keeps its own reference."""
        if alignment_is_over(self.stages, self.burn_in, self.state.step):
            self.nets.teacher = None

    def check_precision(self) -> Counter[str]:
        """Count the trained values by their type.

        Raises:
            ValueError: if a weight, a moment or an average is not stored as it has to be.
        """
        parameters = trainable_parameters(self.trained)
        named: list[tuple[str, torch.Tensor]] = list(parameters.items())
        for name, p in parameters.items():
            named += [(f"{key} of {name}", value) for key, value in self.optimizer.state.get(p, {}).items()]
        named += [(f"average of {name}", value) for name, value in self.averages.tensors().items()]
        bf16 = self.cfg.weights_dtype == "bf16" and self.cfg.lora_rank is None  # under an adapter nothing is lost
        return check_precision(named, torch.bfloat16 if bf16 else torch.float32)

    def unlock(self) -> None:
        """Free the output folder for another run."""
        if self.lock is not None:
            self.lock.release()


def alignment_is_over(stages: list[Stage], burn_in: BurnIn, step: int) -> bool:
    """True if nothing will be aligned from this step on."""
    coming = [stage for stage in stages if stage.stop_step > step and stage.cfg.repa_weight]
    return not coming or not burn_in.active(step)
