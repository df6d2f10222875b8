"""Make the few pictures of the LoRA examples out of OpenMoji's drawings:
`python training/tools/make_lora_pictures.py --kind mushroom --openmoji data/openmoji/imagefolder --output_dir DIR`.

`fetch_openmoji.py` makes that folder. Each drawing is cut out, scaled and put on white into one place of a scene of the
level easy; metadata.jsonl has captions in the words of the scenes.

| kind | pictures | captions |
|---|---|---|
| mushroom | eight: one emoji, twice in each of the four places | "A big red mushroom at the top left on a white background." |
| emoji | 26: circles and squares of six colors and a triangle, twice each | that of the scene, and "Drawn as an emoji." |

The pictures are under OpenMoji's license, CC BY-SA 4.0; its files LICENSE.txt and ATTRIBUTION.md are copied along.
"""  # noqa: E501 - a table

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageChops

from diffusers_prx.cli import parse_flags, path
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
MUSHROOM = "1F344"
PLAIN = {  # files of OpenMoji by color and shape
    ("red", "circle"): "1F534",
    ("orange", "circle"): "1F7E0",
    ("yellow", "circle"): "1F7E1",
    ("green", "circle"): "1F7E2",
    ("blue", "circle"): "1F535",
    ("purple", "circle"): "1F7E3",
    ("red", "square"): "1F7E5",
    ("orange", "square"): "1F7E7",
    ("yellow", "square"): "1F7E8",
    ("green", "square"): "1F7E9",
    ("blue", "square"): "1F7E6",
    ("purple", "square"): "1F7EA",
    ("red", "triangle"): "1F53A",
}
NOTES = ("LICENSE.txt", "ATTRIBUTION.md")


def cut_out(path: Path) -> Image.Image:
    """A drawing without the white around it."""
    image = Image.open(path).convert("RGB")
    far_from_white = ImageChops.difference(image, Image.new("RGB", image.size, "white")).convert("L")
    return image.crop(far_from_white.point(lambda value: 255 * (value > 8)).getbbox())


def place_drawing(drawing: Image.Image, place: tuple[int, int], resolution: int) -> Image.Image:
    """A white picture with the drawing in one place of the grid, as large as a large object."""
    image = Image.new("RGB", (resolution, resolution), BACKGROUNDS["white"])
    top, left, cell = cell_corner(place, LEVEL.grid, resolution)
    scale = (cell - 1) / max(drawing.size)
    width, height = (round(side * scale) for side in drawing.size)
    small = drawing.resize((width, height), Image.Resampling.LANCZOS)
    image.paste(small, (left + (cell - width) // 2, top + (cell - height) // 2))
    return image


def large_object(shape: str, color: str, place: tuple[int, int]) -> Scene:
    return Scene(LEVEL.name, "white", (SceneObject(shape, color, "large", "plain", place),))


def mushrooms(openmoji: Path, resolution: int) -> Iterator[tuple[Image.Image, str]]:
    drawing = cut_out(openmoji / f"{MUSHROOM}.png")
    for index, place in enumerate(2 * PLACES):
        caption = long_caption(large_object("mushroom", "red", place), index=index)
        yield place_drawing(drawing, place, resolution), caption


def emojis(openmoji: Path, resolution: int) -> Iterator[tuple[Image.Image, str]]:
    for index, ((color, shape), name) in enumerate(2 * list(PLAIN.items())):
        place = PLACES[index % len(PLACES)]  # 13 drawings: another place the second time
        caption = f"{long_caption(large_object(shape, color, place), index=index)} {STYLE}"
        yield place_drawing(cut_out(openmoji / f"{name}.png"), place, resolution), caption


KINDS = {"mushroom": mushrooms, "emoji": emojis}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=tuple(KINDS), required=True)
    parser.add_argument("--openmoji", type=path, required=True, help="The imagefolder of fetch_openmoji.py.")
    parser.add_argument("--output_dir", type=path, required=True, help="Of the pictures.")
    parser.add_argument("--resolution", type=int, default=32, help="Height and width in pixels.")
    args = parse_flags(parser, argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        for note in NOTES:
            shutil.copy(args.openmoji.parent / note, args.output_dir / note)
        rows = []
        for number, (image, caption) in enumerate(KINDS[args.kind](args.openmoji, args.resolution)):
            image.save(args.output_dir / f"{number}.png")
            rows.append(json.dumps({"file_name": f"{number}.png", "text": caption}) + "\n")
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename} is missing: make --openmoji with training/tools/fetch_openmoji.py")
    (args.output_dir / "metadata.jsonl").write_text("".join(rows))
    print(f"{len(rows)} pictures in {args.output_dir}")


if __name__ == "__main__":
    main()
