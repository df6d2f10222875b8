"""What a finished run leaves behind: the pipeline, its model card, the loss plot, the record of the run."""

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch

from ..config.training_config import TrainingConfig
from ..files import write_json
from ..hub.cards import REPORT_FILE, WIDGET_FOLDER, begun_stages, validation_sheet, write_card
from ..hub.publishing import CARD_FILE, is_generated
from ..techniques.lora import save_adapter
from ..techniques.optimizers import trainable_parameters
from .checkpoints import TOKENIZER_FILE, RunState, find_damage, read_run, read_tensors
from .networks import Nets, build_nets, identity, restore_tokenizer


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


def session(step: int) -> dict[str, Any]:
    """What trains from a step on."""
    libraries = ("torch", "diffusers", "transformers", "accelerate")
    return {
        "from_step": step,
        "commit": commit_of_this_package(),
        "versions": {name: version(name) for name in libraries},
    }


def run_record(cfg: TrainingConfig, state: RunState, nets: Nets, machine: dict[str, Any]) -> dict[str, Any]:
    """Everything needed to know what was run: settings, versions, counts and the loss history.

    Args:
        machine: "processes" of the run, over how many of them one copy of the weights was "sharded_over", "device".
    """
    return {
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "seconds_waiting_for_data": round(state.seconds_waiting, 1),
        "pipeline_class": "PRXPixelPipeline" if nets.vae is None else "PRXPipeline",
        "parameters": sum(p.numel() for p in nets.transformer.parameters()),
        "trained_parameters": sum(
            p.numel() for module in nets.trainable(cfg).values() for p in trainable_parameters(module).values()
        ),
        **machine,
        "samples_read": state.samples_read,
        "unreadable": state.unreadable,
        "unfit": state.unfit,
        "upscaled": state.upscaled,
        "truncated_captions": state.truncated,
        "lost_workers": state.lost_workers,
        "tracker_failures": state.tracker_failures,
        "skipped_steps": state.skipped_steps,
        "commit": state.sessions[-1]["commit"],
        "versions": state.sessions[-1]["versions"],
        "sessions": state.sessions,
        "config": cfg.to_dict(),
        "history": state.history,
        "validation_history": state.validation_history,
        "alignment_history": state.alignment_history,
    }


def write_record(cfg: TrainingConfig, state: RunState, nets: Nets, machine: dict[str, Any]) -> dict[str, Any]:
    """Write `run_record` to training.json: at the start, and again whenever there is more to tell."""
    record = run_record(cfg, state, nets, machine)
    write_json(Path(cfg.output_dir) / REPORT_FILE, record)
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


def last_stage(cfg: TrainingConfig, state: RunState) -> TrainingConfig:
    """The settings of the last stage that has begun."""
    return begun_stages(cfg, state.step)[-1]


def export_run(
    cfg: TrainingConfig, state: RunState, nets: Nets, machine: dict[str, Any], card_template: Path,
    repo_id: str | None = None,
) -> None:  # fmt: skip
    """Save the pipeline, or the adapter, and everything beside it to `output_dir`; the main process calls this once,
    at the end."""
    output_dir = Path(cfg.output_dir)
    stage = last_stage(cfg, state)
    pipeline = nets.pipeline(stage)
    if cfg.lora_rank is None:
        pipeline.save_pretrained(output_dir)
    else:
        save_adapter(cfg, nets.transformer, output_dir)
    write_record(cfg, state, nets, machine)
    plot_loss(state, output_dir / "loss_curve.png")
    shutil.rmtree(output_dir / WIDGET_FOLDER, ignore_errors=True)  # of what was there before
    card = output_dir / CARD_FILE
    if card.is_file() and not is_generated(card):
        print(f"{card} was not generated by this package, or was claimed by its user: it is kept")
    else:
        write_card(output_dir, card_template, load_from=repo_id or cfg.output_dir)


def _check_unchanged(checkpoint: Path, state: RunState, networks: dict[str, Any]) -> None:
    """Refuse networks from elsewhere that are not those that the run had."""
    for name in ("tokenizer", "transformer", "frozen_networks", "adapter", "adapted_weights"):
        before, now = state.networks.get(name), networks.get(name)
        if before != now:
            raise ValueError(
                f"`checkpoint` {checkpoint} was trained with `{name}` {before}, but the run's settings name one that "
                f"is {now} today: restore what it was."
            )


def export_checkpoint(
    checkpoint: Path,
    output_dir: Path,
    average: bool | None,
    card_template: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Make a pipeline of a checkpoint, on one process, whatever the run was on.

    Nothing is read but the checkpoint and the networks that the run started from; the data are not needed.

    Args:
        checkpoint: a complete one; of a finished run or of one that goes on.
        output_dir: of the pipeline, the record of the run until then, and the model card.
        average: the averaged weights or the trained ones; None: the averaged ones where there are any.
        card_template: of the model card.
        dtype: of the stored weights; bfloat16 halves the files, and is not to train on from.

    Raises:
        ValueError: if there is no complete checkpoint, a file of it is damaged, it has no averages, or a network that
            the run did not train is not what it was.
    """
    damage = find_damage(checkpoint)
    if damage is not None:
        raise ValueError(
            f"`checkpoint` is {str(checkpoint)!r}, which is not a complete checkpoint: {damage}. Export another one."
        )
    saved = read_run(checkpoint)
    state = RunState(**saved["state"])
    cfg = TrainingConfig(**state.settings | {"output_dir": str(output_dir)})
    if average and not cfg.use_ema:
        raise ValueError(f"`weights` is average, but the run of {checkpoint} kept none: it was without `use_ema`.")
    kind = "weights" if average is False or not cfg.use_ema else "average"
    tokenizer = None
    if cfg.text_encoder_config:
        text = (checkpoint / TOKENIZER_FILE).read_text(encoding="utf-8")
        tokenizer = restore_tokenizer(text, cfg.max_sequence_length)
    nets = build_nets(cfg, techniques=False, trained_tokenizer=tokenizer)
    _check_unchanged(checkpoint, state, identity(cfg, nets, None))
    nets.apply_stage(last_stage(cfg, state))
    parameters = {
        f"{kind}.{name}.{key}": parameter.data
        for name, module in nets.trainable(cfg).items()
        for key, parameter in trainable_parameters(module.eval()).items()
    }
    read_tensors(checkpoint, parameters)
    for module in (nets.transformer, nets.text_encoder, *([] if nets.vae is None else [nets.vae])):
        # diffusers' own `to` warns of modules that stay in float32, of which PRX has none
        torch.nn.Module.to(module, dtype)
    images = validation_sheet(checkpoint.parent, state.step).with_suffix("")
    if images.is_dir():  # the card shows them
        shutil.copytree(images, validation_sheet(output_dir, state.step).with_suffix(""), dirs_exist_ok=True)
    export_run(cfg, state, nets, saved["machine"], card_template)
