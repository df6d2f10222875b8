"""Time the transformer against diffusers' PRXTransformer2DModel with the same weights, alternating in one process.

    python training/benchmarks/bench_model.py                      # the whole table, nine minutes on two cores
    python training/benchmarks/bench_model.py --task train --dtype bf16 --latent_size 32 --compile no --repeats 40
    python training/benchmarks/bench_model.py --threads 1 --clock cpu      # on a busy machine

Tasks:

- `train`: forward and backward of one training step with the squared error of the velocity. bf16 is autocast over
  float32 weights.
- `denoise`: one guided denoising step of one image without gradients: two rows (empty prompt and prompt), the guidance
  formula, and the step. bf16 means bf16 weights, as a pipeline loads them.

Each model gets its text as its own trainer or pipeline would pass it: stock in a window of 256 tokens with a mask,
ours cut to the longest caption of the batch (`trim_text`, included in the time). The third column, stock with cut
text, separates the effect of the cutting from that of the model. Captions have 60 to 110 tokens, drawn for every
repeat.

A number is the median over the repeats; a ratio is a ratio of medians. Compilation is not timed.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import diffusers
import torch
import torch.nn.functional as F
from timing import add_timing_flags, alternate, compile_blocks, randomize, set_up

from diffusers_prx.models.transformer_prx import PRXTransformer2DModel
from diffusers_prx.text import trim_text

CONFIG = {
    "in_channels": 16,
    "patch_size": 2,
    "context_in_dim": 2304,
    "hidden_size": 512,
    "num_heads": 8,
    "depth": 4,
    "axes_dim": [32, 32],
}
WINDOW = 256
SHORTEST, LONGEST = 60, 110
GUIDANCE_SCALE = 4.0
STEP = 1 / 28  # of sigma

Batch = dict[str, torch.Tensor]


def make_models(dtype: torch.dtype, compiled: bool) -> dict[str, torch.nn.Module]:
    """Return both models with the same random weights."""
    ours = PRXTransformer2DModel(**CONFIG)
    randomize(ours)
    stock = diffusers.PRXTransformer2DModel(**CONFIG)
    stock.load_state_dict(ours.state_dict())
    for model in (ours, stock):
        if dtype != torch.float32:
            model.to(dtype)
    if compiled:
        compile_blocks(ours, stock)
    return {"ours": ours, "stock": stock, "stock_trimmed": stock}


def make_batch(task: str, rows: int, latent_size: int, dtype: torch.dtype, generator: torch.Generator) -> Batch:
    lengths = torch.randint(SHORTEST, LONGEST + 1, (rows,), generator=generator)
    if task == "denoise":
        lengths[0] = 1  # the empty prompt has one token
    clean = torch.randn(rows, CONFIG["in_channels"], latent_size, latent_size, generator=generator)
    return {
        "clean": clean.to(dtype),
        "noise": torch.randn(clean.shape, generator=generator).to(dtype),
        "timestep": torch.rand(rows, generator=generator).to(dtype),
        "text": torch.randn(rows, WINDOW, CONFIG["context_in_dim"], generator=generator).to(dtype),
        "mask": torch.arange(WINDOW) < lengths[:, None],
    }


def train(model: torch.nn.Module, batch: Batch, trimmed: bool, autocast: bool) -> None:
    text, mask = trim_text(batch["text"], batch["mask"]) if trimmed else (batch["text"], batch["mask"])
    timestep = batch["timestep"][:, None, None, None]
    noisy = (1 - timestep) * batch["clean"] + timestep * batch["noise"]
    with torch.autocast(noisy.device.type, torch.bfloat16) if autocast else nullcontext():
        velocity = model(noisy, batch["timestep"], text, mask, return_dict=False)[0]
    F.mse_loss(velocity.float(), batch["noise"] - batch["clean"]).backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def denoise(model: torch.nn.Module, batch: Batch, trimmed: bool, autocast: bool) -> None:
    text, mask = trim_text(batch["text"], batch["mask"]) if trimmed else (batch["text"], batch["mask"])
    noisy = batch["noise"][: len(batch["noise"]) // 2]  # the first half of the rows is the negative prompt's
    twice, timestep = torch.cat((noisy, noisy)), batch["timestep"][: len(noisy)].repeat(2)
    with torch.autocast(noisy.device.type, torch.bfloat16) if autocast else nullcontext():
        negative, positive = model(twice, timestep, text, mask, return_dict=False)[0].chunk(2)
    noisy - STEP * (negative + GUIDANCE_SCALE * (positive - negative))


TASKS: dict[str, Callable[..., None]] = {"train": train, "denoise": denoise}


def as_markdown(line: dict) -> str:
    size = f"{line['latent_size']}x{line['latent_size']}"
    cells = [line["task"], size, line["dtype"], "compiled" if line["compiled"] else "eager"]
    cells += [f"{1000 * seconds:.0f}" for seconds in line["median_seconds"].values()]
    cells += [f"**{line['stock_over_ours']:.2f}x**", f"{line['stock_trimmed_over_ours']:.2f}x", str(line["repeats"])]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    parser.add_argument("--dtype", choices=["bf16", "fp32", "all"], default="all")
    parser.add_argument("--latent_size", choices=["32", "64", "all"], default="all")
    parser.add_argument("--compile", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--train_batch_size", type=int, help="Default: 4 at 32x32, 2 at 64x64.")
    add_timing_flags(parser, None, "outputs/bench_model.json")
    args = parser.parse_args()
    clock, environment = set_up(args)
    print("| task | latents | dtype | mode | ours ms | stock ms | cut text ms | stock / ours | cut text / ours | n |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    lines: list[dict] = []
    for task, compiled, dtype in itertools.product(
        TASKS if args.task == "all" else [args.task],
        {"no": [False], "yes": [True], "both": [False, True]}[args.compile],
        ["bf16", "fp32"] if args.dtype == "all" else [args.dtype],
    ):
        weights = torch.bfloat16 if dtype == "bf16" and task == "denoise" else torch.float32
        models = make_models(weights, compiled)
        for latent_size in [32, 64] if args.latent_size == "all" else [int(args.latent_size)]:
            generator = torch.Generator().manual_seed(1)
            rows = 2 if task == "denoise" else args.train_batch_size or {32: 4, 64: 2}[latent_size]
            batches = partial(make_batch, task, rows, latent_size, weights, generator)
            autocast = dtype == "bf16" and task == "train"
            work = {
                name: partial(TASKS[task], model, trimmed=name != "stock", autocast=autocast)
                for name, model in models.items()
            }
            seconds = alternate(work, batches, args.repeats or 5, clock, 0 if args.repeats else 10)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            lines.append(
                {
                    "task": task,
                    "latent_size": latent_size,
                    "dtype": dtype,
                    "compiled": compiled,
                    "rows": rows,
                    "repeats": len(seconds["ours"]),
                    "median_seconds": medians,
                    "stock_over_ours": medians["stock"] / medians["ours"],
                    "stock_trimmed_over_ours": medians["stock_trimmed"] / medians["ours"],
                    "seconds": seconds,
                }
            )
            print(as_markdown(lines[-1]), flush=True)
            report = environment | {"config": CONFIG, "lines": lines}
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
