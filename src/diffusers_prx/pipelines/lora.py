"""LoRA adapters (arXiv 2106.09685) on the transformer of both pipelines.

Files are read, and layers are made, by diffusers' own loader and peft. What stands here are the checks before a call
changes anything, and the calls that diffusers and peft leave half done: those on a transformer that torch.compile has
wrapped, hot-swapping, and what is active after an adapter was deleted.
"""

import collections
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.utils import logging
from torch import nn
from torch.distributed.tensor import DTensor

from ..compat import (
    is_cast_for_storage,
    is_offloaded_by_leaf,
    is_offloaded_to_disk,
    reapply_group_offloading,
    unwrap_compiled,
)
from ..models.transformer_prx import PRXTransformer2DModel
from ..schedulers.scheduling_prx import is_number
from .check_finite import PLAIN_DTYPES, is_plain

logger = logging.get_logger(__name__)

# what files hold of an adapted layer, under the names that peft and diffusers give it
PARTS = r"lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?"
KEY = re.compile(rf"transformer\.(?P<layer>.+)\.(?P<part>{PARTS})")
SHOWN = 3  # number of layers and tensors that an error message names
NAME = re.compile(r"[\w.-]+")  # a name of layers, as against a pattern for them

# Settings of peft's LoraConfig that say nothing about the sampled picture: the tensors name their layers, and values
# to start from are for training. (`use_dora` and `lora_bias` are read from the tensors.)
TRAINING_SETTINGS = {"lora_dropout", "inference_mode", "task_type", "auto_mapping", "base_model_name_or_path"}
TRAINING_SETTINGS |= {"revision", "peft_version", "use_dora", "lora_bias", "eva_config", "runtime_config"}
LAYER_SETTINGS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
READ_SETTINGS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "peft_type"}
# what peft starts from without changing the weights under the adapter, which files of adapters do not hold
INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
OFF: tuple[Any, ...] = (None, False, "none", [], {})
UNUSED = {"megatron_core": "megatron.core", "qalora_group_size": 16}  # defaults of what is off


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a transformer.

    Args:
        tensors: for each layer its tensors, under `lora_A`, `lora_B`, `lora_B.bias` and `lora_magnitude_vector`.
        ranks: rank of each layer.
        alphas: alpha of each layer; the delta is alpha / rank * B A.
        use_rslora: alpha / sqrt(rank) instead (arXiv 2312.03732).
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    ranks: dict[str, int]
    alphas: dict[str, float]
    use_rslora: bool

    @property
    def parts(self) -> set[str]:
        return set(next(iter(self.tensors.values())))

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of peft's LoraConfig, in which every pattern is the name of one layer."""
        rank = collections.Counter(self.ranks.values()).most_common(1)[0][0]
        alpha = collections.Counter(self.alphas.values()).most_common(1)[0][0]
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{re.escape(name)}": own for name, own in self.ranks.items() if own != rank},
            "alpha_pattern": {f"^{re.escape(name)}": own for name, own in self.alphas.items() if own != alpha},
            "use_rslora": self.use_rslora,
            "use_dora": "lora_magnitude_vector" in self.parts,
            "lora_bias": "lora_B.bias" in self.parts,
            "target_modules": sorted(self.tensors),
        }


class PRXLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """`load_lora_weights` and its relatives, with the arguments that they have on every pipeline of diffusers.

    CogVideoX's mixin is the one of diffusers that adapts the component `transformer` alone and knows no names of other
    tools, which is what PRX needs too. After any sequence of calls the pipeline draws what a new one with the same
    adapters and weights would, or the call raises a ValueError and nothing has changed.
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
        """Load an adapter and use it, and no other one, until `set_adapters`. Those that are loaded stay loaded.

        After `disable_lora` it is not used before `enable_lora`.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a .safetensors file, a Hub id, or tensors by name.
            adapter_name: name for `set_adapters`; the first free one of default_0, default_1, ... when None.
            hotswap: put it in the place of the loaded adapter of that name, with the weight that `set_adapters` gave
                to that one and without a new compilation. Its layers must be among those of the other adapter, and
                its ranks not higher; `enable_lora_hotswap(target_rank=...)` before the first adapter makes room.
            weight_name: name of the file; without a network it must be given for a Hub id.
            subfolder, revision, token, cache_dir, force_download, proxies, local_files_only: location on the Hub, as
                in `DiffusionPipeline.from_pretrained`.
            low_cpu_mem_usage: make the layers without values before they are filled.

        Raises:
            ValueError: a file that holds something else than a LoRA or DoRA of this transformer's layers, an adapter
                name that is taken, fused adapters, or a transformer that is offloaded to disk; the pipeline is as it
                was.
        """
        model = unwrap_compiled(self.transformer)
        method = "hotswap" if hotswap else "load_lora_weights"
        _require_unfused(method, model)
        _require_in_memory(method, model)
        source = pretrained_model_name_or_path_or_dict
        try:
            state_dict, metadata = self.lora_state_dict(
                dict(source) if isinstance(source, Mapping) else source,
                return_lora_metadata=True,
                use_safetensors=True,  # nothing is unpickled
                weight_name=weight_name,
                subfolder=subfolder,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                proxies=proxies,
                local_files_only=local_files_only,
            )
        except (safetensors.SafetensorError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{source} is not a .safetensors file that can be read: {error}.") from error
        adapter = read_adapter(state_dict, metadata, model)
        if hotswap:
            _hotswap(model, adapter_name, adapter)
            return
        name = _new_name(model, adapter_name)
        _check_room(model, adapter)
        active, disabled = _active(model), _disabled(model)
        offloaded = bool(getattr(self, "_all_hooks", []))  # by `enable_model_cpu_offload`
        try:
            self.load_lora_into_transformer(
                _as_weights(adapter, model),
                transformer=model,
                adapter_name=name,
                metadata={f"transformer.{key}": value for key, value in adapter.settings.items()},
                # diffusers would take the hooks away and apply them anew, for its own choice of a device
                _pipeline=None if offloaded else self,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            _undo_casting(model, name, adapter)
        except Exception:
            _forget(model, [name], active)
            raise
        for layer in lora_layers(model).values():
            layer.eval()
            layer.enable_adapters(not disabled)

    def set_adapters(
        self, adapter_names: list[str] | str, adapter_weights: float | dict | list[float] | list[dict] | None = None
    ) -> None:
        """Use these adapters and no others, each with its weight (1 when None): W + sum of weight * delta.

        At weight 0 a LoRA changes nothing; a DoRA (arXiv 2402.09353) still brings its lengths of the rows, which
        `disable_lora` leaves out too.

        Args:
            adapter_names: names of loaded adapters; an empty list for none.
            adapter_weights: one finite number for all, a list with one for each, or {"transformer": number} in the
                place of a number.

        Raises:
            ValueError: unknown or repeated names, another number of weights, or adapters that are fused: unfusing
                would then take away something else than what was added.
        """
        model = unwrap_compiled(self.transformer)
        _require_unfused("set_adapters", model)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        _check_names("adapter_names", names, model)
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
        """Forget these adapters; the others stay.

        If none of those in use is left, the one of the others that was loaded last is used.

        Raises:
            ValueError: unknown or repeated names, adapters that are fused (what was added to the weights could not be
                taken out any more), or a transformer that is offloaded to disk.
        """
        model = unwrap_compiled(self.transformer)
        _require_unfused("delete_adapters", model)
        _require_in_memory("delete_adapters", model)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        _check_names("adapter_names", names, model)
        left = [name for name in _loaded(model) if name not in names]
        active = [name for name in _active(model) if name not in names]
        if left and not active and _active(model):
            active = left[-1:]
            logger.warning(f"The adapters in use were deleted: {active} is used now.")
        _forget(model, names, active)

    def disable_lora(self) -> None:
        """Draw without adapters until `enable_lora`; they and their weights stay.

        Raises:
            ValueError: adapters are fused.
        """
        model = unwrap_compiled(self.transformer)
        _require_unfused("disable_lora", model)
        for layer in lora_layers(model).values():
            layer.enable_adapters(False)

    def enable_lora(self) -> None:
        """Take `disable_lora` back."""
        for layer in lora_layers(unwrap_compiled(self.transformer)).values():
            layer.enable_adapters(True)

    def fuse_lora(
        self,
        components: list[str] | tuple[str, ...] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Add adapters to the weights, which makes the network as fast as without them.

        Args:
            components: `transformer` is the only one.
            lora_scale: factor of the weights of `set_adapters` until `unfuse_lora`; finite, and not 0.
            safe_fusing: raise an error, and change nothing, if a weight would not be finite. Needs memory for a copy
                of the adapted layers.
            adapter_names: names of the adapters, which are those in use from then on; those in use already when None.

        Raises:
            ValueError: adapters that are not loaded, or disabled; weights that nothing can be added to (quantized,
                cast for storage, offloaded to disk); a `lora_scale` while others are fused, which it would change as
                well; or one of 0, from which `unfuse_lora` could not find the weights of `set_adapters` again.
        """
        _check_components(components)
        model = unwrap_compiled(self.transformer)
        _require_in_memory("fuse_lora", model)
        if not is_number(lora_scale) or lora_scale == 0:
            raise ValueError(
                f"`lora_scale` is {lora_scale!r}, which `unfuse_lora` cannot take back; accepted is any other finite "
                "number. To leave adapters out: `disable_lora`."
            )
        lora_scale, fused = float(lora_scale), _fused(model)
        if lora_scale != 1 and fused:
            raise ValueError(f"`lora_scale` is {lora_scale}, but {fused} are fused already: call `unfuse_lora` first.")
        if _disabled(model):
            raise ValueError("`fuse_lora` needs `enable_lora` first: the adapters are disabled.")
        names = _active(model) if adapter_names is None else list(adapter_names)
        _check_names("adapter_names", names, model)
        names = [name for name in names if name not in fused]
        if not names and not fused:
            raise ValueError("`fuse_lora` has no adapter to fuse: call `load_lora_weights` or `set_adapters` first.")
        adapted = {key: layer for key, layer in lora_layers(model).items() if not set(names).isdisjoint(layer.lora_A)}
        for key, layer in adapted.items():
            _require_addable("fuse_lora", key, layer, names)
        kept = {key: _snapshot(layer) for key, layer in adapted.items()} if safe_fusing else {}
        active = _active(model)
        for layer in lora_layers(model).values():
            layer.set_adapter(fused + names)
        model.fuse_lora(float(lora_scale), adapter_names=names)
        if broken := [key for key in kept if not _is_finite(adapted[key].get_base_layer())]:
            model.lora_scale = 1.0
            for key, layer in adapted.items():
                _restore(layer, kept[key])
            for layer in lora_layers(model).values():
                layer.set_adapter(active)
            raise ValueError(
                f"`safe_fusing`: with {names}, weights of {len(broken)} layers would not be finite, as "
                f"{broken[:SHOWN]}; nothing was fused. Use smaller weights, or a type with a larger range."
            )

    def unfuse_lora(self, components: list[str] | tuple[str, ...] = ("transformer",)) -> None:
        """Take what was fused out of the weights again, and the `lora_scale` back: the weights are those from before
        to the rounding of their type.

        Raises:
            ValueError: the weights were quantized, cast for storage or offloaded to disk since they were fused.
        """
        _check_components(components)
        model = unwrap_compiled(self.transformer)
        fused = _fused(model)
        if not fused:
            return
        _require_in_memory("unfuse_lora", model)
        merged = {key: layer for key, layer in lora_layers(model).items() if layer.merged}
        for key, layer in merged.items():
            _require_addable("unfuse_lora", key, layer, layer.merged_adapters)
        for layer in merged.values():
            layer.unmerge()
        scale = getattr(model, "lora_scale", 1.0)  # diffusers leaves it
        for layer in lora_layers(model).values():
            if scale != 1:
                layer.unscale_layer(scale)
        model.lora_scale = 1.0

    def unload_lora_weights(self) -> None:
        """Forget all adapters. What is fused stays in the weights.

        Raises:
            ValueError: the transformer has adapters and is offloaded to disk.
        """
        model = unwrap_compiled(self.transformer)
        if lora_layers(model):
            _require_in_memory("unload_lora_weights", model)
            _unload(model)

    def get_active_adapters(self) -> list[str]:
        """Return the names of the adapters in use, in the order in which they are added."""
        return _active(unwrap_compiled(self.transformer))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all loaded adapters, as {"transformer": names}, or {} if there are none."""
        names = _loaded(unwrap_compiled(self.transformer))
        return {"transformer": names} if names else {}

    @property
    def fused_loras(self) -> set[str]:
        """Names of the adapters that are in the weights and can be taken out again."""
        return set(_fused(unwrap_compiled(self.transformer)))

    @property
    def num_fused_loras(self) -> int:
        return len(self.fused_loras)


# What a file says.


def read_adapter(state_dict: Mapping[str, Any], metadata: Any, transformer: Any) -> Adapter:
    """Read an adapter and refuse one that is not of this transformer.

    Args:
        state_dict: tensors by name, `transformer.LAYER.lora_A.weight` and so on.
        metadata: settings of a LoraConfig behind `transformer.`, or None if the file has none (alpha is the rank).
            Names of layers in it are compared, never run as regular expressions.
        transformer: with or without other adapters.

    Raises:
        ValueError: with what does not fit.
    """
    if not isinstance(transformer, PRXTransformer2DModel):
        raise ValueError(
            f"`transformer` is a {type(transformer).__module__}.{type(transformer).__name__}, which takes no adapters "
            "here; accepted is diffusers_prx.PRXTransformer2DModel, which loads the same files."
        )
    if not state_dict:
        raise ValueError("The file has no tensors; accepted are those of a LoRA or DoRA of the transformer.")
    found = {key: KEY.fullmatch(key) if isinstance(key, str) else None for key in state_dict}
    other = sorted(str(key) for key, match in found.items() if match is None)
    if other:
        raise ValueError(
            f"The file has {len(other)} tensors of {len(state_dict)} that are no part of a LoRA or DoRA of the "
            f"transformer, as {other[:SHOWN]}; accepted are transformer.LAYER.lora_A.weight, .lora_B.weight, "
            ".lora_B.bias and .lora_magnitude_vector."
        )
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state_dict.items():
        match: Any = found[key]
        tensors.setdefault(match["layer"], {})[match["part"].removesuffix(".weight")] = tensor
    linear, adapted = dict(transformer.named_modules()), lora_layers(transformer)
    inside = tuple(f"{name}." for name in adapted)  # parts of other adapters
    linear = {name: module for name, module in linear.items() if not name.startswith(inside)}
    parts = set().union(*tensors.values())
    misfits = {name: _misfit(linear.get(name), own, parts) for name, own in tensors.items()}
    wrong = [f"{name} {misfit}" for name, misfit in misfits.items() if misfit is not None]
    settings = _read_settings(metadata)
    ranks, alphas = {}, {}
    for name, own in tensors.items() if not wrong else ():
        rank = ranks[name] = own["lora_A"].shape[0]
        stated = rank if metadata is None else _stated(settings, "rank_pattern", name, settings["r"])
        alphas[name] = rank if metadata is None else _stated(settings, "alpha_pattern", name, settings["lora_alpha"])
        if stated != rank:
            wanted, came = (stated, *own["lora_A"].shape[1:]), tuple(own["lora_A"].shape)
            wrong.append(f"{name} takes lora_A of the shape {wanted}, not {came}, by the rank in the file's metadata")
    fitting = {} if wrong else tensors
    if broken := [name for name, own in fitting.items() if not _is_finite_as(own, linear[name], transformer)]:
        raise ValueError(
            f"The adapter has NaN or infinite values, in the type of the weights of its layers, in {len(broken)} of "
            f"{len(tensors)} layers, as {broken[:SHOWN]}: its file is damaged or its training diverged."
        )
    if wrong:
        raise ValueError(
            f"The adapter does not fit this transformer, in {len(wrong)} of {len(tensors)} layers: "
            f"{'; '.join(wrong[:SHOWN])}. It was made for another model: load it on the pipeline that it was trained "
            "on."
        )
    return Adapter(tensors, ranks, alphas, settings["use_rslora"])


def _misfit(layer: Any, tensors: Mapping[str, Any], parts: set[str]) -> str | None:
    """Say what is wrong with the adapter of one layer, where others have these parts."""
    if layer is None:
        return "is not there"
    if not {"lora_A", "lora_B", *parts} <= tensors.keys():
        return f"has only {sorted(tensors)} in the file"
    if not hasattr(layer, "in_features"):
        return f"is a {type(layer).__name__}, not a linear layer"
    if other := [part for part, tensor in tensors.items() if not _is_number_tensor(tensor)]:
        return f"has no tensor of floating-point numbers in {other}"
    shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
    rank = max(1, *shapes["lora_A"][:1]) if shapes["lora_A"] else 1
    wanted: dict[str, tuple[int, ...]] = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
    wanted |= {"lora_B.bias": (layer.out_features,), "lora_magnitude_vector": (layer.out_features,)}
    for part, shape in shapes.items():
        if shape != wanted[part]:
            return f"takes {part} of the shape {wanted[part]}, not {shape}"
    return None


def _read_settings(metadata: Any) -> dict[str, Any]:
    """Check the settings of a LoraConfig, and return those that count, with peft's defaults where one is missing."""
    defaults: dict[str, Any] = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    if metadata is None:
        return defaults
    if not isinstance(metadata, dict):
        raise ValueError(f"The file's metadata is a {type(metadata).__name__}; it has to be the settings of a LoRA.")
    given = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    settings = defaults | {key: value for key, value in given.items() if key in defaults and value is not None}
    for setting in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings[setting], dict):
            raise ValueError(f"`{setting}` in the file's metadata is {settings[setting]!r}; it has to be a dict.")
    for rank in (settings["r"], *settings["rank_pattern"].values()):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(
                f"`r` or `rank_pattern` in the file's metadata has {rank!r}; a rank is a whole number of at least 1."
            )
    for alpha in (settings["lora_alpha"], *settings["alpha_pattern"].values()):
        if not is_number(alpha) or alpha == 0:
            raise ValueError(
                f"`lora_alpha` or `alpha_pattern` in the file's metadata has {alpha!r}; an alpha is a finite number "
                "other than 0."
            )
    if not isinstance(settings["use_rslora"], bool):
        raise ValueError(
            f"`use_rslora` in the file's metadata is {settings['use_rslora']!r}; accepted are True, False."
        )
    for setting in (*LAYER_SETTINGS, "rank_pattern", "alpha_pattern"):
        names = given.get(setting) or []
        for name in names if isinstance(names, (list, dict)) else [names]:
            literal = _literal(str(name)) if setting.endswith("pattern") else str(name)
            if NAME.fullmatch(literal) is None:
                raise ValueError(
                    f"`{setting}` in the file's metadata has {str(name)[:80]!r}, a regular expression; accepted are "
                    "the names of layers. Save the adapter with `target_modules` as a list of names."
                )
    if given.get("init_lora_weights") not in INITIALIZATIONS or given.get("peft_type") not in (None, "LORA"):
        raise ValueError(
            f"`init_lora_weights` and `peft_type` in the file's metadata are {given.get('init_lora_weights')!r} and "
            f"{given.get('peft_type')!r}; accepted are LoRA that leave the weights under them as they were "
            f"({list(INITIALIZATIONS)}). Convert the adapter to a plain LoRA with peft."
        )
    known = TRAINING_SETTINGS | LAYER_SETTINGS | READ_SETTINGS
    if other := {k: v for k, v in given.items() if k not in known and v not in OFF and v != UNUSED.get(k)}:
        raise ValueError(f"The file's metadata has {other}, which is not supported here; accepted are LoRA and DoRA.")
    return settings


