"""Discriminator of adversarial distillation on the features of the teacher's own blocks (LADD, arXiv 2403.12015)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


class DiscriminatorHead(nn.Module):
    """Judge of the features of one block, token by token.

    The logit of a token is a linear function of its features plus their inner product with the condition (projection
    discriminator, arXiv 1802.05637).
    """

    def __init__(self, features: int, condition: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(features, elementwise_affine=False)
        self.inner = nn.Sequential(nn.Linear(features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.condition = nn.Linear(condition, hidden_size)
        self.logit = nn.Linear(hidden_size, 1)

    def forward(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        inner = F.silu(self.inner(self.norm(features)))  # (B, N, H)
        projected = (inner * self.condition(condition)[:, None]).sum(-1) / inner.shape[-1] ** 0.5  # (B, N)
        return self.logit(inner)[..., 0] + projected  # (B, N)


class Discriminator(nn.Module):
    """One head per block of the frozen teacher; trained with the student and not part of the pipeline.

    Args:
        blocks: indices, from 0, of the teacher's blocks that it sees.
        hidden_size: width D of the features.
        text_size: width E of the text embeddings.

    Example:
        >>> discriminator = Discriminator([3, 7], hidden_size=1792, text_size=2304)
        >>> logits = discriminator(features, timestep, text, text_mask)  # (B, 2 * N)
    """

    def __init__(self, blocks: Sequence[int], hidden_size: int, text_size: int):
        super().__init__()
        self.blocks = tuple(blocks)
        self.heads = nn.ModuleList(DiscriminatorHead(hidden_size, text_size + 1, hidden_size) for _ in self.blocks)

    def forward(
        self,
        features: Sequence[torch.Tensor],
        timestep: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return a logit per block and token; positive for real images.

        Args:
            features: (B, N, D) for each of `blocks`.
            timestep: noise level of the features' input (B,).
            text: text embeddings (B, L, E).
            text_mask: bool mask (B, L), or None without padding.

        Returns:
            (B, number of blocks * N).
        """
        counted = torch.ones_like(text[..., :1]) if text_mask is None else text_mask[..., None].to(text)  # (B, L, 1)
        mean = (text * counted).sum(1) / counted.sum(1)  # (B, E)
        mean = F.layer_norm(mean, mean.shape[-1:])  # (B, E)
        condition = torch.cat((mean, timestep[:, None].to(mean)), dim=-1)  # (B, E + 1)
        return torch.cat([head(part, condition) for head, part in zip(self.heads, features)], dim=1)


def default_blocks(depth: int) -> list[int]:
    """Return up to four evenly spaced blocks, the last one included.

    Example:
        >>> default_blocks(16)
        [3, 7, 11, 15]
    """
    count = min(4, depth)
    return [depth * (n + 1) // count - 1 for n in range(count)]


def adversarial_losses(
    discriminator: nn.Module,
    fake: Sequence[torch.Tensor],
    real: Sequence[torch.Tensor],
    condition: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the hinge losses (arXiv 1705.02894) of the student and of the discriminator for one backward pass.

    The student's loss changes only the student, the discriminator's only the discriminator, so that their sum trains
    both.

    Args:
        discriminator: a `Discriminator`.
        fake: features of the student's images, with gradients to the student.
        real: features of real images.
        condition: timestep, text and text mask, as in `Discriminator.forward`.

    Returns:
        Loss of the student and loss of the discriminator, scalars.
    """
    frozen: Mapping[str, torch.Tensor] = {name: p.detach() for name, p in discriminator.named_parameters()}
    generator = -functional_call(discriminator, dict(frozen), (fake, *condition)).mean()
    fake_logits = discriminator([part.detach() for part in fake], *condition)  # (B, blocks * N)
    real_logits = discriminator([part.detach() for part in real], *condition)  # (B, blocks * N)
    return generator, F.relu(1 + fake_logits).mean() + F.relu(1 - real_logits).mean()
