"""Prompt following on emoji: images of prompts are read back by vision networks and compared with the prompt.

| group | requested drawings |
|---|---|
| trained | drawings of the split `train` |
| heldout_pairs | drawings whose name is trained in other styles only |
| unseen_names | drawings whose name is not trained |
| scenes | all drawings of a held-out combination of trained drawings, each at its position in a composed scene |
| scenes_heldout_pairs, scenes_unseen_names | the first drawing of a composed scene, which is held out |

Only drawings whose name exists in another style are requested, see `emoji_reader`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.emoji import EmojiDrawing, EmojiDrawings
from ..data.emoji_scenes import GROUNDS, EmojiScenesDataset, drawing_box
from .distances import share_interval
from .emoji_reader import TOP, WHITE, EmojiReader, Reading
from .generation import Prompt

EMOJI_PROMPTS = ("drawings", "scenes")
DRAWING_CAPTIONS = ("text", "long")
GROUPS = {
    "drawings": {"trained": "train", "heldout_pairs": "heldout_pairs", "unseen_names": "unseen_names"},
    "scenes": {
        "scenes": "heldout",
        "scenes_heldout_pairs": "heldout_pairs",
        "scenes_unseen_names": "unseen_names",
    },
}
TOP_SHARE = f"name_top{TOP}"
EMOJI_SHARES = ("name_top1", TOP_SHARE, "style", "version")


@dataclass(frozen=True)
class Question:
    """One drawing that a prompt requests.

    Args:
        prompt: index of the prompt in its group.
        asked: requested drawing.
        box: (top, left, side) of the drawing in pixels; None: the whole image.
    """

    prompt: int
    asked: EmojiDrawing
    box: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class EmojiGroup:
    """Prompts of one kind.

    Args:
        name: name of the group, see the table above.
        prompts: prompts with their indices.
        questions: requested drawings of all prompts.
        grounds: name of the requested ground of each prompt; empty: white grounds, which are not graded.
        boxes: (top, left, side) of all drawings of each prompt, if there are grounds.
        real: function from the index of a prompt to its real image, uint8 (H, W, 3).
    """

    name: str
    prompts: list[Prompt]
    questions: list[Question]
    grounds: list[str]
    boxes: list[list[tuple[int, int, int]]]
    real: Callable[[int], np.ndarray]


@dataclass
class GradedEmoji:
    """A prompt, the image generated for it, and what the first network read from the image.

    Args:
        prompt: text of the prompt.
        image: generated image, uint8 (H, W, 3).
        right: True if every requested name is among the five best matches.
        read_instead: what was read instead; empty if `right`.
    """

    prompt: str
    image: np.ndarray
    right: bool
    read_instead: str


def drawing_group(
    drawings: EmojiDrawings, name: str, caption: str, resolution: int, count: int, seed: int
) -> EmojiGroup:
    """Choose prompts that request one drawing each.

    Args:
        drawings: data set.
        name: name of a group of single drawings.
        caption: kind of the captions, `text` or `long`.
        resolution: side length of the images in pixels.
        count: largest number of prompts.
        seed: seed of the choice.
    """
    split = drawings.splits[GROUPS["drawings"][name]]
    own = [drawing for drawing in split if drawings.style_counts[drawing.name] > 1]
    own.sort(key=lambda drawing: random.Random(f"{seed}/{drawing.name}/{drawing.style}").random())
    chosen = own[:count]
    return EmojiGroup(
        name,
        [(place, getattr(drawing, caption)) for place, drawing in enumerate(chosen)],
        [Question(place, drawing) for place, drawing in enumerate(chosen)],
        [],
        [],
        lambda place: drawings.on_ground(chosen[place], WHITE, resolution),
    )


def scene_group(drawings: EmojiDrawings, name: str, resolution: int, count: int, seed: int) -> EmojiGroup:
    """Choose prompts that request composed scenes. The arguments are those of `drawing_group`."""
    split = GROUPS["scenes"][name]
    scenes = EmojiScenesDataset(drawings, resolution, seed, split, size=count)
    prompts, questions, grounds, boxes = [], [], [], []
    for index in range(count):
        scene = scenes.scene(index)
        prompts.append((index, scenes.describe(scene, "long", index)))
        grounds.append(scene.ground)
        boxes.append([drawing_box(thing.place, resolution) for thing in scene.objects])
        asked = list(zip(scene.objects, boxes[-1]))
        for thing, box in asked if split == "heldout" else asked[:1]:
            if drawings.style_counts[thing.name] > 1:
                questions.append(Question(index, drawings.by_name_and_style[thing.name, scene.style], box))
    return EmojiGroup(name, prompts, questions, grounds, boxes, lambda place: np.asarray(scenes[place]["image"]))


def choose_groups(
    emoji_dir: str, kinds: Sequence[str], caption: str, resolution: int, count: int, seed: int
) -> tuple[EmojiDrawings, list[EmojiGroup]]:
    """Open the data set and choose the prompts of every group.

    Args:
        emoji_dir: output folder of `training/tools/fetch_emoji.py`.
        kinds: kinds of prompts, from `EMOJI_PROMPTS`.
        caption: kind of the captions, see `drawing_group`.
        resolution: side length of the images in pixels.
        count: largest number of prompts per group.
        seed: seed of the choice.

    Raises:
        ValueError: if the folder has no data set, or only smaller drawings.
    """
    drawings = EmojiDrawings(emoji_dir, resolution)
    groups = []
    for kind in kinds:
        for name in GROUPS[kind]:
            if kind == "drawings":
                groups.append(drawing_group(drawings, name, caption, resolution, count, seed))
            else:
                groups.append(scene_group(drawings, name, resolution, count, seed))
    return drawings, groups


def find_ground(picture: np.ndarray, boxes: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return the color of the ground, (3,): the median of the pixels outside of all boxes."""
    outside = np.ones(picture.shape[:2], dtype=bool)
    for top, left, side in boxes:
        outside[top : top + side, left : left + side] = False
    return np.median(picture[outside], axis=0)


