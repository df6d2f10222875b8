"""Image to image, inpainting and outpainting: both spaces, all schedulers, every form of image and mask."""

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import tiny
from diffusers_prx import (
    PRXFlowMatchScheduler,
    PRXImg2ImgPipeline,
    PRXInpaintPipeline,
    PRXPipeline,
    PRXPixelImg2ImgPipeline,
    PRXPixelInpaintPipeline,
    PRXPixelPipeline,
    PRXXPredictionScheduler,
    fast_scheduler,
    fast_sigmas,
    register,
)
from diffusers_prx.compat import auto_pipeline_mappings
from diffusers_prx.pipelines.editing import KnownLatents, make_edit
from diffusers_prx.schedulers.diffusers_compat import cut_schedule, set_schedule

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS = {
    "ours": None,
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm": lambda: DPMSolverMultistepScheduler(**FLOW),
    "fast": fast_scheduler,
}
KINDS = {
    "latents": (tiny.latent_pipeline, PRXImg2ImgPipeline, PRXInpaintPipeline),
    "pixels": (tiny.pixel_pipeline, PRXPixelImg2ImgPipeline, PRXPixelInpaintPipeline),
}
BOX = (5, 7, 14, 15)  # left, top, right, bottom


@pytest.fixture(scope="module", params=KINDS)
def pipes(request):
    """Text to image, image to image and inpainting, with the same networks."""
    make, *editing = KINDS[request.param]
    base = make()
    pipes = (base, *(cls.from_pipe(base) for cls in editing))
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="module")
def latent_pipes():
    base = tiny.latent_pipeline()
    pipes = (base, PRXImg2ImgPipeline.from_pipe(base), PRXInpaintPipeline.from_pipe(base))
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def picture(seed=0, size=(32, 32)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def mask(box=BOX, size=(32, 32), value=255):
    image = PIL.Image.new("L", size, 0)
    if box is not None:
        image.paste(value, box)
    return image


def pixels(image):
    return np.asarray(image).astype(int)


def draw(pipe, *args, seed=0, prompt="a red cat", **kwargs):
    settings = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(seed), "output_type": "pt"}
    return pipe(prompt, *args, **settings | kwargs).images


def outside(image, box=BOX):
    """Return the pixels outside a box, (n, 3)."""
    left, top, right, bottom = box
    keep = np.ones(image.size[::-1], dtype=bool)
    keep[top:bottom, left:right] = False
    return np.asarray(image)[keep]


# --- where a call starts


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_starts_at_exactly_the_level(name):
    scheduler = PRXFlowMatchScheduler(shift=3.0) if name == "ours" else SCHEDULERS[name]()
    sigmas = fast_sigmas(6) if name == "fast" else None
    set_schedule(scheduler, 6, sigmas=sigmas)
    whole = scheduler.sigmas.tolist()
    cut_schedule(scheduler, 0.55)
    assert scheduler.sigmas.tolist() == [torch.tensor(0.55).item(), *(sigma for sigma in whole if sigma < 0.55)]
    assert len(scheduler.timesteps) == len(scheduler.sigmas) - 1
    assert scheduler.timesteps[0] == 550
    set_schedule(scheduler, 6, sigmas=sigmas)
    cut_schedule(scheduler, whole[3])  # a level of the schedule itself is not there twice
    assert scheduler.sigmas.tolist() == whole[3:]
    cut_schedule(scheduler, 0.0)
    assert scheduler.sigmas.tolist() == [0.0]
    assert len(scheduler.timesteps) == 0


