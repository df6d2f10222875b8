"""Tiny runs: exact resume, splits of the work, saved files, and errors that stop a run."""

import importlib.util
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import runs
import tiny
from diffusers_prx import PRXPipeline, PRXPixelPipeline
from diffusers_prx.fingerprints import tokenizer_fingerprint
from diffusers_prx.techniques.ema import EMAWeights
from diffusers_prx.training import run as run_module
from diffusers_prx.training import trainer
from diffusers_prx.training.bookkeeping import validate
from diffusers_prx.training.distributed import TrainableModules, check_environment
from diffusers_prx.training.export import export_checkpoint
from model_cards import check_card
from runs import assert_same, copy_checkpoint, saved_state, saved_weights
from training import train_prx

PROMPTS = ["a red circle", "a blue square"]
# everything at once: Muon and AdamW, averages, a schedule, dropped captions, validation, a tracker
EVERYTHING = {
    "optimizer": "muon",
    "use_ema": True,
    "ema_update_every": 1,
    "ema_decay": 0.3,
    "max_train_steps": 8,
    "lr_scheduler": "linear",
    "lr_decay_steps": 2,
    "caption_dropout": 0.3,
    "validation_steps": 2,
    "num_validation_samples": 3,
    "validation_prompts": PROMPTS,
    "validation_inference_steps": 2,
    "checkpointing_steps": 1,
    "report_to": "tensorboard",
}
# one optimizer whose update is a smooth function of the gradient, to compare sums in another order
SMOOTH = {"adam_epsilon": 1e-4, "learning_rate": 1e-2, "checkpointing_steps": 1, "max_train_steps": 5}


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    return runs.save_text_encoder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text_encoder):
    """Finished run of eight steps."""
    return runs.train(runs.settings(tmp_path_factory.mktemp("whole"), text_encoder, **EVERYTHING))


@pytest.fixture(scope="module")
def smooth(tmp_path_factory, text_encoder):
    """Finished run of five steps."""
    return runs.train(runs.settings(tmp_path_factory.mktemp("smooth"), text_encoder, **SMOOTH))


def losses(run) -> list[float]:
    return [entry["loss/flow"] for entry in run.state.history]


# Exact resume


def test_resuming_is_bitwise(whole, tmp_path, text_encoder):
    """Also with validation at other steps, which must not use random numbers of the training."""
    copy_checkpoint(whole, 5, tmp_path)
    changes = {"resume_from_checkpoint": "latest", "validation_steps": 7, "output_dir": str(tmp_path)}
    resumed = runs.train(whole.cfg.to_dict() | changes)
    one, other = (saved_state(run.output_dir / "checkpoint-8") for run in (whole, resumed))
    assert {name.partition(".")[0] for name in one} == {"weights", "optimizer", "average", "generators-0", "run"}
    for state in (one, other):
        state_of_run = state["run.json"]["state"]
        assert [entry["step"] for entry in state_of_run["history"]] == list(range(1, 9))
        assert state_of_run["samples_read"] == 32
        del state_of_run["validation_history"]
    assert_same(one, other)
    assert [entry["from_step"] for entry in one["run.json"]["state"]["sessions"]] == [0]
    record = json.loads((tmp_path / "training.json").read_text())  # which code has trained from which step on
    assert [entry["from_step"] for entry in record["sessions"]] == [0, 5]
    assert record["sessions"][1]["commit"] == record["commit"]
    assert losses(resumed) == losses(whole)
    assert resumed.state.validation_history[-1] == whole.state.validation_history[-1]
    assert [e["step"] for e in resumed.state.validation_history] == [2, 4, 7, 8]
    for name in ("transformer", "text_encoder"):  # both had learnt before and after it
        steps = [saved_weights(whole.output_dir / f"checkpoint-{step}", name) for step in (1, 5, 8)]
        for early, late in itertools.pairwise(steps):
            assert any(not torch.equal(early[key], late[key]) for key in early)


def test_repeated_run_is_bitwise_equal(smooth, tmp_path):
    again = runs.train(smooth.cfg.to_dict() | {"output_dir": str(tmp_path)})
    assert_same(saved_state(smooth.output_dir / "checkpoint-5"), saved_state(tmp_path / "checkpoint-5"))
    assert losses(again) == losses(smooth)


