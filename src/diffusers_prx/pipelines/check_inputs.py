"""Checks of the arguments of a pipeline call. Each raises a ValueError with the value and what is accepted."""

import numbers
from typing import Any

import numpy as np
import torch
from diffusers.guiders import BaseGuidance
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from torch.distributed import ProcessGroup

from ..compat import has_cache
from ..latents import check_floating
from ..schedulers.scheduling_prx import is_number
from .check_finite import check_finite_input

DEFAULT_GUIDANCE_SCALE = 4.0


def check_flag(name: str, value: Any) -> None:
    """Check that an argument is True, False or None."""
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` is {value!r}; it must be True, False or None.")


def check_guidance(guidance_scale: Any, name: str = "guidance_scale") -> float:
    """Check and return the scale of classifier-free guidance; 0 and 1 both mean off.

    A value between them would interpolate, and one below 0 would lead away from the prompt. diffusers' PRX raises an
    error for both; its other pipelines silently treat them as off.
    """
    if not is_number(guidance_scale) or not (guidance_scale == 0 or guidance_scale >= 1):
        raise ValueError(f"`{name}` is {guidance_scale!r}; it must be a finite number above 1, or 1 or 0 (both: off).")
    return float(guidance_scale)


def check_guidance_change(new: float, old: float, guided: bool, guider: Any, cached: bool) -> None:
    """Check a new `pipeline._guidance_scale` that a step callback has set.

    Args:
        new, old: scales after and before the callback, both valid by `check_guidance`.
        guided: True if the call began with guidance and so has a negative prompt.
        guider: guider in place of the scale, or None.
        cached: True if the transformer has a cache.
    """
    if new == old:
        return
    change = f"`callback_on_step_end` set `guidance_scale` from {old} to {new}"
    if guider is not None:
        raise ValueError(f"{change}, but a `guider` guides this call: set its `start` and `stop`, or leave it out.")
    if new > 1 and not guided:
        raise ValueError(
            f"{change}, but guidance was off when the call began, and no negative prompt was encoded: begin with a"
            " `guidance_scale` above 1."
        )
    if cached and (new > 1) != (old > 1):
        raise ValueError(
            f"{change}, but the transformer has a cache, which would mix up one branch and two: call"
            " `transformer.disable_cache()`, or stay above 1."
        )


def check_guider(guider: Any, guidance_scale: Any, cached: bool) -> None:
    """Check that a guider is one of diffusers', and that no `guidance_scale` was passed as well."""
    if not isinstance(guider, BaseGuidance):
        raise ValueError(f"`guider` is a {type(guider).__name__}; it must be one of diffusers' guiders, or None.")
    if guidance_scale != DEFAULT_GUIDANCE_SCALE:
        raise ValueError(
            f"`guidance_scale` is {guidance_scale!r} and `guider` is given, which has its own scale: leave one of them"
            " out."
        )
    if cached and (guider._start > 0 or guider._stop < 1):
        raise ValueError(
            f"`guider` guides from {guider._start} to {guider._stop} of the steps, but the transformer has a cache,"
            " which would mix up one branch and two: call `transformer.disable_cache()`, or guide at all steps."
        )


def check_guidance_group(group: Any, guided: bool, transformer: Any) -> None:
    """Check that a group has two processes, and that the call has two branches for them."""
    if group is None:
        return
    if not isinstance(group, ProcessGroup) or group.size() != 2:
        received = f"a group of {group.size()}" if isinstance(group, ProcessGroup) else f"a {type(group).__name__}"
        raise ValueError(
            f"`guidance_group` is {received}; it must be a torch.distributed.ProcessGroup of two with this one."
        )
    if not guided:
        raise ValueError(
            "`guidance_group` is given, but guidance is off, so that there is one branch for two processes: leave it"
            " out, or set `guidance_scale` above 1."
        )
    if isinstance(getattr(transformer, "_cache_config", None), FirstBlockCacheConfig):
        raise ValueError(
            "`guidance_group` is given, but the transformer has a FirstBlockCache, which compares both branches"
            " together: call `transformer.disable_cache()`, or use another cache."
        )


def check_cached_steps(transformer: Any, steps: int) -> None:
    """Check that a MagCache, which has one ratio per step, was made for this number of steps."""
    config = getattr(transformer, "_cache_config", None)
    if isinstance(config, MagCacheConfig) and config.num_inference_steps != steps:
        raise ValueError(
            f"The transformer has a MagCacheConfig with `num_inference_steps` {config.num_inference_steps}, but this"
            f" call takes {steps} steps: make the config for {steps}."
        )


def check_token_route(token_route: Any, transformer: Any) -> tuple[int, int, float]:
    """Check a route against the transformer, if there is one, and return it as a tuple."""
    accepted = "(start, stop, ratio): a half-open range of blocks, and the fraction in (0, 1) of tokens that skip it"
    if not isinstance(token_route, (tuple, list)) or len(token_route) != 3:
        raise ValueError(f"`token_route` is {token_route!r}; it must be {accepted}.")
    start, stop, ratio = token_route
    integers = all(isinstance(block, numbers.Integral) and not isinstance(block, bool) for block in (start, stop))
    if not integers or not 0 <= start < stop or not is_number(ratio) or not 0 < ratio < 1:
        raise ValueError(f"`token_route` is {token_route!r}; it must be {accepted}.")
    if transformer is not None:
        depth, fusion_range = transformer.config["depth"], transformer.config.get("fusion_range")
        if stop > depth:
            raise ValueError(f"`token_route` is {token_route!r}, but the transformer has {depth} blocks.")
        if fusion_range is not None and (start, stop) != tuple(fusion_range):
            raise ValueError(
                f"`token_route` is {token_route!r}; its blocks have to be the {list(fusion_range)} that the"
                " transformer fuses (`fusion_range`)."
            )
    return int(start), int(stop), float(ratio)


def check_self_guidance(self_guidance_scale: Any, token_route: Any, guided: bool, transformer: Any) -> None:
    """Check that self-guidance is off, or that the pipeline and the other arguments allow it."""
    if not is_number(self_guidance_scale) or self_guidance_scale < 1:
        raise ValueError(
            f"`self_guidance_scale` is {self_guidance_scale!r}; it must be a finite number of at least 1 (off)."
        )
    if self_guidance_scale == 1:
        return
    if token_route is None:
        raise ValueError(
            f"`self_guidance_scale` is {self_guidance_scale!r}, but the pipeline has no `token_route`: load or make it"
            " with the route that the transformer was trained with, or leave `self_guidance_scale` out."
        )
    if guided:
        raise ValueError(
            f"`self_guidance_scale` is {self_guidance_scale!r} and `guidance_scale` is above 1; both are guidance: set"
            " `guidance_scale=1`, or leave `self_guidance_scale` out."
        )
    if has_cache(transformer):
        raise ValueError(
            f"`self_guidance_scale` is {self_guidance_scale!r}, but the transformer has a cache, which would mix up"
            " the two predictions: call `transformer.disable_cache()`, or leave `self_guidance_scale` out."
        )
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            f"`self_guidance_scale` is {self_guidance_scale!r}, but the transformer is parallel, and each process has"
            " only some of the tokens that a route takes: leave `self_guidance_scale` out."
        )


def check_generator(generator: Any, batch_size: int, device: torch.device) -> None:
    """Check that a generator, or one for each image, can draw the noise of a call on this device."""
    if isinstance(generator, list):
        if len(generator) != batch_size or not all(isinstance(entry, torch.Generator) for entry in generator):
            raise ValueError(
                f"`generator` is a list of {len(generator)}; it must be one torch.Generator, or a list of"
                f" {batch_size} (prompts x images)."
            )
    elif generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"`generator` is a {type(generator).__name__}; it must be a torch.Generator or a list of them."
        )
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    kinds = {entry.device.type for entry in generators}
    if len(kinds) > 1 or not kinds <= {"cpu", device.type}:  # noise from a CPU generator is moved to the device
        raise ValueError(
            f"`generator` is on {sorted(kinds)} and the pipeline on {device.type}; accepted are generators all on"
            " the CPU, or all on the pipeline's device."
        )


def check_callback_result(changed: Any, given: dict[str, torch.Tensor | None]) -> None:
    """Check the tensors that a step callback returned.

    Args:
        changed: return value of the callback.
        given: tensors that it may replace; None for those that this call does not have.
    """
    if not isinstance(changed, dict):
        raise ValueError(f"`callback_on_step_end` returned a {type(changed).__name__}; accepted are a dict and None.")
    for name, value in changed.items():
        current = given.get(name)
        if current is None and value is None:
            continue  # negative_prompt_embeds of a call without guidance, returned as received
        if current is None or not isinstance(value, torch.Tensor):
            accepted = [key for key, tensor in given.items() if tensor is not None]
            raise ValueError(
                f"`callback_on_step_end` returned {name!r}; accepted in this call are the tensors {accepted}."
            )
        if not value.is_floating_point():
            raise ValueError(f"`callback_on_step_end` returned `{name}` of {value.dtype}; it must be floating-point.")
        if value.shape != current.shape:
            raise ValueError(
                f"`callback_on_step_end` returned `{name}` of shape {tuple(value.shape)}; it has to stay"
                f" {tuple(current.shape)}. (diffusers' SDCFGCutoffCallback keeps one row, which fits one image; for"
                " several images, set `pipeline._guidance_scale = 0.0` in a callback of your own.)"
            )


def _is_list_of_str(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, str) for entry in value)


def check_callback(callback: Any, names: Any, accepted: list[str]) -> None:
    """Check a step callback and the names of the tensors that it receives."""
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` is a {type(callback).__name__}; it must be a function, or None.")
    if not isinstance(names, list) or not all(name in accepted for name in names):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` is {names!r}; it must be a list out of {accepted}.")


def check_prompts(
    guided: bool,
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
) -> int:
    """Check that prompts, negative prompts and embeddings fit each other; return the number of prompts."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("Pass either `prompt` or `prompt_embeds`.")
    if prompt is not None and not isinstance(prompt, str) and not _is_list_of_str(prompt):
        raise ValueError(f"`prompt` is {prompt!r}; it must be a string or a list of at least one string.")
    if not (negative_prompt is None or isinstance(negative_prompt, str) or _is_list_of_str(negative_prompt)):
        raise ValueError(f"`negative_prompt` is {negative_prompt!r}; it must be a string or a list of strings.")
    if negative_prompt and negative_prompt_embeds is not None:
        raise ValueError("Pass either `negative_prompt` or `negative_prompt_embeds`, not both.")
    count = len(prompt_embeds) if prompt_embeds is not None else 1 if isinstance(prompt, str) else len(prompt)
    if isinstance(negative_prompt, list) and len(negative_prompt) != count:
        raise ValueError(f"`negative_prompt` has {len(negative_prompt)} entries; it must be one string, or {count}.")
    if negative_prompt_embeds is not None and len(negative_prompt_embeds) != count:
        raise ValueError(
            f"`negative_prompt_embeds` has {len(negative_prompt_embeds)} rows; it has to have {count}, one per prompt."
        )
    if guided and prompt_embeds is not None and negative_prompt_embeds is None:
        raise ValueError(
            "Guidance needs `negative_prompt_embeds` along with `prompt_embeds`: pass both, or set `guidance_scale=1`."
        )
    return count


def check_embeds(name: str, embeds: Any, mask: Any, width: int | None) -> None:
    """Check embeddings (P, L, D) and their mask (P, L).

    Args:
        name: "prompt" or "negative_prompt".
        embeds: embeddings or None.
        mask: mask or None.
        width: D; None if any D fits.
    """
    if embeds is None:
        if mask is not None:
            raise ValueError(f"`{name}_attention_mask` needs `{name}_embeds`: pass both, or leave it out.")
        return
    check_floating(f"{name}_embeds", embeds)
    width = embeds.shape[-1] if width is None and embeds.ndim else width
    if embeds.ndim != 3 or embeds.shape[-1] != width or 0 in embeds.shape:
        raise ValueError(f"`{name}_embeds` is {tuple(embeds.shape)}; it must be (prompts, tokens, {width}).")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"`{name}_attention_mask` is a {type(mask).__name__}; it must be a tensor.")
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"`{name}_attention_mask` is {tuple(mask.shape)}; it must be {tuple(embeds.shape[:2])}, as"
            f" `{name}_embeds`."
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"`{name}_attention_mask` has entries other than 0 and 1; it must be true (1) where a token counts. (A"
            " mask that is added to attention scores, with 0 where a token counts, does not fit.)"
        )


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Check that `latents` are finite floating-point values of a shape."""
    check_floating("latents", latents)
    if tuple(latents.shape) != shape:
        raise ValueError(f"`latents` has the shape {tuple(latents.shape)}; for this call it must be {shape}.")
    check_finite_input("latents", latents)
