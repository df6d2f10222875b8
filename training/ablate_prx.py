"""Run an ablation study: `python training/ablate_prx.py --study training/studies/scenes.yaml`.

Trains every arm of the study file with every seed (training/train_prx.py), evaluates it (training/evaluate_prx.py),
and writes report.md, report.html and pictures to the report folder. If it is interrupted, run the same command again:
it resumes. --collect writes the report from existing records; --push_to_hub uploads the report folder.

Reproduce one row of the report, with its reference, in another folder:
`python training/ablate_prx.py --study training/studies/scenes.yaml --only repa --output_dir outputs/again`.
"""

import argparse
import signal
import sys
from concurrent.futures import CancelledError
from pathlib import Path
from types import FrameType
from typing import NoReturn

from diffusers_prx.cli import exit_with_error, parse_flags, path
from diffusers_prx.hub.publishing import EXIT_NOT_UPLOADED, UploadError
from diffusers_prx.study.runner import Stopped, StudyOptions, run_study


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def switch(name: str, text: str) -> None:
        parser.add_argument(name, action="store_true", help=text)

    parser.add_argument("--study", type=path, required=True, help="Study file.")
    parser.add_argument("--output_dir", type=path, help="Folder of the runs. Default: outputs/studies/NAME.")
    parser.add_argument(
        "--report_dir", type=path, help="Folder of records and report. Default: report in --output_dir."
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="Run only the arms that these findings or arms need."
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="Run only these seeds of the study.")
    parser.add_argument("--jobs", type=int, default=1, help="Number of runs at the same time. Default: 1.")
    parser.add_argument(
        "--time_limit", type=float, metavar="MINUTES", help="Start no new run after this many minutes."
    )
    switch("--remove_checkpoints", "Delete the checkpoints of finished runs; their pipelines stay.")
    switch("--retry_failed", "Continue failed runs with the same seed.")
    switch("--collect", "Write the report from existing records and run nothing.")
    switch("--dry_run", "Print the commands of the missing runs and run nothing.")
    switch("--measure_throughput", "Time steps of arms and references in turns instead of running the study.")
    parser.add_argument("--throughput_steps", type=int, default=12, help="Steps of a timed run. Default: 12.")
    parser.add_argument("--throughput_repeats", type=int, default=3, help="Timed pairs per finding. Default: 3.")
    switch("--push_to_hub", "Upload the report folder. The token is checked before the first run.")
    parser.add_argument("--hub_model_id", metavar="REPO_ID", help="Data set repository. Default: the study's name.")
    return parse_flags(parser, argv)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_study(StudyOptions(**vars(args)), scripts_dir=Path(__file__).resolve().parent)
    except ValueError as error:
        exit_with_error(error)
    except UploadError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_NOT_UPLOADED)
    except (KeyboardInterrupt, Stopped, CancelledError):
        sys.exit("stopped; run the same command again to resume")
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    main()
