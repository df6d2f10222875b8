"""Images of the pipelines: against stock where stock works, against exact predictors, and where stock fails."""

import threading

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import tiny
from diffusers_prx import fast_scheduler, fast_sigmas
from diffusers_prx.resolution_bins import RESOLUTION_BINS
from diffusers_prx.schedulers import PRXFlowMatchScheduler, PRXXPredictionScheduler

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
PROMPTS = ["a red cat on the beach", "two blue dog", "sunset"]


@pytest.fixture(scope="module")
def pipe():
    return tiny.latent_pipeline()


@pytest.fixture(scope="module")
def pixel_pipe():
    return tiny.pixel_pipeline()


def draw(pipe, prompt=PROMPTS[0], seeds=(0,), steps=4, output_type="pt", **kwargs):
    generator = tiny.generators(*seeds)
    generator = generator[0] if len(generator) == 1 else generator
    return pipe(prompt, generator=generator, num_inference_steps=steps, output_type=output_type, **kwargs).images


def difference(a, b):
    return (torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item()


# --- parity with stock


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["kl", "dc", "pixel"])
def test_same_seed_same_image_as_stock(kind, side, guidance_scale):
    """Stock with the exact noise levels, and with guidance one image at a time, because it fails with more."""
    if kind == "pixel":
        ours = tiny.pixel_pipeline(side)
        stock_class, settings, extra = diffusers.PRXPixelPipeline, tiny.PIXEL_SETTINGS, {"prompt_max_tokens": 12}
        extra["text_encoder"] = tiny.qwen_text_tower()
    else:
        vae = tiny.vae_kl() if kind == "kl" else tiny.vae_dc()
        ours = tiny.latent_pipeline(vae, side)
        stock_class, settings = diffusers.PRXPipeline, {}
        extra = {"text_encoder": tiny.text_encoder(), "vae": vae}
    transformer = tiny.transformer(cls=diffusers.PRXTransformer2DModel, **settings)
    stock = stock_class(
        transformer, tiny.ExactEuler(shift=3.0), tokenizer=tiny.tokenizer(side), default_sample_size=32, **extra
    )
    stock.set_progress_bar_config(disable=True)
    prompt, seeds = (PROMPTS, (1, 2, 3)) if guidance_scale == 1.0 else (PROMPTS[0], (1,))
    args = {"guidance_scale": guidance_scale, "output_type": "np", "height": 32, "width": 48}
    expected = draw(stock, prompt, seeds, use_resolution_binning=False, **args)
    images = draw(ours, prompt, seeds, **args)
    assert images.shape == (len(seeds), 32, 48, 3)
    assert difference(images, expected) < 1e-4
    assert difference(images, draw(ours, ["green lion"] * len(seeds), seeds, **args)) > 1e-3  # text matters


def test_resolution_bins_are_those_of_stock_and_three_more_at_1024():
    lacking = {"0.73": (864, 1184), "0.88": (960, 1088), "1.6": (1280, 800)}
    for size, bins in diffusers.pipelines.prx.pipeline_prx.ASPECT_RATIO_BINS.items():
        stock = {ratio: tuple(pair) for ratio, pair in bins.items()}
        assert RESOLUTION_BINS[size] == stock | (lacking if size == 1024 else {})
    for size, bins in RESOLUTION_BINS.items():
        assert all(f"{float(ratio):.1f}" == f"{height / width:.1f}" for ratio, (height, width) in bins.items()), size


@pytest.mark.parametrize("size", [(864, 1184), (960, 1088), (1280, 800)])
def test_sizes_that_stock_lacks_are_not_resized(size):
    assert tiny.pixel_pipeline(default_sample_size=1024)._image_sizes(*size, None)[1] == size


def test_resolution_binning():
    vae = tiny.vae_dc()
    pipe = tiny.latent_pipeline(vae, default_sample_size=256)
    args = {"height": 100, "width": 180, "steps": 1}
    assert draw(pipe, output_type="latent", **args).shape == (1, 4, 192 // 4, 320 // 4)
    image = draw(pipe, **args)
    assert image.shape == (1, 3, 100, 180)
    with pytest.raises(ValueError, match="multiples of 8"):
        draw(pipe, use_resolution_binning=False, **args)
    latents = draw(pipe, use_resolution_binning=False, height=96, width=176, steps=1, output_type="latent")
    assert latents.shape == (1, 4, 24, 44)
    small = tiny.latent_pipeline(vae)  # 32 pixels have no bins
    assert draw(small, steps=1).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="use_resolution_binning"):
        draw(small, steps=1, use_resolution_binning=True)


# --- exact predictors


