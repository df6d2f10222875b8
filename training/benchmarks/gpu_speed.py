"""Speed part of gpu_check.py: the ceilings of the device, then training and sampling beside stock diffusers."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import bench_model
import diffusers
import torch
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


def make_batch(arguments: Mapping[str, Any], side: int, rows: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return a batch of the tasks of bench_model.py; its captions have 60 to 110 tokens of a window of 256."""
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(bench_model.SHORTEST, bench_model.LONGEST + 1, (rows,), generator=generator)
    clean = torch.randn(rows, arguments.get("in_channels", 16), side, side, generator=generator)
    batch = {
        "clean": clean,
        "noise": torch.randn(clean.shape, generator=generator),
        "timestep": torch.rand(rows, generator=generator),
        "text": torch.randn(rows, bench_model.WINDOW, 2304, generator=generator),
    }
    moved: dict[str, Any] = {name: value.to(device, dtype) for name, value in batch.items()}
    return moved | {"mask": (torch.arange(bench_model.WINDOW) < lengths[:, None]).to(device)}


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
        RuntimeError: if the device multiplies no float8.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise RuntimeError("float8 products need an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper).")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("rowwise")
    for block in model.blocks:
        convert_to_float8_training(block, config=config)
    return model


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
    if device == "cuda":
        torch.cuda.empty_cache()
    return fits


def candidates(
    arguments: Mapping[str, Any], device: str, dtype: torch.dtype, fp8: bool, compile_backend: str
) -> dict[str, torch.nn.Module]:
    """Return ours, ours with compiled blocks, ours in float8 where asked for, and stock, with equal weights."""
    ours = PRXTransformer2DModel(**arguments)
    randomize(ours)
    weights = ours.state_dict()

    def copy(compiled: bool) -> torch.nn.Module:
        model = PRXTransformer2DModel(**arguments)
        model.load_state_dict(weights)
        model.to(device, dtype)
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend=compile_backend)
        return model

    models = {"ours": copy(False), "ours, compiled": copy(True)}
    if fp8:
        models["ours, compiled, fp8"] = to_fp8(copy(False))
        models["ours, compiled, fp8"].compile_repeated_blocks(fullgraph=True, backend=compile_backend)
    if "bottleneck_size" not in arguments:  # stock's linear bottleneck has another name
        stock = diffusers.PRXTransformer2DModel(**{"depth": 16} | dict(arguments))
        with suppress(RuntimeError):  # other arguments: no comparison
            stock.load_state_dict(weights)
            models["stock"] = stock.to(device, dtype)
    return models


def training_speed(
    label: str, device: str, size: str, ceiling_tflops: float, fp8: bool, compile_backend: str, repeats: int
) -> list[dict]:
    """Time forward and backward pass in bf16 autocast over float32 weights, at the largest batch that fits.

    The share of the ceiling is the FLOPs of real tokens (the mean caption) over time and measured bf16 product.
    """
    arguments, side, most = SIZES[size][label]
    models = candidates(arguments, device, torch.float32, fp8, compile_backend)
    batch = partial(make_batch, arguments, side, device=device, dtype=torch.float32)

    def train(rows: int) -> None:
        for name in ("ours", "stock") if "stock" in models else ("ours",):
            bench_model.train(models[name], batch(rows), trimmed=name != "stock", autocast=True)

    rows = largest_batch(train, device, most)
    tokens = (bench_model.SHORTEST + bench_model.LONGEST) // 2
    flops = rows * training_flops(arguments, side, tokens)
    lines = []
    peak = {}
    for name, model in models.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        bench_model.train(model, batch(rows), trimmed=name != "stock", autocast=True)
        peak[name] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    work = {
        name: partial(bench_model.train, model, trimmed=name != "stock", autocast=True)
        for name, model in models.items()
    }
    seconds = median_seconds(work, lambda: batch(rows), device, repeats)
    for name, taken in seconds.items():
        lines.append(
            {
                "task": "train", "model": label, "variant": name, "batch": rows, "seconds": taken,
                "per_second": rows / taken, "memory_gib": peak[name],
                "share_of_ceiling": flops / taken / 1e12 / ceiling_tflops,
                "over_stock": seconds["stock"] / taken if "stock" in seconds else None,
            }
        )  # fmt: skip
    return lines


def sampling_speed(device: str, size: str, fp8: bool, compile_backend: str, repeats: int) -> list[dict]:
    """Time one guided denoising step of a batch in bf16: two rows of the network for each picture."""
    label, arguments, side, pictures = SAMPLED[size]
    models = candidates(arguments, device, torch.bfloat16, fp8, compile_backend)
    work = {
        name: partial(bench_model.denoise, model, trimmed=name != "stock", autocast=False)
        for name, model in models.items()
    }
    batch = partial(make_batch, arguments, side, 2 * pictures, device, torch.bfloat16)
    seconds = median_seconds(work, batch, device, repeats)
    return [
        {
            "task": "sample", "model": label, "variant": name, "batch": pictures, "seconds": taken,
            "per_second": pictures / taken, "memory_gib": None, "share_of_ceiling": None,
            "over_stock": seconds["stock"] / taken if "stock" in seconds else None,
        }
        for name, taken in seconds.items()
    ]  # fmt: skip
