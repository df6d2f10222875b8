"""Exponential moving averages (EMA) of the weights, whole or sharded like the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ..config.training_config import TrainingConfig
from .optimizers import trainable_parameters

# trainable modules that are not part of the pipeline
TRAINING_ONLY = ("projector", "discriminator")


class EMAWeights:
    """Moving averages of all trainable modules that become part of the pipeline (those of `TRAINING_ONLY` do not).

    Args:
        trained: trainable modules, already distributed.
        cfg: run configuration. Without `use_ema`, all methods do nothing.

    Attributes:
        models: an EMAModel for each module name.

    Example:
        >>> ema = EMAWeights(trained, cfg)
        >>> optimizer.step()
        >>> ema.update()
        >>> with ema.swapped_in():
        ...     validate()
    """

    def __init__(self, trained: nn.Module, cfg: TrainingConfig):
        self.trained = trained
        # By default EMAModel copies the weights at the first update and then ramps the decay up; this disables both.
        constant: dict[str, Any] = {} if cfg.ema_warmup else {"min_decay": cfg.ema_decay, "update_after_step": -1}
        self.models = {
            name: EMAModel(trainable_parameters(module).values(), decay=cfg.ema_decay, foreach=True, **constant)
            for name, module in trained.named_children()
            if cfg.use_ema and name not in TRAINING_ONLY
        }

    def update(self) -> None:
        """Update the averages after an optimizer step."""
        for name, model in self.models.items():
            model.step(trainable_parameters(self.trained.get_submodule(name)).values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Averages by the names of their parameters in `trained`; not copied."""
        return {
            f"{name}.{key}": value
            for name, model in self.models.items()
            for key, value in zip(trainable_parameters(self.trained.get_submodule(name)), model.shadow_params)
        }

    def state_dict(self) -> dict[str, int]:
        """Number of updates of each average, which determines its decay; the values are in `tensors`."""
        return {name: model.optimization_step for name, model in self.models.items()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the numbers of updates."""
        for name, model in self.models.items():
            model.optimization_step = state[name]

    def copy_to_trained(self) -> None:
        """Replace the trained weights by the averages permanently."""
        _copy(self.tensors(), dict(self.trained.named_parameters()))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Replace the trained weights by the averages temporarily. EMAModel's own method does not support shards."""
        averaged, parameters = self.tensors(), dict(self.trained.named_parameters())
        backup = {name: parameters[name].detach().clone() for name in averaged}
        _copy(averaged, parameters)
        try:
            yield
        finally:
            _copy(backup, parameters)


@torch.no_grad()
def _copy(values: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
