"""Evaluation of a pipeline with metrics and a reference, on any number of processes.

The report records every setting that affects a score.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from ..data.captioned import CaptionedImages
from ..data.emoji import EmojiDrawings
from ..data.scenes import LEVELS, ScenesDataset, one_of
from ..data.sources import load_source
from ..files import write_json
from ..fingerprints import pipeline_fingerprint
from ..techniques.teachers import VisionTeacher, load_teacher
from .clip_score import DEFAULT_CLIP, CLIPScore, load_clip_score
from .distances import share_interval
from .emoji_accuracy import DRAWING_CAPTIONS, EMOJI_PROMPTS, EmojiGroup, GradedEmoji, choose_groups, grade_group
from .emoji_reader import EmojiReader
from .extractors import INCEPTION, FeatureExtractor, load_extractor
from .generation import PictureFolder, Prompt, default_resolution, draw_missing, load_pipeline, pipeline_draw
from .metrics import PHOTOROOM, FeatureDistance, FrechetDistance, MaximumMeanDiscrepancy
from .references import FITTING, GeneratedImages, ReferenceCache, ReferenceImages, content_hash, image_batches
from .scene_accuracy import GradedScene, grade_scenes, scene_report

logger = logging.get_logger(__name__)

SCENES = "scenes"
LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "torchmetrics",
    "torch-fidelity",
    "numpy",
    "pillow",
    "diffusers-prx",
)
# Kind of metric -> standard encoder, or None.
METRIC_KINDS: dict[str, str | None] = {"fid": INCEPTION, "mmd": None, "clip_score": DEFAULT_CLIP}
# Names of the study -> (kind, encoder).
STUDY_METRICS = {"cmmd": ("mmd", "clip"), "dino_mmd": ("mmd", "dinov2")}
NUM_SHOWN = 8  # images on a sheet
DRAWN_FILE = "drawn.json"


def parse_metric(text: str) -> tuple[str, str]:
    """Return (kind, encoder) of a metric.

    Args:
        text: fid, cmmd, dino_mmd, clip_score, fid:ENCODER, mmd:ENCODER or clip_score:ENCODER.

    Raises:
        ValueError: for an unknown metric, or one without an encoder.
    """
    kind, colon, encoder = text.partition(":")
    if kind in STUDY_METRICS and not colon:
        return STUDY_METRICS[kind]
    if kind in STUDY_METRICS:
        raise ValueError(f"`metrics` has {text!r}, but {kind} has a fixed encoder. Pass `mmd:{encoder}`.")
    if kind not in METRIC_KINDS:
        raise ValueError(
            f"`metrics` has {text!r}; accepted: {', '.join([*METRIC_KINDS, *STUDY_METRICS])}, with :ENCODER."
        )
    chosen = encoder or METRIC_KINDS[kind]
    if chosen is None:
        raise ValueError(f"`metrics` has {text!r}, which needs an encoder. Pass `{kind}:FOLDER`, cmmd or dino_mmd.")
    return kind, chosen


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Args:
        model: saved pipeline, a folder or a Hub id.
        revision: revision of the model on the Hub.
        stock: load the pipeline with diffusers' own class.
        dtype: type of the weights: float32, bfloat16, float16; None: default of `from_pretrained`.
        scenes: grade prompt following on the built-in scenes.
        metrics: names of metrics, see `parse_metric`.
        reference: "scenes", or a data set for `data.sources.load_source`; its captions are the prompts.
        reference_config: configuration of the data set.
        reference_split: split of the data set.
        image_column: column of the images.
        caption_column: column of the captions.
        level: level of the scenes.
        caption: kind of the captions of scenes.
        emoji: folder of `training/tools/fetch_emoji.py`, to grade emoji drawings; None: none are graded.
        emoji_network: networks that read the drawings, see `techniques.teachers.load_teacher`; the report's picture
            shows what the first one read.
        emoji_prompts: any of "drawings" (one on white for each prompt) and "scenes" (composed of several).
        emoji_caption: caption of single drawings that is the prompt: "text" or "long".
        num_prompts: number of prompts to grade in each split of scenes and group of emoji.
        num_images: number of images to generate for the metrics.
        num_reference: number of reference images; None: as many as are generated.
        resolution: side length in pixels; None: default of the pipeline.
        num_inference_steps: denoising steps.
        guidance_scale: scale of classifier-free guidance; 1: none.
        seed: seed of the scenes, the noise (seed + index of the prompt) and the bootstrap.
        batch_size: prompts per call; it changes the last bits of the images.
        bootstrap: number of resamples for the intervals; 0: no intervals.
        compat: "photoroom" to evaluate like the study's public code: inverted colors for FID, equal noise in each
            batch.

    Raises:
        ValueError: if a value is out of range, or nothing is to be graded.

    Example:
        >>> from diffusers_prx.evaluation.evaluate import EvaluationSettings
        >>> EvaluationSettings("outputs/quickstart", scenes=True, num_prompts=128)
    """

    model: str
    revision: str | None = None
    stock: bool = False
    dtype: str | None = None
    scenes: bool = False
    metrics: Sequence[str] = ()
    reference: str = SCENES
    reference_config: str | None = None
    reference_split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    level: str = "easy"
    caption: str = "long"
    emoji: str | None = None
    emoji_network: Sequence[str] = ()
    emoji_prompts: Sequence[str] = ("drawings",)
    emoji_caption: str = "text"
    num_prompts: int = 256
    num_images: int = 10_000
    num_reference: int | None = None
    resolution: int | None = None
    num_inference_steps: int = 24
    guidance_scale: float = 3.0
    seed: int = 2026
    batch_size: int = 64
    bootstrap: int = 200
    compat: str | None = None

    def __post_init__(self) -> None:
        if not self.scenes and not self.metrics and self.emoji is None and not self.emoji_network:
            raise ValueError("`scenes`, `emoji` and `metrics` are empty. Pass at least one of them.")
        if (self.emoji is None) == bool(self.emoji_network):
            raise ValueError(
                f"`emoji` is {self.emoji!r} and `emoji_network` is {list(self.emoji_network)}. Pass both: a folder of "
                "`training/tools/fetch_emoji.py`, and networks that read the drawings."
            )
        for kind in self.emoji_prompts:
            one_of("emoji_prompts", kind, EMOJI_PROMPTS)
        one_of("emoji_caption", self.emoji_caption, DRAWING_CAPTIONS)
        minimums = {"num_prompts": 2, "num_images": 2, "num_reference": 2, "num_inference_steps": 1, "batch_size": 1}
        for name, bound in {**minimums, "guidance_scale": 1, "bootstrap": 0, "resolution": 1}.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"`{name}` must be at least {bound}, got {value}.")
        if self.compat not in (None, PHOTOROOM):
            raise ValueError(f"`compat` is {self.compat!r}; accepted: {PHOTOROOM!r}.")
        for metric in self.metrics:
            parse_metric(metric)


