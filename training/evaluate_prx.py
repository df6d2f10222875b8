"""Grade a saved pipeline: `python training/evaluate_prx.py --model outputs/quickstart --scenes --seed 1`.

The last line of the output is JSON with the scores; report.json and a labelled picture go to the output folder.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_prx import PRXPipeline, PRXPixelPipeline
from diffusers_prx.data.scenes import CAPTIONS, LEVELS
from diffusers_prx.evaluation.scene_accuracy import grade_scenes, pipeline_draw, scene_report
from diffusers_prx.evaluation.sheets import scene_sheet
from diffusers_prx.training.export import REPORT_FILE

PICTURES_ON_SHEET = 16


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A saved pipeline: a folder or a Hub id.")
    parser.add_argument("--scenes", action="store_true", required=True, help="Grade on the built-in scenes.")
    parser.add_argument("--level", choices=list(LEVELS), default="easy", help="Difficulty of the prompts.")
    parser.add_argument("--caption", choices=CAPTIONS, default="long", help="Which caption is the prompt.")
    parser.add_argument("--seed", type=int, default=2026, help="Of the prompts and of the noise.")
    parser.add_argument("--num_prompts", type=int, default=256, help="Held-out prompts, and as many novel ones.")
    parser.add_argument("--num_inference_steps", type=int, default=24)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output_dir", type=Path, help="Where the report goes; default: the model's folder.")
    args = parser.parse_args(argv)
    for name, least in (("num_prompts", 2), ("num_inference_steps", 1), ("batch_size", 1), ("guidance_scale", 1)):
        if not getattr(args, name) >= least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.output_dir is None:
        if not Path(args.model).is_dir():
            parser.error("--output_dir is needed for a model from the Hub")
        args.output_dir = Path(args.model)
    return args


def load_pipeline(name_or_path: str) -> PRXPipeline | PRXPixelPipeline:
    classes = {"PRXPipeline": PRXPipeline, "PRXPixelPipeline": PRXPixelPipeline}
    try:
        name = DiffusionPipeline.load_config(name_or_path).get("_class_name")
    except OSError as error:
        sys.exit(f"error: {name_or_path} holds no pipeline: {error}")
    if name not in classes:
        sys.exit(f"error: {name_or_path} holds a {name}; accepted: {sorted(classes)}.")
    pipeline = classes[name].from_pretrained(name_or_path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    start = time.perf_counter()
    pipeline = load_pipeline(args.model)
    resolution = pipeline.config.default_sample_size or pipeline.default_resolution
    if resolution < LEVELS[args.level].min_resolution:
        sys.exit(
            f"error: pictures of level {args.level} can be read from {LEVELS[args.level].min_resolution} pixels on; "
            f"the model draws {resolution}."
        )
    draw = pipeline_draw(
        pipeline, resolution, args.num_inference_steps, args.guidance_scale, args.seed, args.batch_size
    )
    graded, novel = (
        grade_scenes(draw, args.level, split, args.seed, args.num_prompts, args.caption)
        for split in ("heldout", "novel")
    )
    report = {
        **scene_report(graded, novel, args.level, args.caption, args.seed),
        "level": args.level,
        "caption": args.caption,
        "seed": args.seed,
        "num_prompts": args.num_prompts,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "seconds_evaluation": round(time.perf_counter() - start, 1),
    }
    training = Path(args.model) / REPORT_FILE
    if training.is_file():
        record = json.loads(training.read_text())
        report.update({name: record[name] for name in ("steps", "seconds", "commit", "versions", "config")})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    half = PICTURES_ON_SHEET // 2
    title = (
        f"first {half} held-out and first {half} novel prompts; of {args.num_prompts} each, "
        f"{report['scene_accuracy']:.3f} and {report['scene_accuracy_novel']:.3f} are right"
    )
    scene_sheet(graded[:half] + novel[:half], title, args.output_dir / "samples.png")
    print(json.dumps({name: value for name, value in report.items() if name not in ("config", "versions")}))


if __name__ == "__main__":
    main()
