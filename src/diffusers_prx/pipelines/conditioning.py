"""Text and noise levels as arguments of the transformer.

Our transformer computes what no step changes once per call: keys and values of the text (`PRXTextContext`) and the
modulation of all steps (`PRXTimeContext`). Stock diffusers' transformer gets embeddings and a timestep at every step.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..compat import is_group_offloaded, unwrap_compiled
from ..models.transformer_prx import PRXTextContext
from ..text import used_range


@dataclass(frozen=True)
class TextBranch:
    """Encoded texts.

    Args:
        embeds: (B, L, D).
        mask: bool (B, L), true where a token counts; or (B, N, L), true where it counts for an image token.
        value_weights: (B, L), factors of the tokens' values; None: all 1.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    value_weights: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TextBranch":
        """Return the texts with a function of rows applied to each tensor."""
        weights = None if self.value_weights is None else function(self.value_weights)
        return TextBranch(function(self.embeds), function(self.mask), weights)

    def rows(self, start: int, stop: int) -> "TextBranch":
        """Return the rows [start, stop)."""
        return self.map(lambda tensor: tensor[start:stop])

    def weights(self) -> torch.Tensor:
        """Return the factors of the values, (B, L)."""
        return self.embeds.new_ones(self.embeds.shape[:2]) if self.value_weights is None else self.value_weights


@dataclass(frozen=True)
class PromptEmbeddings:
    """Encoded prompts, and encoded negative prompts if there is guidance.

    Args:
        prompt_embeds: (B, L, D).
        prompt_mask: bool (B, L) or (B, N, L), see `TextBranch`.
        negative_prompt_embeds: (B, L', D), or None without guidance.
        negative_prompt_mask: bool (B, L'), or None.
        prompt_weights: (B, L), or None, see `TextBranch`.
        negative_prompt_weights: (B, L'), or None.
    """

    prompt_embeds: torch.Tensor
    prompt_mask: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None = None
    negative_prompt_mask: torch.Tensor | None = None
    prompt_weights: torch.Tensor | None = None
    negative_prompt_weights: torch.Tensor | None = None

    def branches(self, dtype: torch.dtype) -> list[TextBranch]:
        """Return the branches of guidance: negative prompts, if any, then prompts."""
        branches = [TextBranch(self.prompt_embeds.to(dtype), self.prompt_mask, self.prompt_weights)]
        if self.negative_prompt_embeds is not None and self.negative_prompt_mask is not None:
            negative = self.negative_prompt_embeds.to(dtype)
            branches.insert(0, TextBranch(negative, self.negative_prompt_mask, self.negative_prompt_weights))
        return branches


