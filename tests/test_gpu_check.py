"""gpu_check.py on the CPU, in small: wrong numbers are found, and a failing part stops no other."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "training" / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The modules of the script; they import each other by name, as scripts of a folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("gpu_check", "gpu_correctness", "gpu_speed")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in (*names, "timing", "bench_model"):
        sys.modules.pop(name, None)


def rows(markdown: str, title: str) -> list[list[str]]:
    part = markdown.split(f"## {title}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in part.splitlines()
        if line.startswith("| ")
    ][2:]


@pytest.mark.parametrize("name", ["SPRINT", "iREPA", "DPO", "x-prediction", "LADD", "NFT", "DINO perceptual"])
def test_techniques_agree_with_float64(scripts, name):
    found = list(scripts.gpu_correctness.compare_training(name, name, "cpu"))
    parts = {row.check for row in found}
    assert [row.dtype for row in found] == [
        dtype for dtype in ("float32", "bfloat16", "float16") for _ in range(len(parts))
    ]
    assert all(row.ok for row in found), found
    # the bounds mean something: gradients come within a factor of 60 of them, in every type
    assert all(row.error > row.bound / 60 for row in found if "gradients" in row.check)


def damage(transformer: torch.nn.Module) -> None:
    """Double one row of one matrix of the last block."""
    with torch.no_grad():
        transformer.blocks[-1].down_proj.weight[3] *= 2


def test_one_wrong_row_of_a_weight_is_found(scripts):
    check = scripts.gpu_correctness.compare_forward
    right = list(check("", "cpu"))
    assert len(right) == 3
    assert all(row.ok for row in right)
    wrong = list(check("", "cpu", damage))
    assert [row.ok for row in wrong] == [False, True, True]  # bf16 and fp16 round more than this row changes
    assert wrong[0].error > 100 * wrong[0].bound


def test_a_wrong_matrix_is_found_in_every_type(scripts):
    def replace_matrix(transformer: torch.nn.Module) -> None:
        with torch.no_grad():
            transformer.blocks[1].down_proj.weight *= 1.5

    assert not any(row.ok for row in scripts.gpu_correctness.compare_forward("", "cpu", replace_matrix))
    training = scripts.gpu_correctness.compare_training("", "flow matching", "cpu", replace_matrix)
    assert not any(row.ok for row in training if "gradients" in row.check)


def test_a_wrong_row_changes_the_pictures_of_every_pipeline(scripts):
    found = list(scripts.gpu_correctness.check_pipelines("latents", "cpu", damage))
    assert {row.check.removeprefix("latents: ") for row in found} == {"text to image", "image to image", "inpainting"}
    assert not any(row.ok for row in found if row.dtype == "float32")


def test_checking_a_backend_leaves_that_of_other_models(scripts):
    """`set_attention_backend` changes diffusers' default, too: the next timing of stock would run with it."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    list(scripts.gpu_correctness.check_backend("_native_math", "cpu"))
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


def test_a_backend_without_masks_is_checked_without_padding(scripts):
    found = list(scripts.gpu_correctness.check_backend("_native_flash", "cpu"))
    assert {row.check for row in found} == {"attention _native_flash, no padding"}
    assert all(row.ok for row in found)


def test_numbers_that_are_not_finite_are_wrong(scripts):
    assert not scripts.gpu_correctness.Comparison("", "float32", float("nan"), 1.0).ok


