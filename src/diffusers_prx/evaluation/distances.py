"""Distances between two sets of features, and their bootstrap intervals; all in float64.

Shapes: n and m images with E features each. This module does not know networks or processes; `metrics.py` does.
"""

from collections.abc import Iterator

import numpy as np
import torch

# Kernel width and scale of the study's MMD (arXiv 2401.09603).
SIGMA, SCALE = 10.0, 1000.0
# Rows of a kernel matrix in memory at a time: 80 MB for 10,000 columns.
CHUNK = 1024


def moments(count: int, total: torch.Tensor, outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean (E,) and unbiased covariance (E, E) of features.

    Args:
        count: number of images n, at least 2.
        total: sum of the features, (E,).
        outer: sum of the outer products of the features with themselves, (E, E).
    """
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


def covariance_factor(covariance: torch.Tensor) -> torch.Tensor:
    """Return F (E, r) with F F^T = covariance and r its rank; eigenvalues within rounding error of zero are zero."""
    values, vectors = torch.linalg.eigh(covariance)  # (E,) ascending, (E, E)
    floor = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    kept = values > floor
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Return the squared Frechet distance of two Gaussians (arXiv 1706.08500), a float64 scalar.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2. With S = F F^T, the last trace is the sum of the singular values of
    F1^T F2. This avoids the square root of a nearly singular matrix, and complex numbers.

    Args:
        first: mean (E,) and covariance (E, E) in float64.
        second: mean (E,) and covariance (E, E) in float64.

    Example:
        >>> import torch
        >>> from diffusers_prx.evaluation.distances import frechet_distance
        >>> zero, one = torch.zeros(2).double(), torch.eye(2).double()
        >>> frechet_distance((zero, one), (zero + 1, one))  # 2.0
    """
    (mean1, covariance1), (mean2, covariance2) = first, second
    shared = torch.linalg.svdvals(covariance_factor(covariance1).T @ covariance_factor(covariance2)).sum()
    return (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * shared


def _kernel_chunks(x: torch.Tensor, y: torch.Tensor, sigma: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows of k(x_i, y_j) - 1, (chunk, m), for the Gaussian kernel k = exp(-|x_i - y_j|^2 / (2 sigma^2)).

    At sigma 10, k is in [0.98, 1] for unit vectors, and the distance is a small difference of means of k. The ones
    cancel exactly in this difference, so they are subtracted before rounding.
    """
    x, y = x.double(), y.double()
    y_squared = y.square().sum(dim=1)  # (m,)
    for start in range(0, len(x), CHUNK):
        rows = x[start : start + CHUNK]  # (chunk, E)
        squared = rows.square().sum(dim=1, keepdim=True) + y_squared - 2 * rows @ y.T  # (chunk, m)
        yield slice(start, start + len(rows)), torch.expm1(squared.clamp(min=0) / (-2 * sigma**2))  # (chunk, m)


def kernel_sum(x: torch.Tensor, y: torch.Tensor, sigma: float = SIGMA) -> torch.Tensor:
    """Return the sum of k(x_i, y_j) - 1 over all pairs, a float64 scalar. Pairs of an image with itself add 0."""
    sums = [chunk.sum() for _, chunk in _kernel_chunks(x, y, sigma)]
    return torch.stack(sums).sum()


def maximum_mean_discrepancy(
    generated: torch.Tensor,
    reference: torch.Tensor,
    unbiased: bool = False,
    sigma: float = SIGMA,
    scale: float = SCALE,
) -> torch.Tensor:
    """Return the squared maximum mean discrepancy (arXiv 2401.09603), a float64 scalar.

    Args:
        generated: features of generated images, (n, E).
        reference: features of reference images, (m, E).
        unbiased: leave out pairs of an image with itself. The study's estimator includes them, and is above zero for
            two samples of the same distribution.
        sigma: width of the Gaussian kernel.
        scale: factor on the result.
    """
    n, m = len(generated), len(reference)
    pairs_n, pairs_m = (n * (n - 1), m * (m - 1)) if unbiased else (n * n, m * m)
    within = kernel_sum(generated, generated, sigma) / pairs_n + kernel_sum(reference, reference, sigma) / pairs_m
    return scale * (within - 2 * kernel_sum(generated, reference, sigma) / (n * m))


# --- bootstrap intervals


def resampled_counts(images: int, resamples: int, seed: int) -> torch.Tensor:
    """Return how often each image is in each bootstrap resample, (resamples, images) float64; rows sum to `images`."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.multinomial(images, np.full(images, 1 / images), size=resamples)).double()


def bootstrap_frechet(
    generated: torch.Tensor, reference: tuple[torch.Tensor, torch.Tensor], counts: torch.Tensor
) -> torch.Tensor:
    """Return the Frechet distances of resampled generated images to a fixed reference, (resamples,).

    Args:
        generated: features of generated images, (n, E).
        reference: mean (E,) and covariance (E, E) in float64.
        counts: return value of `resampled_counts`, (resamples, n).
    """
    generated = generated.double()
    mean, covariance = reference
    factor = covariance_factor(covariance)  # (E, r)
    distances = []
    for weights in counts.to(generated):
        total, outer = weights @ generated, (generated * weights[:, None]).T @ generated  # (E,), (E, E)
        resampled_mean, resampled = moments(len(generated), total, outer)
        values = torch.linalg.eigvalsh(factor.T @ resampled @ factor)  # (r,)
        shared = values.clamp(min=0).sqrt().sum()
        distances.append((resampled_mean - mean).square().sum() + resampled.trace() + covariance.trace() - 2 * shared)
    return torch.stack(distances)


def bootstrap_mmd(
    generated: torch.Tensor,
    reference: torch.Tensor,
    counts: torch.Tensor,
    unbiased: bool = False,
    sigma: float = SIGMA,
    scale: float = SCALE,
) -> torch.Tensor:
    """Return the maximum mean discrepancies of resampled generated images to a fixed reference, (resamples,).

    Args:
        generated: features of generated images, (n, E).
        reference: features of reference images, (m, E).
        counts: return value of `resampled_counts`, (resamples, n).
        unbiased: leave out pairs of an image with itself, however often a resample contains it.
        sigma: width of the Gaussian kernel.
        scale: factor on the result.
    """
    n, m = len(generated), len(reference)
    counts = counts.to(generated.device, torch.float64)
    within, between = (torch.zeros(len(counts), dtype=torch.float64, device=generated.device) for _ in range(2))
    for rows, chunk in _kernel_chunks(generated, generated, sigma):
        within += (counts[:, rows] * (counts @ chunk.T)).sum(dim=1)  # (resamples,)
    for rows, chunk in _kernel_chunks(generated, reference, sigma):
        between += counts[:, rows] @ chunk.sum(dim=1)  # (resamples,)
    within_reference = kernel_sum(reference, reference, sigma) / (m * (m - 1) if unbiased else m * m)
    pairs = n * n - counts.square().sum(dim=1) if unbiased else n * n
    return scale * (within / pairs + within_reference - 2 * between / (n * m))


def centered_interval(value: float, replicates: torch.Tensor, level: float = 0.95) -> tuple[float, float]:
    """Return an interval around a value: the spread of bootstrap replicates about their mean, centered on the value.

    Resamples contain images more than once. This alone raises a Frechet distance and a biased discrepancy, by about as
    much as the finite number of images does. Percentiles of the replicates would therefore often miss the value.

    Args:
        value: distance of all images.
        replicates: distances of resamples, (resamples,).
        level: share of the replicates inside the interval.
    """
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(replicates.double().cpu() - replicates.double().mean().cpu(), tails).tolist()
    return value + low, value + high


def share_interval(successes: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share. Unlike a bootstrap interval, it has a width at 0 and 1."""
    z = 1.959963984540054
    spread = z * (successes * (total - successes) / total + z * z / 4) ** 0.5
    center = successes + z * z / 2
    return (center - spread) / (total + z * z), (center + spread) / (total + z * z)
