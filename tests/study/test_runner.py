"""Study runner: flags, refused studies, and small studies with failing, interrupted and resumed runs."""

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
from diffusers_prx.study.runner import (
    StudyOptions,
    StudyRunner,
    check_settings,
    evaluation_flag,
    training_flag,
)
from diffusers_prx.study.spec import load_study, read_record, record_path, register
from diffusers_prx.training.recipes import parse_config
from runs import save_study
from training import ablate_prx

SCRIPTS = runs.ROOT / "training"
STUDIES = sorted((SCRIPTS / "studies").glob("*.yaml"))


@pytest.mark.parametrize(
    "value",
    ["null and void", "1.0", 1e-5, 3, True, None, [], ["a: b", "c, d"], {"a": {"b": 1e-5}, "c": None}],
)
def test_settings_passed_as_flags_keep_type_and_value(value):
    name = {str: "caption_column", float: "learning_rate", int: "seed", bool: "use_ema", list: "validation_prompts"}
    name = name.get(type(value), "lr_decay_steps" if value is None else "caption_weights")
    if isinstance(value, dict):
        name, value = "transformer_config", runs.TRANSFORMER | {"mlp_ratio": 1e-5}
    base = ["--dataset_name", "scenes", "--transformer_config", "{depth: 1}", "--text_encoder_name_or_path", "x"]
    cfg = parse_config([*base, *training_flag(name, value)])
    assert getattr(cfg, name) == value
    assert type(getattr(cfg, name)) is type(value)


def test_flags_of_evaluations():
    values = {"scenes": True, "quiet": False, "level": None, "num_prompts": 8, "metrics": ["fid", "cmmd"]}
    flags = [part for name, value in values.items() for part in evaluation_flag(name, value)]
    assert flags == ["--scenes", "--num_prompts", "8", "--metrics", "fid", "cmmd"]


# Arms that the study of scenes judges.
JUDGED_ARMS = {"short_captions", "weights_bf16", "baseline", "repa", "repa_expiring", "irepa", "contrastive", "ema"}
JUDGED_ARMS |= {"x_prediction", "tread", "tread_256", "sprint", "sprint_256", "sft", "dino_perceptual"}
JUDGED_ARMS |= {"everything", "latents_kl"}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_files_of_the_repository_are_valid(path, tmp_path):
    study = load_study(path)
    runner = StudyRunner(study, tmp_path, tmp_path / "report", StudyOptions(path), SCRIPTS)
    check_settings(runner, list(study.arms))
    for prerequisite in study.needs.values():
        script, *arguments = prerequisite.command.split()
        assert (runs.ROOT / script).is_file()
        assert prerequisite.makes in arguments
    for seed_dependent in ("seed", "output_dir", "resume_from_checkpoint"):
        assert all(seed_dependent not in study.settings_of(arm) for arm in study.arms)


def test_study_of_scenes_covers_the_published_findings():
    study = load_study(SCRIPTS / "studies" / "scenes.yaml")
    assert {finding.arm for finding in study.findings.values()} == JUDGED_ARMS
    assert len(study.seeds) >= 3
    for name, finding in study.findings.items():
        assert finding.expected or finding.note or finding.at_this_size, name
        figures = [pair[1] - pair[0] for figure, pair in finding.published.items() if not figure.endswith("/s")]
        if figures and all(change > 0 for change in figures):  # FID and the MMDs: lower is better
            assert finding.expected == "worse", name
        elif figures and all(change < 0 for change in figures):
            assert finding.expected == "better", name
        else:
            # published metrics that disagree: no direction, or that of FID
            by_fid = "better" if figures and figures[0] < 0 else "worse"
            assert finding.expected in (None, by_fid) or not figures, name


def ablate(folder: Path, *more: str) -> None:
    ablate_prx.main(["--study", str(folder / "study.yaml"), "--output_dir", str(folder / "out"), *more])


