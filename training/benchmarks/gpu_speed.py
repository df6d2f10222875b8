"""Speed part of gpu_check.py: the ceilings of the device, then training and sampling beside stock diffusers."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import bench_model
import diffusers
import torch
from gpu_correctness import Unavailable
from timing import alternate, randomize

from diffusers_prx.models.transformer_prx import PRXTransformer2DModel
from diffusers_prx.planning.counting import count, fake_tensors

# name -> arguments of the transformer, side of its input, largest batch that is tried
SIZES: dict[str, dict[str, tuple[dict[str, Any], int, int]]] = {
    "real": {
        "PRX-1.2B, 256 px, latents": ({}, 32, 512),
        "PRX-1.2B, 512 px, pixels": (
            {"in_channels": 3, "patch_size": 32, "bottleneck_size": 256},
            512,
            512,
        ),
    },
    "tiny": {
        "tiny, latents": ({"hidden_size": 64, "num_heads": 2, "depth": 2, "axes_dim": [16, 16]}, 8, 2),
    },
}
SAMPLED = {
    "real": ("PRX-1.2B, 512 px, latents", {}, 64, 4),
    "tiny": ("tiny, latents", SIZES["tiny"]["tiny, latents"][0], 8, 2),
}
ELEMENTS = {"real": 2**29, "tiny": 2**16}  # of the copied tensor, bf16
PRODUCT = {"real": 8192, "tiny": 128}  # side of the multiplied matrices


def wait_for(device: str) -> float:
    """Return the time when all work of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(work: Mapping[str, Callable[[Any], Any]], make_input: Callable[[], Any], device: str, repeats: int):
    seconds = alternate(work, make_input, repeats, partial(wait_for, device))
    return {name: statistics.median(times) for name, times in seconds.items()}


def ceilings(device: str, size: str) -> dict[str, float]:
    """Measure the bandwidth of a copy in GB/s (read and write) and the rate of a bf16 matrix product in TFLOP/s."""
    source = torch.ones(ELEMENTS[size], dtype=torch.bfloat16, device=device)
    target, side = torch.empty_like(source), PRODUCT[size]
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    work = {"copy": lambda _: target.copy_(source), "product": lambda _: matrix @ matrix}
    found = median_seconds(work, lambda: None, device, 20)
    return {
        "copy_gb_per_s": 2 * source.numel() * source.element_size() / found["copy"] / 1e9,
        "bf16_tflops": 2 * side**3 / found["product"] / 1e12,
    }


def make_batch(
    task: str, arguments: Mapping[str, Any], side: int, rows: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Return a batch of a task of bench_model.py, drawn on the device.

    Captions have 60 to 110 tokens of a window of 256; the negative prompts of `denoise`, the first half of the rows,
    have one.
    """
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    shape = (rows, arguments.get("in_channels", 16), side, side)
    limits = (bench_model.SHORTEST, bench_model.LONGEST + 1)
    lengths = torch.randint(*limits, (rows, 1), generator=generator, device=device)
    lengths[0] = bench_model.LONGEST  # the same number of computed tokens for every number of rows
    if task == "denoise":
        lengths = torch.cat((torch.ones_like(lengths[rows // 2 :]), lengths[: rows // 2]))
    return {
        "clean": draw(*shape),
        "noise": draw(*shape),
        "timestep": torch.rand(rows, generator=generator, device=device, dtype=dtype),
        "text": draw(rows, bench_model.WINDOW, 2304),
        "mask": torch.arange(bench_model.WINDOW, device=device) < lengths,
    }


def training_flops(arguments: Mapping[str, Any], side: int, text_tokens: int) -> int:
    """Count the multiplications and additions of forward and backward pass of one sample, without recomputation."""
    with fake_tensors():
        model = PRXTransformer2DModel(**arguments)
        noisy = torch.randn(1, model.config["in_channels"], side, side)
        text = torch.randn(1, text_tokens, 2304)
        flops = count(lambda: model(noisy, torch.rand(1), text, return_dict=False)[0])
    return flops.forward + flops.backward


def to_fp8(model: torch.nn.Module) -> torch.nn.Module:
    """Let the linear layers of the blocks multiply in float8 with one scale per row (torchao).

    Raises:
        Unavailable: if the device multiplies no float8, or torchao is not installed.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise Unavailable("float8 products need an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper).")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise Unavailable("float8 products need torchao: pip install torchao.") from error

    config = Float8LinearConfig.from_recipe_name("rowwise")
    for block in model.blocks:
        convert_to_float8_training(block, config=config)
    return model


def free(device: str) -> None:
    """Give back what earlier work holds: compiled graphs and cached memory."""
    torch.compiler.reset()  # also the count of recompilations, which is limited for each function
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def largest_batch(run: Callable[[int], Any], device: str, most: int) -> int:
    """Return the largest power of two, at most `most`, for which `run` fits into memory.

    Raises:
        torch.OutOfMemoryError: if not even one sample fits.
    """
    fits, rows = 0, 1
    while rows <= most:
        try:
            run(rows)
        except torch.OutOfMemoryError:
            if not fits:
                raise
            break
        fits, rows = rows, 2 * rows
    free(device)
    return fits


def variants(
    arguments: Mapping[str, Any], device: str, dtype: torch.dtype, fp8: bool, compile_backend: str
) -> dict[str, Callable[[], torch.nn.Module]]:
    """Return makers of ours, ours compiled, ours in float8 where asked for, and stock, which share their weights."""
    with torch.device(device):
        ours = PRXTransformer2DModel(**arguments)
    randomize(ours)
    ours.to(dtype)

    def shared(model_class: Any) -> torch.nn.Module:
        with torch.device(device):
            model = model_class(**{"depth": ours.config["depth"]} | dict(arguments))
        model.load_state_dict(ours.state_dict(), assign=True)
        return model

    def compiled(in_fp8: bool) -> torch.nn.Module:
        model: Any = shared(PRXTransformer2DModel)
        if in_fp8:
            to_fp8(model)
        model.compile_repeated_blocks(fullgraph=True, backend=compile_backend)
        return model

    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "ours": lambda: ours,
        "ours, compiled": lambda: compiled(False),
    }
    if fp8:
        makers["ours, compiled, fp8"] = lambda: compiled(True)
    if "bottleneck_size" not in arguments:  # stock's has another form
        makers["stock"] = lambda: shared(diffusers.PRXTransformer2DModel)
    return makers


