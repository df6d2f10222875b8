"""Where images come from, what is done with those that cannot be read, and how an image becomes a sample."""

import json
import random
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_prx.data.sources import (
    Slice,
    TrainingSamples,
    UnreadableSample,
    build_loader,
    collate,
    fit_image,
    load_images,
    to_rgb,
)
from diffusers_prx.data.stream import Position
from diffusers_prx.training.rng import derive_seed

COLOURS = [(250, 10, 20), (10, 240, 30), (20, 30, 230), (200, 200, 10)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(place: int, size: tuple[int, int] = (24, 16)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size, COLOURS[place % 4])


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


def open_data(name=None, folder=None, split="train", image_column="image", caption_column="text"):
    return load_images(name and str(name), None, split, folder and str(folder), image_column, caption_column)


def samples(source, resolution=16, center_crop=False, random_flip=False, seed=0) -> TrainingSamples:
    return TrainingSamples(source, resolution, center_crop, random_flip, partial(derive_seed, seed))


def assert_complete(source):
    assert len(source) == 4
    assert sorted(source[i]["caption"] for i in range(4)) == [f"caption {i}" for i in range(4)]
    for i in range(4):
        sample = source[i]
        assert sample["image"].getpixel((3, 3)) == COLOURS[int(sample["caption"][-1])]


# Sources


def test_an_image_folder(folder):
    assert_complete(open_data(folder=folder))


def test_a_data_set_on_disk_with_and_without_splits(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [picture(i) for i in range(4)], "text": [f"caption {i}" for i in range(4)]}
    )
    rows.save_to_disk(tmp_path / "plain")
    assert_complete(open_data(tmp_path / "plain"))
    with pytest.raises(ValueError, match=r"`dataset_split` is 'test', but .*plain has no splits"):
        open_data(tmp_path / "plain", split="test")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "split")
    assert_complete(open_data(tmp_path / "split"))
    assert len(open_data(tmp_path / "split", split="test")) == 1
    with pytest.raises(ValueError, match=r"`dataset_split` is 'val', but .*split has \['test', 'train'\]"):
        open_data(tmp_path / "split", split="val")


def test_a_folder_of_parquet_files(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"photo": [picture(i) for i in range(4)], "captions": [[f"caption {i}", "another"] for i in range(4)]}
    ).cast_column("photo", datasets.Image())
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train-00000.parquet")
    assert_complete(open_data(tmp_path / "parquet", image_column="photo", caption_column="captions"))


def test_wrong_columns_are_refused_with_those_that_are_there(folder):
    with pytest.raises(ValueError, match=r"`image_column` is 'img', but the data set has \['image', 'text'\]"):
        open_data(folder=folder, image_column="img")
    with pytest.raises(ValueError, match=r"`caption_column` is 'caption', but the data set has \['image', 'text'\]"):
        open_data(folder=folder, caption_column="caption")


def test_a_folder_that_is_none_and_one_without_metadata(folder):
    with pytest.raises(ValueError, match="`train_data_dir` is no folder: nowhere"):
        open_data(folder="nowhere")
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"photos has no metadata\.jsonl with file_name and captions"):
        open_data(folder=folder)


def test_images_without_metadata_are_reported(folder, caplog):
    picture(0).save(folder / "extra.jpg")
    source = open_data(folder=folder)
    assert_complete(source)
    assert "1 images in" in caplog.text
    assert "are in no metadata.jsonl and are not used" in caplog.text


def test_a_slice(folder):
    source = open_data(folder=folder)
    assert [Slice(source, 1, 3)[i]["caption"] for i in range(2)] == [source[i]["caption"] for i in (1, 2)]
    assert len(Slice(source, 1, 3)) == 2


# Samples that cannot be read


