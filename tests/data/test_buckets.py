"""Bucket sizes, the assignment of images to them, and image sizes from headers."""

import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from diffusers_prx.data import buckets as module
from diffusers_prx.data.buckets import (
    Buckets,
    assign_bucket,
    compute_buckets,
    image_sizes,
    resize_scale_and_crop,
    sort_into_buckets,
    study_buckets,
)
from diffusers_prx.data.captioned import Slice
from diffusers_prx.data.images import UnreadableSample
from diffusers_prx.data.sources import FolderImages
from disks import full_disk


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_study_buckets_are_symmetric_and_maximal(resolution):
    sizes = study_buckets(resolution, 32)
    assert (resolution, resolution) in sizes
    assert all(0.85 < height * width / resolution**2 <= 1 for height, width in sizes)
    assert {(width, height) for height, width in sizes} == set(sizes)
    assert len(sizes) == {256: 7, 512: 13, 1024: 27}[resolution]
    for height, width in sizes:  # a longer side would exceed the area of the square
        larger = {(height + 32) * width, height * (width + 32)}
        assert max(larger) > resolution**2
    ratios = [height / width for height, width in sizes]
    assert ratios == sorted(ratios)


def test_study_buckets_reject_other_resolutions_and_multiples():
    with pytest.raises(ValueError, match=r"`resolution` is 768.* \[256, 512, 1024\]"):
        study_buckets(768)
    with pytest.raises(ValueError, match=r"`resolution` 256 .*64.* \[\(160, 352\), "):
        study_buckets(256, 64)


@pytest.mark.parametrize(
    ("resolution", "multiple", "max_ratio"),
    [(256, 16, 2.0), (256, 32, 2.5), (512, 32, 2.0), (1024, 64, 4.0), (96, 8, 3.0), (320, 80, 2.0), (33, 33, 2.0)],
)
def test_computed_buckets_are_the_largest_for_each_short_side(resolution, multiple, max_ratio):
    every = range(multiple, 8 * resolution, multiple)
    fitting = [(h, w) for h in every for w in every if h * w <= resolution**2]
    expected = set()
    for short in range(multiple, resolution + 1, multiple):
        long = max(w for h, w in fitting if h == short)
        if long <= max_ratio * short:
            expected |= {(short, long), (long, short)}
    found = compute_buckets(resolution, multiple, max_ratio)
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert [h / w for h, w in found] == sorted(h / w for h, w in found)
    assert all(h * w > (1 - multiple / max(h, w)) * resolution**2 for h, w in found)


def test_computed_buckets_are_close_to_the_study():
    """At 512 pixels the study has two more near 5:3, and 2:1 as 704 x 352."""
    study, computed = set(study_buckets(512)), set(compute_buckets(512, 32))
    assert computed < study
    assert study - computed == {(384, 640), (640, 384), (352, 704), (704, 352)}
    assert compute_buckets(64, 16, 1.0) == [(64, 64)]


@pytest.mark.parametrize("arguments", [(256, 48), (16, 32), (0, 16), (256, 0), (256, 16, 0.5), (256, 16, math.inf)])
def test_compute_buckets_rejects_invalid_arguments(arguments):
    name = "max_ratio" if len(arguments) == 3 else "resolution"
    with pytest.raises(ValueError, match=f"`{name}`.* got {arguments[-1] if name == 'max_ratio' else arguments[0]}"):
        compute_buckets(*arguments)


@pytest.mark.parametrize("sizes", [study_buckets(256), study_buckets(1024), compute_buckets(96, 8, 4.0), [(8, 8)]])
def test_assign_bucket_finds_the_nearest_ratio(sizes):
    rng = np.random.default_rng(0)
    sizes = [sizes[number] for number in rng.permutation(len(sizes))]
    width, height = rng.integers(1, 400, (2, 500))
    found = assign_bucket(width, height, sizes)
    for w, h, bucket in zip(width.tolist(), height.tolist(), found):
        distances = [max(h * bw / (w * bh), w * bh / (h * bw)) for bh, bw in sizes]
        assert distances[bucket] <= min(distances) * (1 + 1e-12)
    assert int(assign_bucket(300, 200, [(2, 3), (3, 2)])) == 0
    assert all(sizes[int(assign_bucket(w, h, sizes))] == (h, w) for h, w in sizes)


def slow_cover(width: int, height: int, size: tuple[int, int]) -> tuple[float, float]:
    """Enlarge in small steps until the size is covered; measure the cropped share in areas."""
    scale = 1e-3
    while width * scale < size[1] - 1e-9 or height * scale < size[0] - 1e-9:
        scale += 1e-3
    return scale, (width * scale * height * scale - size[0] * size[1]) / (width * scale * height * scale)


