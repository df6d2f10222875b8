"""The model card of a finished run: the template, filled in from what the run and its evaluation wrote down.

Nothing stands in a card that is not in training.json, in the report of an evaluation of these very weights, or in the
folder.
"""

import copy
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from ..config.fields import RUNTIME, marked
from ..config.training_config import TrainingConfig, settings_of_run, sources_of
from ..evaluation.generation import load_pipeline
from ..evaluation.image_grids import pictures_of_grid
from ..evaluation.reports import PAIRS_SHEET, REPORT_JSON, SCENES_SHEET, markdown_table
from ..fingerprints import pipeline_fingerprint
from .publishing import ADAPTER_LOADED_FROM, CARD_FILE, CARD_MARKER, LOADED_FROM, hub_id, is_ours

REPORT_FILE = "training.json"
PICTURES = "widget"  # one for each validation prompt
TAGS = ["prx", "text-to-image", "diffusers", "flow-matching"]
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_TEMPLATE = "template_lora.md"  # of an adapter's card, beside the template of a pipeline's
PACKAGE_LICENSE = "apache-2.0"
UNKNOWN_LICENSE = "unknown"  # the Hub's own word for it
SCENES = "scenes"
# A file of the same repository that a card shows or names: Markdown links and images without a scheme.
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#]+)(?:#[^)]*)?\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def write_card(
    folder: Path,
    template: Path,
    report: dict[str, Any] | None = None,
    load_from: str | None = None,
    license: str | None = None,
) -> Path:
    """Write README.md of a finished run's folder anew.

    Args:
        folder: with the pipeline, or the adapter, and training.json.
        template: see model_cards/template.md; that of an adapter's card stands beside it.
        report: of an evaluation of the pipeline in the folder, see `read_report`; None: the card says that there was
            none.
        load_from: the folder or repository that its code loads; None: the folder.
        license: identifier of the Hub; None: Apache-2.0 where the run started from nothing and has seen only what this
            package draws, and unknown otherwise.

    Returns:
        The file.

    Raises:
        ValueError: if there is no finished run, or a card that somebody has made their own.
    """
    adapter = (folder / ADAPTER_FILE).is_file() and not (folder / "model_index.json").is_file()
    for needed in (REPORT_FILE, ADAPTER_FILE if adapter else "model_index.json"):
        if not (folder / needed).is_file():
            raise ValueError(
                f"{folder} has no {needed}: a card is written of a finished run of training/train_prx.py."
            )
    card_file = folder / CARD_FILE
    _require_ours(card_file)
    record = json.loads((folder / REPORT_FILE).read_text())
    cfg = TrainingConfig(**settings_of_run(record["config"], record["pipeline_class"] == "PRXPixelPipeline"))
    stages = begun_stages(cfg, record["steps"])
    load_from = load_from or str(folder)
    name = Path(load_from).name
    license = license or (PACKAGE_LICENSE if _is_all_ours(stages) else UNKNOWN_LICENSE)
    shown = None if report is None else without_folders(report)
    prompts = list(cfg.validation_prompts)
    write_widget_pictures(folder, record["steps"], len(prompts))
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license,
        language="en" if _is_all_ours(stages) else None,
        tags=[*TAGS, "lora"] if adapter else TAGS,
        base_model=hub_id(cfg.pretrained_model_name_or_path),
        datasets=sorted({source for source in _sources(stages) if hub_id(source)}) or None,
        widget=[_widget(folder, place, prompt) for place, prompt in enumerate(prompts)] or None,
        model_name=name if shown is not None else None,
        eval_results=None if shown is None else evaluation_results(shown),
    )
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
        data=", ".join(dict.fromkeys(_data_facts(source, stage) for stage in stages for source in sources_of(stage))),
        scenes_only=all(source == SCENES for source in _sources(stages)),
        techniques=techniques(stages),
        networks=_networks(stages),
        recipe=recipe_text(cfg),
        started_from=_shown_name(cfg.pretrained_model_name_or_path),
        base=cfg.pretrained_model_name_or_path,  # for code, which has to find it
        evaluation=None if shown is None else markdown_table(shown),
        pictures=[] if report is None else [file for file in (SCENES_SHEET, PAIRS_SHEET) if (folder / file).is_file()],
        license=license,
        marker=CARD_MARKER,
    )
    card.save(card_file)
    return card_file


