"""Schedulers of PRX for the two predictions of its transformers, velocity and clean image, with the same noise levels.

Time is as in the whole package: sigma (also written t) is 0 at the clean image and 1 at pure noise,
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

# Options of FlowMatchEulerDiscreteScheduler that change its noise levels or its step, and that do not exist here.
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
    """Return value of `step`.

    Args:
        prev_sample: (B, ...), sample at the next, lower noise level.

    Example:
        >>> sample = scheduler.step(model_output, timestep, sample).prev_sample
    """

    prev_sample: torch.Tensor


class _PRXSchedulerBase(SchedulerMixin, ConfigMixin):
    """Noise levels, noising and training timesteps. Subclasses define the prediction and the step."""

    order = 1
    init_noise_sigma = 1.0
    # diffusers then reads stock configurations without a warning for each key that does not exist here
    _compatibles = ["FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012
    prediction_type: ClassVar[str]

    def _setup(self) -> None:
        """Check the configuration and start without a schedule. NumPy numbers become Python numbers, for JSON."""
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
            raise ValueError(f"`timestep_sampling` is {sampling!r}; accepted are 'logit_normal' and 'uniform'.")
        self.num_inference_steps: int | None = None
        self.sigmas = torch.empty(0)
        self.timesteps = torch.empty(0)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a scheduler as `ConfigMixin.from_config` does, also from a FlowMatchEulerDiscreteScheduler.

        Raises:
            ValueError: if the configuration sets an option in `STOCK_ONLY_OPTIONS`.

        Example:
            >>> pipe.scheduler = PRXFlowMatchScheduler.from_config(pipe.scheduler.config, shift=3.0)
        """
        unsupported = {key: config[key] for key in STOCK_ONLY_OPTIONS if isinstance(config, dict) and config.get(key)}
        if unsupported:
            raise ValueError(
                f"`config` sets {unsupported}, which {cls.__name__} does not support; switch these options off, or use"
                " diffusers' FlowMatchEulerDiscreteScheduler."
            )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @property
    def shift(self) -> float:
        """Shift s of the noise levels, sigma -> s sigma / (1 + (s - 1) sigma) (arXiv 2403.03206, 5.3.2)."""
        return float(self.config["shift"])

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | np.ndarray | torch.Tensor | None = None,
    ) -> None:
        """Set the noise levels of one sampling run: `sigmas` (n + 1 values, 1 ... 0) and `timesteps` (n values).

        Args:
            num_inference_steps: number n of steps, at least 1. Optional with `sigmas`.
            device: device of `sigmas` and `timesteps`; the CPU when None.
            sigmas: n custom noise levels, strictly decreasing, in (0, 1]. They are *not* shifted again
                (FlowMatchEulerDiscreteScheduler would do so). The final 0 is appended.

        Raises:
            ValueError: if both arguments are missing, the count is below 1, or the noise levels are not as described.

        Example:
            >>> scheduler = PRXFlowMatchScheduler()
            >>> scheduler.set_timesteps(4)
            >>> scheduler.timesteps
            tensor([1000.,  750.,  500.,  250.])
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
                    " of them out."
                )
            grid = np.append(given, 0.0)
        if bool(np.any(np.diff(grid.astype(np.float32)) >= 0)):
            raise ValueError(
                f"`num_inference_steps` is {len(grid) - 1} and `shift` {self.shift:g}: their noise levels repeat in"
                " float32. Use fewer steps, or a shift nearer to 1."
            )
        self.num_inference_steps = len(grid) - 1
        # float64 up to here, so that both lists are correctly rounded
        self.sigmas = torch.from_numpy(grid.astype(np.float32)).to(device)
        timesteps = grid[:-1] * self.config["num_train_timesteps"]
        self.timesteps = torch.from_numpy(timesteps.astype(np.float32)).to(device)

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Return the index of a timestep in the schedule.

        Raises:
            ValueError: if `set_timesteps` was not called, or the timestep is not in its result.

        Example:
            >>> scheduler.index_for_timestep(scheduler.timesteps[3])
            3
        """
        if self.num_inference_steps is None:
            raise ValueError("The scheduler has no timesteps yet: call `set_timesteps` first.")
        if isinstance(timestep, torch.Tensor) and timestep.numel() == 1:
            timestep = timestep.item()
        if not is_number(timestep):
            raise ValueError(f"`timestep` is {timestep!r}; it must be one of `scheduler.timesteps`.")
        value = float(timestep)
        distance = (self.timesteps.cpu().double() - value).abs()
        index = int(distance.argmin())
        # above the rounding of a float32 product, far below the spacing of any schedule
        if not float(distance[index]) <= 1e-6 * self.config["num_train_timesteps"]:
            raise ValueError(f"`timestep` is {value}, which is not in this schedule: {self.timesteps.tolist()}.")
        return index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return the sample as it is: PRX does not scale inputs (diffusers' interface)."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Add noise to a clean sample: x_t = (1 - sigma) x_0 + sigma noise, computed in float32.

        Args:
            sample: x_0, (B, ...).
            timestep: one value or (B,) values in [0, num_train_timesteps], on the schedule or not.
            noise: standard normal draw, (B, ...).

        Returns:
            (B, ...) in the sample's dtype.

        Raises:
            ValueError: if the shapes differ, the tensors hold integers, or a timestep is out of range.

        Example:
            >>> noisy = scheduler.scale_noise(latents, 500.0, torch.randn_like(latents))
        """
        _check_tensors(sample=sample, noise=noise)
        highest = self.config["num_train_timesteps"]
        timestep = _as_levels("timestep", timestep, highest)
        if not bool(((timestep >= 0) & (timestep <= highest)).all()):
            raise ValueError(f"`timestep` is {timestep.tolist()}; it must be in [0, {highest}].")
        sigma = _like_sample(timestep.to(sample.device) / highest, sample)
        return ((1 - sigma) * sample.float() + sigma * noise.float()).to(sample.dtype)

    def sample_timesteps(
        self, n: int, generator: torch.Generator | None = None, device: str | torch.device | None = None
    ) -> torch.Tensor:
        """Draw noise levels for training, in [min_timestep, 1), float32, shape (n,).

        A logit-normal (arXiv 2403.03206) or uniform draw is shifted and conditioned on the range. A fraction
        `uniform_fraction` of the logit-normal ones is then replaced by uniform draws on the range, which are not
        shifted. Each sample consumes three numbers of the generator, so that n draws of one generator and one draw of
        each of n generators have the same distribution.

        Args:
            n: number of draws, at least 1.
            generator: torch generator; the global one when None.
            device: device of the result; the generator's when None.

        Raises:
            ValueError: if `n` is not an integer of at least 1, or `generator` is not a generator.

        Example:
            >>> sigmas = scheduler.sample_timesteps(8, torch.Generator().manual_seed(0))
        """
        n = check_count("n", n)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"`generator` is a {type(generator).__name__}; it must be a torch.Generator or None.")
        source = generator.device if generator is not None else "cpu"
        return self.timesteps_from_uniforms(torch.rand(n, 3, generator=generator, device=source)).to(device)

    def timesteps_from_uniforms(self, uniforms: torch.Tensor) -> torch.Tensor:
        """Transform uniform numbers to noise levels with the distribution of `sample_timesteps`.

        It computes in float64, so that the levels, rounded to float32, do not depend on the other samples: PyTorch's
        vectorized functions round the end of a tensor in another way than the rest.

        Args:
            uniforms: numbers in [0, 1), (n, 3).

        Returns:
            (n,) float32 in [min_timestep, 1).

        Example:
            >>> sigmas = scheduler.timesteps_from_uniforms(torch.rand(8, 3))
        """
        config, low = self.config, self.config["min_timestep"]
        device = "cpu" if uniforms.device.type == "mps" else uniforms.device  # MPS has no float64
        u, coin, u_plain = uniforms.to(device).double().unbind(1)  # (n,) each
        # inverting the distribution function on [F(low), 1) is the same as drawing again until inside the range
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
        # float32 may round beyond the range; 1 itself is excluded
        return t.float().clamp(low, 1 - 2**-24).to(uniforms.device)

    def velocity(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Convert a prediction to a velocity, float32; see the subclasses."""
        raise NotImplementedError

    def clean(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Convert a prediction to a clean image x_0, float32; see the subclasses."""
        raise NotImplementedError

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> PRXSchedulerOutput | tuple[torch.Tensor]:
        """Take one Euler step to the next lower noise level. The scheduler keeps no state between steps.

        Args:
            model_output: prediction of the transformer, (B, ...); see `prediction_type`.
            timestep: one of `timesteps`.
            sample: x_t at this timestep, (B, ...).
            return_dict: False to return a plain tuple.

        Returns:
            `PRXSchedulerOutput`, computed in float32, in the dtype of `model_output`.

        Raises:
            ValueError: if the timestep is not in the schedule, the shapes differ, or a tensor holds integers.

        Example:
            >>> for t in scheduler.timesteps:
            ...     velocity = transformer(sample, t[None] / 1000, embeds, return_dict=False)[0]
            ...     sample = scheduler.step(velocity, t, sample).prev_sample
        """
        _check_tensors(sample=sample, model_output=model_output)
        index = self.index_for_timestep(timestep)
        sigma, sigma_next = self.sigmas[index].item(), self.sigmas[index + 1].item()
        prev = self._step(model_output.float(), sample.float(), sigma, sigma_next).to(model_output.dtype)
        return PRXSchedulerOutput(prev_sample=prev) if return_dict else (prev,)

    def _step(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
        raise NotImplementedError


class PRXFlowMatchScheduler(_PRXSchedulerBase):
    """Scheduler for a PRX transformer that predicts velocity, v = noise - x_0.

    Args:
        num_train_timesteps: unit of `timesteps`: timestep = num_train_timesteps * sigma.
        shift: s in s t / (1 + (s - 1) t), for the sampling steps and the training draw. PRX uses 1 at 256 pixels and 3
            at 1024.
        timestep_sampling: base distribution in training, "logit_normal" or "uniform".
        logit_mean: mean of the normal distribution of the logits.
        logit_std: standard deviation of that distribution.
        uniform_fraction: fraction of logit-normal training draws that is uniform and unshifted instead, in [0, 1].
        min_timestep: lowest noise level in training, in (0, 1).

    Raises:
        ValueError: if an argument is not as described.

    Example:
        >>> scheduler = PRXFlowMatchScheduler(shift=3.0)
        >>> pipe = PRXPipeline.from_pretrained("Photoroom/prx-512-t2i-sft", scheduler=scheduler)
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
        """Return the prediction itself as float32. Arguments as in `clean`."""
        return model_output.float()

    def clean(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Convert the predicted velocity to a clean image, x_t - sigma v, float32.

        Args:
            model_output: predicted velocity, (B, ...).
            sample: x_t, (B, ...).
            sigma: one value or (B,) noise levels in [0, 1].

        Example:
            >>> clean = scheduler.clean(velocity, noisy, 0.5)
        """
        _check_tensors(sample=sample, model_output=model_output)
        sigma = _like_sample(_as_levels("sigma", sigma).to(sample.device), sample)
        return sample.float() - sigma * model_output.float()

    def _step(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
        return sample + (sigma_next - sigma) * model_output


class PRXXPredictionScheduler(_PRXSchedulerBase):
    """Scheduler for a PRX transformer that predicts the clean image x_0 (JiT, arXiv 2511.13720).

    A step goes towards the predicted image, x_s = x_0 + (s / t) (x_t - x_0). This is the Euler step without its
    division by a small t, which would need a clamp: a perfect prediction leaves no noise.

    Args:
        clamp: lower bound of t in the *training* velocity (x_t - x_0) / max(t, clamp), which bounds the loss near
            t = 0.
        num_train_timesteps, shift, timestep_sampling, logit_mean, logit_std, uniform_fraction, min_timestep: as in
            `PRXFlowMatchScheduler`.

    Raises:
        ValueError: if an argument is not as described.

    Example:
        >>> scheduler = PRXXPredictionScheduler(shift=3.0)
        >>> pipe = PRXPixelPipeline.from_pretrained("Photoroom/prxpixel-t2i", scheduler=scheduler)
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
        """Convert the predicted image to the velocity of the training loss, (x_t - x_0) / max(sigma, clamp), float32.

        Args:
            model_output: predicted clean image, (B, ...).
            sample: x_t, (B, ...).
            sigma: one value or (B,) noise levels in [0, 1].

        Example:
            >>> velocity = scheduler.velocity(clean, noisy, 0.5)
        """
        _check_tensors(sample=sample, model_output=model_output)
        sigma = _like_sample(_as_levels("sigma", sigma).to(sample.device), sample)
        return (sample.float() - model_output.float()) / sigma.clamp(min=self.config["clamp"])

    def clean(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Return the prediction itself as float32. Arguments as in `velocity`."""
        return model_output.float()

    def _step(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
        return model_output + (sigma_next / sigma) * (sample - model_output)


def is_number(value: Any) -> bool:
    """True for a finite number of Python or NumPy that a float can hold; false for booleans, strings and tensors."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int of more than 308 digits
        return False


def check_number(name: str, value: Any, low: float, high: float, closed: bool = False) -> float | int:
    """Check a finite number between low and high (inclusive if `closed`), and return it as a Python number.

    Raises:
        ValueError: for anything else, including booleans and strings; NumPy numbers are accepted.
    """
    if not is_number(value) or not (low <= value <= high if closed else low < value < high):
        edges = "[]" if closed else "()"
        raise ValueError(f"`{name}` is {value!r}; it must be a finite number in {edges[0]}{low}, {high}{edges[1]}.")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_count(name: str, value: Any) -> int:
    """Check an integer of at least 1, and return it as a Python int.

    Raises:
        ValueError: for anything else, including 32.0 and True; NumPy integers are accepted.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least 1.")
    return int(value)


def check_levels(name: str, values: Any, highest: float = 1.0) -> np.ndarray:
    """Check noise levels (at least one, strictly decreasing, in (0, highest]), and return them as a float64 array.

    Args:
        name: name of the argument, for the error message.
        values: list, tuple, array or tensor of one dimension.
        highest: unit of the values, 1 for sigmas.

    Raises:
        ValueError: for anything else, including levels that are equal in float32, in which schedulers keep them.
    """
    accepted = f"a list of strictly decreasing numbers in (0, {highest:g}]"
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().tolist()
    elif isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise ValueError(f"`{name}` is {values!r}; it must be {accepted}.")
    items = [value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value for value in values]
    if not all(is_number(value) for value in items):
        raise ValueError(f"`{name}` is {values!r}; it must be {accepted}.")
    levels = np.array([float(value) for value in items], dtype=np.float64)
    rounded = (levels / highest).astype(np.float32)
    in_range = bool(np.all((rounded > 0) & (levels <= highest)))
    if not levels.size or not in_range or bool(np.any(np.diff(rounded) >= 0)):
        raise ValueError(f"`{name}` is {values!r}; it must be {accepted}.")
    return levels


def _check_tensors(sample: torch.Tensor, **others: torch.Tensor) -> None:
    """Raise a ValueError unless all are floating-point tensors (integers would be truncated) of the sample's shape."""
    for name, tensor in {"sample": sample, **others}.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            received = f"of {tensor.dtype}" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"`{name}` is {received}; it must be a floating-point tensor.")
        if tensor.shape != sample.shape:
            raise ValueError(f"`{name}` is {tuple(tensor.shape)}; it must be as `sample`, {tuple(sample.shape)}.")


def _as_levels(name: str, values: Any, highest: float = 1.0) -> torch.Tensor:
    """Return one value or (B,) values as float32. A tensor's values are not checked: that would wait for a GPU."""
    is_real_tensor = isinstance(values, torch.Tensor) and not values.is_complex() and values.dtype != torch.bool
    if not is_real_tensor and not (is_number(values) and 0 <= values <= highest):
        raise ValueError(f"`{name}` is {values!r}; it must be in [0, {highest:g}], or a tensor with one per row.")
    return torch.as_tensor(values, dtype=torch.float32)


def _like_sample(sigma: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Reshape () or (B,) noise levels so that they broadcast with a sample (B, ...)."""
    if sigma.numel() != 1 and sigma.shape != sample.shape[:1]:
        raise ValueError(
            f"Noise levels have the shape {tuple(sigma.shape)}, the sample {tuple(sample.shape)}; accepted are one"
            " value, or one per row."
        )
    return sigma.reshape(-1, *[1] * (sample.ndim - 1))
