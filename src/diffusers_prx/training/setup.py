"""Setup of a run: open the data, print the plan, load the networks, distribute them, and resume."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerFast

from ..config.checks import check_teacher
from ..config.training_config import TrainingConfig
from ..files import UNFINISHED
from ..hub.cards import REPORT_FILE
from ..hub.publishing import repository
from ..techniques.alignment import BurnIn
from ..techniques.ema import EMAWeights
from ..techniques.optimizers import build_optimizer
from .checkpoints import (
    TOKENIZER_FILE,
    CheckpointWriter,
    RunState,
    find_checkpoint,
    load_tensors,
    read_run_file,
    read_tensors,
    reference_tensors,
    restore_generators,
)
from .distributed import ObjectCommunicator, TrainableModules, distribute, shard_count, start_accelerator
from .export import session
from .folder_lock import FolderLock
from .networks import build_nets, has_unused_parameters, network_identities, restore_tokenizer, train_tokenizer
from .precision import resolve_precision
from .precompute import open_precomputed
from .preflight import caption_statistics_of, check_techniques, describe_plan, meta_networks
from .run import Run, alignment_is_over
from .stages import CAPTIONS_FOR_TOKENIZER, Stage, build_stages, quiet_data
from .tracking import Tracking
from .watchdog import Watchdog


@dataclass(frozen=True)
class Resumed:
    """Checkpoint to resume from.

    Args:
        folder: folder of the checkpoint.
        saved: content of its `run.json`.
    """

    folder: Path
    saved: dict[str, Any]

    @property
    def step(self) -> int:
        return self.saved["state"]["step"]


def set_up_run(cfg: TrainingConfig, card_template: Path) -> Run:
    """Prepare a run up to its first step.

    Args:
        cfg: configuration of the run.
        card_template: template of the model card.

    Raises:
        ValueError: data or networks are missing or do not fit, another run uses the output folder, or the token
            cannot write to the repository of `push_to_hub`.
        SystemExit: the plan is printed and `dry_run` is set.

    Example:
        >>> run = set_up_run(cfg, Path("model_cards/template.md"))
        >>> train(run)
    """
    is_auto, cfg = cfg.mixed_precision == "auto", resolve_precision(cfg)
    accelerator = start_accelerator(cfg)
    if is_auto and cfg.mixed_precision == "no":
        accelerator.print("`mixed_precision` is auto: float32, because this CPU is slow in bf16")
    machine = {
        "processes": accelerator.num_processes,
        "sharded_over": shard_count(cfg, accelerator.num_processes),  # refused before anything is loaded
        "device": str(accelerator.device),
    }
    communicator = ObjectCommunicator(accelerator, 2 * cfg.step_timeout_seconds)
    lock = None if cfg.dry_run else lock_folder(Path(cfg.output_dir), communicator)
    try:
        return _build(cfg, card_template, accelerator, machine, communicator, lock)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _build(
    cfg: TrainingConfig,
    card_template: Path,
    accelerator: Accelerator,
    machine: dict[str, Any],
    communicator: ObjectCommunicator,
    lock: FolderLock | None,
) -> Run:
    checkpoint = find_checkpoint(Path(cfg.output_dir), cfg.resume_from_checkpoint, communicator)
    resumed = None if checkpoint is None else Resumed(checkpoint, read_run_file(checkpoint))

    stages, burn_in, teacher_width = plan_run(cfg, accelerator, machine, resumed)
    # checked now, so that a wrong token does not cost the result of a training
    repo_id = repository(cfg.repo_id) if cfg.push_to_hub and accelerator.is_main_process else None

    # networks
    set_seed(cfg.seed)  # global generators; only libraries use them
    tokenizer = prepare_tokenizer(cfg, stages[0], communicator, resumed)
    nets = build_nets(cfg, teacher_width=teacher_width, trained_tokenizer=tokenizer)
    open_precomputed(stages, nets)
    networks_record = network_identities(cfg, nets, teacher_width)
    state = new_state(cfg, stages, networks_record, accelerator.num_processes, resumed)

    # devices, distribution, optimizer
    nets.to(accelerator.device)
    modules = nets.trainable(cfg)
    if cfg.compile:
        nets.transformer.compile_repeated_blocks(fullgraph=True)
    trained = TrainableModules(modules)
    model = distribute(trained, cfg, accelerator, has_unused_parameters(nets, [stage.cfg for stage in stages]))
    optimizer: AcceleratedOptimizer = accelerator.prepare(build_optimizer(cfg, modules))
    writer = CheckpointWriter(
        Path(cfg.output_dir),
        cfg.checkpoints_total_limit,
        ObjectCommunicator(accelerator, 2 * cfg.step_timeout_seconds),
        files_of_every_checkpoint(stages, tokenizer),
    )
    counts: Counter[str] = Counter()
    run = Run(
        cfg=cfg,
        card_template=card_template,
        accelerator=accelerator,
        machine=machine,
        communicator=communicator,
        lock=lock,
        repo_id=repo_id,
        stages=stages,
        nets=nets,
        modules=modules,
        trained=trained,
        model=model,
        optimizer=optimizer,
        averages=EMAWeights(trained, cfg),
        burn_in=burn_in,
        state=state,
        writer=writer,
        watchdog=Watchdog(accelerator.process_index, cfg.step_timeout_seconds),
        tracking=Tracking(accelerator, counts),
        counts=counts,
    )
    run.check_precision()
    if resumed is not None:
        restore(run, resumed)
    elif cfg.resume_from_checkpoint is not None:
        accelerator.print(f"no checkpoint in {run.output_dir} yet: starting at step 0")
    return run


def plan_run(
    cfg: TrainingConfig, accelerator: Accelerator, machine: dict[str, Any], resumed: Resumed | None
) -> tuple[list[Stage], BurnIn, int | None]:
    """Open the data and print the plan, before weights are loaded.

    Returns:
        The stages, and the results of `alignment_of`.

    Raises:
        ValueError: data, networks or files of techniques are missing or do not fit.
        SystemExit: `dry_run` is set.
    """
    check_teacher(cfg, cfg.stage_configs()[0])
    networks = meta_networks(cfg)
    stages = open_data(cfg, accelerator, networks.pixels_per_token, resumed)
    burn_in, teacher_width = alignment_of(stages, resumed)
    check_techniques(cfg, teacher_width is None)
    if accelerator.is_main_process:
        print_plan(cfg, stages, networks.transformer, machine)
    if cfg.dry_run:
        accelerator.print("dry run: nothing is trained")
        accelerator.end_training()
        sys.exit(0)
    return stages, burn_in, teacher_width


def new_state(
    cfg: TrainingConfig,
    stages: list[Stage],
    networks: dict[str, Any],
    processes: int,
    resumed: Resumed | None,
) -> RunState:
    """Make the state of a run, and restore that of the checkpoint.

    Raises:
        ValueError: the run differs from that of the checkpoint.
    """
    records = [stage.record(processes) for stage in stages]
    state = RunState(settings=cfg.to_dict(), stages=records, networks=networks)
    if resumed is not None:
        state.load_state_dict(resumed.saved["state"])
    state.sessions = [*state.sessions, session(state.step)]
    return state


def files_of_every_checkpoint(stages: list[Stage], tokenizer: PreTrainedTokenizerFast | None) -> dict[str, bytes]:
    """Return the contents of files that the run derived from its data, by name."""
    files = {name: content for stage in stages for name, content in stage.checkpoint_files().items()}
    if tokenizer is not None:
        files[TOKENIZER_FILE] = tokenizer.backend_tokenizer.to_str().encode()
    return files


def lock_folder(output_dir: Path, communicator: ObjectCommunicator) -> FolderLock | None:
    """Lock the output folder on the main process.

    Raises:
        ValueError: another run holds the lock; raised on all processes.
    """
    lock = failure = None
    if communicator.rank == 0:
        try:
            lock = FolderLock(output_dir)
            for leftover in output_dir.glob(f"{REPORT_FILE}.*{UNFINISHED}"):  # of a killed run
                leftover.unlink(missing_ok=True)
        except (ValueError, OSError) as error:
            failure = str(error)
    failure = communicator.gather(failure)[0]
    if failure is not None:
        raise ValueError(failure)
    return lock


def open_data(
    cfg: TrainingConfig, accelerator: Accelerator, pixels_per_token: int, resumed: Resumed | None
) -> list[Stage]:
    """Open the data of all stages and assign it to buckets; stages that have begun use the checkpoint's sizes."""
    # the other processes read the caches that the main process writes
    with accelerator.main_process_first(), quiet_data(not accelerator.is_main_process):
        stages = build_stages(cfg, accelerator.process_index, accelerator.num_processes)
        for stage in stages:
            begun = resumed is not None and stage.first_step < resumed.step
            stage.assign_buckets(
                pixels_per_token, accelerator.num_processes, resumed.folder if resumed and begun else None
            )
    return stages


