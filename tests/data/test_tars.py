"""WebDataset tars, local and over http, intact, damaged and hostile."""

import functools
import http.server
import json
import os
import signal
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from diffusers_prx.data import tars
from diffusers_prx.data.captioned import decode_sample
from diffusers_prx.data.images import UnreadableSample
from diffusers_prx.data.tars import TarImages, TarShards, index_tar
from disks import full_disk
from image_files import COLORS, plain_png, write_tar


def png(number: int) -> bytes:
    return plain_png(COLORS[number % 4])


def members(first: int, count: int) -> list[tuple[str, bytes]]:
    found = []
    for i in range(first, first + count):
        texts = {"short": f"short {i}", "number": i}
        found += [
            (f"{i:03}.png", png(i)),
            (f"{i:03}.txt", f"caption {i}".encode()),
            (f"{i:03}.json", json.dumps(texts).encode()),
        ]
    return found


@pytest.fixture
def pair(tmp_path) -> list[str]:
    return [write_tar(tmp_path / f"{k}.tar", members(5 * k, 5)) for k in (0, 1)]


def streamed(shards, shard=0, start=0):
    return [decode_sample(*row) for row in shards.rows(shard, start)]


def assert_sample(sample, number):
    assert sample["caption"] == f"caption {number}"
    assert sample["image"].getpixel((3, 3)) == COLORS[number % 4]


def test_tar_images_have_random_access(pair):
    source = TarImages(pair, "image", ["text"])
    assert len(source) == 10
    for i in (3, 9, 0, 5):
        assert_sample(source[i], i)
        assert source.captions(i) == {"text": f"caption {i}"}
        assert source.size(i) == (24, 16)


def test_tar_shards_stream_from_any_row(pair):
    shards = TarShards(pair, "image", ["text"])
    assert len(shards) == 2
    for shard in (0, 1):
        for row, sample in enumerate(streamed(shards, shard)):
            assert_sample(sample, 5 * shard + row)
    assert [s["caption"] for s in streamed(shards, 1, 3)] == ["caption 8", "caption 9"]
    assert streamed(shards, 1, 5) == []


@pytest.mark.parametrize("kind", [TarImages, TarShards])
def test_columns_are_endings_or_json_keys(pair, kind):
    source = kind(pair, "png", ["txt", "short"])
    sample = source[2] if kind is TarImages else streamed(source)[2]
    assert sample["captions"] == {"txt": "caption 2", "short": "short 2"}
    with pytest.raises(ValueError, match=r"`image_column` is 'jpg'.* 'json', 'png', 'txt': .*`--image_column png`"):
        kind(pair, "jpg", ["txt"])
    available = r"'json', 'number', 'png', 'short', 'text', 'txt': .*`--caption_column text`"
    with pytest.raises(ValueError, match=rf"`caption_column` is 'long'.*0\.tar.* {available}"):
        kind(pair, "png", ["short", "long"])


def test_member_names_follow_webdataset(tmp_path):
    """The key ends at the first dot and includes the folder; endings may have any case; hidden files are omitted."""
    files = [
        ("README", b"no ending"),
        ("./a/1.JPG", png(0)),
        ("./a/1.seg.png", png(1)),
        ("./a/._1.jpg", b"written by macOS"),
        ("./a/1.txt", b"caption 0"),
        ("./b/1.webp", png(2)),
        ("./b/1.txt", b"caption 2"),
        ("__meta.json", b"{}"),
        ("b/2.webp", png(3)),
        ("b/2.long.txt", b"caption 3"),
    ]
    path = write_tar(tmp_path / "a.tar", files)
    source = TarImages([path], "image", ["text", "long.txt"])
    found = [source[i] for i in range(len(source))]
    assert [sample["caption"] for sample in found] == ["caption 0", "caption 2", "caption 3"]
    for number, sample in zip((0, 2, 3), found):
        assert_sample(sample, number)
    rows = streamed(TarShards([path], "image", ["text", "long.txt"]))
    assert [row["caption"] for row in rows] == [sample["caption"] for sample in found]


