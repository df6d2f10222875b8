"""Random numbers of a run as pure functions of (seed, step, sample): the same after a resume, at any world size,
at any accumulation, and when a checkpointed forward is computed again."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def derive_seed(seed: int, step: int, sample_index: int, purpose: str) -> int:
    """A 63-bit seed for one purpose of one sample of one step; purposes do not share random numbers.

    PyTorch's generators on a CPU use the lowest 32 bits of a seed: there two of some 100,000 draws may be the same.
    """
    key = struct.pack("<qqq", seed, step, sample_index) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


class StepRandom:
    """All random draws of one micro-batch.

    Args:
        seed: the run's seed.
        step: the optimizer step, from 0.
        sample_index: the place of every sample of the micro-batch in the run's stream of samples.
        device: where the numbers are drawn; CPU and GPU generators give different numbers.
    """

    def __init__(self, seed: int, step: int, sample_index: Sequence[int], device: torch.device | str = "cpu"):
        self.seed = seed
        self.step = step
        self.sample_index = list(sample_index)
        self.device = torch.device(device)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One generator per sample."""
        return [
            torch.Generator(self.device).manual_seed(derive_seed(self.seed, self.step, index, purpose))
            for index in self.sample_index
        ]

    @contextmanager
    def seeded(self, purpose: str) -> Iterator[None]:
        """The global generators for a while, for layers that draw from nothing else (dropout). Their numbers follow
        from the whole micro-batch, so that another split of the work gives others."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, self.step, self.sample_index[0], purpose))
            yield

    def normal(self, purpose: str, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal numbers, float32, of shape (B, *shape)."""
        return torch.stack([torch.randn(*shape, generator=g, device=self.device) for g in self.generators(purpose)])

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> torch.Tensor:
        """Numbers in [0, 1), float32, of shape (B, *shape)."""
        return torch.stack(
            [torch.rand(tuple(shape), generator=g, device=self.device) for g in self.generators(purpose)]
        )
