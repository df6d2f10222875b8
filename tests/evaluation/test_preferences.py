"""Pairs for preference tuning: the best and the worst of several images, as data that training reads."""

import sys
import types

import numpy as np
import pytest

import emoji
import runs
from diffusers_prx.data.emoji import EmojiDrawings
from diffusers_prx.data.scenes import ScenesDataset
from diffusers_prx.data.sources import load_source
from diffusers_prx.evaluation import scorers
from diffusers_prx.evaluation.emoji_reader import WHITE, EmojiReader
from diffusers_prx.evaluation.preferences import PairSettings, make_pairs, scene_prompts
from diffusers_prx.evaluation.scorers import RankedPrompt, load_scorer
from diffusers_prx.schedulers import PRXXPredictionScheduler
from diffusers_prx.techniques.teachers import load_teacher
from training import make_preference_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    cfg = runs.config(prediction_type="x_prediction")
    runs.nets(PRXXPredictionScheduler()).pipeline(cfg).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def brightness(monkeypatch) -> str:
    """A scorer of a module of the user's own."""
    module = types.ModuleType("my_scorers")
    module.brightness = lambda images, prompts: [float(image.mean()) for image in images]
    module.constant = lambda images, prompts: [1.0] * len(images)
    module.broken = lambda images, prompts: [1.0]
    monkeypatch.setitem(sys.modules, "my_scorers", module)
    return "my_scorers:brightness"


def settings(model: str, *scorers: str, **changes) -> PairSettings:
    values = {"images_per_prompt": 3, "num_inference_steps": 1, "guidance_scale": 1.0, "batch_size": 4}
    return PairSettings(model, dict.fromkeys(scorers, 1.0), **values | changes)


def test_best_and_worst_image_of_each_prompt_are_paired(model, brightness, tmp_path):
    prompts = [RankedPrompt(text) for text in runs.CAPTIONS]
    summary = make_pairs(settings(model, brightness), prompts, tmp_path, "cpu")
    assert summary.startswith("2 pairs in ")
    files = sorted((tmp_path / "images").rglob("*.png"))
    levels = [runs.read_pixels(file).mean().item() for file in files]
    arguments = {"caption_columns": ["caption"]}
    win, lose = (
        load_source(f"{tmp_path}/pairs.parquet", image_column=name, **arguments)
        for name in ("image_win", "image_lose")
    )
    for row, caption in enumerate(runs.CAPTIONS):
        assert win[row]["caption"] == lose[row]["caption"] == caption
        of_prompt = levels[3 * row : 3 * row + 3]
        assert np.array(win[row]["image"]).mean() == pytest.approx(max(of_prompt))
        assert np.array(lose[row]["image"]).mean() == pytest.approx(min(of_prompt))
    before = (tmp_path / "pairs.parquet").read_bytes()
    files[0].unlink()
    make_pairs(settings(model, brightness), prompts, tmp_path, "cpu")
    assert (tmp_path / "pairs.parquet").read_bytes() == before


def test_weights_add_scores_and_equal_scores_make_no_pair(model, brightness, tmp_path):
    prompts = [RankedPrompt(text) for text in runs.CAPTIONS]
    make_pairs(settings(model, brightness), prompts, tmp_path / "plain", "cpu")
    both = PairSettings(model, {brightness: -2.0, "my_scorers:constant": 1.0}, 3, 1, 1.0, batch_size=4)
    make_pairs(both, prompts, tmp_path / "reversed", "cpu")
    plain, backward = (
        load_source(f"{tmp_path}/{name}/pairs.parquet", image_column=column, caption_columns=["caption"])
        for name, column in (("plain", "image_win"), ("reversed", "image_lose"))
    )
    assert [plain.image_hash(row) for row in range(2)] == [backward.image_hash(row) for row in range(2)]
    with pytest.raises(ValueError, match="equal scores"):
        make_pairs(settings(model, "my_scorers:constant"), prompts, tmp_path / "plain", "cpu")
    with pytest.raises(ValueError, match="broken"):
        make_pairs(settings(model, "my_scorers:broken"), prompts, tmp_path / "plain", "cpu")


