"""Runs on every kind of data source: equality, sampling weights, captions, streams, and checks before training."""

import io
import json
import multiprocessing
import shutil
import tarfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import debug_launcher

import runs
import tiny
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.data.mixing import ENDLESS
from diffusers_prx.data.scenes import ScenesDataset, long_caption, short_caption
from diffusers_prx.training import stages
from diffusers_prx.training.lost_workers import batches_despite_lost_workers
from diffusers_prx.training.networks import build_nets
from diffusers_prx.training.preflight import memory, meta_networks
from diffusers_prx.training.run import Run
from diffusers_prx.training.stages import build_stages
from diffusers_prx.training.trainer import enter_stage, micro_step, optimizer_step, train

CPU = torch.device("cpu")
PHOTOS = 12
FIELDS = {"max_train_steps": 2, "lr_warmup_steps": 0, "checkpointing_steps": 1, "num_validation_samples": 2}


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    return runs.save_text_encoder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def photo(place: int) -> bytes:
    pixels = np.random.default_rng(place).integers(0, 256, (33, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def caption(place: int, kind: str = "photo") -> str:
    return f"a {kind} of number {place}"


def write_folder(folder: Path) -> str:
    folder.mkdir()
    for place in range(PHOTOS):
        (folder / f"{place:02}.png").write_bytes(photo(place))
    lines = [json.dumps({"file_name": f"{place:02}.png", "text": caption(place)}) for place in range(PHOTOS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def write_two_shapes(folder: Path) -> str:
    """Write photos, every other one upright (33 x 70 pixels)."""
    write_folder(folder)
    for place in range(0, PHOTOS, 2):
        PIL.Image.open(io.BytesIO(photo(place))).resize((33, 70)).save(folder / f"{place:02}.png")
    return str(folder)


def write_beside(folder: Path) -> str:
    folder.mkdir()
    for place in range(PHOTOS):
        (folder / f"{place:02}.png").write_bytes(photo(place))
        (folder / f"{place:02}.txt").write_text(caption(place))
        (folder / f"{place:02}.json").write_text(json.dumps({"short": caption(place, "short")}))
    return str(folder)


def write_parquet(folder: Path) -> str:
    folder.mkdir()
    rows = {"image": [{"bytes": photo(i), "path": None} for i in range(PHOTOS)]}
    rows["text"] = [caption(i) for i in range(PHOTOS)]
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "0.parquet")
    return str(folder / "*.parquet")


def write_tars(folder: Path, lengths=(5, 3, 4)) -> str:
    folder.mkdir()
    places = iter(range(sum(lengths)))
    for shard, length in enumerate(lengths):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for place in islice(places, length):
                texts = {"txt": caption(place).encode(), "short.txt": caption(place, "short").encode()}
                for ending, content in {"png": photo(place), **texts}.items():
                    header = tarfile.TarInfo(f"{place:02}.{ending}")
                    header.size = len(content)
                    archive.addfile(header, io.BytesIO(content))
    return f"{folder}/{{0..{len(lengths) - 1}}}.tar"


WRITERS = {"folder": write_folder, "beside": write_beside, "parquet": write_parquet, "tars": write_tars}


def read(run: Run, count: int, stage: int = 0) -> list[str]:
    """Return the captions that a stage trains on, from its beginning."""
    batches = run.stages[stage].training_batches(run.stages[stage].first_step, 0, 1, CPU)
    return [text for batch in islice(batches, count) for text in batch["captions"]]


def held_out(run: Run) -> list[str]:
    return [text for batch in run.stages[0].held_out_batches(CPU) for text in batch["captions"]]


def losses(run: Run) -> list[float]:
    return [entry["loss/flow"] for entry in run.state.history]


# Every kind of source


@pytest.fixture(scope="module")
def reference(tmp_path_factory, text_encoder) -> Run:
    """Finished run on a folder with a metadata.jsonl."""
    folder = tmp_path_factory.mktemp("reference")
    values = {"dataset_name": write_folder(folder / "photos")}
    return runs.train(runs.settings(folder / "run", text_encoder, **FIELDS | values))


@pytest.mark.parametrize("kind", ["beside", "parquet", "tars", "train_data_dir", "one of several"])
def test_storage_format_does_not_change_the_run(reference, text_encoder, tmp_path, kind):
    name = WRITERS.get(kind, write_folder)(tmp_path / "photos")
    data = {"dataset_name": name}
    if kind == "train_data_dir":
        data = {"dataset_name": None, "train_data_dir": name}
    if kind == "one of several":
        data = {"dataset_name": None, "data_sources": [{"name": name, "image_column": "image"}], "image_column": "x"}
    data |= {"data_cache_dir": str(tmp_path / "indices")} if kind == "tars" else {}
    run = runs.train(runs.settings(tmp_path / "run", text_encoder, **FIELDS | data))
    assert run.state.samples_read == 8
    assert losses(run) == losses(reference)
    assert run.state.validation_history == reference.state.validation_history
    assert read(run, 2) == read(reference, 2)
    assert held_out(run) == [caption(10), caption(11)]
    assert not set(read(run, 2)) & set(held_out(run))
    assert (tmp_path / "indices").exists() == (kind == "tars")
    # of what lies on this machine the last part
    assert f"| data | `{Path(name).name}` (split train)" in (run.output_dir / "README.md").read_text()


def test_waiting_time_is_recorded(text_encoder, tmp_path):
    class Slow:
        """Source that takes 20 ms per sample."""

        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            time.sleep(0.02)
            return self.source[index]

    run = runs.start(runs.settings(tmp_path / "run", text_encoder))
    run.stages[0].source = Slow(run.stages[0].source)
    train(run)
    assert run.state.samples_read == 16
    assert 16 * 0.02 < run.state.seconds_waiting < run.state.seconds
    assert run.state.history[-1]["waiting_share"] == run.state.seconds_waiting / run.state.seconds
    record = json.loads((run.output_dir / "training.json").read_text())
    assert record["seconds_waiting_for_data"] == round(run.state.seconds_waiting, 1)


@pytest.mark.parametrize("kind", ["folder", "beside", "parquet", "tars"])
def test_only_small_images_are_rejected_with_the_flag(text_encoder, tmp_path, kind):
    name = WRITERS[kind](tmp_path / "photos")  # 40 x 33 pixels
    values = runs.settings(tmp_path / "run", text_encoder, dataset_name=name, resolution=64)
    with pytest.raises(
        ValueError, match=r"`resolution` is 64, but 12 of 12 images .* 40 x 33.*`--resolution 32`"
    ) as error:
        runs.start(values)
    assert "`--max_upscale none`" in str(error.value)
    for fix in ({"resolution": 32}, {"max_upscale": None}):
        assert runs.start(values | fix).stages[0].left_out == []
    buckets = {"aspect_ratio_buckets": "computed"}
    with pytest.raises(ValueError, match=r"`resolution` is 64, but 12 of 12 images .*`--resolution 32`"):
        runs.start(values | buckets)
    assert runs.start(values | buckets | {"resolution": 32}).stages[0].left_out == []


@pytest.mark.parametrize("buckets", ["none", "computed"])
def test_plan_lists_unusable_images_and_captions(text_encoder, tmp_path, capsys, buckets):
    folder = Path(write_beside(tmp_path / "photos"))
    for place, size in ((2, (20, 20)), (3, (30, 31)), (4, (33, 300)), (5, (2000, 40))):
        PIL.Image.new("RGB", size).save(folder / f"{place:02}.png")
    (folder / "06.png").write_bytes(b"")
    (folder / "07.txt").write_text(" ")
    (folder / "08.txt").write_bytes(b"\xff")
    changes = {"dataset_name": str(folder), "aspect_ratio_buckets": buckets, "dry_run": True, "train_batch_size": 1}
    values = runs.settings(tmp_path / "run", text_encoder, **changes)
    with pytest.raises(SystemExit):
        runs.start(values)
    small, elongated, unreadable, captions = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("  left out")
    )
    assert "2 of 12 images are smaller (largest: 30 x 31)" in small
    assert "Pass `--max_upscale 1.6` to enlarge them" in small
    assert "02.png (20 x 20)" in small
    assert "03.png (30 x 31)" in small
    assert "`max_crop` is 0.5" in elongated
    assert "2 of 12 images" in elongated
    assert f"`--max_crop {0.98 if buckets == 'none' else 0.97}`" in elongated
    assert "05.png (2000 x 40)" in elongated
    assert "1 of 12 images cannot be read" in unreadable
    assert "06.png" in unreadable
    assert "2 of 12 captions cannot be read" in captions
    assert "07.png" in captions
    assert "08.png" in captions
    with pytest.raises(SystemExit):
        runs.start(values | {"max_upscale": None, "max_crop": 0.99})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  left out")]
    assert len(lines) == 2  # those that cannot be read


def test_small_images_suggest_their_resolution(text_encoder, tmp_path):
    folder = Path(write_beside(tmp_path / "photos"))
    for place in range(1, PHOTOS):
        PIL.Image.new("RGB", (20, 20)).save(folder / f"{place:02}.png")
    run = runs.start(runs.settings(tmp_path / "run", text_encoder, dataset_name=str(folder)))
    (message,) = run.stages[0].left_out
    assert "`resolution` is 32, but 11 of 12 images are smaller (largest: 20 x 20)" in message
    assert "Pass `--resolution 16`, or `--max_upscale none` to enlarge them" in message
    assert "01.png (20 x 20), " in message
    assert "and 6 more" in message


def test_large_data_sets_are_sampled(text_encoder, tmp_path, monkeypatch):
    folder = Path(write_beside(tmp_path / "photos"))
    for place in range(0, 12, 2):
        PIL.Image.new("RGB", (20, 20)).save(folder / f"{place:02}.png")
    monkeypatch.setattr(stages, "MAX_IMAGES_CHECKED", 4)
    run = runs.start(runs.settings(tmp_path / "run", text_encoder, dataset_name=str(folder)))
    assert "of 4 images are smaller" in run.stages[0].left_out[0]
    assert "4 of 12 images" in run.stages[0].left_out[-1]


def test_unusable_held_out_images_are_rejected(text_encoder, tmp_path):
    name = write_folder(tmp_path / "photos")
    for place in (10, 11):
        PIL.Image.new("RGB", (20, 20)).save(tmp_path / "photos" / f"{place}.png")
    values = runs.settings(tmp_path / "run", text_encoder, **FIELDS, dataset_name=name)
    with pytest.raises(
        ValueError, match=r"Held-out images \(`num_validation_samples`\): .* 2 of 2 images .*`--resolution 16`"
    ):
        runs.start(values)
    runs.start(values | {"max_upscale": 1.6})


def test_perceptual_losses_reject_narrow_buckets(text_encoder, tmp_path):
    name, teacher = write_two_shapes(tmp_path / "photos"), runs.save_teacher(tmp_path / "teacher")
    changes = {"dataset_name": name, "aspect_ratio_buckets": "computed", "max_upscale": None, "max_aspect_ratio": 4.0}
    changes |= {"dino_weight": 0.01, "dino_teacher": str(teacher), "dino_size": 32, "train_batch_size": 1}
    values = runs.settings(tmp_path / "run", text_encoder, **FIELDS | changes)
    runs.start(values)  # resized, and not cropped
    narrow = "`dino_crop`.*32.*24"
    with pytest.raises(ValueError, match=narrow):
        runs.start(values | {"dino_crop": True})
    runs.start(values | {"dino_crop": True, "dino_size": 24})


def test_run_with_buckets_resumes_bitwise(text_encoder, tmp_path):
    changes = {
        "dataset_name": write_two_shapes(tmp_path / "photos"),
        "aspect_ratio_buckets": "computed",
        "max_aspect_ratio": 4.0,
    }
    changes |= {"train_batch_size": 2, "max_train_steps": 6, "checkpointing_steps": 3, "num_validation_samples": 0}
    whole = runs.train(runs.settings(tmp_path / "whole", text_encoder, **FIELDS | changes))
    assert len(whole.stages[0].buckets.sizes) == 2
    runs.copy_checkpoint(whole, 3, tmp_path / "resumed")
    again = {"resume_from_checkpoint": "latest"}
    resumed = runs.train(runs.settings(tmp_path / "resumed", text_encoder, **FIELDS | changes | again))
    runs.assert_same(*(runs.saved_state(run.output_dir / "checkpoint-6") for run in (whole, resumed)))


def test_resumed_run_keeps_its_buckets(text_encoder, tmp_path):
    """Image sizes are restored from the checkpoint, even if the images have changed."""
    name = write_two_shapes(tmp_path / "photos")
    changes = {
        "dataset_name": name,
        "aspect_ratio_buckets": "computed",
        "max_aspect_ratio": 4.0,
        "train_batch_size": 2,
    }
    values = runs.settings(tmp_path / "run", text_encoder, **FIELDS | changes | {"max_train_steps": 2})
    before = runs.train(values).stages[0]
    shutil.rmtree(tmp_path / "run" / "image_sizes")
    wide, tall = sorted(Path(name).glob("*.png"))[:2]
    wide.write_bytes(tall.read_bytes())
    wide_again = runs.start(values | {"max_train_steps": 4, "resume_from_checkpoint": "latest"}).stages[0]
    for one, other in ((before.buckets, wide_again.buckets), (before.held_out_buckets, wide_again.held_out_buckets)):
        assert one.sizes == other.sizes
        assert all(np.array_equal(a, b) for a, b in zip(one.members, other.members, strict=True))
    anew = runs.start(values | {"output_dir": str(tmp_path / "anew")}).stages[0]
    assert [len(members) for members in anew.buckets.members] != [len(members) for members in before.buckets.members]


def test_very_long_caption_is_truncated_and_counted(text_encoder, tmp_path):
    folder = Path(write_folder(tmp_path / "photos"))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"file_name": "00.png", "text": "word " * 10_000})
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    changes = {"dataset_name": str(folder), "train_batch_size": 12, "max_train_steps": 1, "num_validation_samples": 0}
    run = runs.train(runs.settings(tmp_path / "run", text_encoder, **FIELDS | changes | {"caption_dropout": 0.0}))
    assert (run.state.truncated, run.state.samples_read, run.state.unreadable) == (1, 12, 0)


