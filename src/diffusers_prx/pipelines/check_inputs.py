"""Checks of what a pipeline call is given. Each raises a ValueError with what came and what is accepted."""

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
from .check_finite import check_given

DEFAULT_GUIDANCE_SCALE = 4.0


def check_flag(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` is {value!r}; it has to be True, False or None.")


def check_guidance(guidance_scale: Any) -> float:
    """Return the scale of classifier-free guidance; 0 and 1 both mean off.

    A value between them would interpolate, and one below 0 would lead away from the prompt. diffusers' PRX refuses
    both, and its other pipelines treat both as off without a word.
    """
    if not is_number(guidance_scale) or not (guidance_scale == 0 or guidance_scale >= 1):
        raise ValueError(
            f"`guidance_scale` is {guidance_scale!r}; it has to be a finite number above 1, or 1 or 0 (both: off)."
        )
    return float(guidance_scale)


def check_guidance_change(new: float, old: float, guided: bool, guider: Any, cached: bool) -> None:
    """Check what a step callback made of `pipeline._guidance_scale` against what the call can do.

    Args:
        new, old: the scales; a setting that is no scale was refused when it was set.
        guided: the call began with guidance, so that it has a negative prompt.
        guider: guides in place of the scale, or None.
        cached: the transformer has a cache.
    """
    if new == old:
        return
    came = f"`callback_on_step_end` set `guidance_scale` from {old} to {new}"
    if guider is not None:
        raise ValueError(f"{came}, but a `guider` guides this call: set its `start` and `stop`, or leave it out.")
    if new > 1 and not guided:
        raise ValueError(
            f"{came}, but guidance was off when the call began, and no negative prompt was encoded: begin with a"
            " `guidance_scale` above 1."
        )
    if cached and (new > 1) != (old > 1):
        raise ValueError(
            f"{came}, but the transformer has a cache, which would mix up one branch and two: call"
            " `transformer.disable_cache()`, or stay above 1."
        )


def check_guider(guider: Any, guidance_scale: Any, cached: bool) -> bool:
    """Check that a guider combines nothing but two predictions, and that it alone is asked to guide; always guided."""
    if not isinstance(guider, BaseGuidance):
        raise ValueError(f"`guider` is a {type(guider).__name__}; it has to be one of diffusers' guiders, or None.")
    hooked = type(guider).prepare_models is not BaseGuidance.prepare_models
    if hooked or guider._input_predictions != ["pred_cond", "pred_uncond"]:
        raise ValueError(
            f"`guider` is a {type(guider).__name__}, which changes the network for a prediction of its own; accepted"
            " are those that combine a prediction with the prompt and one with the negative prompt."
        )
    if guidance_scale != DEFAULT_GUIDANCE_SCALE:
        raise ValueError(
            f"`guidance_scale` is {guidance_scale!r} and there is a `guider`, which has a scale of its own; leave one"
            " of them out."
        )
    if cached and (guider._start > 0 or guider._stop < 1):
        raise ValueError(
            f"`guider` guides between the shares {guider._start} and {guider._stop} of the steps, but the transformer"
            " has a cache, which would mix up one branch and two: call `transformer.disable_cache()`, or guide at all"
            " steps."
        )
    return True


def check_guidance_group(group: Any, guided: bool, transformer: Any) -> None:
    """Check that there are two branches for the two processes, which draw what one would."""
    if group is None:
        return
    if not isinstance(group, ProcessGroup) or group.size() != 2:
        came = f"a group of {group.size()}" if isinstance(group, ProcessGroup) else f"a {type(group).__name__}"
        raise ValueError(
            f"`guidance_group` is {came}; it has to be a torch.distributed.ProcessGroup of two, this process in it."
        )
    if not guided:
        raise ValueError(
            "`guidance_group` came with guidance off, so that there is one branch for two processes; leave it out, or"
            " set `guidance_scale` above 1."
        )
    if isinstance(getattr(transformer, "_cache_config", None), FirstBlockCacheConfig):
        raise ValueError(
            "`guidance_group` came, but the transformer has a FirstBlockCache, which judges both branches together:"
            " call `transformer.disable_cache()`, or use another cache."
        )


def check_cached_steps(transformer: Any, steps: int) -> None:
    """Check that a MagCache, which has a ratio for every step, is for this number of them."""
    config = getattr(transformer, "_cache_config", None)
    if isinstance(config, MagCacheConfig) and config.num_inference_steps != steps:
        raise ValueError(
            f"the transformer has a MagCacheConfig with a `num_inference_steps` of {config.num_inference_steps}, but"
            f" this call takes {steps} steps: make it for {steps}."
        )


def check_token_route(token_route: Any, transformer: Any) -> tuple[int, int, float]:
    """Check a route against the transformer that it is for (None: not there to ask); as a tuple, whatever came."""
    wanted = "(start, stop, ratio): a half-open range of blocks, and the share in (0, 1) of the tokens that skips it"
    if not isinstance(token_route, (tuple, list)) or len(token_route) != 3:
        raise ValueError(f"`token_route` is {token_route!r}; it has to be {wanted}.")
    start, stop, ratio = token_route
    whole = all(isinstance(block, numbers.Integral) and not isinstance(block, bool) for block in (start, stop))
    if not whole or not 0 <= start < stop or not is_number(ratio) or not 0 < ratio < 1:
        raise ValueError(f"`token_route` is {token_route!r}; it has to be {wanted}.")
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
    if not is_number(self_guidance_scale) or self_guidance_scale < 1:
        raise ValueError(
            f"`self_guidance_scale` is {self_guidance_scale!r}; it has to be a finite number of at least 1 (off)."
        )
    if self_guidance_scale == 1:
        return
    if token_route is None:
        raise ValueError(
            f"`self_guidance_scale` is {self_guidance_scale!r}, but no `token_route` is known: load or make the"
            " pipeline with the route that the network was trained with, or leave `self_guidance_scale` out."
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
            f"`self_guidance_scale` is {self_guidance_scale!r}, but of the tokens that its route takes each process of"
            " a parallel transformer has a share only; leave `self_guidance_scale` out."
        )


def check_generator(generator: Any, batch_size: int, device: torch.device) -> None:
    """Check that a generator, or one for each image, can draw the noise of a call on this device."""
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
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    kinds = {entry.device.type for entry in generators}
    if len(kinds) > 1 or not kinds <= {"cpu", device.type}:  # noise of the CPU's is moved to the device
        raise ValueError(
            f"`generator` is on {sorted(kinds)}, and the call on {device.type}; accepted are generators on the CPU, or"
            " all of them on the device of the call."
        )


def check_callback_result(changed: Any, given: dict[str, torch.Tensor | None]) -> None:
    """Check what a step callback returned against what it may change."""
    if not isinstance(changed, dict):
        raise ValueError(f"`callback_on_step_end` returned a {type(changed).__name__}; accepted are a dict and None.")
    for name, value in changed.items():
        ours = given.get(name)
        if ours is None and value is None:
            continue  # negative_prompt_embeds of a call without guidance, as it was given
        if ours is None or not isinstance(value, torch.Tensor):
            accepted = [key for key, tensor in given.items() if tensor is not None]
            raise ValueError(
                f"`callback_on_step_end` returned {name!r}; accepted in this call are the tensors {accepted}."
            )
        if not value.is_floating_point():
            raise ValueError(
                f"`callback_on_step_end` returned `{name}` of {value.dtype}; it has to be floating-point."
            )
        if value.shape != ours.shape:
            raise ValueError(
                f"`callback_on_step_end` returned `{name}` of shape {tuple(value.shape)}; it has to stay"
                f" {tuple(ours.shape)}. (diffusers' SDCFGCutoffCallback keeps one row, which fits calls for one image;"
                " for several, set `pipeline._guidance_scale = 0.0` in a callback of your own.)"
            )


def _is_list_of_str(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, str) for entry in value)


def check_callback(callback: Any, names: Any, accepted: list[str]) -> None:
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` is a {type(callback).__name__}; it has to be a function, or None.")
    if not isinstance(names, list) or not all(name in accepted for name in names):
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


def check_embeds(name: str, embeds: Any, mask: Any, width: int | None) -> None:
    """Check embeddings and their mask, of a prompt or a negative prompt; a width of None fits any."""
    if embeds is None:
        if mask is not None:
            raise ValueError(f"`{name}_attention_mask` came without `{name}_embeds`; leave it out, or give both.")
        return
    check_floating(f"{name}_embeds", embeds)
    width = embeds.shape[-1] if width is None and embeds.ndim else width
    if embeds.ndim != 3 or embeds.shape[-1] != width or 0 in embeds.shape:
        raise ValueError(f"`{name}_embeds` is {tuple(embeds.shape)}; it has to be (prompts, tokens, {width}).")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"`{name}_attention_mask` is a {type(mask).__name__}; it has to be a tensor.")
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"`{name}_attention_mask` is {tuple(mask.shape)}; it has to be {tuple(embeds.shape[:2])}, as"
            f" `{name}_embeds`."
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"`{name}_attention_mask` has entries other than 0 and 1; it has to be true (1) where a token counts. (One"
            " that is added to the scores of attention, 0 where a token counts, says the opposite.)"
        )


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    check_floating("latents", latents)
    if tuple(latents.shape) != shape:
        raise ValueError(f"`latents` has the shape {tuple(latents.shape)}; for this call it has to be {shape}.")
    check_given("latents", latents)
