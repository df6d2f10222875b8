"""Streaming: read sources from beginning to end, shard by shard, and resume at the exact sample.

The shards of an epoch are shuffled; the samples inside a shard are not. It has no shuffle buffer, because the
samples waiting in it would be lost on resume. So write many shards, and shuffle the samples when you write them.

A lane is one worker of one process; R processes with W workers have R * W lanes. In epoch e lane l reads every
(R * W)th shard of the seeded order of that epoch, starting with the l-th: each epoch reads each shard once. A lane
starts its next epoch when it has read its shards, without waiting for the other lanes.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypedDict

import datasets
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .captioned import StoredImages, decode_sample
from .captions import read_captions, require_column
from .images import NO_FILES, AllowedFiles, UnreadableSample, image_value
from .mixing import Mix, permutation
from .samplers import Position
from .samples import first_usable
from .tars import StoredSample

ROWS_PER_READ = 16
MAX_FOLDER_SHARDS = 64


class Shards(Protocol):
    """Set of shards. `rows(shard, start)` yields the stored samples of one shard from row `start` on."""

    def __len__(self) -> int: ...

    def name(self, shard: int) -> str: ...

    def rows(self, shard: int, start: int) -> Iterator[StoredSample]: ...


class HubShards:
    """Shards of a streaming data set of `datasets`.

    Args:
        dataset: data set opened with `streaming=True`.
        image_column: column of the images.
        caption_columns: columns of the captions.
        label: name of the data set, for messages.
        allowed_files: files that cells may name. Default: none; cells must hold bytes.

    Raises:
        ValueError: if a column is missing.

    Example:
        >>> rows = datasets.load_dataset("me/photos", split="train", streaming=True)
        >>> image, captions = next(HubShards(rows, "image", ["text"], "photos").rows(0, 0))
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        image_column: str,
        caption_columns: Sequence[str],
        label: str,
        allowed_files: AllowedFiles = NO_FILES,
    ):
        columns = dataset.column_names or list(next(iter(dataset), {}))
        for option, column in (("image_column", image_column), *(("caption_column", c) for c in caption_columns)):
            require_column(option, column, columns)
        if dataset.features is not None and isinstance(dataset.features[image_column], datasets.Image):
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        for column in caption_columns:
            if dataset.features is not None and dataset.features[column] == datasets.Value("string"):
                # as bytes: a single text of invalid UTF-8 would end the shard
                dataset = dataset.cast_column(column, datasets.Value("binary"))
        self.dataset = dataset.select_columns(list(dict.fromkeys([image_column, *caption_columns])))
        self.image_column = image_column
        self.caption_columns = tuple(caption_columns)
        self.label = label
        self.allowed_files = allowed_files

    def __len__(self) -> int:
        return self.dataset.num_shards

    def name(self, shard: int) -> str:
        return f"{self.label}, shard {shard}"

    def rows(self, shard: int, start: int) -> Iterator[StoredSample]:
        part = self.dataset.shard(num_shards=len(self), index=shard)
        # inside a worker `iter(part)` would divide this one shard among all workers; `part.iter(n)` does not
        for batch in (part.skip(start) if start else part).iter(ROWS_PER_READ):
            for row, image in enumerate(batch[self.image_column]):
                captions = {column: batch[column][row] for column in self.caption_columns}
                try:
                    yield self.allowed_files.resolve(image_value(image)), captions
                except UnreadableSample as error:
                    yield error, captions


