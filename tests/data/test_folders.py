"""Image folders: selection of data files, matching of captions, metadata, and reports of unused files."""

import csv
import json
import os
import unicodedata
from pathlib import Path

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet
import pytest

from diffusers_prx.data import images
from diffusers_prx.data.captioned import decode_sample
from diffusers_prx.data.folders import MAX_CAPTION_BYTES
from diffusers_prx.data.images import UnreadableSample
from diffusers_prx.data.sources import FolderImages, load_source, load_stream
from diffusers_prx.data.tars import TarImages
from image_files import plain_png, write_tar


def pair(stem: Path, ending: str = "png", text_ending: str = "txt", text: str | None = None) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (24, 16), (250, 10, 20)).save(f"{stem}.{ending}")
    Path(f"{stem}.{text_ending}").write_text(stem.name if text is None else text)


def captions(folder: Path | str, **options) -> list[str]:
    source = load_source(str(folder), **options)
    assert isinstance(source, FolderImages)
    return [source[index]["caption"] for index in range(len(source))]


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("\n".join(map(json.dumps, rows)))


TAR_FILES = [("a.png", plain_png((250, 10, 20))), ("a.txt", b"a")]


@pytest.mark.parametrize("name", ["test", "train", "validation", "val-00", "dev"])
def test_file_and_folder_names_are_not_interpreted_as_splits(tmp_path, name):
    files = ["0.png", "1.png", f"{name}/a.png", f"{name}.png"]
    for file in files:
        pair((tmp_path / file).with_suffix(""))
    assert captions(tmp_path) == ["0", "1", name, "a"]
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": file, "text": f"of {file}"} for file in files])
    assert captions(tmp_path) == [f"of {file}" for file in files]
    with pytest.raises(ValueError, match="`dataset_split` is 'other'"):
        load_source(str(tmp_path), split="other")


def test_folders_named_like_splits_are_splits_if_there_are_no_others(tmp_path, caplog):
    for split in ("train", "test"):
        pair(tmp_path / split / f"of {split}")
    assert captions(tmp_path) == ["of train"]
    assert "`dataset_split`" in caplog.text
    assert captions(tmp_path, split="test") == ["of test"]


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".Trash-0", ".thumbnails", "@eaDir", "__MACOSX", "#recycle"])
@pytest.mark.parametrize("with_metadata", [False, True])
def test_system_folders_are_not_data(tmp_path, name, with_metadata):
    for folder in (tmp_path, tmp_path / name, tmp_path / "below" / name):
        pair(folder / "a")
    pair(tmp_path / "._a")  # written by macOS
    if with_metadata:
        for folder in (tmp_path, tmp_path / name):
            write_lines(folder / "metadata.jsonl", [{"file_name": "a.png", "text": "a"}])
    assert captions(tmp_path) == ["a"]


def test_linked_folders_are_read_once(tmp_path):
    pair(tmp_path / "photos" / "own")
    for name in ("x", "y"):
        pair(tmp_path / "elsewhere" / name)
    for link in ("link", "second"):
        (tmp_path / "photos" / link).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "a").symlink_to(tmp_path / "photos" / "real")
    pair(tmp_path / "photos" / "real" / "z")
    assert captions(tmp_path / "photos") == ["x", "y", "own", "z"]
    (tmp_path / "whole").symlink_to(tmp_path / "photos")
    assert len(captions(tmp_path / "whole")) == 4


@pytest.mark.parametrize("target", [".", "..", "/", "other"])
def test_circular_links_are_refused(tmp_path, target):
    pair(tmp_path / "photos" / "below" / "a")
    pair(tmp_path / "other" / "b")
    (tmp_path / "photos" / "below" / "loop").symlink_to(tmp_path / target if target == "other" else target)
    (tmp_path / "other" / "loop").symlink_to(tmp_path / "photos")
    with pytest.raises(ValueError, match="loop is a link to a folder that contains it"):
        load_source(str(tmp_path / "photos"))


