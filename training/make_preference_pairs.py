"""Draw several images of each prompt with a PRX pipeline, and pair the best with the worst by scorers of your choice:

`python training/make_preference_pairs.py --model PIPELINE --scenes --scorers scenes --output_dir outputs/pairs`

The result, outputs/pairs/pairs.parquet, is data for preference tuning, see training/recipes/dpo.yaml. If it is
interrupted, run the same command again: it continues.
"""

import argparse

import torch

from diffusers_prx.cli import exit_on_error, parse_flags, path
from diffusers_prx.data.scenes import LEVELS
from diffusers_prx.evaluation.preferences import PairSettings, emoji_prompts, make_pairs, scene_prompts
from diffusers_prx.evaluation.scorers import RankedPrompt
from diffusers_prx.files import expand_path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=expand_path, help="Saved pipeline: folder or Hub id.")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", type=path, help="Text file with one prompt per line.")
    prompts.add_argument("--scenes", action="store_true", help="Use captions of the built-in scenes as prompts.")
    prompts.add_argument(
        "--emoji", type=expand_path, metavar="DIR",
        help="Use captions of the drawings in this folder of training/tools/fetch_emoji.py as prompts.",
    )  # fmt: skip
    parser.add_argument("--level", choices=list(LEVELS), default="easy", help="Level of the scenes.")
    parser.add_argument("--num_prompts", type=int, default=1000, help="Number of scenes or emoji.")
    names = "Scorers: scenes, clip=NAME and emoji=NETWORK (folders or Hub ids; emoji needs --emoji), module:function."
    parser.add_argument("--scorers", nargs="+", required=True, help=names)
    parser.add_argument("--scorer_weights", type=float, nargs="+", help="Weight of each scorer. Default: 1.")
    parser.add_argument("--images_per_prompt", type=int, default=4, help="Images that are ranked for each prompt.")
    parser.add_argument("--num_inference_steps", type=int, default=28, help="Denoising steps.")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="Scale of classifier-free guidance.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the images, the scenes and the choice of emoji.")
    parser.add_argument("--resolution", type=int, help="Side in pixels. Default: that of the pipeline.")
    parser.add_argument("--batch_size", type=int, default=16, help="Images per call.")
    parser.add_argument("--output_dir", type=path, required=True, help="Folder of the pairs.")
    parser.add_argument("--device", help="Device. Default: the accelerator, or the CPU.")
    args = parse_flags(parser, argv)
    if args.scorer_weights is not None and len(args.scorer_weights) != len(args.scorers):
        parser.error(f"--scorer_weights needs one number for each of {len(args.scorers)} scorers")
    if args.images_per_prompt < 2:
        parser.error(f"--images_per_prompt must be at least 2, got {args.images_per_prompt}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = vars(parse_args(argv))
    file, use_scenes, level, count = (args.pop(name) for name in ("prompts", "scenes", "level", "num_prompts"))
    output_dir, device = args.pop("output_dir"), args.pop("device")
    names, weights = args.pop("scorers"), args.pop("scorer_weights")
    with exit_on_error():
        if use_scenes:
            prompts = scene_prompts(level, count, args["seed"])
        elif args["emoji"] is not None:
            prompts = emoji_prompts(args["emoji"], count, args["seed"])
        else:
            lines = file.read_text(encoding="utf-8").splitlines()
            prompts = [RankedPrompt(line.strip()) for line in lines if line.strip()]
        settings = PairSettings(scorers=dict(zip(names, weights or [1.0] * len(names))), **args)
        print(make_pairs(settings, prompts, output_dir, device or torch.accelerator.current_accelerator() or "cpu"))


if __name__ == "__main__":
    main()
