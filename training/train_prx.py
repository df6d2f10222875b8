"""Train PRX: `accelerate launch training/train_prx.py --config training/recipes/quickstart.yaml`."""

import sys
from pathlib import Path

from diffusers_prx.training.recipes import parse_config
from diffusers_prx.training.trainer import Run

CARD_TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"


def main(argv: list[str] | None = None) -> None:
    try:
        run = Run(parse_config(argv), CARD_TEMPLATE)
    except (ValueError, OSError) as error:  # what does not fit or cannot be read: the message says what would do
        sys.exit(f"error: {error}")
    run.train()


if __name__ == "__main__":
    main()
