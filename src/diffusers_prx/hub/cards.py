"""Model cards of finished runs: a template filled in from training.json and the report of an evaluation.

A card contains only what these two files and the folder itself state. The report must belong to the stored weights.
"""

import copy
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from ..config.data_sources import DRAWN_SOURCES, DataSource, data_sources_of
from ..config.fields import RUNTIME, field_names
from ..config.training_config import TrainingConfig, complete_settings
from ..evaluation.emoji_accuracy import EMOJI_SHARES
from ..evaluation.generation import load_pipeline
from ..evaluation.reports import EMOJI_SHEET, PAIRS_SHEET, REPORT_JSON, SCENES_SHEET, markdown_table
from ..fingerprints import pipeline_fingerprint
from .publishing import CARD_FILE, CARD_MARKER, LOAD_FROM_KEY, hub_id, is_generated

REPORT_FILE = "training.json"
WIDGET_FOLDER = "widget"  # one picture per validation prompt
TAGS = ["prx", "text-to-image", "diffusers", "flow-matching"]
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_TEMPLATE = "template_lora.md"  # in the folder of the pipeline template
PACKAGE_LICENSE = "apache-2.0"
UNKNOWN_LICENSE = "unknown"  # identifier of the Hub
SCENES = "scenes"
SHEETS = (SCENES_SHEET, EMOJI_SHEET, PAIRS_SHEET)
# Markdown links and images without a scheme: files of the card's own repository.
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#]+)(?:#[^)]*)?\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def write_card(
    folder: Path,
    template: Path,
    report: dict[str, Any] | None = None,
    load_from: str | None = None,
    license: str | None = None,
) -> Path:
    """Write README.md into the folder of a finished run.

    Args:
        folder: folder with a pipeline or an adapter, and training.json.
        template: model_cards/template.md; the template for adapters is in the same folder.
        report: return value of `read_report`; None: the card states that there was no evaluation.
        load_from: folder or repository that the card's code loads; None: `folder`.
        license: license identifier of the Hub; None: Apache-2.0 if the run started from scratch and used only scenes
            drawn by this package, "unknown" otherwise.

    Returns:
        Path of README.md.

    Raises:
        ValueError: if the folder has no finished run, or has a card that was not generated.

    Example:
        >>> from pathlib import Path
        >>> from diffusers_prx.hub.cards import read_report, write_card
        >>> run = Path("outputs/quickstart")
        >>> write_card(run, Path("model_cards/template.md"), read_report(run), load_from="me/prx-quickstart")
    """
    adapter = (folder / ADAPTER_FILE).is_file() and not (folder / "model_index.json").is_file()
    for needed in (REPORT_FILE, ADAPTER_FILE if adapter else "model_index.json"):
        if not (folder / needed).is_file():
            raise ValueError(
                f"`folder` {folder} has no {needed}. Pass the folder of a finished run of training/train_prx.py."
            )
    card_file = folder / CARD_FILE
    _require_generated(card_file)
    record = json.loads((folder / REPORT_FILE).read_text())
    cfg = TrainingConfig(**complete_settings(record["config"], record["pipeline_class"] == "PRXPixelPipeline"))
    stages = begun_stages(cfg, record["steps"])
    load_from = load_from or str(folder)
    name = Path(load_from).name
    license = license or (PACKAGE_LICENSE if _is_scratch_on_scenes(stages) else UNKNOWN_LICENSE)
    public_report = None if report is None else without_folders(report)
    copy_widget_pictures(folder, record["steps"])
    card_data = _metadata(folder, stages, cfg, adapter, license, load_from, public_report)
    prompts = list(cfg.validation_prompts)
    card = ModelCard.from_template(
        card_data,
        template_path=str(template.with_name(ADAPTER_TEMPLATE) if adapter else template),
        name=name,
        load_from=load_from,
        pipeline_class=record["pipeline_class"] if adapter else _stored_class(folder),
        prompt=(prompts or [cfg.instance_prompt or "a small red circle on a white background."])[0],
        record=record,
        stored=_stored_weights(folder),
        config=stages[-1],
        stages=_stage_facts(stages, record["steps"], record["processes"]),
        data=", ".join(
            dict.fromkeys(_data_facts(source, stage) for stage in stages for source in data_sources_of(stage))
        ),
        scenes_only=all(source == SCENES for source in _sources(stages)),
        techniques=techniques(stages),
        networks=_networks(stages),
        recipe=recipe_text(cfg),
        started_from=_public_name(cfg.pretrained_model_name_or_path),
        base=cfg.pretrained_model_name_or_path,  # with its folder, because the code loads it
        evaluation=None if public_report is None else markdown_table(public_report),
        pictures=[] if report is None else [sheet for sheet in SHEETS if (folder / sheet).is_file()],
        license=license,
        marker=CARD_MARKER,
    )
    card.save(card_file)
    return card_file


