"""Less memory, one line each, as diffusers has it: what of it a CPU can show."""

import pytest
import torch

import tiny

PROMPTS = ["a red cat on the beach", "sunset"]


def draw(pipe, **kwargs):
    return pipe(PROMPTS, generator=tiny.generators(1, 2), num_inference_steps=4, output_type="pt", **kwargs).images


def test_layerwise_casting_to_float8():
    pipe = tiny.latent_pipeline()
    expected = draw(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.transformer.blocks[0].down_proj.weight.dtype == torch.float8_e4m3fn
    assert 0 < (draw(pipe) - expected).abs().max() < 0.3  # seen: 0.09


@pytest.mark.parametrize(
    "level", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading_of_the_whole_pipeline(level):
    pipe = tiny.latent_pipeline()
    expected = draw(pipe)
    pipe.enable_group_offload(onload_device=torch.device("cpu"), **level)
    assert (draw(pipe) - expected).abs().max() < 1e-5


def test_tiled_and_sliced_decoding():
    pipe = tiny.latent_pipeline()
    expected = draw(pipe, height=64, width=64)
    pipe.vae.enable_slicing()
    assert (draw(pipe, height=64, width=64) - expected).abs().max() < 1e-5
    pipe.vae.enable_tiling()
    assert pipe.vae.tile_latent_min_size < 32  # the 32 x 32 latents are more than one tile
    tiled = draw(pipe, height=64, width=64)
    assert 0 < (tiled - expected).abs().mean() < 0.1  # tiles overlap and are blended
