"""Scorers: functions that say how good an image of a prompt is, for preference pairs and rewards."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.scenes import Scene
from .clip_score import load_clip_score
from .scene_checker import attribute_scores, read_scene, scene_matches

# (images, uint8 (B, H, W, 3); prompts) -> one score per image, higher is better
Scorer = Callable[[Sequence[np.ndarray], Sequence["RankedPrompt"]], Sequence[float]]
SCENES_SCORER, CLIP_PREFIX = "scenes", "clip="


@dataclass(frozen=True)
class RankedPrompt:
    """Prompt whose images are ranked.

    Args:
        text: the prompt.
        scene: scene that it describes, or None.
    """

    text: str
    scene: Scene | None = None


def load_scorer(name: str) -> Scorer:
    """Return a scorer by name.

    Args:
        name: `scenes` (share of attributes that are right in images of the built-in scenes, and 1 more if all are),
            `clip=NAME` (cosine of image and prompt by a CLIP of transformers, such as PickScore, a folder or Hub id),
            or `module:function` (a `Scorer` of your own).

    Raises:
        ValueError: the name is not that of a scorer.

    Example:
        >>> scorer = load_scorer("clip=yuvalkirstain/PickScore_v1")
        >>> scores = scorer([image], [RankedPrompt("a red cat")])
    """
    if name == SCENES_SCORER:
        return score_scenes
    if name.startswith(CLIP_PREFIX):
        metric = load_clip_score(name.removeprefix(CLIP_PREFIX))

        def score(images: Sequence[np.ndarray], prompts: Sequence[RankedPrompt]) -> list[float]:
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (B, 3, H, W)
            return metric.score(pixels, [prompt.text for prompt in prompts]).tolist()

        return score
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`scorers` has {name!r}; accepted: {SCENES_SCORER}, {CLIP_PREFIX}NAME, and module:function ({error})."
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
