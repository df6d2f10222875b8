"""Built-in data set of captioned scenes, drawn on the fly; also the ground truth for grading generated images.

A scene is a plain background with one to four objects, each in its own place of a grid. The description (`Scene`)
determines the whole image, and the long caption states the whole description. Scenes, wordings and pixels are pure
functions of (seed, index, level, split): the same on any machine and in any process.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

T = TypeVar("T")
Points = Callable[[np.ndarray, np.ndarray], np.ndarray]

SPLITS = ("train", "heldout", "novel")
CAPTIONS = ("long", "short")
MIN_RESOLUTION, MAX_RESOLUTION = 32, 256

# Every color is at least 105 away (Euclidean, 0..255) from each other color and from every background.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 15, 30),
    "green": (20, 155, 60),
    "blue": (30, 60, 220),
    "yellow": (255, 235, 40),
    "orange": (255, 130, 0),
    "purple": (130, 30, 170),
    "cyan": (40, 205, 225),
    "pink": (250, 100, 180),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "beige": (232, 218, 188),
}
# Radius of an object as a share of half its grid cell.
SIZES: dict[str, float] = {"small": 0.5, "medium": 0.7, "large": 0.92}


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Five points, folded onto one half point: the edge runs from the tip (1.05, 0) to the notch at 36 degrees.
    radius, angle = np.hypot(u, v), np.arctan2(u, -v)
    angle = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    notch_x, notch_y = 0.52 * np.cos(np.pi / 5), 0.52 * np.sin(np.pi / 5)
    return (notch_x - 1.05) * radius * np.sin(angle) - notch_y * (radius * np.cos(angle) - 1.05) >= 0


# Shapes as point sets: u to the right, v down, both about -1..1 over the object.
SHAPES: dict[str, Points] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.88,
    "triangle": lambda u, v: (v <= 0.85) & (abs(u) <= (v + 1) / 1.85),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.4) & (np.maximum(abs(u), abs(v)) <= 1),
    "diamond": lambda u, v: abs(u) / 0.8 + abs(v) <= 1,
    "star": _star,
    "heart": lambda u, v: ((1.2 * u) ** 2 + (0.1 - 1.1 * v) ** 2 - 1) ** 3 <= (1.2 * u) ** 2 * (0.1 - 1.1 * v) ** 3,
    "arrow": lambda u, v: ((u >= -0.05) & (abs(v) <= 0.95 * (1 - u))) | ((abs(v) <= 0.34) & (u <= 0) & (u >= -1)),
    "moon": lambda u, v: (u**2 + v**2 <= 1) & ((u - 0.5) ** 2 + v**2 >= 0.7**2),
    "hourglass": lambda u, v: (abs(u) <= 0.1 + 0.85 * abs(v)) & (abs(v) <= 0.95),
}
# Part of an object that has its color, in addition to its rim; the rest shows the background.
TEXTURES: dict[str, Points] = {
    "plain": lambda u, v: np.ones_like(u, dtype=bool),
    "striped": lambda u, v: (v / 0.66 + 0.3) % 1 <= 0.6,
    "outlined": lambda u, v: np.zeros_like(u, dtype=bool),
    "dotted": lambda u, v: ((u / 0.52) % 1 - 0.5) ** 2 + ((v / 0.52) % 1 - 0.5) ** 2 >= 0.3**2,
    "checkered": lambda u, v: (np.floor(u / 0.45) + np.floor(v / 0.45)) % 2 == 0,
}

# One pair in eight: every shape lacks one color in training, and both occur there in other pairs.
HELD_OUT_PAIRS = frozenset((tuple(COLORS)[(5 * i + 2) % 8], shape) for i, shape in enumerate(SHAPES))
# One description in twenty belongs to the heldout split.
_HELD_OUT_SHARE = 20


@dataclass(frozen=True)
class SceneLevel:
    """Vocabulary of the scenes of a level.

    Args:
        name: name of the level.
        shapes, colors, sizes, textures, backgrounds: accepted attributes.
        grid: (rows, columns) of the places.
        max_objects: largest number of objects.
        relations: True if long captions state the relation of the first two objects.
        min_resolution: smallest resolution in pixels at which `evaluation.scene_checker` reads at least 99.5% of the
            rendered scenes correctly.
    """

    name: str
    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    sizes: tuple[str, ...]
    textures: tuple[str, ...]
    grid: tuple[int, int]
    max_objects: int
    backgrounds: tuple[str, ...]
    relations: bool
    min_resolution: int


LEVELS: dict[str, SceneLevel] = {
    level.name: level
    for level in (
        SceneLevel(
            name="easy",
            shapes=tuple(SHAPES)[:4],
            colors=tuple(COLORS),
            sizes=("small", "large"),
            textures=("plain",),
            grid=(2, 2),
            max_objects=2,
            backgrounds=("black", "white"),
            relations=False,
            min_resolution=32,
        ),
        SceneLevel(
            name="medium",
            shapes=tuple(SHAPES)[:6],
            colors=tuple(COLORS),
            sizes=("medium", "large"),
            textures=("plain", "striped", "outlined"),
            grid=(3, 3),
            max_objects=3,
            backgrounds=("black", "white", "grey"),
            relations=False,
            min_resolution=64,
        ),
        SceneLevel(
            name="hard",
            shapes=tuple(SHAPES),
            colors=tuple(COLORS),
            sizes=("small", "medium", "large"),
            textures=tuple(TEXTURES),
            grid=(3, 3),
            max_objects=4,
            backgrounds=tuple(BACKGROUNDS),
            relations=True,
            min_resolution=128,
        ),
    )
}


@dataclass(frozen=True)
class SceneObject:
    """Object of a scene; `place` is its (row, column) in the grid, from the top left."""

    shape: str
    color: str
    size: str
    texture: str
    place: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """Full description of an image. The first object is the main one; the others have no particular order."""

    level: str
    background: str
    objects: tuple[SceneObject, ...]

    @property
    def relation(self) -> str | None:
        """Relation of the first object to the second ("to the left of", "above and to the right of", ...), or None at
        levels without relations and for a single object."""
        if not get_level(self.level).relations or len(self.objects) < 2:
            return None
        return relation_between(self.objects[0].place, self.objects[1].place)


def one_of(name: str, value: str, accepted: Sequence[str]) -> str:
    """Return `value`, or raise a `ValueError` that lists the accepted values of the argument `name`."""
    if value not in accepted:
        raise ValueError(f"`{name}` is {value!r}; accepted: {', '.join(map(repr, accepted))}.")
    return value


def get_level(level: str) -> SceneLevel:
    """Return the level of a name, or raise a `ValueError` that lists the names."""
    return LEVELS[one_of("level", level, tuple(LEVELS))]


def grid_places(level: SceneLevel) -> list[tuple[int, int]]:
    """List the places (row, column) of a level's grid, row by row from the top left."""
    return [(row, column) for row in range(level.grid[0]) for column in range(level.grid[1])]


