"""Text and noise levels as arguments of the transformer.

Our transformer computes what no step changes once per call: keys and values of the text (`PRXTextContext`) and the
modulation of all steps (`PRXTimeContext`). Stock diffusers' transformer gets embeddings and a timestep at every step.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from ..compat import is_group_offloaded, unwrap_compiled
from ..models.transformer_prx import PRXTextContext
from ..text import trim_text


@dataclass(frozen=True)
class PromptEmbeddings:
    """Encoded prompts, and encoded negative prompts if there is guidance.

    Args:
        prompt_embeds: (B, L, D).
        prompt_mask: bool (B, L), true where a token counts.
        negative_prompt_embeds: (B, L, D), or None without guidance.
        negative_prompt_mask: bool (B, L), or None.
    """

    prompt_embeds: torch.Tensor
    prompt_mask: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None
    negative_prompt_mask: torch.Tensor | None

    def branches(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (embeddings, mask) of each branch of guidance: negative prompts, if any, then prompts."""
        branches = [(self.prompt_embeds.to(dtype), self.prompt_mask)]
        if self.negative_prompt_embeds is not None and self.negative_prompt_mask is not None:
            branches.insert(0, (self.negative_prompt_embeds.to(dtype), self.negative_prompt_mask))
        return branches


@dataclass(frozen=True)
class Conditioning:
    """Text arguments of the transformer for G branches of guidance: negative prompts, if any, then prompts.

    Args:
        num_branches: G, 1 or 2.
        text_contexts: keys and values of each branch; empty for a transformer that takes embeddings.
        encoder_hidden_states: (G * B, L, D), or None with `text_contexts`.
        attention_mask: bool (G * B, L), or None if no token is padding.
    """

    num_branches: int
    text_contexts: tuple[PRXTextContext, ...] = ()
    encoder_hidden_states: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the transformer."""
        if self.text_contexts:
            return {"text_context": self.text_contexts}
        return {"encoder_hidden_states": self.encoder_hidden_states, "attention_mask": self.attention_mask}

    def branch(self, index: int) -> "Conditioning":
        """Return one branch: 0 is the first, -1 the prompts."""
        if self.num_branches == 1:
            return self
        if self.text_contexts:
            return Conditioning(1, (self.text_contexts[index],))
        assert self.encoder_hidden_states is not None
        mask = self.attention_mask
        return Conditioning(
            1,
            encoder_hidden_states=self.encoder_hidden_states.chunk(2)[index],
            attention_mask=None if mask is None else mask.chunk(2)[index],
        )


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


def encode_conditioning(
    transformer: Any, branches: list[tuple[torch.Tensor, torch.Tensor]], height: int, width: int
) -> Conditioning:
    """Compute the text arguments of all steps.

    Args:
        transformer: our transformer or stock diffusers'.
        branches: (embeddings, mask) of each branch of guidance, see `PromptEmbeddings.branches`.
        height: h of the latents.
        width: w of the latents.
    """
    if supports_contexts(transformer):
        contexts = []  # each with B rows, or 1 row that serves all
        for embeds, mask in branches:
            embeds, trimmed_mask = trim_text(*_merge_equal_rows(embeds, mask))
            contexts.append(transformer.encode_text_context(embeds, trimmed_mask, height=height, width=width))
        return Conditioning(len(branches), tuple(contexts))
    embeds, mask = (torch.cat(parts) for parts in zip(*branches))  # (G * B, L, D) and (G * B, L)
    # attention without a mask is faster
    return Conditioning(len(branches), encoder_hidden_states=embeds, attention_mask=None if bool(mask.all()) else mask)


def encode_timesteps(transformer: Any, sigmas: torch.Tensor, latents: torch.Tensor) -> list[dict[str, Any]]:
    """Return the time arguments of each step.

    Args:
        transformer: our transformer or stock diffusers'.
        sigmas: (n,) noise levels of the n steps.
        latents: (B, C, h, w), for device and size.
    """
    sigmas = sigmas.to(latents.device)
    if supports_contexts(transformer):
        contexts = transformer.encode_timesteps(sigmas, *latents.shape[-2:])
        return [{"time_context": contexts.at(step)} for step in range(len(sigmas))]
    return [{"timestep": sigma[None]} for sigma in sigmas]


def _merge_equal_rows(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first row if all B rows are equal, as negative prompts usually are; else all rows."""
    equal = bool((embeds == embeds[:1]).all() and (mask == mask[:1]).all())
    return (embeds[:1], mask[:1]) if equal else (embeds, mask)


def with_full_mask(embeds: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings (B, L, D) and their bool mask (B, L) on one device; no mask means that all tokens count."""
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
    return embeds, mask.to(embeds.device, torch.bool)


def stack_texts(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack embeddings (B, L, D) and masks (B, L) of different L; shorter ones are padded on the right."""
    longest = max(mask.shape[1] for _, mask in parts)
    pad = torch.nn.functional.pad
    embeds = [pad(embeds, (0, 0, 0, longest - embeds.shape[1])) for embeds, _ in parts]
    masks = [pad(mask, (0, longest - mask.shape[1]), value=False) for _, mask in parts]
    return torch.cat(embeds), torch.cat(masks)
