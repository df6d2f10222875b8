"""Statistics of differences between arms: paired by seed, with Student's t over the seeds.

The score of a run depends on its seed (weights, samples, noise). Two runs with the same seed share most of that, so
their difference varies less than either score. The intervals here measure how much it still varies over seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every confidence interval
# With two seeds, the t quantile is 12.7 and the interval says little.
MIN_SEEDS = 3
NORMAL_QUANTILE = float(stats.norm.ppf((1 + LEVEL) / 2))


@dataclass(frozen=True)
class Difference:
    """Mean of differences per seed, with its confidence interval.

    Args:
        per_seed: seed -> arm minus reference.
        mean: mean over the seeds.
        low: lower bound of the interval; None for a single seed.
        high: upper bound of the interval; None for a single seed.
        p: two-sided p value of a zero mean; None for a single seed.
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
    """Return the mean over seeds with its Student interval; None without seeds."""
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
    """Return arm minus reference over the seeds that both have; None without common seeds.

    Example:
        >>> from diffusers_prx.study.statistics import paired_difference
        >>> paired_difference({1: 0.5, 2: 0.7}, {1: 0.4, 2: 0.5}).mean  # 0.15
    """
    return mean_difference({seed: arm[seed] - reference[seed] for seed in sorted(set(arm) & set(reference))})


def mean_ratio(ratios: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the geometric mean of positive ratios and its interval (Student's t over the logarithms).

    Raises:
        ValueError: if `ratios` is empty.
    """
    logs = mean_difference(dict(enumerate(np.log(ratios))))
    if logs is None:
        raise ValueError("`ratios` is empty; pass at least one ratio.")
    if logs.low is None or logs.high is None:
        return math.exp(logs.mean), None, None
    return math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high)


def seeds_needed(difference: Difference, most: int = 1000) -> int | None:
    """Return the number of seeds at which the interval would exclude zero with the same mean and spread.

    Args:
        difference: measured difference.
        most: largest number of seeds to consider.

    Returns:
        Number of seeds; None if it exceeds `most`, or if a single seed gives no spread.
    """
    if difference.n < 2:
        return None
    spread = float(np.std(list(difference.per_seed.values()), ddof=1))
    if abs(difference.mean) * math.sqrt(most) < NORMAL_QUANTILE * spread:
        return None
    # the t quantile exceeds the normal one, so fewer seeds cannot suffice
    fewest = int((NORMAL_QUANTILE * spread / difference.mean) ** 2) if difference.mean else 0
    for n in range(max(2, fewest), most + 1):
        if stats.t.ppf((1 + LEVEL) / 2, n - 1) * spread / math.sqrt(n) < abs(difference.mean):
            return n
    return None


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p values, which control the chance of any false positive among several questions."""
    adjusted, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return adjusted


def verdict(difference: Difference | None, better: str, expected: str | None) -> str:
    """Return the verdict on a finding.

    Args:
        difference: arm minus reference of the primary metric.
        better: "higher" or "lower" values of the metric.
        expected: expected direction of the arm, "better" or "worse"; None: the finding has no direction.

    Returns:
        "no data", "too few seeds" (fewer than `MIN_SEEDS`), "undecided" (the interval contains zero), "agrees" or
        "disagrees"; for a finding without direction, "better" or "worse" instead of the last two.
    """
    if difference is None:
        return "no data"
    if difference.n < MIN_SEEDS:
        return "too few seeds"
    if not difference.excludes_zero:
        return "undecided"
    direction = "better" if (difference.mean > 0) == (better == "higher") else "worse"
    if expected is None:
        return direction
    return "agrees" if direction == expected else "disagrees"


def value_at(curve: Sequence[tuple[float, float]], step: float) -> float | None:
    """Return the value of a curve at a step, interpolated linearly in the logarithms of step and value.

    Losses fall about as a power of the step. Linear interpolation of the values would lie above such a curve.

    Args:
        curve: points (step, value), both positive, in ascending order.
        step: position on the curve.

    Returns:
        Interpolated value; None outside the curve.
    """
    if not curve or not curve[0][0] <= step <= curve[-1][0]:
        return None
    steps, values = np.log(curve).T
    return math.exp(np.interp(math.log(step), steps, values))


def equal_time_steps(
    seconds_arm: float, seconds_reference: float, last_arm: float, last_reference: float
) -> tuple[float, float]:
    """Return the steps that arm and reference reach in equal time, for the longest time that both curves cover.

    Args:
        seconds_arm: seconds per step of the arm.
        seconds_reference: seconds per step of the reference.
        last_arm: last comparable step of the arm.
        last_reference: last comparable step of the reference.
    """
    time = min(seconds_arm * last_arm, seconds_reference * last_reference)
    return min(time / seconds_arm, last_arm), min(
        time / seconds_reference, last_reference
    )  # rounding must not pass the last step
