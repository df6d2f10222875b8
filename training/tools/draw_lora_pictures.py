"""Draw the few pictures of the LoRA examples: `python training/tools/draw_lora_pictures.py --kind flower --output_dir DIR`.

| kind | pictures | captions |
|---|---|---|
| flower | eight: a flower with five pink petals, a yellow middle and a green stem, at each corner, on white and black | none: give `--instance_prompt` |
| outlines | ten scenes of the level easy, their objects as outlines | metadata.jsonl: that of the scene, and "Drawn as outlines." |

Both are what the scenes that the quickstart learns from never show.
"""  # noqa: E501 - a table

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from diffusers_prx.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    cell_corner,
    get_level,
    long_caption,
    object_mask,
    sample_scene,
)

GRID = get_level("easy").grid
STYLE = "Drawn as outlines."
OVERSAMPLING = 8


def draw_flower(place: tuple[int, int], background: str, resolution: int) -> Image.Image:
    """A flower in one place of the grid, antialiased."""
    size = resolution * OVERSAMPLING
    image = Image.new("RGB", (size, size), BACKGROUNDS[background])
    draw = ImageDraw.Draw(image)
    top, left, cell = cell_corner(place, GRID, size)
    x, y, unit = left + 0.5 * cell, top + 0.36 * cell, cell / 16

    def disc(at_x: float, at_y: float, radius: float, colour: str) -> None:
        draw.ellipse((at_x - radius, at_y - radius, at_x + radius, at_y + radius), fill=COLOURS[colour])

    draw.rectangle((x - unit, y, x + unit, top + 0.96 * cell), fill=COLOURS["green"])
    for petal in range(5):
        angle = 2 * math.pi * petal / 5 - math.pi / 2
        disc(x + 3.2 * unit * math.cos(angle), y + 3.2 * unit * math.sin(angle), 2.4 * unit, "pink")
    disc(x, y, 2.1 * unit, "yellow")
    return image.resize((resolution, resolution), Image.Resampling.BOX)


def flowers(resolution: int) -> Iterator[tuple[Image.Image, None]]:
    for background in ("white", "black"):
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                yield draw_flower((row, column), background, resolution), None


def outlines(resolution: int, count: int = 10, seed: int = 1) -> Iterator[tuple[Image.Image, str]]:
    for index in range(count):
        scene = sample_scene(index, seed=seed, level="easy")
        image = Image.new("RGB", (resolution, resolution), BACKGROUNDS[scene.background])
        for thing in scene.objects:
            top, left, cell = cell_corner(thing.place, GRID, resolution)
            image.paste(COLOURS[thing.colour], (left, top), object_mask(thing.shape, thing.size, "outlined", cell))
        yield image, f"{long_caption(scene, seed=seed, index=index)} {STYLE}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("flower", "outlines"), required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="Of the pictures.")
    parser.add_argument("--resolution", type=int, default=32, help="Height and width in pixels.")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (image, caption) in enumerate({"flower": flowers, "outlines": outlines}[args.kind](args.resolution)):
        image.save(args.output_dir / f"{number}.png")
        if caption is not None:
            rows.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    if rows:
        (args.output_dir / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    print(f"{number + 1} pictures in {args.output_dir}")


if __name__ == "__main__":
    main()
