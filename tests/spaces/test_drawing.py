"""From a request to pictures: the same as the pipeline's call, with true previews, and an end when nobody waits."""

import copy
import itertools
import threading
import time

import numpy as np
import pytest
import torch

import tiny
from diffusers_prx.schedulers import PRXFlowMatchScheduler
from diffusers_prx.schedulers.diffusers_compat import set_schedule
from space_tools import counted, rests

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")

from drawing import Update, draw, predicted_clean, preview_of, with_preset
from model_cache import ModelCache, Stopped, find_loras
from settings import PRESETS, Request

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
def test_pictures_are_those_of_the_pipelines_call(cache, model, preset):
    updates = list(draw(request(model, preset=preset, images=2), cache))
    pipeline, levels = with_preset(cache.get(model)[0], preset, 4)
    expected = pipeline(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=3.0,
        num_images_per_prompt=2,
        generator=tiny.generators(5, 6),
        sigmas=levels,
    ).images
    for image, other in zip(updates[-1].images, expected, strict=True):
        assert np.array_equal(pixels(image), pixels(other))
    steps = [update.step for update in updates]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 4)
    assert pixels(updates[-1].images[0]).std() > 5  # or all pictures would be the same grey


def test_an_image_of_several_is_the_one_drawn_alone(cache):
    several = last(draw(request(images=3), cache)).images
    alone = last(draw(request(images=3).of_image(2), cache)).images
    assert len(alone) == 1
    assert abs(pixels(several[2]) - pixels(alone[0])).max() <= 1  # another size of batch rounds differently
    assert abs(pixels(several[2]) - pixels(several[1])).max() > 20


@pytest.mark.parametrize("preset", PRESETS)
def test_the_clean_image_is_what_the_solver_aimed_at(preset):
    """On exactly solvable data: a step of Euler aims at the prediction itself; every last step ends on its aim."""
    network = tiny.transformer(cls=tiny.GaussianData)
    pipeline = tiny.latent_pipeline(transformer=network, scheduler=PRXFlowMatchScheduler())
    pipeline, levels = with_preset(pipeline, preset, 6)
    noise = torch.randn(2, 4, 16, 16)
    scheduler = copy.deepcopy(pipeline.scheduler)
    set_schedule(scheduler, 6, sigmas=levels)
    sigmas = scheduler.sigmas
    states = [noise]
    pipeline(
        PROMPT,
        num_inference_steps=6,
        guidance_scale=1,
        num_images_per_prompt=2,
        latents=noise,
        sigmas=levels,
        output_type="latent",
        callback_on_step_end=lambda _, step, timestep, tensors: states.append(tensors["latents"]) or {},
    )
    assert len(states) == 7
    errors = []
    for step in range(6):
        aimed = predicted_clean(states[step], states[step + 1], sigmas[step].item(), sigmas[step + 1].item())
        velocity = network(states[step], sigmas[step].expand(2), None)[0]
        errors.append((aimed - (states[step] - sigmas[step] * velocity)).abs().max().item())
    assert errors[0] < 1e-5  # no solver has a memory yet
    assert max(errors) > 1e-3 if preset == "fast" else max(errors) < 1e-5
    assert errors[-1] < 1e-5  # the last step is one of first order
    end = predicted_clean(states[5], states[6], sigmas[5].item(), 0.0)
    assert (end - states[6]).abs().max() < 1e-6


