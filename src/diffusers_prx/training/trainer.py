"""The run: build everything, loop over its stages, watch, save. The arithmetic of a step is in `train_step.py`."""

import json
import logging
import math
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedTokenizerFast

from ..evaluation.sheets import image_grid
from .alignment import BurnIn, gradient_cosine
from .averages import Averages
from .cards import REPORT_FILE, validation_sheet
from .checkpoints import (
    TOKENIZER_FILE,
    UNFINISHED,
    CheckpointWriter,
    RunState,
    find_checkpoint,
    load_tensors,
    named_tensors,
    read_run,
    restore_generators,
)
from .config import TrainingConfig
from .distributed import (
    Exchange,
    Trained,
    distribute,
    learning,
    norm_of_clipped,
    shard_count,
    start_accelerator,
    whole_module,
)
from .export import export_run, session, write_record
from .faults import (
    EXIT_PREEMPTED,
    GRACE_SECONDS,
    PREEMPTED_FILE,
    SKIPPED_IN_A_ROW,
    FolderLock,
    Watch,
    samples_of_step,
    steady_batches,
    write_non_finite,
)
from .nets import Nets, build_nets, identity, restore_tokenizer, some_rest, train_tokenizer
from .optimizers import build_lr_scheduler, build_optimizer
from .precision import check_precision
from .precompute import open_precomputed
from .preflight import caption_figures, check_techniques, outline, report
from .publishing import EXIT_NOT_UPLOADED, OF_AN_EVALUATION, UploadError, kind_of, repository, upload
from .rng import StepRandom
from .stages import CAPTIONS_FOR_TOKENIZER, Stage, build_stages
from .tracking import Tracking
from .train_step import StepOutput, train_step
from .validation import losses_by_sample, validation_images, validation_loss

# what is counted of the data, by its name in `RunState`
COUNTS = ("samples_read", "unreadable", "unfit", "upscaled", "truncated", "lost_workers", "tracker_failures")
# fewer image tokens than this, and a route costs quality: FID 18.20 became 21.61 (TREAD) and 22.56 (SPRINT) at 256
# tokens, while at 1024 it became 14.10 and 16.90 from 17.42 (PRX study)
TOKENS_FOR_A_ROUTE = 512
# whose messages appear above the progress bar instead of inside of it; the libraries have handlers of their own
LOGGERS = [logging.getLogger(name) for name in ("", "diffusers", "transformers", "datasets", "huggingface_hub")]