def test_unweighted_sources_are_read_once_per_epoch(text_encoder, tmp_path):
    sources = [{"name": write_folder(tmp_path / "a")}, {"name": write_tars(tmp_path / "b", [3])}]
    values = {"dataset_name": None, "data_sources": sources, "num_validation_samples": 3}
    run = runs.start(runs.settings(tmp_path / "run", text_encoder, **values, train_batch_size=6))
    assert Counter(read(run, 2)) == Counter(caption(i) for i in [*range(10), 0, 1])  # of 12 two, of 3 one is held out
    assert held_out(run) == [caption(10), caption(11), caption(2)]


def mixed(folder: Path, *weights: float) -> dict:
    scenes = {"name": "scenes", "weight": weights[1]}
    return {"dataset_name": None, "data_sources": [{"name": str(folder), "weight": weights[0]}, scenes]}


def test_weighted_sources_are_read_in_proportion(text_encoder, tmp_path):
    write_folder(tmp_path / "photos")
    values = runs.settings(tmp_path / "run", text_encoder, **FIELDS | mixed(tmp_path / "photos", 0.75, 0.25))
    run = runs.train(values)
    assert len(run.state.history) == 2
    for captions in (read(run, 2), list(run.stages[0].captions(8))):  # the tokenizer's and the preflight's too
        for cycle in (captions[:4], captions[4:]):
            assert sum(text.startswith("a photo") for text in cycle) == 3
    photos = [text for text in read(run, 2) if text.startswith("a photo")]
    assert len(set(photos)) == len(photos) == 6
    scenes = ScenesDataset(split="heldout", seed=42)
    assert held_out(run) == [caption(11), scenes[0]["caption"]]
    assert run.state.validation_history[-1]["validation/loss"] > 0

    def resumed(*weights):
        changes = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
        return runs.start(values | changes | mixed(tmp_path / "photos", *weights))

    assert resumed(0.75, 0.25).state.step == 2
    with pytest.raises(ValueError, match=r"`weights of stage 0` is \[0.5, 0.5\].*\[0.75, 0.25\]"):
        resumed(0.5, 0.5)