@pytest.mark.parametrize("image", [(40, 30), (30, 40), (64, 64), (200, 100), (10, 20), (3, 90)])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)])
def test_resize_scale_and_crop_equal_a_slow_search(image, size):
    scale, crop = resize_scale_and_crop(*image, size)
    slow_scale, slow_crop = slow_cover(*image, size)
    assert -1e-9 < slow_scale - scale < 1.001e-3
    assert crop == pytest.approx(slow_crop, abs=3e-3 / scale)


def sort_slowly(image_sizes, sizes, minimum, max_upscale, max_crop):
    """Return {size: images} and {reason: count}, one image after another."""
    sizes = list(sizes)
    while True:
        members: dict = {size: [] for size in sizes}
        out = Counter()
        for index, (w, h) in enumerate(image_sizes.tolist()):
            if not (w and h):
                out["unreadable"] += 1
                continue
            bh, bw = min(sizes, key=lambda size: abs(math.log(size[0] / size[1] / (h / w))))
            scale = bh / h if bh / h > bw / w else bw / w
            kept = bh * bw / (w * h * scale * scale)
            if 1 - kept > max_crop + 1e-12:
                out["too elongated"] += 1
            elif scale > max_upscale:
                out["too small"] += 1
            else:
                members[bh, bw].append(index)
        least = min(sizes, key=lambda size: len(members[size]))
        if len(sizes) == 1 or len(members[least]) >= minimum:
            return members, out
        sizes.remove(least)


@pytest.mark.parametrize("minimum", [0, 1, 12, 40, 10**6])
@pytest.mark.parametrize(
    ("max_upscale", "max_crop"), [(1.0, 0.5), (1.5, 0.2), (1.0, 1.0), (100.0, 0.0), (math.inf, 0.3)]
)
def test_sort_into_buckets_equals_a_slow_loop(minimum, max_upscale, max_crop):
    rng = np.random.default_rng(2)
    found = np.concatenate(
        [rng.integers(20, 200, (300, 2)), np.array([[0, 0], [1, 20000], [20000, 1], [1, 1], [64, 64], [8, 8]])]
    ).astype(np.int32)
    sizes = compute_buckets(64, 8, 2.0)
    buckets = sort_into_buckets(found, sizes, minimum, max_upscale, max_crop)
    members, out = sort_slowly(found, sizes, minimum, max_upscale, max_crop)
    assert {size: list(m) for size, m in zip(buckets.sizes, buckets.members)} == members
    assert {reason.partition(" (")[0]: count for reason, count in buckets.left_out.items()} == +out
    assert sum(buckets.counts().values()) + sum(buckets.left_out.values()) == len(found)
    assert len(buckets.sizes) == 1 or min(buckets.counts().values()) >= minimum
    all_members = np.concatenate(buckets.members)
    assert len(set(all_members.tolist())) == len(all_members)  # an image is in one bucket
    for bucket, images in enumerate(buckets.members):  # the check while samples are read agrees
        assert all(buckets.rejection_reason(*map(int, found[index]), bucket) is None for index in images)


def test_sort_into_buckets_counts_extreme_images():
    found = np.array([[1, 20000], [20000, 1], [100_000, 5000], [1, 1], [31, 64], [64, 64], [0, 0]], dtype=np.int32)
    buckets = sort_into_buckets(found, [(32, 64), (64, 32), (45, 45)], 0)
    assert buckets.left_out == {
        "too elongated (more than 50% would be cropped)": 3,
        "too small (would be enlarged more than 1 times)": 2,
        "unreadable": 1,
    }
    assert buckets.counts() == {(32, 64): 0, (64, 32): 0, (45, 45): 1}
    assert buckets.rejection_reason(1, 20000, 1) == "1 x 20000 pixels are too elongated: 100.0% would be cropped"
    assert buckets.rejection_reason(31, 64, 1) == "31 x 64 pixels are too small: they would be enlarged 1.03 times"
    assert buckets.rejection_reason(32, 64, 1) is None


def test_summary_lists_buckets_and_excluded_images():
    found = np.array([[64, 64]] * 6 + [[40, 80]] * 3 + [[90, 30]] * 1 + [[5, 5]] * 2, dtype=np.int32)
    buckets = sort_into_buckets(found, [(64, 64), (80, 40), (40, 80)], 2, max_crop=0.8)
    assert buckets.summary().splitlines() == [
        "9 images in 2 buckets (height x width):",
        "  64 x 64: 6 images (66.7%)",
        "  80 x 40: 3 images (33.3%)",
        "  left out: 3 too small (would be enlarged more than 1 times)",
    ]
    closed = sort_into_buckets(found[5:9], [(64, 64), (64, 32)], 2)
    assert "  64 x 64: closed, its 1 images are too few for a step" in closed.summary().splitlines()
    assert closed.counts() == {(64, 32): 4}  # the square image is cropped by half, which is allowed


def test_square_bucket_needs_no_sizes():
    buckets = Buckets.square(64, 2**40)
    assert buckets.counts() == {(64, 64): 2**40}
    assert buckets.rejection_reason(64, 20000, 0) is None
    assert "too small" in buckets.rejection_reason(63, 64, 0)
    assert pickle.loads(pickle.dumps(buckets)) == buckets


