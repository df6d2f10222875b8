"""Scorers: functions that say how good an image of a prompt is, for preference pairs and rewards."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from torch import nn

from ..data.emoji import MAKE_IT, EmojiDrawings
from ..data.scenes import Scene
from ..files import expand_path
from ..techniques.teachers import VisionTeacher, load_teacher
from .clip_score import CLIPScore, load_clip_score
from .emoji_reader import EmojiReader
from .references import REFERENCE_CACHE
from .scene_checker import attribute_scores, read_scene, scene_matches

logger = logging.get_logger(__name__)

# (images, uint8 (B, H, W, 3); prompts) -> one score per image, higher is better
Scorer = Callable[[Sequence[np.ndarray], Sequence["RankedPrompt"]], Sequence[float]]
SCENES_SCORER, CLIP_PREFIX, EMOJI_PREFIX = "scenes", "clip=", "emoji="


@dataclass(frozen=True)
class RankedPrompt:
    """Prompt whose images are ranked.

    Args:
        text: the prompt.
        scene: scene that it describes, or None.
    """

    text: str
    scene: Scene | None = None


class CLIPScorer(nn.Module):
    """Scorer: agreement of image and prompt.

    Args:
        metric: CLIP score.

    Example:
        >>> CLIPScorer(load_clip_score())([image], [RankedPrompt("a red cat")])
    """

    def __init__(self, metric: CLIPScore):
        super().__init__()
        self.metric = metric

    def forward(self, images: Sequence[np.ndarray], prompts: Sequence[RankedPrompt]) -> list[float]:
        """Score images, see `Scorer`."""
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.metric.device)  # (B, 3, H, W)
        return self.metric.score(pixels, [prompt.text for prompt in prompts]).tolist()


class EmojiScorer(nn.Module):
    """Scorer: probability of the requested name plus that of the requested style, as `emoji_reader` reads them.

    A probability is bounded: one bad image does not hide the differences between the others, and an image that is
    read clearly gains nothing by exaggeration. The rank of the name, which `emoji_accuracy` counts, is 0 for most
    images of a trained model, and equal scores teach nothing.

    Args:
        drawings: the data set. Prompts are its captions `text` and `long`, which are different for all drawings.
        teacher: network that reads, see `techniques.teachers.load_teacher`.
        cache_dir: folder that keeps the features of the drawings.

    Example:
        >>> scorer = EmojiScorer(EmojiDrawings("data/emoji", 64), load_teacher("data/networks/lite0"), Path("cache"))
        >>> scorer([image], [RankedPrompt("a red apple in the Twemoji style")])
    """

    def __init__(self, drawings: EmojiDrawings, teacher: VisionTeacher, cache_dir: Path):
        super().__init__()
        self.teacher = teacher
        self.reader = EmojiReader(drawings, teacher, cache_dir)
        everything = drawings.by_name_and_style.values()
        self.asked = {caption: drawing for drawing in everything for caption in (drawing.text, drawing.long)}
        self.unreadable = {name for name, count in drawings.style_counts.items() if count == 1}
        if self.unreadable:
            logger.warning(
                f"{len(self.unreadable)} of {len(drawings.style_counts)} names are drawn in one style only, so that "
                "they cannot be read in another one; images of them score 0."
            )

    def forward(self, images: Sequence[np.ndarray], prompts: Sequence[RankedPrompt]) -> list[float]:
        """Score images, see `Scorer`.

        Raises:
            ValueError: a prompt is not a caption of a drawing.
        """
        asked = []
        for prompt in prompts:
            if prompt.text not in self.asked:
                raise ValueError(
                    f"`scorers` has emoji, but {prompt.text!r} is not the caption `text` or `long` of a drawing."
                )
            asked.append(self.asked[prompt.text])
        readable = [place for place, drawing in enumerate(asked) if drawing.name not in self.unreadable]
        readings = self.reader.read([images[place] for place in readable], [asked[place] for place in readable])
        scores = [0.0] * len(images)
        for place, reading in zip(readable, readings):
            scores[place] = reading.name_probability + reading.style_probability
        return scores


def load_scorer(name: str, emoji_dir: str | None = None, resolution: int = 1) -> Scorer:
    """Return a scorer by name, with its network on the CPU.

    Args:
        name: `scenes` (share of attributes that are right in images of the built-in scenes, and 1 more if all are),
            `clip=NAME` (cosine of image and prompt by a CLIP of transformers, such as PickScore, a folder or Hub id),
            `emoji=NETWORK` (name and style of an emoji drawing, read by a vision network, a folder or Hub id), or
            `module:function` (a `Scorer` of your own).
        emoji_dir: output folder of `training/tools/fetch_emoji.py`, for `emoji=NETWORK`.
        resolution: side length of the images in pixels, for `emoji=NETWORK`.

    Raises:
        ValueError: the name is not that of a scorer, or a network or data set cannot be loaded.

    Example:
        >>> scorer = load_scorer("clip=yuvalkirstain/PickScore_v1")
        >>> scores = scorer([image], [RankedPrompt("a red cat")])
    """
    if name == SCENES_SCORER:
        return score_scenes
    if name.startswith(CLIP_PREFIX):
        return CLIPScorer(load_clip_score(name.removeprefix(CLIP_PREFIX)))
    if name.startswith(EMOJI_PREFIX):
        if emoji_dir is None:
            raise ValueError(f"`scorers` has {name!r}, which needs the emoji data: {MAKE_IT}, and pass its folder.")
        drawings = EmojiDrawings(emoji_dir, resolution)
        try:
            teacher = load_teacher(expand_path(name.removeprefix(EMOJI_PREFIX)))
        except OSError as error:
            raise ValueError(f"`scorers` has {name!r}, whose network cannot be loaded: {error}") from error
        return EmojiScorer(drawings, teacher, REFERENCE_CACHE)
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`scorers` has {name!r}; accepted: {SCENES_SCORER}, {CLIP_PREFIX}NAME, {EMOJI_PREFIX}NETWORK and "
            f"module:function ({error})."
        ) from error
    if not callable(found):
        raise ValueError(f"`scorers` has {name!r}, which is not a function.")
    return found


def score_scenes(images: Sequence[np.ndarray], prompts: Sequence[RankedPrompt]) -> list[float]:
    """Score images of built-in scenes: the mean share of right attributes, plus 1 if all are right."""
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        if prompt.scene is None:
            raise ValueError(f"`scorers` has scenes, but {prompt.text!r} is not the caption of a scene.")
        found = read_scene(image, prompt.scene.level)
        right = float(scene_matches(found, prompt.scene))
        scores.append(right + float(np.mean(list(attribute_scores(found, prompt.scene).values()))))
    return scores


def total_scores(
    scorers: Mapping[str, Scorer],
    weights: Mapping[str, float],
    images: Sequence[np.ndarray],
    prompts: Sequence[RankedPrompt],
) -> np.ndarray:
    """Return the weighted sum of the scores of each image, float64 (B,).

    Raises:
        ValueError: a scorer returns another number of scores, or one that is not finite.
    """
    total = np.zeros(len(images))
    for name, scorer in scorers.items():
        scores = np.asarray(scorer(images, prompts), dtype=np.float64)
        if scores.shape != total.shape or not np.isfinite(scores).all():
            raise ValueError(
                f"The scorer {name} returned {scores.shape} scores for {len(images)} images, or scores that are not "
                "finite; accepted: one number per image."
            )
        total += weights[name] * scores
    return total
