"""FID and MMD as torchmetrics.

```python
metric = FrechetDistance(load_extractor("inception")).to("cuda")
metric.update(reference, real=True)  # uint8 (B, 3, H, W), any number of times
metric.update(generated, real=False)
metric.compute()
```

Under torch.distributed, each process updates with its own share of the images, and `compute` joins the shares. Sums
are
float64: the order of batches and processes changes only the 16th digit, and the batch size changes a result only
through the float32 features.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from diffusers.utils import logging
from torchmetrics import Metric

from .distances import (
    SCALE,
    SIGMA,
    bootstrap_frechet,
    bootstrap_mmd,
    centered_interval,
    frechet_distance,
    maximum_mean_discrepancy,
    moments,
    resampled_counts,
)
from .extractors import INCEPTION, FeatureExtractor, check_images, wrap_colors

logger = logging.get_logger(__name__)

PHOTOROOM = "photoroom"
# Extractor -> established name of its MMD.
MMD_NAMES = {"clip": "CMMD", "dinov2": "DINO-MMD"}


class FeatureDistance(Metric):
    """Base of distances between the features of generated and reference images.

    Args:
        extractor: return value of `load_extractor`; metrics may share it.
        compat: "photoroom" to treat images as the study's public code does; None otherwise.

    Raises:
        ValueError: for another `compat`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    kind: ClassVar[str]  # of the reference statistics
    min_images: ClassVar[int] = 2

    generated_peak: torch.Tensor
    reference_peak: torch.Tensor

    def __init__(self, extractor: FeatureExtractor, compat: str | None = None):
        super().__init__()
        if compat not in (None, PHOTOROOM):
            raise ValueError(f"`compat` is {compat!r}; accepted: None and {PHOTOROOM!r}.")
        self.extractor = extractor
        self.compat = compat
        for name in ("generated_peak", "reference_peak"):
            self.add_state(name, torch.tensor(-1), dist_reduce_fx="max")

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in reports, with that of the encoder unless it is the standard one."""

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (B, E) of images, uint8 (B, 3, H, W)."""
        return self.extractor(images)

    def update(self, images: torch.Tensor, real: bool, features: torch.Tensor | None = None) -> None:
        """Add images.

        Args:
            images: images, uint8 (B, 3, H, W).
            real: True for reference images.
            features: return value of `extract` for these images, (B, E), if it exists already.

        Raises:
            ValueError: if images or features are not as described.
        """
        check_images(images)
        features = self.extract(images) if features is None else features
        if features.shape != (len(images), self.extractor.num_features):
            raise ValueError(
                f"`features` has the shape {tuple(features.shape)}; accepted: "
                f"{(len(images), self.extractor.num_features)}."
            )
        side = "reference" if real else "generated"
        peak = f"{side}_peak"
        setattr(self, peak, torch.maximum(getattr(self, peak), images.max().to(getattr(self, peak))))
        self._add(side, features.detach())

    def compute(self) -> torch.Tensor:
        """Return the distance over all processes, a float64 scalar.

        Raises:
            ValueError: if a side has fewer than two images, or no pixel above 1.
        """
        self._check()
        return self._distance()

    def details(self, resamples: int = 0, seed: int = 0) -> dict[str, Any]:
        """Return the distance and related numbers. All processes must call this method.

        Args:
            resamples: number of bootstrap resamples of the generated images; 0: no interval.
            seed: seed of the resamples.

        Returns:
            "value", "interval" (bounds of the 95% interval, or None), "num_images", "num_reference"; more for MMD.
        """
        with self.sync_context():
            self._check()
            return {**self._details(resamples, seed), "num_images": self._count("generated")} | {
                "num_reference": self._count("reference")
            }

    def reference_state(self) -> dict[str, torch.Tensor]:
        """Return the reference statistics of all processes on the CPU, for `load_reference_state`."""
        with self.sync_context():
            statistics = {"peak": self.reference_peak, **self._reference()}
            return {name: tensor.detach().cpu().clone() for name, tensor in statistics.items()}

    def load_reference_state(self, state: dict[str, torch.Tensor]) -> None:
        """Load reference statistics instead of images. Under torch.distributed, exactly one process must call this."""
        self.reference_peak = state["peak"].to(self.device)
        self._load_reference({name: tensor.to(self.device) for name, tensor in state.items()})

    def _check(self) -> None:
        for side in ("generated", "reference"):
            if self._count(side) < self.min_images:
                raise ValueError(
                    f"{self.name} needs at least {self.min_images} {side} images, got {self._count(side)}."
                )
            if getattr(self, f"{side}_peak") == 1:
                raise ValueError(
                    f"`images`: the largest value in all {self._count(side)} {side} images is 1. They seem to be in "
                    "[0, 1]; multiply by 255 before the conversion to uint8."
                )

    @abstractmethod
    def _add(self, side: str, features: torch.Tensor) -> None:
        """Add features (B, E) to the statistics."""

    @abstractmethod
    def _count(self, side: str) -> int:
        """Return the number of images of a side."""

    @abstractmethod
    def _distance(self) -> torch.Tensor:
        """Return the distance, a float64 scalar."""

    @abstractmethod
    def _details(self, resamples: int, seed: int) -> dict[str, Any]:
        """Return the entries of `details`, except the numbers of images."""

    @abstractmethod
    def _reference(self) -> dict[str, torch.Tensor]:
        """Return the reference statistics."""

    @abstractmethod
    def _load_reference(self, state: dict[str, torch.Tensor]) -> None:
        """Load the return value of `_reference`."""


