"""Prompts to embeddings of a text encoder, for sampling and training."""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    T5GemmaConfig,
    T5GemmaModuleConfig,
)

# A fast tokenizer keeps padding and truncation as state, which another thread would change during a call.
_TOKENIZER_LOCK = threading.Lock()

# Tokenizers without a limit have a `model_max_length` of 1e30; PRX reads a few hundred tokens.
LONGEST_TEXT = 1_000_000


def encoder_only(module: T5GemmaModuleConfig, **settings: Any) -> T5GemmaConfig:
    """Return a configuration for T5GemmaEncoderModel, which uses only the encoder.

    Args:
        module: configuration of the encoder.
        settings: other settings of T5GemmaConfig.

    Example:
        >>> model = T5GemmaEncoderModel(encoder_only(T5GemmaModuleConfig(hidden_size=64)))
    """
    # T5GemmaConfig marks its decoder as a decoder: without a copy it would mark the encoder too
    return T5GemmaConfig(encoder=module, decoder=copy.deepcopy(module), is_encoder_decoder=False, **settings)


def load_text_encoder(
    name_or_path: str, dtype: torch.dtype | str = "auto"
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a text encoder of transformers and its tokenizer.

    It is the encoder of an encoder-decoder (T5, T5Gemma), or the text tower of a model for text and images (CLIP,
    Qwen3-VL), in a public class that a saved pipeline can name.

    Args:
        name_or_path: folder or Hub id.
        dtype: dtype of the weights; "auto" for the stored one.

    Raises:
        ValueError: if transformers has no such class for this model, or weights are missing.

    Example:
        >>> text_encoder, tokenizer = load_text_encoder("google/t5gemma-2b-2b-ul2", torch.bfloat16)
    """
    config: Any = AutoConfig.from_pretrained(name_or_path)
    text_config = getattr(config, "text_config", config)
    is_text_encoder = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    if type(text_config) not in MODEL_MAPPING or (config.is_encoder_decoder and not is_text_encoder):
        raise ValueError(
            f"`text_encoder_name_or_path` is a {config.model_type}, for whose text encoder transformers has no class;"
            " accepted are T5Gemma, T5, the text towers of Qwen3-VL and CLIP, and models of text alone."
        )
    if config.model_type == "t5gemma":
        config.is_encoder_decoder = False
    auto_class: Any = AutoModelForTextEncoding if is_text_encoder else AutoModel
    encoder, info = auto_class.from_pretrained(name_or_path, config=config, dtype=dtype, output_loading_info=True)
    if missing := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        name = type(encoder).__name__
        raise ValueError(f"`text_encoder_name_or_path` {name_or_path} lacks weights of its {name}: {missing}.")
    if text_config is not config:
        # the tower's own class would not find its weights under the names of the whole model (Qwen3-VL)
        tower_class: Any = MODEL_MAPPING[type(text_config)]
        encoder = next(module for module in encoder.modules() if isinstance(module, tower_class))
    return encoder.eval(), AutoTokenizer.from_pretrained(name_or_path)


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_length: int, clean: Callable[[str], str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and tokenize prompts, padded or truncated to `max_length` tokens.

    Padding is on the right, regardless of the tokenizer's own side: the first token then has position 0 in every text
    encoder, and the encoding does not depend on the amount of padding.

    Args:
        tokenizer: transformers tokenizer with a padding token.
        prompts: B prompts.
        max_length: L, number of tokens.
        clean: function that cleans a prompt, such as those in `prompt_cleaning.CLEANERS`.

    Returns:
        Token ids (B, L) and a bool mask (B, L), true where a token counts. A prompt without tokens (an empty one, if
        the tokenizer adds none) keeps one padding token: a text encoder cannot attend to a row that is all masked.

    Raises:
        ValueError: if `max_length` is not between 1 and `LONGEST_TEXT`.

    Example:
        >>> input_ids, mask = tokenize_prompts(tokenizer, ["a red cat"], 256, clean_prompt)
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or not 1 <= max_length <= LONGEST_TEXT:
        raise ValueError(
            f"`max_length` is {max_length}; it must be a number of tokens between 1 and {LONGEST_TEXT}. Set the"
            " tokenizer's `model_max_length`, or pass `tokenizer_max_length` to the pipeline."
        )
    cleaned = [clean(prompt) for prompt in prompts]
    with _TOKENIZER_LOCK:
        tokens = tokenizer(
            cleaned,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
    mask = tokens["attention_mask"].bool()
    mask[~mask.any(dim=1), 0] = True
    return tokens["input_ids"].long(), mask


def find_truncated(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], mask: torch.Tensor, clean: Callable[[str], str]
) -> list[bool]:
    """Return one flag per prompt: True if `tokenize_prompts` has truncated it.

    Args:
        tokenizer, prompts, clean: as in `tokenize_prompts`.
        mask: mask (B, L) that it returned.

    Example:
        >>> truncated = find_truncated(tokenizer, ["a red cat"], mask, clean_prompt)
    """
    full_rows = [row for row, row_mask in enumerate(mask) if row_mask.all()]
    truncated = [False] * len(prompts)
    if full_rows:
        cleaned = [clean(prompts[row]) for row in full_rows]
        with _TOKENIZER_LOCK:
            ids = tokenizer(cleaned, padding=False, truncation=False, verbose=False)["input_ids"]
        for row, tokens in zip(full_rows, ids):
            truncated[row] = len(tokens) > mask.shape[1]
    return truncated


def tokenize_windows(
    tokenizer: Any, prompts: Sequence[str], max_length: int, clean: Callable[[str], str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Clean and tokenize prompts of any length into windows of at most `max_length` tokens.

    The first window of a prompt is what `tokenize_prompts` makes of it. Each window has its own special tokens, such
    as the one that starts a text.

    Args:
        tokenizer, prompts, max_length, clean: as in `tokenize_prompts`; the tokenizer has to be a fast one.

    Returns:
        Token ids (R, L) and bool mask (R, L) of R windows, the characters (R, L, 2) of the cleaned prompt that each
        token stands for (start and stop), and for each window the index of its prompt, ascending.

    Raises:
        ValueError: if the tokenizer is a slow one, which does not know where its tokens come from.

    Example:
        >>> input_ids, mask, offsets, rows = tokenize_windows(tokenizer, ["a red cat"], 256, clean_prompt)
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"`tokenizer` is a {type(tokenizer).__name__}, which does not say where in a prompt its tokens are."
            " Windows and weights of words need a fast tokenizer (PreTrainedTokenizerFast)."
        )
    with _TOKENIZER_LOCK:
        tokens = tokenizer(
            [clean(prompt) for prompt in prompts],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=max_length,
            return_attention_mask=True,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
    mask = tokens["attention_mask"].bool()
    mask[~mask.any(dim=1), 0] = True
    rows = tokens["overflow_to_sample_mapping"].tolist()
    return tokens["input_ids"].long(), mask, tokens["offset_mapping"], rows


def encode_text(text_encoder: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the last hidden state (B, L, D) of a transformers text encoder, with gradients.

    Args:
        text_encoder: T5GemmaEncoderModel, Qwen3VLTextModel, T5EncoderModel, CLIPTextModel, or another model that
            returns `last_hidden_state` and attends to no masked token.
        input_ids: (B, L), on the device of the encoder.
        attention_mask: bool (B, L).

    Example:
        >>> embeds = encode_text(text_encoder, input_ids, mask)
    """
    return text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def trim_tokens(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut away trailing positions that are padding in every row, so that the text encoder does not compute them.

    Padding on the left stays: without it the tokens would get other positions.

    Args:
        input_ids: (B, L).
        mask: bool (B, L), true where a token counts.

    Returns:
        Token ids (B, M) and their mask (B, M), 1 <= M <= L.

    Example:
        >>> input_ids, mask = trim_tokens(input_ids, mask)
    """
    _, stop = used_range(mask)
    return input_ids[:, :stop], mask[:, :stop]


def used_range(mask: torch.Tensor) -> tuple[int, int]:
    """Return the half-open range of at least one position outside of which all rows are padding.

    Args:
        mask: bool (B, L), true where a token counts.

    Example:
        >>> start, stop = used_range(mask)
    """
    used = mask.any(dim=0).nonzero().flatten()
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)


def trim_text(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cut away positions on both sides that are padding in every row. The transformer's prediction stays the same.

    Args:
        embeds: (B, L, D).
        mask: bool (B, L), true where a token counts.

    Returns:
        Embeddings (B, M, D) with 1 <= M <= L, and their mask (B, M), or None if nothing is padding.

    Example:
        >>> embeds, mask = trim_text(embeds, mask)
    """
    start, stop = used_range(mask)
    embeds, mask = embeds[:, start:stop], mask[:, start:stop]
    return embeds, None if bool(mask.all()) else mask