# Captions


def test_caption_columns_of_a_folder_are_sampled_by_weight(text_encoder, tmp_path):
    values = {"dataset_name": write_beside(tmp_path / "photos"), "caption_weights": {"text": 1, "short": 3}}
    run = runs.train(runs.settings(tmp_path / "run", text_encoder, **FIELDS | values))
    texts = read(run, 2)
    assert texts == read(run, 2)
    kinds = Counter(text.split()[1] for text in read(run, 2) + list(run.stages[0].captions(10)))
    assert 9 <= kinds["short"] <= 17  # of 18; 13.5 on average
    assert sum(kinds.values()) == 18
    only = runs.start(
        runs.settings(tmp_path / "x", text_encoder, **FIELDS | values | {"caption_weights": {"short": 1}})
    )
    assert all(text.startswith("a short") for text in read(only, 2) + held_out(only))
    with pytest.raises(ValueError, match="`caption_weights`"):
        runs.start(runs.settings(tmp_path / "y", text_encoder, **FIELDS | values | {"caption_weights": {"short": 0}}))


def test_captions_of_scenes_are_sampled_by_weight(text_encoder, tmp_path):
    values = {"caption_weights": {"long": 1, "short": 1}, "scenes_caption": "long"}
    run = runs.train(runs.settings(tmp_path / "run", text_encoder, **FIELDS | values))
    scenes = ScenesDataset(seed=42)
    kinds = Counter()
    for index, text in enumerate(read(run, 2)):
        both = [describe(scenes[index]["scene"], seed=42, index=index) for describe in (long_caption, short_caption)]
        kinds[both.index(text)] += 1
    assert sorted(kinds) == [0, 1]


