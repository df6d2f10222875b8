"""LoRA adapters (arXiv 2106.09685) of a saved pipeline's transformer, created by peft.

The adapter is part of the transformer: the training step, the validation images and the text's keys and values use it
because they call the transformer's layers. Optimizer, EMA and checkpoints handle parameters with `requires_grad`,
which in the transformer are those of the adapter.
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
from ..models.transformer_prx import PRXTransformer2DModel
from ..pipelines.lora import PRXLoraLoaderMixin

ADAPTER_NAME = "default"  # in peft, during training


def adapter_settings(cfg: TrainingConfig) -> dict[str, Any]:
    """Arguments of peft's LoraConfig that define an adapter. All arguments would tie a file to one version of peft."""
    assert cfg.lora_rank is not None
    return {
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_rank if cfg.lora_alpha is None else cfg.lora_alpha,
        "target_modules": list(cfg.lora_layers),
        "use_dora": cfg.use_dora,
    }


def add_adapter(cfg: TrainingConfig, transformer: PRXTransformer2DModel) -> None:
    """Freeze a transformer and add a new adapter in float32, regardless of the transformer's type.

    The adapter does not change the output yet: lora_B is zero. lora_A is drawn from `cfg.seed`.

    Args:
        cfg: run configuration.
        transformer: transformer to change in place, on any device.

    Raises:
        ValueError: if a name in `lora_layers` is not that of a linear layer.

    Example:
        >>> add_adapter(cfg, pipe.transformer)
        >>> trainable_parameters(pipe.transformer).keys()  # the adapter's alone
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for layer in cfg.lora_layers:
        if not any(f".{name}".endswith(f".{layer}") for name in linear):
            known = sorted({name.partition(".")[2].partition(".")[2] for name in linear if name.startswith("blocks.")})
            raise ValueError(
                f"`lora_layers` has {layer!r}, which is not a linear layer of the transformer. Accepted in its "
                f"blocks: {known}."
            )
    transformer.requires_grad_(False)
    torch.manual_seed(cfg.seed)  # independent of what was drawn while networks were loaded
    transformer.add_adapter(LoraConfig(**adapter_settings(cfg), lora_dropout=cfg.lora_dropout), ADAPTER_NAME)
    cast_training_params(transformer, torch.float32)  # peft uses the type of the weights


def base_fingerprint(transformer: nn.Module) -> str:
    """Hash of the frozen weights under an adapter, which a resumed run must share."""
    digest = hashlib.blake2b(digest_size=16)
    hash_tensors(digest, {name: p for name, p in transformer.named_parameters() if not p.requires_grad})
    return digest.hexdigest()


def save_adapter(cfg: TrainingConfig, transformer: nn.Module, folder: Path) -> None:
    """Write `pytorch_lora_weights.safetensors` in the format of diffusers' training scripts.

    The keys are peft's names with the prefix `transformer.`; the settings are in the metadata of the file.
    """
    weights = get_peft_model_state_dict(transformer, adapter_name=ADAPTER_NAME)
    PRXLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers={name: value.detach().cpu().contiguous() for name, value in weights.items()},
        transformer_lora_adapter_metadata=adapter_settings(cfg),
    )
