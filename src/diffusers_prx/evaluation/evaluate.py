"""One evaluation: a pipeline x a reference x metrics, on any number of processes; beside every number stands what
changes it."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers.utils import logging

from ..data.scenes import LEVELS, ScenesDataset
from ..data.sources import load_source
from ..files import write_json
from ..fingerprints import pipeline_fingerprint
from .clip_score import DEFAULT_CLIP, CLIPScore, load_clip_score
from .distances import share_interval
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
# kind of metric -> its encoder, where it has a standard one
KINDS: dict[str, str | None] = {"fid": INCEPTION, "mmd": None, "clip_score": DEFAULT_CLIP}
# the study's names of two of them
STANDARD = {"cmmd": ("mmd", "clip"), "dino_mmd": ("mmd", "dinov2")}
PICTURES_SHOWN = 8
DRAWN_FILE = "drawn.json"


def parse_metric(text: str) -> tuple[str, str]:
    """Kind and encoder of a metric as a user writes it: fid, cmmd, dino_mmd, clip_score, fid:ENCODER, mmd:ENCODER,
    clip_score:ENCODER.

    Raises:
        ValueError: for another one.
    """
    kind, colon, encoder = text.partition(":")
    if kind in STANDARD and not colon:
        return STANDARD[kind]
    if kind in STANDARD:
        raise ValueError(f"`metrics` has {text!r}, but {kind} is a name for one encoder: write mmd:{encoder}.")
    if kind not in KINDS:
        raise ValueError(f"`metrics` has {text!r}; accepted: {', '.join([*KINDS, *STANDARD])}, with :ENCODER.")
    chosen = encoder or KINDS[kind]
    if chosen is None:
        raise ValueError(f"`metrics` has {text!r}, which needs an encoder: {kind}:FOLDER, or cmmd or dino_mmd.")
    return kind, chosen


@dataclass(frozen=True)
class EvaluationSettings:
    """All that the numbers of an evaluation depend on, besides the contents of what is named here.

    Args:
        model: a saved pipeline: a folder or a Hub id.
        revision: of the model on the Hub.
        stock: load it with diffusers' own class.
        dtype: of its weights: float32, bfloat16, float16; None: as `from_pretrained` does.
        scenes: grade prompt following on the built-in scenes.
        metrics: see `parse_metric`.
        reference: `scenes`, or the name of a data set that `data.sources.load_source` opens; its captions are the
            prompts.
        reference_config, reference_split, image_column, caption_column: of that data set.
        level, caption: of the scenes.
        num_prompts: scenes to grade: so many of the held-out split, and as many novel ones.
        num_images: to generate for the metrics.
        num_reference: images of the reference, from its first on; None: as many as are generated.
        resolution: side in pixels; None: the pipeline's own.
        num_inference_steps, guidance_scale: of the pipeline's call.
        seed: of the scenes, the noise (seed + index of the prompt) and the bootstrap.
        batch_size: prompts drawn at once; it changes the last bits of the pictures.
        bootstrap: resamples for the intervals; 0: none.
        compat: "photoroom": as the study's public code (colors inverted for FID, the same noise in each batch).

    Raises:
        ValueError: for a value out of range, or nothing to do.
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
        if not self.scenes and not self.metrics:
            raise ValueError("Nothing is asked for: give `scenes`, `metrics` or both.")
        least = {"num_prompts": 2, "num_images": 2, "num_reference": 2, "num_inference_steps": 1, "batch_size": 1}
        for name, bound in {**least, "guidance_scale": 1, "bootstrap": 0, "resolution": 1}.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"`{name}` must be at least {bound}, got {value}.")
        if self.compat not in (None, PHOTOROOM):
            raise ValueError(f"`compat` is {self.compat!r}; accepted: {PHOTOROOM!r}.")
        for metric in self.metrics:
            parse_metric(metric)


@dataclass
class Evaluation:
    """What the main process has at the end.

    Attributes:
        report: what goes to report.json.
        scenes: the graded scenes, held-out and novel; empty without `scenes`.
        pairs: (prompt, reference image or None where it cannot be read, generated image) for the sheet of pictures;
            images are uint8 (H, W, 3). Empty without metrics.
    """

    report: dict[str, Any]
    scenes: tuple[list[GradedScene], list[GradedScene]]
    pairs: list[tuple[str, np.ndarray | None, np.ndarray]]