def _literal(pattern: str) -> str:
    """The name of a layer that peft or diffusers has written as a pattern."""
    return pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")


def _stated(settings: Mapping[str, Any], patterns: str, name: str, default: Any) -> Any:
    """The rank or alpha that settings state for a layer, as peft reads them: the first pattern that fits."""
    for pattern, value in settings[patterns].items():
        literal = _literal(pattern)
        if name == literal or (not pattern.startswith("^") and name.endswith(f".{literal}")):
            return value
    return default


def _is_number_tensor(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.device.type != "meta"


def _dtype(layer: Any, model: Any) -> torch.dtype:
    """The type of an adapter in a layer: that of the weights, or of the computation where they are only stored."""
    return layer.weight.dtype if layer.weight.dtype in PLAIN_DTYPES else model.dtype


def _is_finite_as(tensors: Mapping[str, torch.Tensor], layer: Any, model: Any) -> bool:
    return all(bool(torch.isfinite(tensor.to(_dtype(layer, model))).all()) for tensor in tensors.values())


# Adapters that are loaded.


def lora_layers(model: Any) -> dict[str, Any]:
    """Return the layers that adapters can be in, by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)}


@contextmanager
def scale_adapters(transformer: Any, scale: float) -> Iterator[None]:
    """Multiply the weights of all adapters by a number, and leave them exactly as they were afterwards."""
    layers = list(lora_layers(unwrap_compiled(transformer)).values()) if scale != 1 else []
    kept = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name in layer.scaling:
                layer.scaling[name] = layer.scaling[name] * scale
        yield
    finally:
        for layer, scaling in zip(layers, kept):
            layer.scaling.update(scaling)


def check_adapters(transformer: Any, attention_kwargs: Any) -> float:
    """Check that adapters can draw here, and return the `scale` of a call.

    Raises:
        ValueError: something else in `attention_kwargs` than a finite `scale`, a scale while adapters are fused, or a
            DoRA whose weights are not there when it reads them.
    """
    given = {} if attention_kwargs is None else attention_kwargs
    scale: Any = given.get("scale", 1.0) if isinstance(given, dict) else None
    if not is_number(scale) or not given.keys() <= {"scale"}:
        raise ValueError(
            f"`attention_kwargs` is {attention_kwargs!r}; accepted is {{'scale': s}}, a finite number that "
            "multiplies the weights of all adapters in this call."
        )
    model = unwrap_compiled(transformer)
    if scale != 1 and (fused := _fused(model)):
        raise ValueError(
            f"`attention_kwargs` is {attention_kwargs!r}, but {fused} are fused into the weights: call `unfuse_lora` "
            "first, or `fuse_lora` with a `lora_scale`."
        )
    layers = lora_layers(model).values()
    dora = [layer for layer in layers if not set(layer.lora_magnitude_vector).isdisjoint(layer.active_adapters)]
    if not _disabled(model):
        _require_weights_for_dora(model, [layer.get_base_layer() for layer in dora if not layer.merged])
    return float(scale)


def _loaded(model: Any) -> list[str]:
    return list(getattr(model, "peft_config", {}))


def _active(model: Any) -> list[str]:
    """The adapters in use; all layers agree on them."""
    return next((list(layer.active_adapters) for layer in lora_layers(model).values()), [])


def _disabled(model: Any) -> bool:
    return any(layer.disable_adapters for layer in lora_layers(model).values())


def _fused(model: Any) -> list[str]:
    """The adapters that are in the weights now, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.merged_adapters))


