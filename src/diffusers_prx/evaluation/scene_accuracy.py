"""Prompt following on scenes: images of held-out prompts are read back and compared with the prompt."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..data.scenes import BACKGROUNDS, Scene, ScenesDataset, get_level
from .scene_checker import attribute_scores, describe_differences, read_scene, scene_matches


@dataclass
class GradedScene:
    """A prompt, the image generated for it, and the result of reading the image.

    Args:
        prompt: caption of the scene.
        scene: scene that the prompt describes.
        image: generated image, uint8 (H, W, 3).
        right: True if everything that the prompt states was read from the image.
        read_instead: what was read instead; empty if `right`.
    """

    prompt: str
    scene: Scene
    image: np.ndarray
    right: bool
    read_instead: str = ""


def grade_scenes(
    images: Iterable[np.ndarray], level: str, split: str, seed: int, num_prompts: int, caption: str
) -> list[GradedScene]:
    """Grade the images of the first prompts of a split.

    Args:
        images: images in the order of the prompts, uint8 (H, W, 3).
        level: level of the scenes, see `ScenesDataset`.
        split: split of the scenes.
        seed: seed of the scenes.
        num_prompts: number of prompts.
        caption: kind of the captions.
    """
    resolution = get_level(level).min_resolution  # any: only the prompts are used
    scenes = ScenesDataset(level, resolution, seed, split=split, caption=caption, size=num_prompts)
    prompts = [scenes[index]["caption"] for index in range(num_prompts)]
    expected = [scenes[index]["scene"] for index in range(num_prompts)]
    graded = []
    for prompt, scene, image in zip(prompts, expected, images, strict=True):
        found = read_scene(image, level)
        right = scene_matches(found, scene, caption)
        graded.append(GradedScene(prompt, scene, image, right, describe_differences(found, scene, caption)))
    return graded


def scene_report(
    graded: list[GradedScene], novel: list[GradedScene], level: str, caption: str, seed: int
) -> dict[str, float]:
    """Return the scores of a model, and the scores of images that do not follow the prompts.

    `scene_accuracy` is the share of held-out prompts whose stated attributes are all correct. `scene_accuracy_novel`
    is the same share for combinations of color and shape that training never showed. `..._shuffled` grades the same
    images against the next prompt, `..._chance` is the share of neighboring prompts that match each other, and
    `..._blank` and `..._noise` grade blank images and noise.
    """
    neighbors = list(zip(graded, graded[1:] + graded[:1]))
    rng = np.random.default_rng(seed)
    backgrounds = [BACKGROUNDS[name] for name in get_level(level).backgrounds]
    blank = [np.full_like(g.image, backgrounds[i % len(backgrounds)]) for i, g in enumerate(graded)]
    noise = [rng.integers(0, 256, graded[0].image.shape, dtype=np.uint8) for _ in graded]

    def share(pictures: list[np.ndarray]) -> float:
        pairs = zip(pictures, graded)
        return float(np.mean([scene_matches(read_scene(image, level), g.scene, caption) for image, g in pairs]))

    attributes = [attribute_scores(read_scene(g.image, level), g.scene) for g in graded]
    return {
        "scene_accuracy": float(np.mean([g.right for g in graded])),
        "scene_accuracy_novel": float(np.mean([g.right for g in novel])),
        "scene_accuracy_shuffled": share([other.image for _, other in neighbors]),
        "scene_accuracy_chance": float(np.mean([scene_matches(b.scene, a.scene, caption) for a, b in neighbors])),
        "scene_accuracy_blank": share(blank),
        "scene_accuracy_noise": share(noise),
        **{
            f"right_{name}": float(np.mean([a[name] for a in attributes if name in a]))
            for name in sorted({name for a in attributes for name in a})
        },
    }
