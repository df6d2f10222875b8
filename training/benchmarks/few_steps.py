"""Measure what a student draws beside its teacher: a distilled model, or one that learned from preferences or rewards.

    python training/benchmarks/few_steps.py --model model_cards/prx-scenes-small --student FOLDER --network FOLDER

The student is a pipeline, or an adapter for the teacher. Every row draws the same prompts from the same noise; the
rows alternate, batch by batch. If it is interrupted, run the same command again: it continues.

| column | |
|---|---|
| held out, novel | share of pictures in which everything that the prompt says was read back right |
| FID | Frechet distance to the held-out scenes themselves, by the features of `--fid_network` |
| diversity | mean distance between the features (of `--network`) of 16 pictures of one prompt, over the first row's |
| saturation | mean chroma over that of the held-out scenes |
| ms | processor time of a picture |

After preferences or rewards, draw both in the same way: `--student_steps 28 --student_guidance_scale 3`.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steering import LEVEL, distance_to_scenes

from diffusers_prx.data.scenes import CAPTIONS, ScenesDataset
from diffusers_prx.evaluation.extractors import load_extractor
from diffusers_prx.evaluation.generation import PictureFolder, Prompt, load_pipeline
from diffusers_prx.evaluation.scene_checker import read_scene, scene_matches
from diffusers_prx.files import write_json
from diffusers_prx.fingerprints import pipeline_fingerprint

PICTURES_OF_ONE_PROMPT = 16
BATCH_SIZE = 32


@dataclass
class Row:
    """A way to draw, and the folder of what it has drawn.

    Args:
        name: name in the table.
        pipeline: pipeline that draws.
        steps: denoising steps.
        guidance_scale: scale of classifier-free guidance.
        folder: folder for its pictures and times.
    """

    name: str
    pipeline: Any
    steps: int
    guidance_scale: float
    folder: Path

    @property
    def evaluations(self) -> int:
        return self.steps * (2 if self.guidance_scale > 1 else 1)

    def pictures(self, group: str) -> PictureFolder:
        return PictureFolder(self.folder / group)

    @property
    def times(self) -> dict[str, float]:
        """Seconds that were measured, and the number of pictures drawn in them."""
        file = self.folder / "times.json"
        return json.loads(file.read_text()) if file.exists() else {"seconds": 0.0, "pictures": 0}

    def draw(self, group: str, prompts: list[Prompt], seed: int) -> None:
        """Draw a batch of pictures, if one of them is missing."""
        pictures = self.pictures(group)
        if all(map(pictures.has, prompts)):
            return
        start = time.process_time()
        drawn = self.pipeline(
            [text for _, text in prompts],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(seed + index) for index, _ in prompts],
            output_type="np",
        ).images
        seconds, times = time.process_time() - start, self.times
        for prompt, image in zip(prompts, (drawn * 255).round().astype(np.uint8)):
            pictures.write(prompt, image)
        found = {"seconds": times["seconds"] + seconds, "pictures": times["pictures"] + len(prompts)}
        write_json(self.folder / "times.json", found)


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
    groups = [extractor(torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2)) for part in chunks(pictures)]
    return torch.stack([torch.pdist(features.float()).mean() for features in groups]).mean().item()


def chunks(pictures: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Return the pictures of each prompt."""
    count = PICTURES_OF_ONE_PROMPT
    return [pictures[first : first + count] for first in range(0, len(pictures), count)]


def saturation(pictures: list[np.ndarray]) -> float:
    """Return the mean difference between the largest and the smallest channel of a pixel."""
    return float(np.mean([np.ptp(picture.astype(np.int16), axis=-1).mean() for picture in pictures]))


