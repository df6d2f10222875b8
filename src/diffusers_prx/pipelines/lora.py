"""LoRA adapters (arXiv 2106.09685) on the transformer of both pipelines.

diffusers' loader reads the files and peft makes the layers. This module checks every call before it changes anything,
and does what diffusers and peft get wrong: adapters on a transformer that `torch.compile` wraps, hot-swapping, and the
choice of active adapters after one was deleted.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.utils import logging
from torch import nn
from torch.distributed.tensor import DTensor

from ..compat import (
    fetch_lora_file,
    fetch_peft_settings,
    is_cast_for_storage,
    is_offloaded_by_leaf,
    is_offloaded_to_disk,
    reapply_group_offloading,
    unwrap_compiled,
)
from ..models.transformer_prx import PRXTransformer2DModel
from ..schedulers.scheduling_prx import is_number
from .check_finite import PLAIN_DTYPES, is_plain
from .lora_files import LoraAdapter, PeftLayer, adapter_dtype, layer_alphas, lora_layers, read_adapter
from .lora_formats import LORA_FORMATS, NAMES_SHOWN, group_by_layer, is_peft_file, name_tensors

logger = logging.get_logger(__name__)


class PRXLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """`load_lora_weights` and the other adapter calls of diffusers' pipelines, with the same arguments.

    A call either raises a ValueError and changes nothing, or leaves a pipeline that draws what a new pipeline with the
    same adapters and weights would draw. The base class is CogVideoX's because that mixin adapts the component
    `transformer` alone.

    Example:
        >>> pipe.load_lora_weights("my-lora", adapter_name="style")
        >>> pipe.set_adapters("style", 0.8)
        >>> image = pipe("a red cat").images[0]
    """

    transformer: Any

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        force_download: bool = False,
        proxies: dict[str, str] | None = None,
        local_files_only: bool | None = None,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Load an adapter and make it the only active one, until `set_adapters`. Other adapters stay loaded.

        The scale is alpha / rank with the file's own alpha: of its metadata, its tensors `alpha`, or peft's
        adapter_config.json beside it. Without any of them, it is 1.

        After `disable_lora`, the new adapter is inactive until `enable_lora`.

        Args:
            pretrained_model_name_or_path_or_dict: folder, .safetensors file, Hub id, or tensors by name. The names are
                those of diffusers (`transformer.`), ComfyUI and ai-toolkit (`diffusion_model.`), peft
                (`base_model.model.`) or kohya (`lora_unet_`); layers have the names of diffusers or of the original,
                with fused or split queries, keys and values.
            adapter_name: name for `set_adapters`. None: the first free one of default_0, default_1, ...
            hotswap: replace the loaded adapter of that name, without a new compilation. The new adapter keeps the
                weight that `set_adapters` gave the old one. It must adapt no other layers and have no higher ranks;
                `enable_lora_hotswap(target_rank=...)` before the first adapter reserves room.
            weight_name: name of the file; offline you must pass it for a Hub id.
            subfolder, revision, token, cache_dir, force_download, proxies, local_files_only: location on the Hub, as
                in `DiffusionPipeline.from_pretrained`.
            low_cpu_mem_usage: create the layers without values before filling them.

        Raises:
            ValueError: if the file is not a LoRA or DoRA for this transformer, the adapter name is taken, adapters are
                fused, or the transformer is offloaded to disk. The pipeline is unchanged.

        Example:
            >>> pipe.load_lora_weights("my-lora", adapter_name="style")
            >>> pipe.load_lora_weights("other-lora", adapter_name="style", hotswap=True)
        """
        model = unwrap_compiled(self.transformer)
        method = "hotswap" if hotswap else "load_lora_weights"
        _require_unfused(method, model)
        _require_weights_in_memory(method, model)
        source = pretrained_model_name_or_path_or_dict
        hub: dict[str, Any] = {"subfolder": subfolder, "revision": revision, "token": token, "cache_dir": cache_dir}
        hub |= {"force_download": force_download, "proxies": proxies, "local_files_only": local_files_only}
        metadata: dict[str, Any] | None = None
        try:
            if isinstance(source, Mapping):
                state_dict = dict(source)
            else:
                state_dict, metadata = fetch_lora_file(source, weight_name=weight_name, **hub)
                if metadata is None and is_peft_file(state_dict):
                    metadata = json.loads(Path(fetch_peft_settings(source, **hub)).read_text(encoding="utf-8"))
        except (safetensors.SafetensorError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{source} is not a .safetensors file that can be read: {error}.") from error
        adapter = read_adapter(state_dict, metadata, model)
        if hotswap:
            _hotswap(model, adapter_name, adapter)
            return
        name = _check_new_name(model, adapter_name)
        _check_capacity(model, adapter)
        active, disabled = _active_adapters(model), _is_disabled(model)
        has_model_offload = bool(getattr(self, "_all_hooks", []))  # `enable_model_cpu_offload`
        try:
            self.load_lora_into_transformer(
                _file_tensors(adapter, model),
                transformer=model,
                adapter_name=name,
                metadata={f"transformer.{key}": value for key, value in adapter.peft_settings.items()},
                # given the pipeline, diffusers would reinstall its offloading hooks, on a device of its own choice
                _pipeline=None if has_model_offload else self,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            _undo_storage_dtype(model, name, adapter)
        except Exception:
            _delete(model, [name], active)
            raise
        for layer in lora_layers(model).values():
            layer.eval()
            layer.enable_adapters(not disabled)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        format: str = "diffusers",
    ) -> None:
        """Save an adapter's tensors in one file; `load_lora_weights` reads every format.

        Args:
            save_directory: folder.
            transformer_lora_layers: tensors by name, as peft's `get_peft_model_state_dict` returns them.
            is_main_process, save_function, safe_serialization: as in diffusers.
            weight_name: name of the file; None: pytorch_lora_weights.safetensors.
            transformer_lora_adapter_metadata: settings of the LoraConfig; None: alpha is the rank.
            format: "diffusers" (`transformer.`, alpha in the metadata), "comfyui" (`diffusion_model.`, as ai-toolkit
                writes; alpha as tensors) or "kohya" (`lora_unet_`, `lora_down`, `lora_up`, `alpha`).

        Raises:
            ValueError: for another format, or an adapter that the format cannot express.

        Example:
            >>> from peft.utils import get_peft_model_state_dict
            >>> layers = get_peft_model_state_dict(pipe.transformer, adapter_name="style")
            >>> settings = pipe.transformer.peft_config["style"].to_dict()
            >>> pipe.save_lora_weights("out", layers, transformer_lora_adapter_metadata=settings, format="kohya")
        """
        if format not in LORA_FORMATS:
            raise ValueError(f"`format` is {format!r}; accepted: {', '.join(LORA_FORMATS)}.")
        files: dict[str, Any] = {"is_main_process": is_main_process, "weight_name": weight_name}
        files |= {"save_function": save_function, "safe_serialization": safe_serialization}
        metadata = transformer_lora_adapter_metadata
        if format == "diffusers":
            super().save_lora_weights(
                save_directory, transformer_lora_layers, transformer_lora_adapter_metadata=metadata, **files
            )
            return
        layers, _ = group_by_layer(
            {f"transformer.{key}": value for key, value in (transformer_lora_layers or {}).items()}
        )
        tensors = name_tensors(layers, layer_alphas(layers, metadata), format)
        cls.write_lora_layers(tensors, save_directory, lora_adapter_metadata=None, **files)

    def set_adapters(
        self, adapter_names: list[str] | str, adapter_weights: float | dict | list[float] | list[dict] | None = None
    ) -> None:
        """Make these adapters the active ones, each with its weight: W + sum of weight * delta.

        At weight 0 a LoRA changes nothing. A DoRA (arXiv 2402.09353) still rescales the rows of W; use `disable_lora`
        to leave it out.

        Args:
            adapter_names: names of loaded adapters; an empty list for none.
            adapter_weights: one finite number for all, or a list with one per name; {"transformer": number} in place
                of a number. None: 1.

        Raises:
            ValueError: if a name is unknown or repeated, the number of weights differs, or adapters are fused
                (`unfuse_lora` would then subtract something else than was added).

        Example:
            >>> pipe.set_adapters(["style", "person"], [0.8, 1.0])
        """
        model = unwrap_compiled(self.transformer)
        _require_unfused("set_adapters", model)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        _check_loaded("adapter_names", names, model)
        given = adapter_weights if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        if len(given) != len(names):
            raise ValueError(
                f"`adapter_weights` has {len(given)} entries; it has to be one number, or one for each of the "
                f"{len(names)} names {names}."
            )
        weights = [_check_weight(weight) for weight in given]
        for layer in lora_layers(model).values():
            layer.set_adapter(names)
            for name, weight in zip(names, weights):
                _set_weight(layer, name, weight)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Delete these adapters. If no active one is left, the last loaded of the others becomes active.

        Args:
            adapter_names: names of loaded adapters.

        Raises:
            ValueError: if a name is unknown or repeated, adapters are fused (their part of the weights could not be
                removed any more), or the transformer is offloaded to disk.

        Example:
            >>> pipe.delete_adapters("style")
        """
        model = unwrap_compiled(self.transformer)
        _require_unfused("delete_adapters", model)
        _require_weights_in_memory("delete_adapters", model)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        _check_loaded("adapter_names", names, model)
        left = [name for name in _loaded_adapters(model) if name not in names]
        active = [name for name in _active_adapters(model) if name not in names]
        if left and not active and _active_adapters(model):
            active = left[-1:]
            logger.warning(f"The active adapters were deleted: {active} is active now.")
        _delete(model, names, active)

    def disable_lora(self) -> None:
        """Draw without adapters until `enable_lora`. The adapters and their weights stay.

        Raises:
            ValueError: if adapters are fused.

        Example:
            >>> pipe.disable_lora()
            >>> image_without_lora = pipe("a red cat").images[0]
        """
        model = unwrap_compiled(self.transformer)
        _require_unfused("disable_lora", model)
        for layer in lora_layers(model).values():
            layer.enable_adapters(False)

    def enable_lora(self) -> None:
        """Undo `disable_lora`.

        Example:
            >>> pipe.enable_lora()
        """
        for layer in lora_layers(unwrap_compiled(self.transformer)).values():
            layer.enable_adapters(True)

    def fuse_lora(
        self,
        components: list[str] | tuple[str, ...] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Add adapters to the weights: the transformer is then as fast as without them.

        Args:
            components: ["transformer"], the only one.
            lora_scale: factor on all weights of `set_adapters` until `unfuse_lora`; finite, not 0.
            safe_fusing: raise an error and change nothing if a weight would become NaN or infinite. Needs memory for a
                copy of the adapted layers.
            adapter_names: adapters to fuse, which become the active ones. None: the active ones.

        Raises:
            ValueError: if an adapter is not loaded, adapters are disabled, weights are quantized, cast for storage or
                offloaded to disk, or `lora_scale` is not 1 while other adapters are fused (it would rescale them).

        Example:
            >>> pipe.fuse_lora()
            >>> pipe.unload_lora_weights()  # the weights keep what was fused
        """
        _check_components(components)
        model = unwrap_compiled(self.transformer)
        _require_weights_in_memory("fuse_lora", model)
        if not is_number(lora_scale) or lora_scale == 0:
            raise ValueError(
                f"`lora_scale` is {lora_scale!r}, which `unfuse_lora` cannot undo; accepted is any other finite"
                " number. To leave adapters out, call `disable_lora`."
            )
        fused = _fused_adapters(model)
        if lora_scale != 1 and fused:
            raise ValueError(f"`lora_scale` is {lora_scale}, but {fused} are already fused: call `unfuse_lora` first.")
        if _is_disabled(model):
            raise ValueError("`fuse_lora` needs `enable_lora` first: the adapters are disabled.")
        names = _active_adapters(model) if adapter_names is None else list(adapter_names)
        _check_loaded("adapter_names", names, model)
        names = [name for name in names if name not in fused]
        if not names and not fused:
            raise ValueError("`fuse_lora` has no adapter to fuse: call `load_lora_weights` or `set_adapters` first.")
        layers = {key: layer for key, layer in lora_layers(model).items() if not set(names).isdisjoint(layer.lora_A)}
        for key, layer in layers.items():
            _require_mergeable("fuse_lora", key, layer, names)
        snapshots = {key: _snapshot(layer) for key, layer in layers.items()} if safe_fusing else {}
        active = _active_adapters(model)
        _activate(model, fused + names)
        model.fuse_lora(float(lora_scale), adapter_names=names)
        non_finite = [key for key in snapshots if not _is_finite(layers[key].get_base_layer())]
        if non_finite:
            model.lora_scale = 1.0
            for key, layer in layers.items():
                _restore(layer, snapshots[key])
            _activate(model, active)
            raise ValueError(
                f"`safe_fusing`: with {names}, weights of {len(non_finite)} layers would not be finite, such as "
                f"{non_finite[:NAMES_SHOWN]}; nothing was fused. Use smaller weights, or a dtype with a larger range."
            )

    def unfuse_lora(self, components: list[str] | tuple[str, ...] = ("transformer",)) -> None:
        """Subtract fused adapters from the weights again, and undo `lora_scale`; exact up to rounding.

        Args:
            components: ["transformer"], the only one.

        Raises:
            ValueError: if the weights were quantized, cast for storage or offloaded to disk since they were fused.

        Example:
            >>> pipe.fuse_lora(lora_scale=0.5)
            >>> pipe.unfuse_lora()
        """
        _check_components(components)
        model = unwrap_compiled(self.transformer)
        if not _fused_adapters(model):
            return
        _require_weights_in_memory("unfuse_lora", model)
        merged = {key: layer for key, layer in lora_layers(model).items() if layer.merged}
        for key, layer in merged.items():
            _require_mergeable("unfuse_lora", key, layer, layer.merged_adapters)
        for layer in merged.values():
            layer.unmerge()
        scale = getattr(model, "lora_scale", 1.0)  # diffusers does not undo it
        for layer in lora_layers(model).values():
            if scale != 1:
                layer.unscale_layer(scale)
        model.lora_scale = 1.0

    def unload_lora_weights(self) -> None:
        """Delete all adapters. Fused ones stay in the weights.

        Raises:
            ValueError: if the transformer has adapters and is offloaded to disk.

        Example:
            >>> pipe.unload_lora_weights()
        """
        model = unwrap_compiled(self.transformer)
        if lora_layers(model):
            _require_weights_in_memory("unload_lora_weights", model)
            _unload(model)

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters.

        Example:
            >>> pipe.get_active_adapters()
            ['style']
        """
        return _active_adapters(unwrap_compiled(self.transformer))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all loaded adapters: {"transformer": names}, or {} if there are none.

        Example:
            >>> pipe.get_list_adapters()
            {'transformer': ['style', 'person']}
        """
        names = _loaded_adapters(unwrap_compiled(self.transformer))
        return {"transformer": names} if names else {}

    @property
    def fused_loras(self) -> set[str]:
        """Names of the fused adapters."""
        return set(_fused_adapters(unwrap_compiled(self.transformer)))

    @property
    def num_fused_loras(self) -> int:
        """Number of fused adapters."""
        return len(self.fused_loras)


# --- adapters during a call of the pipeline


@contextmanager
def scale_adapters(transformer: Any, scale: float) -> Iterator[None]:
    """Multiply the weights of all adapters by a number inside the block; afterwards they are exactly as before."""
    layers = list(lora_layers(unwrap_compiled(transformer)).values()) if scale != 1 else []
    scalings = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name in layer.scaling:
                layer.scaling[name] = layer.scaling[name] * scale
        yield
    finally:
        for layer, scaling in zip(layers, scalings):
            layer.scaling.update(scaling)


def check_adapters(transformer: Any, attention_kwargs: Any) -> float:
    """Check that adapters can draw now, and return the `scale` in `attention_kwargs`.

    Raises:
        ValueError: if `attention_kwargs` holds anything but a finite `scale`, the scale is not 1 while adapters are
            fused, or an active DoRA cannot read the weights of its layers.
    """
    given = {} if attention_kwargs is None else attention_kwargs
    scale: Any = given.get("scale", 1.0) if isinstance(given, dict) else None
    if not is_number(scale) or not given.keys() <= {"scale"}:
        raise ValueError(
            f"`attention_kwargs` is {attention_kwargs!r}; accepted is {{'scale': s}}, a finite number that "
            "multiplies the weights of all adapters in this call."
        )
    model = unwrap_compiled(transformer)
    if scale != 1 and (fused := _fused_adapters(model)):
        raise ValueError(
            f"`attention_kwargs` is {attention_kwargs!r}, but {fused} are fused into the weights: call `unfuse_lora` "
            "first, or `fuse_lora` with a `lora_scale`."
        )
    layers = lora_layers(model).values()
    dora = [layer for layer in layers if not set(layer.lora_magnitude_vector).isdisjoint(layer.active_adapters)]
    if not _is_disabled(model):
        _require_weights_for_dora(model, [layer.get_base_layer() for layer in dora if not layer.merged])
    return float(scale)


# --- state of the adapters


def _loaded_adapters(model: PRXTransformer2DModel) -> list[str]:
    return list(getattr(model, "peft_config", {}))


def _active_adapters(model: PRXTransformer2DModel) -> list[str]:
    return next((list(layer.active_adapters) for layer in lora_layers(model).values()), [])  # all layers agree


def _activate(model: PRXTransformer2DModel, names: list[str]) -> None:
    for layer in lora_layers(model).values():
        layer.set_adapter(names)


def _is_disabled(model: PRXTransformer2DModel) -> bool:
    return any(layer.disable_adapters for layer in lora_layers(model).values())


def _fused_adapters(model: PRXTransformer2DModel) -> list[str]:
    """Return the adapters that are in the weights, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.merged_adapters))


def _adapter_parameters(layer: PeftLayer, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter in a layer, named as in `LoraAdapter.tensors`."""
    parameters = {"lora_A": layer.lora_A[name].weight, "lora_B": layer.lora_B[name].weight}
    if layer.lora_B[name].bias is not None:
        parameters["lora_B.bias"] = layer.lora_B[name].bias
    if name in layer.lora_magnitude_vector:
        parameters["lora_magnitude_vector"] = layer.lora_magnitude_vector[name].weight
    return parameters


def _set_weight(layer: PeftLayer, name: str, weight: float) -> None:
    """Set the weight of an adapter; peft's `set_scale` alone would replace the tensor of `enable_lora_hotswap`."""
    old = layer.scaling.get(name)
    layer.set_scale(name, weight)
    if isinstance(old, torch.Tensor):
        layer.scaling[name] = old.fill_(layer.scaling[name])


def _scale_at_weight_1(layer: PeftLayer, name: str) -> float:
    rank = layer.r[name]
    return layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name, False) else rank)