def test_scenes_are_scored_by_what_is_right():
    prompts = scene_prompts("easy", 2, seed=5)
    scenes = ScenesDataset("easy", 32, 5, split="train", size=2)
    images = [np.array(scenes[number]["image"]) for number in range(2)]
    score = load_scorer("scenes")
    assert score(images, prompts) == [2.0, 2.0]
    assert max(score(images[::-1], prompts)) < 1
    with pytest.raises(ValueError, match="scenes"):
        score(images[:1], [RankedPrompt("a cat")])


@pytest.fixture
def eyes(tmp_path, monkeypatch) -> str:
    """A scorer of emoji by name, which keeps its features in a temporary folder."""
    monkeypatch.setattr(scorers, "REFERENCE_CACHE", tmp_path / "references")
    (tmp_path / "eyes").mkdir()
    return f"emoji={runs.save_teacher(tmp_path / 'eyes', patch_size=16)}"


def test_emoji_are_scored_as_the_accuracy_reads_them(eyes, tmp_path):
    folder = emoji.save_emoji(tmp_path / "emoji")
    drawings = EmojiDrawings(folder, 32)
    asked = drawings.splits["train"][:6]
    images = [drawings.on_ground(drawing, WHITE, 32) for drawing in [*asked[1:], asked[0]]]
    reader = EmojiReader(drawings, load_teacher(eyes.removeprefix("emoji=")), tmp_path)
    wanted = [found.name_probability + found.style_probability for found in reader.read(images, asked)]
    score = load_scorer(eyes, str(folder), 32)
    for caption in ("text", "long"):
        prompts = [RankedPrompt(getattr(drawing, caption)) for drawing in asked]
        assert score(images, prompts) == pytest.approx(wanted, rel=1e-3)  # the features are kept in float16
    assert len(set(wanted)) == len(wanted)
    with pytest.raises(ValueError, match=asked[0].label):
        score(images[:1], [RankedPrompt(asked[0].label)])
    with pytest.raises(ValueError, match="emoji"):
        load_scorer(eyes)
    with pytest.raises(ValueError, match="no-such-network"):
        load_scorer("emoji=no-such-network", str(folder))


def test_emoji_of_one_style_score_nothing(eyes, tmp_path):
    drawings = EmojiDrawings(emoji.save_emoji(tmp_path / "emoji"), 32)
    lonely, other = drawings.splits["train"][0], drawings.splits["train"][-1]
    drawings.style_counts[lonely.name] = 1
    score = scorers.EmojiScorer(drawings, load_teacher(eyes.removeprefix("emoji=")), tmp_path)
    images = [drawings.on_ground(drawing, WHITE, 32) for drawing in (lonely, other)]
    found = score(images, [RankedPrompt(lonely.text), RankedPrompt(other.text)])
    assert found[0] == 0
    assert found[1] > 0


def test_script_pairs_emoji_by_what_is_read(model, eyes, tmp_path, capsys):
    folder = emoji.save_emoji(tmp_path / "emoji")
    flags = ["--model", model, "--emoji", str(folder), "--scorers", eyes, "--num_prompts", "3", "--device", "cpu"]
    flags += ["--num_inference_steps", "1", "--images_per_prompt", "2", "--output_dir", str(tmp_path)]
    make_preference_pairs.main(flags)
    assert "3 pairs" in capsys.readouterr().out
    win, lose = (
        load_source(f"{tmp_path}/pairs.parquet", image_column=name, caption_columns=["caption"])
        for name in ("image_win", "image_lose")
    )
    score = load_scorer(eyes, str(folder), 16)
    trained = {drawing.text for drawing in EmojiDrawings(folder, 1).splits["train"]}
    for row in range(3):
        prompt = RankedPrompt(win[row]["caption"])
        better, worse = score([np.array(pairs[row]["image"]) for pairs in (win, lose)], [prompt, prompt])
        assert better > worse
        assert prompt.text in trained


@pytest.mark.parametrize("name", ["nothing", "no_such_module:score", "math:no_such_function", "math:pi"])
def test_unknown_scorers_are_refused(name):
    with pytest.raises(ValueError, match="`scorers`"):
        load_scorer(name)


def test_script_makes_pairs(model, brightness, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    flags = ["--model", model, "--prompts", str(tmp_path / "prompts.txt"), "--scorers", brightness]
    flags += ["--num_inference_steps", "1"]
    make_preference_pairs.main([*flags, "--output_dir", str(tmp_path), "--device", "cpu"])
    assert "2 pairs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        make_preference_pairs.main([*flags, "--output_dir", str(tmp_path), "--scorer_weights", "1", "2"])
