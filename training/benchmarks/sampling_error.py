"""Measure the error and the time of solvers, step counts, guiders, caches and a distilled student.

    python training/benchmarks/sampling_error.py --model model_cards/prx-scenes-small \\
        --student model_cards/prx-scenes-turbo --caption short

Every method draws the same held-out scene prompts from the same noise. `error` is the root-mean-square difference of
the final latents to those of Euler with `--reference_steps` steps and the same guidance, relative to the
root-mean-square of the reference. It measures how well the ODE is solved. A few images with other content dominate it,
so the error of the median image is listed as well. Methods that change the answer itself (guidance at some steps,
caches, a student) are judged by `scene_accuracy`, the share of images in which every attribute of the prompt is
correct. The student (`--student`) is a pipeline or an adapter for the model; it draws without guidance.
`seconds` is the median time of a batch; the methods alternate. `rows of the network` counts rows per image, two for a
guided step. MagCache is left out, because it needs ratios measured on the network.

Output: sampling_error.json, sampling_error.md (table) and sampling_error.png (error and accuracy over time).
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
from few_steps import load_student

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
FAST_STEPS = 9  # of the fast preset
STUDENT = "distilled student"
FAMILIES = ("Euler", *SOLVERS, FAST_LEVELS, "guiders", "caches", STUDENT)


@dataclass
class Method:
    """A sampling method.

    Args:
        name: name in the table.
        family: line of the plot.
        steps: denoising steps.
        solver: key of SOLVERS, on the pipeline's noise levels, or FAST_LEVELS; None: Euler.
        guider: guider in place of guidance at every step.
        cache: configuration of a step cache.
        student: pipeline that draws in place of the model, without guidance.
        same_answer: True if the method solves the same ODE as the reference.
    """

    name: str
    family: str
    steps: int
    solver: str | None = None
    guider: Any = None
    cache: Any = None
    student: Any = None
    same_answer: bool = True
    seconds: list[float] = field(default_factory=list)


def methods(scale: float, quick: bool, student: Any, student_steps: list[int]) -> list[Method]:
    found = [Method(f"Euler, {n}", "Euler", n) for n in ((28, 10) if quick else (50, 28, 20, 14, 10, 7, 5))]
    for solver in (*SOLVERS, FAST_LEVELS):
        for n in (FAST_STEPS,) if quick else (20, 14, 12, 10, 9, 8, 6, 5):
            found.append(Method(f"{solver}, {n}", solver, n, solver))
    for base, solver, n in ((BASELINE, None, 28), (f"{FAST_LEVELS}, {FAST_STEPS}", FAST_LEVELS, FAST_STEPS)):
        guiders = {
            "guided 0 to 0.8": ClassifierFreeGuidance(scale, stop=0.8),
            "guided 0.2 to 0.8": ClassifierFreeGuidance(scale, start=0.2, stop=0.8),
            "guided 0 to 0.5": ClassifierFreeGuidance(scale, stop=0.5),
            "CFG-Zero*": ClassifierFreeZeroStarGuidance(scale, zero_init_steps=1 if n > 20 else 0),
            # as published; diffusers' default form weakens the part parallel to the prediction
            "APG": AdaptiveProjectedGuidance(scale - 1, eta=0.0, use_original_formulation=True),
        }
        for name, guider in guiders.items():
            found.append(Method(f"{base}, {name}", "guiders", n, solver, guider=guider, same_answer=False))
    caches: dict[str, Any] = {f"FirstBlockCache {t}": FirstBlockCacheConfig(t) for t in (0.05, 0.1, 0.2)}
    for interval in (2, 3, 4):
        caches[f"TaylorSeer every {interval}"] = TaylorSeerCacheConfig(
            interval, 4, max_order=1, taylor_factors_dtype=torch.float32, use_lite_mode=True
        )
    for name, cache in caches.items():
        found.append(Method(f"{BASELINE}, {name}", "caches", 28, cache=cache, same_answer=False))
    if student is not None:
        for n in student_steps:
            found.append(Method(f"{STUDENT}, {n}", STUDENT, n, student=student, same_answer=False))
    return found


def draw(
    pipeline: Any,
    method: Method,
    text: dict[str, Any],
    noise: torch.Tensor,
    resolution: int,
    scale: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Any:
    """Return the latents (B, C, h, w) of one batch and the seconds. The pipeline does not change."""
    drawing = copy.copy(method.student or pipeline)
    levels: dict[str, Any] = {"num_inference_steps": method.steps}
    if method.solver == FAST_LEVELS:
        drawing.scheduler = fast_scheduler()
        levels = {"sigmas": fast_sigmas(method.steps)}
    elif method.solver is not None:
        solver, settings = SOLVERS[method.solver]
        drawing.scheduler = solver(
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            flow_shift=pipeline.scheduler.shift,
            **settings,
        )
    guidance = {"guidance_scale": 1.0 if method.student else scale}
    if method.guider is not None:
        guidance = {"guider": method.guider}
    if method.cache is not None:
        drawing.transformer.enable_cache(method.cache)
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
        if method.cache is not None:
            drawing.transformer.disable_cache()


def decode(pipeline: Any, latents: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        images = pipeline.image_processor.postprocess(pipeline._decode(latents), output_type="np")
    return (images * 255).round().astype(np.uint8)


def evaluations(method: Method) -> float:
    """Return the rows of the network per image; an upper bound with a cache."""
    guided = 0 if method.student else method.steps
    if method.guider is not None:
        first, last = (int(share * method.steps) for share in (method.guider._start, method.guider._stop))
        guided = last - first
    return method.steps + guided


def plot(results: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    labels = {"error": "relative error to the reference", "scene_accuracy": "scene_accuracy"}
    for axis, (value, label) in zip(axes, labels.items()):
        for family in dict.fromkeys(result["family"] for result in results):
            line = sorted((r["seconds"], r[value]) for r in results if r["family"] == family)
            style = "" if family in ("guiders", "caches") else "-"
            axis.plot(*zip(*line), linestyle=style, marker="o", label=family)
        axis.set(xscale="log", xlabel="seconds per batch", ylabel=label)
        axis.axhline(next(r[value] for r in results if r["name"] == BASELINE), color="gray", linestyle=":")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_yscale("log")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def as_markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| method | rows of the network | error | median image | seconds | Euler, 28 over it | `scene_accuracy` |",
        "|" + 7 * "---|",
    ]
    for r in results:
        rows = f"{r['evaluations']:.0f}" + (" at most" if r["family"] == "caches" else "")
        error = f"{r['error']:.4f}" + ("" if r["same_answer"] else " (another answer)")
        cells = [r["name"], rows, error, f"{r['median_error']:.4f}", f"{r['seconds']:.2f}", f"{r['speed']:.2f}x"]
        lines.append("| " + " | ".join([*cells, f"{r['scene_accuracy']:.3f}"]) + " |")
    return "\n".join(lines) + "\n"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Saved pipeline: a folder or a Hub id.")
    parser.add_argument("--student", help="Distilled pipeline, or an adapter for the model: folder or file.")
    parser.add_argument("--student_steps", type=int, nargs="+", default=[4, 2, 1], help="Steps of the student.")
    parser.add_argument("--level", choices=list(LEVELS), default="easy", help="Level of the scenes.")
    parser.add_argument("--caption", choices=CAPTIONS, default="long", help="Kind of the captions.")
    parser.add_argument("--seed", type=int, default=2026, help="Seed of scenes and noise.")
    parser.add_argument("--num_prompts", type=int, default=128, help="Number of prompts.")
    parser.add_argument("--batch_size", type=int, default=32, help="Prompts per call.")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="Scale of guidance.")
    parser.add_argument("--reference_steps", type=int, default=200, help="Euler steps of the reference.")
    parser.add_argument("--repeats", type=int, default=3, help="Number of batches that are timed.")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="Use cpu on a busy machine.")
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="Only methods of these kinds. Default: all."
    )
    parser.add_argument("--quick", action="store_true", help="Only a few methods, to see that it runs.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/sampling_error"), help="Output folder.")
    return parser.parse_args(argv)


@torch.no_grad()
def make_batches(
    pipeline: Any, prompts: list[str], resolution: int, args: argparse.Namespace
) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Return (text arguments, noise) of every batch."""
    side = resolution // pipeline.vae_scale_factor
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.num_prompts, pipeline.transformer.config["in_channels"], side, side)
    noise = torch.randn(shape, generator=generator) * pipeline.config["noise_scale"]
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    batches = []
    for first in range(0, args.num_prompts, args.batch_size):
        part = slice(first, first + args.batch_size)
        encoded = pipeline.encode_prompt(prompts[part])
        batches.append((dict(zip(names, encoded)) | {"prompt": None}, noise[part]))
    return batches