# --- changes of the adapters


def _hotswap(model: PRXTransformer2DModel, name: str | None, adapter: LoraAdapter) -> None:
    """Write an adapter over a loaded one, in place.

    peft's own function keeps the old alpha in the layers, resets the weight, clears adapters whose names contain this
    one, and has no DoRA; if it fails, diffusers deletes the adapter.
    """
    if name not in _loaded_adapters(model):
        raise ValueError(
            f"`adapter_name` is {name!r}; to hotswap, it has to be one of the loaded {_loaded_adapters(model)}."
        )
    layers = {key: layer for key, layer in lora_layers(model).items() if name in layer.lora_A}
    parameters = {key: _adapter_parameters(layer, name) for key, layer in layers.items()}
    mismatches = [f"{key} is not adapted by it" for key in adapter.tensors if key not in layers]
    for key, tensors in adapter.tensors.items():
        if key in layers and tensors.keys() != parameters[key].keys():
            mismatches.append(f"{key} has {sorted(parameters[key])}, not {sorted(tensors)}")
        elif key in layers and adapter.ranks[key] > (capacity := len(parameters[key]["lora_A"])):
            mismatches.append(f"{key} has room for rank {capacity}, not {adapter.ranks[key]}")
    if adapter.is_dora:  # a layer that the file lacks is set to zero, and a DoRA of zeros changes the weights
        mismatches += [f"{key} is missing in the file" for key in layers if key not in adapter.tensors]
    for key, own in parameters.items():
        if not all(map(is_plain, own.values())):
            mismatches.append(f"{key} has no plain tensors")
    if mismatches:
        raise ValueError(
            f"`hotswap`: the adapter does not fit in the place of {name!r}, in {len(mismatches)} layers: "
            f"{'; '.join(mismatches[:NAMES_SHOWN])}. Delete that adapter and load this one, or call "
            "`enable_lora_hotswap(target_rank=...)` before the first adapter is loaded."
        )
    for key, layer in layers.items():
        weight = float(layer.scaling[name]) / _scale_at_weight_1(layer, name)
        tensors = adapter.tensors.get(key, {})
        for part, parameter in parameters[key].items():
            parameter.data.zero_()
            if part in tensors:
                parameter.data[tuple(map(slice, tensors[part].shape))].copy_(tensors[part])
        layer.r[name], layer.lora_alpha[name] = adapter.ranks.get(key, 1), adapter.alphas.get(key, 1)
        layer.use_rslora[name] = adapter.use_rslora
        _set_weight(layer, name, weight)
    model.peft_config[name] = type(model.peft_config[name])(**adapter.peft_settings)