def _set_weight(layer: Any, name: str, weight: float) -> None:
    """Set a weight as peft's `set_scale` does, which would replace the tensor of `enable_lora_hotswap` by a number."""
    old = layer.scaling.get(name)
    layer.set_scale(name, weight)
    if isinstance(old, torch.Tensor):
        layer.scaling[name] = old.fill_(layer.scaling[name])


def _hotswap(model: Any, name: str | None, adapter: Adapter) -> None:
    """Write an adapter over another one, in place.

    peft's own function leaves the old alpha in the layers, forgets the weight, empties adapters whose names have this
    one in them, and knows no DoRA; and when it fails, diffusers deletes the adapter.
    """
    if name not in _loaded(model):
        raise ValueError(f"`adapter_name` is {name!r}; to hotswap, it has to be one of the loaded {_loaded(model)}.")
    layers = {key: layer for key, layer in lora_layers(model).items() if name in layer.lora_A}
    parts = {key: _parameters(layer, name) for key, layer in layers.items()}
    wrong = [f"{key} is not adapted by it" for key in adapter.tensors if key not in layers]
    for key, own in adapter.tensors.items():
        if key in layers and own.keys() != parts[key].keys():
            wrong.append(f"{key} has {sorted(parts[key])}, not {sorted(own)}")
        elif key in layers and adapter.ranks[key] > (room := len(parts[key]["lora_A"])):
            wrong.append(f"{key} has room for rank {room}, not {adapter.ranks[key]}")
    if "lora_magnitude_vector" in adapter.parts:  # a DoRA of zeros is not nothing
        wrong += [f"{key} is missing in the file" for key in layers if key not in adapter.tensors]
    wrong += [f"{key} holds no plain tensors" for key, own in parts.items() if not all(map(is_plain, own.values()))]
    if wrong:
        raise ValueError(
            f"`hotswap`: the adapter does not fit in the place of {name!r}, in {len(wrong)} layers: "
            f"{'; '.join(wrong[:SHOWN])}. Delete that one and load this one, or call "
            "`enable_lora_hotswap(target_rank=...)` before the first adapter is loaded."
        )
    for key, layer in layers.items():
        weight = float(layer.scaling[name]) / _own_scale(layer, name)
        tensors = adapter.tensors.get(key, {})
        for part, parameter in parts[key].items():
            parameter.data.zero_()
            if part in tensors:
                parameter.data[tuple(map(slice, tensors[part].shape))].copy_(tensors[part])
        layer.r[name], layer.lora_alpha[name] = adapter.ranks.get(key, 1), adapter.alphas.get(key, 1)
        layer.use_rslora[name] = adapter.use_rslora
        _set_weight(layer, name, weight)
    model.peft_config[name] = type(model.peft_config[name])(**adapter.settings)


