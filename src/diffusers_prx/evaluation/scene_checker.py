"""Reading a scene back from an image, and comparison of scenes: an exact test of prompt following.

Each cell of the grid is compared with every shape x size x texture of the level. The comparison is invariant to the
strength of the color, so that shape and color are judged separately, each against its own threshold. Whatever is
visible but not recognized is `UNKNOWN`.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from ..data.scenes import (
    BACKGROUNDS,
    CAPTIONS,
    COLORS,
    Scene,
    SceneLevel,
    SceneObject,
    cell_corner,
    get_level,
    object_mask,
    one_of,
    place_name,
    relation_between,
)

UNKNOWN = "unknown"

# Largest Euclidean distance (0..255 per channel) at which a color has a name. The named colors and backgrounds are at
# least 105 apart, so nearly every shade has exactly one name.
COLOR_TOLERANCE = 60.0
# Smallest share of pixels with the color of a background. Rendered scenes have 0.65 and more.
BACKGROUND_SHARE = 0.35
# Largest difference of a background pixel from the background (noise of sigma 4 differs by 7).
BACKGROUND_NOISE = 16.0
# Smallest squared cosine between a cell (minus the background) and the best template. Rendered scenes at the smallest
# resolution keep 0.93 and more after JPEG (quality 90). A Gaussian blob of any width reaches at most 0.81 against a
# sharp disc, but more against discs of a few pixels.
MATCH = 0.92
# The noise energy of the quietest empty cell is subtracted from |x|^2 before MATCH, up to this share of |x|^2. Without
# noise nothing changes. Measured on 41 noisy images (15 to 25 per pixel, from disturbed weights) that were judged
# wrong without it: 39 were right to the eye, where the best template explained 0.81 to 0.92 of |x|^2 before and at
# least 0.94 after; the two wrong ones stayed at 0.91 or less.
NOISE_SHARE = 0.2
# A cell is occupied if, after a 3x3 mean, at least this share of it differs from the background by OCCUPIED_BY.
OCCUPIED_SHARE, OCCUPIED_BY = 0.02, 45.0
# Templates are shifted by up to this many pixels in both directions, at the smallest resolution of the level.
_SHIFT = 1
# Rows: Y, Cb, Cr of JPEG, scaled so that distances approximate those in RGB.
_TO_YCC = np.diag((3**0.5, 1.8, 1.57)) @ np.array(
    [[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]]
)
_FROM_YCC = np.linalg.inv(_TO_YCC)


def _smooth(cells: np.ndarray) -> np.ndarray:
    """Return the 3x3 mean over the last two axes."""
    padded = np.pad(cells, [(0, 0)] * (cells.ndim - 2) + [(1, 1)] * 2, mode="edge")
    rows = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9


@lru_cache(maxsize=8)
def _templates(level: SceneLevel, cell: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, str]]]:
    """Return templates for cells of `cell` pixels, resized to the cell size of the smallest resolution (`side`).

    Returns:
        Coverage (0..1) scaled to unit length, (2, kinds * shifts, side * side), first sharp (for Y), then smoothed
        (for Cb and Cr); the lengths before scaling, (2, kinds * shifts); (shape, size, texture) of each kind and
        shift.
    """
    side = level.min_resolution // max(level.grid)
    kinds = [(shape, size, texture) for shape in level.shapes for size in level.sizes for texture in level.textures]
    steps = range(2 * _SHIFT + 1)
    rows = []
    for kind in kinds:
        mask = object_mask(*kind, cell).resize((side, side), Image.Resampling.BOX)
        padded = np.pad(np.asarray(mask, dtype=np.float32) / 255, _SHIFT)
        rows += [padded[y : y + side, x : x + side] for y in steps for x in steps]
    coverage = np.stack([rows, _smooth(np.asarray(rows))]).reshape(2, len(rows), -1)
    lengths = np.linalg.norm(coverage, axis=-1)
    return coverage / lengths[..., None], lengths, [kind for kind in kinds for _ in range(len(steps) ** 2)]


def _nearest(color: np.ndarray, names: tuple[str, ...], palette: dict[str, tuple[int, int, int]]) -> str:
    distances = [float(np.linalg.norm(color - np.asarray(palette[name]))) for name in names]
    best = int(np.argmin(distances))
    return names[best] if distances[best] <= COLOR_TOLERANCE else UNKNOWN


def _find_background(pixels: np.ndarray, level: SceneLevel) -> tuple[str, np.ndarray]:
    """Return the name of the background and its exact color, the median of its pixels, (3,)."""
    step = len(pixels) // 32  # about a thousand pixels suffice for share and median
    flat = pixels[::step, ::step].reshape(-1, 3)
    best, best_near = UNKNOWN, np.zeros(len(flat), dtype=bool)
    for name in level.backgrounds:
        near = np.linalg.norm(flat - np.asarray(BACKGROUNDS[name], dtype=np.float32), axis=1) <= COLOR_TOLERANCE
        if near.sum() > max(best_near.sum(), BACKGROUND_SHARE * len(flat)):
            best, best_near = name, near
    return best, np.median(flat[best_near], axis=0) if best != UNKNOWN else np.zeros(3)


def _is_occupied(residual: np.ndarray) -> bool:
    """True if a cell minus the background, (3, side, side), contains an object."""
    # Smoothed, because single noisy pixels are not an object. Without the rim, because an object in the next cell may
    # be shifted by a pixel.
    strength = np.linalg.norm(_smooth(residual), axis=0)[1:-1, 1:-1]
    return bool((strength > OCCUPIED_BY).mean() >= OCCUPIED_SHARE)


def _to_comparable(residual: np.ndarray) -> np.ndarray:
    """Return a cell minus the background, (3, side, side), as Y, Cb and Cr for the comparison with templates."""
    residual = np.where(np.linalg.norm(residual, axis=0) > BACKGROUND_NOISE, residual, 0)
    # JPEG and small networks keep brightness sharp but not color, so Cb and Cr are smoothed in cell and template.
    ycc = np.tensordot(_TO_YCC, residual, axes=1).astype(np.float32)
    ycc[1:] = _smooth(ycc[1:])
    return ycc


def _read_cell(
    ycc: np.ndarray, noise: float, background: np.ndarray, place: tuple[int, int], level: SceneLevel, cell: int
) -> SceneObject:
    """Read the object in an occupied cell.

    Args:
        ycc: return value of `_to_comparable`, (3, side, side).
        noise: energy of an empty cell of the same image.
        background: RGB of the background, (3,).
        place: (row, column) of the cell.
        level: level of the scene.
        cell: side length of the cell in the image, in pixels.
    """
    ycc = ycc.reshape(3, -1)
    templates, lengths, kinds = _templates(level, cell)
    # For a template m of unit length, the best strength is m.x, and it explains the share |m.x|^2 / |x|^2.
    strengths = np.stack([templates[0] @ ycc[0], templates[1] @ ycc[1], templates[1] @ ycc[2]])
    energy = (ycc**2).sum()
    explained = (strengths**2).sum(axis=0) / (energy - min(noise, NOISE_SHARE * energy))
    best = int(np.argmax(explained))
    shape, size, texture = kinds[best] if explained[best] >= MATCH else (UNKNOWN,) * 3
    color = background + _FROM_YCC @ (strengths[:, best] / lengths[[0, 1, 1], best])
    return SceneObject(shape, _nearest(color, level.colors, COLORS), size, texture, place)


def read_scene(image: Image.Image | np.ndarray, level: str) -> Scene:
    """Read an image as a scene of a level.

    Args:
        image: square RGB image or uint8 array (height, width, 3) of at least the level's `min_resolution`.
        level: "easy", "medium" or "hard".

    Returns:
        Scene with its objects in row order. Attributes that are not recognized are `UNKNOWN` and match no prompt: a
        blurred blob has no shape, size and texture, a wrong hue has no color. The scene is
        empty and its background `UNKNOWN` in two cases: no background of the level covers enough of the image, or
        more cells are occupied than the level allows and none is recognized (noise).

    Raises:
        ValueError: if the level is unknown, or mode, type, shape or size of the image are not as described.

    Example:
        >>> from diffusers_prx.data.scenes import ScenesDataset
        >>> from diffusers_prx.evaluation.scene_checker import read_scene
        >>> sample = ScenesDataset("easy", 32, seed=0)[0]
        >>> read_scene(sample["image"], "easy") == sample["scene"]  # True
    """
    definition = get_level(level)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.shape[0] != array.shape[1]:
        raise ValueError(
            f"`image` is {array.dtype} of shape {array.shape}; accepted: a square RGB image, or uint8 of shape "
            "(height, width, 3) with height = width."
        )
    picture, resolution = Image.fromarray(array), array.shape[0]
    if resolution < definition.min_resolution:
        raise ValueError(
            f"`image` is {resolution} pixels wide; level {level!r} needs at least {definition.min_resolution}."
        )
    name, background = _find_background(array.astype(np.float32), definition)
    if name == UNKNOWN:
        return Scene(level, UNKNOWN, ())
    side = definition.min_resolution // max(definition.grid)
    occupied, empty = {}, []
    for row, column in np.ndindex(*definition.grid):
        top, left, cell = cell_corner((row, column), definition.grid, resolution)
        pixels = picture.resize((side, side), Image.Resampling.BOX, box=(left, top, left + cell, top + cell))
        residual = np.moveaxis(np.asarray(pixels, dtype=np.float32) - background, -1, 0)
        if _is_occupied(residual):
            occupied[row, column] = _to_comparable(residual)
        else:
            empty.append(float((_to_comparable(residual) ** 2).sum()))
    noise = min(empty, default=0.0)  # the smallest, because a faint object in a cell is not noise
    found = [_read_cell(ycc, noise, background, place, definition, cell) for place, ycc in occupied.items()]
    if len(found) > definition.max_objects and all(thing.shape == UNKNOWN for thing in found):
        return Scene(level, UNKNOWN, ())  # noise around a background color
    return Scene(level, name, tuple(found))


def _check_levels(found: Scene, expected: Scene) -> None:
    if found.level != expected.level:
        raise ValueError(f"`found` has the level {found.level!r}; accepted: that of `expected`, {expected.level!r}.")


def scene_matches(found: Scene, expected: Scene, caption: str = "long") -> bool:
    """True if a scene contains everything that a caption of the expected scene states.

    Args:
        found: scene that was read from an image.
        expected: scene of the prompt.
        caption: "long": the background and exactly the expected objects with all attributes must match, which includes
            the relation. "short": the first expected object must exist with all attributes.

    Raises:
        ValueError: if the caption kind is unknown, or the levels differ.
    """
    _check_levels(found, expected)
    if one_of("caption", caption, CAPTIONS) == "short":
        return expected.objects[0] in found.objects
    return found.background == expected.background and set(found.objects) == set(expected.objects)


def _described(thing: SceneObject, level: str) -> str:
    """Return an object in words, such as "small pink square at the top left"."""
    size = "" if thing.size == UNKNOWN else thing.size
    texture = "" if thing.texture in ("plain", UNKNOWN) else thing.texture
    color = "unknown-color" if thing.color == UNKNOWN else thing.color
    shape = "unknown shape" if thing.shape == UNKNOWN else thing.shape
    return " ".join(filter(None, (size, texture, color, shape, place_name(thing.place, level))))


def describe_differences(found: Scene, expected: Scene, caption: str = "long") -> str:
    """Return what was read instead of the expected scene: "small pink square at the top left, black background".

    Args:
        found: scene that was read from an image.
        expected: scene of the prompt.
        caption: kind of the caption, see `scene_matches`.

    Returns:
        Unexpected objects, positions of missing objects, and an unexpected background; empty if `scene_matches`.

    Raises:
        ValueError: if the caption kind is unknown, or the levels differ.
    """
    if scene_matches(found, expected, caption):
        return ""
    if found.background == UNKNOWN:
        return "not a scene (unknown background, or too many unknown objects)"
    if caption == "short":
        missing = expected.objects[0]
        extra = [thing for thing in found.objects if thing.place == missing.place]
        missing_places = [missing.place]
    else:
        extra = [thing for thing in found.objects if thing not in expected.objects]
        missing_places = [thing.place for thing in expected.objects if thing not in found.objects]
    filled = {thing.place for thing in extra}
    parts = [_described(thing, found.level) for thing in extra]
    parts += [f"nothing {place_name(place, found.level)}" for place in missing_places if place not in filled]
    if caption == "long" and found.background != expected.background:
        parts.append(f"{found.background} background")
    return ", ".join(parts)


def attribute_scores(found: Scene, expected: Scene) -> dict[str, float]:
    """Return a score in [0, 1] per attribute.

    `count` and `background` are 0 or 1. `shape`, `color`, `size`, `texture` and `place` are shares of the expected
    objects. Each found object is matched with at most one expected object, pairs with the best agreement first.
    `relation` (0 or 1; only if the expected scene has one) holds if the objects matched with the related ones have
    their colors and shapes and the expected relation, wherever they are.

    Raises:
        ValueError: if the levels differ.
    """
    _check_levels(found, expected)
    names = ("shape", "color", "size", "texture", "place")

    def agreement(pair: tuple[int, int]) -> int:
        one, other = expected.objects[pair[0]], found.objects[pair[1]]
        # place counts twice, to decide between objects that agree equally well otherwise
        return sum(getattr(one, name) == getattr(other, name) for name in names) + (one.place == other.place)

    matched: dict[int, SceneObject] = {}
    candidates = {(i, j) for i in range(len(expected.objects)) for j in range(len(found.objects))}
    while candidates:
        i, j = max(sorted(candidates), key=agreement)
        matched[i] = found.objects[j]
        candidates = {(a, b) for a, b in candidates if a != i and b != j}
    scores = {
        "count": float(len(found.objects) == len(expected.objects)),
        "background": float(found.background == expected.background),
    }
    for name in names:
        hits = sum(getattr(matched[i], name) == getattr(expected.objects[i], name) for i in matched)
        scores[name] = hits / len(expected.objects)
    if expected.relation is not None:
        objects_match = (
            0 in matched
            and 1 in matched
            and all(
                (matched[i].color, matched[i].shape) == (expected.objects[i].color, expected.objects[i].shape)
                for i in (0, 1)
            )
        )
        holds = objects_match and relation_between(matched[0].place, matched[1].place) == expected.relation
        scores["relation"] = float(holds)
    return scores