@dataclass(frozen=True)
class Conditioning:
    """Text arguments of the transformer for G branches of guidance: negative prompts, if any, then prompts.

    Args:
        num_branches: G, 1 or 2.
        text_contexts: keys and values of each branch; empty for a transformer that takes embeddings.
        encoder_hidden_states: (G * B, L, D), or None with `text_contexts`.
        attention_mask: bool (G * B, L) or (G * B, N, L), or None if no token is padding.
        text_value_weights: (G * B, L), or None if all are 1.
        guide: text arguments of a weaker transformer that guides, or None.
    """

    num_branches: int
    text_contexts: tuple[PRXTextContext, ...] = ()
    encoder_hidden_states: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    text_value_weights: torch.Tensor | None = None
    guide: "Conditioning | None" = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the transformer."""
        if self.text_contexts:
            return {"text_context": self.text_contexts}
        arguments = {"encoder_hidden_states": self.encoder_hidden_states, "attention_mask": self.attention_mask}
        if self.text_value_weights is not None:  # stock's transformer has no such argument
            arguments["text_value_weights"] = self.text_value_weights
        return arguments

    def branch(self, index: int) -> "Conditioning":
        """Return one branch: 0 is the first, -1 the prompts."""
        if self.num_branches == 1:
            return self
        if self.text_contexts:
            return Conditioning(1, (self.text_contexts[index],))
        tensors = (self.encoder_hidden_states, self.attention_mask, self.text_value_weights)
        own = [None if tensor is None else tensor.chunk(2)[index] for tensor in tensors]
        return Conditioning(1, (), own[0], own[1], own[2])


def supports_contexts(transformer: Any) -> bool:
    """True if the transformer can compute text and time contexts once per call.

    Stock's transformer has none. Under group offloading, or sharded over processes, a block's weights are available
    only while the block runs, so that it projects its text at every step, as in training.
    """
    transformer = unwrap_compiled(transformer)
    parameters = inspect.signature(transformer.forward).parameters
    is_sharded = hasattr(transformer, "unshard")  # torch's FSDPModule
    takes_contexts = {"text_context", "time_context"} <= parameters.keys()
    return takes_contexts and not is_group_offloaded(transformer) and not is_sharded


def encode_conditioning(transformer: Any, branches: list[TextBranch], height: int, width: int) -> Conditioning:
    """Compute the text arguments of all steps.

    Args:
        transformer: our transformer or stock diffusers'.
        branches: branches of guidance, see `PromptEmbeddings.branches`.
        height: h of the latents.
        width: w of the latents.

    Raises:
        ValueError: if the texts have weights or regions, which only our transformer takes.
    """
    # attention without a mask is faster
    if supports_contexts(transformer):
        contexts = []  # each with B rows, or 1 row that serves all
        for branch in branches:
            text = trim_branch(_merge_equal_rows(branch))
            mask = None if bool(text.mask.all()) else text.mask
            weights = {} if text.value_weights is None else {"text_value_weights": text.value_weights}
            size = {"height": height, "width": width}
            contexts.append(transformer.encode_text_context(text.embeds, mask, **size, **weights))
        return Conditioning(len(branches), tuple(contexts))
    stacked = stack_texts(branches)  # (G * B, L, D), (G * B, L) and (G * B, L)
    if stacked.value_weights is not None or stacked.mask.ndim == 3:
        check_accepts(transformer, "text_value_weights", "`prompt_weights` or `regions`")
    mask = None if bool(stacked.mask.all()) else stacked.mask
    return Conditioning(len(branches), (), stacked.embeds, mask, stacked.value_weights)


def check_accepts(transformer: Any, argument: str, given: str) -> None:
    """Raise a ValueError that names what was given if the transformer's forward has no such argument."""
    parameters = inspect.signature(unwrap_compiled(transformer).forward).parameters.values()
    if not any(parameter.name == argument or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(
            f"{given} needs a transformer of this package, but `transformer` is a {type(transformer).__module__}."
            f"{type(transformer).__name__}: load it as diffusers_prx.PRXTransformer2DModel, or leave this out."
        )


def encode_timesteps(
    transformer: Any, sigmas: torch.Tensor, latents: torch.Tensor, guidance_scale: float | None = None
) -> list[dict[str, Any]]:
    """Return the time arguments of each step.

    Args:
        transformer: our transformer or stock diffusers'.
        sigmas: (n,) noise levels of the n steps.
        latents: (B, C, h, w), for device and size.
        guidance_scale: scale that the transformer takes as an input; None if it does not.
    """
    sigmas = sigmas.to(latents.device)
    guidance = {} if guidance_scale is None else {"guidance": sigmas.new_tensor([guidance_scale])}
    if supports_contexts(transformer):
        contexts = transformer.encode_timesteps(sigmas, *latents.shape[-2:], **guidance)
        return [{"time_context": contexts.at(step)} for step in range(len(sigmas))]
    return [{"timestep": sigma[None], **guidance} for sigma in sigmas]


def embeds_guidance(transformer: Any) -> bool:
    """True if the transformer takes the guidance scale as an input."""
    return bool(transformer.config.get("guidance_embeds"))


def _merge_equal_rows(text: TextBranch) -> TextBranch:
    """Return the first row if all B rows are equal, as negative prompts usually are; else all rows."""
    tensors = (text.embeds, text.mask, text.value_weights)
    equal = all(tensor is None or bool((tensor == tensor[:1]).all()) for tensor in tensors)
    return text.map(lambda tensor: tensor[:1]) if equal else text


def with_full_mask(embeds: torch.Tensor, mask: torch.Tensor | None) -> TextBranch:
    """Return embeddings (B, L, D) with their mask on one device; no mask means that all tokens count."""
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
    return TextBranch(embeds, mask.to(embeds.device, torch.bool))


def trim_branch(text: TextBranch) -> TextBranch:
    """Cut away positions on both sides that are padding in every row. The transformer's prediction stays the same."""
    start, stop = used_range(text.mask.flatten(0, -2))
    weights = None if text.value_weights is None else text.value_weights[:, start:stop]
    return TextBranch(text.embeds[:, start:stop], text.mask[..., start:stop], weights)


def stack_texts(parts: list[TextBranch]) -> TextBranch:
    """Stack texts of different L; shorter ones are padded on the right."""
    longest, pad = max(part.mask.shape[-1] for part in parts), torch.nn.functional.pad
    gaps = [longest - part.mask.shape[-1] for part in parts]
    embeds = torch.cat([pad(part.embeds, (0, 0, 0, gap)) for part, gap in zip(parts, gaps)])
    masks = [pad(part.mask, (0, gap), value=False) for part, gap in zip(parts, gaps)]
    tokens = max((mask.shape[1] for mask in masks if mask.ndim == 3), default=None)
    if tokens is not None:  # masks per image token beside those for all of them
        masks = [mask if mask.ndim == 3 else mask[:, None].expand(-1, tokens, -1) for mask in masks]
    weights = None
    if any(part.value_weights is not None for part in parts):
        weights = torch.cat([pad(part.weights(), (0, gap), value=1.0) for part, gap in zip(parts, gaps)])
    return TextBranch(embeds, torch.cat(masks), weights)