def evaluate(
    settings: EvaluationSettings,
    output_dir: Path,
    cache_dir: Path,
    metric_batch_size: int = 32,
    num_workers: int = 0,
    commit: str | None = None,
) -> Evaluation | None:
    """Draw what is missing, and compute every metric that is asked for.

    May be killed and started again, also on another number of processes: pictures that are there are not drawn again.

    Args:
        settings: what to do.
        output_dir: pictures go to `pictures/` in it, in a folder for all that they depend on.
        cache_dir: where what metrics keep of references is kept.
        metric_batch_size: images that an encoder sees at once.
        num_workers: processes that read images.
        commit: of the code, for the report.

    Returns:
        On the main process; None on the others.

    Raises:
        ValueError: for a model, a reference or an encoder that does not fit; the message says what would.
    """
    start = time.perf_counter()
    state = PartialState(cpu=not torch.cuda.is_available())
    pipeline = load_pipeline(settings.model, settings.revision, settings.stock, settings.dtype).to(state.device)
    resolution = settings.resolution or default_resolution(pipeline)
    least = LEVELS[settings.level].min_resolution
    if settings.scenes and resolution < least:
        raise ValueError(
            f"Pictures of level {settings.level} can be read from {least} pixels on; the model draws {resolution}."
        )
    metrics = build_metrics(settings)
    reference = open_reference(settings, resolution) if metrics else None

    drawn = sampling_settings(settings, pipeline, resolution)
    drawn |= {"device": state.device.type, "commit": commit, "versions": installed_versions()}  # others draw anew
    pictures = PictureFolder(output_dir / "pictures" / _key(drawn))
    if state.is_main_process:
        write_json(pictures.folder / DRAWN_FILE, drawn)
    draw = pipeline_draw(
        pipeline, resolution, settings.num_inference_steps, settings.guidance_scale, settings.seed,
        settings.batch_size, drawn["fixed_noise"],
    )  # fmt: skip
    splits = {split: scene_prompts(settings, split) for split in ("heldout", "novel")} if settings.scenes else {}
    for split, prompts in splits.items():
        draw_missing(draw, pictures, prompts, settings.batch_size, f"Drawing {split} scenes")
    prompts, report = [], {}
    if reference is not None:
        prompts, without = reference.prompts(settings.num_images)
        if len(prompts) < settings.num_images:
            logger.warning(f"The reference has {len(prompts)} captions, fewer than `num_images`.")
        draw_missing(draw, pictures, prompts, settings.batch_size, "Drawing")
        del draw, pipeline  # the encoders take its place in memory
        reference.size = min(settings.num_reference or prompts[-1][0] + 1, reference.size)
        loading = {"batch_size": metric_batch_size, "num_workers": num_workers}
        report = measure(settings, metrics, reference, pictures, prompts, ReferenceCache(cache_dir), loading)
        report["reference"]["samples_without_caption"] = len(without)
    if not state.is_main_process:
        return None

    graded: tuple[list[GradedScene], list[GradedScene]] = ([], [])
    if settings.scenes:
        graded = (
            grade_kept(settings, "heldout", pictures, splits["heldout"]),
            grade_kept(settings, "novel", pictures, splits["novel"]),
        )
        report = {**scenes_part(settings, graded), **report}
    report |= {
        "seed": settings.seed,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "seconds_evaluation": round(time.perf_counter() - start, 1),
        "evaluation": {
            **asdict(settings),
            "drawn": drawn,
            "pictures": str(pictures.folder.relative_to(output_dir)),
            "metric_batch_size": metric_batch_size,
            "processes": state.num_processes,
            "device": state.device.type,
            "commit": commit,
            "versions": installed_versions(),
        },
    }
    return Evaluation(report, graded, shown_pairs(reference, pictures, prompts))


def sampling_settings(settings: EvaluationSettings, pipeline: Any, resolution: int) -> dict[str, Any]:
    """All that a picture depends on, besides its prompt, its index and the code."""
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
    """What a report says of metrics and reference, from pictures that are all on disk.

    Args:
        settings: for the bootstrap and for names.
        metrics: by what the user called them; they are moved to the device of this process.
        reference, pictures, prompts: what is compared.
        cache: of references.
        loading: `batch_size` and `num_workers` of `image_batches`.
    """
    for metric in metrics.values():
        metric.to(PartialState().device)
    distances = [metric for metric in metrics.values() if isinstance(metric, FeatureDistance)]
    described: dict[str, Any] = {"name": settings.reference}
    if distances:  # CLIP score alone needs the captions only
        content, unreadable = content_hash(reference, **loading)
        see_reference(distances, reference, content, cache, loading)
        described |= {
            "images": len(reference) - len(unreadable),
            "unreadable_images": len(unreadable),
            "first_unreadable": unreadable[:3],
            "resolution": reference.resolution,
            "fitting": FITTING,
            "content_hash": content,
        }
    see_generated(list(metrics.values()), pictures, prompts, loading)
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
    """The metrics, by what the user called them; those with one encoder share it.

    Raises:
        ValueError: if an encoder cannot be loaded, or two metrics would have one name.
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
        raise ValueError(f"`metrics` has several that would be called {sorted(clash)}: rename an encoder's folder.")
    return metrics


def open_reference(settings: EvaluationSettings, resolution: int) -> ReferenceImages:
    """The reference's images at a resolution; raises `ValueError` for one that cannot be opened."""
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
    """The prompts that are graded of a split."""
    resolution = LEVELS[settings.level].min_resolution  # of pictures that nobody looks at
    scenes = ScenesDataset(
        settings.level, resolution, settings.seed, split, settings.caption, size=settings.num_prompts
    )
    return [(index, scenes[index]["caption"]) for index in range(settings.num_prompts)]


