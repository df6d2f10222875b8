"""Rewrite the model card of a finished run, including its last evaluation:

`python training/card_prx.py --model outputs/quickstart`

report.json in the folder must belong to the stored weights. With --output_dir, the card and the pictures that it shows
are copied to another folder; the weights stay.
"""

import argparse
from pathlib import Path

from diffusers_prx.cli import exit_on_error, parse_flags, path
from diffusers_prx.hub.cards import copy_card, read_card_choices, read_report, write_card

CARD_TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=path, required=True, help="Folder of a finished run.")
    parser.add_argument("--load_from", help="Folder or repository that the card's code loads. Default: unchanged.")
    parser.add_argument("--license", help="License identifier of the Hub, such as apache-2.0. Default: unchanged.")
    parser.add_argument("--output_dir", type=path, help="Folder for a copy of the card. Default: none.")
    args = parse_flags(parser, argv)
    with exit_on_error():
        choices = read_card_choices(args.model)
        choices |= {name: getattr(args, name) for name in choices if getattr(args, name) is not None}
        card = write_card(args.model, CARD_TEMPLATE, read_report(args.model), **choices)
        if args.output_dir is not None:
            card = copy_card(args.model, args.output_dir)
    print(f"written to {card}")


if __name__ == "__main__":
    main()
