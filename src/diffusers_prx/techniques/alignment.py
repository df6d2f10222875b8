"""Alignment of the transformer's features with those of a frozen vision teacher: REPA and iREPA.

REPA: arXiv 2410.06940. iREPA: arXiv 2512.10794. A step with alignment does the following, in this order: the forward
returns the features of one block, `projector(features, indices, grid)` maps them to the teacher's width,
`teacher_features` computes the target, which `spatial_normalize` normalizes for iREPA, and `alignment_loss` compares
them. Only the projector is trained.

Shapes in this file: B batch, N tokens of the whole grid (rows, columns), row by row, K tokens of them that passed
through the block (K = N without routing), D width of the transformer, E width of the teacher.
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

STD_EPS = 1e-6  # added to the standard deviation over patches, because a channel may be constant

# Projectors map (features (B, K, D), indices (B, K) or None, grid) to (B, K, E). Like all trainable modules they are
# stored in float32; they compute in autocast's type, and the loss computes the cosine in float32.


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
    """One 3x3 convolution over the grid (iREPA, arXiv 2512.10794). It requires all tokens."""

    def __init__(self, student_width: int, teacher_width: int):
        super().__init__()
        self.conv = nn.Conv2d(student_width, teacher_width, kernel_size=3, padding=1)

    def forward(self, features: torch.Tensor, indices: torch.Tensor | None, grid: tuple[int, int]) -> torch.Tensor:
        if indices is not None:
            raise ValueError(
                "`repa_projector` conv needs the whole grid, but tokens were routed around this block. Accepted with "
                "routing: `mlp`, `attention`."
            )
        image = features.transpose(1, 2).unflatten(2, grid)  # (B, D, rows, columns)
        return self.conv(image).flatten(2).transpose(1, 2)  # (B, N, E)


class AttentionProjector(nn.Module):
    """One self-attention layer with the axial rotary embedding of the transformer, then a linear layer.

    Like the convolution it uses neighboring tokens and their positions, but it accepts any subset of the grid.
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
    """Build a projector in float32, called as `projector(features, indices, grid)`.

    `features` (B, K, D) are the tokens that passed through the block, `indices` (B, K) int64 their indices in the grid
    (None: all tokens, in order), and `grid` is (rows, columns). The result is (B, K, E) in autocast's type.

    Args:
        kind: `mlp`, `conv` (which raises ValueError if there are indices) or `attention`.
        student_width: width D of the transformer.
        teacher_width: width E of the teacher.
        hidden_size: width inside the MLP; 2048 in REPA.
        num_heads: heads of the attention, as in the transformer.
        axes_dim: rotary dimensions per axis, as in the transformer.
        theta: rotary base, as in the transformer.

    Raises:
        ValueError: for another kind, or attention sizes that do not match.

    Example:
        >>> projector = build_projector("mlp", student_width=1792, teacher_width=1024)
        >>> projector(features, None, (16, 16)).shape
        torch.Size([2, 256, 1024])
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


def spatial_normalize(features: torch.Tensor, gamma: float) -> torch.Tensor:
    """Normalize teacher features per channel over the patches of each image, as in iREPA (arXiv 2512.10794).

    (x - gamma mean(x)) / (std(x) + eps): what all patches share contains no spatial information. gamma = 1 removes all
    of it; the authors' default is 0.8. `std` divides by N. Dividing by N - 1 would scale all channels by one factor,
    which does not change a cosine.

    Args:
        features: (B, N, E) of the whole grid. Normalize first, then select the tokens of the block.
        gamma: share of the mean that is subtracted.

    Returns:
        (B, N, E), float32.
    """
    features = features.float()
    mean = features.mean(dim=1, keepdim=True)  # (B, 1, E)
    std = features.std(dim=1, correction=0, keepdim=True)  # (B, 1, E)
    return (features - gamma * mean) / (std + STD_EPS)  # (B, N, E)


def alignment_loss(projected: torch.Tensor, teacher: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """Return REPA's loss (arXiv 2410.06940) per sample: 1 minus the mean cosine over the tokens of the block.

    The papers use minus the mean cosine. The added 1 does not change the gradient; it makes 0 the best value and 2 the
    worst.

    Args:
        projected: (B, K, E), output of the projector.
        teacher: (B, N, E) of the whole grid, detached here.
        indices: (B, K) int64 indices of the K tokens among the N. None: all tokens, in order.

    Returns:
        (B,), float32, in [0, 2].

    Example:
        >>> target = spatial_normalize(teacher_features(teacher, pixels_uint8, grid), 0.8)
        >>> alignment_loss(projector(features, None, grid), target, None).mean().backward()
    """
    target = teacher.detach().float()  # (B, N, E)
    if indices is not None:
        target = torch.take_along_dim(target, indices[..., None], dim=1)  # (B, K, E)
    assert projected.shape == target.shape, f"{tuple(projected.shape)} and {tuple(target.shape)}"  # would broadcast
    return 1 - F.cosine_similarity(projected.float(), target, dim=-1).mean(dim=1)  # (B,)


def gradient_cosine(
    flow_loss: torch.Tensor, alignment_loss: torch.Tensor, tensors: torch.Tensor | Sequence[torch.Tensor]
) -> float:
    """Return the cosine between the gradients of two losses: 1 if they agree, -1 if they oppose each other.

    It costs two partial backward passes and leaves the graph and every `.grad` unchanged. A loss without a gradient
    gives 0, such as the flow loss of a new transformer, whose last layer is zero, before its first step.

    Args:
        flow_loss: scalar whose graph still exists.
        alignment_loss: scalar whose graph still exists.
        tensors: tensor, or tensors taken together, with respect to which the gradients are computed: the tapped
            features or the weights of the tapped block. The features must be the input of the later blocks;
            accelerate's bf16 wrapper returns float32 copies, so behind it use the weights.

    Raises:
        ValueError: if one of the losses does not depend on one of the tensors.
    """
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    flat = []
    for name, loss in (("flow_loss", flow_loss), ("alignment_loss", alignment_loss)):
        gradients = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                f"`{name}` does not depend on every tensor of `tensors`. Outputs of a model in accelerate's mixed "
                "precision are copies: pass the weights of the tapped block instead."
            )
        flat.append(torch.cat([gradient.float().flatten() for gradient in gradients]))
    flow, alignment = (F.normalize(gradient, dim=0, eps=torch.finfo(torch.float32).tiny) for gradient in flat)
    return (flow @ alignment).item()


class BurnIn:
    """Schedule of the alignment: on at first, then off for good, because REPA helps early and later limits texture.

    It ends at a given step, or automatically: when the cosine between the gradients of the flow loss and of the
    alignment, sampled at regular steps, is below a threshold on average over a full window. The state is plain data;
    the same calls after `load_state_dict` give the same answers. With several processes give each the same cosine
    (their mean).

    Args:
        until_step: first optimizer step without alignment. None: no fixed end.
        window: number of sampled cosines that are averaged. None: no automatic end.
        every: optimizer steps between two samples.
        threshold: threshold of the mean cosine, in [-1, 1].

    Attributes:
        ended_at: first optimizer step without alignment, or None while it is unknown.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> burn_in = BurnIn(until_step=200_000)
        >>> burn_in.active(0), burn_in.active(200_000)
        (True, False)
    """

    def __init__(
        self, until_step: int | None = None, window: int | None = None, every: int = 100, threshold: float = 0.0
    ):
        for name, value in (("until_step", until_step), ("window", window), ("every", every)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not -1 <= threshold <= 1:
            raise ValueError(f"`threshold` of a cosine must be in [-1, 1], got {threshold}.")
        self.until_step, self.window, self.every, self.threshold = until_step, window, every, threshold
        self.cosines: deque[float] = deque(maxlen=window)
        self.ended_at: int | None = None

    def active(self, step: int) -> bool:
        """True if the alignment is on in this optimizer step, counted from 0."""
        if self.ended_at is None and self.until_step is not None and step >= self.until_step:
            self.ended_at = self.until_step  # saved, so that a resumed run with a later `until_step` does not restart
        return self.ended_at is None or step < self.ended_at

    def due(self, step: int) -> bool:
        """True if this step must sample the cosine for `observe`."""
        return self.window is not None and self.active(step) and step % self.every == 0

    def observe(self, step: int, cosine: float) -> None:
        """Record a sampled cosine, and end the alignment after this step if the window's mean is below the threshold.

        Raises:
            ValueError: if the value is not a cosine, for example after gradients that are not finite.
        """
        assert self.due(step), f"step {step} is not due"
        if not -1.001 <= cosine <= 1.001:  # allows rounding errors
            raise ValueError(f"`cosine` must be in [-1, 1], got {cosine} at step {step}.")
        self.cosines.append(cosine)
        if len(self.cosines) == self.window and sum(self.cosines) / len(self.cosines) < self.threshold:
            self.ended_at = step + 1

    def state_dict(self) -> dict[str, Any]:
        return {"cosines": list(self.cosines), "ended_at": self.ended_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cosines = deque(state["cosines"], maxlen=self.window)
        self.ended_at = state["ended_at"]


class FeatureCache:
    """Teacher features on disk, one bfloat16 file per teacher, grid and image.

    The key is a hash of the teacher's fingerprint, the grid and the uint8 pixels after crop and flip, so that another
    crop, teacher or grid never matches. It does not include the type in which the teacher computes. The cache saves
    time if crops repeat. It never deletes anything: a sample of 256 patches of width 1024 takes 0.5 MB.

    Damaged files are computed again, replaced and counted. Writes are atomic, so processes may share a folder.

    Unlike `data.precomputed` it also works with flips, trained text encoders, mixed sources and scenes.

    Args:
        folder: folder of the files, which are in up to 256 subfolders.

    Attributes:
        hits: number of samples read.
        misses: number of samples computed.
        corrupt: number of damaged files, which are misses too.

    Example:
        >>> cache = FeatureCache("cache/teacher")
        >>> teacher_features(teacher, pixels_uint8, (16, 16), cache).shape
        torch.Size([2, 256, 1024])
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.hits = self.misses = self.corrupt = 0

    def path(self, teacher: VisionTeacher, pixels_uint8: torch.Tensor, grid: tuple[int, int]) -> Path:
        """Path of the file of one sample (3, H, W)."""
        digest = hashlib.blake2b(digest_size=20)
        digest.update(f"{teacher.fingerprint} {tuple(grid)} {torch.bfloat16} {tuple(pixels_uint8.shape)}".encode())
        digest.update(pixels_uint8.contiguous().numpy().tobytes())
        key = digest.hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, path: Path, shape: tuple[int, int]) -> torch.Tensor | None:
        """Read features of shape (N, E), or return None if they must be computed."""
        try:
            features = read_hashed_tensors(path).get("features")
        except FileNotFoundError:
            return None
        except ValueError:
            features = None
        if features is None or features.shape != shape or features.dtype != torch.bfloat16:
            self.corrupt += 1
            return None
        return features

    def write(self, path: Path, features: torch.Tensor) -> None:
        """Write the features (N, E) of one sample.

        Raises:
            OSError: if they cannot be written, for example on a full disk.
        """
        try:
            write_hashed_tensors(path, {"features": features})
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            raise OSError(
                f"Teacher features cannot be written to `repa_cache_dir` {self.folder}: {error}. Existing files are "
                "complete: free some space and resume, or omit `--repa_cache_dir`."
            ) from error

    def features(self, teacher: VisionTeacher, pixels_uint8: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return `teacher_features`, always rounded to bfloat16."""
        shape = (grid[0] * grid[1], teacher.hidden_size)
        paths = [self.path(teacher, image, grid) for image in pixels_uint8.cpu()]
        rows = [self.read(path, shape) for path in paths]  # B x (N, E) or None
        absent = [i for i, row in enumerate(rows) if row is None]
        self.hits, self.misses = self.hits + len(rows) - len(absent), self.misses + len(absent)
        if absent:
            computed = teacher_features(teacher, pixels_uint8[absent], grid).bfloat16().cpu()  # (misses, N, E)
            for i, row in zip(absent, computed):
                self.write(paths[i], row)
                rows[i] = row
        return torch.stack([row for row in rows if row is not None]).to(pixels_uint8.device).float()  # (B, N, E)


def teacher_features(
    teacher: VisionTeacher, pixels_uint8: torch.Tensor, grid: tuple[int, int], cache: FeatureCache | None = None
) -> torch.Tensor:
    """Compute the teacher's features of a batch, without gradient.

    Args:
        teacher: teacher on the device of the pixels.
        pixels_uint8: (B, 3, H, W) as the model sees them, after crop and flip.
        grid: (rows, columns) of the transformer's tokens.
        cache: cache from which features are read and to which missing ones are written.

    Returns:
        (B, rows * columns, E), float32.
    """
    if cache is not None:
        return cache.features(teacher, pixels_uint8, grid)
    with torch.no_grad():
        return teacher(pixels_uint8.float() / 127.5 - 1, grid)  # (B, N, E)
