"""Make a data set of captioned emoji drawings in seven styles:
`python training/tools/fetch_emoji.py --output_dir data/emoji`.

The drawings and their names come from eight npm packages of fixed versions (44 MB), fetched by `npm pack` and checked
against the hashes below. `--packages_dir` takes .tgz files that you fetched yourself instead. SVGs are drawn by resvg
(`pip install -e '.[emoji]'`). For each of `--sizes` the output folder holds parquet files of these splits:

| split | drawings |
|---|---|
| train | all that are in no other split |
| heldout_pairs | 10% of the (name, style) pairs: the name is in `train`, drawn in other styles |
| unseen_names | 3% of the names, in no style in `train` |
| skin_tones | people and hands of the `train` split in five skin tones; give them a small weight |

Columns: `image` (PNG with transparency; training puts it on white), `name` (the same in all styles), `style`, `group`,
`skin_tone` (empty for most), and three captions: `label` ("red apple"), `text` (label and style) and `long` (label,
style, synonyms, group, and the main colors read from the pixels). Splits and wordings follow from hashes of the names:
the same versions of packages and renderer give the same files. LICENSES.md names authors and licenses; pass it on with
the data.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
from tqdm import tqdm

from diffusers_prx.data.emoji import STYLE_WORDS, enumerate_words, with_article

ROWS_PER_FILE = 4000
ROWS_PER_GROUP = 100  # a stream holds one group at a time
SPLITS = ("train", "heldout_pairs", "unseen_names", "skin_tones")
HELDOUT_PAIRS, UNSEEN_NAMES = 0.10, 0.03  # shares of the (name, style) pairs, and of the names
SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


@dataclass(frozen=True)
class Package:
    """One npm package: name, version, and the hash of its .tgz as `npm pack --json` states it."""

    name: str
    version: str
    sha512: str

    @property
    def file(self) -> str:
        """Name of the file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Style:
    """One style of drawings.

    Args:
        package: package that holds the drawings.
        author: author for the attribution.
        source: address of the original drawings.
        license: SPDX identifier of their license.
    """

    package: Package
    author: str
    source: str
    license: str


