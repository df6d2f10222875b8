"""Checkpoints that are either whole or not there: written aside, then renamed; old ones go only after that.

`checkpoint-{step}/` holds `shard-*.safetensors` (weights, optimizer, averages: see `named_tensors`), `run.json` (what
`RunState` knows, and more), `generators-{rank}.json`, and `complete.json`, written last, with the sizes of all others.
"""

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from .config import TrainingConfig, settings_of_run
from .distributed import Exchange, learning
from .settings import FIXED, marked

NAME = re.compile(r"checkpoint-\d+")
RUN_FILE, COMPLETE_FILE, UNFINISHED = "run.json", "complete.json", ".unfinished"
FILE_BYTES = 2**31


@dataclass
class RunState:
    """What a run knows besides weights, optimizer and schedule; saved with every checkpoint.

    Args:
        settings: of the run; those that are `FIXED` must be the same when it is resumed.
        stages: of each stage its steps, the size of its data and the samples of an optimizer step over all processes;
            stages that have begun must be the same when the run is resumed.
        networks: what they are, by `trainer.identity`; they must be the same when the run is resumed.
        step: optimizer steps done.
        seconds: training time so far, without validation and checkpoints.
        seconds_waiting: how much of it the main process has waited for data.
        samples_read, unreadable, unfit, upscaled, truncated: counts over all processes.
        lost_workers, tracker_failures: the same.
        validated: the step of the last validation.
        skipped_steps: steps whose loss or gradient was not finite.
        sessions: from which step on which commit and versions have trained; see `export.session`.
        stream: how far the workers of all processes have read the current stage's stream, and what that is; None: the
            data are not streamed. See `data.streaming.StreamedImages.record`.
        history: one entry per logging interval.
        validation_history: one entry per validation.
        alignment_history: one entry per measured cosine of the gradients of alignment and flow.
    """

    settings: dict[str, Any]
    stages: list[dict[str, Any]]
    networks: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    seconds_waiting: float = 0.0
    samples_read: int = 0
    unreadable: int = 0
    unfit: int = 0
    upscaled: int = 0
    truncated: int = 0
    lost_workers: int = 0
    tracker_failures: int = 0
    validated: int = 0
    skipped_steps: int = 0
    sessions: list[dict[str, Any]] = field(default_factory=list)
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
        in_pixels = "vae" not in state["networks"].get("frozen_networks", {})
        saved = settings_of_run(state["settings"], in_pixels)
        same = [(name, saved.get(name), self.settings.get(name)) for name in marked(TrainingConfig, FIXED)]
        same += [(name, state["networks"].get(name), network) for name, network in self.networks.items()]
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
            if name not in ("settings", "stages", "networks"):
                setattr(self, name, value)


