"""Pairs of a preferred and a rejected image of one prompt: a model draws several, scorers rank them."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..data.emoji import EmojiDrawings
from ..data.scenes import CAPTIONS, ScenesDataset, get_level, one_of
from ..files import atomic_write
from .emoji_accuracy import drawing_group
from .generation import PictureFolder, default_resolution, draw_missing, load_pipeline, pipeline_draw
from .scorers import RankedPrompt, load_scorer, total_scores

PAIRS_FILE = "pairs.parquet"


@dataclass(frozen=True)
class PairSettings:
    """Settings that determine the pairs.

    Args:
        model: saved pipeline, a folder or Hub id.
        scorers: weight of each scorer by name, see `load_scorer`.
        images_per_prompt: images that are drawn and ranked for each prompt.
        num_inference_steps: denoising steps.
        guidance_scale: scale of classifier-free guidance.
        seed: seed of the images.
        resolution: side length in pixels; None: that of the pipeline.
        batch_size: images per call.
        emoji: folder of `training/tools/fetch_emoji.py` for the scorer of emoji, or None.
    """

    model: str
    scorers: Mapping[str, float]
    images_per_prompt: int = 4
    num_inference_steps: int = 28
    guidance_scale: float = 4.0
    seed: int = 0
    resolution: int | None = None
    batch_size: int = 16
    emoji: str | None = None


def scene_prompts(level: str, count: int, seed: int, caption: str = "long") -> list[RankedPrompt]:
    """Return the first captions of the training split of the built-in scenes with this seed."""
    one_of("caption", caption, CAPTIONS)
    scenes = ScenesDataset(level, get_level(level).min_resolution, seed, split="train", caption=caption, size=count)
    return [RankedPrompt(scenes.describe(scenes.scene(n), caption, n), scenes.scene(n)) for n in range(count)]


def emoji_prompts(emoji_dir: str, count: int, seed: int) -> list[RankedPrompt]:
    """Return captions `text` of trained drawings of the emoji data that the scorer of emoji can read."""
    group = drawing_group(EmojiDrawings(emoji_dir, 1), "trained", "text", 1, count, seed)
    return [RankedPrompt(text) for _, text in group.prompts]


def make_pairs(settings: PairSettings, prompts: Sequence[RankedPrompt], output_dir: Path, device: Any) -> str:
    """Draw images, rank them, and write the best and the worst of each prompt to `output_dir/pairs.parquet`.

    The file has the columns `image_win`, `image_lose` (PNG) and `caption`. Prompts whose best and worst images have
    the same score are left out. If it is interrupted, call it again: existing images are used.

    Args:
        settings: settings of the images and their ranks.
        prompts: prompts to draw.
        output_dir: folder for the pairs.
        device: device of the model.

    Returns:
        A summary with the number of pairs.

    Raises:
        ValueError: a scorer returns another number of scores, or every prompt is left out.

    Example:
        >>> settings = PairSettings("outputs/quickstart", {"scenes": 1.0})
        >>> make_pairs(settings, scene_prompts("easy", 100, seed=1), Path("outputs/pairs"), "cpu")
    """
    pipeline = load_pipeline(settings.model).to(device)
    side = settings.resolution or default_resolution(pipeline)
    scorers = {name: load_scorer(name, settings.emoji, side) for name in settings.scorers}
    for scorer in scorers.values():
        if isinstance(scorer, torch.nn.Module):
            scorer.to(device)
    draw = pipeline_draw(
        pipeline, side, settings.num_inference_steps, settings.guidance_scale, settings.seed, settings.batch_size
    )
    count = settings.images_per_prompt
    rows = [prompt for prompt in prompts for _ in range(count)]
    numbered = [(index, prompt.text) for index, prompt in enumerate(rows)]
    key = (
        f"{Path(settings.model).name}-{side}-{settings.num_inference_steps}-{settings.guidance_scale}-{settings.seed}"
    )
    pictures = PictureFolder(output_dir / "images" / key)
    draw_missing(draw, pictures, numbered, settings.batch_size, "drawing")

    pairs: dict[str, list[Any]] = {"image_win": [], "image_lose": [], "caption": []}
    for first in range(0, len(rows), count):
        images = [pictures.read(prompt) for prompt in numbered[first : first + count]]
        total = total_scores(scorers, settings.scorers, images, rows[first : first + count])
        best, worst = int(total.argmax()), int(total.argmin())
        if total[best] > total[worst]:
            pairs["image_win"].append(_png(images[best]))
            pairs["image_lose"].append(_png(images[worst]))
            pairs["caption"].append(rows[first].text)
    found = len(pairs["caption"])
    if not found:
        raise ValueError(f"The images of each of {len(prompts)} prompts have equal scores, so none makes a pair.")
    with atomic_write(output_dir / PAIRS_FILE) as file:
        pq.write_table(pa.table(pairs), file)
    return f"{found} pairs in {output_dir / PAIRS_FILE}; {len(prompts) - found} prompts left out with equal scores"


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    PIL.Image.fromarray(image).save(content, format="PNG")
    return content.getvalue()