NAMES = Package(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
STYLES = {
    "noto": Style(
        Package(
            "@iconify-json/noto",
            "1.2.9",
            "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        ),
        "Google",
        "https://github.com/googlefonts/noto-emoji",
        "Apache-2.0",
    ),
    "noto-v1": Style(
        Package(
            "@iconify-json/noto-v1",
            "1.2.5",
            "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        ),
        "Google",
        "https://github.com/googlefonts/noto-emoji",
        "Apache-2.0",
    ),
    "twemoji": Style(
        Package(
            "@iconify-json/twemoji",
            "1.2.5",
            "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        ),
        "Twitter and contributors",
        "https://github.com/jdecked/twemoji",
        "CC-BY-4.0",
    ),
    "fluent": Style(
        Package(
            "@iconify-json/fluent-emoji",
            "1.2.7",
            "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        ),
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
    ),
    "fluent-flat": Style(
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        ),
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
    ),
    "fluent-3d": Style(
        Package(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        ),
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
    ),
    "emojione": Style(
        Package(
            "@iconify-json/emojione",
            "1.2.3",
            "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        ),
        "EmojiOne (EmojiTwo)",
        "https://github.com/EmojiTwo/emojitwo",
        "CC-BY-4.0",
    ),
}
LICENSE_URLS = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "MIT": "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
}
MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""

# sRGB values of the color words in captions; the nearest one in CIELAB names a pixel.
COLORS = {
    "black": (35, 31, 32), "gray": (140, 145, 150), "white": (248, 248, 248), "red": (222, 45, 50),
    "orange": (255, 140, 30), "yellow": (255, 210, 65), "green": (70, 160, 70), "turquoise": (45, 185, 190),
    "light blue": (140, 200, 250), "blue": (40, 110, 215), "purple": (135, 85, 185), "pink": (245, 140, 185),
    "brown": (125, 80, 60), "beige": (245, 215, 170),
}  # fmt: skip
COLOR_SHARE = 0.12  # colors of a smaller share of the drawing are not named


@dataclass(frozen=True)
class Entry:
    """What is known about one emoji.

    Args:
        name: identifier shared by all styles, such as `red-apple`.
        label: a few words, such as "red apple".
        group: topic, such as "food and drink".
        tags: synonyms and related words.
        base: name of the emoji without its skin tone; of one that has none, its own.
        skin_tone: one of `SKIN_TONES`, or empty.
    """

    name: str
    label: str
    group: str
    tags: tuple[str, ...]
    base: str
    skin_tone: str


@dataclass(frozen=True)
class Drawing:
    """One drawing of a style: its entry and a function that draws it as RGBA at a size in pixels."""

    entry: Entry
    style: str
    draw: Callable[[int], PIL.Image.Image]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the data set.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="Sides of the pictures in pixels.")
    parser.add_argument("--styles", nargs="+", default=list(STYLES), help=f"Any of {', '.join(STYLES)}.")
    parser.add_argument("--packages_dir", type=Path, help="Folder with the .tgz files, in place of `npm pack`.")
    args = parser.parse_args(argv)
    for style in args.styles:
        if style not in STYLES:
            parser.error(f"--styles has {style!r}; accepted: {', '.join(STYLES)}")
    for size in args.sizes:
        if not 16 <= size <= 512:
            parser.error(f"--sizes has {size}; accepted: 16 to 512")
        if (args.output_dir / str(size)).exists():
            parser.error(f"--output_dir: {args.output_dir / str(size)} exists; remove it or choose another folder")
    args.styles, args.sizes = list(dict.fromkeys(args.styles)), list(dict.fromkeys(args.sizes))
    return args


# --- packages


def fetch_packages(packages: Sequence[Package], folder: Path) -> None:
    """Fetch packages into a folder through the npm client.

    Raises:
        ValueError: if npm is missing or fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            "npm is missing, which fetches the drawings: install Node.js, or fetch the packages elsewhere "
            f"(npm pack {' '.join(f'{p.name}@{p.version}' for p in packages)}) and pass `--packages_dir`."
        )
    for package in packages:
        print(f"fetching {package.name} {package.version}", flush=True)
        # what npm has in its cache needs no network; its default of retrying takes minutes
        call = [npm, "pack", "--loglevel=error", "--prefer-offline", "--fetch-retry-maxtimeout=10000"]
        call += ["--pack-destination", str(folder), f"{package.name}@{package.version}"]
        result = subprocess.run(call, capture_output=True, text=True)
        if result.returncode:
            lines = (result.stderr or result.stdout).strip().splitlines()
            lines = [line for line in lines if "A complete log of this run" not in line]
            raise ValueError(
                f"npm could not fetch {package.name} {package.version}: {lines[-1] if lines else 'no reason given'}. "
                "Check the network (`npm ping`), or fetch the package elsewhere and pass `--packages_dir`."
            )


def open_package(package: Package, folder: Path) -> dict[str, bytes]:
    """Read the files of a package by their names, once its hash is checked; nothing is unpacked to the disk.

    Raises:
        ValueError: if the file is missing or is not the one that was published.
    """
    path = folder / package.file
    if not path.is_file():
        raise ValueError(f"`packages_dir` {folder} has no {package.file}: npm pack {package.name}@{package.version}")
    content = path.read_bytes()
    found = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != package.sha512:
        raise ValueError(
            f"{path} has the hash sha512-{found}; expected sha512-{package.sha512}. The download is damaged or not "
            "what was published. Nothing was written; try again."
        )
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [member for member in archive if member.isfile()]
        return {member.name.partition("/")[2]: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]


# --- names


def slug(label: str) -> str:
    """Turn a label into a name: "Côte d'Ivoire" is `cote-divoire`."""
    plain = unicodedata.normalize("NFKD", re.sub("['\u2019\u201c\u201d]", "", label.replace("&", "and")))
    return re.sub(r"[^a-z0-9]+", "-", plain.encode("ascii", "ignore").decode().lower()).strip("-")


def readable(label: str) -> str:
    """Write a label without its colon: "flag: Peru" is "flag of Peru", "man: red hair" is "man with red hair"."""
    label = re.sub("[\u201c\u201d]", "", label)
    head, _, details = label.partition(": ")
    if not details:
        return label
    if head == "flag":
        return f"flag of {details}"
    if head == "keycap":
        return f"keycap {details}"
    if head in ("family", "kiss", "couple with heart"):
        return f"{head} ({details})"
    return f"{head} with {' and '.join(details.split(', '))}"


def read_entries(files: Mapping[str, bytes]) -> dict[str, Entry]:
    """Read the emoji that have a topic, skin tones included, by their code points in lower case without FE0F."""
    messages = json.loads(files["en/messages.json"])
    groups = {group["order"]: group["message"].replace("&", "and") for group in messages["groups"]}
    parts = next(group["order"] for group in messages["groups"] if group["key"] == "component")
    entries = {}
    for item in json.loads(files["en/data.json"]):
        if item.get("group") in (None, parts):
            continue
        base, tags = slug(item["label"]), tuple(item.get("tags", ()))
        for one in (item, *item.get("skins", ())):
            if isinstance(one.get("tone"), list):
                continue  # two people of different tones
            name, label, tone = slug(one["label"]), readable(one["label"]), one.get("tone")
            tone = "" if tone is None else SKIN_TONES[tone - 1]
            entries[code_points(one["hexcode"])] = Entry(name, label, groups[item["group"]], tags, base, tone)
    return entries


def code_points(text: str) -> str:
    """Normalize code points for comparison: "0023-FE0F-20E3" is "23-20e3"."""
    return "-".join(part.lstrip("0") for part in text.lower().split("-") if part != "fe0f")


def find_entry(icon: str, aliases: Sequence[str], points: Sequence[str], entries: Mapping[str, Entry],
               by_name: Mapping[str, Entry]) -> Entry | None:  # fmt: skip
    """Find the entry of an icon by its code points, its name, or another name that its set has for it."""
    for point in points:
        if (entry := entries.get(code_points(point))) is not None:
            return entry
    for name in (icon, *aliases):
        spellings = [name, name.replace("flag-for-flag-", "flag-").replace("flag-for-", "flag-")]
        spellings += [re.sub(f"-({'|'.join(SKIN_TONES)})$", r"-\1-skin-tone", name)]
        for spelling in spellings:
            if spelling in by_name:
                return by_name[spelling]
    return None


# --- drawings


def svg_drawings(style: str, files: Mapping[str, bytes], entries: Mapping[str, Entry]) -> Iterator[Drawing]:
    """Yield the drawings of an Iconify package that have an entry, the first of each name."""
    from resvg_py import svg_to_bytes

    icons, points = json.loads(files["icons.json"]), {}
    for point, icon in json.loads(files.get("chars.json", b"{}")).items():
        points.setdefault(icon, []).append(point)
    aliases: dict[str, list[str]] = {}
    for alias, target in icons.get("aliases", {}).items():
        if set(target) == {"parent"}:  # others are turned or mirrored
            aliases.setdefault(target["parent"], []).append(alias)
    by_name = {entry.name: entry for entry in entries.values()}
    for name, icon in sorted(icons["icons"].items()):
        entry = find_entry(name, aliases.get(name, ()), points.get(name, ()), entries, by_name)
        if icon.get("hidden") or entry is None:
            continue
        left, top, width, height = (icon.get(key, icons.get(key, default)) for key, default in
                                    (("left", 0), ("top", 0), ("width", 16), ("height", 16)))  # fmt: skip
        side = max(width, height)  # a few are not square
        left, top = left - (side - width) / 2, top - (side - height) / 2
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}">{icon["body"]}</svg>'
        )

        def draw(size: int, svg: str = svg) -> PIL.Image.Image:
            png = svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
            return PIL.Image.open(io.BytesIO(bytes(png))).convert("RGBA")

        yield Drawing(entry, style, draw)


def webp_drawings(style: str, files: Mapping[str, bytes], entries: Mapping[str, Entry]) -> Iterator[Drawing]:
    """Yield the drawings of a package of WebP files that are named by code points."""
    for name, content in sorted(files.items()):
        entry = entries.get(code_points(Path(name).stem)) if name.endswith(".webp") else None
        if entry is None:
            continue

        def draw(size: int, content: bytes = content) -> PIL.Image.Image:
            picture = PIL.Image.open(io.BytesIO(content)).convert("RGBa")  # premultiplied: no dark rims
            return picture.resize((size, size), PIL.Image.Resampling.LANCZOS, reducing_gap=None).convert("RGBA")

        yield Drawing(entry, style, draw)


def drawings_of(style: str, files: Mapping[str, bytes], entries: Mapping[str, Entry]) -> list[Drawing]:
    """List the drawings of a style, one of each name, by name.

    Raises:
        ValueError: if the package holds none that has a name.
    """
    find = svg_drawings if "icons.json" in files else webp_drawings
    found: dict[str, Drawing] = {}
    for drawing in find(style, files, entries):
        found.setdefault(drawing.entry.name, drawing)
    if not found:
        raise ValueError(f"The package of style {style!r} has no drawing with a known name.")
    return [found[name] for name in sorted(found)]


# --- splits and captions


def share_of(*key: str) -> float:
    """Return a number in [0, 1) that follows from the words alone."""
    digest = hashlib.sha256("/".join(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(entry: Entry, style: str) -> str:
    """Return the split of a drawing. A skin tone is where its base is, or in `skin_tones` if that is in `train`."""
    if share_of("unseen name", entry.base) < UNSEEN_NAMES:
        return "unseen_names"
    if share_of("held-out pair", entry.base, style) < HELDOUT_PAIRS:
        return "heldout_pairs"
    return "skin_tones" if entry.skin_tone else "train"


def choose(options: Sequence[str], *key: str) -> str:
    """Choose one of the options by the words of the key."""
    return options[int(share_of(*key) * len(options))]


def text_caption(entry: Entry, style: str) -> str:
    """Write a caption of label and style: "a red apple in the Twemoji style"."""
    words = STYLE_WORDS[style]
    thing = choose((entry.label, with_article(entry.label)), "article", entry.name, style)
    patterns = ("{thing} in the {words} style", "{words} emoji of {thing}", "{thing}, {words} style")
    return choose(patterns, "text", entry.name, style).format(thing=thing, words=words)


def long_caption(entry: Entry, style: str, colors: Sequence[str]) -> str:
    """Write a caption of sentences: label and style, synonyms, group, and colors."""
    key, words, thing = (entry.name, style), STYLE_WORDS[style], with_article(entry.label)
    first = choose(
        (
            "An emoji of {thing} in the {words} style.",
            "A drawing of {thing}, {words} style.",
            "{words} drawing of {thing} on a white background.",
            "This is {thing}, drawn in the {words} style.",
        ),
        "long",
        *key,
    ).format(thing=thing, words=words)
    words = set(re.split(r"\W+", entry.label.lower()))
    new = [tag for tag in entry.tags if tag.lower() not in words]
    new = sorted(new, key=lambda tag: share_of("tag", tag, *key))[: int(1 + 4 * share_of("tags", *key))]
    rest = []
    if new:
        pattern = choose(("Related words: {}.", "It stands for {}.", "Keywords: {}."), "tag sentence", *key)
        rest.append(pattern.format(", ".join(new)))
    rest.append(choose(("Group: {}.", "It belongs to {}."), "group", *key).format(entry.group))
    if colors:
        pattern = choose(("Colors: {}.", "Its main colors are {}.", "It is mostly {}."), "color", *key)
        if len(colors) == 1:
            pattern = choose(("Color: {}.", "Its main color is {}.", "It is mostly {}."), "color", *key)
        rest.append(pattern.format(enumerate_words(colors)))
    rest.sort(key=lambda sentence: share_of("order", sentence, *key))
    return " ".join([first, *rest])


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB (..., 3) in [0, 255] to CIELAB under D65."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    xyz = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def main_colors(picture: PIL.Image.Image) -> list[str]:
    """List at most three color words of an RGBA picture, of the largest share first."""
    pixels = np.asarray(picture, dtype=np.float64).reshape(-1, 4)
    weight = pixels[:, 3] / 255
    distances = ((to_lab(pixels[:, None, :3]) - to_lab(np.array(list(COLORS.values()), dtype=float))) ** 2).sum(-1)
    shares = np.bincount(distances.argmin(1), weight, len(COLORS)) / max(weight.sum(), 1e-9)
    order = np.argsort(-shares, kind="stable")[:3]
    return [list(COLORS)[i] for i in order if shares[i] >= COLOR_SHARE]


# --- writing


def make_row(drawing: Drawing, size: int) -> dict[str, Any]:
    """Draw and caption one drawing.

    Raises:
        ValueError: if it comes out in another size, or empty.
    """
    picture, entry, style = drawing.draw(size), drawing.entry, drawing.style
    if picture.size != (size, size) or picture.getextrema()[3][1] == 0:
        raise ValueError(f"{style}/{entry.name} is empty or has the size {picture.size}: update resvg-py.")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {
        "image": {"bytes": file.getvalue(), "path": f"{style}-{entry.name}.png"},
        "name": entry.name,
        "style": style,
        "group": entry.group,
        "skin_tone": entry.skin_tone,
        "label": entry.label,
        "text": text_caption(entry, style),
        # of one size, so that captions do not depend on it
        "long": long_caption(entry, style, main_colors(picture if size == 64 else drawing.draw(64))),
    }


def write_split(rows: Sequence[dict[str, Any]], split: str, folder: Path) -> None:
    """Write the rows of a split in a mixed order, as parquet files."""
    columns = ("name", "style", "group", "skin_tone", "label", "text", "long")
    features = datasets.Features({"image": datasets.Image(), **{name: datasets.Value("string") for name in columns}})
    rows = sorted(rows, key=lambda row: share_of("order", row["name"], row["style"]))
    count = -(-len(rows) // ROWS_PER_FILE)
    for number in range(count):
        part = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
        path = folder / f"{split}-{number:05d}-of-{count:05d}.parquet"
        table = datasets.Dataset.from_list(list(part), features=features).data.table
        pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)


def write_card(folder: Path) -> None:
    """Write the README.md from which `datasets` knows the splits: by file names it would see `train` alone."""
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in SPLITS:
        if any(folder.glob(f"{split}-*.parquet")):
            lines += [f"  - split: {split}", f"    path: {split}-*.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def write_licenses(styles: Sequence[str], output_dir: Path) -> None:
    """Write who drew what under which license, with the license texts that have to go along."""
    lines = [
        "# Licenses and attribution",
        "",
        "| style | author | license | source | npm package |",
        "|---|---|---|---|---|",
    ]
    for name in styles:
        style = STYLES[name]
        license = f"[{style.license}]({LICENSE_URLS[style.license]})"
        package = f"{style.package.name} {style.package.version}"
        lines.append(f"| {name} | {style.author} | {license} | {style.source} | {package} |")
    lines += [
        "",
        f"Names, groups and synonyms: emojibase-data {NAMES.version} (MIT, Miles Johnson), after Unicode CLDR.",
        "",
        "Changes: the drawings were rendered or resized to small pictures and captioned from these names and from "
        "their colors.",
        "",
        "## MIT license of the Fluent drawings (Copyright (c) Microsoft Corporation) and of emojibase-data (Copyright "
        "(c) Miles Johnson)",
        "",
        MIT,
    ]
    (output_dir / "LICENSES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if any(STYLES[name].license == "Apache-2.0" for name in styles):
        shutil.copy(Path(__file__).resolve().parents[2] / "LICENSE", output_dir / "LICENSE-Apache-2.0.txt")


def fetch_emoji(args: argparse.Namespace) -> None:
    """Fetch, draw, caption and write the data set.

    Raises:
        ValueError: for a missing renderer or client, or packages that are not what they should be.
    """
    try:
        import resvg_py  # noqa: F401 - before the download
    except ImportError as error:
        raise ValueError("resvg-py draws the SVGs and is missing: pip install -e '.[emoji]'") from error
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.packages_dir or Path(temporary)
        packages = [NAMES, *(STYLES[style].package for style in args.styles)]
        if args.packages_dir is None:
            fetch_packages(packages, folder)
        entries = read_entries(open_package(NAMES, folder))
        drawings = [
            drawing
            for style in args.styles
            for drawing in drawings_of(style, open_package(STYLES[style].package, folder), entries)
        ]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_licenses(args.styles, args.output_dir)  # first, so that no data is there without them
    for size in args.sizes:
        rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for drawing in tqdm(drawings, desc=f"drawing at {size} px", disable=None):
            rows[split_of(drawing.entry, drawing.style)].append(make_row(drawing, size))
        with tempfile.TemporaryDirectory(prefix=f".{size}-", suffix=".unfinished", dir=args.output_dir) as unfinished:
            content = Path(unfinished) / str(size)
            content.mkdir()
            for split in SPLITS:
                write_split(rows[split], split, content)
            write_card(content)
            os.replace(content, args.output_dir / str(size))
        print(f"{args.output_dir / str(size)}: " + ", ".join(f"{split} {len(rows[split])}" for split in SPLITS))
    print("drawings by style:", dict(Counter(drawing.style for drawing in drawings)))


def main(argv: list[str] | None = None) -> None:
    try:
        fetch_emoji(parse_args(argv))
    except (ValueError, OSError) as error:  # no network, a damaged package, a full disk
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
