"""Words of a prompt: weights such as `(red:1.3)`, windows of long prompts, and regions with prompts of their own.

The text of PRX is a set of keys and values without positions, so that any number of texts can stand side by side.
"""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image

from .conditioning import TextBranch

LongPrompts = Literal["cut", "windows"]
LONG_PROMPTS = ("cut", "windows")
LARGEST_WEIGHT = 10.0
# words, which may hold one level of parentheses (an error that is worth a message), number, and what follows
_WEIGHT = re.compile(r"\(((?:[^()]|\([^()]*\))*):([^():]*)(.?)", re.DOTALL)

# (left, top, right, bottom) as fractions of the picture, or a mask of it
Area: TypeAlias = Sequence[float] | Image.Image | np.ndarray | torch.Tensor
Regions: TypeAlias = Sequence[tuple[str, Area]]
PromptEnhancer: TypeAlias = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class WeightedPrompt:
    """A prompt without its weights, and the weights.

    Args:
        text: prompt as it would be without weights.
        spans: (start, stop, weight) of each weighted part of `text`, in characters.
    """

    text: str
    spans: tuple[tuple[int, int, float], ...] = ()


def parse_weights(prompt: str) -> WeightedPrompt:
    r"""Parse `(words:number)` in a prompt. Other parentheses stay, and so does what follows a backslash: `\(`, `\)`.

    Args:
        prompt: prompt with weights between 0 and 10.

    Raises:
        ValueError: if a parenthesis with a colon has no closing one, no words, another one inside, or no such number.

    Example:
        >>> parse_weights("a (red:1.3) cat")
        WeightedPrompt(text='a red cat', spans=((2, 5, 1.3),))
    """
    text, spans, position = "", [], 0
    while position < len(prompt):
        character = prompt[position]
        if character == "\\" and prompt[position + 1 : position + 2] in ("(", ")", "\\"):
            text, position = text + prompt[position + 1], position + 2
        elif character == "(" and (found := _WEIGHT.match(prompt, position)):
            words, number, end = found.groups()
            weight = _read_weight(number)
            if end != ")" or not words.strip() or "(" in words or weight is None:
                raise ValueError(
                    f"`prompt` has {found[0]!r}, which is no weight: it must be `(words:number)` with a number"
                    f" between 0 and {LARGEST_WEIGHT:g}, and no parentheses inside. Write `\\(` for a parenthesis of"
                    " the text."
                )
            spans.append((len(text), len(text) + len(words), weight))
            text, position = text + words, found.end()
        else:
            text, position = text + character, position + 1
    return WeightedPrompt(text, tuple(spans))


def _read_weight(number: str) -> float | None:
    """Return a number between 0 and the largest weight, or None."""
    if not re.fullmatch(r"\s*\d*\.?\d+\s*", number):
        return None
    weight = float(number)
    return weight if weight <= LARGEST_WEIGHT else None


def clean_spans(prompt: WeightedPrompt, clean: Callable[[str], str]) -> list[tuple[int, int, float]]:
    """Return the weighted parts as (start, stop, weight) in the cleaned text, which may have lost signs and spaces.

    Raises:
        ValueError: if cleaning removes a weighted part.
    """
    cleaned = clean(prompt.text)
    # lower case on both sides: a change of case is the most common rule of cleaning
    blocks = difflib.SequenceMatcher(None, prompt.text.lower(), cleaned.lower(), autojunk=False).get_matching_blocks()
    spans = []
    for start, stop, weight in prompt.spans:
        # where the characters of the part went
        places = [
            (b.b + max(start - b.a, 0), b.b + min(stop - b.a, b.size))
            for b in blocks
            if b.a < stop and start < b.a + b.size
        ]
        if not places:
            raise ValueError(
                f"`prompt` weighs {prompt.text[start:stop]!r}, which cleaning removes. Pass `skip_text_cleaning=True`,"
                " or take the weight away."
            )
        spans.append((places[0][0], places[-1][1], weight))
    return spans


