"""Metrics during training: equal to those of an evaluation, without effect on the run, and refused early."""

import json

import pytest

import emoji
import runs
from diffusers_prx.evaluation.evaluate import EvaluationSettings, evaluate
from runs import assert_same, saved_state

SAMPLES = 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A text encoder and a vision network, saved."""
    folder = tmp_path_factory.mktemp("parts")
    return runs.save_text_encoder(folder / "text_encoder"), str(runs.save_teacher(folder / "teacher"))


def settings(parts, output_dir, **changes):
    text_encoder, teacher = parts
    values = {
        "use_ema": True, "ema_update_every": 1, "ema_decay": 0.3, "validation_steps": 1, "num_validation_samples": 4,
        "prediction_type": "velocity",  # whose pictures are full of their noise
        "validation_inference_steps": 2, "validation_metrics_steps": 3, "validation_metrics_samples": SAMPLES,
        "validation_metrics": ["scenes", f"fid:{teacher}", f"mmd:{teacher}"],
    }  # fmt: skip
    return runs.settings(output_dir, text_encoder, **values | changes)


@pytest.fixture(scope="module")
def measured(parts, tmp_path_factory):
    """Finished run of four steps, measured at the third and the last."""
    return runs.train(settings(parts, tmp_path_factory.mktemp("measured")))


def test_metrics_equal_those_of_an_evaluation_of_the_saved_model(measured, parts, tmp_path):
    record = json.loads((measured.output_dir / "training.json").read_text())
    entries = {entry["step"]: entry for entry in record["validation_history"]}
    assert {step: "validation/FID (teacher)" in entry for step, entry in entries.items()} == {
        1: False, 2: False, 3: True, 4: True,
    }  # fmt: skip
    report = evaluate(
        EvaluationSettings(
            str(measured.output_dir),
            scenes=True,
            metrics=[f"fid:{parts[1]}", f"mmd:{parts[1]}"],
            num_prompts=SAMPLES,
            num_images=SAMPLES,
            num_inference_steps=2,
            guidance_scale=4.0,
            seed=42,
            batch_size=4,
            bootstrap=0,
        ),
        tmp_path / "evaluation",
        tmp_path / "cache",
    ).report
    wanted = {name: metric["value"] for name, metric in report["metrics"].items()}
    wanted |= {name: report[name] for name in ("scene_accuracy", "scene_accuracy_novel")}
    assert {name: entries[4][f"validation/{name}"] for name in wanted} == wanted
    assert len(set(wanted.values())) > 2
    assert entries[3]["validation/MMD (teacher)"] != wanted["MMD (teacher)"]
    assert sorted(path.name for path in (measured.output_dir / "validation").iterdir()) == ["references"]


def test_metrics_do_not_change_the_run_and_resume(measured, parts, tmp_path):
    without = runs.train(settings(parts, tmp_path / "without", validation_metrics=[], num_validation_samples=0))
    runs.copy_checkpoint(measured, 2, tmp_path)
    changes = {"resume_from_checkpoint": "latest", "output_dir": str(tmp_path)}
    resumed = runs.train(measured.cfg.to_dict() | changes)
    assert_same(resumed.state.validation_history, measured.state.validation_history)
    one, other = (saved_state(run.output_dir / "checkpoint-4") for run in (measured, without))
    for state in (one, other):
        del state["run.json"]["state"]["validation_history"]
    assert_same(one, other)


def test_emoji_are_graded(parts, tmp_path):
    folder = str(emoji.save_emoji(tmp_path / "emoji"))
    changes = {"dataset_name": "emoji_scenes", "emoji_dir": folder, "num_validation_samples": 0, "max_train_steps": 1}
    run = runs.train(settings(parts, tmp_path / "run", **changes, validation_metrics=[f"emoji:{parts[1]}"]))
    (entry,) = run.state.validation_history
    assert 0 <= entry["validation/emoji_style/scenes/teacher"] <= 1
    assert "validation/emoji_name_top1/scenes_unseen_names/teacher" in entry


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"train_data_dir": "photos", "dataset_name": None, "validation_metrics": ["scenes"]}, "dataset_name"),
        ({"validation_metrics": ["fid"]}, "num_validation_samples"),
        ({"validation_metrics": ["emoji"]}, "emoji_dir"),
        ({"validation_metrics": ["scenes"], "validation_metrics_steps": 150}, "multiple"),
    ],
)
def test_metrics_that_do_not_fit_the_data_are_refused(changes, flag):
    with pytest.raises(ValueError, match=flag):
        runs.config(**changes)


@pytest.mark.parametrize("metric", ["mmd", "bleu", "fid:missing.pth", "mmd:missing"])
def test_unknown_metrics_and_missing_encoders_are_refused_before_the_first_step(metric, parts, tmp_path):
    with pytest.raises(ValueError, match=f"validation_metrics.*{metric}"):
        runs.start(settings(parts, tmp_path, validation_metrics=[metric], dry_run=True))
