"""Streaming: every shard once per epoch, exact resume, exact shares, and errors."""

import json
import re
from collections import Counter

import datasets
import pytest

from diffusers_prx.data.images import UnfitSample, UnreadableSample
from diffusers_prx.data.iterable import HubShards, StreamedBatches, StreamedImages, build_stream_loader
from diffusers_prx.data.mixing import permutation
from diffusers_prx.data.samplers import StreamSampler
from diffusers_prx.data.tars import TarShards
from image_files import plain_png, write_tar

LENGTHS = [3, 5, 1, 4, 2, 6, 3, 4]  # samples of each shard: unequal, so that lanes diverge


def png(number: int) -> bytes:
    return plain_png((number % 256, 0, 0), (4, 4))


def write_tars(folder, lengths=LENGTHS, start=0, broken=()) -> list[str]:
    folder.mkdir()
    paths, number = [], start
    for shard, length in enumerate(lengths):
        files = []
        for sample in range(number, number + length):
            files += [(f"{sample:05}.png", b"broken" if sample in broken else png(sample))]
            files += [(f"{sample:05}.txt", str(sample).encode())]
        paths.append(write_tar(folder / f"{shard}.tar", files))
        number += length
    return paths


def write_parquets(folder, lengths=LENGTHS, start=0) -> list[str]:
    folder.mkdir()
    paths, number = [], start
    for shard, length in enumerate(lengths):
        numbers = range(number, number + length)
        rows = {"photo": [{"bytes": png(i), "path": None} for i in numbers], "text": list(map(str, numbers))}
        paths.append(str(folder / f"{shard}.parquet"))
        datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image()).to_parquet(paths[-1])
        number += length
    return paths


def open_tars(paths) -> TarShards:
    return TarShards(paths, "image", ["text"])


def open_parquets(paths) -> HubShards:
    rows = datasets.load_dataset("parquet", data_files=paths, split="train", streaming=True)
    return HubShards(rows, "photo", ["text"], "photos")


@pytest.fixture(params=["tars", "parquet"])
def shards(request, tmp_path):
    if request.param == "tars":
        return open_tars(write_tars(tmp_path / "t"))
    return open_parquets(write_parquets(tmp_path / "p"))


FIRSTS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]


def read(stream, worker, count, progress=None):
    """Return the numbers of samples and the progress after each."""
    rows = stream.read(worker, stream.initial_progress() if progress is None else progress)
    samples = [next(rows) for _ in range(count)]
    return [int(sample["caption"]) for sample, _ in samples], [after for _, after in samples]


def test_an_epoch_reads_every_shard_once_for_any_number_of_lanes(shards):
    for world_size, workers in ((1, 0), (3, 2), (4, 2)):
        epochs: dict[int, list[int]] = {0: [], 1: []}
        for rank in range(world_size):
            stream = StreamedImages([shards], [1], 3, rank, world_size, workers)
            for worker in range(max(workers, 1)):
                mine: dict[int, list[int]] = {0: [], 1: [], 2: []}
                for sample, progress in stream.read(worker, stream.initial_progress()):
                    epoch = progress["sources"][0][0]
                    mine[epoch].append(int(sample["caption"]))
                    if epoch == 2:
                        break
                for epoch in (0, 1):
                    epochs[epoch] += mine[epoch]
                    # shards are read whole and in order
                    starts = [n for n in mine[epoch] if n in FIRSTS]
                    assert mine[epoch] == [n for s in starts for n in range(s, s + LENGTHS[FIRSTS.index(s)])]
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(sum(LENGTHS)))


def test_the_order_of_shards_depends_on_seed_and_epoch(shards):
    def order(seed):
        return read(StreamedImages([shards], [1], seed), 0, 56)[0]

    first = order(0)
    assert first == order(0)
    assert sorted(first[:28]) == sorted(first[28:]) == list(range(28))
    assert first[:28] != first[28:]
    assert first != order(1)


def test_a_stream_resumes_at_the_next_sample(shards):
    stream = StreamedImages([shards], [1], 0, rank=1, world_size=2, num_workers=2)
    for worker in (0, 1):
        whole, progress = read(stream, worker, 40)
        for stop in (0, 1, 5, 11, 12, 13, 30):
            saved = json.loads(json.dumps(progress[stop]))  # as in a checkpoint
            assert read(stream, worker, 39 - stop, saved)[0] == whole[stop + 1 :]


