"""Few steps: a solver of second order, from diffusers, and noise levels that are dense at both ends for it."""

from diffusers import UniPCMultistepScheduler

from .scheduling_prx import check_count

FLOW_SHIFT = 1.5
DENSITY = 1.5


def fast_scheduler() -> UniPCMultistepScheduler:
    """UniPC of order 2 (arXiv 2302.04867) for any PRX, to be called with the noise levels of `fast_sigmas`.

    >>> pipe.scheduler = fast_scheduler()
    >>> image = pipe("A rusty, vintage tram on a sandy beach", sigmas=fast_sigmas(9)).images[0]
    """
    return UniPCMultistepScheduler(
        solver_order=2, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=FLOW_SHIFT
    )


def fast_sigmas(num_inference_steps: int) -> list[float]:
    """Noise levels for `fast_scheduler`, which shifts them: from 1 down, with small steps at both ends.

    Near noise the layout of the picture is decided, and a network that was trained for a short time changes fast
    there; near the image the last step takes the predicted image for the image. Evenly spaced levels, with any shift,
    give up one or the other: `training/benchmarks/sampling_error.py` measures it.

    Args:
        num_inference_steps: n, at least 1.

    Returns:
        n levels in (0, 1], u^p / (u^p + (1 - u)^p) with p = 1.5 of n evenly spaced u.

    Raises:
        ValueError: not a whole number of at least 1.
    """
    num_inference_steps = check_count("num_inference_steps", num_inference_steps)
    even = [1 - step / num_inference_steps for step in range(num_inference_steps)]
    return [u**DENSITY / (u**DENSITY + (1 - u) ** DENSITY) for u in even]
