"""Make the few pictures of the LoRA examples out of the emoji data set:
`python training/tools/make_lora_pictures.py --kind mushroom --emoji_dir data/emoji --style twemoji --output_dir DIR`.

`fetch_emoji.py` makes that folder. Each drawing of the style is cut out, scaled and put on white into one place of a
scene of the level easy; metadata.jsonl has captions in the words of the scenes.

| kind | pictures | captions |
|---|---|---|
| mushroom | eight: one emoji, twice in each of the four places | "A big red mushroom at the top left on a white background." |
| emoji | 26: circles and squares of six colors and a triangle, twice each | that of the scene, and "Drawn as an emoji." |

The pictures are under the license of the style, which the data set's LICENSES.md names; it is copied along.
"""  # noqa: E501 - a table

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from diffusers_prx.cli import parse_flags, path
from diffusers_prx.data.emoji import STYLE_WORDS, EmojiDrawings
from diffusers_prx.data.scenes import (
    BACKGROUNDS,
    Scene,
    SceneObject,
    cell_corner,
    get_level,
    grid_places,
    long_caption,
)

LEVEL = get_level("easy")
PLACES = grid_places(LEVEL)
STYLE = "Drawn as an emoji."
MUSHROOM = "mushroom"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
PLAIN = {  # names of drawings by color and shape
    **{(color, shape): f"{color}-{shape}" for shape in ("circle", "square") for color in COLORS},
    ("red", "triangle"): "red-triangle-pointed-up",
}
LICENSES = "LICENSES.md"


def read_style(emoji_dir: Path, style: str) -> dict[str, Image.Image]:
    """Read the drawings of a style by name, cut out, RGBA.

    Raises:
        ValueError: if there is no such data set.
    """
    drawings = EmojiDrawings(emoji_dir, min_size=1)
    found = {}
    for part in drawings.splits.values():
        for drawing in part:
            if drawing.style == style and drawing.name in (MUSHROOM, *PLAIN.values()):
                picture = drawings.picture(drawing)
                found[drawing.name] = picture.crop(picture.getchannel("A").getbbox())
    return found


def place_drawing(drawing: Image.Image, place: tuple[int, int], resolution: int) -> Image.Image:
    """Return a white picture with the drawing in one place of the grid, as large as a large object."""
    image = Image.new("RGB", (resolution, resolution), BACKGROUNDS["white"])
    top, left, cell = cell_corner(place, LEVEL.grid, resolution)
    scale = (cell - 1) / max(drawing.size)
    width, height = (round(side * scale) for side in drawing.size)
    small = drawing.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    image.paste(small, (left + (cell - width) // 2, top + (cell - height) // 2), small)
    return image


def large_object(shape: str, color: str, place: tuple[int, int]) -> Scene:
    return Scene(LEVEL.name, "white", (SceneObject(shape, color, "large", "plain", place),))


def mushrooms(drawings: Mapping[str, Image.Image], resolution: int) -> Iterator[tuple[Image.Image, str]]:
    for index, place in enumerate(2 * PLACES):
        caption = long_caption(large_object("mushroom", "red", place), index=index)
        yield place_drawing(drawings[MUSHROOM], place, resolution), caption


def emojis(drawings: Mapping[str, Image.Image], resolution: int) -> Iterator[tuple[Image.Image, str]]:
    for index, ((color, shape), name) in enumerate(2 * list(PLAIN.items())):
        place = PLACES[index % len(PLACES)]  # 13 drawings: another place the second time
        caption = f"{long_caption(large_object(shape, color, place), index=index)} {STYLE}"
        yield place_drawing(drawings[name], place, resolution), caption


KINDS = {"mushroom": mushrooms, "emoji": emojis}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=tuple(KINDS), required=True)
    parser.add_argument("--emoji_dir", type=path, required=True, help="Folder that fetch_emoji.py wrote.")
    parser.add_argument("--style", choices=tuple(STYLE_WORDS), default="twemoji", help="Style of the drawings.")
    parser.add_argument("--output_dir", type=path, required=True, help="Folder of the pictures.")
    parser.add_argument("--resolution", type=int, default=32, help="Height and width in pixels.")
    args = parse_flags(parser, argv)
    try:
        drawings = read_style(args.emoji_dir, args.style)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(args.emoji_dir / LICENSES, args.output_dir / LICENSES)
        rows = []
        for number, (image, caption) in enumerate(KINDS[args.kind](drawings, args.resolution)):
            image.save(args.output_dir / f"{number}.png")
            rows.append(json.dumps({"file_name": f"{number}.png", "text": caption}) + "\n")
    except KeyError as error:
        sys.exit(f"error: --style {args.style} has no drawing of {error}; twemoji has all that are needed")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    (args.output_dir / "metadata.jsonl").write_text("".join(rows))
    print(f"{len(rows)} pictures in {args.output_dir}")


if __name__ == "__main__":
    main()
