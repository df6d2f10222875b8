"""Time a training step with Muon against one with AdamW: same network and batches, alternating in one process.

    python training/benchmarks/bench_muon.py                          # 4096 tokens per step; allow for minutes
    python training/benchmarks/bench_muon.py --images 64 --repeats 5  # four times the tokens for the same matrices
    python training/benchmarks/bench_muon.py --threads 1 --clock cpu  # on a machine that is busy with other work

A step is forward, backward and optimizer of a PRX of width 512 with 8 blocks, on 32x32 latents (256 tokens per image)
with 100 tokens of text. Muon costs the same in every step whatever the batch, so its share falls with the tokens. It
is timed twice: with one matrix per projection (the default), and with the study's fused ones (`--muon_fused`).

The three take turns in random order, so that whatever else the machine does falls on all of them alike; a number is
the median over the repeats, a ratio is a ratio of medians. Where Muon's time goes is read from PyTorch's profiler in
steps of their own. With `--clock cpu` a number is processor time, to be used with one thread: waiting threads count as
well.
"""

import argparse
import copy
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
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


def make_sides(newton_schulz: str) -> dict[str, tuple[torch.nn.Module, Optimizer]]:
    """The same random network three times, each with its optimizer."""
    model = PRXTransformer2DModel(**CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    settings = TrainingConfig(
        dataset_name="scenes",
        transformer_config=CONFIG,
        text_encoder_name_or_path="none",
        adam_epsilon=1e-8,
        muon_newton_schulz_dtype=newton_schulz,
    )
    changes = {"adamw": {}, "muon": {"optimizer": "muon"}, "muon_fused": {"optimizer": "muon", "muon_fused": True}}
    sides = {}
    for name, change in changes.items():
        network = copy.deepcopy(model)
        sides[name] = (network, build_optimizer(replace(settings, **change), {"transformer": network}))
    return sides


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
    sides: dict[str, tuple[torch.nn.Module, Optimizer]],
    batches: Callable[[], Batch],
    autocast: bool,
    clock: Callable[[], float],
    repeats: int,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every repeat of every side: forward with backward, and the optimizer."""
    order = random.Random(0)
    seconds: dict[str, dict[str, list[float]]] = {name: {"backward": [], "optimizer": []} for name in sides}
    for repeat in range(repeats + 1):
        batch = batches()
        for name in order.sample(list(sides), len(sides)):
            model, optimizer = sides[name]
            start = clock()
            backward(model, batch, autocast)
            between = clock()
            optimizer.step()
            end = clock()
            optimizer.zero_grad()
            if repeat > 0:  # the first one warms up
                seconds[name]["backward"].append(between - start)
                seconds[name]["optimizer"].append(end - between)
    return seconds


def parts_of(model: torch.nn.Module, optimizer: MuonAdamW, batch: Batch, autocast: bool, repeats: int) -> dict:
    """Median wall seconds of the parts of Muon's step; the rest of it is AdamW."""
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
    parser.add_argument("--images", type=int, default=16, help=f"per step, of {TOKENS_PER_IMAGE} tokens each")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of forward and backward")
    parser.add_argument("--newton_schulz_dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, help="threads of PyTorch; default: its own choice")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_muon.json"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(f"{versions} {machine}, {args.clock} time")
    tokens = args.images * TOKENS_PER_IMAGE
    print(f"{tokens} tokens per step, {args.dtype}; Newton-Schulz {args.newton_schulz_dtype}\n")

    sides = make_sides(args.newton_schulz_dtype)
    generator = torch.Generator().manual_seed(1)
    autocast = args.dtype == "bf16"
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    seconds = measure(sides, lambda: make_batch(args.images, generator), autocast, clock, args.repeats)
    lines: dict[str, dict] = {}
    print("| optimizer | forward and backward ms | optimizer ms | step ms | over AdamW | matrices |")
    print("|---|---|---|---|---|---|")
    for name, of_side in seconds.items():
        step = statistics.median(map(sum, zip(*of_side.values())))
        line = {part: statistics.median(times) for part, times in of_side.items()} | {"step": step}
        line["over_adamw"] = step / lines["adamw"]["step"] if lines else 1.0
        line["matrices"] = getattr(sides[name][1], "orthogonalized", 0)
        lines[name] = line | {"seconds": of_side}
        cells = [f"{1000 * line[part]:.0f}" for part in ("backward", "optimizer", "step")]
        print(f"| {name} | {' | '.join(cells)} | **{line['over_adamw']:.2f}x** | {line['matrices']} |", flush=True)

    print(f"\n| Muon's step, wall ms | {' | '.join(PARTS)} |")
    print("|---|" + "---|" * len(PARTS))
    batch = make_batch(args.images, generator)
    for name in ("muon", "muon_fused"):
        lines[name]["parts"] = parts_of(*sides[name], batch, autocast, args.repeats)
        print(f"| {name} | " + " | ".join(f"{1000 * value:.0f}" for value in lines[name]["parts"].values()) + " |")

    settings = {"images": args.images, "dtype": args.dtype, "newton_schulz_dtype": args.newton_schulz_dtype}
    report = {"versions": versions, "machine": machine, "clock": args.clock, **settings, "config": CONFIG, **lines}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
