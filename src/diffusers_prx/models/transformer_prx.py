"""The PRX transformer: image tokens attend to themselves and to text tokens that no block ever changes.

Shapes in this file: B batch, C channels, H x W latent (or pixel) height and width, p patch size, D hidden size,
h heads, d head dimension (h * d = D), N = (H/p) * (W/p) image tokens, L text tokens, T timesteps.

What no step of a sampling run changes can be computed once before it: `PRXTextContext` and `PRXTimeContext`. They are
values that the caller keeps and passes in; the model remembers nothing of a run.
"""

import functools
import json
import math
import os
from collections.abc import Callable
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
from .token_routing import TokenRoute

NORM_EPS = 1e-6
TIME_EMBEDDING_SIZE = 256

# Devices known to have float64 and complex numbers; others (MPS, NPUs, ...) are not asked for either.
NUMBER_RICH_DEVICES = ("cpu", "cuda")

# Configuration that diffusers' PRXTransformer2DModel does not have. A model that uses any of it is stored under a
# class name that diffusers does not know, and so refuses: it would load the rest without these weights.
OWN_OPTIONS = ("resolution_tokens", "fusion_range")
STOCK_CLASS_NAME, OWN_CLASS_NAME = "PRXTransformer2DModel", "PRXExtendedTransformer2DModel"


def load_complete(load: Callable[..., Any], source: Any, **kwargs: Any) -> Any:
    """Load a model whose file holds all of its weights; diffusers and transformers fill at random what is missing.

    Args:
        load: `from_pretrained` of a class of diffusers or transformers.
        source: first argument of `load`.
        kwargs: its other arguments.

    Raises:
        ValueError: names the weights that are missing.
    """
    try:
        model, info = load(source, output_loading_info=True, **kwargs)
    except NotImplementedError:  # `device_map` cannot move what is not there
        if kwargs.get("device_map") is None:
            raise
        load_complete(load, source, **kwargs | {"device_map": None})
        raise
    lacking = set(info["missing_keys"])
    if not {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())):
        # what an index promises and no shard holds; offloaded weights wait there as well
        lacking |= {name for name, weight in model.state_dict().items() if weight.is_meta}
    if lacking:
        raise ValueError(
            f"The weights of {type(model).__name__} in {source} are not complete: {len(lacking)} are missing, such as"
            f" {sorted(lacking)[:8]}. Save or download them again."
        )
    return model


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images (B, C, H, W) into a row-major sequence of patches (B, N, C * p * p)."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def unpatchify(patches: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """Put a sequence of patches (B, N, C * p * p) together again as images (B, C, H, W)."""
    rows, columns = height // patch_size, width // patch_size
    images = patches.reshape(patches.shape[0], rows, columns, -1, patch_size, patch_size)
    return images.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, height, width)


def rotary_table(
    rows: int, columns: int, axes_dim: tuple[int, ...], theta: float, device: torch.device
) -> torch.Tensor:
    """Cosines and sines of the axial rotary embedding (RoFormer, arXiv 2104.09864), of shape (N, d/2, 2).

    The first `axes_dim[0] / 2` angles follow the row of a token, the others its column. They are computed in float64,
    on the device itself where possible: a copy from the CPU inside a compiled graph would rule out CUDA graphs.
    """
    place = device if device.type in NUMBER_RICH_DEVICES else torch.device("cpu")
    row_ids, column_ids = (torch.arange(n, dtype=torch.float64, device=place) for n in (rows, columns))
    angles = []
    for positions, dim in zip(torch.meshgrid(row_ids, column_ids, indexing="ij"), axes_dim):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=place) / dim)  # (dim/2,)
        angles.append(positions.reshape(-1, 1) * frequencies)  # (N, dim/2)
    table = torch.cat(angles, dim=-1)  # (N, d/2)
    return torch.stack((table.cos(), table.sin()), dim=-1).float().to(device)  # (N, d/2, 2)


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate neighboring pairs of features of x (B, N, h, d) by the angles of their tokens; float32 throughout."""
    pairs, angles = x.unflatten(-1, (-1, 2)), rotary.unsqueeze(-3)  # (B, N, h, d/2, 2) and (N, 1, d/2, 2)
    if x.device.type in NUMBER_RICH_DEVICES and not torch.compiler.is_compiling():
        # one pass over memory where the lines below take seven; inductor has no code for complex numbers
        product = torch.view_as_complex(pairs) * torch.view_as_complex(angles)  # (B, N, h, d/2)
        return torch.view_as_real(product).flatten(-2)  # (B, N, h, d)
    (even, odd), (cos, sin) = pairs.unbind(-1), angles.unbind(-1)  # (B, N, h, d/2) and (N, 1, d/2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)  # (B, N, h, d)