def _file_tensors(adapter: LoraAdapter, model: PRXTransformer2DModel) -> dict[str, torch.Tensor]:
    """Copy an adapter's tensors in the dtype of their layers, under the names that files use."""
    named = {}
    for key, tensors in adapter.tensors.items():
        dtype = adapter_dtype(model.get_submodule(key), model)
        for part, tensor in tensors.items():
            suffix = ".weight" if part in ("lora_A", "lora_B") else ""
            named[f"transformer.{key}.{part}{suffix}"] = tensor.detach().to(dtype, copy=True)
    return named


def _undo_storage_dtype(model: PRXTransformer2DModel, name: str, adapter: LoraAdapter) -> None:
    """Give an adapter the model's dtype where peft gave it one in which weights are only stored (float8)."""
    for key, tensors in adapter.tensors.items():
        layer: PeftLayer = model.get_submodule(key)
        if layer.weight.dtype not in PLAIN_DTYPES:
            for part in (layer.lora_A, layer.lora_B):
                part[name].to(model.dtype)
            for part, parameter in _adapter_parameters(layer, name).items():
                parameter.data.copy_(tensors[part])
    if is_cast_for_storage(model):
        reapply_group_offloading(model)  # its copies in pinned memory have the old dtype


def _delete(model: PRXTransformer2DModel, names: Sequence[str], active: list[str]) -> None:
    """Delete adapters and activate these of the others."""
    _activate(model, active)
    if set(_loaded_adapters(model)) <= set(names):
        _unload(model)  # layers without adapters would still rename the weights
    else:
        model.delete_adapters(list(names))


