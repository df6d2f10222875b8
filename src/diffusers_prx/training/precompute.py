"""Precomputation of latents, text embeddings and teacher features with the frozen networks of a run.

`data/precomputed.py` defines the files of a cache. Before its first step, a run that uses a cache checks three
things: the cache is complete and undamaged; settings and network weights (by hash) are the same; number, sizes, and a
sample of the images and captions match the data set. While it trains, it checks the hashes of every sample that it
reads. `precompute` checks all samples, and computes those again that differ.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..config.fields import SHARED_CACHE, field_names
from ..config.training_config import TrainingConfig
from ..data.buckets import Buckets
from ..data.captioned import ListedImages
from ..data.precomputed import (
    INDEX_FILE,
    SETTINGS_FILE,
    ImagesToEncode,
    PrecomputedImages,
    ShardCheck,
    ShardCheckDataset,
    ShardWriter,
    check_settings,
    next_shard_number,
    processed_samples,
    read_empty_text,
    read_settings,
    shard_files,
    skipped_samples,
    write_empty_text,
    write_index,
    write_settings,
)
from ..files import UNFINISHED
from ..fingerprints import tokenizer_fingerprint
from ..latents import encode
from ..pipelines.check_finite import check_finite_output
from ..techniques.alignment import teacher_features
from ..text import encode_text, find_truncated, tokenize_prompts, trim_tokens
from .distributed import check_environment
from .networks import Nets, build_nets
from .precision import resolve_precision
from .preflight import meta_networks
from .stages import Stage, build_stages, quiet_data

SHARD_SAMPLES = 512  # about 0.5 GB with FLUX latents at 256 pixels and captions of 110 tokens of width 2304

MAX_MESSAGES = 5  # about damaged samples, and about changed ones
# Settings that determine the pixels of a sample.
IMAGE_SETTINGS = ("resolution", "aspect_ratio_buckets", "max_aspect_ratio", "max_upscale", "max_crop")
# Settings that are stored for messages only; networks are compared by weights, and data by content.
MADE_FROM = (
    "pretrained_model_name_or_path",
    "revision",
    "vae_name_or_path",
    "text_encoder_name_or_path",
    "repa_teacher",
    "dataset_name",
    "train_data_dir",
    "data_sources",
    "dataset_split",
    "caption_column",
)


def network_settings(nets: Nets) -> dict[str, Any]:
    """Return facts that identify the frozen networks of a run."""
    return {
        "vae": None if nets.vae is None else nets.fingerprint_of("vae"),
        "text_encoder": nets.fingerprint_of("text_encoder"),
        "tokenizer": tokenizer_fingerprint(nets.tokenizer),
        "caption_cleaning": nets.caption_cleaning,
    }


def cache_settings(
    stages: Sequence[TrainingConfig], nets: Nets, networks: dict[str, Any], samples: int
) -> dict[str, Any]:
    """Return everything that the content of a cache depends on.

    Args:
        stages: configurations of the stages that use the cache.
        nets: networks of the run.
        networks: result of `network_settings`.
        samples: number of samples in the data set.
    """
    cfg = stages[0]
    columns = needed_columns(stages, nets)
    teacher = None
    if "teacher_features" in columns:
        teacher = f"{nets.teacher.fingerprint}, one patch for {nets.pixels_per_token} pixels"
    return {
        "samples": samples,
        **{name: getattr(cfg, name) for name in IMAGE_SETTINGS},
        "crop": "center",
        **networks,
        "max_sequence_length": cfg.max_sequence_length,
        "mixed_precision": cfg.mixed_precision,
        "types": {"latents": "float32", "text": "bfloat16", "teacher_features": "float16"},
        "teacher_features": teacher,
        "pixels": True if "pixels_uint8" in columns else None,
    }


def needed_columns(stages: Sequence[TrainingConfig], nets: Nets) -> list[str]:
    """Return the columns, besides text, that the stages need."""
    columns = [] if nets.vae is None else ["latent_mean", "latent_std"]
    if nets.vae is None or any(cfg.lpips_weight or cfg.dino_weight for cfg in stages):
        columns.append("pixels_uint8")
    if any(cfg.repa_weight for cfg in stages):
        columns.append("teacher_features")
    return columns


# Using a cache


def open_precomputed(stages: Sequence[Stage], nets: Nets) -> None:
    """Open the cache of every stage with `precomputed_dir`; the stages must have buckets.

    Raises:
        ValueError: a cache is missing, incomplete or damaged, or was made with other settings or data.
    """
    cached = [stage for stage in stages if stage.cfg.precomputed_dir is not None]
    networks = network_settings(nets) if cached else {}
    for stage in cached:
        assert stage.buckets is not None
        settings = cache_settings([stage.cfg], nets, networks, len(stage.source))
        columns = needed_columns([stage.cfg], nets)
        stage.precomputed = PrecomputedImages(stage.cfg.precomputed_folder, settings, columns)
        stage.precomputed.verify(stage.source, stage.buckets)


# Making a cache


def precompute(cfg: TrainingConfig, shard_samples: int = SHARD_SAMPLES) -> None:
    """Compute the missing samples in the caches of a run's stages, on one or several processes.

    After an interruption, call it again, with any number of processes: finished shards are kept.

    Args:
        cfg: configuration of the training run.
        shard_samples: number of samples per shard.

    Raises:
        ValueError: the data cannot be cached, or the cache was started with other settings.
        OSError: the disk is full; finished shards are kept.

    Example:
        >>> precompute(parse_config(["--config", "recipe.yaml", "--precomputed_dir", "cache", "--center_crop"]))
    """
    cfg = resolve_precision(cfg)
    check_environment(cfg)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=cfg.mixed_precision)
    shared: dict[Path, list[Stage]] = {}
    # the other processes read the caches that the main process writes
    with accelerator.main_process_first(), quiet_data(not accelerator.is_main_process):
        built = build_stages(cfg)
    for stage in built:
        if stage.cfg.precomputed_dir is not None:
            shared.setdefault(stage.cfg.precomputed_folder, []).append(stage)
    if not shared:
        raise ValueError("`precomputed_dir` is not set: pass `--precomputed_dir` with a folder for the results.")
    pixels_per_token = meta_networks(cfg).pixels_per_token
    for folder, stages in shared.items():
        _check_shared(folder, stages)
        if accelerator.is_main_process and shard_files(folder):  # images may have changed since then
            stages[0].clear_size_cache()
        with accelerator.main_process_first():  # the others read the cached sizes
            stages[0].assign_buckets(pixels_per_token, accelerator.num_processes)
            if stages[0].cfg.aspect_ratio_buckets == "none":
                stages[0].check_squares(pixels_per_token)
        for message in stages[0].left_out:
            accelerator.print(f"left out: {message}")
        assert stages[0].buckets is not None
        accelerator.print(f"{folder}: {len(stages[0].source)} samples, {stages[0].buckets.summary()}")
    if cfg.dry_run:
        accelerator.print("dry run: nothing is computed")
        accelerator.end_training()
        return
    nets = replace(build_nets(cfg), transformer=None, projector=None, lpips=None, dino=None)
    networks = network_settings(nets)
    for module in (nets.vae, nets.text_encoder, nets.teacher):
        if module is not None:
            module.to(accelerator.device)
    for folder, stages in shared.items():
        _precompute_folder(folder, stages, nets, networks, accelerator, shard_samples)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _check_shared(folder: Path, stages: list[Stage]) -> None:
    """Raise a ValueError if stages that share a cache differ in a setting of its samples."""
    for name in field_names(TrainingConfig, SHARED_CACHE):
        values = [getattr(stage.cfg, name) for stage in stages]
        if name == "caption_weights":  # all captions are stored, regardless of their weights
            values = [sorted(weights) for weights in values]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"Stages with the same `resolution` share the folder {folder}, but their `{name}` differs: {values}. "
                "Set another `precomputed_dir` for one of them."
            )


def _precompute_folder(
    folder: Path,
    stages: list[Stage],
    nets: Nets,
    networks: dict[str, Any],
    accelerator: Accelerator,
    shard_samples: int,
) -> None:
    """Compute the share of this process of one cache; the main process then writes the index."""
    source, buckets, configs = stages[0].source, stages[0].buckets, [stage.cfg for stage in stages]
    cfg, columns = configs[0], needed_columns(configs, nets)
    assert buckets is not None
    settings = cache_settings(configs, nets, networks, len(source))
    if accelerator.is_main_process:
        _begin(folder, {"settings": settings, "made_from": {name: getattr(cfg, name) for name in MADE_FROM}})
    accelerator.wait_for_everyone()
    begun = read_settings(folder)
    check_settings(begun["settings"], settings, folder, begun["made_from"])
    _drop_damaged_and_changed(folder, source, buckets, accelerator, cfg.dataloader_num_workers)
    done, number = processed_samples(folder, len(source)), next_shard_number(folder)
    accelerator.wait_for_everyone()  # all processes must list the shards before one is written

    if accelerator.is_main_process and not _has_empty_text(folder):
        with torch.no_grad(), accelerator.autocast():
            write_empty_text(folder, embed_captions([""], nets, cfg)[0][0])
    batches = _batches(buckets, done, cfg.train_batch_size)
    start, stop = (len(batches) * (accelerator.process_index + i) // accelerator.num_processes for i in (0, 1))
    batches = batches[start:stop]
    loader = DataLoader(
        ImagesToEncode(source, buckets),
        batch_sampler=batches,
        collate_fn=list,
        num_workers=cfg.dataloader_num_workers,
    )
    writer = ShardWriter(folder, accelerator.process_index, number, shard_samples)
    with tqdm(
        total=sum(map(len, batches)),
        desc=f"precomputing {folder} ({int(done.sum())} of {len(done)} samples exist)",
        disable=not accelerator.is_local_main_process,
        unit="image",
    ) as progress:
        for items in loader:
            usable = [item for item in items if "skipped" not in item]
            for item in items:
                if "skipped" in item:
                    writer.skip(item["index"], *item["skipped"])
            if usable:
                with torch.no_grad(), accelerator.autocast():
                    samples = encode_samples(usable, columns, nets, cfg)
                for sample in samples:  # outside of autocast, which does not support float16 on a CPU
                    writer.add(sample)
            progress.update(len(items))
    writer.write()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _check_readable(folder, len(source), cfg)
        print(summary(folder, write_index(folder, begun["settings"], begun["made_from"])))


def _drop_damaged_and_changed(
    folder: Path, source: ListedImages, buckets: Buckets, accelerator: Accelerator, num_workers: int
) -> None:
    """Remove damaged samples, and samples whose image, caption or bucket has changed, from the shards.

    Each process checks a part of the shards. The index is removed before a shard is changed.
    """
    mine = shard_files(folder)[accelerator.process_index :: accelerator.num_processes]
    checks: list[ShardCheck] = []
    loader = DataLoader(ShardCheckDataset(mine, source, buckets), batch_size=None, num_workers=num_workers)
    for check in tqdm(loader, desc=f"verifying {folder}", disable=not mine or not accelerator.is_local_main_process):
        checks.append(check)
    checks = [check for check in checks if check.damaged or check.changed]
    found = gather_object([(check.damaged, check.changed) for check in checks])
    for title, messages in (
        ("damaged", [message for damaged, _ in found for message in damaged]),
        ("changed in the data set since they were computed", [message for _, changed in found for message in changed]),
    ):
        if messages:
            accelerator.print(f"{folder}: {len(messages)} samples are {title} and are computed again:")
            for message in messages[:MAX_MESSAGES]:
                accelerator.print(f"  {message}")
    if found and accelerator.is_main_process:
        (folder / INDEX_FILE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    for check in checks:
        check.remove_invalid()
    accelerator.wait_for_everyone()


def _has_empty_text(folder: Path) -> bool:
    try:
        read_empty_text(folder)
    except ValueError:
        return False
    return True


def _check_readable(folder: Path, samples: int, cfg: TrainingConfig) -> None:
    """Raise a ValueError if too many samples are unreadable; the shards are kept."""
    reasons = [reason for kind, reason in skipped_samples(folder).values() if kind == "unreadable"]
    if reasons and (len(reasons) == samples or cfg.exceeds_corrupt_share(len(reasons), samples)):
        raise ValueError(
            f"`max_corrupt_share` is {cfg.max_corrupt_share}, but {len(reasons)} of {samples} samples are unreadable; "
            f"the first: {reasons[0]}."
        )


def _begin(folder: Path, begun: dict[str, Any]) -> None:
    """Make the folder of a cache, or continue an existing one."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"*{UNFINISHED}"):  # of a killed process
        leftover.unlink()
    if not (folder / SETTINGS_FILE).is_file():
        write_settings(folder, begun)


