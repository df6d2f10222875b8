"""The run: build everything, loop over its stages, watch, save. The arithmetic of a step is in `train_step.py`."""

import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
)
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from .alignment import BurnIn, gradient_cosine
from .checkpoints import RunState, find_checkpoint, save_checkpoint
from .config import TrainingConfig
from .export import export_run, hub_repository, image_grid, push_to_hub, write_record
from .nets import Nets, build_nets
from .optimizers import build_lr_scheduler, build_optimizer
from .precision import check_precision
from .precompute import open_precomputed
from .preflight import caption_figures, outline, report
from .rng import StepRandom
from .stages import CAPTIONS_FOR_TOKENIZER, Stage, build_stages
from .train_step import StepOutput, train_step
from .validation import validation_images, validation_loss

# what is counted of the data, by its name in `RunState`
COUNTS = ("samples_read", "unreadable", "unfit", "upscaled", "truncated")
# fewer image tokens than this, and a route costs quality: FID 18.20 became 21.61 (TREAD) and 22.56 (SPRINT) at 256
# tokens, while at 1024 it became 14.10 and 16.90 from 17.42 (PRX study)
TOKENS_FOR_A_ROUTE = 512


class Run:
    """One training run on one process: networks, optimizer, averages and counters, and what is done with them.

    Args:
        cfg: the run's configuration.
        card_template: the model card's template, filled in at the end.

    Raises:
        ValueError: for data and networks that are missing or do not fit.
        SystemExit: with `dry_run`, once the run is printed.
    """

    def __init__(self, cfg: TrainingConfig, card_template: Path):
        self.cfg = cfg
        self.card_template = card_template
        self.output_dir = Path(cfg.output_dir)
        self.accelerator = Accelerator(
            # said here: of processes that torchrun starts without a GPU, each would take itself for the only one
            cpu=not torch.accelerator.is_available(),
            mixed_precision=cfg.mixed_precision,
            # as a plugin: an environment variable would silently be over the plain number
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            log_with=None if cfg.report_to == "none" else cfg.report_to,
            project_config=ProjectConfiguration(project_dir=cfg.output_dir, logging_dir=str(self.output_dir / "logs")),
        )
        if cfg.report_to != "none" and not self.accelerator.log_with:
            raise ValueError(f"`report_to` is {cfg.report_to}, which is not installed: pip install {cfg.report_to}.")
        self.checkpoint = find_checkpoint(self.output_dir, cfg.resume_from_checkpoint)
        self._plan()
        self.repo_id = hub_repository(cfg) if cfg.push_to_hub and self.accelerator.is_main_process else None
        self.nets = build_nets(cfg, self.stages[0].captions(CAPTIONS_FOR_TOKENIZER))
        open_precomputed(self.stages, self.nets)
        trained = {
            name: sum(p.numel() for p in module.parameters()) for name, module in self.nets.trainable(cfg).items()
        }
        self.state = RunState(
            settings=cfg.to_dict() | {"trained_parameters": trained},
            stages=[stage.record(self.accelerator.num_processes) for stage in self.stages],
        )
        aligned = [stage for stage in self.stages if stage.cfg.repa_weight]
        self.burn_in = new_burn_in(aligned[0].cfg) if aligned else BurnIn()
        self.precision_checked = False
        self.counts: Counter[str] = Counter()  # of this process, since they were last added to the state
        self._prepare()

    def _plan(self) -> None:
        """Open the data and print what the run will be, before any weights are loaded."""
        cfg, accelerator = self.cfg, self.accelerator
        networks = outline(cfg)
        with accelerator.main_process_first():  # what it finds in the data and keeps, the others find there
            self.stages = build_stages(cfg, accelerator.process_index, accelerator.num_processes)
            for stage in self.stages:
                stage.sort(networks.pixels_per_token, accelerator.num_processes)
        if accelerator.is_main_process:
            figures = [caption_figures(cfg, stage, networks.in_pixels) for stage in self.stages]
            print(report(cfg, self.stages, networks.transformer, figures, accelerator.num_processes))
        if cfg.dry_run:
            accelerator.print("a dry run: nothing is trained")
            accelerator.end_training()
            sys.exit(0)

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
        self.optimizer: Any = build_optimizer(cfg, self.modules)
        saved = [module for name, module in self.modules.items() if name != "projector"]  # in the pipeline
        self.averages = [
            EMAModel(module.parameters(), decay=cfg.ema_decay, foreach=True) for module in saved if cfg.use_ema
        ]
        self.optimizer = accelerator.prepare(self.optimizer)
        if nets.transformer.config["fusion_range"] and not all(stage.cfg.route_ratio for stage in self.stages):
            # without a route SPRINT's mask token is in no loss, and DDP would wait for its gradient
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.modules = {name: accelerator.prepare(module) for name, module in self.modules.items()}
        self.parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        self._check_precision()
        for piece in (self.state, *self.averages, self.burn_in):
            accelerator.register_for_checkpointing(piece)
        if self.checkpoint is not None:
            # before accelerate loads weights and optimizer, which do not say why they do not fit
            self.state.load_state_dict(torch.load(self.checkpoint / "custom_checkpoint_0.pkl"))
            accelerator.load_state(str(self.checkpoint))
            accelerator.step = 0  # counts micro-batches, of which another accumulation has another number
            for average in self.averages:
                average.to(accelerator.device)  # accelerate loads them to the CPU
            for stage in self.stages:
                if stage.stream is not None and stage.first_step < self.state.step < stage.stop_step:
                    stage.places = stage.stream.restore(self.state.stream or {})
            accelerator.print(f"resumed from {self.checkpoint} at step {self.state.step}")
        elif cfg.resume_from_checkpoint is not None:
            accelerator.print(f"no checkpoint in {self.output_dir} yet: starting at step 0")

    def train(self) -> None:
        """Train through all stages, validate and export."""
        self._start_trackers()
        with tqdm(
            total=self.stages[-1].stop_step,
            initial=self.state.step,
            disable=not self.accelerator.is_local_main_process,
            unit="step",
        ) as progress:
            for number, stage in enumerate(self.stages):
                # a finished run that is resumed validates nothing, but exports again what its last stage made
                if self.state.step < stage.stop_step or stage is self.stages[-1]:
                    self._enter(number, stage)
                    self._train_stage(stage, progress)
        self._finish()

    def _enter(self, number: int, stage: Stage) -> None:
        """Make the run that of a stage: its settings, its schedules, the networks of its losses."""
        cfg, accelerator, state = stage.cfg, self.accelerator, self.state
        self.stage = stage
        accelerator.gradient_accumulation_steps = cfg.gradient_accumulation_steps
        accelerator.step = 0  # counts micro-batches
        # stepped here, once per optimizer step: accelerate would step it once per process
        self.lr_scheduler = build_lr_scheduler(cfg, self.optimizer.optimizer, state.step - stage.first_step)
        self.nets.scheduler = self.nets.scheduler.from_config(
            self.nets.scheduler.config,
            shift=cfg.timestep_shift,
            timestep_sampling=cfg.timestep_sampling,
            uniform_fraction=cfg.uniform_fraction,
        )
        tokens = (cfg.resolution // self.nets.pixels_per_token) ** 2
        if len(self.stages) > 1:
            accelerator.print(
                f"stage {number}: steps {stage.first_step} to {stage.stop_step}, {cfg.resolution} pixels"
            )
        if cfg.route_ratio and tokens < TOKENS_FOR_A_ROUTE:
            accelerator.print(
                f"`route_ratio` is {cfg.route_ratio} on {tokens} image tokens: the PRX study found that routing costs "
                f"quality below about {TOKENS_FOR_A_ROUTE} tokens (FID 18.2 became 21.6 and 22.6 at 256) and gains at "
                "1024."
            )

    def _step_nets(self) -> Nets:
        """The networks that this step's losses need."""
        cfg, modules = self.stage.cfg, dict(self.modules)
        aligning = cfg.repa_weight > 0 and self.burn_in.active(self.state.step)
        modules["projector"] = modules.get("projector") if aligning else None
        return replace(
            self.nets,
            **modules,
            lpips=self.nets.lpips if cfg.lpips_weight else None,
            dino=self.nets.dino if cfg.dino_weight else None,
        )

    def _train_stage(self, stage: Stage, progress: tqdm) -> None:
        """Every optimizer step of a stage from the current one on."""
        cfg, accelerator, state = stage.cfg, self.accelerator, self.state
        since_log: list[dict[str, torch.Tensor]] = []
        tick = time.perf_counter()
        batches = stage.training_batches(
            state.step, accelerator.process_index, accelerator.num_processes, accelerator.device
        )
        for batch in self._waiting_for(batches):
            output, grad_norm = self._micro_step(batch)
            since_log.append({name: loss.detach() for name, loss in output.losses.items()})
            if not accelerator.sync_gradients:
                continue
            state.step += 1
            state.seconds += time.perf_counter() - tick
            progress.update()
            last = state.step == stage.stop_step
            if state.step % cfg.logging_steps == 0 or last:
                progress.set_postfix(self._log(since_log, grad_norm))
                since_log = []
            if state.step % cfg.validation_steps == 0 or last:
                self._validate()
            if state.step % cfg.checkpointing_steps == 0 or last:
                self._save()
            tick = time.perf_counter()

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
            state.stream = self.stage.stream.record(gather_object([self.stage.places]))
        save_checkpoint(accelerator, self.output_dir, state.step, cfg.checkpoints_total_limit)
        if accelerator.is_main_process:
            write_record(cfg, state, self.nets, accelerator)

    def _micro_step(self, batch: dict[str, Any]) -> tuple[StepOutput, torch.Tensor | None]:
        """Forward and backward of one micro-batch; on the last of a step, everything that follows it."""
        cfg, accelerator, state = self.stage.cfg, self.accelerator, self.state
        rng = StepRandom(cfg.seed, state.step, batch["sample_index"], accelerator.device)
        with accelerator.accumulate(*self.modules.values()):
            with accelerator.autocast():
                output = train_step(batch, self._step_nets(), cfg, rng)
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
            grad_norm = None
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(self.parameters, cfg.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            if not self.precision_checked:  # now that the optimizer has its moments
                self.precision_checked = True
                if cfg.weights_dtype == "bf16":
                    accelerator.print("`weights_dtype` is bf16: updates smaller than a weight's last digit are lost")
                accelerator.print(f"stored values by type: {dict(self._check_precision())}")
            self.lr_scheduler.step()
            if (state.step + 1) % cfg.ema_update_every == 0:
                for average, module in zip(self.averages, self.modules.values()):
                    average.step(module.parameters())
        return output, grad_norm

    def _check_alignment(self, output: StepOutput) -> None:
        """Measure whether alignment and flow still pull together, at the weights of the aligned block."""
        accelerator, step = self.accelerator, self.state.step
        block = self.nets.transformer.blocks[self.stage.cfg.repa_block]
        weights = [weight for weight in block.parameters() if weight.requires_grad]
        cosine = gradient_cosine(output.losses["flow"], output.losses["alignment"], weights)
        cosine = float(accelerator.reduce(torch.tensor(cosine, device=accelerator.device), "mean"))
        self.burn_in.observe(step, cosine)
        self.state.alignment_history.append({"step": step, "cosine": cosine})
        accelerator.log({"alignment/gradient_cosine": cosine}, step=step)
        if self.burn_in.ended_at is not None:
            accelerator.print(f"alignment ends at step {self.burn_in.ended_at}: its gradient opposes the flow's")

    def _check_precision(self) -> Counter[str]:
        """Stop unless everything that training changes is stored as it has to be; count it by type."""
        parameters = {
            name: [(f"{name}.{key}", p) for key, p in module.named_parameters() if p.requires_grad]
            for name, module in self.modules.items()
        }
        named: list[tuple[str, torch.Tensor]] = [pair for pairs in parameters.values() for pair in pairs]
        for name, p in list(named):
            state = self.optimizer.state.get(p, {})
            named += [(f"{key} of {name}", value) for key, value in state.items() if isinstance(value, torch.Tensor)]
        for average, pairs in zip(self.averages, parameters.values()):
            named += [(f"average of {name}", value) for (name, _), value in zip(pairs, average.shadow_params)]
        stored = {"float32": torch.float32, "bf16": torch.bfloat16}[self.cfg.weights_dtype]
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

    def _log(self, losses: list[dict[str, torch.Tensor]], grad_norm: torch.Tensor | None) -> dict[str, str]:
        """One entry of the log: the mean of every loss since the last one, over all processes."""
        accelerator, state = self.accelerator, self.state
        self._add_counts()
        since: dict[str, list[torch.Tensor]] = defaultdict(list)
        for step_losses in losses:
            for name, loss in step_losses.items():
                since[name].append(loss)
        means = {n: accelerator.reduce(torch.stack(values).mean(), "mean").item() for n, values in since.items()}
        wrong = {name: mean for name, mean in means.items() if not math.isfinite(mean)}
        if wrong:
            raise ValueError(
                f"The loss is not finite at step {state.step} ({wrong}): lower `learning_rate` or `max_grad_norm`, or "
                "try `mixed_precision` no. The last checkpoint may be affected too."
            )
        entry = {
            "step": state.step,
            **{f"loss/{name}": mean for name, mean in means.items()},
            "grad_norm": float(grad_norm) if grad_norm is not None else 0.0,
            "lr": self.lr_scheduler.get_last_lr()[0],
            "images_per_second": state.samples_read / state.seconds,
            "waiting_share": state.seconds_waiting / state.seconds,
        }
        state.history.append(entry)
        accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=state.step)
        return {"loss": f"{entry['loss/flow']:.4f}", "lr": f"{entry['lr']:.1e}"}

    def _validate(self) -> None:
        """Validation loss and pictures, with the averaged weights where there are any."""
        cfg, accelerator, state = self.stage.cfg, self.accelerator, self.state
        self._use_averages()
        for module in self.modules.values():
            module.eval()
        if self.stage.held_out is not None and accelerator.is_main_process:
            with accelerator.autocast():
                losses = validation_loss(self.nets, cfg, self.stage.held_out_batches(accelerator.device))
            state.validation_history.append({"step": state.step, **losses})
            accelerator.log(losses, step=state.step)
        if cfg.validation_prompts and accelerator.is_main_process:
            with accelerator.autocast():
                grid = image_grid(validation_images(self.nets, cfg))
            folder = self.output_dir / "validation"
            folder.mkdir(parents=True, exist_ok=True)
            grid.save(folder / f"step-{state.step:07d}.png")
            self._track_image(grid)
        for module in self.modules.values():
            module.train()
        self._restore_weights()
        accelerator.wait_for_everyone()

    def _use_averages(self) -> None:
        """Put the averaged weights in place of the trained ones."""
        for average, module in zip(self.averages, self.modules.values()):
            average.store(module.parameters())
            average.copy_to(module.parameters())

    def _restore_weights(self) -> None:
        for average, module in zip(self.averages, self.modules.values()):
            average.restore(module.parameters())

    def _start_trackers(self) -> None:
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in self.cfg.to_dict().items()
        }
        self.accelerator.init_trackers("prx", config=plain)
        if self.accelerator.is_main_process:
            write_record(self.cfg, self.state, self.nets, self.accelerator)

    def _track_image(self, grid: PIL.Image.Image) -> None:
        name, step = "validation/images", self.state.step
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.array(grid)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [grid]}, step=step)
            else:
                import trackio  # an optional dependency, there when --report_to asks for it

                tracker.log({name: trackio.Image(grid)}, step=step)

    def _finish(self) -> None:
        """Export the pipeline with everything beside it, print what was counted, upload."""
        cfg, accelerator, state = self.cfg, self.accelerator, self.state
        accelerator.print(
            f"{state.samples_read} samples read: {state.unreadable} unreadable, {state.unfit} left out because they "
            f"did not fit their size, {state.upscaled} enlarged, {state.truncated} captions cut at "
            f"{cfg.max_sequence_length} tokens"
        )
        if self.averages:
            self._use_averages()
        if accelerator.is_main_process:
            for module in (self.nets.transformer, self.nets.text_encoder):
                accelerator.unwrap_model(module, keep_fp32_wrapper=False).eval()
            export_run(cfg, state, self.nets, accelerator, self.card_template, self.repo_id)
            if self.repo_id is not None:
                push_to_hub(cfg, self.repo_id)
            accelerator.print(f"saved to {cfg.output_dir}")
        accelerator.end_training()


def new_burn_in(cfg: TrainingConfig) -> BurnIn:
    """When the alignment of a run ends: at a step, by the measured gradients, or never."""
    if cfg.repa_check_steps is None:
        return BurnIn(cfg.repa_until_step)
    return BurnIn(cfg.repa_until_step, cfg.repa_check_window, cfg.repa_check_steps)