@dataclass
class Evaluation:
    """Result of an evaluation.

    Attributes:
        report: content of report.json.
        scenes: graded scenes, held-out and novel; empty without `scenes`.
        emoji: graded pictures of every group of emoji prompts; empty without `emoji`.
        pairs: (prompt, reference image or None if unreadable, generated image); images are uint8 (H, W, 3). Empty
            without metrics.
    """

    report: dict[str, Any]
    scenes: tuple[list[GradedScene], list[GradedScene]]
    emoji: dict[str, list[GradedEmoji]]
    pairs: list[tuple[str, np.ndarray | None, np.ndarray]]


def evaluate(
    settings: EvaluationSettings,
    output_dir: Path,
    cache_dir: Path,
    metric_batch_size: int = 32,
    num_workers: int = 0,
    commit: str | None = None,
) -> Evaluation | None:
    """Generate missing images and compute all metrics.

    If it is interrupted, call it again, also on another number of processes: existing images are reused.

    Args:
        settings: settings of the evaluation.
        output_dir: output folder; images go to `pictures/`, in a folder for everything that they depend on.
        cache_dir: folder for statistics of references.
        metric_batch_size: images per batch of an encoder.
        num_workers: processes that read images.
        commit: commit of the code, for the report.

    Returns:
        Result on the main process; None on the others.

    Raises:
        ValueError: if a model, reference or encoder is invalid or does not fit.

    Example:
        >>> from pathlib import Path
        >>> from diffusers_prx.evaluation.evaluate import EvaluationSettings, evaluate
        >>> settings = EvaluationSettings("outputs/quickstart", scenes=True)
        >>> evaluate(settings, Path("outputs/quickstart"), Path("cache")).report["scene_accuracy"]
    """
    start = time.perf_counter()
    state = PartialState(cpu=not torch.cuda.is_available())
    pipeline = load_pipeline(settings.model, settings.revision, settings.stock, settings.dtype).to(state.device)
    resolution = settings.resolution or default_resolution(pipeline)
    exam = open_exam(settings, resolution)  # before the first picture is drawn

    # the missing pictures; another machine or version draws new ones
    drawn = sampling_settings(settings, pipeline, resolution)
    drawn |= {"device": state.device.type, "commit": commit, "versions": installed_versions()}
    pictures = PictureFolder(output_dir / "pictures" / _key(drawn))
    if state.is_main_process:
        write_json(pictures.folder / DRAWN_FILE, drawn)
    draw_pictures(settings, pipeline, resolution, pictures, exam.groups)
    del pipeline  # frees memory for the encoders

    graded = grade_exam(exam, pictures, cache_dir, metric_batch_size, num_workers)
    if graded is None:
        return None
    graded.report |= describe_run(settings, drawn, str(pictures.folder.relative_to(output_dir)), metric_batch_size)
    graded.report["seconds_evaluation"] = round(time.perf_counter() - start, 1)
    return graded