def gaussian_pipeline(predicts, scheduler, noise_scale):
    sizes = {"patch_size": 4, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 1, "axes_dim": [8, 8]}
    model = tiny.GaussianData(in_channels=3, **sizes)
    model.predicts, model.scale = predicts, noise_scale
    return tiny.pixel_pipeline(
        transformer=model, scheduler=scheduler, prediction_type=predicts, noise_scale=noise_scale
    )


@pytest.mark.parametrize("predicts", ["velocity", "x_prediction"])
@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("scheduler", "steps", "tolerance"),
    [
        ("ours", 400, 0.03),  # Euler's error is 0.053 at 200 steps, 0.105 at 100
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 400, 0.03),
        (UniPCMultistepScheduler(**FLOW), 80, 0.008),
        (DPMSolverMultistepScheduler(**FLOW), 320, 0.008),
    ],
)
def test_every_scheduler_reaches_the_exact_solution(predicts, noise_scale, scheduler, steps, tolerance):
    if scheduler == "ours":
        ours = {"velocity": PRXFlowMatchScheduler, "x_prediction": PRXXPredictionScheduler}
        scheduler = ours[predicts](shift=3.0)
    pipe = gaussian_pipeline(predicts, scheduler, noise_scale)
    noise = noise_scale * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    image = draw(pipe, steps=steps, output_type="latent", guidance_scale=1.0)
    assert difference(image, pipe.transformer.solution(noise)) < tolerance
    sigmas = torch.cat(pipe.transformer.seen)
    assert sigmas.unique().numel() == steps  # rounded to integers, several would be equal
    assert sigmas[0] >= 0.999


@pytest.mark.parametrize("predicts", ["velocity", "x_prediction"])
def test_fast_preset_is_as_close_to_the_solution_as_28_euler_steps(predicts):
    ours = {"velocity": PRXFlowMatchScheduler, "x_prediction": PRXXPredictionScheduler}
    exact, fast = (gaussian_pipeline(predicts, s, 1.0) for s in (ours[predicts](shift=3.0), fast_scheduler()))
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = [
        draw(pipe, output_type="latent", guidance_scale=1.0, **levels)
        for pipe, levels in ((exact, {"steps": 28}), (fast, {"sigmas": fast_sigmas(9)}))
    ]
    errors = [difference(image, exact.transformer.solution(noise)) for image in images]
    assert errors[1] <= errors[0]
    levels = [1.5 * level / (1 + 0.5 * level) for level in fast_sigmas(9)]  # shifted by the scheduler
    assert torch.cat(fast.transformer.seen).tolist() == pytest.approx(levels, abs=2e-6)


@pytest.mark.parametrize("steps", [1, 8, 50])
@pytest.mark.parametrize("scheduler", [PRXXPredictionScheduler(), FlowMatchEulerDiscreteScheduler(), "unipc"])
def test_perfect_image_predictor_leaves_no_noise(scheduler, steps):
    """Down to t = 0.02, below the clamp of the training loss; stock's clamp and default grid leave noise here."""
    if scheduler == "unipc":
        scheduler = UniPCMultistepScheduler(**FLOW)
    pipe = gaussian_pipeline("x_prediction", scheduler, 2.0)
    pipe.transformer.std = 0.0  # all images are equal
    image = draw(pipe, steps=steps, output_type="latent", guidance_scale=1.0)
    assert difference(image, torch.full_like(image, 0.3)) < 1e-5


def test_transformer_receives_the_sigma_for_the_whole_batch():
    scheduler = PRXXPredictionScheduler(shift=3.0)
    pipe = gaussian_pipeline("x_prediction", scheduler, 2.0)
    draw(pipe, PROMPTS, (0, 1, 2), steps=8)
    scheduler.set_timesteps(8)
    seen = torch.stack(pipe.transformer.seen)
    assert seen.shape == (8, 6)
    assert torch.equal(seen, scheduler.sigmas[:-1, None].expand(8, 6))


def test_repeated_integer_timesteps_do_not_skip_a_step():
    """At shift 3 UniPC casts the first two of 600 timesteps to 999."""
    scheduler = UniPCMultistepScheduler(**FLOW)
    pipe = gaussian_pipeline("velocity", scheduler, 1.0)
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    image = draw(pipe, steps=600, output_type="latent", guidance_scale=1.0)
    assert difference(image, pipe.transformer.solution(noise)) < 1e-3


