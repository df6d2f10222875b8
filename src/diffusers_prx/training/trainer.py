"""The training loop: stages, steps, and what is done between them. The arithmetic of a step is in `step.py`."""

import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..techniques.alignment import gradient_cosine
from ..techniques.optimizers import build_lr_scheduler
from .bookkeeping import finish, leave, log, note_non_finite, save, validate
from .distributed import norm_of_clipped
from .export import write_record
from .faults import GRACE_SECONDS, PREEMPTED_FILE, steady_batches
from .rng import StepRandom
from .run import Run
from .stages import Stage
from .step import StepOutput, train_step

# fewer image tokens than this, and a route costs quality: FID 18.20 became 21.61 (TREAD) and 22.56 (SPRINT) at 256
# tokens, while at 1024 it became 14.10 and 16.90 from 17.42 (PRX study)
TOKENS_FOR_A_ROUTE = 512
# whose messages appear above the progress bar instead of inside of it; the libraries have handlers of their own
LOGGERS = [logging.getLogger(name) for name in ("", "diffusers", "transformers", "datasets", "huggingface_hub")]


def train(run: Run) -> None:
    """Train through all stages, validate and export; then the output folder is free for another run.

    Raises:
        ValueError: for data that cannot be read, and losses that are not finite.
        OSError: if a checkpoint cannot be written.
        SystemExit: with `EXIT_PREEMPTED`, once a signal has ended the run and its checkpoint is complete; with
            `EXIT_NOT_UPLOADED`, if everything is saved and its upload has failed.
    """
    try:
        bar = tqdm(
            total=run.stages[-1].stop_step,
            initial=run.state.step,
            disable=not run.accelerator.is_local_main_process,
            unit="step",
        )
        with bar as progress, logging_redirect_tqdm(LOGGERS), run.watchdog:
            run.tracking.start(run.cfg)
            if run.accelerator.is_main_process:
                (run.output_dir / PREEMPTED_FILE).unlink(missing_ok=True)
                write_record(run.cfg, run.state, run.nets, run.machine)
            for stage in run.stages:
                # a finished run that is resumed trains nothing, but exports again what its last stage made
                at_its_end = run.state.step == stage.stop_step and run.validation_is_due(stage)
                if run.state.step < stage.stop_step or at_its_end or stage is run.stages[-1]:
                    train_stage(run, stage, progress)
            run.writer.wait()
        finish(run)
    finally:  # once the last checkpoint is written; not if its thread waits for processes that are gone
        wait([run.writer.thread.submit(run.unlock)], timeout=GRACE_SECONDS)


def train_stage(run: Run, stage: Stage, progress: tqdm) -> None:
    """Make every optimizer step of a stage from the current one on."""
    cfg, accelerator, state = stage.cfg, run.accelerator, run.state
    lr_scheduler = enter_stage(run, stage)
    losses_to_log: list[dict[str, torch.Tensor]] = []
    outputs: list[tuple[dict[str, Any], StepOutput]] = []
    started = time.perf_counter()
    run.watchdog.begin()
    if run.validation_is_due(stage):
        validate(run, stage)
    batches = steady_batches(
        stage, state.step, accelerator.process_index, accelerator.num_processes, accelerator.device, run.counts
    )
    for batch in timed(batches, run):
        output = micro_step(run, stage, batch)
        outputs.append(({name: batch[name] for name in ("sample_index", "captions")}, output))
        if not accelerator.sync_gradients:
            continue
        grad_norm, loss = optimizer_step(run, stage, lr_scheduler, outputs)
        if grad_norm is not None:
            losses_to_log += [output.losses for _, output in outputs]
        outputs = []
        state.step += 1
        run.release_teacher()
        state.seconds += time.perf_counter() - started
        lr = lr_scheduler.get_last_lr()[0]
        progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", refresh=False)  # drawn by update, ten times a second
        progress.update()
        last = state.step == stage.stop_step
        if state.step % cfg.logging_steps == 0 or last:
            log(run, losses_to_log, grad_norm, lr)
            losses_to_log = []
        if run.stop_signal:
            save(run, stage)
            leave(run)
        if run.validation_is_due(stage):
            run.watchdog.begin()
            validate(run, stage)
        if state.step % cfg.checkpointing_steps == 0 or last:
            save(run, stage)
        started = time.perf_counter()
        run.watchdog.begin()


