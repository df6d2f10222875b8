"""The prompts of a call: read, cleaned, tokenized, encoded and stacked."""

import dataclasses
from typing import Any, ClassVar

import torch
from diffusers.utils import logging

from ..prompt_cleaning import CLEANERS, CaptionCleaning
from ..schedulers.scheduling_prx import check_count
from ..text import encode_text, find_truncated, tokenize_prompts, tokenize_windows, trim_tokens
from .check_finite import check_finite_input, check_finite_output
from .check_inputs import check_embeds, check_flag, check_prompts
from .conditioning import PromptEmbeddings, TextBranch, stack_texts, trim_branch, with_full_mask
from .words import (
    LONG_PROMPTS,
    LongPrompts,
    PromptEnhancer,
    WeightedPrompt,
    clean_spans,
    enhance_prompts,
    join_regions,
    join_windows,
    parse_weights,
    weigh_tokens,
)

logger = logging.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How to read the texts of a call.

    Args:
        max_length: number of text tokens; the pipeline's own when None.
        skip_text_cleaning, long_prompts: see the call.
        prompt_weights: True to read weights of words.
    """

    max_length: int | None = None
    skip_text_cleaning: bool | None = None
    long_prompts: LongPrompts = "cut"
    prompt_weights: bool = False

    def check(self) -> None:
        """Raise a ValueError if a setting is not as described."""
        if self.max_length is not None:
            check_count("tokenizer_max_length", self.max_length)
        check_flag("skip_text_cleaning", self.skip_text_cleaning)
        check_flag("prompt_weights", self.prompt_weights)
        if self.long_prompts not in LONG_PROMPTS:
            raise ValueError(f"`long_prompts` is {self.long_prompts!r}; accepted are {list(LONG_PROMPTS)}.")

    def cleaning(self, own: CaptionCleaning) -> CaptionCleaning:
        """Return the cleaning of the prompts, from the pipeline's own."""
        if self.skip_text_cleaning:
            return "light"
        if self.skip_text_cleaning is not None and own == "light":
            return "full_v1"  # as in diffusers
        return own