def weigh_tokens(
    offsets: torch.Tensor, rows: Sequence[int], spans: Sequence[Sequence[tuple[int, int, float]]]
) -> torch.Tensor:
    """Return the weight (R, L) of each token: that of the part that it is in, and 1 elsewhere.

    Args:
        offsets: (R, L, 2), start and stop of each token in its text; equal for special tokens.
        rows: for each of R windows the index of its prompt.
        spans: for each prompt its weighted parts (start, stop, weight).
    """
    weights = torch.ones(offsets.shape[:2])  # (R, L)
    for row, own, (first, last) in zip(rows, weights, offsets.transpose(1, 2).unbind(0)):  # (L,) each
        for start, stop, weight in spans[row]:
            own[(first < stop) & (last > start) & (first < last)] = weight
    return weights


def join_windows(windows: torch.Tensor, rows: Sequence[int], count: int, fill: float = 0) -> torch.Tensor:
    """Put the windows of a prompt side by side.

    Args:
        windows: (R, L, ...), one row per window.
        rows: for each window the index of its prompt, ascending.
        count: number P of prompts, with at least one window each.
        fill: value where a prompt has fewer windows than the longest one.

    Returns:
        (P, K * L, ...) with K the largest number of windows of a prompt.
    """
    parts = [windows[[index for index, row in enumerate(rows) if row == prompt]] for prompt in range(count)]
    longest = max(map(len, parts))
    gaps = [windows.new_full((longest - len(part), *windows.shape[1:]), fill) for part in parts]
    return torch.stack([torch.cat(pair).flatten(0, 1) for pair in zip(parts, gaps)])


def check_regions(regions: Any) -> None:
    """Check that regions are pairs of a prompt and an area."""
    if regions is None:
        return
    pair = '("prompt", box or mask)'
    if not isinstance(regions, (list, tuple)) or not regions:
        raise ValueError(f"`regions` is {regions!r}; it must be a list of at least one pair {pair}.")
    for number, region in enumerate(regions):
        if not isinstance(region, (list, tuple)) or len(region) != 2 or not isinstance(region[0], str):
            raise ValueError(f"`regions[{number}]` is a {type(region).__name__}; it must be a pair {pair}.")
        _read_area(region[1], number)


def _read_area(area: Any, number: int) -> torch.Tensor | tuple[float, ...]:
    """Return a mask (H, W), float32, or a box."""
    if isinstance(area, (Image.Image, np.ndarray, torch.Tensor)):
        mask = torch.as_tensor(np.array(area.convert("L")) / 255 if isinstance(area, Image.Image) else area)
        if mask.ndim != 2 or 0 in mask.shape:
            raise ValueError(f"The mask of `regions[{number}]` is {tuple(mask.shape)}; it must be (height, width).")
        return mask.float().cpu()
    accepted = "(left, top, right, bottom) as fractions of the picture, between 0 and 1, or a mask of the picture"
    box = tuple(area) if isinstance(area, (list, tuple)) else ()
    numbers = len(box) == 4 and all(isinstance(side, (int, float)) and 0 <= side <= 1 for side in box)
    if not numbers or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"The area of `regions[{number}]` is {area!r}; it must be {accepted}.")
    return box


def describe_regions(regions: Regions | None) -> list[list[Any]] | None:
    """Return prompts and boxes for the settings of a picture; a mask is only called so."""
    if regions is None:
        return None
    return [[prompt, list(area) if isinstance(area, (list, tuple)) else "mask"] for prompt, area in regions]


