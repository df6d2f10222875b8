"""The distances against independent implementations: SciPy's matrix square root, double loops, literal resampling."""

import numpy as np
import pytest
import scipy.linalg
import torch

from diffusers_prx.evaluation.distances import (
    bootstrap_frechet,
    bootstrap_mmd,
    centered_interval,
    frechet_distance,
    kernel_sum,
    maximum_mean_discrepancy,
    moments,
    resampled_counts,
    share_interval,
)


def features(count, width, seed, shift=0.0):
    """Return correlated features, like those of networks."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + shift


def own_moments(x):
    x = torch.as_tensor(x).double()
    return moments(len(x), x.sum(dim=0), x.T @ x)


def scipy_frechet(x, y):
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * np.trace(root).real


@pytest.mark.parametrize("shift", [0.0, 0.5, 30.0])
def test_frechet_distance_equals_scipy(shift):
    x, y = features(300, 24, 0), features(400, 24, 1, shift)
    distance = frechet_distance(own_moments(x), own_moments(y))
    assert distance.dtype == torch.float64
    assert distance.item() == pytest.approx(scipy_frechet(x, y), rel=1e-9)  # measured: 2e-12; asked for: 1e-6


def test_frechet_distance_equals_the_closed_form():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances."""
    mean, spread = torch.tensor([1.0, -2, 0.5]).double(), torch.tensor([0.5, 2, 3]).double()
    other = torch.tensor([1.0, 1, 1]).double()
    distance = frechet_distance((mean, spread.square().diag()), (torch.zeros(3).double(), other.square().diag()))
    assert distance.item() == pytest.approx((mean.square().sum() + (spread - other).square().sum()).item(), rel=1e-12)


def test_fewer_images_than_features():
    """The distance of a set to itself is zero, where sqrtm has rounding errors."""
    x, y = features(10, 24, 0), features(12, 24, 1)
    assert frechet_distance(own_moments(x), own_moments(y)).item() == pytest.approx(scipy_frechet(x, y), rel=1e-6)
    assert abs(frechet_distance(own_moments(x), own_moments(x)).item()) < 1e-10 * np.trace(np.cov(x, rowvar=False))


def unit(count, width, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator) + shift, dim=1)


def double_loop(x, y, unbiased, sigma, scale):
    """Compute the MMD from single kernel values in Python."""

    def mean(first, second, skip):
        values = [
            np.exp(-((a - b) ** 2).sum() / (2 * sigma**2))
            for i, a in enumerate(first)
            for j, b in enumerate(second)
            if not (skip and i == j)
        ]
        return np.mean(values)

    x, y = x.double().numpy(), y.double().numpy()
    return scale * (mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("sigma", "scale"), [(10.0, 1000.0), (0.7, 1.0)])
def test_mmd_equals_a_double_loop(unbiased, sigma, scale):
    x, y = unit(40, 16, 0), unit(30, 16, 1, 0.1)
    value = maximum_mean_discrepancy(x, y, unbiased, sigma, scale)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(double_loop(x, y, unbiased, sigma, scale), rel=1e-9)  # measured: 2e-11


def test_mmd_of_similar_sets_is_not_lost_in_rounding():
    """At the study's sigma, kernel values are in [0.98, 1]; float32 would lose the distance of similar sets."""
    x = unit(300, 64, 0)
    y = torch.nn.functional.normalize(
        x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), dim=1
    )
    squared = (x.double()[:, None] - y.double()).square().sum(-1)
    assert torch.exp(-squared / 200).min() > 0.98
    true = double_loop(x[:60], y[:60], False, 10.0, 1000.0)
    assert maximum_mean_discrepancy(x[:60], y[:60]).item() == pytest.approx(true, rel=1e-6)

    def float32(a, b):
        return torch.exp(-(a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T) / 200).mean()

    single = 1000 * (float32(x[:60], x[:60]) + float32(y[:60], y[:60]) - 2 * float32(x[:60], y[:60]))
    assert abs(single.item() - true) > 0.1 * true