def records(folder: Path) -> dict[str, dict]:
    found = sorted((folder / "out" / "report" / "runs").glob("*/seed_*.json"))
    return {f"{path.parent.name}/{path.stem}": json.loads(path.read_text()) for path in found}


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"settings": {"learning_rat": 1}}, [], "arm baseline: .*--learning_rat "),
        ({"steps": 0}, [], "`steps`"),
        ({"settings": {"contrastive_weight": -1}}, [], "arm baseline: `contrastive_weight`"),
        ({}, ["--seeds", "1", "7"], r"`seeds` has \[7\]"),
        ({}, ["--only", "x"], "`only`.*'x'"),
        ({}, ["--collect"], r"plan\.json"),
        ({}, ["--jobs", "0"], "`jobs`"),
        ({}, ["--hub_model_id", "me/mine"], "`hub_model_id`.*`push_to_hub`"),
    ],
)
def test_invalid_studies_and_flags_are_refused_before_anything_runs(tmp_path, changes, more, message):
    save_study(tmp_path, **changes)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        ablate(tmp_path, *more)
    assert not (tmp_path / "out" / "report").exists()


def test_dry_run_prints_the_commands_of_missing_runs(tmp_path, capsys):
    save_study(tmp_path)
    ablate(tmp_path, "--dry_run", "--only", "tuning")
    lines = capsys.readouterr().out.splitlines()
    # all arms with the first seed come before the second seed
    assert [line.split("seed_")[-1].split("/")[0].split()[0] for line in lines] == ["1"] * 4 + ["2"] * 4
    assert "diverging" not in " ".join(lines)
    train, evaluate = lines[2:4]
    assert f"--pretrained_model_name_or_path {tmp_path}/out/baseline/seed_1" in train
    assert "--max_train_steps 3 --lr_warmup_steps 1" in train
    assert "--seed 1" in train
    assert "--resume_from_checkpoint latest" in train
    assert f"--model {tmp_path}/out/tuned/seed_1 " in evaluate
    assert not (tmp_path / "out" / "report").exists()


def test_output_folder_is_locked(tmp_path):
    path = save_study(tmp_path)
    output_dir = tmp_path / "out"
    runner = StudyRunner(load_study(path), output_dir, output_dir / "report", StudyOptions(path), SCRIPTS)
    with pytest.raises(SystemExit, match="`output_dir`"):
        ablate(tmp_path)
    runner.processes.lock.close()
    ablate(tmp_path, "--dry_run")


def test_study_with_a_finished_and_a_failed_run(tmp_path, capsys):
    save_study(tmp_path, seeds=[1])
    ablate(tmp_path, "--only", "divergence", "--remove_checkpoints")
    found = records(tmp_path)
    statuses = {name: record["status"] for name, record in found.items()}
    assert statuses == {"baseline/seed_1": "finished", "diverging/seed_1": "failed"}
    good, bad = found["baseline/seed_1"], found["diverging/seed_1"]
    assert (good["steps"], good["config"]["seed"], good["config"]["lr_warmup_steps"]) == (3, 1, 1)
    assert [step for step, _ in good["curve"]] == [1, 2, 3]
    assert 0 <= good["evaluations"]["default"]["scene_accuracy"] <= 1
    assert good["seconds_per_step"] >= 0
    assert good["commit"] == json.loads((tmp_path / "out/baseline/seed_1/training.json").read_text())["commit"]
    assert (tmp_path / "out/report/runs/baseline/seed_1.png").is_file()
    assert not list((tmp_path / "out/baseline/seed_1").glob("checkpoint-*"))
    assert (tmp_path / "out/baseline/seed_1/model_index.json").is_file()
    assert "is not finite at step 2" in bad["failures"][0]["message"]
    assert bad["failures"][0]["stage"] == "training"

    report = (tmp_path / "out/report/report.md").read_text()
    assert "**failed**; runs failed" in report
    assert "diverging, seed 1: The loss or its gradient is not finite" in report
    assert "| tuned | 1 | not run |" in report
    capsys.readouterr()
    ablate(tmp_path, "--only", "divergence")  # neither finished nor failed runs are repeated
    assert "0 runs to do, 2 done" in capsys.readouterr().out
    assert records(tmp_path) == found


def test_no_run_starts_after_the_time_limit(tmp_path, capsys):
    save_study(tmp_path)
    ablate(tmp_path, "--time_limit", "0")
    assert records(tmp_path) == {}
    assert capsys.readouterr().out.count("not started: --time_limit") == 6
    assert "0 of 6 planned runs were made" in (tmp_path / "out/report/report.md").read_text()