@pytest.mark.parametrize("scheduler", [PRXFlowMatchScheduler, fast_scheduler, "x"], ids=["velocity", "fast", "x"])
def test_image_to_image_follows_the_exact_solution(scheduler):
    """For Gaussian data the path through a point x_t at level t is known; 200 Euler steps have an error of 0.0225."""
    x_prediction = scheduler == "x"
    model = tiny.transformer(cls=tiny.GaussianData)
    model.predicts, model.scale = ("x_prediction" if x_prediction else "velocity"), 1.7
    pipe = PRXImg2ImgPipeline.from_pipe(
        tiny.latent_pipeline(),
        transformer=model,
        scheduler=PRXXPredictionScheduler() if x_prediction else scheduler(),
        prediction_type="x_prediction" if x_prediction else "velocity",
        noise_scale=1.7,
    )
    pipe.set_progress_bar_config(disable=True)
    image, noise = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    level = 0.37
    start = (1 - level) * image + level * 1.7 * noise
    spread = ((1 - level) ** 2 * model.std**2 + level**2 * 1.7**2) ** 0.5
    expected = model.mean + model.std / spread * (start - (1 - level) * model.mean)
    latents = draw(
        pipe, image, level, latents=1.7 * noise, num_inference_steps=200, guidance_scale=1.0, output_type="latent"
    )
    assert (latents - expected).abs().max() < 0.03
    assert (latents - image).abs().max() > 1  # so that the bound says something


@pytest.mark.parametrize("name", SCHEDULERS)
def test_strength_1_is_text_to_image_and_strength_0_the_image(pipes, name, monkeypatch):
    scheduler = pipes[0].scheduler if SCHEDULERS[name] is None else SCHEDULERS[name]()
    for pipe in pipes:
        monkeypatch.setattr(pipe, "scheduler", scheduler)
    sigmas = {"sigmas": fast_sigmas(3)} if name == "fast" else {}
    text, edit, inpaint = pipes
    expected = draw(text, **sigmas)
    assert torch.equal(draw(edit, picture(), 1.0, **sigmas), expected)
    assert torch.equal(draw(inpaint, picture(), mask((0, 0, 32, 32)), strength=1.0, **sigmas), expected)
    image = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 255
    if isinstance(text, PRXPixelPipeline):
        assert (draw(edit, picture(), 0.0, **sigmas) - image).abs().max() < 1e-6
    else:
        latents = (text.vae.encode(image * 2 - 1).latent_dist.mode() - 0.12) * 0.36
        assert torch.allclose(draw(edit, picture(), 0.0, output_type="latent", **sigmas), latents, atol=1e-5)
        decoded = text.vae.decode(latents / 0.36 + 0.12).sample
        assert torch.allclose(draw(edit, picture(), 0.0, **sigmas), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5)


# --- masks


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_white_mask_is_image_to_image_and_a_black_one_the_image(pipes, name, monkeypatch):
    scheduler = pipes[0].scheduler if SCHEDULERS[name] is None else SCHEDULERS[name]()
    for pipe in pipes:
        monkeypatch.setattr(pipe, "scheduler", scheduler)
    _, edit, inpaint = pipes
    white, black = mask((0, 0, 32, 32)), mask(None)
    assert torch.equal(draw(inpaint, picture(), white, strength=0.45), draw(edit, picture(), 0.45))
    drawn = draw(inpaint, picture(), black, output_type="pil")[0]
    assert np.array_equal(pixels(drawn), pixels(picture()))


@pytest.mark.parametrize("padding", [None, 3])
def test_pixels_outside_the_mask_keep_every_byte(pipes, padding):
    image = picture(size=(48, 32))
    region = mask(size=(48, 32))
    size = {} if padding is None else {"height": 32, "width": 32}
    drawn = draw(pipes[2], image, region, padding_mask_crop=padding, output_type="pil", **size)[0]
    assert drawn.size == image.size
    assert np.array_equal(outside(drawn), outside(image))
    inside = pixels(drawn)[7:15, 5:14] != pixels(image)[7:15, 5:14]
    assert inside.any(-1).mean() > 0.9


def test_the_known_region_is_at_the_noise_level_of_every_step(latent_pipes):
    inpaint = latent_pipes[2]
    clean, noise = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    seen = []

    def record(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])

    left_half = torch.zeros(32, 32)
    left_half[:, :16] = 1
    final = draw(inpaint, clean, left_half, latents=noise, callback_on_step_end=record, output_type="latent")
    levels = [3 * u / (1 + 2 * u) for u in (2 / 3, 1 / 3, 0)]
    for level, latents in zip(levels, seen, strict=True):
        known = (1 - level) * clean + level * noise
        assert torch.allclose(latents[..., 8:], known[..., 8:], atol=1e-6)
        assert not torch.allclose(latents[..., :8], known[..., :8], atol=0.01)
    assert torch.equal(final[..., 8:], clean[..., 8:])


