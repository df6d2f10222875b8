"""File helpers: paths of users, atomic writes, hashed JSON and safetensors files, and safe reading of YAML."""

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
HASH_KEY = "hash"  # key in a JSON file, and in the metadata of a safetensors file
HASH_NAME = "xxh3_128"  # algorithm of `hash_file`
# limit of values in a YAML text with aliases written out: ten short lines can hold a billion
YAML_VALUES = 100_000
NAMES_SHOWN = 5


def is_remote(path: str) -> bool:
    """True for an address such as `hf://...`, false for a path. File names such as `memory::x.png` are paths.

    Example:
        >>> is_remote("hf://datasets/me/pictures")
        True
    """
    return "://" in path


def expand_path(path: str) -> str:
    """Expand a leading `~` and variables such as `$HOME`; addresses stay unchanged.

    Example:
        >>> expand_path("~/pictures")
        '/home/me/pictures'
    """
    return path if is_remote(path) else os.path.expandvars(os.path.expanduser(path))


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a regular file for reading.

    Raises:
        OSError: if the file does not exist, or is a FIFO, a device or a socket: reading could block forever.

    Example:
        >>> with open_regular("cat.png") as file:
        ...     content = file.read()
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{printable(path)} is not a regular file")
    return open(path, "rb")


def printable(path: str | Path) -> str:
    """Return a path for a message, also if its name is not valid text.

    Example:
        >>> printable(Path("cat.png"))
        'cat.png'
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shown(names: Iterable[str | Path], count: int) -> str:
    """Return the first of `count` names for a message, and the number of the others.

    Example:
        >>> shown(["a", "b"], 2)
        'a, b'
    """
    text = ", ".join(map(printable, islice(names, NAMES_SHOWN)))
    return text if count <= NAMES_SHOWN else f"{text} and {count - NAMES_SHOWN} more"


@contextmanager
def atomic_write(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename the file to `path` when the block ends without an error.

    Several processes may write the same path at once; the last one wins. A killed process leaves a file whose name
    ends in `UNFINISHED`.

    Args:
        path: file to write. Missing folders are created.
        sync: flush the file to disk before renaming it, which also survives a power loss.

    Raises:
        OSError: if a folder cannot be created, or the file cannot be renamed.

    Example:
        >>> with atomic_write(Path("report.txt")) as file:
        ...     file.write_text("done")
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
    """Write a JSON file atomically; `sync` as in `atomic_write`.

    Raises:
        OSError: if the file cannot be written.

    Example:
        >>> write_json(Path("scores.json"), {"fid": 12.5})
    """
    with atomic_write(path, sync) as file:
        file.write_text(json.dumps(values, indent=1) + "\n")


def write_hashed_json(path: Path, values: Mapping[str, Any], sync: bool = False) -> None:
    """Write a JSON file with a hash of its values, atomically; read it with `read_hashed_json`.

    Raises:
        OSError: if the file cannot be written.

    Example:
        >>> write_hashed_json(Path("state.json"), {"step": 100})
    """
    write_json(path, {**values, HASH_KEY: _json_hash(values)}, sync)


def read_hashed_json(path: Path) -> dict[str, Any]:
    """Read a file of `write_hashed_json` and check its hash.

    Raises:
        ValueError: if the file is damaged or has no hash.
        OSError: if it cannot be read.

    Example:
        >>> read_hashed_json(Path("state.json"))
        {'step': 100}
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
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)  # keys and tuples as JSON returns them
    return xxhash.xxh3_128(text.encode()).hexdigest()


def hash_tensors(digest: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Update a hash with names, dtypes, shapes and values of tensors, in the order of their names.

    Args:
        digest: object with `update`, from hashlib or xxhash.
        tensors: tensors by name, on any device.

    Example:
        >>> digest = hashlib.blake2b()
        >>> hash_tensors(digest, model.state_dict())
    """
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_hashed_tensors(path: Path, tensors: Mapping[str, torch.Tensor], sync: bool = False) -> None:
    """Write a safetensors file with a hash of its tensors, atomically; read it with `read_hashed_tensors`.

    Raises:
        OSError, SafetensorError: if the file cannot be written.

    Example:
        >>> write_hashed_tensors(Path("statistics.safetensors"), {"mean": torch.zeros(3)})
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_write(path, sync) as file:
        save_file(contiguous, file, {HASH_KEY: _tensors_hash(contiguous)})


def read_hashed_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of `write_hashed_tensors` and check its hash.

    Raises:
        ValueError: if the file is damaged or has no hash.
        FileNotFoundError: if the file does not exist.

    Example:
        >>> mean = read_hashed_tensors(Path("statistics.safetensors"))["mean"]
    """
    try:
        with safe_open(path, "pt") as file:
            stored_hash = (file.metadata() or {}).get(HASH_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if stored_hash != _tensors_hash(tensors):
        raise ValueError(f"{path} is damaged: its content does not match its hash.")
    return tensors


def _tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128()
    hash_tensors(digest, tensors)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the XXH3-128 hash of a file's content, in hexadecimal.

    It detects accidents, not forgery, and is twelve times as fast as BLAKE2 on checkpoints of gigabytes.

    Raises:
        OSError: if the file cannot be read.

    Example:
        >>> checksum = hash_file(Path("model.safetensors"))
    """
    digest, buffer = xxhash.xxh3_128(), bytearray(2**20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def read_yaml(source: str | Path, text: str) -> Any:
    """Read untrusted YAML as plain data.

    Args:
        source: file or setting of the text, for messages.
        text: one YAML document.

    Raises:
        ValueError: if the text is not valid YAML, a mapping has a key twice (YAML would keep the last one), or it has
            more than `YAML_VALUES` values with aliases written out.

    Example:
        >>> read_yaml("recipe.yaml", "learning_rate: 0.0001")
        {'learning_rate': 0.0001}
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
    """Count the values of a node. `counted` maps the id of each visited node to its count, 0 during the count."""
    if id(node) in counted:
        if not counted[id(node)]:
            raise ValueError(f"`{source}` has an alias that contains itself{_line(node)}.")
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