def test_run_fails_without_the_pipeline_that_it_starts_from(tmp_path):
    path = save_study(tmp_path, seeds=[1])
    register(load_study(path), tmp_path / "out/report", "2026-01-01", "abc")
    failed = {"status": "failed", "trained": False, "evaluations": {}, "machine": {}, "jobs": 1, "threads": 1}
    failed["failures"] = [{"stage": "training", "message": "lost"}]
    write_json(record_path(tmp_path / "out/report", "baseline", 1), failed)
    ablate(tmp_path, "--only", "tuned")
    record = read_record(tmp_path / "out/report", "tuned", 1)
    assert record["status"] == "failed"
    assert record["failures"][0]["message"].endswith("from which it starts, contains no pipeline")
    assert load_study(path).select(["tuned"]) == ["baseline", "tuned"]


def training_processes(folder: Path) -> list[str]:
    """Return the command lines of training processes that use a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(process.read_bytes().decode().replace("\0", " "))
        except OSError:  # it has ended since
            continue
    return [line for line in found if "train_prx.py" in line and str(folder) in line]


@pytest.mark.slow
def test_interrupted_study_resumes(tmp_path, capsys):
    """Interrupt two parallel runs, resume, retry failed runs, and reproduce one row in another folder."""
    path = save_study(tmp_path, steps=40)
    command = [sys.executable, str(runs.ROOT / "training" / "ablate_prx.py"), "--study", str(path)]
    command += ["--output_dir", str(tmp_path / "out"), "--jobs", "2"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(runs.ROOT / "src")})
    checkpoints = tmp_path / "out/baseline/seed_1"
    while not list(checkpoints.glob("checkpoint-[0-9]")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    assert training_processes(tmp_path) == []
    assert records(tmp_path) == {}  # interrupted runs have no record
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
    assert "6 of 6 planned runs were made (3 arms, seeds 1, 2). 2 failed, and 0 continued after" in report
    assert "**too few seeds**" in report

    # an evaluation that a record lacks is repeated, and so is a failed run
    record = found["tuned/seed_1"]
    write_json(record_path(tmp_path / "out/report", "tuned", 1), record | {"evaluations": {}})
    capsys.readouterr()
    ablate(tmp_path, "--retry_failed", "--seeds", "1")
    assert "2 runs to do, 1 done" in capsys.readouterr().out
    again = records(tmp_path)
    scores = [r["tuned/seed_1"]["evaluations"]["default"]["scene_accuracy"] for r in (found, again)]
    assert scores[0] == scores[1]
    assert len(again["diverging/seed_1"]["failures"]) == 2

    ablate_prx.main(["--study", str(path), "--output_dir", str(tmp_path / "row"), "--only", "tuning", "--seeds", "1"])
    rows = [read_record(tmp_path / "row/report", arm, 1) for arm in ("baseline", "tuned")]
    # equal seeds give equal runs, although the first one was interrupted
    assert [row["curve"] for row in rows] == [found[f"{arm}/seed_1"]["curve"] for arm in ("baseline", "tuned")]


@pytest.mark.slow
def test_throughput_is_measured(tmp_path, capsys):
    save_study(tmp_path, seeds=[1])
    ablate(
        tmp_path, "--only", "diverging", "--measure_throughput", "--throughput_steps", "6", "--throughput_repeats", "1"
    )
    # it fails before its last step
    assert "diverging was not timed: ValueError: The loss is not finite" in capsys.readouterr().out
    assert not (tmp_path / "out/report/throughput.json").exists()
    arms = {"baseline": {}, "wide": {"settings": {"transformer_config": runs.TRANSFORMER | {"depth": 12}}}}
    findings = {"wide": {"text": "More blocks take longer.", "arm": "wide"}}
    save_study(tmp_path, seeds=[1], arms=arms, findings=findings)
    for _ in range(2):  # the second call measures nothing
        ablate(tmp_path, "--measure_throughput", "--throughput_steps", "12", "--throughput_repeats", "2")
    timed = json.loads((tmp_path / "out/report/throughput.json").read_text())
    assert [(entry["arm"], entry["reference"], entry["repeat"]) for entry in timed] == [
        ("wide", "baseline", 0),
        ("wide", "baseline", 1),
    ]
    assert all(entry["seconds_arm"] > entry["seconds_reference"] > 0 for entry in timed)
    assert re.search(r"\| 0\.\d\d \[0\.\d\d, ", (tmp_path / "out/report/report.md").read_text())  # its ratio
    assert records(tmp_path) == {}
