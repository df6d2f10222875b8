"""Stages of a run: the data and the range of steps of each."""

import contextlib
import io
import itertools
import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..config.data_sources import DataSource, data_sources_of
from ..config.training_config import TrainingConfig
from ..data.buckets import Buckets, Size, compute_buckets, image_sizes, sort_into_buckets, study_buckets
from ..data.captioned import DecodedImages, JoinedSource, PreferencePairs
from ..data.captions import choose_caption
from ..data.iterable import LaneProgress, StreamedBatches, StreamedImages, build_stream_loader
from ..data.mixing import MixedSource, combine
from ..data.precomputed import PrecomputedImages, PrecomputedSamples, collate_precomputed
from ..data.samplers import BucketStreamSampler, Position, StreamSampler, every_sample_once
from ..data.samples import TrainingSamples, build_loader, collate
from ..data.sources import (
    CaptionedImages,
    ListedImages,
    SceneImages,
    Slice,
    UnreadableSample,
    load_source,
    load_stream,
)
from .distributed import split_evenly
from .image_checks import MAX_IMAGES_CHECKED, EvenSubset, check_images
from .rng import derive_seed

CAPTIONS_FOR_TOKENIZER = 5000


@dataclass
class Stage:
    """One stage of a run.

    Args:
        cfg: configuration of the stage.
        first_step: first optimizer step of the stage within the run.
        stop_step: step after the last one.
        source: indexed training images; None if they are streamed.
        held_out: images for the validation loss, or None.
        sizes: number of training images of each source; empty if they are streamed.
        stream: streamed training images, or None.
        stream_positions: reading positions of this process's workers in the stream.
        buckets: training images by size; set by `assign_buckets`.
        held_out_buckets: held-out images by size; set by `assign_buckets`.
        image_sizes: arrays (N, 2) of widths and heights in pixels, by the name of their file in a checkpoint; empty
            without aspect-ratio buckets.
        precomputed: precomputed data to read instead of images, see `precompute.open_precomputed`; or None.
        left_out: messages about unusable images and captions; set by `assign_buckets`.
    """

    cfg: TrainingConfig
    first_step: int
    stop_step: int
    source: Any
    held_out: CaptionedImages | None
    sizes: Sequence[int] = ()
    stream: StreamedImages | None = None
    stream_positions: list[LaneProgress] = field(default_factory=list)
    buckets: Buckets | None = None
    held_out_buckets: Buckets | None = None
    image_sizes: dict[str, np.ndarray] = field(default_factory=dict)
    precomputed: PrecomputedImages | None = None
    left_out: list[str] = field(default_factory=list)

    def assign_buckets(self, multiple: int, processes: int, checkpoint: Path | None = None) -> None:
        """Assign the images to buckets by aspect ratio, or all of them to one square.

        Args:
            multiple: number of pixels that heights and widths must be multiples of.
            processes: number of processes. A bucket with fewer images than one optimizer step needs is not used.
            checkpoint: checkpoint to resume from. Image sizes in it are not read from the images again.

        Raises:
            ValueError: the resolution has no buckets, or no image fits one.
        """
        cfg = self.cfg
        limits: dict[str, float] = {
            "max_upscale": math.inf if cfg.max_upscale is None else cfg.max_upscale,
            "max_crop": cfg.max_crop,
        }
        if cfg.aspect_ratio_buckets == "none":
            count = 0 if self.source is None else len(self.source)
            self.buckets = Buckets.square(cfg.resolution, count, **limits)
            if cfg.precomputed_dir is None:  # precomputing has checked the images
                self.check_squares(multiple)
            if self.held_out is not None:
                self.held_out_buckets = Buckets.square(cfg.resolution, len(self.held_out), **limits)
                held_out = self.held_out
                if isinstance(held_out, JoinedSource) and not all(
                    isinstance(part, SceneImages) for part in held_out.sources
                ):
                    found = self._read_image_sizes(held_out, "held_out")
                    self._check_held_out_sizes(held_out, found, self.held_out_buckets.sizes, multiple)
        else:
            if cfg.aspect_ratio_buckets == "study":
                sizes = study_buckets(cfg.resolution, multiple)
            else:
                sizes = compute_buckets(cfg.resolution, multiple, cfg.max_aspect_ratio)
            found = self._restore_image_sizes(self.source, "train", checkpoint)
            self.left_out += check_images(cfg, self.source, found, sizes, multiple)
            self.buckets = sort_into_buckets(found, sizes, self.step_size(processes), **limits)
            if isinstance(self.held_out, JoinedSource):  # always, if there is one: streams have no buckets
                found = self._restore_image_sizes(self.held_out, "held_out", checkpoint)
                self._check_held_out_sizes(self.held_out, found, self.buckets.sizes, multiple)
                self.held_out_buckets = sort_into_buckets(found, self.buckets.sizes, 1, **limits)
        for size in self.buckets.sizes:
            cfg.check_perceptual_size(min(size))
        if self.held_out_buckets is not None:
            self._check_held_out_samples(self.held_out_buckets)

    def _check_held_out_sizes(
        self, held_out: ListedImages, image_sizes: np.ndarray, sizes: Sequence[Size], multiple: int
    ) -> None:
        try:
            found = check_images(self.cfg, held_out, image_sizes, sizes, multiple)
        except ValueError as error:
            raise ValueError(f"Held-out images (`num_validation_samples`): {error}") from error
        self.left_out += [f"held out: {message}" for message in found]

    def _check_held_out_samples(self, buckets: Buckets) -> None:
        """Read one held-out image per bucket, so that validation does not fail after hours of training.

        Raises:
            ValueError: no image of a bucket can be read.
        """
        samples = self._samples(self.held_out, buckets, True, False)
        for bucket, members in enumerate(buckets.members):
            if len(members):
                try:
                    samples[Position(-1, int(members[0]), int(members[0]), bucket)]
                except ValueError as error:
                    raise ValueError(f"Held-out images (`num_validation_samples`): {error}") from error

    def check_squares(self, multiple: int) -> None:
        """Add messages to `left_out` about stored images that do not fit the square, and about unreadable captions.

        Raises:
            ValueError: no image of a source can be used.
        """
        parts = self.source.sources if isinstance(self.source, MixedSource) else [self.source]
        for number, part in enumerate(parts):
            if self.stream is not None or isinstance(part, SceneImages):
                continue
            subset, side = EvenSubset(part, MAX_IMAGES_CHECKED), self.cfg.resolution
            sizes = self._read_image_sizes(subset, "train" if len(parts) == 1 else f"train-{number}")
            messages = check_images(self.cfg, subset, sizes, [(side, side)], multiple)
            if messages and len(subset) < len(part):
                messages.append(f"Checked: {len(subset)} of {len(part)} images, evenly spaced.")
            self.left_out += messages

    def _read_image_sizes(self, source: ListedImages, name: str) -> np.ndarray:
        cache = self._sizes_file(name)
        cache.parent.mkdir(parents=True, exist_ok=True)
        return image_sizes(source, self.cfg.dataloader_num_workers, cache)

    def _restore_image_sizes(self, source: ListedImages, name: str, checkpoint: Path | None) -> np.ndarray:
        """Return image sizes from the checkpoint, or read them; the next checkpoints contain them."""
        file, sizes = f"image_sizes-{name}-{self.first_step}.npy", None
        if checkpoint is not None and (checkpoint / file).is_file():
            sizes = np.load(checkpoint / file)
        # another count: different training data, which `RunState` rejects, or different held-out data
        if sizes is None or len(sizes) != len(source):
            sizes = self._read_image_sizes(source, name)
        self.image_sizes[file] = sizes
        return sizes

    def checkpoint_files(self) -> dict[str, bytes]:
        """Return the contents of the files that every checkpoint keeps of this stage, by name."""
        files = {}
        for name, sizes in self.image_sizes.items():
            np.save(content := io.BytesIO(), sizes)
            files[name] = content.getvalue()
        return files

    def _sizes_file(self, name: str) -> Path:
        return Path(self.cfg.output_dir) / "image_sizes" / f"{name}-{self.first_step}.npz"

    def clear_size_cache(self) -> None:
        """Remove the cached sizes of the training images, so that `assign_buckets` reads them again."""
        self._sizes_file("train").unlink(missing_ok=True)

    def step_size(self, processes: int) -> int:
        """Return the number of samples per optimizer step, over all processes and micro-batches."""
        return self.cfg.train_batch_size * self.cfg.gradient_accumulation_steps * processes

    def record(self, processes: int) -> dict[str, Any]:
        """Return the facts that determine the order of samples; a resumed run must keep them."""
        assert self.buckets is not None
        record: dict[str, Any] = {
            "first_step": self.first_step,
            "stop_step": self.stop_step,
            "global_batch_size": self.step_size(processes),
            "weights": [source.weight for source in data_sources_of(self.cfg)],
        }
        if self.stream is not None:
            return record | {"shards": [len(shards) for shards in self.stream.sources]}
        counts = [len(members) for members in self.buckets.members]
        return record | {"dataset_sizes": list(self.sizes), "bucket_counts": counts}

    @property
    def has_random_order(self) -> bool:
        """True if the source itself is in random order: scenes, and sources mixed by weight."""
        return isinstance(self.source, (SceneImages, MixedSource))

    def captions(self, count: int) -> Iterator[str]:
        """Yield the captions of up to `count` training samples, chosen like in training."""
        weights = self.cfg.caption_weights
        for position, texts in enumerate(self._caption_columns(count)):
            if not weights:
                yield next(iter(texts.values()))
                continue
            rng = random.Random(derive_seed(self.cfg.seed, -1, position, "caption_choice"))
            with contextlib.suppress(UnreadableSample):  # training counts it
                yield choose_caption(texts, weights, rng.random())

    def _caption_columns(self, count: int) -> Iterator[dict[str, str]]:
        if self.stream is not None:
            yield from itertools.islice(self.stream.captions(), count)
            return
        count = min(count, len(self.source))
        for position in range(count):
            # stored data may be sorted: take evenly spaced samples
            index = position if self.has_random_order else position * len(self.source) // count
            with contextlib.suppress(UnreadableSample):
                yield self.source.captions(index)

    def training_batches(
        self, start_step: int, rank: int, processes: int, device: torch.device
    ) -> Iterator[dict[str, Any]]:
        """Yield the micro-batches of one process, from a step of the run to the end of the stage."""
        cfg = self.cfg
        assert self.buckets is not None
        if self.stream is not None:
            return self._read_stream(self.stream, self.buckets, start_step, device)
        sampler = self._sampler(self.buckets, start_step, rank, processes)
        if cfg.precomputed_dir is None:
            return self._read(self.source, self.buckets, sampler, cfg.center_crop, cfg.random_flip, device)
        assert self.precomputed is not None, "open_precomputed was not called"
        seeds, weights = partial(derive_seed, cfg.seed), cfg.caption_weights or None
        samples = PrecomputedSamples(self.precomputed, self.source, self.buckets, seeds, weights)
        return _move_to_device(build_loader(samples, sampler, cfg.dataloader_num_workers, collate_precomputed), device)

    def _sampler(self, buckets: Buckets, start_step: int, rank: int, processes: int) -> StreamSampler:
        cfg = self.cfg
        stream: dict[str, Any] = {
            "batch_size": cfg.train_batch_size,
            "start_step": start_step,
            "stop_step": self.stop_step,
            "accumulation": cfg.gradient_accumulation_steps,
            "rank": rank,
            "world_size": processes,
            "seed": cfg.seed,
            "first_step": self.first_step,
        }
        if cfg.aspect_ratio_buckets == "none":
            return StreamSampler(len(self.source), shuffle=not self.has_random_order, **stream)
        return BucketStreamSampler(buckets, **stream)

    def dataset_indices(self, sample_indices: Sequence[int], processes: int) -> dict[int, int]:
        """Return the indices in the data set by indices in the run's sequence of samples; empty if streamed."""
        if self.stream is not None:
            return {}
        assert self.buckets is not None
        sampler = self._sampler(self.buckets, self.first_step, 0, processes)
        return {index: sampler.position(self.first_step, index).dataset_index for index in sample_indices}

    def _read_stream(
        self, stream: StreamedImages, buckets: Buckets, start_step: int, device: torch.device
    ) -> Iterator[dict[str, Any]]:
        cfg = self.cfg
        samples = self._samples([], buckets, cfg.center_crop, cfg.random_flip)
        batches = StreamedBatches(
            stream,
            samples.make,
            collate,
            cfg.train_batch_size,
            start_step,
            self.stop_step,
            cfg.gradient_accumulation_steps,
            self.stream_positions,
            self.first_step,
        )
        for batch in _move_to_device(build_stream_loader(batches, cfg.dataloader_num_workers), device):
            self.stream_positions[batch["worker"]] = batch["progress"]  # workers read ahead of the training
            yield batch

    def held_out_batches(self, device: torch.device, rank: int = 0, processes: int = 1) -> Iterator[dict[str, Any]]:
        """Yield the held-out samples of one process, always in the same batches and with the same crops.

        All processes get the same number of batches, so several processes may get the last batch.
        """
        assert self.held_out is not None
        assert self.held_out_buckets is not None
        all_batches = every_sample_once(self.held_out_buckets, self.cfg.train_batch_size)
        batches = [batch for _, batch in split_evenly(all_batches, rank, processes)]
        return self._read(self.held_out, self.held_out_buckets, batches, True, False, device)

    def _read(
        self,
        source: CaptionedImages,
        buckets: Buckets,
        batches: Iterable[list[Position]],
        center_crop: bool,
        random_flip: bool,
        device: torch.device,
    ) -> Iterator[dict[str, Any]]:
        samples = self._samples(source, buckets, center_crop, random_flip)
        return _move_to_device(build_loader(samples, batches, self.cfg.dataloader_num_workers), device)

    def _samples(self, source: Any, buckets: Buckets, center_crop: bool, random_flip: bool) -> TrainingSamples:
        seeds, weights = partial(derive_seed, self.cfg.seed), self.cfg.caption_weights or None
        return TrainingSamples(source, buckets, center_crop, random_flip, seeds, weights)