@torch.no_grad()
def test_a_preview_is_small_and_shows_all_images():
    grey = torch.zeros(2, 3, 1024, 512)
    grey[1] = 1.0
    image = preview_of(grey, None, 1)
    assert image.size == (2 * 128, 256)
    assert (image.getpixel((0, 0)), image.getpixel((200, 0))) == ((128,) * 3, (255,) * 3)
    vae = tiny.vae_kl()
    latents = torch.randn(1, 4, 512, 256)
    assert preview_of(latents, vae, 2).size == (128, 256)
    whole = torch.randn(1, 4, 16, 16)
    decoded = tiny.latent_pipeline(vae=vae)._decode(whole).clamp(-1, 1)
    assert abs(pixels(preview_of(whole, vae, 2)) - ((decoded[0] + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 0.51


def test_the_last_preview_is_the_picture(cache):
    counted(cache, "pixels", 0.3)  # slow enough that every step is shown
    updates = list(draw(request(), cache))
    previews = [update.preview for update in updates if update.preview is not None]
    assert len(previews) == 4
    assert np.array_equal(pixels(previews[-1]), pixels(updates[-1].images[0]))
    assert abs(pixels(previews[0]) - pixels(previews[-1])).max() > 5


def test_a_closed_generator_ends_the_work_within_a_step(cache):
    network = counted(cache, "pixels", 0.3)
    updates = draw(request(steps=50), cache)
    while next(updates).step < 2:
        pass
    seen = network.calls
    updates.close()
    assert rests(network)
    assert network.calls <= seen + 1


def test_a_step_that_takes_long_gives_signs_of_life(cache):
    network = counted(cache, "pixels", 2.5)
    updates = draw(request(steps=2), cache)
    times = []
    begin = time.monotonic()
    for update in updates:
        times.append(time.monotonic() - begin)
        if update.step == 1:
            break
    updates.close()
    assert max(b - a for a, b in itertools.pairwise(times)) < 2.0
    assert rests(network)


def test_stops_and_starts_never_make_more_threads_compute(cache):
    """Twenty requests that are given up at once: the network is never in more than two calls."""
    network = counted(cache, "pixels", 0.05)
    inside, most = [0], [0]
    lock = threading.Lock()
    forward = type(network).forward

    class Watched(type(network)):
        def forward(self, *args, **kwargs):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            try:
                return forward(self, *args, **kwargs)
            finally:
                with lock:
                    inside[0] -= 1

    network.__class__ = Watched
    for _ in range(20):
        updates = draw(request(steps=50), cache)
        next(updates)
        updates.close()
    keep = [draw(request(steps=3, seed=seed), cache) for seed in range(4)]
    for updates in keep:
        next(updates)
    assert all(last(updates).images for updates in keep)
    assert 1 <= most[0] <= 2


def test_two_at_once_do_not_disturb_each_other(cache):
    asked = [
        request(steps=9, seed=1),
        request(steps=5, seed=2, preset="fast", guidance_scale=1.0),
        request(steps=7, seed=3, preset="fastest", guidance_scale=5.0),
        request("latents", steps=6, seed=4, images=2),
    ]
    alone = [last(draw(one, cache)).images for one in asked]
    together: dict[int, list] = {}

    def person(index: int) -> None:
        together[index] = [last(draw(asked[index], cache)).images for _ in range(3)]

    threads = [threading.Thread(target=person, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, images in enumerate(alone):
        for again in together[index]:
            assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(images, again, strict=True))


def test_an_error_reaches_who_waits(cache):
    cache.get("pixels")[0].register_modules(transformer=tiny.transformer(**tiny.PIXEL_SETTINGS | {"patch_size": 5}))
    with pytest.raises(ValueError, match="multiples of 5"):
        list(draw(request(), cache))
    with pytest.raises(KeyError):
        list(draw(request("nowhere"), cache))
    assert last(draw(request("latents"), cache)).images  # the seats are free again


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
    """Two weights of one LoRA, and no LoRA, at the same time: each as alone."""
    monkeypatch.setenv("PRX_LORAS", str(lora_folder))
    cache = ModelCache(cache.models, find_loras())
    asked = [
        request(seed=1),
        request(seed=1, lora="style", lora_weight=1.0),
        request(seed=1, lora="style", lora_weight=0.3),
        request(seed=1, lora="style", lora_weight=0.0),
    ]
    alone = [pixels(last(draw(one, cache)).images[0]) for one in asked]
    assert np.array_equal(alone[3], alone[0])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(alone[one] - alone[other]).max() > 3
    wrong = []

    def person(index: int) -> None:
        for _ in range(4):
            if not np.array_equal(pixels(last(draw(asked[index], cache)).images[0]), alone[index]):
                wrong.append(index)

    threads = [threading.Thread(target=person, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not cache.get("pixels")[0].get_list_adapters()


def test_who_waits_for_a_lora_can_stop(cache, lora_folder, monkeypatch):
    monkeypatch.setenv("PRX_LORAS", str(lora_folder))
    cache = ModelCache(cache.models, find_loras())
    stop = threading.Event()
    with cache.lend("pixels", "style", 1.0, stop):
        stop.set()
        with pytest.raises(Stopped), cache.lend("pixels", "style", 0.5, stop):
            pass
