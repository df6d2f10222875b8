"""Mixtures of sources in given shares, as pure arithmetic on the index of a sample."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from .captioned import IndexedView, JoinedSource, ListedImages

ENDLESS = 2**40  # length of a mixture: more samples than any run reads
LONGEST_CYCLE = 10_000_000


def permutation(size: int, *key: int) -> np.ndarray:
    """Return the pseudo-random order of 0 .. size - 1 that belongs to a key of integers, int64 (size,)."""
    # the length comes first, because SeedSequence does not distinguish (5,) from (5, 0)
    state = np.random.SeedSequence((len(key), *key)).generate_state(2, np.uint32)
    generator = torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
    return torch.randperm(size, generator=generator).numpy()


class Mix:
    """Endless sequence of source numbers in given shares.

    Weights are read as exact decimals and reduced to integers: 0.7, 0.2, 0.1 make a cycle of ten samples, seven of
    them from source 0. Each cycle has its own seeded order, so that the shares are exact after every cycle.

    Args:
        weights: one positive number per source; only their ratios count.
        key: seed of the orders, one or more integers.

    Raises:
        ValueError: for a weight that is not positive and finite, or weights with a cycle longer than ten million.

    Example:
        >>> mix = Mix([0.75, 0.25], 0)
        >>> [mix.locate(index)[0] for index in range(4)]  # three times source 0, once source 1
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
        self._last_cycle: tuple[int, np.ndarray, np.ndarray] | None = None

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, number of earlier samples of that source) of sample `index` of the mixture."""
        cycle, offset = divmod(index, self.cycle)
        if self._last_cycle is None or self._last_cycle[0] != cycle:
            order = np.repeat(np.arange(len(self.shares)), self.shares)[permutation(self.cycle, *self.key, cycle)]
            earlier = np.empty_like(order)
            for source, share in enumerate(self.shares):
                earlier[order == source] = np.arange(share)
            self._last_cycle = (cycle, order, earlier)
        source = int(self._last_cycle[1][offset])
        return source, cycle * self.shares[source] + int(self._last_cycle[2][offset])


class MixedSource(IndexedView):
    """Endless mixture of several sources in given shares. It is shuffled already: read it in order.

    Every source has its own epochs, each in a seeded order: no sample of a source repeats before all of them were
    read. A sample is a function of the seed and its index alone.

    Args:
        sources: sources with at least one sample each.
        weights: share of each source, see `Mix`.
        seed: seed of the mix and of the orders of the sources.

    Raises:
        ValueError: for an empty source or invalid weights.

    Example:
        >>> mixed = MixedSource([load_source("photos"), load_source("paintings")], [0.7, 0.3], seed=0)
        >>> mixed[0]["caption"]
    """

    def __init__(self, sources: Sequence[ListedImages], weights: Sequence[float], seed: int):
        if len(sources) != len(weights):
            raise ValueError(f"`weights` has {len(weights)} numbers for {len(sources)} sources: give one for each.")
        empty = [number for number, source in enumerate(sources) if len(source) == 0]
        if empty:
            raise ValueError(f"`sources` must not be empty, but source {empty[0]} has no sample.")
        super().__init__(sources)
        self.seed = seed
        self.mix = Mix(weights, seed)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source: (epoch, order)

    def locate(self, index: int) -> tuple[int, int]:
        source, earlier = self.mix.locate(index)
        epoch, offset = divmod(earlier, len(self.sources[source]))
        if self._orders.get(source, (None,))[0] != epoch:
            self._orders[source] = (epoch, permutation(len(self.sources[source]), self.seed, source, epoch))
        return source, int(self._orders[source][1][offset])

    def __len__(self) -> int:
        return ENDLESS


def combine(sources: Sequence[ListedImages], weights: Sequence[float | None], seed: int) -> ListedImages:
    """Combine sources: a mixture if they have weights, else a concatenation that has every sample once per epoch.

    Raises:
        ValueError: if only some of the sources have a weight.
    """
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(sources):
        raise ValueError(f"`weights` are {list(weights)}: give every source one, or none to read each sample equally.")
    if len(sources) == 1:
        return sources[0]
    return MixedSource(sources, given, seed) if given else JoinedSource(sources)
