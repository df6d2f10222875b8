"""PRXPipeline with every VAE and every kind of text encoder: sampling, saving, loading, and parity with stock."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, Flux2Pipeline

import tiny
import zoo
from diffusers_prx.latents import latent_channels, vae_scale_factor
from diffusers_prx.pipelines import PRXPipeline

VAES = {"kl": tiny.vae_kl, "flux2": zoo.vae_flux2, "dc": tiny.vae_dc, "tiny": zoo.vae_tiny}
TEXTS = {
    "t5": (zoo.t5_encoder, tiny.tokenizer),
    "clip": (zoo.clip_text, zoo.clip_tokenizer),
    "bert": (zoo.bert, tiny.tokenizer),
    "qwen3_vl": (tiny.qwen_text_tower, tiny.tokenizer),
}
PROMPTS = ["a red cat on the beach", "dog"]


def pipeline(name, **changes):
    vae = VAES[name]()
    return tiny.latent_pipeline(vae, transformer=tiny.transformer(in_channels=latent_channels(vae)), **changes)


def draw(pipe, prompt=PROMPTS, **changes):
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", "height": 32, "width": 48}
    return pipe(prompt, **{"generator": tiny.generators(0, 1)} | settings | changes).images


def decode_by_hand(vae, latents):
    """Decode with the VAE's own methods, for FLUX.2 with those of its pipeline."""
    if isinstance(vae, diffusers.AutoencoderKLFlux2):
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
        codes = Flux2Pipeline._unpatchify_latents(latents * std + vae.bn.running_mean.view(1, -1, 1, 1))
    else:
        codes = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
    return (vae.decode(codes).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_images_are_the_decoded_latents(name):
    pipe = pipeline(name)
    latents, images = draw(pipe, output_type="latent"), draw(pipe)
    side = vae_scale_factor(pipe.vae)
    assert pipe.vae_scale_factor == side == {"kl": 2, "flux2": 4, "dc": 4, "tiny": 2}[name]
    assert latents.shape == (2, pipe.transformer.config.in_channels, 32 // side, 48 // side)
    assert images.shape == (2, 3, 32, 48)
    torch.testing.assert_close(images, decode_by_hand(pipe.vae, latents), rtol=0, atol=1e-5)
    assert images.std() > 0.01


@pytest.mark.parametrize("name", VAES)
def test_save_and_load(name, tmp_path):
    pipe = pipeline(name)
    pipe.save_pretrained(tmp_path)
    loaded = PRXPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is type(pipe.vae)
    assert torch.equal(draw(loaded), draw(pipe))
    assert type(loaded.scheduler) is type(pipe.scheduler)


@pytest.mark.parametrize("name", ["kl", "dc", "tiny"])
def test_stock_draws_the_same(name, tmp_path):
    pipe = pipeline(name)
    pipe.save_pretrained(tmp_path)
    stock = diffusers.PRXPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    assert type(stock.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    stock.scheduler = tiny.ExactEuler.from_config(stock.scheduler.config)
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    ours, theirs = (
        p("a red cat", generator=torch.Generator().manual_seed(0), use_resolution_binning=False, **settings).images
        for p in (pipe, stock)
    )
    assert np.abs(ours - theirs).max() < 1e-4


def test_rae_draws_its_own_size(tmp_path):
    vae = zoo.vae_rae(size=32)
    pipe = tiny.latent_pipeline(vae, transformer=tiny.transformer(in_channels=64))
    latents, images = (draw(pipe, width=32, output_type=kind) for kind in ("latent", "pt"))
    assert latents.shape == (2, 64, 8, 8)
    torch.testing.assert_close(images, vae.decode(latents).sample.clamp(0, 1), rtol=0, atol=1e-5)
    assert images.std() > 0.01
    with pytest.raises(ValueError, match=r"`width`.*32 x 32"):
        draw(pipe, width=48)
    assert not pipe.is_stock_compatible
    pipe.save_pretrained(tmp_path)
    loaded = PRXPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded, width=32), images, rtol=0, atol=1e-5)  # measured: 5e-7


def test_stock_refuses_flux2(tmp_path):
    pipe = pipeline("flux2")
    assert not pipe.is_stock_compatible
    pipe.save_pretrained(tmp_path)
    with pytest.raises((ValueError, AttributeError), match="PRXFlowMatchScheduler"):
        diffusers.PRXPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", TEXTS)
def test_text_encoders(name, tmp_path):
    """They load under their public classes, and the images do not depend on the tokenizer's padding side."""
    encoder, tokenizer = TEXTS[name]
    pipe = pipeline("flux2", text_encoder=encoder(), tokenizer=tokenizer("right"))
    pipe.save_pretrained(tmp_path)
    loaded = PRXPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.text_encoder) is type(pipe.text_encoder)
    images = draw(pipe)
    assert torch.equal(draw(loaded), images)
    left = pipeline("flux2", text_encoder=pipe.text_encoder, tokenizer=tokenizer("left"))
    assert torch.equal(draw(left), images)
    assert (draw(pipe, negative_prompt="two small circle") - images).abs().max() > 1e-3


@pytest.mark.parametrize("name", TEXTS)
def test_row_of_a_batch_equals_the_prompt_alone(name):
    encoder, tokenizer = TEXTS[name]
    pipe = pipeline("kl", text_encoder=encoder(), tokenizer=tokenizer())
    whole = draw(pipe, guidance_scale=1.0)
    for row, prompt in enumerate(PROMPTS):
        alone = draw(pipe, prompt, generator=tiny.generators(row)[0], guidance_scale=1.0)
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-5)


def test_padding_does_not_reach_the_text_encoder():
    pipe = pipeline("kl")
    tokens = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, tokenizer_max_length=12)
    longer = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, tokenizer_max_length=40)
    assert tokens[0].shape == (2, 7, tiny.TEXT_WIDTH)
    assert torch.equal(longer[0], tokens[0])  # to the last bit


def test_vae_with_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"`vae`.*12.*4"):
        tiny.latent_pipeline(zoo.vae_flux2())


def test_vae_without_a_scale_is_refused_at_construction(tmp_path):
    zoo.vae_flux2().save_pretrained(tmp_path)
    plain = AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    with pytest.raises(ValueError, match="scaling_factor"):
        tiny.latent_pipeline(plain, transformer=tiny.transformer(in_channels=3))