def measure(
    label: str,
    makers: Mapping[str, Callable[[], torch.nn.Module]],
    work: Callable[[torch.nn.Module, bool], Any],
    device: str,
    repeats: int,
) -> tuple[dict[str, tuple[float, float | None]], dict[str, Exception]]:
    """Time the variants of a model in turns. One that fails is left out.

    Args:
        label: name of the model.
        makers: name -> maker of the variant.
        work: function of the variant, and of True if it gets its text without padding.
        device: "cuda" or "cpu".
        repeats: number of timed repeats.

    Returns:
        name -> (median seconds, peak GiB: weights, gradients and activations), and label and name -> error.
    """
    ready: dict[str, Callable[[Any], Any]] = {}
    memory: dict[str, float | None] = {}
    failed: dict[str, Exception] = {}
    for name, make in makers.items():
        model = None
        try:
            model = make()
            run = partial(lambda model, trimmed, _: work(model, trimmed), model, name != "stock")
            run(None)  # compiles
            memory[name] = peak_gib(model, run) if device == "cuda" else None
            ready[name] = run
        except Exception as error:
            failed[f"{label}, {name}"] = error.with_traceback(None)  # which would hold its tensors
        if model is not None:
            model.zero_grad(set_to_none=True)  # of a pass that ended in the middle
    seconds = median_seconds(ready, lambda: None, device, repeats) if ready else {}
    return {name: (taken, memory[name]) for name, taken in seconds.items()}, failed


def peak_gib(model: torch.nn.Module, run: Callable[[Any], Any]) -> float:
    """Return the memory at the peak of a call in GiB, with the model's weights and without those of others."""
    weights = sum(weight.nbytes for weight in model.parameters())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(None)
    return (torch.cuda.max_memory_allocated() - before + weights) / 2**30


def training_speed(
    label: str, device: str, size: str, ceiling_tflops: float, fp8: bool, compile_backend: str, repeats: int
) -> tuple[list[dict], dict[str, Exception]]:
    """Time forward and backward pass in bf16 autocast over float32 weights, at the largest batch that fits.

    Ours in eager mode and stock must fit. The share of the ceiling is the planner's FLOPs for the mean caption, over
    time and measured bf16 product. Returns the lines of the report, and the errors of variants that failed.
    """
    arguments, side, most = SIZES[size][label]
    makers = variants(arguments, device, torch.float32, fp8, compile_backend)
    draw = partial(make_batch, "train", arguments, side, device=device, dtype=torch.float32)
    eager = {name: makers[name]() for name in ("ours", "stock") if name in makers}

    def attempt(rows: int) -> None:
        batch = draw(rows)
        for name, model in eager.items():
            try:
                bench_model.train(model, batch, trimmed=name != "stock", autocast=True)
            finally:
                model.zero_grad(set_to_none=True)

    rows = largest_batch(attempt, device, most)
    batch = draw(rows)
    found, failed = measure(
        f"training, {label}",
        makers,
        lambda model, trimmed: bench_model.train(model, batch, trimmed=trimmed, autocast=True),
        device,
        repeats,
    )
    flops = rows * training_flops(arguments, side, (bench_model.SHORTEST + bench_model.LONGEST) // 2)
    lines = as_lines("train", label, rows, found)
    for line in lines:
        line["share_of_ceiling"] = flops / line["seconds"] / 1e12 / ceiling_tflops
    return lines, failed


def sampling_speed(
    device: str, size: str, fp8: bool, compile_backend: str, repeats: int
) -> tuple[list[dict], dict[str, Exception]]:
    """Time one guided denoising step of a batch in bf16: two rows of the network for each picture.

    Returns the lines of the report, and the errors of variants that failed.
    """
    label, arguments, side, pictures = SAMPLED[size]
    makers = variants(arguments, device, torch.bfloat16, fp8, compile_backend)
    batch = make_batch("denoise", arguments, side, 2 * pictures, device, torch.bfloat16)
    found, failed = measure(
        f"sampling, {label}",
        makers,
        lambda model, trimmed: bench_model.denoise(model, batch, trimmed=trimmed, autocast=False),
        device,
        repeats,
    )
    return as_lines("sample", label, pictures, found), failed


def as_lines(task: str, label: str, batch: int, found: Mapping[str, tuple[float, float | None]]) -> list[dict]:
    return [
        {
            "task": task, "model": label, "variant": name, "batch": batch, "seconds": seconds,
            "per_second": batch / seconds, "memory_gib": memory, "share_of_ceiling": None,
            "over_stock": found["stock"][0] / seconds if "stock" in found else None,
        }
        for name, (seconds, memory) in found.items()
    ]  # fmt: skip
