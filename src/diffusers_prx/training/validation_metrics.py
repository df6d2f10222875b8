"""Metrics during training, by the functions of `training/evaluate_prx.py`, on pictures of the validation."""

from typing import Any

from ..config.data_sources import data_sources_of
from ..config.training_config import TrainingConfig
from ..evaluation.emoji_accuracy import EMOJI_SHARES
from ..evaluation.evaluate import EvaluationSettings, Exam, build_metrics, open_emoji
from ..evaluation.generation import PictureFolder, pipeline_draw
from ..files import expand_path
from .distributed import split_evenly
from .networks import Nets

SCENE_SHARES = ("scene_accuracy", "scene_accuracy_novel")


def metric_settings(cfg: TrainingConfig) -> EvaluationSettings:
    """Return the settings of `validation_metrics` as those of an evaluation.

    Args:
        cfg: configuration of the stage.

    Raises:
        ValueError: a metric is unknown, or lacks its encoder.
    """
    sources = data_sources_of(cfg)
    kinds = [(name.partition(":")[0], name.partition(":")[2]) for name in cfg.validation_metrics]
    captions = [source.caption_column for source in sources if source.name == "scenes"]
    networks = [expand_path(encoder) for kind, encoder in kinds if kind == "emoji"]
    composed = {source.name == "emoji_scenes" for source in sources}
    return EvaluationSettings(
        model=cfg.output_dir,
        scenes=("scenes", "") in kinds,
        level=cfg.scenes_level,
        caption=next(iter([*cfg.caption_weights, *captions])) if captions else "long",
        emoji=cfg.emoji_dir if networks else None,
        emoji_network=networks,
        emoji_prompts=[kind for kind, asked in (("drawings", False), ("scenes", True)) if asked in composed],
        metrics=[
            f"{kind}:{expand_path(encoder)}" if encoder else kind
            for kind, encoder in kinds
            if kind not in ("scenes", "emoji")
        ],
        num_prompts=cfg.validation_metrics_samples,
        num_images=cfg.validation_metrics_samples,
        num_inference_steps=cfg.validation_inference_steps,
        guidance_scale=cfg.validation_guidance_scale,
        seed=cfg.seed,
        batch_size=cfg.train_batch_size,
        bootstrap=0,
    )


def check_metrics(cfg: TrainingConfig) -> None:
    """Load the encoders and the emoji of `validation_metrics`, and release them.

    Args:
        cfg: configuration of the stage.

    Raises:
        ValueError: something cannot be loaded.
    """
    try:
        settings = metric_settings(cfg)
        build_metrics(settings)
        open_emoji(settings, cfg.resolution)
    except ValueError as error:
        raise ValueError(f"`validation_metrics` is {cfg.validation_metrics}: {error}") from error


def draw_exam(nets: Nets, cfg: TrainingConfig, exam: Exam, pictures: PictureFolder, rank: int, processes: int) -> None:
    """Draw this process's share of the pictures of an exam.

    The batches do not depend on the number of processes, and all processes call the networks equally often, which FSDP
    requires.

    Args:
        nets: networks of the run.
        cfg: configuration of the stage.
        exam: prompts to draw.
        pictures: empty folder that all processes share.
        rank: rank of this process.
        processes: number of processes.
    """
    settings = exam.settings
    pipeline = nets.pipeline(cfg)
    pipeline.set_progress_bar_config(disable=True)
    sampling = (settings.num_inference_steps, settings.guidance_scale, settings.seed, settings.batch_size)
    draw = pipeline_draw(pipeline, cfg.resolution, *sampling)
    batches = [
        prompts[first : first + settings.batch_size]
        for prompts in exam.groups.values()
        for first in range(0, len(prompts), settings.batch_size)
    ]
    for _, batch in split_evenly(batches, rank, processes):
        indices, texts = zip(*batch)
        for prompt, image in zip(batch, draw(texts, indices)):
            pictures.write(prompt, image)


def metric_values(report: dict[str, Any]) -> dict[str, float]:
    """Return the scores of a report as {"validation/...": number}.

    Args:
        report: report of `evaluation.evaluate.grade_exam`.
    """
    found: dict[str, float] = {name: report[name] for name in SCENE_SHARES if name in report}
    found |= {name: metric["value"] for name, metric in report.get("metrics", {}).items()}
    for group, graded in report.get("emoji_accuracy", {}).items():
        for network, shares in graded["networks"].items():
            for share in EMOJI_SHARES:
                found[f"emoji_{share}/{group}/{network}"] = shares[share]
    return {f"validation/{name}": value for name, value in found.items()}
