"""Prompt cleaning: a prompt has to reach the text encoder as the captions did in training.

The rules are those that PRX was trained with (a form of the caption cleaning of DeepFloyd IF), in the same order, and
with their quirks: what looks odd here is how the captions of the published checkpoints were cleaned.
"""

import html
import re
from urllib.parse import unquote_plus

import ftfy

_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
    "\ufe63\uff0d"
)
_FILE_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAINS = "com|co|ru|net|org|edu|gov|it"

# (what is found, what takes its place), applied one after another to the lower-cased prompt
_BEFORE_REPAIR = [
    (r"<person>", "person"),
    (rf"\b((?:https?|www):(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:{_DOMAINS})[\w/-]*\b/?(?!@))", ""),  # links
    (r"@\w+\b", ""),  # names of users
    ("[\u31c0-\u9fff]+", ""),  # CJK strokes to unified ideographs
    (f"[\\{_DASHES}]+", "-"),
    ("[`\u00b4«»\u00a8]", '"'),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a backslash and an n
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE_ENDINGS})", ""),  # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_AFTER_REPAIR = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers: jc6640, jc6640vc, 6640vc231
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_ENDINGS})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # noqa: RUF001 (sizes, 100x200; the second sign is a Cyrillic letter)
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),  # quotation marks around the whole prompt
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


def clean_prompt(text: str) -> str:
    """The full cleaning: lower case, without links, names of files, numbers of articles, CJK signs and odd signs."""
    text = unquote_plus(text).strip().lower()
    for pattern, replacement in _BEFORE_REPAIR:
        text = re.sub(pattern, replacement, text)
    if len(re.findall(r"[-_]", text)) > 3:  # words-joined-like-this
        text = re.sub(r"[-_]", " ", text)
    text = repair_prompt(text)
    for pattern, replacement in _AFTER_REPAIR:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def repair_prompt(text: str) -> str:
    """The light cleaning: repair broken Unicode (ftfy) and HTML entities, also those that were escaped twice."""
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()
