"""Model cards state what was run and what was measured of the stored weights, and nothing else."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import runs
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.hub.cards import begun_stages, recipe_text, techniques, without_folders, write_card
from diffusers_prx.hub.publishing import CARD_MARKER
from model_cards import check_card
from training import card_prx, evaluate_prx

QUICK = ["--scenes", "--num_prompts", "2", "--num_inference_steps", "1", "--guidance_scale", "2"]


def evaluate(folder: Path, *flags: str) -> dict:
    evaluate_prx.main(["--model", str(folder), *QUICK, *flags])
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two steps from scratch on scenes, with the card that training writes."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    text = {"text_encoder_config": runs.TEXT_ENCODER, "tokenizer_vocab_size": 300}
    validation = {"validation_inference_steps": 2, "num_validation_samples": 2, "validation_prompts": runs.CAPTIONS}
    return runs.train(runs.settings(folder, max_train_steps=2, **text, **validation)).output_dir


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_card_without_evaluation(trained):
    card = check_card(trained / "README.md")
    assert card.data.eval_results is None
    assert "No evaluation of these weights has been run." in card.text
    assert "scene_accuracy" not in card.text
    record = json.loads((trained / "training.json").read_text())
    loss = record["validation_history"][-1]["validation/loss"]
    assert f"{loss:.4f}, the mean over ten noise levels" in card.text
    assert f"| commit | {record['commit']} |" in card.text
    assert f"{record['parameters']:,} parameters" in card.text
    weights = [file for part in ("transformer", "text_encoder") for file in (trained / part).glob("*.safetensors")]
    assert list(trained.glob("checkpoint-*/*.safetensors"))  # which do not count
    assert f"| {sum(file.stat().st_size for file in weights) / 1e6:.1f} MB of safetensors, float32 |" in card.text
    assert (card.data.license, card.data.language) == ("apache-2.0", "en")
    pictures = [example["output"]["url"] for example in card.data.widget]
    assert [example["text"] for example in card.data.widget] == runs.CAPTIONS
    sheet = PIL.Image.open(trained / "validation" / "step-0000002.png")
    for place, file in enumerate(pictures):
        expected = sheet.crop((32 * place, 0, 32 * (place + 1), 32))
        assert PIL.Image.open(trained / file).tobytes() == expected.tobytes()


def test_recipe_in_the_card_reproduces_the_config(trained):
    text = (trained / "README.md").read_text()
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    cfg = TrainingConfig(**json.loads((trained / "training.json").read_text())["config"])
    again = TrainingConfig(**recipe)
    runtime_options = {
        name: getattr(cfg, name) for name in ("output_dir", "report_to", "checkpointing_steps", "logging_steps")
    }
    assert replace(again, **runtime_options) == cfg


def test_code_in_the_card_runs(trained, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert PIL.Image.open("image.png").size == (32, 32)


def test_evaluation_is_added_to_the_card_with_its_settings(run):
    report = evaluate(run, "--seed", "5")
    card = check_card(run / "README.md")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert set(results) == {"scene_accuracy", "scene_accuracy_novel"}
    for name, result in results.items():
        assert result.metric_value == report[name]
        sampling = {"resolution": 32, "num_inference_steps": 1, "guidance_scale": 2.0, "seed": 5}
        assert result.metric_args == sampling | {"num_prompts": 2, "caption": "long"}
    assert results["scene_accuracy_novel"].dataset_split == "novel"
    assert f"| scene_accuracy | {report['scene_accuracy']:.4f} |" in card.text
    assert report["evaluation"]["drawn"]["pipeline_fingerprint"] in card.text
    assert "![Pictures of the evaluation below, the first ones, not picked](samples.png)" in card.text
    assert "No evaluation" not in card.text
    assert str(run) not in card.content


def test_card_of_a_released_model_keeps_license_and_source(run, tmp_path, capsys):
    evaluate(run)
    (run / "README.md").unlink()
    released = tmp_path / "model_cards" / "small"
    flags = ["--load_from", "model_cards/small", "--license", "cc-by-4.0", "--output_dir", str(released)]
    card_prx.main(["--model", str(run), *flags])
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {released / 'README.md'}"
    card = check_card(released / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.model_name == "small"
    assert 'from_pretrained("model_cards/small")' in card.text
    assert card.data.eval_results
    assert str(tmp_path) not in card.content
    names = {str(file.relative_to(released)) for file in released.rglob("*") if file.is_file()}
    assert names == {"README.md", "training.json", "loss_curve.png", "samples.png", "widget/0.png", "widget/1.png"}
    evaluate(run, "--seed", "7")
    again = check_card(run / "README.md")
    assert again.data.license == "cc-by-4.0"
    assert 'from_pretrained("model_cards/small")' in again.text
    assert again.data.eval_results[0].metric_args["seed"] == 7


def test_report_of_other_weights_is_refused(run):
    evaluate(run)
    file = run / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file({key: value + (key == name) * 1e-3 for key, value in weights.items()}, file, {"format": "pt"})
    before = (run / "README.md").read_text()
    with pytest.raises(SystemExit, match=r"report\.json belongs to other weights"):
        card_prx.main(["--model", str(run)])
    assert (run / "README.md").read_text() == before
    (run / "report.json").unlink()
    card_prx.main(["--model", str(run)])
    assert check_card(run / "README.md").data.eval_results is None


def test_card_of_the_user_is_kept(run, tmp_path):
    own = (run / "README.md").read_text().replace(CARD_MARKER, "") + "More.\n"
    (run / "README.md").write_text(own)
    evaluate(run)
    with pytest.raises(SystemExit, match=r"README\.md"):
        card_prx.main(["--model", str(run)])
    cfg = json.loads((run / "training.json").read_text())["config"]
    runs.train(cfg | {"output_dir": str(run), "resume_from_checkpoint": "latest"})  # finished: exports again
    assert (run / "README.md").read_text() == own
    with pytest.raises(ValueError, match=r"`folder`.*training\.json"):
        write_card(tmp_path, runs.CARD_TEMPLATE)


def test_pretrained_networks_are_named_and_the_license_is_unknown(run):
    """Local paths are not published."""
    record = json.loads((run / "training.json").read_text())
    record["config"] |= {"text_encoder_config": {}, "transformer_config": {}, "caption_column": "long"}
    record["config"] |= {"repa_weight": 0.5, "repa_teacher": str(run), "repa_block": 1, "dataset_name": None}
    record["config"] |= {
        "pretrained_model_name_or_path": "Photoroom/prx-512-t2i",
        "data_sources": [{"name": "me/photos", "weight": 2.0}, {"name": str(run / "tars"), "weight": 1.0}],
        "stages": [{"max_train_steps": 1}, {"max_train_steps": 1, "repa_weight": 0.0, "repa_teacher": None}],
    }
    (run / "training.json").write_text(json.dumps(record))
    write_card(run, runs.CARD_TEMPLATE, load_from="me/prx")
    card = check_card(run / "README.md")
    assert card.data.license == "unknown"
    assert card.data.language is None
    assert "No license has been stated" in card.text
    assert (card.data.base_model, card.data.datasets) == ("Photoroom/prx-512-t2i", ["me/photos"])
    assert "- Started from: `Photoroom/prx-512-t2i`, under its own license." in card.text
    assert "- Teacher of the alignment: `copy`, under its own license." in card.text
    assert "`me/photos` (split train, weight 2), `tars` (split train, weight 1)" in card.text
    assert "REPA (arXiv 2410.06940): weight 0.5, block 1, with `copy`, in stage 0" in card.text
    assert "| 1 | 1 | 32 px | 4 |" in card.text
    assert str(run) not in card.content


def test_card_lists_the_techniques_in_use():
    plain = runs.config(prediction_type="velocity")
    assert techniques([plain]) == []
    routed = runs.config(route_ratio=0.5, route_range=[0, 1], optimizer="muon", lpips_weight=0.1)
    assert [text.partition(" ")[0] for text in techniques([routed])] == ["the", "TREAD", "LPIPS", "Muon"]
    fused = runs.TRANSFORMER | {"fusion_range": [0, 1]}
    sprint = runs.config(route_ratio=0.75, route_range=[0, 1], transformer_config=fused)
    assert any(text.startswith("SPRINT (arXiv 2510.21986): 75% of the tokens") for text in techniques([sprint]))


def test_caption_weights_are_listed(run):
    record = json.loads((run / "training.json").read_text())
    record["config"]["caption_weights"] = {"long": 0.5, "short": 0.25}
    (run / "training.json").write_text(json.dumps(record))
    text = write_card(run, runs.CARD_TEMPLATE).read_text()
    assert "level easy, long (0.5) and short (0.25) captions" in text


def test_stages_that_have_not_begun_are_left_out():
    cfg = runs.config(stages=[{"max_train_steps": 3}, {"max_train_steps": 2}])
    assert [len(begun_stages(cfg, step)) for step in (0, 1, 3, 4, 5)] == [1, 1, 1, 2, 2]


def test_recipe_contains_no_local_paths(tmp_path):
    cfg = runs.config(repa_weight=0.5, repa_teacher=str(tmp_path), repa_cache_dir=str(tmp_path), repa_block=1)
    recipe = yaml.safe_load(recipe_text(cfg))
    assert recipe["repa_teacher"] == tmp_path.name
    assert "repa_cache_dir" not in recipe
    assert "output_dir" not in recipe


def test_metrics_become_metadata(run, tmp_path):
    """Names are adapted to the Hub's format, and the unbiased estimator is listed as well."""
    teacher = tmp_path / "a teacher"
    teacher.mkdir()
    runs.save_teacher(teacher)
    flags = ["--metrics", f"fid:{teacher}", f"mmd:{teacher}", "--num_images", "20", "--bootstrap", "0"]
    report = evaluate(run, *flags, "--cache_dir", str(tmp_path / "cache"))
    card = check_card(run / "README.md")
    found = {result.metric_name: result for result in card.data.eval_results if result.dataset_name == "scenes"}
    assert set(found) == {"FID (a teacher)", "MMD (a teacher)", "MMD (a teacher), unbiased"}
    fid = found["FID (a teacher)"]
    assert fid.metric_value == pytest.approx(report["metrics"]["FID (a teacher)"]["value"])
    assert (fid.metric_type, fid.dataset_split, fid.metric_args["encoder"]) == ("fid", "heldout", "a teacher")
    assert (fid.metric_args["num_images"], fid.metric_args["num_reference"]) == (20, 20)
    assert str(tmp_path) not in without_folders(report)["metrics"]["FID (a teacher)"]["metric"]
    assert torch.isfinite(torch.tensor([result.metric_value for result in card.data.eval_results])).all()
