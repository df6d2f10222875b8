"""Compute once what the frozen networks of a run make of its data, with the recipe and flags of the run itself:

`accelerate launch training/precompute_prx.py --config RECIPE.yaml --precomputed_dir DIR --center_crop`.

Then train with the same flags. Killed, it goes on where it was when it is started again.
"""

import sys

from diffusers_prx.training.precompute import precompute
from diffusers_prx.training.recipes import parse_config


def main(argv: list[str] | None = None) -> None:
    try:
        precompute(parse_config(argv))
    except (
        ValueError,
        OSError,
    ) as error:  # what does not fit, a full disk: the message says what to do
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
