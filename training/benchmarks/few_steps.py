"""Measure what a distilled student draws in few evaluations, beside its guided teacher.

    python training/benchmarks/few_steps.py --model model_cards/prx-scenes-small --student FOLDER --network FOLDER

The student is a pipeline, or an adapter for the teacher. Every row draws the same prompts from the same noise.
`held out` and `novel` are the shares of pictures in which everything that the prompt says was read back right,
`distance` is the Frechet distance of a vision network's features (a folder of `training/tools/fetch_networks.py`) to
the held-out scenes themselves, `diversity` the mean distance between the features of 16 pictures of one prompt over
that of the teacher, and `ms` the processor time of a picture; the rows alternate, batch by batch.
"""

import argparse
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steering import LEVEL, distance_to_scenes

from diffusers_prx.data.scenes import CAPTIONS, ScenesDataset
from diffusers_prx.evaluation.extractors import load_extractor
from diffusers_prx.evaluation.generation import load_pipeline
from diffusers_prx.evaluation.scene_checker import read_scene, scene_matches

PICTURES_OF_ONE_PROMPT = 16


@dataclass
class Row:
    """A way to draw, and what it has drawn.

    Args:
        name: name in the table.
        pipeline: pipeline that draws.
        steps: denoising steps.
        guidance_scale: scale of classifier-free guidance.
    """

    name: str
    pipeline: Any
    steps: int
    guidance_scale: float
    pictures: dict[str, list[np.ndarray]] = field(default_factory=dict)
    seconds: float = 0.0
    count: int = 0

    @property
    def evaluations(self) -> int:
        return self.steps * (2 if self.guidance_scale > 1 else 1)

    def draw(self, group: str, prompts: list[str], seeds: list[int]) -> None:
        """Draw a batch of pictures for one group."""
        start = time.process_time()
        drawn = self.pipeline(
            prompts,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        self.seconds += time.process_time() - start
        self.count += len(prompts)
        self.pictures.setdefault(group, []).extend((drawn * 255).round().astype(np.uint8))


def load_student(student: str, teacher: str) -> Any:
    """Load a pipeline, or the teacher with an adapter."""
    if (Path(student) / "model_index.json").exists():
        return load_pipeline(student, dtype="float32")
    pipeline = load_pipeline(teacher, dtype="float32")
    pipeline.load_lora_weights(student)
    pipeline.fuse_lora()
    return pipeline


def diversity(extractor: Any, pictures: list[np.ndarray]) -> float:
    """Return the mean distance between the features of two pictures of the same prompt."""
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    features = extractor(images).float().unflatten(0, (-1, PICTURES_OF_ONE_PROMPT))  # (P, 16, E)
    return torch.stack([torch.pdist(group).mean() for group in features]).mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Saved pipeline in pixels that draws scenes: the teacher.")
    parser.add_argument("--student", required=True, help="Saved pipeline, or an adapter: folder or file.")
    parser.add_argument("--network", required=True, help="Folder of a vision network for distance and diversity.")
    parser.add_argument("--caption", choices=CAPTIONS, default="long", help="Kind of the captions.")
    parser.add_argument("--num_prompts", type=int, default=128, help="Number of prompts of each split.")
    parser.add_argument("--num_diverse", type=int, default=16, help="Number of prompts for the diversity.")
    parser.add_argument("--teacher_steps", type=int, default=28, help="Steps of the teacher.")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="Scale of guidance of the teacher.")
    parser.add_argument("--student_steps", type=int, nargs="+", default=[4, 2, 1], help="Steps of the student.")
    parser.add_argument("--seed", type=int, default=2026, help="Seed of scenes and noise.")
    args = parser.parse_args(argv)
    teacher, student = load_pipeline(args.model, dtype="float32"), load_student(args.student, args.model)
    most = max(args.student_steps)
    rows = [
        Row("teacher", teacher, args.teacher_steps, args.guidance_scale),
        Row("teacher", teacher, most, args.guidance_scale),
        *[Row("teacher", teacher, steps, 1.0) for steps in args.student_steps],
        *[Row("student", student, steps, 1.0) for steps in args.student_steps],
    ]
    side = teacher.config["default_sample_size"]
    samples: dict[str, list[Any]] = {}
    for split in ("heldout", "novel"):
        scenes = ScenesDataset(LEVEL, side, args.seed, split, args.caption, args.num_prompts)
        samples[split] = [scenes[index] for index in range(args.num_prompts)]
    repeated = [sample for sample in samples["heldout"][: args.num_diverse] for _ in range(PICTURES_OF_ONE_PROMPT)]
    order = random.Random(args.seed)
    for group, members in {**samples, "diverse": repeated}.items():
        for first in range(0, len(members), 32):
            prompts = [sample["caption"] for sample in members[first : first + 32]]
            seeds = [args.seed + first + index for index in range(len(prompts))]
            for row in order.sample(rows, len(rows)):
                row.draw(group, prompts, seeds)
        print(f"{group}: {len(members)} pictures", flush=True)
    extractor = load_extractor(Path(args.network))
    spread = [diversity(extractor, row.pictures["diverse"]) for row in rows]
    print("| | evaluations | held out | novel | distance | diversity | ms |\n|---|---|---|---|---|---|---|")
    for row, own in zip(rows, spread):
        right = [
            np.mean(
                [
                    scene_matches(read_scene(picture, LEVEL), sample["scene"], args.caption)
                    for picture, sample in zip(row.pictures[split], samples[split])
                ]
            )
            for split in samples
        ]
        distance = distance_to_scenes(extractor, row.pictures["heldout"], samples["heldout"])
        print(
            f"| {row.name} | {row.evaluations} | {right[0]:.3f} | {right[1]:.3f} | {distance:.3f} |"
            f" {own / spread[0]:.3f} | {1000 * row.seconds / row.count:.1f} |"
        )


if __name__ == "__main__":
    main()