def test_mixed_streams_have_exact_shares_and_resume(tmp_path):
    sources = [
        open_tars(write_tars(tmp_path / "a")),
        open_parquets(write_parquets(tmp_path / "b", [3, 3], 1000)),
    ]
    stream = StreamedImages(sources, [0.7, 0.3], 0, num_workers=2)
    whole, progress = read(stream, 1, 60)
    for cycle in range(6):
        assert Counter(n >= 1000 for n in whole[10 * cycle : 10 * cycle + 10]) == {False: 7, True: 3}
    assert whole != read(stream, 0, 60)[0]
    for stop in (0, 7, 25, 44):
        assert read(stream, 1, 59 - stop, progress[stop])[0] == whole[stop + 1 :]


def test_unreadable_samples_are_reported_with_their_shard(tmp_path):
    stream = StreamedImages([open_tars(write_tars(tmp_path / "a", broken=(4, 9)))], [1], 0)
    rows = stream.read(0, stream.initial_progress())
    found = [next(rows)[0] for _ in range(28)]
    reasons = sorted(str(sample) for sample in found if isinstance(sample, UnreadableSample))
    for reason, location in zip(reasons, (r"^sample 0 \(.*3\.tar\): ", r"^sample 1 \(.*1\.tar\): "), strict=True):
        assert re.match(location, reason)


def test_held_out_samples_are_never_trained_on(shards):
    stream = StreamedImages([shards], [1], 0, held_out=2)
    assert [sample["caption"] for sample in stream.held_out_samples()] == ["0", "1"]
    numbers, _ = read(stream, 0, 52)
    assert sorted(numbers[:26]) == sorted(numbers[26:]) == list(range(2, 28))
    both = StreamedImages([shards, shards], [1, 1], 0, held_out=2)  # held out from the first source only
    read_of: list[list[int]] = [[], []]
    before = both.initial_progress()["sources"]
    for (sample, progress), _ in zip(both.read(0, both.initial_progress()), range(56)):
        source = 0 if progress["sources"][0] != before[0] else 1
        read_of[source].append(int(sample["caption"]))
        before = progress["sources"]
    assert sorted(read_of[0][:26]) == list(range(2, 28))
    assert sorted(read_of[1]) == list(range(28))
    with pytest.raises(ValueError, match="`num_validation_samples` is 4, but the first shard has 3 samples"):
        StreamedImages([shards], [1], 0, held_out=4).held_out_samples()


def make_sample(sample, position):
    return {"caption": sample["caption"], "position": position}


def collate(samples):
    return {
        "captions": [int(sample["caption"]) for sample in samples],
        "positions": [sample["position"] for sample in samples],
        "unreadable": [reason for sample in samples for reason in sample["unreadable"]],
        "unfit": sum(sample["unfit"] for sample in samples),
    }


