"""Scripts as users call them: train on scenes from scratch, then evaluate."""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from training.tools import train_autoencoder, train_scenes_teacher

import runs
import tiny
from diffusers_prx import PRXPipeline, PRXPixelPipeline
from diffusers_prx.schedulers import PRXFlowMatchScheduler
from training import card_prx, evaluate_prx, export_prx, publish_prx, train_prx

SCORES = ("scene_accuracy", "scene_accuracy_novel")
QUICK = ["--scenes", "--num_prompts", "3", "--num_inference_steps", "2", "--seed", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder of a run with a new text encoder, as in the quickstart."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    values = runs.settings(tmp_path_factory.mktemp("trained"), text_encoder_config=runs.TEXT_ENCODER)
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(json.dumps(values | {"max_train_steps": 9, "tokenizer_vocab_size": 300}))
    train_prx.main(["--config", str(recipe), "--max_train_steps", "1"])
    return Path(values["output_dir"])


def test_new_text_encoder_is_saved_in_the_standard_format(trained):
    pipeline = PRXPixelPipeline.from_pretrained(trained)
    assert type(pipeline.text_encoder).__name__ == "T5GemmaEncoderModel"
    assert len(pipeline.tokenizer) == pipeline.text_encoder.config.encoder.vocab_size == 300
    text = "A large red circle é at the top left; 2 λ"
    ids = pipeline.tokenizer(text)["input_ids"]
    assert ids[-1] == pipeline.tokenizer.eos_token_id  # an empty prompt has a token as well
    assert pipeline.tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower()  # nothing is unknown
    assert json.loads((trained / "training.json").read_text())["steps"] == 1


def test_invalid_settings_end_the_script_with_one_line(capsys):
    with pytest.raises(SystemExit, match=r"^error: `dataset_name` is None"):
        train_prx.main([])
    with pytest.raises(SystemExit, match=r"^error: `seed` is 'x'"):
        train_prx.main(["--seed", "x"])


def test_evaluation_prints_the_scores_as_json(trained, tmp_path, capsys):
    evaluate_prx.main(["--model", str(trained), *QUICK, "--output_dir", str(tmp_path / "graded")])
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in (*SCORES, *(f"scene_accuracy_{kind}" for kind in ("shuffled", "chance", "blank", "noise"))):
        assert 0 <= scores[name] <= 1
    assert (scores["level"], scores["seed"], scores["num_prompts"], scores["steps"]) == ("easy", 1, 3, 1)
    report = json.loads((tmp_path / "graded" / "report.json").read_text())
    assert scores.items() <= report.items()
    assert report["config"]["resolution"] == 32
    assert (tmp_path / "graded" / "samples.png").is_file()


def test_evaluation_of_an_untrained_pipeline(tmp_path, capsys):
    vae = tiny.vae_kl()
    nets = runs.nets(PRXFlowMatchScheduler(), vae)
    PRXPipeline(nets.transformer, nets.scheduler, nets.text_encoder, nets.tokenizer, vae, 32).save_pretrained(tmp_path)
    evaluate_prx.main(["--model", str(tmp_path), *QUICK])
    assert set(SCORES) <= json.loads(capsys.readouterr().out.splitlines()[-1]).keys()
    assert (tmp_path / "report.json").is_file()


def test_evaluation_with_a_reference_and_scenes(trained, tmp_path, capsys):
    (tmp_path / "scenes ViT").mkdir()
    encoder = runs.save_teacher(tmp_path / "scenes ViT")
    flags = ["--metrics", f"fid:{encoder}", f"mmd:{encoder}", "--num_images", "20", "--bootstrap", "10"]
    folders = ["--output_dir", str(tmp_path / "graded"), "--cache_dir", str(tmp_path / "cache")]
    evaluate_prx.main(["--model", str(trained), *QUICK, *flags, *folders])
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(SCORES) <= scores.keys()
    assert scores["metrics"]["FID (scenes ViT)"]["num_images"] == 20
    report = json.loads((tmp_path / "graded" / "report.json").read_text())
    assert scores.items() <= report.items()
    assert report["config"]["resolution"] == report["evaluation"]["drawn"]["resolution"] == 32
    for name in ("report.md", "samples.png", "comparison.png"):
        assert (tmp_path / "graded" / name).is_file()


def test_evaluation_without_a_metric_is_rejected(trained, capsys):
    with pytest.raises(SystemExit):
        evaluate_prx.main(["--model", str(trained)])
    assert "`metrics`" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^error: .* has no preprocessor_config\.json"):
        evaluate_prx.main(["--model", str(trained), "--metrics", f"fid:{trained}"])


def test_scripts_suggest_flags_and_expand_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        export_prx.main(["--checkpoint", "x", "--output_dir", "y", "--dytpe", "bf16"])
    assert "unrecognized arguments: --dytpe bf16 (did you mean --dtype?)" in capsys.readouterr().err
    for main, flags in (
        (export_prx.main, ["--output_dir", "y", "--checkpoint"]),
        (card_prx.main, ["--model"]),
        (publish_prx.main, ["--folder"]),
        (evaluate_prx.main, ["--scenes", "--output_dir", "y", "--model"]),
    ):
        with pytest.raises(SystemExit, match=rf"^error: .*{tmp_path}/none"):
            main([*flags, "~/none"])
    assert evaluate_prx.metric("fid:~/encoder") == f"fid:{tmp_path}/encoder"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--level", "impossible"], "invalid choice: 'impossible'"),
        (["--num_prompts", "1"], "--num_prompts must be at least 2"),
        (["--num_inference_steps", "0"], "--num_inference_steps must be at least 1"),
        (["--model", "someone/prx"], "--output_dir is needed for a model from the Hub"),
        (["--metrics", "kid"], "--metrics has 'kid'; accepted: fid, mmd, clip_score, cmmd, dino_mmd"),
        (["--metric_batch_size", "0"], "--metric_batch_size must be at least 1"),
    ],
)
def test_invalid_evaluation_flags_are_rejected(trained, argv, message, capsys):
    with pytest.raises(SystemExit):
        evaluate_prx.main(["--model", str(trained), "--scenes", *argv])
    assert message in capsys.readouterr().err


def test_models_that_cannot_be_graded_are_rejected(trained, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: `level`.*64.*32"):
        evaluate_prx.main(["--model", str(trained), "--scenes", "--level", "medium"])
    with pytest.raises(SystemExit, match=r"^error: `model`"):
        evaluate_prx.main(["--model", str(tmp_path), "--scenes"])
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "_diffusers_version": "0.42.0"}')
    with pytest.raises(SystemExit, match=r"FluxPipeline; accepted: \['PRXPipeline', 'PRXPixelPipeline'\]"):
        evaluate_prx.main(["--model", str(tmp_path), "--scenes"])


@pytest.mark.parametrize("script", [train_prx, evaluate_prx, train_scenes_teacher, train_autoencoder])
def test_help(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    assert "usage: " in capsys.readouterr().out