def test_missing_data_is_rejected(text_encoder, tmp_path):
    name = write_beside(tmp_path / "photos")
    for changes, message in (
        ({"dataset_name": None, "train_data_dir": "nowhere"}, "`train_data_dir` is 'nowhere', which is not a folder"),
        ({"caption_weights": {"long": 1, "tags": 1}}, "`caption_column` .*tags"),
        ({"dataset_name": name, "streaming": True}, "`streaming`"),
    ):
        with pytest.raises(ValueError, match=message):
            runs.start(runs.settings(tmp_path / "run", text_encoder, **changes))


def test_too_many_held_out_samples_become_a_tenth(text_encoder, tmp_path, capsys):
    name = write_beside(tmp_path / "photos")  # 12 pictures
    for asked, kept in ((6, 6), (7, 1), (128, 1)):
        values = {"dataset_name": name, "num_validation_samples": asked, "train_batch_size": 2, "max_train_steps": 1}
        run = runs.start(runs.settings(tmp_path / f"{asked}", text_encoder, **values))
        assert [len(run.stages[0].held_out), len(run.stages[0].source)] == [kept, 12 - kept]
        assert (f"{kept} samples, because `num_validation_samples` {asked}" in capsys.readouterr().out) == (asked > 6)


# Streams

STREAM = {
    "streaming": True, "num_validation_samples": 2, "checkpointing_steps": 1, "lr_warmup_steps": 0,
    "caption_dropout": 0.3,
    "stages": [{"max_train_steps": 2, "gradient_accumulation_steps": 2}, {"max_train_steps": 3, "resolution": 16}],
}  # fmt: skip


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("tars") / "photos")


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_resumes_bitwise(text_encoder, tars, tmp_path, workers):
    """At every step of the first stage, at its end, and in the second stage."""
    values = STREAM | {"dataset_name": tars, "dataloader_num_workers": workers}
    whole = runs.train(runs.settings(tmp_path / "whole", text_encoder, **values))
    assert whole.state.samples_read == 2 * 8 + 3 * 4
    assert held_out(whole) == [caption(0), caption(1)]
    assert whole.state.stream is not None
    assert len(whole.state.stream["places"][0]) == max(workers, 1)
    assert sum(place["drawn"] for place in whole.state.stream["places"][0]) == 3 * 4
    assert all("dataset_sizes" not in stage for stage in whole.state.stages)
    for step in (1, 2, 4) if workers == 0 else (1,):
        folder = tmp_path / str(step)
        runs.copy_checkpoint(whole, step, folder)
        changes = {"output_dir": str(folder), "resume_from_checkpoint": "latest"}
        resumed = runs.train(whole.cfg.to_dict() | changes)
        runs.assert_same(*(runs.saved_state(run.output_dir / "checkpoint-5") for run in (resumed, whole)))
    changes["dataloader_num_workers"] = 3 - workers
    runs.copy_checkpoint(whole, 1, tmp_path / "other")
    with pytest.raises(ValueError, match="`workers`"):
        runs.start(whole.cfg.to_dict() | changes | {"output_dir": str(tmp_path / "other")})


