"""The latents of each VAE against the VAE's own methods."""

import pytest
import torch
from diffusers import AutoencoderTiny

import tiny
from diffusers_prx import latents


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_kl(pixels):
    vae = tiny.vae_kl(scaling_factor=0.36, shift_factor=0.12)
    gaussian = vae.encode(pixels).latent_dist
    encoded = latents.encode(vae, pixels)
    noise = torch.randn(encoded.mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(encoded.draw(), (gaussian.mode() - 0.12) * 0.36)
    expected = (gaussian.mean + gaussian.std * noise - 0.12) * 0.36
    torch.testing.assert_close(encoded.draw(noise), expected)
    assert (encoded.draw(noise) - encoded.draw()).abs().max() > 1e-3
    codes = encoded.draw()
    torch.testing.assert_close(latents.decode(vae, codes), vae.decode(codes / 0.36 + 0.12).sample)
    assert latents.vae_scale_factor(vae) == 2
    assert latents.latent_channels(vae) == 4


@torch.no_grad()
def test_dc(pixels):
    vae = tiny.vae_dc(scaling_factor=0.41)
    encoded = latents.encode(vae, pixels)
    torch.testing.assert_close(encoded.draw(torch.randn(encoded.mean.shape)), vae.encode(pixels).latent * 0.41)
    torch.testing.assert_close(latents.decode(vae, encoded.mean), vae.decode(encoded.mean / 0.41).sample)
    assert latents.vae_scale_factor(vae) == 4
    assert encoded.mean.shape == (2, 4, 4, 4)


@torch.no_grad()
def test_bf16_vae_gives_float32(pixels):
    vae = tiny.vae_kl().to(torch.bfloat16)
    encoded = latents.encode(vae, pixels)
    assert encoded.mean.dtype == encoded.std.dtype == torch.float32
    assert latents.decode(vae, encoded.mean).dtype == torch.float32


@torch.no_grad()
def test_kl_without_shift(pixels):
    vae = tiny.vae_kl(shift_factor=None)
    torch.testing.assert_close(latents.encode(vae, pixels).mean, vae.encode(pixels).latent_dist.mean * 0.36)


def test_a_vae_without_a_scale_is_refused(pixels):
    vae = tiny.vae_kl()
    vae.register_to_config(scaling_factor=None)
    for call in (lambda: latents.encode(vae, pixels), lambda: latents.decode(vae, torch.zeros(1, 4, 8, 8))):
        with pytest.raises(ValueError, match="scaling_factor"):
            call()


def test_other_classes_are_refused(pixels):
    vae = AutoencoderTiny(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
                          num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    for call in (latents.vae_scale_factor, latents.latent_channels, lambda vae: latents.encode(vae, pixels)):
        with pytest.raises(ValueError, match="AutoencoderTiny"):
            call(vae)
