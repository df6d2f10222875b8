"""Samplers: the same samples for any division of the work, without gaps, from any step on."""

from collections import Counter

import numpy as np
import pytest

from diffusers_prx.data.buckets import Buckets
from diffusers_prx.data.samplers import BucketStreamSampler, StreamSampler, every_sample_once


def steps(source, world_size, accumulation, batch_size, stop_step, start_step=0, seed=3, **options):
    """Return {step: positions of all processes and micro-batches}; `source` is a size or buckets."""
    found: dict[int, list] = {}
    sampler_class = BucketStreamSampler if isinstance(source, Buckets) else StreamSampler
    for rank in range(world_size):
        sampler = sampler_class(
            source, batch_size, start_step, stop_step, accumulation, rank, world_size, seed=seed, **options
        )
        batches = list(sampler)
        assert len(batches) == len(sampler) == (stop_step - start_step) * accumulation
        for number, batch in enumerate(batches):
            assert len(batch) == batch_size
            assert {position.step for position in batch} == {start_step + number // accumulation}
            found.setdefault(batch[0].step, []).extend(batch)
    return {step: sorted(positions, key=lambda p: p.sample_index) for step, positions in found.items()}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "split", [(1, 1, 12), (1, 12, 1), (12, 1, 1), (2, 2, 3), (3, 4, 1), (4, 1, 3), (2, 3, 2)], ids=str
)
def test_every_division_of_a_step_reads_the_same_samples(split, shuffle):
    assert steps(17, *split, stop_step=9, shuffle=shuffle) == steps(17, 1, 1, 12, stop_step=9, shuffle=shuffle)