def _unload(model: PRXTransformer2DModel) -> None:
    model.unload_lora()
    model.lora_scale = 1.0


def _snapshot(layer: PeftLayer) -> dict[str, Any]:
    """Copy everything that fusing changes in a layer."""
    weights = {name: parameter.data.clone() for name, parameter in layer.get_base_layer().named_parameters()}
    return {"weights": weights, "merged": list(layer.merged_adapters), "scaling": dict(layer.scaling)}


def _restore(layer: PeftLayer, snapshot: Mapping[str, Any]) -> None:
    for name, parameter in layer.get_base_layer().named_parameters():
        parameter.data = snapshot["weights"][name]
    layer.merged_adapters = snapshot["merged"]
    layer.scaling.update(snapshot["scaling"])


def _is_finite(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


# --- checks


def _check_new_name(model: PRXTransformer2DModel, name: Any) -> str:
    """Check the name of a new adapter, or make one."""
    loaded = _loaded_adapters(model)
    if name is None:
        return next(free for number in range(len(loaded) + 1) if (free := f"default_{number}") not in loaded)
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"`adapter_name` is {name!r}; accepted is a text without dots that torch's ModuleDict has no attribute of."
        )
    if name in loaded:
        raise ValueError(
            f"Adapter name {name} already in use: give another `adapter_name` than {loaded}, or pass `hotswap=True`"
            " to replace that adapter."
        )
    return name


