"""What a finished run leaves behind: the pipeline, its model card, the loss plot, the record of the run."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import matplotlib.figure
import PIL.Image
from accelerate import Accelerator
from huggingface_hub import ModelCard, ModelCardData

from .checkpoints import RunState
from .config import TrainingConfig, sources_of
from .nets import Nets

REPORT_FILE = "training.json"


def commit_of_this_package() -> str | None:
    """The git commit that the package runs from, `-dirty` where files differ from it; None for an installed wheel."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a wheel inside the repository of something else
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def run_record(cfg: TrainingConfig, state: RunState, nets: Nets, accelerator: Accelerator) -> dict[str, Any]:
    """Everything needed to know what was run: settings, versions, counts and the loss history."""
    libraries = ("torch", "diffusers", "transformers", "accelerate")
    return {
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "seconds_waiting_for_data": round(state.seconds_waiting, 1),
        "parameters": sum(p.numel() for p in nets.transformer.parameters()),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "samples_read": state.samples_read,
        "unreadable": state.unreadable,
        "unfit": state.unfit,
        "upscaled": state.upscaled,
        "truncated_captions": state.truncated,
        "commit": commit_of_this_package(),
        "versions": {name: version(name) for name in libraries},
        "config": cfg.to_dict(),
        "history": state.history,
        "validation_history": state.validation_history,
        "alignment_history": state.alignment_history,
    }


def write_record(cfg: TrainingConfig, state: RunState, nets: Nets, accelerator: Accelerator) -> dict[str, Any]:
    """Write `run_record` to training.json: at the start, and again whenever there is more to tell."""
    record = run_record(cfg, state, nets, accelerator)
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(cfg.output_dir) / REPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")
    return record


def plot_loss(state: RunState, path: Path) -> None:
    """The training loss, and the validation loss where there is one, over the steps."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="flow-matching loss", yscale="log")
    axes.plot([e["step"] for e in state.history], [e["loss/flow"] for e in state.history], lw=1, label="training")
    if state.validation_history:
        steps = [entry["step"] for entry in state.validation_history]
        axes.plot(steps, [entry["validation/loss"] for entry in state.validation_history], "o-", label="validation")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def image_grid(images: list[PIL.Image.Image]) -> PIL.Image.Image:
    """Pictures of one size in rows of eight."""
    width, height = images[0].size
    columns = min(8, len(images))
    grid = PIL.Image.new("RGB", (width * columns, height * -(-len(images) // columns)))
    for place, image in enumerate(images):
        grid.paste(image, (place % columns * width, place // columns * height))
    return grid


def write_model_card(
    cfg: TrainingConfig, record: dict[str, Any], pipeline_class: str, template: Path, repo_id: str | None
) -> None:
    """Fill in the model card's template with what was run; of folders of this machine it names the last part only."""
    names = [Path(name).name if Path(name).exists() else name for name in (s.name for s in sources_of(cfg))]
    base = cfg.pretrained_model_name_or_path
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["prx", "text-to-image", "diffusers", "flow-matching"],
        base_model=None if base is None or Path(base).exists() else base,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(template),
        name=Path(cfg.output_dir).name,
        load_from=repo_id or cfg.output_dir,
        pipeline_class=pipeline_class,
        dataset=", ".join(names),
        record=record,
        config=cfg.stage_configs()[-1].to_dict(),
        prompt=(cfg.validation_prompts or [""])[0],
    )
    card.save(Path(cfg.output_dir) / "README.md")


def export_run(
    cfg: TrainingConfig, state: RunState, nets: Nets, accelerator: Accelerator, card_template: Path,
    repo_id: str | None,
) -> None:  # fmt: skip
    """Save the pipeline and everything beside it to `output_dir`; the main process calls this once, at the end."""
    output_dir = Path(cfg.output_dir)
    pipeline = nets.pipeline(cfg.stage_configs()[-1])
    pipeline.save_pretrained(output_dir)
    record = write_record(cfg, state, nets, accelerator)
    plot_loss(state, output_dir / "loss_curve.png")
    write_model_card(cfg, record, type(pipeline).__name__, card_template, repo_id)


def hub_repository(cfg: TrainingConfig) -> str:
    """Create (or find) the repository to upload to, at the start of a run: a wrong token must not cost a training."""
    return huggingface_hub.create_repo(cfg.hub_model_id or Path(cfg.output_dir).name, exist_ok=True).repo_id


def push_to_hub(cfg: TrainingConfig, repo_id: str) -> None:
    """Upload what `export_run` wrote, without checkpoints and logs."""
    huggingface_hub.upload_folder(
        repo_id=repo_id,
        folder_path=cfg.output_dir,
        commit_message="End of training",
        ignore_patterns=["checkpoint-*", "logs/*", "validation/*"],
    )