def test_finished_run_can_be_exported_again(smooth, tmp_path):
    copy_checkpoint(smooth, 5, tmp_path)
    runs.train(smooth.cfg.to_dict() | {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"})
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert_same(load_file(tmp_path / name), load_file(smooth.output_dir / name))


def test_resume_without_checkpoints_starts_at_step_0(tmp_path, text_encoder, capsys):
    run = runs.start(runs.settings(tmp_path, text_encoder, resume_from_checkpoint="latest"))
    assert run.state.step == 0
    assert "no checkpoint in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "`seed` is 1.* 42"),
        ({"train_batch_size": 8}, "`global_batch_size of stage 0` is 8.* 4"),
        ({"gradient_accumulation_steps": 3}, "`global_batch_size of stage 0` is 12.* 4"),
        ({"max_train_steps": 2}, "step 5.*`max_train_steps`.* 2"),
        ({"resume_from_checkpoint": None}, "`output_dir`.*`--resume_from_checkpoint latest`"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "`resume_from_checkpoint` is 'checkpoint-9'"),
    ],
)
def test_resume_rejects_a_different_run(smooth, changes, message):
    with pytest.raises(ValueError, match=message):
        runs.start(smooth.cfg.to_dict() | {"resume_from_checkpoint": "latest"} | changes)


# Splits of the work


def test_accumulation_equals_a_larger_batch_after_resuming(smooth, tmp_path):
    """After an odd number of micro-batches, counting starts again."""
    copy_checkpoint(smooth, 1, tmp_path)
    changes = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "resume_from_checkpoint": "latest"}
    run = runs.train(smooth.cfg.to_dict() | changes | {"output_dir": str(tmp_path)})
    assert losses(run) == pytest.approx(losses(smooth), rel=1e-5)
    for name in ("transformer", "text_encoder"):
        one, other = (saved_weights(r.output_dir / "checkpoint-5", name) for r in (smooth, run))
        start = saved_weights(smooth.output_dir / "checkpoint-1", name)
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=1e-5, atol=1e-5)
        # a tolerance that can fail: the steps themselves are larger
        assert max((one[key] - start[key]).abs().max() for key in one) > 3e-4


@pytest.mark.parametrize(
    ("variable", "accepted", "refused", "setting"),
    [
        ("MIXED_PRECISION", ["no", "bf16", "BF16", ""], ["fp16", "fp8"], "mixed_precision"),
        ("DYNAMO_BACKEND", ["NO", "no", ""], ["INDUCTOR", "EAGER"], "compile"),
        ("GRADIENT_ACCUMULATION_STEPS", ["2", ""], ["4", "1", "auto"], "gradient_accumulation_steps"),
    ],
)
def test_contradicting_environment_is_rejected(monkeypatch, variable, accepted, refused, setting):
    cfg = runs.config(mixed_precision="bf16", gradient_accumulation_steps=2)
    for value in accepted:
        monkeypatch.setenv(f"ACCELERATE_{variable}", value)
        check_environment(cfg)
    for value in refused:
        monkeypatch.setenv(f"ACCELERATE_{variable}", value)
        with pytest.raises(ValueError, match=f"ACCELERATE_{variable} is {value}.*`--{setting}`"):
            check_environment(cfg)
    for name, value in (("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")):
        monkeypatch.delenv(f"ACCELERATE_{variable}", raising=False)
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=name):  # and the other way round
            check_environment(runs.config(mixed_precision="no"))
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    check_environment(runs.config(compile=True))


def _train_in_two_processes(values: dict) -> None:
    torch.set_num_threads(1)
    os.environ.pop("ACCELERATE_USE_CPU")  # the launcher's help; torchrun does not give it
    run = runs.train(values)
    if run.accelerator.is_main_process:
        record = {"losses": losses(run), "lr": [e["lr"] for e in run.state.history], "n": run.state.samples_read}
        (run.output_dir / "record.json").write_text(json.dumps(record))


def test_two_processes_equal_one_with_a_doubled_batch(smooth, tmp_path):
    debug_launcher(
        _train_in_two_processes,
        (smooth.cfg.to_dict() | {"train_batch_size": 2, "output_dir": str(tmp_path)},),
        num_processes=2,
    )
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["losses"] == pytest.approx(losses(smooth), rel=1e-4)
    assert record["lr"] == [entry["lr"] for entry in smooth.state.history]
    assert record["n"] == smooth.state.samples_read == 20
    one, other = (saved_weights(d / "checkpoint-5", "transformer") for d in (smooth.output_dir, tmp_path))
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-5)


