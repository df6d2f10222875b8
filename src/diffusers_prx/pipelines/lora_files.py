"""Read LoRA files (arXiv 2106.09685) and check them against a transformer before anything is changed.

`lora_formats.py` knows the names in the files of several tools.
"""

import collections
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from ..models.transformer_prx import PRXTransformer2DModel
from ..schedulers.scheduling_prx import is_number
from .check_finite import PLAIN_DTYPES
from .lora_formats import NAMES_SHOWN, Target, find_targets, fuse_parts, group_by_layer, read_alpha

# A layer that peft has adapted (peft.tuners.lora.LoraLayer). peft is imported only when an adapter is loaded.
PeftLayer: TypeAlias = Any

_LAYER_NAME = re.compile(r"[\w.-]+")  # a plain name, not a regular expression

# Settings of peft's LoraConfig that do not change the picture: they say how training starts, or the tensors say the
# same (`use_dora`, `lora_bias`).
_IGNORED_SETTINGS = {"lora_dropout", "inference_mode", "task_type", "auto_mapping", "base_model_name_or_path"}
_IGNORED_SETTINGS |= {"revision", "peft_version", "use_dora", "lora_bias", "eva_config", "runtime_config"}
_LAYER_SETTINGS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_READ_SETTINGS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "peft_type"}
# initializations of peft that leave the weights under the adapter as they are; files do not hold changed ones
_INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_OFF_VALUES: tuple[Any, ...] = (None, False, "none", [], {})
_OFF_DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}  # defaults of features that are off


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA or DoRA that fits a transformer.

    Args:
        tensors: for each layer its tensors, named `lora_A`, `lora_B`, `lora_B.bias` and `lora_magnitude_vector`.
        ranks: rank of each layer.
        alphas: alpha of each layer. The weight changes by alpha / rank * B A.
        use_rslora: scale by alpha / sqrt(rank) instead (arXiv 2312.03732).
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    ranks: dict[str, int]
    alphas: dict[str, float]
    use_rslora: bool

    @property
    def has_bias(self) -> bool:
        return "lora_B.bias" in self._parts

    @property
    def is_dora(self) -> bool:
        """True if the adapter is a DoRA (arXiv 2402.09353)."""
        return "lora_magnitude_vector" in self._parts

    @property
    def _parts(self) -> set[str]:
        return set(next(iter(self.tensors.values())))  # `read_adapter` ensures that all layers have the same

    @property
    def peft_settings(self) -> dict[str, Any]:
        """Arguments of peft's LoraConfig, in which every pattern is the name of one layer."""
        rank = collections.Counter(self.ranks.values()).most_common(1)[0][0]
        alpha = collections.Counter(self.alphas.values()).most_common(1)[0][0]
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{re.escape(name)}": own for name, own in self.ranks.items() if own != rank},
            "alpha_pattern": {f"^{re.escape(name)}": own for name, own in self.alphas.items() if own != alpha},
            "use_rslora": self.use_rslora,
            "use_dora": self.is_dora,
            "lora_bias": self.has_bias,
            "target_modules": sorted(self.tensors),
        }


@dataclass(frozen=True)
class _FileSettings:
    """Settings in a file's metadata that change the picture. The defaults are peft's."""

    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False