def _check_resolution(resolution: int) -> None:
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise ValueError(f"`resolution` is {resolution}; accepted: {MIN_RESOLUTION} to {MAX_RESOLUTION} pixels.")


def relation_between(first: tuple[int, int], second: tuple[int, int]) -> str:
    """Describe the position of the place `first` relative to the place `second` in words."""
    vertical = "above" if first[0] < second[0] else "below" if first[0] > second[0] else ""
    side = "left" if first[1] < second[1] else "right" if first[1] > second[1] else ""
    return " and ".join(filter(None, (vertical, f"to the {side} of" if side else "")))


def random_stream(*key: str | int) -> random.Random:
    """Return the random generator that belongs to a key; use its `random()` only."""
    # Python guarantees the same random() for the same string on every version, so all choices use random() alone.
    return random.Random("/".join(map(str, key)))


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Choose one of the options, all equally likely."""
    return options[int(rng.random() * len(options))]


def _is_held_out(scene: Scene) -> bool:
    """True for descriptions of the heldout split, by a hash that ignores the order of the objects."""
    objects = sorted(f"{o.shape} {o.color} {o.size} {o.texture} {o.place[0]} {o.place[1]}" for o in scene.objects)
    digest = hashlib.sha256("|".join((scene.level, scene.background, *objects)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_SHARE == 0


@lru_cache(maxsize=8)
def _choices(level: SceneLevel) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Return the held-out and the trained (color, shape) pairs of a level."""
    pairs = [(color, shape) for color in level.colors for shape in level.shapes]
    return tuple(p for p in pairs if p in HELD_OUT_PAIRS), tuple(p for p in pairs if p not in HELD_OUT_PAIRS)