def test_masks_cover_every_latent_they_touch_and_mix_soft_pixels():
    soft = torch.zeros(1, 1, 4, 8)
    soft[..., 1, 1], soft[..., 0, 2], soft[..., 3, 5] = 0.5, 0.49, 1.0
    edit = make_edit(torch.full((1, 3, 4, 8), 0.25), 1.0, None, None, soft, None, 4, 2)
    expected = torch.tensor([[True, False, False, False], [False, False, True, False]])
    assert torch.equal(edit.latent_mask(2)[0, 0], expected)
    pasted = edit.paste(torch.full((2, 3, 4, 8), 0.75))
    assert torch.equal(pasted, (0.25 + 0.5 * soft).expand(2, 3, 4, 8))


# --- forms and numbers of images


def test_all_forms_of_image_and_mask_draw_the_same(pipes):
    image, region = picture(), mask()
    array, plane = np.asarray(image).astype(np.float32) / 255, np.asarray(region).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = draw(pipes[2], image, region, num_inference_steps=1)
    for other, other_mask in (
        ([image], [region]),
        (array, plane),
        (array[None], plane[..., None]),
        (tensor, torch.from_numpy(plane)),
        ([tensor], torch.from_numpy(plane)[None, None]),
        (image.convert("RGBA"), plane > 0),
    ):
        assert torch.equal(draw(pipes[2], other, other_mask, num_inference_steps=1), expected)


def test_a_batch_draws_what_each_image_draws_alone(pipes):
    images, masks = [picture(1), picture(2)], [mask(), mask((0, 0, 9, 30))]
    settings = {"strength": 0.6, "negative_prompt": "a dog"}
    prompts = ["a red cat", "two blue squares"]
    batch = draw(
        pipes[2],
        images,
        masks,
        prompt=prompts,
        num_images_per_prompt=2,
        generator=tiny.generators(0, 1, 2, 3),
        padding_mask_crop=2,
        **settings,
    )
    for row in range(4):
        index = row // 2
        alone = draw(
            pipes[2], images[index], masks[index], prompt=prompts[index], seed=row, padding_mask_crop=2, **settings
        )
        assert torch.allclose(batch[row], alone[0], atol=1e-4)
    assert not torch.allclose(batch[0], batch[1], atol=0.01)


def test_one_image_serves_all_prompts(pipes):
    both = draw(pipes[1], picture(), 0.6, prompt=["a cat", "a dog"], generator=tiny.generators(4, 5))
    for row, prompt in enumerate(["a cat", "a dog"]):
        assert torch.allclose(both[row], draw(pipes[1], picture(), 0.6, prompt=prompt, seed=4 + row)[0], atol=1e-4)


def test_latents_of_an_image_draw_the_same_as_the_image(latent_pipes):
    text, edit, _ = latent_pipes
    latents = draw(edit, picture(), 0.0, output_type="latent")
    assert torch.allclose(draw(edit, latents, 0.5), draw(edit, picture(), 0.5), atol=1e-5)
    without_vae = PRXImg2ImgPipeline(**{**text.components, "vae": None}, default_sample_size=32)
    with pytest.raises(ValueError, match="`vae`"):
        draw(without_vae, picture(), 0.5, output_type="latent", height=32, width=32)


def test_height_and_width_resize_the_image(pipes):
    flat = PIL.Image.new("RGB", (40, 24), (200, 100, 50))
    small = PIL.Image.new("RGB", (16, 32), (200, 100, 50))
    resized = draw(pipes[1], flat, 0.5, height=32, width=16)
    assert resized.shape[-2:] == (32, 16)
    assert torch.allclose(resized, draw(pipes[1], small, 0.5), atol=1e-5)


# --- with the rest of the package


def test_from_pipe_goes_in_every_direction_and_shares_the_networks(pipes):
    text, edit, inpaint = pipes
    expected = draw(text)
    addresses = [parameter.data_ptr() for parameter in text.transformer.parameters()]
    for start in pipes:
        for cls in (type(text), type(edit), type(inpaint)):
            other = cls.from_pipe(start)
            assert all(other.components[name] is part for name, part in text.components.items())
            assert other.config["noise_scale"] == text.config["noise_scale"]
    back = type(text).from_pipe(inpaint)
    back.set_progress_bar_config(disable=True)
    assert torch.equal(draw(back), expected)
    assert [parameter.data_ptr() for parameter in text.transformer.parameters()] == addresses


