"""The stream of samples: the same for any split of the work, without gaps, from any step on."""

from collections import Counter

import pytest

from diffusers_prx.data.stream import StreamSampler


def steps(size, world_size, accumulation, batch_size, stop_step, start_step=0, **options):
    """{step: the positions of all processes and micro-batches, in the order of the stream}."""
    found: dict[int, list] = {}
    for rank in range(world_size):
        sampler = StreamSampler(
            size, batch_size, start_step, stop_step, accumulation, rank, world_size, seed=3, **options
        )
        batches = list(sampler)
        assert len(batches) == len(sampler) == (stop_step - start_step) * accumulation
        for place, batch in enumerate(batches):
            assert len(batch) == batch_size
            assert {position.step for position in batch} == {start_step + place // accumulation}
            found.setdefault(batch[0].step, []).extend(batch)
    return {step: sorted(positions, key=lambda p: p.sample_index) for step, positions in found.items()}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "split", [(1, 1, 12), (1, 12, 1), (12, 1, 1), (2, 2, 3), (3, 4, 1), (4, 1, 3), (2, 3, 2)], ids=str
)
def test_every_split_of_a_step_reads_the_same_samples(split, shuffle):
    assert steps(17, *split, stop_step=9, shuffle=shuffle) == steps(17, 1, 1, 12, stop_step=9, shuffle=shuffle)


@pytest.mark.parametrize("size", [1, 3, 12, 17, 40])  # smaller than, as large as, and larger than a step
def test_epochs_follow_each_other_without_gap_or_repetition(size):
    stop = 10 * size // 12 + 1
    stream = [position for positions in steps(size, 2, 2, 3, stop_step=stop).values() for position in positions]
    assert [position.sample_index for position in stream] == list(range(12 * stop))
    orders = [[p.dataset_index for p in stream[e * size : (e + 1) * size]] for e in range(len(stream) // size)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size >= 12:
        assert len({tuple(order) for order in orders}) == len(orders)  # each epoch in an order of its own


@pytest.mark.parametrize("start", [0, 1, 4, 8, 9])
def test_starting_later_gives_the_tail(start):
    whole = steps(17, 2, 2, 3, stop_step=9)
    assert steps(17, 2, 2, 3, stop_step=9, start_step=start) == {s: p for s, p in whole.items() if s >= start}


def test_without_shuffling_the_order_is_that_of_the_data():
    stream = [p.dataset_index for positions in steps(5, 1, 1, 4, 5, shuffle=False).values() for p in positions]
    assert stream == [0, 1, 2, 3, 4] * 4


def test_another_seed_is_another_order_and_all_places_are_equally_likely():
    one, other = ([p.dataset_index for p in next(iter(StreamSampler(50, 50, 0, 1, seed=s)))] for s in (0, 1))
    assert one != other
    firsts = Counter(next(iter(StreamSampler(5, 1, 0, 1, seed=s)))[0].dataset_index for s in range(500))
    assert sum((count - 100) ** 2 / 100 for count in firsts.values()) < 18.5  # chi-squared, 4 degrees, 0.1%
    assert len(firsts) == 5


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="`dataset_size` must be at least 1, got 0"):
        StreamSampler(0, 1, 0, 1)
