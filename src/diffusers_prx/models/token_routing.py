"""Token routing: some image tokens go around a range of blocks, which makes a training step cheaper.

TREAD (arXiv 2501.04765) carries the routed tokens past the blocks as they are. SPRINT (arXiv 2510.21986) drops them
there and fuses what comes out with the stream from before; its layers belong to the model (`fusion_range`).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenRoute:
    """Which image tokens go through the blocks [start, stop); the others go around them.

    Args:
        start, stop: half-open range of blocks, counted from 0.
        kept: (B, K) int64, the tokens of each sample that stay, 1 <= K <= N, ascending.
    """

    start: int
    stop: int
    kept: torch.Tensor

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """The kept ones (B, K, D) of tokens (B, N, D)."""
        return tokens.gather(1, self.kept[..., None].expand(-1, -1, tokens.shape[-1]))  # (B, K, D)

    def scatter(self, kept_tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D): `kept_tokens` (B, K, D) at their places, those of `others` (B, N, D) elsewhere."""
        index = self.kept[..., None].expand(-1, -1, others.shape[-1])  # (B, K, D)
        return others.scatter(1, index, kept_tokens.to(others.dtype))  # (B, N, D)


def sample_route(scores: torch.Tensor, ratio: float, start: int, stop: int) -> TokenRoute:
    """Route a random share of the tokens around the blocks [start, stop).

    Of N tokens `round(ratio N)` go around, halves to the even number, at least one and at most N - 1: the number that
    Photoroom's trainer takes, for SPRINT too. The code of TREAD's authors rounds down: of an odd number of tokens at
    ratio 1/2 both leave the larger half in the blocks where N = 4 k + 1, theirs one more where N = 4 k + 3.

    Args:
        scores: (B, N) random numbers, drawn by the caller: the tokens with the smallest ones stay.
        ratio: share in [0, 1) of the tokens that go around; 0: none.

    Raises:
        ValueError: for a ratio outside its range.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"`ratio` is a share in [0, 1), got {ratio}.")
    tokens = scores.shape[1]
    around = min(max(round(tokens * ratio), 1), tokens - 1) if ratio > 0 else 0
    return TokenRoute(start, stop, scores.argsort(dim=1)[:, : tokens - around].sort(dim=1).values)
