"""The emoji data set of `training/tools/fetch_emoji.py`: its drawings by name and style, with transparency."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from ..files import expand_path

# `skin_tones` is a fourth split on disk: drawings that differ from one in `train` by a skin tone only.
EMOJI_SPLITS = ("train", "heldout_pairs", "unseen_names")
EMOJI_CAPTIONS = ("label", "text", "long")
# style: its name in captions
STYLE_WORDS = {
    "noto": "Noto",
    "noto-v1": "Noto blob",
    "twemoji": "Twemoji",
    "fluent": "Fluent",
    "fluent-flat": "Fluent flat",
    "fluent-3d": "Fluent 3D",
    "emojione": "EmojiOne",
}
MAKE_IT = "make it with `python training/tools/fetch_emoji.py --output_dir DIR`"


@dataclass(frozen=True)
class EmojiDrawing:
    """One drawing of the data set.

    Args:
        name: identifier that the drawings of all styles share, such as `red-apple`.
        style: one of `STYLE_WORDS`.
        label: name in words, such as "red apple".
        text: caption of label and style.
        long: caption of sentences.
        row: place of its picture in the data set.
    """

    name: str
    style: str
    label: str
    text: str
    long: str
    row: int


class EmojiDrawings:
    """The drawings of the data set without skin-tone variants, in one of the sizes that are there.

    Args:
        emoji_dir: folder that `fetch_emoji.py` wrote: one folder of parquet files for each size.
        min_size: least side in pixels that is needed; the smallest size that has it is read.

    Attributes:
        size: side of the drawings in pixels.
        splits: drawings by split, in the order of the files.

    Raises:
        ValueError: if the folder holds no such data set, or only smaller drawings.

    Example:
        >>> drawings = EmojiDrawings("data/emoji", min_size=64)
        >>> apple = next(d for d in drawings.splits["train"] if d.name == "red-apple")
        >>> drawings.picture(apple).mode
        'RGBA'
    """

    def __init__(self, emoji_dir: str | Path, min_size: int):
        folder = Path(expand_path(str(emoji_dir)))
        found = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())
        if not found:
            raise ValueError(f"`emoji_dir` is {str(emoji_dir)!r}, which is not a folder of the emoji data: {MAKE_IT}.")
        if found[-1] < min_size:
            raise ValueError(
                f"`emoji_dir` {str(emoji_dir)!r} has drawings of {', '.join(map(str, found))} pixels, but {min_size} "
                f"are needed: {MAKE_IT} --sizes {' '.join(map(str, [*found, min_size]))}, or lower `resolution`."
            )
        self.size = next(size for size in found if size >= min_size)
        self.splits: dict[str, tuple[EmojiDrawing, ...]] = {}
        self._pictures: list[bytes] = []
        for split in EMOJI_SPLITS:
            self.splits[split] = self._read(sorted((folder / str(self.size)).glob(f"{split}-*.parquet")), split)

    def _read(self, files: Sequence[Path], split: str) -> tuple[EmojiDrawing, ...]:
        columns = ["image", "name", "style", "skin_tone", *EMOJI_CAPTIONS]
        drawings = []
        for file in files:
            try:
                rows = pq.read_table(file, columns=columns).to_pylist()
            except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
                raise ValueError(f"{file} cannot be read as emoji data ({error}): {MAKE_IT}.") from error
            for row in rows:
                if row["skin_tone"]:
                    continue
                texts = {column: row[column] for column in EMOJI_CAPTIONS}
                drawings.append(EmojiDrawing(row["name"], row["style"], **texts, row=len(self._pictures)))
                self._pictures.append(row["image"]["bytes"])
        if not drawings:
            raise ValueError(f"`emoji_dir` has no drawing of the split {split} at {self.size} pixels: {MAKE_IT}.")
        return tuple(drawings)

    @cached_property
    def by_name_and_style(self) -> dict[tuple[str, str], EmojiDrawing]:
        """Drawings of all splits by (name, style)."""
        return {(drawing.name, drawing.style): drawing for part in self.splits.values() for drawing in part}

    @cached_property
    def style_counts(self) -> Counter[str]:
        """Number of styles by name."""
        return Counter(name for name, _ in self.by_name_and_style)

    def stored(self, drawing: EmojiDrawing) -> bytes:
        """Return the picture of a drawing as it is stored, a PNG."""
        return self._pictures[drawing.row]

    def picture(self, drawing: EmojiDrawing) -> Image.Image:
        """Return the picture of a drawing, RGBA, `size` x `size` pixels."""
        return Image.open(io.BytesIO(self.stored(drawing))).convert("RGBA")

    def on_ground(self, drawing: EmojiDrawing, ground: tuple[int, int, int], side: int) -> np.ndarray:
        """Return a drawing on a plain ground (RGB, 0 to 255), resized to `side` pixels: uint8 (side, side, 3)."""
        image = Image.new("RGB", (side, side), ground)
        place_drawing(image, self.picture(drawing), (0, 0), side)
        return np.asarray(image)


def place_drawing(image: Image.Image, picture: Image.Image, corner: tuple[int, int], side: int) -> None:
    """Put a picture with transparency onto an image.

    Args:
        image: RGB image, changed in place.
        picture: RGBA picture.
        corner: (left, top) of the picture in the image, in pixels.
        side: side of the picture in the image, in pixels.
    """
    if picture.size != (side, side):
        # premultiplied, so that the color of what is transparent does not show at the rim
        picture = picture.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    image.paste(picture, corner, picture)


def with_article(label: str) -> str:
    """Put "a" or "an" before a label that is neither a plural nor a proper name: "an orange heart"."""
    last = label.split(" with ")[0].split(" (")[0].split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if plural or not label[0].islower() or label.startswith(("flag of", "keycap")):
        return f"the {label}" if label.startswith("flag of") else label
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def enumerate_words(words: Sequence[str]) -> str:
    """Join words as in a sentence: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