def test_a_repeated_name_is_another_sample(tmp_path):
    files = [(f"1.{end}", data) for i in (0, 1) for end, data in (("png", png(i)), ("txt", f"caption {i}".encode()))]
    path = write_tar(tmp_path / "a.tar", files)
    source, rows = TarImages([path], "image", ["txt"]), streamed(TarShards([path], "image", ["txt"]))
    for i in (0, 1):
        assert_sample(source[i], i)
        assert_sample(rows[i], i)
    assert len(source) == len(rows) == 2


def test_long_names_are_read_in_both_formats(tmp_path):
    names = [f"{'x' * 150}/{i}" for i in range(2)]
    files = [(f"{n}.{end}", data) for i, n in enumerate(names) for end, data in (("png", png(i)), ("txt", b"caption"))]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "a.tar", files, format=form)
        source = TarImages([path], "image", ["txt"])
        assert [source[i]["image"].getpixel((0, 0)) for i in range(2)] == COLORS[:2]


def test_tars_with_different_members_are_combined(tmp_path):
    first = write_tar(tmp_path / "0.tar", [("0.png", png(0)), ("0.txt", b"caption 0")])
    second = write_tar(tmp_path / "1.tar", [("1.jpg", png(1)), ("1.json", b'{"text": "caption 1"}')])
    source = TarImages([first, second], "image", ["text"])
    for i in range(2):
        assert_sample(source[i], i)


