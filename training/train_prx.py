"""Train PRX.

From scratch: `accelerate launch training/train_prx.py --config training/recipes/quickstart.yaml`

From a saved pipeline: `accelerate launch training/train_prx.py --pretrained_model_name_or_path PIPELINE \\
  --train_data_dir FOLDER --num_train_epochs 10 --output_dir outputs/mine`

A saved pipeline provides prediction type, noise scale, resolution, shift, token limit and caption cleaning.
"""

from pathlib import Path

from diffusers_prx.cli import exit_on_error, print_notes
from diffusers_prx.training.recipes import parse_run_config
from diffusers_prx.training.setup import set_up_run
from diffusers_prx.training.trainer import train

CARD_TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"


def main(argv: list[str] | None = None) -> None:
    with exit_on_error():
        cfg, notes = parse_run_config(argv)
        print_notes(notes)
        train(set_up_run(cfg, CARD_TEMPLATE))


if __name__ == "__main__":
    main()