def test_mmd_does_not_depend_on_the_chunk_size(monkeypatch):
    x, y = unit(23, 8, 0), unit(17, 8, 1)
    whole = maximum_mean_discrepancy(x, y)
    monkeypatch.setattr("diffusers_prx.evaluation.distances.CHUNK", 5)
    assert maximum_mean_discrepancy(x, y).item() == pytest.approx(whole.item(), rel=1e-12)
    assert kernel_sum(x, x[:1]).item() == pytest.approx(kernel_sum(x[:1], x).item(), rel=1e-12)


def test_only_the_biased_estimator_is_above_zero_for_equal_distributions():
    values = [
        [maximum_mean_discrepancy(unit(40, 8, 2 * i), unit(40, 8, 2 * i + 1), u).item() for i in range(60)]
        for u in (False, True)
    ]
    biased, unbiased = map(np.array, values)
    assert (biased > 0).all()
    assert abs(unbiased.mean()) < 4 * unbiased.std() / 60**0.5
    assert biased.mean() > 10 * biased.std() / 60**0.5


# The bootstrap


def resample(x, counts):
    return x[torch.repeat_interleave(torch.arange(len(x)), counts.long())]


def test_counts_of_resamples_sum_to_the_number_of_images():
    counts = resampled_counts(50, 400, seed=3)
    assert (counts.sum(dim=1) == 50).all()
    assert torch.equal(counts, resampled_counts(50, 400, seed=3))
    assert not torch.equal(counts, resampled_counts(50, 400, seed=4))
    assert counts.mean(dim=0).sub(1).abs().max() < 5 / 400**0.5  # each image as often as every other
    assert counts.var().item() == pytest.approx(1 - 1 / 50, abs=0.1)


def test_bootstrapped_distances_equal_those_of_explicit_resamples(monkeypatch):
    monkeypatch.setattr("diffusers_prx.evaluation.distances.CHUNK", 7)
    x, y = unit(40, 8, 0), unit(30, 8, 1, 0.2)
    counts = resampled_counts(40, 3, seed=0)
    frechet, mmd = bootstrap_frechet(x, own_moments(y), counts), bootstrap_mmd(x, y, counts)
    unbiased = bootstrap_mmd(x, y, counts, unbiased=True)
    for place, row in enumerate(counts):
        again = resample(x, row)
        assert frechet[place].item() == pytest.approx(
            frechet_distance(own_moments(again), own_moments(y)).item(), rel=1e-9
        )
        assert mmd[place].item() == pytest.approx(maximum_mean_discrepancy(again, y).item(), rel=1e-9)
        # pairs of different images only, by a double loop over the resample
        names = torch.repeat_interleave(torch.arange(40), row.long())
        kernel = torch.exp(-(again[:, None].double() - again.double()).square().sum(-1) / 200)
        within = kernel[names[:, None] != names].mean()
        rest = torch.exp(-(y[:, None].double() - y.double()).square().sum(-1) / 200)
        rest = (rest.sum() - 30) / (30 * 29)
        between = torch.exp(-(again[:, None].double() - y.double()).square().sum(-1) / 200).mean()
        assert unbiased[place].item() == pytest.approx((1000 * (within + rest - 2 * between)).item(), rel=1e-9)


def test_intervals_cover_the_true_distance_as_often_as_stated():
    """The true distance is 1 + (2 - 1)^2 in each of two dimensions, 4 in total."""
    reference = torch.zeros(2).double(), torch.eye(2).double()
    covered = 0
    for seed in range(80):
        x = 1 + 2 * torch.randn(300, 2, generator=torch.Generator().manual_seed(seed))
        value = frechet_distance(own_moments(x), reference).item()
        low, high = centered_interval(value, bootstrap_frechet(x, reference, resampled_counts(300, 60, seed)))
        covered += low < 4 < high
    assert 0.85 <= covered / 80 <= 0.97  # measured: 0.925; 0.775 at 0.7 times the width, 1 at 1.5 times


def test_interval_of_a_share_has_a_width_at_zero_and_one():
    low, high = share_interval(256, 256)
    assert high == pytest.approx(1)
    assert low == pytest.approx(0.985, abs=1e-3)
    low, high = share_interval(50, 100)
    assert (low, high) == pytest.approx((0.404, 0.596), abs=1e-3)  # Wilson's textbook value
