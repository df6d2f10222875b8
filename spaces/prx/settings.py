"""What one picture is asked for with, its limits, and the link that asks for it again.

The page's controls have the same limits, but the page is only one of those who ask: everything that comes in, from the
page, a link or a program, goes through `check_request`, and what it does not accept is one sentence to a person.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlencode

MAX_PROMPT = 1000  # characters; no PRX reads more than 256 tokens
MAX_STEPS = 50
MAX_IMAGES = 4
MAX_GUIDANCE = 15.0
MAX_SEED = 2**31 - 1
MAX_LORA_WEIGHT = 2.0

# The three presets of `PRXPipeline`, with their steps; but for "fast" the solver is the one the model was saved with.
PRESETS = {"exact": 28, "fast": 9, "fastest": 7}
NO_LORA = "none"


@dataclass(frozen=True)
class Request:
    """What is drawn. Images after the first have the seeds after `seed`, so that each can be drawn alone."""

    prompt: str
    negative_prompt: str
    model: str
    size: str  # "width x height", as `size_name` writes it
    preset: str
    steps: int
    guidance_scale: float
    seed: int
    images: int = 1
    lora: str = NO_LORA
    lora_weight: float = 1.0

    @property
    def height_width(self) -> tuple[int, int]:
        width, height = self.size.split(" x ")
        return int(height), int(width)

    @property
    def seeds(self) -> list[int]:
        return [(self.seed + image) % (MAX_SEED + 1) for image in range(self.images)]

    def of_image(self, image: int) -> "Request":
        """The request that draws one of the images by itself."""
        return replace(self, seed=self.seeds[image], images=1)

    def link(self) -> str:
        """The query string that fills the page with this request."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.lora == NO_LORA:
            del values["lora"], values["lora_weight"]
        left_out = {"negative_prompt": "", "images": 1}
        return "?" + urlencode({name: value for name, value in values.items() if left_out.get(name) != value})


def size_name(height: int, width: int) -> str:
    return f"{width} x {height}"


def check_request(values: Mapping[str, Any], sizes: Mapping[str, Collection[str]], loras: Collection[str]) -> Request:
    """A request out of values that may be anything JSON can say.

    Args:
        values: by the names of `Request`'s fields. What is left out has that field's default, where it has one.
        sizes: the models that can be asked for -> the sizes that each can draw.
        loras: the LoRAs that can be asked for.

    Raises:
        ValueError: a value that is not accepted, as a sentence that says what is. It repeats nothing but numbers and
            short names of what came.
    """
    prompt = _text("The prompt", values.get("prompt"))
    if not prompt.strip():
        raise ValueError("There is no prompt yet: write what the picture should show.")
    model = _choice("Model", values.get("model"), sizes)
    return Request(
        prompt=prompt,
        negative_prompt=_text("The negative prompt", values.get("negative_prompt") or ""),
        model=model,
        size=_choice(f"Size (of {model})", values.get("size"), sizes[model]),
        preset=_choice("Preset", values.get("preset"), PRESETS),
        steps=_whole("Steps", values.get("steps"), 1, MAX_STEPS),
        guidance_scale=_number("Guidance", values.get("guidance_scale"), 1.0, MAX_GUIDANCE),
        seed=_whole("Seed", values.get("seed"), 0, MAX_SEED),
        images=_whole("Number of images", values.get("images", 1), 1, MAX_IMAGES),
        lora=_choice("LoRA", values.get("lora") or NO_LORA, [NO_LORA, *loras]),
        lora_weight=_number("LoRA weight", values.get("lora_weight", 1.0), 0.0, MAX_LORA_WEIGHT),
    )


def read_link(query: Mapping[str, str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a link asks for, not checked yet; what it does not name is as in `defaults`."""
    values = dict(defaults)
    for name in query:
        if name in ("steps", "seed", "images", "guidance_scale", "lora_weight"):
            values[name] = _as_number(query[name])
        elif name in values:
            values[name] = query[name]
    return values


def _as_number(text: str) -> Any:
    """What `check_request` can judge: a number where the text is one."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _shown(value: Any) -> str:
    """A value in a message: short, and of one line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} has to be a text.")
    if len(value) > MAX_PROMPT:
        raise ValueError(f"{name} has {len(value)} characters; at most {MAX_PROMPT} are accepted.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has characters that are no text (halves of surrogate pairs).") from None
    return value


def _choice(name: str, value: Any, accepted: Collection[str]) -> str:
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name}: {_shown(value)} is not there; accepted: {', '.join(accepted) or 'nothing'}.")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # nor NaN
        raise ValueError(f"{name}: {_shown(value)} came; a number from {low:g} to {high:g} is accepted.")
    return float(value)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or value != int(value):  # nor NaN; the page sends 3.0 for 3
        raise ValueError(f"{name}: {_shown(value)} came; a whole number from {low} to {high} is accepted.")
    return int(value)