@pytest.mark.parametrize("size", [1, 3, 12, 17, 40])  # smaller than, as large as, and larger than a step
def test_epochs_follow_each_other_without_gap_or_repetition(size):
    stop = 10 * size // 12 + 1
    samples = [position for positions in steps(size, 2, 2, 3, stop_step=stop).values() for position in positions]
    assert [position.sample_index for position in samples] == list(range(12 * stop))
    orders = [[p.dataset_index for p in samples[e * size : (e + 1) * size]] for e in range(len(samples) // size)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size >= 12:
        assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("start", [0, 1, 4, 8, 9])
def test_a_later_start_gives_the_tail(start):
    whole = steps(17, 2, 2, 3, stop_step=9)
    assert steps(17, 2, 2, 3, stop_step=9, start_step=start) == {s: p for s, p in whole.items() if s >= start}


def test_without_shuffling_the_order_is_that_of_the_data():
    indices = [p.dataset_index for positions in steps(5, 1, 1, 4, 5, shuffle=False).values() for p in positions]
    assert indices == [0, 1, 2, 3, 4] * 4


def test_orders_depend_on_the_seed_and_are_uniform():
    one, other = ([p.dataset_index for p in next(iter(StreamSampler(50, 50, 0, 1, seed=s)))] for s in (0, 1))
    assert one != other
    firsts = Counter(next(iter(StreamSampler(5, 1, 0, 1, seed=s)))[0].dataset_index for s in range(500))
    assert sum((count - 100) ** 2 / 100 for count in firsts.values()) < 18.5  # chi-squared, 4 degrees, 0.1%
    assert len(firsts) == 5


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="`dataset_size`"):
        StreamSampler(0, 1, 0, 1)


SIZES = [(16, 32), (24, 24), (32, 16), (8, 40)]


def make_buckets(*counts: int) -> Buckets:
    """Buckets with these numbers of images, which are interleaved in the source."""
    owner = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    return Buckets(SIZES[: len(counts)], [np.flatnonzero(owner == bucket) for bucket in range(len(counts))])


# one bucket; buckets larger than, equal to, slightly and far smaller than a step of 12; shares that do not divide
COUNTS = [(40,), (40, 31, 12), (11, 60), (1, 5, 12, 100), (7, 7, 7), (13, 25, 37, 49)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("split", [(1, 12, 1), (12, 1, 1), (2, 2, 3), (3, 4, 1), (2, 3, 2)], ids=str)
def test_every_division_of_a_step_reads_the_same_samples_of_one_bucket(counts, split):
    buckets = make_buckets(*counts)
    whole = steps(buckets, 1, 1, 12, 30)
    assert steps(buckets, *split, 30) == whole
    for step, positions in whole.items():
        assert len({position.bucket for position in positions}) == 1
        assert [position.sample_index for position in positions] == list(range(12 * step, 12 * step + 12))
        assert {position.dataset_index for position in positions} <= set(buckets.members[positions[0].bucket])


def expected_steps(counts, step_size, epochs):
    """Yield the steps of each bucket in each epoch, by filling a box per bucket with one image after another."""
    boxes = [0] * len(counts)
    for _ in range(epochs):
        full = [0] * len(counts)
        for bucket, count in enumerate(counts):
            for _ in range(count):
                boxes[bucket] += 1
                if boxes[bucket] == step_size:
                    boxes[bucket], full[bucket] = 0, full[bucket] + 1
        yield full, list(boxes)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_no_sample_is_lost_or_repeated(counts):
    buckets = make_buckets(*counts)
    sampler = BucketStreamSampler(buckets, 3, 0, 0, accumulation=2, world_size=2)
    epochs = 15
    whole = steps(buckets, 2, 2, 3, sampler.steps_before(epochs))
    seen: Counter[int] = Counter()
    carried: dict[int, set] = {bucket: set() for bucket in range(len(counts))}
    first = 0
    for epoch, (full, rest) in enumerate(expected_steps(counts, 12, epochs)):
        assert sampler.steps_before(epoch) == first
        new = {bucket: Counter() for bucket in range(len(counts))}
        for step in range(first, first + sum(full)):
            assert sampler.epoch_of_step(step) == epoch
            new[whole[step][0].bucket].update(position.dataset_index for position in whole[step])
            seen.update(position.dataset_index for position in whole[step])
            for members in buckets.members:  # no image is read again before all others of its bucket are
                passes = [seen[int(index)] for index in members]
                assert max(passes) - min(passes) <= 1
        first += sum(full)
        for bucket, count in enumerate(counts):
            assert sum(new[bucket].values()) == 12 * full[bucket]
            total = sum(seen[int(index)] for index in buckets.members[bucket])
            assert total == (epoch + 1) * count - rest[bucket]
            if count >= 12:  # every image once, except those carried over from the last epoch or to the next
                behind = {int(i) for i in buckets.members[bucket] if seen[int(i)] == epoch}
                assert len(behind) == rest[bucket] < 12
                assert all(seen[int(i)] == epoch + 1 for i in buckets.members[bucket] if int(i) not in behind)
                for index in map(int, buckets.members[bucket]):
                    assert new[bucket][index] == 1 + (index in carried[bucket]) - (index in behind)
                carried[bucket] = behind


def test_a_step_repeats_no_image_within_one_order_of_a_bucket():
    buckets = make_buckets(48, 36)  # both fill their steps exactly
    sampler = BucketStreamSampler(buckets, 12, 0, 0)
    for positions in steps(buckets, 2, 2, 3, sampler.steps_before(5)).values():
        assert len({position.dataset_index for position in positions}) == 12


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_a_later_start_gives_the_tail_of_buckets_for_any_number_of_processes(counts):
    buckets = make_buckets(*counts)
    sampler = BucketStreamSampler(buckets, 12, 0, 0, seed=3)
    stop = sampler.steps_before(4)
    whole = steps(buckets, 2, 2, 3, stop)
    for start in {1, sampler.steps_before(1), sampler.steps_before(2) + 1, sampler.steps_before(3), stop - 1, stop}:
        tail = {step: positions for step, positions in whole.items() if step >= start}
        assert steps(buckets, 2, 2, 3, stop, start) == tail
        assert steps(buckets, 3, 1, 4, stop, start) == tail
    assert [sampler.position(s, 12 * s) for s in range(stop - 1, -1, -1)] == [
        whole[step][0] for step in range(stop - 1, -1, -1)
    ]  # backwards


def test_bucket_orders_depend_on_epoch_and_seed():
    buckets = make_buckets(24, 24, 24)
    one, again, other = (steps(buckets, 1, 1, 12, 120, seed=seed) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    order = [one[step][0].bucket for step in range(120)]
    assert all(Counter(order[first : first + 6]) == {0: 2, 1: 2, 2: 2} for first in range(0, 120, 6))
    assert len({tuple(order[first : first + 6]) for first in range(0, 120, 6)}) > 10  # of 90 orders of an epoch
    passes = {
        bucket: [p.dataset_index for positions in one.values() for p in positions if p.bucket == bucket]
        for bucket in range(3)
    }
    for indices in passes.values():
        orders = [tuple(indices[first : first + 24]) for first in range(0, len(indices), 24)]
        assert all(len(set(order)) == 24 for order in orders)
        assert len(set(orders)) == len(orders)
    # buckets of one size are not read in the same order
    relative = [[list(buckets.members[b]).index(i) for i in passes[b][:24]] for b in range(3)]
    assert relative[0] != relative[1] != relative[2]


def test_orders_of_buckets_and_of_their_images_are_uniform():
    buckets = make_buckets(5, 5)
    images: Counter[int] = Counter()
    firsts: Counter[int] = Counter()
    for seed in range(500):
        position = next(iter(BucketStreamSampler(buckets, 1, 0, 1, seed=seed)))[0]
        firsts[position.bucket] += 1
        images[position.dataset_index] += 1
    assert abs(firsts[0] - 250) < 60  # 5.4 standard deviations
    assert sum((images[i] - 50) ** 2 / 50 for i in range(10)) < 27.9  # chi-squared, 9 degrees, 0.1%


def test_distant_steps_of_large_data_are_computed_directly():
    counts = (3_000_001, 1_000_003, 70_001)
    stops = np.cumsum(counts)
    buckets = Buckets(SIZES[:3], [range(stop - count, stop) for stop, count in zip(stops, counts)])
    sampler = BucketStreamSampler(buckets, 256, 0, 10)
    for step in (0, 15_898, 15_899, 123_456, 10**9):
        epoch = sampler.epoch_of_step(step)
        assert sampler.steps_before(epoch) <= step < sampler.steps_before(epoch + 1)
    first = sampler.position(10**9, 256 * 10**9)
    assert sampler.buckets.members[first.bucket][0] <= first.dataset_index < stops[first.bucket]


def test_an_epoch_without_a_full_step_is_skipped():
    buckets = make_buckets(5, 4)  # fewer images than a step of 12 needs
    whole = steps(buckets, 1, 1, 12, 9)
    sampler = BucketStreamSampler(buckets, 12, 0, 0)
    assert [sampler.steps_before(epoch) for epoch in range(4)] == [0, 0, 0, 2]
    assert [sampler.epoch_of_step(step) for step in range(3)] == [2, 2, 4]
    assert Counter(p.dataset_index for s in range(9) for p in whole[s]).total() == 108


def test_one_bucket_reads_every_image_once_per_epoch():
    samples = [p for ps in steps(Buckets.square(16, 30), 1, 1, 12, 10).values() for p in ps]
    assert all(sorted(p.dataset_index for p in samples[e * 30 :][:30]) == list(range(30)) for e in range(4))


@pytest.mark.parametrize("first_step", [0, 7, 1000])
def test_a_later_stage_begins_with_its_first_sample(first_step):
    buckets = make_buckets(40, 31, 12)

    def read(sampler):
        return [[(p.step - first_step, p.sample_index, p.dataset_index) for p in batch] for batch in sampler]

    for start in (0, 3):
        options = {"accumulation": 2, "rank": 1, "world_size": 2, "first_step": first_step}
        span = (first_step + start, first_step + 20)
        for alone, later in (
            (StreamSampler(40, 3, start, 20, 2, 1, 2), StreamSampler(40, 3, *span, **options)),
            (BucketStreamSampler(buckets, 3, start, 20, 2, 1, 2), BucketStreamSampler(buckets, 3, *span, **options)),
        ):
            expected = [[(p.step, p.sample_index, p.dataset_index) for p in batch] for batch in alone]
            assert read(later) == expected


def test_every_sample_once_covers_the_data_set():
    buckets = make_buckets(7, 4, 1)
    batches = every_sample_once(buckets, 3)
    assert [len(batch) for batch in batches] == [3, 3, 1, 3, 1, 1]
    assert all(len({position.bucket for position in batch}) == 1 for batch in batches)
    positions = [position for batch in batches for position in batch]
    assert sorted(position.dataset_index for position in positions) == list(range(12))
    for position in positions:
        assert position.dataset_index in buckets.members[position.bucket]
        assert (position.step, position.sample_index) == (-1, position.dataset_index)