@dataclass(frozen=True)
class Exam:
    """Everything that the pictures of a model are graded and measured with.

    Args:
        settings: settings of the evaluation.
        metrics: metrics by the user's names.
        scenes: prompts of the built-in scenes by split; empty if none are graded.
        emoji: data set, prompts and networks for emoji.
        reference: reference images of the metrics; None without metrics.
        prompts: captions of the reference that are drawn.
        without_caption: number of reference samples without a caption.
    """

    settings: EvaluationSettings
    metrics: dict[str, FeatureDistance | CLIPScore]
    scenes: dict[str, list[Prompt]]
    emoji: "EmojiExam"
    reference: ReferenceImages | None
    prompts: list[Prompt]
    without_caption: int

    @property
    def groups(self) -> dict[str, list[Prompt]]:
        """All prompts by the name of their group."""
        groups = {f"{split} scenes": group for split, group in self.scenes.items()}
        groups |= {group.name: group.prompts for group in self.emoji.groups}
        return groups | ({"captions of the reference": self.prompts} if self.prompts else {})


def open_exam(settings: EvaluationSettings, resolution: int, source: CaptionedImages | None = None) -> Exam:
    """Open the data and networks of an evaluation.

    Args:
        settings: settings of the evaluation.
        resolution: side length of the pictures in pixels.
        source: reference images of the metrics; None: those of `settings.reference`.

    Raises:
        ValueError: if the resolution is too small for the scenes, or something is missing or invalid.
    """
    least = LEVELS[settings.level].min_resolution
    if settings.scenes and resolution < least:
        raise ValueError(
            f"`level` is {settings.level!r}, which needs at least {least} pixels, but the resolution is {resolution}."
        )
    metrics = build_metrics(settings)
    scenes = {split: scene_prompts(settings, split) for split in ("heldout", "novel")} if settings.scenes else {}
    emoji = open_emoji(settings, resolution)
    if not metrics:
        return Exam(settings, metrics, scenes, emoji, None, [], 0)
    reference = open_reference(settings, resolution) if source is None else ReferenceImages(source, resolution)
    prompts, without_caption = reference.prompts(settings.num_images)
    if len(prompts) < settings.num_images:
        logger.warning(f"The reference has {len(prompts)} captions, fewer than `num_images` {settings.num_images}.")
    reference.size = min(settings.num_reference or prompts[-1][0] + 1, reference.size)
    return Exam(settings, metrics, scenes, emoji, reference, prompts, len(without_caption))


