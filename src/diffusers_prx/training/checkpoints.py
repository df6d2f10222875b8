"""Atomic checkpoints: written under a temporary name, then renamed; older ones are removed afterwards.

Files of `checkpoint-{step}/`:
- `shard-*.safetensors`: weights, optimizer state and averages, see `named_tensors`
- `run.json`: `RunState` and other plain data
- `generators-{rank}.json`: states of the global random generators
- `tokenizer.json`, `image_sizes-*.npy`: files that the run derived from its data
- `complete.json`: written last, with the size and the hash of all other files
"""

import contextlib
import inspect
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields
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

from ..config.fields import FIXED_ON_RESUME, field_names
from ..config.training_config import TrainingConfig
from ..files import HASH_NAME, UNFINISHED, hash_file, read_hashed_json, write_hashed_json
from ..models.transformer_prx import PRXTransformer2DModel
from ..techniques.optimizers import trainable_parameters
from .distributed import ObjectCommunicator

logger = logging.get_logger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")
SHARD_NAME = re.compile(r"shard-(\d+)-.*\.safetensors")
RUN_FILE, COMPLETE_FILE, TOKENIZER_FILE = "run.json", "complete.json", "tokenizer.json"
REMOVED = ".removed"  # suffix of a checkpoint that is being removed
MAX_FILE_BYTES = 2**31


