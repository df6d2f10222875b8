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

import diffusers_prx
from diffusers_prx import apply_preset
from diffusers_prx import latents as vae_latents
from diffusers_prx.schedulers.diffusers_compat import cut_schedule, set_schedule
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


@dataclass(frozen=True)
class Edit:
    """A picture to change.

    Args:
        image: picture of the request's size.
        mask: mask of this size, white where to draw anew; None to change the whole picture.
        strength: noise level at which the change of a whole picture starts.
    """

    image: Image.Image
    mask: Image.Image | None
    strength: float


def draw(request: Request, cache: ModelCache, edit: Edit | None = None) -> Iterator[Update]:
    """Draw a request, or change a picture; yield after every step, and every `HEARTBEAT_SECONDS` during longer ones.

    Raises:
        Exception: any error of the model cache or the pipeline, in the caller's thread.
    """
    reports: queue.Queue[Update | Exception] = queue.Queue()
    stop = threading.Event()
    arguments = (request, cache, edit, reports, stop)
    threading.Thread(target=_run_request, args=arguments, name="draw", daemon=True).start()
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
    request: Request,
    cache: ModelCache,
    edit: Edit | None,
    reports: "queue.Queue[Update | Exception]",
    stop: threading.Event,
) -> None:
    try:
        while not _SLOTS.acquire(timeout=0.1):
            if stop.is_set():
                return
        try:
            with cache.lend(request.model, request.lora, request.lora_weight, stop, request.preset) as pipeline:
                _sample(request, pipeline, edit, reports, stop)
        finally:
            _SLOTS.release()
    except Stopped:
        pass
    except Exception as error:
        reports.put(error)


@torch.no_grad()
def _sample(
    request: Request,
    pipeline: Any,
    edit: Edit | None,
    reports: "queue.Queue[Update | Exception]",
    stop: threading.Event,
) -> None:
    begin = time.monotonic()
    pipeline, arguments = editing_pipeline(pipeline, edit)
    pipeline, preset_arguments = apply_preset(pipeline, request.preset, request.steps)
    height, width = request.height_width
    scheduler = copy.deepcopy(pipeline.scheduler)
    set_schedule(scheduler, request.steps, sigmas=preset_arguments.get("sigmas"))
    if arguments.get("strength", 1.0) < 1:
        cut_schedule(scheduler, arguments["strength"])
    sigmas = scheduler.sigmas.tolist()
    steps = len(sigmas) - 1
    before = None  # latents before a step; of a changed picture, the first ones are not known here
    if edit is None:
        before = pipeline.prepare_latents(
            request.images,
            pipeline.transformer.config["in_channels"],
            height,
            width,
            pipeline.text_encoder.dtype,
            pipeline.transformer.device,
            request.generators(),
        )

    def report_step(_: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal before
        if stop.is_set():
            raise Stopped
        after = tensors["latents"]
        preview = None
        if before is not None and reports.empty():  # a slow connection gets fewer previews
            clean = predicted_clean(before, after, sigmas[step], sigmas[step + 1])
            preview = preview_image(clean, getattr(pipeline, "vae", None), pipeline.vae_scale_factor)
        before = after
        reports.put(Update(step + 1, steps, time.monotonic() - begin, preview))

    images = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=height,
        width=width,
        num_images_per_prompt=request.images,
        generator=request.generators(),
        callback_on_step_end=report_step,
        **arguments,
        **preset_arguments | {"guidance_scale": request.guidance_scale},
    ).images
    reports.put(Update(steps, steps, time.monotonic() - begin, images=tuple(images)))


def editing_pipeline(pipeline: Any, edit: Edit | None) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline that makes an edit, around the same networks, and the arguments of its call."""
    if edit is None:
        return pipeline, {}
    kind = "Img2Img" if edit.mask is None else "Inpaint"
    name = type(pipeline).__name__.replace("Pipeline", f"{kind}Pipeline")
    pipeline = getattr(diffusers_prx, name).from_pipe(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    if edit.mask is None:
        return pipeline, {"image": edit.image, "strength": edit.strength}
    return pipeline, {"image": edit.image, "mask_image": edit.mask}


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
    """Decode clean latents (B, C, h, w) to one image of at most `MAX_PREVIEW_SIDE` pixels each, in rows of two.

    The latents are downsampled before decoding: decoding whole latents costs more than some steps.
    """
    shrink = max(clean.shape[-2:]) * scale_factor / MAX_PREVIEW_SIDE
    if shrink > 1:
        size = [max(1, round(side / shrink)) for side in clean.shape[-2:]]
        clean = F.interpolate(clean, size=size, mode="area")
    pixels_pm1 = vae_latents.decode(vae, clean)  # (B, 3, H, W)
    columns = min(2, len(pixels_pm1))
    tiles = F.pad(pixels_pm1, (0, 0, 0, 0, 0, 0, 0, -len(pixels_pm1) % columns))  # (rows * columns, 3, H, W)
    grid = tiles.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (3, rows H, columns W)
    pixels_255 = ((grid.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels_255.permute(1, 2, 0).cpu().numpy())