def test_stream_reads_every_training_sample_once(text_encoder, tars, tmp_path):
    values = STREAM | {"dataset_name": tars, "stages": [], "max_train_steps": 5, "train_batch_size": 2}
    run = runs.start(runs.settings(tmp_path, text_encoder, **values))
    assert Counter(read(run, 5)) == Counter(caption(i) for i in range(2, 12))
    assert sorted(run.stages[0].captions(100)) == sorted(caption(i) for i in range(2, 12))
    values["caption_weights"] = {"text": 1, "short.txt": 1}
    both = runs.start(runs.settings(tmp_path, text_encoder, **values))
    for texts in (read(both, 5), list(both.stages[0].captions(10))):
        assert {text.split()[1] for text in texts} == {"photo", "short"}
        assert sorted(int(text.split()[-1]) for text in texts) == list(range(2, 12))


def test_stream_indices_start_with_the_stage(text_encoder, tars, tmp_path):
    run = runs.start(runs.settings(tmp_path, text_encoder, **STREAM | {"dataset_name": tars}))
    listed = runs.start(runs.settings(tmp_path, text_encoder, **STREAM | {"dataset_name": tars, "streaming": False}))
    for number, step in ((0, 0), (0, 1), (1, 2), (1, 4)):
        numbers = [
            [batch["sample_index"] for batch in r.stages[number].training_batches(step, 0, 1, CPU)]
            for r in (run, listed)
        ]
        assert numbers[0] == numbers[1]
        assert numbers[0][0][0] == {0: 0, 1: 8, 2: 0, 4: 8}[step]