def _draw(rng: random.Random, level: SceneLevel, novel: bool) -> Scene:
    held_out, trained = map(list, _choices(level))
    places = grid_places(level)
    objects = []
    for i in range(1 + int(rng.random() * level.max_objects)):
        color, shape = pick(rng, held_out if novel and i == 0 else trained)
        place = pick(rng, places)
        places.remove(place)
        if (color, shape) in trained:
            trained.remove((color, shape))  # "the red circle" names one object
        objects.append(SceneObject(shape, color, pick(rng, level.sizes), pick(rng, level.textures), place))
    return Scene(level.name, pick(rng, level.backgrounds), tuple(objects))


def sample_scene(index: int, *, seed: int, level: str, split: str = "train") -> Scene:
    """Generate scene `index` of (`seed`, `level`, `split`).

    A scene has one to `max_objects` objects, all counts equally likely; no two share a place, and no two have the same
    color and shape.

    - `train`: no (color, shape) pair of `HELD_OUT_PAIRS`.
    - `heldout`: no such pair either. One description in twenty belongs to this split, by a hash of the background and
      the set of objects with all attributes. It is therefore disjoint from `train` of every seed by description, but
      not by parts: each single object of a heldout scene also occurs in training. The easy level is finite (448
      descriptions of one object and 36,288 of two outside the held-out pairs), so its heldout split has only 21
      different images of one object.
    - `novel`: the first object has a pair of `HELD_OUT_PAIRS`, all others have trained pairs.

    Args:
        index: index of the scene, from 0.
        seed: seed of all scenes.
        level: name in `LEVELS`.
        split: name in `SPLITS`.

    Raises:
        ValueError: for an unknown level or split, or a negative index.

    Example:
        >>> sample_scene(0, seed=0, level="easy").background
    """
    definition = get_level(level)
    one_of("split", split, SPLITS)
    if index < 0:
        raise ValueError(f"`index` must be at least 0, got {index}.")
    rng = random_stream("scene", level, split, seed, index)
    while True:
        scene = _draw(rng, definition, novel=split == "novel")
        if split == "novel" or _is_held_out(scene) == (split == "heldout"):
            return scene


