"""The PRX transformer: image tokens attend to themselves and to text tokens, which no block changes.

Shapes in this file: B batch, C channels, H x W latent (or pixel) height and width, p patch size, D hidden size,
h heads, d head dimension (h * d = D), N = (H/p) * (W/p) image tokens, L text tokens, T timesteps.

`PRXTextContext` and `PRXTimeContext` are parts of the forward that do not depend on the image tokens. A sampling run
computes them once and passes them to every step.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import CacheMixin, ConfigMixin, ContextParallelConfig, ModelMixin, ParallelConfig
from diffusers.configuration_utils import register_to_config
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_context_parallel,
)
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import apply_lora_scale
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ..compat import (
    AttentionMixin,
    AttentionModuleMixin,
    ContextParallelInput,
    ContextParallelOutput,
    SeqAllToAllDim,
    Transformer2DModelOutput,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
    apply_forward_hook,
    dispatch_attention_fn,
    get_timestep_embedding,
    is_offloaded_to_disk,
    ulysses_group,
    ulysses_rank,
)
from .single_file import SingleFileMixin
from .token_routing import TokenRoute

NORM_EPS = 1e-6
TIME_EMBEDDING_SIZE = 256
GUIDANCE_FACTOR = 100.0  # scales of 1 to 10 then use the range of the timesteps, 0 to 1000

# devices with float64 and complex numbers, unlike MPS and NPUs
FLOAT64_DEVICES = ("cpu", "cuda")

# Configuration that diffusers' PRXTransformer2DModel does not have. A model that uses it is stored under another class
# name, so that diffusers raises an error instead of loading the model without these weights.
OWN_OPTIONS = ("resolution_tokens", "fusion_range", "guidance_embeds")
STOCK_CLASS_NAME, OWN_CLASS_NAME = "PRXTransformer2DModel", "PRXExtendedTransformer2DModel"


def load_complete(load: Callable[..., Any], source: Any, **kwargs: Any) -> Any:
    """Load a model and check that no weight is missing; diffusers and transformers would initialize it at random.

    Args:
        load: `from_pretrained` of a class of diffusers or transformers.
        source: first argument of `load`.
        kwargs: other arguments of `load`.

    Raises:
        ValueError: if weights are missing; the message names them.

    Example:
        >>> vae = load_complete(AutoencoderKL.from_pretrained, "my-prx", subfolder="vae")
    """
    try:
        model, info = load(source, output_loading_info=True, **kwargs)
    except NotImplementedError:  # with `device_map`, missing weights fail here already
        if kwargs.get("device_map") is None:
            raise
        load_complete(load, source, **kwargs | {"device_map": None})
        raise
    missing = set(info["missing_keys"])
    is_offloaded = {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values()))
    if not is_offloaded:  # offloaded weights are on the meta device too
        # weights that the index lists, but no shard holds
        missing |= {name for name, weight in model.state_dict().items() if weight.is_meta}
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}, such as {sorted(missing)[:8]}. Save or"
            " download them again."
        )
    return model


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images (B, C, H, W) into a row-major sequence of patches (B, N, C * p * p).

    Example:
        >>> patchify(torch.zeros(1, 3, 8, 8), 4).shape
        torch.Size([1, 4, 48])
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def unpatchify(patches: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """Assemble patches (B, N, C * p * p) to images (B, C, H, W); the inverse of `patchify`.

    Example:
        >>> unpatchify(torch.zeros(1, 4, 48), 4, height=8, width=8).shape
        torch.Size([1, 3, 8, 8])
    """
    rows, columns = height // patch_size, width // patch_size
    images = patches.reshape(patches.shape[0], rows, columns, -1, patch_size, patch_size)
    return images.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, height, width)


def rotary_table(
    rows: int, columns: int, axes_dim: tuple[int, ...], theta: float, device: torch.device
) -> torch.Tensor:
    """Compute cosines and sines (N, d/2, 2) of the axial rotary embedding (RoFormer, arXiv 2104.09864).

    The first `axes_dim[0] / 2` angles depend on the row of a token, the others on its column. They are computed in
    float64, if possible on `device`: a copy from the CPU in a compiled graph would prevent CUDA graphs.
    """
    float64_device = device if device.type in FLOAT64_DEVICES else torch.device("cpu")
    row_ids, column_ids = (torch.arange(n, dtype=torch.float64, device=float64_device) for n in (rows, columns))
    angles = []
    for positions, dim in zip(torch.meshgrid(row_ids, column_ids, indexing="ij"), axes_dim):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=float64_device) / dim)  # (dim/2,)
        angles.append(positions.reshape(-1, 1) * frequencies)  # (N, dim/2)
    table = torch.cat(angles, dim=-1)  # (N, d/2)
    return torch.stack((table.cos(), table.sin()), dim=-1).float().to(device)  # (N, d/2, 2)


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate neighboring pairs of features of x (B, N, h, d) by the angles of their tokens, in float32."""
    pairs, angles = x.unflatten(-1, (-1, 2)), rotary.unsqueeze(-3)  # (B, N, h, d/2, 2) and (N, 1, d/2, 2)
    if x.device.type in FLOAT64_DEVICES and not torch.compiler.is_compiling():
        # one pass over memory instead of seven below; inductor has no code for complex numbers
        product = torch.view_as_complex(pairs) * torch.view_as_complex(angles)  # (B, N, h, d/2)
        return torch.view_as_real(product).flatten(-2)  # (B, N, h, d)
    (even, odd), (cos, sin) = pairs.unbind(-1), angles.unbind(-1)  # (B, N, h, d/2) and (N, 1, d/2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)  # (B, N, h, d)


def exchange_tokens_for_heads(x: torch.Tensor, tokens: int, config: ContextParallelConfig) -> torch.Tensor:
    """Exchange all heads of n tokens per process for h/w heads of all N tokens, on w processes.

    (B, n, h, d) becomes (B, N, h/w, d) (Ulysses, arXiv 2309.14509). Tokens are padded to a multiple of w before; the
    exchange removes the padding, so that it needs no mask.
    """
    return SeqAllToAllDim.apply(ulysses_group(config), x, 2, 1)[:, :tokens]  # (B, N, h/w, d)


def exchange_heads_for_tokens(x: torch.Tensor, tokens: int, config: ContextParallelConfig) -> torch.Tensor:
    """Undo `exchange_tokens_for_heads`: (B, N, h/w, d) becomes (B, n, h, d) with `tokens` = n and zero padding."""
    x = F.pad(x, (0, 0, 0, 0, 0, config.ulysses_degree * tokens - x.shape[1]))  # (B, w * n, h/w, d)
    return SeqAllToAllDim.apply(ulysses_group(config), x, 1, 2)  # (B, n, h, d)


class PRXRMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension, computed and returned in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), NORM_EPS)


# keys and values of the text in one block, (B, L, h, d) each
TextKeysValues: TypeAlias = tuple[torch.Tensor, torch.Tensor]
# a mask or None, or one of these per part of the text
AttentionMask: TypeAlias = torch.Tensor | tuple[torch.Tensor | None, ...] | None


