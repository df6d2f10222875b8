"""Several sources in given shares: which sample stands at a place of the mix, as pure arithmetic."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from .captioned import IndexedView, JoinedSource, ListedImages

ENDLESS = 2**40  # places of a mix: more than any run reads
LONGEST_CYCLE = 10_000_000


def permutation(size: int, *key: int) -> np.ndarray:
    """The order of 0 .. size - 1 that belongs to a key of numbers, int64 (size,)."""
    state = np.random.SeedSequence((len(key), *key)).generate_state(2, np.uint32)  # (5,) and (5, 0) are the same to it
    generator = torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
    return torch.randperm(size, generator=generator).numpy()


class Mix:
    """Which of several parties has its turn at place i, for i from 0 on without end.

    Weights are read as exact decimals and brought to whole numbers: 0.7, 0.2, 0.1 is a cycle of ten places of which
    the first party has seven. Each cycle is in a seeded order of its own, so that shares are exact after every cycle.

    Args:
        weights: one positive number per party; only their ratios count.
        key: seed of the orders, one or more numbers.

    Raises:
        ValueError: for a weight that is not positive and finite, or weights whose cycle is longer than ten million.
    """

    def __init__(self, weights: Sequence[float], *key: int):
        if not weights or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"`weights` must be positive and finite, one per source, got {list(weights)}.")
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        shares = [int(weight * scale) for weight in exact]
        self.shares = [share // math.gcd(*shares) for share in shares]
        self.cycle = sum(self.shares)
        if self.cycle > LONGEST_CYCLE:
            raise ValueError(f"`weights` {list(weights)} are too fine: round them to three or four digits.")
        self.key = key
        self._last: tuple[int, np.ndarray, np.ndarray] | None = None

    def turn(self, place: int) -> tuple[int, int]:
        """(party, how many turns it has had before) at a place."""
        cycle, inside = divmod(place, self.cycle)
        if self._last is None or self._last[0] != cycle:
            order = np.repeat(np.arange(len(self.shares)), self.shares)[permutation(self.cycle, *self.key, cycle)]
            earlier = np.empty_like(order)
            for party, share in enumerate(self.shares):
                earlier[order == party] = np.arange(share)
            self._last = (cycle, order, earlier)
        party = int(self._last[1][inside])
        return party, cycle * self.shares[party] + int(self._last[2][inside])


class MixedSource(IndexedView):
    """A source made of several in given shares, without end: read it in order, it is shuffled already.

    Every source goes through epochs of its own, each in a seeded order: no sample of a source comes twice before all
    of it came once. What stands at a place is a function of the seed and the place alone.

    Args:
        sources: each with at least one sample.
        weights: one per source, see `Mix`.
        seed: of the mix and of the orders of the sources.

    Raises:
        ValueError: for an empty source, or weights that do not fit.
    """

    def __init__(self, sources: Sequence[ListedImages], weights: Sequence[float], seed: int):
        if len(sources) != len(weights):
            raise ValueError(f"`weights` has {len(weights)} numbers for {len(sources)} sources: give one for each.")
        empty = [place for place, source in enumerate(sources) if len(source) == 0]
        if empty:
            raise ValueError(f"Source {empty[0]} of the mix has no sample.")
        super().__init__(sources)
        self.seed = seed
        self.mix = Mix(weights, seed)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source: (epoch, order)

    def locate(self, place: int) -> tuple[int, int]:
        source, turn = self.mix.turn(place)
        epoch, inside = divmod(turn, len(self.sources[source]))
        if self._orders.get(source, (None,))[0] != epoch:
            self._orders[source] = (epoch, permutation(len(self.sources[source]), self.seed, source, epoch))
        return source, int(self._orders[source][1][inside])

    def __len__(self) -> int:
        return ENDLESS


def combine(sources: Sequence[ListedImages], weights: Sequence[float | None], seed: int) -> ListedImages:
    """One source of several: all samples once per epoch where no source has a weight, else in the given shares.

    Raises:
        ValueError: if only some of the sources have a weight.
    """
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(sources):
        raise ValueError(f"Weights are {list(weights)}: give every source one, or none to read each sample equally.")
    if len(sources) == 1:
        return sources[0]
    return MixedSource(sources, given, seed) if given else JoinedSource(sources)