@lru_cache(maxsize=2048)
def object_mask(shape: str, size: str, texture: str, cell: int) -> Image.Image:
    """Draw the coverage of an object centered in its cell: mode "L", `cell` x `cell` pixels, 0 to 255."""
    oversampling = 8 if cell <= 32 else 4
    n = cell * oversampling
    axis = ((np.arange(n) + 0.5) / n * 2 - 1) / SIZES[size]
    v, u = np.meshgrid(axis, axis, indexing="ij")
    covered = inside = SHAPES[shape](u, v)
    if texture != "plain":
        # The rim is always drawn, so that a texture does not hide the shape.
        width = (0.28 if texture == "outlined" else 0.12) * SIZES[size] * n / 2
        padded = np.pad(inside, n // 2)
        core = inside.copy()
        for turn in np.arange(32) * np.pi / 16:
            y, x = n // 2 + round(width * np.sin(turn)), n // 2 + round(width * np.cos(turn))
            core &= padded[y : y + n, x : x + n]
        covered = inside & (TEXTURES[texture](u, v) | ~core)
    share = covered.reshape(cell, oversampling, cell, oversampling).mean(axis=(1, 3))
    return Image.fromarray(np.round(share * 255).astype(np.uint8))


def cell_corner(place: tuple[int, int], grid: tuple[int, int], resolution: int) -> tuple[int, int, int]:
    """Return (top, left, side) in pixels of the square at a place of the grid."""
    cell = resolution // max(grid)
    top, left = ((2 * place[i] + 1) * resolution / (2 * grid[i]) - cell / 2 for i in (0, 1))
    return int(top + 0.5), int(left + 0.5), cell


def render_scene(scene: Scene, resolution: int) -> Image.Image:
    """Draw a scene: RGB, `resolution` x `resolution` pixels, antialiased.

    The image is the same at every resolution, up to half a pixel, and depends on the description alone.

    Args:
        scene: scene to draw.
        resolution: side of the image in pixels, 32 to 256.

    Raises:
        ValueError: for a resolution out of range, an attribute or place that the level lacks, or two objects in one
            place.

    Example:
        >>> render_scene(sample_scene(0, seed=0, level="easy"), 64).size
        (64, 64)
    """
    _check_resolution(resolution)
    level = get_level(scene.level)
    one_of("background", scene.background, level.backgrounds)
    image = Image.new("RGB", (resolution, resolution), BACKGROUNDS[scene.background])
    if len({thing.place for thing in scene.objects}) < len(scene.objects):
        raise ValueError("`scene` has two objects in one place; each needs its own.")
    for thing in scene.objects:
        one_of("shape", thing.shape, level.shapes)
        one_of("color", thing.color, level.colors)
        one_of("size", thing.size, level.sizes)
        one_of("texture", thing.texture, level.textures)
        if not all(0 <= thing.place[i] < level.grid[i] for i in (0, 1)):
            raise ValueError(f"`place` is {thing.place}; the grid of level {level.name!r} is {level.grid}.")
        top, left, cell = cell_corner(thing.place, level.grid, resolution)
        image.paste(COLORS[thing.color], (left, top), object_mask(thing.shape, thing.size, thing.texture, cell))
    return image


# Wordings; `{things}` is a list such as "a large red circle in the top left corner and a small blue star".
_LONG_PATTERNS = (
    "{things} on a {background} background.",
    "{things} against a {background} background.",
    "A picture of {things}, on a {background} background.",
    "A {background} background with {things}.",
    "On a {background} background, there is {things}.",
)
_SENTENCES = ("There is {thing} {place}.", "{place} there is {thing}.")
_LAST_SENTENCE = "The background is {background}."
_SHORT_PATTERNS = ("{things}.", "A picture of {things}.", "There is {things}.")
_RELATION_SENTENCE = "The {first} is {relation} the {second}."
_SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium",), "large": ("large", "big")}


def _place_phrases(place: tuple[int, int], grid: tuple[int, int]) -> tuple[str, ...]:
    row, column = ({0: 0, n - 1: 2}.get(at, 1) for at, n in zip(place, grid))
    side = ("left", "centre", "right")[column]
    if row == 1:
        return (
            ("in the centre", "in the middle") if column == 1 else (f"at the middle {side}", f"at the centre {side}")
        )
    end, other = (("top", "upper"), ("middle", "centre"), ("bottom", "lower"))[row]
    if column == 1:
        return f"at the {end} centre", f"at the {end} middle"
    return (
        f"at the {end} {side}",
        f"at the {other} {side}",
        f"in the {end} {side} corner",
        f"in the {other} {side} corner",
    )


def place_name(place: tuple[int, int], level: str) -> str:
    """Name a place of a level's grid in words: "at the top left"."""
    return _place_phrases(place, get_level(level).grid)[0]


def capitalize(sentence: str) -> str:
    """Return a sentence with a capital first letter."""
    return sentence[0].upper() + sentence[1:]


def _noun(thing: SceneObject, rng: random.Random) -> str:
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return f"a {pick(rng, _SIZE_WORDS[thing.size])} {texture}{thing.color} {thing.shape}"


def long_caption(scene: Scene, *, seed: int = 0, index: int = 0) -> str:
    """Write a caption of the whole description; (seed, index) choose the wording.

    It states the background, every attribute of every object in the order of `scene.objects` (the texture unless it is
    plain), and `scene.relation` if there is one.
    """
    rng, grid = random_stream("long", seed, index), get_level(scene.level).grid
    nouns = [_noun(thing, rng) for thing in scene.objects]
    places = [pick(rng, _place_phrases(thing.place, grid)) for thing in scene.objects]
    pattern = pick(rng, _LONG_PATTERNS + _SENTENCES)
    if pattern in _SENTENCES:
        parts = [capitalize(pattern.format(thing=noun, place=place)) for noun, place in zip(nouns, places)]
        text = " ".join([*parts, _LAST_SENTENCE.format(background=scene.background)])
    else:
        things = [f"{noun} {place}" for noun, place in zip(nouns, places)]
        joined = " and ".join(filter(None, (", ".join(things[:-1]), things[-1])))
        text = capitalize(pattern.format(things=joined, background=scene.background))
    if scene.relation is not None:
        # either "A is above B" or "B is below A"
        first, second = scene.objects[:2] if rng.random() < 0.5 else scene.objects[1::-1]
        names = {"first": f"{first.color} {first.shape}", "second": f"{second.color} {second.shape}"}
        text += " " + _RELATION_SENTENCE.format(relation=relation_between(first.place, second.place), **names)
    return text


def short_caption(scene: Scene, *, seed: int = 0, index: int = 0) -> str:
    """Write a caption of the first object alone; (seed, index) choose the wording.

    It states size, texture (unless plain), color, shape and place, and neither the background nor other objects.
    """
    rng, thing = random_stream("short", seed, index), scene.objects[0]
    place = pick(rng, _place_phrases(thing.place, get_level(scene.level).grid))
    return capitalize(pick(rng, _SHORT_PATTERNS).format(things=f"{_noun(thing, rng)} {place}"))


class ScenesDataset(torch.utils.data.Dataset):
    """Map-style data set of `size` scenes, drawn on access.

    Item i is {"image": RGB image of `resolution` pixels, "caption": str, "scene": `Scene`}, independent of `size`.

    Args:
        level: name in `LEVELS`.
        resolution: side of the images in pixels, 32 to 256.
        seed: seed of the scenes and of their wordings.
        split: name in `SPLITS`, see `sample_scene`.
        caption: "long" or "short".
        size: number of scenes.

    Raises:
        ValueError: for an unknown level, split or caption, a resolution out of range, or a size below one.

    Example:
        >>> scenes = ScenesDataset("easy", resolution=64)
        >>> scenes[0]["caption"]
    """

    def __init__(
        self,
        level: str = "easy",
        resolution: int = 32,
        seed: int = 0,
        split: str = "train",
        caption: str = "long",
        size: int = 1_000_000,
    ) -> None:
        get_level(level)
        _check_resolution(resolution)
        if size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}.")
        self.level, self.resolution, self.seed, self.size = level, resolution, seed, size
        self.split = one_of("split", split, SPLITS)
        self.caption = one_of("caption", caption, CAPTIONS)

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> Scene:
        """Return the description of a scene; nothing is drawn."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside the {self.size} scenes")
        return sample_scene(index, seed=self.seed, level=self.level, split=self.split)

    def describe(self, scene: Scene, caption: str, index: int) -> str:
        """Write the long or short caption of scene `index`."""
        return {"long": long_caption, "short": short_caption}[caption](scene, seed=self.seed, index=index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        return {
            "image": render_scene(scene, self.resolution),
            "caption": self.describe(scene, self.caption, index),
            "scene": scene,
        }
