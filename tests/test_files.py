"""Atomic writes, hashed files."""

import json

import pytest
import torch

from diffusers_prx.files import (
    UNFINISHED,
    atomic_write,
    read_hashed_json,
    read_hashed_tensors,
    write_hashed_json,
    write_hashed_tensors,
    write_json,
)
from disks import full_disk


@pytest.mark.parametrize("sync", [False, True])
def test_atomic_write_creates_the_file_at_the_end(tmp_path, sync):
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path, sync) as file:
        file.write_text("half")
        assert not path.exists()
        file.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, "before")
    with full_disk(20), pytest.raises(OSError, match="File too large"):
        write_json(path, "a text that is longer than the disk")
    assert json.loads(path.read_text()) == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_use_different_temporary_files(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_write(path) as one, atomic_write(path) as other:
        assert one != other
        assert one.name.endswith(UNFINISHED)
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the block that ended last


def test_write_json_creates_folders(tmp_path):
    write_json(tmp_path / "a" / "values.json", {"a": [1, None]})
    assert json.loads((tmp_path / "a" / "values.json").read_text()) == {"a": [1, None]}


@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_any_flipped_bit_in_a_hashed_file_is_detected(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "json":
        read, values = read_hashed_json, {"a": [1, 2.5, None], "b": {"c": "star"}}
        write_hashed_json(path, {**values, "a": tuple(values["a"])})
        assert read(path) == values
    else:
        read, values = read_hashed_tensors, {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True)}
        write_hashed_tensors(path, values)
        assert all(torch.equal(tensor, values[name]) for name, tensor in read(path).items())
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=str(path)):
            read(path)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{}", b'{"hash": 1}', b"[" * 100_000, b"\xff"])
def test_file_without_hash_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    for read in (read_hashed_json, read_hashed_tensors):
        with pytest.raises(ValueError, match="damaged"):
            read(tmp_path / "file")