def test_index_tar_finds_offsets_and_sizes(pair):
    endings, found, damage = index_tar(pair[1])
    assert (endings, found.shape, damage) == (["json", "png", "txt"], (5, 3, 2), "")
    content = Path(pair[1]).read_bytes()
    with tarfile.open(pair[1]) as archive:
        for number, (name, data) in enumerate(members(5, 5)):
            offset, size = found[number // 3, endings.index(name.rpartition(".")[2])]
            assert (offset, size) == (archive.getmember(name).offset_data, len(data))
            assert content[offset : offset + size] == data


def test_the_index_is_cached_until_the_tar_changes(pair, tmp_path, caplog):
    cache = str(tmp_path / "cache" / "indices")

    def captions():
        source = TarImages(pair, "image", ["text"], cache)
        return [source.captions(i)["text"] for i in range(len(source))]

    expected = [f"caption {i}" for i in range(10)]
    assert captions() == expected
    files = sorted(os.listdir(cache))
    assert len(files) == 2
    assert not any(file.startswith(".") for file in files)
    # the cache is used: an index with one sample fewer gives one sample fewer
    with np.load(f"{cache}/{files[0]}") as saved:
        parts = dict(saved)
    np.savez(f"{cache}/{files[0]}", **{**parts, "members": parts["members"][:-1]})
    assert captions() == expected[:4] + expected[5:]
    write_tar(pair[0], members(20, 3))
    assert captions() == [f"caption {i}" for i in (20, 21, 22, 5, 6, 7, 8, 9)]
    with open(f"{cache}/{files[0]}", "wb") as file:
        file.write(b"broken")
    assert captions() == [f"caption {i}" for i in (20, 21, 22, 5, 6, 7, 8, 9)]
    assert f"The index {cache}" in caplog.text


def test_a_full_disk_leaves_no_index_and_is_reported(pair, tmp_path, caplog):
    cache = tmp_path / "cache"
    with full_disk(100):
        source = TarImages(pair, "image", ["text"], str(cache))
    assert_sample(source[7], 7)
    assert os.listdir(cache) == []
    assert "is not cached" in caplog.text


def broken_members() -> list[tuple[str, bytes]]:
    files = dict(members(0, 8))
    files["001.png"] = b""
    files["002.png"] = files["002.png"][:60]
    files["003.txt"] = "K\xe4uzchen".encode("latin-1")
    files["004.txt"] = b""
    del files["005.txt"], files["006.png"]
    return list(files.items())


def test_broken_members_are_unreadable_samples(tmp_path):
    path = write_tar(tmp_path / "a.tar", broken_members())
    source = TarImages([path], "image", ["text"])
    shards = TarShards([path], "image", ["text"])
    reasons = {
        1: "formats PNG",
        2: "cannot be decoded",
        3: "`text` .*UTF-8",
        4: "`text` is empty",
        5: "`text` is missing",
        6: "the image is missing",
    }
    rows = list(shards.rows(0, 0))
    assert len(source) == len(rows) == 8
    for i in range(8):
        if i in reasons:
            with pytest.raises(UnreadableSample, match=rf"^sample {i} \(.*a\.tar, byte \d+\): .*{reasons[i]}"):
                source[i]
            with pytest.raises(UnreadableSample, match=reasons[i]):
                decode_sample(*rows[i])
        else:
            assert_sample(source[i], i)
            assert_sample(decode_sample(*rows[i]), i)


def test_a_broken_json_does_not_affect_other_captions(tmp_path):
    files = dict(members(0, 3)) | {"000.json": b"{", "001.json": b'{"short": "\xff"}'}
    source = TarImages([write_tar(tmp_path / "a.tar", files.items())], "image", ["short", "txt"])
    assert [source[i]["captions"] for i in range(3)] == [
        {"txt": "caption 0"},
        {"txt": "caption 1"},
        {"short": "short 2", "txt": "caption 2"},
    ]


DAMAGES = {
    "truncated data": lambda data, offset: data[: offset + 20],
    "truncated header": lambda data, offset: data[: offset - 400],
    "truncated between members": lambda data, offset: data[: offset - 512],
    "broken header": lambda data, offset: data[: offset - 512] + b"\x07" * 512 + data[offset:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tar_is_used_up_to_the_damage(pair, damage, caplog):
    """Random access uses the part before the damage, with a warning; a stream raises an error there. `tarfile` alone
    takes three of the four damages for the end of the tar."""
    with tarfile.open(pair[0]) as archive:
        offset = archive.getmember("003.png").offset_data
    Path(pair[0]).write_bytes(DAMAGES[damage](Path(pair[0]).read_bytes(), offset))
    source = TarImages(pair, "image", ["text"])
    assert [source[i]["caption"] for i in range(8)] == [f"caption {i}" for i in (0, 1, 2, 5, 6, 7, 8, 9)]
    assert len(source) == 8
    assert f"{pair[0]} is damaged: " in caplog.text
    assert "The 3 samples" in caplog.text
    shards = TarShards([pair[1], pair[0]], "image", ["text"])
    rows = shards.rows(1, 1)
    assert decode_sample(*next(rows))["caption"] == "caption 1"
    with pytest.raises(ValueError, match=r"0\.tar cannot be read beyond sample [23]: "):
        list(rows)
    assert "broke off" not in caplog.text  # a local file is not opened again


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """Header of 512 bytes; `tarfile` does not write such sizes."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[136:148], block[257:265] = b"0000644\0", b"00000000000\0", b"ustar\x0000"
    binary = (size + (128 << 88) * (size > 0)).to_bytes(12, "big", signed=size < 0)
    block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else binary
    block[156:157], block[148:156] = kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 512) * 512, b"\0")


HOSTILE = {
    "negative": header(b"b.png", -512),
    "terabytes": header(b"b.png", 2**40),
    "no number of a file": header(b"README", 2**80),
    "terabytes of names": header(b"b", 2**40, b"L"),
    "gigabytes of records": header(b"b", 8**11 - 1, b"x"),
    "negative records": header(b"b", -512, b"x"),
    "negative in a record": header(b"b", 13, b"x") + padded(b"13 size=-512\n") + header(b"b.png", 0),
    "huge in a record": header(b"b", 20, b"x") + padded(b"20 size=99999999999\n") + header(b"b.png", 0),
    "sparse without end": header(b"b", 24, b"x") + padded(b"24 GNU.sparse.map=1,2,x\n") + header(b"b.png", 0),
    "endless records": header(b"b", 0, b"x") * 3000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, kind, caplog):
    """`tarfile` alone loops forever, or allocates as much memory as the header states."""
    good = b"".join(
        header(name.encode(), len(data)) + padded(data) for name, data in members(0, 1) if not name.endswith("json")
    )
    path = tmp_path / "a.tar"
    path.write_bytes(good + HOSTILE[kind] + b"\0" * 1024)
    signal.alarm(60)  # ends the test run if it hangs
    try:
        source = TarImages([str(path)], "image", ["text"])
        assert len(source) == 1
        assert_sample(source[0], 0)
        assert "is damaged: " in caplog.text
        with pytest.raises(ValueError, match=r"a\.tar cannot be read"):
            list(TarShards([str(path)], "image", ["text"]).rows(0, 0))
    finally:
        signal.alarm(0)


def test_absolute_and_relative_member_names_are_plain_names(tmp_path):
    """Nothing is extracted to disk, so these names are harmless."""
    files = [
        (f"{stem}.{end}", data) for stem in ("/etc/0", "../../1") for end, data in (("png", png(0)), ("txt", b"a"))
    ]
    path = write_tar(tmp_path / "a.tar", files)
    source = TarImages([path], "image", ["text"])
    assert [source[index]["caption"] for index in range(len(source))] == ["a", "a"]


def test_files_that_are_not_tars_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")
    for kind in (TarImages, TarShards):
        with pytest.raises(ValueError, match="is not a regular file"):
            kind([str(tmp_path / "fifo.tar")], "image", ["text"])
    (tmp_path / "text.tar").write_text("no tar " * 1000)
    (tmp_path / "empty.tar").write_bytes(b"")
    packed = write_tar(tmp_path / "packed.tar", members(0, 2), "w:gz")
    for path in (tmp_path / "text.tar", tmp_path / "empty.tar", packed):
        with pytest.raises(ValueError, match="is not an uncompressed tar"):
            TarImages([str(path)], "image", ["text"])
    for path in (tmp_path / "text.tar", tmp_path / "empty.tar", tmp_path / "gone.tar"):
        with pytest.raises(ValueError, match=r"The tar .* cannot be read"):
            TarShards([str(path)], "image", ["text"])
    assert len(streamed(TarShards([packed], "image", ["text"]))) == 2  # a stream may be compressed
    nothing = write_tar(tmp_path / "nothing.tar", [])
    for kind in (TarImages, TarShards):
        with pytest.raises(ValueError, match="no samples"):
            kind([nothing], "image", ["text"])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Local server of `tmp_path` that truncates its first answers after the numbers of bytes in `cuts`."""
    cuts: list[int] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            outputfile.write(source.read(cuts.pop(0)) if cuts else source.read())

        def log_message(self, *args):
            pass

    monkeypatch.setattr(tars, "FIRST_WAIT", 0.01)
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}", cuts
        served.shutdown()


def test_a_remote_tar_is_streamed(pair, server):
    shards = TarShards([f"{server[0]}/1.tar"], "image", ["text", "short"])
    for row, sample in enumerate(streamed(shards)):
        assert_sample(sample, 5 + row)
    with pytest.raises(ValueError, match=r"gone\.tar cannot be read: .*404"):
        TarShards([f"{server[0]}/gone.tar"], "image", ["text"])


def test_a_broken_connection_is_opened_again(pair, server, caplog):
    shards = TarShards([f"{server[0]}/1.tar"], "image", ["text"])
    server[1][:] = [4000, 512 * 13]  # inside a member, and between two
    assert [sample["caption"] for sample in streamed(shards, 0, 1)] == [f"caption {i}" for i in range(6, 10)]
    assert caplog.text.count("broke off at sample") == 2


def test_a_connection_that_breaks_without_progress_ends_the_run(pair, server):
    shards = TarShards([f"{server[0]}/1.tar"], "image", ["text"])
    server[1][:] = [3 * 1024 * (1 + attempt // 2) + 1000 for attempt in range(8)]  # samples have 3 kB
    assert [sample["caption"] for sample in streamed(shards)] == [f"caption {i}" for i in range(5, 10)]
    assert not server[1]
    server[1][:] = [6000] * 20
    rows = shards.rows(0, 0)
    assert decode_sample(*next(rows))["caption"] == "caption 5"
    with pytest.raises(ValueError, match=r"1\.tar cannot be read beyond sample 1: "):
        list(rows)
    assert len(server[1]) == 16  # the first attempt, and three more
