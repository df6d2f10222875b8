"""diffusers' own schedulers on PRX's terms: which of them fit, and which noise levels they are given."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from .scheduling_prx import PRXFlowMatchScheduler, PRXXPredictionScheduler, check_levels

PREDICTION_TYPES = ("velocity", "x_prediction")
_OURS = (PRXFlowMatchScheduler, PRXXPredictionScheduler)
_SOLVERS = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
# these pick their grid of noise levels instead of, not on top of, the flow-matching one
_OTHER_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def is_stock(scheduler: Any) -> bool:
    """Whether a scheduler is one of diffusers' own, which all step along a velocity."""
    return not isinstance(scheduler, _OURS)


def check_scheduler(scheduler: Any, prediction_type: str) -> None:
    """Raise a ValueError, with the fix, unless a scheduler can sample with a network that predicts this.

    Args:
        scheduler: any diffusers scheduler.
        prediction_type: what the network predicts, "velocity" or "x_prediction".
    """
    name = type(scheduler).__name__
    if not is_stock(scheduler):
        if scheduler.prediction_type != prediction_type:
            right = next(ours.__name__ for ours in _OURS if ours.prediction_type == prediction_type)
            raise ValueError(
                f"`scheduler` is a {name}, but `prediction_type` is {prediction_type!r}: use {right}, or the"
                f" `prediction_type` {scheduler.prediction_type!r} if that is what the network was trained for."
            )
        return
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # dynamic shifting needs a `mu` that no PRX has; the others turn time round, or leave the ODE
        wrong: dict[str, Any] = {"use_dynamic_shifting": False, "invert_sigmas": False, "stochastic_sampling": False}
    elif isinstance(scheduler, _SOLVERS):
        wrong = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "zero"}
        wrong |= dict.fromkeys(_OTHER_GRIDS, False) | {"use_dynamic_shifting": False}
        if isinstance(scheduler, DPMSolverMultistepScheduler):
            wrong["algorithm_type"] = "dpmsolver++"
    else:
        raise ValueError(
            f"`scheduler` is a {name}; accepted are PRXFlowMatchScheduler, PRXXPredictionScheduler,"
            " FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler and UniPCMultistepScheduler."
        )
    fixes = {key: value for key, value in wrong.items() if scheduler.config.get(key, value) != value}
    if fixes:
        settings = ", ".join(f"{key}={value!r}" for key, value in fixes.items())
        raise ValueError(
            f"`scheduler` ({name}) cannot sample from PRX as it is configured; make it with"
            f" {name}.from_config(scheduler.config, {settings})."
        )


def set_schedule(
    scheduler: Any,
    num_inference_steps: int,
    timesteps: Sequence[float] | np.ndarray | None = None,
    sigmas: Sequence[float] | np.ndarray | None = None,
) -> None:
    """Lay the noise levels of one sampling run on the CPU, where reading them costs no synchronization.

    Args:
        scheduler: one that `check_scheduler` accepts. Our own take `sigmas` and `timesteps` as they are. Of diffusers'
            own, FlowMatchEuler and UniPC apply their shift to what they are given; without `sigmas` they are given
            1, ..., 1/n, since their default grids are other ones (FlowMatchEuler shifts twice). DPM-Solver++ takes no
            noise levels and lays its own.
        num_inference_steps: n.
        timesteps: custom timesteps, 1000 sigma, strictly decreasing, in (0, 1000].
        sigmas: custom noise levels, strictly decreasing, in (0, 1].

    Raises:
        ValueError: both lists, one that this scheduler cannot take or that is not as described, or a configuration
            whose noise levels do not decrease from at most 1 to 0.
    """
    name = type(scheduler).__name__
    if timesteps is not None and sigmas is not None:
        raise ValueError("`timesteps` and `sigmas` were both given; accepted is one of them.")
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
        raise ValueError(f"`timesteps` was given, but the scheduler is a {name}, which takes none.")
    own_grid = isinstance(scheduler, DPMSolverMultistepScheduler)
    if own_grid:
        if sigmas is not None:
            raise ValueError(f"`sigmas` was given, but the scheduler is a {name}, which lays its own noise levels.")
        scheduler.set_timesteps(num_inference_steps)
    elif timesteps is not None:
        scheduler.set_timesteps(timesteps=list(timesteps))
    else:
        exact = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]
        scheduler.set_timesteps(sigmas=exact if sigmas is None else sigmas)
    _check_schedule(scheduler)
    # Their timesteps may repeat once they are cast to integers; without this the first step is looked up by value.
    scheduler.set_begin_index(0)


def _check_schedule(scheduler: Any) -> None:
    """Raise a ValueError unless one of diffusers' schedulers laid noise levels from at most 1 down to 0.

    diffusers does not check its options (`shift`, `flow_shift`, `shift_terminal`, ...), which change the levels.
    """
    levels = scheduler.sigmas
    if bool((levels.diff() < 0).all()) and levels[0] <= 1 and levels[-1] == 0:
        return
    shown = [f"{level:.7g}" for level in (*levels[:3].tolist(), *levels[-2:].tolist())]
    raise ValueError(
        f"`scheduler` is a {type(scheduler).__name__} that lays {len(levels)} noise levels,"
        f" {', '.join(shown[:3])}, ..., {', '.join(shown[3:])}, which do not decrease from at most 1 to 0. Check"
        " `num_inference_steps` and the options of its configuration, such as `shift`, `flow_shift` and"
        " `shift_terminal`."
    )
