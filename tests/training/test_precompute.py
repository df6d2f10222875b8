"""Precomputation with real networks: equal losses, interruptions, several processes, and rejected caches."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

import runs
import tiny
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.data.precomputed import ImagesToEncode, Shard, shard_files
from diffusers_prx.fingerprints import fingerprint, tokenizer_fingerprint
from diffusers_prx.training import networks
from diffusers_prx.training.networks import Nets, build_nets
from diffusers_prx.training.precompute import (
    embed_captions,
    encode_images,
    needed_columns,
    open_precomputed,
    precompute,
)
from diffusers_prx.training.rng import StepRandom
from diffusers_prx.training.stages import build_stages
from diffusers_prx.training.step import train_step
from diffusers_prx.training.trainer import train
from disks import full_disk
from training import precompute_prx

SIZES = [(40, 48), (48, 40), (32, 32), (64, 33), (36, 60), (20, 20), (33, 34), (50, 50), (32, 40), (41, 33), (37, 37)]
UNREADABLE, TOO_SMALL, LAST = 2, 5, 10
BATCH = 4


def make_images(folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for place, (width, height) in enumerate(SIZES):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{place:02}.png")
        caption = runs.CAPTIONS[place % 2] + " and a star" * place
        (folder / f"{place:02}.txt").write_text(caption)
    (folder / f"{UNREADABLE:02}.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """Paths of saved networks and images."""
    root = tmp_path_factory.mktemp("parts")
    tiny.vae_kl().save_pretrained(root / "vae")
    runs.save_text_encoder(root / "text_encoder")
    runs.save_teacher(root / "teacher")
    make_images(root / "images")
    return {path.name: str(path) for path in root.iterdir()}


def settings(parts: dict[str, str], output_dir: Path, **changes) -> dict:
    values = {
        "dataset_name": None,
        "train_data_dir": parts["images"],
        "center_crop": True,
        "train_text_encoder": False,
        "vae_name_or_path": parts["vae"],
        "transformer_config": runs.TRANSFORMER | {"patch_size": 4},
        "prediction_type": "velocity",
        "train_batch_size": BATCH,
        "caption_dropout": 0.3,
        "max_corrupt_share": 0.5,
        "max_sequence_length": 24,  # cuts some of the captions
    }
    return runs.settings(output_dir, parts["text_encoder"], **values | changes)


def aligned(parts: dict[str, str]) -> dict:
    return {"repa_weight": 0.5, "repa_teacher": parts["teacher"], "repa_block": 1}


def forget_processes() -> None:
    """Reset the state that accelerate keeps in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_cache(values: dict, folder: Path, shard_samples: int = 3) -> dict:
    """Precompute for a run, and return its settings with the cache."""
    values = values | {"precomputed_dir": str(folder)}
    forget_processes()
    precompute(TrainingConfig(**values), shard_samples)
    return values


@pytest.fixture(scope="module")
def cached(tmp_path_factory, parts) -> dict:
    """Settings of a run with a cache of all columns."""
    folder = tmp_path_factory.mktemp("cached")
    return make_cache(settings(parts, folder / "run", **aligned(parts)), folder / "cache")


def opened(values: dict) -> tuple[Nets, list]:
    """Return networks and stages of a run before its first step."""
    cfg = TrainingConfig(**values)
    nets, stages = build_nets(cfg), build_stages(cfg)
    tiny.randomize(nets.transformer)  # a new one ignores its text
    for stage in stages:
        stage.assign_buckets(nets.pixels_per_token, 1)
    open_precomputed(stages, nets)
    return nets, stages


def steps(values: dict) -> list[dict[str, float]]:
    """Return the losses of all steps, without training."""
    nets, (stage,) = opened(values)
    found = []
    for step, batch in enumerate(stage.training_batches(0, 0, 1, torch.device("cpu"))):
        rng = StepRandom(stage.cfg.seed, step, batch["sample_index"])
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.cfg.mixed_precision == "bf16"):
            output = train_step(batch, nets, stage.cfg, rng)
        losses = {name: value.item() for name, value in output.losses.items()}
        counts = {name: batch[name] for name in ("unfit", "upscaled", "captions")}
        found.append({**losses, **counts, "unreadable": len(batch["unreadable"]), "truncated": output.truncated})
    return found


