"""gpu_check.py on the CPU, in small: wrong numbers are found, and a failing part stops no other."""

import importlib
import json
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
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")][
        2:
    ]


@pytest.mark.parametrize("name", ["SPRINT", "iREPA", "DPO", "x-prediction"])
def test_techniques_agree_with_float64(scripts, name):
    found = list(scripts.gpu_correctness.check_technique(name, "cpu"))
    assert [row.dtype for row in found] == ["float32"] * 2 + ["bfloat16"] * 2 + ["float16"] * 2
    assert all(row.ok for row in found), found
    # the bounds mean something: gradients come within a factor of 400 of them, in every type
    assert all(row.error > row.bound / 400 for row in found if "gradients" in row.check)


def test_one_wrong_weight_is_found(scripts):
    """One row of one matrix of the last block is doubled."""

    def damage(transformer: torch.nn.Module) -> None:
        with torch.no_grad():
            transformer.blocks[-1].down_proj.weight[3] *= 2

    check = scripts.gpu_correctness.check_forward
    for dtype in (torch.float32, torch.bfloat16):
        (right,) = check("", lambda transformer: None, dtype, "cpu")
        assert right.ok
    (wrong,) = check("", damage, torch.float32, "cpu")
    assert not wrong.ok
    assert wrong.error > 100 * wrong.bound


def test_numbers_that_are_not_finite_are_wrong(scripts):
    assert not scripts.gpu_correctness.Comparison("", "float32", float("nan"), 1.0).ok


def test_all_parts_run_and_a_failing_one_is_reported(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scripts.gpu_correctness, "TECHNIQUES", {"flow matching": ({}, {})})
    flags = ["--device", "cpu", "--size", "tiny", "--repeats", "2", "--compile_backend", "eager"]
    flags += ["--output_dir", str(tmp_path)]
    status = scripts.gpu_check.main([*flags, "--attention_backends", "native", "flash_varlen_hub_3"])
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert status == 1
    assert list(found["failed"]) == ["attention flash_varlen_hub_3"]
    assert all(row["ok"] for row in found["correctness"])
    checked = {row["check"] for row in found["correctness"]}
    assert {"flow matching: gradients", "attention native", "PRXXPredictionScheduler"} <= checked
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
    assert [line[0] for line in rows(page, "Failed")] == list(found["failed"])
    assert found["environment"]["torch"] == torch.__version__
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] is False


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
