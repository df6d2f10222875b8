"""Token routing: some image tokens skip a range of blocks, which makes a training step cheaper.

TREAD (arXiv 2501.04765) carries these tokens past the blocks unchanged. SPRINT (arXiv 2510.21986) drops them and fuses
the output of the blocks with their input; its layers belong to the model (`fusion_range`).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenRoute:
    """Image tokens that go through the blocks [start, stop); the others skip these blocks.

    Args:
        start, stop: half-open range of blocks, counted from 0.
        kept: (B, K) int64, indices of the tokens that stay, ascending, with 1 <= K <= N.

    Example:
        >>> route = TokenRoute(2, 13, torch.tensor([[0, 3, 5]]))
        >>> output = transformer(latents, timestep, embeds, route=route)
    """

    start: int
    stop: int
    kept: torch.Tensor

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the kept tokens (B, K, D) of tokens (B, N, D)."""
        return tokens.gather(1, self.kept[..., None].expand(-1, -1, tokens.shape[-1]))  # (B, K, D)

    def scatter(self, kept_tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return tokens (B, N, D): `kept_tokens` (B, K, D) at the kept indices, `others` (B, N, D) elsewhere."""
        index = self.kept[..., None].expand(-1, -1, others.shape[-1])  # (B, K, D)
        return others.scatter(1, index, kept_tokens.to(others.dtype))  # (B, N, D)


def sample_route(scores: torch.Tensor, ratio: float, start: int, stop: int) -> TokenRoute:
    """Route a random fraction of the tokens around the blocks [start, stop).

    round(ratio * N) tokens skip the blocks, at least one and at most N - 1, with halves rounded to even. This is the
    number that Photoroom's trainer takes, for SPRINT too. The code of TREAD's authors rounds down instead, which keeps
    one token more for an odd N = 4 k + 3 at ratio 1/2.

    Args:
        scores: (B, N) random numbers; the tokens with the smallest ones stay.
        ratio: fraction in [0, 1) of the tokens that skip the blocks.
        start, stop: half-open range of blocks, counted from 0.

    Raises:
        ValueError: if `ratio` is out of range.

    Example:
        >>> route = sample_route(torch.rand(8, 256), ratio=0.5, start=2, stop=13)
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"`ratio` is {ratio}; accepted are fractions in [0, 1).")
    tokens = scores.shape[1]
    skipping = min(max(round(tokens * ratio), 1), tokens - 1) if ratio > 0 else 0
    return TokenRoute(start, stop, scores.argsort(dim=1)[:, : tokens - skipping].sort(dim=1).values)
