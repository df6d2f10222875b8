"""The stream of samples of a run: which sample every process reads at every step, as pure arithmetic."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

from .buckets import Buckets


@dataclass(frozen=True)
class Position:
    """A place in the stream: what is to be read there.

    Args:
        step: the optimizer step that uses the sample.
        sample_index: the place in the stream, from 0.
        dataset_index: the sample of the data set that stands there.
        bucket: which of the run's `Buckets` it belongs to, and so its size; the same for all samples of a step.
    """

    step: int
    sample_index: int
    dataset_index: int
    bucket: int = 0


class StreamSampler(Sampler[list[Position]]):
    """A batch sampler that starts at any step and splits each step's samples over processes and micro-batches.

    Step s of the stream uses its places [s * G, (s + 1) * G), G = batch_size * accumulation * world_size, whatever
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
        first_step: the optimizer step with which the stream begins.
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
        """What stands at a place of the stream, given the step that the place belongs to."""
        return Position(step, sample_index, self._dataset_index(sample_index))

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
                micro_steps = (step - self.first_step) * self.accumulation + micro_step
                first = micro_steps * micro_batch + self.rank * self.batch_size
                yield [self.position(step, index) for index in range(first, first + self.batch_size)]


class BucketStreamSampler(StreamSampler):
    """A `StreamSampler` whose steps each take all their samples, of all processes and micro-batches, from one bucket.

    Every bucket is an endless stream of its own: its n images once in an order of their own, then once in another,
    without a gap; its k-th step takes the places [k * G, (k + 1) * G) of it, G = samples of a step. In the first e
    epochs of the stream it has floor(e * n / G) steps, as many as its e * n images fill. Epoch e consists of the
    floor((e + 1) * n / G) - floor(e * n / G) steps of each bucket that come new, in a seeded order. So

    - no image comes for the (k + 1)-th time before every other one of its bucket has come k times;
    - at the end of epoch e every image has come e + 1 times, but for the last ((e + 1) * n) mod G places of its
      bucket's stream, fewer than a step: they are carried over, and come first in the bucket's next step.

    Where one pass through a bucket ends inside a step, an image can come twice in that step.
    All of it follows from (seed, step): nothing is remembered, and resuming is starting at a later step.

    Args:
        buckets: the images of each bucket.
        batch_size: samples per process and micro-batch.
        start_step, stop_step: half-open range of optimizer steps.
        accumulation: micro-batches per step.
        rank, world_size: this process among all.
        seed: of the orders of images and buckets.
        first_step: the optimizer step with which the stream begins; steps and epochs are counted from there.
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
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None  # first step; bucket and its step, of each step
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # bucket: (pass through it, the images in order)

    def position(self, step: int, sample_index: int) -> Position:
        bucket, bucket_step = self._bucket_of_step(sample_index // self.step_size)
        place = bucket_step * self.step_size + sample_index % self.step_size
        passes, offset = divmod(place, self.bucket_sizes[bucket])
        return Position(step, sample_index, int(self._order(bucket, passes)[offset]), bucket)

    def steps_before(self, epoch: int) -> int:
        """How many steps of the stream the epochs before this one have."""
        return sum(epoch * size // self.step_size for size in self.bucket_sizes)

    def epoch_of_step(self, step: int) -> int:
        """The epoch that a step of the stream belongs to."""
        # each bucket is less than a step short of its share, so that this many epochs have more than `step` steps
        enough = (step + len(self.bucket_sizes) + 1) * self.step_size // self.dataset_size + 1
        return bisect_right(range(enough + 1), step, key=self.steps_before) - 1

    def _bucket_of_step(self, step: int) -> tuple[int, int]:
        """The bucket that a step of the stream reads, and how many steps have read it before."""
        if self._epoch is None or not 0 <= step - self._epoch[0] < len(self._epoch[1]):
            self._epoch = self._plan(self.epoch_of_step(step))
        first, buckets, bucket_steps = self._epoch
        return int(buckets[step - first]), int(bucket_steps[step - first])

    def _plan(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        bounds = [(epoch * n // self.step_size, (epoch + 1) * n // self.step_size) for n in self.bucket_sizes]
        buckets = np.repeat(np.arange(len(bounds)), [stop - start for start, stop in bounds])
        buckets = _generator(self.seed, epoch, 0).permutation(buckets)
        bucket_steps = np.empty_like(buckets)
        for bucket, (start, stop) in enumerate(bounds):
            bucket_steps[buckets == bucket] = np.arange(start, stop)
        return self.steps_before(epoch), buckets, bucket_steps

    def _order(self, bucket: int, passes: int) -> np.ndarray:
        if self._orders.get(bucket, (-1,))[0] != passes:
            order = _generator(self.seed, passes, 1 + bucket).permutation(self.buckets.members[bucket])
            self._orders[bucket] = (passes, order)
        return self._orders[bucket][1]


def _generator(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    # not torch's: its CPU generators use the lowest 32 bits of their seed, too few for three numbers
    return np.random.default_rng((seed, epoch, purpose))


def every_sample_once(buckets: Buckets, batch_size: int) -> list[list[Position]]:
    """Batches for validation: bucket after bucket in the order of the data; a bucket's last batch may be smaller.

    They belong to no step (-1), and a sample's place in the data set is its place in the stream, so that its crop and
    noise are always the same.
    """
    batches = []
    for bucket, members in enumerate(buckets.members):
        positions = [Position(-1, int(index), int(index), bucket) for index in members]
        batches += [positions[first : first + batch_size] for first in range(0, len(positions), batch_size)]
    return batches
