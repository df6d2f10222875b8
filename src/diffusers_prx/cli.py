"""Shared parts of the command-line scripts: paths as arguments, and errors in one sentence."""

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
    """A `type` of argparse: a path whose `~` and variables are expanded."""
    return Path(expand_path(text))


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return `parser.parse_args(argv)`; the message about an unknown flag names the one that it may stand for."""
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown, known)}")
    return parsed


def did_you_mean(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Return " (did you mean --seed?)" for the first name that looks like a known one, or nothing."""
    known = list(known)
    for name in unknown:
        if found := difflib.get_close_matches(name.partition("=")[0].replace("-", "_"), _folded(known), n=1):
            return f" (did you mean {_folded(known)[found[0]]}?)"
    return ""


def _folded(names: Iterable[str]) -> dict[str, str]:
    return {name.replace("-", "_"): name for name in names}


def print_notes(notes: Iterable[str]) -> None:
    """Print lines once, however many processes were launched; for scripts whose run has not begun."""
    if int(os.environ.get("RANK", 0)) == 0:
        for note in notes:
            print(note, flush=True)


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """End the process with "error: ..." and exit code 1 where a value, a file or a disk is not as it has to be.

    What is a mistake of ours (any other exception) keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        end(error)


def end(error: Exception) -> NoReturn:
    """Print an error without its traceback and end the process with exit code 1."""
    sys.exit(f"error: {sentence(error)}")


def sentence(error: BaseException) -> str:
    """Return what an error says, from a data worker too, and whether it is because the Hub could not be reached."""
    text = str(error)
    if text.startswith("Caught "):  # PyTorch's report of an error in a data worker, with the worker's traceback
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    if not text:
        text = type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            why = " (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""
            return f"{text.rstrip('. ')}. The Hub could not be reached{why}: check the name and the connection."
        cause = cause.__cause__ or cause.__context__
    return text
