"""Sampling presets: their steps by prediction type, stored steps, pictures, and what they leave unchanged."""

import pytest
import torch

import tiny
from diffusers_prx import (
    PRXPipeline,
    PRXPixelImg2ImgPipeline,
    PRXPixelPipeline,
    apply_preset,
    fast_scheduler,
    fast_sigmas,
)

PROMPT = "a red cat"


def draw(pipe, **kwargs):
    return pipe(PROMPT, generator=tiny.generators(1), guidance_scale=1, output_type="pt", **kwargs).images


def test_the_prediction_type_decides_the_fast_steps():
    velocity, clean = tiny.latent_pipeline(), tiny.pixel_pipeline()
    assert (velocity.config["prediction_type"], clean.config["prediction_type"]) == ("velocity", "x_prediction")
    assert velocity.preset_steps == {"exact": 28, "fast": 14, "fastest": 7}
    assert clean.preset_steps == {"exact": 28, "fast": 9, "fastest": 7}


def test_presets_equal_the_calls_that_the_documentation_names():
    pipe = tiny.latent_pipeline(preset_steps={"exact": 5, "fast": 4, "fastest": 2})
    fast = PRXPipeline.from_pipe(pipe, scheduler=fast_scheduler())
    expected = {
        "exact": draw(pipe, num_inference_steps=5),
        "fast": draw(fast, sigmas=fast_sigmas(4)),
        "fastest": draw(pipe, num_inference_steps=2),
    }
    scheduler = pipe.scheduler
    for preset, images in expected.items():
        with_preset, settings = apply_preset(pipe, preset)
        assert torch.equal(draw(with_preset, **settings), images)
    assert pipe.scheduler is scheduler
    assert not torch.equal(expected["fast"], expected["fastest"])
    with_preset, settings = apply_preset(pipe, "fast", 6)
    assert torch.equal(draw(with_preset, **settings), draw(fast, sigmas=fast_sigmas(6)))


def test_a_distilled_network_draws_its_own_steps_without_guidance(tmp_path):
    """Its "fast" has the noise levels that it learned, not those of the fast solver."""
    steps = dict.fromkeys(("exact", "fast", "fastest"), 3)
    tiny.pixel_pipeline(preset_steps=steps, preset_guidance_scale=1).save_pretrained(tmp_path)
    student = PRXPixelPipeline.from_pretrained(tmp_path)
    for pipe in (student, PRXPixelPipeline.from_pipe(PRXPixelImg2ImgPipeline.from_pipe(student))):
        for preset in steps:
            with_preset, settings = apply_preset(pipe, preset)
            assert with_preset is pipe
            assert settings == {"num_inference_steps": 3, "guidance_scale": 1.0}
    with pytest.raises(ValueError, match="`preset_guidance_scale`"):
        tiny.pixel_pipeline(preset_guidance_scale=0.5)


def test_an_editing_pipeline_takes_presets():
    pipe = PRXPixelImg2ImgPipeline.from_pipe(tiny.pixel_pipeline(preset_steps={"fast": 3}))
    with_preset, settings = apply_preset(pipe, "fast")
    assert type(with_preset) is PRXPixelImg2ImgPipeline
    assert len(settings["sigmas"]) == 3
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(draw(with_preset, image=image, strength=0.0, **settings), image)


def test_steps_are_stored_with_the_pipeline(tmp_path):
    pipe = tiny.latent_pipeline(preset_steps={"fast": 20})
    pipe.save_pretrained(tmp_path)
    assert PRXPipeline.from_pretrained(tmp_path).preset_steps == {"exact": 28, "fast": 20, "fastest": 7}
    tiny.latent_pipeline().save_pretrained(tmp_path / "default")
    assert "preset_steps" not in (tmp_path / "default" / "model_index.json").read_text()


@pytest.mark.parametrize("steps", [{"slow": 3}, {"fast": 0}, {"fast": 2.5}, {"fast": True}, [3], "fast"])
def test_wrong_steps_are_refused(steps):
    with pytest.raises(ValueError, match="preset_steps"):
        tiny.latent_pipeline(preset_steps=steps)


@pytest.mark.parametrize("preset", ["best", None, ["fast"]])
def test_an_unknown_preset_is_refused(preset):
    with pytest.raises(ValueError, match="`preset`"):
        apply_preset(tiny.latent_pipeline(), preset)
