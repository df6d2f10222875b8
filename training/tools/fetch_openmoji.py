"""Make a data set of captioned drawings out of OpenMoji: `python training/tools/fetch_openmoji.py --output_dir DIR`.

Downloads the npm package `openmoji` (4 MB), checks its hash, draws the colored SVGs on white and captions them from
the annotations, groups and tags that come with them. Needs the extra: `pip install -e '.[emoji]'`.
DIR then holds, at most 1000 drawings to a shard, always in the same mixed order:

| | columns |
|---|---|
| parquet/train-*.parquet | image, text, text_short, tags |
| webdataset/*.tar | .png, .txt with text, .json with text, text_short and tags |
| imagefolder/ | PNGs, metadata.jsonl with text, text_short and tags |
| LICENSE.txt, ATTRIBUTION.md | what whoever passes the data on has to pass on with it |

`text` is a caption in sentences, `text_short` the annotation, `tags` keywords with commas. The same version and size
give the same pixels and texts.
"""

import argparse
import base64
import collections
import hashlib
import http.client
import io
import json
import os
import re
import tarfile
import tempfile
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pyarrow.parquet as pq
from tqdm import tqdm

from diffusers_prx.cli import exit_with_error, parse_flags, path

VERSION = "17.0.0"
REGISTRY = "https://registry.npmjs.org"
TIMEOUT = 60.0  # seconds without an answer
SHARD_SAMPLES = 1000
ROW_GROUP = 100
UNFINISHED = ".unfinished"

# Groups say what a drawing is of, but for these, which say where it comes from.
GROUPS_OF_ORIGIN = ("extras-openmoji", "extras-unicode", "component")
# In names of subgroups: "animal-bird" is a kind of animal, whereas "country-flag" is one term.
KINDS = ("animal", "face", "food", "hand", "person", "place", "plant", "transport")
ABBREVIATIONS = {"alphanum": "letters and digits", "av-symbol": "audio and video", "ui-element": "user interface"}
PAIRS = (
    "animals-nature", "arts-crafts", "book-paper", "climate-environment", "food-drink", "light-video", "people-body",
    "sky-weather", "smileys-emotion", "travel-places",
)  # fmt: skip

ATTRIBUTION = """# Attribution

All emojis designed by [OpenMoji](https://openmoji.org/) - the open-source emoji and icon project.
License: [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/), the full text is in LICENSE.txt.

Source: version {version} of the npm package `openmoji`, {url}

Changes: the colored SVG drawings were rendered at {size} x {size} pixels on white; captions were made from their
annotations, groups and tags. This data set is under the same license.

Drawn by: {authors}.
"""


@dataclass(frozen=True)
class Sample:
    """One drawing: the code points that name it, a PNG, and its texts."""

    hexcode: str
    png: bytes
    text: str
    text_short: str
    tags: str

    def texts(self) -> dict[str, str]:
        return {"text": self.text, "text_short": self.text_short, "tags": self.tags}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=path, required=True, help="Folder of the data set.")
    parser.add_argument("--size", type=int, default=64, help="Side of the pictures in pixels.")
    parser.add_argument("--format", default=",".join(WRITERS), help="Which of them to write, with commas between.")
    parser.add_argument("--version", default=VERSION, help="Of the npm package.")
    parser.add_argument("--registry", default=REGISTRY, help="Where npm packages come from: a mirror of your own.")
    parser.add_argument(
        "--skin_tones",
        action="store_true",
        help="Also the same persons and hands in five skin tones, nearly as many drawings as all others.",
    )
    args = parse_flags(parser, argv)
    if args.size < 1:
        parser.error(f"--size must be at least 1, got {args.size}")
    args.formats = list(dict.fromkeys(args.format.split(",")))
    for name in args.formats:
        if name not in WRITERS:
            parser.error(f"--format has {name!r}; accepted: {', '.join(WRITERS)}")
        if (args.output_dir / name).exists():  # shards of another run would be mixed with ours
            parser.error(f"--output_dir: {args.output_dir / name} is there already; remove it or choose another")
    return args


