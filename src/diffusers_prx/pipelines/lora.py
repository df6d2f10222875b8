"""LoRA adapters (arXiv 2106.09685) on the transformer of both pipelines, through diffusers' own loader."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
from diffusers.utils import unscale_lora_layers

from ..models.transformer_prx import PRXTransformer2DModel

# what files hold of an adapted layer, under the names that peft and diffusers give it
PARTS = r"lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?"
KEY = re.compile(rf"transformer\.(?P<layer>.+)\.(?P<part>{PARTS})")
SHOWN = 3  # of the layers that do not fit, so many are named


class PRXLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """`load_lora_weights` and its relatives, with the arguments that they have on every pipeline of diffusers.

    CogVideoX's mixin is the one of diffusers that adapts the component `transformer` alone and knows no names of other
    tools, which is what PRX needs too. Here stands what it lets through: files that do not fit are refused before
    anything is changed, and fusing is refused where unfusing could not give the weights back.
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
        """Load an adapter, beside those that are there.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a .safetensors file, a Hub id, or tensors by name.
            adapter_name: what `set_adapters` calls it; numbered when None.
            hotswap: put it in the place of the adapter of that name, whose ranks and layers it must have.
            weight_name: of the file; without a network it must be given for a Hub id.
            subfolder, revision, token, cache_dir, force_download, proxies, local_files_only: of the Hub, as in
                `DiffusionPipeline.from_pretrained`.
            low_cpu_mem_usage: make the layers without values before they are filled.

        Raises:
            ValueError: a file that holds something else than a LoRA or DoRA of this transformer's layers, or an
                adapter name that is taken, or `hotswap` while adapters are fused; the pipeline is as it was.
        """
        if hotswap:  # peft refuses too, and diffusers then deletes the adapter that is in the weights
            _require_unfused("hotswap", self.transformer)
        model = _unwrapped(self.transformer)
        source = pretrained_model_name_or_path_or_dict
        state_dict, metadata = self.lora_state_dict(
            dict(source) if isinstance(source, dict) else source,
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
        check_adapter(state_dict, metadata, model)
        self.load_lora_into_transformer(
            state_dict,
            transformer=model,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    def set_adapters(
        self, adapter_names: list[str] | str, adapter_weights: float | dict | list[float] | list[dict] | None = None
    ) -> None:
        """Use these adapters and no others, each with its weight (1 when None): W + sum of weight * delta.

        At weight 0 a LoRA changes nothing; a DoRA (arXiv 2402.09353) still brings its lengths of the rows, which
        `disable_lora` leaves out too.

        Raises:
            ValueError: unknown names, another number of weights, or adapters that are fused: unfusing would then take
                away something else than what was added.
        """
        _require_unfused("set_adapters", self.transformer)
        super().set_adapters(adapter_names, adapter_weights)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Forget these adapters; the others stay.

        Raises:
            ValueError: unknown names, or adapters that are fused: what was added to the weights could not be taken out
                any more.
        """
        _require_unfused("delete_adapters", self.transformer)
        super().delete_adapters(adapter_names)

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
            lora_scale: what the weights of `set_adapters` are multiplied by until `unfuse_lora`; not 0.
            safe_fusing: look for NaN before.
            adapter_names: which; the active ones when None.

        Raises:
            ValueError: a `lora_scale` while others are fused, which it would change as well; or one of 0, from which
                `unfuse_lora` could not find the weights of `set_adapters` again.
        """
        if lora_scale == 0:
            raise ValueError(
                "`lora_scale` is 0, which `unfuse_lora` cannot take back; accepted is any other number. To "
                "leave adapters out: `disable_lora`."
            )
        if lora_scale != 1 and (fused := _fused(self.transformer)):
            raise ValueError(f"`lora_scale` is {lora_scale}, but {fused} are fused already: call `unfuse_lora` first.")
        super().fuse_lora(list(components), lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self, components: list[str] | tuple[str, ...] = ("transformer",)) -> None:
        """Take what was fused out of the weights again, and the `lora_scale` back: the weights are those from before
        to the rounding of their type."""
        super().unfuse_lora(list(components))
        model = _unwrapped(self.transformer)
        unscale_lora_layers(model, getattr(model, "lora_scale", 1.0))  # diffusers leaves it
        model.lora_scale = 1.0


def check_adapter(
    state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None, transformer: Any
) -> None:
    """Refuse an adapter that is not one of this transformer.

    Args:
        state_dict: tensors by name, `transformer.LAYER.lora_A.weight` and so on.
        metadata: of the file, where it has any: the settings of its LoraConfig behind `transformer.`.
        transformer: with or without other adapters.

    Raises:
        ValueError: with what does not fit.
    """
    if not isinstance(transformer, PRXTransformer2DModel):
        raise ValueError(
            f"`transformer` is a {type(transformer).__module__}.{type(transformer).__name__}, which takes no adapters "
            "here; accepted is diffusers_prx.PRXTransformer2DModel, which loads the same files."
        )
    other = sorted(key for key in state_dict if KEY.fullmatch(key) is None)
    if other or not state_dict:
        raise ValueError(
            f"The file has {len(other)} tensors of {len(state_dict)} that are no part of a LoRA or DoRA of the "
            f"transformer, as {other[:SHOWN]}; accepted are transformer.LAYER.lora_A.weight, .lora_B.weight, "
            ".lora_B.bias and .lora_magnitude_vector."
        )
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state_dict.items():
        found: Any = KEY.fullmatch(key)
        layers.setdefault(found["layer"], {})[found["part"].removesuffix(".weight")] = tensor
    rank = None if metadata is None or metadata.get("transformer.rank_pattern") else metadata.get("transformer.r")
    wrong = [
        f"{name} {problem}" for name, parts in layers.items() if (problem := _misfit(transformer, name, parts, rank))
    ]
    if wrong:
        raise ValueError(
            f"The adapter does not fit this transformer, in {len(wrong)} of {len(layers)} layers: "
            f"{'; '.join(wrong[:SHOWN])}. It was made for another model: load it on the pipeline that it was trained "
            "on."
        )


def _misfit(transformer: Any, name: str, parts: Mapping[str, torch.Tensor], rank: int | None) -> str | None:
    """What is wrong with the adapter of one layer."""
    try:
        layer = transformer.get_submodule(name)
    except AttributeError:
        return "is not there"
    if not {"lora_A", "lora_B"} <= parts.keys():
        return f"has only {sorted(parts)} in the file"
    if not hasattr(layer, "in_features"):
        return f"is a {type(layer).__name__}, not a linear layer"
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    rank = shapes["lora_A"][0] if rank is None else rank
    wanted: dict[str, tuple[int, ...]] = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
    wanted |= {"lora_B.bias": (layer.out_features,), "lora_magnitude_vector": (layer.out_features,)}
    for part, shape in shapes.items():
        if shape != wanted[part]:
            return f"takes {part} of the shape {wanted[part]}, not {shape}"
    return None


def _unwrapped(transformer: Any) -> Any:
    return getattr(transformer, "_orig_mod", transformer)  # out of the wrapper of torch.compile


def _require_unfused(method: str, transformer: Any) -> None:
    if fused := _fused(transformer):
        raise ValueError(f"`{method}` needs `unfuse_lora` first: {fused} are fused into the weights.")


def _fused(transformer: Any) -> list[str]:
    """The adapters that are in the weights now. (What diffusers remembers as fused stays when they are unloaded.)"""
    merged = {name for module in transformer.modules() for name in getattr(module, "merged_adapters", ())}
    return sorted(merged)