def alignment_of(stages: list[Stage], resumed: Resumed | None) -> tuple[BurnIn, int | None]:
    """Return the rule that ends the alignment, and the width of the teacher if the alignment is over."""
    aligned = [stage for stage in stages if stage.cfg.repa_weight]
    burn_in = new_burn_in(aligned[0].cfg) if aligned else BurnIn()
    if resumed is None:
        return burn_in, None
    burn_in.load_state_dict(resumed.saved["burn_in"])
    over = alignment_is_over(stages, burn_in, resumed.step)
    return burn_in, resumed.saved["state"]["networks"]["teacher_width"] if over else None


def new_burn_in(cfg: TrainingConfig) -> BurnIn:
    """Make the rule that ends the alignment: at a step, by measured gradients, or never."""
    if cfg.repa_check_steps is None:
        return BurnIn(cfg.repa_until_step)
    return BurnIn(cfg.repa_until_step, cfg.repa_check_window, cfg.repa_check_steps)


def print_plan(cfg: TrainingConfig, stages: list[Stage], transformer: Any, machine: dict[str, Any]) -> None:
    """Print the plan of the run; the transformer may be on the meta device."""
    captions = [caption_statistics_of(cfg, stage) for stage in stages]
    print(describe_plan(cfg, stages, transformer, captions, machine["processes"]))
    if machine["sharded_over"] > 1:
        print(f"sharding      {cfg.sharding}: each process holds 1/{machine['sharded_over']} of that memory")