class ListedShards:
    """Shards of neighboring samples of a source that is read by index.

    Args:
        source: source to divide.
        label: name of the source, for messages.
    """

    def __init__(self, source: StoredImages, label: str):
        self.source = source
        self.label = label

    def __len__(self) -> int:
        return min(len(self.source), MAX_FOLDER_SHARDS)

    def name(self, shard: int) -> str:
        return f"{self.label}, shard {shard}"

    def rows(self, shard: int, start: int) -> Iterator[StoredSample]:
        first, stop = (len(self.source) * number // len(self) for number in (shard, shard + 1))
        for index in range(first + start, stop):
            try:
                yield self.source.stored_image(index), self.source.stored_captions(index)
            except (UnreadableSample, OSError, UnicodeDecodeError) as error:
                yield UnreadableSample(str(error)), {"caption": "unreadable"}


class LaneProgress(TypedDict):
    """Progress of one lane: samples read so far, and [epoch, shard in the lane's order, row] of each source."""

    drawn: int
    sources: list[list[int]]


class StreamedImages:
    """One or several sets of shards, mixed by weights, as an endless source for the lanes of a run.

    Args:
        sources: sets of shards, each with at least one shard per lane.
        weights: share of the samples of each source, see `mixing.Mix`.
        seed: seed of the shard orders and of the mix.
        rank: rank of this process.
        world_size: number of processes.
        num_workers: worker processes of this process's loader; 0 reads in the process itself, as one lane.
        held_out: number of samples at the beginning of the first shard of the first source that are not trained on.

    Raises:
        ValueError: if a source has fewer shards than there are lanes, or the weights are invalid.

    Example:
        >>> stream = StreamedImages([load_stream("photos/*.tar")], [1.0], seed=0)
        >>> sample, progress = next(stream.read(0, stream.initial_progress()))
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
                    f"workers = {self.lanes}, but {source.name(0)} is one of {len(source)}. Lower "
                    "`--dataloader_num_workers`, or divide the data into more shards."
                )
        self.sources = list(sources)
        self.weights = list(weights)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.held_out = held_out
        Mix(weights, seed)  # reports invalid weights now, not in a worker

    def initial_progress(self) -> LaneProgress:
        """Progress of a lane that has read nothing."""
        return {"drawn": 0, "sources": [[0, 0, 0] for _ in self.sources]}

    def held_out_samples(self) -> list[dict[str, Any]]:
        """Read the held-out samples, without the unreadable ones.

        Raises:
            ValueError: if the first shard has fewer than `held_out` samples.
        """
        rows = [row for row, _ in zip(self.sources[0].rows(0, 0), range(self.held_out))]
        if len(rows) < self.held_out:
            raise ValueError(
                f"`num_validation_samples` is {self.held_out}, but the first shard has {len(rows)} samples, and all "
                f"of them come from it. Pass `--num_validation_samples` of at most {len(rows)}."
            )
        samples = []
        for row in rows:
            with contextlib.suppress(UnreadableSample):  # the caller compares the length with `held_out`
                samples.append(decode_sample(*row))
        return samples

    def captions(self) -> Iterator[dict[str, str]]:
        """Yield the captions by column of training samples, in the shares of the sources, without decoding images.

        Unreadable captions are omitted. The iterator ends with the first source that ends.
        """
        rows = [self._training_rows(number) for number in range(len(self.sources))]
        mix = Mix(self.weights, self.seed)
        for index in itertools.count():
            row = next(rows[mix.locate(index)[0]], None)
            if row is None:
                return
            with contextlib.suppress(UnreadableSample):
                yield read_captions(row[1])

    def _training_rows(self, number: int) -> Iterator[StoredSample]:
        source = self.sources[number]
        for shard in range(len(source)):
            yield from source.rows(shard, self._first_row(number, shard))

    def _first_row(self, number: int, shard: int) -> int:
        return self.held_out if (number, shard) == (0, 0) else 0

    def read(
        self, worker: int, progress: LaneProgress
    ) -> Iterator[tuple[dict[str, Any] | UnreadableSample, LaneProgress]]:
        """Yield the samples of a worker of this process without end.

        Args:
            worker: index of the worker.
            progress: progress of its lane.

        Yields:
            A sample, or the reason why it is unreadable, and the progress after it.
        """
        mix = Mix(self.weights, self.seed, self.rank * self.workers + worker)
        drawn, positions = progress["drawn"], [list(position) for position in progress["sources"]]
        streams = [self._rows(number, worker, *positions[number]) for number in range(len(self.sources))]
        while True:
            number, _ = mix.locate(drawn)
            row, positions[number], name = next(streams[number])
            drawn += 1
            sample: dict[str, Any] | UnreadableSample
            try:
                sample = decode_sample(*row)
            except UnreadableSample as error:
                sample = UnreadableSample(f"sample {positions[number][2] - 1} ({name}): {error}")
            yield sample, {"drawn": drawn, "sources": [list(position) for position in positions]}

    def _rows(
        self, number: int, worker: int, epoch: int, first_shard: int, first_row: int
    ) -> Iterator[tuple[StoredSample, list[int], str]]:
        """Yield the rows of a source for a worker, each with the position after it and the name of its shard."""
        source, lane = self.sources[number], self.rank * self.workers + worker
        while True:
            order = permutation(len(source), self.seed, number, epoch)[lane :: self.lanes]
            found = False
            for index in range(first_shard, len(order)):
                shard = int(order[index])
                start = max(first_row, self._first_row(number, shard))
                for row, stored in enumerate(source.rows(shard, start), start):
                    found = True
                    yield stored, [epoch, index, row + 1], source.name(shard)
                first_row = 0
            if not found and first_shard == 0:
                raise ValueError(f"All {len(order)} shards ({source.name(0)}, ...) have no sample to train on.")
            epoch, first_shard = epoch + 1, 0

    def record(self, progress: Sequence[Sequence[LaneProgress]]) -> dict[str, Any]:
        """Return the state to save in a checkpoint: the progress of all lanes, by rank and worker, and the layout."""
        return {**self._layout(), "places": [list(lanes) for lanes in progress]}

    def _layout(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "world_size": self.world_size,
            "workers": self.workers,
            "shards": [len(source) for source in self.sources],
            "weights": self.weights,
            "held_out": self.held_out,
        }

    def restore(self, record: dict[str, Any]) -> list[LaneProgress]:
        """Return the progress of this process's workers from a checkpoint.

        Raises:
            ValueError: if the stream or the number of processes or workers differs. These divide the shards among the
                lanes, so that samples would be lost and repeated.
        """
        for name, value in self._layout().items():
            if record[name] != value:
                raise ValueError(
                    f"`{name}` of the stream is {value}, but {record[name]} in the checkpoint. A stream resumes "
                    "only with the same settings. Restore them, or use data that are not streamed."
                )
        return record["places"][self.rank]


class StreamedBatches(IterableDataset):
    """Micro-batches of a process, read from a stream by its workers in turn.

    A batch also has "worker", the worker that read it, and "progress", the progress of that worker's lane after it.
    Pass the last progress of every worker to `StreamedImages.record`. The number of a sample in the run, which
    determines its noise, is that of `samplers.StreamSampler`.

    Args:
        stream: stream to read.
        make_sample: function from a sample of the stream and its position to a training sample; samples for which it
            raises `UnreadableSample` or `UnfitSample` are replaced.
        collate: function from samples to a batch. Each sample has "unreadable", the reasons of the unreadable samples
            that it replaces, and "unfit", the number of those that did not fit.
        batch_size: samples per micro-batch.
        start_step, stop_step: half-open range of optimizer steps.
        accumulation: micro-batches per step.
        progress: progress of each worker, from `StreamedImages.restore`. Default: the beginning.
        first_step: optimizer step with which the stream begins.
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
        progress: Sequence[LaneProgress] | None = None,
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
        initial = [stream.initial_progress() for _ in range(stream.workers)]
        self.progress = initial if progress is None else list(progress)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        # A loader always begins with its worker 0, which therefore continues the lane that is next.
        begin = self.first + (0 if info is None else info.id)
        worker = begin % self.stream.workers
        samples = self.stream.read(worker, self.progress[worker])
        for micro_batch in range(begin, self.stop, self.stream.workers):
            items = []
            first = (micro_batch * self.stream.world_size + self.stream.rank) * self.batch_size
            for index in range(first, first + self.batch_size):
                step = self.first_step + micro_batch // self.accumulation
                item, progress = self._next(samples, Position(step, index, index))
                items.append(item)
            yield {**self.collate(items), "worker": worker, "progress": progress}

    def _next(
        self, samples: Iterator[tuple[dict[str, Any] | UnreadableSample, LaneProgress]], position: Position
    ) -> tuple[dict[str, Any], LaneProgress]:
        def attempt() -> dict[str, Any]:
            sample, progress = next(samples)
            if isinstance(sample, UnreadableSample):
                raise sample
            return {**self.make_sample(sample, position), "progress": progress}

        item = first_usable(itertools.repeat(attempt))
        return item, item.pop("progress")


def build_stream_loader(batches: StreamedBatches, num_workers: int) -> DataLoader:
    """Build a loader over the micro-batches of a stream; `num_workers` is that of its `StreamedImages`."""
    return DataLoader(batches, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available())
