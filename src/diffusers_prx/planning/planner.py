"""Prediction of a run's FLOPs, memory, communication, time and cost, before you rent a GPU.

FLOPs and activations are counted on the run's own networks (`counting.py`). Time follows from an assumed utilization:
the share of the GPU's peak that all operations of a step reach. Reading data, validation, checkpoints and the start
are not included.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from torch import nn

from ..config.training_config import TrainingConfig
from ..latents import latent_channels, vae_scale_factor
from ..techniques.optimizers import muon_weights, newton_schulz_flops
from ..training.networks import Nets
from ..training.preflight import memory
from ..training.recipes import DATA_SETTINGS, load_recipe, parse_command_line, parse_config, parse_run_config
from .communication import Cluster, muon_transfers, step_transfers
from .counting import Flops, MicroBatch, build_meta_networks, fake_tensors, optimizer_bytes, stored_bytes

logger = logging.get_logger(__name__)

# Llama 3 405B reached 38% to 43% of an H100's bf16 peak, including communication (arXiv 2407.21783, table 4). Smaller
# models with smaller matrices may reach less.
UTILIZATION = 0.40
UTILIZATION_SOURCE = "Llama 3 405B: 38% to 43% on H100 (arXiv 2407.21783)"
# Share of a GPU's memory without CUDA's context, NCCL's buffers and fragmentation: an assumption.
USABLE_MEMORY = 0.92
# Tokens of the mean caption in the data on which the cache was measured.
CAPTION_TOKENS = 113
ALIGNMENT_PARTS = ("teacher", "projector")
FROZEN_PARTS = ("autoencoder", "text encoder", "teacher", "LPIPS", "DINO", "decoder")
# Rule of thumb: a step launches thousands of kernels, and a shorter micro-batch waits for Python.
SMALL_BATCH_SECONDS = 0.03
# Rule of thumb: above this share of the computation, communication does not hide behind the backward pass.
COMMUNICATION_SHARE = 0.5
# Data set of recipes that name none; nothing is read from it.
NO_DATA = "(not named)"


@dataclass(frozen=True)
class PublishedRun:
    """Published facts about a run of the study.

    Args:
        hours: training time.
        cost_usd: cost in US dollars.
        num_gpus: number of GPUs.
        peak_tflops: bf16 peak of one GPU.
        gpu: name of the GPU.
        stages: (resolution, steps, images per step) of each stage.
    """

    hours: float
    cost_usd: float
    num_gpus: int
    peak_tflops: float
    gpu: str
    stages: tuple[tuple[int, int, int], ...] = ()


# Keyed by the recipe's output_dir, which is unique; https://huggingface.co/blog/Photoroom/prx-part3
PUBLISHED_RUNS = {
    "outputs/speedrun": PublishedRun(24, 1500, 32, 989.4, "H200", ((512, 100_000, 1024), (1024, 20_000, 512)))
}


# --- configuration


def read_config(recipe: Path, flags: list[str]) -> TrainingConfig:
    """Read a recipe with flags over it, as training does, but without requiring data.

    A recipe may continue a pipeline that does not exist yet. It is then planned with the networks of the recipe in the
    same folder that creates this pipeline, or the one that this recipe continues.

    Raises:
        ValueError: see `parse_config`.
    """
    argv = ["--config", str(recipe), *flags]
    if not any(parse_command_line(argv).settings.get(name) for name in DATA_SETTINGS):
        argv += ["--dataset_name", NO_DATA]
    cfg = parse_config(argv)
    start = cfg.pretrained_model_name_or_path
    if start is None:
        return cfg
    if Path(start).exists():
        return parse_run_config(argv)[0]
    recipes = {str(load_recipe(other).get("output_dir")): other for other in recipe.parent.glob("*.yaml")}
    creator, missing = recipe, start
    while missing in recipes and recipes[missing] != creator:
        creator = recipes[missing]
        settings = load_recipe(creator)
        if settings.get("pretrained_model_name_or_path") is None:
            logger.warning(f"{start} does not exist; planning with the networks of {creator}.")
            names = ("transformer_config", "vae_name_or_path", "text_encoder_name_or_path", "text_encoder_config")
            networks = {name: settings[name] for name in names if name in settings}
            return replace(cfg, pretrained_model_name_or_path=None, **networks)
        missing = settings["pretrained_model_name_or_path"]
    return cfg


def strategy_of(cfg: TrainingConfig, gpus_per_node: int) -> str:
    """Return the strategy (`communication.STRATEGIES`) that a configuration selects.

    Raises:
        ValueError: if the groups of hybrid sharding are not the nodes.
    """
    if cfg.sharding_size not in (None, gpus_per_node):
        raise ValueError(
            f"`sharding_size` is {cfg.sharding_size}; the planner accepts the number of GPUs per node, which is "
            f"{gpus_per_node}. Pass `--gpus_per_node {cfg.sharding_size}` or change `sharding_size`."
        )
    return {"none": "ddp", "full": "fsdp2", "hybrid": "hsdp"}[cfg.sharding]


def published_run(recipe: Path, cfg: TrainingConfig) -> PublishedRun | None:
    """Return the published run of a recipe if a configuration equals it, except for its data and output folder."""
    run = PUBLISHED_RUNS.get(str(load_recipe(recipe).get("output_dir")))
    if run is None:
        return None
    unchanged = read_config(recipe, [])
    if replace(cfg, **{name: getattr(unchanged, name) for name in (*DATA_SETTINGS, "output_dir")}) != unchanged:
        return None
    stages = tuple(
        (stage.resolution, stage.max_train_steps, stage.train_batch_size * stage.gradient_accumulation_steps)
        for stage in unchanged.stage_configs()
    )
    published_stages = tuple((size, steps, images // run.num_gpus) for size, steps, images in run.stages)
    return run if stages == published_stages else None


# --- FLOPs


def newton_schulz_flops_per_step(cfg: TrainingConfig, trained: Mapping[str, nn.Module]) -> int:
    """Return the FLOPs of Muon in one step on all ranks together; ranks do not repeat each other's work."""
    if cfg.optimizer != "muon":
        return 0
    stacked = muon_weights(trained, cfg.muon_fused)
    return sum(n * newton_schulz_flops(w.shape[0] // n, w.shape[1]) for w, n in stacked.items())


def flops_of_step(
    flops: Mapping[str, Flops], cfg: TrainingConfig, num_gpus: int, aligned_share: float
) -> dict[str, float]:
    """Return the FLOPs of one optimizer step on all GPUs together, by part.

    Args:
        flops: FLOPs of one micro-batch by part.
        cfg: settings of the stage.
        num_gpus: number of GPUs.
        aligned_share: share of the stage's steps with alignment, in [0, 1].
    """
    batches = cfg.gradient_accumulation_steps * num_gpus
    transformer = flops["transformer"]
    parts: dict[str, float] = {
        "transformer forward": batches * transformer.forward,
        "transformer backward": batches * transformer.backward,
    }
    if transformer.recomputed:
        parts["forward once more"] = batches * transformer.recomputed
    for name, part in flops.items():
        if name != "transformer":
            parts[name] = batches * part.total * (aligned_share if name in ALIGNMENT_PARTS else 1)
    return parts


def aligned_steps(cfg: TrainingConfig, first_step: int) -> int:
    """Return the number of steps with alignment in a stage, as far as it is known before the run."""
    if not cfg.repa_weight:
        return 0
    end = math.inf if cfg.repa_until_step is None else cfg.repa_until_step
    return int(min(cfg.max_train_steps, max(0, end - first_step)))


# --- memory


def memory_parts(
    cfg: TrainingConfig,
    nets: Nets,
    cluster: Cluster,
    strategy: str,
    activations: int,
    optimizer_temporary: tuple[int, int],
) -> dict[str, float]:
    """Return the bytes on one GPU at the peak, by part.

    Weights, gradients, optimizer state and frozen networks are always present. The peak adds either the activations or
    the temporary tensors of the optimizer, whichever are larger.

    Args:
        cfg: settings of the run.
        nets: networks of the run, on fake tensors.
        cluster: GPUs of the run.
        strategy: one of `communication.STRATEGIES`.
        activations: return value of `MicroBatch.activations`.
        optimizer_temporary: return value of `optimizer_bytes`.
    """
    shards = cluster.shards(strategy)
    trained = nets.trainable(cfg)
    parts: dict[str, float] = {name: size / shards for name, size in memory(cfg, trained).items()}
    if strategy == "ddp" and cluster.num_gpus > 1:
        parts["gradient buckets"] = parts["gradients"]  # DistributedDataParallel has a copy
    frozen = _frozen_modules(nets, cfg)
    if frozen:
        parts["frozen networks"] = stored_bytes(list(frozen.values()))
    gathered = 0
    if cfg.optimizer == "muon":
        gathered = muon_transfers(cfg, trained, shards, cluster.num_gpus // shards)[1]
    optimizer_step = optimizer_temporary[0] + optimizer_temporary[1] / shards + gathered
    if activations >= optimizer_step:
        parts["activations"] = activations
    else:
        parts["optimizer step"] = optimizer_step
    if shards > 1:
        parts["gathered weights"] = unsharded_bytes(nets, cfg)
    return parts


def unsharded_bytes(nets: Nets, cfg: TrainingConfig) -> int:
    """Return the float32 bytes that FSDP2 holds unsharded at a time.

    These are the weights outside of blocks, the weights of the current and the next block, and one block's gradients.
    """
    blocks = [sum(w.nbytes for w in block.parameters()) for block in nets.transformer.blocks]
    total = sum(w.nbytes for module in nets.trainable(cfg).values() for w in module.parameters())
    return total - sum(blocks) + 3 * max(blocks)


def _frozen_modules(nets: Nets, cfg: TrainingConfig) -> dict[str, nn.Module]:
    modules = {"autoencoder": nets.vae, "teacher": nets.teacher, "LPIPS": nets.lpips, "DINO": nets.dino}
    modules["teacher of distillation"] = nets.reference
    if not cfg.train_text_encoder:
        modules["text encoder"] = nets.text_encoder
    return {name: module for name, module in modules.items() if module is not None}


# --- storage


def cache_bytes(nets: Nets, cfg: TrainingConfig, caption_tokens: float) -> dict[str, float]:
    """Return the bytes that training/precompute_prx.py stores per image, by column."""
    size, columns = cfg.resolution, {}
    if nets.vae is not None:
        values = latent_channels(nets.vae) * (size // vae_scale_factor(nets.vae)) ** 2
        has_std = type(nets.vae).__name__ in ("AutoencoderKL", "AutoencoderKLFlux2")
        columns["latents"] = 4.0 * values * (2 if has_std else 1)
    if nets.vae is None or cfg.lpips_weight or cfg.dino_weight:
        columns["pixels"] = 3.0 * size**2
    captions = max(1, len(cfg.caption_weights))
    columns["text"] = 2.0 * captions * caption_tokens * nets.transformer.config["context_in_dim"]
    if cfg.repa_weight:
        columns["teacher features"] = 2.0 * (size // nets.pixels_per_token) ** 2 * nets.teacher.hidden_size
    return columns


def _plan_storage(cfg: TrainingConfig, nets: Nets, caption_tokens: float, num_images: int) -> dict[str, Any]:
    """Return the TB of the caches of all images. Stages with the same resolution share a cache."""
    columns: dict[int, dict[str, float]] = {}
    for stage in cfg.stage_configs():
        columns.setdefault(stage.resolution, {}).update(cache_bytes(nets, stage, caption_tokens))
    by_resolution = {
        str(resolution): {name: size * num_images / 1e12 for name, size in sizes.items()}
        for resolution, sizes in columns.items()
    }
    return {
        "num_images": num_images,
        "caption_tokens": caption_tokens,
        "total_tb": sum(sum(sizes.values()) for sizes in by_resolution.values()),
        "tb_by_resolution": by_resolution,
    }


# --- the plan


def make_plan(
    cfg: TrainingConfig,
    cluster: Cluster,
    *,
    published: PublishedRun | None = None,
    text_tokens: int | None = None,
    caption_tokens: float = CAPTION_TOKENS,
    num_images: int | None = None,
) -> dict[str, Any]:
    """Plan a run. The result is plain data; GB are 1e9 bytes, and FLOPs, time and cost are those of all GPUs together.

    Args:
        cfg: settings of the run.
        cluster: GPUs of the run.
        published: published facts about the same run.
        text_tokens: length of the longest caption in a micro-batch, to which others are padded; None: the limit.
        caption_tokens: length of the mean caption, for the cache.
        num_images: size of the data set, for the cache and the epochs; None: neither is planned.

    Raises:
        ValueError: if a network is unknown (see `build_meta_networks`), `text_tokens` exceeds the limit, or the
            cluster does not support its strategy.

    Example:
        >>> from pathlib import Path
        >>> from diffusers_prx.planning.communication import Cluster
        >>> from diffusers_prx.planning.gpus import GPUS
        >>> from diffusers_prx.planning.planner import make_plan, read_config
        >>> cfg = read_config(Path("training/recipes/speedrun.yaml"), [])
        >>> make_plan(cfg, Cluster(GPUS["h200"], 32, 8, "ddp", 0.4, 4.0))["predicted_hours"]
    """
    if cluster.strategy not in cluster.strategies:
        raise ValueError(
            f"`strategy` is {cluster.strategy}; accepted for {cluster.num_gpus} GPUs with {cluster.gpus_per_node} per "
            f"node: {cluster.strategies}."
        )
    tokens = cfg.max_sequence_length if text_tokens is None else text_tokens
    if tokens > cfg.max_sequence_length:
        raise ValueError(
            f"`text_tokens` is {tokens}; accepted: up to `max_sequence_length` {cfg.max_sequence_length}."
        )
    with fake_tensors():
        nets = build_meta_networks(cfg)
        trained = nets.trainable(cfg)
        optimizer_temporary = optimizer_bytes(nets, cfg)
        stages = _plan_stages(cfg, nets, cluster, tokens)
        memories = _plan_memory(cfg, nets, cluster, stages, optimizer_temporary)
        storage = None if num_images is None else _plan_storage(cfg, nets, caption_tokens, num_images)
        parameters = {name: _num_parameters(module) for name, module in trained.items()}
        frozen = {name: _num_parameters(module) for name, module in _frozen_modules(nets, cfg).items()}
    steps = sum(stage["steps"] for stage in stages)
    images = sum(stage["images_per_step"] * stage["steps"] for stage in stages)
    hours = sum(stage["hours"] for stage in stages)
    cost = hours * cluster.num_gpus * cluster.price_per_hour
    configured = memories[cluster.strategy]["as configured"]["total"]
    usable = USABLE_MEMORY * cluster.gpu.memory_gb
    result: dict[str, Any] = {
        "predicted_hours": hours,
        "predicted_cost_usd": cost,
        "implied_utilization": None,
        "memory_gb": configured,
        "flops_per_step": sum(stage["flops_per_step"] * stage["steps"] for stage in stages) / steps,
        "fits": configured <= usable,
        "steps": steps,
        "images": images,
        "gpu_hours": hours * cluster.num_gpus,
        "usable_memory_gb": usable,
        "text_tokens": tokens,
        "cluster": asdict(cluster) | {"peak_tflops": cluster.peak_flops(cfg) / 1e12},
        "parameters": parameters,
        "frozen_parameters": frozen,
    }
    if num_images is not None:
        epochs = images / num_images
        result |= {"storage": storage, "epochs": epochs}
        result |= {"hours_per_epoch": hours / epochs, "cost_usd_per_epoch": cost / epochs}
    result |= {"stages": stages, "memory": memories, "published": None}
    result["warnings"] = _warnings(result)
    if published is not None:
        result["published"] = compare_with_published(published, stages, cluster.num_gpus, cluster.price_per_hour)
        result["implied_utilization"] = result["published"]["implied_utilization"]
    return result


def _num_parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _warnings(plan: dict[str, Any]) -> list[str]:
    """Return the reasons why a plan may not work out."""
    warnings = []
    if not plan["fits"]:
        warnings.append("the configuration does not fit: choose a strategy that fits, or lower train_batch_size")
    for stage in plan["stages"]:
        batch_seconds = stage["seconds_computing"] / stage["micro_batch"][1]
        sending = stage["communication"][plan["cluster"]["strategy"]]["seconds"]
        if batch_seconds < SMALL_BATCH_SECONDS:
            warnings.append(
                f"a micro-batch takes {1000 * batch_seconds:.2g} ms at {stage['resolution']} pixels: the GPU waits "
                "for Python, and the utilization is out of reach"
            )
        if sending > COMMUNICATION_SHARE * stage["seconds_computing"]:
            warnings.append(
                f"communication takes at least {sending / stage['seconds_computing']:.0%} of the time of computation "
                f"at {stage['resolution']} pixels: the utilization may be out of reach"
            )
    return warnings


def _plan_stages(cfg: TrainingConfig, nets: Nets, cluster: Cluster, text_tokens: int) -> list[dict[str, Any]]:
    newton_schulz = newton_schulz_flops_per_step(cfg, nets.trainable(cfg))
    stages: list[dict[str, Any]] = []
    first_step = 0
    for stage in cfg.stage_configs():
        stages.append(_plan_stage(stage, nets, cluster, text_tokens, first_step, newton_schulz))
        first_step += stage.max_train_steps
    return stages


def _plan_stage(
    cfg: TrainingConfig, nets: Nets, cluster: Cluster, text_tokens: int, first_step: int, newton_schulz: int
) -> dict[str, Any]:
    """Return FLOPs, seconds and communication of a stage, and its activations with and without checkpointing."""
    steps = cfg.max_train_steps
    batch = MicroBatch(nets.for_losses(cfg, aligning=cfg.repa_weight > 0), cfg, text_tokens)
    aligned = aligned_steps(cfg, first_step)
    parts = flops_of_step(batch.flops(), cfg, cluster.num_gpus, aligned / steps)
    if newton_schulz:
        parts["Newton-Schulz"] = newton_schulz
    flops = sum(parts.values())
    computing = flops / (cluster.num_gpus * cluster.peak_flops(cfg) * cluster.utilization)
    communication: dict[str, dict[str, Any]] = {}
    for strategy in cluster.strategies:
        transfers = step_transfers(nets, cfg, cluster.num_gpus, cluster.shards(strategy))
        communication[strategy] = {
            "gb_sent_per_gpu": sum(t.bytes_sent for t in transfers) / 1e9,
            "seconds": sum(t.seconds(cluster) for t in transfers),
            "transfers": [
                {"what": t.content, "kind": t.kind, "ranks": t.ranks, "gb_sent_per_gpu": t.bytes_sent / 1e9}
                for t in transfers
            ],
        }
    seconds = max(computing, communication[cluster.strategy]["seconds"])
    return {
        "resolution": cfg.resolution,
        "steps": steps,
        "steps_with_alignment": aligned,
        "image_tokens": math.prod(batch.grid),
        "images_per_step": cfg.train_batch_size * cfg.gradient_accumulation_steps * cluster.num_gpus,
        "micro_batch": [cfg.train_batch_size, cfg.gradient_accumulation_steps],
        "flops_per_step": flops,
        "flops_per_step_by_part": parts,
        "seconds_per_step": seconds,
        "seconds_computing": computing,
        "hours": steps * seconds / 3600,
        "communication": communication,
        "activations_gb": {
            "without checkpointing": batch.activations(False) / 1e9,
            "with checkpointing": batch.activations(True) / 1e9,
        },
    }


def _plan_memory(
    cfg: TrainingConfig,
    nets: Nets,
    cluster: Cluster,
    stages: list[dict[str, Any]],
    optimizer_temporary: tuple[int, int],
) -> dict[str, dict[str, dict[str, float]]]:
    """Return GB on one GPU by strategy and checkpointing, for the stage with the most activations."""
    memories: dict[str, dict[str, dict[str, float]]] = {}
    configured = "with checkpointing" if cfg.gradient_checkpointing else "without checkpointing"
    for strategy in cluster.strategies:
        memories[strategy] = {}
        for checkpointing in ("without checkpointing", "with checkpointing"):
            activations = int(1e9 * max(stage["activations_gb"][checkpointing] for stage in stages))
            parts = memory_parts(cfg, nets, cluster, strategy, activations, optimizer_temporary)
            sizes = {name: size / 1e9 for name, size in parts.items()}
            memories[strategy][checkpointing] = {"total": sum(sizes.values()), **sizes}
        memories[strategy]["as configured"] = memories[strategy][configured]
    return memories


def compare_with_published(
    run: PublishedRun, stages: list[dict[str, Any]], num_gpus: int, price_per_hour: float
) -> dict[str, Any]:
    """Return the utilization that published time and cost imply for the planned operations.

    Args:
        run: published run.
        stages: stages of the plan.
        num_gpus: number of GPUs of the plan.
        price_per_hour: US dollars per GPU.
    """
    flops = frozen = repeated = 0.0
    for stage in stages:
        for name, part in stage["flops_per_step_by_part"].items():
            # images per step scale with the number of GPUs, Newton-Schulz does not
            part_flops = stage["steps"] * part * (1 if name == "Newton-Schulz" else run.num_gpus / num_gpus)
            flops += part_flops
            repeated += part_flops * (run.num_gpus if name == "Newton-Schulz" else 1)
            frozen += part_flops * (name in FROZEN_PARTS)
    hours_at_peak = flops / (run.num_gpus * run.peak_tflops * 1e12) / 3600
    return {
        **{name: value for name, value in asdict(run).items() if name != "stages"},
        "flops": flops,
        "implied_utilization": hours_at_peak / run.hours,
        "implied_utilization_without_frozen": hours_at_peak * (1 - frozen / flops) / run.hours,
        "implied_utilization_if_each_gpu_repeats_newton_schulz": hours_at_peak * repeated / flops / run.hours,
        "implied_price_per_gpu_hour": run.cost_usd / (run.hours * run.num_gpus),
        "implied_utilization_by_cost": hours_at_peak * run.num_gpus * price_per_hour / run.cost_usd,
    }