class PRXPromptMixin:
    """Encode the prompts of a call. Part of `PRXPipelineBase`."""

    default_caption_cleaning: ClassVar[CaptionCleaning]

    config: Any
    transformer: Any
    text_encoder: Any
    tokenizer: Any
    _execution_device: Any

    @property
    def max_tokens(self) -> int:
        """Number of text tokens, unless a call sets `tokenizer_max_length`."""
        raise NotImplementedError

    @property
    def caption_cleaning(self) -> CaptionCleaning:
        """Cleaning of prompts: that of the captions in training (see `prompt_cleaning`)."""
        return self.config.get("caption_cleaning") or self.default_caption_cleaning

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        device: torch.device | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = "",
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        tokenizer_max_length: int | None = None,
        skip_text_cleaning: bool | None = None,
        long_prompts: LongPrompts = "cut",
        prompt_enhancer: PromptEnhancer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Encode prompts and negative prompts, or complete embeddings that were encoded before.

        Args:
            prompt: one prompt or a list of P prompts; or pass `prompt_embeds`.
            device: device of the result; the pipeline's when None.
            do_classifier_free_guidance: False to leave out negative prompts.
            negative_prompt: one for all prompts, or a list of P.
            num_images_per_prompt: rows per prompt, in the order p0, p0, p1, p1.
            prompt_embeds, negative_prompt_embeds: (P, L, D), in place of texts.
            prompt_attention_mask, negative_prompt_attention_mask: (P, L) of these, true where a token counts.
            tokenizer_max_length: number of text tokens; the pipeline's own when None.
            skip_text_cleaning, long_prompts, prompt_enhancer: see the call.

        Returns:
            Embeddings (B, L, D) and bool mask (B, L) of the prompts, with B = P * `num_images_per_prompt`, then the
            same of the negative prompts, or None and None without guidance. Both have the same L; positions that are
            padding in all rows are cut away.

        Raises:
            ValueError: if an argument is not as described, the pipeline has no `text_encoder` or `tokenizer` for a
                text, or embeddings are not finite.

        Example:
            >>> embeds, mask, negative_embeds, negative_mask = pipe.encode_prompt("a red cat")
            >>> image = pipe(
            ...     prompt_embeds=embeds, prompt_attention_mask=mask,
            ...     negative_prompt_embeds=negative_embeds, negative_prompt_attention_mask=negative_mask,
            ... ).images[0]
        """
        encoded = self._encode_prompts(
            enhance_prompts(prompt, prompt_enhancer),
            self._execution_device if device is None else device,
            do_classifier_free_guidance,
            negative_prompt,
            num_images_per_prompt,
            (prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask),
            TextSettings(tokenizer_max_length, skip_text_cleaning, long_prompts),
        )
        return (
            encoded.prompt_embeds,
            encoded.prompt_mask,
            encoded.negative_prompt_embeds,
            encoded.negative_prompt_mask,
        )

    def _encode_prompts(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        do_guidance: bool,
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        given: tuple[torch.Tensor | None, ...],
        settings: TextSettings,
        regions: list[str] | None = None,
        members: torch.Tensor | None = None,
    ) -> PromptEmbeddings:
        """Encode the texts of a call, B rows each; see `encode_prompt`.

        Args:
            given: embeddings and mask in place of prompts, then in place of negative prompts, or None each.
            settings: how to read the texts.
            regions: R prompts of regions, or None.
            members: bool (R, N), image tokens of each region.
        """
        num_images_per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        settings.check()
        text_width = None if self.transformer is None else self.transformer.config["context_in_dim"]
        embeds, mask, negative_embeds, negative_mask = given
        check_embeds("prompt", embeds, mask, text_width)
        check_embeds("negative_prompt", negative_embeds, negative_mask, text_width)
        check_prompts(False, prompt, negative_prompt, embeds, negative_embeds)
        texts: list[str] = [prompt] if isinstance(prompt, str) else list(prompt or [])
        num_prompts = len(texts) if embeds is None else len(embeds)
        if do_guidance and negative_embeds is None:
            if isinstance(negative_prompt, list):
                texts += negative_prompt
            else:
                texts += [negative_prompt or ""] * num_prompts
        parts: list[TextBranch] = []
        areas: TextBranch | None = None
        if texts or regions:
            both = texts + (regions or [])
            encoded = self._encode_texts(both, device, settings)
            stop = len(texts)
            parts = [encoded.rows(start, start + num_prompts) for start in range(0, stop, num_prompts)]
            areas = encoded.rows(stop, len(both))
        if embeds is not None:
            check_finite_input("prompt_embeds", embeds)
            parts.insert(0, with_full_mask(embeds.to(device), mask))
        if do_guidance and negative_embeds is not None:
            check_finite_input("negative_prompt_embeds", negative_embeds)
            parts.append(with_full_mask(negative_embeds.to(device), negative_mask))
        stacked = trim_branch(stack_texts(parts))  # (P or 2P, L, D)
        stacked = stacked.map(lambda x: x.repeat_interleave(num_images_per_prompt, dim=0))  # (B or 2B, L, D)
        rows = num_prompts * num_images_per_prompt
        positive, negative = stacked.rows(0, rows), stacked.rows(rows, 2 * rows)  # (B, L, D) each
        if regions and members is not None and areas is not None:
            positive = join_regions(positive, areas, members)  # (B, K, D)
        if not do_guidance:
            return PromptEmbeddings(positive.embeds, positive.mask, prompt_weights=positive.value_weights)
        return PromptEmbeddings(
            positive.embeds,
            positive.mask,
            negative.embeds,
            negative.mask,
            positive.value_weights,
            negative.value_weights,
        )

    def _encode_texts(self, texts: list[str], device: torch.device, settings: TextSettings) -> TextBranch:
        """Clean, tokenize and encode texts (B, L, D)."""
        for name in ("text_encoder", "tokenizer"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"The pipeline has no `{name}`, but there are {len(texts)} prompts to encode. Load it with one, or"
                    " pass `prompt_embeds` and, with guidance, `negative_prompt_embeds`."
                )
        cleaning = settings.cleaning(self.caption_cleaning)
        clean, long_prompts, prompt_weights = CLEANERS[cleaning], settings.long_prompts, settings.prompt_weights
        # encode equal texts once: a negative prompt is usually the same for the whole batch
        unique = list(dict.fromkeys(texts))
        rows = [unique.index(text) for text in texts]
        weighted = [parse_weights(text) if prompt_weights else WeightedPrompt(text) for text in unique]
        plain = [prompt.text for prompt in weighted]
        for text in plain:
            if text.strip() and not clean(text):
                fix = "" if cleaning == "light" else " Pass `skip_text_cleaning=True` to keep it."
                logger.warning(
                    f"Cleaning (`caption_cleaning` is {cleaning!r}) removes the whole prompt {_shorten(text)}, which"
                    f" is drawn as an empty prompt.{fix}"
                )
        max_length = self.max_tokens if settings.max_length is None else int(settings.max_length)
        input_ids, mask = tokenize_prompts(self.tokenizer, plain, max_length, clean)
        truncated = find_truncated(self.tokenizer, plain, mask, clean)
        owners, weights = list(range(len(unique))), None
        if prompt_weights or (long_prompts == "windows" and any(truncated)):
            input_ids, mask, offsets, owners = tokenize_windows(self.tokenizer, plain, max_length, clean)
            if long_prompts == "cut":
                first = [owners.index(row) for row in range(len(unique))]
                input_ids, mask, offsets, owners = input_ids[first], mask[first], offsets[first], sorted(set(owners))
            if prompt_weights:
                weights = weigh_tokens(offsets, owners, [clean_spans(prompt, clean) for prompt in weighted])
        if long_prompts == "cut" and any(truncated):
            count = sum(truncated[row] for row in rows)
            logger.warning(
                f'{count} of {len(texts)} prompts are truncated to {max_length} tokens; `long_prompts="windows"` keeps'
                " them whole."
            )
        input_ids, mask = trim_tokens(input_ids, mask)
        mask = mask.to(device)
        embeds = encode_text(self.text_encoder, input_ids.to(device), mask)
        check_finite_output("text_encoder", self.text_encoder, embeds)
        if weights is not None:
            weights = weights[:, : mask.shape[1]].to(device)
        encoded = TextBranch(embeds, mask, weights)
        if len(owners) > len(unique):
            encoded = encoded.map(lambda x: join_windows(x, owners, len(unique)))
        return encoded.map(lambda x: x[rows])


def _shorten(text: str, length: int = 80) -> str:
    return repr(text) if len(text) <= length else f"{text[:length]!r}..."
