"""Time whole calls of our pipeline against diffusers' PRXPipeline: same weights, alternating in one process.

    python training/benchmarks/bench_sampling.py                 # the whole table
    python training/benchmarks/bench_sampling.py --dtype bf16 --size 256 --compile no --repeats 3
    python training/benchmarks/bench_sampling.py --threads 1 --clock cpu    # on a machine that is busy

A call goes from prompts to latents: text encoder and denoising loop, without a VAE, which is the same for both. The
text encoder is T5Gemma in about the proportion to the transformer that it has in PRX (twice as many parameters).
Captions have 60 to 110 tokens of the window of 256, drawn anew for every repeat, and the same for all sides. `guided`
is one image with guidance and the empty negative prompt; `plain` is four images without guidance, since diffusers'
pipeline fails with a batch and guidance together. The sides:

- `stock`: diffusers' pipeline, 28 Euler steps;
- `exact`: ours, 28 Euler steps, the same picture (`difference` is the largest between the latents of the two, over
  the largest latent, on the same noise levels);
- `fast`: ours, 9 steps of a solver of second order, and `fastest`: ours, 7 Euler steps. What they do to the picture
  is measured on a trained network by sampling_error.py: random weights prove nothing about it.

The sides take turns in random order, after a call of two steps each; a number is the median over the repeats, a ratio
is a ratio of medians. glibc is told to keep the memory that tensors give back: by its own rule it returns some to the
system, now of one side and now of the other, for up to 8% of a call's time at 512 px. `--compile` compiles every block
by itself as one graph with dynamic shapes, with the same settings for both; its time is not counted. Peak memory is
that of one call above what the process held before, each side in a process of its own.
"""

import argparse
import ctypes
import gc
import itertools
import json
import multiprocessing
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

from diffusers_prx import PRXFlowMatchScheduler, PRXPipeline, PRXTransformer2DModel, fast_scheduler, fast_sigmas

TRANSFORMER = {
    "in_channels": 16,
    "patch_size": 2,
    "context_in_dim": 768,
    "hidden_size": 512,
    "num_heads": 8,
    "depth": 4,
    "axes_dim": [32, 32],
}
TEXT_ENCODER = {
    "vocab_size": 1024,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 96,
    "query_pre_attn_scalar": 96,
    "sliding_window": 4096,
    "max_position_embeddings": 512,
}
WINDOW, SHORTEST, LONGEST = 256, 60, 110
SHIFT, GUIDANCE_SCALE = 3.0, 4.0
STEPS = {"stock": 28, "exact": 28, "fast": 9, "fastest": 7}
CASES = {"guided": (1, GUIDANCE_SCALE), "plain": (4, 1.0)}


class ExactEuler(diffusers.FlowMatchEulerDiscreteScheduler):
    """Stock's Euler on the noise levels of ours: its own default grid applies the shift twice."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        levels = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        super().set_timesteps(sigmas=levels, device=device)


def make_pipelines(dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """All sides, over the same weights: random ones, since an untrained network multiplies by zero."""
    generator = torch.Generator().manual_seed(0)
    ours = PRXTransformer2DModel(**TRANSFORMER).eval()
    module = T5GemmaModuleConfig(**TEXT_ENCODER)
    encoder = T5GemmaEncoderModel(
        T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False, vocab_size=module.vocab_size)
    ).eval()
    with torch.no_grad():
        for parameter in (*ours.parameters(), *encoder.parameters()):
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    stock = diffusers.PRXTransformer2DModel(**TRANSFORMER).eval()
    stock.load_state_dict(ours.state_dict())
    torch._dynamo.reset()
    for network in (ours, stock, encoder):
        network.to(dtype)
    if compiled:  # what `compile_repeated_blocks` does, which stock's model does not offer
        for block in (*ours.blocks, *stock.blocks):
            block.compile(fullgraph=True, dynamic=True)
    words = {word: place for place, word in enumerate(["<pad>", "<unk>", "<bos>", *map(word_of, range(1000))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    bos = ("<bos>", words["<bos>"])  # as Gemma's: also an empty prompt has a token
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", model_max_length=WINDOW, padding_side="right"
    )
    shared = {"text_encoder": encoder, "tokenizer": tokenizer, "default_sample_size": 256}
    pipelines = {
        "stock": diffusers.PRXPipeline(stock, ExactEuler(shift=SHIFT), **shared),
        "exact": PRXPipeline(ours, PRXFlowMatchScheduler(shift=SHIFT), **shared),
        "fast": PRXPipeline(ours, fast_scheduler(), **shared),
        "fastest": PRXPipeline(ours, PRXFlowMatchScheduler(shift=SHIFT), **shared),
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def word_of(number: int) -> str:
    """A word of letters, which cleaning leaves alone: 900 is "wjaa"."""
    return "w" + "".join(chr(ord("a") + int(digit)) for digit in f"{number:03d}")


def keep_memory() -> None:
    """Have glibc, where it is the system's, neither map large blocks by themselves nor return what is free."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 2**30)


def draw_prompts(count: int, order: random.Random) -> list[str]:
    return [
        " ".join(word_of(order.randrange(1000)) for _ in range(order.randint(SHORTEST, LONGEST))) for _ in range(count)
    ]


