"""Distances between two sets of features, and how far chance could move them; all in float64.

n images, E features of each. Nothing here knows of networks or processes: `metrics.py` does.
"""

from collections.abc import Iterator

import numpy as np
import torch

# of the study's MMD (arXiv 2401.09603): a Gaussian kernel of this width, and the factor on the result
SIGMA, SCALE = 10.0, 1000.0
# rows of a kernel matrix that are in memory at once: 80 MB for 10,000 columns
CHUNK = 1024


def moments(count: int, total: torch.Tensor, outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean (E,) and unbiased covariance (E, E) of features.

    Args:
        count: number n of images, at least 2.
        total: (E,), the sum of the features.
        outer: (E, E), the sum of the outer products of each with itself.
    """
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


def covariance_factor(covariance: torch.Tensor) -> torch.Tensor:
    """F (E, r) with F F^T = covariance, r its rank; eigenvalues within rounding error of zero count as zero."""
    values, vectors = torch.linalg.eigh(covariance)  # (E,) ascending, (E, E)
    floor = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    kept = values > floor
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """The squared Frechet distance of two Gaussians (arXiv 1706.08500), a float64 scalar.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2. With S = F F^T the last trace is the sum of the singular values of
    F1^T F2: no square root of a matrix that is nearly singular, and no complex numbers.

    Args:
        first, second: mean (E,) and covariance (E, E), float64.
    """
    (mean1, covariance1), (mean2, covariance2) = first, second
    shared = torch.linalg.svdvals(covariance_factor(covariance1).T @ covariance_factor(covariance2)).sum()
    return (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * shared


def _kernel_chunks(x: torch.Tensor, y: torch.Tensor, sigma: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of k(x_i, y_j) - 1, (chunk, m), for the Gaussian kernel k = exp(-|x_i - y_j|^2 / (2 sigma^2)).

    At sigma 10 every k of unit vectors is in [0.98, 1], and the distance is what is left when means of them are
    subtracted. The ones cancel there exactly, so they are left out before anything is rounded.
    """
    x, y = x.double(), y.double()
    y_squared = y.square().sum(dim=1)  # (m,)
    for start in range(0, len(x), CHUNK):
        rows = x[start : start + CHUNK]  # (chunk, E)
        squared = rows.square().sum(dim=1, keepdim=True) + y_squared - 2 * rows @ y.T  # (chunk, m)
        yield slice(start, start + len(rows)), torch.expm1(squared.clamp(min=0) / (-2 * sigma**2))  # (chunk, m)


def kernel_sum(x: torch.Tensor, y: torch.Tensor, sigma: float = SIGMA) -> torch.Tensor:
    """The sum of k(x_i, y_j) - 1 over all pairs, a float64 scalar. Of a set with itself, pairs i = j add nothing."""
    sums = [chunk.sum() for _, chunk in _kernel_chunks(x, y, sigma)]
    return torch.stack(sums).sum()


def maximum_mean_discrepancy(
    generated: torch.Tensor,
    reference: torch.Tensor,
    unbiased: bool = False,
    sigma: float = SIGMA,
    scale: float = SCALE,
) -> torch.Tensor:
    """The squared maximum mean discrepancy (arXiv 2401.09603), a float64 scalar.

    Args:
        generated: (n, E).
        reference: (m, E).
        unbiased: leave out the pairs of an image with itself. The study's estimator has them, and is above zero also
            for two samples of one distribution.
        sigma: width of the Gaussian kernel.
        scale: factor on the result.
    """
    n, m = len(generated), len(reference)
    pairs_n, pairs_m = (n * (n - 1), m * (m - 1)) if unbiased else (n * n, m * m)
    within = kernel_sum(generated, generated, sigma) / pairs_n + kernel_sum(reference, reference, sigma) / pairs_m
    return scale * (within - 2 * kernel_sum(generated, reference, sigma) / (n * m))


# How far chance could move them


def resampled_counts(images: int, resamples: int, seed: int) -> torch.Tensor:
    """How often each image is in each bootstrap resample, (resamples, images) float64; rows sum to `images`."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.multinomial(images, np.full(images, 1 / images), size=resamples)).double()


def bootstrap_frechet(
    generated: torch.Tensor, reference: tuple[torch.Tensor, torch.Tensor], counts: torch.Tensor
) -> torch.Tensor:
    """The Frechet distance of resamples of the generated images to the same reference, (resamples,).

    Args:
        generated: (n, E).
        reference: mean (E,) and covariance (E, E), float64.
        counts: (resamples, n), see `resampled_counts`.
    """
    generated = generated.double()
    mean, covariance = reference
    factor = covariance_factor(covariance)  # (E, r)
    distances = []
    for weights in counts.to(generated):
        total, outer = weights @ generated, (generated * weights[:, None]).T @ generated  # (E,), (E, E)
        own_mean, own = moments(len(generated), total, outer)
        values = torch.linalg.eigvalsh(factor.T @ own @ factor)  # (r,)
        shared = values.clamp(min=0).sqrt().sum()
        distances.append((own_mean - mean).square().sum() + own.trace() + covariance.trace() - 2 * shared)
    return torch.stack(distances)


def bootstrap_mmd(
    generated: torch.Tensor,
    reference: torch.Tensor,
    counts: torch.Tensor,
    unbiased: bool = False,
    sigma: float = SIGMA,
    scale: float = SCALE,
) -> torch.Tensor:
    """The maximum mean discrepancy of resamples of the generated images to the same reference, (resamples,).

    Args:
        generated, reference, unbiased, sigma, scale: see `maximum_mean_discrepancy`. Unbiased, the pairs of an image
            with itself are left out however often a resample has it.
        counts: (resamples, n), see `resampled_counts`.
    """
    n, m = len(generated), len(reference)
    counts = counts.to(generated.device, torch.float64)
    within, between = (torch.zeros(len(counts), dtype=torch.float64, device=generated.device) for _ in range(2))
    for rows, chunk in _kernel_chunks(generated, generated, sigma):
        within += (counts[:, rows] * (counts @ chunk.T)).sum(dim=1)  # (resamples,)
    for rows, chunk in _kernel_chunks(generated, reference, sigma):
        between += counts[:, rows] @ chunk.sum(dim=1)  # (resamples,)
    own = kernel_sum(reference, reference, sigma) / (m * (m - 1) if unbiased else m * m)
    pairs = n * n - counts.square().sum(dim=1) if unbiased else n * n
    return scale * (within / pairs + own - 2 * between / (n * m))


def centered_interval(value: float, replicates: torch.Tensor, level: float = 0.95) -> tuple[float, float]:
    """An interval about a value: how replicates scatter about their own mean, put around the value.

    A resample has images more than once. That alone raises a Frechet distance and a biased discrepancy, by about as
    much again as the finite number of images does; percentiles of the replicates themselves would often miss the value
    that they are of.

    Args:
        value: of all images.
        replicates: (resamples,).
        level: share of the scatter that is inside.
    """
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(replicates.double().cpu() - replicates.double().mean().cpu(), tails).tolist()
    return value + low, value + high


def share_interval(right: int, of: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share; unlike a bootstrap it has a width at 0 and at 1 as well."""
    z = 1.959963984540054
    share, spread = right / of, z * (right * (of - right) / of + z * z / 4) ** 0.5
    middle = of * share + z * z / 2
    return (middle - spread) / (of + z * z), (middle + spread) / (of + z * z)