def _stored_class(folder: Path) -> str:
    return json.loads((folder / "model_index.json").read_text())["_class_name"]


def _stored_weights(folder: Path) -> str:
    """The files of a pipeline or an adapter, and the types in them: "11.3 MB of safetensors, bf16"."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("[!.]*/*.safetensors")])
    found = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    types = {"F32": "float32", "BF16": "bf16", "F16": "float16"}
    size = sum(file.stat().st_size for file in files) / 1e6
    return f"{size:.1f} MB of safetensors, {' and '.join(sorted(types.get(name, name) for name in found))}"


def read_card_choices(folder: Path) -> dict[str, str | None]:
    """What a user may have said of a card that is there, as arguments of `write_card`: `load_from` and `license`."""
    if not is_ours(folder / CARD_FILE):
        return {"load_from": None, "license": None}
    card = ModelCard.load(folder / CARD_FILE)
    loaded = ADAPTER_LOADED_FROM.search(card.text) or LOADED_FROM.search(card.text)
    return {"load_from": loaded[0] if loaded else None, "license": card.data.license}


def copy_card(folder: Path, output_dir: Path) -> Path:
    """Copy a card with the files that it shows, for a model whose weights stay where they are. Returns the copy.

    Raises:
        ValueError: if somebody's own card is there.
    """
    target = output_dir / CARD_FILE
    _require_ours(target)
    for file in (CARD_FILE, *linked_files(ModelCard.load(folder / CARD_FILE))):
        (output_dir / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, output_dir / file)
    return target


def _require_ours(card: Path) -> None:
    if card.is_file() and not is_ours(card):
        raise ValueError(f"{card} is not as we wrote it; it stays. Move it away to have one written.")


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of the last evaluation in a folder, or None where there was none.

    Raises:
        ValueError: if it is of other weights than those in the folder.
    """
    if not (folder / REPORT_JSON).is_file():
        return None
    report = json.loads((folder / REPORT_JSON).read_text())
    made = report["evaluation"]
    pipeline = load_pipeline(str(folder), None, made["stock"], made["dtype"])
    if pipeline_fingerprint(pipeline) != made["drawn"]["pipeline_fingerprint"]:
        raise ValueError(
            f"{folder / REPORT_JSON} is of other weights than those that are in {folder} now: run "
            "training/evaluate_prx.py again, or remove it."
        )
    return report


def write_widget_pictures(folder: Path, step: int, count: int) -> None:
    """Cut the sheet of the run's last validation into one picture per prompt, for the card.

    Args:
        folder: of the run.
        step: the last one; without a sheet of it nothing is done.
        count: prompts.
    """
    sheet = validation_sheet(folder, step)
    if not count or not sheet.is_file():
        return
    (folder / PICTURES).mkdir(exist_ok=True)
    with PIL.Image.open(sheet) as grid:
        for place, picture in enumerate(pictures_of_grid(grid, count)):
            picture.save(folder / PICTURES / f"{place}.png")


def validation_sheet(folder: Path, step: int) -> Path:
    """The pictures of the validation at a step of the run in a folder, one for each prompt."""
    return folder / "validation" / f"step-{step:07d}.png"


def begun_stages(cfg: TrainingConfig, step: int) -> list[TrainingConfig]:
    """The settings of the stages of a run that had begun by a step, the first in any case."""
    begun: list[TrainingConfig] = []
    first_step = 0
    for stage in cfg.stage_configs():
        if begun and first_step >= step:
            break
        begun.append(stage)
        first_step += stage.max_train_steps
    return begun


