"""Evaluate a saved pipeline: `python training/evaluate_prx.py --model outputs/quickstart --scenes --seed 1`.

Or compare its images with a reference, on several processes with `accelerate launch` or torchrun:

`accelerate launch training/evaluate_prx.py --model Photoroom/prx-512-t2i-sft --output_dir outputs/sft \\
   --reference 'photos/{000..009}.tar' --metrics fid cmmd dino_mmd --num_inference_steps 50 --guidance_scale 3.5`

If it is interrupted, run the same command again: it resumes. The last line of the output is JSON with the scores.
report.json, report.md and labeled images go to the output folder. If this is the folder of the run, its model card is
updated.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

from diffusers_prx.cli import exit_on_error, parse_flags, path
from diffusers_prx.data.scenes import CAPTIONS, LEVELS
from diffusers_prx.evaluation.emoji_accuracy import DRAWING_CAPTIONS, EMOJI_PROMPTS
from diffusers_prx.evaluation.evaluate import EvaluationSettings, evaluate
from diffusers_prx.evaluation.generation import DTYPES
from diffusers_prx.evaluation.metrics import PHOTOROOM
from diffusers_prx.evaluation.references import REFERENCE_CACHE
from diffusers_prx.evaluation.reports import write_reports
from diffusers_prx.files import expand_path
from diffusers_prx.hub.cards import read_card_choices, write_card
from diffusers_prx.hub.publishing import CARD_FILE, is_generated
from diffusers_prx.training.export import REPORT_FILE, commit_of_this_package

CARD_TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"
NOT_IN_LAST_LINE = ("config", "versions", "evaluation")


def metric(text: str) -> str:
    """Expand the path of an encoder in KIND:ENCODER."""
    kind, colon, encoder = text.partition(":")
    return kind + colon + expand_path(encoder)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    default = {field.name: field.default for field in fields(EvaluationSettings)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def number(group: argparse._ArgumentGroup, name: str, text: str, kind: type = int) -> None:
        group.add_argument(f"--{name}", type=kind, default=default[name], help=f"{text} Default: {default[name]}.")

    model = parser.add_argument_group("the model")
    model.add_argument("--model", required=True, type=expand_path, help="Saved pipeline: a folder or a Hub id.")
    model.add_argument("--revision", help="Revision of the model on the Hub.")
    model.add_argument(
        "--stock",
        action="store_true",
        help="Load the pipeline with diffusers' own class: stock PRX, or another text-to-image pipeline.",
    )
    model.add_argument("--dtype", choices=DTYPES, help="Type of the weights. Default: that of from_pretrained.")
    number(model, "resolution", "Side length in pixels; None: that of the model.")
    number(model, "num_inference_steps", "Denoising steps.")
    number(model, "guidance_scale", "Scale of classifier-free guidance; 1: none.", float)
    number(model, "seed", "Seed of scenes, noise and bootstrap.")
    number(model, "batch_size", "Prompts per call.")

    scenes = parser.add_argument_group("prompt following on the built-in scenes")
    scenes.add_argument("--scenes", action="store_true", help="Grade prompt following.")
    scenes.add_argument("--level", choices=list(LEVELS), default="easy", help="Difficulty of the prompts.")
    scenes.add_argument("--caption", choices=CAPTIONS, default="long", help="Kind of the captions.")
    number(scenes, "num_prompts", "Number of held-out prompts, and of novel ones; of emoji, number in each group.")

    emoji = parser.add_argument_group("prompt following on emoji drawings")
    emoji.add_argument("--emoji", type=expand_path, help="Grade it with this folder of training/tools/fetch_emoji.py.")
    emoji.add_argument(
        "--emoji_network", nargs="+", default=(), type=expand_path, metavar="FOLDER",
        help="Vision networks that read the drawings: folders, as of a --repa_teacher.",
    )  # fmt: skip
    emoji.add_argument(
        "--emoji_prompts", nargs="+", choices=EMOJI_PROMPTS, default=("drawings",),
        help="drawings: one on white for each prompt; scenes: composed of several. Default: drawings.",
    )  # fmt: skip
    emoji.add_argument(
        "--emoji_caption", choices=DRAWING_CAPTIONS, default="text",
        help="Caption of single drawings that is the prompt. Default: text.",
    )  # fmt: skip

    metrics = parser.add_argument_group("distances to a reference")
    names = "fid, cmmd, dino_mmd, clip_score; with another encoder (a folder, a Hub id, a .pth of Inception) "
    names += "fid:ENCODER, mmd:ENCODER, clip_score:ENCODER."
    metrics.add_argument("--metrics", nargs="+", default=(), metavar="METRIC", type=metric, help=names)
    metrics.add_argument(
        "--reference",
        default="scenes",
        type=expand_path,
        help="scenes (their held-out split), or a data set as for training. Default: scenes.",
    )
    metrics.add_argument("--reference_config", help="Configuration of the data set.")
    metrics.add_argument("--reference_split", default="train", help="Split of the data set. Default: train.")
    metrics.add_argument("--image_column", default="image", help="Column of the images. Default: image.")
    metrics.add_argument("--caption_column", default="text", help="Column of the prompts. Default: text.")
    number(metrics, "num_images", "Number of images to generate; the study uses 10,000.")
    number(metrics, "num_reference", "Number of reference images; None: as many as are generated.")
    number(metrics, "bootstrap", "Resamples for the intervals; 0: no intervals.")
    metrics.add_argument("--compat", choices=[PHOTOROOM], help="Evaluate like the study's public code.")

    run = parser.add_argument_group("the run")
    run.add_argument("--output_dir", type=path, help="Output folder. Default: folder of the model.")
    text = f"Cache of reference statistics. Default: {REFERENCE_CACHE}."
    run.add_argument("--cache_dir", type=path, default=REFERENCE_CACHE, help=text)
    run.add_argument("--metric_batch_size", type=int, default=32, help="Images per batch of an encoder. Default: 32.")
    run.add_argument("--num_workers", type=int, default=0, help="Processes that read images. Default: 0.")
    args = parse_flags(parser, argv)
    if args.metric_batch_size < 1:
        parser.error(f"--metric_batch_size must be at least 1, got {args.metric_batch_size}")
    if args.output_dir is None:
        if not Path(args.model).is_dir():
            parser.error("--output_dir is needed for a model from the Hub")
        args.output_dir = Path(args.model)
    names = [field.name for field in fields(EvaluationSettings)]
    try:
        args.settings = EvaluationSettings(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        parser.error(str(error).replace("`", "--", 1).replace("`", "", 1))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_error():
        folders, loading = (args.output_dir, args.cache_dir), (args.metric_batch_size, args.num_workers)
        evaluation = evaluate(args.settings, *folders, *loading, commit_of_this_package())
    if evaluation is None:  # not the main process
        return
    report = evaluation.report
    training = Path(args.model) / REPORT_FILE
    if training.is_file():
        record = json.loads(training.read_text())
        report.update({name: record[name] for name in ("steps", "seconds", "commit", "versions", "config")})
    write_reports(evaluation, args.output_dir)
    if (
        training.is_file()
        and args.output_dir.resolve() == Path(args.model).resolve()
        and is_generated(args.output_dir / CARD_FILE)
    ):
        write_card(args.output_dir, CARD_TEMPLATE, report, **read_card_choices(args.output_dir))
    print(json.dumps({name: value for name, value in report.items() if name not in NOT_IN_LAST_LINE}))


if __name__ == "__main__":
    main()
