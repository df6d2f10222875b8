"""What is said of a setting where it stands: its type, its help, its range, and what else depends on it.

`name: Annotated[int, "Images per process and forward.", AT_LEAST_ONE, STAGE] = 32` in a dataclass.
"""

import functools
import math
import types
import typing
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal


class Mark(Enum):
    """What depends on a setting."""

    STAGE = "A stage of a run may change it; all others belong to the run as a whole."
    FIXED = (
        "A resumed run must keep it: its stream of samples follows from it, or it is restored with optimizer and "
        "averages, so that another value would have no effect."
    )
    CACHED = "It makes a sample of an image or a caption; stages that share a cache have it in common."
    RUNTIME = "It is of the run's surroundings, and no part of its recipe."
    PATH = "A path, or a name that may be one: `~` and variables of the environment are expanded."


STAGE, FIXED, CACHED, RUNTIME, PATH = Mark.STAGE, Mark.FIXED, Mark.CACHED, Mark.RUNTIME, Mark.PATH


@dataclass(frozen=True)
class Range:
    """Which numbers a setting may be.

    Args:
        words: the same for a reader, behind "must be".
        low, high: the bounds; numbers that are not finite are never in between.
        open_low, open_high: whether a bound is left out.
    """

    words: str
    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and value < math.inf


AT_LEAST_ONE = Range("at least 1", 1)
FROM_ONE = Range("finite and at least 1", 1)
NOT_NEGATIVE = Range("finite and not negative", 0)
POSITIVE = Range("positive and finite", 0, open_low=True)
SHARE = Range("a share in [0, 1]", 0, 1)
BELOW_ONE = Range("in [0, 1)", 0, 1, open_high=True)
PART = Range("in (0, 1]", 0, 1, open_low=True)


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass of settings."""

    annotation: Any
    help: str
    range: Range | None
    marks: frozenset[Mark]

    @property
    def accepts(self) -> str:
        """In words, the type and the range."""
        words = f", {self.range.words}" if self.range is not None else ""
        return " | ".join(map(_type_name, _members(self.annotation))) + words

    def read(self, name: str, value: Any) -> Any:
        """The value as the field's type, or a ValueError: recipes and flags go through the same door."""
        kinds = _members(self.annotation)
        if isinstance(value, str) and value.lower() == "none" and type(None) in kinds and str not in kinds:
            return None  # as people type it; YAML has null
        for member in _members(self.annotation):
            choices = typing.get_args(member) if typing.get_origin(member) is Literal else ()
            if choices:
                # YAML reads a bare `no` as false
                value = "no" if value is False and "no" in choices else value
                if isinstance(value, str) and value.lower() in choices:
                    return value.lower()
            elif member is list and isinstance(value, str):
                return [value]  # one prompt, one layer
            elif member is float and not isinstance(value, bool):
                try:
                    return float(value)  # YAML reads 1e-4 as a word
                except (TypeError, ValueError):
                    continue
            elif member is str and isinstance(value, (int, float)) and not isinstance(value, bool):
                return str(value)
            elif isinstance(value, member) and not (member is int and isinstance(value, bool)):
                return value
        raise ValueError(f"`{name}` got {value!r}; accepted: {self.accepts}.")

    def check(self, name: str, value: Any) -> None:
        """Raise a ValueError for a number out of range."""
        if self.range is not None and value is not None and value not in self.range:
            raise ValueError(f"`{name}` must be {self.range.words}, got {value}.")


@functools.cache
def settings_of(kind: type) -> dict[str, Setting]:
    """The settings of a dataclass whose fields are annotated as above, by name."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        annotation, text, *more = typing.get_args(hint)
        ranges = [said for said in more if isinstance(said, Range)]
        marks = frozenset(said for said in more if isinstance(said, Mark))
        found[name] = Setting(annotation, text, ranges[0] if ranges else None, marks)
    return found


def marked(kind: type, mark: Mark) -> list[str]:
    """The names of the settings that have a mark, in order."""
    return [name for name, setting in settings_of(kind).items() if mark in setting.marks]


def _members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _type_name(member: Any) -> str:
    if typing.get_origin(member) is Literal:
        return " | ".join(map(str, typing.get_args(member)))
    return "null" if member is type(None) else member.__name__