def enter_stage(run: Run, stage: Stage) -> Any:
    """Take a stage's settings, schedules and networks of losses. Returns its learning-rate schedule."""
    cfg = stage.cfg
    run.accelerator.gradient_accumulation_steps = cfg.gradient_accumulation_steps
    run.accelerator.step = 0  # counts micro-batches
    run.nets.apply_stage(cfg)
    run.release_teacher()
    tokens = (cfg.resolution // run.nets.pixels_per_token) ** 2
    if len(run.stages) > 1:
        number = [other is stage for other in run.stages].index(True)
        run.print(f"stage {number}: steps {stage.first_step} to {stage.stop_step}, {cfg.resolution} pixels")
    if cfg.route_ratio and tokens < TOKENS_FOR_A_ROUTE:
        run.print(
            f"`route_ratio` is {cfg.route_ratio} on {tokens} image tokens: the PRX study found that routing costs "
            f"quality below about {TOKENS_FOR_A_ROUTE} tokens (FID 18.2 became 21.6 and 22.6 at 256) and gains at "
            "1024."
        )
    # stepped here, once per optimizer step: accelerate would step it once per process
    return build_lr_scheduler(cfg, run.optimizer.optimizer, run.state.step - stage.first_step)


def timed(batches: Iterator[dict[str, Any]], run: Run) -> Iterator[dict[str, Any]]:
    """Yield the batches and add up how long this process waits for them."""
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        run.state.seconds_waiting += time.perf_counter() - asked
        yield batch


def micro_step(run: Run, stage: Stage, batch: dict[str, Any]) -> StepOutput:
    """Do forward and backward of one micro-batch."""
    cfg, accelerator, step = stage.cfg, run.accelerator, run.state.step
    rng = StepRandom(cfg.seed, step, batch["sample_index"], accelerator.device)
    nets = run.nets.for_losses(cfg, cfg.repa_weight > 0 and run.burn_in.active(step))
    with accelerator.accumulate(run.model):
        with accelerator.autocast():
            output: StepOutput = run.model(train_step, batch, nets, cfg, rng)
        run.counts.update(
            samples_read=len(batch["captions"]) + len(batch["unreadable"]) + batch["unfit"],
            unfit=batch["unfit"],
            unreadable=len(batch["unreadable"]),
            upscaled=batch["upscaled"],
            truncated=output.truncated,
        )
        if "alignment" in output.losses and accelerator.sync_gradients and run.burn_in.due(step):
            check_alignment(run, stage, output)
        accelerator.backward(output.loss)
    losses = {name: loss.detach() for name, loss in output.losses.items()}
    return output._replace(loss=output.loss.detach(), losses=losses)


def check_alignment(run: Run, stage: Stage, output: StepOutput) -> None:
    """Measure the cosine between the gradients of alignment and flow at the weights of the aligned block, and end the
    alignment where the two oppose each other."""
    accelerator, step = run.accelerator, run.state.step
    block = run.nets.transformer.blocks[stage.cfg.repa_block]
    weights = [weight for weight in block.parameters() if weight.requires_grad]
    cosine = gradient_cosine(output.losses["flow"], output.losses["alignment"], weights)
    cosine = float(accelerator.reduce(torch.tensor(cosine, device=accelerator.device), "mean"))
    if not math.isfinite(cosine):
        return  # nor will the step be
    run.burn_in.observe(step, cosine)
    run.state.alignment_history.append({"step": step, "cosine": cosine})
    run.tracking.log({"alignment/gradient_cosine": cosine}, step)
    if run.burn_in.ended_at is not None:
        run.print(f"alignment ends at step {run.burn_in.ended_at}: its gradient opposes the flow's")


def optimizer_step(
    run: Run, stage: Stage, lr_scheduler: Any, outputs: list[tuple[dict[str, Any], StepOutput]]
) -> tuple[torch.Tensor | None, float]:
    """Do what follows the backward passes of a step.

    Returns:
        The norm of the gradients, None for a step that was skipped because it or a loss is not finite; and this
        process's flow-matching loss.
    """
    cfg = stage.cfg
    grad_norm = norm_of_clipped(run.accelerator, run.parameters, cfg.max_grad_norm)
    loss = torch.stack([output.loss for _, output in outputs]).sum()
    flow = torch.stack([output.losses["flow"] for _, output in outputs]).mean()
    total, shown = torch.stack([loss + grad_norm, flow]).tolist()  # the one wait for the device in a step
    # one question to all processes per step: whether one of them is broken, and whether one was told to stop
    broken, run.stop_signal = run.communicator.maximum([not math.isfinite(total), run.watchdog.received])
    if broken:
        note_non_finite(run, stage, outputs, float(grad_norm))
    else:
        run.skipped_in_a_row = 0
        run.optimizer.step()
    run.optimizer.zero_grad()
    lr_scheduler.step()  # a function of the step, skipped or not
    if broken:
        return None, shown
    if not run.precision_checked:  # now that the optimizer has its moments
        run.precision_checked = True
        if cfg.weights_dtype == "bf16" and cfg.lora_rank is None:
            run.print("`weights_dtype` is bf16: updates smaller than a weight's last digit are lost")
        run.print(f"stored values by type: {dict(run.check_precision())}")
    if (run.state.step + 1) % cfg.ema_update_every == 0:
        run.averages.update()
    return grad_norm, shown
