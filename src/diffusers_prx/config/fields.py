"""Metadata of config fields: type, help text, accepted range and tags.

Write a field of a config dataclass as `name: Annotated[int, "Help text.", AT_LEAST_ONE, PER_STAGE] = 32`.
"""

import functools
import math
import types
import typing
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal


class Tag(Enum):
    """Rules that a config field takes part in; the values are descriptions for readers."""

    PER_STAGE = "A stage may change this setting. All other settings apply to the whole run."
    FIXED_ON_RESUME = "A resumed run must use the same value as its checkpoint."
    SHARED_CACHE = "Stages that share a folder of precomputed data must use the same value."
    RUNTIME = "The setting affects how a run executes, not what it learns. Recipes on model cards leave it out."
    PATH = "`~` and environment variables in the value are expanded."


PER_STAGE, FIXED_ON_RESUME, SHARED_CACHE, RUNTIME, PATH = Tag


@dataclass(frozen=True)
class Range:
    """Range of accepted numbers; infinity and NaN are never accepted.

    Args:
        description: range in words, to follow "must be".
        low: lower bound.
        high: upper bound.
        exclude_low: True if the lower bound itself is not accepted.
        exclude_high: True if the upper bound itself is not accepted.

    Example:
        >>> 0.5 in Range("in [0, 1]", 0, 1)
        True
    """

    description: str
    low: float
    high: float = math.inf
    exclude_low: bool = False
    exclude_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.exclude_low else value >= self.low
        below = value < self.high if self.exclude_high else value <= self.high
        return above and below and value < math.inf


AT_LEAST_ONE = Range("at least 1", 1)
AT_LEAST_TWO = Range("at least 2", 2)
NON_NEGATIVE = Range("at least 0", 0)
POSITIVE = Range("greater than 0", 0, exclude_low=True)
FRACTION = Range("in [0, 1]", 0, 1)
FRACTION_BELOW_ONE = Range("in [0, 1)", 0, 1, exclude_high=True)
FRACTION_ABOVE_ZERO = Range("in (0, 1]", 0, 1, exclude_low=True)


@dataclass(frozen=True)
class ConfigField:
    """Metadata of one config field.

    Args:
        type_hint: type of the value.
        help: help text.
        range: accepted numbers; None for values that are not numbers.
        tags: rules that the field takes part in.
    """

    type_hint: Any
    help: str
    range: Range | None = None
    tags: frozenset[Tag] = frozenset()

    @property
    def accepted(self) -> str:
        """Type and range in words."""
        description = f", {self.range.description}" if self.range is not None else ""
        return " | ".join(map(_type_name, _alternatives(self.type_hint))) + description

    def parse(self, name: str, value: Any) -> Any:
        """Convert a value that YAML has read to the type of the field, and check it.

        Raises:
            ValueError: the type or the range does not fit.
        """
        parsed = self._convert(name, value)
        self.check_range(name, parsed)
        return parsed

    def _convert(self, name: str, value: Any) -> Any:
        alternatives = _alternatives(self.type_hint)
        is_optional = type(None) in alternatives and str not in alternatives
        if is_optional and isinstance(value, str) and value.lower() == "none":
            return None  # YAML's own word is null
        for alternative in alternatives:
            if typing.get_origin(alternative) is Literal:
                choices = typing.get_args(alternative)
                value = "no" if value is False and "no" in choices else value  # YAML reads a bare `no` as false
                if isinstance(value, str) and value.lower() in choices:
                    return value.lower()
            elif alternative is list and isinstance(value, str):
                return [value]
            elif alternative is float and not isinstance(value, bool):
                try:
                    return float(value)  # YAML reads 1e-4 as a string
                except (TypeError, ValueError):
                    continue
            elif alternative is str and isinstance(value, (int, float)) and not isinstance(value, bool):
                return str(value)
            elif isinstance(value, alternative) and not (alternative is int and isinstance(value, bool)):
                return value
        raise ValueError(f"`{name}` is {value!r}; accepted: {self.accepted}.")

    def check_range(self, name: str, value: Any) -> None:
        """Raise a ValueError for a number out of range."""
        if self.range is not None and value is not None and value not in self.range:
            raise ValueError(f"`{name}` must be {self.range.description}, got {value}.")


@functools.cache
def config_fields(config_class: type) -> dict[str, ConfigField]:
    """Return the metadata of all fields of a config dataclass by name.

    Example:
        >>> config_fields(TrainingConfig)["seed"].help
    """
    found = {}
    for name, annotated in typing.get_type_hints(config_class, include_extras=True).items():
        type_hint, help_text, *metadata = typing.get_args(annotated)
        ranges = [entry for entry in metadata if isinstance(entry, Range)]
        tags = frozenset(entry for entry in metadata if isinstance(entry, Tag))
        found[name] = ConfigField(type_hint, help_text, ranges[0] if ranges else None, tags)
    return found


def field_names(config_class: type, tag: Tag) -> list[str]:
    """Return the names of the fields that have a tag, in the order of their definition."""
    return [name for name, field in config_fields(config_class).items() if tag in field.tags]


def _alternatives(type_hint: Any) -> tuple[Any, ...]:
    return typing.get_args(type_hint) if isinstance(type_hint, types.UnionType) else (type_hint,)


def _type_name(alternative: Any) -> str:
    if typing.get_origin(alternative) is Literal:
        return " | ".join(map(str, typing.get_args(alternative)))
    return "null" if alternative is type(None) else alternative.__name__
