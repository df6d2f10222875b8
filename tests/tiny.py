"""Tiny instances of the real components, made offline; the same seed gives the same weights."""

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderDC, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    T5GemmaModel,
    T5GemmaModuleConfig,
)

from diffusers_prx.models.transformer_prx import PRXTransformer2DModel
from diffusers_prx.pipelines import PRXPipeline, PRXPixelPipeline
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler

TEXT_WIDTH = 32
MAX_TOKENS = 12
WORDS = [
    "a",
    "an",
    "the",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "tram",
    "lion",
    "on",
    "in",
    "with",
    "small",
    "big",
    "square",
    "circle",
    "beach",
    "sunset",
    "two",
    "one",
    "and",
]


def tokenizer(padding_side: str = "right", bos: bool = True, max_length: int = MAX_TOKENS) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer. With `bos` every text starts with <bos>; without, an empty text has no tokens."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<bos>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        model_max_length=max_length,
        padding_side=padding_side,
    )


def t5gemma_module_config(**changes) -> T5GemmaModuleConfig:
    settings = {
        "vocab_size": 64,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "max_position_embeddings": 64,
    }
    return T5GemmaModuleConfig(**settings | changes)


def _t5gemma_config(is_encoder_decoder: bool) -> T5GemmaConfig:
    return T5GemmaConfig(
        encoder=t5gemma_module_config(),
        decoder=t5gemma_module_config(),
        is_encoder_decoder=is_encoder_decoder,
        vocab_size=64,
    )


def text_encoder(seed: int = 0) -> T5GemmaEncoderModel:
    torch.manual_seed(seed)
    return T5GemmaEncoderModel(_t5gemma_config(is_encoder_decoder=False)).eval()


def t5gemma_model(seed: int = 0) -> T5GemmaModel:
    """Return encoder and decoder; the published checkpoints hold the encoder of such a model."""
    torch.manual_seed(seed)
    return T5GemmaModel(_t5gemma_config(is_encoder_decoder=True)).eval()


def qwen_text_tower(seed: int = 0) -> Qwen3VLTextModel:
    torch.manual_seed(seed)
    config = Qwen3VLTextConfig(
        vocab_size=64,
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    )
    return Qwen3VLTextModel(config).eval()


def language_model(seed: int = 0) -> GPT2LMHeadModel:
    """A causal model of the words of `tokenizer`, which writes them at random."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokenizer()), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config).eval()


def vae_kl(seed: int = 0, scaling_factor: float = 0.36, shift_factor: float = 0.12) -> AutoencoderKL:
    """2x compression, 4 channels."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    ).eval()


def vae_dc(seed: int = 0, scaling_factor: float = 0.41) -> AutoencoderDC:
    """4x compression, 4 channels."""
    torch.manual_seed(seed)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=scaling_factor,
    ).eval()


def transformer(seed: int = 0, cls: type = PRXTransformer2DModel, **changes):
    """Return a transformer with random modulation and output layer: with zero modulation a block is the identity."""
    settings = {
        "in_channels": 4,
        "patch_size": 2,
        "context_in_dim": TEXT_WIDTH,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [8, 8],
    }
    model = cls(**settings | changes).eval()
    randomize(model, seed)
    assert all(block.modulation.lin.weight.abs().max() > 0 for block in model.blocks)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter at a size that keeps activations near 1 and makes text and time matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("norm.weight") or "norm." in name else 0.0))
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


class EmbeddingsTransformer(PRXTransformer2DModel):
    """A transformer that takes embeddings and timesteps only, as in training and as stock diffusers' does."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, attention_mask=None, return_dict=True, **route):
        return super().forward(
            hidden_states, timestep, encoder_hidden_states, attention_mask, return_dict=return_dict, **route
        )


class RecordingTransformer(PRXTransformer2DModel):
    """Records what it computes: (rows, tokens, masked) of texts, numbers of timesteps, and rows of images."""

    def encode_text_context(self, encoder_hidden_states, attention_mask=None, **settings):
        self.texts = [*getattr(self, "texts", []), (*encoder_hidden_states.shape[:2], attention_mask is not None)]
        self.weights = [*getattr(self, "weights", []), settings.get("text_value_weights")]
        return super().encode_text_context(encoder_hidden_states, attention_mask, **settings)

    def encode_timesteps(self, timestep, *size):
        self.steps = [*getattr(self, "steps", []), len(timestep)]
        return super().encode_timesteps(timestep, *size)

    def forward(self, hidden_states, time_context=None, text_context=None, return_dict=True, **changes):
        self.rows = [*getattr(self, "rows", []), len(hidden_states)]
        contexts = {"time_context": time_context, "text_context": text_context}
        return super().forward(hidden_states, return_dict=return_dict, **contexts, **changes)


class ExactEuler(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler scheduler on the exact grid, for its pipelines, which take no `sigmas`."""

    def set_timesteps(self, num_inference_steps=None, device=None, **kwargs):
        super().set_timesteps(sigmas=np.linspace(1, 0, num_inference_steps + 1)[:-1], device=device)


class GaussianData(PRXTransformer2DModel):
    """The exact predictor for data N(mean, std^2) in every value and noise of a given scale.

    E[x_0 | x_t] of a Gaussian is linear in x_t, and the ODE has the solution
    x_t = (1-t) mean + sqrt((1-t)^2 std^2 + t^2 scale^2) / scale * noise, so that x_0 = mean + std / scale * noise.
    """

    mean, std, scale, predicts = 0.3, 0.5, 1.0, "velocity"

    def forward(self, hidden_states, timestep, encoder_hidden_states, attention_mask=None, return_dict=True):
        self.seen = [*getattr(self, "seen", []), timestep]
        t = timestep.double().view(-1, 1, 1, 1)
        x = hidden_states.double()
        variance = (1 - t) ** 2 * self.std**2 + t**2 * self.scale**2
        clean = self.mean + (1 - t) * self.std**2 / variance * (x - (1 - t) * self.mean)
        return ((clean if self.predicts == "x_prediction" else (x - clean) / t).float(),)

    def solution(self, noise):
        return self.mean + self.std / self.scale * noise


def latent_pipeline(vae=None, side="right", bos=True, shift=3.0, **changes):
    """Return a PRXPipeline of 32 pixels, with KL latents unless another VAE is given."""
    vae = vae_kl() if vae is None else vae
    parts = {
        "transformer": transformer(),
        "scheduler": PRXFlowMatchScheduler(shift=shift),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(side, bos),
        "vae": vae,
        "default_sample_size": 32,
    }
    pipe = PRXPipeline(**parts | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIXEL_SETTINGS = {"in_channels": 3, "patch_size": 4, "bottleneck_size": 16, "resolution_embeds": True}


def pixel_pipeline(side="right", shift=3.0, **changes):
    """Return a PRXPixelPipeline of 32 pixels with a Qwen3-VL text tower."""
    parts = {
        "transformer": transformer(**PIXEL_SETTINGS),
        "scheduler": PRXXPredictionScheduler(shift=shift),
        "text_encoder": qwen_text_tower(),
        "tokenizer": tokenizer(side),
        "default_sample_size": 32,
        "prompt_max_tokens": MAX_TOKENS,
    }
    pipe = PRXPixelPipeline(**parts | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def split_grid(grid: PIL.Image.Image, columns: int, count: int) -> list[PIL.Image.Image]:
    """Return the first `count` images of a grid with `columns` images per row."""
    width, height = grid.width // columns, grid.height // -(-count // columns)
    corners = [(index % columns * width, index // columns * height) for index in range(count)]
    return [grid.crop((left, top, left + width, top + height)) for left, top in corners]
