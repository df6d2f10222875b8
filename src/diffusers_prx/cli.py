"""Helpers of the command-line scripts: paths, suggestions for unknown flags, and short error messages."""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from .files import expand_path


def path(text: str) -> Path:
    """Convert an argument to a path, with `~` and environment variables expanded (a `type` for argparse)."""
    return Path(expand_path(text))


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; the error for an unknown flag suggests a similar one."""
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown, known)}")
    return parsed


def did_you_mean(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Return " (did you mean --seed?)" for the first name similar to a known one, or an empty string."""
    known = list(known)
    for name in unknown:
        if found := difflib.get_close_matches(name.partition("=")[0].replace("-", "_"), _folded(known), n=1):
            return f" (did you mean {_folded(known)[found[0]]}?)"
    return ""


def _folded(names: Iterable[str]) -> dict[str, str]:
    return {name.replace("-", "_"): name for name in names}


def print_notes(notes: Iterable[str]) -> None:
    """Print lines on the first process, before an accelerator exists."""
    if int(os.environ.get("RANK", 0)) == 0:
        for note in notes:
            print(note, flush=True)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print a ValueError or OSError as "error: ..." without traceback, and exit with code 1.

    Other exceptions are bugs and keep their traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        exit_with_error(error)


def exit_with_error(error: Exception) -> NoReturn:
    """Print an error without traceback and exit with code 1."""
    sys.exit(f"error: {error_message(error)}")


def error_message(error: BaseException) -> str:
    """Return the message of an error, without the traceback of a data worker, and with a hint if the Hub failed."""
    text = str(error)
    if text.startswith("Caught "):  # an error in a data worker, with its traceback
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    if not text:
        text = type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            offline = " (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""
            return f"{text.rstrip('. ')}. The Hub could not be reached{offline}: check the name and the connection."
        cause = cause.__cause__ or cause.__context__
    return text