def _parameters(layer: Any, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter in a layer, under the names of `Adapter.tensors`."""
    found = {"lora_A": layer.lora_A[name].weight, "lora_B": layer.lora_B[name].weight}
    if layer.lora_B[name].bias is not None:
        found["lora_B.bias"] = layer.lora_B[name].bias
    if name in layer.lora_magnitude_vector:
        found["lora_magnitude_vector"] = layer.lora_magnitude_vector[name].weight
    return found


def _own_scale(layer: Any, name: str) -> float:
    """Return the factor of an adapter's delta at weight 1."""
    rank = layer.r[name]
    return layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name, False) else rank)


def _as_weights(adapter: Adapter, model: Any) -> dict[str, torch.Tensor]:
    """Copies of an adapter's tensors in the type of the layers, under the names of files."""
    named = {}
    for key, tensors in adapter.tensors.items():
        dtype = _dtype(model.get_submodule(key), model)
        for part, tensor in tensors.items():
            suffix = "" if part == "lora_B.bias" or part == "lora_magnitude_vector" else ".weight"
            named[f"transformer.{key}.{part}{suffix}"] = tensor.detach().to(dtype, copy=True)
    return named


def _undo_casting(model: Any, name: str, adapter: Adapter) -> None:
    """Give an adapter the type of the computation where peft gave it one in which weights are only stored."""
    for key, tensors in adapter.tensors.items():
        layer = model.get_submodule(key)
        if layer.weight.dtype not in PLAIN_DTYPES:
            for part in (layer.lora_A, layer.lora_B):
                part[name].to(model.dtype)
            for part, parameter in _parameters(layer, name).items():
                parameter.data.copy_(tensors[part])
    if is_cast_for_storage(model):
        reapply_group_offloading(model)  # copies in pinned memory have the other type


