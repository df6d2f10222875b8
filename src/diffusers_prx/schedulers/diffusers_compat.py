"""Stock schedulers of diffusers: which of them can sample from PRX, and with which noise levels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from .scheduling_prx import PRXFlowMatchScheduler, PRXXPredictionScheduler, check_levels

PREDICTION_TYPES = ("velocity", "x_prediction")
_OURS = (PRXFlowMatchScheduler, PRXXPredictionScheduler)
_SOLVERS = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
# noise levels that are nearer to each other count as one: a step between them would change nothing
SAME_LEVEL = 1e-4
# options that replace the flow-matching noise levels by others
_OTHER_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def is_stock(scheduler: SchedulerMixin) -> bool:
    """True if a scheduler is diffusers' own; all of these step along a velocity."""
    return not isinstance(scheduler, _OURS)


def check_scheduler(scheduler: SchedulerMixin, prediction_type: str) -> None:
    """Check that a scheduler can sample from a PRX transformer.

    Args:
        scheduler: any diffusers scheduler.
        prediction_type: prediction of the transformer, "velocity" or "x_prediction".

    Raises:
        ValueError: if it cannot; the message says which scheduler or settings can.

    Example:
        >>> check_scheduler(PRXFlowMatchScheduler(shift=3.0), "velocity")
    """
    name = type(scheduler).__name__
    if not is_stock(scheduler):
        if scheduler.prediction_type != prediction_type:
            fitting = next(cls.__name__ for cls in _OURS if cls.prediction_type == prediction_type)
            raise ValueError(
                f"`scheduler` is a {name}, but `prediction_type` is {prediction_type!r}: use {fitting}, or"
                f" `prediction_type={scheduler.prediction_type!r}` if the transformer was trained for that."
            )
        return
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # dynamic shifting needs a `mu`, which PRX does not have; the others reverse time, or leave the ODE
        required: dict[str, Any] = {
            "use_dynamic_shifting": False,
            "invert_sigmas": False,
            "stochastic_sampling": False,
        }
    elif isinstance(scheduler, _SOLVERS):
        required = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "zero"}
        required |= dict.fromkeys(_OTHER_GRIDS, False) | {"use_dynamic_shifting": False}
        if isinstance(scheduler, DPMSolverMultistepScheduler):
            required["algorithm_type"] = "dpmsolver++"
    else:
        raise ValueError(
            f"`scheduler` is a {name}; accepted are PRXFlowMatchScheduler, PRXXPredictionScheduler,"
            " FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler and UniPCMultistepScheduler."
        )
    fixes = {key: value for key, value in required.items() if scheduler.config.get(key, value) != value}
    if fixes:
        settings = ", ".join(f"{key}={value!r}" for key, value in fixes.items())
        raise ValueError(
            f"`scheduler` ({name}) cannot sample from PRX with this configuration; make it with"
            f" {name}.from_config(scheduler.config, {settings})."
        )


def set_schedule(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    timesteps: Sequence[float] | np.ndarray | None = None,
    sigmas: Sequence[float] | np.ndarray | None = None,
) -> None:
    """Set the noise levels of one sampling run, on the CPU, where reading them costs no synchronization.

    Our schedulers use custom noise levels as they are. diffusers' FlowMatchEuler and UniPC apply their shift to them;
    without any, they get 1, ..., 1/n, because their defaults differ (FlowMatchEuler shifts twice). DPM-Solver++ takes
    no custom noise levels.

    Args:
        scheduler: scheduler that `check_scheduler` accepts.
        num_inference_steps: number n of steps.
        timesteps: custom timesteps, 1000 * sigma, strictly decreasing, in (0, 1000].
        sigmas: custom noise levels, strictly decreasing, in (0, 1].

    Raises:
        ValueError: if both lists are given, the scheduler does not take one, it is not as described, or the
            scheduler's configuration gives noise levels that do not decrease from at most 1 to 0.

    Example:
        >>> scheduler = PRXFlowMatchScheduler()
        >>> set_schedule(scheduler, 2)
        >>> scheduler.sigmas
        tensor([1.0000, 0.5000, 0.0000])
    """
    name = type(scheduler).__name__
    if timesteps is not None and sigmas is not None:
        raise ValueError("Pass either `timesteps` or `sigmas`, not both.")
    if timesteps is not None:
        timesteps = check_levels("timesteps", timesteps, scheduler.config["num_train_timesteps"])
    if sigmas is not None:
        sigmas = check_levels("sigmas", sigmas)
    if not is_stock(scheduler):
        if timesteps is not None:
            sigmas = timesteps / scheduler.config["num_train_timesteps"]
        scheduler.set_timesteps(None if sigmas is not None else num_inference_steps, sigmas=sigmas)
        return
    if timesteps is not None and not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(f"`timesteps` is given, but `scheduler` is a {name}, which takes none; leave it out.")
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        if sigmas is not None:
            raise ValueError(f"`sigmas` is given, but `scheduler` is a {name}, which takes none; leave it out.")
        scheduler.set_timesteps(num_inference_steps)
    elif timesteps is not None:
        scheduler.set_timesteps(timesteps=list(timesteps))
    else:
        uniform = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]
        scheduler.set_timesteps(sigmas=uniform if sigmas is None else sigmas)
    _check_schedule(scheduler)
    # Otherwise the first step looks up its timestep, and timesteps cast to integers may repeat.
    scheduler.set_begin_index(0)


def cut_schedule(scheduler: SchedulerMixin, level: float) -> None:
    """Start the schedule that `set_schedule` made at a noise level: that level, then the levels below it.

    Args:
        scheduler: scheduler with a schedule.
        level: first noise level, in [0, 1); 0 (up to 1e-4) leaves no step.

    Example:
        >>> scheduler = PRXFlowMatchScheduler()
        >>> set_schedule(scheduler, 4)
        >>> cut_schedule(scheduler, 0.6)
        >>> scheduler.sigmas
        tensor([0.6000, 0.5000, 0.2500, 0.0000])
    """
    sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
    below = sigmas[:-1] < level - SAME_LEVEL
    first = [level] if level > SAME_LEVEL else []
    unit = scheduler.config["num_train_timesteps"]
    scheduler.sigmas = torch.cat([sigmas.new_tensor(first), sigmas[:-1][below], sigmas[-1:]])
    scheduler.timesteps = torch.cat([timesteps.new_tensor([sigma * unit for sigma in first]), timesteps[below]])
    scheduler.num_inference_steps = len(scheduler.timesteps)


def _check_schedule(scheduler: SchedulerMixin) -> None:
    """Raise a ValueError unless the noise levels of a stock scheduler decrease from at most 1 to 0.

    diffusers does not check the options that change them (`shift`, `flow_shift`, `shift_terminal`, ...).
    """
    levels = scheduler.sigmas
    if bool((levels.diff() < 0).all()) and levels[0] <= 1 and levels[-1] == 0:
        return
    shown = [f"{level:.7g}" for level in (*levels[:3].tolist(), *levels[-2:].tolist())]
    raise ValueError(
        f"`scheduler` is a {type(scheduler).__name__} with {len(levels)} noise levels,"
        f" {', '.join(shown[:3])}, ..., {', '.join(shown[3:])}, which do not decrease from at most 1 to 0. Check"
        " `num_inference_steps` and its options `shift`, `flow_shift` and `shift_terminal`."
    )
