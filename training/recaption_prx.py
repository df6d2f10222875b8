"""Write longer captions into a new column, with any image-text model of transformers:

`accelerate launch training/recaption_prx.py --model_name_or_path MODEL --dataset_name DATA --output_dir DIR`.

DIR is then a data set with the images, their captions and the new ones. Killed, it goes on where it was when it is
started again; with several processes each writes shards of its own.
"""

import argparse

from accelerate import PartialState

from diffusers_prx.cli import errors_in_one_sentence, parse_flags, path
from diffusers_prx.data.recaptioning import DTYPES, PROMPT, RecaptionSettings, recaption
from diffusers_prx.files import expand_path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, type=expand_path, help="A folder or a Hub id.")
    parser.add_argument("--revision", help="Of the model on the Hub.")
    parser.add_argument(
        "--dataset_name", required=True, type=expand_path, help="A folder, pattern or Hub id, as for training."
    )
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_columns", nargs="+", default=["text"], help="Captions to keep.")
    parser.add_argument("--output_dir", type=path, required=True, help="Of the new data set.")
    parser.add_argument("--output_column", default="text_long")
    parser.add_argument(
        "--prompt",
        help=f"What the model is asked; {{text}} stands for the caption of that column. Default: {PROMPT!r} for "
        "models with a chat template, nothing for others.",
    )
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token.")
    parser.add_argument("--seed", type=int, default=0, help="For a temperature above 0.")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shard_samples", type=int, default=1000, help="What a kill loses is less than a shard.")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", help="Default: the one that accelerate gives to the process.")
    return parse_flags(parser, argv)


def main(argv: list[str] | None = None) -> None:
    args = vars(parse_args(argv))
    output_dir, batch_size, device = (args.pop(name) for name in ("output_dir", "batch_size", "device"))
    with errors_in_one_sentence():
        told = recaption(RecaptionSettings(**args), output_dir, batch_size, device)
    PartialState().print(told)  # one process does


if __name__ == "__main__":
    main()