# The same losses


KINDS = ["latents", "pixels", "perceptual", "buckets", "no randomness"]


@pytest.mark.parametrize(("kind", "precision"), [*((k, "no") for k in KINDS), ("latents", "bf16"), ("pixels", "bf16")])
def test_precomputed_losses_equal_those_without_a_cache(kind, precision, parts, tmp_path):
    """Only text (bfloat16) and teacher features (float16) are rounded. Measured, the largest relative difference of
    any loss in any step: 3.0e-5 in float32; with bf16 autocast, as in real training, 0 of the flow loss and 2.2e-5 of
    the alignment.
    """
    changes = aligned(parts) | {"contrastive_weight": 0.05}
    if kind == "pixels":
        changes |= {"vae_name_or_path": None, "prediction_type": "x_prediction"}
    elif kind == "perceptual":
        changes |= {"dino_weight": 0.1, "dino_teacher": parts["teacher"], "dino_size": 16, "dino_crop": True}
        changes |= {"perceptual_decode_latents": True}
    elif kind == "buckets":
        changes |= {"aspect_ratio_buckets": "computed", "train_batch_size": 2, "repa_spatial_gamma": 0.8}
    elif kind == "no randomness":
        tiny.vae_dc().save_pretrained(tmp_path / "vae")
        changes |= {"vae_name_or_path": str(tmp_path / "vae"), "caption_dropout": 0.0}
    values = settings(parts, tmp_path, **changes, mixed_precision=precision, max_train_steps=6)
    wanted = steps(values)
    got = steps(make_cache(values, tmp_path / "cache"))
    assert len(got) == len(wanted) == 6
    for entry, reference in zip(got, wanted):
        assert entry.keys() == reference.keys()
        for name, value in reference.items():
            if isinstance(value, float):
                assert entry[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
            else:
                assert entry[name] == value, name
    assert len({entry["flow"] for entry in wanted}) == 6
    assert {"alignment", "contrastive"} <= wanted[0].keys()
    assert sum(entry["truncated"] for entry in wanted) > 0
    assert sum(entry["unreadable"] + entry["unfit"] for entry in wanted) > 0 or kind == "buckets"


def test_images_are_not_read_with_a_cache(cached, parts):
    """Only the images that are compared at the start are read."""
    columns = needed_columns([TrainingConfig(**cached)], opened(cached)[0])
    assert columns == ["latent_mean", "latent_std", "teacher_features"]
    _, (stage,) = opened(cached)
    batch = next(iter(stage.training_batches(0, 0, 1, torch.device("cpu"))))
    assert "pixels_uint8" not in batch
    assert batch["latent_mean"].shape == (BATCH, 4, 16, 16)


# What is stored


def test_cached_text_is_independent_of_the_batch(cached):
    """Without padding, and independent of other captions in the batch."""
    nets, (stage,) = opened(cached)
    limit = stage.cfg.max_sequence_length
    captions = [runs.CAPTIONS[0], "", runs.CAPTIONS[1] + " and a star" * 9]
    for caption, (text, cut) in zip(captions, embed_captions(captions, nets, stage.cfg)):
        text_ids = nets.tokenizer(nets.clean_caption(caption))["input_ids"]
        assert cut == (len(text_ids) > limit)
        kept = torch.tensor([*text_ids[: limit - 1], text_ids[-1]])[:limit][None] if cut else torch.tensor([text_ids])
        alone = nets.text_encoder(input_ids=kept).last_hidden_state[0]  # (T, E)
        assert text.dtype == torch.bfloat16
        assert text.shape == alone.shape
        # half a unit in the last place of bfloat16 is 2**-9; a different order of sums is far less
        torch.testing.assert_close(text.float(), alone, rtol=2**-8, atol=1e-5)
    assert [cut for _, cut in embed_captions(captions, nets, stage.cfg)] == [False, False, True]


def test_non_finite_values_are_not_cached(parts, tmp_path):
    """Overflows are reported before anything is stored."""
    nets, (stage,) = opened(settings(parts, tmp_path))
    next(nets.text_encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="`text_encoder`"):
        embed_captions(["a red cat"], nets, stage.cfg)
    next(nets.vae.parameters()).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="`vae`"):
        encode_images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ("latent_mean",), nets)


