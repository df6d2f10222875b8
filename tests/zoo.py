"""Tiny instances of further VAEs and text encoders, made offline."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, AutoencoderRAE, AutoencoderTiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Model,
)

import tiny

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": tiny.TEXT_WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BOS, END = 2, len(tiny.WORDS) + 3  # of `clip_tokenizer`
CLIP_TEXT = SMALL | {"max_position_embeddings": 24, "bos_token_id": BOS, "eos_token_id": END, "pad_token_id": END}
QWEN_TEXT = SMALL | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}


def vae_flux2(seed: int = 0) -> AutoencoderKLFlux2:
    """2x compression and patchify, together 4x: 3 channels of codes, 12 of latents, each with its own statistics."""
    torch.manual_seed(seed)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    vae.bn.running_mean.copy_(torch.randn(12))
    vae.bn.running_var.copy_(torch.rand(12) * 2 + 0.1)
    return vae


def vae_tiny(seed: int = 0, **changes: Any) -> AutoencoderTiny:
    """2x compression, 4 channels."""
    torch.manual_seed(seed)
    settings = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    return AutoencoderTiny(**settings | changes).eval()


def vae_rae(seed: int = 0, size: int = 16, **changes: Any) -> AutoencoderRAE:
    """4x compression, 64 channels, each with its own statistics; images of `size` pixels only."""
    torch.manual_seed(seed)
    settings = {
        "encoder_hidden_size": 64,
        "encoder_num_hidden_layers": 1,
        "encoder_input_size": 14 * size // 4,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "patch_size": 4,
        "latents_mean": torch.randn(64, 1, 1),
        "latents_std": torch.rand(64, 1, 1) + 0.5,
    }
    vae = AutoencoderRAE(**settings | changes)
    tiny.randomize(vae)
    return vae.eval()


def t5_encoder() -> T5EncoderModel:
    """Relative positions, bidirectional."""
    return randomized(T5EncoderModel(_t5_config()))


def t5_model() -> T5Model:
    return randomized(T5Model(_t5_config()))


def clip_text() -> CLIPTextModel:
    """Absolute positions, causal."""
    return randomized(CLIPTextModel(CLIPTextConfig(**CLIP_TEXT)))


def clip_model() -> CLIPModel:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=vision, projection_dim=8))
    randomized(model.text_model)
    return model.eval()


def save_clip(folder: Path) -> CLIPModel:
    """Save a CLIP model with its tokenizer and image normalization."""
    model = clip_model()
    for part in (model.vision_model, model.visual_projection, model.text_projection):
        tiny.randomize(part)
    model.save_pretrained(folder)
    clip_tokenizer(max_length=24).save_pretrained(folder)
    settings = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def bert() -> BertModel:
    """Absolute positions, bidirectional."""
    return randomized(BertModel(BertConfig(**SMALL, max_position_embeddings=24)))


def qwen_model() -> Qwen3VLModel:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": tiny.TEXT_WIDTH, "deepstack_visual_indexes": []}
    return randomized(Qwen3VLModel(Qwen3VLConfig(text_config=QWEN_TEXT, vision_config=vision)))


def randomized(model: PreTrainedModel) -> Any:
    """Draw weights large enough that positions and neighbors matter."""
    tiny.randomize(model)
    return model.eval()


def _t5_config() -> T5Config:
    return T5Config(
        vocab_size=64,
        d_model=tiny.TEXT_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )


def clip_tokenizer(padding_side: str = "right", max_length: int = tiny.MAX_TOKENS) -> PreTrainedTokenizerFast:
    """Return a tokenizer like CLIP's: texts are between <bos> and <eos>, and <eos> is also the padding."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<bos>", *tiny.WORDS, "<eos>"])}
    assert (vocabulary["<bos>"], vocabulary["<eos>"]) == (BOS, END)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<eos>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side=padding_side,
    )
