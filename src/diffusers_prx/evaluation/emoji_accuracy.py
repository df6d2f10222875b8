"""How well a pipeline draws the emoji that it is asked for: prompts drawn, read back by networks, compared.

| group | the asked drawing |
|---|---|
| trained | of the data set's split `train` |
| heldout_pairs | its name is trained in other styles |
| unseen_names | its name is trained in no style |
| scenes, scenes_heldout_pairs, scenes_unseen_names | each of a composed scene, at its place: all of a held-out combination of trained drawings; the first, which is held out, of the others |

Only drawings whose name has another style are asked for: see `emoji_reader`.
"""  # noqa: E501 - a table

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.emoji import EmojiDrawing, EmojiDrawings
from ..data.emoji_scenes import GROUNDS, EmojiScenesDataset, drawing_box
from .distances import share_interval
from .emoji_reader import TOP, WHITE, EmojiReader, Reading, on_white
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
    """One drawing that a prompt asks for.

    Args:
        prompt: place of the prompt in its group.
        asked: the drawing.
        box: (top, left, side) of the drawing in pixels; None: the whole picture.
    """

    prompt: int
    asked: EmojiDrawing
    box: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class EmojiGroup:
    """Prompts of one kind.

    Args:
        name: name of the group, see the table above.
        prompts: the prompts with their indices.
        questions: what they ask for.
        grounds: name of the ground of each prompt; empty: white, and not asked for.
        boxes: (top, left, side) of all drawings of each prompt, where there are grounds.
        real: function from the place of a prompt to the real picture of it, uint8 (H, W, 3).
    """

    name: str
    prompts: list[Prompt]
    questions: list[Question]
    grounds: list[str]
    boxes: list[list[tuple[int, int, int]]]
    real: Callable[[int], np.ndarray]


@dataclass
class GradedEmoji:
    """One prompt, the picture drawn for it, and what the first network read from it.

    `right` is true if every asked name is among the five that fit best; `read_instead` says what was read where not.
    """

    prompt: str
    image: np.ndarray
    right: bool
    read_instead: str


def drawing_group(
    drawings: EmojiDrawings, name: str, caption: str, resolution: int, count: int, seed: int
) -> EmojiGroup:
    """Choose prompts that ask for one drawing each.

    Args:
        drawings: the data set.
        name: group of single drawings.
        caption: caption that is the prompt, `text` or `long`.
        resolution: side of the pictures in pixels.
        count: number of prompts, or all that there are.
        seed: seed of the choice.
    """
    styles: dict[str, set[str]] = {}
    for part in drawings.splits.values():
        for drawing in part:
            styles.setdefault(drawing.name, set()).add(drawing.style)
    own = [drawing for drawing in drawings.splits[GROUPS["drawings"][name]] if len(styles[drawing.name]) > 1]
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
    """Choose composed scenes. Arguments are those of `drawing_group`."""
    split = GROUPS["scenes"][name]
    scenes = EmojiScenesDataset(drawings, resolution, seed, split, size=count)
    found = {(drawing.name, drawing.style): drawing for part in drawings.splits.values() for drawing in part}
    styles: dict[str, int] = {}
    for drawing_name, _ in found:
        styles[drawing_name] = styles.get(drawing_name, 0) + 1
    prompts, questions, grounds, boxes = [], [], [], []
    for index in range(count):
        scene = scenes.scene(index)
        prompts.append((index, scenes.describe(scene, "long", index)))
        grounds.append(scene.ground)
        boxes.append([drawing_box(thing.place, resolution) for thing in scene.objects])
        asked = list(zip(scene.objects, boxes[-1]))
        for thing, box in asked if split == "heldout" else asked[:1]:
            if styles[thing.name] > 1:
                questions.append(Question(index, found[thing.name, scene.style], box))
    return EmojiGroup(name, prompts, questions, grounds, boxes, lambda place: np.asarray(scenes[place]["image"]))


def choose_groups(
    emoji_dir: str, kinds: Sequence[str], caption: str, resolution: int, count: int, seed: int
) -> tuple[EmojiDrawings, list[EmojiGroup]]:
    """Open the data set and choose the prompts of every group.

    Args:
        emoji_dir: folder that `training/tools/fetch_emoji.py` wrote.
        kinds: any of `EMOJI_PROMPTS`.
        caption, resolution, count, seed: see `drawing_group`.

    Raises:
        ValueError: for a folder without the data set, or with smaller drawings only.
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
    """Return the ground's color (3,) of a picture: the median of the pixels outside of all boxes."""
    outside = np.ones(picture.shape[:2], dtype=bool)
    for top, left, side in boxes:
        outside[top : top + side, left : left + side] = False
    return np.median(picture[outside], axis=0)


def nearest_ground(color: np.ndarray) -> str:
    """Name the ground whose color is nearest."""
    return min(GROUNDS, key=lambda name: float(np.linalg.norm(color - np.asarray(GROUNDS[name]))))


def read_group(group: EmojiGroup, pictures: Sequence[np.ndarray], reader: EmojiReader) -> list[Reading]:
    """Read the answer to every question of a group.

    Args:
        group: questions.
        pictures: uint8 (H, W, 3), in the order of the prompts.
        reader: network that reads.
    """
    shown = []
    for question in group.questions:
        picture = pictures[question.prompt]
        if question.box is not None:
            top, left, side = question.box
            ground = find_ground(picture, group.boxes[question.prompt])
            picture = on_white(picture[top : top + side, left : left + side], ground)
        shown.append(picture)
    return reader.read(shown, [question.asked for question in group.questions])


def shares(readings: Sequence[Reading], questions: Sequence[Question]) -> dict[str, Any]:
    """Return the shares that were read right, with their 95% intervals."""
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
    """Grade the pictures of a group with every network.

    Beside the pictures' own shares stand, under `real`, those of the real pictures of the same prompts, which are the
    ceiling, and under `shuffled` those of the pictures of the next prompt in their place, which are chance.

    Args:
        group: prompts and questions.
        pictures: uint8 (H, W, 3), in the order of the prompts.
        readers: networks by their names; the first one also gives the graded pictures.

    Returns:
        What a report says of the group, and the graded pictures.
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