def grade_exam(
    exam: Exam, pictures: PictureFolder, cache_dir: Path, metric_batch_size: int, num_workers: int
) -> Evaluation | None:
    """Grade and measure stored pictures; all processes must call this.

    Args:
        exam: what is graded and measured.
        pictures: folder with the pictures of all prompts.
        cache_dir: folder for statistics of references.
        metric_batch_size: images per batch of an encoder.
        num_workers: processes that read images.

    Returns:
        Result on the main process; None on the others.
    """
    settings, state, reference = exam.settings, PartialState(), exam.reference
    report: dict[str, Any] = {}
    if reference is not None:
        loading = {"batch_size": metric_batch_size, "num_workers": num_workers}
        cache = ReferenceCache(cache_dir)
        report = measure(settings, exam.metrics, reference, pictures, exam.prompts, cache, loading)
        report["reference"]["samples_without_caption"] = exam.without_caption
    if not state.is_main_process:
        return None
    graded: tuple[list[GradedScene], list[GradedScene]] = ([], [])
    if exam.scenes:
        graded = (
            grade_stored_images(settings, "heldout", pictures, exam.scenes["heldout"]),
            grade_stored_images(settings, "novel", pictures, exam.scenes["novel"]),
        )
        report = {**scenes_report(settings, graded), **report}
    graded_emoji: dict[str, list[GradedEmoji]] = {}
    if exam.emoji.drawings is not None:
        report["emoji_accuracy"], graded_emoji = emoji_report(
            exam.emoji, pictures, cache_dir, metric_batch_size, state.device
        )
    return Evaluation(report, graded, graded_emoji, shown_pairs(reference, pictures, exam.prompts))


def draw_pictures(
    settings: EvaluationSettings,
    pipeline: DiffusionPipeline,
    resolution: int,
    pictures: PictureFolder,
    groups: Mapping[str, Sequence[Prompt]],
) -> None:
    """Draw the pictures of all prompts, by name of their group, that the folder does not have yet."""
    sampling = (settings.num_inference_steps, settings.guidance_scale, settings.seed, settings.batch_size)
    draw = pipeline_draw(pipeline, resolution, *sampling, settings.compat == PHOTOROOM)
    for name, prompts in groups.items():
        draw_missing(draw, pictures, prompts, settings.batch_size, f"Drawing {name}")


def describe_run(
    settings: EvaluationSettings, drawn: dict[str, Any], folder: str, metric_batch_size: int
) -> dict[str, Any]:
    """Return the report's entries about the evaluation itself.

    Args:
        settings: settings of the evaluation.
        drawn: everything that an image depends on.
        folder: folder of the images, relative to the report.
        metric_batch_size: images per batch of an encoder.
    """
    return {
        "seed": settings.seed,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "evaluation": {
            **asdict(settings),
            "drawn": drawn,
            "pictures": folder,
            "metric_batch_size": metric_batch_size,
            "processes": PartialState().num_processes,
            **{name: drawn[name] for name in ("device", "commit", "versions")},
        },
    }


def sampling_settings(settings: EvaluationSettings, pipeline: DiffusionPipeline, resolution: int) -> dict[str, Any]:
    """Return everything that an image depends on, except prompt, index and code."""
    return {
        "pipeline": f"{type(pipeline).__module__.partition('.')[0]}.{type(pipeline).__name__}",
        "pipeline_fingerprint": pipeline_fingerprint(pipeline),
        "resolution": resolution,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "fixed_noise": settings.compat == PHOTOROOM,
    }


def _key(drawn: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(drawn, sort_keys=True).encode(), digest_size=8).hexdigest()


def measure(
    settings: EvaluationSettings,
    metrics: dict[str, FeatureDistance | CLIPScore],
    reference: ReferenceImages,
    pictures: PictureFolder,
    prompts: Sequence[Prompt],
    cache: ReferenceCache,
    loading: dict[str, int],
) -> dict[str, Any]:
    """Compute the metrics of stored images. Return the report's entries for metrics and reference.

    Args:
        settings: settings of the evaluation.
        metrics: metrics by the user's names; they are moved to the device of this process.
        reference: reference images.
        pictures: folder of the generated images.
        prompts: prompts of the generated images.
        cache: cache of reference statistics.
        loading: `batch_size` and `num_workers` of `image_batches`.
    """
    for metric in metrics.values():
        metric.to(PartialState().device)
    distances = [metric for metric in metrics.values() if isinstance(metric, FeatureDistance)]
    described: dict[str, Any] = {"name": settings.reference}
    if distances:  # CLIP score alone needs the captions only
        content, unreadable = content_hash(reference, **loading)
        update_with_reference(distances, reference, content, cache, loading)
        described |= {
            "images": len(reference) - len(unreadable),
            "unreadable_images": len(unreadable),
            "first_unreadable": unreadable[:3],
            "resolution": reference.resolution,
            "fitting": FITTING,
            "content_hash": content,
        }
    update_with_generated(list(metrics.values()), pictures, prompts, loading)
    found = {}
    for text, metric in metrics.items():
        encoder = metric.describe() if isinstance(metric, CLIPScore) else metric.extractor.describe()
        found[metric.name] = {
            **metric.details(settings.bootstrap, settings.seed),
            "metric": text,
            "higher_is_better": bool(metric.higher_is_better),
            "encoder": encoder,
        }
    return {"metrics": found, "reference": described}


