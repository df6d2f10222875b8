"""Reads a picture of a scene back into its description, and compares descriptions: prompt following, graded exactly.

Each place of the grid is compared with every shape x size x texture that the level has. The comparison ignores how
strong the color is, so that shape and color are judged one after the other, each against its own threshold, and a
picture that is not clearly a scene of the level is not read as one: what is seen but not recognized is `UNKNOWN`.
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

# The largest distance (Euclidean, 0..255 per channel) at which a color still has its name. The named colors and
# backgrounds are at least 105 apart, so this is about half way: nearly every shade in between has one name.
COLOR_TOLERANCE = 60.0
# A picture has a background if at least this share of its pixels has the background's name. Rendered scenes: 0.65 up.
BACKGROUND_SHARE = 0.35
# A pixel that differs from the background by no more than this belongs to it (noise of sigma 4 differs by 7).
BACKGROUND_NOISE = 16.0
# Squared cosine between a cell (less the background) and the best template. Rendered scenes at the smallest resolution
# keep 0.93 and more after JPEG (quality 90); a Gaussian blob reaches at most 0.81 against a sharp disc, whatever its
# width, but more against discs of only a few pixels.
MATCH = 0.92
# Noise in the background counts as noise in the objects too: its energy, measured in the quietest empty cell, is taken
# off |x|^2 before MATCH, up to this share of |x|^2. Without noise nothing changes. Of 41 pictures with noise (15 to 25
# per pixel, from disturbed weights) that were judged wrong, 39 were right to the eye: the best template explained 0.81
# to 0.92 of |x|^2 in them, and 0.94 and more after; at most 0.91 in the two that were wrong.
NOISE_SHARE = 0.2
# A cell holds something if, after a 3x3 mean, at least this share of it differs from the background by OCCUPIED_BY.
OCCUPIED_SHARE, OCCUPIED_BY = 0.02, 45.0
# Templates are also tried this many pixels away (at the level's smallest resolution), in both directions.
_SHIFT = 1
# Rows: Y, Cb, Cr of JPEG, scaled so that distances are about those of RGB.
_TO_YCC = np.diag((3**0.5, 1.8, 1.57)) @ np.array(
    [[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]]
)
_FROM_YCC = np.linalg.inv(_TO_YCC)


def _smooth(cells: np.ndarray) -> np.ndarray:
    """The 3x3 mean over the last two axes."""
    padded = np.pad(cells, [(0, 0)] * (cells.ndim - 2) + [(1, 1)] * 2, mode="edge")
    rows = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9


@lru_cache(maxsize=8)
def _templates(level: SceneLevel, cell: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, str]]]:
    """What a cell, drawn with `cell` pixels and resized to `side` (that of the smallest resolution), is compared with:
    coverage (0..1) scaled to unit length, (2, kinds * shifts, side * side), first sharp (for Y), then smoothed (for Cb
    and Cr); the lengths before, (2, kinds * shifts); for each kind and shift its (shape, size, texture)."""
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
    """The name and the exact shade (the median of its pixels), (3,)."""
    step = len(pixels) // 32  # some thousand pixels tell the share and the median
    flat = pixels[::step, ::step].reshape(-1, 3)
    best, best_near = UNKNOWN, np.zeros(len(flat), dtype=bool)
    for name in level.backgrounds:
        near = np.linalg.norm(flat - np.asarray(BACKGROUNDS[name], dtype=np.float32), axis=1) <= COLOR_TOLERANCE
        if near.sum() > max(best_near.sum(), BACKGROUND_SHARE * len(flat)):
            best, best_near = name, near
    return best, np.median(flat[best_near], axis=0) if best != UNKNOWN else np.zeros(3)


def _is_occupied(residual: np.ndarray) -> bool:
    """True if a cell, less the background (3, side, side), holds something."""
    # Smoothed, because single noisy pixels are no evidence of an object; without the rim, because an object in the
    # next cell may be a pixel off its place.
    strength = np.linalg.norm(_smooth(residual), axis=0)[1:-1, 1:-1]
    return bool((strength > OCCUPIED_BY).mean() >= OCCUPIED_SHARE)


def _compared(residual: np.ndarray) -> np.ndarray:
    """The Y, Cb and Cr of a cell, less the background (3, side, side), that are compared with templates."""
    residual = np.where(np.linalg.norm(residual, axis=0) > BACKGROUND_NOISE, residual, 0)
    # JPEG, and small networks, keep brightness sharp but not color: Cb and Cr are compared smoothed, on both sides.
    ycc = np.tensordot(_TO_YCC, residual, axes=1).astype(np.float32)
    ycc[1:] = _smooth(ycc[1:])
    return ycc


def _read_cell(
    ycc: np.ndarray, noise: float, background: np.ndarray, place: tuple[int, int], level: SceneLevel, cell: int
) -> SceneObject:
    """Read the object in an occupied cell.

    Args:
        ycc: the cell as of `_compared`, resized as for `_templates`, (3, side, side).
        noise: energy of an empty cell, as `ycc`, of the same picture.
        background: RGB of the background, (3,).
        place: (row, column) of the cell.
        level: level of the scene.
        cell: side of the cell in the picture, in pixels.
    """
    ycc = ycc.reshape(3, -1)
    templates, lengths, kinds = _templates(level, cell)
    # For a template m of unit length the best strength is m.x, and |m.x|^2 / |x|^2 is the share that it explains.
    strengths = np.stack([templates[0] @ ycc[0], templates[1] @ ycc[1], templates[1] @ ycc[2]])
    energy = (ycc**2).sum()
    explained = (strengths**2).sum(axis=0) / (energy - min(noise, NOISE_SHARE * energy))
    best = int(np.argmax(explained))
    shape, size, texture = kinds[best] if explained[best] >= MATCH else (UNKNOWN,) * 3
    color = background + _FROM_YCC @ (strengths[:, best] / lengths[[0, 1, 1], best])
    return SceneObject(shape, _nearest(color, level.colors, COLORS), size, texture, place)


def read_scene(image: Image.Image | np.ndarray, level: str) -> Scene:
    """Reads a picture as a scene of `level`.

    Args:
        image: an RGB picture, or a uint8 array of shape (height, width, 3); square, and of at least the level's
            `min_resolution` pixels.
        level: "easy", "medium" or "hard".

    Returns:
        The scene, its objects row by row. The background is `UNKNOWN` if no background of the level covers enough of
        the picture, or if more places are filled than the level allows and nothing in them is recognized (noise);
        then there are no objects. A place that holds something is listed in `objects`; what of it is
        not recognized (a blurred blob has no shape, size and texture; a wrong hue has no color) is `UNKNOWN`, and so
        matches no prompt.

    Raises:
        ValueError: for an unknown level, an image of another mode, type or shape, or one that is too small.
    """
    definition = get_level(level)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.shape[0] != array.shape[1]:
        raise ValueError(
            f"`image` is {array.dtype} of shape {array.shape}; accepted: a square RGB picture, or uint8 of shape "
            "(height, width, 3) with height = width."
        )
    picture, resolution = Image.fromarray(array), array.shape[0]
    if resolution < definition.min_resolution:
        raise ValueError(
            f"`image` is {resolution} pixels wide; level {level!r} is readable from {definition.min_resolution} on."
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
            occupied[row, column] = _compared(residual)
        else:
            empty.append(float((_compared(residual) ** 2).sum()))
    noise = min(empty, default=0.0)  # the smallest, because a faint ghost in a cell is no noise
    found = [_read_cell(ycc, noise, background, place, definition, cell) for place, ycc in occupied.items()]
    if len(found) > definition.max_objects and all(thing.shape == UNKNOWN for thing in found):
        return Scene(level, UNKNOWN, ())  # noise around the shade of a background
    return Scene(level, name, tuple(found))


def _check_levels(found: Scene, wanted: Scene) -> None:
    if found.level != wanted.level:
        raise ValueError(f"The scenes are of different levels: found {found.level!r}, wanted {wanted.level!r}.")


def scene_matches(found: Scene, wanted: Scene, caption: str = "long") -> bool:
    """Whether everything is right that the caption of `wanted` states. "long": the background and exactly the wanted
    objects with all attributes, none missing and none extra (then the relation holds as well). "short": the first
    wanted object is there with all attributes.

    Raises `ValueError` for an unknown caption kind, or scenes of different levels.
    """
    _check_levels(found, wanted)
    if one_of("caption", caption, CAPTIONS) == "short":
        return wanted.objects[0] in found.objects
    return found.background == wanted.background and set(found.objects) == set(wanted.objects)


def _described(thing: SceneObject, level: str) -> str:
    """An object in words, "small pink square at the top left"; what is unknown is called so."""
    size = "" if thing.size == UNKNOWN else thing.size
    texture = "" if thing.texture in ("plain", UNKNOWN) else thing.texture
    color = "unknown-color" if thing.color == UNKNOWN else thing.color
    shape = "unknown shape" if thing.shape == UNKNOWN else thing.shape
    return " ".join(filter(None, (size, texture, color, shape, place_name(thing.place, level))))


def read_instead(found: Scene, wanted: Scene, caption: str = "long") -> str:
    """Say what was read in place of what was asked: "small pink square at the top left, black background".

    Args:
        found: scene that was read from a picture.
        wanted: scene that was asked for.
        caption: kind of the caption that asked for it, "long" or "short" (which states the first object only).

    Returns:
        The objects that were not asked for, the places where an object is missing, and the background if it is
        another one; an empty string if `scene_matches`.

    Raises:
        ValueError: unknown caption kind, or scenes of different levels.
    """
    if scene_matches(found, wanted, caption):
        return ""
    if found.background == UNKNOWN:
        return "no scene (no background of the level, or too much that is unknown)"
    if caption == "short":
        missing = wanted.objects[0]
        extra = [thing for thing in found.objects if thing.place == missing.place]
        missing_places = [missing.place]
    else:
        extra = [thing for thing in found.objects if thing not in wanted.objects]
        missing_places = [thing.place for thing in wanted.objects if thing not in found.objects]
    filled = {thing.place for thing in extra}
    parts = [_described(thing, found.level) for thing in extra]
    parts += [f"nothing {place_name(place, found.level)}" for place in missing_places if place not in filled]
    if caption == "long" and found.background != wanted.background:
        parts.append(f"{found.background} background")
    return ", ".join(parts)


def attributes_right(found: Scene, wanted: Scene) -> dict[str, float]:
    """What is right, attribute by attribute, each 0..1.

    `count` and `background` are 0 or 1; `shape`, `color`, `size`, `texture` and `place` are the share of wanted
    objects for which it is right. Each found object answers for at most one wanted object, pairs that agree most
    first. `relation` (0 or 1; only where `wanted` has one) holds if the two objects that answer for the related ones
    have their colors and shapes, and lie to each other as wanted, wherever they are.

    Raises `ValueError` for scenes of different levels.
    """
    _check_levels(found, wanted)
    names = ("shape", "color", "size", "texture", "place")

    def agreement(pair: tuple[int, int]) -> int:
        ours, theirs = wanted.objects[pair[0]], found.objects[pair[1]]
        # Place counts double: it decides between two objects that are otherwise equally near.
        return sum(getattr(ours, name) == getattr(theirs, name) for name in names) + (ours.place == theirs.place)

    answers: dict[int, SceneObject] = {}
    free = {(i, j) for i in range(len(wanted.objects)) for j in range(len(found.objects))}
    while free:
        i, j = max(sorted(free), key=agreement)
        answers[i] = found.objects[j]
        free = {(a, b) for a, b in free if a != i and b != j}
    right = {
        "count": float(len(found.objects) == len(wanted.objects)),
        "background": float(found.background == wanted.background),
    }
    for name in names:
        hits = sum(getattr(answers[i], name) == getattr(wanted.objects[i], name) for i in answers)
        right[name] = hits / len(wanted.objects)
    if wanted.relation is not None:
        named = (
            0 in answers
            and 1 in answers
            and all(
                (answers[i].color, answers[i].shape) == (wanted.objects[i].color, wanted.objects[i].shape)
                for i in (0, 1)
            )
        )
        holds = named and relation_between(answers[0].place, answers[1].place) == wanted.relation
        right["relation"] = float(holds)
    return right