def _forget(model: Any, names: Sequence[str], active: list[str]) -> None:
    """Delete adapters, and use these of the others."""
    for layer in lora_layers(model).values():
        layer.set_adapter(active)
    if set(_loaded(model)) <= set(names):
        _unload(model)  # empty layers would give the weights other names
    else:
        model.delete_adapters(list(names))


def _unload(model: Any) -> None:
    model.unload_lora()
    model.lora_scale = 1.0  # of what is fused


# Refusals.


def _new_name(model: Any, name: Any) -> str:
    """Check the name of a new adapter, or find one."""
    taken = _loaded(model)
    if name is None:
        return next(free for number in range(len(taken) + 1) if (free := f"default_{number}") not in taken)
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"`adapter_name` is {name!r}; accepted is a text without dots that torch's ModuleDict has no attribute of."
        )
    if name in taken:
        raise ValueError(
            f"Adapter name {name} already in use: give another `adapter_name` than {taken}, or pass `hotswap=True` to "
            "replace that adapter."
        )
    return name


def _check_room(model: Any, adapter: Adapter) -> None:
    """Refuse what a transformer cannot take although it fits."""
    target_rank = (model._prepare_lora_hotswap_kwargs or {}).get("target_rank")
    if target_rank is not None and (highest := max(adapter.ranks.values())) > target_rank:
        raise ValueError(
            f"The adapter has the rank {highest}, but `enable_lora_hotswap` was called with a `target_rank` of "
            f"{target_rank}: call it with at least {highest}."
        )
    layers = {key: model.get_submodule(key) for key in adapter.tensors}
    if "lora_magnitude_vector" in adapter.parts:
        _require_weights_for_dora(model, list(layers.values()))
    odd = [key for key, layer in layers.items() if not is_plain(layer.weight)]
    if "lora_B.bias" in adapter.parts and odd:
        raise ValueError(f"The adapter has a `lora_B.bias`, which quantized layers do not take, as {odd[:SHOWN]}.")


