"""What a difference between two kinds of runs is worth: paired by seed, with Student's t over the seeds.

A run's score depends on its seed (weights, samples, noise). Two runs of the same seed share most of that, so their
difference varies less than either score; how much it still varies over seeds is what the intervals here measure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval
# From fewer seeds nothing is concluded: t is 12.7 for two, which says little whatever was measured.
MIN_SEEDS = 3
NORMAL_QUANTILE = float(stats.norm.ppf((1 + LEVEL) / 2))


@dataclass(frozen=True)
class Difference:
    """The mean of what was measured per seed, with its interval.

    Args:
        per_seed: seed -> arm minus reference.
        mean: over the seeds.
        low, high: the interval of the mean; None of a single seed.
        p: two-sided, of a mean of zero; None of a single seed.
    """

    per_seed: dict[int, float]
    mean: float
    low: float | None
    high: float | None
    p: float | None

    @property
    def n(self) -> int:
        return len(self.per_seed)

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_difference(per_seed: Mapping[int, float]) -> Difference | None:
    """The mean over seeds with its Student interval; None where there is no seed."""
    values = np.array(list(per_seed.values()), dtype=np.float64)
    if not len(values):
        return None
    mean = float(values.mean())
    if len(values) == 1:
        return Difference(dict(per_seed), mean, None, None, None)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return Difference(dict(per_seed), mean, mean, mean, float(mean == 0))
    student = stats.t(len(values) - 1)
    half = float(student.ppf((1 + LEVEL) / 2)) * error
    return Difference(dict(per_seed), mean, mean - half, mean + half, float(2 * student.sf(abs(mean) / error)))


def paired_difference(arm: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Arm minus reference over the seeds that both have; None where there is none."""
    return mean_difference({seed: arm[seed] - reference[seed] for seed in sorted(set(arm) & set(reference))})


def mean_ratio(ratios: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The geometric mean of positive ratios and its interval (Student's, of the logarithms)."""
    found = mean_difference(dict(enumerate(np.log(ratios))))
    if found is None:
        raise ValueError("`ratios` is empty; at least one is needed.")
    if found.low is None or found.high is None:
        return math.exp(found.mean), None, None
    return math.exp(found.mean), math.exp(found.low), math.exp(found.high)


def seeds_needed(difference: Difference, most: int = 1000) -> int | None:
    """How many seeds would decide if mean and spread stayed as they are; None: more than `most`, or no spread is
    known."""
    if difference.n < 2:
        return None
    spread = float(np.std(list(difference.per_seed.values()), ddof=1))
    if abs(difference.mean) * math.sqrt(most) < NORMAL_QUANTILE * spread:
        return None
    # t is larger than the normal quantile, so that fewer cannot do
    fewest = int((NORMAL_QUANTILE * spread / difference.mean) ** 2) if difference.mean else 0
    for n in range(max(2, fewest), most + 1):
        if stats.t.ppf((1 + LEVEL) / 2, n - 1) * spread / math.sqrt(n) < abs(difference.mean):
            return n
    return None


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p values: with several questions, the chance that any of those below a limit is a false one
    stays below that limit."""
    adjusted, largest = {}, 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = largest
    return adjusted


def verdict(difference: Difference | None, better: str, expected: str | None) -> str:
    """What a difference says about a finding.

    Args:
        difference: arm minus reference, of the primary metric.
        better: "higher" or "lower" values are better.
        expected: "better" or "worse" than the reference, as the finding has it; None: it says neither.

    Returns:
        "no data", "too few seeds" (less than `MIN_SEEDS`), "undecided" (the interval contains zero); else "agrees" or
        "disagrees", and of a finding without a direction "better" or "worse".
    """
    if difference is None:
        return "no data"
    if difference.n < MIN_SEEDS:
        return "too few seeds"
    if not difference.excludes_zero:
        return "undecided"
    found = "better" if (difference.mean > 0) == (better == "higher") else "worse"
    if expected is None:
        return found
    return "agrees" if found == expected else "disagrees"


def value_at(curve: Sequence[tuple[float, float]], step: float) -> float | None:
    """A curve of (step, value), both positive, at a step; None before the first point and after the last.

    Between its points it is a straight line of the logarithms: losses fall about as a power of the step, and a line of
    the values would lie above such a curve.
    """
    if not curve or not curve[0][0] <= step <= curve[-1][0]:
        return None
    steps, values = np.log(curve).T
    return math.exp(np.interp(math.log(step), steps, values))


def equal_time_steps(
    seconds_arm: float, seconds_reference: float, last_arm: float, last_reference: float
) -> tuple[float, float]:
    """The steps of arm and reference after the same time: the longest for which both have steps.

    Args:
        seconds_arm, seconds_reference: per step.
        last_arm, last_reference: the last steps that may be compared.
    """
    time = min(seconds_arm * last_arm, seconds_reference * last_reference)
    return min(time / seconds_arm, last_arm), min(time / seconds_reference, last_reference)  # despite rounding
