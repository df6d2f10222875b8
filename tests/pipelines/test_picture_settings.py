"""Pictures that say how they were made, and draw again from what they say."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

import tiny
from diffusers_prx import read_settings, save_with_settings

PROMPTS = ["a red cat", "sunset"]


def draw(pipe, prompt=PROMPTS, **kwargs):
    return pipe(prompt, **{"num_inference_steps": 2, "guidance_scale": 3.0} | kwargs).images


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
def test_picture_draws_itself_again(ending, tmp_path):
    pipe = tiny.latent_pipeline()
    images = draw(pipe, negative_prompt=["one", "two"], generator=tiny.generators(7, 8), height=32, width=48)
    path = tmp_path / f"picture.{ending}"
    save_with_settings(images[1], path)
    settings = read_settings(path)
    assert settings == read_settings(images[1])
    assert read_settings(PIL.Image.open(path)) == settings
    assert settings["seed"] == 8
    assert settings["scheduler"]["shift"] == 3.0
    assert settings["versions"]["torch"] == torch.__version__
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "height", "width")
    again = pipe(**{name: settings[name] for name in names}, generator=tiny.generators(settings["seed"])[0]).images[0]
    assert np.abs(np.int16(again) - np.int16(images[1])).max() <= 1  # drawn alone: another batch


def test_seed_is_stated_only_if_it_draws_the_picture():
    pipe = tiny.latent_pipeline()
    generator = torch.Generator().manual_seed(3)
    first, second = (read_settings(image) for image in draw(pipe, generator=generator))
    assert (first["seed"], first["image_of_batch"], second["image_of_batch"]) == (3, [0, 2], [1, 2])
    assert [settings["prompt"] for settings in (first, second)] == PROMPTS
    assert read_settings(draw(pipe, "sunset", generator=generator)[0])["seed"] is None  # it has drawn before
    assert read_settings(draw(pipe, "sunset")[0])["seed"] is None


def test_settings_hold_what_was_drawn():
    pipe = tiny.pixel_pipeline()
    pipe.register_to_config(_name_or_path="/home/somebody/my-prx")
    enhanced = lambda prompts: [f"{prompt} on the beach" for prompt in prompts]  # noqa: E731
    image = draw(pipe, "sunset", prompt_enhancer=enhanced, regions=[("a dog", (0, 0, 0.5, 1))], guidance_scale=1)[0]
    settings = json.loads(image.info["prx"])
    assert settings["prompt"] == "sunset on the beach"
    assert settings["regions"] == [["a dog", [0, 0, 0.5, 1]]]
    assert settings["negative_prompt"] is None
    assert settings["model"] == "my-prx"  # not where it is


def test_settings_are_off_with_one_argument(tmp_path):
    image = draw(tiny.latent_pipeline(), "sunset", settings_in_image=False)[0]
    assert image.info == {}
    assert read_settings(image) is None
    with pytest.raises(ValueError, match=r"`image`.*settings_in_image"):
        save_with_settings(image, tmp_path / "picture.png")
    image.save(tmp_path / "plain.png")
    assert read_settings(tmp_path / "plain.png") is None


def test_plain_jpeg_keeps_the_settings(tmp_path):
    """PIL writes the comment of `info` by itself; a broken one is no settings."""
    image = draw(tiny.latent_pipeline(), "sunset")[0]
    image.save(tmp_path / "picture.jpg")
    assert read_settings(tmp_path / "picture.jpg")["prompt"] == "sunset"
    image.save(tmp_path / "picture.jpg", comment=b"\xff{not json")
    assert read_settings(tmp_path / "picture.jpg") is None
