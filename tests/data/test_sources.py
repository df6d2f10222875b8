"""Which kind of source a name stands for, and what is done with those of its samples that cannot be read."""

import json
import os
import tarfile
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import emoji
from diffusers_prx.data.buckets import Buckets
from diffusers_prx.data.captioned import read_sample
from diffusers_prx.data.emoji_scenes import EmojiScenesDataset
from diffusers_prx.data.samplers import Position
from diffusers_prx.data.samples import TrainingSamples, collate
from diffusers_prx.data.scenes import ScenesDataset, short_caption
from diffusers_prx.data.sources import Slice, UnreadableSample, expand, load_source, load_stream
from diffusers_prx.data.tars import TarImages
from diffusers_prx.training.rng import derive_seed
from disks import full_disk

COLORS = [(250, 10, 20), (10, 240, 30), (20, 30, 230), (200, 200, 10)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(place: int, size: tuple[int, int] = (24, 16)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size, COLORS[place % 4])


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for place in range(4):
        picture(place).save(folder / f"{place}.png")
        rows.append({"file_name": f"{place}.png", "text": f"caption {place}"})
    write_metadata(folder, rows)
    return folder


def write_metadata(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def read_metadata(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture
def beside(tmp_path) -> Path:
    """A folder with captions beside the images, one of them in a folder below."""
    folder = tmp_path / "beside"
    (folder / "more").mkdir(parents=True)
    for place in range(4):
        stem = folder / ("more" if place == 2 else "") / f"img.{place}"
        picture(place).save(f"{stem}.PNG" if place == 1 else f"{stem}.png")
        Path(f"{stem}.txt").write_text(f"caption {place}\n")
        Path(f"{stem}.json").write_text(json.dumps({"short": f"short {place}"}))
    return folder


def rows_of_four() -> datasets.Dataset:
    rows = {"image": [picture(i) for i in range(4)], "text": [f"caption {i}" for i in range(4)]}
    return datasets.Dataset.from_dict(rows)


def write_tars(folder: Path, beside: Path) -> None:
    folder.mkdir()
    for place in range(4):
        with tarfile.open(folder / f"{place:03}.tar", "w") as archive:
            for file in sorted(beside.rglob(f"img.{place}.*")):
                archive.add(file, file.name.replace("img.", ""))


def samples(source, resolution=16, seed=0) -> TrainingSamples:
    return TrainingSamples(source, Buckets.square(resolution, len(source)), False, False, partial(derive_seed, seed))


def assert_complete(source):
    assert len(source) == 4
    assert sorted(source[i]["caption"] for i in range(4)) == [f"caption {i}" for i in range(4)]
    for i in range(4):
        sample = source[i]
        assert sample["image"].getpixel((3, 3)) == COLORS[int(sample["caption"][-1])]
        assert next(iter(sample["captions"].values())) == sample["caption"]
        assert source.captions(i) == sample["captions"]
        assert source.size(i) == sample["image"].size == (24, 16)


def assert_stream_complete(shards):
    rows = [row for shard in range(len(shards)) for row in shards.rows(shard, 0)]
    assert sorted(
        row[1]["text"].strip() if isinstance(row[1]["text"], str) else row[1]["text"].decode().strip() for row in rows
    ) == [f"caption {i}" for i in range(4)]


# Kinds of sources


def test_a_folder_with_metadata(folder):
    assert_complete(load_source(str(folder)))
    assert_stream_complete(load_stream(str(folder)))


def test_a_folder_with_captions_beside(beside):
    assert_complete(load_source(str(beside)))
    source = load_source(str(beside), caption_columns=("txt", "short"))
    assert source[1]["captions"] == {
        "txt": source[1]["caption"],
        "short": source[1]["caption"].replace("caption", "short"),
    }
    with pytest.raises(ValueError, match="beside is read by index: leave `streaming` out"):
        load_stream(str(beside))


def test_parquet(tmp_path):
    numbers = [[0, 1], [2, 3]]
    for kind, (first, second) in {"struct": numbers, "bytes": numbers}.items():
        (tmp_path / kind).mkdir()
        for part in (first, second):
            rows = rows_of_four().select(part).cast_column("image", datasets.Image(decode=False))
            images = [row["image"] if kind == "struct" else row["image"]["bytes"] for row in rows]
            table = pa.table({"image": images, "text": rows["text"]})
            pyarrow.parquet.write_table(table, tmp_path / kind / f"train-{part[0]}.parquet")
        assert_complete(load_source(f"{tmp_path}/{kind}/*.parquet"))
        assert_complete(load_source(f"{tmp_path}/{kind}/train-{{0,2}}.parquet"))
        assert_stream_complete(load_stream(f"{tmp_path}/{kind}/*.parquet"))
        assert len(load_stream(f"{tmp_path}/{kind}/*.parquet")) == 2
    assert_complete(load_source(str(tmp_path / "struct")))
    assert_stream_complete(load_stream(str(tmp_path / "struct")))
    assert len(load_source(f"{tmp_path}/struct/train-0.parquet")) == 2


def test_tars(tmp_path, beside):
    write_tars(tmp_path / "tars", beside)
    for name in ("tars", "tars/*.tar", "tars/{000..003}.tar", "tars/00{0..3}.tar"):
        source = load_source(f"{tmp_path}/{name}", cache_dir=str(tmp_path / "index"))
        assert isinstance(source, TarImages)
        assert_complete(source)
        assert_stream_complete(load_stream(f"{tmp_path}/{name}"))
    assert len(os.listdir(tmp_path / "index")) == 4
    assert len(load_source(f"{tmp_path}/tars/001.tar")) == 1
    assert_stream_complete(load_stream(f"file://{tmp_path}/tars/*.tar"))
    with pytest.raises(ValueError, match=r"is not on this machine: stream it"):
        load_source("https://example.com/{000..003}.tar")


def test_a_data_set_on_disk_with_and_without_splits(tmp_path):
    rows = rows_of_four()
    rows.save_to_disk(tmp_path / "plain")
    assert_complete(load_source(str(tmp_path / "plain")))
    with pytest.raises(ValueError, match=r"`dataset_split` is 'test', but .*plain has no splits"):
        load_source(str(tmp_path / "plain"), split="test")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "split")
    assert_complete(load_source(str(tmp_path / "split")))
    assert len(load_source(str(tmp_path / "split"), split="test")) == 1
    with pytest.raises(ValueError, match=r"`dataset_split` is 'val', but .*split has \['test', 'train'\]"):
        load_source(str(tmp_path / "split"), split="val")
    with pytest.raises(ValueError, match="split is read by index: leave `streaming` out"):
        load_stream(str(tmp_path / "split"))


def test_parquet_with_text_that_is_no_utf8(tmp_path):
    texts = pa.array([b"caption 0", b"K\xe4uzchen", b"caption 2", None], pa.binary()).view(pa.string())
    images = [row["bytes"] for row in rows_of_four().cast_column("image", datasets.Image(decode=False))["image"]]
    pyarrow.parquet.write_table(pa.table({"image": images, "text": texts}), tmp_path / "a.parquet")
    source = load_source(f"{tmp_path}/a.parquet")
    rows = list(load_stream(f"{tmp_path}/a.parquet").rows(0, 0))
    for i in (0, 2):
        assert source[i]["caption"] == read_sample(*rows[i])["caption"] == f"caption {i}"
    for i, reason in ((1, "utf-?8"), (3, "text is None")):
        for read in (lambda i=i: source[i], lambda i=i: source.captions(i), lambda i=i: read_sample(*rows[i])):
            with pytest.raises(UnreadableSample, match=f"(?i){reason}"):
                read()


def test_of_several_captions_in_a_column_the_first_is_taken(tmp_path):
    rows = rows_of_four().add_column("both", [[f"caption {i}", "another"] for i in range(4)])
    rows.save_to_disk(tmp_path / "plain")
    assert_complete(load_source(str(tmp_path / "plain"), caption_columns=("both",)))


def test_scenes():
    options = {"level": "easy", "resolution": 32, "seed": 3, "size": 50}
    source = load_source("scenes", caption_columns=("long", "short"), scenes=options)
    scenes = ScenesDataset(**options)
    assert len(source) == 50
    for i in (0, 49):
        assert source[i]["caption"] == source.captions(i)["long"] == scenes[i]["caption"]
        assert source[i]["captions"]["short"] == short_caption(scenes[i]["scene"], seed=3, index=i)
        assert source[i]["image"].tobytes() == scenes[i]["image"].tobytes()
        assert source.size(i) == (32, 32)
    with pytest.raises(ValueError, match="`caption_column` is 'text'; accepted: 'long', 'short'"):
        load_source("scenes")
    with pytest.raises(ValueError, match="scenes is read by index"):
        load_stream("scenes")


def test_emoji_scenes(tmp_path):
    options = {"emoji_dir": str(emoji.save_emoji(tmp_path)), "resolution": 32, "seed": 3, "size": 50}
    source = load_source("emoji_scenes", caption_columns=("short", "long"), scenes=options)
    scenes = EmojiScenesDataset(**options)
    assert len(source) == 50
    for i in (0, 49):
        assert source[i]["captions"]["long"] == source.captions(i)["long"] == scenes[i]["caption"]
        assert source[i]["caption"] == scenes.describe(scenes.scene(i), "short", i)
        assert source[i]["image"].tobytes() == scenes[i]["image"].tobytes()
        assert source.size(i) == (32, 32)
    assert len({source.image_hash(i) for i in range(50)}) > 45
    with pytest.raises(ValueError, match="`caption_column` is 'text'; accepted: 'long', 'short'"):
        load_source("emoji_scenes", scenes=options)
    with pytest.raises(ValueError, match="`streaming`"):
        load_stream("emoji_scenes")


def test_patterns(tmp_path):
    for name in ("a0.tar", "a1.tar", "b1.tar", "[x].tar"):
        (tmp_path / name).touch()

    def names(pattern):
        return [Path(path).name for path in expand(f"{tmp_path}/{pattern}")]

    assert names("{a,b}1.tar") == ["a1.tar", "b1.tar"]
    assert names("a?.tar") == ["a0.tar", "a1.tar"]
    assert names("[x].tar") == ["[x].tar"]
    assert expand("https://a.b/{08..11}-{x,y}.tar")[:3] == [f"https://a.b/{n}.tar" for n in ("08-x", "08-y", "09-x")]
    assert len(expand("https://a.b/{08..11}-{x,y}.tar")) == 8
    for pattern in ("{a,c}1.tar", "c*.tar", "c.tar"):
        with pytest.raises(ValueError, match=r"There is no file .*c"):
            expand(f"{tmp_path}/{pattern}")


def test_a_slice(folder):
    source = load_source(str(folder))
    part = Slice(source, 1, 3)
    assert [part[i]["caption"] for i in range(2)] == [source[i]["caption"] for i in (1, 2)]
    assert (len(part), part.captions(1), part.size(1)) == (2, source.captions(2), (24, 16))


# What is refused, and what is reported


def test_wrong_columns_are_refused_with_those_that_are_there(folder):
    with pytest.raises(ValueError, match=r"`image_column` is 'img'; .* 'image', 'text': pass `--image_column image`"):
        load_source(str(folder), image_column="img")
    with pytest.raises(ValueError, match=r"`caption_column` is 'long'; .* 'text': pass `--caption_column text`"):
        load_source(str(folder), caption_columns=("text", "long"))
    rows_of_four().rename_column("text", "caption").to_parquet(folder.parent / "a.parquet")
    for load in (load_source, load_stream):
        with pytest.raises(ValueError, match=r"`caption_column` is 'text'; .* pass `--caption_column caption`"):
            load(f"{folder.parent}/a.parquet")


def test_folders_without_captions_are_refused(folder):
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"photos has 4 images and neither a metadata\.jsonl nor captions beside them"
    ):
        load_source(str(folder))
    for name in ("*.parquet", "1.tar"):
        with pytest.raises(ValueError, match="There is no file"):
            load_source(f"{folder}/{name}")


def test_images_that_are_left_out_are_reported(folder, beside, caplog):
    picture(0).save(folder / "extra.jpg")
    assert_complete(load_source(str(folder)))
    assert "1 of 5 images are in no metadata file" in caplog.text
    assert caplog.text.count("extra.jpg") == 1
    picture(0).save(beside / "extra.jpg")
    assert_complete(load_source(str(beside)))
    assert "1 of 5 pictures have no caption" in caplog.text
    assert caplog.text.count("extra.jpg") == 2


def test_metadata_that_is_broken_ends_the_run(folder):
    """It is read whole before training: nothing to skip. A caption that is no text is a sample that cannot be read."""
    text = (folder / "metadata.jsonl").read_text()
    broken = {
        "UnicodeDecodeError": text.replace("caption 2", "K\xe4uzchen").encode("latin-1"),
        "line 4": text[:-5].encode(),
        "line 1 is no mapping": b"[]",
        "line 2": text.replace("\n", "\n" + "[" * 100_000 + "\n", 1).encode(),
    }
    for reason, content in broken.items():
        (folder / "metadata.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=rf"metadata\.jsonl cannot be read: .*{reason}"):
            load_source(str(folder))
    (folder / "metadata.jsonl").write_text(text.replace('"caption 2"', "5"))
    source = load_source(str(folder))
    with pytest.raises(UnreadableSample, match="text is 5"):
        source.captions(2)
    assert source[3]["caption"] == "caption 3"


def test_a_full_disk_ends_the_run_with_what_to_do(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 100, 100, 3), dtype=np.uint8)
    rows = datasets.Dataset.from_dict({"image": [PIL.Image.fromarray(x) for x in noise], "text": ["a cat"] * 4})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    message = r"No space left for the data set's cache in .*cache, nothing of it was kept"
    with full_disk(20_000), pytest.raises(OSError, match=message):
        load_source(f"{tmp_path}/a.parquet")
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert len(load_source(f"{tmp_path}/a.parquet")) == 4


# Samples that cannot be read


def break_truncated(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(folder / "1.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:2000])


def break_empty(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"")


def break_missing_caption(folder: Path) -> None:
    write_metadata(folder, [{**r, "text": None} if "1" in r["text"] else r for r in read_metadata(folder)])


def break_empty_caption(folder: Path) -> None:
    write_metadata(folder, [{**r, "text": " "} if "1" in r["text"] else r for r in read_metadata(folder)])


@pytest.mark.parametrize("damage", [break_truncated, break_empty, break_missing_caption, break_empty_caption])
def test_an_unreadable_sample_is_replaced_reported_and_counted(folder, damage):
    damage(folder)
    source = load_source(str(folder))
    bad = []
    for index in range(4):
        try:
            source[index]
        except UnreadableSample as error:
            bad.append((index, str(error)))
    ((bad, message),) = bad
    assert message.startswith(f"sample {bad} has no ")
    assert message.endswith(".png)")
    data = samples(source)
    items = [data[Position(0, place, place)] for place in range(4)]
    assert [len(item["unreadable"]) for item in items] == [int(place == bad) for place in range(4)]
    assert items[bad]["caption"] == source[(bad + 1) % 4]["caption"]
    batch = collate(items)
    assert batch["pixels_uint8"].shape == (4, 3, 16, 16)
    assert batch["pixels_uint8"].dtype == torch.uint8
    assert len(batch["unreadable"]) == 1
    assert batch["sample_index"] == [0, 1, 2, 3]


def test_broken_files_beside_each_other(beside):
    (beside / "img.0.txt").write_bytes(b"\xef\xbb\xbf \r\n")
    (beside / "img.1.txt").write_bytes(b"K\xe4uzchen")
    (beside / "img.3.png").write_bytes(b"")
    source = load_source(str(beside))
    reasons = []
    for i in range(4):
        try:
            source[i]
        except UnreadableSample as error:
            reasons.append(str(error).partition(" (")[0])
    assert reasons[0].endswith("has no caption: text is an empty text")
    assert reasons[1].endswith("has no caption: text is text that is no UTF-8")
    assert "has no readable image: " in reasons[2]
    assert len(reasons) == 3


def test_when_nothing_can_be_read_it_says_so(folder):
    for file in folder.glob("*.png"):
        file.write_text("no picture")
    with pytest.raises(ValueError, match=r"4 cannot be read and 0 do not fit .*; the first: sample 2 has no readable"):
        samples(load_source(str(folder)))[Position(0, 0, 2)]
