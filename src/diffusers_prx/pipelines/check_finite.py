"""Find the component that made NaN or infinite values, which would be drawn as a black picture."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..compat import is_group_offloaded

SHOWN = 3  # weights named in an error
# types that networks compute in; others are for storage (float8, integers)
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, (), on the tensor's device; NaN or infinite if any entry is."""
    return torch.linalg.vector_norm(tensor, math.inf)


def check_output(name: str, module: Any, output: torch.Tensor, given: torch.Tensor | None = None) -> None:
    """Raise a ValueError that names the component if its output is not finite. Waits for the GPU.

    Args:
        name: name of the component.
        module: the component.
        output: its output.
        given: the tensor that it was given, whose size the error states.
    """
    if not math.isfinite(largest(output).item()):
        source = "" if given is None else f"it was given values of up to {largest(given).item():.3g}; "
        raise ValueError(f"`{name}` gave NaN or infinite values: {_reason(name, module, source)}")


def check_given(name: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError that names the argument if it is not finite. Waits for the GPU."""
    if not math.isfinite(largest(tensor).item()):
        raise ValueError(f"`{name}` has entries that are NaN or infinite; all of them have to be finite.")


@dataclass
class FiniteCheck:
    """The largest absolute value of everything that a denoising loop computes, left on the device until the end.

    So a loop costs two small reductions per step, and waits for the GPU once.

    Args:
        steps: number of steps of the call.
        step: the step that runs, from 1; 0 before the first.
    """

    steps: int = 0
    step: int = 0
    seen: list[tuple[str, int, torch.Tensor]] = field(default_factory=list)

    def note(self, what: str, tensor: torch.Tensor) -> None:
        self.seen.append((what, self.step, largest(tensor).float()))

    def check(self, transformer: Any, scheduler: Any, guidance: str) -> None:
        """Raise a ValueError that names the first thing that was not finite.

        Args:
            transformer, scheduler: components of the call.
            guidance: setting that guided the call, for the error.
        """
        sizes = torch.stack([size for _, _, size in self.seen]).tolist()
        first = next((i for i, size in enumerate(sizes) if not math.isfinite(size)), None)
        if first is None:
            return
        what, step, _ = self.seen[first]
        place = f"at step {step} of {self.steps}"
        if what == "callback":
            raise ValueError(f"`callback_on_step_end` returned `latents` with NaN or infinite values {place}.")
        if what == "text":
            raise ValueError(
                f"The text embeddings have NaN or infinite values in {transformer.dtype}, the dtype of `transformer`"
                f" (before step {step + 1}): load it in bfloat16 or float32, or check `prompt_embeds`,"
                " `negative_prompt_embeds` and what `callback_on_step_end` returns for them."
            )
        before = [size for (name, _, _), size in zip(self.seen[:first], sizes) if name in ("latents", "callback")]
        if what == "latents":
            raise ValueError(
                f"The latents are NaN or infinite {place}, although `transformer` gave finite values: check"
                f" {guidance}, and the settings of `scheduler` ({type(scheduler).__name__})."
            )
        source = f"it was given latents of up to {before[-1]:.3g} with {guidance}, which may be too large; "
        raise ValueError(
            f"`transformer` gave NaN or infinite values {place}: {_reason('transformer', transformer, source)}"
        )


def _reason(name: str, module: Any, source: str) -> str:
    """Look at the weights of a module whose output is not finite, and say what to do about it."""
    # group offloading to disk leaves memory without values in their place
    weights = {} if is_group_offloaded(module) else dict(module.named_parameters())
    broken = [key for key, value in weights.items() if is_plain(value) and not torch.isfinite(value).all()]
    if broken:
        return f"{len(broken)} of its weights are not finite, such as {broken[:SHOWN]}; load or train it again."
    dtype = getattr(module, "dtype", None)
    if dtype == torch.float16:
        return f"{source}values above 65504 overflow in float16: load it with `dtype={{'{name}': torch.bfloat16}}`."
    other = "" if dtype == torch.float32 else ", or load it in float32"
    found = "its weights are finite, and " if weights else ""
    return f"{source}{found}it computed in {dtype}: check what it was given{other}."


def is_plain(tensor: Any) -> bool:
    """True for a dense tensor that is in memory, of a type that computes and has NaN."""
    return type(tensor) in (nn.Parameter, torch.Tensor) and tensor.dtype in PLAIN_DTYPES and not tensor.is_meta
