"""Draw prompts of a file, one per line, into one picture with the prompts under the drawings:

    python training/tools/draw_sheet.py --model model_cards/prx-emoji-small \
      --prompts training/benchmarks/english_prompts.txt --output sheet.png

Every prompt is drawn once, from the noise of the same seed: nothing is picked.
"""

import argparse
import sys
from pathlib import Path

import torch

from diffusers_prx.cli import parse_flags, path
from diffusers_prx.evaluation.generation import load_pipeline
from diffusers_prx.evaluation.image_grids import prompt_sheet


def read_prompts(file: Path) -> list[str]:
    """Return the lines of a file that are not empty.

    Raises:
        ValueError: if there are none.
    """
    prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"`--prompts` {file} has no line with a prompt.")
    return prompts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Saved pipeline: folder or Hub id.")
    parser.add_argument("--prompts", type=path, required=True, help="Text file with a prompt in each line.")
    parser.add_argument("--output", type=path, required=True, help="PNG file.")
    parser.add_argument("--num_inference_steps", type=int, default=16, help="Denoising steps.")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="Scale of guidance.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise.")
    parser.add_argument("--batch_size", type=int, default=8, help="Prompts per call.")
    args = parse_flags(parser, sys.argv[1:] if argv is None else argv)
    prompts = read_prompts(args.prompts)
    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for first in range(0, len(prompts), args.batch_size):
        batch = prompts[first : first + args.batch_size]
        images += pipeline(
            batch,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(args.seed) for _ in batch],
        ).images
    prompt_sheet(list(zip(prompts, images)), args.output)
    print(f"{len(prompts)} prompts drawn in {args.output}")


if __name__ == "__main__":
    main()
