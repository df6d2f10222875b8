"""Checkpoints that are either whole or not there: written aside, then renamed; old ones go only after that.

`checkpoint-{step}/` holds `shard-*.safetensors` (weights, optimizer, averages: see `named_tensors`), `run.json` (what
`RunState` knows, and more), `generators-{rank}.json`, what the run has derived from its data (`tokenizer.json`,
`image_sizes-*.npy`), and `complete.json`, written last, with the size and the hash of every other file.
"""

import contextlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from diffusers.utils import logging
from torch import nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from ..config.fields import FIXED, marked
from ..config.training_config import TrainingConfig
from ..files import HASH_NAME, UNFINISHED, hash_file, read_hashed_json, write_hashed_json
from ..techniques.optimizers import trainable_parameters
from .distributed import ObjectCommunicator

logger = logging.get_logger(__name__)

NAME = re.compile(r"checkpoint-\d+")
SHARD = re.compile(r"shard-(\d+)-.*\.safetensors")
RUN_FILE, COMPLETE_FILE, TOKENIZER_FILE = "run.json", "complete.json", "tokenizer.json"
REMOVED = ".removed"  # ending of a folder that is no longer a checkpoint; one that is not yet ends in `UNFINISHED`
FILE_BYTES = 2**31


@dataclass
class RunState:
    """What a run knows besides weights, optimizer and schedule; saved with every checkpoint.

    Args:
        settings: of the run; those that are `FIXED` must be the same when it is resumed.
        stages: of each stage its steps, the size of its data and the samples of an optimizer step over all processes;
            stages that have begun must be the same when the run is resumed.
        networks: identities of the networks, of `networks.identity`; they must be the same when the run is resumed.
        step: optimizer steps done.
        seconds: training time so far, without validation and checkpoints.
        seconds_waiting: how much of it the main process has waited for data.
        samples_read, unreadable, unfit, upscaled, truncated: counts over all processes.
        lost_workers, tracker_failures: the same.
        validated: the step of the last validation.
        skipped_steps: steps whose loss or gradient was not finite.
        sessions: from which step on which commit and versions have trained; see `export.session`.
        stream: how far the workers of all processes have read the current stage's stream, and what that is; None: the
            data are not streamed. See `data.iterable.StreamedImages.record`.
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
                "(`max_train_steps`, of all stages together): pass a new `--output_dir`, or more steps."
            )
        saved = state["settings"]
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
    is on the disk, every process hashes the shards it has written; then the checkpoint is marked complete and renamed,
    and only then older ones are removed. There is no pickle in it.

    Args:
        output_dir: of the run.
        total_limit: how many checkpoints are kept; None: all.
        communicator: between the writers of all processes, for nothing else.
        derived: contents of the files that every checkpoint of the run has, by name; those of the main process count.
    """

    def __init__(
        self,
        output_dir: Path,
        total_limit: int | None,
        communicator: ObjectCommunicator,
        derived: Mapping[str, bytes] | None = None,
    ):
        self.output_dir, self.total_limit, self.communicator = output_dir, total_limit, communicator
        self.derived = dict(derived or {})
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.writing: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, torch.Tensor], run: dict[str, Any]) -> None:
        """Begin to write `checkpoint-{step}`; called by every process. Returns as soon as a copy is in memory.

        Args:
            step: optimizer steps done.
            tensors: what `TrainableModules` and its optimizer consist of, by name; see `named_tensors`.
            run: plain data, the same on all processes.

        Raises:
            OSError: if the one before could not be written.
        """
        self.wait()
        staged = self.stager.stage(tensors)
        # to JSON now: the run goes on changing what it holds
        files = {f"generators-{self.communicator.rank}.json": json.dumps(generator_states()).encode()}
        if self.communicator.rank == 0:
            files |= self.derived | {RUN_FILE: json.dumps(run, indent=1).encode()}
        self.writing = self.thread.submit(self._write, step, staged, files)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; called by every process.

        Raises:
            OSError: on all processes, if one of them could not write its part. Earlier checkpoints are as they were.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, tensors: Any, files: dict[str, bytes]) -> None:
        folder = self.output_dir / f"checkpoint-{step}"
        unfinished = folder.with_name(folder.name + UNFINISHED)
        try:
            self._all_or_raise(self._begin, unfinished)
            with warnings.catch_warnings():  # it warns of there being a single process
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                writer = HuggingFaceStorageWriter(str(unfinished), file_of_each(tensors), save_distributed=True)
                dcp.save(tensors, storage_writer=writer, process_group=self.communicator.group)
            self._all_or_raise(write_files, unfinished, files)
            hashed = self._all_or_raise(self._hash_own_files, unfinished)
            entries = {name: entry for part in hashed for name, entry in sorted(part.items())}
            self._all_or_raise(self._complete, unfinished, folder, entries)
        except (OSError, CheckpointException) as error:
            if self.communicator.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)  # a full disk is no place for half a checkpoint
            kept = [path.name for path in list_checkpoints(self.output_dir)]
            raise OSError(
                f"{folder} could not be written: {reason(error)}. Complete are {kept}: make room and continue with "
                "`--resume_from_checkpoint latest`."
            ) from error

    def _begin(self, unfinished: Path) -> None:
        """Remove what a killed run has left, whose files must not be taken for this one's, and make the folder."""
        if self.communicator.rank:
            return
        left = list(self.output_dir.glob(f"checkpoint-*{UNFINISHED}"))
        for aside in self.output_dir.glob(f"checkpoint-*{REMOVED}"):
            half_removed = aside.with_name(aside.name.removesuffix(REMOVED))
            left += [aside] if is_complete(half_removed) else [aside, half_removed]
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                logger.warning(f"{folder}, which an earlier run has left, cannot be removed: remove it by hand.")
        unfinished.mkdir(parents=True)

    def _hash_own_files(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and hash of the files that this process has written; the main process takes those of no other."""
        own = []
        for path in folder.iterdir():
            shard = SHARD.fullmatch(path.name)
            if (int(shard[1]) - 1 if shard else 0) == self.communicator.rank:
                own.append(path)
        return {path.name: {"bytes": path.stat().st_size, "hash": hash_file(path)} for path in own}

    def _complete(self, unfinished: Path, folder: Path, entries: dict[str, dict[str, Any]]) -> None:
        if self.communicator.rank:
            return
        write_hashed_json(unfinished / COMPLETE_FILE, {"algorithm": HASH_NAME, "files": entries}, sync=True)
        sync_folder(unfinished)
        if folder.exists():  # damaged, or the run would have started from it
            remove_checkpoint(folder)
        os.replace(unfinished, folder)
        sync_folder(self.output_dir)
        if self.total_limit is not None:
            # later ones are damaged, or the run would have started from them: they do not count as kept
            until_now = [path for path in list_checkpoints(self.output_dir) if step_of(path) <= step_of(folder)]
            for old in until_now[: -self.total_limit]:
                remove_checkpoint(old)

    def _all_or_raise(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function on all processes, and raise on all of them if it fails on one: none goes on alone.

        Returns what it returned, by rank.
        """
        failure = result = None
        try:
            result = function(*arguments)
        except OSError as error:
            failure = str(error)
        outcomes = self.communicator.gather((failure, result))
        failures = [text for text, _ in outcomes if text is not None]
        if failures:
            raise OSError(failures[0])
        return [value for _, value in outcomes]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. One that cannot be removed stays as it was, with a warning.

    Its files are moved aside first, `complete.json` before all others: a file that cannot be removed cannot be moved
    either, and then those that were moved go back.
    """
    aside, moved = folder.with_name(folder.name + REMOVED), []
    try:
        aside.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name != COMPLETE_FILE):
            path.rename(aside / path.name)
            moved.append(path)
        folder.rmdir()
    except OSError as error:
        with contextlib.suppress(OSError):
            for path in reversed(moved):
                (aside / path.name).rename(path)
            aside.rmdir()
        logger.warning(f"{folder} cannot be removed and stays: {error}")
        return
    shutil.rmtree(aside, ignore_errors=True)  # what is left of it, the next checkpoint tries again


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files, down to the disk."""
    for name, content in contents.items():
        with open(folder / name, "wb") as file:
            file.write(content)
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
    for name, parameter in trainable_parameters(trained).items():
        tensors[f"weights.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors | {f"average.{name}": tensor for name, tensor in averages.items()}


def load_tensors(
    checkpoint: Path, trained: nn.Module, optimizer: Optimizer, averages: Mapping[str, torch.Tensor]
) -> None:
    """Read what `named_tensors` has named, in place, on any number of processes and in any sharding."""
    stored: Any = shard_reader(checkpoint).read_metadata().state_dict_metadata
    optimizer.state.clear()
    for name, parameter in trainable_parameters(trained).items():
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
    """Read tensors of a checkpoint, in place.

    Raises:
        ValueError: if it does not have them, or in other shapes.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=shard_reader(checkpoint))
    except CheckpointException as error:  # no subclass of Exception: what handles errors would let it through
        raise ValueError(f"The tensors of {checkpoint} cannot be read: {reason(error)}") from error


class ListedFiles(FileSystem):
    """Files of a checkpoint that `complete.json` lists: macOS, network drives and editors put others beside them."""

    def ls(self, path: str | os.PathLike) -> list[str]:
        return [os.fspath(Path(path) / name) for name in listed_files(Path(path))]


def shard_reader(checkpoint: Path) -> HuggingFaceStorageReader:
    """A reader of the shards that a checkpoint lists."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    reader.fs = ListedFiles()
    return reader


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


def listed_files(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of a checkpoint, by name, as `complete.json` states them.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not what `CheckpointWriter` writes.
    """
    stored = read_hashed_json(checkpoint / COMPLETE_FILE)
    files: Any = stored.get("files")
    if stored.get("algorithm") != HASH_NAME or not isinstance(files, dict):
        raise ValueError(f"{COMPLETE_FILE} does not list the {HASH_NAME} of files")
    if RUN_FILE not in files or not any(SHARD.fullmatch(name) for name in files):
        raise ValueError(f"{COMPLETE_FILE} lists no {RUN_FILE} or no shard")
    return files


def check_size(file: Path, entry: Mapping[str, Any]) -> None:
    """Raise an OSError or a ValueError unless a file is there and as large as it was when it was written."""
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{file.name} has {size} bytes, not {entry['bytes']}")


def find_damage(checkpoint: Path, communicator: ObjectCommunicator | None = None) -> str | None:
    """Read all files of a checkpoint and compare them with their hashes.

    Args:
        checkpoint: its folder.
        communicator: between processes that all call this; each reads a share of the files, all get the same answer.
            None: this process reads everything.

    Returns:
        What is damaged, with the name of the file, or None.
    """
    rank, processes = (0, 1) if communicator is None else (communicator.rank, communicator.size)
    damage = None
    try:
        for name, entry in list(listed_files(checkpoint).items())[rank::processes]:
            check_size(checkpoint / name, entry)
            if hash_file(checkpoint / name) != entry["hash"]:
                raise ValueError(f"the content of {name} is not what was written")
    except FileNotFoundError as error:
        damage = f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        damage = str(error)
    found = [damage] if communicator is None else communicator.gather(damage)
    return next((text for text in found if text is not None), None)


def is_complete(checkpoint: Path) -> bool:
    """True if a checkpoint was written to its end, and no file was lost or cut since; `find_damage` reads them too."""
    try:
        for name, entry in listed_files(checkpoint).items():
            check_size(checkpoint / name, entry)
    except (OSError, ValueError):
        return False
    return True


def named_checkpoints(output_dir: Path) -> list[Path]:
    """List the folders that are called like a checkpoint, oldest first."""
    return sorted((path for path in _called_like_checkpoints(output_dir) if path.is_dir()), key=step_of)


def _called_like_checkpoints(output_dir: Path) -> list[Path]:
    return [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return [path for path in named_checkpoints(output_dir) if is_complete(path)]


def find_checkpoint(
    output_dir: Path, resume_from: str | None, communicator: ObjectCommunicator | None = None
) -> Path | None:
    """Where a run starts: None for the beginning, else the checkpoint that `--resume_from_checkpoint` names.

    Args:
        output_dir: of the run.
        resume_from: None; `latest`, which is the newest one that is not damaged, and the beginning when there is none
            yet, so that a job that is started again and again can always ask for it; a folder, or a name inside
            `output_dir`.
        communicator: between processes that all call this, see `find_damage`.

    Raises:
        ValueError: if there is no such checkpoint, if it or all of them are damaged, if a file has the name of a
            checkpoint, or if `output_dir` has later ones: they are of another run, and would be taken for this one's.
    """
    found = named_checkpoints(output_dir)
    files = sorted(path.name for path in _called_like_checkpoints(output_dir) if path.is_file())
    if communicator is not None:  # what the main process sees: a network drive may show others an older list
        found, files = communicator.gather((found, files))[0]
    if files:
        raise ValueError(
            f"`output_dir` {output_dir} has {files}, which are not folders, but are called like the checkpoints that "
            "this run will write: move them away, or give another `output_dir`."
        )
    if resume_from == "latest":
        return _newest_intact(reversed(found), output_dir, communicator)
    start = None
    if resume_from is not None:
        folders = [folder for folder in (Path(resume_from), output_dir / resume_from) if NAME.fullmatch(folder.name)]
        damages: list[str] = []
        for folder in filter(Path.is_dir, folders):
            damage = find_damage(folder, communicator)
            if damage is None:
                start = folder
                break
            damages.append(f" ({damage})")
        if start is None:
            others = [path.name for path in found if path not in folders and is_complete(path)]
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from!r}, which is not a complete checkpoint"
                f"{''.join(damages[:1])}; {output_dir} has {others}. Name one of these, or pass `latest`, which "
                "starts from the newest that is not damaged."
            )
    later = [path.name for path in found if start is None or step_of(path) > step_of(start)]
    if later:
        raise ValueError(
            f"`output_dir` {output_dir} has checkpoints that this run would not start from: {later}. Continue with "
            "`--resume_from_checkpoint latest`, give another `output_dir`, or remove them."
        )
    return start


def _newest_intact(
    newest_first: Iterable[Path], output_dir: Path, communicator: ObjectCommunicator | None
) -> Path | None:
    """The first checkpoint that is not damaged; a warning names the damage of those before it."""
    damages: list[str] = []
    for folder in newest_first:
        damage = find_damage(folder, communicator)
        if damage is None:
            if damages and (communicator is None or communicator.rank == 0):
                logger.warning(f"Damaged checkpoints in {output_dir}: {'; '.join(damages)}. Starting from {folder}.")
            return folder
        damages.append(f"{folder.name} ({damage})")
    if damages:
        raise ValueError(
            f"`resume_from_checkpoint` is 'latest', but every checkpoint in {output_dir} is damaged: "
            f"{'; '.join(damages)}. To start at step 0, remove them or give another `output_dir`."
        )
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's name states."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
