"""Checkpoints that are either whole or not there: written aside, then renamed; old ones go only after that."""

import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

NAME = re.compile(r"checkpoint-\d+")

# What a resumed run must keep: its stream of samples follows from the seed, and the rest is restored with optimizer
# and averages, so that another value would have no effect.
FIXED = (
    "seed", "optimizer", "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay",
    "muon_momentum", "muon_adjust_lr_fn", "muon_fused", "muon_newton_schulz_dtype", "use_ema", "ema_decay",
    "train_text_encoder", "trained_parameters",
)  # fmt: skip


@dataclass
class RunState:
    """What a run knows besides weights, optimizer and schedule; saved with every checkpoint.

    Args:
        settings: of the run, and the numbers of parameters that it trains; those of `FIXED` must be the same when it
            is resumed.
        stages: of each stage its steps, the size of its data and the samples of an optimizer step over all processes;
            stages that have begun must be the same when the run is resumed.
        step: optimizer steps done.
        seconds: training time so far, without validation and checkpoints.
        seconds_waiting: how much of it the main process has waited for data.
        samples_read, unreadable, unfit, upscaled, truncated: counts over all processes.
        stream: how far the workers of all processes have read the current stage's stream, and what that is; None: the
            data are not streamed. See `data.streaming.StreamedImages.record`.
        history: one entry per logging interval.
        validation_history: one entry per validation.
        alignment_history: one entry per measured cosine of the gradients of alignment and flow.
    """

    settings: dict[str, Any]
    stages: list[dict[str, Any]]
    step: int = 0
    seconds: float = 0.0
    seconds_waiting: float = 0.0
    samples_read: int = 0
    unreadable: int = 0
    unfit: int = 0
    upscaled: int = 0
    truncated: int = 0
    stream: dict[str, Any] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    validation_history: list[dict[str, float]] = field(default_factory=list)
    alignment_history: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        step = state["step"]
        if step > self.stages[-1]["stop_step"]:
            raise ValueError(
                f"The checkpoint is at step {step}, beyond the {self.stages[-1]['stop_step']} of this run "
                "(`max_train_steps`, of all stages together)."
            )
        same = [(name, state["settings"].get(name), self.settings.get(name)) for name in FIXED]
        for number, (old, new) in enumerate(zip(state["stages"], self.stages)):
            if step > old["first_step"]:
                begun = [name for name in old if name != "stop_step" or old["stop_step"] < step]
                same += [(f"{name} of stage {number}", old[name], new.get(name)) for name in begun]
        for name, old_value, new_value in same:
            if old_value != new_value:
                raise ValueError(
                    f"The checkpoint was trained with `{name}` {old_value}, this run has {new_value}: a resumed run "
                    "must keep it."
                )
        for name, value in state.items():
            if name not in ("settings", "stages"):
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
