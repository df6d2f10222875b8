"""Time whole calls of the pipeline against diffusers' PRXPipeline with the same weights, alternating in one process.

    python training/benchmarks/bench_sampling.py                 # the whole table
    python training/benchmarks/bench_sampling.py --dtype bf16 --size 256 --compile no --repeats 3
    python training/benchmarks/bench_sampling.py --threads 1 --clock cpu    # on a busy machine

A call goes from prompts to latents: text encoder and denoising loop, without the VAE, which is equal for both. The
text encoder is a T5Gemma with twice as many parameters as the transformer, about as in PRX. Captions have 60 to 110
tokens in a window of 256, drawn for every repeat and equal for all candidates. `guided` is one image with guidance and
an empty negative prompt; `plain` is four images without guidance, because diffusers' pipeline fails with both
together.
Candidates:

- `stock`: diffusers' pipeline, 28 Euler steps;
- `exact`: ours, 28 Euler steps on the same noise levels (`difference`: largest difference of the latents, relative to
  the largest latent);
- `fast`: ours, 9 steps of a second-order solver;
- `fastest`: ours, 7 Euler steps. sampling_error.py measures the effect of `fast` and `fastest` on images with a
trained
  network; random weights prove nothing about it.

A number is the median over the repeats; a ratio is a ratio of medians. glibc is configured to keep freed memory:
otherwise it returns some to the system at random, for up to 8% of a call's time at 512 px. Compilation is not timed.
Peak memory is that of one call beyond the memory held before, in a separate process for each candidate.
"""

import argparse
import ctypes
import gc
import itertools
import json
import multiprocessing
import random
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from timing import Clock, add_timing_flags, alternate, compile_blocks, randomize, set_up
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
    """Stock's Euler scheduler on our noise levels; its default grid applies the shift twice."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        levels = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        super().set_timesteps(sigmas=levels, device=device)


def make_pipelines(dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """Return all candidates with the same random weights."""
    ours = PRXTransformer2DModel(**TRANSFORMER).eval()
    module = T5GemmaModuleConfig(**TEXT_ENCODER)
    encoder = T5GemmaEncoderModel(
        T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False, vocab_size=module.vocab_size)
    ).eval()
    randomize(ours, encoder)
    stock = diffusers.PRXTransformer2DModel(**TRANSFORMER).eval()
    stock.load_state_dict(ours.state_dict())
    for network in (ours, stock, encoder):
        network.to(dtype)
    if compiled:
        compile_blocks(ours, stock)
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "<bos>", *map(word_of, range(1000))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    bos = ("<bos>", words["<bos>"])  # like Gemma: an empty prompt has a token, too
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
    """Return a word of letters, which cleaning does not change: "wjaa" for 900."""
    return "w" + "".join(chr(ord("a") + int(digit)) for digit in f"{number:03d}")


def keep_memory() -> None:
    """Configure glibc, if it is in use, to keep freed memory and not to map large blocks separately."""
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
    pipelines: dict[str, Any], case: str, size: int, clock: Clock, repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Return the seconds of every repeat, and the largest difference of the latents of `stock` and `exact`."""
    rng, seeds = random.Random(0), itertools.count()
    latents: dict[str, list[torch.Tensor]] = {name: [] for name in pipelines}

    def call(name: str, given: tuple[int, list[str]]) -> None:
        seed, prompts = given
        options = arguments(name, case, size, seed, steps=None if seed else 2)  # the first call warms up
        latents[name].append(pipelines[name](prompts, **options).images)

    work = {name: partial(call, name) for name in pipelines}
    seconds = alternate(work, lambda: (next(seeds), draw_prompts(CASES[case][0], rng)), repeats, clock)
    pairs = list(zip(latents["stock"], latents["exact"]))[1:]
    return seconds, max(((a.float() - b.float()).abs().max() / a.abs().max()).item() for a, b in pairs)


def peak_memory(candidate: str, dtype: torch.dtype, case: str, size: int, result: Any) -> None:
    """Put the bytes of one call beyond those held before into a queue. Runs in a separate process."""
    pipeline = make_pipelines(dtype, False)[candidate]
    prompts = draw_prompts(CASES[case][0], random.Random(0))
    pipeline(prompts, **arguments(candidate, case, size, 0, steps=2))  # allocates what stays: tables, kernels
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that glibc kept from the first call would hide that of the second
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    before = memory("VmRSS")
    pipeline(prompts, **arguments(candidate, case, size, 0))
    result.put(memory("VmHWM") - before)


def memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def peak_of_each(dtype: torch.dtype, case: str, size: int) -> dict[str, float]:
    """Return MB per candidate; empty without Linux and glibc."""
    if not Path("/proc/self/clear_refs").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return {}
    context, peaks = multiprocessing.get_context("spawn"), {}
    for candidate in STEPS:
        result = context.Queue()
        child = context.Process(target=peak_memory, args=(candidate, dtype, case, size, result))
        child.start()
        peaks[candidate] = result.get(timeout=600) / 1e6
        child.join()
    return peaks


def as_markdown(line: dict[str, Any]) -> str:
    cells = [line["case"], f"{line['size']} px", line["dtype"], "compiled" if line["compiled"] else "eager"]
    cells += [f"{line['median_seconds'][name]:.2f}" for name in STEPS]
    cells += [f"**{line['stock_over'][name]:.2f}x**" for name in ("exact", "fast", "fastest")]
    cells += [f"{line['difference']:.0e}"]
    cells += [" / ".join(f"{peak:.0f}" for peak in line["peak_megabytes"].values()) or "-", str(line["repeats"])]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--dtype", choices=["bf16", "fp32", "all"], default="all")
    parser.add_argument("--size", choices=["256", "512", "all"], default="all")
    parser.add_argument("--compile", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="Measure peak memory.")
    add_timing_flags(parser, 3, "outputs/bench_sampling.json")
    args = parser.parse_args()
    keep_memory()
    clock, environment = set_up(args)
    print(f"steps {STEPS}\n")
    titles = ["call", "size", "dtype", "mode", *(f"{name} s" for name in STEPS)]
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
    for compiled, dtype in itertools.product(
        {"no": [False], "yes": [True], "both": [False, True]}[args.compile],
        ["bf16", "fp32"] if args.dtype == "all" else [args.dtype],
    ):
        weights = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        pipelines = make_pipelines(weights, compiled)
        for size, case in itertools.product(
            [256, 512] if args.size == "all" else [int(args.size)], CASES if args.case == "all" else [args.case]
        ):
            seconds, difference = measure(pipelines, case, size, clock, args.repeats)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            ratios = {name: medians["stock"] / medians[name] for name in ("exact", "fast", "fastest")}
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
            report = environment | {"steps": STEPS, "lines": lines}
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