def accuracy(pictures: list[np.ndarray], samples: list[Any], caption: str) -> float:
    """Return the share of pictures that show the scenes of the samples."""
    pairs = zip(pictures, samples)
    return float(np.mean([scene_matches(read_scene(own, LEVEL), sample["scene"], caption) for own, sample in pairs]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Saved pipeline in pixels that draws scenes: the teacher.")
    parser.add_argument("--student", required=True, help="Saved pipeline, or an adapter: folder or file.")
    parser.add_argument("--network", required=True, help="Folder of a vision network for the diversity.")
    parser.add_argument("--fid_network", help="Encoder for FID: inception, folder or Hub id. Default: --network.")
    parser.add_argument("--caption", choices=CAPTIONS, default="long", help="Kind of the captions.")
    parser.add_argument("--num_prompts", type=int, default=128, help="Number of prompts of each split.")
    parser.add_argument("--num_diverse", type=int, default=16, help="Number of prompts for the diversity.")
    parser.add_argument("--teacher_steps", type=int, default=28, help="Steps of the teacher.")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="Scale of guidance of the teacher.")
    parser.add_argument("--student_steps", type=int, nargs="+", default=[4, 2, 1], help="Steps of the student.")
    parser.add_argument("--student_guidance_scale", type=float, default=1.0, help="Scale of guidance of the student.")
    parser.add_argument("--seed", type=int, default=2026, help="Seed of scenes and noise.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/few_steps"), help="Folder of the pictures.")
    args = parser.parse_args(argv)
    pipelines = {"teacher": load_pipeline(args.model, dtype="float32")}
    pipelines["student"] = load_student(args.student, args.model)
    hashes = {name: pipeline_fingerprint(pipeline) for name, pipeline in pipelines.items()}
    ways = [("teacher", args.teacher_steps, args.guidance_scale)]
    ways += [("teacher", max(args.student_steps), args.guidance_scale)]
    ways += [(name, steps, args.student_guidance_scale) for name in pipelines for steps in args.student_steps]
    rows = []
    for name, steps, scale in dict.fromkeys(ways):
        folder = args.output_dir / f"{hashes[name]}-{steps}-{scale:g}-{args.caption}-{args.seed}"
        rows.append(Row(name, pipelines[name], steps, scale, folder))

    side = pipelines["teacher"].config["default_sample_size"]
    samples: dict[str, list[Any]] = {}
    for split in ("heldout", "novel"):
        scenes = ScenesDataset(LEVEL, side, args.seed, split, args.caption, args.num_prompts)
        samples[split] = [scenes[index] for index in range(args.num_prompts)]
    first = samples["heldout"][: args.num_diverse]
    prompts = {split: [sample["caption"] for sample in split_samples] for split, split_samples in samples.items()}
    prompts["diverse"] = [sample["caption"] for sample in first for _ in range(PICTURES_OF_ONE_PROMPT)]
    numbered = {group: list(enumerate(texts)) for group, texts in prompts.items()}
    order = random.Random(args.seed)
    for group, members in numbered.items():
        for start in range(0, len(members), BATCH_SIZE):
            for row in order.sample(rows, len(rows)):
                row.draw(group, members[start : start + BATCH_SIZE], args.seed)
            print(f"{group}: {min(start + BATCH_SIZE, len(members))} of {len(members)} pictures", flush=True)

    network = load_extractor(Path(args.network))
    fid_network = network if args.fid_network is None else load_extractor(args.fid_network)
    chroma = saturation([np.array(sample["image"]) for sample in samples["heldout"]])
    spread = None
    print("| | evaluations | held out | novel | FID | diversity | saturation | ms |\n|" + 8 * "---|")
    for row in rows:
        pictures = {group: [row.pictures(group).read(prompt) for prompt in numbered[group]] for group in numbered}
        right = [accuracy(pictures[split], samples[split], args.caption) for split in samples]
        own_spread = diversity(network, pictures["diverse"])
        spread = spread or own_spread
        print(
            f"| {row.name} | {row.evaluations} | {right[0]:.3f} | {right[1]:.3f} |"
            f" {distance_to_scenes(fid_network, pictures['heldout'], samples['heldout']):.3f} |"
            f" {own_spread / spread:.3f} | {saturation(pictures['heldout']) / chroma:.3f} |"
            f" {1000 * row.times['seconds'] / row.times['pictures']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