def run(sources, start, stop, progress=None, workers=2, rank=0, world_size=1, accumulation=1, make=make_sample):
    stream = StreamedImages(sources, [1], 5, rank, world_size, workers)
    batches = StreamedBatches(stream, make, collate, 2, start, stop, accumulation, progress)
    return stream, list(build_stream_loader(batches, workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_the_same_batches(shards, workers):
    """The stop may be within a round of the workers."""
    _, whole = run([shards], 0, 12, workers=workers)
    assert len({number for batch in whole[:6] for number in batch["captions"]}) == 12  # no sample twice
    for stop in (5,) if workers else (0, 4, 5):
        stream, before = run([shards], 0, stop, workers=workers)
        progress = [stream.initial_progress() for _ in range(stream.workers)]
        for batch in before:
            progress[batch["worker"]] = batch["progress"]
        record = json.loads(json.dumps(stream.record([progress])))
        _, after = run([shards], stop, 12, stream.restore(record), workers)
        assert before + after == whole


def test_samples_are_numbered_like_those_of_other_sources(tmp_path):
    sources = [open_tars(write_tars(tmp_path / "a"))]
    for rank in (0, 1):
        _, batches = run(sources, 1, 4, rank=rank, world_size=2, accumulation=2)
        sampler = StreamSampler(28, 2, 1, 4, accumulation=2, rank=rank, world_size=2)
        expected = [[(p.step, p.sample_index) for p in batch] for batch in sampler]
        assert [[(p.step, p.sample_index) for p in batch["positions"]] for batch in batches] == expected


def refuse_even(sample, position):
    if int(sample["caption"]) % 2 == 0:
        raise UnreadableSample(f"{sample['caption']} is even")
    return make_sample(sample, position)


def test_unreadable_samples_are_replaced_and_counted(tmp_path):
    _, batches = run([open_tars(write_tars(tmp_path / "a", broken=(7,)))], 0, 6, workers=1, make=refuse_even)
    used = [n for batch in batches for n in batch["captions"]]
    assert len(set(used)) == len(used) == 12  # of the 13 that are odd and undamaged
    assert set(used) <= {n for n in range(28) if n % 2} - {7}
    reasons = [reason for batch in batches for reason in batch["unreadable"]]
    assert sum(reason.endswith("is even") for reason in reasons) == len(reasons) - 1
    assert sum(".tar): " in reason for reason in reasons) == 1
    assert len(used) + len(reasons) == batches[-1]["progress"]["drawn"]


def refuse_odd(sample, position):
    if int(sample["caption"]) % 2:
        raise UnfitSample(f"{sample['caption']} is too small")
    return make_sample(sample, position)


def test_unfit_samples_are_counted_separately(tmp_path):
    _, batches = run([open_tars(write_tars(tmp_path / "a"))], 0, 6, workers=1, make=refuse_odd)
    used = sum(len(batch["captions"]) for batch in batches)
    assert not any(number % 2 for batch in batches for number in batch["captions"])
    assert not any(batch["unreadable"] for batch in batches)
    assert used + sum(batch["unfit"] for batch in batches) == batches[-1]["progress"]["drawn"] > used


def test_a_stream_without_a_readable_sample_ends_the_run(tmp_path):
    sources = [open_tars(write_tars(tmp_path / "a", [2, 2], broken=range(4)))]
    with pytest.raises(ValueError, match=r"None of 1000 .*1000 are unreadable and 0 do not fit"):
        run(sources, 0, 1, workers=0)


def test_fewer_shards_than_lanes_are_refused(shards):
    StreamedImages([shards], [1], 0, 0, 4, 2)
    with pytest.raises(ValueError, match=r"3 processes x 3 workers = 9, .* one of 8.*`--dataloader_num_workers`"):
        StreamedImages([shards], [1], 0, 0, 3, 3)


def test_an_empty_lane_is_refused(tmp_path):
    shards = open_tars(write_tars(tmp_path / "a", [2, 0]))
    lanes = [StreamedImages([shards], [1], 0, rank, 2) for rank in (0, 1)]
    full = next(rank for rank in (0, 1) if permutation(2, 0, 0, 0)[rank] == 0)
    with pytest.raises(ValueError, match=r"1 shards .*no sample"):
        read(lanes[1 - full], 0, 1)


def test_a_checkpoint_of_another_layout_is_refused(shards):
    def stream(seed=0, rank=0, world_size=2, workers=2, **options):
        return StreamedImages([shards], [1], seed, rank, world_size, workers, **options)

    start = stream().initial_progress()
    record = stream().record([[start, start], [start, {"drawn": 3, "sources": [[0, 0, 3]]}]])
    assert stream(rank=1).restore(record)[1]["drawn"] == 3
    for name, before in (("world_size", 2), ("workers", 2), ("seed", 0), ("held_out", 0)):
        with pytest.raises(ValueError, match=rf"`{name}` .*is 1, but {before} in the checkpoint"):
            stream(**{name: 1}).restore(record)


def test_missing_columns_and_invalid_weights_are_refused(tmp_path):
    paths = write_parquets(tmp_path / "p", [2])
    rows = datasets.load_dataset("parquet", data_files=paths, split="train", streaming=True)
    with pytest.raises(ValueError, match=r"`image_column` is 'image'.* 'photo', 'text'"):
        HubShards(rows, "image", ["text"], "photos")
    with pytest.raises(ValueError, match=r"`caption_column` is 'long'.* 'photo', 'text'"):
        HubShards(rows, "photo", ["text", "long"], "photos")
    shards = HubShards(rows, "photo", ["text"], "photos")
    with pytest.raises(ValueError, match="`weights` has 2 numbers for 1 sources"):
        StreamedImages([shards], [1, 1], 0)
    with pytest.raises(ValueError, match="`weights` must be positive"):
        StreamedImages([shards], [0], 0)