def _check_capacity(model: PRXTransformer2DModel, adapter: LoraAdapter) -> None:
    """Raise a ValueError for an adapter that fits the layers, but not the way in which they are kept."""
    target_rank = (model._prepare_lora_hotswap_kwargs or {}).get("target_rank")
    if target_rank is not None and (highest := max(adapter.ranks.values())) > target_rank:
        raise ValueError(
            f"The adapter has the rank {highest}, but `enable_lora_hotswap` was called with a `target_rank` of "
            f"{target_rank}: call it with at least {highest}."
        )
    layers = {key: model.get_submodule(key) for key in adapter.tensors}
    if adapter.is_dora:
        _require_weights_for_dora(model, list(layers.values()))
    quantized = [key for key, layer in layers.items() if not is_plain(layer.weight)]
    if adapter.has_bias and quantized:
        raise ValueError(
            f"The adapter has a `lora_B.bias`, which quantized layers do not take: {quantized[:NAMES_SHOWN]}."
        )


def _require_weights_for_dora(model: PRXTransformer2DModel, layers: list[Any]) -> None:
    """Raise a ValueError if a DoRA could not read the weights of its layers."""
    readable = all(is_plain(layer.weight) or isinstance(layer.weight, DTensor) for layer in layers)
    if layers and (not readable or is_offloaded_by_leaf(model) or is_cast_for_storage(model)):
        raise ValueError(
            "A DoRA (`lora_magnitude_vector`) reads the weights of its layers, which are offloaded one by one, cast "
            "for storage or quantized. Use a LoRA, or fuse the DoRA and unload it before that."
        )


