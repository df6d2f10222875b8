"""Check PRX on this machine's GPU: first whether its numbers are right, then how fast it is.

    python training/benchmarks/gpu_check.py                                  # or: make gpu-check
    python training/benchmarks/gpu_check.py --device cpu --size tiny         # the same in small, without a GPU

1. Correctness. Losses and gradients of the training techniques, compiled blocks, attention backends, schedulers and
   pipelines, in float32, bf16 and fp16, against float64 on the CPU with the same weights and inputs. The error is the
   norm of the difference over the norm of the reference; the bound is what rounding explains (`error_bound`).
2. Ceilings. Bandwidth of a copy, rate of a bf16 matrix product.
3. Training (forward and backward pass, largest batch that fits) and guided denoising of PRX-1.2B: eager, compiled,
   float8, and stock diffusers with the same weights, alternating; share of the measured ceiling.

A part that fails, or runs out of memory, is reported, and the others run; so is one that would begin after
`--max_minutes`. The exit status is 1 if a part failed or an error is above its bound. What needs another package or
device, such as an attention backend or float8, is listed and is no failure. Results are written after every part:
`gpu_check.json` and `gpu_check.md`.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from gpu_correctness import Unavailable, correctness
from gpu_speed import SIZES, ceilings, free, sampling_speed, training_speed

from diffusers_prx.files import write_json

BACKENDS = ("native", "_native_math", "_native_flash", "_native_efficient", "_native_cudnn", "flex", "flash_varlen")


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Return the card, versions and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    on_gpu = args.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() or None,
        "command": " ".join(["python", "training/benchmarks/gpu_check.py", *sys.argv[1:]]),
    }


class Report:
    """Results so far; written to disk after every part.

    Args:
        folder: folder of `gpu_check.json` and `gpu_check.md`.
        facts: see `environment`.
        device: "cuda" or "cpu".
        max_minutes: time after which no part begins.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], device: str, max_minutes: float):
        self.folder, self.device, self.max_minutes = folder, device, max_minutes
        self.start = time.perf_counter()
        self.found: dict[str, Any] = {"environment": facts, "seconds": {}, "failed": {}, "unavailable": {}}
        self.found["ceilings"] = None
        self.found |= {"correctness": [], "speed": []}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def ok(self) -> bool:
        return not self.found["failed"] and all(row["ok"] for row in self.found["correctness"])

    def run(self, name: str, part: Callable[[], Any]) -> Any:
        """Run a part and return its result; None if it fails, which is recorded with its error."""
        start = time.perf_counter()
        if start - self.start > 60 * self.max_minutes:
            self.found["failed"][name] = f"not started: --max_minutes {self.max_minutes:g}"
            self.write()
            return None
        try:
            return part()
        except Exception as error:
            self.record(name, error)
        finally:
            free(self.device)
            self.found["seconds"][name] = round(time.perf_counter() - start, 1)
            self.write()
        return None

    def record(self, name: str, error: Exception) -> None:
        """Note that a part failed, or is not available here."""
        if isinstance(error, Unavailable):
            self.found["unavailable"][name] = str(error).splitlines()[0][:300]
            return
        traceback.print_exception(error)
        self.found["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]

    def write(self) -> None:
        write_json(self.folder / "gpu_check.json", self.found)
        (self.folder / "gpu_check.md").write_text(as_markdown(self.found))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(header)
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return ["| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names), *escaped)]


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def as_markdown(found: dict[str, Any]) -> str:
    """Return the results as a page."""
    facts = [(name, str(value)) for name, value in found["environment"].items() if value is not None]
    lines = ["# PRX on this device", "", *table(("", ""), facts), ""]
    if found["ceilings"]:
        copy, product = found["ceilings"]["copy_gb_per_s"], found["ceilings"]["bf16_tflops"]
        lines += [f"Ceilings: copy {copy:.0f} GB/s, bf16 product {product:.1f} TFLOP/s.", ""]
    if found["failed"]:
        lines += ["## Failed", "", *table(("part", "error"), found["failed"].items()), ""]
    if found["unavailable"]:
        lines += ["## Not available", "", *table(("part", "reason"), found["unavailable"].items()), ""]
    if found["speed"]:
        header = ("task", "model", "variant", "batch", "ms", "samples/s", "GiB", "share of ceiling", "over stock")
        rows = [
            (
                row["task"], row["model"], row["variant"], str(row["batch"]), f"{1000 * row['seconds']:.1f}",
                f"{row['per_second']:.2f}", number(row["memory_gib"], ".1f"), number(row["share_of_ceiling"], ".1%"),
                number(row["over_stock"], ".2f"),
            )
            for row in found["speed"]
        ]  # fmt: skip
        lines += ["## Speed", "", *table(header, rows), ""]
    if found["correctness"]:
        rows = [
            (
                row["check"],
                row["dtype"],
                f"{row['error']:.1e}",
                f"{row['bound']:.1e}",
                "" if row["ok"] else "**wrong**",
            )
            for row in found["correctness"]
        ]
        lines += ["## Errors against float64", "", *table(("check", "type", "error", "bound", ""), rows), ""]
    return "\n".join(lines)


def check_correctness(report: Report, args: argparse.Namespace) -> None:
    for name, check in correctness(args.device, args.attention_backends, args.compile_backend).items():
        comparisons = report.run(name, lambda check=check: list(check()))
        for row in comparisons or []:
            report.found["correctness"].append(asdict(row) | {"ok": row.ok})
            if not row.ok:
                print(f"wrong: {row.check}, {row.dtype}: error {row.error:.2e}, accepted {row.bound:.2e}")
    report.write()


def check_speed(report: Report, args: argparse.Namespace) -> None:
    report.found["ceilings"] = report.run("ceilings", partial(ceilings, args.device, args.size))
    tflops = report.found["ceilings"]["bf16_tflops"] if report.found["ceilings"] else float("nan")
    common = (args.device, args.size)
    parts: dict[str, Callable[[], tuple[list[dict], dict[str, Exception]]]] = {
        f"training, {label}": partial(
            training_speed, label, *common, tflops, args.fp8, args.compile_backend, args.repeats
        )
        for label in SIZES[args.size]
    }
    parts["sampling"] = partial(sampling_speed, *common, args.fp8, args.compile_backend, args.repeats)
    for name, part in parts.items():
        lines, failed = report.run(name, part) or ([], {})
        report.found["speed"] += lines
        for variant, error in failed.items():
            report.record(variant, error)
        report.write()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="Default: cuda.")
    parser.add_argument("--size", choices=list(SIZES), default="real", help="Size of the networks that are timed.")
    parser.add_argument("--parts", nargs="+", choices=["correctness", "speed"], default=["correctness", "speed"])
    parser.add_argument(
        "--attention_backends", nargs="*", default=list(BACKENDS), metavar="NAME", help="Names of diffusers' backends."
    )
    parser.add_argument("--compile_backend", default="inductor", help="Backend of torch.compile. Default: inductor.")
    parser.add_argument("--fp8", action="store_true", help="Time float8 as well (torchao, compute capability 8.9).")
    parser.add_argument("--repeats", type=int, default=10, help="Timed repeats. Default: 10.")
    limit = "Minutes after which no part begins. Default: 8."
    parser.add_argument("--max_minutes", type=float, default=8, help=limit)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu_check"))
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device: pass `--device cpu --size tiny` for the same in small.")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default is True: convolutions in "float32" have 11 bits
    report = Report(args.output_dir, environment(args), args.device, args.max_minutes)
    if "correctness" in args.parts:
        check_correctness(report, args)
    if "speed" in args.parts:
        check_speed(report, args)
    print((args.output_dir / "gpu_check.md").read_text())
    print(json.dumps({"ok": report.ok, "failed": report.found["failed"]}))
    return 0 if report.ok else 1


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    sys.exit(main())
