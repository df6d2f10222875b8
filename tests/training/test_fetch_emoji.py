"""The data set of emoji drawings: made twice from small packages of our own, and refused when a package is damaged."""

import base64
import dataclasses
import hashlib
import io
import json
import subprocess
import tarfile
from collections import Counter

import datasets
import numpy as np
import PIL.Image
import pytest
from training.tools import fetch_emoji as tool

from diffusers_prx.data.sources import load_source

pytest.importorskip("resvg_py")

LABELS = [
    ("red apple", "1F34E", ["fruit", "healthy"]),
    ("waving hand", "1F44B", ["hello"]),
    ("flag: Peru", "1F1F5-1F1EA", []),
    *((f"thing number {n}", f"{0x1F900 + n:X}", ["thing"]) for n in range(60)),
]


def circle(color: str) -> str:
    return f'<circle cx="8" cy="8" r="7" fill="{color}"/>'


def icons() -> dict:
    bodies = {tool.slug(label): {"body": circle("#d8202a")} for label, _, _ in LABELS}
    bodies["waving-hand-dark"] = {"body": circle("#7a4e36")}  # as one set names its skin tones
    bodies["brand-logo"] = {"body": circle("#000")}
    bodies["peru-old"] = bodies.pop("flag-peru")
    bodies["red-apple"] = {"body": '<rect width="16" height="8" fill="#2a6fd6"/>', "height": 8}
    return {"icons": bodies, "aliases": {"flag-peru": {"parent": "peru-old"}}, "width": 16, "height": 16}


def names() -> tuple[dict, list]:
    groups = [
        {"key": "things", "message": "food & drink", "order": 0},
        {"key": "component", "message": "", "order": 1},
    ]
    data: list[dict] = [{"label": label, "hexcode": code, "tags": tags, "group": 0} for label, code, tags in LABELS]
    tones = [(5, "waving hand: dark skin tone"), ([1, 5], "two tones")]
    data[1]["skins"] = [
        {"label": label, "hexcode": f"1F44B-{n}", "group": 0, "tone": tone} for n, (tone, label) in enumerate(tones)
    ]
    data.append({"label": "regional indicator A", "hexcode": "1F1E6"})
    return {"groups": groups}, data


def webp() -> bytes:
    picture = PIL.Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    picture.paste((40, 110, 215, 255), (8, 8, 24, 24))
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=True)
    return file.getvalue()


def pack(folder, package: tool.Package, files: dict[str, bytes]) -> tool.Package:
    with tarfile.open(folder / package.file, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    digest = hashlib.sha512((folder / package.file).read_bytes()).digest()
    return dataclasses.replace(package, sha512=base64.b64encode(digest).decode())


@pytest.fixture
def packages(tmp_path, monkeypatch):
    folder = tmp_path / "packages"
    folder.mkdir()
    messages, data = names()
    texts = {"en/messages.json": json.dumps(messages).encode(), "en/data.json": json.dumps(data).encode()}
    monkeypatch.setattr(tool, "NAMES", pack(folder, tool.NAMES, texts))
    styles = {}
    for name, files in (
        ("noto", {"icons.json": json.dumps(icons()).encode()}),
        ("fluent-3d", {"assets/1f34e.webp": webp(), "assets/1f44b-fe0f.webp": webp(), "package.json": b"{}"}),
    ):
        style = tool.STYLES[name]
        styles[name] = dataclasses.replace(style, package=pack(folder, style.package, files))
    monkeypatch.setattr(tool, "STYLES", styles)
    return folder


def make(output_dir, packages, *flags) -> None:
    tool.main(["--output_dir", str(output_dir), "--packages_dir", str(packages), "--sizes", "32", *flags])


def read(output_dir) -> dict:
    rows = {}
    for file in sorted((output_dir / "32").glob("*.parquet")):
        split = file.name.split("-")[0]
        for row in datasets.Dataset.from_parquet(str(file), cache_dir=str(output_dir / "cache")):
            rows[row["style"], row["name"]] = row | {"split": split}
    return rows


def test_two_runs_write_the_same_bytes(tmp_path, packages):
    for name in ("a", "b"):
        make(tmp_path / name, packages)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert {"LICENSES.md", "LICENSE-Apache-2.0.txt"} < {str(file) for file in files}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_training_finds_every_split(tmp_path, packages):
    make(tmp_path / "data", packages)
    counts = Counter(row["split"] for row in read(tmp_path / "data").values())
    assert len(counts) > 1
    for split, count in counts.items():
        assert len(load_source(str(tmp_path / "data" / "32"), split=split, caption_columns=("label",))) == count


def test_drawings_are_named_captioned_and_split(tmp_path, packages):
    make(tmp_path / "data", packages)
    rows = read(tmp_path / "data")
    assert len(rows) == len(LABELS) + 1 + 2  # one skin tone; two of the other style; no logo, no pair of tones
    apple = rows["noto", "red-apple"]
    assert (apple["label"], apple["group"], apple["skin_tone"]) == ("red apple", "food and drink", "")
    assert "Noto" in apple["text"]
    assert "red apple" in apple["text"]
    assert "blue" in apple["long"]
    assert "food and drink" in apple["long"]
    assert rows["noto", "flag-peru"]["label"] == "flag of Peru"  # found by an alias of its set
    hand = rows["noto", "waving-hand-dark-skin-tone"]
    assert (hand["label"], hand["skin_tone"]) == ("waving hand with dark skin tone", "dark")
    assert hand["split"] != "train"
    pixels = np.asarray(apple["image"])
    assert pixels.shape == (32, 32, 4)
    assert pixels[2, 16, 3] == 0
    assert pixels[16, 16, 3] == 255
    square = np.asarray(rows["fluent-3d", "red-apple"]["image"])
    assert square[16, 16].tolist() == [40, 110, 215, 255]
    assert not square[square[..., 3] > 0][:, 0].max() > 60  # no red of the invisible pixels at the rim


def entry(name: str, base: str | None = None) -> tool.Entry:
    return tool.Entry(name, name, "group", (), base or name, "" if base is None else "dark")


def test_splits_have_their_shares_and_keep_names_and_tones_together():
    styles = list(tool.STYLES)
    counts = Counter(tool.split_of(entry(f"name {n}"), style) for n in range(2000) for style in styles)
    total = 2000 * len(styles)
    assert 0.02 < counts["unseen_names"] / total < 0.04
    assert 0.085 < counts["heldout_pairs"] / total < 0.11
    assert counts["skin_tones"] == 0
    for n in range(300):
        splits = [tool.split_of(entry(f"name {n}"), style) for style in styles]
        assert ("unseen_names" in splits) == (set(splits) == {"unseen_names"})
        for style, split in zip(styles, splits):
            tone = tool.split_of(entry(f"name {n} dark", f"name {n}"), style)
            assert tone == ("skin_tones" if split == "train" else split)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("man: red hair", "man with red hair"),
        ("person: dark skin tone, beard", "person with dark skin tone and beard"),
        ("family: man, boy", "family (man, boy)"),
        ("keycap: 1", "keycap 1"),
        ("Japanese “here” button", "Japanese here button"),
    ],
)
def test_labels_are_readable(label, expected):
    assert tool.readable(label) == expected


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("red apple", "a red apple"),
        ("orange heart", "an orange heart"),
        ("grapes", "grapes"),
        ("octopus", "an octopus"),
        ("flag of Peru", "the flag of Peru"),
        ("1st place medal", "1st place medal"),
        ("woman with red hair", "a woman with red hair"),
    ],
)
def test_articles(label, expected):
    assert tool.with_article(label) == expected


