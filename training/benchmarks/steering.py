"""Measure what guiders that change the network do to pictures of held-out scenes.

    python training/benchmarks/steering.py --model model_cards/prx-scenes-small --network FOLDER

Every method draws the same prompts from the same noise with the same Euler steps. `accuracy` is the share of pictures
in which everything that the prompt says was read back right, `distance` the Frechet distance of a vision network's
features to the held-out scenes themselves (a folder of `training/tools/fetch_networks.py`), and `time` the processor
time over that of no guidance; the methods alternate, batch by batch. With `--guide_steps` above 0, a smaller
transformer is trained for so many steps on the same scenes and the same text encoder, and guides as a weaker network.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.guiders import AutoGuidance, PerturbedAttentionGuidance, SkipLayerGuidance

from diffusers_prx import PRXTransformer2DModel
from diffusers_prx.data.scenes import CAPTIONS, ScenesDataset
from diffusers_prx.evaluation.extractors import load_extractor
from diffusers_prx.evaluation.generation import load_pipeline
from diffusers_prx.evaluation.metrics import FrechetDistance
from diffusers_prx.evaluation.scene_checker import read_scene, scene_matches

LEVEL = "easy"


def methods(scale: float, block: int, guide: Any) -> dict[str, dict[str, Any]]:
    """Return the arguments of a call for each method."""
    skip = {"skip_layer_guidance_layers": [block], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    alone = {"perturbed_guidance_layers": [block], "perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
    found: dict[str, dict[str, Any]] = {"no guidance": {"guidance_scale": 1.0}}
    found[f"negative prompt, {scale:g}"] = {"guidance_scale": scale}
    for w in (1.0, scale):
        name = "alone" if w == 1 else f"with the negative prompt, {w:g}"
        found[f"block {block} skipped, {name}"] = {"guider": SkipLayerGuidance(w, 1.0, **skip)}
        found[f"block {block} perturbed, {name}"] = {"guider": PerturbedAttentionGuidance(w, 1.0, **alone)}
    auto = AutoGuidance(scale, auto_guidance_layers=[block], dropout=1.0)
    found[f"negative prompt with block {block} skipped, {scale:g}"] = {"guider": auto}
    if guide is not None:
        found[f"weaker network, {scale:g}"] = {"guide_transformer": guide, "guidance_scale": scale}
    return found


def train_guide(pipeline: Any, steps: int, caption: str, seed: int) -> Any:
    """Train a transformer of half the width and depth on velocities, with the text encoder of the pipeline."""
    config = dict(pipeline.transformer.config)
    half = {"hidden_size": config["hidden_size"] // 2, "num_heads": config["num_heads"] // 2}
    torch.manual_seed(seed)
    guide = PRXTransformer2DModel.from_config(config | half | {"depth": config["depth"] // 2})
    optimizer = torch.optim.AdamW(guide.parameters(), lr=2e-3)
    scenes = ScenesDataset(LEVEL, pipeline.config["default_sample_size"], seed, "train", caption, 64 * steps)
    for step in range(steps):
        samples = [scenes[64 * step + index] for index in range(64)]
        clean = torch.stack([torch.from_numpy(np.array(sample["image"])) for sample in samples])
        clean = clean.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        prompts = ["" if index % 10 == 0 else sample["caption"] for index, sample in enumerate(samples)]
        with torch.no_grad():
            text, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        shifted = torch.rand(64)
        sigma = 3 * shifted / (1 + 2 * shifted)
        noise = torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        loss = (guide(noisy, sigma, text.float(), mask).sample - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return guide.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Saved pipeline in pixels that draws scenes.")
    parser.add_argument("--network", help="Folder of a vision network for the distance.")
    parser.add_argument("--caption", choices=CAPTIONS, default="long", help="Kind of the captions.")
    parser.add_argument("--num_prompts", type=int, default=128, help="Number of prompts.")
    parser.add_argument("--num_inference_steps", type=int, default=12, help="Euler steps.")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="Scale of guidance.")
    parser.add_argument("--block", type=int, default=3, help="Block that is skipped or perturbed, from 0.")
    parser.add_argument("--guide_steps", type=int, default=0, help="Training steps of a weaker network; 0: none.")
    parser.add_argument("--seed", type=int, default=2026, help="Seed of scenes and noise.")
    args = parser.parse_args(argv)
    pipeline = load_pipeline(args.model, dtype="float32")
    guide = train_guide(pipeline, args.guide_steps, args.caption, args.seed) if args.guide_steps else None
    side = pipeline.config["default_sample_size"]
    scenes = ScenesDataset(LEVEL, side, args.seed, "heldout", args.caption, args.num_prompts)
    samples = [scenes[index] for index in range(args.num_prompts)]
    compared = methods(args.guidance_scale, args.block, guide)
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in compared}
    seconds = dict.fromkeys(compared, 0.0)
    order = random.Random(args.seed)
    for first in range(0, args.num_prompts, 32):
        part = samples[first : first + 32]
        for name in order.sample(list(compared), len(compared)):
            generators = [torch.Generator().manual_seed(args.seed + first + index) for index in range(len(part))]
            start = time.process_time()
            drawn = pipeline(
                [sample["caption"] for sample in part],
                num_inference_steps=args.num_inference_steps,
                generator=generators,
                output_type="np",
                **compared[name],
            ).images
            seconds[name] += time.process_time() - start
            pictures[name].extend((drawn * 255).round().astype(np.uint8))
        print(f"{first + len(part)} of {args.num_prompts} prompts", flush=True)
    extractor = None if args.network is None else load_extractor(Path(args.network))
    print("| method | accuracy | distance | time |\n|---|---|---|---|")
    for name in compared:
        right = [
            scene_matches(read_scene(picture, LEVEL), sample["scene"], args.caption)
            for picture, sample in zip(pictures[name], samples)
        ]
        distance = "" if extractor is None else f"{distance_to_scenes(extractor, pictures[name], samples):.1f}"
        share = seconds[name] / seconds["no guidance"]
        print(f"| {name} | {np.mean(right):.3f} | {distance} | {share:.2f} |", flush=True)


def distance_to_scenes(extractor: Any, pictures: list[np.ndarray], samples: list[Any]) -> float:
    """Return the Frechet distance of pictures to the scenes that their prompts describe."""
    metric = FrechetDistance(extractor)
    for images, real in (([np.array(sample["image"]) for sample in samples], True), (pictures, False)):
        for first in range(0, len(images), 32):
            metric.update(torch.from_numpy(np.stack(images[first : first + 32])).permute(0, 3, 1, 2), real)
    return metric.compute().item()


if __name__ == "__main__":
    main()
