"""Image to image and inpainting together with everything else that changes how a pipeline draws.

Each case compares with text to image, in which the same change was tested by itself: strength 1 draws its picture to
the bit, and a smaller one what it draws from the noised image along the rest of the schedule. A white mask is image to
image, a black one gives the image back to the byte.
"""

from itertools import product

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    TaylorSeerCacheConfig,
)
from torch import nn

import tiny
from diffusers_prx import (
    PRXImg2ImgPipeline,
    PRXInpaintPipeline,
    PRXPixelImg2ImgPipeline,
    PRXPixelInpaintPipeline,
)
from diffusers_prx.latents import encode

PROMPTS = ["a red cat on the beach", "two blue dog"]
STRENGTH, STEPS = 0.7, 6
LEVELS = [0.7, 0.6, 0.375]  # 3u / (1 + 2u) of a shift of 3 for u = 2/6 and 1/6, below the strength
TOLERANCE = 1e-5  # of pictures in [0, 1]; seen: 2e-6
CHANGED = 1e-3
CPU = torch.device("cpu")
IMAGES = [
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)) for seed in (1, 2)
]
WHITE, BLACK = PIL.Image.new("L", (32, 32), 255), PIL.Image.new("L", (32, 32), 0)
KINDS = {
    "latents": (tiny.latent_pipeline, {}, PRXImg2ImgPipeline, PRXInpaintPipeline),
    "pixels": (tiny.pixel_pipeline, tiny.PIXEL_SETTINGS, PRXPixelImg2ImgPipeline, PRXPixelInpaintPipeline),
}


def load_lora(pipe, weight=1.0):
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("img_qkv_proj", "txt_kv_proj", "down_proj")):
            a, b = torch.randn(2, module.in_features, generator=generator), torch.randn(module.out_features, 2)
            tensors |= {f"transformer.{name}.lora_A.weight": 0.2 * a, f"transformer.{name}.lora_B.weight": 0.3 * b}
    pipe.load_lora_weights(tensors, adapter_name="style")
    pipe.set_adapters("style", weight)


def fuse_lora(pipe):
    load_lora(pipe)
    pipe.fuse_lora()


def disable_lora(pipe):
    load_lora(pipe)
    pipe.disable_lora()