def test_cached_text_is_stored_without_padding(parts, tmp_path):
    """Captions of 110 tokens on average, 256 at most; measured: 0.43 of the padded embeddings, all tables included."""
    images = tmp_path / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    words = runs.CAPTIONS[0].split()[1:6]
    for place in range(48):
        PIL.Image.new("RGB", (32, 32)).save(images / f"{place:03}.png")
        (images / f"{place:03}.txt").write_text(" ".join(generator.choice(words, generator.integers(12, 120))))
    changes = {"train_data_dir": str(images), "max_sequence_length": 256, "train_batch_size": 16}
    values = make_cache(settings(parts, tmp_path / "run", **changes), tmp_path / "cache")
    shards = [Shard(path) for path in shard_files(tmp_path / "cache" / "32")]
    lengths = [int(shard.value("text_lengths", row)) for shard in shards for row in range(len(shard.indices))]
    assert len(lengths) == 48
    assert np.mean(lengths) == pytest.approx(110, abs=5)
    text = ("text", "text_lengths", "caption_hash", "cut")
    stored = sum(size for shard in shards for name, size in shard.bytes.items() if name.partition(".")[0] in text)
    width = opened(values)[0].text_encoder.config.encoder.hidden_size
    padded = 48 * 256 * width * 2
    tables = stored - sum(lengths) * width * 2
    print(
        f"text: {sum(lengths) / 48:.1f} tokens, {(stored - tables) / padded:.3f} of padded, with tables {tables} bytes"
    )
    assert (stored - tables) / padded < 0.5
    # with the tables at the width of the study's text encoder
    assert (sum(lengths) * 2304 * 2 + tables) / (48 * 256 * 2304 * 2) < 0.5