def test_lost_worker_of_a_stream_loses_no_sample(text_encoder, tars, tmp_path):
    """In the middle of a step, after its first micro-batch."""
    values = {"dataset_name": tars, "streaming": True, "dataloader_num_workers": 2, "max_train_steps": 6}
    cfg = TrainingConfig(
        **runs.settings(tmp_path, text_encoder, **values, train_batch_size=2, gradient_accumulation_steps=2)
    )

    def new_stage():
        (stage,) = build_stages(cfg)
        stage.assign_buckets(8, 1)
        return stage

    def told(batch) -> tuple:
        return batch["captions"], batch["sample_index"], batch["worker"], batch["progress"]

    wanted = [told(batch) for batch in new_stage().training_batches(0, 0, 1, CPU)]
    found, counts = [], Counter()
    for batch in batches_despite_lost_workers(new_stage(), 0, 0, 1, CPU, counts):
        found.append(told(batch))
        if len(found) == 3:
            for worker in multiprocessing.active_children():
                worker.kill()
    assert found == wanted
    assert counts["lost_workers"] >= 1


def test_unfit_samples_of_a_stream_are_counted(text_encoder, tars, tmp_path):
    values = STREAM | {"dataset_name": tars, "stages": [], "max_train_steps": 1, "num_validation_samples": 0}
    with pytest.raises(ValueError, match=r"None of 1000 .*0 are unreadable and 1000 do not fit.* enlarged 1.21"):
        runs.train(runs.settings(tmp_path / "run", text_encoder, **values | {"resolution": 40}))
    assert runs.train(runs.settings(tmp_path / "fits", text_encoder, **values)).state.unfit == 0


def test_weighted_streams_are_read_in_proportion(text_encoder, tars, tmp_path):
    other = write_parquet(tmp_path / "other")
    sources = [{"name": tars, "weight": 1}, {"name": other, "weight": 3}]
    values = STREAM | {"stages": [], "max_train_steps": 1, "data_sources": sources, "dataset_name": None}
    run = runs.train(runs.settings(tmp_path / "run", text_encoder, **values))
    (place,) = run.state.stream["places"][0]
    assert [row for _, _, row in place["sources"]][1] == 3
    assert place["drawn"] == 4


def _train_in_two_processes(values: dict) -> None:
    torch.set_num_threads(1)
    runs.train(values)


def test_stream_resumes_only_with_the_same_number_of_processes(text_encoder, tars, tmp_path):
    values = STREAM | {"dataset_name": tars, "stages": [], "max_train_steps": 2, "train_batch_size": 2}
    values = runs.settings(tmp_path / "whole", text_encoder, **values)
    debug_launcher(_train_in_two_processes, (values,), num_processes=2)
    for name in ("resumed", "alone"):
        shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / name / "checkpoint-1")
    changes = {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "latest"}
    debug_launcher(_train_in_two_processes, (values | changes,), num_processes=2)
    states = [runs.saved_state(tmp_path / name / "checkpoint-2") for name in ("whole", "resumed")]
    runs.assert_same(*states)
    stream = states[0]["run.json"]["state"]["stream"]
    assert [places[0]["drawn"] for places in stream["places"]] == [4, 4]
    assert stream["places"][0] != stream["places"][1]
    with pytest.raises(ValueError, match="`world_size`"):
        runs.start(values | changes | {"output_dir": str(tmp_path / "alone"), "train_batch_size": 4})


