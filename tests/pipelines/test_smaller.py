"""Less memory with one line each: casting, quantization, offloading, tiling; as far as a CPU can test them."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from torch import nn

import tiny
from diffusers_prx import PRXPipeline

PROMPTS = ["a red cat on the beach", "sunset"]
CPU = torch.device("cpu")
# parts of the transformer that layerwise casting leaves unchanged
HIGH_PRECISION = ("norm", "time_in", "resolution", "modulation", "img_in", "txt_in", "final_layer", "mask_token")
TOLERANCE = 1e-5  # seen: 6e-7


def draw(pipe, **kwargs):
    return pipe(PROMPTS, generator=tiny.generators(1, 2), num_inference_steps=4, output_type="pt", **kwargs).images


@torch.no_grad()
def with_weights(make, weight_of):
    """Make a pipeline and replace the weights of its linear layers by `weight_of(name, weight)`."""
    pipe = make()
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(weight_of(name, module.weight))
    return pipe


def row_maxima(weight):
    return weight.abs().amax(dim=1, keepdim=True)


def own_options_pipeline():
    return tiny.latent_pipeline(transformer=tiny.transformer(resolution_tokens=True, fusion_range=[0, 1]))


@pytest.mark.parametrize("make", [tiny.latent_pipeline, tiny.pixel_pipeline, own_options_pipeline])
def test_layerwise_casting_to_float8(make):
    pipe = make()
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    for name, parameter in pipe.transformer.named_parameters():
        kept = any(part in name for part in HIGH_PRECISION)
        assert parameter.dtype == (torch.float32 if kept else torch.float8_e4m3fn), name
    images = draw(pipe)

    rounded = make()
    with torch.no_grad():
        for name, parameter in rounded.transformer.named_parameters():  # also what belongs to no linear layer
            if not any(part in name for part in HIGH_PRECISION):
                parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    expected = draw(rounded)
    assert (images - expected).abs().max() < TOLERANCE
    assert (images - draw(make())).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        # half of one of 255 steps; half of one of 8 steps per power of two, or of the smallest step
        ("Int8", lambda w: 0.51 / 127.5 * row_maxima(w)),
        ("Float8", lambda w: w.abs() / 15.9 + 2**-9 / 448 * row_maxima(w)),
    ],
    ids=["int8", "float8"],
)
def test_torchao_weights(tmp_path, kind, error):
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: pip install -e '.[quantization]'"
    )
    config, tensor = getattr(quantization, f"{kind}WeightOnlyConfig")(), getattr(quantization, f"{kind}Tensor")
    tiny.latent_pipeline().save_pretrained(tmp_path / "whole")
    settings = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(config)})
    pipe = PRXPipeline.from_pretrained(tmp_path / "whole", quantization_config=settings, dtype=torch.float32)

    def rounded(name, weight):
        small = pipe.transformer.get_submodule(name).weight
        assert isinstance(small, tensor), name
        assert ((small.dequantize() - weight).abs() <= error(weight)).all(), name
        return small.dequantize()

    images = draw(pipe)
    assert (images - draw(with_weights(tiny.latent_pipeline, rounded))).abs().max() < TOLERANCE
    assert (images - draw(tiny.latent_pipeline())).abs().max() > 1e-3

    pipe.save_pretrained(tmp_path / "small")
    assert torch.equal(draw(PRXPipeline.from_pretrained(tmp_path / "small", dtype=torch.float32)), images)
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    assert (draw(pipe) - images).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "level", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
@pytest.mark.parametrize("cast", [False, True])
def test_group_offloading_of_the_whole_pipeline(level, cast):
    pipe = tiny.latent_pipeline()
    if cast:
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    expected = draw(pipe)
    pipe.enable_group_offload(onload_device=CPU, **level)
    assert (draw(pipe) - expected).abs().max() < TOLERANCE


def offload_models(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe):
    """Do what `enable_sequential_cpu_offload` does, which itself needs an accelerator."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)
    assert pipe.transformer.blocks[0].down_proj.weight.device.type == "meta"


@pytest.mark.parametrize("make", [tiny.latent_pipeline, tiny.pixel_pipeline])
@pytest.mark.parametrize("offload", [offload_models, offload_layers])
def test_offloading_by_models_and_by_layers(make, offload):
    """accelerate's hooks must also run before contexts are computed, which is before the first forward."""
    pipe = make()
    offload(pipe)
    assert torch.equal(draw(pipe), draw(make()))
    assert torch.equal(draw(pipe), draw(make()))  # a second call as well


@pytest.mark.gpu  # without a GPU these move nothing
@pytest.mark.parametrize(
    "offload",
    [
        lambda pipe: pipe.enable_model_cpu_offload(),
        lambda pipe: pipe.enable_sequential_cpu_offload(),
        lambda pipe: pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True),
    ],
    ids=["models", "layers", "groups"],
)
def test_offloading_to_a_gpu(offload):
    expected = draw(tiny.latent_pipeline().to("cuda"))
    pipe = tiny.latent_pipeline()
    offload(pipe)
    assert pipe.transformer.blocks[0].down_proj.weight.device.type != "cuda"
    assert (draw(pipe) - expected).abs().max() < 1e-4


def test_tiled_and_sliced_decoding():
    pipe = tiny.latent_pipeline()
    expected = draw(pipe, height=64, width=64)
    pipe.vae.enable_slicing()
    assert (draw(pipe, height=64, width=64) - expected).abs().max() < 1e-5
    pipe.vae.enable_tiling()
    assert pipe.vae.tile_latent_min_size < 32  # the 32 x 32 latents are more than one tile
    tiled = draw(pipe, height=64, width=64)
    assert 0 < (tiled - expected).abs().mean() < 0.1  # tiles overlap and are blended
