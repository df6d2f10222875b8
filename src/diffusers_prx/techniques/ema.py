"""Moving averages of the weights (EMA), where the weights are: whole, or sharded as they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ..config.training_config import TrainingConfig
from .optimizers import trainable_parameters


class Averages:
    """The averages of what a run trains for its pipeline, which the alignment's projector is not part of.

    Args:
        trained: what is trained, already distributed.
        cfg: run configuration; without `use_ema` there are no averages, and nothing here does anything.

    Attributes:
        models: an EMAModel by the name of its module.
    """

    def __init__(self, trained: nn.Module, cfg: TrainingConfig):
        self.trained = trained
        # diffusers copies the weights at the first update and then ramps the decay up, unless both are switched off
        constant: dict[str, Any] = {} if cfg.ema_warmup else {"min_decay": cfg.ema_decay, "update_after_step": -1}
        self.models = {
            name: EMAModel(trainable_parameters(module).values(), decay=cfg.ema_decay, foreach=True, **constant)
            for name, module in trained.named_children()
            if cfg.use_ema and name != "projector"
        }

    def update(self) -> None:
        for name, model in self.models.items():
            model.step(trainable_parameters(self.trained.get_submodule(name)).values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages by the names of their parameters in `trained`; not copied."""
        return {
            f"{name}.{key}": value
            for name, model in self.models.items()
            for key, value in zip(trainable_parameters(self.trained.get_submodule(name)), model.shadow_params)
        }

    def state_dict(self) -> dict[str, int]:
        """How often each was updated, which their decay depends on; the values are in `tensors`."""
        return {name: model.optimization_step for name, model in self.models.items()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name, model in self.models.items():
            model.optimization_step = state[name]

    def put_in_place(self) -> None:
        """The averages instead of the trained weights, for good."""
        _copy(self.tensors(), dict(self.trained.named_parameters()))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """With the averages in place of the trained weights. By hand: EMAModel's own way takes no shards."""
        averaged, parameters = self.tensors(), dict(self.trained.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in averaged}
        _copy(averaged, parameters)
        try:
            yield
        finally:
            _copy(kept, parameters)


@torch.no_grad()
def _copy(values: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