# Plan and checks before training


def test_dry_run_prints_the_plan_without_weights(text_encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobodys")
    without_weights = tmp_path / "text_encoder"
    without_weights.mkdir()
    for file in text_encoder.glob("*.json"):
        (without_weights / file.name).write_bytes(file.read_bytes())
    photos = write_folder(tmp_path / "photos")
    values = {
        "dataset_name": photos, "dry_run": True, "push_to_hub": True, "hub_model_id": "me/prx", "use_ema": True,
        "num_validation_samples": 1, "ema_update_every": 1, "gradient_accumulation_steps": 2,
        "stages": [{}, {"aspect_ratio_buckets": "computed", "train_batch_size": 1}, mixed(Path(photos), 2, 1)],
    }  # fmt: skip
    with pytest.raises(SystemExit) as end:
        runs.start(runs.settings(tmp_path / "run", without_weights, **values))
    assert end.value.code == 0
    lines = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert {
        "transformer   59,248 parameters",
        "types         weights float32, computation float32",
        "memory        0.00118 GB (weights 0.000237, gradients 0.000237, optimizer 0.000474, average 0.000237), "
        "without activations and frozen networks",
        "upload to     me/prx",
        "stage 0       steps 0 to 4",
        f"data        {photos}: 11 samples",
        "held out    1 samples",
        "resolution  32 pixels",
        "batch       8: 4 x 2 accumulated x 1 process",
        "epoch       1.4 steps; 2.91 epochs in this stage",
        "stage 1       steps 4 to 8",
        "buckets     11 images in 1 buckets (height x width):",
        "stage 2       steps 8 to 12",
        f"data        {photos}: 11 samples, weight 2",
        "data        scenes: 1000000 samples, weight 1",
        "dry run: nothing is trained",
    } - lines == set()
    assert sum("11 captions: " in line for line in lines) == 1  # the same of stages 0 and 1
    assert any(line.startswith("warning     Captions are short") for line in lines)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".npz"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 36}, "`resolution` must be a multiple of 8 for these networks, got 36"),
        ({"route_ratio": 0.5, "route_range": [0, 3]}, r"`route_range` is \[0, 3\], but the transformer has 2 blocks"),
        (
            {
                "route_ratio": 0.5,
                "route_range": [0, 2],
                "transformer_config": runs.TRANSFORMER | {"fusion_range": [0, 1]},
            },
            r"`route_range` is \[0, 2\].*`fusion_range`",
        ),
        ({"repa_weight": 0.5, "repa_teacher": "TEACHER", "repa_block": 2}, "`repa_block` is 2, but"),
        ({"repa_weight": 0.5, "repa_teacher": "nowhere", "repa_block": 1}, "`repa_teacher` is 'nowhere', whose"),
        ({"dino_weight": 0.1, "dino_teacher": "TEACHER", "dino_size": 18}, "`dino_size` must be a multiple of 4"),
        ({"lpips_weight": 0.1, "lpips_backbone": "nowhere"}, "`lpips_backbone` is 'nowhere'"),
        ({"transformer_config": runs.TRANSFORMER | {"in_channels": 4}}, "`in_channels` .*is 4"),
        ({"transformer_config": runs.TRANSFORMER | {"fusion_range": 3}}, "`fusion_range`"),
        ({"max_sequence_length": 99_999}, "`max_sequence_length` is 99999"),
        ({"lpips_weight": 0.1, "perceptual_decode_latents": True}, "`perceptual_decode_latents`"),
        ({"precomputed_dir": "nowhere", "center_crop": True, "train_text_encoder": False}, "has no index.json"),
        ({"push_to_hub": True}, "`push_to_hub`"),
    ],
)  # fmt: skip
def test_dry_run_rejects_what_the_run_would(text_encoder, tmp_path, monkeypatch, changes, message):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    teacher = str(runs.save_teacher(tmp_path / "teacher"))
    changes = {name: teacher if value == "TEACHER" else value for name, value in changes.items()}
    values = {"dataset_name": write_folder(tmp_path / "photos"), "dry_run": True}
    with pytest.raises(ValueError, match=message):
        runs.start(runs.settings(tmp_path / "run", text_encoder, **values | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_name": "scenes"}, False),
        ({"caption_statistics_samples": 0}, False),
        ({"text_encoder_name_or_path": None, "text_encoder_config": runs.TEXT_ENCODER}, False),
        ({"caption_statistics_samples": 5}, True),
    ],
)
def test_caption_statistics_are_printed_for_stored_captions(text_encoder, tmp_path, capsys, changes, said):
    values = {"dataset_name": write_beside(tmp_path / "photos"), "dry_run": True}
    with pytest.raises(SystemExit):
        runs.start(runs.settings(tmp_path / "run", text_encoder, **values) | changes)
    text = capsys.readouterr().out
    assert ("5 captions: " in text) == said
    assert ("warning" in text) == said


