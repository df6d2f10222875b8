"""Sampling in few steps: a second-order solver of diffusers, and noise levels for it that are dense at both ends."""

from diffusers import UniPCMultistepScheduler

from .scheduling_prx import check_count

FLOW_SHIFT = 1.5
DENSITY = 1.5


def fast_scheduler() -> UniPCMultistepScheduler:
    """Make a UniPC solver of order 2 (arXiv 2302.04867) for any PRX. Use it with the noise levels of `fast_sigmas`.

    Example:
        >>> pipe.scheduler = fast_scheduler()
        >>> image = pipe("A rusty, vintage tram on a sandy beach", sigmas=fast_sigmas(9)).images[0]
    """
    return UniPCMultistepScheduler(
        solver_order=2, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=FLOW_SHIFT
    )


def fast_sigmas(num_inference_steps: int) -> list[float]:
    """Return noise levels for `fast_scheduler`, which shifts them: from 1 down, with small steps at both ends.

    Near noise, the layout of the picture is decided, and the prediction of a briefly trained transformer changes fast.
    Near the image, the last step takes the predicted image as the result. Evenly spaced levels have large steps at one
    of these ends, for any shift: `training/benchmarks/sampling_error.py` measures it.

    Args:
        num_inference_steps: number n of steps, at least 1.

    Returns:
        n levels in (0, 1]: u^p / (u^p + (1 - u)^p) for n evenly spaced u, with p = 1.5.

    Raises:
        ValueError: if `num_inference_steps` is not an integer of at least 1.

    Example:
        >>> [round(sigma, 2) for sigma in fast_sigmas(4)]
        [1.0, 0.84, 0.5, 0.16]
    """
    num_inference_steps = check_count("num_inference_steps", num_inference_steps)
    even = [1 - step / num_inference_steps for step in range(num_inference_steps)]
    return [u**DENSITY / (u**DENSITY + (1 - u) ** DENSITY) for u in even]
