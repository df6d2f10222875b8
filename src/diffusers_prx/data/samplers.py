"""Batch samplers: the samples that each process reads at each step, as pure arithmetic on seed and step."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

from .buckets import Buckets


@dataclass(frozen=True)
class Position:
    """Position of a sample in a run.

    Args:
        step: optimizer step that uses the sample.
        sample_index: index in the run's sequence of samples, from 0.
        dataset_index: index in the data set.
        bucket: index of its bucket in the run's `Buckets`, the same for all samples of a step.
    """

    step: int
    sample_index: int
    dataset_index: int
    bucket: int = 0


class StreamSampler(Sampler[list[Position]]):
    """Batch sampler that starts at any step and divides each step's samples among processes and micro-batches.

    Step s uses the samples [s * G, (s + 1) * G) of the run, G = batch_size * accumulation * world_size, whatever the
    three factors are. Epochs follow each other without a gap, each in its own order: no sample is lost or
    repeated. The sampler has no state; to resume, start it at a later step.

    Args:
        dataset_size: number of samples, at least 1.
        batch_size: samples per process and micro-batch.
        start_step, stop_step: half-open range of optimizer steps.
        accumulation: micro-batches per step.
        rank: rank of this process.
        world_size: number of processes.
        seed: seed of the orders of the epochs.
        shuffle: False keeps the order of the data set, for data that are random already.
        first_step: optimizer step at which the sequence of samples begins.

    Raises:
        ValueError: if `dataset_size` is below 1.

    Example:
        >>> sampler = StreamSampler(dataset_size=1000, batch_size=8, start_step=0, stop_step=100)
        >>> [position.dataset_index for position in next(iter(sampler))]
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
        first_step: int = 0,
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
        self.first_step = first_step
        self._epoch_order: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return max(self.stop_step - self.start_step, 0) * self.accumulation

    def position(self, step: int, sample_index: int) -> Position:
        """Return the position with index `sample_index`, given the step that it belongs to."""
        return Position(step, sample_index, self._dataset_index(sample_index))

    def _dataset_index(self, sample_index: int) -> int:
        epoch, offset = divmod(sample_index, self.dataset_size)
        if not self.shuffle:
            return offset
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch_order = (epoch, torch.randperm(self.dataset_size, generator=generator))
        return int(self._epoch_order[1][offset])

    def __iter__(self) -> Iterator[list[Position]]:
        micro_batch = self.batch_size * self.world_size
        for step in range(self.start_step, self.stop_step):
            for micro_step in range(self.accumulation):
                micro_steps = (step - self.first_step) * self.accumulation + micro_step
                first = micro_steps * micro_batch + self.rank * self.batch_size
                yield [self.position(step, index) for index in range(first, first + self.batch_size)]


class BucketStreamSampler(StreamSampler):
    """`StreamSampler` that takes all samples of a step, of all processes and micro-batches, from one bucket.

    Every bucket has its own endless sequence: its n images in one order, then in another, without a gap. Its
    k-th step takes the samples [k * G, (k + 1) * G) of that sequence, G = samples per step. The first e epochs have
    floor(e * n / G) steps of the bucket, as many as e * n images fill. Epoch e consists of the
    floor((e + 1) * n / G) - floor(e * n / G) new steps of each bucket, in a seeded order. Therefore

    - no image is used for the (k + 1)-th time before every image of its bucket was used k times;
    - at the end of epoch e every image was used e + 1 times, except the last ((e + 1) * n) mod G samples of its
      bucket's sequence, fewer than a step. The next step of the bucket begins with these.

    An image can appear twice in a step in which its bucket begins a new order.

    Args:
        buckets: images of each bucket.
        batch_size: samples per process and micro-batch.
        start_step, stop_step: half-open range of optimizer steps.
        accumulation: micro-batches per step.
        rank: rank of this process.
        world_size: number of processes.
        seed: seed of the orders of images and buckets.
        first_step: optimizer step at which the sequence of samples begins; epochs count from there.
    """

    def __init__(
        self,
        buckets: Buckets,
        batch_size: int,
        start_step: int,
        stop_step: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        first_step: int = 0,
    ):
        self.bucket_sizes = [len(members) for members in buckets.members]
        size = sum(self.bucket_sizes)
        super().__init__(
            size, batch_size, start_step, stop_step, accumulation, rank, world_size, seed, first_step=first_step
        )
        self.buckets = buckets
        self.step_size = batch_size * accumulation * world_size
        # first step of an epoch; for each of its steps the bucket and the number of the bucket's step
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # bucket: (number of the order, the images in order)

    def position(self, step: int, sample_index: int) -> Position:
        bucket, bucket_step = self._bucket_of_step(sample_index // self.step_size)
        bucket_index = bucket_step * self.step_size + sample_index % self.step_size
        number, offset = divmod(bucket_index, self.bucket_sizes[bucket])
        return Position(step, sample_index, int(self._order(bucket, number)[offset]), bucket)

    def steps_before(self, epoch: int) -> int:
        """Number of steps in all epochs before this one."""
        return sum(epoch * size // self.step_size for size in self.bucket_sizes)

    def epoch_of_step(self, step: int) -> int:
        """Epoch of a step, counted from `first_step`."""
        # each bucket is less than one step short of its share, so this many epochs have more than `step` steps
        upper_bound = (step + len(self.bucket_sizes) + 1) * self.step_size // self.dataset_size + 1
        return bisect_right(range(upper_bound + 1), step, key=self.steps_before) - 1

    def _bucket_of_step(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and the number of earlier steps of that bucket."""
        if self._epoch is None or not 0 <= step - self._epoch[0] < len(self._epoch[1]):
            self._epoch = self._plan_epoch(self.epoch_of_step(step))
        first, buckets, bucket_steps = self._epoch
        return int(buckets[step - first]), int(bucket_steps[step - first])

    def _plan_epoch(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        bounds = [(epoch * n // self.step_size, (epoch + 1) * n // self.step_size) for n in self.bucket_sizes]
        buckets = np.repeat(np.arange(len(bounds)), [stop - start for start, stop in bounds])
        buckets = _generator(self.seed, epoch, 0).permutation(buckets)
        bucket_steps = np.empty_like(buckets)
        for bucket, (start, stop) in enumerate(bounds):
            bucket_steps[buckets == bucket] = np.arange(start, stop)
        return self.steps_before(epoch), buckets, bucket_steps

    def _order(self, bucket: int, number: int) -> np.ndarray:
        if self._orders.get(bucket, (-1,))[0] != number:
            order = _generator(self.seed, number, 1 + bucket).permutation(self.buckets.members[bucket])
            self._orders[bucket] = (number, order)
        return self._orders[bucket][1]


def _generator(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    # not torch's: its CPU generators use the lowest 32 bits of their seed, too few for three numbers
    return np.random.default_rng((seed, epoch, purpose))


def every_sample_once(buckets: Buckets, batch_size: int) -> list[list[Position]]:
    """Return validation batches: bucket after bucket in the order of the data. A bucket's last batch may be smaller.

    The positions have step -1 and the index in the data set as `sample_index`, so that the crop and the noise of a
    sample are always the same.
    """
    batches = []
    for bucket, members in enumerate(buckets.members):
        positions = [Position(-1, int(index), int(index), bucket) for index in members]
        batches += [positions[first : first + batch_size] for first in range(0, len(positions), batch_size)]
    return batches
