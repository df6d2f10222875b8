"""Prompt cleaning: prompts are cleaned as the captions in training.

The rules, their order and their quirks are those of PRX's training (a variant of DeepFloyd IF's caption cleaning): the
published checkpoints were trained on captions that were cleaned this way. All rules take linear time. Two that would
be quadratic as regular expressions are functions (`_remove_links`, `_remove_file_name`).

`caption_cleaning` of a pipeline is one of:

- "full": lower case, without links, file names, article numbers, CJK characters and odd signs; the rules of the
  current trainer of Photoroom/PRX. The study uses it with T5Gemma.
- "full_v1": the rules as in diffusers' PRXPipeline: curly quotes are straightened only after the rules for quotes, and
  whitespace at the ends hides signs there from their rules. The default of PRXPipeline.
- "light": only repairs Unicode and HTML. The study uses it with Qwen3-VL. The default of PRXPixelPipeline.
"""

import html
import re
from collections.abc import Callable
from typing import Literal, get_args
from urllib.parse import unquote_plus

import ftfy

CaptionCleaning = Literal["full", "full_v1", "light"]
CAPTION_CLEANINGS: tuple[CaptionCleaning, ...] = get_args(CaptionCleaning)

_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
    "\ufe63\uff0d"
)
_FILE_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAINS = "com|co|ru|net|org|edu|gov|it"

_HOST = re.compile(r"[a-zA-Z0-9.\-]+")
_SCHEME = re.compile(r"\b(?:https?|www):(?:/{1,3}|[a-zA-Z0-9%])")
_DOMAIN = re.compile(rf"[.](?:{_DOMAINS})[\w/-]*\b/?(?!@)")
_BOUNDARY = re.compile(r"\b")
_FILE_ENDING = re.compile(rf"\.(?:{_FILE_ENDINGS})")
_LONG_REFERENCE = re.compile(r"(?<=&#)[0-9]{8,}")


def _remove_links(text: str) -> str:
    """Remove starts of addresses, and host names with their paths.

    Equals removing every match of `\\b(scheme|host characters + .domain[\\w/-]*\\b/?(?!@))`, in linear time: wherever
    it starts in a run of host characters, a match ends with the last domain of the run that can end one.
    """
    parts, position = [], 0
    while run := _HOST.search(text, position):
        start, stop = run.span()
        dot = text.rfind(".", start + 1, stop)
        while dot > start and (found := _DOMAIN.match(text, dot)) is None:
            dot = text.rfind(".", start + 1, dot)
        begin = _BOUNDARY.search(text, start) if dot > start else None
        if begin is not None and begin.start() < dot:
            assert found is not None
            first, last = begin.start(), found.end()
        elif (scheme := _SCHEME.search(text, start, stop + len(":///"))) is not None and scheme.start() < stop:
            first, last = scheme.span()
        else:
            first = last = stop
        parts.append(text[position:first])
        position = last
    return "".join(parts) + text[position:]


def _remove_file_name(word: re.Match[str]) -> str:
    """Return the rest of a word after its last file ending; equals removing `\\S+\\.(?:png|...)`."""
    ends = [found.end() for found in _FILE_ENDING.finditer(word[0], 1)]
    return word[0][ends[-1] :] if ends else word[0]


Rule = tuple[str, str | Callable[[re.Match[str]], str]]  # (pattern, replacement)

_QUOTES: dict[str, list[Rule]] = {
    "full": [("[`\u00b4«»“”\u00a8]", '"'), ("[‘’]", "'")],  # noqa: RUF001 (curly quotes)
    "full_v1": [("[`\u00b4«»\u00a8]", '"')],
}
_CHARACTERS: list[Rule] = [
    (r"@\w+\b", ""),  # names of users
    ("[\u31c0-\u9fff]+", ""),  # CJK strokes to unified ideographs
    (f"[\\{_DASHES}]+", "-"),
]
_BEFORE_REPAIR: list[Rule] = [
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a backslash and an n
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (r"\S+", _remove_file_name),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),
]
_AFTER_REPAIR: list[Rule] = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers: jc6640, jc6640vc, 6640vc231
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_ENDINGS})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),
    (r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),  # noqa: RUF001 (sizes, 100x200; the second sign is Cyrillic)
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
]
_AT_THE_ENDS: list[Rule] = [
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),  # quotation marks around the whole prompt
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


def _apply(rules: list[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def clean_prompt(text: str, version: Literal["full", "full_v1"] = "full") -> str:
    """Apply the full cleaning: lower case, without links, file names, article numbers, CJK and odd signs.

    Args:
        text: prompt or caption of any length.
        version: "full" or "full_v1", see the top of this module.

    Example:
        >>> clean_prompt("A Cat, see https://cats.com/1")
        'a cat, see'
    """
    text = unquote_plus(text).strip().lower().replace("<person>", "person")
    text = _apply(_CHARACTERS, _remove_links(text))
    text = _apply(_BEFORE_REPAIR, _apply(_QUOTES[version], text))
    if len(re.findall(r"[-_]", text)) > 3:  # words-joined-like-this
        text = re.sub(r"[-_]", " ", text)
    text = _apply(_AFTER_REPAIR, repair_prompt(text))
    if version == "full":
        text = text.strip()
    return _apply(_AT_THE_ENDS, text).strip()


def repair_prompt(text: str) -> str:
    """Apply the light cleaning: repair broken Unicode (ftfy) and HTML entities, also if they were escaped twice.

    Args:
        text: prompt or caption of any length.

    Example:
        >>> repair_prompt(" A Cat (&amp;lt;3) ")
        'A Cat (<3)'
    """
    return _unescape(_unescape(ftfy.fix_text(text))).strip()


def _unescape(text: str) -> str:
    """Unescape HTML. `html.unescape` alone fails for a character reference of more than 4300 digits."""
    return html.unescape(_LONG_REFERENCE.sub(_shorten, text))


def _shorten(digits: re.Match[str]) -> str:
    """Return the number without leading zeros, or 8 nines if it is above every character's."""
    number = digits[0].lstrip("0") or "0"
    return number if len(number) < 8 else "9" * 8


def _clean_v1(text: str) -> str:
    return clean_prompt(text, "full_v1")


CLEANERS: dict[CaptionCleaning, Callable[[str], str]] = {
    "full": clean_prompt,
    "full_v1": _clean_v1,
    "light": repair_prompt,
}
