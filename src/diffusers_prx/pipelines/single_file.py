"""`from_single_file` of both pipelines: the transformer from one file, other components from elsewhere."""

import inspect
import os
from typing import Any

import torch

from ..latents import latent_channels
from ..models.transformer_prx import PRXTransformer2DModel

# arguments that say where and how to download
_HUB = ("token", "cache_dir", "force_download", "proxies", "local_files_only")


class PRXSingleFileLoaderMixin:
    """`from_single_file` with diffusers' calling convention."""

    @classmethod
    def from_single_file(
        cls: Any,
        pretrained_model_link_or_path: str | os.PathLike,
        *,
        config: str | os.PathLike | None = None,
        torch_dtype: torch.dtype | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a pipeline whose transformer is in one file, with the original's names or those of this package.

        Args:
            pretrained_model_link_or_path: .safetensors or .gguf file, or its address on the Hub.
            config: folder or Hub id of a pipeline. It gives the components that you do not pass, the settings, and
                the transformer's configuration. None: pass `scheduler`, `text_encoder`, `tokenizer` and, for latents,
                `vae`.
            torch_dtype: dtype of the transformer and of components from `config`. None: float32.
            quantization_config: see `PRXTransformer2DModel.from_single_file`.
            kwargs: components and settings of the pipeline, and other arguments of
                `PRXTransformer2DModel.from_single_file`.

        Raises:
            ValueError: if a component is missing, or the file is not a PRX transformer that fits the others.

        Example:
            >>> pipe = PRXPipeline.from_single_file("prx.safetensors", config="Photoroom/prx-512-t2i-sft")
        """
        parameters = inspect.signature(cls.__init__).parameters
        parts = {name: kwargs.pop(name) for name in list(kwargs) if name in parameters}
        if config is None:
            needed = {"scheduler", "text_encoder", "tokenizer"} | ({"vae"} & parameters.keys())
            if missing := sorted(needed - parts.keys()):
                raise ValueError(
                    f"`config` is None and {missing} are missing; pass them, or `config`, a PRX pipeline."
                )
            kwargs.setdefault("in_channels", latent_channels(parts.get("vae")))
        transformer = PRXTransformer2DModel.from_single_file(
            pretrained_model_link_or_path,
            config=config,
            torch_dtype=torch_dtype,
            quantization_config=quantization_config,
            **kwargs,
        )
        if config is None:
            return cls(transformer=transformer, **parts)
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        if "config_revision" in kwargs:
            hub["revision"] = kwargs["config_revision"]
        return cls.from_pretrained(str(config), transformer=transformer, torch_dtype=torch_dtype, **parts, **hub)
