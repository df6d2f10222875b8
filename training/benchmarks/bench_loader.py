"""Time the loading of data: samples per second by kind of source, and the share of a training run spent waiting.

    python training/benchmarks/bench_loader.py                      # everything
    python training/benchmarks/bench_loader.py --what sources --dataloader_num_workers 0

- `sources`: the same 64 px images with long captions through the loader of a training run: from a folder of PNGs, from
  parquet, from a WebDataset tar, and from the cache of `precompute_prx.py`. The cache has latents of 16 channels at an
  eighth of the side, and text of width 384. The clock starts after the first batch, so the start of the workers does
  not count. A number is the median over the repeats, in random order.
- `quickstart`: the first steps of `recipes/quickstart.yaml`, and the share of their time spent waiting for data.
"""

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import datasets
import torch
from diffusers import AutoencoderKL
from timing import alternate

from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.data.scenes import ScenesDataset
from diffusers_prx.training.networks import build_nets, new_text_encoder, train_tokenizer
from diffusers_prx.training.precompute import open_precomputed, precompute
from diffusers_prx.training.recipes import parse_config
from diffusers_prx.training.setup import set_up_run
from diffusers_prx.training.stages import Stage, build_stages
from diffusers_prx.training.trainer import train

TRAINING = Path(__file__).resolve().parents[1]
RESOLUTION, BATCH_SIZE = 64, 32


def write_sources(folder: Path, count: int) -> dict[str, Path]:
    """Write the same samples as a folder, a parquet file and a tar file. Return the path of each."""
    scenes = ScenesDataset(level="medium", resolution=RESOLUTION, size=count)
    paths = {"folder": folder / "images", "parquet": folder / "all.parquet", "tar": folder / "all.tar"}
    paths["folder"].mkdir()
    rows = []
    with tarfile.open(paths["tar"], "w") as tar:
        for index in range(count):
            sample, png = scenes[index], io.BytesIO()
            sample["image"].save(png, "PNG")
            members = {"png": png.getvalue(), "txt": sample["caption"].encode()}
            for ending, content in members.items():
                (paths["folder"] / f"{index:05}.{ending}").write_bytes(content)
                member = tarfile.TarInfo(f"{index:05}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            rows.append({"image": {"bytes": members["png"], "path": None}, "text": sample["caption"]})
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(paths["parquet"])
    return paths


def write_networks(folder: Path) -> dict[str, str]:
    """Save small random networks for precomputing. Return them as settings of a run."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16,) * 4,
        norm_num_groups=8,
        latent_channels=16,
        scaling_factor=0.36,
        shift_factor=0.12,
    )
    tokenizer = train_tokenizer([ScenesDataset(level="medium", size=9)[i]["caption"] for i in range(9)], 320, 128)
    text = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 6}
    text |= {"head_dim": 64, "intermediate_size": 384, "query_pre_attn_scalar": 64}
    vae.save_pretrained(folder / "vae")
    new_text_encoder(text, tokenizer).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "text_encoder")
    return {"vae_name_or_path": str(folder / "vae"), "text_encoder_name_or_path": str(folder / "text_encoder")}


def open_stage(cfg: TrainingConfig) -> Stage:
    """Return the data of a run, ready to be read."""
    (stage,) = build_stages(cfg)
    stage.assign_buckets(8, 1)
    if cfg.precomputed_dir is not None:
        open_precomputed([stage], build_nets(cfg))
    return stage


def samples_per_second(stage: Stage) -> float:
    batches = stage.training_batches(0, 0, 1, torch.device("cpu"))
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch["captions"]) for batch in batches)
    return count / (time.perf_counter() - start)


def bench_sources(count: int, workers: int, repeats: int) -> None:
    transformer = {"patch_size": 1, "hidden_size": 64, "num_heads": 2, "depth": 1, "axes_dim": [16, 16]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = write_sources(folder, count)
        settings = {
            **write_networks(folder),
            "output_dir": str(folder / "run"),
            "transformer_config": transformer,
            "resolution": RESOLUTION,
            "center_crop": True,
            "max_sequence_length": 128,
            "train_batch_size": BATCH_SIZE,
            "max_train_steps": count // BATCH_SIZE,
            "lr_warmup_steps": 0,
            "dataloader_num_workers": workers,
        }
        cached = {"dataset_name": str(sources["parquet"]), "precomputed_dir": str(folder / "cache")}
        precompute(TrainingConfig(**settings | cached))
        stages = {
            kind: open_stage(TrainingConfig(**settings | {"dataset_name": str(path)}))
            for kind, path in sources.items()
        }
        stages["cache"] = open_stage(TrainingConfig(**settings | cached))
        rates: dict[str, list[float]] = {kind: [] for kind in stages}
        work = {
            kind: partial(lambda kind, _: rates[kind].append(samples_per_second(stages[kind])), kind)
            for kind in stages
        }
        alternate(work, lambda: None, repeats)
    print(f"\n{count} samples of {RESOLUTION} px, batch {BATCH_SIZE}, {workers} workers, n = {repeats}\n")
    print("| source | samples/s | slowest to fastest |\n|---|---|---|")
    for kind, (_, *values) in rates.items():  # the first one warms up
        print(f"| {kind} | **{statistics.median(values):.0f}** | {min(values):.0f} to {max(values):.0f} |")


def measure_quickstart(steps: int) -> None:
    flags = ["--config", str(TRAINING / "recipes" / "quickstart.yaml"), "--max_train_steps", str(steps)]
    flags += ["--lr_scheduler", "constant", "--lr_decay_steps", "null", "--lr_warmup_steps", "0"]
    flags += ["--validation_steps", str(10 * steps), "--checkpointing_steps", str(10 * steps), "--report_to", "none"]
    with tempfile.TemporaryDirectory() as folder:
        cfg = parse_config([*flags, "--output_dir", folder])
        train(set_up_run(cfg, TRAINING.parent / "model_cards" / "template.md"))
        record = json.loads((Path(folder) / "training.json").read_text())
    share = 100 * record["history"][-1]["waiting_share"]
    print(f"\nquickstart: {share:.2f}% of {record['seconds']:.1f} s for {steps} steps were spent waiting for data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["sources", "quickstart", "all"], default="all")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--dataloader_num_workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="Steps of the quickstart.")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.what in ("sources", "all"):
        bench_sources(args.samples, args.dataloader_num_workers, args.repeats)
    if args.what in ("quickstart", "all"):
        measure_quickstart(args.steps)


if __name__ == "__main__":
    main()
