"""MDS shards: what the original trainer's writer stores is read; damage is named and bounded."""

import bz2
import gzip
import json
import struct

import numpy as np
import pytest

from diffusers_prx.data.captioned import decode_sample
from diffusers_prx.data.images import UnreadableSample
from diffusers_prx.data.iterable import StreamedImages
from diffusers_prx.data.sources import load_source, load_stream
from image_files import encode, noise

COLUMNS = {"caption": ("str", None), "image": ("png", None), "width": ("int", 8)}
PACK = {"gz": gzip.compress, "bz2": bz2.compress}


def pil_bytes(image):
    mode = image.mode.encode()
    return struct.pack("<3I", *image.size, len(mode)) + mode + image.tobytes()


def encode_sample(index, columns):
    image, caption = noise(8, 12, index), f"caption {index} \u00e9"
    values = {
        "image": pil_bytes(image) if columns["image"][0] == "pil" else encode(image),
        "caption": (caption if columns["caption"][0] == "str" else json.dumps([caption])).encode(),
        "width": struct.pack("<q", index),
    }
    sizes = [len(values[name]) for name, (_, size) in columns.items() if size is None]
    return struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(values[name] for name in columns)


def write_mds(folder, counts=(3, 2, 4), columns=COLUMNS, compression=None):
    """Write shards as the writer of mosaicml-streaming does; the sample of index i is `noise(8, 12, i)`."""
    folder.mkdir(parents=True)
    shards, first = [], 0
    config = b'{"format": "mds"}'
    for number, count in enumerate(counts):
        samples = [encode_sample(index, columns) for index in range(first, first + count)]
        offsets = np.cumsum([4 * (count + 2) + len(config), *map(len, samples)])
        content = struct.pack(f"<{count + 2}I", count, *offsets) + config + b"".join(samples)
        entry = {
            "format": "mds", "version": 2, "samples": count, "compression": compression, "zip_data": None,
            "column_names": list(columns), "column_encodings": [kind for kind, _ in columns.values()],
            "column_sizes": [size for _, size in columns.values()],
            "raw_data": {"basename": f"shard.{number:05d}.mds", "bytes": len(content), "hashes": {}},
        }  # fmt: skip
        if compression is None:
            (folder / entry["raw_data"]["basename"]).write_bytes(content)
        else:
            kind = compression.partition(":")[0]
            entry["zip_data"] = {"basename": f"shard.{number:05d}.mds.{kind}"}
            (folder / entry["zip_data"]["basename"]).write_bytes(PACK[kind](content))
        shards.append(entry)
        first += count
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return str(folder)


@pytest.mark.parametrize("encoding", ["png", "bytes", "pil"])
@pytest.mark.parametrize("captions", ["str", "json"])
def test_samples_are_read_by_index_and_in_order(encoding, captions, tmp_path):
    columns = COLUMNS | {"image": (encoding, None), "caption": (captions, None)}
    folder = write_mds(tmp_path / "mds", columns=columns)
    images = load_source(folder, caption_columns=["caption"])
    assert len(images) == 9
    streamed = [row for shard in range(3) for row in load_stream(folder, caption_columns=["caption"]).rows(shard, 0)]
    for index, row in enumerate(streamed):
        for sample in (images[index], decode_sample(*row)):
            assert np.array_equal(np.asarray(sample["image"]), np.asarray(noise(8, 12, index)))
            assert sample["caption"] == f"caption {index} \u00e9"
        assert images.captions(index) == {"caption": sample["caption"]}
        assert images.size(index) == images[index]["image"].size


def zstd():
    return pytest.importorskip("zstandard").ZstdCompressor().compress


@pytest.mark.parametrize("compression", ["zstd:3", "gz", "bz2:9"])
def test_compressed_shards_are_streamed(compression, tmp_path):
    if compression == "zstd:3":
        PACK["zstd"] = zstd()
    plain, packed = write_mds(tmp_path / "plain"), write_mds(tmp_path / "packed", compression=compression)
    streams = [load_stream(folder, caption_columns=["caption"]) for folder in (plain, packed)]
    for shard in range(3):
        assert [*streams[0].rows(shard, 1)] == [*streams[1].rows(shard, 1)]
    with pytest.raises(ValueError, match="--streaming"):
        load_source(packed, caption_columns=["caption"])


