"""Opening sources by name, and handling of their unreadable samples."""

import json
import os
import tarfile
from functools import partial
from pathlib import Path

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import emoji
from diffusers_prx.data.buckets import Buckets
from diffusers_prx.data.captioned import decode_sample
from diffusers_prx.data.emoji_scenes import EmojiScenesDataset
from diffusers_prx.data.samplers import Position
from diffusers_prx.data.samples import TrainingSamples, collate
from diffusers_prx.data.scenes import ScenesDataset
from diffusers_prx.data.sources import Slice, UnreadableSample, expand_pattern, load_source, load_stream
from diffusers_prx.data.tars import TarImages
from diffusers_prx.training.rng import derive_seed
from disks import full_disk
from image_files import COLORS, noise


def picture(number: int, size: tuple[int, int] = (24, 16)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size, COLORS[number % 4])


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"caption {number}"})
    write_metadata(folder, rows)
    return folder


def write_metadata(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def read_metadata(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture
def paired(tmp_path) -> Path:
    """Folder with captions next to the images, one of them in a subfolder."""
    folder = tmp_path / "paired"
    (folder / "more").mkdir(parents=True)
    for number in range(4):
        stem = folder / ("more" if number == 2 else "") / f"img.{number}"
        picture(number).save(f"{stem}.PNG" if number == 1 else f"{stem}.png")
        Path(f"{stem}.txt").write_text(f"caption {number}\n")
        Path(f"{stem}.json").write_text(json.dumps({"short": f"short {number}"}))
    return folder


def rows_of_four() -> datasets.Dataset:
    rows = {"image": [picture(i) for i in range(4)], "text": [f"caption {i}" for i in range(4)]}
    return datasets.Dataset.from_dict(rows)


def write_tars(folder: Path, paired: Path) -> None:
    folder.mkdir()
    for number in range(4):
        with tarfile.open(folder / f"{number:03}.tar", "w") as archive:
            for file in sorted(paired.rglob(f"img.{number}.*")):
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


def test_a_folder_with_metadata_is_opened(folder):
    assert_complete(load_source(str(folder)))
    assert_stream_complete(load_stream(str(folder)))


def test_a_folder_with_caption_files_is_opened(paired):
    assert_complete(load_source(str(paired)))
    source = load_source(str(paired), caption_columns=("txt", "short"))
    assert source[1]["captions"] == {
        "txt": source[1]["caption"],
        "short": source[1]["caption"].replace("caption", "short"),
    }
    with pytest.raises(ValueError, match=r"`streaming` does not support .*paired"):
        load_stream(str(paired))


def test_parquet_files_are_opened(tmp_path):
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


def test_folders_of_one_name_and_readme_keep_their_own_rows(tmp_path):
    """`datasets` gives both one cache, which held the rows of whichever folder was opened first."""

    def write(folder: str, rows: list[int]) -> str:
        path = tmp_path / folder / "64"
        path.mkdir(parents=True, exist_ok=True)
        rows_of_four().select(rows).to_parquet(path / "train-0.parquet")
        readme = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train-*.parquet"
        (path / "README.md").write_text(f"---\n{readme}\n---\n")
        return str(path)

    first, second = write("first", [0, 1, 2, 3]), write("second", [2, 3])
    assert_complete(load_source(first))
    assert [load_source(second)[row]["caption"] for row in range(2)] == ["caption 2", "caption 3"]
    write("first", [1])  # new files in the old folder
    assert [sample["caption"] for sample in load_source(first)] == ["caption 1"]


def test_tars_are_opened(tmp_path, paired):
    write_tars(tmp_path / "tars", paired)
    for name in ("tars", "tars/*.tar", "tars/{000..003}.tar", "tars/00{0..3}.tar"):
        source = load_source(f"{tmp_path}/{name}", cache_dir=str(tmp_path / "index"))
        assert isinstance(source, TarImages)
        assert_complete(source)
        assert_stream_complete(load_stream(f"{tmp_path}/{name}"))
    assert len(os.listdir(tmp_path / "index")) == 4
    assert len(load_source(f"{tmp_path}/tars/001.tar")) == 1
    assert_stream_complete(load_stream(f"file://{tmp_path}/tars/*.tar"))
    with pytest.raises(ValueError, match="`--streaming`"):
        load_source("https://example.com/{000..003}.tar")


def test_a_saved_data_set_is_opened_with_and_without_splits(tmp_path):
    rows = rows_of_four()
    rows.save_to_disk(tmp_path / "plain")
    assert_complete(load_source(str(tmp_path / "plain")))
    with pytest.raises(ValueError, match="`dataset_split` is 'test'"):
        load_source(str(tmp_path / "plain"), split="test")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "split")
    assert_complete(load_source(str(tmp_path / "split")))
    assert len(load_source(str(tmp_path / "split"), split="test")) == 1
    with pytest.raises(ValueError, match=r"`dataset_split` is 'val', but .*split has \['test', 'train'\]"):
        load_source(str(tmp_path / "split"), split="val")
    with pytest.raises(ValueError, match="`streaming` does not support"):
        load_stream(str(tmp_path / "split"))


def test_parquet_texts_of_invalid_utf8_are_unreadable_samples(tmp_path):
    texts = pa.array([b"caption 0", b"K\xe4uzchen", b"caption 2", None], pa.binary()).view(pa.string())
    images = [row["bytes"] for row in rows_of_four().cast_column("image", datasets.Image(decode=False))["image"]]
    pyarrow.parquet.write_table(pa.table({"image": images, "text": texts}), tmp_path / "a.parquet")
    source = load_source(f"{tmp_path}/a.parquet")
    rows = list(load_stream(f"{tmp_path}/a.parquet").rows(0, 0))
    for i in (0, 2):
        assert source[i]["caption"] == decode_sample(*rows[i])["caption"] == f"caption {i}"
    for i, reason in ((1, "utf-?8"), (3, "`text` is missing")):
        for read in (lambda i=i: source[i], lambda i=i: source.captions(i), lambda i=i: decode_sample(*rows[i])):
            with pytest.raises(UnreadableSample, match=f"(?i){reason}"):
                read()


def test_the_first_of_several_captions_in_a_cell_is_used(tmp_path):
    rows = rows_of_four().add_column("both", [[f"caption {i}", "another"] for i in range(4)])
    rows.save_to_disk(tmp_path / "plain")
    assert_complete(load_source(str(tmp_path / "plain"), caption_columns=("both",)))


@pytest.mark.parametrize("name", ["scenes", "emoji_scenes"])
def test_drawn_sources_are_opened(tmp_path, name):
    options = {"resolution": 32, "seed": 3, "size": 50}
    if name == "emoji_scenes":
        options["emoji_dir"] = str(emoji.save_emoji(tmp_path))
    source = load_source(name, caption_columns=("long", "short"), scenes=options)
    scenes = {"scenes": ScenesDataset, "emoji_scenes": EmojiScenesDataset}[name](**options)
    assert len(source) == 50
    for i in (0, 49):
        assert source[i]["caption"] == source.captions(i)["long"] == scenes[i]["caption"]
        assert source[i]["captions"]["short"] == scenes.describe(scenes[i]["scene"], "short", i)
        assert source[i]["image"].tobytes() == scenes[i]["image"].tobytes()
        assert source.size(i) == (32, 32)
    assert len({source.image_hash(i) for i in range(50)}) > 45
    with pytest.raises(ValueError, match=r"`caption_column` is 'text'.* 'long', 'short'"):
        load_source(name, scenes=options)
    with pytest.raises(ValueError, match="`streaming`"):
        load_stream(name)


def test_emoji_scenes_need_their_drawings():
    with pytest.raises(ValueError, match="`emoji_dir`"):
        load_source("emoji_scenes", caption_columns=("long",))


def test_patterns_are_expanded(tmp_path):
    for name in ("a0.tar", "a1.tar", "b1.tar", "[x].tar"):
        (tmp_path / name).touch()

    def names(pattern):
        return [Path(path).name for path in expand_pattern(f"{tmp_path}/{pattern}")]

    assert names("{a,b}1.tar") == ["a1.tar", "b1.tar"]
    assert names("a?.tar") == ["a0.tar", "a1.tar"]
    assert names("[x].tar") == ["[x].tar"]
    assert expand_pattern("https://a.b/{08..11}-{x,y}.tar")[:3] == [
        f"https://a.b/{n}.tar" for n in ("08-x", "08-y", "09-x")
    ]
    assert len(expand_pattern("https://a.b/{08..11}-{x,y}.tar")) == 8
    for pattern in ("{a,c}1.tar", "c*.tar", "c.tar"):
        with pytest.raises(ValueError, match=r"file .*c.* does not exist"):
            expand_pattern(f"{tmp_path}/{pattern}")


def test_slice_selects_a_range(folder):
    source = load_source(str(folder))
    part = Slice(source, 1, 3)
    assert [part[i]["caption"] for i in range(2)] == [source[i]["caption"] for i in (1, 2)]
    assert (len(part), part.captions(1), part.size(1)) == (2, source.captions(2), (24, 16))


def test_missing_columns_are_refused_with_a_remedy(folder):
    with pytest.raises(ValueError, match=r"`image_column` is 'img'.* 'image', 'text': pass `--image_column image`"):
        load_source(str(folder), image_column="img")
    with pytest.raises(ValueError, match=r"`caption_column` is 'long'.* 'text': pass `--caption_column text`"):
        load_source(str(folder), caption_columns=("text", "long"))
    rows_of_four().rename_column("text", "caption").to_parquet(folder.parent / "a.parquet")
    for load in (load_source, load_stream):
        with pytest.raises(ValueError, match=r"`caption_column` is 'text'.* pass `--caption_column caption`"):
            load(f"{folder.parent}/a.parquet")


def test_missing_files_are_refused(folder):
    for name in ("*.parquet", "1.tar"):
        with pytest.raises(ValueError, match="does not exist"):
            load_source(f"{folder}/{name}")


def test_broken_metadata_end_the_run(folder):
    text = (folder / "metadata.jsonl").read_text()
    broken = {
        "UnicodeDecodeError": text.replace("caption 2", "K\xe4uzchen").encode("latin-1"),
        "line 4": text[:-5].encode(),
        "line 1 is not a mapping": b"[]",
        "line 2": text.replace("\n", "\n" + "[" * 100_000 + "\n", 1).encode(),
    }
    for reason, content in broken.items():
        (folder / "metadata.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=rf"metadata\.jsonl cannot be read: .*{reason}"):
            load_source(str(folder))
    (folder / "metadata.jsonl").write_text(text.replace('"caption 2"', "5"))
    source = load_source(str(folder))
    with pytest.raises(UnreadableSample, match=r"`text` .*5"):
        source.captions(2)
    assert source[3]["caption"] == "caption 3"


def test_a_full_disk_ends_the_run_with_a_remedy(tmp_path):
    images = [noise(100, 100, seed) for seed in range(4)]
    rows = datasets.Dataset.from_dict({"image": images, "text": ["a cat"] * 4})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    with full_disk(20_000), pytest.raises(OSError, match=r"No space left .*HF_DATASETS_CACHE"):
        load_source(f"{tmp_path}/a.parquet")
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert len(load_source(f"{tmp_path}/a.parquet")) == 4


@pytest.mark.parametrize("damage", ["image", "caption"])
def test_an_unreadable_sample_is_replaced_reported_and_counted(folder, damage):
    if damage == "image":
        (folder / "1.png").write_bytes(b"")
    else:
        write_metadata(folder, [{**row, "text": None} if "1" in row["text"] else row for row in read_metadata(folder)])
    source = load_source(str(folder))
    with pytest.raises(UnreadableSample, match=r"^sample 1 \(.*1\.png\): "):
        source[1]
    data = samples(source)
    items = [data[Position(0, index, index)] for index in range(4)]
    assert [len(item["unreadable"]) for item in items] == [0, 1, 0, 0]
    assert items[1]["caption"] == source[2]["caption"]
    batch = collate(items)
    assert batch["pixels_uint8"].shape == (4, 3, 16, 16)
    assert batch["pixels_uint8"].dtype == torch.uint8
    assert len(batch["unreadable"]) == 1
    assert batch["sample_index"] == [0, 1, 2, 3]


def test_broken_image_and_caption_files_are_unreadable_samples(paired):
    (paired / "img.0.txt").write_bytes(b"\xef\xbb\xbf \r\n")
    (paired / "img.1.txt").write_bytes(b"K\xe4uzchen")
    (paired / "img.3.png").write_bytes(b"")
    source = load_source(str(paired))
    reasons = []
    for i in range(4):
        try:
            source[i]
        except UnreadableSample as error:
            reasons.append(str(error))
    for reason, expected in zip(reasons, ("`text` is empty", "UTF-8", "image"), strict=True):
        assert expected in reason