def build_metrics(settings: EvaluationSettings) -> dict[str, FeatureDistance | CLIPScore]:
    """Build the metrics by the user's names; metrics with the same encoder share it.

    Raises:
        ValueError: if an encoder cannot be loaded, or two metrics would have the same name.
    """
    extractors: dict[str, FeatureExtractor] = {}
    metrics: dict[str, FeatureDistance | CLIPScore] = {}
    for text in settings.metrics:
        kind, encoder = parse_metric(text)
        try:
            if kind == "clip_score":
                metrics[text] = load_clip_score(encoder)
                continue
            if encoder not in extractors:
                extractors[encoder] = load_extractor(encoder)
        except OSError as error:
            raise ValueError(f"`metrics` has {text!r}, whose encoder cannot be loaded: {error}") from error
        if kind == "mmd":
            metrics[text] = MaximumMeanDiscrepancy(extractors[encoder], settings.compat)
        else:
            keep_features = settings.bootstrap > 0
            metrics[text] = FrechetDistance(extractors[encoder], settings.compat, keep_features)
    names = [metric.name for metric in metrics.values()]
    if clash := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"`metrics` has several with the name {sorted(clash)}. Rename the folder of an encoder.")
    return metrics


def open_reference(settings: EvaluationSettings, resolution: int) -> ReferenceImages:
    """Open the reference images. Raises `ValueError` if that fails."""
    if settings.reference == SCENES:
        size = max(settings.num_images, settings.num_reference or 0)
        scenes = {"level": settings.level, "resolution": resolution, "seed": settings.seed, "split": "heldout"}
        source = load_source(SCENES, caption_columns=[settings.caption], scenes={**scenes, "size": size})
        return ReferenceImages(source, resolution)
    source = load_source(
        settings.reference,
        config_name=settings.reference_config,
        split=settings.reference_split,
        image_column=settings.image_column,
        caption_columns=[settings.caption_column],
    )
    return ReferenceImages(source, resolution)


def scene_prompts(settings: EvaluationSettings, split: str) -> list[Prompt]:
    """Return the prompts of a split that are graded."""
    resolution = LEVELS[settings.level].min_resolution  # any: only the captions are used
    scenes = ScenesDataset(
        settings.level, resolution, settings.seed, split, settings.caption, size=settings.num_prompts
    )
    return [(index, scenes[index]["caption"]) for index in range(settings.num_prompts)]


def grade_stored_images(
    settings: EvaluationSettings, split: str, pictures: PictureFolder, prompts: Sequence[Prompt]
) -> list[GradedScene]:
    """Grade the stored images of the prompts of `scene_prompts`."""
    images = map(pictures.read, prompts)
    graded = grade_scenes(images, settings.level, split, settings.seed, settings.num_prompts, settings.caption)
    assert [scene.prompt for scene in graded] == [text for _, text in prompts]
    return graded


def scenes_report(settings: EvaluationSettings, graded: tuple[list[GradedScene], list[GradedScene]]) -> dict[str, Any]:
    """Return the report's entries for prompt following."""
    heldout, novel = graded
    intervals = {
        f"scene_accuracy{suffix}_interval": list(share_interval(sum(g.right for g in part), len(part)))
        for suffix, part in (("", heldout), ("_novel", novel))
    }
    return {
        **scene_report(heldout, novel, settings.level, settings.caption, settings.seed),
        **intervals,
        "level": settings.level,
        "caption": settings.caption,
        "num_prompts": settings.num_prompts,
    }


@dataclass(frozen=True)
class EmojiExam:
    """Data set, prompts and networks for the grading of emoji.

    Args:
        drawings: data set; None: no emoji are graded.
        groups: groups of prompts.
        networks: name -> network that reads images.
    """

    drawings: EmojiDrawings | None
    groups: list[EmojiGroup]
    networks: dict[str, VisionTeacher]