def region_tokens(
    regions: Regions, grid: tuple[int, int], image_size: tuple[int, int], render_size: tuple[int, int]
) -> torch.Tensor:
    """Return which image tokens are in each region: bool (R, N). A token counts by its center.

    Args:
        regions: R regions.
        grid: rows and columns of tokens.
        image_size: (height, width) of the picture.
        render_size: (height, width) that is drawn, then resized and cropped to the picture.

    Raises:
        ValueError: if a region has no token.
    """
    scale = max(image_size[0] / render_size[0], image_size[1] / render_size[1])
    centers = []  # of rows and columns, as fractions of the picture; the border that is cropped belongs to its edge
    for tokens, side, rendered in zip(grid, image_size, render_size):
        places = (torch.arange(tokens, dtype=torch.float64) + 0.5) / tokens  # of what is drawn
        centers.append((((places - 0.5) * rendered * scale / side) + 0.5).clamp(0, math.nextafter(1, 0)))
    y, x = torch.meshgrid(*centers, indexing="ij")  # (rows, columns) each
    members = []
    for number, (prompt, area) in enumerate(regions):
        place = _read_area(area, number)
        if isinstance(place, torch.Tensor):
            inside = place[(y * place.shape[0]).long(), (x * place.shape[1]).long()] >= 0.5
        else:
            left, top, right, bottom = place
            inside = (left <= x) & (x < right) & (top <= y) & (y < bottom)
        if not inside.any():
            raise ValueError(
                f"The area of `regions[{number}]` ({prompt!r}) is smaller than a token: it holds the center of none of"
                f" the {grid[0]} x {grid[1]} tokens of the picture."
            )
        members.append(inside.flatten())
    return torch.stack(members)


def join_regions(base: TextBranch, regions: TextBranch, members: torch.Tensor) -> TextBranch:
    """Put the texts of regions beside those of prompts; each image token reads its own.

    Args:
        base: prompts (B, L, D) for tokens in no region.
        regions: R texts (R, M, D).
        members: bool (R, N), true where a token is in the region.

    Returns:
        Texts (B, K, D) with a mask (B, N, K), without keys that no token reads; or with a mask (B, K) if all tokens
        read the same.
    """
    rows, members = len(base.embeds), members.to(base.mask.device)
    in_none = ~members.any(dim=0)  # (N,)
    base_mask = in_none[None, :, None] & base.mask[:, None]  # (B, N, L)
    region_mask = (members[:, :, None] & regions.mask[:, None]).transpose(0, 1).flatten(1)  # (N, R * M)
    mask = torch.cat((base_mask, region_mask.expand(rows, -1, -1)), dim=2)  # (B, N, L + R * M)
    read = mask.flatten(0, 1).any(dim=0)  # (L + R * M,)
    embeds = torch.cat((base.embeds, regions.embeds.flatten(0, 1).expand(rows, -1, -1)), dim=1)[:, read]  # (B, K, D)
    mask = mask[:, :, read]  # (B, N, K)
    weights = None
    if base.value_weights is not None and regions.value_weights is not None:
        weights = torch.cat((base.value_weights, regions.value_weights.flatten().expand(rows, -1)), dim=1)[:, read]
    if bool((mask == mask[:, :1]).all()):
        mask = mask[:, 0]  # (B, K)
    return TextBranch(embeds, mask, weights)


def enhance_prompts(prompt: Any, prompt_enhancer: PromptEnhancer | None) -> Any:
    """Return the prompts that a function makes of these, in the same form; without a function the same prompts."""
    if prompt_enhancer is None:
        return prompt
    if prompt is None:
        raise ValueError("`prompt_enhancer` needs `prompt`, not `prompt_embeds`: leave one of them out.")
    if not callable(prompt_enhancer):
        raise ValueError(f"`prompt_enhancer` is a {type(prompt_enhancer).__name__}; it must be a function, or None.")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    enhanced = prompt_enhancer(list(prompts))
    is_list = isinstance(enhanced, list) and all(isinstance(text, str) for text in enhanced)
    if not is_list or len(enhanced) != len(prompts):
        raise ValueError(
            f"`prompt_enhancer` returned {enhanced!r}; it must return a list of {len(prompts)} strings, one for each"
            " prompt that it receives."
        )
    return enhanced[0] if isinstance(prompt, str) else enhanced
