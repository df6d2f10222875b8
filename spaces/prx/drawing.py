"""From a checked request to pictures: a generator that tells how far it is, and that ends the work when it is closed.

The page can only stop a generator, and the pipeline is one call that runs to its end; so the call runs in a thread of
its own and reports through a queue. Closing the generator (Stop, or a browser that went away) sets an event that the
step callback reads: the work ends at the next step.
"""

import copy
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_prx import fast_scheduler, fast_sigmas
from diffusers_prx import latents as vae_latents
from diffusers_prx.schedulers.diffusers_compat import set_schedule
from model_cache import ModelCache, Stopped
from settings import Request

CONCURRENCY = 2  # requests that are drawn at the same time
PREVIEW_SIDE = 256  # pixels, at most
PATIENCE = 0.5  # seconds between two signs of life, the time in which a Stop is heard during a long step

# A stopped request leaves the page's queue at once, but its thread only at its next step. Whoever comes next waits
# here, so that no sequence of stops makes more than so many threads compute.
_SEATS = threading.BoundedSemaphore(CONCURRENCY)


@dataclass(frozen=True)
class Update:
    """How far a request is. `preview` is new whenever `step` is; `images` are there at the end only."""

    step: int
    steps: int
    seconds: float
    preview: Image.Image | None = None
    images: tuple[Image.Image, ...] = ()


def draw(request: Request, cache: ModelCache) -> Iterator[Update]:
    """Draw, and yield at every step, or every `PATIENCE` seconds while a step takes longer.

    Raises:
        Exception: whatever the pipeline raised, in the caller's thread.
    """
    reports: queue.Queue[Update | Exception] = queue.Queue()
    stop = threading.Event()
    worker = threading.Thread(target=_work, args=(request, cache, reports, stop), name="draw", daemon=True)
    worker.start()
    begin = time.monotonic()
    latest = Update(0, request.steps, 0.0)
    try:
        yield latest
        while not latest.images:
            try:
                report = reports.get(timeout=PATIENCE)
            except queue.Empty:
                yield Update(latest.step, latest.steps, time.monotonic() - begin)
                continue
            if isinstance(report, Exception):
                raise report
            latest = report
            yield latest
    finally:
        stop.set()


def _work(
    request: Request, cache: ModelCache, reports: "queue.Queue[Update | Exception]", stop: threading.Event
) -> None:
    try:
        while not _SEATS.acquire(timeout=0.1):
            if stop.is_set():
                return
        try:
            with cache.lend(request.model, request.lora, request.lora_weight, stop) as pipeline:
                _draw(request, pipeline, reports, stop)
        finally:
            _SEATS.release()
    except Stopped:
        pass
    except Exception as error:
        reports.put(error)


@torch.no_grad()
def _draw(request: Request, pipeline: Any, reports: "queue.Queue[Update | Exception]", stop: threading.Event) -> None:
    begin = time.monotonic()
    pipeline, levels = with_preset(pipeline, request.preset, request.steps)
    height, width = request.height_width
    scheduler = copy.deepcopy(pipeline.scheduler)
    set_schedule(scheduler, request.steps, sigmas=levels)
    sigmas = scheduler.sigmas.tolist()
    # what the call would draw itself; here, because the first preview needs the noise that the first step came from
    noise = pipeline.prepare_latents(
        request.images,
        pipeline.transformer.config["in_channels"],
        height,
        width,
        pipeline.text_encoder.dtype,
        pipeline.transformer.device,
        [torch.Generator().manual_seed(seed) for seed in request.seeds],
    )
    before = noise

    def report_step(_: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal before
        if stop.is_set():
            raise Stopped
        after = tensors["latents"]
        preview = None
        if reports.empty():  # whoever watches a fast model through a slow line sees fewer of the steps
            clean = predicted_clean(before, after, sigmas[step], sigmas[step + 1])
            preview = preview_of(clean, getattr(pipeline, "vae", None), pipeline.vae_scale_factor)
        before = after
        reports.put(Update(step + 1, request.steps, time.monotonic() - begin, preview))

    images = pipeline(
        request.prompt,
        request.negative_prompt,
        height,
        width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.images,
        latents=noise,
        sigmas=levels,
        callback_on_step_end=report_step,
    ).images
    reports.put(Update(request.steps, request.steps, time.monotonic() - begin, images=tuple(images)))


def with_preset(pipeline: Any, preset: str, steps: int) -> tuple[Any, list[float] | None]:
    """The pipeline as a preset of `PRXPipeline` has it, and the noise levels for its call.

    It is a second pipeline around the same networks, with another solver: nothing that another request sees.
    """
    if preset != "fast":
        return pipeline, None
    pipeline = copy.copy(pipeline)
    pipeline.register_modules(scheduler=fast_scheduler())
    return pipeline, fast_sigmas(steps)


def predicted_clean(before: torch.Tensor, after: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """The clean image that a step went towards, with guidance: it stepped along x_s = x_0 + (s / t) (x_t - x_0).

    For Euler that is the prediction of the network; UniPC (arXiv 2302.04867) puts its memory of the steps before into
    it, and what it corrected of `before`.

    Args:
        before: (B, C, h, w), x_t at the noise level `sigma`.
        after: (B, C, h, w), x_s at `sigma_next`, which is lower.
    """
    return (sigma * after - sigma_next * before) / (sigma - sigma_next)


def preview_of(clean: torch.Tensor, vae: Any, scale_factor: int) -> Image.Image:
    """Clean latents (B, C, h, w) as one small picture, side by side.

    They are made small before they are decoded: to decode them whole at every step would cost more than some steps do.
    """
    shrink = max(clean.shape[-2:]) * scale_factor / PREVIEW_SIDE
    if shrink > 1:
        size = [max(1, round(side / shrink)) for side in clean.shape[-2:]]
        clean = F.interpolate(clean, size=size, mode="area")
    pixels_pm1 = vae_latents.decode(vae, clean)  # (B, 3, H, W)
    row = torch.cat(tuple(pixels_pm1), dim=-1).clamp(-1, 1)  # (3, H, B W)
    pixels_255 = ((row + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels_255.permute(1, 2, 0).cpu().numpy())