def exchange_tokens_for_heads(x: torch.Tensor, tokens: int, config: ContextParallelConfig) -> torch.Tensor:
    """From 1/w of the tokens, padded to a multiple of w, to `tokens` = N with 1/w of the heads, on w processes.

    (B, n, h, d) to (B, N, h/w, d): Ulysses, arXiv 2309.14509. The padding is gone on this side, so it needs no mask.
    """
    return SeqAllToAllDim.apply(ulysses_group(config), x, 2, 1)[:, :tokens]  # (B, N, h/w, d)


def exchange_heads_for_tokens(x: torch.Tensor, tokens: int, config: ContextParallelConfig) -> torch.Tensor:
    """The way back: from (B, N, h/w, d) to (B, n, h, d) with `tokens` = n, in which the padding is zero."""
    x = F.pad(x, (0, 0, 0, 0, 0, config.ulysses_degree * tokens - x.shape[1]))  # (B, w * n, h/w, d)
    return SeqAllToAllDim.apply(ulysses_group(config), x, 1, 2)  # (B, n, h, d)


class PRXRMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension, computed and returned in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), NORM_EPS)


# Keys and values of text in one block, (B, L, h, d) each.
TextKeysValues: TypeAlias = tuple[torch.Tensor, torch.Tensor]
# A mask or None, or for each part of the text one of these.
AttentionMask: TypeAlias = torch.Tensor | tuple[torch.Tensor | None, ...] | None


@dataclass(frozen=True)
class PRXTextContext:
    """What the blocks read of a text: computed once per prompt, since no block changes it and no step either.

    `PRXTransformer2DModel.encode_text_context` makes it. It belongs to the weights and adapters that made it.

    Args:
        keys_values: for each block, keys and values (B, L, h, d); B = 1 serves any number of rows.
        mask: bool (B, L), true where a token counts; None where all of them do.
    """

    keys_values: tuple[TextKeysValues, ...]
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class PRXTimeContext:
    """What the blocks make of timesteps: their modulation, computed for all steps of a run in one go.

    `PRXTransformer2DModel.encode_timesteps` makes it. It belongs to the weights and adapters that made it.

    Args:
        blocks: for each block, shift, scale and gate of attention and MLP for T timesteps, (T, 6, D).
        final: shift and scale of the final layer, (T, 2, D).
    """

    blocks: tuple[torch.Tensor, ...]
    final: torch.Tensor

    def at(self, step: int) -> "PRXTimeContext":
        """The one timestep (T = 1) with this index, counted from 0, which a forward takes."""
        return PRXTimeContext(tuple(block[step, None] for block in self.blocks), self.final[step, None])