def evaluation_results(report: dict[str, Any]) -> list[EvalResult]:
    """The scores of a report as the Hub's metadata; settings that change them go into their `args`.

    Args:
        report: see `evaluation.evaluate.Evaluation`, with names as they may be published.
    """
    made = report["evaluation"]
    drawn = made["drawn"]
    sampling = {key: drawn[key] for key in ("resolution", "num_inference_steps", "guidance_scale", "seed")}
    results = []
    if "scene_accuracy" in report:
        for name, split in (("scene_accuracy", "heldout"), ("scene_accuracy_novel", "novel")):
            results.append(
                EvalResult(
                    task_type="text-to-image",
                    dataset_type="diffusers-prx-scenes",
                    dataset_name="Captioned scenes of diffusers-prx",
                    dataset_config=made["level"],
                    dataset_split=split,
                    metric_type=name,
                    metric_name="share of prompts of which everything was drawn right",
                    metric_value=report[name],
                    metric_args={**sampling, "num_prompts": made["num_prompts"], "caption": made["caption"]},
                )
            )
    for name, found in report.get("metrics", {}).items():
        settings = {**sampling, "num_images": found["num_images"], "encoder": found["encoder"]["source"]}
        settings |= {"num_reference": found["num_reference"]} if "num_reference" in found else {}
        settings |= {"compat": made["compat"]} if made["compat"] is not None else {}
        for label, key in ((name, "value"), (f"{name}, unbiased", "unbiased_value")):
            if key in found:
                results.append(
                    EvalResult(
                        task_type="text-to-image",
                        dataset_type=_dataset_type(report["reference"]["name"]),
                        dataset_name=report["reference"]["name"],
                        dataset_split="heldout" if made["reference"] == SCENES else made["reference_split"],
                        metric_type=found["metric"].partition(":")[0],
                        metric_name=label,
                        metric_value=found[key],
                        metric_args=settings,
                    )
                )
    return results


def without_folders(report: dict[str, Any]) -> dict[str, Any]:
    """A report that names of folders of this machine the last part only."""
    report = copy.deepcopy(report)
    report["evaluation"]["model"] = _shown_name(report["evaluation"]["model"])
    if "reference" in report:
        report["reference"]["name"] = _shown_name(report["reference"]["name"])
    for found in report.get("metrics", {}).values():
        found["metric"] = ":".join(str(_shown_name(part)) for part in found["metric"].split(":", 1))
        found["encoder"]["source"] = _shown_name(found["encoder"]["source"])
    return report


def techniques(stages: list[TrainingConfig]) -> list[str]:
    """What a run did besides the plain step, with papers, and in which stages."""
    found: dict[str, list[int]] = {}
    for number, cfg in enumerate(stages):
        for technique in _techniques_of(cfg):
            found.setdefault(technique, []).append(number)
    return [
        text if len(numbers) == len(stages) else f"{text}, in stage {' and '.join(map(str, numbers))}"
        for text, numbers in found.items()
    ]


def _techniques_of(cfg: TrainingConfig) -> list[str]:
    sprint = cfg.transformer_config.get("fusion_range") is not None
    route = "SPRINT (arXiv 2510.21986)" if sprint else "TREAD (arXiv 2501.04765)"
    start, stop = cfg.route_range
    repa = "iREPA (arXiv 2512.10794)" if cfg.repa_spatial_gamma is not None else "REPA (arXiv 2410.06940)"
    until = "" if cfg.repa_until_step is None else f", until step {cfg.repa_until_step}"
    named = (
        (cfg.prediction_type == "x_prediction", "the network predicts the clean image (arXiv 2511.13720)"),
        (cfg.route_ratio, f"{route}: {cfg.route_ratio:.0%} of the tokens around blocks [{start}, {stop})"),
        (cfg.repa_weight, f"{repa}: weight {cfg.repa_weight}, block {cfg.repa_block}{until}, with "
            f"`{_shown_name(cfg.repa_teacher)}`"),
        (cfg.contrastive_weight, f"contrastive flow matching (arXiv 2506.05350): weight {cfg.contrastive_weight}"),
        (cfg.lpips_weight, f"LPIPS (arXiv 1801.03924): weight {cfg.lpips_weight}"),
        (cfg.dino_weight, f"distance of the patches of `{_shown_name(cfg.dino_teacher)}`: weight {cfg.dino_weight}"),
        (cfg.optimizer == "muon", "Muon for the matrices (arXiv 2502.16982), AdamW for the rest"),
        (cfg.weights_dtype == "bf16", "weights stored in bf16, which loses small updates"),
    )  # fmt: skip
    return [text for used, text in named if used]


