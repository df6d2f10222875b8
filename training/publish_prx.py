"""Publish a folder on the Hugging Face Hub: a pipeline, a LoRA, a Space, or the report of a study.

`python training/publish_prx.py --folder outputs/quickstart --repo_id me/prx-quickstart`

The files in the folder determine its kind. If the upload is interrupted or fails, run the same command again: files
that the Hub already has are not sent twice.
"""

import argparse
import sys

from diffusers_prx.cli import exit_with_error, parse_flags, path
from diffusers_prx.hub.publishing import EXIT_NOT_UPLOADED, UploadError, publish_folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=path, required=True, help="Folder to publish.")
    parser.add_argument("--repo_id", help="Name or namespace/name, created if necessary. Default: the folder's name.")
    parser.add_argument(
        "--private", action="store_true", help="Create a private repository; existing ones do not change."
    )
    args = parse_flags(parser, argv)
    try:
        print(f"uploaded to {publish_folder(args.folder, args.repo_id or args.folder.resolve().name, args.private)}")
    except ValueError as error:  # the folder, the token or the name
        exit_with_error(error)
    except UploadError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_NOT_UPLOADED)


if __name__ == "__main__":
    main()