def nearest_ground(color: np.ndarray) -> str:
    """Return the name of the ground with the nearest color."""
    return min(GROUNDS, key=lambda name: float(np.linalg.norm(color - np.asarray(GROUNDS[name]))))


def read_group(group: EmojiGroup, pictures: Sequence[np.ndarray], reader: EmojiReader) -> list[Reading]:
    """Read the answer to every question of a group.

    Args:
        group: prompts and questions.
        pictures: images in the order of the prompts, uint8 (H, W, 3).
        reader: reader with one network.
    """
    shown = []
    for question in group.questions:
        picture = pictures[question.prompt]
        if question.box is not None:
            top, left, side = question.box
            picture = picture[top : top + side, left : left + side]
        shown.append(picture)
    return reader.read(shown, [question.asked for question in group.questions])


def shares(readings: Sequence[Reading], questions: Sequence[Question]) -> dict[str, Any]:
    """Return the shares of correct readings with their 95% intervals."""
    right = {
        "name_top1": sum(reading.rank == 0 for reading in readings),
        TOP_SHARE: sum(reading.rank < TOP for reading in readings),
        "style": sum(reading.style == question.asked.style for reading, question in zip(readings, questions)),
        "version": sum(reading.version == question.asked.style for reading, question in zip(readings, questions)),
    }
    found: dict[str, Any] = {name: count / len(readings) for name, count in right.items()}
    return found | {f"{name}_interval": list(share_interval(count, len(readings))) for name, count in right.items()}


def grade_group(
    group: EmojiGroup, pictures: Sequence[np.ndarray], readers: dict[str, EmojiReader]
) -> tuple[dict[str, Any], list[GradedEmoji]]:
    """Grade the images of a group with every network.

    For comparison, `real` has the shares of the real images of the same prompts (an upper bound), and `shuffled` those
    of the images of the next prompt (chance level).

    Args:
        group: prompts and questions.
        pictures: images in the order of the prompts, uint8 (H, W, 3).
        readers: name -> reader; the first one determines the graded images.

    Returns:
        Entries of the report, and the graded images.
    """
    others = [*pictures[1:], pictures[0]]
    real = [group.real(place) for place in range(len(group.prompts))]
    report: dict[str, Any] = {"num_prompts": len(group.prompts), "num_drawings": len(group.questions), "networks": {}}
    if group.grounds:
        grounds = [nearest_ground(find_ground(*pair)) for pair in zip(pictures, group.boxes)]
        right = sum(found == asked for found, asked in zip(grounds, group.grounds))
        report["ground"], report["ground_interval"] = right / len(grounds), list(share_interval(right, len(grounds)))
    first: list[Reading] = []
    for name, reader in readers.items():
        readings = read_group(group, pictures, reader)
        first = first or readings
        report["networks"][name] = {
            **shares(readings, group.questions),
            "real": shares(read_group(group, real, reader), group.questions),
            "shuffled": shares(read_group(group, others, reader), group.questions),
        }
    return report, _graded(group, pictures, first)


def _graded(group: EmojiGroup, pictures: Sequence[np.ndarray], readings: Sequence[Reading]) -> list[GradedEmoji]:
    graded = []
    for place, (_, text) in enumerate(group.prompts):
        own = [
            (question, reading)
            for question, reading in zip(group.questions, readings)
            if question.prompt == place and reading.rank >= TOP
        ]
        instead = "; ".join(
            f"{', '.join(reading.labels)} instead of {question.asked.label}" for question, reading in own
        )
        graded.append(GradedEmoji(text, pictures[place], not own, instead))
    return graded
