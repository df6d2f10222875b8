"""FID and MMD as torchmetrics: images in, one number out, the same whatever the batches and processes were.

```python
metric = FrechetDistance(load_extractor("inception")).to("cuda")
metric.update(reference, real=True)  # uint8 (B, 3, H, W), any number of times
metric.update(generated, real=False)
metric.compute()
```

Under torch.distributed each process updates with its own share of the images, each image once in all; `compute` joins
the shares. The sums are float64: the order of batches and processes moves a result by rounding of the 16th digit, and
the batch size by what it does to the float32 features.
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
# the extractors whose MMD has a name of its own
MMD_NAMES = {"clip": "CMMD", "dinov2": "DINO-MMD"}


class FeatureDistance(Metric):
    """What the two distances share: the door for images, and how many there were.

    Args:
        extractor: from `load_extractor`; shared with other metrics it is one network.
        compat: None, or "photoroom" for what the study's public code does to images on their way to this metric.

    Raises:
        ValueError: for another `compat`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    kind: ClassVar[str]  # of what is kept of the reference
    least_images: ClassVar[int] = 2

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
        """As it stands in reports: with the encoder's name, unless it is the metric's standard one."""

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, E) of uint8 images (B, 3, H, W)."""
        return self.extractor(images)

    def update(self, images: torch.Tensor, real: bool, features: torch.Tensor | None = None) -> None:
        """Add images.

        Args:
            images: uint8 (B, 3, H, W).
            real: whether they belong to the reference.
            features: (B, E), what `extract` made of these images, where several metrics share the work.

        Raises:
            ValueError: for images that are not as described, or another number of features.
        """
        check_images(images)
        features = self.extract(images) if features is None else features
        if features.shape != (len(images), self.extractor.num_features):
            raise ValueError(
                f"`features` has the shape {tuple(features.shape)}; for these images it has to be "
                f"{(len(images), self.extractor.num_features)}."
            )
        side = "reference" if real else "generated"
        peak = f"{side}_peak"
        setattr(self, peak, torch.maximum(getattr(self, peak), images.max().to(getattr(self, peak))))
        self._add(side, features.detach())

    def compute(self) -> torch.Tensor:
        """The distance over all processes, a float64 scalar.

        Raises:
            ValueError: for fewer than two images on a side, or if no pixel of a side is above 1.
        """
        self._check()
        return self._distance()

    def details(self, resamples: int = 0, seed: int = 0) -> dict[str, Any]:
        """The distance with what belongs to it, as plain numbers; all processes have to call it.

        Args:
            resamples: of the bootstrap over the generated images; 0: no interval.
            seed: of the resamples.

        Returns:
            "value", "interval" (95%, low and high, or None), "num_images", "num_reference"; more for MMD.
        """
        with self.sync_context():
            self._check()
            return {**self._details(resamples, seed), "num_images": self._count("generated")} | {
                "num_reference": self._count("reference")
            }

    def reference_state(self) -> dict[str, torch.Tensor]:
        """What is kept of the reference, of all processes, on the CPU: enough to go without its images next time."""
        with self.sync_context():
            kept = {"peak": self.reference_peak, **self._reference()}
            return {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}

    def load_reference_state(self, state: dict[str, torch.Tensor]) -> None:
        """Start from a reference that was seen before. Under torch.distributed one process does it, and only one."""
        self.reference_peak = state["peak"].to(self.device)
        self._load_reference({name: tensor.to(self.device) for name, tensor in state.items()})

    def _check(self) -> None:
        for side in ("generated", "reference"):
            if self._count(side) < self.least_images:
                raise ValueError(
                    f"{self.name} needs at least {self.least_images} {side} images, got {self._count(side)}."
                )
            if getattr(self, f"{side}_peak") == 1:
                raise ValueError(
                    f"The largest value in all {self._count(side)} {side} images is 1: they seem to be pixels in "
                    "[0, 1], cast to uint8 without a factor of 255."
                )

    @abstractmethod
    def _add(self, side: str, features: torch.Tensor) -> None:
        """Keep of features (B, E) what the distance needs."""

    @abstractmethod
    def _count(self, side: str) -> int:
        """Images of a side so far."""

    @abstractmethod
    def _distance(self) -> torch.Tensor:
        """A float64 scalar."""

    @abstractmethod
    def _details(self, resamples: int, seed: int) -> dict[str, Any]:
        """What else a report says of this kind of distance."""

    @abstractmethod
    def _reference(self) -> dict[str, torch.Tensor]:
        """What is known of the reference, to be kept."""

    @abstractmethod
    def _load_reference(self, state: dict[str, torch.Tensor]) -> None:
        """Take what `_reference` gave."""


class FrechetDistance(FeatureDistance):
    """The Frechet distance of features (FID with Inception, arXiv 1706.08500), from streamed float64 sums.

    Memory does not grow with the number of images, unless `keep_features`.

    Args:
        extractor: from `load_extractor`.
        compat: "photoroom": colors are inverted on both sides, as the study's public code does for FID.
        keep_features: keep those of the generated images, which the interval of `details` needs.
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
            _begin(self, "generated_features")

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
            _begin(self, "generated_features")

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
                f"{self.name} of {fewest} images with {self.extractor.num_features} features each: a covariance has "
                "not its full rank, and the distance is far above that of many images."
            )
        return frechet_distance(self._moments("generated"), self._moments("reference"))

    def _details(self, resamples: int, seed: int) -> dict[str, Any]:
        value = self._distance().item()
        if not resamples:
            return {"value": value, "interval": None}
        if not self.keep_features:
            raise ValueError("`resamples` needs the features: make the metric with keep_features=True.")
        generated = in_order(_joined(self.generated_features))  # (n, E)
        counts = resampled_counts(len(generated), resamples, seed)
        replicates = bootstrap_frechet(generated, self._moments("reference"), counts)
        return {"value": value, "interval": list(centered_interval(value, replicates))}

    def _reference(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, f"reference_{name}") for name in ("count", "sum", "outer")}

    def _load_reference(self, state: dict[str, torch.Tensor]) -> None:
        for name in ("count", "sum", "outer"):
            setattr(self, f"reference_{name}", state[name])