class PRXAttnProcessor:
    """Attention of image tokens over the joint sequence of text and image tokens.

    On several processes (`enable_parallelism`) each of them comes with its n of the N image tokens and with the whole
    text. In here it has all tokens and its share of the heads, so that mask, rotary table and text stay what they are
    on one process, and no text key counts twice. (diffusers' own templates would take the keys of all processes for
    parts of one sequence.)
    """

    # set by `set_attention_backend` and by `enable_parallelism`
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: "PRXAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[TextKeysValues, ...],
        image_rotary_emb: torch.Tensor,
        attention_mask: AttentionMask = None,
    ) -> torch.Tensor:
        """Attend from `hidden_states` (B, N, D) to `encoder_hidden_states` (B, L, D) and to itself.

        `attention_mask` is bool (B, 1, 1, L + N), true where a key may be looked at, or None. Returns (B, N, D).

        Or the text comes as keys and values that were projected before, in parts of a length and with a mask of their
        own (the branches of guidance): the first part is for the first rows, and so on, as many for each.
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
            text_key, text_value = attn.project_text(encoder_hidden_states)  # (B, L, h, d) each
            hidden_states = self.attend(query, key, value, text_key, text_value, attention_mask)  # (B, N, h, d)
        else:
            assert isinstance(attention_mask, tuple)
            images = [x.unflatten(0, (len(encoder_hidden_states), -1)).unbind() for x in (query, key, value)]
            attended = []  # for each part of the text, (B / parts, N, h, d)
            for q, k, v, text, mask in zip(*images, encoder_hidden_states, attention_mask):
                text_key, text_value = (x.expand(len(q), -1, -1, -1) for x in text)  # (B / parts, L, h, d) each
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
        """Attention (B, N, h, d) of image tokens (B, N, h, d) to text tokens (B, L, h, d) and to themselves."""
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
    """Projections and norms of one attention layer; the arithmetic is in its processor."""

    processor: Any
    _default_processor_cls = PRXAttnProcessor
    _available_processors = [PRXAttnProcessor]  # noqa: RUF012 (the name and form are diffusers')
    _supports_qkv_fusion = False  # the projections are stored fused

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

    def project_text(self, encoder_hidden_states: torch.Tensor) -> TextKeysValues:
        """Keys and values (B, L, h, d) of text (B, L, D), which has no position: they depend on nothing else."""
        text_kv = self.txt_kv_proj(encoder_hidden_states).unflatten(-1, (2, self.heads, self.head_dim))
        text_key, text_value = text_kv.unbind(2)  # (B, L, h, d) each
        return self.norm_added_k(text_key).to(text_value.dtype), text_value

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[TextKeysValues, ...],
        image_rotary_emb: torch.Tensor,
        attention_mask: AttentionMask = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, image_rotary_emb, attention_mask)


class PRXModulation(nn.Module):
    """Shift, scale and gate for the two halves of a block, from the conditioning vector (adaLN-Zero, 2212.09748)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.lin = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.lin(F.silu(temb))[:, None, :].chunk(6, dim=-1)  # 6 x (B, 1, D)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm of x (B, N, D), then shift and scale, (B, 1, D) or, the same for all rows, (D,).

    PyTorch's kernel takes mean and variance in float32 whatever the input's type, so no cast is needed for that.
    """
    if shift.ndim == 1:  # what is the same for all tokens is the norm's own weight and bias: one pass over memory
        return F.layer_norm(x, x.shape[-1:], 1 + scale, shift, NORM_EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


class PRXBlock(nn.Module):
    """One transformer block: modulated joint attention, then a modulated gated MLP; the text stays as it is."""

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
    ) -> torch.Tensor:
        modulation = self.modulation(temb) if isinstance(temb, torch.Tensor) else temb
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation  # (B, 1, D) or (D,) each

        x = modulate(hidden_states, attn_shift, attn_scale)  # (B, N, D)
        x = self.attention(x, encoder_hidden_states, image_rotary_emb, attention_mask)  # (B, N, D)
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
    """Sinusoidal embeddings (2, 128), float32, of the height and the width of latents or pixels."""
    return get_timestep_embedding(
        torch.tensor([height, width], device=device, dtype=torch.float32),
        TIME_EMBEDDING_SIZE // 2,
        max_period=max_period,
        flip_sin_to_cos=True,
        downscale_freq_shift=0.0,
    )


class PRXResolutionEmbedder(nn.Module):
    """Height and width as a vector to add to the timestep's."""

    def __init__(self, hidden_size: int, max_period: int):
        super().__init__()
        self.max_period = max_period
        self.mlp = PRXMLPEmbedder(TIME_EMBEDDING_SIZE, hidden_size)

    def forward(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        features = embed_resolution(height, width, self.max_period, device)  # (2, 128)
        return self.mlp(features.reshape(1, -1).to(dtype))  # (1, D)


class PRXResolutionTokens(nn.Module):
    """Height and width as two tokens that stand before the text."""

    def __init__(self, hidden_size: int, max_period: int):
        super().__init__()
        self.max_period = max_period
        self.height = PRXMLPEmbedder(TIME_EMBEDDING_SIZE // 2, hidden_size)
        self.width = PRXMLPEmbedder(TIME_EMBEDDING_SIZE // 2, hidden_size)

    def forward(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        features = embed_resolution(height, width, self.max_period, device).to(dtype)  # (2, 128)
        return torch.stack((self.height(features[:1]), self.width(features[1:])), dim=1)  # (1, 2, D)


class PRXFusion(nn.Module):
    """Fuses the tokens before a range of blocks with those behind it (SPRINT, arXiv 2510.21986)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(2 * hidden_size, hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, dense: torch.Tensor, deep: torch.Tensor, route: TokenRoute | None) -> torch.Tensor:
        """Tokens (B, N, D) from those before (B, N, D) and behind (B, N or K, D); the mask token where none came."""
        if route is not None:
            deep = route.scatter(deep, self.mask_token.to(deep.dtype).expand_as(dense))  # (B, N, D)
        return self.linear(torch.cat((dense, deep), dim=-1))  # (B, N, D)


class PRXFinalLayer(nn.Module):
    """Modulated norm, then the projection of every token to the values of its patch."""

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
    """What `PRXTransformer2DModel` returns.

    Args:
        sample (`torch.Tensor` of shape (B, C, H, W)): the prediction.
        features (`torch.Tensor` of shape (B, K, D), *optional*): what block `feature_block` gave, if asked for.
        feature_indices (`torch.Tensor` of shape (B, K), *optional*): which of the N tokens they belong to; None where
            they are all of them in order.
    """

    features: torch.Tensor | None = None
    feature_indices: torch.Tensor | None = None


class PRXTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    """PRX, the text-to-image transformer of Photoroom (https://github.com/Photoroom/PRX).

    Configuration and state-dict keys are those of the class of the same name in diffusers, so that weights go both
    ways; but for `resolution_tokens` and `fusion_range`, which diffusers does not have: models with one of them are
    stored as PRXExtendedTransformer2DModel. A model made from a configuration is initialized for training from
    scratch (`init_weights`).

    Args:
        in_channels (`int`): channels C of the latents, or 3 for pixels.
        patch_size (`int`): side p of the square patch that becomes one token.
        context_in_dim (`int`): width of the text encoder's hidden states.
        hidden_size (`int`): width D of the tokens.
        mlp_ratio (`float`): width of the gated MLP over `hidden_size`.
        num_heads (`int`): attention heads; must divide `hidden_size`.
        depth (`int`): number of blocks.
        axes_dim (`tuple[int, int]`): features of a head that encode the row and the column; both even, their sum is
            `hidden_size / num_heads`.
        theta (`int`): base of the rotary frequencies.
        time_factor (`float`): what timesteps in [0, 1] are multiplied by before their sinusoidal embedding.
        time_max_period (`int`): longest period of the sinusoidal embeddings of timestep and resolution.
        bottleneck_size (`int`, *optional*): width of a linear bottleneck between patch and token (JiT, arXiv
            2511.13720); None for one linear layer.
        resolution_embeds (`bool`): add an embedding of (H, W) to the timestep's.
        resolution_tokens (`bool`): put an embedding of H and one of W before the text, as two tokens.
        fusion_range (`tuple[int, int]`, *optional*): half-open range of blocks whose output is fused with their input
            by a linear layer (SPRINT, arXiv 2510.21986), so that a `route` around them may drop tokens; None for no
            fusion. It runs with and without a route.

    Raises:
        ValueError: if the sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PRXBlock"]  # noqa: RUF012 (the names and forms here are diffusers')
    _repeated_blocks = ["PRXBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        "norm", "time_in", "resolution_", "modulation", "img_in", "txt_in", "final_layer",
    ]  # fmt: skip
    # image tokens are split over processes from their embedding to the last projection; see `enable_parallelism`
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
        axes = (32, 32) if axes_dim is None else tuple(axes_dim)  # None is how stock configurations say (32, 32)
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
        self.kept_blocks = 0  # with checkpointing: so many of the last blocks keep their activations all the same
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
        self.blocks = nn.ModuleList([PRXBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = PRXFinalLayer(hidden_size, patch_values)
        self.fusion = PRXFusion(hidden_size) if fusion_range is not None else None
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize every parameter for training from scratch, as DiT does (arXiv 2212.09748).

        Xavier-uniform matrices and zero biases; normal(0, 0.02) in the embedders of timestep and resolution and in the
        mask token of the fusion; zero modulation and output layer, so that every block starts as the identity and the
        network answers zero.
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

    @property
    def stored_class_name(self) -> str:
        """The class that stored files name: stock's, or one that stock does not know where stock lacks an option."""
        return OWN_CLASS_NAME if any(self.config[option] for option in OWN_OPTIONS) else STOCK_CLASS_NAME

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Any:
        """Load a model as `ModelMixin.from_pretrained` does, which fills at random what a file lacks.

        Raises:
            ValueError: weights that are not all there. With `output_loading_info=True` you get the model all the same,
                and the names of what is missing.
        """
        if kwargs.get("output_loading_info") or kwargs.get("use_flashpack"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return load_complete(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

    def to_json_string(self) -> str:
        """What config.json says: without options of our own that are off, so that it is stock's where stock can be."""
        stored = json.loads(super().to_json_string()) | {"_class_name": self.stored_class_name}
        stored = {key: value for key, value in stored.items() if value or key not in OWN_OPTIONS}
        return json.dumps(stored, indent=2, sort_keys=True) + "\n"

    @functools.wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look at the arguments
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save a model as `ModelMixin.save_pretrained` does, if its weights are in memory under the names of files.

        Raises:
            ValueError: the model is offloaded to disk, has adapters or was quantized after it was loaded; nothing is
                written.
        """
        check_saving("transformer", self)
        super().save_pretrained(save_directory, *args, **kwargs)

    def enable_parallelism(self, *, config: ContextParallelConfig | ParallelConfig, cp_plan: Any = None) -> None:
        """Share one forward out over several processes, each with its part of the image tokens (sampling only).

        Every process calls the model, or the pipeline, with the same arguments and gets the whole answer. Text, text
        contexts and masks stay whole everywhere: attention exchanges tokens for heads (Ulysses, arXiv 2309.14509), and
        what it exchanges are image tokens. `torch.distributed` must be initialized, on each process with its device.

        Args:
            config (`ContextParallelConfig`): with an `ulysses_degree` that divides the heads. Where it does not divide
                the image tokens, they are padded.
            cp_plan: not taken; which tensors are split is the model's.

        Raises:
            ValueError: another kind of parallelism, a degree that does not divide the heads, or a FirstBlockCache.
            RuntimeError: parallelism is on already, or `torch.distributed` is not initialized.
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
            raise ValueError("`config` has `ulysses_anything`; leave it out: any number of tokens is accepted.")
        if cp_plan is not None:
            raise ValueError("`cp_plan` was given; leave it out: the model's own is the one that its forward is for.")
        _check_cache(self._cache_config, True)
        if self._parallel_config is not None:
            raise RuntimeError("parallelism is on already, and stays as it is.")
        if not dist.is_initialized():
            raise RuntimeError("`torch.distributed.init_process_group` has to be called first.")
        # diffusers' own steps need an accelerator (0.42), and an attention backend that its templates know
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device_type = "cpu" if accelerator is None else accelerator.type
        mesh = parallel.mesh
        if mesh is None:
            mesh = init_device_mesh(device_type, parallel.mesh_shape, mesh_dim_names=parallel.mesh_dim_names)
        together = ParallelConfig(context_parallel_config=parallel)
        together.setup(dist.get_rank(), dist.get_world_size(), torch.device(device_type), mesh=mesh)
        self._parallel_config = together
        for processor in self.attn_processors.values():
            processor._parallel_config = together
        apply_context_parallel(self, parallel, self._cp_plan)

    def enable_cache(self, config: Any) -> None:
        """Reuse features of earlier steps (`CacheMixin.enable_cache`, hooks of diffusers; sampling only).

        Args:
            config: FirstBlockCacheConfig or MagCacheConfig (blocks are left out where little changes),
                TaylorSeerCacheConfig (attention is extrapolated or, with `use_lite_mode`, the final layer; arXiv
                2503.06923) or PyramidAttentionBroadcastConfig (attention is repeated, arXiv 2408.12588). The state is
                the module's: one sampling run at a time.

        Raises:
            ValueError: another cache, or one that this network has no place for.
        """
        _check_cache(config, self._parallel_config is not None)
        whole_blocks = isinstance(config, (FirstBlockCacheConfig, MagCacheConfig))
        if not whole_blocks and not isinstance(config, (TaylorSeerCacheConfig, PyramidAttentionBroadcastConfig)):
            raise ValueError(
                f"`config` is a {type(config).__name__}; accepted are FirstBlockCacheConfig, MagCacheConfig,"
                " TaylorSeerCacheConfig and PyramidAttentionBroadcastConfig."
            )
        if whole_blocks and (self.config.fusion_range is not None or self.config.depth < 2):
            raise ValueError(
                f"`config` is a {type(config).__name__}, which leaves out blocks up to the last: that takes a model"
                f" of at least two blocks and without a `fusion_range`, got {self.config.depth} and"
                f" {self.config.fusion_range}."
            )
        if isinstance(config, TaylorSeerCacheConfig):  # by default it looks for names that this model does not have
            if config.use_lite_mode:
                names = {"skip_predict_identifiers": [r"blocks\.\d+"], "cache_identifiers": ["final_layer"]}
                config = replace(config, use_lite_mode=False, **names)
            elif config.skip_predict_identifiers is None and config.cache_identifiers is None:
                config = replace(config, cache_identifiers=[r"blocks\.\d+\.attention"])
        TransformerBlockRegistry.register(PRXBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)

    def _rotary(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """The rotary table of a token grid, remembered: it depends on nothing but the shape."""
        if torch.compiler.is_compiling():
            return rotary_table(rows, columns, self.axes_dim, self.config.theta, device)
        key = (rows, columns, device)
        if key not in self._rotary_tables:
            # a table first made while sampling must also serve a later training step
            with torch.inference_mode(False):
                self._rotary_tables[key] = rotary_table(rows, columns, self.axes_dim, self.config.theta, device)
        return self._rotary_tables[key]

    def _embed_time(
        self, timestep: torch.Tensor, height: int | None, width: int | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """The vector (T, D) that the modulation of every block is made from, of timesteps (T,)."""
        temb = get_timestep_embedding(
            timestep,
            TIME_EMBEDDING_SIZE,
            max_period=self.config.time_max_period,
            scale=self.config.time_factor,
            flip_sin_to_cos=True,
            downscale_freq_shift=0.0,
        )  # (T, 256)
        temb = self.time_in(temb.to(dtype))  # (T, D)
        if self.resolution_embedder is not None:
            temb = temb + self.resolution_embedder(height, width, temb.device, dtype)  # (T, D)
        return temb

    def _embed_text(
        self,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        height: int | None,
        width: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text tokens (B, L, D) and their mask; with resolution tokens two more, which L counts from here on."""
        txt = self.txt_in(encoder_hidden_states)  # (B, L, D)
        if self.resolution_token_embedder is not None:
            size_tokens = self.resolution_token_embedder(height, width, txt.device, txt.dtype)  # (1, 2, D)
            txt = torch.cat((size_tokens.expand(len(txt), -1, -1), txt), dim=1)  # (B, 2 + L, D)
            attention_mask = None if attention_mask is None else F.pad(attention_mask.bool(), (2, 0), value=True)
        return txt, attention_mask

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
    def encode_text_context(
        self,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> PRXTextContext:
        """Project the text to the keys and values of all blocks, for any number of forwards with this text.

        Args:
            encoder_hidden_states (`torch.Tensor` of shape (B, L, `context_in_dim`)): the text; B = 1 serves any number
                of rows of images.
            attention_mask (`torch.Tensor` of shape (B, L), *optional*): true where a text token counts.
            height (`int`, *optional*): H of the `hidden_states` to come; needed with `resolution_tokens`.
            width (`int`, *optional*): W, likewise.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` multiplies LoRA adapters by s.

        Raises:
            ValueError: if a shape is not as above, or there is no size where one is needed.
        """
        self._check_text(encoder_hidden_states, attention_mask)
        if self.resolution_token_embedder is not None and (height is None or width is None):
            raise ValueError("`height` and `width` are needed: this model puts them before the text as tokens.")
        txt, mask = self._embed_text(encoder_hidden_states, attention_mask, height, width)  # (B, L, D) and (B, L)
        blocks: Any = self.blocks
        projected = [block.attention.project_text(txt) for block in blocks]  # (B, L, h, d) each
        # the values are a view of keys and values together, of which only they are still needed
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
    ) -> PRXTimeContext:
        """Compute the modulation of all blocks for all timesteps of a run in one go.

        Args:
            timestep (`torch.Tensor` of shape (T,)): shares of noise in [0, 1], on the device of the images.
            height (`int`, *optional*): H of the `hidden_states` to come; needed with `resolution_embeds`.
            width (`int`, *optional*): W, likewise.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` multiplies LoRA adapters by s.

        Raises:
            ValueError: if the shape is not as above, or there is no size where one is needed.
        """
        if timestep.ndim != 1:
            raise ValueError(f"`timestep` must have the shape (T,), got {tuple(timestep.shape)}.")
        if self.resolution_embedder is not None and (height is None or width is None):
            raise ValueError("`height` and `width` are needed: this model adds them to the timestep.")
        temb = self._embed_time(timestep, height, width, self.dtype)  # (T, D)
        blocks: Any = self.blocks
        modulations = tuple(torch.cat(block.modulation(temb), dim=1) for block in blocks)  # (T, 6, D) each
        return PRXTimeContext(modulations, self.final_layer.adaLN_modulation(temb).unflatten(-1, (2, -1)))

    def _check_text(self, encoder_hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        text, width = tuple(encoder_hidden_states.shape), self.config.context_in_dim
        if len(text) != 3 or text[2] != width:
            raise ValueError(f"`encoder_hidden_states` must have the shape (B, L, {width}), got {text}.")
        if attention_mask is not None and attention_mask.shape != text[:2]:
            raise ValueError(
                f"`attention_mask` must have the shape {text[:2]} of the text tokens, "
                f"got {tuple(attention_mask.shape)}."
            )

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | PRXTimeContext,
        text: torch.Tensor | tuple[PRXTextContext, ...],
        attention_mask: torch.Tensor | None,
        route: TokenRoute | None,
        feature_block: int | None,
    ) -> None:
        channels, patch_size, width = self.config.in_channels, self.config.patch_size, self.config.context_in_dim
        depth, fusion_range = self.config.depth, self.config.fusion_range
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
                    f"`time_context` must hold one timestep (take it with `at`) for the {depth} blocks, "
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
                    f"`text_context` must be one for each equal share of {shape[0]} rows, got {len(text)}."
                )
            if attention_mask is not None:
                raise ValueError("`attention_mask` goes to `encode_text_context`: a `text_context` holds its own.")
        else:
            if text.ndim == 3 and text.shape[0] != shape[0]:
                raise ValueError(
                    f"`encoder_hidden_states` must have the shape ({shape[0]}, L, {width}), got {tuple(text.shape)}."
                )
            self._check_text(text, attention_mask)
        if feature_block is not None and not 0 <= feature_block < depth:
            raise ValueError(f"`feature_block` must be one of the {depth} blocks, from 0, got {feature_block}.")
        if self._parallel_config is not None and (route is not None or feature_block is not None):
            name = "feature_block" if route is None else "route"
            raise ValueError(f"`{name}` was given, but in parallel a process has only its share of the tokens.")
        if route is None:
            return
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
        kept, tokens = tuple(route.kept.shape), (shape[2] // patch_size) * (shape[3] // patch_size)
        if len(kept) != 2 or kept[0] != shape[0] or not 1 <= kept[1] <= tokens:
            raise ValueError(
                f"`route.kept` must have the shape ({shape[0]}, K) with 1 <= K <= {tokens} tokens, got {kept}."
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
        feature_block: int | None = None,
        text_context: PRXTextContext | tuple[PRXTextContext, ...] | None = None,
        time_context: PRXTimeContext | None = None,
    ) -> PRXTransformer2DModelOutput | tuple[torch.Tensor | None, ...]:
        """Predict the velocity (or the clean image, by how the network was trained) of noisy latents or pixels.

        Args:
            hidden_states (`torch.Tensor` of shape (B, C, H, W)): the noisy input; H and W are multiples of p.
            timestep (`torch.Tensor` of shape (B,) or (1,)): share of noise in [0, 1]; 0 is the clean image.
            encoder_hidden_states (`torch.Tensor` of shape (B, L, `context_in_dim`)): the text.
            attention_mask (`torch.Tensor` of shape (B, L), *optional*): true where a text token counts. None where
                nothing is padded, which is faster.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` multiplies LoRA adapters by s for this call.
            return_dict (`bool`): False for a plain tuple.
            route (`TokenRoute`, *optional*): image tokens that go around a range of blocks.
            feature_block (`int`, *optional*): the block, counted from 0, whose output is returned as well.
            text_context (`PRXTextContext`, *optional*): what `encode_text_context` made, in place of
                `encoder_hidden_states` and its mask. Or several, each with a length and a mask of its own: the first
                is for the first rows, and so on, as many rows for each (the branches of guidance).
            time_context (`PRXTimeContext`, *optional*): one timestep of what `encode_timesteps` made, in place of
                `timestep`; for all rows.

        Returns:
            `PRXTransformer2DModelOutput`, whose `sample` has the shape of `hidden_states`; or the tuple (sample,), or
            (sample, features, feature_indices) with a `feature_block`.

        Raises:
            ValueError: if a shape is not as above, or of timestep or text not exactly one form came.
        """
        if (timestep is None) == (time_context is None):
            raise ValueError("exactly one of `timestep` and `time_context` must be given.")
        if (encoder_hidden_states is None) == (text_context is None):
            raise ValueError("exactly one of `encoder_hidden_states` and `text_context` must be given.")
        contexts = (text_context,) if isinstance(text_context, PRXTextContext) else text_context
        time: Any = timestep if time_context is None else time_context
        text: Any = encoder_hidden_states if contexts is None else contexts
        self._check_inputs(hidden_states, time, text, attention_mask, route, feature_block)
        height, width = hidden_states.shape[-2:]
        patch_size, depth = self.config.patch_size, self.config.depth

        patches = patchify(hidden_states, patch_size)  # (B, N, C * p * p)
        if self._parallel_config is not None:
            degree = self._parallel_config.context_parallel_config.ulysses_degree
            patches = F.pad(patches, (0, 0, 0, -patches.shape[1] % degree))  # N a multiple of w, up to the last line
        img = self.img_in(patches)  # (B, N, D), in parallel (B, N/w, D)
        table = self._rotary(height // patch_size, width // patch_size, img.device)  # (N, d/2, 2)

        if time_context is None:
            final_time: Any = self._embed_time(time, height, width, img.dtype)  # (B, D)
            times: list[Any] = [final_time] * depth
        else:
            times = [block[0].unbind() for block in time_context.blocks]  # 6 x (D,) each
            final_time = time_context.final[0].unbind()  # 2 x (D,)
            # a linear layer gives a view, a block does not: dynamo would compile the first block by itself
            img = img.clone()  # (B, N, D)

        text_mask: AttentionMask
        if contexts is None:
            txt, text_mask = self._embed_text(text, attention_mask, height, width)  # (B, L, D)
            texts: list[Any] = [txt] * depth
        else:
            text_mask = tuple(context.mask for context in contexts)  # (B, L) each, or None
            texts = list(zip(*(context.keys_values for context in contexts)))  # (B, L, h, d) each

        start, stop = (self.config.fusion_range or (None, None)) if route is None else (route.start, route.stop)
        joint_mask = join_mask(text_mask, len(table))  # (B, 1, 1, L + N)
        rotary, mask, features, feature_indices = table, joint_mask, None, None
        for index, block in enumerate(self.blocks):
            if index == start:
                dense = img  # (B, N, D)
                if route is not None:
                    img, rotary = route.gather(img), table[route.kept]  # (B, K, D) and (B, K, d/2, 2)
                    mask = join_mask(text_mask, img.shape[1])  # (B, 1, 1, L + K)
            recomputed = self.gradient_checkpointing and index < self.config.depth - self.kept_blocks
            if torch.is_grad_enabled() and recomputed:
                img = self._gradient_checkpointing_func(
                    block, img, texts[index], times[index], rotary, mask
                )  # (B, N or K, D)
            else:
                img = block(img, texts[index], times[index], rotary, mask)  # (B, N or K, D)
            if index == feature_block:
                features = img  # (B, N or K, D)
                if route is not None and route.start <= index < route.stop:
                    feature_indices = route.kept  # (B, K)
            if index + 1 == stop:
                if self.fusion is not None:
                    img = self.fusion(dense, img, route)  # (B, N, D)
                elif route is not None:
                    img = route.scatter(img, dense)  # (B, N, D); TREAD: the others as they were
                rotary, mask = table, joint_mask

        patches = self.final_layer(img, final_time)[:, : len(table)]  # (B, N, C * p * p)
        sample = unpatchify(patches, patch_size, height, width)  # (B, C, H, W)
        if not return_dict:
            return (sample,) if feature_block is None else (sample, features, feature_indices)
        return PRXTransformer2DModelOutput(sample, features, feature_indices)


def check_saving(name: str, module: nn.Module) -> None:
    """Refuse to save weights that are not in memory, or under names that nothing loads.

    Args:
        name: name of the component, for the message.
        module: any network of diffusers or transformers.

    Raises:
        ValueError: it is offloaded to disk, has adapters or was quantized after it was loaded.
    """
    if is_offloaded_to_disk(module):
        raise ValueError(
            f"`{name}` is offloaded to disk, so that its weights are not in memory to be saved. Load the pipeline "
            "again, and save it before `enable_group_offload` or without `offload_to_disk_path`."
        )
    saves_itself = getattr(module, "hf_quantizer", None) is not None
    if not saves_itself and any(type(parameter) is not nn.Parameter for parameter in module.parameters()):
        raise ValueError(
            f"`{name}` was quantized after it was loaded, and a file has no place for such weights. To save it "
            "quantized, load it with a `quantization_config`."
        )
    named = [getattr(part, "lora_A", None) for part in module.modules()]
    if layers := [adapters for adapters in named if isinstance(adapters, nn.ModuleDict)]:
        raise ValueError(
            f"`{name}` has the adapters {sorted(set().union(*layers))}. To save it without them, call "
            "`unload_lora_weights` of the pipeline before; with them in its weights, `fuse_lora` and then that."
        )


def join_mask(text_mask: AttentionMask, tokens: int) -> Any:
    """Mask (B, 1, 1, L + N) of text tokens (B, L) and of image tokens, which all count; None where all text counts.

    Of parts of the text, a tuple of masks, each by itself.
    """
    if isinstance(text_mask, tuple):
        return tuple(join_mask(part, tokens) for part in text_mask)
    return None if text_mask is None else F.pad(text_mask.bool(), (0, tokens), value=True)[:, None, None, :]


def _check_cache(config: Any, parallel: bool) -> None:
    """Raise a ValueError for a cache by which processes could come to run different blocks, and wait for ever."""
    if parallel and isinstance(config, FirstBlockCacheConfig):
        raise ValueError(
            "FirstBlockCacheConfig does not go with parallelism: each process would judge its own tokens, and the"
            " blocks that one leaves out the others would wait for. Use another cache."
        )


def _is_range(span: tuple[int, int], depth: int) -> bool:
    """Whether [start, stop) is a range of at least one of `depth` blocks."""
    return isinstance(span, (list, tuple)) and len(span) == 2 and 0 <= span[0] < span[1] <= depth
