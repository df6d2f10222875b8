"""Lock on the output folder, so that only one run writes to it."""

import fcntl
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

LOCK_FILE = ".run.lock"


class FolderLock:
    """System lock (flock) on `.run.lock` in a folder; the file names its holder.

    The system releases the lock when the process ends for any reason. Other processes of the run and data workers do
    not hold it. On a network drive, it detects runs of other machines only if the drive supports locks: NFS does
    unless it is mounted with `nolock` or `local_lock=flock`, and Lustre needs `flock`. With Lustre's `localflock` and
    with object stores (s3fs, gcsfuse), only runs of the same machine detect each other.

    Args:
        folder: output folder of the run; it is created if it does not exist.

    Raises:
        ValueError: another run holds the lock, or the folder cannot be created.

    Example:
        >>> lock = FolderLock(Path("outputs/run"))
        >>> lock.release()
    """

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"`output_dir` is {folder}, which cannot be created ({error.strerror}). Pass another `--output_dir`."
            ) from error
        self.path = folder / LOCK_FILE
        while True:
            self.file: Any = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.file.seek(0)
                holder = self.file.read().strip() or "another process"
                self.file.close()
                raise ValueError(
                    f"`output_dir` {folder} is in use by another run: {holder}. Wait until it ends, or pass another "
                    "`--output_dir`."
                ) from error
            except OSError as error:  # a drive without locks
                tqdm.write(f"`output_dir` {folder} cannot be locked; make sure that no other run uses it: {error}")
            if self._is_current():
                break
            self.file.close()  # the previous holder removed the file between open and flock
        HELD_LOCKS.add(self)
        self.file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
        self.file.flush()

    def _is_current(self) -> bool:
        """True if the path still refers to the open file."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file and release the lock. Further calls do nothing."""
        if self in HELD_LOCKS:
            HELD_LOCKS.discard(self)
            self.path.unlink(missing_ok=True)
            self.file.close()


HELD_LOCKS: weakref.WeakSet[FolderLock] = weakref.WeakSet()  # of this process


def _close_in_child() -> None:
    # flock belongs to the open file: a data worker that outlives its run would keep the folder locked
    for lock in list(HELD_LOCKS):
        lock.file.close()
    HELD_LOCKS.clear()


os.register_at_fork(after_in_child=_close_in_child)
