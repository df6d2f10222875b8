"""Sources that are read from beginning to end, shard by shard, and resume at exactly the sample they had reached.

The shards of an epoch are shuffled, the samples inside a shard are not, and there is no shuffle buffer: of a buffer's
samples, those that wait in it are lost at a resume. So shards should be many, and shuffled when they are written.

A lane is one worker of one process; with R processes of W workers there are R * W. Epoch e of lane l reads every
(R * W)th shard of the seeded order of epoch e, from the l-th on: each epoch reads each shard once, whatever lanes do.
A lane starts its next epoch when it is through with its shards, without waiting for others.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import datasets
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .captioned import StoredImages, read_sample
from .captions import read_captions, require_column
from .images import NOWHERE, Scope, UnfitSample, UnreadableSample, image_value
from .mixing import Mix, permutation
from .samplers import Position
from .tars import Stored

UNREADABLE_IN_A_ROW = 1000  # then the stream is taken for unreadable altogether
ROWS_AT_ONCE = 16
SHARDS_OF_A_FOLDER = 64


class Shards(Protocol):
    """A set of shards: `rows(shard, start)` gives what is stored in one, from row `start` on."""

    def __len__(self) -> int: ...

    def name(self, shard: int) -> str: ...

    def rows(self, shard: int, start: int) -> Iterator[Stored]: ...


class HubShards:
    """The shards of a streaming data set of `datasets`.

    Args:
        dataset: the data set.
        image_column, caption_columns: its columns.
        label: its name, for messages.
        scope: the files that its cells may name; by default none, they must hold bytes.

    Raises:
        ValueError: if a column is missing, with the columns that are there.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        image_column: str,
        caption_columns: Sequence[str],
        label: str,
        scope: Scope = NOWHERE,
    ):
        columns = dataset.column_names or list(next(iter(dataset), {}))
        for option, column in (("image_column", image_column), *(("caption_column", c) for c in caption_columns)):
            require_column(option, column, columns)
        if dataset.features is not None and isinstance(dataset.features[image_column], datasets.Image):
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        for column in caption_columns:
            if dataset.features is not None and dataset.features[column] == datasets.Value("string"):
                # as bytes: a single text that is no UTF-8 would end the shard
                dataset = dataset.cast_column(column, datasets.Value("binary"))
        self.dataset = dataset.select_columns(list(dict.fromkeys([image_column, *caption_columns])))
        self.image_column = image_column
        self.caption_columns = tuple(caption_columns)
        self.label = label
        self.scope = scope

    def __len__(self) -> int:
        return self.dataset.num_shards

    def name(self, shard: int) -> str:
        return f"{self.label}, shard {shard}"

    def rows(self, shard: int, start: int) -> Iterator[Stored]:
        part = self.dataset.shard(num_shards=len(self), index=shard)
        # `iter(part)` inside a worker would share the one shard out over all workers once more; `iter(n)` does not
        for batch in (part.skip(start) if start else part).iter(ROWS_AT_ONCE):
            for place, image in enumerate(batch[self.image_column]):
                captions = {column: batch[column][place] for column in self.caption_columns}
                try:
                    yield self.scope.locate(image_value(image)), captions
                except UnreadableSample as error:
                    yield error, captions