def test_lanes_read_every_sample_once_and_resume_exactly(tmp_path):
    stream = load_stream(write_mds(tmp_path / "mds", counts=(3, 2, 4, 3)), caption_columns=["caption"])
    seen = []
    for rank in range(2):
        lane = StreamedImages([stream], [1.0], 5, rank, 2)
        drawn, position = [], None
        for sample, position in lane.read(0, lane.initial_progress()):
            if position["sources"][0][0] > 0:
                break
            drawn.append((sample["caption"], position))
        seen += [caption for caption, _ in drawn]
        rest = lane.read(0, drawn[1][1])
        assert [next(rest)[0]["caption"] for _ in drawn[2:]] == [caption for caption, _ in drawn[2:]]
    assert sorted(seen) == sorted(f"caption {index} \u00e9" for index in range(12))


def change_index(folder, **changes):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    for name, value in changes.items():
        entry = index["shards"][0]
        (entry["raw_data"] if name in entry["raw_data"] else entry)[name] = value
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "changes",
    [
        {"basename": "../shard.00000.mds"},
        {"basename": "/etc/passwd"},
        {"bytes": 1 << 40},
        {"bytes": 8},
        {"samples": -1},
        {"samples": 1 << 40},
        {"samples": "many"},
        {"column_sizes": [None, None, -8]},
        {"column_sizes": [None]},
        {"format": "json"},
        {"basename": "shard.00009.mds"},
        {"column_names": ["text", "image", "width"]},
    ],
    ids=str,
)
def test_wrong_index_is_refused(changes, tmp_path):
    folder = write_mds(tmp_path / "mds")
    change_index(tmp_path / "mds", **changes)
    for load in (load_source, load_stream):
        with pytest.raises(ValueError, match=r"index\.json|other columns"):
            load(folder, caption_columns=["caption"])


@pytest.mark.parametrize(("options", "name"), [({"caption_columns": ["text"]}, "caption_column caption"),
                                               ({"image_column": "width"}, "`image_column`.*'int'")])  # fmt: skip
def test_missing_column_or_encoding_is_refused(options, name, tmp_path):
    folder = write_mds(tmp_path / "mds")
    with pytest.raises(ValueError, match=name):
        load_source(folder, **{"caption_columns": ["caption"], **options})


def test_damaged_sample_is_skipped_and_damaged_shard_named(tmp_path):
    folder = write_mds(tmp_path / "mds")
    path = tmp_path / "mds" / "shard.00000.mds"
    content = bytearray(path.read_bytes())
    content[8:12] = struct.pack("<I", 1 << 31)  # end of the first sample, start of the second
    path.write_bytes(content)
    images = load_source(folder, caption_columns=["caption"])
    for index in (0, 1):
        with pytest.raises(UnreadableSample, match="offsets"):
            images[index]
    assert images[2]["caption"].startswith("caption 2")
    rows = [*load_stream(folder, caption_columns=["caption"]).rows(0, 0)]
    assert [isinstance(image, UnreadableSample) for image, _ in rows] == [True, True, False]
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"shard\.00000\.mds.*bytes"):
        load_stream(folder, caption_columns=["caption"])


def test_sizes_that_exceed_the_sample_are_refused(tmp_path):
    folder = write_mds(tmp_path / "mds", counts=(1,))
    path = tmp_path / "mds" / "shard.00000.mds"
    content = bytearray(path.read_bytes())
    begin = struct.unpack_from("<I", content, 4)[0]
    content[begin : begin + 4] = struct.pack("<I", 0xFFFFFFFF)  # size of the caption
    path.write_bytes(content)
    with pytest.raises(UnreadableSample, match="columns have"):
        load_source(folder, caption_columns=["caption"])[0]


def test_image_folder_with_captions_named_index_stays_one(tmp_path):
    noise(8, 8).save(tmp_path / "index.png")
    (tmp_path / "index.json").write_text(json.dumps({"text": "a picture"}))
    assert load_source(str(tmp_path))[0]["caption"] == "a picture"