class Run:
    """One training run on one process: networks, optimizer, averages and counters, and what is done with them.

    Args:
        cfg: the run's configuration.
        card_template: the model card's template, filled in at the end.

    Raises:
        ValueError: for data and networks that are missing or do not fit, and with `push_to_hub` for a token that may
            not write to the repository.
        SystemExit: with `dry_run`, once the run is printed.
    """

    def __init__(self, cfg: TrainingConfig, card_template: Path):
        self.cfg = cfg
        self.card_template = card_template
        self.output_dir = Path(cfg.output_dir)
        self.accelerator = start_accelerator(cfg)
        processes = self.accelerator.num_processes
        self.machine = {
            "processes": processes,
            "sharded_over": shard_count(cfg, processes),  # asked now, before anything is loaded
            "device": str(self.accelerator.device),
        }
        self.exchange = Exchange(self.accelerator, 2 * cfg.step_timeout_seconds)
        self.lock = None if cfg.dry_run else self._lock()
        try:
            self._build()
        except BaseException:
            self._unlock()
            raise

    def _lock(self) -> FolderLock | None:
        """Take the output folder; the main process holds it for all.

        Raises:
            ValueError: on all processes, if another run has it.
        """
        lock = failure = None
        if self.accelerator.is_main_process:
            try:
                lock = FolderLock(self.output_dir)
                for left in self.output_dir.glob(f"{REPORT_FILE}.*{UNFINISHED}"):  # by a run that was killed
                    left.unlink(missing_ok=True)
            except (ValueError, OSError) as error:
                failure = str(error)
        failure = self.exchange.gather(failure)[0]
        if failure is not None:
            raise ValueError(failure)
        return lock

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def _build(self) -> None:
        """Everything up to the first step."""
        cfg = self.cfg
        self.checkpoint = find_checkpoint(self.output_dir, cfg.resume_from_checkpoint, self.exchange)
        self.saved = None if self.checkpoint is None else read_run(self.checkpoint)
        self._plan()
        # now: neither a wrong token nor a wrong name may cost a training
        self.repo_id = repository(cfg.repo_id) if cfg.push_to_hub and self.accelerator.is_main_process else None
        set_seed(cfg.seed)  # of all global generators: nothing of ours draws from them, libraries may
        tokenizer = self._tokenizer()
        self.nets = build_nets(cfg, iter(()), teacher_width=self.teacher_width, trained_tokenizer=tokenizer)
        self.derived = {file: content for stage in self.stages for file, content in stage.derived().items()}
        if tokenizer is not None:
            self.derived[TOKENIZER_FILE] = tokenizer.backend_tokenizer.to_str().encode()
        open_precomputed(self.stages, self.nets)
        self.state = RunState(
            settings=cfg.to_dict(),
            stages=[stage.record(self.accelerator.num_processes) for stage in self.stages],
            networks=identity(cfg, self.nets, self.teacher_width),
        )
        if self.saved is not None:  # before weights are loaded: it says what does not fit
            self.state.load_state_dict(self.saved["state"])
        self.state.sessions = [*self.state.sessions, session(self.state.step)]
        self.precision_checked = False
        self.skipped_in_a_row = 0
        self.stop_signal = 0.0
        self.counts: Counter[str] = Counter()  # of this process, since they were last added to the state
        self.tracking = Tracking(self.accelerator, self.counts)
        self._prepare()

    def _plan(self) -> None:
        """Open the data and print what the run will be, before any weights are loaded."""
        cfg, accelerator = self.cfg, self.accelerator
        networks = outline(cfg)
        with accelerator.main_process_first():  # what it finds in the data and keeps, the others find there
            self.stages = build_stages(cfg, accelerator.process_index, accelerator.num_processes)
            for stage in self.stages:
                begun = self.saved is not None and stage.first_step < self.saved["state"]["step"]
                kept = self.checkpoint if begun else None
                stage.sort(networks.pixels_per_token, accelerator.num_processes, kept)
        aligned = [stage for stage in self.stages if stage.cfg.repa_weight]
        self.burn_in = new_burn_in(aligned[0].cfg) if aligned else BurnIn()
        self.teacher_width = None  # of a teacher that is not needed any more
        if self.saved is not None:
            self.burn_in.load_state_dict(self.saved["burn_in"])
            if self._alignment_is_over(self.saved["state"]["step"]):
                self.teacher_width = self.saved["state"]["networks"]["teacher_width"]
        check_techniques(cfg, self.teacher_width is None)
        if accelerator.is_main_process:
            figures = [caption_figures(cfg, stage) for stage in self.stages]
            print(report(cfg, self.stages, networks.transformer, figures, accelerator.num_processes))
            shards = self.machine["sharded_over"]
            if shards > 1:
                print(f"sharding      {cfg.sharding}: each process holds 1/{shards} of that memory")
        if cfg.dry_run:
            accelerator.print("a dry run: nothing is trained")
            accelerator.end_training()
            sys.exit(0)

    def _tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer of a new text encoder: the checkpoint's, or one that the main process trains for all."""
        cfg, text = self.cfg, None
        if not cfg.text_encoder_config:
            return None
        if self.checkpoint is not None:
            text = (self.checkpoint / TOKENIZER_FILE).read_text(encoding="utf-8")
            return restore_tokenizer(text, cfg.max_sequence_length)
        if self.accelerator.is_main_process:
            captions = self.stages[0].captions(CAPTIONS_FOR_TOKENIZER)
            trained = train_tokenizer(captions, cfg.tokenizer_vocab_size, cfg.max_sequence_length)
            text = trained.backend_tokenizer.to_str()
        return restore_tokenizer(self.exchange.gather(text)[0], cfg.max_sequence_length)

    def _prepare(self) -> None:
        """Move everything to its device, wrap what is trained, and restore the checkpoint to resume from."""
        cfg, nets, accelerator = self.cfg, self.nets, self.accelerator
        for module in (nets.transformer, nets.text_encoder, nets.vae, nets.projector):
            if module is not None:
                module.to(accelerator.device)
        for frozen in (nets.teacher, nets.lpips, nets.dino):
            if frozen is not None:
                frozen.to(accelerator.device)
        self.modules: dict[str, Any] = nets.trainable(cfg)
        if cfg.compile:
            nets.transformer.compile_repeated_blocks(fullgraph=True)
        self.trained = Trained(self.modules)
        self.model: Any = distribute(
            self.trained, cfg, accelerator, some_rest(nets, [stage.cfg for stage in self.stages])
        )
        self.parameters = list(learning(self.trained).values())
        self.optimizer: Any = accelerator.prepare(build_optimizer(cfg, self.modules))
        self.averages = Averages(self.trained, cfg)
        self._check_precision()
        self.watch = Watch(accelerator.process_index, cfg.step_timeout_seconds)
        own = Exchange(accelerator, 2 * cfg.step_timeout_seconds)
        self.writer = CheckpointWriter(self.output_dir, cfg.checkpoints_total_limit, own, self.derived)
        if self.checkpoint is not None and self.saved is not None:
            self._resume(self.checkpoint, self.saved)
        elif cfg.resume_from_checkpoint is not None:
            accelerator.print(f"no checkpoint in {self.output_dir} yet: starting at step 0")

    def _resume(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """Restore everything from a checkpoint, of any number of processes and any sharding."""
        state = self.state
        load_tensors(checkpoint, self.trained, self.optimizer.optimizer, self.averages.tensors())
        self.averages.load_state_dict(saved["average_updates"])
        if not restore_generators(checkpoint, self.accelerator.process_index):
            print(
                f"{checkpoint} was written by fewer processes: the global generators of process "
                f"{self.accelerator.process_index}, from which libraries may draw, start anew"
            )
        for stage in self.stages:
            if stage.stream is not None and stage.first_step < state.step < stage.stop_step:
                stage.places = stage.stream.restore(state.stream or {})
        self.accelerator.print(f"resumed from {checkpoint} at step {state.step}")

    def train(self) -> None:
        """Train through all stages, validate and export; then the folder is free for another run.

        Raises:
            ValueError: for data that cannot be read, and losses that are not finite.
            OSError: if a checkpoint cannot be written.
            SystemExit: with `EXIT_PREEMPTED`, once a signal has ended the run and its checkpoint is complete; with
                `EXIT_NOT_UPLOADED`, if everything is saved and its upload has failed.
        """
        try:
            self._train()
        finally:  # once the last checkpoint is written; not if its thread waits for processes that are gone
            wait([self.writer.thread.submit(self._unlock)], timeout=GRACE_SECONDS)

    def _train(self) -> None:
        bar = tqdm(
            total=self.stages[-1].stop_step,
            initial=self.state.step,
            disable=not self.accelerator.is_local_main_process,
            unit="step",
        )
        with bar as progress, logging_redirect_tqdm(LOGGERS), self.watch:
            self.tracking.start(self.cfg)
            if self.accelerator.is_main_process:
                (self.output_dir / PREEMPTED_FILE).unlink(missing_ok=True)
                write_record(self.cfg, self.state, self.nets, self.machine)
            for number, stage in enumerate(self.stages):
                # a finished run that is resumed trains nothing, but exports again what its last stage made
                at_its_end = self.state.step == stage.stop_step and self._validation_is_due(stage)
                if self.state.step < stage.stop_step or at_its_end or stage is self.stages[-1]:
                    self._enter(number, stage)
                    self._train_stage(stage, progress)
            self.writer.wait()
        self._finish()

    def _print(self, text: str) -> None:
        """Print a line once, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def _enter(self, number: int, stage: Stage) -> None:
        """Make the run that of a stage: its settings, its schedules, the networks of its losses."""
        cfg, accelerator, state = stage.cfg, self.accelerator, self.state
        self.stage = stage
        accelerator.gradient_accumulation_steps = cfg.gradient_accumulation_steps
        accelerator.step = 0  # counts micro-batches
        # stepped here, once per optimizer step: accelerate would step it once per process
        self.lr_scheduler = build_lr_scheduler(cfg, self.optimizer.optimizer, state.step - stage.first_step)
        self.nets.enter(cfg)
        self._release_teacher()
        tokens = (cfg.resolution // self.nets.pixels_per_token) ** 2
        if len(self.stages) > 1:
            self._print(f"stage {number}: steps {stage.first_step} to {stage.stop_step}, {cfg.resolution} pixels")
        if cfg.route_ratio and tokens < TOKENS_FOR_A_ROUTE:
            self._print(
                f"`route_ratio` is {cfg.route_ratio} on {tokens} image tokens: the PRX study found that routing costs "
                f"quality below about {TOKENS_FOR_A_ROUTE} tokens (FID 18.2 became 21.6 and 22.6 at 256) and gains at "
                "1024."
            )

    def _step_nets(self) -> Nets:
        """The networks that this step's losses need."""
        cfg = self.stage.cfg
        return self.nets.for_losses(cfg, cfg.repa_weight > 0 and self.burn_in.active(self.state.step))

    def _alignment_is_over(self, step: int) -> bool:
        """Whether nothing will be aligned from this step on."""
        coming = [stage for stage in self.stages if stage.stop_step > step and stage.cfg.repa_weight]
        return not coming or not self.burn_in.active(step)

    def _release_teacher(self) -> None:
        """Give up the teacher once nothing will be aligned; the DINO loss keeps its own reference."""
        if self._alignment_is_over(self.state.step):
            self.nets.teacher = None

    def _validation_is_due(self, stage: Stage) -> bool:
        """Whether this step of a stage is one to validate after, and was not yet: a signal may have come first."""
        step = self.state.step
        due = step % stage.cfg.validation_steps == 0 or step == stage.stop_step
        return due and self.state.validated < step

    def _train_stage(self, stage: Stage, progress: tqdm) -> None:
        """Every optimizer step of a stage from the current one on."""
        cfg, accelerator, state = stage.cfg, self.accelerator, self.state
        rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        since_log: list[dict[str, torch.Tensor]] = []
        of_step: list[tuple[dict[str, Any], StepOutput]] = []
        tick = time.perf_counter()
        self.watch.begin()
        if self._validation_is_due(stage):
            self._validate()
        batches = steady_batches(stage, state.step, rank, processes, device, self.counts)
        for batch in self._waiting_for(batches):
            output = self._micro_step(batch)
            of_step.append(({name: batch[name] for name in ("sample_index", "captions")}, output))
            if not accelerator.sync_gradients:
                continue
            grad_norm, loss = self._optimizer_step(of_step)
            if grad_norm is not None:
                since_log += [output.losses for _, output in of_step]
            of_step = []
            state.step += 1
            self._release_teacher()
            state.seconds += time.perf_counter() - tick
            # drawn by update, at most ten times a second
            progress.set_postfix(loss=f"{loss:.4f}", lr=f"{self.lr_scheduler.get_last_lr()[0]:.1e}", refresh=False)
            progress.update()
            last = state.step == stage.stop_step
            if state.step % cfg.logging_steps == 0 or last:
                self._log(since_log, grad_norm)
                since_log = []
            if self.stop_signal:
                self._save()
                self._leave()
            if self._validation_is_due(stage):
                self.watch.begin()
                self._validate()
            if state.step % cfg.checkpointing_steps == 0 or last:
                self._save()
            tick = time.perf_counter()
            self.watch.begin()

    def _waiting_for(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches; how long this process waits for them is added up."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.state.seconds_waiting += time.perf_counter() - asked
            yield batch

    def _save(self) -> None:
        """Save a checkpoint, and the record of the run so far."""
        cfg, accelerator, state = self.cfg, self.accelerator, self.state
        self._add_counts()
        if self.stage.stream is not None:
            state.stream = self.stage.stream.record(self.exchange.gather(self.stage.places))
        tensors = named_tensors(self.trained, self.optimizer.optimizer, self.averages.tensors())
        run = {
            "state": state.state_dict(),
            "burn_in": self.burn_in.state_dict(),
            "average_updates": self.averages.state_dict(),
            "machine": self.machine,
        }
        self.writer.save(state.step, tensors, run)
        if accelerator.is_main_process:
            write_record(cfg, state, self.nets, self.machine)

    def _micro_step(self, batch: dict[str, Any]) -> StepOutput:
        """Forward and backward of one micro-batch."""
        cfg, accelerator, state = self.stage.cfg, self.accelerator, self.state
        rng = StepRandom(cfg.seed, state.step, batch["sample_index"], accelerator.device)
        with accelerator.accumulate(self.model):
            with accelerator.autocast():
                output: StepOutput = self.model(train_step, batch, self._step_nets(), cfg, rng)
            self.counts.update(
                samples_read=len(batch["captions"]) + len(batch["unreadable"]) + batch["unfit"],
                unfit=batch["unfit"],
                unreadable=len(batch["unreadable"]),
                upscaled=batch["upscaled"],
                truncated=output.truncated,
            )
            if "alignment" in output.losses and accelerator.sync_gradients and self.burn_in.due(state.step):
                self._check_alignment(output)
            accelerator.backward(output.loss)
        losses = {name: loss.detach() for name, loss in output.losses.items()}
        return output._replace(loss=output.loss.detach(), losses=losses)

    def _optimizer_step(self, of_step: list[tuple[dict[str, Any], StepOutput]]) -> tuple[torch.Tensor | None, float]:
        """Do what follows the backward passes of a step.

        Returns:
            The norm of the gradients, None for a step that was skipped because it or a loss is not finite; and this
            process's flow-matching loss.
        """
        cfg, accelerator, state = self.stage.cfg, self.accelerator, self.state
        grad_norm = norm_of_clipped(accelerator, self.parameters, cfg.max_grad_norm)
        loss = torch.stack([output.loss for _, output in of_step]).sum()
        flow = torch.stack([output.losses["flow"] for _, output in of_step]).mean()
        total, shown = torch.stack([loss + grad_norm, flow]).tolist()  # the one wait for the device in a step
        # one question to all processes per step: whether one of them is broken, and whether one was told to stop
        finite = math.isfinite(total)
        broken, self.stop_signal = self.exchange.maximum([not finite, self.watch.received])
        if broken:
            self._not_finite(of_step, float(grad_norm))
        else:
            self.skipped_in_a_row = 0
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()  # a function of the step, skipped or not
        if broken:
            return None, shown
        if not self.precision_checked:  # now that the optimizer has its moments
            self.precision_checked = True
            if cfg.weights_dtype == "bf16" and cfg.lora_rank is None:
                self._print("`weights_dtype` is bf16: updates smaller than a weight's last digit are lost")
            self._print(f"stored values by type: {dict(self._check_precision())}")
        if (state.step + 1) % cfg.ema_update_every == 0:
            self.averages.update()
        return grad_norm, shown

    def _not_finite(self, of_step: list[tuple[dict[str, Any], StepOutput]], grad_norm: float) -> None:
        """Write down the samples of a step that is not finite; stop, or count it."""
        cfg, accelerator, state = self.cfg, self.accelerator, self.state
        batches = [(batch, output.loss_per_sample) for batch, output in of_step]
        read = [index for batch, _ in batches for index in batch["sample_index"]]
        places = self.stage.dataset_indices(read, accelerator.num_processes)
        gathered = self.exchange.gather(samples_of_step(accelerator.process_index, batches, places))
        path = self.output_dir / "non_finite" / f"step-{state.step:07d}.json"
        if accelerator.is_main_process:
            write_non_finite(path, state.step, grad_norm, [sample for samples in gathered for sample in samples])
        state.skipped_steps += 1
        self.skipped_in_a_row += 1
        told = f"The loss is not finite at step {state.step} (or its gradient; its samples are in {path})"
        if cfg.non_finite == "stop" or self.skipped_in_a_row > SKIPPED_IN_A_ROW:
            raise ValueError(
                f"{told}: lower `learning_rate` or `max_grad_norm`, or try `mixed_precision` no. "
                + ("" if cfg.non_finite == "stop" else f"These were {self.skipped_in_a_row} steps in a row. ")
                + "The weights are those before it; the last checkpoint may be affected too."
            )
        self._print(f"{told}; it is skipped, as {state.skipped_steps} until now")

    def _leave(self) -> None:
        """End the run because a signal asked for it, once its checkpoint is complete."""
        accelerator, state = self.accelerator, self.state
        self.writer.wait()
        name = signal.Signals(int(self.stop_signal)).name
        self._print(f"{name} at step {state.step}: saved, ending with exit code {EXIT_PREEMPTED}")
        if accelerator.is_main_process:
            (self.output_dir / PREEMPTED_FILE).write_text(json.dumps({"signal": name, "step": state.step}) + "\n")
        self.tracking.end()
        sys.exit(EXIT_PREEMPTED)

    def _check_alignment(self, output: StepOutput) -> None:
        """Measure whether alignment and flow still pull together, at the weights of the aligned block."""
        accelerator, step = self.accelerator, self.state.step
        block = self.nets.transformer.blocks[self.stage.cfg.repa_block]
        weights = [weight for weight in block.parameters() if weight.requires_grad]
        cosine = gradient_cosine(output.losses["flow"], output.losses["alignment"], weights)
        cosine = float(accelerator.reduce(torch.tensor(cosine, device=accelerator.device), "mean"))
        if not math.isfinite(cosine):
            return  # nor will the step be
        self.burn_in.observe(step, cosine)
        self.state.alignment_history.append({"step": step, "cosine": cosine})
        self.tracking.log({"alignment/gradient_cosine": cosine}, step)
        if self.burn_in.ended_at is not None:
            self._print(f"alignment ends at step {self.burn_in.ended_at}: its gradient opposes the flow's")

    def _check_precision(self) -> Counter[str]:
        """Stop unless everything that training changes is stored as it has to be; count it by type."""
        parameters = learning(self.trained)
        named: list[tuple[str, torch.Tensor]] = list(parameters.items())
        for name, p in parameters.items():
            named += [(f"{key} of {name}", value) for key, value in self.optimizer.state.get(p, {}).items()]
        named += [(f"average of {name}", value) for name, value in self.averages.tensors().items()]
        bf16 = self.cfg.weights_dtype == "bf16" and self.cfg.lora_rank is None  # under an adapter nothing is lost
        stored = torch.bfloat16 if bf16 else torch.float32
        return check_precision(named, stored)

    def _add_counts(self) -> None:
        """Add the counts of all processes to the state, and stop when too much of the data cannot be read."""
        cfg, state = self.cfg, self.state
        counts = torch.tensor([self.counts[name] for name in COUNTS], device=self.accelerator.device)
        for name, count in zip(COUNTS, self.accelerator.reduce(counts, "sum").tolist()):
            setattr(state, name, getattr(state, name) + count)
        self.counts.clear()
        if cfg.too_many_unreadable(state.unreadable, state.samples_read):
            raise ValueError(
                f"{state.unreadable} of {state.samples_read} samples cannot be read, more than `max_corrupt_share` "
                f"{cfg.max_corrupt_share} allows."
            )

    def _log(self, losses: list[dict[str, torch.Tensor]], grad_norm: torch.Tensor | None) -> None:
        """One entry of the log: the mean of every loss since the last one, over all processes."""
        accelerator, state = self.accelerator, self.state
        self._add_counts()
        since: dict[str, list[torch.Tensor]] = defaultdict(list)
        for step_losses in losses:
            for name, loss in step_losses.items():
                since[name].append(loss)
        means = {n: accelerator.reduce(torch.stack(values).mean(), "mean").item() for n, values in since.items()}
        if not means:
            return
        before = state.history[-1] if state.history else {}
        images = state.samples_read - state.unreadable - state.unfit
        entry = {
            "step": state.step,
            **{f"loss/{name}": mean for name, mean in means.items()},
            **({} if grad_norm is None else {"grad_norm": float(grad_norm)}),  # none of a step that was skipped
            "lr": self.lr_scheduler.get_last_lr()[0],
            "images": images,
            "seconds": state.seconds,
            "images_per_second": (images - before.get("images", 0)) / (state.seconds - before.get("seconds", 0.0)),
            "waiting_share": state.seconds_waiting / state.seconds,
        }
        state.history.append(entry)
        self.tracking.log({name: value for name, value in entry.items() if name != "step"}, state.step)

    def _validate(self) -> None:
        """Validation loss and pictures, with the averaged weights where there are any; shared out over processes."""
        cfg, accelerator, state = self.stage.cfg, self.accelerator, self.state
        rank, processes = accelerator.process_index, accelerator.num_processes
        self.trained.eval()
        state.validated = state.step
        # not through DDP, which would get ready for gradients; libraries may draw from the global generator
        with self.averages.in_place(), torch.no_grad(), torch.random.fork_rng(devices=[]), accelerator.autocast():
            if self.stage.held_out is not None:
                batches = self.stage.held_out_batches(accelerator.device, rank, processes)
                by_sample = self.exchange.merge(self.trained(losses_by_sample, self.nets, cfg, batches))
                losses = validation_loss(by_sample)
                state.validation_history.append({"step": state.step, **losses})
                self.tracking.log(losses, state.step)
            if cfg.validation_prompts:
                images = self.exchange.merge(self.trained(validation_images, self.nets, cfg, rank, processes))
                if accelerator.is_main_process:
                    self._save_images([image for _, image in sorted(images.items())])
        self.trained.train()

    def _save_images(self, images: list[PIL.Image.Image]) -> None:
        grid, sheet = image_grid(images), validation_sheet(self.output_dir, self.state.step)
        sheet.parent.mkdir(parents=True, exist_ok=True)
        grid.save(sheet)
        self.tracking.image("validation/images", grid, self.state.step)

    def _finish(self) -> None:
        """Export the pipeline with everything beside it, print what was counted, upload."""
        cfg, accelerator, state = self.cfg, self.accelerator, self.state
        accelerator.print(
            f"{state.samples_read} samples read: {state.unreadable} unreadable, {state.unfit} left out because they "
            f"did not fit their size, {state.upscaled} enlarged, {state.truncated} captions cut at "
            f"{cfg.max_sequence_length} tokens"
        )
        if (cache := self.nets.teacher_cache) is not None:
            accelerator.print(
                f"teacher features, of the main process since it started: {cache.hits} read from {cache.folder}, "
                f"{cache.misses} computed, of which {cache.corrupt} because their file could not be read"
            )
        self.averages.put_in_place()
        parts = {name: whole_module(module) for name, module in self.modules.items() if name != "projector"}
        self.nets = replace(self.nets, **parts)
        if accelerator.is_main_process:
            for module in (self.nets.transformer, self.nets.text_encoder):
                module.eval()
            export_run(cfg, state, self.nets, self.machine, self.card_template, self.repo_id)
            accelerator.print(f"saved to {cfg.output_dir}")
        self.tracking.end()
        if self.repo_id is not None:
            self._upload(self.repo_id)

    def _upload(self, repo_id: str) -> None:
        """Upload what the run has left. A failure is told with what to do, and ends with `EXIT_NOT_UPLOADED`."""
        try:
            url = upload(self.output_dir, repo_id, kind_of(self.output_dir), "End of training", OF_AN_EVALUATION)
        except UploadError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_NOT_UPLOADED)
        print(f"uploaded to {url}")


def new_burn_in(cfg: TrainingConfig) -> BurnIn:
    """When the alignment of a run ends: at a step, by the measured gradients, or never."""
    if cfg.repa_check_steps is None:
        return BurnIn(cfg.repa_until_step)
    return BurnIn(cfg.repa_until_step, cfg.repa_check_window, cfg.repa_check_steps)