def test_broken_links_and_fifos_are_reported(tmp_path, caplog):
    pair(tmp_path / "a")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    os.mkfifo(tmp_path / "fifo.png")
    for name in ("gone", "self", "fifo"):
        (tmp_path / f"{name}.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert captions(tmp_path) == ["a"]
    assert "4 entries" in caplog.text
    assert "b.txt, fifo.png, gone.png, self.png" in caplog.text


OTHER_FILES = {
    "labels.csv": b"file,text\na.png,other\n",
    "notes.jsonl": b'{"text": "other"}\n',
    "backup.zip": b"no zip",
    "old.tar": b"no tar",
    "x.parquet": b"no parquet",
    "state.txt": b"note",
}


@pytest.mark.parametrize("name", OTHER_FILES)
@pytest.mark.parametrize("with_metadata", [False, True])
def test_other_files_are_ignored_and_reported(tmp_path, name, with_metadata, caplog):
    for stem in ("a", "b"):
        pair(tmp_path / stem)
    if with_metadata:
        write_lines(tmp_path / "metadata.jsonl", [{"file_name": f"{n}.png", "text": n} for n in "ab"])
    (tmp_path / name).write_bytes(OTHER_FILES[name])
    assert captions(tmp_path) == ["a", "b"]
    assert (name in caplog.text) == (name != "state.txt" or not with_metadata)


def test_an_image_without_caption_next_to_tars_is_ignored(tmp_path):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", TAR_FILES)
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "tars" / "preview.png")
    assert isinstance(load_source(str(tmp_path / "tars")), TarImages)


def test_folders_without_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no data"):
        load_source(str(tmp_path))
    (tmp_path / "labels.csv").write_text("file_name,text\na.png,a\n")
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"1 images.*`--instance_prompt`.*labels\.csv.*metadata\.csv"):
        load_source(str(tmp_path))
    assert len(load_source(str(tmp_path), instance_prompt="a thing")) == 1
    for name in ("nowhere", "a.png"):
        with pytest.raises(ValueError, match=name):
            load_source(str(tmp_path / name))


def test_paths_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pair(tmp_path / "pics" / "a")
    write_tar(tmp_path / "0.tar", TAR_FILES)
    assert captions("~/pics") == captions("$HOME/pics") == ["a"]
    assert len(load_source("~/{0,0}.tar")) == 2
    assert len(load_stream("$HOME/*.tar")) == 1


def test_upper_and_lower_case_endings_are_equal(tmp_path):
    pair(tmp_path / "A", "PNG", "TXT")
    pair(tmp_path / "b", "Jpg", "Long.Txt")
    source = load_source(str(tmp_path), caption_columns=("text", "long.txt"))
    assert [source.captions(index) for index in range(2)] == [{"text": "A"}, {"long.txt": "b"}]
    (tmp_path / "A.txt").write_text("exact case")
    assert captions(tmp_path) == ["exact case"]


def test_composed_and_decomposed_accents_are_equal(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "K\u00e4uzchen") for form in ("NFC", "NFD"))
    pair(tmp_path / composed)
    os.rename(tmp_path / f"{composed}.png", tmp_path / f"{decomposed}.png")
    assert captions(tmp_path) == [composed]
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": f"{composed}.png", "text": "an owl"}])
    assert captions(tmp_path) == ["an owl"]


@pytest.mark.parametrize(
    "name", ["memory::x", "file:z", "zip::a", "a b", "100%", "[x]", "{1,2}", "~", "$HOME", "a#b?"]
)
@pytest.mark.parametrize("with_metadata", [False, True])
def test_names_with_special_characters_are_read(tmp_path, name, with_metadata):
    for folder in ("", "memory::y", "file:w"):
        pair(tmp_path / folder / name)
    if with_metadata:
        rows = [{"file_name": f"{folder}{name}.png", "text": name} for folder in ("", "memory::y/", "file:w/")]
        write_lines(tmp_path / "metadata.jsonl", rows)
    assert captions(tmp_path) == [name] * 3


def test_names_that_are_not_utf8_are_read_and_printable(tmp_path, caplog):
    pair(tmp_path / "a")
    for ending in ("png", "txt"):
        os.rename(tmp_path / f"a.{ending}", os.fsencode(tmp_path) + b"/K\xe4uz." + ending.encode())
    os.mkfifo(os.fsencode(tmp_path) + b"/\xe4.png")
    source = load_source(str(tmp_path))
    assert source[0]["caption"] == "a"
    assert source.location(0).encode().endswith(b"K\\xe4uz.png")
    assert r"\xe4.png" in caplog.text


def test_caption_files_are_stripped_and_limited_in_size(tmp_path):
    pair(tmp_path / "a")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfan owl\r\n")
    assert captions(tmp_path) == ["an owl"]
    (tmp_path / "a.txt").write_bytes(b"x" * (MAX_CAPTION_BYTES + 1))
    with pytest.raises(UnreadableSample, match=f"more than {MAX_CAPTION_BYTES} bytes"):
        load_source(str(tmp_path))[0]