@dataclass(frozen=True)
class PRXTextContext:
    """Keys and values of a text in all blocks, for any number of forwards.

    `PRXTransformer2DModel.encode_text_context` computes it. It is valid for the weights and adapters of that moment.

    Args:
        keys_values: for each block, keys and values (B, L, h, d); B = 1 serves any number of rows.
        mask: bool (B, L), true where a token counts, or (B, N, L), true where it counts for an image token; None if
            all count.

    Example:
        >>> context = transformer.encode_text_context(embeds, mask)
        >>> output = transformer(latents, timestep, text_context=context)
    """

    keys_values: tuple[TextKeysValues, ...]
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class PRXTimeContext:
    """Modulation of all blocks for T timesteps.

    `PRXTransformer2DModel.encode_timesteps` computes it. It is valid for the weights and adapters of that moment.

    Args:
        blocks: for each block (T, 6, D): shift, scale and gate of attention, then of the MLP.
        final: (T, 2, D): shift and scale of the final layer.

    Example:
        >>> times = transformer.encode_timesteps(torch.tensor([1.0, 0.5]))
        >>> output = transformer(latents, encoder_hidden_states=embeds, time_context=times.at(0))
    """

    blocks: tuple[torch.Tensor, ...]
    final: torch.Tensor

    def at(self, step: int) -> "PRXTimeContext":
        """Return the context of one timestep (T = 1), which a forward takes; `step` counts from 0."""
        return PRXTimeContext(tuple(block[step, None] for block in self.blocks), self.final[step, None])


class PRXAttnProcessor:
    """Attention of image tokens to text tokens and image tokens.

    On w processes (`enable_parallelism`) each process holds n of the N image tokens and the whole text. Inside the
    attention it has all tokens and h/w heads, so that masks, rotary table and text are as on one process. (diffusers'
    own templates would concatenate the text keys of all processes.)
    """

    # diffusers sets the first in `set_attention_backend`, this model the second in `enable_parallelism`
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: "PRXAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[TextKeysValues, ...],
        image_rotary_emb: torch.Tensor,
        attention_mask: AttentionMask = None,
        text_value_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from image tokens to text tokens and image tokens.

        The text is either hidden states, or G parts of projected keys and values, each with its own L and mask (the
        branches of guidance). The first part is for the first B / G rows, and so on.

        Args:
            attn: layer with the projections.
            hidden_states: image tokens (B, N, D).
            encoder_hidden_states: text tokens (B, L, D), or G parts of keys and values (B / G or 1, L, h, d).
            image_rotary_emb: (N, d/2, 2) or (B, N, d/2, 2).
            attention_mask: bool (B, 1, 1, L + N) or (B, 1, N, L + N), true for keys that count, or None; for G parts a
                tuple of G masks.
            text_value_weights: (B, L), factors of the values of text tokens, or None; for hidden states only.

        Returns:
            (B, N, D).
        """
        parallel, own_tokens = self._context_parallel, hidden_states.shape[1]
        qkv = attn.img_qkv_proj(hidden_states).unflatten(-1, (3, attn.heads, attn.head_dim))  # (B, N, 3, h, d)
        if parallel is not None:  # n tokens with h heads before, N with h/w from here on
            by_head, tokens = qkv.transpose(2, 3).flatten(3), image_rotary_emb.shape[-3]  # (B, n, h, 3 * d)
            by_head = exchange_tokens_for_heads(by_head, tokens, parallel)  # (B, N, h/w, 3 * d)
            qkv = by_head.unflatten(3, (3, -1)).transpose(2, 3)  # (B, N, 3, h/w, d)
        query, key, value = qkv.unbind(2)  # (B, N, h, d) each
        query = rotate(attn.norm_q(query), image_rotary_emb).to(value.dtype)  # (B, N, h, d)
        key = rotate(attn.norm_k(key), image_rotary_emb).to(value.dtype)  # (B, N, h, d)

        if isinstance(encoder_hidden_states, torch.Tensor):
            assert not isinstance(attention_mask, tuple)
            text_key, text_value = attn.project_text(encoder_hidden_states, text_value_weights)  # (B, L, h, d) each
            hidden_states = self.attend(query, key, value, text_key, text_value, attention_mask)  # (B, N, h, d)
        else:
            assert isinstance(attention_mask, tuple)
            images = [x.unflatten(0, (len(encoder_hidden_states), -1)).unbind() for x in (query, key, value)]
            attended = []  # G x (B / G, N, h, d)
            for q, k, v, text, mask in zip(*images, encoder_hidden_states, attention_mask):
                text_key, text_value = (x.expand(len(q), -1, -1, -1) for x in text)  # (B / G, L, h, d) each
                attended.append(self.attend(q, k, v, text_key, text_value, mask))
            hidden_states = attended[0] if len(attended) == 1 else torch.cat(attended)  # (B, N, h, d)
        if parallel is not None:
            hidden_states = exchange_heads_for_tokens(hidden_states, own_tokens, parallel)  # (B, n, h, d)
        hidden_states = attn.to_out[0](hidden_states.flatten(2))  # (B, N, D)
        return attn.to_out[1](hidden_states)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        text_key: torch.Tensor,
        text_value: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend (B, N, h, d) from image tokens (B, N, h, d) to text tokens (B, L, h, d) and image tokens."""
        if self._context_parallel is not None:
            degree, rank = self._context_parallel.ulysses_degree, ulysses_rank(self._context_parallel)
            text_key, text_value = (x.chunk(degree, dim=2)[rank] for x in (text_key, text_value))  # (B, L, h/w, d)
        return dispatch_attention_fn(
            query,
            torch.cat((text_key, key), dim=1),  # (B, L + N, h, d)
            torch.cat((text_value, value), dim=1),  # (B, L + N, h, d)
            attn_mask=attention_mask,
            backend=self._attention_backend,
        )  # (B, N, h, d)

    @property
    def _context_parallel(self) -> ContextParallelConfig | None:
        return None if self._parallel_config is None else self._parallel_config.context_parallel_config


class PRXAttention(nn.Module, AttentionModuleMixin):
    """Projections and norms of one attention layer; its processor computes the attention."""

    processor: Any
    _default_processor_cls = PRXAttnProcessor
    _available_processors = [PRXAttnProcessor]  # noqa: RUF012 (diffusers defines the name and form)
    _supports_qkv_fusion = False  # stored fused already

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.img_qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.norm_q = PRXRMSNorm(self.head_dim)
        self.norm_k = PRXRMSNorm(self.head_dim)
        self.txt_kv_proj = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.norm_added_k = PRXRMSNorm(self.head_dim)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size, bias=False), nn.Dropout(0.0)])
        self.processor = PRXAttnProcessor()

    def project_text(
        self, encoder_hidden_states: torch.Tensor, value_weights: torch.Tensor | None = None
    ) -> TextKeysValues:
        """Project text (B, L, D) to keys and values (B, L, h, d). Text has no positions.

        Weights (B, L) multiply the values: the attention stays as it is, a token only adds more or less.
        """
        text_kv = self.txt_kv_proj(encoder_hidden_states).unflatten(-1, (2, self.heads, self.head_dim))
        text_key, text_value = text_kv.unbind(2)  # (B, L, h, d) each
        if value_weights is not None:
            text_value = text_value * value_weights[:, :, None, None].to(text_value.dtype)  # (B, L, h, d)
        return self.norm_added_k(text_key).to(text_value.dtype), text_value

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[TextKeysValues, ...],
        image_rotary_emb: torch.Tensor,
        attention_mask: AttentionMask = None,
        text_value_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # a processor of your own needs the last argument only with weights
        weights = {} if text_value_weights is None else {"text_value_weights": text_value_weights}
        return self.processor(self, hidden_states, encoder_hidden_states, image_rotary_emb, attention_mask, **weights)


