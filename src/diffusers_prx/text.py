"""From prompts to what the transformer reads, for sampling and for training alike."""

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

# A fast tokenizer keeps padding and truncation as state of its own, which a second thread would change under us.
_TOKENIZER_LOCK = threading.Lock()

# Tokenizers that state no length say 1e30; no PRX reads more than a few hundred tokens.
LONGEST_TEXT = 1_000_000


def encoder_only(module: T5GemmaModuleConfig, **settings: Any) -> T5GemmaConfig:
    """The configuration of a T5Gemma of which only the encoder counts, for T5GemmaEncoderModel.

    Args:
        module: of the encoder.
        settings: of T5GemmaConfig itself.
    """
    # a copy: the configuration marks its decoder as one, and with that its encoder, were they the same object
    return T5GemmaConfig(encoder=module, decoder=copy.deepcopy(module), is_encoder_decoder=False, **settings)


def load_text_encoder(
    name_or_path: str, dtype: torch.dtype | str = "auto"
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A text encoder of transformers, and its tokenizer.

    Of an encoder-decoder (T5, T5Gemma) it is the encoder, of a model for text and images (CLIP, Qwen3-VL) the text
    tower, of the public class that a saved pipeline can name.

    Args:
        name_or_path: a folder or a Hub id.
        dtype: of its weights; "auto": as they are stored.

    Raises:
        ValueError: if transformers has no such class for this model, or weights are not all there.
    """
    config: Any = AutoConfig.from_pretrained(name_or_path)
    text_config = getattr(config, "text_config", config)
    is_text_encoder = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    if type(text_config) not in MODEL_MAPPING or (config.is_encoder_decoder and not is_text_encoder):
        raise ValueError(
            f"`text_encoder_name_or_path` is a {config.model_type}, whose text encoder has no class of its own in"
            " transformers; accepted are T5Gemma, T5, the text towers of Qwen3-VL and CLIP, and models of text alone."
        )
    if config.model_type == "t5gemma":
        config.is_encoder_decoder = False
    auto_class: Any = AutoModelForTextEncoding if is_text_encoder else AutoModel
    encoder, info = auto_class.from_pretrained(name_or_path, config=config, dtype=dtype, output_loading_info=True)
    if lacking := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        name = type(encoder).__name__
        raise ValueError(f"`text_encoder_name_or_path` {name_or_path} lacks weights of its {name}: {lacking}.")
    if text_config is not config:
        # loaded whole: its own class would not find the tower's weights under the names of the whole (Qwen3-VL)
        tower_class: Any = MODEL_MAPPING[type(text_config)]
        encoder = next(module for module in encoder.modules() if isinstance(module, tower_class))
    return encoder.eval(), AutoTokenizer.from_pretrained(name_or_path)


def tokenize_prompts(
    tokenizer: Any, prompts: Sequence[str], max_length: int, clean: Callable[[str], str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean prompts and turn them into tokens, padded or cut to `max_length`.

    Padding goes to the right, whatever the tokenizer's own side: so the first token of a prompt has position 0 with
    every kind of positions, absolute ones (CLIP, BERT) too, and no prompt's encoding depends on how much is padded.

    Args:
        tokenizer: a transformers tokenizer with a padding token.
        prompts: B prompts.
        max_length: L, the number of tokens that the text encoder sees.
        clean: function that cleans a prompt, one of `prompt_cleaning.CLEANERS`.

    Returns:
        Token ids (B, L) and a bool mask (B, L), true where a token counts. A prompt without any token (an empty one,
        with a tokenizer that adds none of its own) keeps one position, which holds the padding token: a text encoder
        has nothing to attend to in a row that is masked throughout.

    Raises:
        ValueError: `max_length` is no length.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or not 1 <= max_length <= LONGEST_TEXT:
        raise ValueError(
            f"`max_length` is {max_length}; it has to be a number of tokens between 1 and {LONGEST_TEXT}. Set the"
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
    tokenizer: Any, prompts: Sequence[str], mask: torch.Tensor, clean: Callable[[str], str]
) -> list[bool]:
    """Which of B prompts `tokenize_prompts`, whose mask (B, L) this is, has cut at L tokens."""
    full = [row for row, kept in enumerate(mask) if kept.all()]  # only they can be
    cut = [False] * len(prompts)
    if full:
        cleaned = [clean(prompts[row]) for row in full]
        with _TOKENIZER_LOCK:
            ids = tokenizer(cleaned, padding=False, truncation=False, verbose=False)["input_ids"]
        for row, tokens in zip(full, ids):
            cut[row] = len(tokens) > mask.shape[1]
    return cut


def encode_text(text_encoder: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The last hidden state (B, L, D) of a transformers text encoder. Gradients flow unless the caller turns them off.

    Args:
        text_encoder: T5GemmaEncoderModel, Qwen3VLTextModel, T5EncoderModel, CLIPTextModel, or another that returns
            `last_hidden_state` and lets no token see what the mask leaves out.
        input_ids: (B, L), on the device of the encoder.
        attention_mask: bool (B, L).
    """
    return text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def trim_tokens(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut away the last positions that are padding in every row, before a text encoder computes them.

    The padding of `tokenize_prompts` is all on the right. Padding on the left would stay: without it the tokens would
    move, which encoders with absolute positions see.

    Args:
        input_ids: (B, L).
        mask: bool (B, L), true where a token counts.

    Returns:
        Token ids (B, M) and their mask (B, M), 1 <= M <= L.
    """
    _, stop = _used(mask)
    return input_ids[:, :stop], mask[:, :stop]


def _used(mask: torch.Tensor) -> tuple[int, int]:
    """The half-open range of positions, at least one, outside of which all rows are padding."""
    kept = mask.any(dim=0).nonzero().flatten()
    return (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, 1)


def trim_text(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cut away the positions, on either side, that are padding in every row; the transformer's result is the same.

    Args:
        embeds: (B, L, D).
        mask: bool (B, L), true where a token counts.

    Returns:
        (B, M, D) with 1 <= M <= L, and its mask (B, M), or None when nothing of it is padding.
    """
    start, stop = _used(mask)
    embeds, mask = embeds[:, start:stop], mask[:, start:stop]
    return embeds, None if bool(mask.all()) else mask
