"""Work between the steps of a run: logging, validation, checkpoints, and the end of the run."""

import json
import signal
import sys
from collections import defaultdict
from dataclasses import replace
from typing import Any

import PIL.Image
import torch

from ..evaluation.evaluate import grade_exam, open_exam
from ..evaluation.generation import PictureFolder
from ..evaluation.image_grids import image_grid
from ..hub.cards import validation_sheet
from ..hub.publishing import EVALUATION_FILES, EXIT_NOT_UPLOADED, UploadError, kind_of, upload
from ..techniques.ema import TRAINING_ONLY
from .checkpoints import named_tensors, reference_tensors
from .distributed import gather_full_module
from .export import export_run, write_record
from .non_finite import MAX_SKIPPED_IN_A_ROW, describe_samples, write_non_finite_step
from .run import Run
from .stages import Stage
from .step import StepOutput
from .validation import losses_by_sample, validation_images, validation_loss
from .validation_metrics import draw_exam, metric_settings, metric_values
from .watchdog import EXIT_PREEMPTED, PREEMPTED_FILE

# Names of counters in `RunState`.
COUNTS = ("samples_read", "unreadable", "unfit", "upscaled", "truncated", "lost_workers", "tracker_failures")


def add_counts(run: Run) -> None:
    """Add the counts of all processes to the state.

    Raises:
        ValueError: more samples are unreadable than `max_corrupt_share` allows.
    """
    cfg, state = run.cfg, run.state
    counts = torch.tensor([run.counts[name] for name in COUNTS], device=run.accelerator.device)
    for name, count in zip(COUNTS, run.accelerator.reduce(counts, "sum").tolist()):
        setattr(state, name, getattr(state, name) + count)
    run.counts.clear()
    if cfg.exceeds_corrupt_share(state.unreadable, state.samples_read):
        raise ValueError(
            f"`max_corrupt_share` is {cfg.max_corrupt_share}, but {state.unreadable} of {state.samples_read} samples "
            "are unreadable: repair the data, or pass a larger share."
        )


def log(run: Run, losses: list[dict[str, torch.Tensor]], grad_norm: torch.Tensor | None, lr: float) -> None:
    """Log the mean of each loss since the last entry, over all processes."""
    accelerator, state = run.accelerator, run.state
    add_counts(run)
    values_by_name: dict[str, list[torch.Tensor]] = defaultdict(list)
    for step_losses in losses:
        for name, loss in step_losses.items():
            values_by_name[name].append(loss)
    means = {
        name: accelerator.reduce(torch.stack(values).mean(), "mean").item() for name, values in values_by_name.items()
    }
    if not means:
        return
    before = state.history[-1] if state.history else {}
    images = state.samples_read - state.unreadable - state.unfit
    entry = {
        "step": state.step,
        **{f"loss/{name}": mean for name, mean in means.items()},
        **({} if grad_norm is None else {"grad_norm": float(grad_norm)}),  # a skipped step has none
        "lr": lr,
        "images": images,
        "seconds": state.seconds,
        "images_per_second": (images - before.get("images", 0)) / (state.seconds - before.get("seconds", 0.0)),
        "waiting_share": state.seconds_waiting / state.seconds,
    }
    state.history.append(entry)
    run.tracking.log({name: value for name, value in entry.items() if name != "step"}, state.step)


def validate(run: Run, stage: Stage) -> None:
    """Compute validation loss, images and metrics on all processes, with the averaged weights if there are any."""
    cfg, accelerator, state = stage.cfg, run.accelerator, run.state
    rank, processes = accelerator.process_index, accelerator.num_processes
    run.trained.eval()
    state.validated = state.step
    found: dict[str, float] = {}
    exam, pictures = None, run.output_dir / "validation" / "pictures_of_metrics"
    with torch.random.fork_rng(devices=[]):  # libraries may use the global generator
        if run.metrics_are_due(stage):
            exam = open_exam(metric_settings(cfg), cfg.resolution, stage.held_out)
            run.remove(pictures)  # of an interrupted validation
        # `run.trained` instead of `run.model`, because DDP would prepare gradients
        with run.averages.swapped_in(), torch.no_grad(), accelerator.autocast():
            if stage.held_out is not None:
                batches = stage.held_out_batches(accelerator.device, rank, processes)
                by_sample = run.communicator.merge(run.trained(losses_by_sample, run.nets, cfg, batches))
                found = validation_loss(by_sample)
            if cfg.validation_prompts:
                images = run.communicator.merge(run.trained(validation_images, run.nets, cfg, rank, processes))
                if accelerator.is_main_process:
                    save_validation_images(run, images)
            if exam is not None:
                run.trained(draw_exam, run.nets, cfg, exam, PictureFolder(pictures), rank, processes)
        if exam is not None:
            run.communicator.gather(None)  # until all pictures are drawn
            evaluation = grade_exam(exam, PictureFolder(pictures), run.output_dir / "validation" / "references", 32, 0)
            values = None if evaluation is None else metric_values(evaluation.report)
            found |= run.communicator.gather(values)[0]
            run.remove(pictures)
    if found:
        state.validation_history.append({"step": state.step, **found})
        run.tracking.log(found, state.step)
    run.trained.train()


