"""Time training steps with Muon and AdamW on the same network and batches, alternating in one process.

    python training/benchmarks/bench_muon.py                          # 4096 tokens per step, several minutes
    python training/benchmarks/bench_muon.py --images 64 --repeats 5  # four times the tokens for the same matrices
    python training/benchmarks/bench_muon.py --threads 1 --clock cpu  # on a busy machine

A step is forward, backward and optimizer of a PRX with width 512 and 8 blocks, on 32x32 latents (256 tokens per image)
with 100 text tokens. Muon's cost does not depend on the batch, so its share falls with the number of tokens. It is
timed with one matrix per projection (the default) and with the study's fused matrices (`--muon_fused`).

A number is the median over the repeats; a ratio is a ratio of medians. PyTorch's profiler measures the parts of Muon's
step in separate steps.
"""

import argparse
import copy
import json
import statistics
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from timing import Clock, add_timing_flags, alternate, randomize, set_up
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.models.transformer_prx import PRXTransformer2DModel
from diffusers_prx.techniques.optimizers import MuonAdamW, build_optimizer

CONFIG = {
    "in_channels": 16,
    "patch_size": 2,
    "context_in_dim": 2304,
    "hidden_size": 512,
    "num_heads": 8,
    "depth": 8,
    "axes_dim": [32, 32],
}
LATENT_SIZE = 32
TOKENS_PER_IMAGE = (LATENT_SIZE // 2) ** 2
TEXT_TOKENS = 100
PARTS = ("momentum", "exchange", "newton_schulz", "update")

Batch = dict[str, torch.Tensor]


Candidates = dict[str, tuple[torch.nn.Module, Optimizer]]


def make_candidates(newton_schulz: str) -> Candidates:
    """Return copies of one random network, each with its optimizer."""
    model = PRXTransformer2DModel(**CONFIG)
    randomize(model)
    settings = TrainingConfig(
        dataset_name="scenes",
        transformer_config=CONFIG,
        text_encoder_name_or_path="none",
        adam_epsilon=1e-8,
        muon_newton_schulz_dtype=newton_schulz,
    )
    changes = {"adamw": {}, "muon": {"optimizer": "muon"}, "muon_fused": {"optimizer": "muon", "muon_fused": True}}
    candidates = {}
    for name, change in changes.items():
        network = copy.deepcopy(model)
        candidates[name] = (network, build_optimizer(replace(settings, **change), {"transformer": network}))
    return candidates


def make_batch(images: int, generator: torch.Generator) -> Batch:
    shape = (images, CONFIG["in_channels"], LATENT_SIZE, LATENT_SIZE)
    return {
        "clean": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "timestep": torch.rand(images, generator=generator),
        "text": torch.randn(images, TEXT_TOKENS, CONFIG["context_in_dim"], generator=generator),
    }


def backward(model: torch.nn.Module, batch: Batch, autocast: bool) -> None:
    timestep = batch["timestep"][:, None, None, None]
    noisy = (1 - timestep) * batch["clean"] + timestep * batch["noise"]
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        velocity = model(noisy, batch["timestep"], batch["text"], return_dict=False)[0]
    F.mse_loss(velocity.float(), batch["noise"] - batch["clean"]).backward()


def measure(
    candidates: Candidates, images: int, generator: torch.Generator, autocast: bool, clock: Clock, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every repeat: forward with backward, and the optimizer."""
    optimizer_seconds: dict[str, list[float]] = {name: [] for name in candidates}

    def step(name: str, batch: Batch) -> None:
        model, optimizer = candidates[name]
        backward(model, batch, autocast)
        start = clock()
        optimizer.step()
        optimizer_seconds[name].append(clock() - start)
        optimizer.zero_grad()

    work = {name: partial(step, name) for name in candidates}
    totals = alternate(work, lambda: make_batch(images, generator), repeats, clock)
    seconds = {}
    for name, total in totals.items():
        optimizer = optimizer_seconds[name][1:]  # the first one warms up
        seconds[name] = {"backward": [a - b for a, b in zip(total, optimizer)], "optimizer": optimizer}
    return seconds


def parts_of(model: torch.nn.Module, optimizer: MuonAdamW, batch: Batch, autocast: bool, repeats: int) -> dict:
    """Return the median wall seconds of the parts of Muon's step; the rest is AdamW."""
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    backward(model, batch, autocast)
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            optimizer.step()
        totals = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
        for name in PARTS:
            parts[name].append(totals[f"MuonAdamW.{name}"])
    optimizer.zero_grad()
    return {name: statistics.median(times) for name, times in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=16, help=f"Images per step, with {TOKENS_PER_IMAGE} tokens each."
    )
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="Type of forward and backward.")
    parser.add_argument("--newton_schulz_dtype", choices=["bf16", "fp32"], default="bf16")
    add_timing_flags(parser, 10, "outputs/bench_muon.json")
    args = parser.parse_args()
    clock, environment = set_up(args)
    tokens = args.images * TOKENS_PER_IMAGE
    print(f"{tokens} tokens per step, {args.dtype}; Newton-Schulz {args.newton_schulz_dtype}\n")

    candidates = make_candidates(args.newton_schulz_dtype)
    generator = torch.Generator().manual_seed(1)
    autocast = args.dtype == "bf16"
    seconds = measure(candidates, args.images, generator, autocast, clock, args.repeats)
    lines: dict[str, dict] = {}
    print("| optimizer | forward and backward ms | optimizer ms | step ms | over AdamW | matrices |")
    print("|---|---|---|---|---|---|")
    for name, parts in seconds.items():
        step = statistics.median(map(sum, zip(*parts.values())))
        line = {part: statistics.median(times) for part, times in parts.items()} | {"step": step}
        line["over_adamw"] = step / lines["adamw"]["step"] if lines else 1.0
        line["matrices"] = getattr(candidates[name][1], "orthogonalized", 0)
        lines[name] = line | {"seconds": parts}
        cells = [f"{1000 * line[part]:.0f}" for part in ("backward", "optimizer", "step")]
        print(f"| {name} | {' | '.join(cells)} | **{line['over_adamw']:.2f}x** | {line['matrices']} |", flush=True)

    print(f"\n| Muon's step, wall ms | {' | '.join(PARTS)} |")
    print("|---|" + "---|" * len(PARTS))
    batch = make_batch(args.images, generator)
    for name in ("muon", "muon_fused"):
        lines[name]["parts"] = parts_of(*candidates[name], batch, autocast, args.repeats)
        print(f"| {name} | " + " | ".join(f"{1000 * value:.0f}" for value in lines[name]["parts"].values()) + " |")

    settings = {"images": args.images, "dtype": args.dtype, "newton_schulz_dtype": args.newton_schulz_dtype}
    report = {**environment, **settings, "config": CONFIG, **lines}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