def test_images_and_captions_without_partner_are_reported(tmp_path, caplog):
    pair(tmp_path / "a")
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "alone.png")
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "LICENSE").write_text("free")
    assert captions(tmp_path) == ["a"]
    assert "1 of 2 images have no caption" in caplog.text
    assert "alone.png" in caplog.text
    assert "1 captions have no image" in caplog.text
    assert "README.txt" in caplog.text
    assert "LICENSE" not in caplog.text


@pytest.mark.parametrize(("ending", "remedy"), [("heic", "pillow-heif"), ("JXL", "pillow-jxl-plugin"), ("eps", "PNG")])
def test_unsupported_formats_are_reported_with_the_remedy(tmp_path, ending, remedy, caplog, monkeypatch):
    monkeypatch.setattr(images, "image_endings", lambda: frozenset({"png"}))
    images.unreadable_endings.cache_clear()
    for name in (f"b.{ending}", "b.txt"):
        (tmp_path / name).write_text("b")
    with pytest.raises(ValueError, match=rf"no readable images.*b\.{ending}\. .*{remedy}"):
        load_source(str(tmp_path))
    pair(tmp_path / "a")
    assert captions(tmp_path) == ["a"]
    assert f"b.{ending}" in caplog.text
    assert remedy in caplog.text
    assert "no image" not in caplog.text
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": n, "text": n} for n in ("a.png", f"b.{ending}")])
    assert captions(tmp_path) == ["a.png"]
    images.unreadable_endings.cache_clear()


def write_csv(file: Path, rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8-sig") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(file: Path, rows: list[dict]) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)


WRITERS = {"metadata.jsonl": write_lines, "METADATA.JSONL": write_lines, "metadata.csv": write_csv}
WRITERS["metadata.parquet"] = write_parquet


@pytest.mark.parametrize("name", WRITERS)
def test_metadata_files_give_the_captions(tmp_path, name, caplog):
    for folder in ("", "sub"):
        pair(tmp_path / folder / "a", text="not this one")
    rows = [{"file_name": "a.png", "text": "NA"}, {"file_name": "sub\\a.png", "text": '2024-01-01, "b"\nc'}]
    WRITERS[name](tmp_path / name, [*rows, {"file_name": "gone.png", "text": "gone"}])
    assert captions(tmp_path) == ["NA", '2024-01-01, "b"\nc']
    assert "1 of 3 images listed in the metadata" in caplog.text
    assert "gone.png" in caplog.text
    shards = load_stream(str(tmp_path))
    rows = [decode_sample(*row) for shard in range(len(shards)) for row in shards.rows(shard, 0)]
    assert [row["caption"] for row in rows] == ["NA", '2024-01-01, "b"\nc']
    (tmp_path / "metadata.CSV").write_text("file_name\n")
    with pytest.raises(ValueError, match="several metadata files"):
        load_source(str(tmp_path))


def test_each_folder_may_have_its_own_metadata(tmp_path, caplog):
    for file in ("one/a", "one/below/b", "one/unlisted", "two/c", "three/d"):
        pair(tmp_path / file)
    write_lines(tmp_path / "one" / "metadata.jsonl", [{"file_name": n, "text": "1"} for n in ("a.png", "below/b.png")])
    write_csv(tmp_path / "two" / "metadata.csv", [{"file_name": "c.png", "text": "2", "more": "x"}])
    assert captions(tmp_path) == ["1", "1", "2", "d"]
    assert "1 of 5 images are in no metadata file" in caplog.text
    assert "one/unlisted.png" in caplog.text


def test_metadata_may_have_another_image_column(tmp_path):
    pair(tmp_path / "a")
    for column in ("photo_file_name", "photo"):
        write_lines(tmp_path / "metadata.jsonl", [{column: "a.png", "text": "1"}])
        assert captions(tmp_path, image_column="photo") == ["1"]
        with pytest.raises(ValueError, match="`image_column` is 'image'"):
            load_source(str(tmp_path))


@pytest.mark.parametrize("name", [5, 0, 1.5, True, ["a.png"], {"path": "a.png"}, None, ""])
def test_rows_without_a_file_name_are_reported(tmp_path, name, caplog):
    pair(tmp_path / "a")
    rows = [{"file_name": "a.png", "text": "1"}, {"file_name": name, "text": "2"}]
    write_lines(tmp_path / "metadata.jsonl", rows)
    assert captions(tmp_path) == ["1"]
    assert "row 2" in caplog.text


@pytest.mark.parametrize(
    ("file", "text", "remedy"),
    [
        ("metadata.csv", "file_name;text\na.png;1\n", "commas"),
        ("metadata.csv", "file_name\ttext\na.png\t1\n", "commas"),
        ("metadata.csv", "file_name,text\n", "has no rows"),
        ("metadata.jsonl", "", "has no rows"),
        ("metadata.jsonl", '{"text": "1"}', "`file_name`"),
        ("metadata.jsonl", '{"picture": "a.png", "text": "1"}', "--image_column picture"),
    ],
)
def test_malformed_metadata_are_refused_with_a_remedy(tmp_path, file, text, remedy):
    pair(tmp_path / "a")
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=remedy):
        load_source(str(tmp_path))


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.png", "sub/../../secret.png", "..\\secret.png"])
def test_metadata_may_not_name_files_outside_their_folder(tmp_path, name):
    pair(tmp_path / "secret")
    pair(tmp_path / "photos" / "a")
    write_lines(tmp_path / "photos" / "metadata.jsonl", [{"file_name": name, "text": "1"}])
    with pytest.raises(ValueError, match=r"Row 1 of .*metadata.jsonl names .* not inside"):
        load_source(str(tmp_path / "photos"))
    own = tmp_path / "photos" / "a.png"
    write_lines(tmp_path / "photos" / "metadata.jsonl", [{"file_name": str(own), "text": "1"}])
    assert captions(tmp_path / "photos") == ["1"]


