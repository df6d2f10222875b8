"""Names in LoRA files of diffusers, ComfyUI, ai-toolkit, peft, kohya and the original trainer, and scales in them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..models.single_file import original_name

NAMES_SHOWN = 3  # layers or tensors that an error message names

LORA_FORMATS = ("diffusers", "comfyui", "kohya")
PEFT_PREFIX = "base_model.model."
KOHYA_PREFIX = "lora_unet_"  # of names in which underscores stand for dots
# prefixes of diffusers, of ComfyUI and ai-toolkit, and of peft
_PREFIXES = ("transformer.", "diffusion_model.", PEFT_PREFIX, KOHYA_PREFIX)

# ends of tensor names in files -> parts of an adapted layer
_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_down.weight": "lora_A",
    "lora_up.weight": "lora_B",
    "lora_B.bias": "lora_B.bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "dora_scale": "lora_magnitude_vector",  # (out_features, 1) in ComfyUI and kohya
    "alpha": "alpha",
}

# fused layers of PRX -> names that other tools give to their parts, in the order of the rows
_SPLIT_NAMES = {
    "img_qkv_proj": (("to_q", "to_k", "to_v"), ("img_q_proj", "img_k_proj", "img_v_proj")),
    "txt_kv_proj": (("add_k_proj", "add_v_proj"), ("txt_k_proj", "txt_v_proj")),
}


@dataclass(frozen=True)
class Target:
    """Rows of a layer that a layer in a file adapts.

    Args:
        layer: name of the layer in the transformer.
        index: number of the part, counted from 0.
        count: number of equal parts of the layer's rows; 1 for the whole layer.
    """

    layer: str
    index: int = 0
    count: int = 1


def group_by_layer(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict[str, dict[str, torch.Tensor]], str]:
    """Return {layer: {part: tensor}} of a file's tensors, with the file's names of layers, and their prefix.

    Raises:
        ValueError: if tensors do not belong to a LoRA or DoRA, or their names have several prefixes.
    """
    if not state_dict:
        raise ValueError("The file has no tensors; accepted are those of a LoRA or DoRA of the transformer.")
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    examples: dict[str, str] = {}  # prefix -> a name that has it
    unknown, repeated = [], []
    for key, tensor in state_dict.items():
        prefix = next((start for start in _PREFIXES if str(key).startswith(start)), None)
        end = next((end for end in _PARTS if str(key).endswith(f".{end}")), None)
        if prefix is None or end is None:
            unknown.append(str(key))
            continue
        examples.setdefault(prefix, key)
        own = tensors.setdefault(key.removeprefix(prefix).removesuffix(f".{end}"), {})
        if _PARTS[end] in own:
            repeated.append(key)
        own[_PARTS[end]] = tensor[:, 0] if end == "dora_scale" and tensor.ndim == 2 else tensor
    if unknown:
        raise ValueError(
            f"The file has {len(unknown)} tensors of {len(state_dict)} that do not belong to a LoRA or DoRA of the "
            f"transformer, such as {sorted(unknown)[:NAMES_SHOWN]}; accepted are PREFIX + LAYER + END with one of the "
            f"prefixes {list(_PREFIXES)} and one of the ends {list(_PARTS)}."
        )
    if len(examples) > 1 or repeated:
        raise ValueError(
            f"The file has names of several formats: {sorted(examples.values()) + sorted(repeated)[:NAMES_SHOWN]}; "
            "accepted is one name for each tensor, all with the same prefix."
        )
    return tensors, next(iter(examples))


def is_peft_file(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """True if the names are those of peft's `save_pretrained`, which writes alpha into another file."""
    names = [str(key) for key in state_dict]
    is_peft = bool(names) and all(name.startswith(PEFT_PREFIX) for name in names)
    return is_peft and not any(name.endswith(".alpha") for name in names)


