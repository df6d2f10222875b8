"""Mixed, joined and sliced sources: exact shares, even use, and no state."""

import pickle
import random
from collections import Counter

import numpy as np
import pytest

from diffusers_prx.data.captioned import JoinedSource, Slice
from diffusers_prx.data.mixing import Mix, MixedSource, combine, permutation


class Numbers:
    """Source whose samples are (name, index)."""

    def __init__(self, name: str, size: int):
        self.name, self.length = name, size

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        return {"caption": (self.name, index)}

    def captions(self, index):
        return {"text": self[index]["caption"]}

    def size(self, index):
        return self[index]["caption"]


SOURCES = [Numbers("a", 7), Numbers("b", 5), Numbers("c", 1)]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([1, 1, 1], [1, 1, 1]),
        ([1_700_000, 6_000_000, 1_000_000], [17, 60, 10]),
        ([0.5, 1.25], [2, 5]),
        ([3], [1]),
    ],
)
def test_shares_are_exact_after_every_cycle(weights, shares):
    mix = Mix(weights, 3)
    assert mix.shares == shares
    counts = [0] * len(shares)
    for index in range(5 * sum(shares)):
        source, earlier = mix.locate(index)
        assert earlier == counts[source]
        counts[source] += 1
        if (index + 1) % sum(shares) == 0:
            assert counts == [share * (index + 1) // sum(shares) for share in shares]


def test_each_cycle_has_its_own_seeded_order():
    def cycles(*key):
        mix = Mix([4, 3, 3], *key)
        return [tuple(mix.locate(10 * cycle + i)[0] for i in range(10)) for cycle in range(20)]

    assert len(set(cycles(0))) > 15
    assert cycles(0) == cycles(0)
    assert cycles(0) != cycles(1)
    assert cycles(0, 1) != cycles(0, 2)


def test_every_source_is_read_evenly():
    mixed = MixedSource(SOURCES, [0.5, 0.4, 0.1], seed=1)
    read = {name: [] for name in "abc"}
    for number in range(1000):
        name, index = mixed[number]["caption"]
        read[name].append(index)
    assert {name: len(indices) for name, indices in read.items()} == {"a": 500, "b": 400, "c": 100}
    for source in SOURCES:
        indices = read[source.name]
        size = len(source)
        epochs = [tuple(indices[first : first + size]) for first in range(0, len(indices) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)  # none twice before all once
        assert size == 1 or len(set(epochs)) > len(epochs) / 2  # each in an order of its own


def test_mixed_samples_depend_on_index_and_seed_alone():
    mixed = MixedSource(SOURCES, [0.5, 0.4, 0.1], seed=1)
    indices = [*range(0, 5000, 37), 10**12]
    shuffled = [(index, mixed[index]["caption"]) for index in indices]
    random.shuffle(shuffled)
    other = pickle.loads(pickle.dumps(MixedSource(SOURCES, [0.5, 0.4, 0.1], seed=1)))
    assert all(other[index]["caption"] == sample for index, sample in shuffled)
    assert all(other.captions(index)["text"] == other.size(index) == sample for index, sample in shuffled)
    changed = MixedSource(SOURCES, [0.5, 0.4, 0.1], seed=2)
    assert sum(changed[index]["caption"] == sample for index, sample in shuffled) < len(indices) / 2
    assert len(mixed) > 10**12


def test_joined_sources_have_every_sample_once():
    joined = JoinedSource(SOURCES)
    assert len(joined) == 13
    expected = [(s.name, i) for s in SOURCES for i in range(len(s))]
    assert [joined[i]["caption"] for i in range(13)] == expected
    assert [joined.captions(i)["text"] for i in range(13)] == [joined.size(i) for i in range(13)] == expected
    part = Slice(joined, 6, 9)
    assert [part[i]["caption"] for i in range(len(part))] == [("a", 6), ("b", 0), ("b", 1)]
    assert part.captions(0)["text"] == part.size(0) == ("a", 6)


def test_combine_mixes_with_weights_and_joins_without():
    assert combine(SOURCES[:1], [None], 0) is combine(SOURCES[:1], [2.0], 0) is SOURCES[0]
    assert isinstance(combine(SOURCES, [None] * 3, 0), JoinedSource)
    mixed = combine(SOURCES, [1, 1, 2], 5)
    assert isinstance(mixed, MixedSource)
    assert Counter(mixed[i]["caption"][0] for i in range(40)) == {"a": 10, "b": 10, "c": 20}
    with pytest.raises(ValueError, match=r"`weights` .*\[1, None, 2\]"):
        combine(SOURCES, [1, None, 2], 0)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 0.123456789]])
def test_mix_rejects_invalid_weights(weights):
    with pytest.raises(ValueError, match="`weights`"):
        Mix(weights, 0)


def test_mixed_source_rejects_empty_sources_and_wrong_numbers_of_weights():
    with pytest.raises(ValueError, match="`weights`"):
        MixedSource(SOURCES, [1, 1], 0)
    with pytest.raises(ValueError, match=r"`sources`.* source 1"):
        MixedSource([SOURCES[0], Numbers("empty", 0)], [1, 1], 0)


def test_permutation_is_uniform_and_depends_on_the_length_of_the_key():
    assert not np.array_equal(permutation(100, 5), permutation(100, 5, 0))
    assert np.array_equal(permutation(100, 5, 1), permutation(100, 5, 1))
    firsts = Counter(int(permutation(4, seed, 0)[0]) for seed in range(400))
    assert all(70 < firsts[value] < 130 for value in range(4))  # 100 each; 3.5 standard deviations
