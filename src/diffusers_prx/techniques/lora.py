"""A run that trains a LoRA adapter (arXiv 2106.09685) of a saved pipeline's transformer: peft makes it, this says how.

The adapter is part of the transformer: the step, the pictures of validation and the text's keys and values see it
because they call the transformer's layers. What is trained, averaged and kept in checkpoints is what has
`requires_grad`, which of the transformer is then the adapter alone.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from ..config.training_config import TrainingConfig
from ..files import hash_tensors
from ..pipelines.lora import PRXLoraLoaderMixin

ADAPTER = "default"  # its name in peft while it is trained


def adapter_settings(cfg: TrainingConfig) -> dict[str, Any]:
    """What an adapter is, as arguments of peft's LoraConfig. (All of them would tie a file to one version of peft.)"""
    assert cfg.lora_rank is not None
    return {
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_rank if cfg.lora_alpha is None else cfg.lora_alpha,
        "target_modules": list(cfg.lora_layers),
        "use_dora": cfg.use_dora,
    }


def add_adapter(cfg: TrainingConfig, transformer: Any) -> None:
    """Freeze a transformer and give it a new adapter, in float32 whatever the transformer's type.

    It changes nothing yet: lora_B is zero. lora_A is drawn from the seed.

    Args:
        cfg: of the run.
        transformer: changed in place; on any device.

    Raises:
        ValueError: if a name of `lora_layers` is that of no linear layer.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for layer in cfg.lora_layers:
        if not any(f".{name}".endswith(f".{layer}") for name in linear):
            known = sorted({name.partition(".")[2].partition(".")[2] for name in linear if name.startswith("blocks.")})
            raise ValueError(
                f"`lora_layers` has {layer!r}, which is no linear layer of the transformer; those of its blocks are "
                f"{known}."
            )
    transformer.requires_grad_(False)
    torch.manual_seed(cfg.seed)  # whatever was drawn while networks were loaded
    transformer.add_adapter(LoraConfig(**adapter_settings(cfg), lora_dropout=cfg.lora_dropout), ADAPTER)
    cast_training_params(transformer, torch.float32)  # peft gives it the type of the weights


def base_fingerprint(transformer: Any) -> str:
    """A hash of the frozen weights under an adapter: a resumed run must have the same."""
    digest = hashlib.blake2b(digest_size=16)
    hash_tensors(digest, {name: p for name, p in transformer.named_parameters() if not p.requires_grad})
    return digest.hexdigest()


def save_adapter(cfg: TrainingConfig, transformer: Any, folder: Path) -> None:
    """Write `pytorch_lora_weights.safetensors` as diffusers' own scripts do: names of peft behind `transformer.`, and
    the settings in the file's metadata."""
    weights = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    PRXLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers={name: value.detach().cpu().contiguous() for name, value in weights.items()},
        transformer_lora_adapter_metadata=adapter_settings(cfg),
    )