class FrechetDistance(FeatureDistance):
    """Frechet distance of features (FID with Inception, arXiv 1706.08500) from streamed float64 sums.

    Memory does not grow with the number of images, unless `keep_features` is set.

    Args:
        extractor: return value of `load_extractor`.
        compat: "photoroom" to invert the colors of all images, as the study's public code does for FID.
        keep_features: keep the features of generated images, which the interval of `details` needs.

    Example:
        >>> from diffusers_prx.evaluation.extractors import load_extractor
        >>> from diffusers_prx.evaluation.metrics import FrechetDistance
        >>> fid = FrechetDistance(load_extractor("inception"))
    """

    kind = "moments"

    generated_features: list[torch.Tensor]

    def __init__(self, extractor: FeatureExtractor, compat: str | None = None, keep_features: bool = False):
        super().__init__(extractor, compat)
        self.keep_features = keep_features
        width = extractor.num_features
        for side in ("generated", "reference"):
            self.add_state(f"{side}_count", torch.tensor(0), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        if keep_features:
            self.add_state("generated_features", [], dist_reduce_fx="cat")
            _append_empty(self, "generated_features")

    @property
    def name(self) -> str:
        notes = [] if self.extractor.name == INCEPTION else [self.extractor.name]
        notes += [] if self.compat is None else [f"compat {self.compat}"]
        return f"FID ({', '.join(notes)})" if notes else "FID"

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        return self.extractor(wrap_colors(images) if self.compat == PHOTOROOM else images)

    def reset(self) -> None:
        super().reset()
        if self.keep_features:
            _append_empty(self, "generated_features")

    def _add(self, side: str, features: torch.Tensor) -> None:
        double = features.double()  # (B, E)
        for name, more in (("count", len(features)), ("sum", double.sum(dim=0)), ("outer", double.T @ double)):
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + more)
        if self.keep_features and side == "generated":
            self.generated_features.append(features.float())

    def _count(self, side: str) -> int:
        return int(getattr(self, f"{side}_count"))

    def _moments(self, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        return moments(self._count(side), getattr(self, f"{side}_sum"), getattr(self, f"{side}_outer"))

    def _distance(self) -> torch.Tensor:
        fewest = min(self._count("generated"), self._count("reference"))
        if fewest <= self.extractor.num_features:
            logger.warning(
                f"{self.name} is computed from {fewest} images with {self.extractor.num_features} features each: the "
                "covariance does not have full rank, and the distance is far above that of many images."
            )
        return frechet_distance(self._moments("generated"), self._moments("reference"))

    def _details(self, resamples: int, seed: int) -> dict[str, Any]:
        value = self._distance().item()
        if not resamples:
            return {"value": value, "interval": None}
        if not self.keep_features:
            raise ValueError("`resamples` needs features: create the metric with keep_features=True.")
        generated = sort_features(_concatenate(self.generated_features))  # (n, E)
        counts = resampled_counts(len(generated), resamples, seed)
        replicates = bootstrap_frechet(generated, self._moments("reference"), counts)
        return {"value": value, "interval": list(centered_interval(value, replicates))}

    def _reference(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, f"reference_{name}") for name in ("count", "sum", "outer")}

    def _load_reference(self, state: dict[str, torch.Tensor]) -> None:
        for name in ("count", "sum", "outer"):
            setattr(self, f"reference_{name}", state[name])


