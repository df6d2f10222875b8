"""How well a pipeline draws what it is asked for: held-out scene prompts, drawn, read back, compared."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..data.scenes import BACKGROUNDS, Scene, ScenesDataset, get_level
from .scene_checker import attributes_right, read_instead, read_scene, scene_matches


@dataclass
class GradedScene:
    """One prompt, the picture drawn for it, and what was read from the picture.

    `right` is true if everything that the prompt states was read; `read_instead` says what was read where it was not.
    """

    prompt: str
    wanted: Scene
    image: np.ndarray
    right: bool
    read_instead: str = ""


def grade_scenes(
    images: Iterable[np.ndarray], level: str, split: str, seed: int, num_prompts: int, caption: str
) -> list[GradedScene]:
    """Grade pictures of the first prompts of a split.

    Args:
        images: uint8 (H, W, 3), in the order of the prompts.
        level, split, seed, caption: of the prompts, see `ScenesDataset`.
        num_prompts: how many.
    """
    resolution = get_level(level).min_resolution  # of pictures nobody looks at: only the prompts are used
    scenes = ScenesDataset(level, resolution, seed, split=split, caption=caption, size=num_prompts)
    prompts = [scenes[index]["caption"] for index in range(num_prompts)]
    wanted = [scenes[index]["scene"] for index in range(num_prompts)]
    graded = []
    for prompt, scene, image in zip(prompts, wanted, images, strict=True):
        found = read_scene(image, level)
        right = scene_matches(found, scene, caption)
        graded.append(GradedScene(prompt, scene, image, right, read_instead(found, scene, caption)))
    return graded


def scene_report(
    graded: list[GradedScene], novel: list[GradedScene], level: str, caption: str, seed: int
) -> dict[str, float]:
    """The scores, and beside them what pictures that do not follow the prompts get.

    `scene_accuracy` is the share of held-out prompts of which every stated attribute is read back right;
    `scene_accuracy_novel` the same for prompts with a color and shape that were never together in training. The
    same pictures are then graded against the prompt of their neighbor (`..._shuffled`; `..._chance` is how often
    two neighboring prompts ask for the same), and blank and noise pictures against all prompts.
    """
    neighbors = list(zip(graded, graded[1:] + graded[:1]))
    rng = np.random.default_rng(seed)
    backgrounds = [BACKGROUNDS[name] for name in get_level(level).backgrounds]
    blank = [np.full_like(g.image, backgrounds[i % len(backgrounds)]) for i, g in enumerate(graded)]
    noise = [rng.integers(0, 256, graded[0].image.shape, dtype=np.uint8) for _ in graded]

    def share(pictures: list[np.ndarray]) -> float:
        pairs = zip(pictures, graded)
        return float(np.mean([scene_matches(read_scene(image, level), g.wanted, caption) for image, g in pairs]))

    attributes = [attributes_right(read_scene(g.image, level), g.wanted) for g in graded]
    return {
        "scene_accuracy": float(np.mean([g.right for g in graded])),
        "scene_accuracy_novel": float(np.mean([g.right for g in novel])),
        "scene_accuracy_shuffled": share([other.image for _, other in neighbors]),
        "scene_accuracy_chance": float(np.mean([scene_matches(b.wanted, a.wanted, caption) for a, b in neighbors])),
        "scene_accuracy_blank": share(blank),
        "scene_accuracy_noise": share(noise),
        **{
            f"right_{name}": float(np.mean([a[name] for a in attributes if name in a]))
            for name in sorted({name for a in attributes for name in a})
        },
    }
