"""Export a checkpoint of any run, also a distributed one, as a pipeline:

`python training/export_prx.py --checkpoint outputs/run/checkpoint-1000 --output_dir outputs/run-1000`
"""

import argparse
from pathlib import Path

import torch

from diffusers_prx.cli import exit_on_error, parse_flags, path
from diffusers_prx.training.export import export_checkpoint

CARD_TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=path, required=True, help="Folder of a complete checkpoint.")
    parser.add_argument("--output_dir", type=path, required=True, help="Folder for the pipeline.")
    parser.add_argument(
        "--weights",
        choices=("average", "trained"),
        help="Default: the average, if the run keeps one.",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="Data type of the saved weights. bf16 halves the files."
    )
    args = parse_flags(parser, argv)
    average = None if args.weights is None else args.weights == "average"
    with exit_on_error():
        export_checkpoint(args.checkpoint, args.output_dir, average, CARD_TEMPLATE, DTYPES[args.dtype])


if __name__ == "__main__":
    main()