def recipe_text(cfg: TrainingConfig) -> str:
    """The settings of a run that are not the defaults, as a recipe; of folders of this machine the last part only."""
    told = {}
    surroundings = marked(TrainingConfig, RUNTIME)
    for option in dataclasses.fields(cfg):
        value = getattr(cfg, option.name)
        default = option.default_factory() if callable(option.default_factory) else option.default
        if value != default and option.name not in surroundings:
            told[option.name] = value if option.name == "validation_prompts" else _without_folders(value)
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=110).strip()


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return _shown_name(value) if isinstance(value, str) else value


def linked_files(card: ModelCard) -> list[str]:
    """The files of its own repository that a card shows or names."""
    widget = [example["output"]["url"] for example in card.data.get("widget") or [] if "output" in example]
    return list(dict.fromkeys([*LINK.findall(FENCED.sub("", card.text)), *widget]))


def _widget(folder: Path, place: int, prompt: str) -> dict[str, Any]:
    """An example on the model's page; with its picture, where there is one."""
    file = f"{PICTURES}/{place}.png"
    return {"text": prompt} | ({"output": {"url": file}} if (folder / file).is_file() else {})


def _stage_facts(stages: list[TrainingConfig], steps: int, processes: int) -> list[dict[str, Any]]:
    """A row for each stage, of the steps that were made."""
    facts: list[dict[str, Any]] = []
    for stage in stages:
        made = min(stage.max_train_steps, steps)
        steps -= made
        row = {
            "steps": made,
            "resolution": stage.resolution,
            "batch": stage.train_batch_size * stage.gradient_accumulation_steps * processes,
            "data": ", ".join(_data_facts(source, stage) for source in sources_of(stage)),
            "learning_rate": stage.learning_rate,
        }
        facts.append(row)
    return facts


def _data_facts(source: Any, cfg: TrainingConfig) -> str:
    """A source of data in a few words."""
    share = "" if source.weight is None else f", weight {source.weight:g}"
    if source.is_drawn:
        shares = [f"{name} ({weight:g})" for name, weight in (cfg.caption_weights or {}).items()]
        captions = " and ".join(shares) or cfg.scenes_caption
        kind = f"level {cfg.scenes_level}" if source.name == SCENES else f"from `{_shown_name(cfg.emoji_dir)}`"
        return f"`{source.name}` (drawn by diffusers-prx, {kind}, {captions} captions{share})"
    return f"`{_shown_name(source.name)}` (split {source.split}{share})"


def _sources(stages: list[TrainingConfig]) -> list[str]:
    return [source.name for stage in stages for source in sources_of(stage)]


def _is_all_ours(stages: list[TrainingConfig]) -> bool:
    """Whether the weights come from nothing but the drawings of this package."""
    return not _networks(stages) and all(name == SCENES for name in _sources(stages))


def _networks(stages: list[TrainingConfig]) -> list[tuple[str, str]]:
    """The networks of others that a run started from, used or learnt from: (what for, name)."""
    roles = (
        ("started from", "pretrained_model_name_or_path"),
        ("text encoder", "text_encoder_name_or_path"),
        ("autoencoder", "vae_name_or_path"),
        ("teacher of the alignment", "repa_teacher"),
        ("network of a loss", "dino_teacher"),
    )
    named = [(role, _shown_name(getattr(cfg, field))) for cfg in stages for role, field in roles]
    named += [("network of a loss", "LPIPS with VGG-16") for cfg in stages if cfg.lpips_weight]
    return list(dict.fromkeys((role, name) for role, name in named if name is not None))


def _shown_name(name: str | None) -> str | None:
    """A name as it may be published: of a folder or file of this machine the last part only."""
    if name is None or not (os.path.isabs(name) or os.path.exists(name)):
        return name
    return Path(name).name


def _dataset_type(name: str) -> str:
    """A name as the Hub's metadata take it for a data set."""
    return name if hub_id(name) else re.sub(r"[^\w.-]+", "-", name).strip("-")