def test_colors_are_named_by_their_share_of_what_is_drawn():
    picture = PIL.Image.new("RGBA", (10, 10), (0, 255, 0, 0))  # transparent: green does not count
    picture.paste((255, 140, 30, 255), (0, 0, 10, 4))
    picture.paste((35, 31, 32, 255), (0, 4, 10, 5))
    picture.putpixel((0, 9), (40, 110, 215, 255))
    assert tool.main_colors(picture) == ["orange", "black"]
    for name, color in tool.COLORS.items():
        assert tool.main_colors(PIL.Image.new("RGBA", (2, 2), (*color, 255))) == [name]


def test_a_damaged_package_is_refused_and_nothing_is_written(tmp_path, packages):
    file = next(packages.glob("*noto*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=file.name):
        make(tmp_path / "data", packages)
    assert not (tmp_path / "data").exists()


def test_what_an_interruption_leaves_is_complete(tmp_path, packages, monkeypatch):
    """It comes in the second size: the first one has its licenses, and the second does not exist until it is made."""
    make_row = tool.make_row

    def interrupted(drawing, size):
        if size == 48:
            raise OSError("no space left")
        return make_row(drawing, size)

    monkeypatch.setattr(tool, "make_row", interrupted)
    with pytest.raises(SystemExit, match="no space left"):
        make(tmp_path / "data", packages, "--sizes", "32", "48")
    assert {file.name for file in (tmp_path / "data").iterdir()} == {"32", "LICENSES.md", "LICENSE-Apache-2.0.txt"}
    monkeypatch.setattr(tool, "make_row", make_row)
    make(tmp_path / "data", packages, "--sizes", "48")
    assert len(list((tmp_path / "data" / "48").glob("*.parquet"))) == len(
        list((tmp_path / "data" / "32").glob("*.parquet"))
    )


def test_a_missing_package_is_named_with_the_command_that_fetches_it(tmp_path, packages):
    file = next(packages.glob("*noto*"))
    file.unlink()
    with pytest.raises(SystemExit, match=r"packages_dir.*npm pack"):
        make(tmp_path / "data", packages)


def test_without_npm_or_network_it_is_said_how_to_go_on(tmp_path, packages, monkeypatch):
    fetch = ["--output_dir", str(tmp_path / "data")]
    monkeypatch.setattr(tool.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"npm is missing.*--packages_dir"):
        tool.main(fetch)
    monkeypatch.setattr(tool.shutil, "which", lambda name: "npm")
    stderr = "npm error code ENOTFOUND\nnpm error network request failed\n"
    stderr += "npm error A complete log of this run can be found in: x"
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(tool.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit, match=r"network request failed.*--packages_dir"):
        tool.main(fetch)


@pytest.mark.parametrize("flags", [["--styles", "crayons"], ["--sizes", "8"]])
def test_wrong_flags_are_refused(tmp_path, packages, flags, capsys):
    with pytest.raises(SystemExit) as error:
        tool.main(["--output_dir", str(tmp_path), *flags])
    assert error.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_an_existing_output_is_kept(tmp_path, packages, capsys):
    make(tmp_path, packages)
    with pytest.raises(SystemExit):
        make(tmp_path, packages)
    assert "--output_dir" in capsys.readouterr().err