def find_targets(names: Iterable[str], prefix: str, linear_layers: Iterable[str]) -> dict[str, Target]:
    """Return what each layer in a file adapts: name in the file -> rows of a layer.

    Args:
        names: names of layers in the file.
        prefix: prefix of these names.
        linear_layers: names of the transformer's linear layers.

    Raises:
        ValueError: if two layers in the file adapt the same rows.
    """
    known: dict[str, Target] = {}
    for layer in linear_layers:
        targets = {layer: Target(layer), original_name(f"{layer}.weight").removesuffix(".weight"): Target(layer)}
        block, _, fused = layer.rpartition(".attention.")
        for family in _SPLIT_NAMES.get(fused, ()):
            for index, part in enumerate(family):
                target = Target(layer, index, len(family))
                targets |= {f"{block}.attention.{part}": target, f"{block}.{part}": target}
        for name, target in targets.items():
            own_name = name.replace(".", "_") if prefix == KOHYA_PREFIX else name
            assert known.setdefault(own_name, target) == target, own_name
    found = {name: known.get(name, Target(name)) for name in names}
    taken: dict[tuple[str, int], str] = {}
    for name, target in found.items():
        for index in range(3) if target.count == 1 else (target.index,):  # no layer has more than 3 parts
            if (other := taken.setdefault((target.layer, index), name)) != name:
                raise ValueError(f"The file has both {other} and {name}, which adapt the same rows of {target.layer}.")
    return found


def fuse_parts(
    parts: Mapping[Target, Mapping[str, torch.Tensor]], scales: Mapping[Target, float]
) -> tuple[dict[str, torch.Tensor], float]:
    """Fuse LoRA of parts of one layer to a block-diagonal one of the layer, which changes the weights equally.

    Args:
        parts: `lora_A` (r, in_features) and `lora_B` (rows of the part, r) of each part. Rows without a part stay.
        scales: factor on B A of each part.

    Returns:
        `lora_A` (sum of r, in_features), `lora_B` (out_features, sum of r), and the factor on their product.
    """
    first = next(iter(parts))
    has_one_scale = len(set(scales.values())) == 1
    scale = scales[first] if has_one_scale else 1.0
    rows = len(parts[first]["lora_B"])
    down = torch.cat([own["lora_A"] for own in parts.values()])
    dtype = down.dtype if has_one_scale else torch.float32
    up = torch.zeros(first.count * rows, len(down), dtype=dtype)
    column = 0
    for target, own in parts.items():
        block = up[target.index * rows : (target.index + 1) * rows, column : column + len(own["lora_A"])]
        block.copy_(own["lora_B"] if has_one_scale else own["lora_B"].float() * scales[target])
        column += block.shape[1]
    return {"lora_A": down, "lora_B": up}, scale


def name_tensors(
    layers: Mapping[str, Mapping[str, torch.Tensor]], alphas: Mapping[str, float], lora_format: str
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file in ComfyUI's or kohya's format.

    Args:
        layers: for each layer its tensors, see `LoraAdapter`.
        alphas: alpha of each layer.
        lora_format: "comfyui" or "kohya".

    Raises:
        ValueError: if an adapter has biases, for which these formats have no name.
    """
    kohya, named = lora_format == "kohya", {}
    ends = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"} if kohya else {}
    ends = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "dora_scale"} | ends
    for layer, tensors in layers.items():
        if "lora_B.bias" in tensors:
            raise ValueError(f"`format` is {lora_format!r}, which has no `lora_B.bias`; accepted: 'diffusers'.")
        name = KOHYA_PREFIX + layer.replace(".", "_") if kohya else f"diffusion_model.{layer}"
        for part, tensor in tensors.items():
            column = tensor[:, None] if part == "lora_magnitude_vector" else tensor
            named[f"{name}.{ends[part]}"] = column.contiguous()
        named[f"{name}.alpha"] = torch.tensor(alphas[layer], dtype=torch.float64)  # exact
    return named


def read_alpha(name: str, tensor: Any) -> float:
    """Return the alpha of a layer.

    Raises:
        ValueError: if it is not one finite number other than 0.
    """
    value = float(tensor) if isinstance(tensor, torch.Tensor) and tensor.numel() == 1 else float("nan")
    if not abs(value) < float("inf") or value == 0:
        raise ValueError(f"{name}.alpha in the file is {tensor!r}; an alpha is a finite number other than 0.")
    return value
