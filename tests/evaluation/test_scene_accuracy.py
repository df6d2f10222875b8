"""Prompt-following scores: 1 for correct images, chance level for images of other prompts."""

import dataclasses

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image

import runs
from diffusers_prx.data.scenes import LEVELS, SPLITS, ScenesDataset
from diffusers_prx.evaluation.generation import pipeline_draw
from diffusers_prx.evaluation.image_grids import graded_sheet, pair_sheet
from diffusers_prx.evaluation.scene_accuracy import grade_scenes, scene_report
from diffusers_prx.schedulers import PRXXPredictionScheduler

RESOLUTION = {name: level.min_resolution for name, level in LEVELS.items()}


def perfect(level, caption="long", seed=1, size=48):
    """Return a function that renders the expected scene of every prompt."""
    known = {}
    for split in SPLITS[1:]:
        scenes = ScenesDataset(level, RESOLUTION[level], seed, split, caption, size)
        known |= {scenes[i]["caption"]: np.asarray(scenes[i]["image"]) for i in range(size)}
    return lambda prompts: np.stack([known[prompt] for prompt in prompts])


def grade(draw, level, split, size, caption="long"):
    scenes = ScenesDataset(level, RESOLUTION[level], 1, split, caption, size)
    images = draw([scenes[index]["caption"] for index in range(size)])
    return grade_scenes(images, level, split, 1, size, caption)


def report(draw, level, caption="long", size=48):
    graded, novel = (grade(draw, level, split, size, caption) for split in ("heldout", "novel"))
    assert len(graded) == len(novel) == size
    return scene_report(graded, novel, level, caption, 1), graded, novel


@pytest.mark.parametrize(("level", "caption"), [*((level, "long") for level in LEVELS), ("easy", "short")])
def test_correct_images_score_one(level, caption):
    scores, _, _ = report(perfect(level, caption), level, caption)
    assert scores["scene_accuracy"] == scores["scene_accuracy_novel"] == 1.0
    assert scores["scene_accuracy_shuffled"] == scores["scene_accuracy_chance"] <= 0.1
    assert scores["scene_accuracy_blank"] == scores["scene_accuracy_noise"] == 0.0
    assert all(value == 1.0 for name, value in scores.items() if name.startswith("right_"))
    expected = {"count", "background", "shape", "color", "size", "texture", "place"}
    expected |= {"relation"} if LEVELS[level].relations else set()
    assert {name.removeprefix("right_") for name in scores if name.startswith("right_")} == expected


def test_images_of_other_prompts_score_at_chance_level():
    draw = perfect("easy")
    scores, _, _ = report(lambda prompts: np.roll(draw(prompts), 1, axis=0), "easy")
    assert scores["scene_accuracy"] <= 0.05
    assert scores["scene_accuracy_novel"] <= 0.05


def test_score_is_the_share_of_correct_images():
    draw = perfect("easy")

    def three_in_four(prompts):
        pictures = draw(prompts).copy()
        pictures[::4] = 255 - pictures[::4]
        return pictures

    scores, graded, _ = report(three_in_four, "easy")
    assert scores["scene_accuracy"] == 0.75
    assert [g.right for g in graded[:5]] == [False, True, True, True, False]
    assert scores["right_place"] >= 0.75 > scores["right_background"] - 0.01


def test_held_out_prompts_differ_from_training_and_novel_ones_have_new_pairs():
    _, graded, novel = report(perfect("easy"), "easy")
    train = ScenesDataset("easy", 32, 1, "train", "long", 500)
    trained = {train[i]["scene"] for i in range(500)}
    assert not trained & {g.scene for g in graded + novel}
    pairs = {(o.color, o.shape) for scene in trained for o in scene.objects}
    assert all((g.scene.objects[0].color, g.scene.objects[0].shape) not in pairs for g in novel)
    assert all((o.color, o.shape) in pairs for g in graded for o in g.scene.objects)


def test_images_depend_on_prompt_and_index_but_not_on_the_batch_size():
    nets = runs.nets(PRXXPredictionScheduler())
    pipeline = nets.pipeline(runs.config(noise_scale=1.0, max_sequence_length=24))
    pipeline.set_progress_bar_config(disable=True)
    options = {"resolution": 32, "num_inference_steps": 2, "guidance_scale": 2.0, "seed": 3}
    prompts = [*runs.CAPTIONS, runs.CAPTIONS[0]]
    one, two = (pipeline_draw(pipeline, **options, batch_size=size)(prompts) for size in (3, 2))
    assert one.shape == (3, 32, 32, 3)
    assert one.dtype == np.uint8
    assert np.abs(one.astype(int) - two).max() <= 1
    assert not np.array_equal(one[0], one[2])  # the same prompt with other noise
    other = pipeline_draw(pipeline, **options | {"seed": 4}, batch_size=3)(prompts)
    assert not np.array_equal(one[0], other[0])
    assert torch.is_grad_enabled()


def titles_and_labels(monkeypatch):
    """Return a list that collects titles and labels of all figures saved from now on."""
    written: list[tuple[str, str]] = []
    savefig = matplotlib.figure.Figure.savefig

    def seen(figure, path, **options):
        written.extend((axes.get_title(), axes.get_xlabel()) for axes in figure.axes)
        savefig(figure, path, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", seen)
    return written


def test_sheet_describes_the_differences(tmp_path, monkeypatch):
    written = titles_and_labels(monkeypatch)
    draw = perfect("easy")
    scenes = ScenesDataset("easy", 32, 1, "heldout", "long", 5)
    images = draw([scenes[index]["caption"] for index in range(5)])
    images[0] = images[1]
    graded_sheet(grade_scenes(images, "easy", "heldout", 1, 5, "long"), "title", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 500
    thing = scenes[1]["scene"].objects[0]
    assert written[0][0].endswith("[wrong]")
    read = " ".join(written[0][1].split())
    assert read.startswith("read: ")
    assert f"{thing.size} {thing.color} {thing.shape} at the " in read
    assert [label for _, label in written[1:]] == [""] * 4


def test_dollar_signs_in_captions_are_not_parsed_as_formulas(tmp_path, monkeypatch):
    """matplotlib would parse the text after a dollar sign as a formula, and fail on an invalid one."""
    written = titles_and_labels(monkeypatch)
    text = r"price $\frac{1$ and $x$"
    (graded,) = grade(perfect("easy"), "easy", "heldout", 1)
    graded = dataclasses.replace(graded, prompt=text, right=False, read_instead=text)
    graded_sheet([graded], text, tmp_path / "sheet.png")
    pair_sheet([(text, graded.image, graded.image)], text, tmp_path / "pairs.png")
    assert [title.split("\n")[0] for title, _ in written] == [text, text, ""]
