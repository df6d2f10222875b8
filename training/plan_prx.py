"""Predict FLOPs, memory, communication, hours and cost of a run before you rent a GPU.

`python training/plan_prx.py --config training/recipes/speedrun.yaml --gpu h200 --num_gpus 32 [--json]`

Any setting of the trainer may follow as a flag, for example `--train_batch_size 16`. Data are not needed, and the
networks of the study's recipes need neither the Hub nor weights.
"""

import argparse
import json
import sys

from diffusers_prx.cli import exit_on_error, path
from diffusers_prx.planning.communication import STRATEGIES, Cluster
from diffusers_prx.planning.gpus import GPUS, PRICES
from diffusers_prx.planning.planner import (
    CAPTION_TOKENS,
    UTILIZATION,
    UTILIZATION_SOURCE,
    make_plan,
    published_run,
    read_config,
    strategy_of,
)
from diffusers_prx.planning.table import format_plan


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    gpus = ", ".join(
        f"{key}: {gpu.name}, {gpu.memory_gb:g} GB, ${gpu.price_per_hour:.2f}" for key, gpu in GPUS.items()
    )
    utilization_source = UTILIZATION_SOURCE.replace("%", "%%")  # argparse formats help texts with %
    strategy = "Copies of all weights (ddp), shards over all GPUs (fsdp2), or shards within a node and copies across "
    strategy += "nodes (hsdp). Default: the recipe's `sharding`."
    tokens = "Length of the longest caption in a micro-batch. Default: max_sequence_length."
    add = parser.add_argument
    add("--config", type=path, required=True, metavar="RECIPE", help="Recipe.")
    add("--gpu", choices=list(GPUS), required=True, help=gpus)
    add("--num_gpus", type=int, required=True, help="Number of GPUs on all nodes together.")
    add("--gpus_per_node", type=int, default=8, help="Number of GPUs per node. Default: 8.")
    add("--strategy", choices=STRATEGIES, help=strategy)
    add(
        "--utilization",
        type=float,
        default=UTILIZATION,
        help=f"Share of the peak FLOP/s of a step, in (0, 1]. Default: {UTILIZATION} ({utilization_source}).",
    )
    add("--price_per_hour", type=float, help=f"US dollars per GPU. Default: that of --gpu; {PRICES}.")
    add("--num_images", type=int, help="Size of the data set; adds epochs and cache sizes to the plan.")
    add("--text_tokens", type=int, help=tokens)
    add("--caption_tokens", type=float, default=CAPTION_TOKENS, help="Length of the mean caption, for the text cache.")
    add("--json", action="store_true", help="Print the plan as one JSON object instead of a table.")
    args, flags = parser.parse_known_args(argv)
    for name in ("num_gpus", "gpus_per_node", "num_images", "text_tokens", "caption_tokens"):
        value = getattr(args, name)
        if value is not None and not value >= 1:
            sys.exit(f"error: --{name} must be at least 1, got {value}.")
    if not 0 < args.utilization <= 1:
        sys.exit(f"error: --utilization must be in (0, 1], got {args.utilization}.")
    if args.price_per_hour is not None and not 0 <= args.price_per_hour < float("inf"):
        sys.exit(f"error: --price_per_hour must be finite and not negative, got {args.price_per_hour}.")
    return args, flags


def main(argv: list[str] | None = None) -> None:
    args, flags = parse_args(argv)
    gpu = GPUS[args.gpu]
    price = gpu.price_per_hour if args.price_per_hour is None else args.price_per_hour
    with exit_on_error():
        cfg = read_config(args.config, flags)
        strategy = args.strategy or strategy_of(cfg, args.gpus_per_node)
        plan = make_plan(
            cfg,
            Cluster(gpu, args.num_gpus, args.gpus_per_node, strategy, args.utilization, price),
            published=published_run(args.config, cfg),
            text_tokens=args.text_tokens,
            caption_tokens=args.caption_tokens,
            num_images=args.num_images,
        )
    print(json.dumps(plan, indent=2) if args.json else format_plan(plan, str(args.config)))


if __name__ == "__main__":
    main()