def _metadata(
    folder: Path,
    stages: list[TrainingConfig],
    cfg: TrainingConfig,
    adapter: bool,
    license: str,
    load_from: str,
    report: dict[str, Any] | None,
) -> ModelCardData:
    examples = [_widget_example(folder, index, prompt) for index, prompt in enumerate(cfg.validation_prompts)]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license,
        language="en" if _is_scratch_on_scenes(stages) else None,
        tags=[*TAGS, "lora"] if adapter else TAGS,
        base_model=hub_id(cfg.pretrained_model_name_or_path),
        datasets=sorted({source for source in _sources(stages) if hub_id(source)}) or None,
        widget=examples or None,
        demo=_demo_of_adapter(stages[-1]) if adapter else _demo_texts(stages),
        model_name=Path(load_from).name if report is not None else None,
        eval_results=None if report is None else evaluation_results(report),
        load_from=load_from,  # LOAD_FROM_KEY
    )


def _demo_texts(stages: list[TrainingConfig]) -> dict[str, str] | None:
    """Return what the demo says of a model: a title, and a sentence on what to ask for; None for unknown data."""
    sources = set(_sources(stages))
    if sources == {SCENES}:
        description = "Say which shape you want, its size and color, where it is, and what is behind it."
        return {"title": "Shapes and colors from words", "description": description}
    if sources <= set(DRAWN_SOURCES):
        description = "Say which emoji you want, its size, where it is, and what is behind it."
        return {"title": "Emoji pictures from words", "description": description}
    return None


def _demo_of_adapter(cfg: TrainingConfig) -> dict[str, Any] | None:
    """Return what the demo reads of an adapter: the model whose "Fast" it is, and its steps; None for others."""
    if cfg.student_steps is None:
        return None
    return {"fast_for": _public_name(cfg.pretrained_model_name_or_path), "steps": cfg.student_steps}


def _stored_class(folder: Path) -> str:
    return json.loads((folder / "model_index.json").read_text())["_class_name"]


def _stored_weights(folder: Path) -> str:
    """Return size and types of the stored weights: "11.3 MB of safetensors, bf16"."""
    index = folder / "model_index.json"  # names the components; other folders are checkpoints of the run
    parts = [name for name in json.loads(index.read_text()) if name[0] != "_"] if index.is_file() else []
    files = sorted(file for part in [".", *parts] for file in (folder / part).glob("*.safetensors"))
    dtypes: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    names = {"F32": "float32", "BF16": "bf16", "F16": "float16"}
    size = sum(file.stat().st_size for file in files) / 1e6
    return f"{size:.1f} MB of safetensors, {' and '.join(sorted(names.get(dtype, dtype) for dtype in dtypes))}"


def read_card_choices(folder: Path) -> dict[str, str | None]:
    """Return the user's choices in an existing generated card, `load_from` and `license`, for `write_card`."""
    if not is_generated(folder / CARD_FILE):
        return {"load_from": None, "license": None}
    card = ModelCard.load(folder / CARD_FILE)
    return {"load_from": card.data.get(LOAD_FROM_KEY), "license": card.data.license}


