"""Captioned scenes of real drawings, composed on the fly: the drawings of the emoji data set on colored grounds.

A scene is a plain ground with one to three drawings of one style, each at its own place. Scenes, wordings and
pixels are pure functions of (data set, seed, index, split). A split shows only drawings of the same split of the data
set: a training scene never contains a held-out pair of name and style, or an unseen name.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from PIL import Image

from .emoji import STYLE_WORDS, EmojiDrawing, EmojiDrawings, enumerate_words, place_drawing, with_article
from .scenes import CAPTIONS, capitalize, one_of, pick, random_stream

Place = tuple[int, int]

EMOJI_SCENE_SPLITS = ("train", "heldout", "heldout_pairs", "unseen_names")
MIN_EMOJI_RESOLUTION = 32
# One combination of names and ground in twenty belongs to the heldout split.
HELD_OUT_SHARE = 20
# No two are nearer than 60 (Euclidean, 0..255); none is as dark as the outlines, or as yellow as the faces.
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "dark gray": (96, 100, 108),
    "beige": (236, 214, 164),
    "sky blue": (135, 206, 250),
    "navy blue": (28, 48, 104),
    "mint green": (160, 236, 186),
    "dark green": (24, 96, 62),
    "pink": (255, 170, 204),
    "lavender": (190, 164, 240),
    "orange": (255, 150, 64),
    "brown": (132, 88, 60),
}
# (row, column) of a place: how captions say it
PLACES: dict[Place, tuple[str, ...]] = {
    (0, 0): ("at the top left", "in the top left corner", "at the upper left"),
    (0, 1): ("at the top", "at the top center"),
    (0, 2): ("at the top right", "in the top right corner", "at the upper right"),
    (1, 0): ("on the left", "at the left"),
    (1, 1): ("in the center", "in the middle"),
    (1, 2): ("on the right", "at the right"),
    (2, 0): ("at the bottom left", "in the bottom left corner", "at the lower left"),
    (2, 1): ("at the bottom", "at the bottom center"),
    (2, 2): ("at the bottom right", "in the bottom right corner", "at the lower right"),
}
CENTER = (1, 1)
CORNERS = ((0, 0), (0, 2), (2, 0), (2, 2))
# Number of drawings: the places that they may have together; nothing overlaps.
LAYOUTS: dict[int, tuple[tuple[Place, ...], ...]] = {
    1: (*((CENTER,),) * 4, *((corner,) for corner in CORNERS)),
    2: (*(((1, 0), (1, 2)), ((0, 1), (2, 1))) * 2, *combinations(CORNERS, 2)),
    3: tuple(combinations(CORNERS, 3)),
}
# Side of a drawing, and the middle of a row or column, as a share of the side of the scene.
CENTER_SIDE, SIDE = 0.8, 0.46
MIDDLES = (0.25, 0.5, 0.75)

_LONG_PATTERNS = (
    "{things}, in the {style} style, on {ground} background.",
    "{things} on {ground} background, {style} style.",
    "{style} drawing of {things}, on {ground} background.",
    "{ground} background with {things}, drawn in the {style} style.",
    "On {ground} background, in the {style} style: {things}.",
)
_SENTENCES = ("There is {thing} {place}.", "{place} there is {thing}.")
_LAST_SENTENCES = ("The background is {color}.", "It is drawn in the {style} style.")
_SHORT_PATTERNS = ("{things} in the {style} style", "{style} drawing of {things}", "{things}, {style} style")


@dataclass(frozen=True)
class EmojiObject:
    """One drawing of a scene: its name, its name in words, and its (row, column), from the top left."""

    name: str
    label: str
    place: Place


@dataclass(frozen=True)
class EmojiScene:
    """The full description of a scene.

    Args:
        style: style of all drawings.
        ground: name of the ground's color.
        objects: the drawings; the first is the main one.
    """

    style: str
    ground: str
    objects: tuple[EmojiObject, ...]


def drawing_box(place: Place, resolution: int) -> tuple[int, int, int]:
    """Return (top, left, side) in pixels of the drawing at a place."""
    side = round((CENTER_SIDE if place == CENTER else SIDE) * resolution)
    top, left = (round(MIDDLES[at] * resolution - side / 2) for at in place)
    return top, left, side


def long_caption(scene: EmojiScene, *, seed: int = 0, index: int = 0) -> str:
    """Write a caption that states style, ground, and the name and place of every drawing; (seed, index) choose the
    wording."""
    rng = random_stream("long", seed, index)
    nouns = [with_article(thing.label) for thing in scene.objects]
    places = [pick(rng, PLACES[thing.place]) for thing in scene.objects]
    style = STYLE_WORDS.get(scene.style, scene.style)
    pattern = pick(rng, _LONG_PATTERNS + _SENTENCES)
    if pattern in _SENTENCES:
        parts = [capitalize(pattern.format(thing=noun, place=place)) for noun, place in zip(nouns, places)]
        return " ".join([*parts, *(last.format(color=scene.ground, style=style) for last in _LAST_SENTENCES)])
    things = enumerate_words([f"{noun} {place}" for noun, place in zip(nouns, places)])
    return capitalize(pattern.format(things=things, style=style, ground=with_article(scene.ground)))


def short_caption(scene: EmojiScene, *, seed: int = 0, index: int = 0) -> str:
    """Write a caption that names the drawings and their style, and neither places nor ground."""
    rng = random_stream("short", seed, index)
    things = enumerate_words([with_article(thing.label) for thing in scene.objects])
    style = STYLE_WORDS.get(scene.style, scene.style)
    return capitalize(pick(rng, _SHORT_PATTERNS).format(things=things, style=style))


def _is_held_out(scene: EmojiScene) -> bool:
    """Decide by the names and the ground, in any style, at any places and in any order."""
    key = "|".join((scene.ground, *sorted(thing.name for thing in scene.objects)))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


class EmojiScenesDataset(torch.utils.data.Dataset):
    """Map-style data set of `size` scenes. Item i is {"image": RGB picture of `resolution` pixels, "caption": str,
    "scene": `EmojiScene`}, composed on access; it depends on the arguments, but not on `size`.

    | split | drawings | combination of names and ground |
    |---|---|---|
    | train | of the data set's split `train` | 19 in 20 |
    | heldout | of the data set's split `train` | the others: in training in no style and at no place |
    | heldout_pairs | the first of `heldout_pairs`, the others of `train` | any |
    | unseen_names | the first of `unseen_names`, the others of `train` | any |

    Args:
        emoji_dir: folder that `training/tools/fetch_emoji.py` wrote, or the drawings in it.
        resolution: side of the scenes in pixels, at least 32.
        seed: seed of the scenes and of their wordings.
        split: see the table.
        caption: "long" or "short".
        size: number of scenes.

    Raises:
        ValueError: for an unknown split or caption, a resolution that is too small or needs larger drawings than
            there are, a size below one, or a folder without the data set.
    """

    def __init__(
        self,
        emoji_dir: str | EmojiDrawings,
        resolution: int = 64,
        seed: int = 0,
        split: str = "train",
        caption: str = "long",
        size: int = 1_000_000,
    ) -> None:
        if resolution < MIN_EMOJI_RESOLUTION:
            raise ValueError(f"`resolution` is {resolution}; emoji scenes need {MIN_EMOJI_RESOLUTION} pixels or more.")
        if size < 1:
            raise ValueError(f"`size` is {size}; it must be 1 or more.")
        self.resolution, self.seed, self.size = resolution, seed, size
        self.split = one_of("split", split, EMOJI_SCENE_SPLITS)
        self.caption = one_of("caption", caption, CAPTIONS)
        if not isinstance(emoji_dir, EmojiDrawings):
            emoji_dir = EmojiDrawings(emoji_dir, drawing_box(CENTER, resolution)[2])
        self.drawings = emoji_dir

    def __len__(self) -> int:
        return self.size

    @cached_property
    def _first(self) -> tuple[EmojiDrawing, ...]:
        """The drawings that the first of a scene may be."""
        return self.drawings.splits["train" if self.split in ("train", "heldout") else self.split]

    @cached_property
    def _trained(self) -> Mapping[str, list[EmojiDrawing]]:
        """The drawings of training by style."""
        found: dict[str, list[EmojiDrawing]] = {}
        for drawing in self.drawings.splits["train"]:
            found.setdefault(drawing.style, []).append(drawing)
        return found

    def _draw(self, rng: random.Random) -> EmojiScene:
        first = pick(rng, self._first)
        others = self._trained.get(first.style, [])
        distinct = len(others) + (self.split not in ("train", "heldout"))  # with the first, which may be one of them
        count = 1 + int(rng.random() * min(len(LAYOUTS), distinct))
        chosen = [first]
        while len(chosen) < count:
            other = pick(rng, others)
            if all(other.name != drawing.name for drawing in chosen):
                chosen.append(other)
        places = list(pick(rng, LAYOUTS[count]))
        objects = []
        for drawing in chosen:
            place = pick(rng, places)
            places.remove(place)
            objects.append(EmojiObject(drawing.name, drawing.label, place))
        return EmojiScene(first.style, pick(rng, tuple(GROUNDS)), tuple(objects))

    def scene(self, index: int) -> EmojiScene:
        """Return the description of a scene; nothing is drawn."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside the {self.size} scenes")
        rng = random_stream("emoji scene", self.split, self.seed, index)
        while True:
            scene = self._draw(rng)
            if self.split not in ("train", "heldout") or _is_held_out(scene) == (self.split == "heldout"):
                return scene

    def render(self, scene: EmojiScene) -> Image.Image:
        """Draw a scene of this split: RGB, `resolution` x `resolution` pixels."""
        image = Image.new("RGB", (self.resolution, self.resolution), GROUNDS[scene.ground])
        for thing in scene.objects:
            top, left, side = drawing_box(thing.place, self.resolution)
            drawing = self.drawings.by_name_and_style[thing.name, scene.style]
            place_drawing(image, self.drawings.picture(drawing), (left, top), side)
        return image

    def describe(self, scene: EmojiScene, caption: str, index: int) -> str:
        """Write the long or short caption of scene `index`."""
        return {"long": long_caption, "short": short_caption}[caption](scene, seed=self.seed, index=index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        return {
            "image": self.render(scene),
            "caption": self.describe(scene, self.caption, index),
            "scene": scene,
        }
