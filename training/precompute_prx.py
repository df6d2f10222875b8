"""Compute once what the frozen networks of a run make of its data, with the recipe and flags of the run itself:

`accelerate launch training/precompute_prx.py --config RECIPE.yaml --precomputed_dir DIR --center_crop`.

Then train with the same flags. Killed, it goes on where it was when it is started again.
"""

from diffusers_prx.cli import errors_in_one_sentence, print_notes
from diffusers_prx.training.precompute import precompute
from diffusers_prx.training.recipes import read_run


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_sentence():
        cfg, notes = read_run(argv)
        print_notes(notes)
        precompute(cfg)


if __name__ == "__main__":
    main()