def _batches(buckets: Buckets, done: np.ndarray, batch_size: int) -> list[list[tuple[int, int]]]:
    """Return batches of (index in the data set, bucket) for missing samples; each batch has one bucket."""
    batches = []
    for bucket, indices in enumerate(map(np.asarray, buckets.members)):
        missing = indices[~done[indices]].tolist()
        for first in range(0, len(missing), batch_size):
            batches.append([(index, bucket) for index in missing[first : first + batch_size]])
    return batches


def encode_samples(
    items: list[dict[str, Any]], columns: Sequence[str], nets: Nets, cfg: TrainingConfig
) -> list[dict[str, torch.Tensor]]:
    """Encode samples of one size.

    Args:
        items: entries of `ImagesToEncode`.
        columns: result of `needed_columns`.
        nets: networks on their device.
        cfg: configuration of the stage.

    Returns:
        Samples for a shard, on the CPU.
    """
    pixels_uint8 = torch.stack([item["pixels_uint8"] for item in items])  # (B, 3, H, W)
    images = encode_images(pixels_uint8.to(nets.text_encoder.device), columns, nets)
    texts = iter(embed_captions([caption for item in items for caption in item["captions"]], nets, cfg))
    samples = []
    for row, item in enumerate(items):
        own = [next(texts) for _ in item["captions"]]
        samples.append(
            {name: item[name] for name in ("index", "size", "image_hash", "upscaled", "caption_hash")}
            | {name: values[row] for name, values in images.items()}
            | {
                "text": torch.cat([text for text, _ in own]),  # (T, E)
                "text_lengths": torch.tensor([len(text) for text, _ in own]),
                "cut": torch.tensor([cut for _, cut in own]),
            }
        )
    return samples


