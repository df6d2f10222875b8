"""Checks of what a pipeline call is given. Each raises a ValueError with what came and what is accepted."""

import math
from typing import Any

import torch


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; it has to be a whole number of at least 1.")


def check_guidance(guidance_scale: Any) -> bool:
    number = isinstance(guidance_scale, (int, float)) and not isinstance(guidance_scale, bool)
    if not number or not 1 <= guidance_scale < math.inf:
        raise ValueError(f"`guidance_scale` is {guidance_scale!r}; it has to be a finite number of at least 1 (off).")
    return guidance_scale > 1


def check_generator(generator: Any, batch_size: int) -> None:
    if isinstance(generator, list):
        if len(generator) != batch_size or not all(isinstance(entry, torch.Generator) for entry in generator):
            raise ValueError(
                f"`generator` is a list of {len(generator)}; it has to be one torch.Generator, or a list of"
                f" {batch_size} (prompts x images)."
            )
    elif generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"`generator` is a {type(generator).__name__}; it has to be a torch.Generator or a list of them."
        )


def check_callback_result(changed: Any, given: dict[str, torch.Tensor | None]) -> None:
    """Check what a step callback returned against what it may change."""
    if not isinstance(changed, dict):
        raise ValueError(f"`callback_on_step_end` returned a {type(changed).__name__}; accepted are a dict and None.")
    for name, value in changed.items():
        ours = given.get(name)
        if ours is None or not isinstance(value, torch.Tensor):
            accepted = [key for key, tensor in given.items() if tensor is not None]
            raise ValueError(
                f"`callback_on_step_end` returned {name!r}; accepted in this call are the tensors {accepted}."
            )
        if value.shape != ours.shape:
            raise ValueError(
                f"`callback_on_step_end` returned `{name}` of shape {tuple(value.shape)}; it has to stay"
                f" {tuple(ours.shape)}."
            )


def _is_list_of_str(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, str) for entry in value)


def check_callback_names(names: Any, accepted: list[str]) -> None:
    if not isinstance(names, list) or not set(names) <= set(accepted):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` is {names!r}; it has to be a list out of {accepted}.")


def check_prompts(
    guided: bool,
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
) -> int:
    """Check that prompts, negative prompts and embeddings fit each other; the number of prompts."""
    if (prompt is None) == (prompt_embeds is None):
        came = "neither" if prompt is None else "both"
        raise ValueError(f"{came} of `prompt` and `prompt_embeds` came; give exactly one of them.")
    if prompt is not None and not isinstance(prompt, str) and not _is_list_of_str(prompt):
        raise ValueError(f"`prompt` is {prompt!r}; it has to be a string or a list of at least one string.")
    if not (negative_prompt is None or isinstance(negative_prompt, str) or _is_list_of_str(negative_prompt)):
        raise ValueError(f"`negative_prompt` is {negative_prompt!r}; it has to be a string or a list of strings.")
    if negative_prompt and negative_prompt_embeds is not None:
        raise ValueError("both `negative_prompt` and `negative_prompt_embeds` came; give one of them.")
    count = len(prompt_embeds) if prompt_embeds is not None else 1 if isinstance(prompt, str) else len(prompt)
    if isinstance(negative_prompt, list) and len(negative_prompt) != count:
        raise ValueError(f"`negative_prompt` has {len(negative_prompt)} entries; it has to be one string, or {count}.")
    if negative_prompt_embeds is not None and len(negative_prompt_embeds) != count:
        raise ValueError(
            f"`negative_prompt_embeds` has {len(negative_prompt_embeds)} rows; it has to have {count}, one per prompt."
        )
    if guided and prompt_embeds is not None and negative_prompt_embeds is None:
        raise ValueError(
            "`prompt_embeds` came without `negative_prompt_embeds`; guidance needs both, or set `guidance_scale=1`."
        )
    return count


def check_embeds(name: str, embeds: torch.Tensor | None, mask: torch.Tensor | None, width: int) -> None:
    if embeds is None:
        if mask is not None:
            raise ValueError(f"`{name}_attention_mask` came without `{name}_embeds`; leave it out, or give both.")
        return
    if embeds.ndim != 3 or embeds.shape[-1] != width or 0 in embeds.shape:
        raise ValueError(f"`{name}_embeds` is {tuple(embeds.shape)}; it has to be (prompts, tokens, {width}).")
    if mask is not None and mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"`{name}_attention_mask` is {tuple(mask.shape)}; it has to be {tuple(embeds.shape[:2])}, as"
            f" `{name}_embeds`."
        )
