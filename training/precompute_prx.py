"""Precompute latents, text embeddings and teacher features of a run, with its recipe and flags:

`accelerate launch training/precompute_prx.py --config RECIPE.yaml --precomputed_dir DIR --center_crop`

Then train with the same flags. If it is interrupted, run the same command again: it resumes.
"""

from diffusers_prx.cli import exit_on_error, print_notes
from diffusers_prx.training.precompute import precompute
from diffusers_prx.training.recipes import parse_run_config


def main(argv: list[str] | None = None) -> None:
    with exit_on_error():
        cfg, notes = parse_run_config(argv)
        print_notes(notes)
        precompute(cfg)


if __name__ == "__main__":
    main()