class CheckpointWriter:
    """Writes checkpoints in another thread while training goes on.

    One is written aside, as `checkpoint-{step}.unfinished`: tensors by torch.distributed.checkpoint, every process its
    own shards (of what is on several processes, each writes a share), as safetensors; the rest as JSON. When all that
    is on the disk it is marked complete and renamed, and only then older ones are removed. There is no pickle in it.

    Args:
        output_dir: of the run.
        total_limit: how many checkpoints are kept; None: all.
        exchange: between the writers of all processes, for nothing else.
    """

    def __init__(self, output_dir: Path, total_limit: int | None, exchange: Exchange):
        self.output_dir, self.total_limit, self.exchange = output_dir, total_limit, exchange
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.writing: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, torch.Tensor], run: dict[str, Any]) -> None:
        """Begin to write `checkpoint-{step}`; called by every process. Returns as soon as a copy is in memory.

        Args:
            step: optimizer steps done.
            tensors: what `Trained` and its optimizer consist of, by name; see `named_tensors`.
            run: plain data, the same on all processes.

        Raises:
            OSError: if the one before could not be written.
        """
        self.wait()
        staged = self.stager.stage(tensors)
        # to JSON now: the run goes on changing what it holds
        files = {f"generators-{self.exchange.rank}.json": json.dumps(generator_states())}
        if self.exchange.rank == 0:
            files[RUN_FILE] = json.dumps(run, indent=1)
        self.writing = self.thread.submit(self._write, step, staged, files)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; called by every process.

        Raises:
            OSError: on all processes, if one of them could not write its part. Earlier checkpoints are as they were.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, tensors: Any, files: dict[str, str]) -> None:
        folder = self.output_dir / f"checkpoint-{step}"
        unfinished = folder.with_name(folder.name + UNFINISHED)
        try:
            self._together(self._begin, unfinished)
            with warnings.catch_warnings():  # it warns of there being a single process
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                writer = HuggingFaceStorageWriter(str(unfinished), file_of_each(tensors), save_distributed=True)
                dcp.save(tensors, storage_writer=writer, process_group=self.exchange.group)
            self._together(write_files, unfinished, files)
            self._together(self._complete, unfinished, folder)
        except (OSError, CheckpointException) as error:
            if self.exchange.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)  # a full disk is no place for half a checkpoint
            kept = [path.name for path in list_checkpoints(self.output_dir)]
            raise OSError(
                f"{folder} could not be written: {reason(error)}. Complete are {kept}: make room and continue with "
                "`--resume_from_checkpoint latest`."
            ) from error

    def _begin(self, unfinished: Path) -> None:
        if self.exchange.rank == 0:
            # of a run that was killed: its files must not be taken for this one's
            for left in self.output_dir.glob(f"checkpoint-*{UNFINISHED}"):
                shutil.rmtree(left)
            unfinished.mkdir(parents=True)

    def _complete(self, unfinished: Path, folder: Path) -> None:
        if self.exchange.rank:
            return
        sizes = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
        write_files(unfinished, {COMPLETE_FILE: json.dumps({"files": sizes}, indent=1)})
        sync_folder(unfinished)
        if folder.exists():  # not complete, or it would have been resumed from
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
        sync_folder(self.output_dir)
        if self.total_limit is not None:
            for old in list_checkpoints(self.output_dir)[: -self.total_limit]:
                (old / COMPLETE_FILE).unlink()  # first: what is half removed is not complete
                shutil.rmtree(old)

    def _together(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function on all processes, and raise on all of them if it fails on one: none goes on alone."""
        failure = None
        try:
            function(*arguments)
        except OSError as error:
            failure = str(error)
        failures = [text for text in self.exchange.gather(failure) if text is not None]
        if failures:
            raise OSError(failures[0])


def write_files(folder: Path, texts: dict[str, str]) -> None:
    """Write files, down to the disk."""
    for name, text in texts.items():
        with open(folder / name, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """The names in a folder, down to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """What went wrong, without the traceback that torch.distributed.checkpoint puts around it."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return str(error)


def file_of_each(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Into which file, from 1, each tensor goes: a file is put together in memory, so none is much larger than
    `FILE_BYTES`."""
    places, size = {}, 0
    for name, tensor in tensors.items():
        places[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.element_size()
    return places


def named_tensors(trained: nn.Module, optimizer: Optimizer, averages: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Everything that training changes, by name; sharded where the parameters are, and not copied.

    Args:
        trained: the module; what of it is frozen is where the run has it from.
        optimizer: of its parameters; all that it keeps of one are tensors.
        averages: by the name of the parameter.

    Returns:
        `weights.NAME`, `optimizer.NAME.KEY` for all that the optimizer keeps of a parameter, and `average.NAME`.
    """
    tensors: dict[str, Any] = {}
    for name, parameter in learning(trained).items():
        tensors[f"weights.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors | {f"average.{name}": tensor for name, tensor in averages.items()}


def load_tensors(
    checkpoint: Path, trained: nn.Module, optimizer: Optimizer, averages: Mapping[str, torch.Tensor]
) -> None:
    """Read what `named_tensors` has named, in place, on any number of processes and in any sharding."""
    stored: Any = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    optimizer.state.clear()
    for name, parameter in learning(trained).items():
        prefix = f"optimizer.{name}."
        for path in stored:
            key = path.removeprefix(prefix)
            if key == path or "." in key:  # of another parameter, whose name may begin with this one's
                continue
            size = stored[path].size
            # like the parameter, but for AdamW's count of steps; of what was in no loss yet there is nothing
            optimizer.state[parameter][key] = (
                torch.zeros_like(parameter) if size == parameter.shape else torch.zeros(size)
            )
    read_tensors(checkpoint, named_tensors(trained, optimizer, averages))


def read_tensors(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """Read tensors of a checkpoint, in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)))


def read_run(checkpoint: Path) -> dict[str, Any]:
    """The plain data of a checkpoint."""
    return json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))


def generator_states() -> dict[str, Any]:
    """The states of this process's global generators; no step draws from them, libraries may."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global state is what is asked for
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def restore_generators(checkpoint: Path, rank: int) -> bool:
    """Restore what `generator_states` has given; False if the checkpoint was written by fewer processes."""
    file = checkpoint / f"generators-{rank}.json"
    if not file.is_file():
        return False
    states = json.loads(file.read_text(encoding="utf-8"))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
    return True


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, and no file was lost or cut since."""
    try:
        files = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    named = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(filter(is_complete, named), key=step_of)


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
        folders = [folder for folder in (Path(resume_from), output_dir / resume_from) if NAME.fullmatch(folder.name)]
        start = next((folder for folder in folders if is_complete(folder)), None)
        if start is None:
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from!r}, which is no complete checkpoint; {output_dir} has "
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
