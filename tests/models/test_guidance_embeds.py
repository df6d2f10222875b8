"""The guidance scale as an input of the transformer, and of the pipelines that draw with it."""

import pytest
import torch

import tiny
from diffusers_prx import PRXPixelPipeline, PRXTransformer2DModel
from diffusers_prx.convert import original_tensors


@pytest.fixture
def pipe() -> PRXPixelPipeline:
    pipe = tiny.pixel_pipeline()
    pipe.transformer.add_guidance_embedder()
    tiny.randomize(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: PRXPixelPipeline, scale: float, **changes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 3, "guidance_scale": scale, "generator": generator, "output_type": "pt"}
    return pipe("a red cat", **call, **changes).images


def test_new_input_changes_no_prediction():
    transformer = tiny.pixel_pipeline().transformer
    torch.manual_seed(0)
    width = transformer.config.context_in_dim
    inputs = (torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8]), torch.randn(2, 5, width))
    before = transformer(*inputs).sample
    transformer.add_guidance_embedder()
    torch.testing.assert_close(transformer(*inputs, guidance=torch.tensor([1.0, 7.0])).sample, before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="guidance_embeds"):
        transformer.add_guidance_embedder()


def test_pipeline_draws_with_one_evaluation_of_the_scale(pipe):
    """Against a loop by hand with timesteps and scales, without contexts."""
    embeds, mask, _, _ = pipe.encode_prompt("a red cat", do_classifier_free_guidance=False)
    latents = pipe.config.noise_scale * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(3)
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps):
        with torch.no_grad():
            prediction = pipe.transformer(latents, sigma[None], embeds, mask, guidance=torch.tensor([3.5])).sample
        latents = scheduler.step(prediction, t, latents).prev_sample
    image = draw(pipe, 3.5, height=32, width=32)
    torch.testing.assert_close(image, (latents / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert (image - draw(pipe, 2.0, height=32, width=32)).abs().max() > 1e-3


def test_callback_changes_the_scale(pipe):
    """Changed after the first of three steps to the scale of the whole call, and to another one."""

    def change(to: float):
        def callback(pipe, step, timestep, tensors):
            if step == 0:
                pipe._guidance_scale = to
            return {}

        return callback

    plain = draw(pipe, 3.5)
    assert torch.equal(draw(pipe, 3.5, callback_on_step_end=change(3.5)), plain)
    assert (draw(pipe, 3.5, callback_on_step_end=change(8.0)) - plain).abs().max() > 1e-3


def test_saving_keeps_the_input_and_the_original_refuses_it(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = PRXPixelPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(draw(again, 3.5), draw(pipe, 3.5), rtol=1e-5, atol=1e-5)
    single = PRXTransformer2DModel.from_single_file(
        str(next((tmp_path / "transformer").glob("*.safetensors"))), in_channels=3
    )
    assert single.config.guidance_embeds
    assert pipe.transformer.stored_class_name != "PRXTransformer2DModel"
    with pytest.raises(ValueError, match="guidance_embeds"):
        original_tensors(pipe.transformer)


def test_wrong_use_is_refused(pipe):
    transformer = pipe.transformer
    latents, t, text = torch.zeros(2, 3, 16, 16), torch.ones(2), torch.zeros(2, 1, transformer.config.context_in_dim)
    with pytest.raises(ValueError, match="`guidance`"):
        transformer(latents, t, text)
    with pytest.raises(ValueError, match="`guidance`"):
        transformer(latents, t, text, guidance=torch.ones(3))
    with pytest.raises(ValueError, match="`guidance`"):
        transformer.encode_timesteps(t, 16, 16)
    with pytest.raises(ValueError, match="`guidance`"):
        tiny.pixel_pipeline().transformer(latents, t, text, guidance=torch.ones(2))
    with pytest.raises(ValueError, match="`guide_transformer`"):
        draw(pipe, 3.5, guide_transformer=transformer)
