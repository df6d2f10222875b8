"""Drawing: pictures equal the pipeline call, previews, cancellation, LoRAs, concurrency."""

import copy
import itertools
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from diffusers_prx.schedulers import PRXFlowMatchScheduler
from diffusers_prx.schedulers.diffusers_compat import set_schedule
from space_tools import becomes_idle, count_calls

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")

from diffusers_prx import PRXInpaintPipeline, PRXPixelImg2ImgPipeline, PRXPixelPipeline, apply_preset
from diffusers_prx.pipelines.presets import PRESETS
from drawing import Edit, Update, draw, predicted_clean, preview_image
from model_cache import ModelCache, Stopped, find_loras, find_models
from settings import Request

PROMPT = "a red cat on the beach"


def request(model: str = "pixels", **changes) -> Request:
    settings = {
        "negative_prompt": "",
        "size": "32 x 32",
        "preset": "exact",
        "steps": 4,
        "guidance_scale": 3.0,
        "seed": 5,
    }
    return Request(prompt=PROMPT, model=model, **settings | changes)


def last(updates) -> Update:
    *_, final = updates
    return final


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("model", ["pixels", "latents"])
@pytest.mark.parametrize("preset", PRESETS)
def test_pictures_equal_the_pipeline_call(cache, model, preset):
    updates = list(draw(request(model, preset=preset, images=2), cache))
    pipeline, settings = apply_preset(cache.get(model)[0], preset, 4)
    generators = tiny.generators(5, 6)
    expected = pipeline(PROMPT, guidance_scale=3.0, num_images_per_prompt=2, generator=generators, **settings).images
    for image, other in zip(updates[-1].images, expected, strict=True):
        assert np.array_equal(pixels(image), pixels(other))
    steps = [update.step for update in updates]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 4)
    assert pixels(updates[-1].images[0]).std() > 5  # not uniformly gray


def test_an_edit_equals_the_pipeline_call(cache):
    before = last(draw(request(seed=1), cache)).images[0]
    mask = Image.new("L", before.size)
    mask.paste(255, (0, 0, 16, 32))
    updates = list(draw(request(), cache, Edit(before, None, 0.6)))
    whole = PRXPixelImg2ImgPipeline.from_pipe(cache.get("pixels")[0])
    call = {"prompt": PROMPT, "image": before, "num_inference_steps": 4, "guidance_scale": 3.0}
    expected = whole(strength=0.6, generator=tiny.generators(5), **call).images[0]
    assert np.array_equal(pixels(updates[-1].images[0]), pixels(expected))
    assert updates[-1].step == updates[-1].steps < 4 + 1
    painted = last(draw(request("latents"), cache, Edit(before, mask, 0.6))).images[0]
    part = PRXInpaintPipeline.from_pipe(cache.get("latents")[0])
    expected = part(mask_image=mask, generator=tiny.generators(5), **call).images[0]
    assert np.array_equal(pixels(painted), pixels(expected))
    assert np.array_equal(pixels(painted)[:, 16:], pixels(before)[:, 16:])


def test_each_image_can_be_drawn_alone(cache):
    several = last(draw(request(images=3), cache)).images
    alone = last(draw(request(images=3).for_image(2), cache)).images
    assert len(alone) == 1
    assert abs(pixels(several[2]) - pixels(alone[0])).max() <= 1  # another batch size rounds differently
    assert abs(pixels(several[2]) - pixels(several[1])).max() > 20


@pytest.mark.parametrize("preset", PRESETS)
def test_the_predicted_clean_image_is_that_of_the_solver(preset):
    """On exactly solvable data: a step of Euler moves towards the prediction; every last step ends on it."""
    network = tiny.transformer(cls=tiny.GaussianData)
    pipeline = tiny.latent_pipeline(transformer=network, scheduler=PRXFlowMatchScheduler())
    pipeline, settings = apply_preset(pipeline, preset, 6)
    noise = torch.randn(2, 4, 16, 16)
    scheduler = copy.deepcopy(pipeline.scheduler)
    set_schedule(scheduler, 6, sigmas=settings.get("sigmas"))
    sigmas = scheduler.sigmas
    states = [noise]
    pipeline(
        PROMPT,
        guidance_scale=1,
        num_images_per_prompt=2,
        latents=noise,
        output_type="latent",
        **settings,
        callback_on_step_end=lambda _, step, timestep, tensors: states.append(tensors["latents"]) or {},
    )
    assert len(states) == 7
    errors = []
    for step in range(6):
        clean = predicted_clean(states[step], states[step + 1], sigmas[step].item(), sigmas[step + 1].item())
        velocity = network(states[step], sigmas[step].expand(2), None)[0]
        errors.append((clean - (states[step] - sigmas[step] * velocity)).abs().max().item())
    assert errors[0] < 1e-5  # a first step has no history
    assert max(errors) > 1e-3 if preset == "fast" else max(errors) < 1e-5
    assert errors[-1] < 1e-5  # the last step is one of first order
    end = predicted_clean(states[5], states[6], sigmas[5].item(), 0.0)
    assert (end - states[6]).abs().max() < 1e-6