@pytest.mark.parametrize("vae", [None, "kl", "dc"])
def test_meta_networks_equal_the_loaded_networks(text_encoder, tmp_path, vae):
    values = {"prediction_type": "velocity"}
    if vae is not None:
        {"kl": tiny.vae_kl, "dc": tiny.vae_dc}[vae]().save_pretrained(tmp_path / "vae")
        values["vae_name_or_path"] = str(tmp_path / "vae")
    cfg = TrainingConfig(**runs.settings(tmp_path, text_encoder, **values, transformer_config=runs.TRANSFORMER))
    made = meta_networks(cfg)
    nets = build_nets(cfg)
    assert made.pixels_per_token == nets.pixels_per_token
    assert (made.vae is None) == (nets.vae is None)
    assert all(weight.is_meta for weight in made.transformer.parameters())
    assert {key: w.shape for key, w in made.transformer.state_dict().items()} == {
        key: w.shape for key, w in nets.transformer.state_dict().items()
    }


def test_meta_networks_of_a_saved_pipeline(reference, tmp_path):
    pipelines = {"pixels": reference.output_dir, "latents": tmp_path / "latents"}
    tiny.latent_pipeline(tiny.vae_kl()).save_pretrained(pipelines["latents"])
    for name, folder in pipelines.items():
        values = runs.settings(tmp_path, None, pretrained_model_name_or_path=str(folder), dataset_name="scenes")
        kind = "x_prediction" if name == "pixels" else "velocity"
        for transformer in ({}, runs.TRANSFORMER):
            cfg = TrainingConfig(**values | {"transformer_config": transformer, "prediction_type": kind})
            made, nets = meta_networks(cfg), build_nets(cfg)
            assert (made.pixels_per_token, made.vae is None) == (nets.pixels_per_token, name == "pixels")
            assert sum(w.numel() for w in made.transformer.parameters()) == sum(
                w.numel() for w in nets.transformer.parameters()
            )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("weights_dtype", ["float32", "bf16"])
def test_predicted_memory_equals_the_training_state(text_encoder, tmp_path, optimizer, weights_dtype):
    values = {
        "max_train_steps": 1, "lr_warmup_steps": 0, "use_ema": True, "ema_update_every": 1, "optimizer": optimizer,
        "mixed_precision": "bf16", "weights_dtype": weights_dtype,
    }  # fmt: skip
    run = runs.start(runs.settings(tmp_path, text_encoder, **values))
    weights = list(run.nets.transformer.parameters())
    [stage] = run.stages
    lr_scheduler = enter_stage(run, stage)
    batch = next(stage.training_batches(0, 0, 1, CPU))
    optimizer_step(run, stage, lr_scheduler, [(batch, micro_step(run, stage, batch))])
    state = [value for weight in weights for value in run.optimizer.state[weight].values()]
    kept = {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(weight.nbytes for weight in weights),
        "optimizer": sum(value.nbytes for value in state if torch.is_tensor(value) and value.dim() > 0),
        "average": sum(value.nbytes for value in run.averages.models["transformer"].shadow_params),
    }
    assert memory(run.cfg, {"transformer": meta_networks(run.cfg).transformer}) == kept


def test_weighted_sources_have_no_epoch(tmp_path):
    write_folder(tmp_path / "photos")
    (stage,) = build_stages(runs.config(**mixed(tmp_path / "photos", 1, 1)))
    assert len(stage.source) == ENDLESS
    assert stage.sizes == [PHOTOS, 1_000_000]