@dataclass
class RunState:
    """Plain data of a run that is saved with every checkpoint: settings, counters and histories.

    Args:
        settings: settings of the run. A resumed run must keep those tagged `FIXED_ON_RESUME`.
        stages: records of the stages, see `Stage.record`. A resumed run must keep those of stages that have begun.
        networks: identities of the networks, see `networks.network_identities`. A resumed run must keep them.
        step: number of finished optimizer steps.
        seconds: training time without validation and checkpoints.
        seconds_waiting: part of `seconds` that the main process waited for data.
        samples_read: number of samples that all processes have read. The next six counts are over all processes too.
        unreadable: number of samples that could not be read.
        unfit: number of samples left out because they do not fit their size.
        upscaled: number of enlarged images.
        truncated: number of truncated captions.
        lost_workers: number of data workers that died and were replaced.
        tracker_failures: number of failed calls of the experiment tracker.
        validated: step of the last validation.
        skipped_steps: number of steps whose loss or gradient was not finite.
        sessions: commit and library versions of each start of the run, see `export.session`.
        stream: reading positions of all workers in the data of the current stage, see
            `data.iterable.StreamedImages.record`; None for indexed data.
        history: one entry per logging interval.
        validation_history: one entry per validation.
        alignment_history: one entry per measured cosine between the gradients of alignment and flow-matching loss.
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
        state = fill_in_defaults(state)
        step = state["step"]
        if step > self.stages[-1]["stop_step"]:
            raise ValueError(
                f"The checkpoint is at step {step}, but `max_train_steps` of all stages is "
                f"{self.stages[-1]['stop_step']}: pass more steps, or another `--output_dir`."
            )
        saved = state["settings"]
        same = [
            (name, saved.get(name), self.settings.get(name)) for name in field_names(TrainingConfig, FIXED_ON_RESUME)
        ]
        same += [(name, state["networks"].get(name), network) for name, network in self.networks.items()]
        for number, (old, new) in enumerate(zip(state["stages"], self.stages)):
            if step > old["first_step"]:
                begun = [name for name in old if name != "stop_step" or old["stop_step"] < step]
                same += [(f"{name} of stage {number}", old[name], new.get(name)) for name in begun]
        for name, old_value, new_value in same:
            if old_value != new_value:
                raise ValueError(
                    f"`{name}` is {new_value}, but the checkpoint was trained with {old_value}: a resumed run "
                    "must use the same."
                )
        for name, value in state.items():
            if name not in ("settings", "stages", "networks"):
                setattr(self, name, value)


class CheckpointWriter:
    """Writer that saves checkpoints in a background thread.

    A checkpoint is written to `checkpoint-{step}.unfinished`. torch.distributed.checkpoint writes the tensors as
    safetensors: each process writes its shards, and a part of the tensors that several processes hold. Everything else
    is JSON; nothing is pickled. Then each process hashes its files, the checkpoint is marked as complete and renamed,
    and older ones are removed.

    Args:
        output_dir: output folder of the run.
        total_limit: number of checkpoints to keep; None: all.
        communicator: communicator of the writers of all processes, used for nothing else.
        derived: contents of files that every checkpoint contains, by name. The main process writes them.

    Example:
        >>> writer = CheckpointWriter(Path("outputs/run"), 3, ObjectCommunicator(accelerator, 60))
        >>> writer.save(100, named_tensors(trained, optimizer, {}), {"state": state.state_dict()})
        >>> writer.wait()
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
        """Start to write `checkpoint-{step}`, and return once the tensors are copied. All processes must call this.

        Args:
            step: number of finished optimizer steps.
            tensors: tensors by name, see `named_tensors`.
            run: plain data, the same on all processes.

        Raises:
            OSError: the previous checkpoint could not be written.
        """
        self.wait()
        staged = self.stager.stage(tensors)
        # converted now, because training continues to change the data
        files = {f"generators-{self.communicator.rank}.json": json.dumps(generator_states()).encode()}
        if self.communicator.rank == 0:
            files |= self.derived | {RUN_FILE: json.dumps(run, indent=1).encode()}
        self.writing = self.thread.submit(self._write, step, staged, files)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete. All processes must call this.

        Raises:
            OSError: a process could not write its part; raised on all processes. Earlier checkpoints are unchanged.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, tensors: Any, files: dict[str, bytes]) -> None:
        folder = self.output_dir / f"checkpoint-{step}"
        unfinished = folder.with_name(folder.name + UNFINISHED)
        try:
            self._all_or_raise(self._begin, unfinished)
            with warnings.catch_warnings():  # of a single process
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                writer = HuggingFaceStorageWriter(str(unfinished), assign_files(tensors), save_distributed=True)
                dcp.save(tensors, storage_writer=writer, process_group=self.communicator.group)
            self._all_or_raise(write_files, unfinished, files)
            hashed = self._all_or_raise(self._hash_own_files, unfinished)
            entries = {name: entry for part in hashed for name, entry in sorted(part.items())}
            self._all_or_raise(self._complete, unfinished, folder, entries)
        except (OSError, CheckpointException) as error:
            if self.communicator.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)  # free the disk space
            kept = [path.name for path in list_checkpoints(self.output_dir)]
            raise OSError(
                f"{folder} could not be written: {describe_error(error)}. Complete checkpoints: {kept}. Free disk "
                "space and continue with `--resume_from_checkpoint latest`."
            ) from error

    def _begin(self, unfinished: Path) -> None:
        """Create the folder, and remove leftovers of a run that was killed."""
        if self.communicator.rank:
            return
        leftovers = list(self.output_dir.glob(f"checkpoint-*{UNFINISHED}"))
        for aside in self.output_dir.glob(f"checkpoint-*{REMOVED}"):
            half_removed = aside.with_name(aside.name.removesuffix(REMOVED))
            leftovers += [aside] if is_complete(half_removed) else [aside, half_removed]
        for folder in leftovers:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                logger.warning(f"{folder} is left from an earlier run and cannot be removed: remove it manually.")
        unfinished.mkdir(parents=True)

    def _hash_own_files(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Return size and hash of the files that this process has written; rank 0 includes all that are not shards."""
        own = []
        for path in folder.iterdir():
            shard = SHARD_NAME.fullmatch(path.name)
            if (int(shard[1]) - 1 if shard else 0) == self.communicator.rank:
                own.append(path)
        return {path.name: {"bytes": path.stat().st_size, "hash": hash_file(path)} for path in own}

    def _complete(self, unfinished: Path, folder: Path, entries: dict[str, dict[str, Any]]) -> None:
        if self.communicator.rank:
            return
        write_hashed_json(unfinished / COMPLETE_FILE, {"algorithm": HASH_NAME, "files": entries}, sync=True)
        sync_folder(unfinished)
        if folder.exists():  # it is damaged; otherwise the run would have resumed from it
            remove_checkpoint(folder)
        os.replace(unfinished, folder)
        sync_folder(self.output_dir)
        if self.total_limit is not None:
            # later checkpoints are damaged, otherwise the run would have resumed from them: they do not count
            earlier = [path for path in list_checkpoints(self.output_dir) if step_of(path) <= step_of(folder)]
            for old in earlier[: -self.total_limit]:
                remove_checkpoint(old)

    def _all_or_raise(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function on all processes and return its results by rank.

        Raises:
            OSError: the function failed on one process; raised on all processes.
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
    """Remove a checkpoint, or keep it unchanged and log a warning if the system refuses.

    The files are moved to another folder first, `complete.json` before all others. If one cannot be moved, it cannot
    be removed either, and all are moved back.
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
        logger.warning(f"{folder} cannot be removed: {error}")
        return
    shutil.rmtree(aside, ignore_errors=True)  # the next checkpoint removes leftovers


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files and flush them to the disk."""
    for name, content in contents.items():
        with open(folder / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the directory entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_error(error: BaseException) -> str:
    """Return the message of an error without the tracebacks that torch.distributed.checkpoint adds."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return str(error)


def assign_files(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the number, from 1, of the file for each tensor.

    torch.distributed.checkpoint assembles a file in memory, so files are limited to about `MAX_FILE_BYTES`.
    """
    files, size = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + size // MAX_FILE_BYTES
        size += tensor.numel() * tensor.element_size()
    return files


def named_tensors(trained: nn.Module, optimizer: Optimizer, averages: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return all tensors that training changes by name, not copied, and sharded like the parameters.

    Args:
        trained: module whose trainable parameters are included.
        optimizer: optimizer of these parameters; its state must consist of tensors.
        averages: moving averages by parameter name.

    Returns:
        Tensors named `weights.NAME`, `optimizer.NAME.KEY` and `average.NAME`.
    """
    tensors: dict[str, Any] = {}
    for name, parameter in trainable_parameters(trained).items():
        tensors[f"weights.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors | {f"average.{name}": tensor for name, tensor in averages.items()}


def reference_tensors(reference: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the frozen model that a later stage of post-training compares with, by name."""
    return {f"reference.{name}": tensor for name, tensor in reference.state_dict().items()}


def load_tensors(
    checkpoint: Path, trained: nn.Module, optimizer: Optimizer, averages: Mapping[str, torch.Tensor]
) -> None:
    """Load the tensors of `named_tensors` in place, with any number of processes and any sharding."""
    stored: Any = shard_reader(checkpoint).read_metadata().state_dict_metadata
    optimizer.state.clear()
    for name, parameter in trainable_parameters(trained).items():
        prefix = f"optimizer.{name}."
        for path in stored:
            key = path.removeprefix(prefix)
            if key == path or "." in key:  # of a parameter whose name starts with this one's
                continue
            size = stored[path].size
            # all state has the parameter's shape except AdamW's step count; unused parameters have no state
            optimizer.state[parameter][key] = (
                torch.zeros_like(parameter) if size == parameter.shape else torch.zeros(size)
            )
    read_tensors(checkpoint, named_tensors(trained, optimizer, averages))


def read_tensors(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """Load tensors of a checkpoint in place.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=shard_reader(checkpoint))
    except CheckpointException as error:  # a BaseException, which error handlers would miss
        raise ValueError(f"The tensors of {checkpoint} cannot be read: {describe_error(error)}") from error


class ListedFiles(FileSystem):
    """File system that only shows files listed in `complete.json`; macOS and network drives add others."""

    def ls(self, path: str | os.PathLike) -> list[str]:
        return [os.fspath(Path(path) / name) for name in listed_files(Path(path))]


def shard_reader(checkpoint: Path) -> HuggingFaceStorageReader:
    """Return a reader of the listed shards of a checkpoint."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    reader.fs = ListedFiles()
    return reader


def read_run_file(checkpoint: Path) -> dict[str, Any]:
    """Return the plain data of a checkpoint."""
    return json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))


def fill_in_defaults(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a run in which what did not exist when it was saved has its default.

    These are settings that a resumed run must share, and arguments of the transformer.
    """
    names = field_names(TrainingConfig, FIXED_ON_RESUME)
    fixed = [each for each in fields(TrainingConfig) if each.name in names]
    settings = {each.name: each.default for each in fixed if each.default is not MISSING}
    settings |= {each.name: each.default_factory() for each in fixed if each.default_factory is not MISSING}
    arguments = inspect.signature(PRXTransformer2DModel.__init__).parameters.values()
    transformer = {each.name: each.default for each in arguments if each.default is not inspect.Parameter.empty}
    defaults = json.loads(json.dumps({"settings": settings, "transformer": transformer}))  # JSON types, as stored
    networks = state["networks"]
    if "transformer" in networks:
        networks = networks | {"transformer": defaults["transformer"] | networks["transformer"]}
    return state | {"settings": defaults["settings"] | state["settings"], "networks": networks}


def generator_states() -> dict[str, Any]:
    """Return the states of the global random generators. Training steps do not use them, but libraries may."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global state is needed
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def restore_generators(checkpoint: Path, rank: int) -> bool:
    """Restore the global generators; return False if the checkpoint has no states for this rank."""
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
    """Return the sizes and hashes in `complete.json` by file name.

    Raises:
        OSError: the file cannot be read.
        ValueError: its content is not that of `CheckpointWriter`.
    """
    stored = read_hashed_json(checkpoint / COMPLETE_FILE)
    files: Any = stored.get("files")
    if stored.get("algorithm") != HASH_NAME or not isinstance(files, dict):
        raise ValueError(f"{COMPLETE_FILE} does not list the {HASH_NAME} of files")
    if RUN_FILE not in files or not any(SHARD_NAME.fullmatch(name) for name in files):
        raise ValueError(f"{COMPLETE_FILE} lists no {RUN_FILE} or no shard")
    return files


def check_size(file: Path, entry: Mapping[str, Any]) -> None:
    """Raise an OSError if a file is missing, and a ValueError if its size has changed."""
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{file.name} has {size} bytes, not {entry['bytes']}")


def find_damage(checkpoint: Path, communicator: ObjectCommunicator | None = None) -> str | None:
    """Compare all files of a checkpoint with their hashes.

    Args:
        checkpoint: folder of the checkpoint.
        communicator: communicator of processes that all call this and share the work; None: this process reads all
            files.

    Returns:
        Description of the damage with the file name, the same on all processes, or None.
    """
    rank, processes = (0, 1) if communicator is None else (communicator.rank, communicator.size)
    damage = None
    try:
        for name, entry in list(listed_files(checkpoint).items())[rank::processes]:
            check_size(checkpoint / name, entry)
            if hash_file(checkpoint / name) != entry["hash"]:
                raise ValueError(f"the content of {name} has changed")
    except FileNotFoundError as error:
        damage = f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        damage = str(error)
    found = [damage] if communicator is None else communicator.gather(damage)
    return next((text for text in found if text is not None), None)


def is_complete(checkpoint: Path) -> bool:
    """True if all files of a checkpoint exist with their original sizes. `find_damage` also checks the contents."""
    try:
        for name, entry in listed_files(checkpoint).items():
            check_size(checkpoint / name, entry)
    except (OSError, ValueError):
        return False
    return True


def named_checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders with the name of a checkpoint, oldest first."""
    return sorted((path for path in _paths_named_like_checkpoints(output_dir) if path.is_dir()), key=step_of)


def _paths_named_like_checkpoints(output_dir: Path) -> list[Path]:
    return [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    return [path for path in named_checkpoints(output_dir) if is_complete(path)]


def find_checkpoint(
    output_dir: Path, resume_from: str | None, communicator: ObjectCommunicator | None = None
) -> Path | None:
    """Return the checkpoint to resume from, or None to start at step 0.

    Args:
        output_dir: output folder of the run.
        resume_from: None for step 0; a folder; a name inside `output_dir`; or `latest` for the newest checkpoint that
            is not damaged, and step 0 if there is none, so that a requeued job can always pass it.
        communicator: communicator of processes that all call this, see `find_damage`.

    Raises:
        ValueError: the checkpoint does not exist, it or all of them are damaged, a file has the name of a checkpoint,
            or `output_dir` has later checkpoints, which belong to another run.
    """
    found = named_checkpoints(output_dir)
    files = sorted(path.name for path in _paths_named_like_checkpoints(output_dir) if path.is_file())
    if communicator is not None:  # a network drive may show other processes an outdated list
        found, files = communicator.gather((found, files))[0]
    if files:
        raise ValueError(
            f"`output_dir` {output_dir} contains {files}, which are files with names of checkpoints: move them, or "
            "pass another `--output_dir`."
        )
    if resume_from == "latest":
        return _newest_intact(reversed(found), output_dir, communicator)
    start = None
    if resume_from is not None:
        folders = [
            folder
            for folder in (Path(resume_from), output_dir / resume_from)
            if CHECKPOINT_NAME.fullmatch(folder.name)
        ]
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
                f"{''.join(damages[:1])}; complete checkpoints in {output_dir}: {others}. Pass one of "
                "these, or `latest`."
            )
    later = [path.name for path in found if start is None or step_of(path) > step_of(start)]
    if later:
        raise ValueError(
            f"`output_dir` {output_dir} has later checkpoints: {later}. Pass `--resume_from_checkpoint latest` to "
            "continue them, or another `--output_dir`, or remove them."
        )
    return start


def _newest_intact(
    newest_first: Iterable[Path], output_dir: Path, communicator: ObjectCommunicator | None
) -> Path | None:
    """Return the first checkpoint that is not damaged, and log a warning about the damaged ones."""
    damages: list[str] = []
    for folder in newest_first:
        damage = find_damage(folder, communicator)
        if damage is None:
            if damages and (communicator is None or communicator.rank == 0):
                logger.warning(f"Damaged checkpoints in {output_dir}: {'; '.join(damages)}. Resuming from {folder}.")
            return folder
        damages.append(f"{folder.name} ({damage})")
    if damages:
        raise ValueError(
            f"`resume_from_checkpoint` is 'latest', but every checkpoint in {output_dir} is damaged: "
            f"{'; '.join(damages)}. To start at step 0, remove them or pass another `--output_dir`."
        )
    return None


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
