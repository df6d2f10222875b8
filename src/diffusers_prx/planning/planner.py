"""What a run would take, before a GPU is rented: operations, memory, traffic, time and money.

Operations and activations are counted on the run's own networks (`counting.py`). Time follows from a utilization that
is given, not measured: the share of the GPU's peak that all operations of a step reach. Not in the plan: reading the
data, validation, checkpoints, and the start.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from torch import nn

from ..config.training_config import TrainingConfig
from ..latents import latent_channels, vae_scale_factor
from ..techniques.optimizers import MuonWeight, balance_across_ranks, muon_weights, newton_schulz_flops
from ..training.networks import Nets
from ..training.preflight import memory
from ..training.recipes import DATA, load_recipe, parse_config, read_command_line, read_run
from .counting import MicroBatch, Work, build_meta_networks, fake_tensors, optimizer_bytes, stored_bytes
from .gpus import GPU

logger = logging.get_logger(__name__)

# The 405B model of Llama 3 ran at 38% to 43% of an H100's bf16 peak (arXiv 2407.21783, table 4), its communication
# included. A smaller model, of smaller matrices, may stay below.
UTILIZATION = 0.40
UTILIZATION_SOURCE = "Llama 3 405B: 38% to 43% on H100 (arXiv 2407.21783)"
# What is left of a GPU's memory beside CUDA's context, NCCL's buffers and the gaps of the allocator: an assumption.
USABLE_MEMORY = 0.92
# tokens of a caption, for the cache, which keeps the real ones; that of the data that the cache was measured on
CAPTION_TOKENS = 113
STRATEGIES = ("ddp", "fsdp2", "hsdp")  # copies, shards over all GPUs, shards within groups and copies of those
OF_ALIGNMENT = ("teacher", "projector")
# Below this a GPU has done its part before Python has told it the next: a step launches thousands of kernels, some
# microseconds each. And above this share traffic does not hide behind the backward pass. Both are rules of thumb.
SMALL_BATCH_SECONDS = 0.03
SHARE_OF_TRAFFIC = 0.5
# what the planner needs of a recipe that names no data; nothing is read from it
NO_DATA = "(not named)"


@dataclass(frozen=True)
class Cluster:
    """What a run would be on.

    Args:
        gpu: of one kind.
        num_gpus: N, one process each.
        gpus_per_node: that share the fast link.
        strategy: one of `STRATEGIES`; the groups of `hsdp` are the nodes.
        utilization: share in (0, 1] of the GPU's peak.
        price_per_hour: of one GPU, US dollars.
    """

    gpu: GPU
    num_gpus: int
    gpus_per_node: int
    strategy: str
    utilization: float
    price_per_hour: float

    @property
    def strategies(self) -> list[str]:
        """Those that this cluster can have: hybrid ones take several whole nodes."""
        several = self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node == 0
        return [name for name in STRATEGIES if (name != "hsdp" or several) and (name == "ddp" or self.num_gpus > 1)]

    def shards(self, strategy: str) -> int:
        """Over how many GPUs weights are cut."""
        return {"ddp": 1, "fsdp2": self.num_gpus, "hsdp": min(self.num_gpus, self.gpus_per_node)}[strategy]

    def peak_flops(self, cfg: TrainingConfig) -> float:
        """Of one GPU, in a second."""
        return 1e12 * (self.gpu.bf16_tflops if cfg.mixed_precision == "bf16" else self.gpu.float32_tflops)


@dataclass(frozen=True)
class Published:
    """What is known of a run of the study.

    Args:
        hours, cost_usd, num_gpus: as published.
        peak_tflops: of one of its GPUs, bf16.
        gpu: their name.
        stages: (resolution, steps, images of a step) of each.
    """

    hours: float
    cost_usd: float
    num_gpus: int
    peak_tflops: float
    gpu: str
    stages: tuple[tuple[int, int, int], ...] = ()


# by the recipe's output_dir, which no two share; https://huggingface.co/blog/Photoroom/prx-part3
PUBLISHED = {"outputs/speedrun": Published(24, 1500, 32, 989.4, "H200", ((512, 100_000, 1024), (1024, 20_000, 512)))}


def read_config(recipe: Path, flags: list[str]) -> TrainingConfig:
    """A recipe with flags over it, as training would read it, but for the data, which no plan needs.

    A recipe may continue another one's pipeline that is not there yet. It is then planned with the networks of the
    recipe beside it that makes that pipeline.

    Raises:
        ValueError: see `parse_config`.
    """
    argv = ["--config", str(recipe), *flags]
    if not any(read_command_line(argv).settings.get(name) for name in DATA):
        argv += ["--dataset_name", NO_DATA]
    cfg = parse_config(argv)
    start = cfg.pretrained_model_name_or_path
    if start is None:
        return cfg
    if Path(start).exists():
        return read_run(argv)[0]
    for other in sorted(recipe.parent.glob("*.yaml")):
        made = load_recipe(other)
        if made.get("output_dir") == start and other != recipe:
            logger.warning(f"{start} is not there: planned with the networks of {other}, which makes it")
            names = ("transformer_config", "vae_name_or_path", "text_encoder_name_or_path", "text_encoder_config")
            return replace(
                cfg, pretrained_model_name_or_path=None, **{name: made[name] for name in names if name in made}
            )
    return cfg


def strategy_of(cfg: TrainingConfig, gpus_per_node: int) -> str:
    """Which of `STRATEGIES` a configuration asks for.

    Raises:
        ValueError: for groups of hybrid sharding that are not the nodes.
    """
    if cfg.sharding_size not in (None, gpus_per_node):
        raise ValueError(
            f"`sharding_size` is {cfg.sharding_size}; a plan takes the nodes for groups, of {gpus_per_node} GPUs "
            "(`gpus_per_node`): give both the same number."
        )
    return {"none": "ddp", "full": "fsdp2", "hybrid": "hsdp"}[cfg.sharding]


def published_run(recipe: Path, cfg: TrainingConfig) -> Published | None:
    """What was published of a recipe, if the configuration is the recipe's own but for where its data are."""
    found = PUBLISHED.get(str(load_recipe(recipe).get("output_dir")))
    if found is None:
        return None
    own = read_config(recipe, [])
    apart = {name: getattr(own, name) for name in (*DATA, "output_dir")}
    if replace(cfg, **apart) != own:
        return None
    stages = tuple(
        (stage.resolution, stage.max_train_steps, stage.train_batch_size * stage.gradient_accumulation_steps)
        for stage in own.stage_configs()
    )
    return found if stages == tuple((size, n, images // found.num_gpus) for size, n, images in found.stages) else None


# --- operations


def newton_schulz_work(cfg: TrainingConfig, trained: Mapping[str, nn.Module]) -> int:
    """Operations of Muon in one step, all ranks together: no rank repeats another's."""
    if cfg.optimizer != "muon":
        return 0
    stacked = muon_weights(trained, cfg.muon_fused)
    return sum(n * newton_schulz_flops(w.shape[0] // n, w.shape[1]) for w, n in stacked.items())


def flops_of_step(work: Mapping[str, Work], cfg: TrainingConfig, num_gpus: int, aligned: float) -> dict[str, float]:
    """Operations of one optimizer step on all GPUs together, by part.

    Args:
        work: of one micro-batch.
        cfg: of the stage.
        num_gpus: N.
        aligned: share of the stage's steps in which the alignment is on.
    """
    batches = cfg.gradient_accumulation_steps * num_gpus
    transformer = work["transformer"]
    parts: dict[str, float] = {
        "transformer forward": batches * transformer.forward,
        "transformer backward": batches * transformer.backward,
    }
    if transformer.again:
        parts["forward once more"] = batches * transformer.again
    for name, part in work.items():
        if name != "transformer":
            parts[name] = batches * part.total * (aligned if name in OF_ALIGNMENT else 1)
    return parts


def aligned_steps(cfg: TrainingConfig, first_step: int) -> int:
    """In how many steps of a stage the alignment is on, as far as its end is known before the run."""
    if not cfg.repa_weight:
        return 0
    end = math.inf if cfg.repa_until_step is None else cfg.repa_until_step
    return int(min(cfg.max_train_steps, max(0, end - first_step)))


# --- memory


def memory_parts(
    cfg: TrainingConfig, nets: Nets, activations: int, temporary: tuple[int, int], gathered: int, cluster: Cluster,
    strategy: str,
) -> dict[str, float]:  # fmt: skip
    """Bytes on one GPU at the worst moment, by part; frozen networks and what training keeps stand beside either the
    activations or the optimizer's temporary tensors, whichever is more.

    Args:
        cfg, nets: of the run.
        activations: see `MicroBatch.activations`.
        temporary: see `optimizer_bytes`.
        gathered: bytes of updates, see `muon_traffic`.
        cluster: what it runs on.
        strategy: one of `STRATEGIES`.
    """
    shards = cluster.shards(strategy)
    parts: dict[str, float] = {name: size / shards for name, size in memory(cfg, nets.trainable(cfg)).items()}
    if strategy == "ddp" and cluster.num_gpus > 1:
        parts["gradient buckets"] = parts["gradients"]  # DistributedDataParallel's own copy
    frozen = [nets.vae, nets.teacher, nets.lpips, nets.dino, *([] if cfg.train_text_encoder else [nets.text_encoder])]
    if any(module is not None for module in frozen):
        parts["frozen networks"] = stored_bytes([module for module in frozen if module is not None])
    of_optimizer = temporary[0] + temporary[1] / shards + gathered
    if activations >= of_optimizer:
        parts["activations"] = activations
    else:
        parts["optimizer step"] = of_optimizer
    if shards > 1:
        parts["gathered weights"] = unsharded_bytes(nets, cfg)
    return parts


def unsharded_bytes(nets: Nets, cfg: TrainingConfig) -> int:
    """Bytes that FSDP2 holds whole at a time, in float32: what is in no block, the weights of the block at work and
    of the next one, and the gradients of one."""
    blocks = [sum(w.nbytes for w in block.parameters()) for block in nets.transformer.blocks]
    whole = sum(w.nbytes for module in nets.trainable(cfg).values() for w in module.parameters())
    return whole - sum(blocks) + 3 * max(blocks)


# --- traffic


@dataclass(frozen=True)
class Transfer:
    """One kind of exchange in an optimizer step.

    Args:
        what: is exchanged.
        kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `broadcast`.
        ranks: of a group that exchanges.
        sent: bytes that each GPU sends in a step; with the ring algorithm where there is a choice.
        apart: the ranks of a group are on different nodes, one of each.
    """

    what: str
    kind: str
    ranks: int
    sent: float
    apart: bool = False

    def seconds(self, cluster: Cluster) -> float:
        """At the full speed of the links, with nothing else on them."""
        gpu, per_node = cluster.gpu, cluster.gpus_per_node
        if self.apart:
            return self.sent / (1e9 * gpu.network_gb_per_s)
        if self.ranks <= per_node:
            return self.sent / (1e9 * gpu.link_gb_per_s)
        if self.kind == "all-to-all":
            beyond = (self.ranks - per_node) / (self.ranks - 1)
            return max(
                self.sent * beyond / (1e9 * gpu.network_gb_per_s), self.sent * (1 - beyond) / (1e9 * gpu.link_gb_per_s)
            )
        # a ring goes through every node once, and NCCL makes one ring over every network card
        return self.sent / (1e9 * min(gpu.link_gb_per_s, per_node * gpu.network_gb_per_s))


def ring(ranks: int) -> float:
    """What a rank sends in an all-gather, a reduce-scatter or broadcasts of all parts, over the size of the whole."""
    return (ranks - 1) / ranks


def traffic(nets: Nets, cfg: TrainingConfig, num_gpus: int, shards: int) -> list[Transfer]:
    """What the processes exchange in one optimizer step, without a few scalars.

    DDP reduces float32 gradients once a step. FSDP2 gathers float32 weights for every forward and every backward, and
    scatters gradients, summed over its groups as well, after every backward.

    Args:
        nets: outlines.
        cfg: of the stage.
        num_gpus: N.
        shards: over how many of them weights are cut; 1: DDP.
    """
    trained = nets.trainable(cfg)
    replicas = num_gpus // shards
    whole = sum(w.nbytes for module in trained.values() for w in module.parameters())
    times = 1 if shards == 1 else cfg.gradient_accumulation_steps
    found = []
    if shards > 1:
        found.append(Transfer("weights", "all-gather", shards, 2 * times * whole * ring(shards)))
        found.append(Transfer("gradients", "reduce-scatter", shards, times * whole * ring(shards)))
    if replicas > 1:
        reduced = times * whole / shards
        found.append(Transfer("gradients", "all-reduce", replicas, 2 * reduced * ring(replicas), shards > 1))
    if cfg.optimizer == "muon":
        found += muon_traffic(cfg, trained, shards, replicas)[0]
    return found


def muon_traffic(
    cfg: TrainingConfig, trained: Mapping[str, nn.Module], shards: int, replicas: int
) -> tuple[list[Transfer], int]:
    """What `MuonAdamW` exchanges in one step, by its own division of the work; and the most bytes of updates that a
    rank gathers at a time."""
    size = 2 if cfg.muon_newton_schulz_dtype == "bf16" else 4
    weights = [
        MuonWeight(w, w, w, w.shape[0], w.shape[1], {"stacked": stacked})
        for w, stacked in muon_weights(trained, cfg.muon_fused).items()
    ]
    exchanged, gathered = [0] * (shards * replicas), [0] * shards
    most = 0
    for by_rank in balance_across_ranks(weights, shards * replicas):
        by_replica = [by_rank[first : first + shards] for first in range(0, len(by_rank), shards)]
        for rank in range(shards):
            # elements of the rows that this shard has of the weights dealt to each replica
            rows = [sum(_elements(weights, rank, shards) for weights in replica) for replica in by_replica]
            gathered[rank] += sum(rows)
            most = max(most, *rows)
            for number, replica in enumerate(by_replica):
                kept = _elements(replica[rank], rank, shards)
                own = sum(w.rows * w.columns for w in replica[rank])
                # rows of others' weights go to them, and the results of its own weights back
                exchanged[number * shards + rank] += rows[number] - kept + own - kept
    transfers = []
    if shards > 1:
        transfers.append(Transfer("Muon's matrices", "all-to-all", shards, size * max(exchanged)))
    if replicas > 1:
        sent = size * max(gathered) * ring(replicas)
        transfers.append(Transfer("Muon's updates", "broadcast", replicas, sent, shards > 1))
    return transfers, size * most if replicas > 1 else 0


def _elements(weights: Iterable[MuonWeight], rank: int, shards: int) -> int:
    """Elements that a shard has of these weights."""
    return sum(w.rows_by_shard(shards)[rank] * w.columns for w in weights)


# --- storage


def cache_bytes(nets: Nets, cfg: TrainingConfig, caption_tokens: float) -> dict[str, float]:
    """Bytes that `precompute_prx.py` would keep of one image, by column."""
    size, columns = cfg.resolution, {}
    if nets.vae is not None:
        values = latent_channels(nets.vae) * (size // vae_scale_factor(nets.vae)) ** 2
        random = type(nets.vae).__name__ in ("AutoencoderKL", "AutoencoderKLFlux2")  # keep a deviation as well
        columns["latents"] = 4.0 * values * (2 if random else 1)
    if nets.vae is None or cfg.lpips_weight or cfg.dino_weight:
        columns["pixels"] = 3.0 * size**2
    captions = max(1, len(cfg.caption_weights))
    columns["text"] = 2.0 * captions * caption_tokens * nets.transformer.config["context_in_dim"]
    if cfg.repa_weight:
        columns["teacher features"] = 2.0 * (size // nets.pixels_per_token) ** 2 * nets.teacher.hidden_size
    return columns


# --- the plan


def plan(
    cfg: TrainingConfig,
    cluster: Cluster,
    *,
    published: Published | None = None,
    text_tokens: int | None = None,
    caption_tokens: float = CAPTION_TOKENS,
    num_images: int | None = None,
) -> dict[str, Any]:
    """Everything about a run, as plain data: GB are 1e9 bytes, `flops` operations, all numbers of the whole cluster
    unless they say otherwise.

    Args:
        cfg: of the run.
        cluster: what it would run on.
        published: what is known of the same run.
        text_tokens: of the longest caption of a micro-batch, which the others are padded to; none: the limit.
        caption_tokens: of the mean caption, for the cache.
        num_images: of the data set, for the cache and the epochs; none: neither is told.

    Raises:
        ValueError: see `build_meta_networks`; for more `text_tokens` than the limit; for a strategy that needs other
            numbers of GPUs.
    """
    if cluster.strategy not in cluster.strategies:
        raise ValueError(
            f"`strategy` is {cluster.strategy}; accepted on {cluster.num_gpus} GPUs with {cluster.gpus_per_node} in a "
            f"node: {cluster.strategies}."
        )
    tokens = cfg.max_sequence_length if text_tokens is None else text_tokens
    if tokens > cfg.max_sequence_length:
        raise ValueError(f"`text_tokens` is {tokens}, more than `max_sequence_length` {cfg.max_sequence_length}.")
    with fake_tensors():
        nets = build_meta_networks(cfg)
        trained = nets.trainable(cfg)
        temporary = optimizer_bytes(nets, cfg)
        newton_schulz = newton_schulz_work(cfg, trained)
        stages: list[dict[str, Any]] = []
        first = 0
        for stage in cfg.stage_configs():
            stages.append(_plan_stage(stage, nets, cluster, tokens, first, newton_schulz))
            first += stage.max_train_steps
        memories = _memories(cfg, nets, cluster, stages, temporary)
        told: dict[str, Any] = {
            "parameters": {name: sum(w.numel() for w in module.parameters()) for name, module in trained.items()},
            "frozen_parameters": _frozen(nets, cfg),
        }
        if num_images is not None:
            told["storage"] = _storage(cfg, nets, caption_tokens, num_images)
    steps = sum(stage["steps"] for stage in stages)
    images = sum(stage["images_per_step"] * stage["steps"] for stage in stages)
    hours = sum(stage["hours"] for stage in stages)
    cost = hours * cluster.num_gpus * cluster.price_per_hour
    if num_images is not None:
        epochs = images / num_images
        told |= {"epochs": epochs, "hours_per_epoch": hours / epochs, "cost_usd_per_epoch": cost / epochs}
    chosen = memories[cluster.strategy]["as configured"]
    usable = USABLE_MEMORY * cluster.gpu.memory_gb
    result: dict[str, Any] = {
        "predicted_hours": hours,
        "predicted_cost_usd": cost,
        "implied_utilization": None,
        "memory_gb": chosen["total"],
        "flops_per_step": sum(stage["flops_per_step"] * stage["steps"] for stage in stages) / steps,
        "fits": chosen["total"] <= usable,
        "steps": steps,
        "images": images,
        "gpu_hours": hours * cluster.num_gpus,
        "usable_memory_gb": usable,
        "text_tokens": tokens,
        "cluster": asdict(cluster) | {"peak_tflops": cluster.peak_flops(cfg) / 1e12},
        **told,
        "stages": stages,
        "memory": memories,
        "published": None,
    }
    result["warnings"] = _warnings(result)
    if published is not None:
        result["published"] = implied(published, stages, cluster.num_gpus, cluster.price_per_hour)
        result["implied_utilization"] = result["published"]["implied_utilization"]
    return result


def _warnings(told: dict[str, Any]) -> list[str]:
    """What about a plan would make it a bad one."""
    found = []
    if not told["fits"]:
        found.append("as configured it does not fit: see what would, or lower train_batch_size")
    for stage in told["stages"]:
        of_batch = stage["seconds_computing"] / stage["micro_batch"][1]
        sending = stage["communication"][told["cluster"]["strategy"]]["seconds"]
        if of_batch < SMALL_BATCH_SECONDS:
            found.append(
                f"a micro-batch would take {1000 * of_batch:.2g} ms at {stage['resolution']} pixels: a GPU waits for "
                "Python then, and the utilization is out of reach"
            )
        if sending > SHARE_OF_TRAFFIC * stage["seconds_computing"]:
            found.append(
                f"the traffic of a step takes at least {sending / stage['seconds_computing']:.0%} of the time of its "
                f"operations at {stage['resolution']} pixels: the utilization may be out of reach"
            )
    return found


def _plan_stage(
    cfg: TrainingConfig, nets: Nets, cluster: Cluster, tokens: int, first_step: int, newton_schulz: int
) -> dict[str, Any]:
    """One stage: operations, seconds, traffic; its activations for both kinds of checkpointing."""
    steps = cfg.max_train_steps
    batch = MicroBatch(nets.for_losses(cfg, aligning=cfg.repa_weight > 0), cfg, tokens)
    work = batch.work()
    aligned = aligned_steps(cfg, first_step)
    parts = flops_of_step(work, cfg, cluster.num_gpus, aligned / steps)
    if newton_schulz:
        parts["Newton-Schulz"] = newton_schulz
    flops = sum(parts.values())
    computing = flops / (cluster.num_gpus * cluster.peak_flops(cfg) * cluster.utilization)
    exchanges: dict[str, dict[str, Any]] = {}
    for strategy in cluster.strategies:
        transfers = traffic(nets, cfg, cluster.num_gpus, cluster.shards(strategy))
        exchanges[strategy] = {
            "gb_sent_per_gpu": sum(t.sent for t in transfers) / 1e9,
            "seconds": sum(t.seconds(cluster) for t in transfers),
            "transfers": [
                {"what": t.what, "kind": t.kind, "ranks": t.ranks, "gb_sent_per_gpu": t.sent / 1e9} for t in transfers
            ],
        }
    exchanging = exchanges[cluster.strategy]["seconds"]
    return {
        "resolution": cfg.resolution,
        "steps": steps,
        "steps_with_alignment": aligned,
        "image_tokens": math.prod(batch.grid),
        "images_per_step": cfg.train_batch_size * cfg.gradient_accumulation_steps * cluster.num_gpus,
        "micro_batch": [cfg.train_batch_size, cfg.gradient_accumulation_steps],
        "flops_per_step": flops,
        "flops_per_step_by_part": parts,
        "seconds_per_step": max(computing, exchanging),
        "seconds_computing": computing,
        "hours": steps * max(computing, exchanging) / 3600,
        "communication": exchanges,
        "activations_gb": {
            "without checkpointing": batch.activations(False) / 1e9,
            "with checkpointing": batch.activations(True) / 1e9,
        },
    }


def _memories(
    cfg: TrainingConfig, nets: Nets, cluster: Cluster, stages: list[dict[str, Any]], temporary: tuple[int, int]
) -> dict[str, dict[str, dict[str, float]]]:
    """GB on one GPU by strategy and checkpointing, of the stage that takes the most."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    configured = "with checkpointing" if cfg.gradient_checkpointing else "without checkpointing"
    for strategy in cluster.strategies:
        shards = cluster.shards(strategy)
        gathered = 0
        if cfg.optimizer == "muon":
            gathered = muon_traffic(cfg, nets.trainable(cfg), shards, cluster.num_gpus // shards)[1]
        found[strategy] = {}
        for how in ("without checkpointing", "with checkpointing"):
            activations = int(1e9 * max(stage["activations_gb"][how] for stage in stages))
            parts = memory_parts(cfg, nets, activations, temporary, gathered, cluster, strategy)
            sizes = {name: size / 1e9 for name, size in parts.items()}
            found[strategy][how] = {"total": sum(sizes.values()), **sizes}
        found[strategy]["as configured"] = found[strategy][configured]
    return found


def _frozen(nets: Nets, cfg: TrainingConfig) -> dict[str, int]:
    modules = {"autoencoder": nets.vae, "teacher": nets.teacher, "LPIPS": nets.lpips, "DINO": nets.dino}
    if not cfg.train_text_encoder:
        modules["text encoder"] = nets.text_encoder
    return {name: sum(w.numel() for w in m.parameters()) for name, m in modules.items() if m is not None}


def _storage(cfg: TrainingConfig, nets: Nets, caption_tokens: float, num_images: int) -> dict[str, Any]:
    """TB of the caches of all images; stages of the same resolution share one."""
    columns: dict[int, dict[str, float]] = {}
    for stage in cfg.stage_configs():
        columns.setdefault(stage.resolution, {}).update(cache_bytes(nets, stage, caption_tokens))
    by_resolution = {
        str(resolution): {name: size * num_images / 1e12 for name, size in found.items()}
        for resolution, found in columns.items()
    }
    return {
        "num_images": num_images,
        "caption_tokens": caption_tokens,
        "total_tb": sum(sum(found.values()) for found in by_resolution.values()),
        "tb_by_resolution": by_resolution,
    }


def implied(run: Published, stages: list[dict[str, Any]], num_gpus: int, price_per_hour: float) -> dict[str, Any]:
    """The utilization that a published time, and a published cost, say about the operations of the same run."""
    flops = frozen = repeated = 0.0
    for stage in stages:
        for name, part in stage["flops_per_step_by_part"].items():
            # a step there had the images of its own number of GPUs; Newton-Schulz does not grow with them
            size = stage["steps"] * part * (1 if name == "Newton-Schulz" else run.num_gpus / num_gpus)
            flops += size
            repeated += size * (run.num_gpus if name == "Newton-Schulz" else 1)
            frozen += size * (name in ("autoencoder", "text encoder", "teacher", "LPIPS", "DINO", "decoder"))
    at_peak = flops / (run.num_gpus * run.peak_tflops * 1e12) / 3600  # hours
    return {
        **{name: value for name, value in asdict(run).items() if name != "stages"},
        "flops": flops,
        "implied_utilization": at_peak / run.hours,
        "implied_utilization_without_frozen": at_peak * (1 - frozen / flops) / run.hours,
        "implied_utilization_if_each_gpu_repeats_newton_schulz": at_peak * repeated / flops / run.hours,
        "implied_price_per_gpu_hour": run.cost_usd / (run.hours * run.num_gpus),
        "implied_utilization_by_cost": at_peak * run.num_gpus * price_per_hour / run.cost_usd,
    }


# --- the plan as a table

INDENT = 26


def table(told: dict[str, Any], title: str) -> str:
    """A plan in lines of a name and its value, for people."""
    cluster, stages = told["cluster"], told["stages"]
    gpu, strategy, count = cluster["gpu"], cluster["strategy"], cluster["num_gpus"]
    rows = [("plan", title), ("", f"{count} x {gpu['name']}, {strategy}")]
    rows += [(name, f"{count:,} parameters, trained") for name, count in told["parameters"].items()]
    rows += [(name, f"{count:,} parameters, frozen") for name, count in told["frozen_parameters"].items()]
    for number, stage in enumerate(stages):
        rows += _stage_rows(number if len(stages) > 1 else None, stage, told)
    rows += [("", ""), *_memory_rows(told), ("", "")]
    rows.append(("utilization", f"{cluster['utilization']:.0%} of {_peak(told)} assumed; {UTILIZATION_SOURCE}"))
    rows.append(
        (
            "time",
            f"{_hours(told['predicted_hours'])} for {told['steps']:,} steps, {_short(told['gpu_hours'])} GPU hours",
        )
    )
    price = cluster["price_per_hour"]
    rows.append(("cost", f"${_dollars(told['predicted_cost_usd'])} at ${price:.2f} per GPU hour"))
    rows += _published_rows(told) + _storage_rows(told)
    rows += [("not in it", "reading data, validation, checkpoints, start"), ("figures of the GPU", gpu["source"])]
    return "\n".join(f"{name:<{INDENT}}{value}".rstrip() for name, value in rows)


def _stage_rows(number: int | None, stage: dict[str, Any], told: dict[str, Any]) -> list[tuple[str, str]]:
    count, cluster = stage["images_per_step"], told["cluster"]
    size, accumulated = stage["micro_batch"]
    rows = [
        ("", ""),
        (
            "stage" if number is None else f"stage {number}",
            f"{stage['steps']:,} steps of {count:,} images ({size} x {accumulated} accumulated x "
            f"{cluster['num_gpus']}), {stage['resolution']} pixels, {stage['image_tokens']} image tokens, "
            f"{told['text_tokens']} text tokens",
        ),
        (
            "  operations",
            f"{stage['flops_per_step']:.3g} a step, {stage['flops_per_step'] / count:.3g} an image",
        ),
    ]
    for name, part in stage["flops_per_step_by_part"].items():
        note = ""
        if name in OF_ALIGNMENT and stage["steps_with_alignment"] < stage["steps"]:
            note = f"  (on in {stage['steps_with_alignment']:,} steps)"
        rows.append((f"    {name}", f"{part:<10.3g}{part / stage['flops_per_step']:>6.1%}{note}"))
    for strategy, exchange in stage["communication"].items():
        if not exchange["transfers"]:
            continue
        parts = ", ".join(f"{t['what']} {t['kind']} {_short(t['gb_sent_per_gpu'])}" for t in exchange["transfers"])
        rows.append(
            (
                f"  sent, {strategy}",
                f"{_short(exchange['gb_sent_per_gpu'])} GB per GPU and step ({parts}), "
                f"at least {exchange['seconds']:.2g} s",
            )
        )
    bound = "" if stage["seconds_per_step"] == stage["seconds_computing"] else ", which the traffic sets"
    rows.append(
        (
            "  time",
            f"{stage['seconds_per_step']:.3g} s a step{bound}, {count / stage['seconds_per_step']:,.0f} images a "
            f"second, {_hours(stage['hours'])}",
        )
    )
    return rows


def _memory_rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    """Every strategy with and without checkpointing, and what would not fit."""
    cluster, usable = told["cluster"], told["usable_memory_gb"]
    capacity = cluster["gpu"]["memory_gb"]
    rows = [("memory per GPU", f"{usable:.0f} of {capacity:g} GB can be used ({USABLE_MEMORY:.0%}, an assumption)")]
    for strategy, found in told["memory"].items():
        for how in ("without checkpointing", "with checkpointing"):
            parts = found[how]
            chosen = strategy == cluster["strategy"] and parts == found["as configured"]
            verdict = "fits" if parts["total"] <= usable else "DOES NOT FIT"
            listed = ", ".join(f"{name} {size:.3g}" for name, size in parts.items() if name != "total")
            mark = ">" if chosen else " "
            rows.append((f"{mark} {strategy}, {how.split()[0]}", f"{parts['total']:.1f} GB {verdict}: {listed}"))
    rows.append(("", "without and with: gradient checkpointing; >: as configured"))
    rows += [("warning", warning) for warning in told["warnings"]]
    return rows


def _published_rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    run = told["published"]
    if run is None:
        return []
    return [
        (
            "published",
            f"{run['hours']:g} h on {run['num_gpus']} {run['gpu']} and about ${run['cost_usd']:,.0f}: "
            f"{run['implied_utilization']:.1%} of the peak for the same {run['flops']:.3g} operations,",
        ),
        ("", f"{run['implied_utilization_without_frozen']:.1%} without the frozen networks,"),
        (
            "",
            f"{run['implied_utilization_if_each_gpu_repeats_newton_schulz']:.1%} if each GPU repeated all of "
            "Newton-Schulz, which is here shared out;",
        ),
        (
            "",
            f"time and cost together: ${run['implied_price_per_gpu_hour']:.2f} per GPU hour; the cost alone, at "
            f"${told['cluster']['price_per_hour']:.2f}: {run['implied_utilization_by_cost']:.1%}",
        ),
    ]


def _storage_rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    storage = told.get("storage")
    if storage is None:
        return []
    rows = [
        (
            "data",
            f"{storage['num_images']:,} images, {told['epochs']:.3g} epochs; one takes "
            f"{_hours(told['hours_per_epoch'])} and ${_dollars(told['cost_usd_per_epoch'])}",
        ),
        (
            "cache",
            f"{storage['total_tb']:,.4g} TB, at {storage['caption_tokens']:g} tokens in the mean caption",
        ),
    ]
    for resolution, columns in storage["tb_by_resolution"].items():
        listed = ", ".join(f"{name} {size:,.4g}" for name, size in columns.items())
        rows.append((f"  {resolution} pixels", f"TB: {listed}"))
    return rows


def _dollars(amount: float) -> str:
    return f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def _peak(told: dict[str, Any]) -> str:
    return f"{told['cluster']['peak_tflops']:g}e12 operations a second"


def _hours(hours: float) -> str:
    return f"{hours:.3g} h" if hours < 48 else f"{hours:,.0f} h ({hours / 24:.1f} days)"