# --- from the registry


def download(url: str) -> bytes:
    """What is at an address.

    Raises:
        ValueError: if it cannot be had, with the reason.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answers {error.code} ({error.reason}): is there such a `--version`?") from error
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"{url} cannot be reached ({error}). The network is needed; behind a proxy set HTTPS_PROXY, and with a "
            "mirror of npm give `--registry`."
        ) from error


def check_integrity(content: bytes, integrity: str) -> None:
    """Compare with a hash as npm writes it: `sha512-` and base64, perhaps others beside it.

    Raises:
        ValueError: if it is another one, or there is no sha512.
    """
    expected = [entry for entry in integrity.split() if entry.startswith("sha512-")]
    found = f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"
    if found not in expected:
        raise ValueError(
            f"The package has the hash {found}, but the registry says {integrity!r}: the download is broken or not "
            "what was published. Nothing was written; try again."
        )


def fetch_package(registry: str, version: str) -> tuple[bytes, dict[str, Any]]:
    """The package's tar.gz, with its hash checked, and what the registry says of it.

    Raises:
        ValueError: without network, for a version that is not there, or a hash that is wrong.
    """
    address = f"{registry.rstrip('/')}/openmoji/{version}"
    answer = download(address)
    try:
        release = json.loads(answer)
        url, integrity = release["dist"]["tarball"], release["dist"]["integrity"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{address} does not answer as a registry of npm: {answer[:80]!r}") from error
    package = download(url)
    check_integrity(package, integrity)
    return package, release


def read_package(package: bytes) -> tuple[list[dict[str, Any]], dict[str, str], str]:
    """(entries of openmoji.json, the colored SVGs by code points, the license); nothing is unpacked to the disk.

    Raises:
        ValueError: if one of them is missing.
    """
    texts: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for member in archive:
            name = member.name.partition("/")[2]  # below the folder `package`
            if name in ("data/openmoji.json", "LICENSE.txt") or re.fullmatch(r"color/svg/[^/]+\.svg", name):
                file = archive.extractfile(member)
                assert file is not None
                texts[name] = file.read().decode()
    drawings = {Path(name).stem: text for name, text in texts.items() if name.endswith(".svg")}
    missing = [name for name in ("data/openmoji.json", "LICENSE.txt") if name not in texts]
    if missing or not drawings:
        raise ValueError(f"The package is laid out in another way: it has no {' and no '.join(missing or ['SVGs'])}.")
    return json.loads(texts["data/openmoji.json"]), drawings, texts["LICENSE.txt"]


# --- choosing and captioning


def choose_entries(
    entries: Sequence[dict[str, Any]], drawings: dict[str, str], skin_tones: bool
) -> tuple[list[dict[str, Any]], str]:
    """The entries of the data set, and how many there are of what.

    Skin-tone variants are the same drawing in another color: with them half of the data set would be a few hundred
    persons and hands, and a validation set would hold what the training has seen. Entries without a drawing, and names
    with U+FFFD, which stands for a sign lost upstream, are always left out.

    The order is that of a hash of the code points: mixed, because streams read shards from front to back, and the same
    everywhere.
    """
    variants = sum(bool(entry["skintone"]) for entry in entries)
    drawn = [entry for entry in entries if entry["hexcode"] in drawings]
    whole = [entry for entry in drawn if "\ufffd" not in entry["annotation"]]
    kept = [entry for entry in whole if skin_tones or not entry["skintone"]]
    parts = [
        f"OpenMoji has {len(entries)} drawings",
        f"{variants} of them skin-tone variants, which are {'kept' if skin_tones else 'left out (see --skin_tones)'}",
        f"{len(entries) - len(drawn)} without an SVG and {len(drawn) - len(whole)} with a broken name are left out",
        f"{len(kept)} remain",
    ]
    return sorted(kept, key=lambda entry: hashlib.sha256(entry["hexcode"].encode()).digest()), "; ".join(parts)


def readable_name(annotation: str) -> str:
    """An annotation without its colon: "flag: Peru" is "flag of Peru", "family: man, boy" is "family (man, boy)"."""
    head, _, details = annotation.partition(": ")
    if not details:
        return annotation
    return f"flag of {details}" if head == "flag" else f"{head} ({details})"


def topics(group: str, subgroup: str) -> list[str]:
    """What the names of a group and a subgroup say of the drawing: "people-body", "person-sport" give "people and
    body", "person", "sport"; each is said once: "animals-nature", "animal-bird" give "animals and nature", "bird"."""
    found: list[str] = []
    for name in ([] if group in GROUPS_OF_ORIGIN else [group]) + [subgroup]:
        kind, _, rest = name.partition("-")
        if name in ABBREVIATIONS:
            terms = [ABBREVIATIONS[name]]
        elif name in PAIRS:
            terms = [name.replace("-", " and ")]
        elif kind in KINDS and rest:
            terms = [kind, rest.replace("-", " ")]
        else:
            terms = [re.sub(r"^other-|-other$", "", name).replace("-", " ")]
        said = " ".join(found).split()
        found += [term for term in terms if term not in ("other", *found, *said) and f"{term}s" not in said]
    return found


