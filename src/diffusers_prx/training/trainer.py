"""The training loop over stages and steps. `step.py` computes the losses of a step."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import nullcontext
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..compat import allow_compiled_variants
from ..config.training_config import TrainingConfig
from ..techniques.alignment import gradient_cosine
from ..techniques.optimizers import build_lr_scheduler
from .bookkeeping import finish, log, record_non_finite_step, save, stop_for_signal, validate
from .distill_step import distill_step
from .distributed import clip_gradients
from .export import write_record
from .lost_workers import batches_despite_lost_workers
from .preference_step import preference_step
from .reward_step import reward_step
from .rng import StepRandom
from .run import Run
from .stages import Stage
from .step import StepOutput, train_step
from .watchdog import GRACE_SECONDS, PREEMPTED_FILE

# Routing costs quality below about this number of image tokens. PRX study: FID 18.20 without routing, 21.61 with TREAD
# and 22.56 with SPRINT at 256 tokens; 17.42, 14.10 and 16.90 at 1,024 tokens.
MIN_TOKENS_FOR_ROUTING = 512
# A block is compiled with and without gradients, a mask, padding to even lengths and, where an adapter's base is the
# teacher, the adapter. dynamo's limit is 8.
COMPILED_VARIANTS = 64
# Loggers whose messages are printed above the progress bar; the libraries have their own handlers.
LOGGERS = [logging.getLogger(name) for name in ("", "diffusers", "transformers", "datasets", "huggingface_hub")]


def train(run: Run) -> None:
    """Train all stages, validate and export, then release the lock on the output folder.

    Raises:
        ValueError: too much data cannot be read, or a loss is not finite.
        OSError: a checkpoint cannot be written.
        SystemExit: with `EXIT_PREEMPTED` after a stop signal, once the checkpoint is complete; with
            `EXIT_NOT_UPLOADED` if the upload of the saved result failed.

    Example:
        >>> train(set_up_run(cfg, Path("model_cards/template.md")))
    """
    try:
        bar = tqdm(
            total=run.stages[-1].stop_step,
            initial=run.state.step,
            disable=not run.accelerator.is_local_main_process,
            unit="step",
        )
        variants = allow_compiled_variants(COMPILED_VARIANTS) if run.cfg.compile else nullcontext()
        with bar as progress, logging_redirect_tqdm(LOGGERS), run.watchdog, variants:
            run.tracking.start(run.cfg)
            if run.accelerator.is_main_process:
                (run.output_dir / PREEMPTED_FILE).unlink(missing_ok=True)
                write_record(run.cfg, run.state, run.nets, run.machine)
            for stage in run.stages:
                # a finished run that is resumed only validates and exports its last stage again
                is_unvalidated = run.state.step == stage.stop_step and run.validation_is_due(stage)
                if run.state.step < stage.stop_step or is_unvalidated or stage is run.stages[-1]:
                    train_stage(run, stage, progress)
            run.writer.wait()
        finish(run)
    finally:  # after the last checkpoint, unless its thread waits for processes that ended
        wait([run.writer.thread.submit(run.unlock)], timeout=GRACE_SECONDS)


def train_stage(run: Run, stage: Stage, progress: tqdm) -> None:
    """Run the remaining optimizer steps of a stage."""
    cfg, accelerator, state = stage.cfg, run.accelerator, run.state
    lr_scheduler = enter_stage(run, stage)
    losses_to_log: list[dict[str, torch.Tensor]] = []
    outputs: list[tuple[dict[str, Any], StepOutput]] = []
    started = time.perf_counter()
    run.watchdog.begin_step()
    if run.validation_is_due(stage):
        validate(run, stage)
    batches = batches_despite_lost_workers(
        stage, state.step, accelerator.process_index, accelerator.num_processes, accelerator.device, run.counts
    )
    for batch in measure_waiting(batches, run):
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
        lr = float(lr_scheduler.get_last_lr()[0])
        progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", refresh=False)  # drawn by update, ten times a second
        progress.update()
        last = state.step == stage.stop_step
        if state.step % cfg.logging_steps == 0 or last:
            log(run, losses_to_log, grad_norm, lr)
            losses_to_log = []
        if run.stop_signal:
            save(run, stage)
            stop_for_signal(run)
        if run.validation_is_due(stage):
            run.watchdog.begin_step()
            validate(run, stage)
        if state.step % cfg.checkpointing_steps == 0 or last:
            save(run, stage)
        started = time.perf_counter()
        run.watchdog.begin_step()


def enter_stage(run: Run, stage: Stage) -> LRScheduler:
    """Apply the settings of a stage, and return its learning-rate schedule."""
    cfg = stage.cfg
    run.accelerator.gradient_accumulation_steps = cfg.gradient_accumulation_steps
    run.accelerator.step = 0  # counts micro-batches
    run.nets.apply_stage(cfg)
    run.release_teacher()
    if run.has_derived_reference(stage) and run.state.step == stage.first_step:
        run.renew_reference()
    tokens = (cfg.resolution // run.nets.pixels_per_token) ** 2
    if len(run.stages) > 1:
        number = [other is stage for other in run.stages].index(True)
        run.print(f"stage {number}: steps {stage.first_step} to {stage.stop_step}, {cfg.resolution} pixels")
    if cfg.route_ratio and tokens < MIN_TOKENS_FOR_ROUTING:
        run.print(
            f"`route_ratio` is {cfg.route_ratio} with {tokens} image tokens: in the PRX study, routing lowers the "
            f"quality below about {MIN_TOKENS_FOR_ROUTING} tokens (FID 18.2 became 21.6 and 22.6 at 256 tokens) and "
            "improves it at 1,024."
        )
    # not prepared by accelerate, which would step it once per process
    return build_lr_scheduler(cfg, run.optimizer.optimizer, run.state.step - stage.first_step)


def measure_waiting(batches: Iterator[dict[str, Any]], run: Run) -> Iterator[dict[str, Any]]:
    """Yield the batches, and add the time of waiting for them to the state."""
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        run.state.seconds_waiting += time.perf_counter() - asked
        yield batch


def micro_step(run: Run, stage: Stage, batch: dict[str, Any]) -> StepOutput:
    """Compute the losses and gradients of one micro-batch."""
    cfg, accelerator, step = stage.cfg, run.accelerator, run.state.step
    rng = StepRandom(cfg.seed, step, batch["sample_index"], accelerator.device)
    nets = run.nets.for_losses(cfg, cfg.repa_weight > 0 and run.burn_in.active(step))
    with accelerator.accumulate(run.model):
        with accelerator.autocast():
            output: StepOutput = run.model(step_function(cfg), batch, nets, cfg, rng)
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


def step_function(cfg: TrainingConfig) -> Callable[..., StepOutput]:
    """Return the step that a stage makes."""
    steps = {"flow": train_step, "dpo": preference_step, "nft": reward_step}
    return steps.get(cfg.objective, distill_step)


def check_alignment(run: Run, stage: Stage, output: StepOutput) -> None:
    """Measure the cosine between the gradients of alignment and flow-matching loss at the aligned block, and end the
    alignment if they oppose each other."""
    accelerator, step = run.accelerator, run.state.step
    block = run.nets.transformer.blocks[stage.cfg.repa_block]
    weights = [weight for weight in block.parameters() if weight.requires_grad]
    cosine = gradient_cosine(output.losses["flow"], output.losses["alignment"], weights)
    cosine = float(accelerator.reduce(torch.tensor(cosine, device=accelerator.device), "mean"))
    if not math.isfinite(cosine):
        return  # the step will be skipped or stop the run
    run.burn_in.observe(step, cosine)
    run.state.alignment_history.append({"step": step, "cosine": cosine})
    run.tracking.log({"alignment/gradient_cosine": cosine}, step)
    if run.burn_in.ended_at is not None:
        run.print(f"alignment ends at step {run.burn_in.ended_at}: its gradient opposes the main loss")


def optimizer_step(
    run: Run, stage: Stage, lr_scheduler: LRScheduler, outputs: list[tuple[dict[str, Any], StepOutput]]
) -> tuple[torch.Tensor | None, float]:
    """Clip gradients, update weights and averages, and advance the learning rate.

    Returns:
        Norm of the gradients, None if the step is skipped because it or a loss is not finite; and the first loss of
        this process: that of flow matching, or of the objective.
    """
    cfg = stage.cfg
    grad_norm = clip_gradients(run.accelerator, run.parameters, cfg.max_grad_norm)
    loss = torch.stack([output.loss for _, output in outputs]).sum()
    first = torch.stack([next(iter(output.losses.values())) for _, output in outputs]).mean()
    total, first_loss = torch.stack([loss + grad_norm, first]).tolist()  # the only synchronization in a step
    # one message per step: any process with a non-finite loss, any with a stop signal
    broken, run.stop_signal = run.communicator.maximum([not math.isfinite(total), run.watchdog.received])
    if broken:
        record_non_finite_step(run, stage, outputs, float(grad_norm))
    else:
        run.skipped_in_a_row = 0
        run.optimizer.step()
    run.optimizer.zero_grad()
    lr_scheduler.step()  # skipped steps count too
    if broken:
        return None, first_loss
    if not run.precision_checked:  # the optimizer has state only after a step
        run.precision_checked = True
        if cfg.trains_bf16_weights:
            run.print("`weights_dtype` is bf16: small updates are lost")
        run.print(f"stored values by data type: {dict(run.check_precision())}")
    if (run.state.step + 1) % cfg.ema_update_every == 0:
        run.averages.update()
    return grad_norm, first_loss
