"""Check that everything that is trained is stored in float32."""

from collections import Counter
from collections.abc import Iterable

import torch


def check_precision(tensors: Iterable[tuple[str, torch.Tensor]], stored: torch.dtype) -> Counter[str]:
    """Count values by data type and reject data types that lose small updates.

    Training with weights in bf16 fails silently: the FID was 21.87 instead of 18.20 in the PRX study.

    Args:
        tensors: names and tensors; integers, like step counters, are ignored.
        stored: data type accepted in addition to float32: bf16 in the recipe that reproduces the effect, else float32.

    Returns:
        Number of values by data type.

    Raises:
        ValueError: tensors have another data type.
    """
    counts: Counter[str] = Counter()
    wrong = []
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        if tensor.dtype not in (stored, torch.float32):
            wrong.append(f"{name} ({tensor.dtype})")
    if wrong:
        raise ValueError(f"Trained tensors must be {stored}, got: {', '.join(wrong)}.")
    return counts
