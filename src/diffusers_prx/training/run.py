"""The state of a training run on one process."""

import shutil
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..config.training_config import TrainingConfig
from ..techniques.alignment import BurnIn
from ..techniques.ema import EMAWeights
from ..techniques.optimizers import trainable_parameters
from .checkpoints import CheckpointWriter, RunState
from .distributed import ObjectCommunicator, TrainableModules
from .folder_lock import FolderLock
from .networks import Nets
from .precision import check_precision
from .stages import Stage
from .tracking import Tracking
from .watchdog import Watchdog


@dataclass
class Run:
    """Training run on one process; `setup.set_up_run` makes it.

    Args:
        cfg: configuration of the run; each stage has its own.
        card_template: template of the model card, filled in at the end.
        accelerator: processes, precision and trackers.
        machine: number of processes, sharding and device, for the record.
        communicator: messages between the processes.
        lock: lock on the output folder; only on the main process.
        repo_id: repository to upload to; only on the main process, or None.
        stages: stages in order.
        nets: networks of the training step.
        modules: trainable networks by name.
        trained: the trainable networks as one module.
        model: `trained`, wrapped by DDP or FSDP2.
        optimizer: optimizer of the trainable parameters.
        averages: moving averages of the weights.
        burn_in: rule that ends the alignment.
        state: counters, histories and settings.
        writer: checkpoint writer.
        watchdog: watchdog for signals and hanging steps.
        tracking: experiment trackers.
        counts: counts of this process that are not yet in `state`.

    Attributes:
        skipped_in_a_row: number of consecutive steps without a finite loss.
        stop_signal: number of the signal that stops the run, or 0.
        precision_checked: True once the data types of the optimizer state are checked.
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
        """Print a line on the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def remove(self, folder: Path) -> None:
        """Remove a folder that all processes share, before any of them continues."""
        self.communicator.gather(None)
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        self.communicator.gather(None)

    def validation_is_due(self, stage: Stage) -> bool:
        """True if the current step must still be validated; a signal may have stopped the run before."""
        step = self.state.step
        due = step % stage.cfg.validation_steps == 0 or step == stage.stop_step
        return due and self.state.validated < step

    def metrics_are_due(self, stage: Stage) -> bool:
        """True if the validation at the current step measures `validation_metrics`."""
        cfg, step = stage.cfg, self.state.step
        due = step % (cfg.validation_metrics_steps or cfg.validation_steps) == 0 or step == stage.stop_step
        return bool(cfg.validation_metrics) and due

    def has_derived_reference(self, stage: Stage) -> bool:
        """True if the stage compares with weights that the run itself has trained, which its checkpoints must hold."""
        return self.nets.reference is not None and stage.cfg.needs_reference and stage.first_step > 0

    def renew_reference(self) -> None:
        """Make the present weights, averaged if there is an average, the frozen model that the stage compares with."""
        with self.averages.swapped_in(), torch.no_grad():
            weights = dict(self.modules["transformer"].named_parameters())
            for name, frozen in self.nets.reference.named_parameters():
                weight: Any = weights[name]
                frozen.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)

    def release_teacher(self) -> None:
        """Release the teacher once the alignment is over. The DINO loss has its own reference."""
        if alignment_is_over(self.stages, self.burn_in, self.state.step):
            self.nets.teacher = None

    def check_precision(self) -> Counter[str]:
        """Count the values of weights, optimizer state and averages by data type.

        Raises:
            ValueError: a tensor has a data type that training must not use.
        """
        parameters = trainable_parameters(self.trained)
        named: list[tuple[str, torch.Tensor]] = list(parameters.items())
        for name, p in parameters.items():
            named += [(f"{key} of {name}", value) for key, value in self.optimizer.state.get(p, {}).items()]
        named += [(f"average of {name}", value) for name, value in self.averages.tensors().items()]
        return check_precision(named, torch.bfloat16 if self.cfg.trains_bf16_weights else torch.float32)

    def unlock(self) -> None:
        """Release the lock on the output folder."""
        if self.lock is not None:
            self.lock.release()


def alignment_is_over(stages: list[Stage], burn_in: BurnIn, step: int) -> bool:
    """True if no step from this one on uses the alignment."""
    remaining = [stage for stage in stages if stage.stop_step > step and stage.cfg.repa_weight]
    return not remaining or not burn_in.active(step)
