"""The study tool: flags, refusals, and whole small studies with a run that fails, stopped and continued."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs
from diffusers_prx.files import write_json
from diffusers_prx.study.spec import load_study, read_record, record_path, register
from diffusers_prx.training.recipes import parse_config
from runs import save_study
from training import ablate_prx

STUDIES = sorted((runs.ROOT / "training" / "studies").glob("*.yaml"))


@pytest.mark.parametrize(
    "value",
    ["a word", "null and void", "1.0", 1e-5, 3, True, None, [], ["a: b", "c, d"], {"a": {"b": 1e-5}, "c": None}],
)
def test_a_setting_survives_being_a_flag(value):
    name = {str: "caption_column", float: "learning_rate", int: "seed", bool: "use_ema", list: "validation_prompts"}
    name = name.get(type(value), "lr_decay_steps" if value is None else "caption_weights")
    if isinstance(value, dict):
        name, value = "transformer_config", runs.TRANSFORMER | {"mlp_ratio": 1e-5}
    base = ["--dataset_name", "scenes", "--transformer_config", "{depth: 1}", "--text_encoder_name_or_path", "x"]
    cfg = parse_config([*base, *ablate_prx.flag(name, value)])
    assert getattr(cfg, name) == value
    assert type(getattr(cfg, name)) is type(value)


def test_flags_of_an_evaluation():
    values = {"scenes": True, "quiet": False, "level": None, "num_prompts": 8, "metrics": ["fid", "cmmd"]}
    flags = [part for name, value in values.items() for part in ablate_prx.evaluation_flag(name, value)]
    assert flags == ["--scenes", "--num_prompts", "8", "--metrics", "fid", "cmmd"]


# what the study over scenes has to decide, by the arm that is judged
FINDINGS = {
    "short_captions", "weights_bf16", "baseline", "repa", "repa_expiring", "irepa", "contrastive", "x_prediction",
    "tread", "tread_256", "sprint", "sprint_256", "ema", "sft", "dino_perceptual", "everything", "latents_kl",
}  # fmt: skip


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_in_the_repository_can_be_started(path, tmp_path):
    study = load_study(path)
    runner = ablate_prx.Runner(study, tmp_path, tmp_path / "report", ablate_prx.parse_args(["--study", str(path)]))
    ablate_prx.check_settings(runner, list(study.arms))
    for need in study.needs.values():
        script, *arguments = need.command.split()
        assert (runs.ROOT / script).is_file()
        assert need.makes in arguments
    for seed_dependent in ("seed", "output_dir", "resume_from_checkpoint"):
        assert all(seed_dependent not in study.settings_of(arm) for arm in study.arms)


def test_the_study_over_scenes_asks_what_the_published_one_did():
    study = load_study(runs.ROOT / "training" / "studies" / "scenes.yaml")
    assert {finding.arm for finding in study.findings.values()} == FINDINGS
    assert len(study.seeds) >= 3
    for name, finding in study.findings.items():
        assert finding.expected or finding.note or finding.at_this_size, name
        figures = [pair[1] - pair[0] for figure, pair in finding.published.items() if not figure.endswith("/s")]
        if figures and all(change > 0 for change in figures):  # FID and the MMDs: lower is better
            assert finding.expected == "worse", name
        elif figures and all(change < 0 for change in figures):
            assert finding.expected == "better", name
        else:
            # where the published metrics disagree, it has no direction, or that of FID, by which it is judged
            judged = "better" if figures and figures[0] < 0 else "worse"
            assert finding.expected in (None, judged) or not figures, name


def ablate(folder: Path, *more: str) -> None:
    ablate_prx.main(["--study", str(folder / "study.yaml"), "--output_dir", str(folder / "out"), *more])


def records(folder: Path) -> dict[str, dict]:
    found = sorted((folder / "out" / "report" / "runs").glob("*/seed_*.json"))
    return {f"{path.parent.name}/{path.stem}": json.loads(path.read_text()) for path in found}


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        (
            {"settings": {"learning_rat": 1}},
            [],
            r"arm baseline: .*--learning_rat .*did you mean --learning_rate\?",
        ),
        ({"settings": {"seed": -1}, "steps": 0}, [], "`steps` and `threads` must be at least 1"),
        ({"settings": {"contrastive_weight": -1}}, [], "arm baseline: `contrastive_weight` must be finite"),
        ({}, ["--seeds", "1", "7"], r"`seeds` \[7\] are not the study's"),
        ({}, ["--only", "x"], "`only` names 'x'"),
        ({}, ["--collect"], r"has no plan\.json"),
    ],
)
def test_what_is_refused_before_anything_runs(tmp_path, changes, more, message):
    save_study(tmp_path, **changes)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        ablate(tmp_path, *more)
    assert not (tmp_path / "out" / "report").exists()


def test_a_dry_run_prints_what_would_run(tmp_path, capsys):
    save_study(tmp_path)
    ablate(tmp_path, "--dry_run", "--only", "tuning")
    lines = capsys.readouterr().out.splitlines()
    # all arms at the first seed before any at the second
    assert [line.split("seed_")[-1].split("/")[0].split()[0] for line in lines] == ["1"] * 4 + ["2"] * 4
    assert "diverging" not in " ".join(lines)
    train, evaluate = lines[2:4]
    assert f"--pretrained_model_name_or_path {tmp_path}/out/baseline/seed_1" in train
    assert "--max_train_steps 3 --lr_warmup_steps 1" in train
    assert "--seed 1" in train
    assert "--resume_from_checkpoint latest" in train
    assert f"--model {tmp_path}/out/tuned/seed_1 " in evaluate
    assert not (tmp_path / "out" / "report").exists()


def test_a_study_is_not_run_twice_at_once(tmp_path):
    path = save_study(tmp_path)
    args = ablate_prx.parse_args(["--study", str(path)])
    runner = ablate_prx.Runner(load_study(path), tmp_path / "out", tmp_path / "out" / "report", args)
    with pytest.raises(SystemExit, match="still at work in"):
        ablate(tmp_path)
    runner.lock.close()
    ablate(tmp_path, "--dry_run")


def test_a_small_study(tmp_path, capsys):
    """One seed of a run that works and of one that does not, then the same command again."""
    save_study(tmp_path, seeds=[1])
    ablate(tmp_path, "--only", "divergence", "--remove_checkpoints")
    found = records(tmp_path)
    assert {name: record["status"] for name, record in found.items()} == {
        "baseline/seed_1": "finished", "diverging/seed_1": "failed",
    }  # fmt: skip
    good, bad = found["baseline/seed_1"], found["diverging/seed_1"]
    assert (good["steps"], good["config"]["seed"], good["config"]["lr_warmup_steps"]) == (3, 1, 1)
    assert [step for step, _ in good["curve"]] == [1, 2, 3]
    assert 0 <= good["evaluations"]["default"]["scene_accuracy"] <= 1
    assert good["seconds_per_step"] >= 0
    assert good["commit"] == json.loads((tmp_path / "out/baseline/seed_1/training.json").read_text())["commit"]
    assert (tmp_path / "out/report/runs/baseline/seed_1.png").is_file()
    assert not list((tmp_path / "out/baseline/seed_1").glob("checkpoint-*"))
    assert (tmp_path / "out/baseline/seed_1/model_index.json").is_file()
    assert "The loss is not finite at step" in bad["failures"][0]["message"]
    assert bad["failures"][0]["stage"] == "training"

    report = (tmp_path / "out/report/report.md").read_text()
    assert "**failed**; runs failed" in report
    assert "diverging, seed 1: The loss is not finite" in report
    assert "| tuned | 1 | not run |" in report
    capsys.readouterr()
    ablate(tmp_path, "--only", "divergence")  # what is there is not run again, what failed neither
    assert "0 runs to do, 2 are there" in capsys.readouterr().out
    assert records(tmp_path) == found


def test_no_run_starts_after_the_time_limit(tmp_path, capsys):
    save_study(tmp_path)
    ablate(tmp_path, "--time_limit", "0")
    assert records(tmp_path) == {}
    assert capsys.readouterr().out.count("not started: --time_limit") == 6
    assert "Of 6 planned runs (3 kinds, seeds 1, 2) 0 were made" in (tmp_path / "out/report/report.md").read_text()


def test_what_a_run_starts_from_has_to_be_there(tmp_path):
    path = save_study(tmp_path, seeds=[1])
    register(load_study(path), tmp_path / "out/report", "2026-01-01", "abc")
    write_json(record_path(tmp_path / "out/report", "baseline", 1), {"status": "failed", "trained": False,
               "evaluations": {}, "failures": [{"stage": "training", "message": "lost"}], "machine": {},
               "jobs": 1, "threads": 1})  # fmt: skip
    ablate(tmp_path, "--only", "tuned")
    record = read_record(tmp_path / "out/report", "tuned", 1)
    assert record["status"] == "failed"
    assert record["failures"][0]["message"].endswith("which it starts from, holds no pipeline")
    assert load_study(path).select(["tuned"]) == ["baseline", "tuned"]


def alive(folder: Path) -> list[str]:
    """The processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(process.read_bytes().decode().replace("\0", " "))
        except OSError:  # it has ended since
            continue
    return [line for line in found if "train_prx.py" in line and str(folder) in line]


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on(tmp_path, capsys):
    """Two runs at once, stopped in the middle of the first ones; continued; the failed one tried again; one row."""
    path = save_study(tmp_path, steps=40)
    command = [sys.executable, str(runs.ROOT / "training" / "ablate_prx.py"), "--study", str(path)]
    command += ["--output_dir", str(tmp_path / "out"), "--jobs", "2"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(runs.ROOT / "src")})
    checkpoints = tmp_path / "out/baseline/seed_1"
    while not list(checkpoints.glob("checkpoint-[0-9]")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    assert alive(tmp_path) == []
    assert records(tmp_path) == {}  # what was stopped is no result
    stopped_at = max(int(path.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*[0-9]"))
    assert stopped_at < 40
    plan = (tmp_path / "out/report/plan.json").read_text()

    ablate(tmp_path, "--jobs", "2")
    found = records(tmp_path)
    expected = {"baseline": "finished", "diverging": "failed", "tuned": "finished"}
    assert {name: record["status"] for name, record in found.items()} == {
        f"{arm}/seed_{seed}": status for arm, status in expected.items() for seed in (1, 2)
    }
    assert (tmp_path / "out/report/plan.json").read_text() == plan
    assert "resumed from" in (checkpoints / "log.txt").read_text()
    assert [step for step, _ in found["baseline/seed_1"]["curve"]] == [12, 24, 36, 40]
    start = found["tuned/seed_2"]["config"]["pretrained_model_name_or_path"]
    assert start == str(tmp_path / "out/baseline/seed_2")
    report = (tmp_path / "out/report/report.md").read_text()
    assert "Of 6 planned runs (3 kinds, seeds 1, 2) 6 were made; 2 of them failed, 0 went on after" in report
    assert "**too few seeds**" in report

    # the evaluation of a run is made up where its record lacks it; a failed one is tried again and fails again
    record = found["tuned/seed_1"]
    write_json(record_path(tmp_path / "out/report", "tuned", 1), record | {"evaluations": {}})
    capsys.readouterr()
    ablate(tmp_path, "--retry_failed", "--seeds", "1")
    assert "2 runs to do, 1 are there" in capsys.readouterr().out
    again = records(tmp_path)
    scores = [r["tuned/seed_1"]["evaluations"]["default"]["scene_accuracy"] for r in (found, again)]
    assert scores[0] == scores[1]
    assert len(again["diverging/seed_1"]["failures"]) == 2

    ablate_prx.main(["--study", str(path), "--output_dir", str(tmp_path / "row"), "--only", "tuning", "--seeds", "1"])
    rows = [read_record(tmp_path / "row/report", arm, 1) for arm in ("baseline", "tuned")]
    # the same seed, the same run: the first was stopped and went on, this one was not
    assert [row["curve"] for row in rows] == [found[f"{arm}/seed_1"]["curve"] for arm in ("baseline", "tuned")]


@pytest.mark.slow
def test_throughput_is_measured_in_turns(tmp_path, capsys):
    save_study(tmp_path, seeds=[1])
    ablate(
        tmp_path, "--only", "diverging", "--measure_throughput", "--throughput_steps", "6", "--throughput_repeats", "1"
    )
    # it does not get to its last step; nothing is made up for it
    assert "diverging was not timed: ValueError: The loss is not finite" in capsys.readouterr().out
    assert not (tmp_path / "out/report/throughput.json").exists()
    save_study(
        tmp_path, seeds=[1],
        arms={"baseline": {}, "wide": {"settings": {"transformer_config": runs.TRANSFORMER | {"depth": 12}}}},
        findings={"wide": {"text": "More blocks take longer.", "arm": "wide"}},
    )  # fmt: skip
    for _ in range(2):  # the second time there is nothing left to measure
        ablate(tmp_path, "--measure_throughput", "--throughput_steps", "12", "--throughput_repeats", "2")
    timed = json.loads((tmp_path / "out/report/throughput.json").read_text())
    assert [(entry["arm"], entry["reference"], entry["repeat"]) for entry in timed] == [
        ("wide", "baseline", 0),
        ("wide", "baseline", 1),
    ]
    assert all(entry["seconds_arm"] > entry["seconds_reference"] > 0 for entry in timed)
    assert re.search(r"\| 0\.\d\d \[0\.\d\d, ", (tmp_path / "out/report/report.md").read_text())  # its ratio
    assert records(tmp_path) == {}
