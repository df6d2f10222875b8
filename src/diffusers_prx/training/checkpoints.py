"""Checkpoints that are either whole or not there: written aside, then renamed; old ones go only after that."""

import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

NAME = re.compile(r"checkpoint-\d+")

# What a resumed run must keep: its stream of samples follows from the seed, and the rest is restored with optimizers
# and averages, so that another value would have no effect.
FIXED = (
    "seed", "optimizer", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay",
    "muon_momentum", "use_ema", "ema_decay", "train_text_encoder",
)  # fmt: skip


@dataclass
class RunState:
    """What a run knows besides weights, optimizers and schedules; saved with every checkpoint.

    Args:
        settings: of the run; those of `FIXED` must be the same when it is resumed.
        dataset_size, global_batch_size: samples of the data, and per optimizer step over all processes; likewise.
        step: optimizer steps done.
        seconds: training time so far, without validation and checkpoints.
        samples_read, unreadable, upscaled, truncated: counts over all processes.
        history: one entry per logging interval.
        validation_history: one entry per validation.
    """

    settings: dict[str, Any]
    dataset_size: int
    global_batch_size: int
    step: int = 0
    seconds: float = 0.0
    samples_read: int = 0
    unreadable: int = 0
    upscaled: int = 0
    truncated: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    validation_history: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("dataset_size", "global_batch_size", *FIXED):
            old, new = (record.get(name, record["settings"].get(name)) for record in (state, self.state_dict()))
            if old != new:
                raise ValueError(
                    f"The checkpoint was trained with `{name}` {old}, this run has {new}: a resumed run must keep it."
                )
        if state["step"] > self.settings["max_train_steps"]:
            raise ValueError(
                f"The checkpoint is at step {state['step']}, beyond `max_train_steps` "
                f"{self.settings['max_train_steps']}."
            )
        for name, value in state.items():
            if name != "settings":
                setattr(self, name, value)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of)


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, total_limit: int | None) -> Path:
    """Save the state of the run as `checkpoint-{step}`; called by every process."""
    folder = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / f"checkpoint-{step}.unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(unfinished, folder)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def find_checkpoint(output_dir: Path, resume_from: str | None) -> Path | None:
    """Where a run starts: None for the beginning, else the checkpoint that `--resume_from_checkpoint` names.

    Args:
        output_dir: of the run.
        resume_from: None; `latest`, which is the beginning when there is no checkpoint yet, so that a job that is
            started again and again can always ask for it; a folder, or a name inside `output_dir`.

    Raises:
        ValueError: if there is no such checkpoint, or `output_dir` has later ones: they are of another run, and would
            be taken for this one's.
    """
    complete = list_checkpoints(output_dir)
    if resume_from == "latest":
        return complete[-1] if complete else None
    start = None
    if resume_from is not None:
        folders = [folder for folder in (Path(resume_from), output_dir / resume_from) if folder.is_dir()]
        start = next((folder for folder in folders if NAME.fullmatch(folder.name)), None)
        if start is None:
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from!r}, which is no checkpoint; {output_dir} has "
                f"{[path.name for path in complete]}."
            )
    later = [path.name for path in complete if start is None or step_of(path) > step_of(start)]
    if later:
        raise ValueError(
            f"`output_dir` {output_dir} has checkpoints that this run would not start from: {later}. Continue with "
            "`--resume_from_checkpoint latest`, give another `output_dir`, or remove them."
        )
    return start


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's name states."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
