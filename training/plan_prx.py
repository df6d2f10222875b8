"""What a run would take, before a GPU is rented: operations, memory, traffic between GPUs, hours and dollars.

`python training/plan_prx.py --config training/recipes/speedrun.yaml --gpu h200 --num_gpus 32 [--json]`

Any setting of the trainer may follow as a flag over the recipe, as `--train_batch_size 16`. No data set has to be
named, and neither the Hub nor weights are asked for the networks of the study's recipes.
"""

import argparse
import json
import sys

from diffusers_prx.cli import errors_in_one_sentence, path
from diffusers_prx.planning.gpus import GPUS, PRICES
from diffusers_prx.planning.planner import (
    CAPTION_TOKENS,
    STRATEGIES,
    UTILIZATION,
    UTILIZATION_SOURCE,
    Cluster,
    plan,
    published_run,
    read_config,
    strategy_of,
    table,
)


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = ", ".join(
        f"{key}: {gpu.name}, {gpu.memory_gb:g} GB, ${gpu.price_per_hour:.2f}" for key, gpu in GPUS.items()
    )
    source = UTILIZATION_SOURCE.replace("%", "%%")  # argparse puts values in where a help text has one
    parser.add_argument("--config", type=path, required=True, metavar="RECIPE", help="A recipe.")
    parser.add_argument("--gpu", choices=list(GPUS), required=True, help=kinds)
    parser.add_argument("--num_gpus", type=int, required=True, help="Of all nodes together.")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="That share the fast link.")
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        help="Copies of all weights, shards over all GPUs, or shards within each node and copies between nodes; "
        "default: what the recipe's `sharding` says.",
    )
    parser.add_argument(
        "--utilization",
        type=float,
        default=UTILIZATION,
        help=f"Share of the peak that all operations of a step reach. Default {UTILIZATION}: {source}.",
    )
    parser.add_argument("--price_per_hour", type=float, help=f"Of one GPU in US dollars; the defaults: {PRICES}.")
    parser.add_argument("--num_images", type=int, help="Of the data set: adds its epochs and the size of its caches.")
    parser.add_argument(
        "--text_tokens",
        type=int,
        help="Of the longest caption of a micro-batch, to which the others are padded; default: max_sequence_length.",
    )
    parser.add_argument(
        "--caption_tokens", type=float, default=CAPTION_TOKENS, help="Of the mean caption, for the cache of the text."
    )
    parser.add_argument("--json", action="store_true", help="Everything as one JSON object, in place of the table.")
    args, flags = parser.parse_known_args(argv)
    for name in ("num_gpus", "gpus_per_node", "num_images", "text_tokens", "caption_tokens"):
        value = getattr(args, name)
        if value is not None and not value >= 1:
            sys.exit(f"error: --{name} must be at least 1, got {value}.")
    if not 0 < args.utilization <= 1:
        sys.exit(f"error: --utilization is a share in (0, 1], got {args.utilization}.")
    if args.price_per_hour is not None and not 0 <= args.price_per_hour < float("inf"):
        sys.exit(f"error: --price_per_hour must be finite and not negative, got {args.price_per_hour}.")
    return args, flags


def main(argv: list[str] | None = None) -> None:
    args, flags = parse_args(argv)
    gpu = GPUS[args.gpu]
    price = gpu.price_per_hour if args.price_per_hour is None else args.price_per_hour
    with errors_in_one_sentence():
        cfg = read_config(args.config, flags)
        strategy = args.strategy or strategy_of(cfg, args.gpus_per_node)
        cluster = Cluster(gpu, args.num_gpus, args.gpus_per_node, strategy, args.utilization, price)
        told = plan(
            cfg,
            cluster,
            published=published_run(args.config, cfg),
            text_tokens=args.text_tokens,
            caption_tokens=args.caption_tokens,
            num_images=args.num_images,
        )
    print(json.dumps(told, indent=2) if args.json else table(told, str(args.config)))


if __name__ == "__main__":
    main()