@pytest.mark.parametrize("scheduler", [PRXFlowMatchScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_sigmas_and_timesteps_of_the_call(scheduler):
    pipe = gaussian_pipeline("velocity", scheduler, 1.0)
    given = [1.0, 0.6, 0.3]
    ours = isinstance(scheduler, PRXFlowMatchScheduler)
    expected = torch.tensor([s if ours else 3 * s / (1 + 2 * s) for s in given])
    for argument in ({"sigmas": given}, {"timesteps": [1000 * s for s in given]}):
        pipe.transformer.seen = []
        draw(pipe, guidance_scale=1.0, **argument)
        torch.testing.assert_close(torch.cat(pipe.transformer.seen), expected)
        assert pipe.num_timesteps == 3


# --- batches, where stock fails or mixes rows up


@pytest.mark.parametrize("which", ["pipe", "pixel_pipe"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_row_of_a_batch_equals_the_prompt_alone(request, which, guidance_scale):
    """Several prompts x several images, each with its own negative prompt and generator."""
    pipe = request.getfixturevalue(which)
    negatives = ["small circle", "", "one big green square"]
    seeds = (1, 2, 3, 4, 5, 6)
    batch = draw(
        pipe, PROMPTS, seeds, negative_prompt=negatives, num_images_per_prompt=2, guidance_scale=guidance_scale
    )
    assert batch.shape == (6, 3, 32, 32)
    for row, seed in enumerate(seeds):
        p = row // 2
        alone = draw(pipe, PROMPTS[p], (seed,), negative_prompt=negatives[p], guidance_scale=guidance_scale)
        assert difference(batch[row], alone[0]) < 1e-4
    assert difference(batch[0], batch[1]) > 0.01


def test_prompts_of_different_lengths_keep_their_masks(pipe):
    """Stock gives prompt 1 the mask of prompt 0 as soon as there are two prompts with two images each."""
    embeds, mask, negative, negative_mask = pipe.encode_prompt(PROMPTS, num_images_per_prompt=2)
    assert mask.sum(1).tolist() == [7, 7, 4, 4, 2, 2]
    assert torch.equal(embeds[0], embeds[1])
    assert difference(embeds[1, :2], embeds[2, :2]) > 1e-3
    assert negative_mask.sum(1).tolist() == [1] * 6
    assert embeds.shape == negative.shape == (6, 7, 32)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [True, False])
def test_empty_prompt(side, bos):
    """Without `bos` the tokenizer gives it no token."""
    pipe = tiny.latent_pipeline(side=side, bos=bos)
    image = draw(pipe, "")
    assert torch.isfinite(image).all()
    batch = draw(pipe, ["", "a red cat"], (0, 0))
    assert difference(batch[0], image[0]) < 1e-4
    assert difference(batch[0], batch[1]) > 1e-3


def test_truncated_prompts_are_counted(pipe, caplog):
    diffusers.utils.logging.enable_propagation()
    draw(pipe, ["a " * 40, "a cat"], (0, 1), steps=1)
    assert "1 of 4 prompts are truncated to 12 tokens" in caplog.text


# --- precomputed embeddings


@pytest.mark.parametrize("which", ["pipe", "pixel_pipe"])
def test_precomputed_embeddings(request, which):
    pipe = request.getfixturevalue(which)
    expected = draw(pipe, PROMPTS, (0, 1, 2), negative_prompt="circle")
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    together = dict(zip(names, pipe.encode_prompt(PROMPTS, negative_prompt="circle")))
    assert difference(draw(pipe, None, (0, 1, 2), **together), expected) < 1e-4
    # encoded on their own, positive and negative differ in length
    positive, mask, _, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    negative, negative_mask, _, _ = pipe.encode_prompt(["circle"] * 3, do_classifier_free_guidance=False)
    assert positive.shape[1] != negative.shape[1]
    apart = dict(zip(names, (positive, mask, negative, negative_mask)))
    assert difference(draw(pipe, None, (0, 1, 2), **apart), expected) < 1e-4
    with_prompt = {name: apart[name] for name in names[2:]}
    assert difference(draw(pipe, PROMPTS, (0, 1, 2), **with_prompt), expected) < 1e-4
    unmasked = {"prompt_embeds": positive[:1], "negative_prompt_embeds": negative[:1]}
    assert difference(draw(pipe, None, **unmasked), draw(pipe, PROMPTS[0], negative_prompt="circle")) < 1e-4


def test_mask_is_none_when_nothing_is_padded(pipe, monkeypatch):
    masks = []
    forward = pipe.transformer.forward

    def recording(**kwargs):
        masks.append(kwargs["attention_mask"])
        return forward(**kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", recording)
    draw(pipe, PROMPTS[0], steps=1, guidance_scale=1.0)
    draw(pipe, PROMPTS[0], steps=1)
    assert masks[0] is None
    assert masks[1].dtype == torch.bool
    assert masks[1].shape == (2, 7)


# --- callbacks and interruption


def test_tensors_that_a_callback_returns_are_used(pipe):
    other = draw(pipe, PROMPTS[1])
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep), sorted(tensors)))
        return {"latents": latents} if step == 3 else {}

    result = draw(pipe, output_type="latent", callback_on_step_end=callback)
    assert torch.equal(result, latents)
    assert [entry[0] for entry in seen] == [0, 1, 2, 3]
    assert seen[0][1:] == (1000.0, ["latents"])
    assert seen[1][1] == pytest.approx(900.0)

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def swap(pipeline, step, timestep, tensors):
        assert sorted(tensors) == sorted(names)
        return {"prompt_embeds": tensors["negative_prompt_embeds"], "negative_prompt_embeds": tensors["prompt_embeds"]}

    swapped = draw(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names)
    assert difference(swapped, draw(pipe)) > 1e-3
    assert difference(swapped, other) > 1e-3


def test_interrupt_ends_the_call_after_the_step(pipe):
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append(tensors["latents"])
        pipeline._interrupt = step == 1
        return None

    result = draw(pipe, output_type="latent", callback_on_step_end=callback, steps=6)
    assert len(steps) == 2
    assert torch.equal(result, steps[1])
    assert draw(pipe, output_type="latent", steps=6).equal(draw(pipe, output_type="latent", steps=6))
    assert not pipe.interrupt


# --- output


@pytest.mark.parametrize("which", ["pipe", "pixel_pipe"])
def test_output_types(request, which):
    pipe = request.getfixturevalue(which)
    pt, array, pil = (draw(pipe, PROMPTS[:2], (0, 1), output_type=kind) for kind in ("pt", "np", "pil"))
    assert pt.shape == (2, 3, 32, 32)
    assert 0 <= pt.min() < 0.2
    assert 0.8 < pt.max() <= 1
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pil[1]), (array[1] * 255).round().astype(np.uint8))
    call = {"generator": tiny.generators(0)[0], "num_inference_steps": 4, "output_type": "pt"}
    (images,) = pipe(PROMPTS[0], return_dict=False, **call)
    assert torch.equal(images, draw(pipe))


