"""Evaluations of a tiny pipeline: recomputed by hand, on two processes, interrupted, with every kind of source."""

import io
import json
import multiprocessing
import os
import signal
import tarfile

import datasets
import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate import PartialState, debug_launcher
from accelerate.state import AcceleratorState
from PIL import Image

import runs
import tiny
import zoo
from diffusers_prx.data.scenes import ScenesDataset
from diffusers_prx.evaluation.evaluate import EvaluationSettings, evaluate, parse_metric
from diffusers_prx.evaluation.extractors import load_extractor
from diffusers_prx.evaluation.generation import PictureFolder, load_pipeline, pipeline_draw
from diffusers_prx.evaluation.metrics import FrechetDistance, MaximumMeanDiscrepancy
from diffusers_prx.evaluation.references import ReferenceCache
from diffusers_prx.evaluation.reports import markdown_table, write_reports

COUNT = 22
FID, MMD = "FID (scenes ViT)", "MMD (scenes ViT)"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "scenes ViT"
    folder.mkdir()
    return runs.save_teacher(folder)


@pytest.fixture(autouse=True)
def fresh_processes():
    """Reset the process-wide state of accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(model, encoder, **changes):
    values = {
        "model": str(model),
        "metrics": (f"fid:{encoder}", f"mmd:{encoder}"),
        "num_images": COUNT,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "batch_size": 4,
        "seed": 3,
        "bootstrap": 20,
    }
    return EvaluationSettings(**values | changes)


def evaluated(settings, folder):
    return evaluate(settings, folder / "out", folder / "cache", metric_batch_size=5)


def values(evaluation):
    report = evaluation.report if hasattr(evaluation, "report") else evaluation
    return {name: found["value"] for name, found in report["metrics"].items()}


def pictures_of(folder):
    paths = sorted(folder.glob("out/pictures/*/*.png"))
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def alone(model, encoder, tmp_path_factory):
    """Evaluate on one process without interruption."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("alone")
    return evaluated(settings(model, encoder), folder), folder


def test_metrics_equal_those_computed_from_the_images_on_disk(model, encoder, alone):
    evaluation, folder = alone
    extractor = load_extractor(encoder)
    scenes = ScenesDataset("easy", 32, seed=3, split="heldout", size=COUNT)
    reference = np.stack([np.asarray(scenes[i]["image"]) for i in range(COUNT)])
    files = sorted(folder.glob("out/pictures/*/*.png"))
    assert [int(file.name[:7]) for file in files] == list(range(COUNT))
    generated = np.stack([np.asarray(Image.open(file)) for file in files])
    x, y = (extractor(torch.from_numpy(a).permute(0, 3, 1, 2)).double().numpy() for a in (generated, reference))
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    frechet = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert values(evaluation)[FID] == pytest.approx(frechet, rel=1e-4)  # float32 features depend on the batch

    def kernel(a, b):
        return np.exp(-np.square(a[:, None] - b).sum(-1) / 200).mean()

    mmd = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert values(evaluation)[MMD] == pytest.approx(mmd, rel=1e-4)
    # the images belong to the prompts, each with the noise of its index
    draw = pipeline_draw(load_pipeline(str(model)), 32, 1, 1.0, 3, batch_size=1)
    for index in (0, 5, COUNT - 1):
        one = draw([scenes[index]["caption"]], [index])[0]
        assert np.abs(one.astype(int) - generated[index]).max() <= 1


