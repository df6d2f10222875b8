"""The run: build everything, loop over the stream, watch, save. The arithmetic of a step is in `train_step.py`."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..data.scenes import ScenesDataset
from ..data.sources import (
    CaptionedImages,
    Slice,
    TrainingSamples,
    UnreadableSample,
    build_loader,
    load_images,
)
from ..data.stream import Position, StreamSampler
from .checkpoints import RunState, find_checkpoint, save_checkpoint
from .config import TrainingConfig
from .export import export_run, hub_repository, image_grid, push_to_hub, write_record
from .nets import build_nets
from .optimization import build_lr_scheduler, build_optimizers
from .rng import StepRandom, derive_seed
from .train_step import StepOutput, train_step
from .validation import validation_images, validation_loss

CAPTIONS_FOR_TOKENIZER = 5000
# what is counted of the data, by its name in `RunState`
COUNTS = ("samples_read", "unreadable", "upscaled", "truncated")
# the share of unreadable samples is judged over at least this many, so that a single one does not stop a run
SAMPLES_BEFORE_JUDGING = 1000


def build_data(cfg: TrainingConfig) -> tuple[CaptionedImages, CaptionedImages | None]:
    """The training images and the held-out ones.

    The scenes have a held-out split of their own; of other data the last samples are kept out of training.

    Raises:
        ValueError: if more samples are to be held out than half of the data set.
    """
    held_out = cfg.num_validation_samples
    if cfg.dataset_name == "scenes":
        scenes = partial(
            ScenesDataset, level=cfg.scenes_level, resolution=cfg.resolution, caption=cfg.scenes_caption, seed=cfg.seed
        )
        return scenes(split="train"), scenes(split="heldout", size=held_out) if held_out else None
    images = load_images(
        cfg.dataset_name,
        cfg.dataset_config_name,
        cfg.dataset_split,
        cfg.train_data_dir,
        cfg.image_column,
        cfg.caption_column,
    )
    if 2 * held_out > len(images):
        raise ValueError(
            f"`num_validation_samples` is {held_out}, but the data set has {len(images)} samples: at most half of "
            "them can be held out."
        )
    first_held_out = len(images) - held_out
    return Slice(images, 0, first_held_out), Slice(images, first_held_out, len(images)) if held_out else None


class Run:
    """One training run on one process: networks, optimizers, averages and counters, and what is done with them.

    Args:
        cfg: the run's configuration.
        card_template: the model card's template, filled in at the end.
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
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=cfg.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=None if cfg.report_to == "none" else cfg.report_to,
            project_config=ProjectConfiguration(project_dir=cfg.output_dir, logging_dir=str(self.output_dir / "logs")),
        )
        if cfg.report_to != "none" and not self.accelerator.log_with:
            raise ValueError(f"`report_to` is {cfg.report_to}, which is not installed: pip install {cfg.report_to}.")
        self.checkpoint = find_checkpoint(self.output_dir, cfg.resume_from_checkpoint)
        self.repo_id = hub_repository(cfg) if cfg.push_to_hub and self.accelerator.is_main_process else None
        self.source, self.held_out = build_data(cfg)
        self.nets = build_nets(cfg, caption_stream(self.source))
        self.state = RunState(
            settings=cfg.to_dict(),
            dataset_size=len(self.source),
            global_batch_size=cfg.train_batch_size * cfg.gradient_accumulation_steps * self.accelerator.num_processes,
        )
        self.counts: Counter[str] = Counter()  # of this process, since they were last added to the state
        self._prepare()

    def _prepare(self) -> None:
        """Move everything to its device, wrap what is trained, and restore the checkpoint to resume from."""
        cfg, nets, accelerator = self.cfg, self.nets, self.accelerator
        for module in (nets.transformer, nets.text_encoder, nets.vae):
            if module is not None:
                module.to(accelerator.device)
        self.modules: dict[str, Any] = nets.trainable(cfg)
        if cfg.compile:
            nets.transformer.compile_repeated_blocks(fullgraph=True)
        self.optimizers = build_optimizers(cfg, list(self.modules.values()))
        # stepped here, once per optimizer step: accelerate would step them once per process
        self.lr_schedulers = [build_lr_scheduler(cfg, optimizer) for optimizer in self.optimizers]
        self.averages = [
            EMAModel(module.parameters(), decay=cfg.ema_decay, foreach=True)
            for module in self.modules.values()
            if cfg.use_ema
        ]
        self.optimizers = [accelerator.prepare(optimizer) for optimizer in self.optimizers]
        self.modules = {name: accelerator.prepare(module) for name, module in self.modules.items()}
        self.train_nets = replace(nets, **self.modules)
        self.parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        wrong = {p.dtype for p in self.parameters} - {torch.float32}
        assert not wrong, f"trainable weights must be float32 after prepare, found {wrong}"
        for piece in (*self.lr_schedulers, *self.averages, self.state):
            accelerator.register_for_checkpointing(piece)
        if self.checkpoint is not None:
            accelerator.load_state(str(self.checkpoint))
            accelerator.step = 0  # counts micro-batches, of which another accumulation has another number
            for average in self.averages:
                average.to(accelerator.device)  # accelerate loads them to the CPU
            accelerator.print(f"resumed from {self.checkpoint} at step {self.state.step}")
        elif cfg.resume_from_checkpoint is not None:
            accelerator.print(f"no checkpoint in {self.output_dir} yet: starting at step 0")

    def train(self) -> None:
        """Train to the last step, then validate and export."""
        cfg, accelerator, state = self.cfg, self.accelerator, self.state
        self._start_trackers()
        progress = tqdm(
            total=cfg.max_train_steps, initial=state.step, disable=not accelerator.is_local_main_process, unit="step"
        )
        since_log: list[torch.Tensor] = []
        tick = time.perf_counter()
        for batch in self._training_batches():
            output, grad_norm = self._micro_step(batch)
            since_log.append(output.loss.detach())
            if not accelerator.sync_gradients:
                continue
            state.step += 1
            state.seconds += time.perf_counter() - tick
            progress.update()
            if state.step % cfg.logging_steps == 0 or state.step == cfg.max_train_steps:
                progress.set_postfix(self._log(since_log, grad_norm))
                since_log = []
            last = state.step == cfg.max_train_steps
            if state.step % cfg.validation_steps == 0 or last:
                self._validate()
            if state.step % cfg.checkpointing_steps == 0 or last:
                self._save()
            tick = time.perf_counter()
        progress.close()
        self._finish()

    def _save(self) -> None:
        """Save a checkpoint, and the record of the run so far."""
        cfg, accelerator, state = self.cfg, self.accelerator, self.state
        self._add_counts()
        save_checkpoint(accelerator, self.output_dir, state.step, cfg.checkpoints_total_limit)
        if accelerator.is_main_process:
            write_record(cfg, state, self.nets, accelerator)

    def _training_batches(self) -> Iterator[dict[str, Any]]:
        """This process's micro-batches from the current step on, on its device."""
        cfg, accelerator = self.cfg, self.accelerator
        sampler = StreamSampler(
            len(self.source),
            cfg.train_batch_size,
            start_step=self.state.step,
            stop_step=cfg.max_train_steps,
            accumulation=cfg.gradient_accumulation_steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            seed=cfg.seed,
            shuffle=cfg.dataset_name != "scenes",  # scenes are independent draws already
        )
        return self._read(self.source, sampler, cfg.center_crop, cfg.random_flip)

    def _held_out_batches(self, held_out: CaptionedImages) -> Iterator[dict[str, Any]]:
        """Every held-out sample once, always cropped in the same way."""
        positions = [Position(-1, index, index) for index in range(len(held_out))]
        size = self.cfg.train_batch_size
        batches = [positions[first : first + size] for first in range(0, len(positions), size)]
        return self._read(held_out, batches, center_crop=True, random_flip=False)

    def _read(
        self, source: CaptionedImages, batches: Iterable[list[Position]], center_crop: bool, random_flip: bool
    ) -> Iterator[dict[str, Any]]:
        samples = TrainingSamples(
            source, self.cfg.resolution, center_crop, random_flip, partial(derive_seed, self.cfg.seed)
        )
        for batch in build_loader(samples, batches, self.cfg.dataloader_num_workers):
            for message in batch["unreadable"]:
                tqdm.write(f"skipped: {message}")
            yield {**batch, "pixels_uint8": batch["pixels_uint8"].to(self.accelerator.device, non_blocking=True)}

    def _micro_step(self, batch: dict[str, Any]) -> tuple[StepOutput, torch.Tensor | None]:
        """Forward and backward of one micro-batch; on the last of a step, everything that follows it."""
        cfg, accelerator, state = self.cfg, self.accelerator, self.state
        rng = StepRandom(cfg.seed, state.step, batch["sample_index"], accelerator.device)
        with accelerator.accumulate(*self.modules.values()):
            with accelerator.autocast():
                output = train_step(batch, self.train_nets, cfg, rng)
            self.counts.update(
                samples_read=len(batch["captions"]) + len(batch["unreadable"]),
                unreadable=len(batch["unreadable"]),
                upscaled=batch["upscaled"],
                truncated=output.truncated,
            )
            accelerator.backward(output.loss)
            grad_norm = None
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(self.parameters, cfg.max_grad_norm)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if accelerator.sync_gradients:
            for lr_scheduler in self.lr_schedulers:
                lr_scheduler.step()
            if (state.step + 1) % cfg.ema_update_every == 0:
                for average, module in zip(self.averages, self.modules.values()):
                    average.step(module.parameters())
        return output, grad_norm

    def _add_counts(self) -> None:
        """Add the counts of all processes to the state, and stop when too much of the data cannot be read."""
        cfg, state = self.cfg, self.state
        counts = torch.tensor([self.counts[name] for name in COUNTS], device=self.accelerator.device)
        for name, count in zip(COUNTS, self.accelerator.reduce(counts, "sum").tolist()):
            setattr(state, name, getattr(state, name) + count)
        self.counts.clear()
        if state.unreadable > cfg.max_corrupt_share * max(state.samples_read, SAMPLES_BEFORE_JUDGING):
            raise ValueError(
                f"{state.unreadable} of {state.samples_read} samples cannot be read, more than `max_corrupt_share` "
                f"{cfg.max_corrupt_share} allows."
            )

    def _log(self, losses: list[torch.Tensor], grad_norm: torch.Tensor | None) -> dict[str, str]:
        """One entry of the log: the mean loss since the last one, over all processes."""
        state = self.state
        self._add_counts()
        loss = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss is {loss} at step {state.step}: lower `learning_rate` or `max_grad_norm`, or try "
                "`mixed_precision` no. The last checkpoint may be affected too."
            )
        entry = {
            "step": state.step,
            "loss/flow": loss,
            "grad_norm": float(grad_norm) if grad_norm is not None else 0.0,
            "lr": self.lr_schedulers[0].get_last_lr()[0],
            "images_per_second": state.step * state.global_batch_size / state.seconds,
        }
        state.history.append(entry)
        self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=state.step)
        return {"loss": f"{entry['loss/flow']:.4f}", "lr": f"{entry['lr']:.1e}"}

    def _validate(self) -> None:
        """Validation loss and pictures, with the averaged weights where there are any."""
        cfg, accelerator, state = self.cfg, self.accelerator, self.state
        self._use_averages()
        for module in self.modules.values():
            module.eval()
        if self.held_out is not None and accelerator.is_main_process:
            with accelerator.autocast():
                losses = validation_loss(self.nets, cfg, self._held_out_batches(self.held_out))
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
            f"{state.samples_read} samples read: {state.unreadable} unreadable, {state.upscaled} smaller than "
            f"{cfg.resolution} pixels and enlarged, {state.truncated} captions cut at {cfg.max_sequence_length} tokens"
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


def caption_stream(source: CaptionedImages) -> Iterator[str]:
    """The captions of the first samples, for a tokenizer to be trained on."""
    for index in range(min(len(source), CAPTIONS_FOR_TOKENIZER)):
        try:
            yield source[index]["caption"]
        except UnreadableSample:
            continue  # counted when training reads it