@pytest.mark.parametrize("name", ["https://example.com/0.parquet", "/etc/0.parquet", "../0.parquet", "zip://x::0.zip"])
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_cards_may_not_name_files_outside_the_data_set(tmp_path, name, card):
    pyarrow.parquet.write_table(pa.table({"image": [b""], "text": ["1"]}), tmp_path / "0.parquet")
    for file, refused in ((name, True), ("0.parquet", False)):
        files = [{"split": "train", "path": [file]}]
        mark = "---\n" if card == "README.md" else ""
        text = json.dumps({"configs": [{"config_name": "default", "data_files": files}]})
        (tmp_path / card).write_text(f"{mark}{text}\n{mark}")
        for load in (load_source, load_stream):
            if refused:
                with pytest.raises(ValueError, match=r"card of .* names .* not inside"):
                    load(str(tmp_path))
            else:
                assert len(load(str(tmp_path))) == 1


def test_tables_that_are_fifos_or_named_like_addresses_are_refused(tmp_path):
    os.mkfifo(tmp_path / "0.parquet")
    for name in ("0.parquet", "*.parquet", ""):
        with pytest.raises(ValueError, match=r"not a regular file|has no data"):
            load_source(f"{tmp_path}/{name}")
    table = pa.table({"image": [b""], "text": ["1"]})
    for name in ("a::b", "[x]", "{1,2}", "file:z"):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        if "::" in name:
            with pytest.raises(ValueError, match="has '::' in its name"):
                load_source(f"{tmp_path}/{name}.parquet")
        else:
            assert len(load_source(f"{tmp_path}/{name}.parquet")) == 1


@pytest.mark.parametrize("name", ["../secret.png", "https://example.com/x.png"])
@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "text"])
def test_cells_may_not_name_files_outside_the_data_set(tmp_path, name, kind):
    pair(tmp_path / "secret")
    cell = name if kind == "text" else {"bytes": None, "path": name}
    pair(tmp_path / "data" / "a")
    (tmp_path / "data" / "a.txt").unlink()
    own = "a.png" if kind == "text" else {"bytes": None, "path": "a.png"}
    table = pa.table({"image": [cell, own], "text": ["1", "2"]})
    if kind == "saved":
        datasets.Dataset(table).save_to_disk(tmp_path / "data")
        source = load_source(str(tmp_path / "data"))
    else:
        pyarrow.parquet.write_table(table, tmp_path / "data" / "0.parquet")
        source = load_source(str(tmp_path / "data") + ("" if kind == "folder" else "/0.parquet"))
        rows = list(load_stream(str(tmp_path / "data") + ("" if kind == "folder" else "/*.parquet")).rows(0, 0))
        assert decode_sample(*rows[1])["image"].size == (24, 16)
        with pytest.raises(UnreadableSample, match="not inside its data set"):
            decode_sample(*rows[0])
    with pytest.raises(UnreadableSample, match=r"sample 0 .*not inside its data set"):
        source[0]
    assert source[1]["image"].size == (24, 16)