# EMAWeights and validation


def test_average_follows_the_formula_and_is_saved(whole):
    weights = [saved_weights(whole.output_dir / f"checkpoint-{step}", "transformer") for step in range(1, 9)]
    saved = load_file(whole.output_dir / "transformer" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == weights[0].keys()
    for key, wanted in weights[0].items():  # the first update takes the weights as they are
        average = wanted.double()
        for update, later in enumerate(weights[1:], start=1):
            decay = min(0.3, (1 + update) / (10 + update))
            average = decay * average + (1 - decay) * later[key]
        torch.testing.assert_close(saved[key], average.float(), rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(saved[key], weights[-1][key], rtol=1e-4) for key in saved)


@pytest.mark.parametrize("decay", [0.999, 0.5])
def test_decay_without_warm_up_is_constant(decay):
    """From the first update and the initial weights on, and across a resume."""
    trained = TrainableModules({"transformer": torch.nn.Linear(3, 2)})
    weight = trained.transformer.weight
    cfg = runs.config(use_ema=True, ema_decay=decay, ema_warmup=False, ema_update_every=1)
    averages, wanted = EMAWeights(trained, cfg), weight.detach().double()
    for update in range(6):
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(update)))
        if update == 3:
            kept, state = averages.tensors(), averages.state_dict()
            averages = EMAWeights(trained, cfg)
            averages.load_state_dict(state)
            for name, value in averages.tensors().items():
                value.copy_(kept[name])
        averages.update()
        wanted = decay * wanted + (1 - decay) * weight.detach()
        torch.testing.assert_close(averages.tensors()["transformer.weight"], wanted.float(), rtol=1e-5, atol=1e-6)


def test_last_weights_are_saved_without_an_average(smooth):
    for name, file in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        last = saved_weights(smooth.output_dir / "checkpoint-5", name)
        assert_same(load_file(smooth.output_dir / name / f"{file}.safetensors"), last)


def test_validation_does_not_change_the_run(whole):
    before = {name: value.clone() for name, value in whole.nets.transformer.state_dict().items()}
    whole.nets.transformer.train()
    history = whole.state.validation_history
    validate(whole, whole.stages[-1])
    validate(whole, whole.stages[-1])
    again, last = history.pop(), history.pop()
    assert again == last
    assert {f"validation/loss_t{t:.2f}" for t in np.arange(0.05, 1, 0.1)} < last.keys()
    levels = [value for name, value in last.items() if "_t" in name]
    assert last["validation/loss"] == pytest.approx(np.mean(levels))
    assert_same(dict(whole.nets.transformer.state_dict()), before)
    assert whole.nets.transformer.training
    assert [entry["step"] for entry in history] == [2, 4, 6, 8]


# What is left behind


def test_files_of_a_finished_run(whole):
    folder = whole.output_dir
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "PRXPixelPipeline"
    record = json.loads((folder / "training.json").read_text())
    assert record["steps"] == 8
    assert record["config"] == whole.cfg.to_dict()
    assert len(record["history"]) == 8
    assert record["samples_read"] == 32
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert PIL.Image.open(folder / "loss_curve.png").size[0] > 400
    for step in (2, 4, 6, 8):
        assert PIL.Image.open(folder / "validation" / f"step-{step:07d}.png").size == (64, 32)
    assert list((folder / "logs").rglob("events.out.tfevents*"))


