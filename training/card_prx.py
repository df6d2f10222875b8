"""Write the model card of a finished run again, with the evaluation that was run since:

`python training/card_prx.py --model outputs/quickstart`

A report.json in the folder is taken if it is of the weights that are there now. With --output_dir the card and the
pictures that it shows go to another folder, and the weights stay.
"""

import argparse
from pathlib import Path

from diffusers_prx.cli import errors_in_one_sentence, parse_flags, path
from diffusers_prx.hub.cards import copy_card, read_card_choices, read_report, write_card

CARD_TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=path, required=True, help="The folder of a finished run.")
    parser.add_argument("--load_from", help="Folder or repository that the card's code loads. Default: as it is now.")
    parser.add_argument("--license", help="The Hub's identifier, as apache-2.0. Default: as it is now.")
    parser.add_argument("--output_dir", type=path, help="Another folder for the card. Default: that of the model.")
    args = parse_flags(parser, argv)
    with errors_in_one_sentence():
        given = {"load_from": args.load_from, "license": args.license}
        said = read_card_choices(args.model) | {name: value for name, value in given.items() if value is not None}
        card = write_card(args.model, CARD_TEMPLATE, read_report(args.model), **said)
        if args.output_dir is not None:
            card = copy_card(args.model, args.output_dir)
    print(f"written to {card}")


if __name__ == "__main__":
    main()