def test_all_parts_run_and_a_failing_one_is_reported(scripts, tmp_path, monkeypatch, capsys):
    techniques = {"flow matching": scripts.gpu_correctness.TECHNIQUES["flow matching"]}
    monkeypatch.setattr(scripts.gpu_correctness, "TECHNIQUES", techniques)
    monkeypatch.setattr(scripts.gpu_correctness, "DTYPES", (torch.float32,))
    flags = ["--device", "cpu", "--size", "tiny", "--repeats", "2", "--compile_backend", "eager", "--fp8"]
    flags += ["--output_dir", str(tmp_path)]
    status = scripts.gpu_check.main([*flags, "--attention_backends", "native", "_native_cudnn", "flash|unknown"])
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert status == 1
    assert list(found["failed"]) == ["attention flash|unknown"]
    # without float8, the other variants of the same model are timed
    assert list(found["unavailable"]) == [
        "attention _native_cudnn",
        "training, tiny, latents, ours, compiled, fp8",
        "sampling, tiny, latents, ours, compiled, fp8",
    ]
    assert all(row["ok"] for row in found["correctness"])
    checked = {row["check"] for row in found["correctness"]}
    assert {"flow matching: gradients of flow", "attention native", "PRXXPredictionScheduler"} <= checked
    assert {f"{space}: inpainting" for space in ("pixels", "latents")} <= checked
    assert {(row["task"], row["variant"]) for row in found["speed"]} == {
        (task, variant) for task in ("train", "sample") for variant in ("ours", "ours, compiled", "stock")
    }
    for row in found["speed"]:
        assert row["per_second"] == pytest.approx(row["batch"] / row["seconds"])
    assert all(0 < row["share_of_ceiling"] < 1 for row in found["speed"] if row["task"] == "train")
    page = (tmp_path / "gpu_check.md").read_text()
    assert [float(line[4]) for line in rows(page, "Speed")] == [
        round(1000 * row["seconds"], 1) for row in found["speed"]
    ]
    assert len(rows(page, "Errors against float64")) == len(found["correctness"])
    assert [line[0] for line in rows(page, "Failed")] == [name.replace("|", r"\|") for name in found["failed"]]
    assert [line[0] for line in rows(page, "Not available")] == list(found["unavailable"])
    assert found["environment"]["torch"] == torch.__version__
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] is False


def test_parts_do_not_begin_after_the_time_limit(scripts, tmp_path):
    report = scripts.gpu_check.Report(tmp_path, {}, "cpu", 0)
    assert report.run("late", lambda: 1) is None
    assert report.found["failed"] == {"late": "not started: --max_minutes 0"}
    assert not report.ok


def test_a_variant_that_fails_leaves_the_others(scripts):
    def too_large() -> torch.nn.Module:
        raise torch.OutOfMemoryError("no memory")

    def work(model: torch.nn.Module, trimmed: bool) -> None:
        model(torch.ones(2, 3)).sum().backward()

    makers = {"ours": lambda: torch.nn.Linear(3, 3), "stock": too_large}
    found, failed = scripts.gpu_speed.measure("model", makers, work, "cpu", 2)
    assert list(found) == ["ours"]
    assert {name: type(error) for name, error in failed.items()} == {"model, stock": torch.OutOfMemoryError}


def test_variants_share_their_weights(scripts):
    """Four copies of PRX-1.2B would leave less memory for the batch."""
    arguments = scripts.gpu_speed.SIZES["tiny"]["tiny, latents"][0]
    makers = scripts.gpu_speed.variants(arguments, "cpu", torch.float32, False, "eager")
    models = [make() for make in makers.values()]
    assert len(models) == 3
    assert len({next(model.blocks.parameters()).data_ptr() for model in models}) == 1
    assert all(weight.requires_grad for model in models for weight in model.parameters())


def test_a_batch_that_does_not_fit_ends_the_search(scripts):
    tried = []

    def run(rows: int) -> None:
        tried.append(rows)
        if rows > 8:
            raise torch.OutOfMemoryError

    assert scripts.gpu_speed.largest_batch(run, "cpu", 1000) == 8
    assert tried == [1, 2, 4, 8, 16]
    assert scripts.gpu_speed.largest_batch(run, "cpu", 4) == 4
    with pytest.raises(torch.OutOfMemoryError):
        scripts.gpu_speed.largest_batch(lambda rows: run(9), "cpu", 4)


def test_flops_are_those_of_the_formula(scripts):
    """Three products (forward, and two backward) of every weight and token; attention adds to it."""
    arguments = {"hidden_size": 64, "num_heads": 2, "depth": 2, "axes_dim": [16, 16]}
    found = scripts.gpu_speed.training_flops(arguments, 16, 10)
    from diffusers_prx import PRXTransformer2DModel

    blocks = PRXTransformer2DModel(**arguments).blocks
    matrices = sum(p.numel() for name, p in blocks.named_parameters() if p.ndim == 2 and "modulation" not in name)
    assert 2 * 3 * 64 * matrices * 0.8 < found < 2 * 3 * 64 * matrices * 2


def test_float8_is_refused_where_the_device_has_none(scripts):
    with pytest.raises(RuntimeError, match="of compute capability"):
        scripts.gpu_speed.to_fp8(torch.nn.Module())


def test_without_a_gpu_it_says_what_to_pass(scripts, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit):
        scripts.gpu_check.main([])
    assert "--device cpu --size tiny" in capsys.readouterr().err
