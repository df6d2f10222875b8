"""Every private import from diffusers, transformers and torch, in one place.

A name is private if its path has a part with a leading underscore, or if its module is deeper than the modules that
diffusers and transformers document (`diffusers.hooks` is public, `diffusers.hooks.group_offloading` is private). No
other file imports private names. When a new release of a library breaks an import, fix it here.
"""

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import ContextParallelConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.group_offloading import (
    GroupOffloadingType,
    _get_top_level_group_offload_hook,
    _is_group_offload_enabled,
    _maybe_remove_and_reapply_group_offloading,
)
from diffusers.hooks.layerwise_casting import _is_layerwise_casting_active
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.loaders.single_file_utils import _extract_repo_id_and_weights_name
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import SeqAllToAllDim, dispatch_attention_fn
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.model_loading_utils import load_gguf_checkpoint, load_model_dict_into_meta
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.quantizers import DiffusersAutoQuantizer
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.hub_utils import _get_model_file
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "AttentionMixin",
    "AttentionModuleMixin",
    "ContextParallelInput",
    "ContextParallelOutput",
    "DiagonalGaussianDistribution",
    "FakeTensorMode",
    "SeqAllToAllDim",
    "TorchDispatchMode",
    "Transformer2DModelOutput",
    "TransformerBlockMetadata",
    "TransformerBlockRegistry",
    "apply_forward_hook",
    "auto_pipeline_mappings",
    "clear_dinov3_positions",
    "dispatch_attention_fn",
    "fetch_lora_file",
    "fetch_peft_settings",
    "fetch_weights_file",
    "get_timestep_embedding",
    "has_cache",
    "is_cast_for_storage",
    "is_group_offloaded",
    "is_offloaded_by_leaf",
    "is_offloaded_to_disk",
    "load_gguf",
    "load_quantized",
    "randn_tensor",
    "reapply_group_offloading",
    "tree_leaves",
    "ulysses_group",
    "ulysses_rank",
    "unwrap_compiled",
]


def auto_pipeline_mappings() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the tables of diffusers' Auto classes: for text to image, image to image and inpainting.

    The import is inside, because the module imports every pipeline of diffusers.
    """
    from diffusers.pipelines import auto_pipeline

    return (
        auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    )


def unwrap_compiled(module: nn.Module) -> Any:
    """Return the module inside the wrapper of `torch.compile`, or the module itself."""
    return getattr(module, "_orig_mod", module)


def has_cache(transformer: nn.Module) -> bool:
    """True if `enable_cache` of a diffusers model is in effect."""
    return getattr(transformer, "is_cache_enabled", False)


def is_group_offloaded(module: nn.Module) -> bool:
    """True if `enable_group_offload` is in effect: a layer's weights are on the device only while the layer runs."""
    return _is_group_offload_enabled(module)


def is_offloaded_to_disk(module: nn.Module) -> bool:
    """True if group offloading keeps the weights on disk, so that parameters in memory hold no values."""
    hook = _get_top_level_group_offload_hook(module)
    return hook is not None and hook.config.offload_to_disk_path is not None


def is_offloaded_by_leaf(module: nn.Module) -> bool:
    """True if group offloading moves each leaf module by itself, so that no module may read another one's weights."""
    hook = _get_top_level_group_offload_hook(module)
    return hook is not None and hook.config.offload_type == GroupOffloadingType.LEAF_LEVEL


def reapply_group_offloading(module: nn.Module) -> None:
    """Make the offloading hooks anew after parameters were added or changed their dtype; no-op without offloading."""
    _maybe_remove_and_reapply_group_offloading(module)


def is_cast_for_storage(module: nn.Module) -> bool:
    """True if `enable_layerwise_casting` is in effect: weights have the dtype of computation only while they run."""
    return _is_layerwise_casting_active(module)


def fetch_lora_file(source: Any, **hub: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Return the tensors of a LoRA file and the settings in its header, or None; downloads it first if needed.

    `lora_state_dict` would drop tensors that diffusers does not know.
    """
    user_agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    return _fetch_state_dict(source, use_safetensors=True, allow_pickle=False, user_agent=user_agent, **hub)


def fetch_peft_settings(source: str | os.PathLike, **hub: Any) -> str:
    """Return the path of peft's adapter_config.json beside a file, in a folder or in a repository of the Hub.

    Raises:
        OSError: if there is none.
    """
    folder = os.path.dirname(os.path.abspath(source)) if os.path.isfile(source) else os.fspath(source)
    hub["local_files_only"] = bool(hub["local_files_only"])
    return _get_model_file(folder, weights_name="adapter_config.json", **hub)


def fetch_weights_file(source: str | os.PathLike, **hub: Any) -> str:
    """Return the path of a file that is local or at an address of the Hub."""
    if os.path.isfile(source):
        return os.fspath(source)
    repository, name = _extract_repo_id_and_weights_name(os.fspath(source))
    return _get_model_file(repository, weights_name=name, **hub)


def load_gguf(file: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a .gguf file; quantized ones have `quant_type` and `quant_shape`."""
    return load_gguf_checkpoint(file)


def load_quantized(
    model: nn.Module, weights: dict[str, torch.Tensor], quantization_config: Any, dtype: torch.dtype | None
) -> None:
    """Fill a model on the meta device with weights of a .gguf file, which stay quantized.

    Args:
        model: model on the meta device.
        weights: return value of `load_gguf`, with the model's names.
        quantization_config: GGUFQuantizationConfig.
        dtype: dtype of weights that are not quantized; None: the `compute_dtype`.
    """
    quantizer: Any = DiffusersAutoQuantizer.from_config(quantization_config)
    quantizer.validate_environment()
    dtype = quantizer.update_torch_dtype(dtype)
    quantizer.preprocess_model(model, device_map=None, state_dict=weights, keep_in_fp32_modules=[])
    load_model_dict_into_meta(model, weights, dtype=dtype, device_map={"": "cpu"}, hf_quantizer=quantizer)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def ulysses_group(config: ContextParallelConfig) -> ProcessGroup:
    """Return the group of processes that share one forward."""
    return config._ulysses_mesh.get_group()


def ulysses_rank(config: ContextParallelConfig) -> int:
    """Return the rank of this process in `ulysses_group`."""
    return config._ulysses_local_rank


def clear_dinov3_positions() -> None:
    """Evict all patch positions from DINOv3's cache, which is shared by all models of the process.

    The cache holds the positions of 32 grids and cannot be cleared, only refilled: with grids of one row, which no
    image of a teacher or metric has. Positions with values and those without (fake tensors) must not meet.
    """
    from transformers.models.dinov3_vit.modeling_dinov3_vit import get_patches_center_coordinates

    for columns in range(2, 34):
        get_patches_center_coordinates(1, columns, torch.float32, torch.device("cpu"))


def allow_compiled_variants(limit: int) -> AbstractContextManager:
    """Let torch.compile make up to `limit` variants of a function within the context before it gives up."""
    import torch._dynamo  # takes a second, and only compiled runs need it

    return torch._dynamo.config.patch(cache_size_limit=limit)