def _require_unfused(method: str, model: PRXTransformer2DModel) -> None:
    if fused := _fused_adapters(model):
        raise ValueError(f"`{method}` needs `unfuse_lora` first: {fused} are fused into the weights.")


def _require_weights_in_memory(method: str, model: PRXTransformer2DModel) -> None:
    if is_offloaded_to_disk(model):
        raise ValueError(
            f"`{method}` would change weights that are on disk: the transformer was given to `enable_group_offload` "
            "with an `offload_to_disk_path`. Load the pipeline again and do this first, or leave the path out."
        )


def _require_mergeable(method: str, key: str, layer: PeftLayer, names: Sequence[str]) -> None:
    """Raise a ValueError if adapters cannot be added to a layer's weights, or not be subtracted again."""
    base = layer.get_base_layer()
    own = {name: _adapter_parameters(layer, name) for name in names if name in layer.lora_A}
    tensors = [base.weight, *(parameter for parameters in own.values() for parameter in parameters.values())]
    if not all(map(is_plain, tensors)):
        raise ValueError(
            f"`{method}` cannot change {key}, whose weights are quantized, cast for storage or offloaded layer by "
            "layer: do it on a pipeline that is loaded without that."
        )
    for name, parameters in own.items():
        if "lora_B.bias" in parameters and base.bias is None:
            raise ValueError(f"`{method}` cannot add the bias of {name!r} to {key}, which has none.")
        magnitude = parameters.get("lora_magnitude_vector")
        if magnitude is not None and not magnitude.all():
            raise ValueError(f"`{method}`: the DoRA {name!r} makes a row of {key} zero, which could not be undone.")


def _check_components(components: Sequence[str]) -> None:
    if list(components) != ["transformer"]:
        raise ValueError(f"`components` is {components!r}; accepted is ['transformer'], the one that has adapters.")


def _check_loaded(argument: str, names: Sequence[str], model: PRXTransformer2DModel) -> None:
    loaded = _loaded_adapters(model)
    if unknown := [name for name in names if name not in loaded]:
        raise ValueError(f"`{argument}` has {unknown}; loaded are {loaded}.")
    if len(set(names)) < len(names):
        raise ValueError(f"`{argument}` is {list(names)}; each name may be there once.")


def _check_weight(weight: Any) -> float:
    if isinstance(weight, dict) and weight.keys() <= {"transformer"}:
        weight = weight.get("transformer")
    if weight is None:
        return 1.0
    if not is_number(weight):
        raise ValueError(
            f"`adapter_weights` has {weight!r}; accepted are finite numbers, None (1), {{'transformer': number}}."
        )
    return float(weight)
