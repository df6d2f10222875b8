"""Captions: what counts as one, which of several is used, and what the captions of a data set look like."""

import difflib
import json
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .images import UnreadableSample

# From which values on `CaptionStatistics.warnings` speaks; choices of ours, not of the study.
SHORT_TOKENS = 30  # median; one plain sentence
TRUNCATED_SHARE = 0.05
EMPTY_SHARE = 0.01
DUPLICATED_SHARE = 0.2

# Names that columns often have, to propose one where another was asked for.
USUAL_COLUMNS = {
    "image_column": ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp"),
    "caption_column": ("text", "caption", "captions", "prompt", "description", "txt", "title"),
}


def require_column(
    option: str, column: str, there: Collection[str], where: str = "the data set", remedy: str | None = None
) -> None:
    """Refuse a column that is not there.

    Args:
        option: the setting that names it, `image_column` or `caption_column`.
        column: its name.
        there: the columns of the data set.
        where: which data set, for the message.
        remedy: what to do if no column looks like the one that is wanted; by default, to pass one of those there.

    Raises:
        ValueError: with the columns that are there, and the flag to pass.
    """
    if column in there:
        return
    likely = [*difflib.get_close_matches(column, there, 1, 0.75), *(n for n in USUAL_COLUMNS[option] if n in there)]
    if likely:
        remedy = f"pass `--{option} {likely[0]}`"
    elif remedy is None:
        remedy = f"pass one of them as `--{option}`"
    raise ValueError(f"`{option}` is {column!r}; {where} has {', '.join(map(repr, there)) or 'no column'}: {remedy}.")


def read_caption(value: Any) -> str:
    """The text of one cell or file, without space around it. Of several captions (a list) the first is taken.

    Raises:
        UnreadableSample: for what is no text, an empty text, and text that is no valid UTF-8 (also half of a surrogate
            pair, as broken JSON gives): a sign put in its place would be learned.
    """
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UnreadableSample(f"text that is no UTF-8 ({error.reason} at byte {error.start})") from error
    if not isinstance(value, str):
        raise UnreadableSample(repr(value)[:80])
    if any("\ud800" <= sign <= "\udfff" for sign in value):
        raise UnreadableSample("text with half of a surrogate pair")
    if not value.strip():
        raise UnreadableSample("an empty text")
    return value.strip()


def read_captions(values: Mapping[str, Any]) -> dict[str, str]:
    """The captions of a sample by column; columns that hold none are left out.

    Raises:
        UnreadableSample: if no column holds one, with the reason for each.
    """
    captions, reasons = {}, []
    for column, value in values.items():
        try:
            captions[column] = read_caption(value)
        except UnreadableSample as error:
            reasons.append(f"{column} is {error}")
    if not captions:
        raise UnreadableSample(f"no caption: {'; '.join(reasons)}")
    return captions


def find_caption(column: str, endings: Collection[str], read: Callable[[str], bytes | None]) -> Any:
    """The value of a caption column for an image with files beside it: the file with that ending (`txt`, `long.txt`;
    the column `text` is also .txt), else the key of that name in the .json file; `None` where there is neither, and
    the error where the .json is broken: both are no text to `read_caption`."""
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


def choose_caption(captions: dict[str, str], weights: dict[str, float], uniform: float) -> str:
    """One caption of a sample, by weights.

    Args:
        captions: by column.
        weights: by column, not negative; renormalized over the columns that hold a text here.
        uniform: a draw from [0, 1); the choice is a function of it, whatever the order of `captions`.

    Raises:
        UnreadableSample: if no column with a positive weight holds a text.
    """
    present = [column for column in weights if weights[column] > 0 and captions.get(column, "").strip()]
    if not present:
        raise UnreadableSample(f"no caption in any of the columns {sorted(weights)}")
    left = uniform * sum(weights[column] for column in present)
    for column in present[:-1]:
        left -= weights[column]
        if left < 0:
            return captions[column]
    return captions[present[-1]]


@dataclass(frozen=True)
class CaptionStatistics:
    """What captions look like to the text encoder.

    Args:
        count: captions looked at.
        tokens_mean, tokens_median, tokens_p95: length in tokens after cleaning, with the tokenizer's own signs.
        truncated: share longer than `max_length`.
        empty: share without a word after cleaning.
        duplicated: share whose cleaned text has stood in an earlier caption.
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
        """The figures in one line."""
        return (
            f"{self.count} captions: {self.tokens_mean:.0f} tokens on average, median {self.tokens_median:.0f}, 95% "
            f"up to {self.tokens_p95:.0f}; {self.truncated:.1%} longer than {self.max_length}, {self.empty:.1%} "
            f"empty, {self.duplicated:.1%} duplicated"
        )

    def warnings(self) -> list[str]:
        """What may harm the training, with what to do about it. For data whose captions leave things unsaid: a
        caption of `scenes` is short and complete."""
        found = []
        if self.tokens_median < SHORT_TOKENS:
            found.append(
                f"Captions are short: a median of {self.tokens_median:.0f} tokens. In PRX's study short captions in "
                "place of long ones raised FID from 18.20 to 36.84. Describe the images anew with a captioning model."
            )
        if self.truncated > TRUNCATED_SHARE:
            found.append(
                f"{self.truncated:.1%} of the captions are longer than `max_sequence_length` {self.max_length} and "
                "are cut."
            )
        if self.empty > EMPTY_SHARE:
            found.append(
                f"{self.empty:.1%} of the captions have no word left after cleaning: `--caption_cleaning light` keeps "
                "what is text, in any writing."
            )
        if self.duplicated > DUPLICATED_SHARE:
            found.append(f"{self.duplicated:.1%} of the captions repeat an earlier one.")
        return found


def caption_statistics(
    captions: Iterable[str], tokenizer: Any, max_length: int, clean: Callable[[str], str]
) -> CaptionStatistics:
    """Statistics of captions as `text.tokenize_prompts` reads them; a few thousand captions say enough.

    Args:
        captions: at least one.
        tokenizer: a transformers tokenizer.
        max_length: tokens that the text encoder sees.
        clean: how captions are cleaned, see `text.tokenize_prompts`.

    Raises:
        ValueError: if there is no caption.
    """
    lengths: list[int] = []
    empty = 0
    seen: set[str] = set()
    stream = iter(captions)
    while chunk := [clean(caption) for caption in islice(stream, 256)]:
        rows = tokenizer(chunk, padding=False, truncation=False, verbose=False)["input_ids"]
        lengths += [len(row) for row in rows]
        empty += sum(not text for text in chunk)
        seen.update(chunk)
    if not lengths:
        raise ValueError("`captions` is empty: there is nothing to tell about.")
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