def test_latents_of_the_call(pipe, pixel_pipe):
    for pipeline, shape in ((pipe, (1, 4, 16, 16)), (pixel_pipe, (1, 3, 32, 32))):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * pipeline.config["noise_scale"]
        assert torch.equal(draw(pipeline), draw(pipeline, latents=noise, seeds=(5,)))


def test_bf16_pipeline_draws_float32_images():
    pipe = tiny.latent_pipeline().to(torch.bfloat16)
    image = draw(pipe, PROMPTS, (0, 1, 2))
    assert image.dtype == torch.float32
    assert torch.isfinite(image).all()


def test_pipeline_without_vae_draws_latents_only(pipe):
    bare = tiny.latent_pipeline()
    bare.register_modules(vae=None)
    assert draw(bare, output_type="latent").shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match="vae"):
        draw(bare)


def test_noise_scale_and_prediction_type_in_latents():
    plain = tiny.latent_pipeline(scheduler=PRXXPredictionScheduler(shift=3.0))
    assert plain.config["prediction_type"] == "x_prediction"
    louder = tiny.latent_pipeline(scheduler=PRXXPredictionScheduler(shift=3.0), noise_scale=2.0)
    noise = 2 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(louder), draw(plain, latents=noise))
    assert difference(draw(louder), draw(plain)) > 1e-3


# --- several users of one pipeline


def test_threads_share_a_pipeline(pipe):
    """Calls with different steps and guidance at the same time draw what they draw alone, and see their own state."""
    jobs = [(2, 1.0, 0), (17, 3.0, 1), (9, 5.0, 2)]
    alone = [draw(pipe, PROMPTS, (seed,) * 3, steps, guidance_scale=scale) for steps, scale, seed in jobs]
    results: list = [None] * len(jobs)
    mixed_up = []
    start = threading.Barrier(len(jobs))

    def work(index):
        steps, scale, seed = jobs[index]

        def callback(pipeline, step, timestep, tensors):
            if (pipeline.num_timesteps, pipeline.guidance_scale) != (steps, scale):
                mixed_up.append(index)

        start.wait()
        results[index] = [
            draw(pipe, PROMPTS, (seed,) * 3, steps, guidance_scale=scale, callback_on_step_end=callback)
            for _ in range(3)
        ]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed_up
    for expected, images in zip(alone, results):
        for image in images:
            assert difference(image, expected) < 1e-6
    assert pipe.scheduler.num_inference_steps is None  # every call worked on a copy
