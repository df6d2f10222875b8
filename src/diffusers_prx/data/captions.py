"""Captions: decode stored captions, choose one of several, and compute statistics of a data set's captions."""

import difflib
import json
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from .images import UnreadableSample

# Thresholds of `CaptionStatistics.warnings`; choices of ours, not of the study.
SHORT_TOKENS = 30  # median; one plain sentence
TRUNCATED_SHARE = 0.05
EMPTY_SHARE = 0.01
DUPLICATED_SHARE = 0.2

# Common column names, suggested when the requested one does not exist.
COMMON_COLUMNS = {
    "image_column": ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp"),
    "caption_column": ("text", "caption", "captions", "prompt", "description", "txt", "title"),
}


def require_column(
    option: str, column: str, available: Collection[str], source: str = "the data set", remedy: str | None = None
) -> None:
    """Raise an error if a data set lacks a column.

    Args:
        option: setting that names the column, `image_column` or `caption_column`.
        column: name of the column.
        available: columns of the data set.
        source: name of the data set, for the message.
        remedy: advice if no available column has a likely name. Default: pass one of the available columns.

    Raises:
        ValueError: if `column` is not in `available`; the message lists these and the flag to pass.
    """
    if column in available:
        return
    similar = difflib.get_close_matches(column, available, 1, 0.75)
    likely = [*similar, *(name for name in COMMON_COLUMNS[option] if name in available)]
    if likely:
        remedy = f"pass `--{option} {likely[0]}`"
    elif remedy is None:
        remedy = f"pass one of them as `--{option}`"
    columns = ", ".join(map(repr, available)) or "no column"
    raise ValueError(f"`{option}` is {column!r}, but {source} has {columns}: {remedy}.")


def read_caption(value: Any) -> str:
    """Decode one cell or file to a caption, stripped of surrounding space. The first item of a list is used.

    Raises:
        UnreadableSample: if the value is not a text, is empty, or is not valid UTF-8. Half of a surrogate pair, which
            broken JSON yields, is invalid too: a replacement character would be learned.
    """
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UnreadableSample(f"is not valid UTF-8 ({error.reason} at byte {error.start})") from error
    if not isinstance(value, str):
        raise UnreadableSample(f"is not a text: {value!r:.80}" if value is not None else "is missing")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UnreadableSample("has half of a surrogate pair")
    if not value.strip():
        raise UnreadableSample("is empty")
    return value.strip()


def read_captions(values: Mapping[str, Any]) -> dict[str, str]:
    """Decode the captions of a sample by column, without the columns that hold none.

    Raises:
        UnreadableSample: if no column holds a caption; the message gives the reason for each.
    """
    captions, reasons = {}, []
    for column, value in values.items():
        try:
            captions[column] = read_caption(value)
        except UnreadableSample as error:
            reasons.append(f"caption `{column}` {error}")
    if not captions:
        raise UnreadableSample("; ".join(reasons))
    return captions


def find_caption(column: str, endings: Collection[str], read: Callable[[str], bytes | None]) -> Any:
    """Return the undecoded caption of an image from the files that share its name.

    The caption is the file with the ending `column` (`txt`, `long.txt`; `text` also means .txt), or else the key
    `column` of the .json file.

    Args:
        column: caption column.
        endings: endings of the files that share the image's name.
        read: function that returns the contents of the file with an ending.

    Returns:
        The value, None if there is none, or the error of a broken .json; `read_caption` rejects the last two.
    """
    if column in endings:
        return read(column)
    if column == "text" and "txt" in endings:
        return read("txt")
    if "json" not in endings:
        return None
    try:
        values = json.loads(read("json") or b"")
    except ValueError as error:
        return error
    return values.get(column) if isinstance(values, dict) else None