def open_emoji(settings: EvaluationSettings, resolution: int) -> EmojiExam:
    """Open the data set of emoji and the networks that read it.

    Raises:
        ValueError: if a folder has no data set or network, or two networks have the same name.
    """
    if settings.emoji is None:
        return EmojiExam(None, [], {})
    drawings, groups = choose_groups(
        settings.emoji, settings.emoji_prompts, settings.emoji_caption, resolution, settings.num_prompts, settings.seed
    )
    networks: dict[str, VisionTeacher] = {}
    for source in settings.emoji_network:
        name = Path(source).name
        if name in networks:
            raise ValueError(f"`emoji_network` has two networks that are called {name!r}: rename a folder.")
        try:
            networks[name] = load_teacher(source)
        except OSError as error:
            raise ValueError(f"`emoji_network` has {source!r}, which cannot be loaded: {error}") from error
    return EmojiExam(drawings, groups, networks)


def emoji_report(
    emoji: EmojiExam, pictures: PictureFolder, cache_dir: Path, batch_size: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, list[GradedEmoji]]]:
    """Grade all emoji. Return the entries of the report and the graded images by group."""
    assert emoji.drawings is not None
    readers = {
        name: EmojiReader(emoji.drawings, network.to(device), cache_dir, batch_size)
        for name, network in emoji.networks.items()
    }
    report, graded = {}, {}
    for group in emoji.groups:
        drawn = [pictures.read(prompt) for prompt in group.prompts]
        report[group.name], graded[group.name] = grade_group(group, drawn, readers)
    return report, graded


class _Features:
    """Features of one batch, computed once per encoder."""

    def __init__(self, images: torch.Tensor):
        self.images = images
        self.computed: dict[tuple[str, str | None], torch.Tensor] = {}

    def of(self, metric: FeatureDistance) -> torch.Tensor:
        compat = metric.compat if isinstance(metric, FrechetDistance) else None
        key = (metric.extractor.fingerprint, compat)
        if key not in self.computed:
            self.computed[key] = metric.extract(self.images)
        return self.computed[key]


def update_with_reference(
    metrics: Sequence[FeatureDistance],
    reference: ReferenceImages,
    content: str,
    cache: ReferenceCache,
    loading: dict[str, int],
) -> None:
    """Load the reference statistics of every metric from the cache, or compute and cache them."""
    missing = [metric for metric in metrics if not cache.load(metric, content)]
    if not missing:
        return
    for _, images, _ in image_batches(reference, **loading, label="Reference"):
        if len(images):
            _update(missing, images.to(missing[0].device), real=True)
    for metric in missing:
        cache.save(metric, content)


def update_with_generated(
    metrics: Sequence[FeatureDistance | CLIPScore],
    pictures: PictureFolder,
    prompts: Sequence[Prompt],
    loading: dict[str, int],
) -> None:
    """Update every metric with the generated images, and CLIP scores also with the prompts."""
    distances = [metric for metric in metrics if isinstance(metric, FeatureDistance)]
    scores = [metric for metric in metrics if isinstance(metric, CLIPScore)]
    generated = GeneratedImages(pictures, prompts)
    for indices, batch, _ in image_batches(generated, **loading, label="Generated"):
        images = batch.to(metrics[0].device)
        _update(distances, images, real=False)
        for score in scores:
            score.update(images, [prompts[index][1] for index in indices])


@torch.no_grad()
def _update(metrics: Sequence[FeatureDistance], images: torch.Tensor, real: bool) -> None:
    features = _Features(images)
    for metric in metrics:
        metric.update(images, real, features.of(metric))


def shown_pairs(
    reference: ReferenceImages | None, pictures: PictureFolder, prompts: Sequence[Prompt]
) -> list[tuple[str, np.ndarray | None, np.ndarray]]:
    """Return the first images with their prompts and the reference images of the same captions."""
    pairs: list[tuple[str, np.ndarray | None, np.ndarray]] = []
    for index, text in prompts[:NUM_SHOWN] if reference is not None else ():
        assert reference is not None
        image = reference[index]
        shown = None if isinstance(image, str) else image.permute(1, 2, 0).numpy()  # (H, W, 3)
        pairs.append((text, shown, pictures.read((index, text))))
    return pairs


def installed_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that affect scores."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
