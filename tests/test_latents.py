"""Latents of each VAE, against the VAE's own methods, and for FLUX.2 against its pipeline."""

import math

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)

import tiny
import zoo
from diffusers_prx import latents

SCALED = {"kl": tiny.vae_kl, "dc": tiny.vae_dc, "tiny": zoo.vae_tiny}
ALL = {**SCALED, "flux2": zoo.vae_flux2, "rae": zoo.vae_rae, "none": lambda: None}


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def normal(like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_kl_latents(pixels):
    vae = tiny.vae_kl(scaling_factor=0.36, shift_factor=0.12)
    gaussian = vae.encode(pixels).latent_dist
    encoded = latents.encode(vae, pixels)
    noise = normal(encoded.mean)
    torch.testing.assert_close(encoded.draw(), (gaussian.mode() - 0.12) * 0.36)
    expected = (gaussian.mean + gaussian.std * noise - 0.12) * 0.36
    torch.testing.assert_close(encoded.draw(noise), expected)
    assert (encoded.draw(noise) - encoded.draw()).abs().max() > 1e-3
    codes = encoded.draw()
    torch.testing.assert_close(latents.decode(vae, codes), vae.decode(codes / 0.36 + 0.12).sample)
    assert latents.vae_scale_factor(vae) == 2
    assert latents.latent_channels(vae) == 4


@torch.no_grad()
def test_dc_latents(pixels):
    vae = tiny.vae_dc(scaling_factor=0.41)
    encoded = latents.encode(vae, pixels)
    torch.testing.assert_close(encoded.draw(torch.randn(encoded.mean.shape)), vae.encode(pixels).latent * 0.41)
    torch.testing.assert_close(latents.decode(vae, encoded.mean), vae.decode(encoded.mean / 0.41).sample)
    assert latents.vae_scale_factor(vae) == 4
    assert encoded.mean.shape == (2, 4, 4, 4)


@pytest.mark.parametrize("factors", [{}, {"scaling_factor": 1.7, "shift_factor": 0.2}])
@torch.no_grad()
def test_tiny_latents(pixels, factors):
    """Its default scale of 1 is right: its codes are the scaled latents of the VAE that it imitates."""
    vae = zoo.vae_tiny(**factors)
    scale, shift = factors.get("scaling_factor", 1.0), factors.get("shift_factor", 0.0)
    encoded = latents.encode(vae, pixels)
    assert encoded.std is None
    torch.testing.assert_close(encoded.mean, (vae.encode(pixels).latents - shift) * scale)
    torch.testing.assert_close(latents.decode(vae, encoded.mean), vae.decode(encoded.mean / scale + shift).sample)
    assert latents.vae_scale_factor(vae) == 2
    assert encoded.mean.shape == (2, latents.latent_channels(vae), 8, 8)


@torch.no_grad()
def test_flux2_latents_match_its_pipeline():
    vae = zoo.vae_flux2()
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    layers = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16}
    widths = {"in_channels": 12, "joint_attention_dim": 8, "timestep_guidance_channels": 8}
    transformer = Flux2Transformer2DModel(**layers, **widths, axes_dims_rope=(4, 4, 4, 4))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = Flux2Pipeline(scheduler, vae, text_encoder=None, tokenizer=None, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    encoded = latents.encode(vae, images)
    assert encoded.mean.shape == (2, 12, 4, 6)
    torch.testing.assert_close(encoded.draw(), pipe._encode_vae_image(images, None), rtol=1e-6, atol=1e-6)
    call = {"prompt_embeds": torch.zeros(2, 3, 8), "height": 16, "width": 24, "num_inference_steps": 1}
    ours_to_decode = {"callback_on_step_end": lambda *_: {"latents": pipe._pack_latents(encoded.mean)}}
    decoded = pipe(**call, **ours_to_decode, output_type="pt").images
    ours = latents.decode(vae, encoded.mean).clamp(-1, 1)
    assert 0.2 < ours.std() < 1
    torch.testing.assert_close(ours / 2 + 0.5, decoded, rtol=0, atol=1e-5)


@torch.no_grad()
def test_flux2_latents_match_a_loop_over_every_value(pixels):
    """Channel and statistics of each value."""
    vae = zoo.vae_flux2()
    gaussian = vae.encode(pixels).latent_dist
    encoded = latents.encode(vae, pixels)
    noise = normal(encoded.mean)
    drawn = encoded.draw(noise)
    for channel in range(12):
        code, row, column = channel // 4, channel % 4 // 2, channel % 2
        mean, var = vae.bn.running_mean[channel].double(), vae.bn.running_var[channel].double()
        for y in range(4):
            for x in range(4):
                index = (slice(None), code, 2 * y + row, 2 * x + column)
                value = gaussian.mean[index] + gaussian.std[index] * noise[:, channel, y, x]
                expected = (value.double() - mean) / (var + 1e-4).sqrt()
                torch.testing.assert_close(drawn[:, channel, y, x].double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_flux2_statistics_stay_in_training_mode(pixels):
    vae = zoo.vae_flux2()
    expected = latents.encode(vae, pixels).mean
    statistics = [tensor.clone() for tensor in vae.bn.state_dict().values()]
    vae.train()
    assert torch.equal(latents.encode(vae, pixels).mean, expected)
    latents.decode(vae, expected)
    assert all(torch.equal(now, before) for now, before in zip(vae.bn.state_dict().values(), statistics))


@torch.no_grad()
def test_rae_latents(pixels):
    """Its images are in [0, 1], and it normalizes its latents itself."""
    vae = zoo.vae_rae()
    encoded = latents.encode(vae, pixels)
    assert encoded.std is None
    torch.testing.assert_close(encoded.mean, vae.encode((pixels + 1) / 2).latent)
    assert latents.vae_scale_factor(vae) == 4
    assert encoded.mean.shape == (2, latents.latent_channels(vae), 4, 4) == (2, 64, 4, 4)
    images = latents.decode(vae, encoded.mean)
    torch.testing.assert_close(images, vae.decode(encoded.mean).sample * 2 - 1)
    assert images.shape == pixels.shape
    assert latents.fixed_image_size(vae) == 16
    assert latents.fixed_image_size(tiny.vae_kl()) is None


@pytest.mark.parametrize("side", [8, 32])
def test_rae_of_another_size_is_refused(side):
    """It would resize the image, and decode any number of latents to its own size."""
    vae = zoo.vae_rae()
    with pytest.raises(ValueError, match=r"`pixels_pm1`.*16 x 16"):
        latents.encode(vae, torch.zeros(1, 3, side, side))
    with pytest.raises(ValueError, match=r"`latents`.*4 x 4"):
        latents.decode(vae, torch.zeros(1, 64, side // 4, side // 4))


def test_rae_without_rows_and_columns_is_refused():
    assert_refused(zoo.vae_rae(reshape_to_2d=False), "reshape_to_2d")


@torch.no_grad()
def test_without_a_vae_latents_are_pixels(pixels):
    encoded = latents.encode(None, pixels)
    assert torch.equal(encoded.draw(torch.ones_like(pixels)), pixels)
    assert encoded.std is None
    assert torch.equal(latents.decode(None, pixels), pixels)
    assert (latents.vae_scale_factor(None), latents.latent_channels(None)) == (1, 3)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_round_trip_equals_the_own_methods_of_the_vae(name, pixels):
    vae = ALL[name]()
    encoded = latents.encode(vae, pixels)
    side = 16 // latents.vae_scale_factor(vae)
    assert encoded.mean.shape == (2, latents.latent_channels(vae), side, side)
    own = pixels
    if vae is not None:
        low, width = (0, 1) if name == "rae" else (-1, 2)  # range of its pixels
        codes = vae.encode((pixels + 1) / 2 * width + low, return_dict=False)[0]
        own = vae.decode(codes if isinstance(codes, torch.Tensor) else codes.mode()).sample
        own = (own - low) / width * 2 - 1
    torch.testing.assert_close(latents.decode(vae, encoded.draw()), own, rtol=1e-5, atol=1e-5)
    if encoded.std is not None:
        assert (latents.decode(vae, encoded.draw(normal(encoded.mean))) - own).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_bf16_vae_returns_float32(name, pixels):
    vae = ALL[name]()
    exact = latents.encode(vae, pixels).mean
    vae = None if vae is None else vae.to(torch.bfloat16)
    encoded = latents.encode(vae, pixels)
    assert encoded.mean.dtype == torch.float32
    assert encoded.std is None or encoded.std.dtype == torch.float32
    assert latents.decode(vae, encoded.mean.bfloat16()).dtype == torch.float32
    assert (encoded.mean - exact).abs().max() < 0.1 * exact.abs().max()


@torch.no_grad()
def test_kl_without_shift(pixels):
    vae = tiny.vae_kl(shift_factor=None)
    torch.testing.assert_close(latents.encode(vae, pixels).mean, vae.encode(pixels).latent_dist.mean * 0.36)


def test_compiled_vae_is_unwrapped():
    vae = torch.compile(zoo.vae_flux2(), backend="eager")
    assert (latents.vae_scale_factor(vae), latents.latent_channels(vae)) == (4, 12)


@pytest.mark.parametrize("name", ["kl", "dc", "tiny", "none"])
def test_has_one_scale(name):
    assert latents.has_one_scale(ALL[name]())
    assert not latents.has_one_scale(zoo.vae_flux2())
    assert not latents.has_one_scale(zoo.vae_rae())


CALLS = [
    latents.vae_scale_factor,
    latents.latent_channels,
    latents.has_one_scale,
    lambda vae: latents.encode(vae, torch.zeros(1, 3, 16, 16)),
    lambda vae: latents.decode(vae, torch.zeros(1, 4, 8, 8)),
]


def assert_refused(vae, match):
    for call in CALLS:
        with pytest.raises(ValueError, match=match):
            call(vae)


def test_vae_without_a_scale_is_refused():
    vae = tiny.vae_kl()
    vae.register_to_config(scaling_factor=None)
    assert_refused(vae, "scaling_factor")


@pytest.mark.parametrize(("name", "default"), [("kl", 0.18215), ("dc", 1.0)])
def test_default_scale_of_the_class_is_refused(name, default, tmp_path):
    """diffusers fills it in if config.json has none. Passed to `from_pretrained`, the same number is accepted."""
    vae = SCALED[name]()
    settings = {key: value for key, value in vae.config.items() if key != "scaling_factor" and key[0] != "_"}
    cls = type(vae)
    with_default = cls(**settings)
    assert with_default.config.scaling_factor == default
    assert_refused(with_default, "scaling_factor")
    vae.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("\n".join(line for line in config.read_text().splitlines() if '"scaling_factor"' not in line))
    assert_refused(cls.from_pretrained(tmp_path), "scaling_factor")
    latents.latent_channels(cls.from_pretrained(tmp_path, scaling_factor=default))


def test_flux2_loaded_as_the_plain_class_is_refused(tmp_path):
    """It would have no patches, no statistics, and a scale of 0.18215."""
    zoo.vae_flux2().save_pretrained(tmp_path)
    assert_refused(AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False), "scaling_factor")


@pytest.mark.parametrize(
    ("name", "value"), [("scaling_factor", 0.0), ("scaling_factor", math.nan), ("shift_factor", "0")]
)
def test_wrong_scale_is_refused(name, value):
    vae = tiny.vae_kl()
    vae.register_to_config(**{name: value})
    assert_refused(vae, name)


@pytest.mark.parametrize("name", ["kl", "none"])
def test_wrong_tensor_is_refused(name):
    vae = ALL[name]()
    channels = latents.latent_channels(vae)
    pixels = torch.zeros(1, 3, 16, 16)
    for wrong in (pixels.to(torch.uint8), pixels.numpy(), pixels[0], pixels[:, :2]):
        with pytest.raises(ValueError, match="`pixels_pm1`"):
            latents.encode(vae, wrong)
    codes = torch.zeros(1, channels, 8, 8)
    for wrong in (codes.long(), codes[0], torch.zeros(1, channels + 1, 8, 8)):
        with pytest.raises(ValueError, match="`latents`"):
            latents.decode(vae, wrong)


def test_unsupported_statistics_are_refused():
    vae = tiny.vae_kl()
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    assert_refused(vae, "latents_mean")


def test_unknown_vae_class_is_refused():
    vae = AsymmetricAutoencoderKL(norm_num_groups=4, down_block_out_channels=(4,), up_block_out_channels=(4,))
    assert_refused(vae, "AsymmetricAutoencoderKL.*AutoencoderKLFlux2")
    assert_refused(torch.nn.Identity(), "Identity")


@pytest.mark.parametrize("name", ["kl", "dc", "tiny", "flux2"])
def test_size_that_is_no_multiple_is_refused(name):
    """A convolution with stride would silently drop the last column."""
    with pytest.raises(ValueError, match=r"`pixels_pm1`.*16 x 17"):
        latents.encode(ALL[name](), torch.zeros(1, 3, 16, 17))