def test_sort_into_buckets_rejects_invalid_limits_and_data_without_a_fitting_image():
    found = np.array([[10, 10], [0, 0]], dtype=np.int32)
    for changes in ({"max_upscale": 0.5}, {"max_upscale": math.nan}, {"max_crop": -0.1}, {"max_crop": 1.5}):
        with pytest.raises(ValueError, match=f"`{next(iter(changes))}`.* got {next(iter(changes.values()))}"):
            sort_into_buckets(found, [(8, 8)], 1, **changes)
    with pytest.raises(ValueError, match=r"small.*: 1.*`--resolution`"):
        sort_into_buckets(found, [(64, 64)], 1)
    with pytest.raises(ValueError, match=r"'unreadable': 1"):
        sort_into_buckets(found[1:], [(64, 64), (32, 64)], 1)


FORMATS = ("jpg", "png", "webp", "tif")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images of all formats and orientations, one broken, one empty, one long."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, ending in enumerate(FORMATS):
        for orientation in range(1, 9):
            exif = PIL.Image.Exif()
            exif[0x0112] = orientation
            name = f"{ending}-{orientation}"
            PIL.Image.new("RGB", (30 + number, 50 + orientation)).save(folder / f"{name}.{ending}", exif=exif)
            (folder / f"{name}.txt").write_text("a caption")
    PIL.Image.new("L", (1, 20000)).save(folder / "long.png")
    (folder / "broken.png").write_bytes((folder / "png-1.png").read_bytes()[:20])
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def decoded_sizes(source) -> list[tuple[int, int]]:
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index]["image"].size)
        except UnreadableSample:
            found.append((0, 0))
    return found


def open_folder(folder: Path) -> FolderImages:
    for file in list(folder.iterdir()):
        file.with_suffix(".txt").write_text("a caption")
    return FolderImages(folder, ["txt"])


def test_image_sizes_equal_those_of_decoded_images(folder):
    source = open_folder(folder)
    sizes = image_sizes(source)
    assert sizes.dtype == np.int32
    assert list(map(tuple, sizes.tolist())) == decoded_sizes(source)
    assert Counter(map(tuple, sizes.tolist()))[0, 0] == 2
    part = Slice(source, 3, 9)
    assert image_sizes(part).tolist() == sizes[3:9].tolist()
    assert np.array_equal(image_sizes(source, num_workers=2), sizes)


def test_image_sizes_decode_no_pixels(folder):
    source = open_folder(folder)
    expected = image_sizes(source)
    for file in folder.glob("*.jpg"):  # everything after the last header, that of the scan, is removed
        if file.stat().st_size:
            file.write_bytes(file.read_bytes()[: file.read_bytes().index(b"\xff\xda") + 14])
    assert np.array_equal(image_sizes(source), expected)


def test_image_sizes_are_cached(folder, tmp_path, monkeypatch, caplog):
    cache = tmp_path / "cache" / "sizes.npz"
    source = open_folder(folder)
    sizes = image_sizes(source, cache_file=cache)
    assert [file.name for file in cache.parent.iterdir()] == ["sizes.npz"]
    assert np.array_equal(np.load(cache)["sizes"], sizes)
    monkeypatch.setattr(module, "IMAGES_COMPARED", 2)
    saved = sizes.copy()
    saved[7] = (11, 12)  # an index that is not compared
    np.savez(cache, sizes=saved)
    assert image_sizes(source, cache_file=cache)[7].tolist() == [11, 12]
    assert not caplog.text


@pytest.mark.parametrize("damage", ["other image", "other number", "truncated", "flipped bit", "no array"])
def test_a_damaged_or_foreign_size_cache_is_replaced(folder, tmp_path, caplog, damage):
    cache = tmp_path / "sizes.npz"
    source = open_folder(folder)
    sizes = image_sizes(source, cache_file=cache)
    if damage == "other image":
        PIL.Image.new("RGB", (77, 78)).save(source.paths[0])
        sizes[0] = (77, 78)
    elif damage == "other number":
        np.savez(cache, sizes=sizes[1:])
    elif damage == "truncated":
        cache.write_bytes(cache.read_bytes()[:150])
    elif damage == "flipped bit":
        content = bytearray(cache.read_bytes())
        content[content.index(sizes.tobytes()) + 7] ^= 1
        cache.write_bytes(content)
    else:
        cache.write_text("sizes")
    found = image_sizes(source, cache_file=cache)
    assert found.tolist() == sizes.tolist() == np.load(cache)["sizes"].tolist()
    assert str(cache) in caplog.text


def test_a_full_disk_leaves_no_partial_size_cache(folder, tmp_path):
    cache = tmp_path / "sizes.npz"
    with full_disk(100), pytest.raises(OSError, match=r"requested|File too large"):
        image_sizes(open_folder(folder), cache_file=cache)
    assert list(tmp_path.glob("sizes*")) == []