def copy_card(folder: Path, output_dir: Path) -> Path:
    """Copy a card and the files that it links to, without the weights. Return the path of the copy.

    Raises:
        ValueError: if `output_dir` has a card that was not generated.
    """
    target = output_dir / CARD_FILE
    _require_generated(target)
    for file in (CARD_FILE, *linked_files(ModelCard.load(folder / CARD_FILE))):
        (output_dir / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, output_dir / file)
    return target


def _require_generated(card: Path) -> None:
    if card.is_file() and not is_generated(card):
        raise ValueError(
            f"{card} was not generated by this package, or was claimed by its user. Move it to replace it."
        )


def read_report(folder: Path) -> dict[str, Any] | None:
    """Return the report of the last evaluation in a folder; None without one.

    Raises:
        ValueError: if the report belongs to other weights than those in the folder.
    """
    if not (folder / REPORT_JSON).is_file():
        return None
    report = json.loads((folder / REPORT_JSON).read_text())
    settings = report["evaluation"]
    pipeline = load_pipeline(str(folder), None, settings["stock"], settings["dtype"])
    if pipeline_fingerprint(pipeline) != settings["drawn"]["pipeline_fingerprint"]:
        raise ValueError(
            f"{folder / REPORT_JSON} belongs to other weights than those in {folder}. Run training/evaluate_prx.py "
            "again, or remove the report."
        )
    return report


def copy_widget_pictures(folder: Path, step: int) -> None:
    """Copy the images of the validation at a step, if there was one, to the card's folder of pictures."""
    images = validation_sheet(folder, step).with_suffix("")
    if images.is_dir():
        shutil.copytree(images, folder / WIDGET_FOLDER, dirs_exist_ok=True)


def validation_sheet(folder: Path, step: int) -> Path:
    """Return the path of the grid of validation images at a step; a folder of the same name has the single images."""
    return folder / "validation" / f"step-{step:07d}.png"


def begun_stages(cfg: TrainingConfig, step: int) -> list[TrainingConfig]:
    """Return the settings of the stages that had begun by a step; always at least the first."""
    begun: list[TrainingConfig] = []
    first_step = 0
    for stage in cfg.stage_configs():
        if begun and first_step >= step:
            break
        begun.append(stage)
        first_step += stage.max_train_steps
    return begun


def evaluation_results(report: dict[str, Any]) -> list[EvalResult]:
    """Return the scores of a report as Hub metadata, with the settings that affect them in `args`.

    Args:
        report: report of an evaluation, without local paths (see `without_folders`).
    """
    evaluation = report["evaluation"]
    drawn = evaluation["drawn"]
    sampling = {key: drawn[key] for key in ("resolution", "num_inference_steps", "guidance_scale", "seed")}
    results = []
    if "scene_accuracy" in report:
        for name, split in (("scene_accuracy", "heldout"), ("scene_accuracy_novel", "novel")):
            results.append(
                EvalResult(
                    task_type="text-to-image",
                    dataset_type="diffusers-prx-scenes",
                    dataset_name="Captioned scenes of diffusers-prx",
                    dataset_config=evaluation["level"],
                    dataset_split=split,
                    metric_type=name,
                    metric_name="share of prompts of which everything was drawn right",
                    metric_value=report[name],
                    metric_args={
                        **sampling,
                        "num_prompts": evaluation["num_prompts"],
                        "caption": evaluation["caption"],
                    },
                )
            )
    for group, graded in report.get("emoji_accuracy", {}).items():
        network, shares = next(iter(graded["networks"].items()))
        for name in EMOJI_SHARES:
            results.append(
                EvalResult(
                    task_type="text-to-image",
                    dataset_type="diffusers-prx-emoji",
                    dataset_name="Emoji drawings of diffusers-prx",
                    dataset_split=group,
                    metric_type=name,
                    metric_name=f"share of drawings of which {name} is right",
                    metric_value=shares[name],
                    metric_args={**sampling, "network": network, "num_drawings": graded["num_drawings"]},
                )
            )
    for name, metric in report.get("metrics", {}).items():
        settings = {**sampling, "num_images": metric["num_images"], "encoder": metric["encoder"]["source"]}
        settings |= {"num_reference": metric["num_reference"]} if "num_reference" in metric else {}
        settings |= {"compat": evaluation["compat"]} if evaluation["compat"] is not None else {}
        for label, key in ((name, "value"), (f"{name}, unbiased", "unbiased_value")):
            if key in metric:
                results.append(
                    EvalResult(
                        task_type="text-to-image",
                        dataset_type=_dataset_type(report["reference"]["name"]),
                        dataset_name=report["reference"]["name"],
                        dataset_split="heldout"
                        if evaluation["reference"] == SCENES
                        else evaluation["reference_split"],
                        metric_type=metric["metric"].partition(":")[0],
                        metric_name=label,
                        metric_value=metric[key],
                        metric_args=settings,
                    )
                )
    return results