def keywords(entry: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """The tags, each once; a skin-tone variant has none of its own and takes those of the drawing it was made from."""
    found: dict[str, str] = {}
    for tag in ",".join([entry["tags"] or base["tags"], entry["openmoji_tags"] or base["openmoji_tags"]]).split(","):
        if tag.strip() and "\ufffd" not in tag:
            found.setdefault(tag.strip().lower(), tag.strip())
    return list(found.values())


def enumerate_words(words: Sequence[str]) -> str:
    """ "a, b and c" """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def long_caption(entry: dict[str, Any], tags: Sequence[str]) -> str:
    """Sentences of what is drawn, its topics, and the keywords that are not already in its name."""
    name = readable_name(entry["annotation"])
    said = {name.lower(), *re.split(r"[\s(),]+", name.lower())}
    sentences = [
        f"A flat emoji drawing on a white background: {name}.",
        f"It is filed under {', '.join(topics(entry['group'], entry['subgroups']))}.",
    ]
    if new := [tag for tag in tags if tag.lower() not in said]:
        sentences.append(f"Its {'keyword is' if len(new) == 1 else 'keywords are'} {enumerate_words(new)}.")
    return " ".join(sentences)


# --- drawing


def find_renderer() -> Callable[..., bytes]:
    """resvg's renderer.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise ValueError("resvg-py draws the SVGs and is missing: pip install -e '.[emoji]'") from error
    return svg_to_bytes


def draw(svg: str, size: int, renderer: Callable[..., bytes]) -> PIL.Image.Image:
    """An SVG as an RGB picture of `size` pixels a side, on white. No fonts are read: OpenMoji has paths only.

    Raises:
        ValueError: if it comes out in another size, as with resvg-py before 0.2.6, or because it is no square.
    """
    png = renderer(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    picture = PIL.Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if picture.size != (size, size):
        raise ValueError(f"A drawing has {picture.size} pixels in place of {size} x {size}: update resvg-py.")
    return picture


def make_samples(
    entries: Sequence[dict[str, Any]], drawings: dict[str, str], bases: dict[str, dict[str, Any]], size: int
) -> list[Sample]:
    """Draw and caption entries; `bases` has all entries by code points."""
    renderer = find_renderer()
    samples = []
    for entry in tqdm(entries, desc="Drawing", disable=None):
        file = io.BytesIO()
        draw(drawings[entry["hexcode"]], size, renderer).save(file, "PNG")
        tags = keywords(entry, bases.get(entry["skintone_base_hexcode"], entry))
        samples.append(
            Sample(entry["hexcode"], file.getvalue(), long_caption(entry, tags), entry["annotation"], ", ".join(tags))
        )
    return samples


# --- writing


def shards(samples: Sequence[Sample]) -> Iterator[tuple[int, int, Sequence[Sample]]]:
    """(number, how many there are, samples) of shards of nearly equal size, at most SHARD_SAMPLES."""
    count = -(-len(samples) // SHARD_SAMPLES)
    for number in range(count):
        yield number, count, samples[number * len(samples) // count : (number + 1) * len(samples) // count]


def write_parquet(samples: Sequence[Sample], folder: Path) -> None:
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "text": text, "text_short": text, "tags": text})
    for number, count, part in shards(samples):
        rows = [{"image": {"bytes": s.png, "path": f"{s.hexcode}.png"}, **s.texts()} for s in part]
        path = folder / f"train-{number:05d}-of-{count:05d}.parquet"
        # small groups of rows: a stream holds one at a time
        pq.write_table(datasets.Dataset.from_list(rows, features=features).data.table, path, row_group_size=ROW_GROUP)


def write_webdataset(samples: Sequence[Sample], folder: Path) -> None:
    for number, _, part in shards(samples):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for sample in part:
                description = json.dumps(sample.texts(), ensure_ascii=False).encode()
                for ending, content in (("png", sample.png), ("txt", sample.text.encode()), ("json", description)):
                    member = tarfile.TarInfo(f"{sample.hexcode}.{ending}")  # its time is 0: the same bytes every time
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def write_imagefolder(samples: Sequence[Sample], folder: Path) -> None:
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for sample in samples:
            (folder / f"{sample.hexcode}.png").write_bytes(sample.png)
            row = {"file_name": f"{sample.hexcode}.png", **sample.texts()}
            metadata.write(json.dumps(row, ensure_ascii=False) + "\n")


WRITERS: dict[str, Callable[[Sequence[Sample], Path], None]] = {
    "parquet": write_parquet,
    "webdataset": write_webdataset,
    "imagefolder": write_imagefolder,
}


def write_whole(samples: Sequence[Sample], output_dir: Path, name: str) -> Path:
    """Write a format whole or not at all; returns its folder."""
    with tempfile.TemporaryDirectory(prefix=f".{name}-", suffix=UNFINISHED, dir=output_dir) as unfinished:
        content = Path(unfinished) / name
        content.mkdir()
        WRITERS[name](samples, content)
        os.replace(content, output_dir / name)
    return output_dir / name


def write_license(output_dir: Path, license: str, entries: Sequence[dict[str, Any]], **about: Any) -> None:
    """LICENSE.txt and ATTRIBUTION.md; authors are those of `entries`."""
    names = unicodedata.normalize("NFC", ",".join(entry["openmoji_author"] for entry in entries)).split(",")
    (output_dir / "LICENSE.txt").write_text(license, encoding="utf-8")
    text = ATTRIBUTION.format(authors=", ".join(sorted({name.strip() for name in names} - {""})), **about)
    (output_dir / "ATTRIBUTION.md").write_text(text, encoding="utf-8")


def fetch_openmoji(args: argparse.Namespace) -> None:
    """What the script does.

    Raises:
        ValueError: without network or renderer, or for a package that is not what it should be.
    """
    find_renderer()  # before the download
    package, release = fetch_package(args.registry, args.version)
    entries, drawings, license = read_package(package)
    chosen, counts = choose_entries(entries, drawings, args.skin_tones)
    print(counts)
    samples = make_samples(chosen, drawings, {entry["hexcode"]: entry for entry in entries}, args.size)
    alike = collections.Counter(sample.png for sample in samples)
    lengths = sorted(len(sample.text.split()) for sample in samples)
    print(
        f"{sum(count for count in alike.values() if count > 1)} share their picture with another of another name; "
        f"captions have {lengths[0]} to {lengths[-1]} words, median {lengths[len(lengths) // 2]}"
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_license(
        args.output_dir, license, chosen, version=release["version"], url=release["dist"]["tarball"], size=args.size
    )
    for name in args.formats:
        print(f"{len(samples)} samples in {write_whole(samples, args.output_dir, name)}")


def main(argv: list[str] | None = None) -> None:
    try:
        fetch_openmoji(parse_args(argv))
    except (ValueError, OSError) as error:  # no network, a package that is not what it should be, a full disk
        exit_with_error(error)


if __name__ == "__main__":
    main()
