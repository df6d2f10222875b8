"""Networks without weights, from configurations on disk, on the Hub, or in tables.

The tables describe the frozen networks of the study, so that the planner works offline (`tables=True`). They contain
only settings that determine shapes and differ from the defaults of the classes.
"""

from typing import Any

from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderRAE
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3VLTextConfig,
    T5GemmaModuleConfig,
)
from transformers.initialization import no_init_weights

from ..latents import VAE, find_vae
from ..text import encoder_only

_KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
# FLUX.1: vae/config.json of black-forest-labs/FLUX.1-dev; REPA-E tunes the same network (arXiv 2504.10483)
_FLUX1 = _KL | {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
AUTOENCODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "black-forest-labs/FLUX.1-dev": (AutoencoderKL, _FLUX1),
    "REPA-E/e2e-flux-vae": (AutoencoderKL, _FLUX1),
    # the defaults of the class in diffusers are those of vae/config.json of FLUX.2-dev
    "black-forest-labs/FLUX.2-dev": (AutoencoderKLFlux2, _KL | {"latent_channels": 32}),
    # `dc-ae-f32c32-sana-1.0`, the same network, in diffusers' scripts/convert_dcae_to_diffusers.py
    "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": (
        AutoencoderDC,
        {
            "latent_channels": 32,
            "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
            "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
            "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
            "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
        },
    ),
    # DINOv2-B/14 with registers at 224 pixels, and the decoder ViT-XL of arXiv 2510.11690: images of 256 pixels
    "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08": (
        AutoencoderRAE,
        {
            "decoder_hidden_size": 1152,
            "decoder_num_hidden_layers": 28,
            "decoder_num_attention_heads": 16,
            "decoder_intermediate_size": 4096,
        },
    ),
}

# T5Gemma 2b-2b: Gemma 2 2B as encoder (arXiv 2504.06225; the defaults of the class in transformers)
_T5GEMMA_2B = {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "vocab_size": 256_000,
}
# Qwen3-VL 2B: its text half is Qwen3 1.7B (arXiv 2505.09388, table 1; arXiv 2511.21631); the embedding model is tuned
# from it
_QWEN3VL_2B = {
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 151_936,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20]},
}
# Qwen3-VL 8B: its text half is Qwen3 8B (arXiv 2505.09388, table 1)
_QWEN3VL_8B = _QWEN3VL_2B | {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 12_288,
}
TEXT_ENCODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "google/t5gemma-2b-2b-ul2": (T5GemmaModuleConfig, _T5GEMMA_2B),
    "Qwen/Qwen3-VL-Embedding-2B": (Qwen3VLTextConfig, _QWEN3VL_2B),
    "Qwen/Qwen3-VL-8B-Instruct": (Qwen3VLTextConfig, _QWEN3VL_8B),
}

# ViT-B/14 and L/14 of arXiv 2304.07193 with the registers of 2309.16588; ViT-L/16 of 2508.10104
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_DINOV2 = {"patch_size": 14, "image_size": 518, "mlp_ratio": 4, "num_register_tokens": 4}
TEACHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "facebook/dinov2-with-registers-large": (Dinov2WithRegistersConfig, _DINOV2 | _LARGE),
    "facebook/dinov2-with-registers-base": (Dinov2WithRegistersConfig, _DINOV2 | _BASE),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": (
        DINOv3ViTConfig,
        _LARGE | {"patch_size": 16, "intermediate_size": 4096, "num_register_tokens": 4},
    ),
}


def meta_autoencoder(name_or_path: str, revision: str | None = None, tables: bool = False) -> VAE:
    """Make an autoencoder from its configuration.

    Args:
        name_or_path: folder or Hub id of the autoencoder or of a pipeline.
        revision: revision on the Hub.
        tables: True to use entries of `AUTOENCODERS`.

    Raises:
        ValueError: the configuration cannot be read, or `latents` does not support the class.
    """
    if tables and name_or_path in AUTOENCODERS:
        vae_class, config = AUTOENCODERS[name_or_path]
        with no_init_weights():
            return vae_class(**config)
    try:
        vae_class, config, _ = find_vae(name_or_path, revision)
    except OSError as error:
        raise _unreadable("vae_name_or_path", name_or_path, AUTOENCODERS) from error
    return vae_class.from_config(config)


def text_config(name_or_path: str, subfolder: str = "", tables: bool = False) -> PreTrainedConfig:
    """Return the complete configuration of a model with a text encoder.

    Args:
        name_or_path: folder or Hub id.
        subfolder: subfolder within a pipeline.
        tables: True to use entries of `TEXT_ENCODERS`.

    Raises:
        ValueError: the configuration cannot be read.
    """
    if tables and name_or_path in TEXT_ENCODERS:
        config_class, settings = TEXT_ENCODERS[name_or_path]
        config = config_class(**settings)
        return encoder_only(config) if config_class is T5GemmaModuleConfig else config
    try:
        return AutoConfig.from_pretrained(name_or_path, subfolder=subfolder)
    except (OSError, ValueError) as error:  # missing, or unknown to transformers
        raise _unreadable("text_encoder_name_or_path", name_or_path, TEXT_ENCODERS) from error


def meta_text_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Make the text encoder that `text.load_text_encoder` would load, without initializing weights."""
    with no_init_weights():
        if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
            if config.model_type == "t5gemma":
                config.is_encoder_decoder = False
            return AutoModelForTextEncoding.from_config(config)
        return AutoModel.from_config(getattr(config, "text_config", config))


def meta_teacher(setting: str, name_or_path: str, tables: bool = False) -> PreTrainedModel:
    """Make a vision model of transformers without initializing weights; for CLIP-like models, the vision half.

    Args:
        setting: name of the setting, for the error message.
        name_or_path: folder or Hub id.
        tables: True to use entries of `TEACHERS`.

    Raises:
        ValueError: the configuration cannot be read.
    """
    if tables and name_or_path in TEACHERS:
        config_class, settings = TEACHERS[name_or_path]
        config = config_class(**settings)
    else:
        try:
            config = AutoConfig.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise _unreadable(setting, name_or_path, TEACHERS) from error
    with no_init_weights():  # some classes read values of initialized weights, which the meta device lacks
        model = AutoModel.from_config(config)
    return getattr(model, "vision_model", model)


def _unreadable(setting: str, name: str, known: dict[str, Any]) -> ValueError:
    return ValueError(
        f"`{setting}` is {name!r}, whose configuration cannot be read from disk or from the Hub. The planner knows "
        f"{sorted(known)} offline."
    )
