"""OpenMoji made into a data set, from a small package of the same layout behind a registry on this machine."""

import base64
import hashlib
import http.server
import importlib.util
import io
import json
import sys
import tarfile
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
from training.tools import fetch_openmoji
from training.tools.fetch_openmoji import keywords, long_caption, main, readable_name, topics

from diffusers_prx.data.sources import load_source, load_stream

needs_renderer = pytest.mark.skipif(
    importlib.util.find_spec("resvg_py") is None, reason="resvg-py is missing: pip install -e '.[emoji]'"
)

VERSION = "1.2.3"
# a red square on the right half, nothing on the left, drawn as large as OpenMoji draws
SVG = (
    '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><path fill="{color}" d="M36 0 H72 V72 H36 Z"/></svg>'
)
COLORS = {"1F600": "#ff0000", "1F44B": "#00ff00", "1F44B-1F3FB": "#0000ff", "E000": "#000000"}


def entry(hexcode: str, annotation: str, **changes) -> dict:
    return {
        "hexcode": hexcode,
        "group": "people-body",
        "subgroups": "hand-fingers-open",
        "annotation": annotation,
        "tags": "",
        "openmoji_tags": "",
        "openmoji_author": "Ada L., Bo M.",
        "skintone": "",
        "skintone_base_hexcode": "",
    } | changes


ENTRIES = [
    entry(
        "1F600", "grinning face", group="smileys-emotion", subgroups="face-smiling", tags="face, happy, Happy, nice"
    ),
    entry("1F44B", "waving hand", tags="bye, hello", openmoji_tags="greeting", skintone_base_hexcode="1F44B"),
    entry("1F44B-1F3FB", "waving hand: light skin tone", skintone=1, skintone_base_hexcode="1F44B"),
    entry("E000", "castile and le\ufffdn flag"),
    entry("E001", "without a drawing"),
]


def make_package() -> bytes:
    files = {"data/openmoji.json": json.dumps(ENTRIES), "LICENSE.txt": "Attribution-ShareAlike 4.0 International\n"}
    files |= {f"color/svg/{name}.svg": SVG.format(color=color) for name, color in COLORS.items()}
    files |= {f"black/svg/{name}.svg": SVG.format(color="black") for name in COLORS}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return file.getvalue()


def integrity(content: bytes) -> str:
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"