def compare(
    pipeline: Any,
    method: Method,
    latents: torch.Tensor,
    reference: torch.Tensor,
    samples: list[Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return the results of one method."""
    squares = (latents - reference).square().flatten(1).mean(dim=1)  # per image
    scale = reference.square().mean().sqrt()
    correct = [
        scene_matches(read_scene(image, args.level), sample["scene"], args.caption)
        for image, sample in zip(decode(pipeline, latents), samples)
    ]
    return {
        "name": method.name,
        "family": method.family,
        "steps": method.steps,
        "evaluations": evaluations(method),
        "error": (squares.mean().sqrt() / scale).item(),
        "median_error": (squares.median().sqrt() / scale).item(),
        "seconds": statistics.median(method.seconds),
        "scene_accuracy": float(np.mean(correct)),
        "same_answer": method.same_answer,
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pipeline = load_pipeline(args.model, dtype="float32")
    student = None if args.student is None else load_student(args.student, args.model)
    resolution = pipeline.config["default_sample_size"] or pipeline.default_resolution
    min_resolution, size = LEVELS[args.level].min_resolution, args.num_prompts
    scenes = ScenesDataset(args.level, min_resolution, args.seed, "heldout", args.caption, size)
    samples = [scenes[index] for index in range(size)]
    batches = make_batches(pipeline, [sample["caption"] for sample in samples], resolution, args)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter

    def run(method: Method, batch: tuple[dict[str, Any], torch.Tensor]) -> tuple[torch.Tensor, float]:
        return draw(pipeline, method, *batch, resolution, args.guidance_scale, clock)

    euler = Method("reference", "Euler", args.reference_steps)
    reference = torch.cat([run(euler, batch)[0] for batch in batches])
    compared = methods(args.guidance_scale, args.quick, student, args.student_steps)
    compared = [method for method in compared if method.family in args.families or method.name == BASELINE]
    latents: dict[str, list[torch.Tensor]] = {method.name: [] for method in compared}
    order = random.Random(args.seed)
    for index, batch in enumerate(batches):
        for method in order.sample(compared, len(compared)):
            drawn, seconds = run(method, batch)
            latents[method.name].append(drawn)
            if index < args.repeats and len(drawn) == args.batch_size:
                method.seconds.append(seconds)
        print(f"batch {index + 1} of {len(batches)}", flush=True)

    results = [
        compare(pipeline, method, torch.cat(latents[method.name]), reference, samples, args) for method in compared
    ]
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
