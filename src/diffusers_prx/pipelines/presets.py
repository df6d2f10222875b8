"""Sampling presets: exact, fast and fastest, each with the number of steps that the model needs."""

import copy
from collections.abc import Mapping
from typing import Any

from ..schedulers.fast import fast_scheduler, fast_sigmas
from ..schedulers.scheduling_prx import check_count

PRESETS = ("exact", "fast", "fastest")
# prediction of the network -> steps of each preset; training/benchmarks/sampling_error.py measures their errors
DEFAULT_STEPS: dict[str, dict[str, int]] = {
    "velocity": {"exact": 28, "fast": 14, "fastest": 7},
    "x_prediction": {"exact": 28, "fast": 9, "fastest": 7},
}


def check_preset_steps(steps: Any) -> dict[str, int]:
    """Check the `preset_steps` of a pipeline, which may leave out presets.

    Raises:
        ValueError: unless it maps names of `PRESETS` to whole numbers of at least 1.
    """
    if not isinstance(steps, Mapping) or not set(steps) <= set(PRESETS):
        raise ValueError(f"`preset_steps` is {steps!r}; it must map some of {list(PRESETS)} to numbers of steps.")
    return {name: check_count(f"preset_steps[{name!r}]", number) for name, number in steps.items()}


def complete_preset_steps(steps: Any, prediction_type: str) -> dict[str, int]:
    """Return the steps of all presets: those given (or None), over the defaults for a prediction type."""
    return DEFAULT_STEPS[prediction_type] | check_preset_steps(steps or {})


def apply_preset(pipeline: Any, preset: str, num_inference_steps: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline with the solver of a preset, and the arguments of its call: steps, noise levels, guidance.

    The pipeline that you pass stays as it is; the returned one shares its networks.

    Args:
        pipeline: PRX pipeline, for text to image or for editing.
        preset: "exact" and "fastest" use the pipeline's own scheduler, "fast" uses `fast_scheduler`. A network that
            was distilled for few steps draws "fast" with its own scheduler too: its `preset_steps` has no fewer steps
            for "fast" than for "exact".
        num_inference_steps: number of steps; None for the pipeline's `preset_steps`.

    Raises:
        ValueError: if `preset` or `num_inference_steps` is not as described.

    Example:
        >>> fast, settings = apply_preset(pipe, "fast")
        >>> image = fast("A rusty, vintage tram on a sandy beach", **settings).images[0]
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"`preset` is {preset!r}; accepted are {list(PRESETS)}.")
    if num_inference_steps is None:
        num_inference_steps = pipeline.preset_steps[preset]
    settings: dict[str, Any] = {"num_inference_steps": check_count("num_inference_steps", num_inference_steps)}
    guidance_scale = pipeline.config.get("preset_guidance_scale")
    if guidance_scale is not None:
        settings["guidance_scale"] = guidance_scale
    if preset == "fast" and pipeline.preset_steps["fast"] < pipeline.preset_steps["exact"]:
        pipeline = copy.copy(pipeline)
        pipeline.register_modules(scheduler=fast_scheduler())
        settings["sigmas"] = fast_sigmas(num_inference_steps)
    return pipeline, settings
