"""The score of prompt following: one for who draws what is asked, chance for who does not look."""

import dataclasses

import numpy as np
import pytest
import torch

import runs
from diffusers_prx.data.scenes import LEVELS, SPLITS, ScenesDataset, render_scene
from diffusers_prx.evaluation.pictures import pipeline_draw
from diffusers_prx.evaluation.scene_accuracy import grade_scenes, scene_report
from diffusers_prx.evaluation.sheets import scene_sheet
from diffusers_prx.schedulers import PRXXPredictionScheduler

RESOLUTION = {name: level.min_resolution for name, level in LEVELS.items()}


def perfect(level, caption="long", seed=1, size=48):
    """Draws the wanted scene of a prompt, which it looks up."""
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


@pytest.mark.parametrize("caption", ["long", "short"])
@pytest.mark.parametrize("level", list(LEVELS))
def test_a_perfect_drawer(level, caption):
    if caption == "short" and level != "easy":
        pytest.skip("one level is enough for the short captions")
    scores, _, _ = report(perfect(level, caption), level, caption)
    assert scores["scene_accuracy"] == scores["scene_accuracy_novel"] == 1.0
    assert scores["scene_accuracy_shuffled"] == scores["scene_accuracy_chance"] <= 0.1
    assert scores["scene_accuracy_blank"] == scores["scene_accuracy_noise"] == 0.0
    assert all(value == 1.0 for name, value in scores.items() if name.startswith("right_"))
    expected = {"count", "background", "shape", "colour", "size", "texture", "place"}
    expected |= {"relation"} if LEVELS[level].relations else set()
    assert {name.removeprefix("right_") for name in scores if name.startswith("right_")} == expected


def test_pictures_of_other_prompts_are_at_chance():
    draw = perfect("easy")
    scores, _, _ = report(lambda prompts: np.roll(draw(prompts), 1, axis=0), "easy")
    assert scores["scene_accuracy"] <= 0.05
    assert scores["scene_accuracy_novel"] <= 0.05


def test_a_share_of_wrong_pictures_is_that_share_of_the_score():
    draw = perfect("easy")

    def three_in_four(prompts):
        pictures = draw(prompts).copy()
        pictures[::4] = 255 - pictures[::4]
        return pictures

    scores, graded, _ = report(three_in_four, "easy")
    assert scores["scene_accuracy"] == 0.75
    assert [g.right for g in graded[:5]] == [False, True, True, True, False]
    assert scores["right_place"] >= 0.75 > scores["right_background"] - 0.01


def test_held_out_prompts_are_none_of_training_and_novel_ones_have_a_novel_pair():
    _, graded, novel = report(perfect("easy"), "easy")
    train = ScenesDataset("easy", 32, 1, "train", "long", 500)
    trained = {train[i]["scene"] for i in range(500)}
    assert not trained & {g.wanted for g in graded + novel}
    pairs = {(o.colour, o.shape) for scene in trained for o in scene.objects}
    assert all((g.wanted.objects[0].colour, g.wanted.objects[0].shape) not in pairs for g in novel)
    assert all((o.colour, o.shape) in pairs for g in graded for o in g.wanted.objects)


def test_the_pipeline_as_a_drawer():
    """A picture depends on its prompt and place, not on the size of the batch."""
    nets = runs.nets(PRXXPredictionScheduler())
    pipeline = nets.pipeline(runs.config(noise_scale=1.0, max_sequence_length=24))
    pipeline.set_progress_bar_config(disable=True)
    options = {"resolution": 32, "num_inference_steps": 2, "guidance_scale": 2.0, "seed": 3}
    prompts = [*runs.CAPTIONS, runs.CAPTIONS[0]]
    one, two = (pipeline_draw(pipeline, **options, batch_size=size)(prompts) for size in (3, 2))
    assert one.shape == (3, 32, 32, 3)
    assert one.dtype == np.uint8
    assert np.abs(one.astype(int) - two).max() <= 1
    assert not np.array_equal(one[0], one[2])  # the same prompt from another noise
    other = pipeline_draw(pipeline, **options | {"seed": 4}, batch_size=3)(prompts)
    assert not np.array_equal(one[0], other[0])
    assert torch.is_grad_enabled()


def test_the_sheet_of_pictures(tmp_path):
    scenes = ScenesDataset("easy", 32, 0)
    graded = grade(perfect("easy"), "easy", "heldout", 5)
    graded[0] = dataclasses.replace(graded[0], right=False, image=np.asarray(render_scene(scenes[0]["scene"], 64)))
    scene_sheet(graded, "title", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 5000
