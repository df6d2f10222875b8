"""Add a column of generated captions to a data set, with an image-text model of transformers:

`accelerate launch training/recaption_prx.py --model_name_or_path MODEL --dataset_name DATA --output_dir DIR`

DIR is then a data set with images, captions and generated captions. If it is interrupted, run the same command again:
it resumes.
"""

import argparse

from accelerate import PartialState

from diffusers_prx.cli import exit_on_error, parse_flags, path
from diffusers_prx.data.recaptioning import DTYPES, PROMPT, RecaptionSettings, recaption
from diffusers_prx.files import expand_path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, type=expand_path, help="Model: folder or Hub id.")
    parser.add_argument("--revision", help="Revision of the model on the Hub.")
    parser.add_argument(
        "--dataset_name", required=True, type=expand_path, help="Data set: folder, file pattern or Hub id."
    )
    parser.add_argument("--dataset_config_name", help="Configuration of a Hub data set.")
    parser.add_argument("--dataset_split", default="train", help="Split of the data set.")
    parser.add_argument("--image_column", default="image", help="Column of the images.")
    parser.add_argument("--caption_columns", nargs="+", default=["text"], help="Caption columns to keep.")
    parser.add_argument("--output_dir", type=path, required=True, help="Folder for the new data set.")
    parser.add_argument("--output_column", default="text_long", help="Column for the generated captions.")
    parser.add_argument(
        "--prompt",
        help=f"Prompt of the model; {{text}} is replaced by the caption of that column. Default: {PROMPT!r} for "
        "models with a chat template, no prompt for others.",
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Maximum length of a caption in tokens.")
    parser.add_argument("--temperature", type=float, default=0.0, help="Sampling temperature. 0: most likely token.")
    parser.add_argument("--seed", type=int, default=0, help="Seed for a temperature above 0.")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="Data type of the model.")
    parser.add_argument(
        "--shard_samples", type=int, default=1000, help="Samples per shard; an interruption loses at most one."
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Images per forward pass.")
    parser.add_argument("--device", help="Device. Default: chosen by accelerate.")
    return parse_flags(parser, argv)


def main(argv: list[str] | None = None) -> None:
    args = vars(parse_args(argv))
    output_dir, batch_size, device = (args.pop(name) for name in ("output_dir", "batch_size", "device"))
    with exit_on_error():
        summary = recaption(RecaptionSettings(**args), output_dir, batch_size, device)
    PartialState().print(summary)


if __name__ == "__main__":
    main()
