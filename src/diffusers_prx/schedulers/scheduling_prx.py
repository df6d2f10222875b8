"""The two schedulers of PRX: the same grid of noise levels, and two things that a network may predict.

Time runs as in the whole package: sigma (also written t) is 0 at the clean image and 1 at pure noise,
x_t = (1 - sigma) x_0 + sigma noise, velocity = noise - x_0 (rectified flow, arXiv 2209.03003; flow matching,
arXiv 2210.02747). A *timestep* of a diffusers scheduler is `num_train_timesteps * sigma`.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

# Options of FlowMatchEulerDiscreteScheduler that change its grid or its step, and that have no counterpart here.
STOCK_ONLY_OPTIONS = (
    "use_dynamic_shifting",
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


@dataclass
class PRXSchedulerOutput(BaseOutput):
    """What `step` returns.

    Args:
        prev_sample (`torch.Tensor`): the sample at the next, lower noise level; shape of the sample given.
    """

    prev_sample: torch.Tensor


class _PRXSchedulerBase(SchedulerMixin, ConfigMixin):
    """The grid, the noising and the draw of training timesteps; subclasses say what the network predicts."""

    order = 1
    init_noise_sigma = 1.0
    # lets diffusers' from_config read a stock configuration without a warning for each key that it does not need
    _compatibles = ["FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012
    prediction_type: ClassVar[str]

    def _setup(self) -> None:
        """Check the configuration and start with an empty schedule. NumPy's numbers become Python's, for JSON."""
        checked: dict[str, Any] = {
            "num_train_timesteps": check_count("num_train_timesteps", self.config["num_train_timesteps"]),
            "logit_mean": check_number("logit_mean", self.config["logit_mean"], -math.inf, math.inf),
            "uniform_fraction": check_number("uniform_fraction", self.config["uniform_fraction"], 0, 1, closed=True),
        }
        for name in ("shift", "logit_std"):
            checked[name] = check_number(name, self.config[name], 0, math.inf)
        for name in ("min_timestep", "clamp"):
            if name in self.config:
                checked[name] = check_number(name, self.config[name], 0, 1)
        self.register_to_config(**checked)
        sampling = self.config["timestep_sampling"]
        if not isinstance(sampling, str) or sampling not in ("logit_normal", "uniform"):
            raise ValueError(
                f"`timestep_sampling` is {self.config['timestep_sampling']!r}; accepted: 'logit_normal', 'uniform'."
            )
        self.num_inference_steps: int | None = None
        self.sigmas = torch.empty(0)
        self.timesteps = torch.empty(0)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As `ConfigMixin.from_config`; reads configurations of FlowMatchEulerDiscreteScheduler too.

        Raises:
            ValueError: the configuration asks for something that only FlowMatchEulerDiscreteScheduler does.
        """
        unknown = {key: config[key] for key in STOCK_ONLY_OPTIONS if isinstance(config, dict) and config.get(key)}
        if unknown:
            raise ValueError(
                f"`config` sets {unknown}, which {cls.__name__} does not do; switch these options off, or use"
                " diffusers' FlowMatchEulerDiscreteScheduler."
            )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @property
    def shift(self) -> float:
        """The shift s of the noise levels, sigma -> s sigma / (1 + (s - 1) sigma) (arXiv 2403.03206, 5.3.2)."""
        return float(self.config["shift"])

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | np.ndarray | torch.Tensor | None = None,
    ) -> None:
        """Lay the grid for one sampling run: `sigmas` (n+1 values, 1 ... 0) and `timesteps` (n values).

        Args:
            num_inference_steps: n, at least 1. May be left out when `sigmas` are given.
            device: where `sigmas` and `timesteps` are put; the CPU when None.
            sigmas: n noise levels, strictly decreasing, in (0, 1]. They are used as they are, *not* shifted again
                (FlowMatchEulerDiscreteScheduler shifts what it is given); the final 0 is appended.

        Raises:
            ValueError: neither argument, a count below 1, or noise levels that are not as described.
        """
        if num_inference_steps is not None or sigmas is None:
            num_inference_steps = check_count("num_inference_steps", num_inference_steps)
        if sigmas is None:
            uniform = np.linspace(1.0, 0.0, num_inference_steps + 1, dtype=np.float64)  # type: ignore[operator]
            grid = self.shift * uniform / (1 + (self.shift - 1) * uniform)
        else:
            given = check_levels("sigmas", sigmas)
            if num_inference_steps is not None and num_inference_steps != given.size:
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps} but `sigmas` has {given.size} values; leave one"
                    " of them out, or make them agree."
                )
            grid = np.append(given, 0.0)
        if bool(np.any(np.diff(grid.astype(np.float32)) >= 0)):
            raise ValueError(
                f"`num_inference_steps` is {len(grid) - 1} and `shift` {self.shift:g}: such noise levels repeat in"
                " float32. Take fewer steps, or a shift nearer to 1."
            )
        self.num_inference_steps = len(grid) - 1
        # float64 up to here, so that both lists are the correctly rounded float32 values
        self.sigmas = torch.from_numpy(grid.astype(np.float32)).to(device)
        timesteps = grid[:-1] * self.config["num_train_timesteps"]
        self.timesteps = torch.from_numpy(timesteps.astype(np.float32)).to(device)

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """The place of a timestep in the schedule.

        Raises:
            ValueError: there is no schedule yet, or the timestep is none of it.
        """
        if self.num_inference_steps is None:
            raise ValueError("There is no schedule yet: call `set_timesteps` first.")
        if isinstance(timestep, torch.Tensor) and timestep.numel() == 1:
            timestep = timestep.item()
        if not is_number(timestep):
            raise ValueError(f"`timestep` is {timestep!r}; it has to be one of `scheduler.timesteps`.")
        value = float(timestep)
        distance = (self.timesteps.cpu().double() - value).abs()
        index = int(distance.argmin())
        # wide enough for a value that went through a float32 product, far below the spacing of any schedule
        if not float(distance[index]) <= 1e-6 * self.config["num_train_timesteps"]:
            raise ValueError(
                f"`timestep` is {value}, which is none of this schedule's timesteps: {self.timesteps.tolist()}."
            )
        return index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample itself: PRX scales no input (diffusers' interface)."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noise a clean sample: x_t = (1 - sigma) x_0 + sigma noise, in float32, at any noise level.

        Args:
            sample (B, ...): x_0.
            timestep: one value or (B,) values in [0, num_train_timesteps], in the unit of `timesteps`; they need not
                be on the grid.
            noise (B, ...): a draw of the noise.

        Returns:
            (B, ...) in the sample's dtype.

        Raises:
            ValueError: the shapes do not agree, the tensors hold whole numbers, or a timestep is out of its range.
        """
        _check_tensors(sample=sample, noise=noise)
        highest = self.config["num_train_timesteps"]
        timestep = _as_levels("timestep", timestep, highest)
        if not bool(((timestep >= 0) & (timestep <= highest)).all()):
            raise ValueError(f"`timestep` is {timestep.tolist()}; it has to be in [0, {highest}].")
        sigma = _like_sample(timestep.to(sample.device) / highest, sample)
        return ((1 - sigma) * sample.float() + sigma * noise.float()).to(sample.dtype)

    def sample_timesteps(
        self, n: int, generator: torch.Generator | None = None, device: str | torch.device | None = None
    ) -> torch.Tensor:
        """Draw noise levels for training, in [min_timestep, 1), float32 of shape (n,).

        A logit-normal (arXiv 2403.03206) or uniform draw is shifted and held inside the range. Of the logit-normal
        ones each is then replaced, with probability `uniform_fraction`, by a uniform draw on that range, which is not
        shifted. Each sample takes three numbers of the generator whatever comes out, so that n draws of one generator
        and one draw of each of n generators have the same distribution, and the draw is a pure function of the
        generator.

        Args:
            n: how many, at least 1.
            generator: torch's global one when None.
            device: where the result goes; the generator's device when None.

        Raises:
            ValueError: `n` is not a whole number of at least 1, or `generator` is not a generator.
        """
        n = check_count("n", n)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"`generator` is a {type(generator).__name__}; it has to be a torch.Generator or None.")
        config, low = self.config, self.config["min_timestep"]
        source = generator.device if generator is not None else "cpu"
        u, coin, u_plain = torch.rand(n, 3, generator=generator, device=source).unbind(1)  # each (n,)
        # The inverse of the distribution function on [F(low), 1) is exactly "draw again until inside the range".
        low_unshifted = low / (self.shift - (self.shift - 1) * low)
        if config["timestep_sampling"] == "logit_normal":
            z_low = (math.log(low_unshifted / (1 - low_unshifted)) - config["logit_mean"]) / config["logit_std"]
            p_low = 0.5 * math.erfc(-z_low / math.sqrt(2))
            t = torch.sigmoid(
                config["logit_mean"] + config["logit_std"] * torch.special.ndtri(p_low + (1 - p_low) * u)
            )
        else:
            t = low_unshifted + (1 - low_unshifted) * u
        t = self.shift * t / (1 + (self.shift - 1) * t)
        if config["timestep_sampling"] == "logit_normal":
            t = torch.where(coin < config["uniform_fraction"], low + (1 - low) * u_plain, t)
        # float32 rounds the ends of the range over its edges: 1 itself is excluded
        return t.clamp(low, 1 - 2**-24).to(device)

    def velocity(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """The network's prediction as a velocity, float32. Arguments as in `clean`."""
        raise NotImplementedError

    def clean(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """The network's prediction as a clean image x_0, float32."""
        raise NotImplementedError

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> PRXSchedulerOutput | tuple[torch.Tensor]:
        """One Euler step to the next lower noise level. Keeps no state: the place comes from `timestep`.

        Args:
            model_output (B, ...): what the network predicts (see `prediction_type`).
            timestep: one of `timesteps`.
            sample (B, ...): x_t at this timestep.
            return_dict: a plain tuple when False.

        Returns:
            `PRXSchedulerOutput`; computed in float32, in the dtype of `model_output`.

        Raises:
            ValueError: a timestep that is not in the schedule, or tensors of other shapes or of whole numbers.
        """
        _check_tensors(sample=sample, model_output=model_output)
        index = self.index_for_timestep(timestep)
        sigma, sigma_next = self.sigmas[index].item(), self.sigmas[index + 1].item()
        prev = self._step(model_output.float(), sample.float(), sigma, sigma_next).to(model_output.dtype)
        return PRXSchedulerOutput(prev_sample=prev) if return_dict else (prev,)

    def _step(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
        raise NotImplementedError


class PRXFlowMatchScheduler(_PRXSchedulerBase):
    """The scheduler of a PRX that predicts velocity, v = noise - x_0.

    Args:
        num_train_timesteps: the unit of `timesteps`: timestep = num_train_timesteps * sigma.
        shift: s of the shift s t / (1 + (s - 1) t) of both the sampling grid and the training draw. PRX uses 1 at
            256 pixels and 3 at 1024.
        timestep_sampling: "logit_normal" or "uniform", the base distribution in training.
        logit_mean: mean of the normal behind the logit-normal.
        logit_std: standard deviation of that normal.
        uniform_fraction: the share of logit-normal training draws that is uniform and unshifted instead.
        min_timestep: the lowest noise level in training.

    Raises:
        ValueError: an argument is outside of what is said above.
    """

    prediction_type = "velocity"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        timestep_sampling: Literal["logit_normal", "uniform"] = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        uniform_fraction: float = 0.1,
        min_timestep: float = 1e-3,
    ):
        self._setup()

    def velocity(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """The network's prediction as a velocity, float32: the prediction itself. Arguments as in `clean`."""
        return model_output.float()

    def clean(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """The network's prediction as a clean image, float32: x_t - sigma v.

        Args:
            model_output (B, ...): the predicted velocity.
            sample (B, ...): x_t.
            sigma: one value or (B,) noise levels in [0, 1], as `sample_timesteps` draws them.
        """
        _check_tensors(sample=sample, model_output=model_output)
        sigma = _like_sample(_as_levels("sigma", sigma).to(sample.device), sample)
        return sample.float() - sigma * model_output.float()

    def _step(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
        return sample + (sigma_next - sigma) * model_output


class PRXXPredictionScheduler(_PRXSchedulerBase):
    """The scheduler of a PRX that predicts the clean image x_0 (JiT, arXiv 2511.13720).

    A step goes in closed form towards the predicted image, x_s = x_0 + (s / t) (x_t - x_0): the same line as an Euler
    step, without the division by a small t that would need a clamp, so that a perfect prediction leaves no noise.

    Args:
        clamp: in *training*, velocity = (x_t - x_0) / max(t, clamp), so that the loss stays bounded near t = 0.
        num_train_timesteps, shift, timestep_sampling, logit_mean, logit_std, uniform_fraction, min_timestep: as in
            `PRXFlowMatchScheduler`.

    Raises:
        ValueError: an argument is outside of what is said above.
    """

    prediction_type = "x_prediction"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        timestep_sampling: Literal["logit_normal", "uniform"] = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        uniform_fraction: float = 0.1,
        min_timestep: float = 1e-3,
        clamp: float = 0.05,
    ):
        self._setup()

    def velocity(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """The network's prediction as the velocity of the training loss, float32: (x_t - x_0) / max(sigma, clamp).

        Args:
            model_output (B, ...): the predicted clean image.
            sample (B, ...): x_t.
            sigma: one value or (B,) noise levels in [0, 1], as `sample_timesteps` draws them.
        """
        _check_tensors(sample=sample, model_output=model_output)
        sigma = _like_sample(_as_levels("sigma", sigma).to(sample.device), sample)
        return (sample.float() - model_output.float()) / sigma.clamp(min=self.config["clamp"])

    def clean(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """The network's prediction as a clean image, float32: the prediction itself. Arguments as in `velocity`."""
        return model_output.float()

    def _step(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
        return model_output + (sigma_next / sigma) * (sample - model_output)


def is_number(value: Any) -> bool:
    """True for a finite number of Python or NumPy that a float can hold; booleans, strings and tensors are none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int of more than 308 digits
        return False


def check_number(name: str, value: Any, low: float, high: float, closed: bool = False) -> float | int:
    """Return a finite number between low and high (those values included if `closed`), as a number of Python.

    Raises:
        ValueError: anything else; NumPy's numbers are numbers, booleans and strings are not.
    """
    if not is_number(value) or not (low <= value <= high if closed else low < value < high):
        edges = "[]" if closed else "()"
        raise ValueError(f"`{name}` is {value!r}; it has to be a finite number in {edges[0]}{low}, {high}{edges[1]}.")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_count(name: str, value: Any) -> int:
    """Return a whole number of at least 1, as an int of Python.

    Raises:
        ValueError: anything else; NumPy's integers are whole numbers, 32.0 and True are not.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; it has to be a whole number of at least 1.")
    return int(value)


def check_levels(name: str, values: Any, highest: float = 1.0) -> np.ndarray:
    """Return noise levels as a float64 array: at least one, strictly decreasing, in (0, highest].

    Args:
        name: argument that the error names.
        values: list, tuple, array or tensor of one dimension.
        highest: unit of the values, 1 for sigmas.

    Raises:
        ValueError: anything else. Levels have to differ as float32 too, in which schedulers keep them.
    """
    wanted = f"a list of strictly decreasing numbers in (0, {highest:g}]"
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().tolist()
    elif isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise ValueError(f"`{name}` is {values!r}; it has to be {wanted}.")
    plain = [value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value for value in values]
    if not all(is_number(value) for value in plain):
        raise ValueError(f"`{name}` is {values!r}; it has to be {wanted}.")
    levels = np.array([float(value) for value in plain], dtype=np.float64)
    kept = (levels / highest).astype(np.float32)
    if not levels.size or not bool(np.all((kept > 0) & (levels <= highest))) or bool(np.any(np.diff(kept) >= 0)):
        raise ValueError(f"`{name}` is {values!r}; it has to be {wanted}.")
    return levels


def _check_tensors(sample: torch.Tensor, **others: torch.Tensor) -> None:
    """Raise a ValueError unless all are tensors of real numbers (whole ones would be cut) in the sample's shape."""
    for name, tensor in {"sample": sample, **others}.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            came = f"of {tensor.dtype}" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"`{name}` is {came}; it has to be a floating-point tensor.")
        if tensor.shape != sample.shape:
            raise ValueError(f"`{name}` is {tuple(tensor.shape)}; it has to be as `sample`, {tuple(sample.shape)}.")


def _as_levels(name: str, values: Any, highest: float = 1.0) -> torch.Tensor:
    """One value or (B,) values as float32. The values of a tensor are not checked: that would wait for a GPU."""
    tensor = isinstance(values, torch.Tensor) and not values.is_complex() and values.dtype != torch.bool
    if not tensor and not (is_number(values) and 0 <= values <= highest):
        raise ValueError(f"`{name}` is {values!r}; it has to be in [0, {highest:g}], or a tensor of one for each row.")
    return torch.as_tensor(values, dtype=torch.float32)


def _like_sample(sigma: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """() or (B,) noise levels with as many trailing dimensions as the sample (B, ...) needs to broadcast."""
    if sigma.numel() != 1 and sigma.shape != sample.shape[:1]:
        raise ValueError(
            f"There are {tuple(sigma.shape)} noise levels for a sample of shape {tuple(sample.shape)}; give one value,"
            " or one for each row."
        )
    return sigma.reshape(-1, *[1] * (sample.ndim - 1))