def arguments(side: str, case: str, size: int, seed: int, steps: int | None = None) -> dict[str, Any]:
    steps = steps or STEPS[side]
    levels = {"sigmas": fast_sigmas(steps)} if side == "fast" else {"num_inference_steps": steps}
    return {
        **levels,
        "height": size,
        "width": size,
        "guidance_scale": CASES[case][1],
        "use_resolution_binning": False,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }


def measure(
    pipelines: dict[str, Any], case: str, size: int, clock: Callable[[], float], repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every repeat of every side, and the difference of the latents of `stock` and `exact`."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    difference = 0.0
    for repeat in range(-1, repeats):
        prompts = draw_prompts(CASES[case][0], order)
        latents = {}
        for side in order.sample(list(seconds), len(seconds)):
            if repeat < 0:  # to warm up
                pipelines[side](prompts, **arguments(side, case, size, 0, steps=2))
                continue
            given = arguments(side, case, size, repeat + 1)
            start = clock()
            latents[side] = pipelines[side](prompts, **given).images
            seconds[side].append(clock() - start)
        if repeat >= 0:
            gap = (latents["stock"].float() - latents["exact"].float()).abs().max() / latents["stock"].abs().max()
            difference = max(difference, gap.item())
    return seconds, difference


def peak_memory(side: str, dtype: torch.dtype, case: str, size: int, answer: Any) -> None:
    """Put the bytes that one call needs above what was there before. In a process of its own."""
    pipeline = make_pipelines(dtype, False)[side]
    prompts = draw_prompts(CASES[case][0], random.Random(0))
    pipeline(prompts, **arguments(side, case, size, 0, steps=2))  # what stays: tables, kernels
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what glibc has kept from the first call would hide what the second one needs
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = memory("VmRSS")
    pipeline(prompts, **arguments(side, case, size, 0))
    answer.put(memory("VmHWM") - before)


def memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def peak_of_each(dtype: torch.dtype, case: str, size: int) -> dict[str, float]:
    """Megabytes; empty where the system does not say (it takes Linux, with glibc)."""
    if not Path("/proc/self/clear_refs").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return {}
    context, peaks = multiprocessing.get_context("spawn"), {}
    for side in STEPS:
        answer = context.Queue()
        child = context.Process(target=peak_memory, args=(side, dtype, case, size, answer))
        child.start()
        peaks[side] = answer.get(timeout=600) / 1e6
        child.join()
    return peaks


def as_markdown(line: dict[str, Any]) -> str:
    cells = [line["case"], f"{line['size']} px", line["dtype"], "compiled" if line["compiled"] else "eager"]
    cells += [f"{line['median_seconds'][side]:.2f}" for side in STEPS]
    cells += [f"**{line['stock_over'][side]:.2f}x**" for side in ("exact", "fast", "fastest")]
    cells += [f"{line['difference']:.0e}"]
    cells += [" / ".join(f"{peak:.0f}" for peak in line["peak_megabytes"].values()) or "-", str(line["repeats"])]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--dtype", choices=["bf16", "fp32", "all"], default="all")
    parser.add_argument("--size", choices=["256", "512", "all"], default="all")
    parser.add_argument("--compile", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks as well")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each side")
    parser.add_argument("--threads", type=int, help="threads of PyTorch; default: its own choice")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_sampling.json"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_memory()

    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(f"{versions} {machine}, {args.clock} time; steps {STEPS}\n")
    titles = ["call", "size", "dtype", "mode", *(f"{side} s" for side in STEPS)]
    titles += [
        "stock / exact",
        "stock / fast",
        "stock / fastest",
        "difference",
        f"peak MB: {' / '.join(STEPS)}",
        "n",
    ]
    print("| " + " | ".join(titles) + " |")
    print("|" + len(titles) * "---|")
    lines: list[dict[str, Any]] = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for compiled, dtype in itertools.product(
        {"no": [False], "yes": [True], "both": [False, True]}[args.compile],
        ["bf16", "fp32"] if args.dtype == "all" else [args.dtype],
    ):
        weights = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        pipelines = make_pipelines(weights, compiled)
        for size, case in itertools.product(
            [256, 512] if args.size == "all" else [int(args.size)], CASES if args.case == "all" else [args.case]
        ):
            clock = time.process_time if args.clock == "cpu" else time.perf_counter
            seconds, difference = measure(pipelines, case, size, clock, args.repeats)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            ratios = {side: medians["stock"] / medians[side] for side in ("exact", "fast", "fastest")}
            lines.append(
                {
                    "case": case,
                    "size": size,
                    "dtype": dtype,
                    "compiled": compiled,
                    "repeats": args.repeats,
                    "median_seconds": medians,
                    "stock_over": ratios,
                    "difference": difference,
                    "peak_megabytes": peak_of_each(weights, case, size) if args.memory and not compiled else {},
                    "seconds": seconds,
                }
            )
            print(as_markdown(lines[-1]), flush=True)
            report = {"versions": versions, "machine": machine, "clock": args.clock, "steps": STEPS, "lines": lines}
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