def contents(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Return all values of a cache by sample."""
    found = {}
    for path in shard_files(folder):
        shard = Shard(path)
        columns = [name for name in shard.bytes if "." not in name]
        for row, index in enumerate(shard.indices):
            assert index not in found
            found[index] = {name: shard.value(name, row) for name in columns}
    return found


def assert_same_contents(one: Path, other: Path) -> None:
    got, wanted = contents(one), contents(other)
    assert got.keys() == wanted.keys()
    for index, sample in wanted.items():
        assert got[index].keys() == sample.keys()
        for name, value in sample.items():
            assert got[index][name].dtype == value.dtype
            # another batch: sums in another order, and roundings to 8 bits that fall to the other side
            rtol = 2**-7 if name in ("text", "teacher_features") else 1e-4
            torch.testing.assert_close(got[index][name], value, rtol=rtol, atol=1e-4)


def test_files_of_a_cache(cached):
    folder = Path(cached["precomputed_dir"]) / "32"
    index = json.loads((folder / "index.json").read_text())
    assert index["samples"] == len(contents(folder)) == 9
    assert index["skipped"] == {"unreadable": 1, "unfit": 1}
    assert index["made_from"]["vae_name_or_path"] == cached["vae_name_or_path"]
    assert index["bytes"]["latent_mean"] == index["bytes"]["latent_std"] == 9 * 4 * 16 * 16 * 4
    assert load_file(folder / "empty_text.safetensors")["text"].shape == (1, 16)
    assert sorted(path.name for path in folder.iterdir()) == [
        "empty_text.safetensors", "index.json", "settings.json", *index["shards"]
    ]  # fmt: skip


# Kills, processes, full disks


def _precompute(values: dict) -> None:
    torch.set_num_threads(1)
    os.environ.pop("ACCELERATE_USE_CPU", None)  # the launcher's help; torchrun does not give it
    forget_processes()
    precompute(TrainingConfig(**values), 2)


def _precompute_and_wait(values: dict) -> None:
    """Source that hangs at the last image."""
    read = ImagesToEncode.__getitem__

    def wait(self: ImagesToEncode, place: tuple[int, int]) -> dict:
        if place[0] == LAST:
            signal.pause()
        return read(self, place)

    ImagesToEncode.__getitem__ = wait  # type: ignore[method-assign] # in this process, which is killed
    _precompute(values)


def test_killed_precomputation_keeps_finished_shards(cached, parts, tmp_path):
    """Killed while it waits for an image, then finished by two processes."""
    images = make_images(tmp_path / "images")
    folder = tmp_path / "cache" / "32"
    values = settings(parts, tmp_path / "run", **aligned(parts), train_data_dir=str(images), train_batch_size=2)
    values["precomputed_dir"] = str(tmp_path / "cache")
    child = multiprocessing.get_context("fork").Process(target=_precompute_and_wait, args=(values,))
    child.start()
    deadline = time.monotonic() + 60
    while len(shard_files(folder)) < 4 and child.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"`precomputed_dir`.* 4 shards"):
        opened(values)

    half = folder / "shard-00000-000004.safetensors.0123.unfinished"  # as of a kill while a shard is written
    half.write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in shard_files(folder)}
    debug_launcher(_precompute, (values,), num_processes=2)
    assert not half.exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(shard_files(folder)) == 5
    assert_same_contents(folder, Path(cached["precomputed_dir"]) / "32")
    opened(values)


def test_two_processes_precompute_together(cached, tmp_path):
    values = cached | {"precomputed_dir": str(tmp_path)}
    debug_launcher(_precompute, (values,), num_processes=2)
    folder = tmp_path / "32"
    assert {path.name.split("-")[1] for path in shard_files(folder)} == {"00000", "00001"}
    assert_same_contents(folder, Path(cached["precomputed_dir"]) / "32")
    assert json.loads((folder / "index.json").read_text())["skipped"] == {"unreadable": 1, "unfit": 1}
    before = {path: path.stat().st_mtime_ns for path in shard_files(folder)}
    make_cache(values, tmp_path)  # there is nothing left to do
    assert {path: path.stat().st_mtime_ns for path in shard_files(folder)} == before


def test_full_disk_keeps_finished_shards(cached, parts, tmp_path, capfd):
    """The disk is full at the second shard."""
    images = make_images(tmp_path / "images")
    for place in (6, 7, 8, 9):  # captions of the shards that come later are longer
        (images / f"{place:02}.txt").write_text(runs.CAPTIONS[0] * 20)
    values = settings(parts, tmp_path / "run", train_data_dir=str(images), max_sequence_length=512)
    values["precomputed_dir"] = str(tmp_path / "cache")
    folder, flags = tmp_path / "cache" / "32", tmp_path / "recipe.yaml"
    flags.write_text(json.dumps(values))
    forget_processes()
    message = r"shard-00000-000001.safetensors cannot be written .*same command"
    with full_disk(45_000), pytest.raises(OSError, match=message):
        precompute(TrainingConfig(**values), 4)
    assert [path.name for path in shard_files(folder)] == ["shard-00000-000000.safetensors"]
    assert not list(folder.glob("*.unfinished"))
    before = shard_files(folder)[0].stat().st_mtime_ns
    make_cache(values, tmp_path / "cache", 4)
    assert shard_files(folder)[0].stat().st_mtime_ns == before
    opened(values)


# Mending


def test_only_changed_and_damaged_samples_are_computed_again(parts, tmp_path, capsys):
    images, folder = make_images(tmp_path / "images"), tmp_path / "cache" / "32"
    changes = {"train_data_dir": str(images), "aspect_ratio_buckets": "computed", "train_batch_size": 2}
    values = make_cache(settings(parts, tmp_path / "run", **changes), tmp_path / "cache")
    before = contents(folder)

    (images / "00.txt").write_text("another caption")
    PIL.Image.new("RGB", SIZES[3]).save(images / "03.png")
    PIL.Image.new("RGB", (64, 33)).save(images / "04.png")  # another shape: another bucket
    path, row = next((path, Shard(path).indices.index(7)) for path in shard_files(folder) if 7 in Shard(path).indices)
    content = bytearray(path.read_bytes())
    content[content.index(Shard(path).value("latent_mean", row).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    (folder / "empty_text.safetensors").write_bytes(b"")
    (folder / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="empty_text"):
        opened(values)
    capsys.readouterr()
    make_cache(values, tmp_path / "cache")
    shown = capsys.readouterr().out
    assert "1 samples are damaged" in shown
    assert "3 samples are changed" in shown
    for words in (f"{path} ", "sample 0: its captions", "sample 3: its image", "sample 4: its image"):
        assert words in shown

    after = contents(folder)
    assert after.keys() == before.keys()
    for index in after.keys() - {0, 3, 4, 7}:
        assert all(torch.equal(after[index][name], before[index][name]) for name in before[index]), index
    fresh = values | {"output_dir": str(tmp_path / "fresh")}
    make_cache(fresh, tmp_path / "fresh_cache")
    assert_same_contents(folder, tmp_path / "fresh_cache" / "32")
    opened(values)

    times = {path: path.stat().st_mtime_ns for path in shard_files(folder)}
    make_cache(values, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in shard_files(folder)} == times
    assert "computed again" not in capsys.readouterr().out


def test_two_processes_repair_a_cache(cached, parts, tmp_path):
    images, folder = make_images(tmp_path / "images"), tmp_path / "cache" / "32"
    values = make_cache(
        cached | {"train_data_dir": str(images), "output_dir": str(tmp_path / "run")}, tmp_path / "cache", 2
    )
    for place in (0, 4, 8):
        (images / f"{place:02}.txt").write_text(f"caption number {place} is another one")
    debug_launcher(_precompute, (values,), num_processes=2)
    make_cache(values, tmp_path / "fresh")
    assert_same_contents(folder, tmp_path / "fresh" / "32")
    opened(values)


# The script and a whole run


def test_precompute_script(cached, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**cached, "precomputed_dir": None}))
    forget_processes()
    with pytest.raises(SystemExit, match=r"^error: .*`--precomputed_dir`"):
        precompute_prx.main(["--config", str(recipe)])
    forget_processes()
    precompute_prx.main(["--config", str(recipe), "--precomputed_dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "9 samples in 1 shards; left out: 1 unreadable, 1 unfit" in shown
    assert "left out: `resolution` is 32, but 1 of 11 images are smaller" in shown  # before anything is computed
    assert f"latent_mean: {9 * 4 * 16 * 16 * 4 / 1e6:.1f} MB" not in shown  # too small to be told
    assert_same_contents(tmp_path / "32", Path(cached["precomputed_dir"]) / "32")


def test_dry_run_computes_nothing(cached, tmp_path, capsys):
    forget_processes()
    precompute(TrainingConfig(**cached | {"precomputed_dir": str(tmp_path / "cache"), "dry_run": True}))
    shown = capsys.readouterr().out
    assert "11 samples, 11 images in 1 buckets" in shown
    assert "dry run: nothing is computed" in shown
    assert not (tmp_path / "cache").exists()


def test_mostly_unreadable_data_is_not_cached(cached, parts, tmp_path):
    images = make_images(tmp_path / "images")
    for file in images.glob("*.png"):
        file.write_bytes(file.read_bytes()[:100])  # no more than the header
    forget_processes()
    values = cached | {"train_data_dir": str(images), "precomputed_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"`max_corrupt_share` is 0\.5.* 11 of 11"):
        precompute(TrainingConfig(**values))
    assert not (tmp_path / "cache" / "32" / "index.json").exists()


def test_run_from_the_cache_equals_the_run_without(parts, tmp_path, monkeypatch):
    """Every flow loss of four steps equals that of the run on the fly to the last bit, and so do the counts.

    The alignment has a weight too small to move another weight: its features are rounded to float16 in the cache, and
    AdamW divides a gradient by its size, so that with a weight of 0.5 the rounding grows fourfold per step (3e-6 of
    the alignment loss in the first step, 1.2e-4 in the fourth).
    """
    changes = aligned(parts) | {"repa_weight": 1e-30, "num_validation_samples": 2, "validation_steps": 4}
    values = settings(parts, tmp_path / "fly", **changes, learning_rate=1e-3, mixed_precision="bf16")
    wanted = runs.train(values)
    values = make_cache(values | {"output_dir": str(tmp_path / "cached")}, tmp_path / "cache")
    hashed = []
    monkeypatch.setattr(networks, "fingerprint", lambda module: hashed.append(module) or fingerprint(module))
    run = runs.start(values)
    assert hashed == [run.nets.vae, run.nets.text_encoder]  # gigabytes of weights, once each
    train(run)
    assert len(run.state.history) == 4
    for entry, reference in zip(run.state.history, wanted.state.history, strict=True):
        assert entry["loss/flow"] == reference["loss/flow"]
        assert entry["loss/alignment"] == pytest.approx(reference["loss/alignment"], rel=2e-5)
    # two held-out images make another batch than in the cache, whose sums may have another order
    assert run.state.validation_history[0] == pytest.approx(wanted.state.validation_history[0], rel=1e-5)
    for name in ("samples_read", "unreadable", "unfit", "upscaled", "truncated"):
        assert getattr(run.state, name) == getattr(wanted.state, name)


# Stages


def test_stages_with_one_resolution_share_a_cache(parts, tmp_path):
    stages = [
        {"max_train_steps": 2},
        {"max_train_steps": 2, **aligned(parts)},
        {"resolution": 16, "max_train_steps": 1},
    ]
    values = make_cache(settings(parts, tmp_path / "run", stages=stages), tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["16", "32"]
    _, built = opened(values)
    assert [stage.precomputed.columns for stage in built] == [
        ("latent_mean", "latent_std"),
        ("latent_mean", "latent_std", "teacher_features"),
        ("latent_mean", "latent_std"),
    ]
    other = make_images(tmp_path / "other")
    stages = [{"max_train_steps": 2}, {"max_train_steps": 2, "train_data_dir": str(other)}]
    with pytest.raises(ValueError, match=r"32.*`train_data_dir`.*`precomputed_dir`"):
        make_cache(settings(parts, tmp_path / "run", stages=stages), tmp_path / "cache")
    prompts = [{"max_train_steps": 2, "instance_prompt": prompt} for prompt in ("a cat", "a dog")]
    with pytest.raises(ValueError, match=r"`instance_prompt`.*\['a cat', 'a dog'\]"):
        make_cache(settings(parts, tmp_path / "run", stages=prompts), tmp_path / "cache")
    stages[1]["precomputed_dir"] = str(tmp_path / "second")
    make_cache(settings(parts, tmp_path / "run", stages=stages), tmp_path / "first")
    assert (tmp_path / "first" / "32" / "index.json").is_file()
    assert (tmp_path / "second" / "32" / "index.json").is_file()


# What is refused


def other_network(parts: dict[str, str], folder: Path, kind: str) -> dict:
    """Save a changed network of the run."""
    if kind == "vae":
        tiny.vae_kl(seed=1).save_pretrained(folder)
        return {"vae_name_or_path": str(folder)}
    if kind == "scaling":
        tiny.vae_kl(scaling_factor=0.5).save_pretrained(folder)
        return {"vae_name_or_path": str(folder)}
    if kind == "teacher":
        model = AutoModel.from_pretrained(parts["teacher"])
        with torch.no_grad():
            next(model.parameters()).add_(1)
        shutil.copytree(parts["teacher"], folder)
        model.save_pretrained(folder)
        return {"repa_teacher": str(folder)}
    shutil.copytree(parts["text_encoder"], folder)
    if kind == "tokenizer":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["normalizer"] = None
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        weights = load_file(folder / "model.safetensors")
        weights[max(weights)].view(-1)[0] += 1e-3  # one number of one weight
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {"text_encoder_name_or_path": str(folder)}


@pytest.mark.parametrize(
    ("kind", "named"),
    [("vae", "vae"), ("scaling", "vae"), ("text_encoder", "text_encoder"), ("tokenizer", "tokenizer"),
     ("teacher", "teacher_features")],
)  # fmt: skip
def test_cache_of_another_network_is_rejected(kind, named, cached, parts, tmp_path):
    opened(cached)
    with pytest.raises(ValueError, match=f"do not belong to this run: `{named}` is [^;]* there and [^;]* here"):
        opened(cached | other_network(parts, tmp_path / "other", kind))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_sequence_length": 23}, "`max_sequence_length` is 24 there and 23 here"),
        ({"mixed_precision": "bf16"}, "`mixed_precision` is 'no' there and 'bf16' here"),
        ({"max_crop": 0.4}, "`max_crop` is 0.5 there and 0.4 here"),
        ({"max_upscale": 2.0}, "`max_upscale` is 1.0 there and 2.0 here"),
        ({"aspect_ratio_buckets": "computed"}, "`aspect_ratio_buckets` is 'none' there and 'computed' here"),
        ({"num_validation_samples": 3}, "`samples` is 11 there and 8 here.*added or removed"),
        ({"resolution": 48}, "has no index.json"),
        ({"vae_name_or_path": None}, "`vae` is 'AutoencoderKL .*' there and None"),
    ],
    ids=str,
)  # fmt: skip
def test_cache_with_other_settings_is_rejected(changes, message, cached):
    with pytest.raises(ValueError, match=message):
        opened(cached | changes)


def test_cache_without_needed_columns_is_rejected(parts, tmp_path):
    values = make_cache(settings(parts, tmp_path / "run"), tmp_path / "cache")
    opened(values)
    with pytest.raises(ValueError, match=r"`teacher_features` is None there and .* here"):
        opened(values | aligned(parts))
    perceptual = {"dino_weight": 0.1, "dino_teacher": parts["teacher"], "dino_size": 16}
    with pytest.raises(ValueError, match="`pixels` is None there and True here"):
        opened(values | perceptual | {"perceptual_decode_latents": True})
    with pytest.raises(ValueError, match=r"`teacher_features` is None there and .* here"):
        make_cache(values | aligned(parts), tmp_path / "cache")  # nor is it added to a finished one


def test_changed_caption_stops_the_run(cached, parts, tmp_path):
    """Captions are compared whenever they are read, not only at the start."""
    images = make_images(tmp_path / "images")
    values = cached | {"train_data_dir": str(images)}
    _, (stage,) = opened(values)  # the same data in another folder
    (images / "09.txt").write_text("a small blue square, after all.")
    with pytest.raises(
        ValueError, match=r"caption of sample 9 is not the one .* now 'a small blue square, after all\.'"
    ):
        list(stage.training_batches(0, 0, 1, torch.device("cpu")))
    with pytest.raises(ValueError, match="caption of sample 9 is not the one"):
        opened(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_text_encoder": True}, "`precomputed_dir`.*`train_text_encoder`"),
        ({"center_crop": False}, "`center_crop` is False"),
        ({"random_flip": True}, "`random_flip` is True"),
        (
            {"train_data_dir": None, "dataset_name": "scenes"},
            "`precomputed_dir`.*scenes.*--scenes_size",
        ),
        ({"repa_cache_dir": "somewhere"}, "`repa_cache_dir`"),
    ],
    ids=str,
)
def test_settings_without_fixed_samples_exclude_a_cache(changes, message, cached):
    TrainingConfig(**cached)
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**cached | changes)


def test_fingerprint_identifies_weights_not_folders(parts, tmp_path):
    """Folders and the last call of a tokenizer do not matter; weights and scale do."""
    vae = tiny.vae_kl()
    vae.save_pretrained(tmp_path)
    assert fingerprint(type(vae).from_pretrained(tmp_path)) == fingerprint(vae) != fingerprint(tiny.vae_kl(seed=1))
    assert fingerprint(vae) != fingerprint(tiny.vae_kl(shift_factor=0.2))
    tokenizer = AutoTokenizer.from_pretrained(parts["text_encoder"])
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=7)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(tiny.tokenizer()) != before