def test_callbacks_tuples_and_steps_count_the_cut_schedule(latent_pipes):
    edit = latent_pipes[1]
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append((step, timestep.item(), pipe.num_timesteps))
        pipe._interrupt = step == 1
        return tensors

    settings = {"num_inference_steps": 9, "callback_on_step_end": stop, "output_type": "pt"}
    (images,) = edit("a cat", picture(), 0.8, return_dict=False, **settings)
    assert images.shape == (1, 3, 32, 32)
    assert [entry[0] for entry in steps] == [0, 1]
    assert steps[0][1:] == (800.0, 6)


@pytest.fixture
def auto_mappings():
    """Tables of diffusers' Auto classes as at the start, whatever ran before; restored after the test."""
    mappings = auto_pipeline_mappings()
    before = [dict(mapping) for mapping in mappings]
    for mapping in mappings:
        mapping.pop("prx", None)
        mapping.pop("prx-pixel", None)
    mappings[0]["prx"] = diffusers.PRXPipeline
    yield mappings
    for mapping, entries in zip(mappings, before):
        mapping.clear()
        mapping.update(entries)


def test_auto_classes_find_our_pipelines_once_registered(auto_mappings, tmp_path):
    """Also one that predicts images in latents, which stock refuses. An editing pipeline is stored like the others."""
    predicts_images = tiny.latent_pipeline(scheduler=PRXXPredictionScheduler(shift=3.0))
    PRXInpaintPipeline.from_pipe(predicts_images).save_pretrained(tmp_path)
    with pytest.raises((ValueError, AttributeError), match="pip install diffusers-prx"):
        AutoPipelineForText2Image.from_pretrained(tmp_path)
    register()
    loaded = AutoPipelineForImage2Image.from_pretrained(tmp_path)
    assert (type(loaded), type(loaded.scheduler)) == (PRXImg2ImgPipeline, PRXXPredictionScheduler)
    assert loaded.config["prediction_type"] == "x_prediction"
    inpaint = AutoPipelineForInpainting.from_pipe(loaded)
    assert type(inpaint) is PRXInpaintPipeline
    assert inpaint.transformer is loaded.transformer
    assert type(AutoPipelineForText2Image.from_pipe(inpaint)) is PRXPipeline
    assert type(AutoPipelineForInpainting.from_pipe(tiny.pixel_pipeline())) is PRXPixelInpaintPipeline
    assert "stable-diffusion" in auto_mappings[2]


# --- errors


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("strength", {"strength": 1.5}),
        ("strength", {"strength": "0.5"}),
        ("image", {"image": None}),
        ("image", {"image": "picture.png"}),
        ("image", {"image": np.zeros((32, 32, 3), dtype=np.uint8)}),
        ("image", {"image": torch.full((3, 32, 32), -1.0)}),
        ("image", {"image": [picture(), picture(size=(16, 16))]}),
        ("image", {"image": [picture()] * 3}),
        ("width", {"image": picture(size=(30, 32)), "mask_image": mask(size=(30, 32))}),
        ("height", {"height": 31}),
        ("mask_image", {"mask_image": mask(size=(16, 16))}),
        ("mask_image", {"mask_image": [mask()] * 2}),
        ("padding_mask_crop", {"padding_mask_crop": -1}),
    ],
)
def test_wrong_arguments_are_named(latent_pipes, name, arguments):
    with pytest.raises(ValueError, match=f"`{name}`"):
        draw(latent_pipes[2], **{"image": picture(), "mask_image": mask(), "strength": 0.5} | arguments)


def test_known_latents_repeat_in_the_order_of_prompts():
    clean = torch.arange(2.0).reshape(2, 1, 1, 1)
    known = KnownLatents.expand(clean, torch.zeros(6, 1, 1, 1), None)
    assert known.at(0.0).flatten().tolist() == [0, 0, 0, 1, 1, 1]