def break_truncated(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(folder / "1.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:2000])


def break_text(folder: Path) -> None:
    (folder / "1.png").write_text("this is no picture")


def break_empty(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"")


def break_missing_file(folder: Path) -> None:
    write_metadata(folder, [{**r, "file_name": r["file_name"].replace("1", "gone")} for r in read_metadata(folder)])


def break_missing_caption(folder: Path) -> None:
    write_metadata(folder, [{**r, "text": None} if "1" in r["text"] else r for r in read_metadata(folder)])


def break_range(folder: Path) -> None:
    PIL.Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(folder / "1.png", format="TIFF")


@pytest.mark.parametrize(
    "damage", [break_truncated, break_text, break_empty, break_missing_file, break_missing_caption, break_range]
)
def test_an_unreadable_sample_is_replaced_reported_and_counted(folder, damage):
    damage(folder)
    source = open_data(folder=folder)
    bad = []
    for index in range(4):
        try:
            source[index]
        except UnreadableSample as error:
            bad.append((index, str(error)))
    ((bad, message),) = bad
    assert message.startswith(f"sample {bad} has no ")
    data = samples(source)
    items = [data[Position(0, place, place)] for place in range(4)]
    assert [len(item["unreadable"]) for item in items] == [int(place == bad) for place in range(4)]
    assert items[bad]["caption"] == source[(bad + 1) % 4]["caption"]
    batch = collate(items)
    assert batch["pixels_uint8"].shape == (4, 3, 16, 16)
    assert batch["pixels_uint8"].dtype == torch.uint8
    assert len(batch["unreadable"]) == 1
    assert batch["sample_index"] == [0, 1, 2, 3]


def test_when_nothing_can_be_read_it_says_so(folder):
    for file in folder.glob("*.png"):
        file.write_text("no picture")
    with pytest.raises(ValueError, match="None of the 4 samples can be read; the first: sample 2 has no readable"):
        samples(open_data(folder=folder))[Position(0, 0, 2)]


# From any kind of image to RGB


def test_kinds_of_images(tmp_path):
    red = (250, 10, 20)
    half = np.zeros((8, 8, 4), dtype=np.uint8)
    half[:, 4:] = (*red, 255)  # the left half is transparent, and black below that
    rgba = PIL.Image.fromarray(half)
    cases = {
        "rgba.png": (rgba, [(255, 255, 255), red]),
        "la.png": (rgba.convert("LA"), [(255, 255, 255), (rgba.convert("L").getpixel((6, 2)),) * 3]),
        "palette.gif": (rgba.convert("RGB").quantize(4), [(0, 0, 0), red]),
        "grey.png": (PIL.Image.new("L", (8, 8), 77), [(77, 77, 77)] * 2),
        "one_bit.png": (PIL.Image.new("1", (8, 8), 1), [(255, 255, 255)] * 2),
        "cmyk.jpg": (PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), [(255, 0, 0)] * 2),
        "sixteen.png": (PIL.Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16)), [(128, 128, 128)] * 2),
    }
    for name, (image, wanted) in cases.items():
        image.save(tmp_path / name)
        with PIL.Image.open(tmp_path / name) as opened:
            found = to_rgb(opened)
        assert found.mode == "RGB"
        for x, colour in zip((2, 6), wanted):
            assert np.abs(np.subtract(found.getpixel((x, 2)), colour)).max() <= 3, name


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = PIL.Image.new("P", (8, 8), 1)
    image.putpalette([0, 255, 0, 250, 10, 20])
    image.paste(0, (0, 0, 4, 8))
    image.save(tmp_path / "p.png", transparency=0)
    with PIL.Image.open(tmp_path / "p.png") as opened:
        found = to_rgb(opened)
    assert found.getpixel((1, 1)) == (255, 255, 255)
    assert found.getpixel((6, 1)) == (250, 10, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_that_a_camera_wrote(folder, orientation):
    upright = PIL.Image.new("RGB", (24, 16), (0, 0, 0))
    upright.paste((255, 255, 255), (0, 0, 12, 8))  # the upper left quarter is white
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL.Image.Transpose that gives what is stored
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored.save(folder / "1.png", exif=exif)
    source = open_data(folder=folder)
    image = next(source[i]["image"] for i in range(4) if source[i]["caption"] == "caption 1")
    assert np.array_equal(np.asarray(image), np.asarray(upright))


# Resizing, cropping, flipping


def test_the_shorter_side_fits_and_the_centre_is_cut():
    image = PIL.Image.new("RGB", (64, 32), (0, 0, 0))
    image.paste((255, 255, 255), (16, 0, 48, 32))
    fitted = fit_image(image, 16, center_crop=True, random_flip=False, rng=random.Random(0))
    assert fitted.size == (16, 16)
    assert np.asarray(fitted)[:, 1:-1].min() > 240


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (100, 7), (7, 100), (333, 250), (1, 1)])
def test_any_size_fits(size):
    assert fit_image(PIL.Image.new("RGB", size), 16, False, True, random.Random(0)).size == (16, 16)


def test_an_image_of_the_right_size_is_not_touched():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    fitted = fit_image(PIL.Image.fromarray(noise), 16, False, False, random.Random(0))
    assert np.array_equal(np.asarray(fitted), noise)


def test_shrinking_does_not_alias():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    fitted = np.asarray(fit_image(PIL.Image.fromarray(stripes), 16, True, False, random.Random(0)))
    assert np.abs(fitted.astype(int) - 128).max() < 40  # every pixel is the mean, none is a stripe


class Ramp:
    """Pictures whose pixels tell where they come from: red is the column, green the row."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        y, x = np.mgrid[0:40, 0:60]
        return {"image": PIL.Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)), "caption": str(index)}


def test_crop_and_flip_follow_from_seed_step_and_sample():
    def crops(seed, **options):
        data = TrainingSamples(Ramp(), 40, False, True, partial(derive_seed, seed), **options)
        return [data[Position(0, i, i)]["pixels_uint8"] for i in range(50)]

    first, again, other = crops(0), crops(0), crops(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    lefts = {int(crop[0, 0, 0].minimum(crop[0, 0, -1])) for crop in first}
    flipped = sum(bool(crop[0, 0, 0] > crop[0, 0, -1]) for crop in first)
    assert len(lefts) > 10  # of 21 places
    assert lefts <= set(range(21))
    assert 12 < flipped < 38  # of 50
    later = TrainingSamples(Ramp(), 40, False, True, partial(derive_seed, 0))[Position(1, 0, 0)]["pixels_uint8"]
    assert not torch.equal(later, first[0])  # another epoch is cropped in another place


def test_small_images_are_counted_as_upscaled(folder):
    for resolution, count in ((16, 0), (17, 4), (24, 4)):
        data = samples(open_data(folder=folder), resolution)
        assert collate([data[Position(0, i, i)] for i in range(4)])["upscaled"] == count


def test_workers_change_nothing(folder):
    data = samples(open_data(folder=folder), random_flip=True)
    batches = [[Position(s, 2 * s + i, (2 * s + i) % 4) for i in range(2)] for s in range(3)]
    alone, helped = (list(build_loader(data, batches, workers)) for workers in (0, 2))
    for a, b in zip(alone, helped):
        assert torch.equal(a.pop("pixels_uint8"), b.pop("pixels_uint8"))
        assert a == b
