"""Export of a run: pipeline or adapter, model card, loss plot, and the record of the run."""

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import torch

from ..config.training_config import TrainingConfig
from ..files import write_json
from ..hub.cards import REPORT_FILE, WIDGET_FOLDER, begun_stages, validation_sheet, write_card
from ..hub.publishing import CARD_FILE, is_generated
from ..techniques.lora import save_adapter
from ..techniques.optimizers import trainable_parameters
from .checkpoints import TOKENIZER_FILE, RunState, fill_in_defaults, find_damage, read_run_file, read_tensors
from .networks import Nets, build_nets, network_identities, restore_tokenizer


def commit_of_this_package() -> str | None:
    """Return the git commit of the package, with `-dirty` for changed files; None for an installed wheel."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails for a wheel inside another repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def session(step: int) -> dict[str, Any]:
    """Describe a start of the run: step, commit and library versions."""
    libraries = ("torch", "diffusers", "transformers", "accelerate")
    return {
        "from_step": step,
        "commit": commit_of_this_package(),
        "versions": {name: version(name) for name in libraries},
    }


def run_record(cfg: TrainingConfig, state: RunState, nets: Nets, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run: settings, versions, counts and histories.

    Args:
        cfg: configuration of the run.
        state: state of the run.
        nets: networks of the run.
        machine: "processes", "sharded_over" and "device".
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
    """Write the record of the run to training.json."""
    record = run_record(cfg, state, nets, machine)
    write_json(Path(cfg.output_dir) / REPORT_FILE, record)
    return record


# what shows the progress of each objective
MAIN_CURVES = ("flow", "guidance_distillation", "mean_velocity", "generator", "dpo", "reward")


def plot_loss(state: RunState, path: Path) -> None:
    """Plot the main loss of each objective, or the reward, and the validation loss, over the steps.

    Margins are fixed and numbers are plain text: to fit the margins to typeset numbers would take four times as long.
    """
    curves = {name: [entry for entry in state.history if f"loss/{name}" in entry] for name in MAIN_CURVES}
    shown = {name: entries for name, entries in curves.items() if entries}
    scale = "linear" if "reward" in shown else "symlog" if "generator" in shown else "log"
    figure = matplotlib.figure.Figure(figsize=(7, 4))
    figure.subplots_adjust(left=0.12, right=0.98, bottom=0.12, top=0.97)
    axes = figure.add_subplot(xlabel="optimizer step", yscale=scale)
    axes.set_ylabel("loss and reward" if "reward" in shown else "loss")
    if scale == "log":
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    for name, entries in shown.items():
        values = [entry[f"loss/{name}"] for entry in entries]
        axes.plot([entry["step"] for entry in entries], values, lw=1, label=f"training, {name.replace('_', ' ')}")
    if validated := [entry for entry in state.validation_history if "validation/loss" in entry]:
        steps = [entry["step"] for entry in validated]
        axes.plot(steps, [entry["validation/loss"] for entry in validated], "o-", label="validation")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def last_stage(cfg: TrainingConfig, state: RunState) -> TrainingConfig:
    """Return the configuration of the last stage that has begun."""
    return begun_stages(cfg, state.step)[-1]


def export_run(
    cfg: TrainingConfig,
    state: RunState,
    nets: Nets,
    machine: dict[str, Any],
    card_template: Path,
    repo_id: str | None = None,
) -> None:
    """Save the pipeline or the adapter, the record, the loss plot and the model card to `output_dir`.

    Args:
        cfg: configuration of the run.
        state: state of the run.
        nets: networks of the run.
        machine: see `run_record`.
        card_template: template of the model card.
        repo_id: repository that the card's code loads from; None: `output_dir`.
    """
    output_dir = Path(cfg.output_dir)
    stage = last_stage(cfg, state)
    pipeline = nets.pipeline(stage)
    if cfg.lora_rank is None:
        pipeline.save_pretrained(output_dir)
    else:
        save_adapter(cfg, nets.transformer, output_dir)
    write_record(cfg, state, nets, machine)
    plot_loss(state, output_dir / "loss_curve.png")
    shutil.rmtree(output_dir / WIDGET_FOLDER, ignore_errors=True)  # from an earlier export
    card = output_dir / CARD_FILE
    if card.is_file() and not is_generated(card):
        print(f"{card} was edited and is not replaced")
    else:
        write_card(output_dir, card_template, load_from=repo_id or cfg.output_dir)


def _check_unchanged(checkpoint: Path, state: RunState, networks: dict[str, Any]) -> None:
    """Raise a ValueError if networks that the run loads have changed since its training."""
    for name in ("tokenizer", "transformer", "frozen_networks", "adapter", "adapted_weights"):
        before, now = state.networks.get(name), networks.get(name)
        if before != now:
            raise ValueError(
                f"`checkpoint` {checkpoint} was trained with `{name}` {before}, but the settings now load {now}: "
                "restore the original files."
            )


def export_checkpoint(
    checkpoint: Path,
    output_dir: Path,
    average: bool | None,
    card_template: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Export a checkpoint as a pipeline or an adapter, on one process.

    The number of processes and the sharding of the run do not matter, and the data is not needed. The networks that
    the run started from must be available.

    Args:
        checkpoint: folder of a complete checkpoint.
        output_dir: folder for the result.
        average: True for the averaged weights, False for the trained ones, None for averages if there are any.
        card_template: template of the model card.
        dtype: data type of the weights in the files; bfloat16 halves them, but is not for further training.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, it has no averages, or a frozen network has changed.

    Example:
        >>> export_checkpoint(Path("outputs/run/checkpoint-1000"), Path("outputs/run-1000"), None, template)
    """
    damage = find_damage(checkpoint)
    if damage is not None:
        raise ValueError(
            f"`checkpoint` is {str(checkpoint)!r}, which is not a complete checkpoint: {damage}. Pass another one."
        )
    saved = read_run_file(checkpoint)
    state = RunState(**fill_in_defaults(saved["state"]))
    cfg = TrainingConfig(**state.settings | {"output_dir": str(output_dir)})
    if average and not cfg.use_ema:
        raise ValueError(
            f"`weights` is average, but {checkpoint} has none, because `use_ema` was off: pass `--weights trained`."
        )
    kind = "weights" if average is False or not cfg.use_ema else "average"
    tokenizer = None
    if cfg.text_encoder_config:
        text = (checkpoint / TOKENIZER_FILE).read_text(encoding="utf-8")
        tokenizer = restore_tokenizer(text, cfg.max_sequence_length)
    nets = build_nets(cfg, techniques=False, trained_tokenizer=tokenizer)
    _check_unchanged(checkpoint, state, network_identities(cfg, nets, None))
    nets.apply_stage(last_stage(cfg, state))
    parameters = {
        f"{kind}.{name}.{key}": parameter.data
        for name, module in nets.trainable(cfg).items()
        for key, parameter in trainable_parameters(module.eval()).items()
    }
    read_tensors(checkpoint, parameters)
    for module in (nets.transformer, nets.text_encoder, *([] if nets.vae is None else [nets.vae])):
        # not `ModelMixin.to`, which warns about modules kept in float32; PRX has none
        torch.nn.Module.to(module, dtype)
    images = validation_sheet(checkpoint.parent, state.step).with_suffix("")
    if images.is_dir():  # the card shows them
        shutil.copytree(images, validation_sheet(output_dir, state.step).with_suffix(""), dirs_exist_ok=True)
    export_run(cfg, state, nets, saved["machine"], card_template)
