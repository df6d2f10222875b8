"""Files that are whole or not there."""

import json

import pytest

from diffusers_prx.data.files import UNFINISHED, write_json, written_whole
from disks import full_disk


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_there_when_it_is_whole(tmp_path, sync):
    path = tmp_path / "new" / "file.txt"
    with written_whole(path, sync) as file:
        file.write_text("half")
        assert not path.exists()
        file.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, "before")
    with full_disk(20), pytest.raises(OSError, match="File too large"):
        write_json(path, "a text that is longer than the disk")
    assert json.loads(path.read_text()) == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "file.txt"
    with written_whole(path) as one, written_whole(path) as other:
        assert one != other
        assert one.name.endswith(UNFINISHED)
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # whose block ended last


def test_json(tmp_path):
    write_json(tmp_path / "a" / "values.json", {"a": [1, None]})
    assert json.loads((tmp_path / "a" / "values.json").read_text()) == {"a": [1, None]}
