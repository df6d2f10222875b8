"""Title, one sentence and example pictures of a model, read from the card in its folder."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from model_cache import ModelInfo, read_card
from pictures import open_picture

MAX_EXAMPLES = 6
MAX_TEXT = 200  # characters of title and sentence
HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Showcase:
    """First view of a model on the page.

    Args:
        title: what the model draws, in a few words.
        description: one sentence on what to ask for.
        examples: (prompt, file of the picture), at most `MAX_EXAMPLES`.
        url: page of the model on the Hub, or "".
        compared: prompt, and its pictures drawn by the model and by its student; None without a student.
    """

    title: str
    description: str
    examples: tuple[tuple[str, str], ...] = ()
    url: str = ""
    compared: tuple[str, str, str] | None = None


def read_showcase(model: ModelInfo) -> Showcase:
    """Read `demo` and `widget` of the front matter of a model's README.md, in its folder or on the Hub.

    What the card lacks is left out or made from the model's name, so that a model without a card can be drawn with.
    """
    front = read_card(model.source)
    demo = front.get("demo")
    demo = demo if isinstance(demo, Mapping) else {}
    examples = _read_examples(model.source, front)
    compared = None
    if model.student is not None:
        folder = str(model.student.parent)
        drawn_by_student = dict(_read_examples(folder, read_card(folder)))
        both = [(prompt, file, drawn_by_student[prompt]) for prompt, file in examples if prompt in drawn_by_student]
        compared = both[:2][-1] if both else None  # the first opens the Draw tab
    return Showcase(
        _text(demo.get("title")) or f"Draw with {model.name}",
        _text(demo.get("description")) or "Describe a picture in a sentence, and the model draws it.",
        examples,
        "" if os.path.isdir(model.source) else HUB + model.source,
        compared,
    )


def _text(value: Any) -> str:
    return value.strip()[:MAX_TEXT] if isinstance(value, str) else ""


def _read_examples(source: str, front: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return prompt and file of the entries of `widget` in a card that have a readable picture."""
    widget = front.get("widget")
    examples = [_read_example(source, entry) for entry in (widget if isinstance(widget, list) else [])]
    return tuple(example for example in examples if example is not None)[:MAX_EXAMPLES]


def _read_example(source: str, entry: Any) -> tuple[str, str] | None:
    """Return prompt and file of an entry of `widget`; None without a readable picture in the model's folder."""
    try:
        prompt, name = str(entry["text"]), str(entry["output"]["url"])
        if not os.path.isdir(source):
            file = Path(hf_hub_download(source, name))
        else:
            file = Path(source, name).resolve()
            if not file.is_relative_to(Path(source).resolve()):
                return None
        open_picture(file)
    except Exception:  # another form, an address of another host, a missing or broken file
        return None
    return prompt, str(file)
