"""Find the component that returned NaN or infinite values, which would be drawn as a black picture."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..compat import is_group_offloaded

WEIGHTS_SHOWN = 3  # weights that an error message names
# dtypes that networks compute in; others are for storage (float8, integers)
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def max_abs(tensor: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value, (), on the tensor's device; NaN or infinite if any entry is."""
    return torch.linalg.vector_norm(tensor, math.inf)


def check_finite_output(name: str, module: Any, output: torch.Tensor, given: torch.Tensor | None = None) -> None:
    """Raise a ValueError that names the component if its output is not finite. Waits for the GPU.

    Args:
        name: name of the component.
        module: component.
        output: its output.
        given: its input, whose largest value the message states.
    """
    if not math.isfinite(max_abs(output).item()):
        cause = "" if given is None else f"its input has values of up to {max_abs(given).item():.3g}; "
        raise ValueError(f"`{name}` returned NaN or infinite values: {_explain(name, module, cause)}")


def check_finite_input(name: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError that names the argument if it is not finite. Waits for the GPU."""
    if not math.isfinite(max_abs(tensor).item()):
        raise ValueError(f"`{name}` has NaN or infinite entries; all of them have to be finite.")


@dataclass
class FiniteCheck:
    """Largest absolute values of all that a denoising loop computes, kept on the device until the end.

    A loop so costs two small reductions per step and waits for the GPU once.

    Args:
        num_steps: number of steps of the call.
        step: current step, counted from 1; 0 before the first.
        records: (source, step, largest absolute value) of each recorded tensor, in order.
    """

    num_steps: int = 0
    step: int = 0
    records: list[tuple[str, int, torch.Tensor]] = field(default_factory=list)

    def record(self, source: str, tensor: torch.Tensor) -> None:
        """Record a tensor.

        Args:
            source: "latents", "prediction", "callback" or "text".
            tensor: tensor on any device.
        """
        self.records.append((source, self.step, max_abs(tensor).float()))

    def check(self, transformer: Any, scheduler: Any, guidance: str) -> None:
        """Raise a ValueError that names the first source that was not finite.

        Args:
            transformer, scheduler: components of the call.
            guidance: setting that guided the call, for the message.
        """
        maxima = torch.stack([maximum for _, _, maximum in self.records]).tolist()
        first = next((i for i, maximum in enumerate(maxima) if not math.isfinite(maximum)), None)
        if first is None:
            return
        source, step, _ = self.records[first]
        when = f"at step {step} of {self.num_steps}"
        if source == "callback":
            raise ValueError(f"`callback_on_step_end` returned `latents` with NaN or infinite values {when}.")
        if source == "text":
            raise ValueError(
                f"The text embeddings have NaN or infinite values in {transformer.dtype}, the dtype of `transformer`"
                f" (before step {step + 1}): load it in bfloat16 or float32, or check `prompt_embeds`,"
                " `negative_prompt_embeds` and what `callback_on_step_end` returns for them."
            )
        if source == "latents":
            raise ValueError(
                f"The latents are NaN or infinite {when}, although `transformer` returned finite values: check"
                f" {guidance}, and the settings of `scheduler` ({type(scheduler).__name__})."
            )
        names = [name for name, _, _ in self.records[:first]]
        latents = [value for name, value in zip(names, maxima) if name in ("latents", "callback")]
        cause = f"its input was latents of up to {latents[-1]:.3g} with {guidance}, which may be too large; "
        raise ValueError(
            f"`transformer` returned NaN or infinite values {when}: {_explain('transformer', transformer, cause)}"
        )


def _explain(name: str, module: Any, cause: str) -> str:
    """Look at the weights of a module whose output is not finite, and return what to do about it."""
    # group offloading to disk leaves memory without values in their place
    weights = {} if is_group_offloaded(module) else dict(module.named_parameters())
    broken = [key for key, value in weights.items() if is_plain(value) and not torch.isfinite(value).all()]
    if broken:
        return f"{len(broken)} of its weights are not finite, such as {broken[:WEIGHTS_SHOWN]}; load or retrain it."
    dtype = getattr(module, "dtype", None)
    if dtype == torch.float16:
        return f"{cause}values above 65504 overflow in float16: load it with `dtype={{'{name}': torch.bfloat16}}`."
    other = "" if dtype == torch.float32 else ", or load it in float32"
    found = "its weights are finite, and " if weights else ""
    return f"{cause}{found}it computed in {dtype}: check its input{other}."


def is_plain(tensor: Any) -> bool:
    """True for a dense tensor in memory whose dtype networks compute in (one that has NaN)."""
    return type(tensor) in (nn.Parameter, torch.Tensor) and tensor.dtype in PLAIN_DTYPES and not tensor.is_meta
