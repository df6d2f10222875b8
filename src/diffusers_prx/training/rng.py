"""Random numbers of a run as pure functions of (seed, step, sample).

They do not depend on resuming, world size, gradient accumulation or recomputed forward passes.
"""

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

# Philox 4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011)
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF  # the 32 bits of a word


def derive_seed(seed: int, step: int, sample_index: int, purpose: str) -> int:
    """Return a 63-bit seed for one purpose of one sample in one step.

    PyTorch's CPU generators use only the lowest 32 bits, so two of about 100,000 draws may be equal.
    """
    key = struct.pack("<qqq", seed, step, sample_index) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def philox(counters: torch.Tensor, key: int) -> torch.Tensor:
    """Compute the words of Philox 4x32-10 in 64-bit integers: a few operations, whatever the number of counters.

    Args:
        counters: four words in [0, 2**32) each, int64 (4, ...).
        key: 64-bit key, its lower word first.

    Returns:
        Random words in [0, 2**32), int64 (4, ...), the same on every device.

    Example:
        >>> hex(philox(torch.zeros(4, 1, dtype=torch.int64), key=0)[0].item())
        '0x6627e8d5'
    """
    shape, device = (2, *[1] * (counters.ndim - 1)), counters.device
    keys = [[((key >> 32 * n) + r * PHILOX_KEY_STEPS[n]) & WORD for n in (0, 1)] for r in range(PHILOX_ROUNDS)]
    multipliers = _to_device(PHILOX_MULTIPLIERS, device).view(shape)
    # higher bits than a word's may be anything in `other`, but not in `multiplied`
    multiplied, other = counters[::2], counters[1::2]  # words 0 and 2, words 1 and 3, (2, ...) each
    for round_key in _to_device(keys, device).view(-1, *shape):
        product = (multiplied * multipliers).flip(0)  # (2, ...); the overflow leaves the 64 bits right
        multiplied = (product >> 32).bitwise_xor_(other).bitwise_xor_(round_key).bitwise_and_(WORD)  # (2, ...)
        other = product
    return torch.stack((multiplied, other & WORD), dim=1).flatten(0, 1)  # (4, ...)


def normal_from_words(words: torch.Tensor) -> torch.Tensor:
    """Transform random words to standard normal numbers, float32, of at most 6.7 in size (Box-Muller).

    Args:
        words: random words of 32 bits, int64 (4, ...).

    Returns:
        (4, ...).
    """
    uniforms = words.float().add_(0.5).mul_(2.0**-32)  # (4, ...) in (0, 1]
    radius = uniforms[:2].log().mul_(-2).sqrt_()  # (2, ...)
    angle = uniforms[2:].mul_(2 * math.pi)  # (2, ...)
    return torch.cat((radius * angle.cos(), radius * angle.sin()))  # (4, ...)


class StepRandom:
    """Random numbers of one micro-batch.

    Uniform numbers are the same on every device. Normal numbers are drawn in a few operations for the whole batch on
    an accelerator; a CPU is five times faster with one generator of PyTorch per sample, and gives other numbers.

    Args:
        seed: seed of the run.
        step: optimizer step, from 0.
        sample_index: index of each sample in the run's sequence of samples, from 0.
        device: device of the numbers.

    Example:
        >>> StepRandom(42, step=0, sample_index=[0, 1]).normal("noise", (3, 32, 32)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, seed: int, step: int, sample_index: Sequence[int], device: torch.device | str = "cpu"):
        self.seed = seed
        self.step = step
        self.sample_index = list(sample_index)
        self.device = torch.device(device)

    @cached_property
    def samples(self) -> torch.Tensor:
        """Indices of the samples on the device, (B,)."""
        return _to_device(self.sample_index, self.device)

    @contextmanager
    def seeded(self, purpose: str) -> Iterator[None]:
        """Seed the global generators temporarily, for dropout layers, which use no other.

        The numbers depend on the first sample of the micro-batch, so they change with the batch size.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, self.step, self.sample_index[0], purpose))
            yield

    def uniform(self, purpose: str, shape: Sequence[int] = (), on_host: bool = False) -> torch.Tensor:
        """Return uniform numbers in [0, 1) (B, *shape), float32, multiples of 2**-24.

        Args:
            purpose: name of the draw; other names give other numbers.
            shape: numbers of each sample.
            on_host: True for numbers that Python reads, which would have to wait for an accelerator.
        """
        samples = torch.tensor(self.sample_index) if on_host else self.samples
        words = self._words(purpose, samples, math.prod(shape))  # (4, B, n / 4)
        return _by_sample((words >> 8).float().mul_(2.0**-24), shape)

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> torch.Tensor:
        """Return standard normal numbers (B, *shape), float32."""
        if self.device.type != "cpu":
            return _by_sample(normal_from_words(self._words(purpose, self.samples, math.prod(shape))), shape)
        seeds = (derive_seed(self.seed, self.step, index, purpose) for index in self.sample_index)
        return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(s)) for s in seeds])

    def _words(self, purpose: str, samples: torch.Tensor, count: int) -> torch.Tensor:
        """Return `count` random words or up to three more for each sample, (4, B, blocks).

        The key holds seed, step and purpose, the counter the sample and the number of the block of four words.
        """
        blocks = torch.arange(-(-count // 4), device=samples.device)
        counter = (blocks, torch.zeros_like(blocks), samples[:, None] & WORD, samples[:, None] >> 32)
        return philox(torch.stack(torch.broadcast_tensors(*counter)), derive_seed(self.seed, self.step, -1, purpose))


def _by_sample(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Rearrange values (4, B, blocks) to (B, *shape)."""
    return values.movedim(0, 2).flatten(1)[:, : math.prod(shape)].reshape(-1, *shape)


def _to_device(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Copy numbers to a device without waiting for it."""
    return torch.tensor(values).to(device, non_blocking=True)
