"""The stages of a run: what each of them trains on, and from which step to which."""

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

from ..config.training_config import DataSource, TrainingConfig, sources_of
from ..data.buckets import Buckets, compute_buckets, image_sizes, sort_into_buckets, study_buckets
from ..data.captioned import JoinedSource
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
from .image_checks import IMAGES_CHECKED, Spread, check_images
from .rng import derive_seed

CAPTIONS_FOR_TOKENIZER = 5000


@dataclass
class Stage:
    """One stage of a run.

    Args:
        cfg: the settings of the run with those that the stage changes.
        first_step, stop_step: half-open range of the run's optimizer steps.
        source: the training images, `ListedImages`; None: streamed.
        held_out: the images of the validation loss; None: no such loss.
        sizes: how many training images each source has; none: streamed.
        stream: the training images, where they are streamed.
        places: how far each of this process's workers has read the stream.
        buckets, held_out_buckets: which of them are trained at which size, once `sort` has been called.
        image_sizes: (width, height) of each of them, by the name of the file that keeps them in a checkpoint; only
            where there are buckets by aspect ratio.
        precomputed: what the training images are read from, with `precomputed_dir`; see `precompute.open_precomputed`.
        left_out: messages about images and captions that will not be used, once `sort` has been called.
    """

    cfg: TrainingConfig
    first_step: int
    stop_step: int
    source: Any
    held_out: CaptionedImages | None
    sizes: Sequence[int] = ()
    stream: StreamedImages | None = None
    places: list[LaneProgress] = field(default_factory=list)
    buckets: Buckets | None = None
    held_out_buckets: Buckets | None = None
    image_sizes: dict[str, np.ndarray] = field(default_factory=dict)
    precomputed: PrecomputedImages | None = None
    left_out: list[str] = field(default_factory=list)

    def sort(self, multiple: int, processes: int, checkpoint: Path | None = None) -> None:
        """Sort the images into buckets by their aspect ratios, or all into one square.

        Args:
            multiple: of heights and widths in pixels, that the networks take.
            processes: of the run; a bucket with fewer images than one optimizer step takes is closed.
            checkpoint: checkpoint to resume from; the sizes that it keeps are not read from the images again.

        Raises:
            ValueError: if there are no such buckets, or no image fits one.
        """
        cfg = self.cfg
        limits: dict[str, float] = {
            "max_upscale": math.inf if cfg.max_upscale is None else cfg.max_upscale,
            "max_crop": cfg.max_crop,
        }
        if cfg.aspect_ratio_buckets == "none":
            count = 0 if self.source is None else len(self.source)
            self.buckets = Buckets.square(cfg.resolution, count, **limits)
            if cfg.precomputed_dir is None:  # the cache knows what it has left out
                self.check_squares(multiple)
            if self.held_out is not None:
                self.held_out_buckets = Buckets.square(cfg.resolution, len(self.held_out), **limits)
                stored = isinstance(self.held_out, JoinedSource) and not all(
                    isinstance(part, SceneImages) for part in self.held_out.sources
                )
                if stored:
                    found = self._image_sizes(self.held_out, "held_out")
                    self._check_held_out_sizes(found, self.held_out_buckets.sizes, multiple)
        else:
            if cfg.aspect_ratio_buckets == "study":
                sizes = study_buckets(cfg.resolution, multiple)
            else:
                sizes = compute_buckets(cfg.resolution, multiple, cfg.max_aspect_ratio)
            found = self._kept_sizes(self.source, "train", checkpoint)
            self.left_out += check_images(cfg, self.source, found, sizes, multiple)
            self.buckets = sort_into_buckets(found, sizes, self.step_size(processes), **limits)
            if self.held_out is not None:
                found = self._kept_sizes(self.held_out, "held_out", checkpoint)
                self._check_held_out_sizes(found, self.buckets.sizes, multiple)
                self.held_out_buckets = sort_into_buckets(found, self.buckets.sizes, 1, **limits)
        for size in self.buckets.sizes:
            cfg.check_perceptual_size(min(size))
        if self.held_out_buckets is not None:
            self._check_held_out(self.held_out_buckets)

    def _check_held_out_sizes(self, image_sizes: np.ndarray, sizes: Sequence[Any], multiple: int) -> None:
        try:
            found = check_images(self.cfg, self.held_out, image_sizes, sizes, multiple)
        except ValueError as error:
            raise ValueError(f"Held-out images (`num_validation_samples`): {error}") from error
        self.left_out += [f"held out: {message}" for message in found]

    def _check_held_out(self, buckets: Buckets) -> None:
        """Refuse held-out images none of which can be used: validation would find out only after hours of training.

        Raises:
            ValueError: with the reasons.
        """
        samples = self._samples(self.held_out, buckets, True, False)
        for bucket, members in enumerate(buckets.members):
            if len(members):
                try:
                    samples[Position(-1, int(members[0]), int(members[0]), bucket)]
                except ValueError as error:
                    raise ValueError(f"Held-out images (`num_validation_samples`): {error}") from error

    def check_squares(self, multiple: int) -> None:
        """Count in `left_out` the images that do not fit the square of the run, and captions that cannot be read.
        Streams and scenes are not looked at.

        Raises:
            ValueError: if no image of a source can be used.
        """
        parts = self.source.sources if isinstance(self.source, MixedSource) else [self.source]
        for number, part in enumerate(parts):
            if self.stream is not None or isinstance(part, SceneImages):
                continue
            some, side = Spread(part, IMAGES_CHECKED), self.cfg.resolution
            sizes = self._image_sizes(some, "train" if len(parts) == 1 else f"train-{number}")
            found = check_images(self.cfg, some, sizes, [(side, side)], multiple)
            if found and len(some) < len(part):
                found.append(f"These were counted among {len(some)} of {len(part)} images, spread over all.")
            self.left_out += found

    def _image_sizes(self, source: Any, name: str) -> np.ndarray:
        cache = self._sizes_file(name)
        cache.parent.mkdir(parents=True, exist_ok=True)
        return image_sizes(source, self.cfg.dataloader_num_workers, cache)

    def _kept_sizes(self, source: Any, name: str, checkpoint: Path | None) -> np.ndarray:
        """The sizes of images, from the checkpoint where it has them; it will keep them."""
        kept, found = f"image_sizes-{name}-{self.first_step}.npy", None
        if checkpoint is not None and (checkpoint / kept).is_file():
            found = np.load(checkpoint / kept)
        if found is None or len(found) != len(source):  # of other data, which `RunState` refuses, or held out anew
            found = self._image_sizes(source, name)
        self.image_sizes[kept] = found
        return found

    def derived(self) -> dict[str, bytes]:
        """The files of a checkpoint that keep what was found in the data, by name."""
        files = {}
        for name, sizes in self.image_sizes.items():
            np.save(content := io.BytesIO(), sizes)
            files[name] = content.getvalue()
        return files

    def _sizes_file(self, name: str) -> Path:
        return Path(self.cfg.output_dir) / "image_sizes" / f"{name}-{self.first_step}.npz"

    def forget_sizes(self) -> None:
        """Remove the kept sizes of the training images, so that `sort` reads them again."""
        self._sizes_file("train").unlink(missing_ok=True)

    def step_size(self, processes: int) -> int:
        """Samples of an optimizer step, of all processes and micro-batches."""
        return self.cfg.train_batch_size * self.cfg.gradient_accumulation_steps * processes

    def record(self, processes: int) -> dict[str, Any]:
        """What a checkpoint remembers of the stage: which samples are read follows from it, and in a stream from how
        far that was read."""
        assert self.buckets is not None
        record: dict[str, Any] = {
            "first_step": self.first_step,
            "stop_step": self.stop_step,
            "global_batch_size": self.step_size(processes),
            "weights": [source.weight for source in sources_of(self.cfg)],
        }
        if self.stream is not None:
            return record | {"shards": [len(shards) for shards in self.stream.sources]}
        counts = [len(members) for members in self.buckets.members]
        return record | {"dataset_sizes": list(self.sizes), "bucket_counts": counts}

    @property
    def drawn(self) -> bool:
        """Whether the samples come in a random order already: scenes, and sources mixed in given shares."""
        return isinstance(self.source, (SceneImages, MixedSource))

    def captions(self, count: int) -> Iterator[str]:
        """The captions of `count` training samples, or of all where there are fewer; each drawn as in training."""
        weights = self.cfg.caption_weights
        for place, texts in enumerate(self._captions(count)):
            if not weights:
                yield next(iter(texts.values()))
                continue
            rng = random.Random(derive_seed(self.cfg.seed, -1, place, "caption_choice"))
            with contextlib.suppress(UnreadableSample):  # counted when training reads it
                yield choose_caption(texts, weights, rng.random())

    def _captions(self, count: int) -> Iterator[dict[str, str]]:
        if self.stream is not None:
            yield from itertools.islice(self.stream.captions(), count)
            return
        count = min(count, len(self.source))
        for place in range(count):
            # stored data may be sorted by something: from everywhere
            index = place if self.drawn else place * len(self.source) // count
            with contextlib.suppress(UnreadableSample):
                yield self.source.captions(index)

    def training_batches(
        self, start_step: int, rank: int, processes: int, device: torch.device
    ) -> Iterator[dict[str, Any]]:
        """One process's micro-batches from a step of the run to the end of the stage, on its device."""
        cfg = self.cfg
        assert self.buckets is not None
        if self.stream is not None:
            return self._read_stream(self.stream, self.buckets, start_step, device)
        sampler = self._sampler(self.buckets, start_step, rank, processes)
        if cfg.precomputed_dir is None:
            return self._read(self.source, self.buckets, sampler, cfg.center_crop, cfg.random_flip, device)
        assert self.precomputed is not None, "open_precomputed comes first"
        seeds, weights = partial(derive_seed, cfg.seed), cfg.caption_weights or None
        samples = PrecomputedSamples(self.precomputed, self.source, self.buckets, seeds, weights)
        return _moved(build_loader(samples, sampler, cfg.dataloader_num_workers, collate_precomputed), device)

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
            return StreamSampler(len(self.source), shuffle=not self.drawn, **stream)
        return BucketStreamSampler(buckets, **stream)

    def dataset_indices(self, sample_indices: Sequence[int], processes: int) -> dict[int, int]:
        """Which samples of the data set stand at places of the run's stream; none where the data are streamed."""
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
            self.places,
            self.first_step,
        )
        for batch in _moved(build_stream_loader(batches, cfg.dataloader_num_workers), device):
            self.places[batch["worker"]] = batch["progress"]  # the workers themselves are ahead
            yield batch

    def held_out_batches(self, device: torch.device, rank: int = 0, processes: int = 1) -> Iterator[dict[str, Any]]:
        """Every held-out sample once over all processes, always in the same batches and cropped in the same way; each
        process has as many batches as the others, and so the last batch may come on several."""
        assert self.held_out is not None
        assert self.held_out_buckets is not None
        every = every_sample_once(self.held_out_buckets, self.cfg.train_batch_size)
        batches = [batch for _, batch in split_evenly(every, rank, processes)]
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
        return _moved(build_loader(samples, batches, self.cfg.dataloader_num_workers), device)

    def _samples(self, source: Any, buckets: Buckets, center_crop: bool, random_flip: bool) -> TrainingSamples:
        seeds, weights = partial(derive_seed, self.cfg.seed), self.cfg.caption_weights or None
        return TrainingSamples(source, buckets, center_crop, random_flip, seeds, weights)