@torch.no_grad()
def test_a_preview_is_small_and_shows_all_images():
    gray = torch.zeros(3, 3, 1024, 512)
    gray[1], gray[2] = 1.0, -1.0
    image = preview_image(gray, None, 1)
    assert image.size == (2 * 128, 2 * 256)
    shades = [image.getpixel(corner)[0] for corner in ((0, 0), (200, 0), (0, 300), (200, 300))]
    assert shades == [128, 255, 0, 128]  # the empty place of three pictures is gray
    assert preview_image(gray[:2], None, 1).size == (2 * 128, 256)
    vae = tiny.vae_kl()
    latents = torch.randn(1, 4, 512, 256)
    assert preview_image(latents, vae, 2).size == (128, 256)
    whole = torch.randn(1, 4, 16, 16)
    decoded = tiny.latent_pipeline(vae=vae)._decode(whole).clamp(-1, 1)
    assert abs(pixels(preview_image(whole, vae, 2)) - ((decoded[0] + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 0.51


def test_the_last_preview_is_the_picture(cache):
    count_calls(cache, "pixels", 0.3)  # slow enough that no preview is left out
    updates = list(draw(request(), cache))
    previews = [update.preview for update in updates if update.preview is not None]
    assert len(previews) == 4
    assert np.array_equal(pixels(previews[-1]), pixels(updates[-1].images[0]))
    assert abs(pixels(previews[0]) - pixels(previews[-1])).max() > 5


def test_closing_the_generator_ends_the_work_within_one_step(cache):
    transformer = count_calls(cache, "pixels", 0.3)
    updates = draw(request(steps=50), cache)
    while next(updates).step < 2:
        pass
    calls_at_close = transformer.calls
    updates.close()
    assert becomes_idle(transformer)
    assert transformer.calls <= calls_at_close + 1


def test_a_long_step_has_heartbeats(cache):
    transformer = count_calls(cache, "pixels", 2.5)
    updates = draw(request(steps=2), cache)
    times = []
    begin = time.monotonic()
    for update in updates:
        times.append(time.monotonic() - begin)
        if update.step == 1:
            break
    updates.close()
    assert max(b - a for a, b in itertools.pairwise(times)) < 2.0
    assert becomes_idle(transformer)


def test_at_most_two_threads_compute_after_many_stops(cache):
    transformer = count_calls(cache, "pixels", 0.05)
    inside, highest = [0], [0]
    lock = threading.Lock()
    forward = type(transformer).forward

    class ConcurrencyCounter(type(transformer)):
        def forward(self, *args, **kwargs):
            with lock:
                inside[0] += 1
                highest[0] = max(highest[0], inside[0])
            try:
                return forward(self, *args, **kwargs)
            finally:
                with lock:
                    inside[0] -= 1

    transformer.__class__ = ConcurrencyCounter
    for _ in range(20):
        updates = draw(request(steps=50), cache)
        next(updates)
        updates.close()
    keep = [draw(request(steps=3, seed=seed), cache) for seed in range(4)]
    for updates in keep:
        next(updates)
    assert all(last(updates).images for updates in keep)
    assert 1 <= highest[0] <= 2


def test_concurrent_requests_do_not_affect_each_other(cache):
    requests = [
        request(steps=9, seed=1),
        request(steps=5, seed=2, preset="fast", guidance_scale=1.0),
        request(steps=7, seed=3, preset="fastest", guidance_scale=5.0),
        request("latents", steps=6, seed=4, images=2),
    ]
    alone = [last(draw(one, cache)).images for one in requests]
    together: dict[int, list] = {}

    def draw_repeatedly(index: int) -> None:
        together[index] = [last(draw(requests[index], cache)).images for _ in range(3)]

    threads = [threading.Thread(target=draw_repeatedly, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, images in enumerate(alone):
        for again in together[index]:
            assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(images, again, strict=True))


def test_errors_are_raised_in_the_callers_thread(cache):
    cache.get("pixels")[0].register_modules(transformer=tiny.transformer(**tiny.PIXEL_SETTINGS | {"patch_size": 5}))
    with pytest.raises(ValueError, match="multiples of 5"):
        list(draw(request(), cache))
    with pytest.raises(KeyError):
        list(draw(request("nowhere"), cache))
    assert last(draw(request("latents"), cache)).images  # the slots are free again


@pytest.fixture
def lora_folder(cache, tmp_path):
    """A LoRA of the pixel pipeline that changes its pictures."""
    network = tiny.transformer(**tiny.PIXEL_SETTINGS)
    layers = {}
    for name, module in network.named_modules():
        if name.endswith(("img_qkv_proj", "to_out.0")):
            layers[f"{name}.lora_A.weight"] = torch.randn(4, module.in_features)
            layers[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 4) / 4
    cache.get("pixels")[0].save_lora_weights(tmp_path / "style", transformer_lora_layers=layers)
    return tmp_path


def test_a_lora_changes_its_own_requests_only(cache, lora_folder, monkeypatch):
    """Concurrent requests with two weights of one LoRA, and without a LoRA."""
    monkeypatch.setenv("PRX_LORAS", str(lora_folder))
    cache = ModelCache(cache.models, find_loras())
    requests = [
        request(seed=1),
        request(seed=1, lora="style", lora_weight=1.0),
        request(seed=1, lora="style", lora_weight=0.3),
        request(seed=1, lora="style", lora_weight=0.0),
    ]
    alone = [pixels(last(draw(one, cache)).images[0]) for one in requests]
    assert np.array_equal(alone[3], alone[0])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(alone[one] - alone[other]).max() > 3
    wrong = []

    def draw_repeatedly(index: int) -> None:
        for _ in range(4):
            if not np.array_equal(pixels(last(draw(requests[index], cache)).images[0]), alone[index]):
                wrong.append(index)

    threads = [threading.Thread(target=draw_repeatedly, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not cache.get("pixels")[0].get_list_adapters()


def test_a_student_draws_fast_of_its_model(cache, model_folder, lora_folder, monkeypatch):
    """The card of an adapter says so. It draws its own steps without guidance, also together with another LoRA."""
    (lora_folder / "style" / "README.md").write_text("---\ndemo:\n  fast_for: pixels\n  steps: 3\n---\n")
    monkeypatch.setenv("PRX_MODELS", f"{model_folder}:{lora_folder}")
    monkeypatch.setenv("PRX_LORAS", str(lora_folder))
    plain, cache = cache, ModelCache(find_models(), find_loras())
    info = cache.models["pixels"]
    assert (info.preset_steps, info.preset_guidance) == ({"exact": 28, "fast": 3}, {"exact": 4.0, "fast": 1.0})
    assert cache.models["latents"].preset_steps == plain.models["latents"].preset_steps
    pipeline = PRXPixelPipeline.from_pretrained(model_folder / "pixels")
    pipeline.load_lora_weights(lora_folder / "style", adapter_name="student")
    for lora, weight in (("none", 1.0), ("style", 1.5)):
        pipeline.set_adapters("student", weight)
        expected = pipeline(PROMPT, num_inference_steps=3, guidance_scale=1.0, generator=tiny.generators(5)).images[0]
        fast = request(preset="fast", steps=3, guidance_scale=1.0, lora=lora, lora_weight=0.5)
        drawn = last(draw(fast, cache)).images[0]
        assert abs(pixels(drawn) - pixels(expected)).max() <= 1
    exact = [pixels(last(draw(request(), one)).images[0]) for one in (plain, cache)]
    assert np.array_equal(*exact)


def test_a_request_that_waits_for_a_lora_can_be_stopped(cache, lora_folder, monkeypatch):
    monkeypatch.setenv("PRX_LORAS", str(lora_folder))
    cache = ModelCache(cache.models, find_loras())
    stop = threading.Event()
    with cache.lend("pixels", "style", 1.0, stop):
        stop.set()
        with pytest.raises(Stopped), cache.lend("pixels", "style", 0.5, stop):
            pass