def test_model_card_of_a_run(whole):
    card = ModelCard.load(whole.output_dir / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.base_model is None
    assert "{{" not in card.text
    assert f'PRXPixelPipeline.from_pretrained("{whole.output_dir}")' in card.text
    for fact in ("8, batch 4", "muon", "32 px", "x_prediction", "| 0.3 |"):
        assert fact in card.text


def test_saved_pipeline_equals_the_trained_one(whole):
    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline(PROMPTS, num_inference_steps=2, generator=generator, output_type="pt").images

    loaded = PRXPixelPipeline.from_pretrained(whole.output_dir)
    for network in (loaded.transformer, loaded.text_encoder):
        for weight in network.parameters():  # mapped from the file at any address, by which products round (6e-8)
            weight.data = weight.data.clone()
    assert torch.equal(draw(loaded), draw(whole.nets.pipeline(whole.cfg)))
    assert loaded.scheduler.config["clamp"] == 0.05
    assert loaded.tokenizer.model_max_length == loaded.max_tokens == 48


def test_no_tracker_writes_no_logs(smooth):
    assert not (smooth.output_dir / "logs").exists()


def test_missing_tracker_is_rejected(tmp_path, text_encoder):
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    with pytest.raises(ValueError, match=r"`report_to` is trackio.*pip install trackio"):
        runs.start(runs.settings(tmp_path, text_encoder, report_to="trackio"))


# Other kinds of runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Folder with six images, one of them broken and one small."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for place in range(6):
        noise = np.random.default_rng(place).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        size = (20, 30) if place == 1 else (36, 40)
        PIL.Image.fromarray(noise).resize(size).save(folder / f"{place}.png")
        rows.append({"file_name": f"{place}.png", "caption": f"a red circle {place}"})
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def latent(tmp_path_factory, photos, text_encoder):
    """Finished run on an image folder in latent space, with a frozen text encoder, in bf16."""
    vae = tmp_path_factory.mktemp("vae")
    tiny.vae_kl().save_pretrained(vae / "vae")
    return runs.train(
        runs.settings(
            tmp_path_factory.mktemp("latent"), text_encoder,
            dataset_name=None, train_data_dir=str(photos), caption_column="caption", random_flip=True,
            vae_name_or_path=str(vae), prediction_type="velocity", train_text_encoder=False,
            transformer_config=runs.TRANSFORMER | {"patch_size": 2}, mixed_precision="bf16", shift=3.0,
            gradient_accumulation_steps=2, max_sequence_length=5, validation_prompts=PROMPTS, logging_steps=3,
            num_validation_samples=1, validation_inference_steps=2, gradient_checkpointing=True,
        )
    )  # fmt: skip


def test_latent_run_on_an_image_folder(latent, text_encoder):
    state = latent.state
    assert all(np.isfinite(losses(latent)))
    assert [entry["step"] for entry in state.history] == [3, 4]
    # 32 samples out of five, of which one is broken and one too small: they are replaced
    assert state.unreadable > 3
    assert state.unfit > 3
    assert state.samples_read == 32 + state.unreadable + state.unfit
    assert state.upscaled == 0
    assert state.truncated > 20
    assert {p.dtype for p in latent.nets.transformer.parameters()} == {torch.float32}
    assert not any(p.requires_grad for m in (latent.nets.text_encoder, latent.nets.vae) for p in m.parameters())
    pipeline = PRXPipeline.from_pretrained(latent.output_dir)
    assert pipeline.scheduler.shift == 3.0
    assert pipeline.max_tokens == 5
    pairs = (
        (load_file(latent.output_dir / "text_encoder" / "model.safetensors"), text_encoder / "model.safetensors"),
        (pipeline.vae.state_dict(), latent.output_dir / "vae" / "diffusion_pytorch_model.safetensors"),
    )
    for found, file in pairs:
        assert_same(dict(found), load_file(file))
    assert_same(dict(pipeline.vae.state_dict()), dict(tiny.vae_kl().state_dict()))
    drawn = pipeline(PROMPTS, height=32, width=32, num_inference_steps=1, output_type="pt").images
    assert drawn.shape == (2, 3, 32, 32)
    card = check_card(latent.output_dir / "README.md")
    assert f"| data | `{Path(latent.cfg.train_data_dir).name}` (split train) |" in card.text
    assert latent.cfg.train_data_dir not in card.content  # not the path of this machine


def test_export_works_without_the_data(latent, photos, tmp_path):
    away = photos.rename(photos.with_name("away"))
    try:
        export_checkpoint(latent.output_dir / "checkpoint-2", tmp_path, None, runs.CARD_TEMPLATE)
    finally:
        away.rename(photos)
    saved = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert_same(saved, saved_weights(latent.output_dir / "checkpoint-2", "transformer"))


def test_export_in_bf16_rounds_frozen_networks_too(latent, tmp_path):
    export_checkpoint(latent.output_dir / "checkpoint-2", tmp_path, None, runs.CARD_TEMPLATE, torch.bfloat16)
    for file in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        rounded = {name: value.bfloat16() for name, value in load_file(latent.output_dir / file).items()}
        assert_same(load_file(tmp_path / file), rounded)


def test_export_rejects_a_changed_network(latent, tmp_path):
    """The checkpoint does not contain the text encoder; another one would change the images."""
    checkpoint = shutil.copytree(latent.output_dir / "checkpoint-2", tmp_path / "checkpoint-2")
    folder = Path(latent.cfg.text_encoder_name_or_path)
    kept = (folder / "model.safetensors").read_bytes()
    try:
        save_file({k: v + 1 for k, v in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors",
            metadata={"format": "pt"})  # fmt: skip
        with pytest.raises(ValueError, match=r"checkpoint-2.*`frozen_networks`"):
            export_checkpoint(checkpoint, tmp_path / "out", None, runs.CARD_TEMPLATE)
    finally:
        (folder / "model.safetensors").write_bytes(kept)
    assert not (tmp_path / "out").exists()


def test_export_rejects_a_damaged_checkpoint(latent, tmp_path):
    checkpoint = shutil.copytree(latent.output_dir / "checkpoint-2", tmp_path / "checkpoint-2")
    shard = next(checkpoint.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"`checkpoint` .*{shard.name}"):
        export_checkpoint(checkpoint, tmp_path / "out", None, runs.CARD_TEMPLATE)


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory):
    """Finished run on an image folder that trains tokenizer and text encoder."""
    data = tmp_path_factory.mktemp("pictures")
    for place in range(4):
        PIL.Image.new("RGB", (32, 32), (60 * place, 0, 0)).save(data / f"{place}.png")
        (data / f"{place}.txt").write_text("a reddish rectangle " * (place + 1))
    values = runs.settings(
        tmp_path_factory.mktemp("own_tokenizer"), text_encoder_config=runs.TEXT_ENCODER, tokenizer_vocab_size=270,
        dataset_name=None, train_data_dir=str(data),
    )  # fmt: skip
    return runs.train(values)


def test_resume_restores_the_tokenizer(own_tokenizer, tmp_path):
    """From the checkpoint; the changed captions would give another tokenizer."""
    data = shutil.copytree(own_tokenizer.cfg.train_data_dir, tmp_path / "data")
    for file in data.glob("*.txt"):
        file.write_text("something else entirely, of other words")
    values = own_tokenizer.cfg.to_dict() | {"train_data_dir": str(data)}
    copy_checkpoint(own_tokenizer, 2, tmp_path / "resumed")
    resumed, anew = (
        runs.start(values | {"output_dir": str(tmp_path / name), "resume_from_checkpoint": "latest"})
        for name in ("resumed", "anew")
    )
    found = [tokenizer_fingerprint(run.nets.tokenizer) for run in (own_tokenizer, resumed, anew)]
    assert [one == found[0] for one in found] == [True, True, False]


def test_resume_with_the_restored_tokenizer_is_bitwise(own_tokenizer, tmp_path):
    copy_checkpoint(own_tokenizer, 2, tmp_path)
    values = own_tokenizer.cfg.to_dict() | {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"}
    runs.train(values)
    assert_same(*(saved_state(folder / "checkpoint-4") for folder in (own_tokenizer.output_dir, tmp_path)))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        one, other = ((folder / "tokenizer" / file).read_text() for folder in (own_tokenizer.output_dir, tmp_path))
        assert json.loads(one) == json.loads(other)


def test_trained_tokenizer_is_exported_without_the_data(own_tokenizer, tmp_path):
    checkpoint = shutil.copytree(own_tokenizer.output_dir / "checkpoint-4", tmp_path / "checkpoint-4")
    data = Path(own_tokenizer.cfg.train_data_dir)
    away = data.rename(data.with_name("pictures_away"))
    try:
        export_checkpoint(checkpoint, tmp_path / "out", None, runs.CARD_TEMPLATE)
    finally:
        away.rename(data)
    folders = (tmp_path / "out", own_tokenizer.output_dir)
    found, wanted = (PRXPixelPipeline.from_pretrained(folder) for folder in folders)
    text = "a reddish rectangle, and words that it has not seen"
    assert found.tokenizer(text).input_ids == wanted.tokenizer(text).input_ids
    assert found.tokenizer.model_max_length == wanted.tokenizer.model_max_length == 48
    for name in ("transformer", "text_encoder"):
        assert_same(*(dict(getattr(pipeline, name).state_dict()) for pipeline in (found, wanted)))


def fine_tuning(folder: Path, latent, **changes) -> dict:
    values = latent.cfg.to_dict() | {
        "pretrained_model_name_or_path": str(latent.output_dir), "transformer_config": {}, "vae_name_or_path": None,
        "text_encoder_name_or_path": None, "output_dir": str(folder), "max_train_steps": 2, "learning_rate": 1e-8,
        "validation_prompts": [], "num_validation_samples": 0,
    }  # fmt: skip
    return values | changes


def test_start_from_a_saved_pipeline(latent, tmp_path):
    runs.train(fine_tuning(tmp_path, latent))
    for part in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        one, other = (load_file(d / f"{part}.safetensors") for d in (latent.output_dir, tmp_path))
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=0, atol=1e-6)


def test_start_from_a_pixel_space_pipeline(whole, tmp_path):
    values = whole.cfg.to_dict() | {
        "pretrained_model_name_or_path": str(whole.output_dir), "transformer_config": {},
        "text_encoder_name_or_path": None, "output_dir": str(tmp_path),
    }  # fmt: skip
    run = runs.start(values)
    saved = load_file(whole.output_dir / "transformer" / "diffusion_pytorch_model.safetensors")
    assert_same(dict(run.nets.transformer.state_dict()), saved)
    assert all(p.requires_grad for m in (run.nets.transformer, run.nets.text_encoder) for p in m.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "x_prediction"}, "`prediction_type` is x_prediction.* velocity"),
        ({"noise_scale": 2.0}, "`noise_scale` is 2.0.* 1.0"),
        ({"resolution": 34}, "`resolution` must be a multiple of 4 for these networks, got 34"),
        ({"transformer_config": {"depht": 2}}, r"`transformer_config`.*\['depht'\]"),
        ({"transformer_config": runs.TRANSFORMER | {"in_channels": 3}}, "`in_channels` .*is 3.* 4"),
        ({"transformer_config": runs.TRANSFORMER | {"context_in_dim": 8}}, "`context_in_dim` .*is 8.* 16"),
        (
            {"text_encoder_config": {"width": 8}, "train_text_encoder": True},
            r"`text_encoder_config`.*\['width'\]",
        ),
        ({"caption_column": "text"}, "`caption_column` is 'text'.*'image', 'caption'"),
    ],
)
def test_networks_and_data_that_do_not_fit_are_rejected(latent, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        runs.start(fine_tuning(tmp_path, latent, **changes))


def test_shift_other_than_the_pretrained_one_is_logged(latent, tmp_path, caplog):
    run = runs.start(fine_tuning(tmp_path, latent, shift=1.5))
    assert run.nets.scheduler.shift == 1.5
    assert "`shift` is 1.5" in caplog.text


# Errors that stop a run


def test_too_many_unreadable_samples_stop_the_run(latent, tmp_path):
    with pytest.raises(ValueError, match=r"`max_corrupt_share` is 0\.0"):
        runs.train(fine_tuning(tmp_path, latent, max_corrupt_share=0.0))


def test_training_error_is_one_line_and_exit_code_1(tmp_path, text_encoder):
    values = runs.settings(tmp_path / "run", text_encoder, learning_rate=1e30, lr_warmup_steps=0, max_train_steps=9)
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as ended:
        train_prx.main(["--config", str(tmp_path / "recipe.yaml")])
    message = str(ended.value.code)  # a text: Python prints it and exits with 1
    assert message.startswith("error: The loss or its gradient is not finite at step")
    assert "\n" not in message


def test_progress_bar_shows_the_loss_below_messages(tmp_path, text_encoder, capsys):
    values = runs.settings(tmp_path, text_encoder, max_train_steps=3, logging_steps=100, checkpointing_steps=100)
    seen = []

    class Bar(trainer.tqdm):
        def update(self, n=1):
            seen.append(self.postfix)
            return super().update(n)

        @classmethod
        def write(cls, text, **_):
            seen.append(text)

    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer, run_module):
            patch.setattr(module, "tqdm", Bar)
        run = runs.train(values)
    assert re.fullmatch(r"loss=\d+\.\d{4}, lr=1\.0e-03", seen[1])
    assert seen[0].startswith("stored values by data type")
    assert len(seen) == 4
    assert "stored values by data type" not in capsys.readouterr().out
    assert [entry["step"] for entry in run.state.history] == [3]


def test_nan_loss_stops_the_run(tmp_path, text_encoder):
    changes = {"learning_rate": 1e30, "lr_warmup_steps": 0, "max_train_steps": 9, "checkpointing_steps": 100}
    with pytest.raises(ValueError, match=r"step \d .*`learning_rate`"):
        runs.train(runs.settings(tmp_path, text_encoder, **changes))