def without_folders(report: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a report in which local paths are cut to their last part."""
    report = copy.deepcopy(report)
    evaluation = report["evaluation"]
    evaluation["model"] = _public_name(evaluation["model"])
    if evaluation.get("emoji") is not None:
        evaluation["emoji"] = _public_name(evaluation["emoji"])
        evaluation["emoji_network"] = [_public_name(network) for network in evaluation["emoji_network"]]
    if "reference" in report:
        report["reference"]["name"] = _public_name(report["reference"]["name"])
    for metric in report.get("metrics", {}).values():
        metric["metric"] = ":".join(str(_public_name(part)) for part in metric["metric"].split(":", 1))
        metric["encoder"]["source"] = _public_name(metric["encoder"]["source"])
    return report


def techniques(stages: list[TrainingConfig]) -> list[str]:
    """Return the training techniques of a run, with their papers and the stages that use them."""
    stages_of: dict[str, list[int]] = {}
    for number, cfg in enumerate(stages):
        for technique in _techniques_of(cfg):
            stages_of.setdefault(technique, []).append(number)
    return [
        text if len(numbers) == len(stages) else f"{text}, in stage {' and '.join(map(str, numbers))}"
        for text, numbers in stages_of.items()
    ]


def _techniques_of(cfg: TrainingConfig) -> list[str]:
    found: list[str] = []
    if cfg.prediction_type == "x_prediction":
        found.append("the network predicts the clean image (arXiv 2511.13720)")
    if cfg.route_ratio:
        sprint = cfg.transformer_config.get("fusion_range") is not None
        route = "SPRINT (arXiv 2510.21986)" if sprint else "TREAD (arXiv 2501.04765)"
        start, stop = cfg.route_range
        found.append(f"{route}: {cfg.route_ratio:.0%} of the tokens around blocks [{start}, {stop})")
    if cfg.repa_weight:
        repa = "iREPA (arXiv 2512.10794)" if cfg.repa_spatial_gamma is not None else "REPA (arXiv 2410.06940)"
        until = "" if cfg.repa_until_step is None else f", until step {cfg.repa_until_step}"
        teacher = _public_name(cfg.repa_teacher)
        found.append(f"{repa}: weight {cfg.repa_weight}, block {cfg.repa_block}{until}, with `{teacher}`")
    if cfg.contrastive_weight:
        found.append(f"contrastive flow matching (arXiv 2506.05350): weight {cfg.contrastive_weight}")
    if cfg.lpips_weight:
        found.append(f"LPIPS (arXiv 1801.03924): weight {cfg.lpips_weight}")
    if cfg.dino_weight:
        found.append(f"distance of the patches of `{_public_name(cfg.dino_teacher)}`: weight {cfg.dino_weight}")
    if cfg.optimizer == "muon":
        found.append("Muon for the matrices (arXiv 2502.16982), AdamW for the rest")
    if cfg.weights_dtype == "bf16":
        found.append("weights stored in bf16, which loses small updates")
    return found


def recipe_text(cfg: TrainingConfig) -> str:
    """Return the settings of a run that differ from the defaults as a recipe, without local paths."""
    settings = {}
    runtime_options = field_names(TrainingConfig, RUNTIME)
    for option in dataclasses.fields(cfg):
        value = getattr(cfg, option.name)
        default = option.default_factory() if callable(option.default_factory) else option.default
        if value != default and option.name not in runtime_options:
            settings[option.name] = value if option.name == "validation_prompts" else _without_folders(value)
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110).strip()


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return _public_name(value) if isinstance(value, str) else value


def linked_files(card: ModelCard) -> list[str]:
    """Return the files of its own repository that a card links to."""
    widget = [example["output"]["url"] for example in card.data.get("widget") or [] if "output" in example]
    return list(dict.fromkeys([*LINK.findall(FENCED.sub("", card.text)), *widget]))


def _widget_example(folder: Path, index: int, prompt: str) -> dict[str, Any]:
    """Return an example for the model page, with its picture if there is one."""
    file = f"{WIDGET_FOLDER}/{index}.png"
    return {"text": prompt} | ({"output": {"url": file}} if (folder / file).is_file() else {})


def _stage_facts(stages: list[TrainingConfig], steps: int, processes: int) -> list[dict[str, Any]]:
    """Return one row per stage, with the number of steps that were made."""
    rows: list[dict[str, Any]] = []
    for stage in stages:
        stage_steps = min(stage.max_train_steps, steps)
        steps -= stage_steps
        row = {
            "steps": stage_steps,
            "resolution": stage.resolution,
            "batch": stage.train_batch_size * stage.gradient_accumulation_steps * processes,
            "data": ", ".join(_data_facts(source, stage) for source in data_sources_of(stage)),
            "learning_rate": stage.learning_rate,
        }
        rows.append(row)
    return rows


def _data_facts(source: DataSource, cfg: TrainingConfig) -> str:
    """Return a short description of a data source."""
    share = "" if source.weight is None else f", weight {source.weight:g}"
    if source.is_drawn:
        shares = [f"{name} ({weight:g})" for name, weight in (cfg.caption_weights or {}).items()]
        captions = " and ".join(shares) or cfg.scenes_caption
        kind = f"level {cfg.scenes_level}" if source.name == SCENES else f"from `{_public_name(cfg.emoji_dir)}`"
        return f"`{source.name}` (drawn by diffusers-prx, {kind}, {captions} captions{share})"
    return f"`{_public_name(source.name)}` (split {source.split}{share})"


def _sources(stages: list[TrainingConfig]) -> list[str]:
    return [source.name for stage in stages for source in data_sources_of(stage)]


def _is_scratch_on_scenes(stages: list[TrainingConfig]) -> bool:
    """True if the run used no other network and no other data than scenes drawn by this package."""
    return not _networks(stages) and all(name == SCENES for name in _sources(stages))


def _networks(stages: list[TrainingConfig]) -> list[tuple[str, str]]:
    """Return (role, name) of every pretrained network that a run started from or used."""
    roles = (
        ("started from", "pretrained_model_name_or_path"),
        ("text encoder", "text_encoder_name_or_path"),
        ("autoencoder", "vae_name_or_path"),
        ("teacher of the alignment", "repa_teacher"),
        ("network of a loss", "dino_teacher"),
    )
    named = [(role, _public_name(getattr(cfg, field))) for cfg in stages for role, field in roles]
    named += [("network of a loss", "LPIPS with VGG-16") for cfg in stages if cfg.lpips_weight]
    return list(dict.fromkeys((role, name) for role, name in named if name is not None))


def _public_name(name: str | None) -> str | None:
    """Return a name without local folders: a local path is cut to its last part."""
    if name is None or not (os.path.isabs(name) or os.path.exists(name)):
        return name
    return Path(name).name


def _dataset_type(name: str) -> str:
    """Return a name in a form that the Hub's metadata accept as a data set."""
    return name if hub_id(name) else re.sub(r"[^\w.-]+", "-", name).strip("-")
