"""The planner's FLOPs, memory and communication against those of real steps, and its output.

`pytest tests/planning/test_planner.py -s -k "real_step or tracker or two_processes"` prints both sides.
"""

import copy
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import runs
import tiny
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.planning.communication import STRATEGIES, Cluster, step_transfers
from diffusers_prx.planning.counting import (
    FUSED_ATTENTION,
    Flops,
    MicroBatch,
    build_meta_networks,
    fake_tensors,
    stored_bytes,
)
from diffusers_prx.planning.gpus import GPUS
from diffusers_prx.planning.planner import (
    PublishedRun,
    aligned_steps,
    cache_bytes,
    compare_with_published,
    flops_of_step,
    make_plan,
    memory_parts,
    newton_schulz_flops_per_step,
    read_config,
    strategy_of,
)
from diffusers_prx.planning.table import format_plan
from diffusers_prx.techniques.optimizers import build_optimizer
from diffusers_prx.text import tokenize_prompts
from diffusers_prx.training import network_configs as known_networks
from diffusers_prx.training.distributed import TrainableModules, shard_in_place
from diffusers_prx.training.networks import Nets, build_nets
from diffusers_prx.training.recipes import load_recipe
from diffusers_prx.training.rng import StepRandom
from diffusers_prx.training.trainer import step_function
from training import plan_prx