class MaximumMeanDiscrepancy(FeatureDistance):
    """Squared MMD of features with the study's Gaussian kernel (CMMD and DINO-MMD, arXiv 2401.09603).

    All features are kept: 31 MB for 10,000 images of CLIP ViT-L. `details` has the study's estimator and the unbiased
    one.

    Args:
        extractor: return value of `load_extractor`.
        compat: "photoroom" has no effect here, because the study's public code does not change these images.
        unbiased: use the unbiased estimator in `compute`.
        sigma: width of the kernel.
        scale: factor on the result.

    Example:
        >>> from diffusers_prx.evaluation.extractors import load_extractor
        >>> from diffusers_prx.evaluation.metrics import MaximumMeanDiscrepancy
        >>> cmmd = MaximumMeanDiscrepancy(load_extractor("clip"))
    """

    kind = "features"

    generated_features: list[torch.Tensor]
    reference_features: list[torch.Tensor]

    def __init__(
        self,
        extractor: FeatureExtractor,
        compat: str | None = None,
        unbiased: bool = False,
        sigma: float = SIGMA,
        scale: float = SCALE,
    ):
        super().__init__(extractor, compat)
        if not sigma > 0 or not scale > 0:
            raise ValueError(f"`sigma` and `scale` must be positive, got {sigma} and {scale}.")
        self.unbiased = unbiased
        self.sigma = sigma
        self.scale = scale
        for side in ("generated", "reference"):
            self.add_state(f"{side}_features", [], dist_reduce_fx="cat")
            _append_empty(self, f"{side}_features")

    @property
    def name(self) -> str:
        return MMD_NAMES.get(self.extractor.name, f"MMD ({self.extractor.name})")

    def reset(self) -> None:
        super().reset()
        for side in ("generated", "reference"):
            _append_empty(self, f"{side}_features")

    def _add(self, side: str, features: torch.Tensor) -> None:
        getattr(self, f"{side}_features").append(features.float())

    def _features(self, side: str) -> torch.Tensor:
        return _concatenate(getattr(self, f"{side}_features"))

    def _count(self, side: str) -> int:
        return len(self._features(side))

    def _distance(self) -> torch.Tensor:
        return self._estimate(self.unbiased)

    def _estimate(self, unbiased: bool) -> torch.Tensor:
        sets = self._features("generated"), self._features("reference")
        return maximum_mean_discrepancy(*sets, unbiased, self.sigma, self.scale)

    def _details(self, resamples: int, seed: int) -> dict[str, Any]:
        generated, reference = sort_features(self._features("generated")), self._features("reference")
        details: dict[str, Any] = {}
        for key, unbiased in (("", False), ("unbiased_", True)):
            value = self._estimate(unbiased).item()
            details[f"{key}value"], details[f"{key}interval"] = value, None
            if resamples:
                counts = resampled_counts(len(generated), resamples, seed)
                replicates = bootstrap_mmd(generated, reference, counts, unbiased, self.sigma, self.scale)
                details[f"{key}interval"] = list(centered_interval(value, replicates))
        return {**details, "kernel": {"sigma": self.sigma, "scale": self.scale}}

    def _reference(self) -> dict[str, torch.Tensor]:
        return {"features": self._features("reference")}

    def _load_reference(self, state: dict[str, torch.Tensor]) -> None:
        self.reference_features.clear()
        self.reference_features.append(state["features"])


def sort_features(features: torch.Tensor) -> torch.Tensor:
    """Sort features (n, E), so that bootstrap resamples do not depend on the distribution over processes."""
    return features[features[:, 0].argsort(stable=True)]


def _append_empty(metric: FeatureDistance, name: str) -> None:
    """Append an empty (0, E) tensor, so that a process without images can take part in the synchronization."""
    getattr(metric, name).append(torch.zeros(0, metric.extractor.num_features, device=metric.device))


def _concatenate(features: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """Return a list state as (n, E); it is a tensor after synchronization."""
    return features if isinstance(features, torch.Tensor) else torch.cat(features)
