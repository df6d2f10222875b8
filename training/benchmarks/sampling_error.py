"""What solvers, step counts, guiders and caches do to the pictures of a trained pipeline, over the time they take.

    python training/benchmarks/sampling_error.py --model outputs/quickstart

Every way of sampling draws the same held-out scene prompts from the same noise. `error` is the root-mean-square
difference of the final latents to those of Euler with `--reference_steps` steps and the same guidance, over the
root-mean-square of the reference: it measures how well the ODE is solved; a few pictures in which something else is
drawn make most of it, so the median picture's stands beside it. What changes the answer itself (guidance at
some steps only, caches) is judged by `scene_accuracy`, the share of pictures of which every attribute of the prompt is
read back right, beside that of 28 Euler steps. `seconds` is the median time of a batch over the repeats, all ways
taking turns; `rows of the network` counts them per picture, two for a guided step. MagCache is left out: it needs
ratios of the network at hand that are measured first.

Written are sampling_error.json, sampling_error.md (the table) and sampling_error.png (error over time).
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance

from diffusers_prx import fast_scheduler, fast_sigmas
from diffusers_prx.data.scenes import CAPTIONS, LEVELS, ScenesDataset
from diffusers_prx.evaluation.generation import load_pipeline
from diffusers_prx.evaluation.scene_checker import read_scene, scene_matches

matplotlib.use("agg")
import matplotlib.pyplot as plt

SOLVERS = {
    "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, {"solver_order": 2}),
    "UniPC": (UniPCMultistepScheduler, {"solver_order": 2}),
}
FAST_LEVELS = "UniPC, dense ends"  # `fast_scheduler` with `fast_sigmas`
BASELINE = "Euler, 28"
FAST = 9  # steps of the fast preset


@dataclass
class Way:
    """One way of sampling: a name, a family (a line of the plot), and what it changes."""

    name: str
    family: str
    steps: int
    solver: str | None = None  # of SOLVERS, on the pipeline's noise levels, or FAST_LEVELS
    guider: Any = None
    cache: Any = None
    same_answer: bool = True
    seconds: list[float] = field(default_factory=list)


def ways(scale: float, quick: bool) -> list[Way]:
    found = [Way(f"Euler, {n}", "Euler", n) for n in ((28, 10) if quick else (50, 28, 20, 14, 10, 7, 5))]
    for solver in (*SOLVERS, FAST_LEVELS):
        for n in (FAST,) if quick else (20, 14, 12, 10, 9, 8, 6, 5):
            found.append(Way(f"{solver}, {n}", solver, n, solver))
    for base, solver, n in ((BASELINE, None, 28), (f"{FAST_LEVELS}, {FAST}", FAST_LEVELS, FAST)):
        guiders = {
            "guided 0 to 0.8": ClassifierFreeGuidance(scale, stop=0.8),
            "guided 0.2 to 0.8": ClassifierFreeGuidance(scale, start=0.2, stop=0.8),
            "guided 0 to 0.5": ClassifierFreeGuidance(scale, stop=0.5),
            "CFG-Zero*": ClassifierFreeZeroStarGuidance(scale, zero_init_steps=1 if n > 20 else 0),
            # as published; diffusers' other form, its default, weakens what is parallel to the prediction
            "APG": AdaptiveProjectedGuidance(scale - 1, eta=0.0, use_original_formulation=True),
        }
        for name, guider in guiders.items():
            found.append(Way(f"{base}, {name}", "guiders", n, solver, guider=guider, same_answer=False))
    caches: dict[str, Any] = {f"FirstBlockCache {t}": FirstBlockCacheConfig(t) for t in (0.05, 0.1, 0.2)}
    for interval in (2, 3, 4):
        caches[f"TaylorSeer every {interval}"] = TaylorSeerCacheConfig(
            interval, 4, max_order=1, taylor_factors_dtype=torch.float32, use_lite_mode=True
        )
    for name, cache in caches.items():
        found.append(Way(f"{BASELINE}, {name}", "caches", 28, cache=cache, same_answer=False))
    return found


def draw(
    pipeline: Any,
    way: Way,
    text: dict[str, Any],
    noise: torch.Tensor,
    resolution: int,
    scale: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Any:
    """Latents (B, C, h, w) of one batch; the pipeline is left as it was."""
    drawing = copy.copy(pipeline)
    levels: dict[str, Any] = {"num_inference_steps": way.steps}
    if way.solver == FAST_LEVELS:
        drawing.scheduler = fast_scheduler()
        levels = {"sigmas": fast_sigmas(way.steps)}
    elif way.solver is not None:
        solver, settings = SOLVERS[way.solver]
        drawing.scheduler = solver(
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            flow_shift=pipeline.scheduler.shift,
            **settings,
        )
    guidance = {"guidance_scale": scale} if way.guider is None else {"guider": way.guider}
    if way.cache is not None:
        drawing.transformer.enable_cache(way.cache)
    try:
        start = clock()
        latents = drawing(
            **text,
            **guidance,
            **levels,
            latents=noise,
            height=resolution,
            width=resolution,
            use_resolution_binning=False,
            output_type="latent",
        ).images
        return latents, clock() - start
    finally:
        if way.cache is not None:
            drawing.transformer.disable_cache()


def pictures(pipeline: Any, latents: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        images = pipeline.image_processor.postprocess(pipeline._decode(latents), output_type="np")
    return (images * 255).round().astype(np.uint8)


def evaluations(way: Way) -> float:
    """Rows of the network per picture; with a cache an upper bound, since it decides by itself."""
    guided = way.steps
    if way.guider is not None:
        first, last = (int(share * way.steps) for share in (way.guider._start, way.guider._stop))
        guided = last - first
    return way.steps + guided


def plot(results: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 5))
    for family in dict.fromkeys(result["family"] for result in results):
        line = sorted((r["seconds"], r["error"]) for r in results if r["family"] == family)
        style = "" if family in ("guiders", "caches") else "-"
        axis.plot(*zip(*line), linestyle=style, marker="o", label=family)
    axis.set(xscale="log", yscale="log", xlabel="seconds per batch", ylabel="relative error to the reference")
    axis.axhline(next(r["error"] for r in results if r["name"] == BASELINE), color="gray", linestyle=":")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def as_markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| way | rows of the network | error | median picture's | seconds | Euler, 28 over it | `scene_accuracy` |",
        "|" + 7 * "---|",
    ]
    for r in results:
        rows = f"{r['evaluations']:.0f}" + (" at most" if r["family"] == "caches" else "")
        error = f"{r['error']:.4f}" + ("" if r["same_answer"] else " (another answer)")
        cells = [r["name"], rows, error, f"{r['median_error']:.4f}", f"{r['seconds']:.2f}", f"{r['speed']:.2f}x"]
        lines.append("| " + " | ".join([*cells, f"{r['scene_accuracy']:.3f}"]) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a saved pipeline: a folder or a Hub id")
    parser.add_argument("--level", choices=list(LEVELS), default="easy")
    parser.add_argument("--caption", choices=CAPTIONS, default="long")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--num_prompts", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--reference_steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="batches whose time is taken for each way")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine that is busy")
    parser.add_argument("--quick", action="store_true", help="a few ways only, to see that it runs")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/sampling_error"))
    args = parser.parse_args(argv)

    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    resolution = pipeline.config["default_sample_size"] or pipeline.default_resolution
    scenes = ScenesDataset(
        args.level,
        LEVELS[args.level].min_resolution,
        args.seed,
        split="heldout",
        caption=args.caption,
        size=args.num_prompts,
    )
    samples = [scenes[index] for index in range(args.num_prompts)]
    side = resolution // pipeline.vae_scale_factor
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.num_prompts, pipeline.transformer.config["in_channels"], side, side)
    noise = torch.randn(shape, generator=generator) * pipeline.config["noise_scale"]
    batches = []
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    for first in range(0, args.num_prompts, args.batch_size):
        part = slice(first, first + args.batch_size)
        with torch.no_grad():
            encoded = pipeline.encode_prompt([sample["caption"] for sample in samples[part]])
        batches.append((dict(zip(names, encoded)) | {"prompt": None}, noise[part]))

    reference_way = Way("reference", "Euler", args.reference_steps)
    reference = torch.cat(
        [draw(pipeline, reference_way, text, x, resolution, args.guidance_scale)[0] for text, x in batches]
    )
    everything = ways(args.guidance_scale, args.quick)
    latents: dict[str, list[torch.Tensor]] = {way.name: [] for way in everything}
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    order = random.Random(args.seed)
    for place, (text, x) in enumerate(batches):
        for way in order.sample(everything, len(everything)):
            drawn, seconds = draw(pipeline, way, text, x, resolution, args.guidance_scale, clock)
            latents[way.name].append(drawn)
            if place < args.repeats and len(x) == args.batch_size:
                way.seconds.append(seconds)
        print(f"batch {place + 1} of {len(batches)}", flush=True)

    results: list[dict[str, Any]] = []
    for way in everything:
        drawn = torch.cat(latents[way.name])
        squares = (drawn - reference).square().flatten(1).mean(dim=1)  # of each picture
        difference = squares.mean().sqrt() / reference.square().mean().sqrt()
        median = squares.median().sqrt() / reference.square().mean().sqrt()
        right = [
            scene_matches(read_scene(image, args.level), sample["scene"], args.caption)
            for image, sample in zip(pictures(pipeline, drawn), samples)
        ]
        results.append(
            {
                "name": way.name,
                "family": way.family,
                "steps": way.steps,
                "evaluations": evaluations(way),
                "error": difference.item(),
                "median_error": median.item(),
                "seconds": statistics.median(way.seconds),
                "scene_accuracy": float(np.mean(right)),
                "same_answer": way.same_answer,
            }
        )
    baseline = next(result["seconds"] for result in results if result["name"] == BASELINE)
    for result in results:
        result["speed"] = baseline / result["seconds"]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = {"settings": settings, "resolution": resolution, "results": results}
    (args.output_dir / "sampling_error.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output_dir / "sampling_error.md").write_text(as_markdown(results))
    plot(results, args.output_dir / "sampling_error.png")
    print(as_markdown(results))


if __name__ == "__main__":
    main()