def _move_to_device(loader: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the batches of a loader on a device, and print messages about skipped samples."""
    for batch in loader:
        for message in batch["unreadable"]:
            tqdm.write(f"skipped: {message}")
        yield {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }


def build_stages(cfg: TrainingConfig, rank: int = 0, processes: int = 1) -> list[Stage]:
    """Open the data of all stages.

    Args:
        cfg: configuration of the run.
        rank: rank of this process; streams depend on it.
        processes: number of processes.

    Raises:
        ValueError: data is missing, or there is too little to hold some out.

    Example:
        >>> (stage,) = build_stages(cfg)
        >>> stage.assign_buckets(multiple=16, processes=1)
    """
    stages: list[Stage] = []
    opened: dict[Any, ListedImages] = {}
    for stage_cfg in cfg.stage_configs():
        first_step = stages[-1].stop_step if stages else 0
        steps = (first_step, first_step + stage_cfg.max_train_steps)
        if stage_cfg.streaming:
            stages.append(_streamed_stage(stage_cfg, steps, rank, processes))
        else:
            stages.append(_listed_stage(stage_cfg, steps, opened))
    return stages


@contextlib.contextmanager
def quiet_data(quiet: bool = True) -> Iterator[None]:
    """Suppress warnings about data, which one process prints once."""
    logger = logging.getLogger(f"{__name__.partition('.')[0]}.data")
    level = logger.level
    if quiet:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _listed_stage(cfg: TrainingConfig, steps: tuple[int, int], opened: dict[Any, ListedImages]) -> Stage:
    """Open a stage with indexed data; each source provides about the same number of held-out samples.

    Args:
        cfg: configuration of the stage.
        steps: half-open range of optimizer steps.
        opened: cache of opened data, shared by the stages.
    """
    sources, training, held_out = data_sources_of(cfg), [], []
    for number, source in enumerate(sources):
        count = cfg.num_validation_samples // len(sources) + (number < cfg.num_validation_samples % len(sources))
        train_part, held_out_part = _open_source(cfg, source, count, opened)
        training.append(train_part)
        held_out += [] if held_out_part is None else [held_out_part]
    return Stage(
        cfg,
        *steps,
        combine(training, [source.weight for source in sources], cfg.seed),
        JoinedSource(held_out) if held_out else None,
        [len(source) for source in training],
    )


def _open_source(
    cfg: TrainingConfig, source: DataSource, held_out: int, opened: dict[Any, ListedImages]
) -> tuple[ListedImages, ListedImages | None]:
    """Return the training images and the held-out images of a source.

    Scenes have a held-out split. For other data, the last samples are held out; if they were more than half of the
    source, a tenth of it is held out instead.

    Raises:
        ValueError: the folder does not exist.
    """
    if cfg.train_data_dir is not None and not Path(cfg.train_data_dir).is_dir():
        raise ValueError(f"`train_data_dir` is {cfg.train_data_dir!r}, which is not a folder.")
    columns = _columns(cfg, source) | {"instance_prompt": source.instance_prompt}
    load = partial(load_source, source.name, **columns, cache_dir=cfg.data_cache_dir)
    if source.is_drawn:
        scenes: dict[str, Any] = {"resolution": cfg.resolution, "seed": cfg.seed}
        scenes |= {"level": cfg.scenes_level} if source.name == "scenes" else {"emoji_dir": cfg.emoji_dir}
        size = {} if cfg.scenes_size is None else {"size": cfg.scenes_size}
        kept = load(scenes=scenes | {"split": "heldout", "size": held_out}) if held_out else None
        return load(scenes=scenes | size), kept
    key = (*load.args, *load.keywords.values())
    if cfg.rejected_image_column is not None:
        images: ListedImages = PreferencePairs(load(), load(image_column=cfg.rejected_image_column))
    else:
        images = opened[key] if key in opened else opened.setdefault(key, load())
    if 2 * held_out > len(images):
        held_out = len(images) // 10  # the plan of the run says so
    first = len(images) - held_out
    return Slice(images, 0, first), Slice(images, first, len(images)) if held_out else None


def _streamed_stage(cfg: TrainingConfig, steps: tuple[int, int], rank: int, processes: int) -> Stage:
    sources = data_sources_of(cfg)
    stream = StreamedImages(
        [load_stream(source.name, **_columns(cfg, source)) for source in sources],
        [1.0 if source.weight is None else source.weight for source in sources],
        cfg.seed,
        rank,
        processes,
        cfg.dataloader_num_workers,
        cfg.num_validation_samples,
    )
    held_out = stream.held_out_samples() if cfg.num_validation_samples else []
    if len(held_out) < cfg.num_validation_samples:
        raise ValueError(
            f"`num_validation_samples` is {cfg.num_validation_samples}, but "
            f"{cfg.num_validation_samples - len(held_out)} of the first samples of {stream.sources[0].name(0)} cannot "
            "be read: pass a smaller number, or repair the data."
        )
    stream_positions = [stream.initial_progress() for _ in range(stream.workers)]
    return Stage(cfg, *steps, None, DecodedImages(held_out) or None, stream=stream, stream_positions=stream_positions)


def _columns(cfg: TrainingConfig, source: DataSource) -> dict[str, Any]:
    """Return the arguments of `load_source` that select the columns."""
    return {
        "config_name": source.config_name,
        "split": source.split,
        "image_column": source.image_column,
        "caption_columns": tuple(cfg.caption_weights) or (source.caption_column,),
    }
