"""Optimizers and learning-rate schedules."""

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from .config import TrainingConfig

# the repeated layers of the transformer (`blocks`) and of transformers' text encoders (`layers`)
REPEATED_LAYERS = ("blocks.", "layers.")


def is_muon_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon is for this parameter: a 2-D weight inside a repeated layer; embeddings and ends are AdamW's."""
    return parameter.ndim == 2 and any(f".{layers}" in f".{name}" for layers in REPEATED_LAYERS)


def build_optimizers(cfg: TrainingConfig, modules: list[nn.Module]) -> list[Optimizer]:
    """AdamW over all trainable parameters, or Muon (https://kellerjordan.github.io/posts/muon) for the matrices of
    the repeated layers and AdamW for the rest.

    Muon's update is scaled to the root mean square of AdamW's (arXiv 2502.16982), so that one learning rate serves
    both. Every trainable parameter is in exactly one group.
    """
    named = [pair for module in modules for pair in module.named_parameters() if pair[1].requires_grad]
    matrices = [parameter for name, parameter in named if cfg.optimizer == "muon" and is_muon_matrix(name, parameter)]
    taken = {id(parameter) for parameter in matrices}
    rest = [parameter for _, parameter in named if id(parameter) not in taken]
    assert len(matrices) + len(rest) == len(named)

    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=cfg.learning_rate,
                momentum=cfg.muon_momentum,
                nesterov=True,
                weight_decay=0.0,  # PyTorch's default is 0.1; the study has none
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest:
        optimizers.append(
            torch.optim.AdamW(
                rest,
                lr=cfg.learning_rate,
                betas=(cfg.adam_beta1, cfg.adam_beta2),
                eps=cfg.adam_epsilon,
                weight_decay=cfg.adam_weight_decay,
            )
        )
    return optimizers


def build_lr_scheduler(cfg: TrainingConfig, optimizer: Optimizer) -> LRScheduler:
    """Linear warm-up, a constant part, and a decay to zero; stepped once per optimizer step, on every process."""
    if cfg.lr_scheduler == "constant":
        return get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=cfg.lr_warmup_steps)
    decay_steps = cfg.lr_decay_steps or cfg.max_train_steps - cfg.lr_warmup_steps
    return get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=cfg.lr_warmup_steps,
        num_training_steps=cfg.max_train_steps,
        scheduler_specific_kwargs={"num_decay_steps": decay_steps, "decay_type": cfg.lr_scheduler},
    )
