"""The fast preset: its noise levels, and its error on an equation with a known solution."""

import numpy as np
import pytest
import torch

from diffusers_prx import PRXFlowMatchScheduler, fast_scheduler, fast_sigmas

STD = 0.4  # standard deviation of normal data, for which velocity and solution are known


def error(scheduler, **levels) -> float:
    """Return the relative error of the end of a sample; the exact end of x_1 is STD * x_1."""
    scheduler.set_timesteps(**{name: np.array(value) if name == "sigmas" else value for name, value in levels.items()})
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1].double()):
        variance = (1 - sigma) ** 2 * STD**2 + sigma**2
        velocity = x * (sigma - (1 - sigma) * STD**2) / variance  # E[noise - x_0 | x_t]
        x = scheduler.step(velocity, timestep, x).prev_sample.double()
    return (x / STD - 1).abs().item()


def test_nine_fast_steps_are_closer_to_the_solution_than_28_euler_steps():
    euler = error(PRXFlowMatchScheduler(shift=3.0), num_inference_steps=28)
    assert error(fast_scheduler(), sigmas=fast_sigmas(9)) < 0.6 * euler
    evenly = fast_scheduler()
    evenly.register_to_config(flow_shift=3.0)
    assert error(fast_scheduler(), sigmas=fast_sigmas(9)) < 0.6 * error(evenly, num_inference_steps=9)


def test_noise_levels_are_dense_at_both_ends():
    scheduler = fast_scheduler()
    scheduler.set_timesteps(sigmas=np.array(fast_sigmas(8)))
    steps = -scheduler.sigmas.diff()
    assert scheduler.sigmas[0] == pytest.approx(1, abs=1e-5)
    assert scheduler.sigmas[-1] == 0
    assert (steps > 0).all()
    assert max(steps[0], steps[-1]) < 0.7 * steps.max()


def test_wrong_number_of_steps_is_refused():
    for steps in (0, 2.5, True, "9"):
        with pytest.raises(ValueError, match="`num_inference_steps`"):
            fast_sigmas(steps)
    assert fast_sigmas(np.int64(9)) == fast_sigmas(9)