def grade_kept(
    settings: EvaluationSettings, split: str, pictures: PictureFolder, prompts: Sequence[Prompt]
) -> list[GradedScene]:
    """Grade the pictures of a split that are on disk, of the prompts of `scene_prompts`."""
    images = map(pictures.read, prompts)
    graded = grade_scenes(images, settings.level, split, settings.seed, settings.num_prompts, settings.caption)
    assert [scene.prompt for scene in graded] == [text for _, text in prompts]
    return graded


def scenes_part(settings: EvaluationSettings, graded: tuple[list[GradedScene], list[GradedScene]]) -> dict[str, Any]:
    """What a report says of prompt following."""
    heldout, novel = graded
    intervals = {
        f"scene_accuracy{suffix}_interval": list(share_interval(sum(g.correct for g in part), len(part)))
        for suffix, part in (("", heldout), ("_novel", novel))
    }
    return {
        **scene_report(heldout, novel, settings.level, settings.caption, settings.seed),
        **intervals,
        "level": settings.level,
        "caption": settings.caption,
        "num_prompts": settings.num_prompts,
    }


class _Features:
    """The features of one batch, computed once for all metrics that see the same images with the same encoder."""

    def __init__(self, images: torch.Tensor):
        self.images = images
        self.made: dict[tuple[str, str | None], torch.Tensor] = {}

    def of(self, metric: FeatureDistance) -> torch.Tensor:
        treated = metric.compat if isinstance(metric, FrechetDistance) else None
        key = (metric.extractor.fingerprint, treated)
        if key not in self.made:
            self.made[key] = metric.extract(self.images)
        return self.made[key]


def see_reference(
    metrics: Sequence[FeatureDistance],
    reference: ReferenceImages,
    content: str,
    cache: ReferenceCache,
    loading: dict[str, int],
) -> None:
    """Give every metric its reference: from the cache, or from the images, which are then looked at once."""
    missing = [metric for metric in metrics if not cache.load(metric, content)]
    if not missing:
        return
    for _, images, _ in image_batches(reference, **loading, label="Looking at the reference"):
        if len(images):
            _update(missing, images.to(missing[0].device), real=True)
    for metric in missing:
        cache.save(metric, content)


def see_generated(
    metrics: Sequence[FeatureDistance | CLIPScore],
    pictures: PictureFolder,
    prompts: Sequence[Prompt],
    loading: dict[str, int],
) -> None:
    """Give every metric the generated pictures, and CLIP score their prompts."""
    distances = [metric for metric in metrics if isinstance(metric, FeatureDistance)]
    scores = [metric for metric in metrics if isinstance(metric, CLIPScore)]
    generated = GeneratedImages(pictures, prompts)
    for places, batch, _ in image_batches(generated, **loading, label="Looking at the pictures"):
        images = batch.to(metrics[0].device)
        _update(distances, images, real=False)
        for score in scores:
            score.update(images, [prompts[place][1] for place in places])


@torch.no_grad()
def _update(metrics: Sequence[FeatureDistance], images: torch.Tensor, real: bool) -> None:
    features = _Features(images)
    for metric in metrics:
        metric.update(images, real, features.of(metric))


def shown_pairs(
    reference: ReferenceImages | None, pictures: PictureFolder, prompts: Sequence[Prompt]
) -> list[tuple[str, np.ndarray | None, np.ndarray]]:
    """The first pictures with their prompts and the reference's images of the same captions."""
    pairs: list[tuple[str, np.ndarray | None, np.ndarray]] = []
    for index, text in prompts[:PICTURES_SHOWN] if reference is not None else ():
        assert reference is not None
        image = reference[index]
        shown = None if isinstance(image, str) else image.permute(1, 2, 0).numpy()  # (H, W, 3)
        pairs.append((text, shown, pictures.read((index, text))))
    return pairs


def installed_versions() -> dict[str, str]:
    """Of the libraries that numbers depend on, those that are there."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