class MaximumMeanDiscrepancy(FeatureDistance):
    """The squared MMD of features with the study's Gaussian kernel (CMMD and DINO-MMD; arXiv 2401.09603).

    Keeps every feature: 31 MB for 10,000 images of CLIP ViT-L. `details` has the estimator of the study and the
    unbiased one.

    Args:
        extractor: from `load_extractor`.
        compat: "photoroom" changes nothing here: the study's public code treats these images as they are.
        unbiased: which of the two `compute` gives.
        sigma: width of the kernel.
        scale: factor on the result.
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
            _begin(self, f"{side}_features")

    @property
    def name(self) -> str:
        return MMD_NAMES.get(self.extractor.name, f"MMD ({self.extractor.name})")

    def reset(self) -> None:
        super().reset()
        for side in ("generated", "reference"):
            _begin(self, f"{side}_features")

    def _add(self, side: str, features: torch.Tensor) -> None:
        getattr(self, f"{side}_features").append(features.float())

    def _features(self, side: str) -> torch.Tensor:
        return _joined(getattr(self, f"{side}_features"))

    def _count(self, side: str) -> int:
        return len(self._features(side))

    def _distance(self) -> torch.Tensor:
        return self._estimate(self.unbiased)

    def _estimate(self, unbiased: bool) -> torch.Tensor:
        sets = self._features("generated"), self._features("reference")
        return maximum_mean_discrepancy(*sets, unbiased, self.sigma, self.scale)

    def _details(self, resamples: int, seed: int) -> dict[str, Any]:
        generated, reference = in_order(self._features("generated")), self._features("reference")
        found: dict[str, Any] = {}
        for key, unbiased in (("", False), ("unbiased_", True)):
            value = self._estimate(unbiased).item()
            found[f"{key}value"], found[f"{key}interval"] = value, None
            if resamples:
                counts = resampled_counts(len(generated), resamples, seed)
                replicates = bootstrap_mmd(generated, reference, counts, unbiased, self.sigma, self.scale)
                found[f"{key}interval"] = list(centered_interval(value, replicates))
        return {**found, "kernel": {"sigma": self.sigma, "scale": self.scale}}

    def _reference(self) -> dict[str, torch.Tensor]:
        return {"features": self._features("reference")}

    def _load_reference(self, state: dict[str, torch.Tensor]) -> None:
        self.reference_features.clear()
        self.reference_features.append(state["features"])


def in_order(features: torch.Tensor) -> torch.Tensor:
    """Features (n, E) in an order of their own. The bootstrap draws places: with the order in which processes had the
    images, an interval would depend on how many there were."""
    return features[features[:, 0].argsort(stable=True)]


def _begin(metric: FeatureDistance, name: str) -> None:
    """An empty list as (0, E): a process without a single image has to join the others with a tensor of their rank."""
    getattr(metric, name).append(torch.zeros(0, metric.extractor.num_features, device=metric.device))


def _joined(features: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """(n, E) of a list state, which is a tensor once the processes were joined."""
    return features if isinstance(features, torch.Tensor) else torch.cat(features)
