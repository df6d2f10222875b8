"""The arguments of one call, in one object that all pipelines hand to the same loop."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from torch.distributed import ProcessGroup

from .prompt_encoding import TextSettings
from .words import LongPrompts, PromptEnhancer, Regions, describe_regions


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallArguments:
    """Arguments of one call of a pipeline; `PRXPipelineBase.__call__` describes each."""

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    height: int | None
    width: int | None
    num_inference_steps: int
    timesteps: Sequence[float] | None
    guidance_scale: float
    num_images_per_prompt: int
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    prompt_attention_mask: torch.Tensor | None
    negative_prompt_attention_mask: torch.Tensor | None
    output_type: str
    return_dict: bool
    use_resolution_binning: bool | None
    callback_on_step_end: Callable[..., dict[str, Any] | None] | None
    callback_on_step_end_tensor_inputs: list[str] | None
    tokenizer_max_length: int | None
    skip_text_cleaning: bool | None
    sigmas: Sequence[float] | None
    self_guidance_scale: float
    guider: BaseGuidance | None
    guidance_group: ProcessGroup | None
    attention_kwargs: dict[str, Any] | None
    guide_transformer: Any
    long_prompts: LongPrompts
    prompt_weights: bool
    regions: Regions | None
    prompt_enhancer: PromptEnhancer | None
    settings_in_image: bool

    @classmethod
    def collect(cls, arguments: Mapping[str, Any], **others: Any) -> "CallArguments":
        """Take the arguments of a call out of its local variables.

        Args:
            arguments: local variables at the start of the call; other names are left out.
            others: arguments that the call does not have, or has with another value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: arguments[name] for name in names if name in arguments} | others)

    @property
    def given_embeddings(self) -> tuple[torch.Tensor | None, ...]:
        """Embeddings and mask in place of prompts, then in place of negative prompts, or None each."""
        return (
            self.prompt_embeds,
            self.prompt_attention_mask,
            self.negative_prompt_embeds,
            self.negative_prompt_attention_mask,
        )

    @property
    def text_settings(self) -> TextSettings:
        """How to read the prompts."""
        return TextSettings(self.tokenizer_max_length, self.skip_text_cleaning, self.long_prompts, self.prompt_weights)

    def describe(self) -> dict[str, Any]:
        """Return the settings that decide about the picture, for its metadata; None where one is off."""
        return {
            "num_inference_steps": int(self.num_inference_steps),
            "sigmas": self.sigmas,
            "timesteps": self.timesteps,
            "guidance_scale": self.guidance_scale,
            "guider": self.guider,
            "self_guidance_scale": self.self_guidance_scale if self.self_guidance_scale > 1 else None,
            "guide_transformer": True if self.guide_transformer is not None else None,
            "attention_kwargs": self.attention_kwargs,
            "long_prompts": self.long_prompts if self.long_prompts != "cut" else None,
            "prompt_weights": self.prompt_weights or None,
            "regions": describe_regions(self.regions),
        }
