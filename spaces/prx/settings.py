"""Requests for pictures: their fields, limits and links.

`parse_request` checks every request, whether the page, a link or a program sends it. The controls of the page have the
same limits.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

import torch

from diffusers_prx.pipelines.presets import PRESETS

MAX_PROMPT = 1000  # characters; no PRX reads more than 256 tokens
MAX_STEPS = 50
MAX_IMAGES = 4
MAX_GUIDANCE = 15.0
MAX_SEED = 2**31 - 1
MAX_LORA_WEIGHT = 2.0
MIN_STRENGTH = 0.05

NO_LORA = "none"


@dataclass(frozen=True)
class Request:
    """Settings of one call. Image i is drawn with seed + i, so that each can be drawn again alone."""

    prompt: str
    negative_prompt: str
    model: str
    size: str  # "width x height", see `format_size`
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

    def generators(self) -> list[torch.Generator]:
        """Return a fresh generator for each image."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def for_image(self, image: int) -> "Request":
        """Return the request that draws only one of the images."""
        return replace(self, seed=self.seeds[image], images=1)

    def link(self) -> str:
        """Return the query string that fills the page with this request."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.lora == NO_LORA:
            del values["lora"], values["lora_weight"]
        defaults = {"negative_prompt": "", "images": 1}
        return "?" + urlencode({name: value for name, value in values.items() if defaults.get(name) != value})


def format_size(height: int, width: int) -> str:
    return f"{width} x {height}"


def parse_request(values: Mapping[str, Any], sizes: Mapping[str, Collection[str]], loras: Collection[str]) -> Request:
    """Build a request from untrusted JSON values.

    Args:
        values: field of `Request` -> value; missing fields take the field's default.
        sizes: name of each available model -> its sizes.
        loras: names of the available LoRAs.

    Raises:
        ValueError: for a value that is not accepted, with the accepted ones. The message repeats at most 40 characters
            of the value.
    """
    prompt = parse_prompt(values.get("prompt"))
    model = _choice("Model", values.get("model"), sizes)
    return Request(
        prompt=prompt,
        negative_prompt=_text("The negative prompt", values.get("negative_prompt") or ""),
        model=model,
        size=_choice(f"Size (of {model})", values.get("size"), sizes[model]),
        preset=_choice("Preset", values.get("preset"), PRESETS),
        steps=_integer("Steps", values.get("steps"), 1, MAX_STEPS),
        guidance_scale=_number("Guidance", values.get("guidance_scale"), 1.0, MAX_GUIDANCE),
        seed=_integer("Seed", values.get("seed"), 0, MAX_SEED),
        images=_integer("Number of images", values.get("images", 1), 1, MAX_IMAGES),
        lora=_choice("LoRA", values.get("lora") or NO_LORA, [NO_LORA, *loras]),
        lora_weight=_number("LoRA weight", values.get("lora_weight", 1.0), 0.0, MAX_LORA_WEIGHT),
    )


def parse_prompt(value: Any) -> str:
    """Check the text of a prompt.

    Raises:
        ValueError: as `parse_request`.
    """
    prompt = _text("The prompt", value)
    if not prompt.strip():
        raise ValueError("The prompt is empty: describe what the picture should show.")
    return prompt


def parse_strength(value: Any) -> float:
    """Check the noise level at which a change of a picture starts.

    Raises:
        ValueError: as `parse_request`.
    """
    return _number("How much to change", value, MIN_STRENGTH, 1.0)


def read_picture_settings(
    settings: Mapping[str, Any], model: str, preset_steps: Mapping[str, int], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the unchecked values of a request for the picture that has these settings.

    Args:
        settings: result of `diffusers_prx.read_settings`; pictures of the page also have their `link`.
        model: name of the picture's model on the page.
        preset_steps: steps of its presets.
        defaults: values of a request.

    Raises:
        ValueError: if a LoRA drew the picture, and the settings have no link that gives its weight.
    """
    if isinstance(settings.get("link"), str):
        return read_link(dict(parse_qsl(settings["link"].removeprefix("?"))), defaults) | {"model": model}
    if settings.get("adapters"):
        raise ValueError("The picture was drawn with a LoRA, whose weight it does not tell: set it yourself.")
    scheduler, steps = settings.get("scheduler"), settings.get("num_inference_steps")
    preset = "fastest" if steps == preset_steps.get("fastest") else "exact"
    if isinstance(scheduler, dict) and scheduler.get("class") == "UniPCMultistepScheduler":
        preset = "fast"
    values = {name: settings.get(name) for name in ("prompt", "negative_prompt", "guidance_scale", "seed")}
    size = f"{settings.get('width')} x {settings.get('height')}"
    return {**defaults, **values, "model": model, "size": size, "preset": preset, "steps": steps}


def read_link(query: Mapping[str, str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the unchecked values of a link's query string over `defaults`."""
    values = dict(defaults)
    for name in query:
        if name in ("steps", "seed", "images", "guidance_scale", "lora_weight"):
            values[name] = _number_or_text(query[name])
        elif name in values:
            values[name] = query[name]
    return values


def _number_or_text(text: str) -> int | float | str:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_short_repr(value)}; accepted: text.")
    if len(value) > MAX_PROMPT:
        raise ValueError(f"{name} has {len(value)} characters; accepted: at most {MAX_PROMPT}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} contains half of a surrogate pair; accepted: Unicode text.") from None
    return value


def _choice(name: str, value: Any, accepted: Collection[str]) -> str:
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name} is {_short_repr(value)}; accepted: {', '.join(accepted) or 'nothing'}.")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # false for NaN too
        raise ValueError(f"{name} is {_short_repr(value)}; accepted: numbers from {low:g} to {high:g}.")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or value != int(value):  # the page sends 3.0 for 3
        raise ValueError(f"{name} is {_short_repr(value)}; accepted: whole numbers from {low} to {high}.")
    return int(value)