def _moved(loader: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """The batches of a loader on a device; says which samples were skipped."""
    for batch in loader:
        for message in batch["unreadable"]:
            tqdm.write(f"skipped: {message}")
        yield {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }


def build_stages(cfg: TrainingConfig, rank: int = 0, processes: int = 1) -> list[Stage]:
    """Open the data of every stage, before anything is trained.

    Args:
        cfg: of the run.
        rank, processes: this process among all; what a stream gives depends on them.

    Raises:
        ValueError: if data are missing, or too few to hold some out.
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
    """Leave out warnings about data: one process prints them, the first time that the run opens its data."""
    logger = logging.getLogger(f"{__name__.partition('.')[0]}.data")
    level = logger.level
    if quiet:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _listed_stage(cfg: TrainingConfig, steps: tuple[int, int], opened: dict[Any, ListedImages]) -> Stage:
    """Open a stage whose data are read by index. Of every source about as many samples are held out.

    Args:
        cfg: configuration of the stage.
        steps: half-open range of the run's steps.
        opened: stored data of the stages before; a folder that several share is listed once.
    """
    sources, training, held_out = sources_of(cfg), [], []
    for place, source in enumerate(sources):
        share = cfg.num_validation_samples // len(sources) + (place < cfg.num_validation_samples % len(sources))
        own, kept = _open_source(cfg, source, share, opened)
        training.append(own)
        held_out += [] if kept is None else [kept]
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
    """A source's training images and its held-out ones.

    The scenes have a held-out split of their own; of other data the last samples are kept out of training.

    Where less than half of a source would be left to train on, a tenth of it is held out instead.

    Raises:
        ValueError: if there is no such folder.
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
    images = opened[key] if key in opened else opened.setdefault(key, load())
    if 2 * held_out > len(images):
        held_out = len(images) // 10  # the report of the run says so
    first = len(images) - held_out
    return Slice(images, 0, first), Slice(images, first, len(images)) if held_out else None


def _streamed_stage(cfg: TrainingConfig, steps: tuple[int, int], rank: int, processes: int) -> Stage:
    sources = sources_of(cfg)
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
            f"{cfg.num_validation_samples - len(held_out)} of the {cfg.num_validation_samples} samples "
            f"(`num_validation_samples`) at the beginning of {stream.sources[0].name(0)} cannot be read."
        )
    places = [stream.initial_progress() for _ in range(stream.workers)]
    return Stage(cfg, *steps, None, held_out or None, stream=stream, places=places)


def _columns(cfg: TrainingConfig, source: DataSource) -> dict[str, Any]:
    """What of a source is read."""
    return {
        "config_name": source.config_name,
        "split": source.split,
        "image_column": source.image_column,
        "caption_columns": tuple(cfg.caption_weights) or (source.caption_column,),
    }
