"""Train PRX.

From nothing: `accelerate launch training/train_prx.py --config training/recipes/quickstart.yaml`.

Train a saved pipeline further: `accelerate launch training/train_prx.py --pretrained_model_name_or_path PIPELINE \\
  --train_data_dir FOLDER --num_train_epochs 10 --output_dir outputs/mine`

What the pipeline was trained with (prediction, noise, resolution, shift, tokens, cleaning) is read from it.
"""

from pathlib import Path

from diffusers_prx.cli import errors_in_one_sentence, print_notes
from diffusers_prx.training.recipes import read_run
from diffusers_prx.training.setup import set_up_run
from diffusers_prx.training.trainer import train

CARD_TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_sentence():
        cfg, notes = read_run(argv)
        print_notes(notes)
        train(set_up_run(cfg, CARD_TEMPLATE))


if __name__ == "__main__":
    main()