def save_validation_images(run: Run, images: dict[int, PIL.Image.Image]) -> None:
    """Save validation images, by the index of their prompt, one by one and as a grid."""
    sheet = validation_sheet(run.output_dir, run.state.step)
    sheet.with_suffix("").mkdir(parents=True, exist_ok=True)
    for index, image in images.items():
        image.save(sheet.with_suffix("") / f"{index}.png")
    grid = image_grid([image for _, image in sorted(images.items())])
    grid.save(sheet)
    run.tracking.image("validation/images", grid, run.state.step)


def save(run: Run, stage: Stage) -> None:
    """Save a checkpoint and the record of the run."""
    state = run.state
    add_counts(run)
    if stage.stream is not None:
        state.stream = stage.stream.record(run.communicator.gather(stage.stream_positions))
    tensors = named_tensors(run.trained, run.optimizer.optimizer, run.averages.tensors())
    if run.has_derived_reference(stage):
        tensors |= reference_tensors(run.nets.reference)
    plain = {
        "state": state.state_dict(),
        "burn_in": run.burn_in.state_dict(),
        "average_updates": run.averages.state_dict(),
        "machine": run.machine,
    }
    run.writer.save(state.step, tensors, plain)
    if run.accelerator.is_main_process:
        write_record(run.cfg, state, run.nets, run.machine)


def record_non_finite_step(
    run: Run, stage: Stage, outputs: list[tuple[dict[str, Any], StepOutput]], grad_norm: float
) -> None:
    """Record the samples of a step with a non-finite loss or gradient, and count it.

    Raises:
        ValueError: `non_finite` is stop, or there were too many such steps in a row.
    """
    cfg, state, processes = run.cfg, run.state, run.accelerator.num_processes
    batches = [(batch, output.loss_per_sample) for batch, output in outputs]
    sample_indices = [index for batch, _ in batches for index in batch["sample_index"]]
    dataset_indices = stage.dataset_indices(sample_indices, processes)
    gathered = run.communicator.gather(describe_samples(run.accelerator.process_index, batches, dataset_indices))
    path = run.output_dir / "non_finite" / f"step-{state.step:07d}.json"
    if run.accelerator.is_main_process:
        write_non_finite_step(path, state.step, grad_norm, [sample for samples in gathered for sample in samples])
    state.skipped_steps += 1
    run.skipped_in_a_row += 1
    message = f"The loss or its gradient is not finite at step {state.step} (samples: {path})"
    if cfg.non_finite == "stop" or run.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
        raise ValueError(
            f"{message}: lower `learning_rate` or `max_grad_norm`, or pass `--mixed_precision no`. "
            + ("" if cfg.non_finite == "stop" else f"There were {run.skipped_in_a_row} such steps in a row. ")
            + "The last checkpoint may be affected too."
        )
    run.print(f"{message}; the step is skipped ({state.skipped_steps} in total)")


def stop_for_signal(run: Run) -> None:
    """End the run after a stop signal, once its checkpoint is complete.

    Raises:
        SystemExit: with `EXIT_PREEMPTED`.
    """
    run.writer.wait()
    name = signal.Signals(int(run.stop_signal)).name
    run.print(f"{name} at step {run.state.step}: checkpoint saved, exit code {EXIT_PREEMPTED}")
    if run.accelerator.is_main_process:
        text = json.dumps({"signal": name, "step": run.state.step})
        (run.output_dir / PREEMPTED_FILE).write_text(text + "\n")
    run.tracking.end()
    sys.exit(EXIT_PREEMPTED)


def finish(run: Run) -> None:
    """Print the counts, export the result, and upload it.

    Raises:
        SystemExit: with `EXIT_NOT_UPLOADED` if the upload of the saved result failed.
    """
    cfg, accelerator, state = run.cfg, run.accelerator, run.state
    accelerator.print(
        f"{state.samples_read} samples read: {state.unreadable} unreadable, {state.unfit} left out because of their "
        f"size, {state.upscaled} enlarged, {state.truncated} captions truncated to {cfg.max_sequence_length} tokens"
    )
    if (cache := run.nets.teacher_cache) is not None:
        accelerator.print(
            f"teacher features of the main process: {cache.hits} read from {cache.folder}, {cache.misses} computed "
            f"({cache.corrupt} because of unreadable files)"
        )
    run.averages.copy_to_trained()
    parts = {name: gather_full_module(module) for name, module in run.modules.items() if name not in TRAINING_ONLY}
    run.nets = replace(run.nets, **parts)
    if accelerator.is_main_process:
        for module in (run.nets.transformer, run.nets.text_encoder):
            module.eval()
        export_run(cfg, state, run.nets, run.machine, run.card_template, run.repo_id)
        accelerator.print(f"saved to {cfg.output_dir}")
    run.tracking.end()
    if run.repo_id is not None:
        try:
            url = upload(run.output_dir, run.repo_id, kind_of(run.output_dir), "End of training", EVALUATION_FILES)
        except UploadError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_NOT_UPLOADED)
        print(f"uploaded to {url}")
