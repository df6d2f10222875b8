"""Drawing: a generator that yields the progress of a request, and stops the work when it is closed.

gradio can cancel generators only, and a pipeline call runs to its end. So the call runs in its own thread and reports
through a queue. Closing the generator (Stop, or a disconnected browser) sets an event that the step callback checks:
the work ends at the next step.
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

CONCURRENCY = 2  # requests drawn at the same time
MAX_PREVIEW_SIDE = 256  # pixels
HEARTBEAT_SECONDS = 0.5  # longest time between two updates; gradio cancels a generator when it yields

# A stopped request leaves gradio's queue at once, but its thread ends at its next step only. The next request waits
# for a slot, so that stops never make more than `CONCURRENCY` threads compute.
_SLOTS = threading.BoundedSemaphore(CONCURRENCY)


@dataclass(frozen=True)
class Update:
    """Progress of a request. The last update has the images.

    Args:
        step: number of finished steps.
        steps: number of all steps.
        seconds: time since the request began.
        preview: predicted clean image after the step; None for a heartbeat, or for a client that reads slowly.
        images: finished images.
    """

    step: int
    steps: int
    seconds: float
    preview: Image.Image | None = None
    images: tuple[Image.Image, ...] = ()


def draw(request: Request, cache: ModelCache) -> Iterator[Update]:
    """Draw a request; yield after every step, and every `HEARTBEAT_SECONDS` during longer ones.

    Raises:
        Exception: any error of the model cache or the pipeline, in the caller's thread.
    """
    reports: queue.Queue[Update | Exception] = queue.Queue()
    stop = threading.Event()
    threading.Thread(target=_run_request, args=(request, cache, reports, stop), name="draw", daemon=True).start()
    begin = time.monotonic()
    latest = Update(0, request.steps, 0.0)
    try:
        yield latest
        while not latest.images:
            try:
                report = reports.get(timeout=HEARTBEAT_SECONDS)
            except queue.Empty:
                yield Update(latest.step, latest.steps, time.monotonic() - begin)
                continue
            if isinstance(report, Exception):
                raise report
            latest = report
            yield latest
    finally:
        stop.set()


def _run_request(
    request: Request, cache: ModelCache, reports: "queue.Queue[Update | Exception]", stop: threading.Event
) -> None:
    try:
        while not _SLOTS.acquire(timeout=0.1):
            if stop.is_set():
                return
        try:
            with cache.lend(request.model, request.lora, request.lora_weight, stop) as pipeline:
                _sample(request, pipeline, reports, stop)
        finally:
            _SLOTS.release()
    except Stopped:
        pass
    except Exception as error:
        reports.put(error)


@torch.no_grad()
def _sample(
    request: Request, pipeline: Any, reports: "queue.Queue[Update | Exception]", stop: threading.Event
) -> None:
    begin = time.monotonic()
    pipeline, preset_sigmas = apply_preset(pipeline, request.preset, request.steps)
    height, width = request.height_width
    scheduler = copy.deepcopy(pipeline.scheduler)
    set_schedule(scheduler, request.steps, sigmas=preset_sigmas)
    sigmas = scheduler.sigmas.tolist()
    # the noise that the call itself would draw; the first preview needs it
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
        if reports.empty():  # a slow connection gets fewer previews
            clean = predicted_clean(before, after, sigmas[step], sigmas[step + 1])
            preview = preview_image(clean, getattr(pipeline, "vae", None), pipeline.vae_scale_factor)
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
        sigmas=preset_sigmas,
        callback_on_step_end=report_step,
    ).images
    reports.put(Update(request.steps, request.steps, time.monotonic() - begin, images=tuple(images)))


def apply_preset(pipeline: Any, preset: str, steps: int) -> tuple[Any, list[float] | None]:
    """Return the pipeline with the solver of a preset, and the `sigmas` for its call.

    The "fast" preset gets a second pipeline around the same networks: other requests keep their solver.
    """
    if preset != "fast":
        return pipeline, None
    pipeline = copy.copy(pipeline)
    pipeline.register_modules(scheduler=fast_scheduler())
    return pipeline, fast_sigmas(steps)


def predicted_clean(before: torch.Tensor, after: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """Return the guided prediction x_0 of a step, which moved along x_s = x_0 + (s / t) (x_t - x_0).

    For Euler this is the prediction of the network. For UniPC (arXiv 2302.04867) it includes the extrapolation from
    earlier steps and the correction of `before`.

    Args:
        before: latents x_t (B, C, h, w) at noise level `sigma`.
        after: latents x_s (B, C, h, w) at noise level `sigma_next` < `sigma`.

    Returns:
        Clean latents (B, C, h, w).
    """
    return (sigma * after - sigma_next * before) / (sigma - sigma_next)


def preview_image(clean: torch.Tensor, vae: Any, scale_factor: int) -> Image.Image:
    """Decode clean latents (B, C, h, w) to one image of at most `MAX_PREVIEW_SIDE` pixels each, side by side.

    The latents are downsampled before decoding: decoding whole latents costs more than some steps.
    """
    shrink = max(clean.shape[-2:]) * scale_factor / MAX_PREVIEW_SIDE
    if shrink > 1:
        size = [max(1, round(side / shrink)) for side in clean.shape[-2:]]
        clean = F.interpolate(clean, size=size, mode="area")
    pixels_pm1 = vae_latents.decode(vae, clean)  # (B, 3, H, W)
    row = torch.cat(tuple(pixels_pm1), dim=-1).clamp(-1, 1)  # (3, H, B W)
    pixels_255 = ((row + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels_255.permute(1, 2, 0).cpu().numpy())
