"""Files that are whole or not there: written under another name, then renamed."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"


@contextmanager
def written_whole(path: Path, sync: bool = False) -> Iterator[Path]:
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
    """Write a JSON file whole or not at all; raises OSError. `sync`: see `written_whole`."""
    with written_whole(path, sync) as file:
        file.write_text(json.dumps(values, indent=1) + "\n")