class PRXModulation(nn.Module):
    """Shift, scale and gate for attention and MLP of a block (adaLN-Zero, arXiv 2212.09748)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.lin = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.lin(F.silu(temb))[:, None, :].chunk(6, dim=-1)  # 6 x (B, 1, D)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Apply layer norm to x (B, N, D), then shift and scale: (B, 1, D), or (D,) for all rows.

    PyTorch's kernel computes mean and variance in float32 whatever the input's dtype.
    """
    if shift.ndim == 1:  # as weight and bias of the norm: one pass over memory
        return F.layer_norm(x, x.shape[-1:], 1 + scale, shift, NORM_EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


class PRXBlock(nn.Module):
    """Transformer block: modulated joint attention, then a modulated gated MLP. The text stays unchanged."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        mlp_size = int(hidden_size * mlp_ratio)
        self.attention = PRXAttention(hidden_size, num_heads)
        self.gate_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)
        self.modulation = PRXModulation(hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[TextKeysValues, ...],
        temb: torch.Tensor | tuple[torch.Tensor, ...],
        image_rotary_emb: torch.Tensor,
        attention_mask: AttentionMask = None,
        text_value_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        modulation = self.modulation(temb) if isinstance(temb, torch.Tensor) else temb
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation  # (B, 1, D) or (D,) each

        x = modulate(hidden_states, attn_shift, attn_scale)  # (B, N, D)
        x = self.attention(x, encoder_hidden_states, image_rotary_emb, attention_mask, text_value_weights)  # (B, N, D)
        hidden_states = torch.addcmul(hidden_states, attn_gate, x)  # (B, N, D)

        x = modulate(hidden_states, mlp_shift, mlp_scale)  # (B, N, D)
        x = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))  # (B, N, D)
        return torch.addcmul(hidden_states, mlp_gate, x)  # (B, N, D)


class PRXMLPEmbedder(nn.Module):
    """Two linear layers with a SiLU between them."""

    def __init__(self, in_size: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(in_size, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def embed_resolution(height: int, width: int, max_period: int, device: torch.device) -> torch.Tensor:
    """Compute sinusoidal embeddings (2, 128), float32, of height and width of the latents or pixels."""
    return get_timestep_embedding(
        torch.tensor([height, width], device=device, dtype=torch.float32),
        TIME_EMBEDDING_SIZE // 2,
        max_period=max_period,
        flip_sin_to_cos=True,
        downscale_freq_shift=0.0,
    )


class PRXResolutionEmbedder(nn.Module):
    """Embedding of height and width that is added to the timestep's."""

    def __init__(self, hidden_size: int, max_period: int):
        super().__init__()
        self.max_period = max_period
        self.mlp = PRXMLPEmbedder(TIME_EMBEDDING_SIZE, hidden_size)

    def forward(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        features = embed_resolution(height, width, self.max_period, device)  # (2, 128)
        return self.mlp(features.reshape(1, -1).to(dtype))  # (1, D)


class PRXResolutionTokens(nn.Module):
    """Embedding of height and width as two tokens before the text."""

    def __init__(self, hidden_size: int, max_period: int):
        super().__init__()
        self.max_period = max_period
        self.height = PRXMLPEmbedder(TIME_EMBEDDING_SIZE // 2, hidden_size)
        self.width = PRXMLPEmbedder(TIME_EMBEDDING_SIZE // 2, hidden_size)

    def forward(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        features = embed_resolution(height, width, self.max_period, device).to(dtype)  # (2, 128)
        return torch.stack((self.height(features[:1]), self.width(features[1:])), dim=1)  # (1, 2, D)


class PRXFusion(nn.Module):
    """Fusion of the input and the output of a range of blocks (SPRINT, arXiv 2510.21986)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(2 * hidden_size, hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, dense: torch.Tensor, deep: torch.Tensor, route: TokenRoute | None) -> torch.Tensor:
        """Fuse the input (B, N, D) and the output (B, N or K, D) of the blocks to (B, N, D).

        The mask token replaces tokens that skipped the blocks.
        """
        if route is not None:
            deep = route.scatter(deep, self.mask_token.to(deep.dtype).expand_as(dense))  # (B, N, D)
        return self.linear(torch.cat((dense, deep), dim=-1))  # (B, N, D)


class PRXFinalLayer(nn.Module):
    """Modulated norm, then a projection of every token to the values of its patch."""

    def __init__(self, hidden_size: int, patch_values: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.linear = nn.Linear(hidden_size, patch_values)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        if isinstance(temb, torch.Tensor):
            temb = self.adaLN_modulation(temb)[:, None, :].chunk(2, dim=-1)
        shift, scale = temb  # (B, 1, D) or (D,) each
        return self.linear(modulate(hidden_states, shift, scale))  # (B, N, C * p * p)


@dataclass
class PRXTransformer2DModelOutput(Transformer2DModelOutput):
    """Return value of `PRXTransformer2DModel`.

    Args:
        sample: (B, C, H, W), the prediction.
        features: (B, K, D), output of block `feature_block`; a tuple of them for several blocks; None without one.
        feature_indices: (B, K), indices of the tokens in `features`; None if they are all N tokens in order.

    Example:
        >>> output = transformer(latents, timestep, embeds, feature_block=7)
        >>> velocity, features = output.sample, output.features
    """

    features: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    feature_indices: torch.Tensor | None = None


class PRXTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin, SingleFileMixin):
    """PRX, the text-to-image transformer of Photoroom (https://github.com/Photoroom/PRX).

    Configuration and state-dict keys are those of the class of the same name in diffusers, so that each loads what the
    other saved. `resolution_tokens`, `fusion_range` and `guidance_embeds` do not exist in diffusers; models with
    any of them are stored as PRXExtendedTransformer2DModel. A new model is initialized for training from scratch
    (`init_weights`).

    Args:
        in_channels: channels C of the latents, or 3 for pixels.
        patch_size: side p of the square patch that becomes one token.
        context_in_dim: width of the text encoder's hidden states.
        hidden_size: width D of the tokens.
        mlp_ratio: width of the gated MLP divided by `hidden_size`.
        num_heads: attention heads; must divide `hidden_size`.
        depth: number of blocks.
        axes_dim: features of a head that encode the row and the column; both even, with the sum
            `hidden_size / num_heads`. None: (32, 32).
        theta: base of the rotary frequencies.
        time_factor: factor on timesteps in [0, 1] before their sinusoidal embedding.
        time_max_period: longest period of the sinusoidal embeddings of timestep and resolution.
        bottleneck_size: width of a linear bottleneck between patch and token (JiT, arXiv 2511.13720); None for one
            linear layer.
        resolution_embeds: add an embedding of (H, W) to the timestep's.
        resolution_tokens: put an embedding of H and one of W before the text, as two tokens.
        fusion_range: half-open range of blocks whose output a linear layer fuses with their input (SPRINT, arXiv
            2510.21986), with or without a `route` around them; None for no fusion.
        guidance_embeds: take the guidance scale as an input, `guidance` (arXiv 2210.03142); one evaluation then
            predicts what a guided teacher predicts with two.

    Raises:
        ValueError: if the sizes do not fit each other.

    Example:
        >>> from diffusers_prx import PRXTransformer2DModel
        >>> transformer = PRXTransformer2DModel.from_pretrained("Photoroom/prx-512-t2i-sft", subfolder="transformer")
        >>> small = PRXTransformer2DModel(hidden_size=256, num_heads=4, depth=4)
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PRXBlock"]  # noqa: RUF012 (diffusers defines these names and forms)
    _repeated_blocks = ["PRXBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        "norm",
        "time_in",
        "resolution_",
        "modulation",
        "img_in",
        "txt_in",
        "final_layer",
    ]
    # `enable_parallelism` splits image tokens over processes from their embedding to the last projection
    _cp_plan = {  # noqa: RUF012
        "img_in": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "final_layer": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    _parallel_config: Any = None  # set by `enable_parallelism`

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        patch_size: int = 2,
        context_in_dim: int = 2304,
        hidden_size: int = 1792,
        mlp_ratio: float = 3.5,
        num_heads: int = 28,
        depth: int = 16,
        axes_dim: tuple[int, int] | None = None,
        theta: int = 10000,
        time_factor: float = 1000.0,
        time_max_period: int = 10000,
        bottleneck_size: int | None = None,
        resolution_embeds: bool = False,
        resolution_tokens: bool = False,
        fusion_range: tuple[int, int] | None = None,
        guidance_embeds: bool = False,
    ):
        super().__init__()
        if hidden_size % num_heads != 0:
            raise ValueError(f"`hidden_size` must be a multiple of `num_heads`, got {hidden_size} and {num_heads}.")
        positive = {
            "theta": theta,
            "time_factor": time_factor,
            "time_max_period": time_max_period,
            "mlp_ratio": mlp_ratio,
        }
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be a positive finite number, got {value}.")
        axes = (32, 32) if axes_dim is None else tuple(axes_dim)  # stock configurations hold None
        head_dim = hidden_size // num_heads
        if len(axes) != 2 or sum(axes) != head_dim or any(dim % 2 for dim in axes):
            raise ValueError(
                f"`axes_dim` must be two even numbers whose sum is the head dimension {head_dim} "
                f"(`hidden_size` / `num_heads`), got {list(axes)}."
            )
        if fusion_range is not None and not _is_range(fusion_range, depth):
            raise ValueError(
                f"`fusion_range` must be a half-open range [start, stop) of the {depth} blocks, got {fusion_range}."
            )
        self.axes_dim = axes
        self.gradient_checkpointing = False
        self.kept_blocks = 0  # number of trailing blocks that gradient checkpointing leaves out
        self._rotary_tables: dict[tuple[int, int, torch.device], torch.Tensor] = {}

        patch_values = in_channels * patch_size**2
        if bottleneck_size is None:
            self.img_in: nn.Module = nn.Linear(patch_values, hidden_size)
        else:
            self.img_in = nn.Sequential(
                nn.Linear(patch_values, bottleneck_size), nn.Linear(bottleneck_size, hidden_size)
            )
        self.time_in = PRXMLPEmbedder(TIME_EMBEDDING_SIZE, hidden_size)
        self.txt_in = nn.Linear(context_in_dim, hidden_size)
        self.resolution_embedder = PRXResolutionEmbedder(hidden_size, time_max_period) if resolution_embeds else None
        self.resolution_token_embedder = (
            PRXResolutionTokens(hidden_size, time_max_period) if resolution_tokens else None
        )
        self.guidance_embedder = PRXMLPEmbedder(TIME_EMBEDDING_SIZE, hidden_size) if guidance_embeds else None
        self.blocks = nn.ModuleList([PRXBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = PRXFinalLayer(hidden_size, patch_values)
        self.fusion = PRXFusion(hidden_size) if fusion_range is not None else None
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize every parameter for training from scratch, as DiT does (arXiv 2212.09748).

        Matrices are Xavier-uniform and biases zero. The embedders of timestep and resolution and the mask token of the
        fusion are normal(0, 0.02). Modulation and output layer are zero, so that every block starts as the identity
        and the model predicts zero.

        Example:
            >>> transformer.init_weights()
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, PRXRMSNorm):
                nn.init.ones_(module.weight)
        for module in self.modules():
            if isinstance(module, PRXMLPEmbedder):
                nn.init.normal_(module.in_layer.weight, std=0.02)
                nn.init.normal_(module.out_layer.weight, std=0.02)
            elif isinstance(module, PRXModulation):
                nn.init.zeros_(module.lin.weight)
            elif isinstance(module, PRXFinalLayer):
                nn.init.zeros_(module.adaLN_modulation.get_parameter("1.weight"))
                nn.init.zeros_(module.linear.weight)
            elif isinstance(module, PRXFusion):
                nn.init.normal_(module.mask_token, std=0.02)

    def add_guidance_embedder(self) -> None:
        """Make the guidance scale an input of a trained model, whose predictions stay the same until it is trained.

        Raises:
            ValueError: if it is one already.

        Example:
            >>> transformer.add_guidance_embedder()
            >>> velocity = transformer(latents, timestep, embeds, guidance=torch.tensor([4.0])).sample
        """
        if self.guidance_embedder is not None:
            raise ValueError("The model has `guidance_embeds` already.")
        weight = self.final_layer.linear.weight
        embedder = PRXMLPEmbedder(TIME_EMBEDDING_SIZE, self.config.hidden_size)
        nn.init.normal_(embedder.in_layer.weight, std=0.02)
        nn.init.zeros_(embedder.in_layer.bias)
        nn.init.zeros_(embedder.out_layer.weight)
        nn.init.zeros_(embedder.out_layer.bias)
        self.guidance_embedder = embedder.to(weight.device, weight.dtype)
        self.register_to_config(guidance_embeds=True)

    @property
    def stored_class_name(self) -> str:
        """Class name in stored files: diffusers', or one that it does not know if the model uses `OWN_OPTIONS`."""
        return OWN_CLASS_NAME if any(self.config[option] for option in OWN_OPTIONS) else STOCK_CLASS_NAME

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Any:
        """Load a model as `ModelMixin.from_pretrained` does, and check that no weight is missing.

        Raises:
            ValueError: if weights are missing. With `output_loading_info=True` you get the model and their names
                instead.

        Example:
            >>> transformer = PRXTransformer2DModel.from_pretrained("my-prx", subfolder="transformer")
        """
        if kwargs.get("output_loading_info") or kwargs.get("use_flashpack"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return load_complete(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

    def to_json_string(self) -> str:
        """Return config.json. It omits `OWN_OPTIONS` that are off, so that diffusers can load it."""
        stored = json.loads(super().to_json_string()) | {"_class_name": self.stored_class_name}
        stored = {key: value for key, value in stored.items() if value or key not in OWN_OPTIONS}
        return json.dumps(stored, indent=2, sort_keys=True) + "\n"

    @functools.wraps(ModelMixin.save_pretrained, assigned=())  # pipelines inspect the signature
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save a model as `ModelMixin.save_pretrained` does.

        Raises:
            ValueError: if the model is offloaded to disk, has adapters or was quantized after loading. Nothing is
                written.

        Example:
            >>> transformer.save_pretrained("my-transformer")
        """
        check_saving("transformer", self)
        super().save_pretrained(save_directory, *args, **kwargs)

    def enable_parallelism(self, *, config: ContextParallelConfig | ParallelConfig, cp_plan: Any = None) -> None:
        """Split one forward over several processes, each with a part of the image tokens (sampling only).

        Every process calls the model, or the pipeline, with the same arguments and gets the whole result. Text and
        masks stay whole on each process; attention exchanges image tokens for heads (Ulysses, arXiv 2309.14509).
        Initialize `torch.distributed` before, and set the device of each process.

        Args:
            config: ContextParallelConfig with an `ulysses_degree` that divides the heads. Image tokens are padded if
                it does not divide their number.
            cp_plan: must be None; the model has its own plan.

        Raises:
            ValueError: for another kind of parallelism, a degree that does not divide the heads, or a FirstBlockCache.
            RuntimeError: if parallelism is already on, or `torch.distributed` is not initialized.

        Example:
            >>> torch.distributed.init_process_group("nccl")
            >>> pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        """
        parallel = config.context_parallel_config if isinstance(config, ParallelConfig) else config
        if not isinstance(parallel, ContextParallelConfig):
            raise ValueError(f"`config` is {config}; accepted is a ContextParallelConfig, with an `ulysses_degree`.")
        if parallel.ring_degree > 1:
            raise ValueError(
                f"`config` has a `ring_degree` of {parallel.ring_degree}, which has to be 1: ring attention takes no"
                " mask, and would count the text once per process. Use `ulysses_degree`."
            )
        if self.config.num_heads % parallel.ulysses_degree:
            raise ValueError(
                f"`config` has an `ulysses_degree` of {parallel.ulysses_degree}, which has to divide the"
                f" {self.config.num_heads} attention heads."
            )
        if parallel.ulysses_anything:
            raise ValueError("`config` has `ulysses_anything`; leave it out: the model accepts any number of tokens.")
        if cp_plan is not None:
            raise ValueError("`cp_plan` is given; leave it out: the forward works only with the model's own plan.")
        _check_cache(self._cache_config, True)
        if self._parallel_config is not None:
            raise RuntimeError("Parallelism is already on. Load the model again to change it.")
        if not dist.is_initialized():
            raise RuntimeError("Call `torch.distributed.init_process_group` before `enable_parallelism`.")
        # diffusers' `enable_parallelism` (0.42) needs an accelerator and an attention backend that its templates know
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device_type = "cpu" if accelerator is None else accelerator.type
        mesh = parallel.mesh
        if mesh is None:
            mesh = init_device_mesh(device_type, parallel.mesh_shape, mesh_dim_names=parallel.mesh_dim_names)
        parallel_config = ParallelConfig(context_parallel_config=parallel)
        parallel_config.setup(dist.get_rank(), dist.get_world_size(), torch.device(device_type), mesh=mesh)
        self._parallel_config = parallel_config
        for processor in self.attn_processors.values():
            processor._parallel_config = parallel_config
        apply_context_parallel(self, parallel, self._cp_plan)

    def enable_cache(self, config: Any) -> None:
        """Reuse features of earlier steps, with diffusers' hooks (sampling only, one run at a time).

        Args:
            config: FirstBlockCacheConfig or MagCacheConfig (skip blocks when little changes), TaylorSeerCacheConfig
                (extrapolates attention or, with `use_lite_mode`, the final layer; arXiv 2503.06923), or
                PyramidAttentionBroadcastConfig (repeats attention, arXiv 2408.12588).

        Raises:
            ValueError: for another cache, or one that does not fit this model.

        Example:
            >>> from diffusers import FirstBlockCacheConfig
            >>> pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        """
        _check_cache(config, self._parallel_config is not None)
        skips_blocks = isinstance(config, (FirstBlockCacheConfig, MagCacheConfig))
        if not skips_blocks and not isinstance(config, (TaylorSeerCacheConfig, PyramidAttentionBroadcastConfig)):
            raise ValueError(
                f"`config` is a {type(config).__name__}; accepted are FirstBlockCacheConfig, MagCacheConfig,"
                " TaylorSeerCacheConfig and PyramidAttentionBroadcastConfig."
            )
        if skips_blocks and (self.config.fusion_range is not None or self.config.depth < 2):
            raise ValueError(
                f"`config` is a {type(config).__name__}, which skips blocks up to the last: it needs at least 2 blocks"
                f" and no `fusion_range`, but the model has {self.config.depth} and {self.config.fusion_range}."
            )
        if isinstance(config, TaylorSeerCacheConfig):  # its default names do not exist in this model
            if config.use_lite_mode:
                names = {"skip_predict_identifiers": [r"blocks\.\d+"], "cache_identifiers": ["final_layer"]}
                config = replace(config, use_lite_mode=False, **names)
            elif config.skip_predict_identifiers is None and config.cache_identifiers is None:
                config = replace(config, cache_identifiers=[r"blocks\.\d+\.attention"])
        TransformerBlockRegistry.register(PRXBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)

    def _rotary(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Return the rotary table of a token grid from a cache: it depends only on the shape."""
        if torch.compiler.is_compiling():
            return rotary_table(rows, columns, self.axes_dim, self.config.theta, device)
        key = (rows, columns, device)
        if key not in self._rotary_tables:
            # a table made while sampling must also serve a later training step
            with torch.inference_mode(False):
                self._rotary_tables[key] = rotary_table(rows, columns, self.axes_dim, self.config.theta, device)
        return self._rotary_tables[key]

    def _embed_time(
        self,
        timestep: torch.Tensor,
        height: int | None,
        width: int | None,
        dtype: torch.dtype,
        guidance: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embed timesteps (T,) and guidance scales (T,) or (1,) to the vectors (T, D) that modulate every block."""
        waves = {"max_period": self.config.time_max_period, "flip_sin_to_cos": True, "downscale_freq_shift": 0.0}
        temb = get_timestep_embedding(
            timestep, TIME_EMBEDDING_SIZE, scale=self.config.time_factor, **waves
        )  # (T, 256)
        temb = self.time_in(temb.to(dtype))  # (T, D)
        if self.guidance_embedder is not None:  # as FLUX.1-dev and arXiv 2210.03142
            assert guidance is not None
            scales = guidance.to(timestep).reshape(-1)  # (T,)
            embedded = get_timestep_embedding(scales, TIME_EMBEDDING_SIZE, scale=GUIDANCE_FACTOR, **waves)  # (T, 256)
            temb = temb + self.guidance_embedder(embedded.to(dtype))  # (T, D)
        if self.resolution_embedder is not None:
            temb = temb + self.resolution_embedder(height, width, temb.device, dtype)  # (T, D)
        return temb

    def _embed_text(
        self,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        value_weights: torch.Tensor | None,
        height: int | None,
        width: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Embed text to tokens (B, L, D), with their mask and weights; L then includes resolution tokens."""
        txt = self.txt_in(encoder_hidden_states)  # (B, L, D)
        if self.resolution_token_embedder is not None:
            size_tokens = self.resolution_token_embedder(height, width, txt.device, txt.dtype)  # (1, 2, D)
            txt = torch.cat((size_tokens.expand(len(txt), -1, -1), txt), dim=1)  # (B, 2 + L, D)
            attention_mask = None if attention_mask is None else F.pad(attention_mask.bool(), (2, 0), value=True)
            value_weights = None if value_weights is None else F.pad(value_weights, (2, 0), value=1.0)  # (B, 2 + L)
        return txt, attention_mask, value_weights

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
    def encode_text_context(
        self,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        text_value_weights: torch.Tensor | None = None,
    ) -> PRXTextContext:
        """Project text to the keys and values of all blocks, for any number of forwards.

        Args:
            encoder_hidden_states: text (B, L, `context_in_dim`); B = 1 serves any number of images.
            attention_mask: (B, L), true where a text token counts, or (B, N, L), see `forward`; None: all count.
            height: H of the later `hidden_states`; needed with `resolution_tokens`.
            width: W, likewise.
            attention_kwargs: `{"scale": s}` multiplies the weights of LoRA adapters by s.
            text_value_weights: (B, L), factors of the values of text tokens; None: all 1.

        Raises:
            ValueError: if a shape is not as described, or a needed size is missing.

        Example:
            >>> context = transformer.encode_text_context(embeds, mask)
            >>> for timestep in timesteps:
            ...     velocity = transformer(latents, timestep, text_context=context).sample
        """
        self._check_text(encoder_hidden_states, attention_mask, text_value_weights)
        if self.resolution_token_embedder is not None and (height is None or width is None):
            raise ValueError("This model puts the size before the text as tokens: pass `height` and `width`.")
        txt, mask, weights = self._embed_text(
            encoder_hidden_states, attention_mask, text_value_weights, height, width
        )  # (B, L, D) and (B, L)
        blocks: Any = self.blocks
        projected = [block.attention.project_text(txt, weights) for block in blocks]  # (B, L, h, d) each
        # the values are a view of the joint projection, whose keys are not needed any more
        keys_values = tuple((key, value.contiguous()) for key, value in projected)
        return PRXTextContext(keys_values, None if mask is None else mask.bool())

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
    def encode_timesteps(
        self,
        timestep: torch.Tensor,
        height: int | None = None,
        width: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        guidance: torch.Tensor | None = None,
    ) -> PRXTimeContext:
        """Compute the modulation of all blocks for all timesteps of a run at once.

        Args:
            timestep: (T,) noise levels in [0, 1], on the device of the model.
            height: H of the later `hidden_states`; needed with `resolution_embeds`.
            width: W, likewise.
            attention_kwargs: `{"scale": s}` multiplies the weights of LoRA adapters by s.
            guidance: (1,), guidance scale; needed with `guidance_embeds`, and only then accepted.

        Raises:
            ValueError: if the shape is not as described, or a needed size or scale is missing.

        Example:
            >>> times = transformer.encode_timesteps(scheduler.sigmas[:-1])
            >>> velocity = transformer(latents, encoder_hidden_states=embeds, time_context=times.at(0)).sample
        """
        if timestep.ndim != 1:
            raise ValueError(f"`timestep` must have the shape (T,), got {tuple(timestep.shape)}.")
        if self.resolution_embedder is not None and (height is None or width is None):
            raise ValueError("This model adds the size to the timestep: pass `height` and `width`.")
        self._check_guidance(guidance, 1)
        temb = self._embed_time(timestep, height, width, self.dtype, guidance)  # (T, D)
        blocks: Any = self.blocks
        modulations = tuple(torch.cat(block.modulation(temb), dim=1) for block in blocks)  # (T, 6, D) each
        return PRXTimeContext(modulations, self.final_layer.adaLN_modulation(temb).unflatten(-1, (2, -1)))

    def _check_guidance(self, guidance: torch.Tensor | None, rows: int) -> None:
        if self.guidance_embedder is None and guidance is not None:
            raise ValueError("`guidance` is given, but this model has no `guidance_embeds`: leave it out.")
        if self.guidance_embedder is not None and (guidance is None or tuple(guidance.shape) not in {(1,), (rows,)}):
            shape = None if guidance is None else tuple(guidance.shape)
            raise ValueError(
                f"`guidance` must have the shape ({rows},) or (1,): this model has `guidance_embeds`, got {shape}."
            )

    def _check_text(
        self,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        value_weights: torch.Tensor | None,
    ) -> None:
        text, width = tuple(encoder_hidden_states.shape), self.config.context_in_dim
        if len(text) != 3 or text[2] != width:
            raise ValueError(f"`encoder_hidden_states` must have the shape (B, L, {width}), got {text}.")
        mask = text[:2] if attention_mask is None else tuple(attention_mask.shape)
        if (mask[0], *mask[-1:]) != text[:2] or len(mask) not in (2, 3):
            raise ValueError(
                f"`attention_mask` must have the shape {text[:2]} of the text tokens, or ({text[0]}, N, {text[1]}), "
                f"got {mask}."
            )
        if value_weights is not None and value_weights.shape != text[:2]:
            raise ValueError(
                f"`text_value_weights` must have the shape {text[:2]} of the text tokens, "
                f"got {tuple(value_weights.shape)}."
            )

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | PRXTimeContext,
        text: torch.Tensor | tuple[PRXTextContext, ...],
        attention_mask: torch.Tensor | None,
        value_weights: torch.Tensor | None,
        route: TokenRoute | None,
        feature_block: int | Sequence[int] | None,
        changed_blocks: dict[str, Collection[int]],
    ) -> None:
        channels, patch_size, width = self.config.in_channels, self.config.patch_size, self.config.context_in_dim
        depth = self.config.depth
        shape = tuple(hidden_states.shape)
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(f"`hidden_states` must have the shape (B, {channels}, H, W), got {shape}.")
        if shape[2] % patch_size or shape[3] % patch_size:
            raise ValueError(
                f"`hidden_states` must have a height and a width that are multiples of the patch size {patch_size}, "
                f"got {shape[2]} x {shape[3]}."
            )
        if isinstance(timestep, PRXTimeContext):
            if len(timestep.blocks) != depth or len(timestep.final) != 1:
                raise ValueError(
                    f"`time_context` must hold one timestep (select it with `at`) for the {depth} blocks, "
                    f"got {len(timestep.final)} for {len(timestep.blocks)}."
                )
        elif timestep.ndim != 1 or timestep.shape[0] not in (1, shape[0]):
            raise ValueError(f"`timestep` must have the shape ({shape[0]},) or (1,), got {tuple(timestep.shape)}.")
        if isinstance(text, tuple):
            rows = shape[0] // max(len(text), 1)
            for part in text:
                if len(part.keys_values) != depth or len(part.keys_values[0][0]) not in (1, rows):
                    raise ValueError(
                        f"`text_context` must hold 1 or {rows} rows ({shape[0]} rows of `hidden_states`, contexts: "
                        f"{len(text)}) for {depth} blocks, "
                        f"got {len(part.keys_values[0][0])} for {len(part.keys_values)}."
                    )
            if rows * len(text) != shape[0]:
                raise ValueError(
                    f"`text_context` must split {shape[0]} rows into equal parts, got {len(text)} contexts."
                )
            for name, given in (("attention_mask", attention_mask), ("text_value_weights", value_weights)):
                if given is not None:
                    raise ValueError(f"`{name}` is part of a `text_context`: pass it to `encode_text_context`.")
        else:
            if text.ndim == 3 and text.shape[0] != shape[0]:
                raise ValueError(
                    f"`encoder_hidden_states` must have the shape ({shape[0]}, L, {width}), got {tuple(text.shape)}."
                )
            self._check_text(text, attention_mask, value_weights)
        tokens = (shape[2] // patch_size) * (shape[3] // patch_size)
        for mask in [part.mask for part in text] if isinstance(text, tuple) else [attention_mask]:
            if mask is not None and mask.ndim == 3 and mask.shape[1] != tokens:
                raise ValueError(f"`attention_mask` is for {mask.shape[1]} image tokens, but there are {tokens}.")
        for name, blocks in changed_blocks.items():
            if not all(0 <= index < depth for index in blocks):
                raise ValueError(f"`{name}` must be out of the {depth} blocks, from 0, got {sorted(blocks)}.")
            if blocks and self.is_cache_enabled:
                raise ValueError(
                    f"`{name}` is given, but the model has a cache of what its blocks computed: call "
                    "`disable_cache()` before."
                )
        blocks = _as_blocks(feature_block)
        if any(not 0 <= block < depth for block in blocks) or list(blocks) != sorted(set(blocks)):
            raise ValueError(
                f"`feature_block` must be one of the {depth} blocks, from 0, or several in order, got {feature_block}."
            )
        if route is not None and len(blocks) > 1:
            raise ValueError("Several blocks in `feature_block` cannot be combined with a `route`.")
        if self._parallel_config is not None and (route is not None or feature_block is not None):
            name = "feature_block" if route is None else "route"
            raise ValueError(f"`{name}` is given, but in parallel each process has only some of the tokens.")
        if route is not None:
            self._check_route(route, shape[0], tokens)

    def _check_route(self, route: TokenRoute, rows: int, tokens: int) -> None:
        depth, fusion_range = self.config.depth, self.config.fusion_range
        if not _is_range((route.start, route.stop), depth):
            raise ValueError(
                f"`route` must go around a half-open range [start, stop) of the {depth} blocks, "
                f"got [{route.start}, {route.stop})."
            )
        if fusion_range is not None and (route.start, route.stop) != tuple(fusion_range):
            raise ValueError(
                f"`route` must go around the blocks [{fusion_range[0]}, {fusion_range[1]}) that this model fuses "
                f"(`fusion_range`), got [{route.start}, {route.stop})."
            )
        kept = tuple(route.kept.shape)
        if len(kept) != 2 or kept[0] != rows or not 1 <= kept[1] <= tokens:
            raise ValueError(
                f"`route.kept` must have the shape ({rows}, K) with 1 <= K <= {tokens} tokens, got {kept}."
            )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        route: TokenRoute | None = None,
        feature_block: int | Sequence[int] | None = None,
        text_context: PRXTextContext | tuple[PRXTextContext, ...] | None = None,
        time_context: PRXTimeContext | None = None,
        text_value_weights: torch.Tensor | None = None,
        skip_blocks: Collection[int] = (),
        identity_attention_blocks: Collection[int] = (),
        guidance: torch.Tensor | None = None,
    ) -> PRXTransformer2DModelOutput | tuple[torch.Tensor | None, ...]:
        """Predict the velocity, or the clean image if trained for it, of noisy latents or pixels.

        Args:
            hidden_states: noisy input (B, C, H, W); H and W are multiples of p.
            timestep: (B,) or (1,), noise level in [0, 1]; 0 is the clean image.
            encoder_hidden_states: text (B, L, `context_in_dim`).
            attention_mask: (B, L), true where a text token counts; or (B, N, L), true where it counts for an image
                token (rows of patches, top to bottom). None: all count, which is faster.
            attention_kwargs: `{"scale": s}` multiplies the weights of LoRA adapters by s for this call.
            return_dict: False to return a plain tuple.
            route: image tokens that skip a range of blocks.
            feature_block: block, counted from 0, whose output is returned as well; or several blocks, in order, whose
                outputs are returned as a tuple.
            text_context: result of `encode_text_context`, in place of `encoder_hidden_states` and its mask. Or G of
                them, each with its own L and mask (the branches of guidance): the first is for the first B / G rows,
                and so on.
            time_context: one timestep of `encode_timesteps`, in place of `timestep`, for all rows.
            text_value_weights: (B, L), factors of the values of text tokens in every block; None: all 1.
            skip_blocks: blocks, counted from 0, that leave the image tokens unchanged (skip-layer guidance).
            identity_attention_blocks: blocks in which an image token attends to the text and to itself only
                (perturbed-attention guidance, arXiv 2403.17377).
            guidance: (B,) or (1,), guidance scale of a model with `guidance_embeds`, which learned it as an input
                (arXiv 2210.03142). Part of a `time_context`.

        Returns:
            `PRXTransformer2DModelOutput`, whose `sample` has the shape of `hidden_states`; or a tuple: (sample,), or
            (sample, features, feature_indices) with a `feature_block`.

        Raises:
            ValueError: if a shape is not as described, timestep or text is missing or given twice, or blocks are
                skipped or perturbed while the model has a cache.

        Example:
            >>> velocity = transformer(latents, torch.tensor([0.5]), embeds, mask).sample
        """
        if (timestep is None) == (time_context is None):
            raise ValueError("Pass either `timestep` or `time_context`.")
        if (encoder_hidden_states is None) == (text_context is None):
            raise ValueError("Pass either `encoder_hidden_states` or `text_context`.")
        contexts = (text_context,) if isinstance(text_context, PRXTextContext) else text_context
        time: Any = timestep if time_context is None else time_context
        text: Any = encoder_hidden_states if contexts is None else contexts
        changed_blocks = {"skip_blocks": skip_blocks, "identity_attention_blocks": identity_attention_blocks}
        self._check_inputs(
            hidden_states, time, text, attention_mask, text_value_weights, route, feature_block, changed_blocks
        )
        if time_context is None:
            self._check_guidance(guidance, len(hidden_states))
        elif guidance is not None:
            raise ValueError("`guidance` is part of a `time_context`: pass it to `encode_timesteps`.")
        height, width = hidden_states.shape[-2:]
        patch_size, depth = self.config.patch_size, self.config.depth

        patches = patchify(hidden_states, patch_size)  # (B, N, C * p * p)
        if self._parallel_config is not None:
            degree = self._parallel_config.context_parallel_config.ulysses_degree
            patches = F.pad(patches, (0, 0, 0, -patches.shape[1] % degree))  # N a multiple of w until the final layer
        img = self.img_in(patches)  # (B, N, D), in parallel (B, N/w, D)
        table = self._rotary(height // patch_size, width // patch_size, img.device)  # (N, d/2, 2)

        if time_context is None:
            final_time: Any = self._embed_time(time, height, width, img.dtype, guidance)  # (B, D)
            times: list[Any] = [final_time] * depth
        else:
            times = [block[0].unbind() for block in time_context.blocks]  # 6 x (D,) each
            final_time = time_context.final[0].unbind()  # 2 x (D,)
            # a linear layer returns a view, a block does not: dynamo would compile the first block separately
            img = img.clone()  # (B, N, D)

        text_mask: AttentionMask
        if contexts is None:
            txt, text_mask, weights = self._embed_text(
                text, attention_mask, text_value_weights, height, width
            )  # (B, L, D), (B, L) and (B, L)
            texts: list[Any] = [txt] * depth
        else:
            weights = None  # they are in the values already
            text_mask = tuple(context.mask for context in contexts)  # (B, L) each, or None
            texts = list(zip(*(context.keys_values for context in contexts)))  # (B, L, h, d) each

        start, stop = (self.config.fusion_range or (None, None)) if route is None else (route.start, route.stop)
        joint_mask = join_mask(text_mask, len(table))  # (B, 1, 1, L + N)
        feature_blocks = _as_blocks(feature_block)
        rotary, mask, found, feature_indices = table, joint_mask, [], None
        for index, block in enumerate(self.blocks):
            if index == start:
                dense = img  # (B, N, D)
                if route is not None:
                    img, rotary = route.gather(img), table[route.kept]  # (B, K, D) and (B, K, d/2, 2)
                    mask = join_mask(text_mask, img.shape[1], route)  # (B, 1, 1, L + K)
            block_mask = mask
            if index in identity_attention_blocks:
                block_mask = isolate_tokens(mask, texts[index], rotary.shape[-3])  # (B, 1, N, L + N)
            recomputed = self.gradient_checkpointing and index < self.config.depth - self.kept_blocks
            if index in skip_blocks:
                pass
            elif torch.is_grad_enabled() and recomputed:
                img = self._gradient_checkpointing_func(
                    block, img, texts[index], times[index], rotary, block_mask, weights
                )  # (B, N or K, D)
            else:
                img = block(img, texts[index], times[index], rotary, block_mask, weights)  # (B, N or K, D)
            if index in feature_blocks:
                found.append(img)  # (B, N or K, D)
                if route is not None and route.start <= index < route.stop:
                    feature_indices = route.kept  # (B, K)
            if index + 1 == stop:
                if self.fusion is not None:
                    img = self.fusion(dense, img, route)  # (B, N, D)
                elif route is not None:
                    img = route.scatter(img, dense)  # (B, N, D); TREAD: the other tokens are unchanged
                rotary, mask = table, joint_mask

        patches = self.final_layer(img, final_time)[:, : len(table)]  # (B, N, C * p * p)
        sample = unpatchify(patches, patch_size, height, width)  # (B, C, H, W)
        features: Any = None
        if feature_block is not None:
            features = found[0] if isinstance(feature_block, int) else tuple(found)  # (B, N or K, D)
        if not return_dict:
            return (sample,) if feature_block is None else (sample, features, feature_indices)
        return PRXTransformer2DModelOutput(sample, features, feature_indices)


def check_saving(name: str, module: nn.Module) -> None:
    """Check that a module can be saved.

    Args:
        name: name of the component, for the message.
        module: any network of diffusers or transformers.

    Raises:
        ValueError: if it is offloaded to disk, has adapters or was quantized after loading.

    Example:
        >>> check_saving("transformer", pipe.transformer)
    """
    if is_offloaded_to_disk(module):
        raise ValueError(
            f"`{name}` is offloaded to disk, and its weights are not in memory. Load the pipeline again, and save it "
            "before `enable_group_offload` or without `offload_to_disk_path`."
        )
    saves_itself = getattr(module, "hf_quantizer", None) is not None
    if not saves_itself and any(type(parameter) is not nn.Parameter for parameter in module.parameters()):
        raise ValueError(
            f"`{name}` was quantized after it was loaded; a file cannot hold such weights. To save it quantized, load "
            "it with a `quantization_config`."
        )
    lora_layers = [getattr(part, "lora_A", None) for part in module.modules()]
    if adapters := [names for names in lora_layers if isinstance(names, nn.ModuleDict)]:
        raise ValueError(
            f"`{name}` has the adapters {sorted(set().union(*adapters))}. To save it without them, call "
            "`unload_lora_weights` of the pipeline before. To save them in the weights, call `fuse_lora` before that."
        )


def _as_blocks(feature_block: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the blocks of `feature_block`: none, one or several."""
    if feature_block is None:
        return ()
    return (feature_block,) if isinstance(feature_block, int) else tuple(feature_block)


def join_mask(text_mask: AttentionMask, tokens: int, route: TokenRoute | None = None) -> Any:
    """Extend a mask of text tokens by N image tokens, which all count.

    (B, L) becomes (B, 1, 1, L + N). (B, N, L), one row per image token, becomes (B, 1, N, L + N); with a route, only
    the rows of the tokens that it keeps. None stays None: all tokens count. A tuple (parts of the text) gives a tuple.
    """
    if isinstance(text_mask, tuple):
        return tuple(join_mask(part, tokens, route) for part in text_mask)
    if text_mask is None:
        return None
    text_mask = text_mask.bool()
    if text_mask.ndim == 2:
        text_mask = text_mask[:, None]  # (B, 1, L)
    elif route is not None:
        text_mask = route.gather(text_mask.expand(len(route.kept), -1, -1))  # (B, K, L)
    return F.pad(text_mask, (0, tokens), value=True)[:, None]  # (B, 1, 1 or N, L + N)


def isolate_tokens(mask: AttentionMask, text: torch.Tensor | tuple[TextKeysValues, ...], tokens: int) -> Any:
    """Restrict a mask of `join_mask`, so that each of N image tokens attends to the text and to itself only.

    Args:
        mask: (B, 1, 1, L + N) or (B, 1, N, L + N), None, or a tuple of these.
        text: text of the block, for L: hidden states, or a tuple of keys and values if `mask` is one.
        tokens: N.

    Returns:
        (B or 1, 1, N, L + N), or a tuple of these.
    """
    if isinstance(mask, tuple):
        return tuple(isolate_tokens(part, keys_values[0], tokens) for part, keys_values in zip(mask, text))
    assert isinstance(text, torch.Tensor)
    own = torch.eye(tokens, dtype=torch.bool, device=text.device)  # (N, N)
    own = F.pad(own, (text.shape[1], 0), value=True)[None, None]  # (1, 1, N, L + N)
    return own if mask is None else mask & own


def _check_cache(config: Any, parallel: bool) -> None:
    """Raise a ValueError for a cache with which processes may run different blocks and wait for each other forever."""
    if parallel and isinstance(config, FirstBlockCacheConfig):
        raise ValueError(
            "`config` is a FirstBlockCacheConfig, which does not work with parallelism: each process would skip blocks"
            " by its own tokens. Use another cache."
        )


def _is_range(span: tuple[int, int], depth: int) -> bool:
    """True if [start, stop) is a range of at least one of `depth` blocks."""
    return isinstance(span, (list, tuple)) and len(span) == 2 and 0 <= span[0] < span[1] <= depth
