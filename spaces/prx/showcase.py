"""Title, one sentence and example pictures of a model, read from the card in its folder."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download

from model_cache import ModelInfo
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
    """

    title: str
    description: str
    examples: tuple[tuple[str, str], ...] = ()
    url: str = ""


def read_showcase(model: ModelInfo) -> Showcase:
    """Read `demo` and `widget` of the front matter of a model's README.md, in its folder or on the Hub.

    What the card lacks is left out or made from the model's name, so that a model without a card can be drawn with.
    """
    on_hub = not os.path.isdir(model.source)
    try:
        front: Any = ModelCard.load(model.source if on_hub else Path(model.source, "README.md")).data.to_dict()
    except Exception as error:  # no card, no network, or broken front matter: of many kinds
        print(f"No card of {model.name} could be read ({type(error).__name__}): it has no examples.")
        front = {}
    demo = front.get("demo")
    demo = demo if isinstance(demo, Mapping) else {}
    widget = front.get("widget")
    examples = [_read_example(model.source, on_hub, entry) for entry in (widget if isinstance(widget, list) else [])]
    return Showcase(
        _text(demo.get("title")) or f"Draw with {model.name}",
        _text(demo.get("description")) or "Describe a picture in a sentence, and the model draws it.",
        tuple(example for example in examples if example is not None)[:MAX_EXAMPLES],
        HUB + model.source if on_hub else "",
    )


def _text(value: Any) -> str:
    return value.strip()[:MAX_TEXT] if isinstance(value, str) else ""


def _read_example(source: str, on_hub: bool, entry: Any) -> tuple[str, str] | None:
    """Return prompt and file of an entry of `widget`; None without a readable picture in the model's folder."""
    try:
        prompt, name = str(entry["text"]), str(entry["output"]["url"])
        if on_hub:
            file = Path(hf_hub_download(source, name))
        else:
            file = Path(source, name).resolve()
            if not file.is_relative_to(Path(source).resolve()):
                return None
        open_picture(file)
    except Exception:  # another form, an address of another host, a missing or broken file
        return None
    return prompt, str(file)