RECIPES = runs.ROOT / "training" / "recipes"
# Activations dominate the memory, and a step takes half a second.
SMALL = {
    "patch_size": 4,
    "hidden_size": 128,
    "mlp_ratio": 3.5,
    "num_heads": 4,
    "depth": 3,
    "axes_dim": [16, 16],
}
H200 = Cluster(GPUS["h200"], 8, 8, "ddp", 0.4, 4.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    runs.save_text_encoder(folder / "text")
    runs.save_teacher(folder / "teacher")
    tiny.vae_kl().save_pretrained(folder / "vae")
    return {"vgg": str(runs.save_vgg16(folder))} | {n: str(folder / n) for n in ("text", "teacher", "vae")}


def config(folders: dict[str, str], **changes: Any) -> TrainingConfig:
    values = {
        "resolution": 64,
        "train_text_encoder": False,
        "transformer_config": SMALL,
        "caption_dropout": 0.0,
        "max_sequence_length": 48,
    }
    return TrainingConfig(**runs.settings("unused", folders["text"], **values | changes))


REPA = {"repa_weight": 0.5, "repa_teacher": "teacher", "repa_block": 1}
DINO = {"dino_weight": 0.01, "dino_teacher": "teacher", "dino_size": 32}
# name -> settings; networks are keys of `folders`
STEPS: dict[str, dict[str, Any]] = {
    "dense": {},
    "TREAD": {"route_ratio": 0.5, "route_range": [1, 3]},
    "SPRINT": {
        "route_ratio": 0.75,
        "route_range": [1, 3],
        "transformer_config": SMALL | {"fusion_range": [1, 3]},
    },
    "REPA": REPA,
    "REPA and TREAD": REPA | {"route_ratio": 0.5, "route_range": [1, 3], "repa_projector": "attention"},
    "iREPA": REPA | {"repa_projector": "conv", "repa_spatial_gamma": 0.8},
    "checkpointing": {"gradient_checkpointing": True, "mixed_precision": "bf16"},
    "checkpointing within a budget": {"gradient_checkpointing": True, "activation_budget": 0.4},  # one block of three
    "checkpointing, TREAD and REPA": REPA
    | {"gradient_checkpointing": True, "route_ratio": 0.5, "route_range": [1, 3]},
    "latents": {
        "vae_name_or_path": "vae",
        "prediction_type": "velocity",
        "contrastive_weight": 0.05,
        "transformer_config": SMALL | {"patch_size": 2, "resolution_tokens": True},
    },
    "perceptual": DINO | {"lpips_weight": 0.1, "resolution": 32, "train_batch_size": 1},
    "perceptual in latents": DINO
    | {
        "vae_name_or_path": "vae",
        "perceptual_decode_latents": True,
        "dino_crop": True,
        "transformer_config": SMALL | {"patch_size": 2},
    },
    "text encoder trained along": {"train_text_encoder": True},
    "weights in bf16": {"weights_dtype": "bf16", "mixed_precision": "bf16"},
    "guidance distillation": {"objective": "guidance_distillation", "caption_dropout": 0.1},
    "mean velocity": {"objective": "mean_velocity", "distill_teacher_steps": 8, "caption_dropout": 0.1},
    "LADD": {"objective": "ladd", "caption_dropout": 0.1},
    "DPO": {"objective": "dpo", "rejected_image_column": "rejected", "caption_dropout": 0.1, "dataset_name": "pairs"},
    "rewards": {
        "objective": "nft",
        "reward_scorers": {"runs:brightness": 1.0},
        "reward_images_per_prompt": 3,
        "reward_steps": 2,
        "reward_guidance_scale": 2.0,
        "reward_kl_weight": 0.1,
    },
}


def case(name: str, folders: dict[str, str], **changes: Any) -> TrainingConfig:
    settings = STEPS[name] | changes
    found = {
        key: folders[value]
        for key, value in settings.items()
        if key.endswith(("teacher", "path")) and value in folders
    }
    if settings.get("lpips_weight"):
        found["lpips_backbone"] = folders["vgg"]
    return config(folders, **settings | found)


def text_tokens(nets: Nets, cfg: TrainingConfig, captions: list[str]) -> int:
    """Return the length of the longest caption."""
    _, mask = tokenize_prompts(nets.tokenizer, captions, cfg.max_sequence_length, nets.clean_caption)
    return int(mask.sum(dim=1).max())


def real_loss(nets: Nets, cfg: TrainingConfig, batch: dict[str, Any]) -> torch.Tensor:
    batch = batch | {"rejected_uint8": batch["pixels_uint8"]}
    with torch.autocast("cpu", torch.bfloat16, enabled=cfg.mixed_precision == "bf16"):
        return step_function(cfg)(batch, nets, cfg, StepRandom(0, 0, batch["sample_index"])).loss


# Combinations of the fast cases, or large networks (VGG-16).
SLOW = (
    "REPA and TREAD",
    "iREPA",
    "checkpointing",
    "perceptual",
    "perceptual in latents",
    "text encoder trained along",
)


def cases(names: Iterable[str], slow: Collection[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


@pytest.mark.parametrize("name", cases(STEPS, SLOW))
def test_flops_equal_those_of_a_real_step(folders, name):
    cfg = case(name, folders)
    nets, batch = build_nets(cfg), runs.batch(cfg.train_batch_size, cfg.resolution)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as counter:
        real_loss(nets, cfg, batch).backward()
    tokens = text_tokens(nets, cfg, batch["captions"])
    with fake_tensors():
        flops = MicroBatch(build_meta_networks(cfg), cfg, tokens).flops()
    planned = sum(part.total for part in flops.values())
    print(f"\nFLOPs, {name}: planned {planned:,}, counted {counter.get_total_flops():,}")
    assert planned == pytest.approx(counter.get_total_flops(), rel=1e-6)  # measured: equal
    assert (flops["transformer"].recomputed > 0) == cfg.gradient_checkpointing
    assert all(part.forward > 0 for part in flops.values())


def test_flops_of_the_transformer_equal_those_of_its_layers(folders):
    """Computed by hand; the backward pass of attention computes the scores again."""
    cfg, text = config(folders, train_batch_size=3), 20
    with fake_tensors():
        nets = build_meta_networks(cfg)
        flops = MicroBatch(nets, cfg, text).flops()["transformer"]
    width, depth, batch, tokens, values = 128, 3, 3, (64 // 4) ** 2, 3 * 4 * 4
    mlp = int(3.5 * width)
    per_token = 3 * width**2 + width**2 + 3 * width * mlp
    block = tokens * per_token + text * 2 * width**2 + 6 * width**2
    first = tokens * values * width + text * 16 * width + 256 * width  # their inputs need no gradient
    rest = width**2 + 2 * width**2 + tokens * width * values
    linear = 2 * batch * (depth * block + rest)
    attention = depth * 4 * batch * tokens * (tokens + text) * width
    first *= 2 * batch
    assert flops.forward == linear + first + attention
    assert flops.backward == 2 * linear + first + attention * 5 // 2


@pytest.mark.parametrize("fused", [False, True])
def test_flops_of_muon_equal_those_of_its_step(folders, fused):
    cfg = config(folders, optimizer="muon", muon_fused=fused, train_text_encoder=True)
    with fake_tensors():
        trained = build_meta_networks(cfg).trainable(cfg)
        optimizer = build_optimizer(cfg, trained)
        for module in trained.values():
            for weight in module.parameters():
                weight.grad = torch.zeros_like(weight)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
    assert newton_schulz_flops_per_step(cfg, trained) == counter.get_total_flops() > 0


def tracked_memory(nets: Nets, cfg: TrainingConfig, batch: dict[str, Any]) -> dict[str, float]:
    """Return the memory at the peak of the second micro-batch, by part, as torch's tracker sees it."""
    trained = nets.trainable(cfg)
    optimizer = build_optimizer(cfg, trained)
    real_loss(nets, cfg, batch).backward()
    optimizer.step()
    frozen = [module for module in (nets.vae, nets.text_encoder, nets.teacher) if module is not None]
    for module in frozen:
        module.requires_grad_(True)  # the tracker requires it; they compute without gradients anyway
    modules = (*trained.values(), *frozen)
    with MemTracker() as tracker:
        tracker.track_external(*modules, optimizer)
        before = next(iter(tracker.get_tracker_snapshot("current").values()))
        real_loss(nets, cfg, batch).backward()
        optimizer.step()
    peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    named = {getattr(key, "name", key): size for key, size in before.items()}
    total = next(size for key, size in peak.items() if getattr(key, "name", key) == "Total")
    kept = sum(size for key, size in named.items() if key != "Total")
    return {
        "weights": named["PARAM"] + named["BUFFER"],
        "gradients": named["GRAD"],
        "optimizer": named["OPT"],
        "activations": total - kept,
        "total": total,
    }


MEMORY = {
    "dense": {},
    "TREAD": {"mixed_precision": "bf16"},
    "SPRINT": {"optimizer": "muon"},
    "REPA": {"mixed_precision": "bf16"},
    "latents": {},
    "checkpointing": {"optimizer": "muon"},
}


@pytest.mark.parametrize("name", cases(MEMORY, ("dense", "SPRINT", "REPA", "latents")))
def test_memory_equals_that_of_torch_tracker(folders, name):
    cfg = case(name, folders, train_batch_size=16, **MEMORY[name])
    nets, batch = build_nets(cfg), runs.batch(16, cfg.resolution)
    tracked = tracked_memory(nets, cfg, batch)
    single = replace(H200, num_gpus=1)
    tokens = text_tokens(nets, cfg, batch["captions"])
    with fake_tensors():
        meta_nets = build_meta_networks(cfg)
        activations = MicroBatch(meta_nets, cfg, tokens).activations(cfg.gradient_checkpointing)
        parts = memory_parts(cfg, meta_nets, single, "ddp", activations, (0, 0))
    for part, size in (("activations", parts["activations"]), ("total", sum(parts.values()))):
        print(f"\nmemory, {name}, {part}: planned {size / 1e6:.2f} MB, tracked {tracked[part] / 1e6:.2f} MB")
    assert parts["weights"] + parts["frozen networks"] == tracked["weights"]
    assert parts["gradients"] == tracked["gradients"]
    assert parts["optimizer"] == pytest.approx(
        tracked["optimizer"], rel=0.001
    )  # AdamW stores its step counts as tensors
    assert parts["activations"] == pytest.approx(tracked["activations"], rel=0.15)
    assert sum(parts.values()) == pytest.approx(tracked["total"], rel=0.15)
    assert tracked["activations"] > 0.4 * tracked["total"]  # otherwise the line above proves little


def test_checkpointing_takes_less_memory_and_more_flops(folders):
    with fake_tensors():
        cfg = config(folders, train_batch_size=16)
        batch = MicroBatch(build_meta_networks(cfg), cfg, 20)
        assert batch.activations(True) < 0.6 * batch.activations(False)
        plain = batch.flops()["transformer"]
        checkpointed = MicroBatch(batch.nets, replace(cfg, gradient_checkpointing=True), 20).flops()["transformer"]
    assert plain.recomputed == 0
    # only the blocks are recomputed
    assert 0.8 * plain.forward < checkpointed.recomputed < plain.forward
    assert (checkpointed.forward, checkpointed.backward) == (plain.forward, plain.backward)


# --- communication


class SentBytes(TorchDispatchMode):
    """Count the bytes that this rank sends, by collective operation and as in the ring algorithm."""

    def __init__(self, world: int):
        super().__init__()
        self.world, self.bytes = world, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            tensors = [t for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor)]
            share = (self.world - 1) / self.world
            if name == "allreduce_":
                self.bytes["all-reduce"] += 2 * share * sum(t.nbytes for t in tensors)
            elif name in ("_allgather_base_", "allgather_"):
                self.bytes["all-gather"] += share * sum(t.nbytes for t in tensors)  # the results
            elif name == "broadcast_":
                self.bytes["broadcast"] += share * sum(t.nbytes for t in tensors)
            elif name == "_reduce_scatter_base_":
                self.bytes["reduce-scatter"] += share * self.world * sum(t.nbytes for t in tensors)
            elif name == "alltoall_base_":
                given, sizes = args[1], args[4]
                rank = dist.get_rank()
                elements = sum(size for place, size in enumerate(sizes) if place != rank)
                self.bytes["all-to-all"] += elements * given.element_size()
            else:
                self.bytes[name] += sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def communicate_on_a_rank(rank: int, world: int, strategy: str, cfg: TrainingConfig, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    nets = build_nets(cfg)
    transformer = nets.transformer
    trained = TrainableModules({"transformer": transformer})
    if strategy == "fsdp2":
        shard_in_place(trained, init_device_mesh("cpu", (world,)))
    called = trained if strategy == "fsdp2" else DistributedDataParallel(trained, broadcast_buffers=False)

    def predict(*inputs: torch.Tensor) -> torch.Tensor:
        return transformer(*inputs, return_dict=False)[0]

    optimizer = build_optimizer(cfg, {"transformer": transformer})
    size = (4, 3, cfg.resolution, cfg.resolution)
    for _ in range(3):  # the first steps order DDP's buckets
        with SentBytes(world) as sent:
            output = called(predict, torch.randn(size), torch.rand(4), torch.randn(4, 10, 16))
            output.square().mean().backward()
            optimizer.step()
    torch.save(dict(sent.bytes), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_communication_equals_that_of_two_processes(folders, strategy, tmp_path):
    cfg = config(folders, optimizer="muon", transformer_config=SMALL | {"depth": 2})
    world = 2
    mp.start_processes(communicate_on_a_rank, (world, strategy, cfg, str(tmp_path)), nprocs=world, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    with fake_tensors():
        transfers = step_transfers(build_meta_networks(cfg), cfg, world, {"ddp": 1, "fsdp2": world}[strategy])
    planned: Counter[str] = Counter()
    for transfer in transfers:
        planned[transfer.kind] += transfer.bytes_sent
    assert set(planned) == set(ranks[0])
    for kind, size in planned.items():
        sent = max(rank[kind] for rank in ranks)
        print(f"\ncommunication, {strategy}, {kind}: planned {size:,.0f} bytes, sent {sent:,.0f}")
        assert size == pytest.approx(sent, rel=0.01), kind


def test_communication_of_hybrid_sharding(folders):
    """16 GPUs in groups of 4: weights are gathered within groups, gradients are also summed across them."""
    cfg = config(folders, gradient_accumulation_steps=3)
    with fake_tensors():
        nets = build_meta_networks(cfg)
        size = sum(w.nbytes for w in nets.transformer.parameters())
        transfers = {(t.content, t.kind): t for t in step_transfers(nets, cfg, 16, 4)}
        muon = step_transfers(nets, replace(cfg, optimizer="muon"), 16, 4)
    assert transfers["weights", "all-gather"].bytes_sent == 3 * 2 * size * 3 / 4
    assert transfers["gradients", "reduce-scatter"].bytes_sent == 3 * size * 3 / 4
    assert transfers["gradients", "all-reduce"].bytes_sent == 3 * 2 * size / 4 * 3 / 4
    assert [t.ranks for t in transfers.values()] == [4, 4, 4]
    assert [t.across_nodes for t in transfers.values()] == [False, False, True]
    assert {(t.content, t.kind, t.across_nodes) for t in muon} > {
        ("Muon's matrices", "all-to-all", False),
        ("Muon's updates", "broadcast", True),
    }


# --- the plan


TINY: dict[str, Any] = {"transformer_config": runs.TRANSFORMER}


def plan_tiny(cfg: TrainingConfig, cluster: Cluster = H200, **changes: Any) -> dict[str, Any]:
    return make_plan(cfg, cluster, **{"text_tokens": 20} | changes)


@pytest.fixture(scope="module")
def with_muon(folders) -> dict[str, Any]:
    return plan_tiny(config(folders, **TINY, max_train_steps=1000, mixed_precision="bf16", optimizer="muon"))


def test_hours_and_cost_follow_from_flops(folders, with_muon):
    (stage,) = with_muon["stages"]
    assert sum(stage["flops_per_step_by_part"].values()) == with_muon["flops_per_step"]
    seconds = with_muon["flops_per_step"] / (8 * 989.4e12 * 0.4)
    assert stage["seconds_computing"] == pytest.approx(seconds)
    assert with_muon["predicted_hours"] == 1000 * max(seconds, stage["communication"]["ddp"]["seconds"]) / 3600
    assert with_muon["predicted_cost_usd"] == pytest.approx(with_muon["predicted_hours"] * 8 * 4)
    # one GPU has no communication and an eighth of the batch; float32 does not use the tensor cores
    cfg = config(folders, **TINY, max_train_steps=1000, optimizer="muon")
    alone = plan_tiny(cfg, replace(H200, num_gpus=1, utilization=0.2))
    newton_schulz = stage["flops_per_step_by_part"]["Newton-Schulz"]
    assert alone["flops_per_step"] - newton_schulz == pytest.approx((with_muon["flops_per_step"] - newton_schulz) / 8)
    assert alone["predicted_hours"] == pytest.approx(1000 * alone["flops_per_step"] / (67e12 * 0.2) / 3600)
    assert list(alone["memory"]) == ["ddp"]


def test_alignment_counts_only_in_its_steps(folders):
    cfg = case("REPA", folders, max_train_steps=100, lr_warmup_steps=0)
    assert aligned_steps(cfg, 0) == aligned_steps(replace(cfg, repa_until_step=100), 0) == 100
    assert aligned_steps(replace(cfg, repa_until_step=150), 100) == 50
    assert aligned_steps(replace(cfg, repa_until_step=100), 100) == 0
    assert aligned_steps(config(folders), 0) == 0
    flops = {"transformer": Flops(10, 20, 10), "text encoder": Flops(7)}
    flops |= {"teacher": Flops(4), "projector": Flops(1, 2)}
    parts = flops_of_step(flops, replace(cfg, gradient_accumulation_steps=3), 2, 0.25)
    transformer = {"transformer forward": 60, "transformer backward": 120, "forward once more": 60}
    assert parts == transformer | {"text encoder": 42, "teacher": 6, "projector": 4.5}


def test_plan_that_does_not_fit_is_marked(folders):
    cfg = config(folders, transformer_config=SMALL | {"depth": 2}, train_batch_size=16, gradient_accumulation_steps=2)
    small = replace(H200, num_gpus=16, gpu=replace(H200.gpu, memory_gb=0.14))
    found = plan_tiny(cfg, small)
    assert list(found["memory"]) == list(STRATEGIES)
    assert not found["fits"]
    assert found["warnings"][0].startswith("the configuration does not fit")
    assert "the GPU waits for Python" in found["warnings"][1]
    assert found["memory_gb"] == found["memory"]["ddp"]["without checkpointing"]["total"] > 0.1288
    assert found["memory"]["ddp"]["with checkpointing"]["total"] < found["usable_memory_gb"] == pytest.approx(0.1288)
    lines = format_plan(found, "small").splitlines()
    assert any(line.startswith("> ddp, without") and "DOES NOT FIT" in line for line in lines)
    assert any(line.startswith("  fsdp2, with ") and " fits: " in line for line in lines)
    weights = {name: parts["with checkpointing"]["weights"] for name, parts in found["memory"].items()}
    assert weights["fsdp2"] == pytest.approx(weights["ddp"] / 16)
    assert weights["hsdp"] == pytest.approx(weights["ddp"] / 8)


def test_strategy_follows_the_sharding_of_the_recipe(folders):
    expected = {"none": "ddp", "full": "fsdp2", "hybrid": "hsdp"}
    assert {kind: strategy_of(config(folders, sharding=kind), 8) for kind in expected} == expected
    hybrid = config(folders, sharding="hybrid", sharding_size=4)
    assert strategy_of(hybrid, 4) == "hsdp"
    with pytest.raises(ValueError, match="`sharding_size` is 4"):
        strategy_of(hybrid, 8)


def test_unsupported_strategy_is_refused(folders):
    with pytest.raises(ValueError, match="`strategy` is hsdp"):
        plan_tiny(config(folders), replace(H200, strategy="hsdp"))


def test_utilization_implied_by_a_published_run(with_muon):
    run = PublishedRun(hours=2.0, cost_usd=100.0, num_gpus=4, peak_tflops=100.0, gpu="X")
    found = compare_with_published(run, with_muon["stages"], 8, 4.0)  # planned on 8 GPUs, published on 4
    parts = with_muon["stages"][0]["flops_per_step_by_part"]
    newton_schulz = parts["Newton-Schulz"]
    flops = 1000 * ((sum(parts.values()) - newton_schulz) / 2 + newton_schulz)
    utilization = flops / (2 * 3600 * 4 * 100e12)
    assert found["implied_utilization"] == pytest.approx(utilization)
    frozen = 1000 * parts["text encoder"] / 2
    assert found["implied_utilization_without_frozen"] == pytest.approx(utilization * (1 - frozen / flops))
    repeated = flops + 3 * 1000 * newton_schulz
    assert found["implied_utilization_if_each_gpu_repeats_newton_schulz"] == pytest.approx(
        utilization * repeated / flops
    )
    assert found["implied_price_per_gpu_hour"] == 100 / 8
    # $100 at $4 are 25 GPU hours instead of 8
    assert found["implied_utilization_by_cost"] == pytest.approx(utilization * 8 / 25)


def test_storage_equals_that_of_the_cache(folders):
    cfg = case("latents", folders, **REPA | {"repa_teacher": folders["teacher"], "contrastive_weight": 0.0})
    with fake_tensors():
        nets = build_meta_networks(cfg)
        latents = cache_bytes(nets, cfg, 10.5)
        pixels = cache_bytes(
            build_meta_networks(config(folders)), config(folders, caption_weights={"a": 1, "b": 1}), 10
        )
    assert latents == {"latents": 2 * 4 * 4 * 32 * 32, "text": 2 * 10.5 * 16, "teacher features": 2 * 16 * 16 * 16}
    assert pixels == {"pixels": 3 * 64 * 64, "text": 2 * 2 * 10 * 16}


# --- networks that are known without the Hub


# Gemma 2 2B has 2,614,341,888 parameters (its model card says 2.61B); Qwen3 1.7B and 8B, without an output layer of
# their own, 1.72B and 7.57B (model cards: 1.7B and 8.2B with one); ViT-L 0.30B and ViT-B 0.09B (arXiv 2304.07193)
SIZES = {
    "google/t5gemma-2b-2b-ul2": 2_614_341_888,
    "Qwen/Qwen3-VL-Embedding-2B": 1.72e9,
    "Qwen/Qwen3-VL-8B-Instruct": 7.57e9,
    "facebook/dinov2-with-registers-large": 0.304e9,
    "facebook/dinov2-with-registers-base": 0.0866e9,
    "facebook/dinov3-vitl16-pretrain-lvd1689m": 0.303e9,
    "black-forest-labs/FLUX.1-dev": 83.8e6,
    "REPA-E/e2e-flux-vae": 83.8e6,
    "black-forest-labs/FLUX.2-dev": 84e6,
    "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": 312e6,
    # DINOv2-B, and a decoder of 28 layers of width 1152 with MLPs of 4096 (arXiv 2510.11690)
    "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08": 0.0866e9 + 28 * (4 * 1152**2 + 2 * 1152 * 4096),
}


def known_meta_networks() -> Iterator[tuple[str, Any]]:
    for name in known_networks.TEXT_ENCODERS:
        yield name, known_networks.meta_text_encoder(known_networks.text_config(name, tables=True))
    for name in known_networks.TEACHERS:
        yield name, known_networks.meta_teacher("repa_teacher", name, tables=True)
    for name in known_networks.AUTOENCODERS:
        yield name, known_networks.meta_autoencoder(name, tables=True)


def test_known_networks_have_their_published_sizes():
    with fake_tensors():
        found = {name: sum(w.numel() for w in module.parameters()) for name, module in known_meta_networks()}
    assert found == {name: pytest.approx(size, rel=0.005) for name, size in SIZES.items()}
    assert found["google/t5gemma-2b-2b-ul2"] == SIZES["google/t5gemma-2b-2b-ul2"]


def flags_of(path: Path) -> list[str]:
    """Return the flags that a recipe requires from its user, except the data."""
    recipe = load_recipe(path)
    text_sources = ("text_encoder_name_or_path", "text_encoder_config", "pretrained_model_name_or_path")
    return [] if any(recipe.get(name) for name in text_sources) else TEXT_ENCODER


TEXT_ENCODER = ["--text_encoder_name_or_path", "google/t5gemma-2b-2b-ul2"]


def test_all_networks_of_the_recipes_are_known():
    known = {**known_networks.TEXT_ENCODERS, **known_networks.TEACHERS, **known_networks.AUTOENCODERS}
    for path in RECIPES.glob("*.yaml"):
        for cfg in read_config(path, flags_of(path)).stage_configs():
            named = {cfg.text_encoder_name_or_path, cfg.vae_name_or_path, cfg.repa_teacher, cfg.dino_teacher} - {None}
            made_here = {name for name in named if name.startswith(("outputs/", "data/"))}
            assert named - made_here <= set(known), path


def test_modules_listed_twice_count_once():
    module = torch.nn.Linear(3, 4)
    assert stored_bytes([module, copy.copy(module), module]) == 4 * 16


def test_fake_tensors_do_not_remain_in_the_cache_of_dinov3():
    """DINOv3 caches patch coordinates for all models of a process."""
    config = known_networks.DINOv3ViTConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1
    )

    def features() -> torch.Tensor:
        return known_networks.AutoModel.from_config(config)(torch.zeros(1, 3, 64, 64)).last_hidden_state

    for _ in range(2):
        with fake_tensors(), known_networks.no_init_weights():
            features()
        assert features().isfinite().all()


# --- training/plan_prx.py


@pytest.fixture(scope="module")
def recipe(folders, tmp_path_factory) -> Path:
    """A recipe without data."""
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    settings = config(folders, **TINY, max_train_steps=10).to_dict()
    path.write_text(json.dumps(settings | {"dataset_name": None, "stages": [{"resolution": 64}, {"resolution": 32}]}))
    return path


ON_EIGHT = ["--gpu", "h200", "--num_gpus", "8"]


def test_script_prints_a_plan_as_json_and_as_a_table(recipe, capsys):
    plan_prx.main(["--config", str(recipe), *ON_EIGHT, "--json", "--num_images", "1000", "--caption_tokens", "10"])
    found = json.loads(capsys.readouterr().out)
    for key in ("predicted_hours", "predicted_cost_usd", "memory_gb", "flops_per_step"):
        assert found[key] > 0
    assert found["implied_utilization"] is None
    assert found["text_tokens"] == 48
    assert [stage["resolution"] for stage in found["stages"]] == [64, 32]
    assert found["steps"] == 20
    assert found["images"] == 20 * 4 * 8
    assert found["epochs"] == 0.64
    # two resolutions, each with pixels and text
    assert found["storage"]["total_tb"] == pytest.approx(1000 * (3 * 64**2 + 3 * 32**2 + 2 * 2 * 10 * 16) / 1e12)
    plan_prx.main(["--config", str(recipe), *ON_EIGHT, "--stages", "[]", "--use_ema", "--ema_update_every", "1"])
    text = capsys.readouterr().out
    for part in ("8 x NVIDIA H200 SXM", "40% of", "fits", "average"):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_gpus", "0"], "--num_gpus"),
        (["--utilization", "40"], "--utilization"),
        (["--price_per_hour", "-1"], "--price_per_hour"),
        (["--text_tokens", "49"], "`text_tokens` is 49"),
        (["--config", "nowhere.yaml"], "`config`"),
        (["--text_encoder_name_or_path", "some/model"], "`text_encoder_name_or_path`"),
        (["--vae_name_or_path", "some/vae"], "`vae_name_or_path`"),
        (["--pretrained_model_name_or_path", "none", "--transformer_config", "{}"], ".*none"),
        (["--route_ratio", "0.5", "--route_range", "[1, 9]"], "`route_range`"),
    ],
)
def test_invalid_input_is_reported_in_one_line(recipe, flags, message):
    with pytest.raises(SystemExit, match=f"^error: {message}") as end:
        plan_prx.main(["--config", str(recipe), *ON_EIGHT, *flags])
    assert "\n" not in str(end.value)


def test_unknown_flags_are_refused(recipe, capsys):
    with pytest.raises(SystemExit):
        plan_prx.main(["--config", str(recipe), *ON_EIGHT, "--gpu", "tpu"])
    assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--no_such_flag"):
        plan_prx.main(["--config", str(recipe), *ON_EIGHT, "--no_such_flag", "1"])


def test_networks_of_a_missing_pipeline_come_from_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without outputs/baseline
    cfg, base = read_config(RECIPES / "sft.yaml", []), read_config(RECIPES / "baseline.yaml", [])
    assert cfg.transformer_config == base.transformer_config
    assert cfg.vae_name_or_path == base.vae_name_or_path
    assert cfg.max_train_steps == 20_000


def test_published_run_requires_the_unchanged_recipe():
    recipe = RECIPES / "speedrun.yaml"
    run = plan_prx.published_run(recipe, read_config(recipe, ["--dataset_name", "mine"]))
    assert run is not None
    assert (run.hours, run.cost_usd, run.num_gpus) == (24, 1500, 32)
    assert plan_prx.published_run(recipe, read_config(recipe, ["--use_ema", "false"])) is None
    for other in (RECIPES / "muon.yaml", RECIPES / "cpu" / "speedrun.yaml"):
        assert plan_prx.published_run(other, read_config(other, [])) is None


# the planner does not count adapters
FULL_TRAINING = sorted(path for path in RECIPES.glob("*.yaml") if not load_recipe(path).get("lora_rank"))


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL_TRAINING, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.save_teacher(tmp_path / "outputs" / "tools" / "scenes_teacher")  # a recipe names what a tool has made
    plan_prx.main(["--config", str(path), "--gpu", "h200", "--num_gpus", "32", "--json", *flags_of(path)])
    found = json.loads(capsys.readouterr().out)
    assert found["predicted_hours"] > 0
    published = found["implied_utilization"]
    assert (published is not None) == (path.stem == "speedrun")
    assert published is None or 0.05 < published < 0.6
