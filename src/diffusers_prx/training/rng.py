"""Random numbers of a run as pure functions of (seed, step, sample).

They do not depend on resuming, world size, gradient accumulation or recomputed forward passes.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def derive_seed(seed: int, step: int, sample_index: int, purpose: str) -> int:
    """Return a 63-bit seed for one purpose of one sample in one step.

    PyTorch's CPU generators use only the lowest 32 bits, so two of about 100,000 draws may be equal.
    """
    key = struct.pack("<qqq", seed, step, sample_index) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


class StepRandom:
    """Random numbers of one micro-batch.

    Args:
        seed: seed of the run.
        step: optimizer step, from 0.
        sample_index: index of each sample in the run's sequence of samples.
        device: device of the generators; CPU and GPU give different numbers.

    Example:
        >>> StepRandom(42, step=0, sample_index=[0, 1]).normal("noise", (3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, seed: int, step: int, sample_index: Sequence[int], device: torch.device | str = "cpu"):
        self.seed = seed
        self.step = step
        self.sample_index = list(sample_index)
        self.device = torch.device(device)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Return one generator per sample."""
        return [
            torch.Generator(self.device).manual_seed(derive_seed(self.seed, self.step, index, purpose))
            for index in self.sample_index
        ]

    @contextmanager
    def seeded(self, purpose: str) -> Iterator[None]:
        """Seed the global generators temporarily, for dropout layers, which use no other.

        The numbers depend on the first sample of the micro-batch, so they change with the batch size.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, self.step, self.sample_index[0], purpose))
            yield

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> torch.Tensor:
        """Return standard normal numbers (B, *shape), float32."""
        return torch.stack(
            [torch.randn(tuple(shape), generator=g, device=self.device) for g in self.generators(purpose)]
        )

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> torch.Tensor:
        """Return uniform numbers in [0, 1) (B, *shape), float32."""
        return torch.stack(
            [torch.rand(tuple(shape), generator=g, device=self.device) for g in self.generators(purpose)]
        )