def choose_caption(captions: Mapping[str, str], weights: Mapping[str, float], uniform: float) -> str:
    """Choose one caption of a sample with the given probabilities.

    Args:
        captions: captions by column.
        weights: non-negative weights by column, renormalized over the columns that hold a text.
        uniform: random number in [0, 1). The choice depends on it and not on the order of `captions`.

    Raises:
        UnreadableSample: if no column with a positive weight holds a text.
    """
    present = [column for column in weights if weights[column] > 0 and captions.get(column, "").strip()]
    if not present:
        raise UnreadableSample(f"the columns {sorted(weights)} have no caption")
    remaining = uniform * sum(weights[column] for column in present)
    for column in present[:-1]:
        remaining -= weights[column]
        if remaining < 0:
            return captions[column]
    return captions[present[-1]]


@dataclass(frozen=True)
class CaptionStatistics:
    """Statistics of captions as the text encoder sees them.

    Args:
        count: number of captions.
        tokens_mean, tokens_median, tokens_p95: length in tokens after cleaning, with special tokens.
        truncated: share of captions longer than `max_length`.
        empty: share of captions without a word after cleaning.
        duplicated: share of captions whose cleaned text repeats an earlier caption.
        max_length: tokens that the text encoder sees.
    """

    count: int
    tokens_mean: float
    tokens_median: float
    tokens_p95: float
    truncated: float
    empty: float
    duplicated: float
    max_length: int

    def summary(self) -> str:
        """All statistics in one line."""
        return (
            f"{self.count} captions: {self.tokens_mean:.0f} tokens on average, median {self.tokens_median:.0f}, 95% "
            f"up to {self.tokens_p95:.0f}; {self.truncated:.1%} longer than {self.max_length}, {self.empty:.1%} "
            f"empty, {self.duplicated:.1%} duplicated"
        )

    def warnings(self) -> list[str]:
        """Properties that may harm the training, each with a remedy.

        They do not apply to `scenes`, whose captions are short and complete.
        """
        found = []
        if self.tokens_median < SHORT_TOKENS:
            found.append(
                f"Captions are short: a median of {self.tokens_median:.0f} tokens. In PRX's study short captions in "
                "place of long ones raised FID from 18.20 to 36.84. Write longer ones with training/recaption_prx.py."
            )
        if self.truncated > TRUNCATED_SHARE:
            found.append(
                f"{self.truncated:.1%} of the captions are longer than `max_sequence_length` {self.max_length} and "
                "are truncated."
            )
        if self.empty > EMPTY_SHARE:
            found.append(
                f"{self.empty:.1%} of the captions have no word left after cleaning. Pass `--caption_cleaning light`, "
                "which keeps text in any script."
            )
        if self.duplicated > DUPLICATED_SHARE:
            found.append(f"{self.duplicated:.1%} of the captions repeat an earlier one.")
        return found


def caption_statistics(
    captions: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int, clean: Callable[[str], str]
) -> CaptionStatistics:
    """Compute statistics of captions as `text.tokenize_prompts` reads them. A few thousand captions are enough.

    Args:
        captions: at least one caption.
        tokenizer: tokenizer of the text encoder.
        max_length: tokens that the text encoder sees.
        clean: cleaning function, see `text.tokenize_prompts`.

    Raises:
        ValueError: if `captions` is empty.

    Example:
        >>> print(caption_statistics(captions, pipe.tokenizer, 256, clean_caption).summary())
    """
    lengths: list[int] = []
    empty = 0
    seen: set[str] = set()
    remaining = iter(captions)
    while chunk := [clean(caption) for caption in islice(remaining, 256)]:
        rows = tokenizer(chunk, padding=False, truncation=False, verbose=False)["input_ids"]
        lengths += [len(row) for row in rows]
        empty += sum(not text for text in chunk)
        seen.update(chunk)
    if not lengths:
        raise ValueError("`captions` is empty; at least one caption is needed.")
    ordered, count = sorted(lengths), len(lengths)
    return CaptionStatistics(
        count=count,
        tokens_mean=statistics.fmean(ordered),
        tokens_median=statistics.median(ordered),
        tokens_p95=ordered[-(-95 * count // 100) - 1],  # the smallest length that 95% do not exceed
        truncated=sum(length > max_length for length in ordered) / count,
        empty=empty / count,
        duplicated=1 - len(seen) / count,
        max_length=max_length,
    )
