"""Paths as a user types them, regular files, atomic writes (under another name, then renamed), hashes of files, and
careful reading of YAML."""

import json
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

UNFINISHED = ".unfinished"
HASH_KEY = "hash"  # of a JSON file, and of the metadata of a safetensors file
HASH_NAME = "xxh3_128"  # of a whole file, see `hash_file`
# Values of a YAML text, each alias counted with all that it stands for: ten short lines can stand for a billion.
YAML_VALUES = 100_000
NAMES_SHOWN = 5


def is_remote(path: str) -> bool:
    """True if a name is an address (`hf://...`), not a path. File names such as `memory::x.png` are paths."""
    return "://" in path


def expand_path(path: str) -> str:
    """Replace a leading `~` and variables such as `$HOME`, as a shell does; addresses stay as they are."""
    return path if is_remote(path) else os.path.expandvars(os.path.expanduser(path))


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a file for reading.

    Raises:
        OSError: if there is none, or it is a FIFO, a device or a socket: reading one could block for ever.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{printable(path)} is not a regular file")
    return open(path, "rb")


def printable(path: str | Path) -> str:
    """A path for a message, also where its name is not valid text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown(names: Iterable[str | Path], count: int) -> str:
    """The first of `count` names for a message, and how many more there are."""
    text = ", ".join(map(printable, islice(names, NAMES_SHOWN)))
    return text if count <= NAMES_SHOWN else f"{text} and {count - NAMES_SHOWN} more"


@contextmanager
def atomic_write(path: Path, sync: bool = False) -> Iterator[Path]:
    """A name to write a file under; what is there when the block ends without an error becomes `path`.

    Until then `path` is what it was. Any number of processes may write it at once: the last one counts. A process that
    is killed leaves a file whose name ends in `UNFINISHED`.

    Args:
        path: its folder is made where it is not there.
        sync: wait for the disk before the renaming, so that after a loss of power, too, the name means the content.

    Raises:
        OSError: if the folder cannot be made, or the file not be renamed; and whatever the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        yield unfinished
        if sync:
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, values: Any, sync: bool = False) -> None:
    """Write a JSON file whole or not at all; raises OSError. `sync`: see `atomic_write`."""
    with atomic_write(path, sync) as file:
        file.write_text(json.dumps(values, indent=1) + "\n")


def write_hashed_json(path: Path, values: Mapping[str, Any], sync: bool = False) -> None:
    """Write a JSON file with a hash of its values, for `read_hashed_json`; raises OSError."""
    write_json(path, {**values, HASH_KEY: _json_hash(values)}, sync)


def read_hashed_json(path: Path) -> dict[str, Any]:
    """Read a file of `write_hashed_json`, without the hash.

    Raises:
        ValueError: if the file is damaged or has no hash.
        OSError: if it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error
    if isinstance(values, dict) and HASH_KEY not in values:
        raise ValueError(f"{path} is damaged, or an earlier version of this package wrote it: it has no hash.")
    if not isinstance(values, dict) or values.pop(HASH_KEY) != _json_hash(values):
        raise ValueError(f"{path} is damaged: its content does not match its hash.")
    return values


def _json_hash(values: Mapping[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)  # keys and tuples as they are read back
    return xxhash.xxh3_128(text.encode()).hexdigest()


def hash_tensors(digest: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Feed names, types, shapes and every byte of some tensors to a hash, in the order of their names."""
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_hashed_tensors(path: Path, tensors: Mapping[str, torch.Tensor], sync: bool = False) -> None:
    """Write a safetensors file with a hash of its tensors, for `read_hashed_tensors`; whole or not at all.

    Raises:
        OSError, SafetensorError: if it cannot be written.
    """
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_write(path, sync) as file:
        save_file(kept, file, {HASH_KEY: _tensors_hash(kept)})


def read_hashed_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of `write_hashed_tensors` into memory.

    Raises:
        ValueError: if the file is damaged or has no hash.
        FileNotFoundError: if there is none.
    """
    try:
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get(HASH_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if stated != _tensors_hash(tensors):
        raise ValueError(f"{path} is damaged: its content does not match its hash.")
    return tensors


def _tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128()
    hash_tensors(digest, tensors)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """The XXH3-128 hash of a file's content, in hexadecimal; read in pieces.

    It finds accidents, and is no defense against forgery. Twelve times as fast as BLAKE2: a checkpoint has gigabytes.

    Raises:
        OSError: if the file cannot be read.
    """
    digest, buffer = xxhash.xxh3_128(), bytearray(2**20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def read_yaml(source: str | Path, text: str) -> Any:
    """Read YAML from a person or a stranger as plain data.

    Args:
        source: file or setting that the text comes from, for messages.
        text: one document.

    Raises:
        ValueError: if it is not valid YAML, a mapping has a key twice (YAML would keep the last one), or aliases stand
            for more than `YAML_VALUES` values.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _count_values(source, node, {})
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`{source}` is not valid YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"`{source}` is not valid YAML: it is nested too deeply.") from None


def _count_values(source: str | Path, node: yaml.Node, counted: dict[int, int]) -> int:
    """Count the values of a node; `counted` has those of the nodes that were seen, 0 while one is being counted."""
    if id(node) in counted:
        if not counted[id(node)]:
            raise ValueError(f"`{source}` has an alias inside of what it stands for{_line(node)}.")
        return counted[id(node)]
    counted[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, Any]] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in keys:
                raise ValueError(f"`{source}` has the key {key.value!r} twice{_line(key)}: keep one of them.")
            keys.add((key.tag, str(key.value)))
            children += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    count = 1 + sum(_count_values(source, child, counted) for child in children)
    if count > YAML_VALUES:
        raise ValueError(f"`{source}` has more than {YAML_VALUES:,} values once its aliases are written out.")
    counted[id(node)] = count
    return count


def _line(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})"