def offload_layers(pipe):
    """Do what `enable_sequential_cpu_offload` does, which itself needs an accelerator."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)


def offload_leaves(pipe):
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


def offload_blocks(pipe):
    load_lora(pipe)
    pipe.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


def cast_layers(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def compile_blocks(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager", dynamic=True)


def cache_steps(pipe):
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2))


SLOW = [("latents", "compiled blocks")]  # the other kind compiles the same blocks
# change of the pipeline -> True if it draws the same pictures as without
SETTINGS = {
    "lora": (load_lora, False),
    "lora at half its weight": (lambda pipe: load_lora(pipe, 0.5), False),
    "fused lora": (fuse_lora, False),
    "disabled lora": (disable_lora, True),
    "offloaded models": (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), True),
    "offloaded layers": (offload_layers, True),
    "offloaded leaves": (offload_leaves, True),
    "offloaded blocks with a lora": (offload_blocks, False),
    "layers in float8": (cast_layers, False),
    "compiled blocks": (compile_blocks, True),
    "cache": (cache_steps, False),
    "float16": (lambda pipe: pipe.to(dtype=torch.float16), False),
    "bfloat16": (lambda pipe: pipe.to(dtype=torch.bfloat16), False),
}


def change_guidance(pipe, step, timestep, tensors):
    pipe._guidance_scale = 2.0 + step
    return {"latents": tensors["latents"] * 1.01}


def end_guidance(pipe, step, timestep, tensors):
    pipe._guidance_scale = 0.0


LAYERS = {"skip_layer_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
ATTENTION = {"perturbed_guidance_layers": [1], "perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
CALLS = {
    "no guidance": {"guidance_scale": 1.0},
    "negative prompts": {"negative_prompt": ["sunset", "one big circle"]},
    "guidance in some steps": {"guider": ClassifierFreeGuidance(4.0, start=0.5)},
    "skipped layers": {"guider": SkipLayerGuidance(4.0, **LAYERS)},
    "perturbed attention": {"guider": PerturbedAttentionGuidance(4.0, **ATTENTION)},
    "autoguidance": {"guider": AutoGuidance(4.0, auto_guidance_layers=[1], dropout=1.0)},
    "weaker network": {"guide_transformer": {"seed": 5, "depth": 1}},
    "self-guidance": {"guidance_scale": 1.0, "self_guidance_scale": 2.0},
    "regions": {"regions": [("one green tram", (0.0, 0.0, 0.5, 1.0)), ("two lion", (0.5, 0.5, 1.0, 1.0))]},
    "weighted words": {"prompt": ["a (red:3) cat on the beach", "two (blue dog:0.1)"], "prompt_weights": True},
    "callback that changes guidance": {"callback_on_step_end": change_guidance},
    "callback that ends guidance": {"callback_on_step_end": end_guidance},
}


def pipelines(kind, change=lambda pipe: None):
    """Return pipelines for text to image, image to image and inpainting around the same changed networks."""
    make, _, *editing = KINDS[kind]
    text = make(token_route=(0, 1, 0.5))
    change(text)
    pipes = (text, *(cls.from_pipe(text) for cls in editing))
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def draw(pipe, generator=None, **kwargs):
    settings = {"prompt": PROMPTS, "num_inference_steps": STEPS, "output_type": "pt"}
    return pipe(**settings | kwargs, generator=generator or tiny.generators(3, 4), return_dict=False)[0]


def draw_from_image(text, **call):
    """Draw with text to image from the noised image, along the noise levels below the strength."""
    pixels_01 = torch.from_numpy(np.stack(IMAGES)).permute(0, 3, 1, 2).contiguous() / 255
    with torch.no_grad():
        image = encode(getattr(text, "vae", None), pixels_01 * 2 - 1).mean
    generator = tiny.generators(3, 4)
    noise = text.prepare_latents(*image.shape[:2], 32, 32, text.text_encoder.dtype, CPU, generator)
    latents = ((1 - STRENGTH) * image + STRENGTH * noise).contiguous()  # layouts differ in rounding to float16
    return draw(text, generator, latents=latents, sigmas=LEVELS, **call)


def check(kind, change, same, call):
    text, edit, inpaint = pipelines(kind, change)
    drawn = draw(edit, image=IMAGES, strength=STRENGTH, **call)
    assert torch.equal(draw(edit, image=IMAGES, strength=1.0, **call), draw(text, **call))
    assert (drawn - draw_from_image(text, **call)).abs().max() < TOLERANCE
    assert torch.equal(draw(inpaint, image=IMAGES, mask_image=WHITE, strength=STRENGTH, **call), drawn)
    kept = draw(inpaint, image=IMAGES, mask_image=BLACK, **call | {"output_type": "pil"})
    assert [np.array(image).tolist() for image in kept] == [np.array(image).tolist() for image in IMAGES]
    plain = draw(pipelines(kind)[1], image=IMAGES, strength=STRENGTH)
    difference = (drawn - plain).abs().max()
    assert (difference < TOLERANCE) if same else (difference > CHANGED)
    return text, edit, drawn


@pytest.mark.parametrize(("kind", "name"), [case for case in product(KINDS, SETTINGS) if case not in SLOW])
def test_editing_with_changed_networks(kind, name, fresh_dynamo):
    check(kind, *SETTINGS[name], {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_editing_with_every_argument(kind, name):
    call = dict(CALLS[name])
    if "guide_transformer" in call:
        call["guide_transformer"] = tiny.transformer(**call["guide_transformer"], **KINDS[kind][1])
    _, edit, drawn = check(kind, lambda pipe: None, False, call)
    for row in range(2):  # a batch draws what each prompt and image draw alone
        alone = {name: [value[row]] for name, value in call.items() if name in ("prompt", "negative_prompt")}
        alone = {"prompt": [PROMPTS[row]], **call} | alone
        [image] = draw(edit, tiny.generators(3 + row), image=IMAGES[row], strength=STRENGTH, **alone)
        assert (image - drawn[row]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_an_editing_pipeline(kind):
    """Loaded into the editing pipeline itself, scaled in one call, and unloaded again."""
    text, edit, _ = pipelines(kind)
    before = draw(edit, image=IMAGES, strength=STRENGTH)
    load_lora(edit)
    half = draw(edit, image=IMAGES, strength=STRENGTH, attention_kwargs={"scale": 0.5})
    assert (half - draw_from_image(text, attention_kwargs={"scale": 0.5})).abs().max() < TOLERANCE
    edit.set_adapters("style", 0.5)
    assert (half - draw(edit, image=IMAGES, strength=STRENGTH)).abs().max() < TOLERANCE
    edit.unload_lora_weights()
    assert torch.equal(draw(edit, image=IMAGES, strength=STRENGTH), before)


@pytest.mark.parametrize("kind", KINDS)
def test_editing_pipelines_survive_saving(kind, tmp_path):
    """Also without the optional part, the VAE; then with latents in place of the image. Tuples hold what dicts do."""
    for pipe, extra in zip(pipelines(kind)[1:], ({}, {"mask_image": WHITE})):
        call = {"image": IMAGES, "strength": STRENGTH, **extra}
        expected = draw(pipe, **call)
        pipe.save_pretrained(tmp_path / "whole")
        loaded = type(pipe).from_pretrained(tmp_path / "whole")
        settings = {"num_inference_steps": STEPS, "output_type": "pt", "generator": tiny.generators(3, 4)}
        assert torch.equal(loaded(PROMPTS, **settings, **call).images, expected)  # `draw` asks for tuples
    if kind == "latents":
        edit = pipelines(kind)[1]
        call = {"image": draw(edit, image=IMAGES, strength=0.0, output_type="latent"), "output_type": "latent"}
        type(edit).from_pipe(edit, vae=None).save_pretrained(tmp_path / "part")
        loaded = type(edit).from_pretrained(tmp_path / "part")
        assert loaded.vae is None
        assert torch.equal(draw(loaded, **call), draw(edit, **call))