class ListedShards:
    """A source that is read by index, cut into shards of neighboring samples.

    Args:
        source: the source.
        label: its name, for messages.
    """

    def __init__(self, source: StoredImages, label: str):
        self.source = source
        self.label = label

    def __len__(self) -> int:
        return min(len(self.source), SHARDS_OF_A_FOLDER)

    def name(self, shard: int) -> str:
        return f"{self.label}, shard {shard}"

    def rows(self, shard: int, start: int) -> Iterator[Stored]:
        first, stop = (len(self.source) * number // len(self) for number in (shard, shard + 1))
        for index in range(first + start, stop):
            try:
                yield self.source.stored_image(index), self.source.stored_captions(index)
            except (UnreadableSample, OSError, UnicodeDecodeError) as error:
                yield UnreadableSample(str(error)), {"caption": "unreadable"}


Place = dict[str, Any]  # how far a lane is: {"drawn": samples so far, "sources": [[epoch, shard, row], ...]}


class StreamedImages:
    """One or several streams, mixed by weights, as an endless source for the lanes of a run.

    Args:
        sources: sets of shards, each with at least as many shards as there are lanes.
        weights: one per source, see `mixing.Mix`; they count samples.
        seed: of the orders of shards and of the mix.
        rank, world_size: this process among all.
        num_workers: workers that read for this process, 0 is one (the process itself).
        held_out: the first samples of the first shard of the first source are kept out of training: how many.

    Raises:
        ValueError: for fewer shards than lanes, or weights that do not fit.
    """

    def __init__(
        self,
        sources: Sequence[Shards],
        weights: Sequence[float],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        held_out: int = 0,
    ):
        if len(sources) != len(weights):
            raise ValueError(f"`weights` has {len(weights)} numbers for {len(sources)} sources: give one for each.")
        self.workers = max(num_workers, 1)
        self.lanes = world_size * self.workers
        for source in sources:
            if len(source) < self.lanes:
                raise ValueError(
                    f"A stream needs at least one shard for each of the {world_size} processes x {self.workers} "
                    f"workers = {self.lanes}, but {source.name(0)} is one of {len(source)}: lower "
                    "`dataloader_num_workers`, or cut the data into more shards."
                )
        self.sources = list(sources)
        self.weights = list(weights)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.held_out = held_out
        Mix(weights, seed)  # wrong weights are an error now, not in a worker

    def start(self) -> Place:
        """The place of a lane that has read nothing."""
        return {"drawn": 0, "sources": [[0, 0, 0] for _ in self.sources]}

    def held_out_samples(self) -> list[dict[str, Any]]:
        """The samples kept out of training, those of them that can be read.

        Raises:
            ValueError: if the first shard does not have as many.
        """
        rows = [row for row, _ in zip(self.sources[0].rows(0, 0), range(self.held_out))]
        if len(rows) < self.held_out:
            raise ValueError(
                f"`num_validation_samples` is {self.held_out}, but the first shard has {len(rows)} samples; they are "
                "all taken from it."
            )
        samples = []
        for row in rows:
            try:
                samples.append(read_sample(*row))
            except UnreadableSample:
                continue  # the length of the list tells
        return samples

    def captions(self) -> Iterator[dict[str, str]]:
        """The captions by column of training samples, in the shares of the sources, without decoding an image. Those
        that cannot be read are left out; it ends with the first source that does."""
        rows = [self._first_rows(number) for number in range(len(self.sources))]
        mix = Mix(self.weights, self.seed)
        for place in itertools.count():
            row = next(rows[mix.turn(place)[0]], None)
            if row is None:
                return
            with contextlib.suppress(UnreadableSample):
                yield read_captions(row[1])

    def _first_rows(self, number: int) -> Iterator[Stored]:
        source = self.sources[number]
        for shard in range(len(source)):
            yield from source.rows(shard, self.held_out if (number, shard) == (0, 0) else 0)

    def read(self, worker: int, place: Place) -> Iterator[tuple[dict[str, Any] | UnreadableSample, Place]]:
        """What a worker of this process reads from a place on, without end: each sample, or why it cannot be read,
        with the place behind it."""
        mix = Mix(self.weights, self.seed, self.rank * self.workers + worker)
        drawn, places = place["drawn"], [list(where) for where in place["sources"]]
        streams = [self._rows(number, worker, *places[number]) for number in range(len(self.sources))]
        while True:
            number, _ = mix.turn(drawn)
            row, places[number], name = next(streams[number])
            drawn += 1
            sample: dict[str, Any] | UnreadableSample
            try:
                sample = read_sample(*row)
            except UnreadableSample as error:
                sample = UnreadableSample(f"sample {places[number][2] - 1} has {error} ({name})")
            yield sample, {"drawn": drawn, "sources": [list(where) for where in places]}

    def _rows(
        self, number: int, worker: int, epoch: int, start_shard: int, start_row: int
    ) -> Iterator[tuple[Stored, list[int], str]]:
        """Rows of a source for a worker, each with the place behind it and the name of its shard."""
        source, lane = self.sources[number], self.rank * self.workers + worker
        while True:
            order = permutation(len(source), self.seed, number, epoch)[lane :: self.lanes]
            found = False
            for turn in range(start_shard, len(order)):
                shard = int(order[turn])
                first = max(start_row, self.held_out if (number, shard) == (0, 0) else 0)
                for row, stored in enumerate(source.rows(shard, first), first):
                    found = True
                    yield stored, [epoch, turn, row + 1], source.name(shard)
                start_row = 0
            if not found and start_shard == 0:
                raise ValueError(f"There is no sample to train on in {len(order)} shards ({source.name(0)}, ...).")
            epoch, start_shard = epoch + 1, 0

    def record(self, places: Sequence[Sequence[Place]]) -> dict[str, Any]:
        """What a checkpoint must keep: the places of all lanes (rank by worker), and what they belong to."""
        return {**self._layout(), "places": [list(lanes) for lanes in places]}

    def _layout(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "world_size": self.world_size,
            "workers": self.workers,
            "shards": [len(source) for source in self.sources],
            "weights": self.weights,
            "held_out": self.held_out,
        }

    def restore(self, record: dict[str, Any]) -> list[Place]:
        """The places of this process's workers in a checkpoint.

        Raises:
            ValueError: if the stream was another one, or read by another number of processes or workers: shards are
                dealt out by these, so that samples would be lost and doubled.
        """
        for name, value in self._layout().items():
            if record[name] != value:
                raise ValueError(
                    f"The checkpoint's stream had {name} {record[name]}, this run has {value}: a stream resumes only "
                    "as it was. Keep it, or use data that are not streamed."
                )
        return record["places"][self.rank]


class StreamedBatches(IterableDataset):
    """The micro-batches of a process, read from a stream by the workers in turn.

    Args:
        stream: what is read.
        make_sample: makes a training sample of what the stream gives; `UnreadableSample` and `UnfitSample` leave it
            out.
        collate: puts samples together; each has a list "unreadable" with the reasons for those left out before it, and
            how many did not fit as "unfit".
        batch_size: samples of a micro-batch.
        start_step, stop_step: half-open range of optimizer steps.
        first_step: the optimizer step with which the stream begins.
        accumulation: micro-batches per step.
        places: of the workers, from `StreamedImages.restore`; none: from the beginning.

    A batch also has "worker", which of the process's workers has read it, and "place", how far that one is then. The
    last place of every worker goes into `StreamedImages.record`. The number of a sample in the run, on which its noise
    depends, is that of `samplers.StreamSampler`.
    """

    def __init__(
        self,
        stream: StreamedImages,
        make_sample: Callable[[dict[str, Any], Position], dict[str, Any]],
        collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
        batch_size: int,
        start_step: int,
        stop_step: int,
        accumulation: int = 1,
        places: Sequence[Place] | None = None,
        first_step: int = 0,
    ):
        self.stream = stream
        self.make_sample = make_sample
        self.collate = collate
        self.batch_size = batch_size
        self.first = (start_step - first_step) * accumulation
        self.stop = (stop_step - first_step) * accumulation
        self.first_step = first_step
        self.accumulation = accumulation
        self.places = [stream.start() for _ in range(stream.workers)] if places is None else list(places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        # a loader begins with its worker 0: that one takes the place of whose turn it is
        begin = self.first + (0 if info is None else info.id)
        worker = begin % self.stream.workers
        samples = self.stream.read(worker, self.places[worker])
        for micro_batch in range(begin, self.stop, self.stream.workers):
            items = []
            first = (micro_batch * self.stream.world_size + self.stream.rank) * self.batch_size
            for index in range(first, first + self.batch_size):
                step = self.first_step + micro_batch // self.accumulation
                item, place = self._next(samples, Position(step, index, index))
                items.append(item)
            yield {**self.collate(items), "worker": worker, "place": place}

    def _next(
        self, samples: Iterator[tuple[dict[str, Any] | UnreadableSample, Place]], position: Position
    ) -> tuple[dict[str, Any], Place]:
        unreadable: list[str] = []
        unfit: list[str] = []
        for sample, place in samples:
            try:
                if isinstance(sample, UnreadableSample):
                    raise sample
                made = self.make_sample(sample, position)
                return {**made, "unreadable": unreadable, "unfit": len(unfit)}, place
            except UnreadableSample as error:
                unreadable.append(str(error))
            except UnfitSample as error:
                unfit.append(str(error))
            if len(unreadable) + len(unfit) == UNREADABLE_IN_A_ROW:
                break
        raise ValueError(
            f"None of {UNREADABLE_IN_A_ROW} samples in a row can be used: {len(unreadable)} cannot be read and "
            f"{len(unfit)} do not fit; the first: {(unreadable + unfit)[0]}"
        )


def build_stream_loader(batches: StreamedBatches, num_workers: int) -> DataLoader:
    """A loader over the micro-batches of a stream; `num_workers` is that of its `StreamedImages`."""
    return DataLoader(batches, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available())