def test_report_records_the_settings_that_affect_a_score(encoder, alone, tmp_path):
    evaluation, _ = alone
    write_reports(evaluation, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    for name, kind in ((FID, "fid"), (MMD, "mmd")):
        found = report["metrics"][name]
        assert found["interval"][0] < found["value"] < found["interval"][1]
        assert (found["num_images"], found["num_reference"], found["higher_is_better"]) == (COUNT, COUNT, False)
        assert found["metric"] == f"{kind}:{encoder}"
        assert found["encoder"]["fingerprint"] == load_extractor(encoder).fingerprint
    assert report["metrics"][MMD]["kernel"] == {"sigma": 10.0, "scale": 1000.0}
    recorded = report["evaluation"]
    drawn = recorded["drawn"]
    assert (recorded["seed"], drawn["num_inference_steps"], drawn["guidance_scale"]) == (3, 1, 1.0)
    assert {"torch", "diffusers", "transformers", "torchmetrics"} <= recorded["versions"].keys()
    assert report["reference"]["images"] == COUNT
    table = (tmp_path / "report.md").read_text()
    assert f"| {FID} | {report['metrics'][FID]['value']:.5g} |" in table
    assert f"| {MMD}, unbiased |" in table
    assert report["reference"]["content_hash"] in table
    assert (tmp_path / "comparison.png").stat().st_size > 5000


def test_repeated_evaluation_reuses_images_and_cached_statistics(model, encoder, alone):
    evaluation, folder = alone

    def stamps():
        return {file: file.stat().st_mtime_ns for end in ("png", "safetensors") for file in folder.rglob(f"*.{end}")}

    before = stamps()
    assert len(before) == COUNT + 2
    again = evaluated(settings(model, encoder), folder)
    assert stamps() == before
    assert values(again) == values(evaluation)
    # a broken cache file is replaced
    broken = next(folder.rglob("moments-*.safetensors"))
    broken.write_bytes(b"broken")
    assert values(evaluated(settings(model, encoder), folder)) == values(evaluation)
    assert broken.stat().st_size > 1000


@pytest.mark.parametrize("position", [-40, 60])
def test_damaged_images_count_as_missing(tmp_path, position, caplog):
    """Pillow reads a PNG with a wrong checksum without an error."""
    pictures = PictureFolder(tmp_path)
    pictures.write((3, "a cat"), np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert pictures.has((3, "a cat"))
    assert not pictures.has((4, "a cat"))
    path = pictures.path((3, "a cat"))
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    assert not pictures.has((3, "a cat"))
    assert "is damaged" in caplog.text


def test_other_settings_and_weights_have_their_own_images(model, encoder, alone, tmp_path):
    evaluation, folder = alone
    known = pictures_of(folder)
    other = evaluated(settings(model, encoder, seed=4), folder)
    assert len(list(folder.glob("out/pictures/*"))) == 2
    assert values(other) != values(evaluation)
    pipeline = load_pipeline(str(model))
    with torch.no_grad():
        pipeline.transformer.final_layer.linear.weight.mul_(1.5)
    pipeline.save_pretrained(tmp_path / "trained on")
    evaluated(settings(tmp_path / "trained on", encoder), folder)
    assert len(list(folder.glob("out/pictures/*"))) == 3
    assert known.items() <= pictures_of(folder).items()


def _evaluate(given, folder):
    torch.set_num_threads(1)
    os.environ.pop("ACCELERATE_USE_CPU", None)  # set by the launcher, but not by torchrun
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluation = evaluated(given, folder)
    state = PartialState()
    assert (evaluation is not None) == state.is_main_process
    if evaluation is not None:
        (folder / "report.json").write_text(json.dumps({**evaluation.report, "processes": state.num_processes}))


def test_two_processes_give_the_results_of_one(model, encoder, alone, tmp_path):
    evaluation, folder = alone
    debug_launcher(_evaluate, (settings(model, encoder), tmp_path), num_processes=2)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["processes"] == 2
    assert pictures_of(tmp_path).items() <= pictures_of(folder).items()  # to the last bit
    assert len(pictures_of(tmp_path)) == COUNT
    for name, found in report["metrics"].items():
        alone_found = evaluation.report["metrics"][name]
        assert found["value"] == pytest.approx(alone_found["value"], rel=1e-9)
        assert found["num_images"] == found["num_reference"] == COUNT
        assert found["interval"] == pytest.approx(alone_found["interval"], rel=1e-9)
    assert report["reference"] == evaluation.report["reference"]
    assert {path.name for path in tmp_path.glob("cache/*")} <= {path.name for path in folder.glob("cache/*")}


def _killed_after(pictures, given, folder):
    write, left = PictureFolder.write, [pictures]

    def write_or_die(self, prompt, image):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        write(self, prompt, image)

    torch.set_num_threads(1)
    PictureFolder.write = write_or_die
    evaluated(given, folder)


@pytest.mark.parametrize("pictures", [0, 10])  # 10: in the middle of a batch
def test_interrupted_evaluation_resumes(model, encoder, alone, tmp_path, pictures):
    evaluation, folder = alone
    given = settings(model, encoder)
    child = multiprocessing.get_context("fork").Process(target=_killed_after, args=(pictures, given, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(before) == pictures
    assert values(evaluated(given, tmp_path)) == values(evaluation)
    kept = [path for path, stamp in before.items() if path.stat().st_mtime_ns == stamp]
    assert len(kept) == pictures // 4 * 4  # complete batches are kept
    assert pictures_of(tmp_path).items() <= pictures_of(folder).items()


def test_compat_uses_the_same_noise_in_every_batch(model, encoder, tmp_path):
    pipeline = load_pipeline(str(model))
    same = pipeline_draw(pipeline, 32, 1, 1.0, 3, batch_size=2, fixed_noise=True)(["a red circle"] * 6)
    assert np.array_equal(same[0], same[2])
    assert not np.array_equal(same[0], same[1])
    report = evaluated(settings(model, encoder, compat="photoroom"), tmp_path).report
    assert list(report["metrics"]) == ["FID (scenes ViT, compat photoroom)", MMD]
    assert report["evaluation"]["drawn"]["fixed_noise"]
    assert "not comparable with other numbers" in markdown_table(report)


def test_cached_statistics_depend_on_compat_and_content(encoder, tmp_path):
    cache, extractor = ReferenceCache(tmp_path), load_extractor(encoder)
    paths = [
        [cache.path(cls(extractor, compat), "content").name for compat in (None, "photoroom")]
        for cls in (FrechetDistance, MaximumMeanDiscrepancy)
    ]
    assert paths[0][0] != paths[0][1]
    assert paths[1][0] == paths[1][1]  # an MMD does not change the images
    assert cache.path(FrechetDistance(extractor), "other content").name not in paths[0]


def test_stock_pipelines(encoder, tmp_path):
    """diffusers' own class supports guidance only with a batch size of one."""
    tiny.latent_pipeline().save_pretrained(tmp_path / "stock")
    found = evaluated(
        settings(tmp_path / "stock", encoder, stock=True, batch_size=1, guidance_scale=3.0, num_images=4), tmp_path
    ).report
    assert found["evaluation"]["drawn"]["pipeline"] == "diffusers.PRXPipeline"
    ours = evaluated(settings(tmp_path / "stock", encoder, guidance_scale=3.0, num_images=4), tmp_path).report
    assert ours["evaluation"]["drawn"]["pipeline"] == "diffusers_prx.PRXPipeline"
    assert np.isfinite(list(values(found).values())).all()


# --- references


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same eight images and captions as a folder, a parquet file and a tar file."""
    root = tmp_path_factory.mktemp("sources")
    (root / "folder").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for index in range(8):
        shape = ((40, 40, 3), (30, 64, 3))[index % 2]
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(buffer, "PNG")
        rows.append((f"{index:03}", buffer.getvalue(), f"picture {index} of a red circle"))
    with tarfile.open(root / "images.tar", "w") as archive:
        for name, content, text in rows:
            (root / "folder" / f"{name}.png").write_bytes(content)
            (root / "folder" / f"{name}.txt").write_text(text)
            for ending, data in (("png", content), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    table = {
        "image": [{"bytes": content, "path": None} for _, content, _ in rows],
        "text": [text for *_, text in rows],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).to_parquet(root / "images.parquet")
    return root


def test_folders_parquet_and_tar_files_give_the_same_reference(model, encoder, sources, tmp_path):
    found = {}
    for name in ("folder", "images.parquet", "images.tar"):
        given = settings(model, encoder, reference=str(sources / name), num_images=100)
        found[name] = evaluated(given, tmp_path).report
        assert found[name]["reference"]["images"] == 8
        assert found[name]["metrics"][FID]["num_images"] == 8  # all captions of the reference
    first, *others = found.values()
    for other in others:
        assert other["reference"]["content_hash"] == first["reference"]["content_hash"]
        assert values(other) == values(first)
    assert len(pictures_of(tmp_path)) == 8  # generated once
    assert len(list(tmp_path.glob("cache/*"))) == 2


def test_clip_score_needs_only_captions_and_counts_truncated_ones(model, tmp_path):
    folder = tmp_path / "tiny CLIP"
    zoo.save_clip(folder)
    scenes = ScenesDataset("easy", 32, seed=3, split="heldout", size=6)
    tokens = zoo.clip_tokenizer()([scenes[i]["caption"] for i in range(6)], truncation=False)["input_ids"]
    truncated = sum(len(ids) > 24 for ids in tokens)
    assert 0 < truncated < 6
    given = settings(model, "", metrics=(f"clip_score:{folder}",), num_images=6)
    report = evaluated(given, tmp_path).report
    found = report["metrics"]["CLIP score (tiny CLIP)"]
    assert (found["num_images"], found["captions_cut"], found["higher_is_better"]) == (6, truncated, True)
    assert report["reference"] == {"name": "scenes", "samples_without_caption": 0}
    assert f"{truncated} captions truncated" in markdown_table(report)
    assert not list(tmp_path.glob("cache/*"))


def test_unreadable_samples_are_counted(model, encoder, sources, tmp_path):
    for file in (sources / "folder").iterdir():
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "images" / "002.png").write_bytes(b"no picture")
    (tmp_path / "images" / "004.txt").write_text("")
    report = evaluated(settings(model, encoder, reference=str(tmp_path / "images")), tmp_path).report
    assert (report["reference"]["images"], report["reference"]["unreadable_images"]) == (6, 2)
    assert report["reference"]["samples_without_caption"] == 1
    assert "002.png" in report["reference"]["first_unreadable"][0]
    found = report["metrics"][FID]
    assert (found["num_images"], found["num_reference"]) == (7, 6)  # 002 has a caption
    # images depend on the index of their prompt, whatever is missing before it
    whole = evaluated(settings(model, encoder, reference=str(sources / "folder")), tmp_path / "whole").report
    assert whole["reference"]["content_hash"] != report["reference"]["content_hash"]
    assert set(pictures_of(tmp_path)) == {name for name in pictures_of(tmp_path / "whole") if "/0000004-" not in name}


def test_reference_can_have_more_images_than_are_generated(model, encoder, tmp_path):
    report = evaluated(settings(model, encoder, num_images=6, num_reference=9), tmp_path).report
    assert (report["metrics"][MMD]["num_images"], report["metrics"][MMD]["num_reference"]) == (6, 9)


def test_scenes_and_metrics_share_their_images(model, encoder, tmp_path):
    """The held-out prompts of the scenes are the first prompts of the reference."""
    given = settings(model, encoder, scenes=True, num_prompts=8)
    evaluation = evaluated(given, tmp_path)
    assert len(pictures_of(tmp_path)) == COUNT + 8  # and 8 novel ones
    assert len(evaluation.scenes[0]) == len(evaluation.scenes[1]) == 8
    low, high = evaluation.report["scene_accuracy_interval"]
    assert low <= evaluation.report["scene_accuracy"] <= high
    write_reports(evaluation, tmp_path)
    assert "| scene_accuracy_novel | " in (tmp_path / "report.md").read_text()


def test_distance_grows_with_the_number_of_damaged_images(encoder):
    """Damaged scenes are gray."""

    def scenes(seed):
        drawn = ScenesDataset("easy", 32, seed, "heldout", size=160)
        pictures = np.stack([np.asarray(drawn[i]["image"]) for i in range(160)])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)

    reference, other = scenes(1), scenes(2)
    grey = other.float().mean(1, keepdim=True).round().to(torch.uint8).expand(-1, 3, -1, -1)
    extractor = load_extractor(encoder)
    for cls in (FrechetDistance, MaximumMeanDiscrepancy):
        found = []
        for damaged in (0, 40, 80, 160):
            metric = cls(extractor)
            metric.update(reference, real=True)
            metric.update(torch.cat([grey[:damaged], other[damaged:]]), real=False)
            found.append(metric.compute().item())
        assert found == sorted(found)
        assert found[3] > 3 * found[0]


# --- invalid settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ()}, "`metrics`"),
        ({"metrics": ("kid",)}, "`metrics` has 'kid'"),
        ({"metrics": ("mmd",)}, "`metrics` has 'mmd'"),
        ({"metrics": ("cmmd:folder",)}, "mmd:folder"),
        ({"num_images": 1}, "`num_images`"),
        ({"compat": "photo"}, "`compat`"),
    ],
)
def test_invalid_settings_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(model, "encoder", **changes)


def test_encoders_and_resolutions_that_do_not_fit_are_refused(model, encoder, tmp_path):
    with pytest.raises(ValueError, match="has no preprocessor_config"):
        evaluated(settings(model, tmp_path / "nothing"), tmp_path)
    with pytest.raises(ValueError, match=r"`metrics`.*FID \(scenes ViT\)"):
        evaluated(settings(model, encoder, metrics=(f"fid:{encoder}", f"fid:{encoder}/")), tmp_path)
    with pytest.raises(ValueError, match="resolution"):
        evaluated(settings(model, encoder, resolution=300), tmp_path)


def test_names_of_metrics():
    assert parse_metric("cmmd") == ("mmd", "clip")
    assert parse_metric("dino_mmd") == ("mmd", "dinov2")
    assert parse_metric("fid") == ("fid", "inception")
    assert parse_metric("mmd:a/b") == ("mmd", "a/b")