def prepare_tokenizer(
    cfg: TrainingConfig, stage: Stage, communicator: ObjectCommunicator, resumed: Resumed | None
) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer of a new text encoder, from the checkpoint or trained on the main process; else None."""
    if not cfg.text_encoder_config:
        return None
    if resumed is not None:
        text = (resumed.folder / TOKENIZER_FILE).read_text(encoding="utf-8")
        return restore_tokenizer(text, cfg.max_sequence_length)
    trained: str | None = None
    if communicator.rank == 0:
        captions = stage.captions(CAPTIONS_FOR_TOKENIZER)
        tokenizer = train_tokenizer(captions, cfg.tokenizer_vocab_size, cfg.max_sequence_length)
        trained = tokenizer.backend_tokenizer.to_str()
    return restore_tokenizer(communicator.gather(trained)[0], cfg.max_sequence_length)


def restore(run: Run, resumed: Resumed) -> None:
    """Load weights, optimizer state, averages and generators, for any number of processes and any sharding."""
    load_tensors(resumed.folder, run.trained, run.optimizer.optimizer, run.averages.tensors())
    run.averages.load_state_dict(resumed.saved["average_updates"])
    rank = run.accelerator.process_index
    if not restore_generators(resumed.folder, rank):
        print(
            f"{resumed.folder} was written by fewer processes: the global random generators of process {rank}, which "
            "libraries may use, are newly seeded"
        )
    for stage in run.stages:
        begun = stage.first_step < run.state.step <= stage.stop_step
        if begun and run.has_derived_reference(stage):
            read_tensors(resumed.folder, reference_tensors(run.nets.reference))
        if stage.stream is not None and stage.first_step < run.state.step < stage.stop_step:
            stage.stream_positions = stage.stream.restore(run.state.stream or {})
    run.accelerator.print(f"resumed from {resumed.folder} at step {run.state.step}")