def encode_images(pixels_uint8: torch.Tensor, columns: Sequence[str], nets: Nets) -> dict[str, torch.Tensor]:
    """Return the stored columns (B, ...) of images (B, 3, H, W), on the CPU."""
    found: dict[str, torch.Tensor | None] = {"pixels_uint8": pixels_uint8}
    if nets.vae is not None:
        latents = encode(nets.vae, pixels_uint8.float() / 127.5 - 1)
        check_finite_output("vae", nets.vae, latents.mean)
        found |= {"latent_mean": latents.mean, "latent_std": latents.std}  # (B, C, h, w) float32
    if "teacher_features" in columns:
        grid = (pixels_uint8.shape[2] // nets.pixels_per_token, pixels_uint8.shape[3] // nets.pixels_per_token)
        features = teacher_features(nets.teacher, pixels_uint8, grid).half()  # (B, N, E)
        if not features.isfinite().all():
            raise ValueError(f"`repa_teacher` {nets.teacher.name!r} gives features beyond float16 (65504).")
        found["teacher_features"] = features
    return {name: value.cpu() for name, value in found.items() if value is not None and name in columns}


def embed_captions(captions: list[str], nets: Nets, cfg: TrainingConfig) -> list[tuple[torch.Tensor, bool]]:
    """Return (embedding (T, E) without padding, bfloat16 on the CPU; truncated) for each caption."""
    clean, device = nets.clean_caption, nets.text_encoder.device
    ids, mask = tokenize_prompts(nets.tokenizer, captions, cfg.max_sequence_length, clean)  # (B, L)
    cut = find_truncated(nets.tokenizer, captions, mask, clean)
    ids, mask = trim_tokens(ids, mask)  # (B, M)
    text = encode_text(nets.text_encoder, ids.to(device), mask.to(device)).bfloat16().cpu()  # (B, M, E)
    check_finite_output("text_encoder", nets.text_encoder, text)
    return [(row[keep], is_cut) for row, keep, is_cut in zip(text, mask, cut)]


def summary(folder: Path, index: dict[str, Any]) -> str:
    """Summarize the content and the size of a cache."""
    skipped = ", ".join(f"{count} {kind}" for kind, count in index["skipped"].items())
    lines = [f"{folder}: {index['samples']} samples in {len(index['shards'])} shards; left out: {skipped}"]
    lines += [f"  {name}: {size / 1e6:.1f} MB" for name, size in index["bytes"].items() if size >= 1e5]
    return "\n".join([*lines, f"  total: {sum(index['bytes'].values()) / 1e6:.1f} MB"])