class Registry(http.server.ThreadingHTTPServer):
    """Answers with what `pages` has, by path."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.package = make_package()
        self.pages = {"/openmoji.tgz": self.package}
        self.announce(integrity(self.package))

    def announce(self, hashes: str) -> None:
        dist = {"tarball": f"{self.url}/openmoji.tgz", "integrity": hashes}
        self.pages[f"/openmoji/{VERSION}"] = json.dumps({"version": VERSION, "dist": dist}).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self):
        content = self.server.pages.get(self.path)
        self.send_response(404 if content is None else 200)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def registry():
    with Registry() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def fetch(registry: Registry, folder: Path, *flags: str) -> None:
    main(["--output_dir", str(folder), "--registry", registry.url, "--version", VERSION, "--size", "16", *flags])


# Captions


def test_a_caption_says_name_topics_and_what_else_the_tags_say():
    face, hand = ENTRIES[:2]
    assert long_caption(face, keywords(face, face)) == (
        "A flat emoji drawing on a white background: grinning face. It is filed under smileys and emotion, face, "
        "smiling. Its keywords are happy and nice."
    )
    assert long_caption(hand, keywords(hand, hand)).endswith("Its keywords are bye, hello and greeting.")
    assert long_caption(hand, ["greeting"]).endswith("Its keyword is greeting.")
    assert long_caption(hand, ["Hand", "waving hand"]).endswith("people and body, hand, fingers open.")


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        ("red apple", "red apple"),
        ("flag: Peru", "flag of Peru"),
        ("family: man, woman, boy", "family (man, woman, boy)"),
        ("keycap: *", "keycap (*)"),
    ],
)
def test_names_have_no_colon(annotation, name):
    assert readable_name(annotation) == name


@pytest.mark.parametrize(
    ("group", "subgroup", "expected"),
    [
        ("people-body", "person-sport", ["people and body", "person", "sport"]),
        ("animals-nature", "animal-bird", ["animals and nature", "bird"]),
        ("symbols", "other-symbol", ["symbols"]),
        ("symbols", "alphanum", ["symbols", "letters and digits"]),
        ("flags", "country-flag", ["flags", "country flag"]),
        ("extras-openmoji", "food-drink", ["food and drink"]),
        ("extras-unicode", "symbol-other", ["symbol"]),
        ("travel-places", "place-other", ["travel and places"]),
    ],
)
def test_topics_are_words_and_each_is_said_once(group, subgroup, expected):
    assert topics(group, subgroup) == expected


def test_a_skin_tone_has_the_keywords_of_its_base():
    assert keywords(ENTRIES[2], ENTRIES[1]) == ["bye", "hello", "greeting"]
    assert keywords(entry("1", "a", tags="le\ufffdn, B, b, c ,"), ENTRIES[1]) == ["B", "c", "greeting"]


# The data set


def texts_by_name(folder: Path) -> dict[str, dict[str, str]]:
    rows = [json.loads(line) for line in (folder / "imagefolder" / "metadata.jsonl").read_text().splitlines()]
    return {row.pop("file_name"): row for row in rows}


@needs_renderer
def test_every_format_is_a_source_with_the_same_pictures_and_texts(registry, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_openmoji, "SHARD_SAMPLES", 1)
    fetch(registry, tmp_path / "data")
    assert "5 drawings; 1 of them skin-tone variants" in (printed := capsys.readouterr().out)
    assert "1 without an SVG and 1 with a broken name are left out; 2 remain" in printed
    texts = texts_by_name(tmp_path / "data")
    assert texts["1F600.png"]["text_short"] == "grinning face"
    assert texts["1F44B.png"]["tags"] == "bye, hello, greeting"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "ATTRIBUTION.md", "LICENSE.txt", "imagefolder", "parquet", "webdataset",
    ]  # fmt: skip
    for kind in ("parquet", "webdataset", "imagefolder"):
        source = load_source(
            str(tmp_path / "data" / kind), caption_columns=("text", "text_short", "tags"), cache_dir=None
        )
        found = {source[i]["captions"]["text_short"]: source[i] for i in range(len(source))}
        assert {name: sample["captions"] for name, sample in found.items()} == {
            row["text_short"]: row for row in texts.values()
        }
        for name, color in (("grinning face", (255, 0, 0)), ("waving hand", (0, 255, 0))):
            expected = np.full((16, 16, 3), 255, dtype=np.uint8)  # white where nothing is drawn
            expected[:, 8:] = color
            np.testing.assert_array_equal(np.asarray(found[name]["image"]), expected)
    for kind in ("parquet", "webdataset"):
        shards = load_stream(str(tmp_path / "data" / kind))
        assert [len(list(shards.rows(shard, 0))) for shard in range(len(shards))] == [1, 1]


@needs_renderer
def test_skin_tones_on_demand_and_one_format(registry, tmp_path):
    fetch(registry, tmp_path, "--skin_tones", "--format", "imagefolder")
    texts = texts_by_name(tmp_path)
    assert len(texts) == 3
    assert not (tmp_path / "parquet").exists()
    assert "hand (light skin tone)." in texts["1F44B-1F3FB.png"]["text"]
    assert texts["1F44B-1F3FB.png"]["tags"] == texts["1F44B.png"]["tags"]
    # the order is a function of the code points: what is left out moves nothing else
    fetch(registry, tmp_path / "fewer", "--format", "imagefolder")
    assert [name for name in texts if "-" not in name] == list(texts_by_name(tmp_path / "fewer"))


@needs_renderer
def test_the_same_bytes_every_time(registry, tmp_path):
    contents = []
    for name in ("first", "second"):
        fetch(registry, tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert len(contents[0]) == 7
    assert contents[0] == contents[1]


@needs_renderer
def test_licence_authors_and_changes_stand_beside_the_data(registry, tmp_path):
    fetch(registry, tmp_path, "--format", "imagefolder")
    assert "ShareAlike" in (tmp_path / "LICENSE.txt").read_text()
    attribution = (tmp_path / "ATTRIBUTION.md").read_text()
    for part in ("OpenMoji", "CC BY-SA 4.0", VERSION, "Drawn by: Ada L., Bo M.", "16 x 16", registry.url):
        assert part in attribution


def test_shards_are_of_nearly_equal_size():
    samples = [fetch_openmoji.Sample(str(i), b"", "", "", "") for i in range(2464)]
    parts = list(fetch_openmoji.shards(samples))
    assert [len(part) for _, _, part in parts] == [821, 821, 822]
    assert [sample for _, _, part in parts for sample in part] == samples
    assert len(list(fetch_openmoji.shards(samples[:3]))) == 1


# What goes wrong


@needs_renderer
@pytest.mark.parametrize(
    "hashes",
    [integrity(b"another package"), "sha1-x", "", integrity(make_package())[:-3]],
    ids=["another", "another kind", "none", "cut off"],  # the package has the time of its making in it
)
def test_a_wrong_hash_is_refused_and_nothing_is_written(registry, tmp_path, hashes):
    registry.announce(hashes)
    with pytest.raises(SystemExit, match=r"^error: The package has the hash sha512-.* but the registry says"):
        fetch(registry, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_one_of_several_hashes_is_enough():
    content = b"anything"
    fetch_openmoji.check_integrity(content, f"sha1-x {integrity(b'x')} {integrity(content)}")


@needs_renderer
def test_no_such_version_no_registry_and_no_network(registry, tmp_path):
    with pytest.raises(SystemExit, match=r"answers 404 .*is there such a `--version`\?"):
        fetch(registry, tmp_path, "--version", "99.0.0")
    registry.pages[f"/openmoji/{VERSION}"] = b"<html>a login page</html>"
    with pytest.raises(SystemExit, match="does not answer as a registry of npm: b'<html>a login page"):
        fetch(registry, tmp_path)
    registry.shutdown()
    registry.server_close()  # nobody listens at this port from now on
    with pytest.raises(SystemExit, match=r"cannot be reached .*The network is needed"):
        fetch(registry, tmp_path)


def test_a_package_of_another_layout():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/README.md"))
    with pytest.raises(ValueError, match=r"it has no data/openmoji\.json and no LICENSE\.txt"):
        fetch_openmoji.read_package(file.getvalue())


def test_a_missing_renderer_is_named_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(SystemExit, match=r"resvg-py draws the SVGs and is missing: pip install"):
        main(["--output_dir", str(tmp_path), "--registry", "http://127.0.0.1:9"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "zip,parquet"], "--format has 'zip'; accepted: parquet, webdataset, imagefolder"),
        (["--size", "0"], "--size must be at least 1, got 0"),
        ([], "parquet is there already; remove it or choose another"),
    ],
)
def test_wrong_flags(flags, message, tmp_path, capsys):
    (tmp_path / "parquet").mkdir()
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path), *flags])
    assert message in capsys.readouterr().err


@needs_renderer
def test_what_was_interrupted_leaves_no_half_data_set(registry, tmp_path, monkeypatch):
    def interrupted(samples, folder):
        (folder / "00000.tar").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(fetch_openmoji.WRITERS, "webdataset", interrupted)
    with pytest.raises(SystemExit, match="No space left"):
        fetch(registry, tmp_path, "--format", "webdataset")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ATTRIBUTION.md", "LICENSE.txt"]


@needs_renderer
def test_transparent_and_half_transparent_places_lie_on_white():
    svg = SVG.replace("<path", '<path opacity="0.5"').format(color="#000000")
    pixels = np.asarray(fetch_openmoji.draw(svg, 4, fetch_openmoji.find_renderer()))
    assert pixels.shape == (4, 4, 3)
    assert (pixels[:, :2] == 255).all()
    assert (abs(pixels[:, 2:].astype(int) - 127.5) <= 1).all()


@needs_renderer
def test_a_drawing_that_is_no_square_is_refused():
    svg = SVG.replace("0 0 72 72", "0 0 72 36").format(color="red")
    with pytest.raises(ValueError, match=r"A drawing has \(8, 4\) pixels in place of 8 x 8"):
        fetch_openmoji.draw(svg, 8, fetch_openmoji.find_renderer())