def _require_weights_for_dora(model: Any, layers: list[Any]) -> None:
    """Refuse a DoRA that would read the weights of these layers while they are elsewhere or in another type."""
    there = all(is_plain(layer.weight) or isinstance(layer.weight, DTensor) for layer in layers)
    if layers and (is_offloaded_by_leaf(model) or is_cast_for_storage(model) or not there):
        raise ValueError(
            "A DoRA (`lora_magnitude_vector`) reads the weights of its layers, which are offloaded one by one, cast "
            "for storage or quantized. Use a LoRA, or fuse the DoRA and unload it before that."
        )


def _require_unfused(method: str, model: Any) -> None:
    if fused := _fused(model):
        raise ValueError(f"`{method}` needs `unfuse_lora` first: {fused} are fused into the weights.")


def _require_in_memory(method: str, model: Any) -> None:
    if is_offloaded_to_disk(model):
        raise ValueError(
            f"`{method}` would change weights that are on disk: the transformer was given to `enable_group_offload` "
            "with an `offload_to_disk_path`. Load the pipeline again and do this first, or leave the path out."
        )


def _require_addable(method: str, key: str, layer: Any, names: Sequence[str]) -> None:
    """Refuse a layer to which adapters cannot be added, or from which they could not be taken away."""
    base = layer.get_base_layer()
    own = [name for name in names if name in layer.lora_A]
    tensors = [base.weight, *(parameter for name in own for parameter in _parameters(layer, name).values())]
    if not all(map(is_plain, tensors)):
        raise ValueError(
            f"`{method}` cannot change {key}, whose weights are quantized, cast for storage or offloaded layer by "
            "layer: do it on a pipeline that is loaded without that."
        )
    for name in own:
        parts = _parameters(layer, name)
        if "lora_B.bias" in parts and base.bias is None:
            raise ValueError(f"`{method}` cannot add the bias of {name!r} to {key}, which has none.")
        if not parts.get("lora_magnitude_vector", tensors[0]).all() and "lora_magnitude_vector" in parts:
            raise ValueError(f"`{method}`: the DoRA {name!r} makes a row of {key} zero, which could not be undone.")


def _check_components(components: Sequence[str]) -> None:
    if list(components) != ["transformer"]:
        raise ValueError(f"`components` is {components!r}; accepted is ['transformer'], the one that has adapters.")


def _check_names(argument: str, names: Sequence[str], model: Any) -> None:
    loaded = _loaded(model)
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


def _snapshot(layer: Any) -> dict[str, Any]:
    """Copy everything that fusing changes in a layer."""
    weights = {name: parameter.data.clone() for name, parameter in layer.get_base_layer().named_parameters()}
    return {"weights": weights, "merged": list(layer.merged_adapters), "scaling": dict(layer.scaling)}


def _restore(layer: Any, snapshot: Mapping[str, Any]) -> None:
    for name, parameter in layer.get_base_layer().named_parameters():
        parameter.data = snapshot["weights"][name]
    layer.merged_adapters = snapshot["merged"]
    layer.scaling.update(snapshot["scaling"])


def _is_finite(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
