"""The stream of samples of a run: which sample every process reads at every step, as pure arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


@dataclass(frozen=True)
class Position:
    """A place in the stream: what is to be read there.

    Args:
        step: the optimizer step that uses the sample.
        sample_index: the place in the stream, from 0, counted over the whole run.
        dataset_index: the sample of the data set that stands there.
    """

    step: int
    sample_index: int
    dataset_index: int


class StreamSampler(Sampler[list[Position]]):
    """A batch sampler that starts at any step and splits each step's samples over processes and micro-batches.

    Step s uses the places [s * G, (s + 1) * G) of the stream, G = batch_size * accumulation * world_size, whatever
    the three factors are. Epochs follow each other without a gap, each in an order of its own: no sample is lost or
    doubled. Nothing is remembered, so resuming is starting at a later step.

    Args:
        dataset_size: number of samples, at least 1.
        batch_size: samples per process and micro-batch.
        start_step, stop_step: half-open range of optimizer steps.
        accumulation: micro-batches per step.
        rank, world_size: this process among all.
        seed: of the orders of the epochs.
        shuffle: False reads in the order of the data set: for data that are drawn at random anyway.
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        start_step: int,
        stop_step: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ):
        if dataset_size < 1:
            raise ValueError(f"`dataset_size` must be at least 1, got {dataset_size}: there is nothing to train on.")
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.start_step = start_step
        self.stop_step = stop_step
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self._epoch_order: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return max(self.stop_step - self.start_step, 0) * self.accumulation

    def _dataset_index(self, sample_index: int) -> int:
        epoch, place = divmod(sample_index, self.dataset_size)
        if not self.shuffle:
            return place
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch_order = (epoch, torch.randperm(self.dataset_size, generator=generator))
        return int(self._epoch_order[1][place])

    def __iter__(self) -> Iterator[list[Position]]:
        micro_batch = self.batch_size * self.world_size
        for step in range(self.start_step, self.stop_step):
            for micro_step in range(self.accumulation):
                first = (step * self.accumulation + micro_step) * micro_batch + self.rank * self.batch_size
                yield [
                    Position(step, index, self._dataset_index(index))
                    for index in range(first, first + self.batch_size)
                ]