def lora_layers(model: nn.Module) -> dict[str, PeftLayer]:
    """Return the layers that hold adapters, by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)}


def adapter_dtype(layer: PeftLayer, model: PRXTransformer2DModel) -> torch.dtype:
    """Return the dtype for adapters of a layer: its weights' own, or the model's if that one is only for storage."""
    return layer.weight.dtype if layer.weight.dtype in PLAIN_DTYPES else model.dtype


def read_adapter(
    state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None, transformer: PRXTransformer2DModel
) -> LoraAdapter:
    """Read an adapter and check that it fits a transformer.

    Args:
        state_dict: tensors by name: `transformer.LAYER.lora_A.weight` and so on, or names of other tools.
        metadata: settings of a LoraConfig, each name prefixed by `transformer.` or not; None if the file has none.
            Without metadata and tensors `alpha`, alpha is the rank. Layer names in it are compared, never run as
            regular expressions.
        transformer: transformer to load the adapter on, with or without other adapters.

    Raises:
        ValueError: if the adapter does not fit; the message says which layers and settings.
    """
    if not isinstance(transformer, PRXTransformer2DModel):
        raise ValueError(
            f"`transformer` is a {type(transformer).__module__}.{type(transformer).__name__}, which takes no adapters "
            "here; accepted is diffusers_prx.PRXTransformer2DModel, which loads the same files."
        )
    in_file, prefix = group_by_layer(state_dict)
    settings = None if metadata is None else _read_settings(metadata)
    use_rslora = settings is not None and settings.use_rslora
    modules = _base_layers(transformer)
    linear_layers = [name for name, module in modules.items() if hasattr(module, "in_features")]
    targets = find_targets(in_file, prefix, linear_layers)
    parts = set().union(*in_file.values())
    mismatches: list[str] = []
    for name, own in in_file.items():
        problem = _find_mismatch(modules.get(targets[name].layer), own, parts, targets[name].count)
        if problem is None and settings is not None:
            rank, shape = _layer_value(settings.rank_pattern, name, settings.r), tuple(own["lora_A"].shape)
            if rank != shape[0]:
                problem = f"takes lora_A of the shape {(rank, *shape[1:])}, not {shape}, by the rank in the metadata"
        mismatches += [] if problem is None else [f"{name} {problem}"]
    if mismatches:
        raise ValueError(
            f"The adapter does not fit this transformer, in {len(mismatches)} of {len(in_file)} layers: "
            f"{'; '.join(mismatches[:NAMES_SHOWN])}. It was made for another model: load it on the pipeline that it "
            "was trained on."
        )
    alphas_in_file = {name: _file_alpha(name, own, settings) for name, own in in_file.items()}
    whole: dict[str, dict[Target, str]] = {}  # layer -> its parts and their names in the file
    for name, target in targets.items():
        whole.setdefault(target.layer, {})[target] = name
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer, own_names in whole.items():
        own_parts = {target: in_file[name] for target, name in own_names.items()}
        if next(iter(own_parts)).count == 1:
            (name,) = own_names.values()
            tensors[layer] = {part: tensor for part, tensor in in_file[name].items() if part != "alpha"}
            ranks[layer], alphas[layer] = len(tensors[layer]["lora_A"]), alphas_in_file[name]
            continue
        scales = {
            target: alphas_in_file[name] / _rank_divisor(len(in_file[name]["lora_A"]), use_rslora)
            for target, name in own_names.items()
        }
        tensors[layer], scale = fuse_parts(own_parts, scales)
        ranks[layer] = len(tensors[layer]["lora_A"])
        alphas[layer] = scale * _rank_divisor(ranks[layer], use_rslora)
    non_finite = [name for name, own in tensors.items() if not _is_finite(own, modules[name], transformer)]
    if non_finite:
        raise ValueError(
            f"The adapter has NaN or infinite values, in the dtype of its layers, in {len(non_finite)} of "
            f"{len(tensors)} layers, such as {non_finite[:NAMES_SHOWN]}: its file is damaged or its training diverged."
        )
    return LoraAdapter(tensors, ranks, alphas, use_rslora)


def layer_alphas(
    layers: Mapping[str, Mapping[str, torch.Tensor]], metadata: Mapping[str, Any] | None
) -> dict[str, float]:
    """Return the alpha of each layer, with which the weights change by alpha / rank * B A.

    Args:
        layers: tensors of each layer, see `LoraAdapter`.
        metadata: settings of the LoraConfig; None: alpha is the rank.

    Raises:
        ValueError: if the settings are wrong, or have other ranks than the tensors.
    """
    settings = None if metadata is None else _read_settings(metadata)
    alphas = {}
    for name, tensors in layers.items():
        rank = len(tensors["lora_A"])
        if settings is not None and (given := _layer_value(settings.rank_pattern, name, settings.r)) != rank:
            raise ValueError(f"{name} has the rank {rank}, and the rank {given} in the metadata.")
        alpha = _file_alpha(name, tensors, settings)
        alphas[name] = alpha * math.sqrt(rank) if settings is not None and settings.use_rslora else alpha
    return alphas


def _file_alpha(name: str, tensors: Mapping[str, torch.Tensor], settings: "_FileSettings | None") -> float:
    """Return the alpha of a layer in a file: its tensor `alpha`, or that of the metadata, or else the rank."""
    alpha: float = len(tensors["lora_A"])
    if settings is not None:
        alpha = _layer_value(settings.alpha_pattern, name, settings.lora_alpha)
    if "alpha" not in tensors:
        return alpha
    stored = read_alpha(name, tensors["alpha"])
    if settings is not None and stored != alpha:
        raise ValueError(f"{name}.alpha in the file is {stored:g}, but the alpha in the metadata is {alpha:g}.")
    return stored


def _rank_divisor(rank: int, use_rslora: bool) -> float:
    """Number by which peft divides alpha."""
    return math.sqrt(rank) if use_rslora else rank


def _base_layers(transformer: PRXTransformer2DModel) -> dict[str, nn.Module]:
    """Return the modules of a transformer by name, without those that belong to other adapters."""
    inside_adapters = tuple(f"{name}." for name in lora_layers(transformer))
    modules = dict(transformer.named_modules())
    return {name: module for name, module in modules.items() if not name.startswith(inside_adapters)}


def _find_mismatch(layer: nn.Module | None, tensors: Mapping[str, Any], parts: set[str], count: int) -> str | None:
    """Return what does not fit in the adapter of one layer, or None.

    Args:
        layer: the layer of that name in the transformer, or None.
        tensors: tensors of the adapter for this layer.
        parts: names of tensors that any layer of the adapter has; all layers must have the same ones.
        count: number of parts of the layer's rows, of which the tensors adapt one.
    """
    if layer is None:
        return "is not in the transformer"
    if not {"lora_A", "lora_B", *parts} <= tensors.keys():
        return f"has only {sorted(tensors)} in the file"
    in_features, out_features = (getattr(layer, name, 0) for name in ("in_features", "out_features"))
    if not in_features:
        return f"is a {type(layer).__name__}, not a linear layer"
    if other := [part for part, tensor in tensors.items() if part != "alpha" and not _has_float_values(tensor)]:
        return f"has no floating-point values in {other}"
    if count > 1 and (other := sorted(tensors.keys() - {"lora_A", "lora_B", "alpha"})):
        return f"is a part of a layer, which takes no {other}"
    shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items() if part != "alpha"}
    out_features = out_features // count
    rank = max(1, *shapes["lora_A"][:1]) if shapes["lora_A"] else 1
    expected = {
        "lora_A": (rank, in_features),
        "lora_B": (out_features, rank),
        "lora_B.bias": (out_features,),
        "lora_magnitude_vector": (out_features,),
    }
    for part, shape in shapes.items():
        if shape != expected[part]:
            return f"takes {part} of the shape {expected[part]}, not {shape}"
    return None


def _read_settings(metadata: Mapping[str, Any]) -> _FileSettings:
    """Check the settings of a LoraConfig and return those that change the picture."""
    if not isinstance(metadata, dict):
        raise ValueError(f"The file's metadata is a {type(metadata).__name__}; it has to be the settings of a LoRA.")
    given = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    defaults = _FileSettings()
    values = {key: given[key] for key in vars(defaults) if given.get(key) is not None}
    settings = _FileSettings(**values)
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(getattr(settings, name), dict):
            raise ValueError(f"`{name}` in the file's metadata is {values[name]!r}; it has to be a dict.")
    for rank in (settings.r, *settings.rank_pattern.values()):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(
                f"`r` or `rank_pattern` in the file's metadata has {rank!r}; a rank is a whole number of at least 1."
            )
    for alpha in (settings.lora_alpha, *settings.alpha_pattern.values()):
        if not is_number(alpha) or alpha == 0:
            raise ValueError(
                f"`lora_alpha` or `alpha_pattern` in the file's metadata has {alpha!r}; an alpha is a finite number "
                "other than 0."
            )
    if not isinstance(settings.use_rslora, bool):
        raise ValueError(f"`use_rslora` in the file's metadata is {settings.use_rslora!r}; accepted are True, False.")
    _check_layer_names(given)
    if given.get("init_lora_weights") not in _INITIALIZATIONS or given.get("peft_type") not in (None, "LORA"):
        raise ValueError(
            f"`init_lora_weights` and `peft_type` in the file's metadata are {given.get('init_lora_weights')!r} and "
            f"{given.get('peft_type')!r}; accepted are LoRA that leave the weights under them as they are "
            f"({list(_INITIALIZATIONS)}). Convert the adapter to a plain LoRA with peft."
        )
    known = _IGNORED_SETTINGS | _LAYER_SETTINGS | _READ_SETTINGS
    unknown = {
        name: value
        for name, value in given.items()
        if name not in known and value not in _OFF_VALUES and value != _OFF_DEFAULTS.get(name)
    }
    if unknown:
        raise ValueError(f"The file's metadata has {unknown}, which is not supported; accepted are LoRA and DoRA.")
    return settings


def _check_layer_names(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError if a setting holds a regular expression: one from a stranger could take forever."""
    for setting in (*_LAYER_SETTINGS, "rank_pattern", "alpha_pattern"):
        names = settings.get(setting) or []
        for name in names if isinstance(names, (list, tuple, set, dict)) else [names]:
            literal = _pattern_to_name(str(name)) if setting.endswith("pattern") else str(name)
            if _LAYER_NAME.fullmatch(literal) is None:
                raise ValueError(
                    f"`{setting}` in the file's metadata has {str(name)[:80]!r}, a regular expression; accepted are "
                    "the names of layers. Save the adapter with `target_modules` as a list of names."
                )


def _pattern_to_name(pattern: str) -> str:
    """Return the layer name in a pattern that peft or diffusers wrote for one layer."""
    return pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")


def _layer_value(patterns: Mapping[str, Any], layer_name: str, default: Any) -> Any:
    """Return the rank or alpha of a layer as peft reads it: that of the first pattern that fits."""
    for pattern, value in patterns.items():
        name = _pattern_to_name(pattern)
        if layer_name == name or (not pattern.startswith("^") and layer_name.endswith(f".{name}")):
            return value
    return default


def _has_float_values(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.device.type != "meta"


def _is_finite(tensors: Mapping[str, torch.Tensor], layer: PeftLayer, model: PRXTransformer2DModel) -> bool:
    dtype = adapter_dtype(layer, model)
    return all(bool(torch.isfinite(tensor.to(dtype)).all()) for tensor in tensors.values())
