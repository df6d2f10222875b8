"""Shared parts of the benchmarks: alternating timing, flags, and random weights."""

import argparse
import platform
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch

Input = TypeVar("Input")
Clock = Callable[[], float]


def alternate(
    work: Mapping[str, Callable[[Input], Any]],
    make_input: Callable[[], Input],
    repeats: int,
    clock: Clock = time.perf_counter,
    min_seconds: float = 0.0,
) -> dict[str, list[float]]:
    """Time alternatives in random order, so that other load on the machine affects all of them equally.

    Args:
        work: name -> function to time.
        make_input: maker of the input of a repeat, which all alternatives share; it is not timed.
        repeats: number of repeats, after one that warms up.
        clock: clock in seconds.
        min_seconds: continue until this much wall time has passed.

    Returns:
        name -> seconds of every repeat.
    """
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    value = make_input()
    for run in work.values():
        run(value)
    begin, done = time.perf_counter(), 0
    while done < repeats or time.perf_counter() - begin < min_seconds:
        value = make_input()
        for name in order.sample(list(work), len(work)):
            start = clock()
            work[name](value)
            seconds[name].append(clock() - start)
        done += 1
    return seconds


def add_timing_flags(parser: argparse.ArgumentParser, repeats: int | None, output: str) -> None:
    """Add --repeats, --threads, --clock and --output."""
    default = "ten seconds' worth, at least 5" if repeats is None else str(repeats)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"Number of repeats. Default: {default}.")
    parser.add_argument("--threads", type=int, help="Threads of PyTorch. Default: its own choice.")
    clock = "wall, or cpu: processor time, for one thread on a busy machine. Default: wall."
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help=clock)
    parser.add_argument("--output", type=Path, default=Path(output), help=f"JSON file. Default: {output}.")


def set_up(args: argparse.Namespace) -> tuple[Clock, dict[str, Any]]:
    """Set the number of threads. Return the clock, and versions and machine for the report."""
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(f"{versions} {machine}, {args.clock} time")
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    return clock, {"versions": versions, "machine": machine, "clock": args.clock}


def randomize(*networks: torch.nn.Module, seed: int = 0) -> None:
    """Give all matrices random values: an untrained network multiplies by zero."""
    generator = torch.Generator(next(networks[0].parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)


def compile_blocks(*networks: torch.nn.Module) -> None:
    """Compile every block as one graph with dynamic shapes, like `compile_repeated_blocks`, which stock PRX lacks."""
    torch._dynamo.reset()
    for network in networks:
        for block in network.blocks:
            block.compile(fullgraph=True, dynamic=True)
