"""Precomputed data: shards, their index, damage, and samples equal to those read from the images."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from diffusers_prx.data import precomputed as module
from diffusers_prx.data.buckets import Buckets, sort_into_buckets
from diffusers_prx.data.precomputed import (
    ImagesToEncode,
    PrecomputedImages,
    PrecomputedSamples,
    Shard,
    ShardCheck,
    ShardCheckDataset,
    ShardWriter,
    cached_text,
    caption_hash,
    collate_precomputed,
    next_shard_number,
    processed_samples,
    shard_files,
    shard_path,
    write_empty_text,
    write_index,
    write_settings,
    write_shard,
)
from diffusers_prx.data.samplers import StreamSampler, every_sample_once
from diffusers_prx.data.samples import TrainingSamples, build_loader
from diffusers_prx.data.sources import load_source
from diffusers_prx.files import read_hashed_json
from diffusers_prx.training.rng import derive_seed
from disks import full_disk

SIZES = [(20, 30), (30, 20), (16, 16), (40, 16), (16, 17), (25, 25), (9, 9), (33, 18), (18, 33)]  # (9, 9) is too small
BROKEN = 3
SEEDS = partial(derive_seed, 7)
SETTINGS = {"samples": len(SIZES), "vae": "a", "teacher_features": None, "pixels": True}
WIDTH = 5


def make_folder(folder: Path) -> Path:
    """Write images with two captions each, except for a missing caption and a broken image."""
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.long.txt").write_text(f"a long caption of picture {number} " + "and more " * number)
        if number != 5:
            (folder / f"{number}.short.txt").write_text(f"picture {number}")
    (folder / f"{BROKEN}.png").write_bytes(b"nothing")
    return folder


def embed(caption: str) -> torch.Tensor:
    """Replace a text encoder: one row per word."""
    rows = [torch.full((WIDTH,), float(len(word))) + torch.arange(WIDTH) for word in caption.split()]
    return torch.stack([torch.ones(WIDTH), *rows]).bfloat16()


def square(count: int = len(SIZES)) -> Buckets:
    return Buckets.square(16, count, 1.0, 0.9)


def make_cache(folder: Path, source, buckets: Buckets, shard_samples: int = 3, indices=None) -> Path:
    folder.mkdir(exist_ok=True)
    write_empty_text(folder, embed(""))
    writer, images = ShardWriter(folder, 0, next_shard_number(folder), shard_samples), ImagesToEncode(source, buckets)
    for bucket, members in enumerate(buckets.members):
        for index in members:
            if indices is not None and index not in indices:
                continue
            item = images[int(index), bucket]
            if "skipped" in item:
                writer.skip(item["index"], *item["skipped"])
                continue
            texts = [embed(caption) for caption in item.pop("captions")]
            lengths = torch.tensor([len(text) for text in texts])
            writer.add({**item, "text": torch.cat(texts), "text_lengths": lengths, "cut": lengths > 12})
    writer.write()
    write_index(folder, SETTINGS, {"vae_name_or_path": "the one"})
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return load_source(str(make_folder(tmp_path_factory.mktemp("images"))), caption_columns=("short.txt", "long.txt"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, source) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache"), source, square())


@pytest.fixture(scope="module")
def images(folder) -> PrecomputedImages:
    return PrecomputedImages(folder, SETTINGS, ["pixels_uint8"])


def test_a_shard_returns_every_value(tmp_path):
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "index": torch.tensor(5 * number),
            "latent_mean": torch.randn(4, 2 + number, 3, generator=generator),
            "text": torch.randn(number, 6, generator=generator).bfloat16(),  # the first has none
            "cut": torch.tensor([number > 1]),
        }
        for number in range(3)
    ]
    write_shard(tmp_path / "a.safetensors", samples, {7: ("unfit", "too é", "0")})
    shard = Shard(tmp_path / "a.safetensors")
    for row in (2, 0, 1):
        for name, value in samples[row].items():
            read = shard.value(name, row)
            assert read.dtype == value.dtype
            assert torch.equal(read, value)
    assert shard.indices == [0, 5, 10]
    assert shard.skipped == {7: ("unfit", "too é", "0")}
    assert (tmp_path / "a.safetensors").stat().st_size == pytest.approx(sum(shard.bytes.values()), abs=1500)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:  # stored as the module's table states
        assert file.get_slice("text").get_shape() == [3 * 6]
        assert file.get_slice("text").get_dtype() == "BF16"


def test_a_shard_may_contain_skipped_samples_only(tmp_path):
    write_shard(shard_path(tmp_path, 0, 4), [], {1: ("unreadable", "broken", "0")})
    assert processed_samples(tmp_path, 3).tolist() == [False, True, False]
    assert next_shard_number(tmp_path) == 5


def test_shard_writer_writes_full_shards_and_the_rest(tmp_path):
    writer = ShardWriter(tmp_path, 2, 6, 2)
    for index in range(5):
        writer.add({"index": torch.tensor(index)})
        assert len(shard_files(tmp_path)) == (index + 1) // 2
    writer.write()
    writer.write()
    assert [path.name for path in shard_files(tmp_path)] == [
        f"shard-00002-00000{number}.safetensors" for number in (6, 7, 8)
    ]
    assert [Shard(path).indices for path in shard_files(tmp_path)] == [[0, 1], [2, 3], [4]]


def test_hashes_distinguish_images_and_captions(source):
    hashes = {source.image_hash(index) for index in range(len(SIZES))}
    assert {len(digest) for digest in hashes} == {16}
    assert len(hashes) == len(SIZES)
    assert not torch.equal(caption_hash("a cat"), caption_hash("a cat "))


def test_images_to_encode_equal_training_samples(source):
    sizes = np.array([(width, height) for width, height in SIZES])
    sizes[BROKEN] = 0
    buckets = sort_into_buckets(sizes, [(8, 16), (12, 12), (16, 8)], 1, 1.0, 0.9)
    training = TrainingSamples(source, buckets, True, False, SEEDS)
    to_encode = ImagesToEncode(source, buckets)
    seen = 0
    for (position,) in every_sample_once(buckets, 1):
        expected, item = training[position], to_encode[position.dataset_index, position.bucket]
        assert torch.equal(item["pixels_uint8"], expected["pixels_uint8"])
        assert tuple(item["size"].tolist()) == tuple(expected["pixels_uint8"].shape[1:])
        assert item["captions"][0] == expected["caption"]
        assert item["upscaled"] == expected["upscaled"]
        seen += 1
    assert seen == 7
    assert to_encode[BROKEN, 0]["skipped"][0] == "unreadable"


WEIGHTS = {"short.txt": 0.5, "long.txt": 0.5}


@pytest.mark.parametrize(("weights", "workers"), [(None, 0), (WEIGHTS, 0), (WEIGHTS, 2)])
def test_precomputed_samples_equal_those_of_the_images(source, images, weights, workers):
    """Unusable samples are replaced and counted in the same way."""
    buckets = square()

    def read(build, samples):
        return list(build(samples, StreamSampler(len(SIZES), 4, 0, 8, seed=3), workers))

    expected = read(build_loader, TrainingSamples(source, buckets, True, False, SEEDS, weights))
    got = read(
        partial(build_loader, collate_fn=collate_precomputed),
        PrecomputedSamples(images, source, buckets, SEEDS, weights),
    )
    for batch, reference in zip(got, expected, strict=True):
        assert torch.equal(batch["pixels_uint8"], reference["pixels_uint8"])
        for name in ("captions", "sample_index", "unfit", "upscaled"):
            assert batch[name] == reference[name], name
        assert batch["unreadable"] == reference["unreadable"]
        texts = [embed(caption) for caption in batch["captions"]]
        assert torch.equal(batch["text"], pad_sequence(texts, batch_first=True))
        assert batch["text_lengths"] == [len(text) for text in texts]
        assert batch["cut"] == [len(text) > 12 for text in texts]
    assert sum(len(batch["unreadable"]) for batch in got) >= 3
    assert sum(batch["unfit"] for batch in got) >= 3
    assert len({caption.split()[0] for batch in got for caption in batch["captions"]}) == 2  # both kinds


def test_precomputed_samples_can_be_pickled_for_workers(source, images):
    samples = PrecomputedSamples(images, source, square(), SEEDS)
    position = StreamSampler(len(SIZES), 1, 0, 1).position(0, 1)
    before, after = samples[position], pickle.loads(pickle.dumps(samples))[position]
    assert torch.equal(before["text"], after["text"])


def test_cached_text_pads_and_replaces_dropped_captions(images, source):
    buckets = square()
    samples = PrecomputedSamples(images, source, buckets, SEEDS)
    batch = next(iter(build_loader(samples, StreamSampler(len(SIZES), 4, 0, 1, seed=1), 0, collate_precomputed)))
    batch["cut"] = [True, True, False, True]
    text, mask, truncated = cached_text(batch, [False, True, False, False])
    rows = [embed(caption) for caption in batch["captions"]]
    rows[1] = embed("")
    assert text.dtype == torch.float32
    assert text.shape[1] == mask.shape[1] == max(len(row) for row in rows)
    for row, own, kept in zip(rows, text, mask):
        assert torch.equal(own[kept], row.float())
        assert kept.tolist() == [True] * len(row) + [False] * (len(kept) - len(row))
    assert truncated == 2  # the dropped one does not count
    text, mask, truncated = cached_text(batch, [True] * 4)
    assert (text.shape, mask, truncated) == ((4, 1, WIDTH), None, 0)


def test_an_unfinished_cache_is_refused(tmp_path, source):
    with pytest.raises(ValueError, match=r"`precomputed_dir`.* has no index.json"):
        PrecomputedImages(tmp_path, SETTINGS, [])
    make_cache(tmp_path, source, square())
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match=r"`precomputed_dir`.* 3 shards"):
        PrecomputedImages(tmp_path, SETTINGS, [])


def test_a_cache_with_missing_samples_is_refused(tmp_path, source):
    cache = PrecomputedImages(make_cache(tmp_path, source, square(), indices={0, 1, 2, 3, 6}), SETTINGS, [])
    with pytest.raises(ValueError, match=r"4 of 9 samples are not in .* sample 4"):
        cache.verify(source, square())
    make_cache(tmp_path, source, square(), indices={4, 5, 7, 8})
    PrecomputedImages(tmp_path, SETTINGS, []).verify(source, square())


def test_a_cache_with_other_settings_is_refused(folder):
    with pytest.raises(ValueError, match=r"`vae` is 'a' there and 'b' here.*made from.*the one"):
        PrecomputedImages(folder, {**SETTINGS, "vae": "b"}, [])
    with pytest.raises(ValueError, match="`teacher_features` is None there and 'dino' here"):
        PrecomputedImages(folder, {**SETTINGS, "teacher_features": "dino"}, [])
    PrecomputedImages(folder, {**SETTINGS, "pixels": None}, [])  # the cache contains more than the run needs


def test_verify_detects_changed_images_captions_and_buckets(tmp_path, source, images):
    images.verify(source, square())
    with pytest.raises(ValueError, match=r"7 samples are in another bucket .*16 x 16 pixels there, 8 x 8 here"):
        images.verify(source, Buckets.square(8, len(SIZES)))
    make_folder(tmp_path)
    PIL.Image.new("RGB", SIZES[4]).save(tmp_path / "4.png")
    with pytest.raises(ValueError, match="The image of sample 4 is not the one"):
        images.verify(load_source(str(tmp_path), caption_columns=("short.txt",)), square())
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.raises(ValueError, match="The image of sample 4 is not the one"):
        images.verify(load_source(str(tmp_path), caption_columns=("short.txt",)), square())
    make_folder(tmp_path)
    (tmp_path / "2.short.txt").write_text("another picture")
    with pytest.raises(ValueError, match=r"caption of sample 2 is not the one .* now 'another picture'"):
        images.verify(load_source(str(tmp_path), caption_columns=("short.txt",)), square())


def test_a_sample_with_a_changed_or_missing_image_raises_an_error(tmp_path, images):
    make_folder(tmp_path)
    samples = PrecomputedSamples(images, load_source(str(tmp_path), caption_columns=("short.txt",)), square(), SEEDS)
    position = StreamSampler(len(SIZES), 1, 0, 9, shuffle=False).position(4, 4)
    assert samples[position]["caption"] == "picture 4"
    PIL.Image.new("RGB", SIZES[4]).save(tmp_path / "4.png")  # of the same size
    with pytest.raises(ValueError, match="The image of sample 4 is not the one"):
        samples[position]
    (tmp_path / "4.png").unlink()
    with pytest.raises(ValueError, match=r"sample 4 .*FileNotFoundError"):
        samples[position]


def test_a_sample_with_a_changed_caption_raises_an_error(tmp_path, images):
    make_folder(tmp_path)
    (tmp_path / "2.short.txt").write_text("another picture")
    samples = PrecomputedSamples(images, load_source(str(tmp_path), caption_columns=("short.txt",)), square(), SEEDS)
    sampler = StreamSampler(len(SIZES), 1, 0, 1, shuffle=False)
    samples[sampler.position(0, 1)]
    with pytest.raises(ValueError, match="caption of sample 2 is not the one that was embedded"):
        samples[sampler.position(0, 2)]


COLUMNS = ["pixels_uint8"]
STORED = ("index", "size", "image_hash", "upscaled", "pixels_uint8", "text", "text_lengths", "cut", "caption_hash")


def read_everything(folder: Path) -> None:
    """Read all values that a run or an unfinished precomputation reads."""
    cache = PrecomputedImages(folder, SETTINGS, COLUMNS)
    for index in np.flatnonzero(cache.sizes.all(1)):
        for name in STORED:
            cache.value(int(index), name)
    read_hashed_json(folder / "settings.json")


def flip_bits_of(folder: Path, count: int, seed: int) -> None:
    """Flip one bit of a cache at a time, and check that it is detected."""
    read_everything(folder)
    files = sorted(folder.iterdir())
    sizes = [file.stat().st_size for file in files]
    rng = np.random.default_rng(seed)
    for position in rng.integers(0, sum(sizes), count).tolist():
        number = int(np.searchsorted(np.cumsum(sizes), position, side="right"))
        file, offset = files[number], position - sum(sizes[:number])
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        module._open_shard.cache_clear()  # the tables of a shard are read once
        with pytest.raises(ValueError, match=file.name):
            read_everything(folder)
        file.write_bytes(whole)
    module._open_shard.cache_clear()
    read_everything(folder)


def make_cache_with_settings(folder: Path, source) -> Path:
    write_settings(make_cache(folder, source, square()), {"settings": SETTINGS, "made_from": {}})
    return folder


@pytest.mark.parametrize(("count", "seed"), [(40, 0), pytest.param(200, 1, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_in_a_cache_is_detected(tmp_path, source, count, seed):
    flip_bits_of(make_cache_with_settings(tmp_path, source), count, seed)


@pytest.mark.parametrize("column", ["pixels_uint8", "text_lengths"])
def test_changed_values_in_a_valid_file_are_detected(tmp_path, source, column):
    make_cache(tmp_path, source, square())
    path = shard_files(tmp_path)[1]
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[column] = 255 - tensors[column] if column == "pixels_uint8" else tensors[column] + 1
    save_file(tensors, path, metadata)
    cache = PrecomputedImages(tmp_path, SETTINGS, COLUMNS)
    with pytest.raises(ValueError, match=rf"{path} .* damaged: `{column}` of sample \d"):
        cache.verify(source, square())


def test_a_damaged_shard_is_refused(tmp_path, source):
    make_cache(tmp_path, source, square())
    path = shard_files(tmp_path)[1]
    whole = path.read_bytes()
    for damaged in (whole[:-10], b"", whole[:4], b"\0" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"The shard {path} .* cannot be read .*precompute_prx.py"):
            PrecomputedImages(tmp_path, SETTINGS, [])
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        PrecomputedImages(tmp_path, SETTINGS, [])


def test_a_shard_of_another_cache_is_refused(tmp_path, source):
    make_cache(tmp_path / "a", source, square())
    make_cache(tmp_path / "b", source, square(), shard_samples=2)
    path = shard_files(tmp_path / "a")[0]
    path.write_bytes(shard_files(tmp_path / "b")[0].read_bytes())
    with pytest.raises(ValueError, match=rf"{path} is not the one that index\.json lists"):
        PrecomputedImages(tmp_path / "a", SETTINGS, [])


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'{"settings": {}}', b"\xff", b"[" * 100_000])
def test_a_damaged_index_is_refused(tmp_path, source, content):
    make_cache(tmp_path, source, square())
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json is damaged.*precompute_prx\.py"):
        PrecomputedImages(tmp_path, SETTINGS, [])


def test_remove_invalid_keeps_undamaged_and_unchanged_samples(tmp_path):
    images, folder = tmp_path / "images", tmp_path / "cache"
    images.mkdir()

    def source():
        return load_source(str(images), caption_columns=("short.txt", "long.txt"))

    def checked() -> list[ShardCheck]:
        checks = ShardCheckDataset(shard_files(folder), source(), square())
        return [checks[number] for number in range(len(checks))]

    make_folder(images)
    make_cache(folder, source(), square(), shard_samples=2)  # samples 0 and 1, 2 and 4, 5 and 7, 8
    assert all(not check.damaged and not check.changed for check in checked())
    (images / "1.long.txt").write_text("another caption")
    PIL.Image.new("RGB", SIZES[2]).save(images / f"{BROKEN}.png")  # can be read now
    (images / "4.png").write_bytes(b"broken since")
    path = shard_files(folder)[2]
    content = bytearray(path.read_bytes())
    content[content.index(Shard(path).value("pixels_uint8", 1).numpy().tobytes()) + 9] ^= 1  # of sample 7
    path.write_bytes(content)
    checks = checked()
    assert [check.rows for check in checks] == [[0], [0], [0], [0]]
    assert [check.skipped for check in checks] == [[], [], [6], []]
    assert [len(check.damaged) for check in checks] == [0, 0, 1, 0]
    changed = [message.split(":")[0] for check in checks for message in check.changed]
    assert [message.split(",")[0].split(" (")[0] for message in changed] == ["sample 1", "sample 4", "sample 3"]
    for check in checks:
        check.remove_invalid()
    assert processed_samples(folder, len(SIZES)).nonzero()[0].tolist() == [0, 2, 5, 6, 8]
    assert all(not check.damaged and not check.changed for check in checked())


def test_a_bucket_without_a_usable_sample_ends_the_run(source, images):
    nothing = Buckets([(16, 16)], [[BROKEN, 6]], 1.0, 0.9)
    position = StreamSampler(2, 1, 0, 1).position(0, 0)
    with pytest.raises(ValueError, match=r"None of 2 samples .*1 are unreadable and 1 do not fit"):
        PrecomputedSamples(images, source, nothing, SEEDS)[position]


def test_a_full_disk_keeps_written_shards_and_says_how_to_resume(tmp_path):
    write_shard(shard_path(tmp_path, 0, 0), [{"index": torch.tensor(0), "text": torch.zeros(100)}], {})
    large = [{"index": torch.tensor(1), "text": torch.zeros(100_000)}]
    with full_disk(100_000), pytest.raises(OSError, match=r"000001.safetensors cannot be written .*same command"):
        write_shard(shard_path(tmp_path, 0, 1), large, {})
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000-000000.safetensors"]
    assert processed_samples(tmp_path, 2).tolist() == [True, False]
    write_shard(shard_path(tmp_path, 0, 1), large, {})
    assert processed_samples(tmp_path, 2).all()
    with full_disk(10), pytest.raises(OSError, match=r"settings.json cannot be written .* same command"):
        write_settings(tmp_path, {"name": "long enough"})
    assert not (tmp_path / "settings.json").exists()
