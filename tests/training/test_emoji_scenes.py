"""Runs on scenes of real drawings: what they train on, resuming, and precomputing."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import emoji
import runs
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.data.emoji_scenes import EmojiScenesDataset
from diffusers_prx.training.precompute import precompute
from diffusers_prx.training.recipes import parse_config, parse_run_config
from diffusers_prx.training.stages import build_stages


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The drawings and a text encoder, saved."""
    root = tmp_path_factory.mktemp("parts")
    return {"emoji": str(emoji.save_emoji(root / "emoji")), "text_encoder": runs.save_text_encoder(root / "text")}


def settings(parts, output_dir, **changes):
    values = {"dataset_name": "emoji_scenes", "emoji_dir": parts["emoji"], "num_validation_samples": 4}
    return runs.settings(output_dir, parts["text_encoder"], **values | changes)


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """A finished run of four steps."""
    return runs.train(settings(parts, tmp_path_factory.mktemp("whole"), validation_steps=4))


def losses(run):
    return [entry["loss/flow"] for entry in run.state.history]


def test_training_and_validation_read_their_splits(parts):
    (stage,) = build_stages(TrainingConfig(**settings(parts, "unused")))
    for source, split in ((stage.source, "train"), (stage.held_out, "heldout")):
        expected = EmojiScenesDataset(parts["emoji"], 32, seed=42, split=split)
        for index in (0, 3):
            assert source[index]["caption"] == expected[index]["caption"]
            assert source[index]["image"].tobytes() == expected[index]["image"].tobytes()
    assert len(stage.held_out) == 4
    assert len(stage.source) == 1_000_000


def test_resuming_is_bitwise(whole, parts, tmp_path):
    runs.train(settings(parts, tmp_path, max_train_steps=2, validation_steps=4))
    changes = {"resume_from_checkpoint": "latest", "output_dir": str(tmp_path)}
    resumed = runs.train(whole.cfg.to_dict() | changes)
    assert [entry["step"] for entry in resumed.state.history] == [1, 2, 3, 4]
    assert losses(resumed) == losses(whole)
    assert resumed.state.validation_history[-1] == whole.state.validation_history[-1]
    weights = (run.nets.transformer.state_dict() for run in (whole, resumed))
    for one, other in zip(*(state.values() for state in weights), strict=True):
        assert torch.equal(one, other)


def test_record_and_card_name_the_data(whole, parts):
    record = json.loads((whole.output_dir / "training.json").read_text())
    assert record["config"]["emoji_dir"] == parts["emoji"]
    card = (whole.output_dir / "README.md").read_text()
    assert "`emoji_scenes` (drawn by diffusers-prx, from `emoji`, long captions)" in card
    assert parts["emoji"] not in card


@pytest.mark.parametrize("name", ["emoji_scenes", "scenes"])
def test_scenes_with_a_size_can_be_precomputed(parts, tmp_path, name):
    """The run from the cache has the losses of the run on the fly."""
    changes = {"dataset_name": name, "scenes_size": 10, "train_text_encoder": False, "center_crop": True}
    changes |= {"max_train_steps": 5, "checkpointing_steps": 5}  # two epochs
    fly = runs.train(settings(parts, tmp_path / "fly", **changes))
    values = settings(parts, tmp_path / "run", **changes, precomputed_dir=str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    precompute(TrainingConfig(**values))
    cached = runs.train(values)
    assert losses(cached) == pytest.approx(losses(fly), rel=1e-4)


def test_scenes_size_allows_epochs(parts):
    flags = ["--dataset_name", "emoji_scenes", "--emoji_dir", parts["emoji"], "--resolution", "32"]
    flags += ["--transformer_config", "{depth: 2}", "--text_encoder_name_or_path", "t5", "--train_batch_size", "4"]
    assert parse_run_config([*flags, "--scenes_size", "10", "--num_train_epochs", "2"])[0].max_train_steps == 5
    with pytest.raises(ValueError, match="`num_train_epochs`"):
        parse_run_config([*flags, "--num_train_epochs", "2"])


def test_misspelled_setting_suggests_the_right_one(parts, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        parse_config(["--dataset_name", "emoji_scenes", "--emojidir", parts["emoji"]])
    assert "--emoji_dir" in f"{capsys.readouterr().err}{error.value}"
