"""Alignment of the transformer's features with those of a frozen vision teacher: REPA and iREPA.

REPA: arXiv 2410.06940. iREPA: arXiv 2512.10794. A step with alignment reads, in this order: features of one block come
back from the forward, `projector(features, indices, grid)` maps them to the teacher's width, `teacher_features` gives
the target, for iREPA through `spatial_normalize`, and `alignment_loss` compares. Only the projector is trained.

Shapes in this file: B batch, N tokens of the whole grid (rows, columns), row by row, K of them that were in the block
(K = N where nothing is routed), D width of the transformer, E width of the teacher.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from ..files import read_hashed_tensors, write_hashed_tensors
from ..models.transformer_prx import rotary_table, rotate
from .teachers import VisionTeacher

STD_EPS = 1e-6  # added to the standard deviation over patches; a channel may be constant

# --- projectors: (features (B, K, D), indices (B, K) or None, grid) -> (B, K, E). Stored in float32, as all that is
# trained; they compute in what autocast says, and the loss takes its cosine in float32


class MLPProjector(nn.Module):
    """Three linear layers with SiLU between them, token by token (REPA, arXiv 2410.06940)."""

    def __init__(self, student_width: int, teacher_width: int, hidden_size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(student_width, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, teacher_width),
        )

    def forward(self, features: torch.Tensor, indices: torch.Tensor | None, grid: tuple[int, int]) -> torch.Tensor:
        return self.layers(features)  # (B, K, E)


class ConvProjector(nn.Module):
    """One 3x3 convolution over the grid (iREPA, arXiv 2512.10794); it needs all tokens."""

    def __init__(self, student_width: int, teacher_width: int):
        super().__init__()
        self.conv = nn.Conv2d(student_width, teacher_width, kernel_size=3, padding=1)

    def forward(self, features: torch.Tensor, indices: torch.Tensor | None, grid: tuple[int, int]) -> torch.Tensor:
        if indices is not None:
            raise ValueError(
                "The projector `conv` needs the whole grid, but tokens of this block were routed away; accepted with "
                "routing: `mlp`, `attention`."
            )
        image = features.transpose(1, 2).unflatten(2, grid)  # (B, D, rows, columns)
        return self.conv(image).flatten(2).transpose(1, 2)  # (B, N, E)


class AttentionProjector(nn.Module):
    """One self-attention layer with the axial rotary embedding of the transformer, then a linear layer.

    What the convolution is to a whole grid, this is to any subset of it: it sees neighbors and where they are.
    """

    def __init__(
        self, student_width: int, teacher_width: int, num_heads: int, axes_dim: tuple[int, int], theta: float
    ):
        super().__init__()
        self.num_heads, self.axes_dim, self.theta = num_heads, axes_dim, theta
        self.qkv = nn.Linear(student_width, 3 * student_width)
        self.out = nn.Linear(student_width, teacher_width)

    def forward(self, features: torch.Tensor, indices: torch.Tensor | None, grid: tuple[int, int]) -> torch.Tensor:
        rotary = rotary_table(*grid, self.axes_dim, self.theta, features.device)  # (N, d/2, 2)
        if indices is not None:
            rotary = rotary[indices]  # (B, K, d/2, 2)
        qkv = self.qkv(features).unflatten(-1, (3, self.num_heads, -1))  # (B, K, 3, h, d)
        query, key, value = qkv.unbind(2)  # (B, K, h, d) each
        query = rotate(query.float(), rotary).to(value.dtype)  # (B, K, h, d)
        key = rotate(key.float(), rotary).to(value.dtype)  # (B, K, h, d)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, h, K, d) each
        heads = F.scaled_dot_product_attention(query, key, value)  # (B, h, K, d)
        return self.out(heads.transpose(1, 2).flatten(2))  # (B, K, E)


def build_projector(
    kind: str,
    student_width: int,
    teacher_width: int,
    hidden_size: int = 2048,
    num_heads: int = 28,
    axes_dim: tuple[int, int] = (32, 32),
    theta: float = 10_000,
) -> nn.Module:
    """A new projector, in float32; all are called as `projector(features, indices, grid)`.

    `features` (B, K, D) are the tokens that were in the block, `indices` (B, K) int64 their places in the grid (None:
    all, in order), `grid` is (rows, columns). The result is (B, K, E), of autocast's type.

    Args:
        kind: `mlp`, `conv` (raises ValueError if there are indices) or `attention`.
        student_width, teacher_width: D and E.
        hidden_size: width inside the MLP; 2048 is REPA's.
        num_heads, axes_dim, theta: of the transformer; the attention has the same.

    Raises:
        ValueError: for another kind, or an attention whose sizes do not fit.
    """
    if kind == "mlp":
        return MLPProjector(student_width, teacher_width, hidden_size)
    if kind == "conv":
        return ConvProjector(student_width, teacher_width)
    if kind == "attention":
        if sum(axes_dim) * num_heads != student_width:
            raise ValueError(
                f"`axes_dim` must add up to `student_width` / `num_heads` = {student_width} / {num_heads}, got "
                f"{list(axes_dim)}."
            )
        return AttentionProjector(student_width, teacher_width, num_heads, axes_dim, theta)
    raise ValueError(f"`kind` of the projector is {kind!r}; accepted: 'mlp', 'conv', 'attention'.")


# --- the target and the loss


def spatial_normalize(features: torch.Tensor, gamma: float) -> torch.Tensor:
    """iREPA's normalization of the teacher (arXiv 2512.10794): per channel, over the patches of each image.

    (x - gamma mean(x)) / (std(x) + eps): what all patches share says nothing about where things are. gamma = 1 takes
    all of it away, the authors' default is 0.8. `std` divides by N; the N - 1 of others is one factor for all
    channels, which a cosine does not see.

    Args:
        features: (B, N, E), of the whole grid: normalize first, then pick the tokens of the block.
        gamma: a scalar.

    Returns:
        (B, N, E), float32.
    """
    features = features.float()
    mean = features.mean(dim=1, keepdim=True)  # (B, 1, E)
    std = features.std(dim=1, correction=0, keepdim=True)  # (B, 1, E)
    return (features - gamma * mean) / (std + STD_EPS)  # (B, N, E)


def alignment_loss(projected: torch.Tensor, teacher: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """REPA's loss (arXiv 2410.06940) per sample: 1 minus the mean cosine over the tokens that were in the block.

    The papers write minus the mean cosine. The 1 changes no gradient; it makes 0 the perfect value and 2 the worst.

    Args:
        projected: (B, K, E), from the projector.
        teacher: (B, N, E), of the whole grid; no gradient flows into it.
        indices: (B, K) int64, which of the N tokens the K are; None: all, in order.

    Returns:
        (B,), float32, in [0, 2].
    """
    target = teacher.detach().float()  # (B, N, E)
    if indices is not None:
        target = torch.take_along_dim(target, indices[..., None], dim=1)  # (B, K, E)
    assert projected.shape == target.shape, f"{tuple(projected.shape)} and {tuple(target.shape)}"  # would broadcast
    return 1 - F.cosine_similarity(projected.float(), target, dim=-1).mean(dim=1)  # (B,)


# --- the burn-in


def gradient_cosine(
    flow_loss: torch.Tensor, alignment_loss: torch.Tensor, at: torch.Tensor | Sequence[torch.Tensor]
) -> float:
    """Cosine between the gradients of two scalar losses: 1 they pull together, -1 they pull apart.

    Costs two partial backward passes and leaves the graph, and every `.grad`, as it was. A loss without a gradient
    pulls nowhere and gives 0: the flow loss of a new transformer, whose last layer is zero, before its first step.

    Args:
        flow_loss, alignment_loss: scalars whose graphs are still there.
        at: the tensor, or tensors taken together, whose gradients are compared: the tapped features or the weights of
            the tapped block. The features must be the tensor that the later blocks were fed; accelerate's bf16 wrapper
            returns float32 copies, so behind it only the weights will do.

    Raises:
        ValueError: if one of the losses does not depend on one of the tensors.
    """
    tensors = [at] if isinstance(at, torch.Tensor) else list(at)
    flat = []
    for name, loss in (("flow_loss", flow_loss), ("alignment_loss", alignment_loss)):
        gradients = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                f"`{name}` does not depend on every tensor of `at`, which must lie on the way to both losses. Outputs "
                "of a model in accelerate's mixed precision are copies: give the weights of the tapped block instead."
            )
        flat.append(torch.cat([gradient.float().flatten() for gradient in gradients]))
    flow, alignment = (F.normalize(gradient, dim=0, eps=torch.finfo(torch.float32).tiny) for gradient in flat)
    return (flow @ alignment).item()


class BurnIn:
    """When alignment is on. REPA helps early and later limits fine texture, so it ends, and stays ended.

    It ends at a given step, or by itself: when the cosine between the gradients of the flow loss and of the alignment,
    sampled every so many steps, is below a threshold on average over a full window. Plain state; the same calls after
    `load_state_dict` give the same answers. In a run of several processes give every one the same cosine (their mean).

    Args:
        until_step: the first optimizer step without alignment; None: no such step.
        window: how many sampled cosines are averaged; None: no automatic end.
        every: optimizer steps between two samples.
        threshold: of the mean cosine, in [-1, 1].

    Attributes:
        ended_at: the first optimizer step without alignment, once it is known.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self, until_step: int | None = None, window: int | None = None, every: int = 100, threshold: float = 0.0
    ):
        for name, value in (("until_step", until_step), ("window", window), ("every", every)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not -1 <= threshold <= 1:
            raise ValueError(f"`threshold` is of a cosine and must be in [-1, 1], got {threshold}.")
        self.until_step, self.window, self.every, self.threshold = until_step, window, every, threshold
        self.cosines: deque[float] = deque(maxlen=window)
        self.ended_at: int | None = None

    def active(self, step: int) -> bool:
        """Whether alignment is on in this optimizer step, counted from 0."""
        if self.ended_at is None and self.until_step is not None and step >= self.until_step:
            self.ended_at = self.until_step  # remembered: a resumed run with a later `until_step` does not start again
        return self.ended_at is None or step < self.ended_at

    def due(self, step: int) -> bool:
        """Whether the cosine is to be sampled in this step and given to `observe`."""
        return self.window is not None and self.active(step) and step % self.every == 0

    def observe(self, step: int, cosine: float) -> None:
        """Take a sampled cosine; where it completes the case against alignment, the next step is without.

        Raises:
            ValueError: if it is no cosine, as after gradients that are not finite.
        """
        assert self.due(step), f"step {step} is not due"
        if not -1.001 <= cosine <= 1.001:  # room for rounding
            raise ValueError(f"`cosine` must be in [-1, 1], got {cosine} at step {step}.")
        self.cosines.append(cosine)
        if len(self.cosines) == self.window and sum(self.cosines) / len(self.cosines) < self.threshold:
            self.ended_at = step + 1

    def state_dict(self) -> dict[str, Any]:
        return {"cosines": list(self.cosines), "ended_at": self.ended_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cosines = deque(state["cosines"], maxlen=self.window)
        self.ended_at = state["ended_at"]


# --- features of the teacher, computed or read


class FeatureCache:
    """Teacher features on disk, addressed by content: one file per teacher, grid and pixels.

    The key is a hash of the teacher's fingerprint, the grid, the stored type and the uint8 pixels as the model sees
    them, after crop and flip: no other crop, teacher or grid can hit. It pays where crops repeat; nothing is ever
    removed. A sample of 256 patches of width 1024 takes 0.5 MB in bfloat16. The type that the teacher computed in is
    not part of the key.

    A file that is damaged is computed again, replaced, and counted. Files are written aside and renamed, so any
    number of processes may share the folder.

    Args:
        folder: where the files go, in up to 256 subfolders.
        dtype: torch.bfloat16 or torch.float32, the type that is stored.

    Attributes:
        hits, misses, corrupt: samples read, samples computed, and damaged files (they are misses too).

    Raises:
        ValueError: for another type.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16):
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"`dtype` of the cache is {dtype}; accepted: torch.bfloat16, torch.float32.")
        self.folder, self.dtype = Path(folder), dtype
        self.hits = self.misses = self.corrupt = 0

    def path(self, teacher: VisionTeacher, pixels_uint8: torch.Tensor, grid: tuple[int, int]) -> Path:
        """The file of one sample (3, H, W)."""
        digest = hashlib.blake2b(digest_size=20)
        digest.update(f"{teacher.fingerprint} {tuple(grid)} {self.dtype} {tuple(pixels_uint8.shape)}".encode())
        digest.update(pixels_uint8.contiguous().numpy().tobytes())
        key = digest.hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, path: Path, shape: tuple[int, int]) -> torch.Tensor | None:
        """The features (N, E) = `shape` in the stored type, or None if they have to be computed."""
        try:
            features = read_hashed_tensors(path).get("features")
        except FileNotFoundError:
            return None
        except ValueError:
            features = None
        if features is None or features.shape != shape or features.dtype != self.dtype:
            self.corrupt += 1
            return None
        return features

    def write(self, path: Path, features: torch.Tensor) -> None:
        """Keep the features (N, E) of one sample.

        Raises:
            OSError: if there is no room, or another reason not to.
        """
        try:
            write_hashed_tensors(path, {"features": features})
        except (OSError, SafetensorError) as error:  # safetensors turns a full disk into an error of its own
            raise OSError(
                f"Teacher features cannot be kept in {self.folder} (`repa_cache_dir`): {error}. What is there is "
                "whole: make room and resume, or leave the setting out."
            ) from error

    def features(self, teacher: VisionTeacher, pixels_uint8: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """As `teacher_features`, rounded to the stored type, on a hit and on a miss alike."""
        shape = (grid[0] * grid[1], teacher.hidden_size)
        paths = [self.path(teacher, image, grid) for image in pixels_uint8.cpu()]
        rows = [self.read(path, shape) for path in paths]  # B x (N, E) or None
        absent = [i for i, row in enumerate(rows) if row is None]
        self.hits, self.misses = self.hits + len(rows) - len(absent), self.misses + len(absent)
        if absent:
            computed = teacher_features(teacher, pixels_uint8[absent], grid).to(self.dtype).cpu()  # (misses, N, E)
            for i, row in zip(absent, computed):
                self.write(paths[i], row)
                rows[i] = row
        return torch.stack([row for row in rows if row is not None]).to(pixels_uint8.device).float()  # (B, N, E)


def teacher_features(
    teacher: VisionTeacher, pixels_uint8: torch.Tensor, grid: tuple[int, int], cache: FeatureCache | None = None
) -> torch.Tensor:
    """What the teacher makes of a batch, without gradient.

    Args:
        teacher: on the device of the pixels.
        pixels_uint8: (B, 3, H, W), as the model sees them, after crop and flip.
        grid: (rows, columns) of the transformer's tokens.
        cache: read from it what is there, and write what is not.

    Returns:
        (B, rows * columns, E), float32.
    """
    if cache is not None:
        return cache.features(teacher, pixels_uint8, grid)
    with torch.no_grad():
        return teacher(pixels_uint8.float() / 127.5 - 1, grid)  # (B, N, E)
