"""Records of steps whose loss or gradient is NaN or infinite."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

# More such steps in a row mean that the weights are broken, not the data.
MAX_SKIPPED_IN_A_ROW = 10


def describe_samples(
    rank: int, batches: Iterable[tuple[dict[str, Any], torch.Tensor]], dataset_indices: dict[int, int]
) -> list[dict[str, Any]]:
    """Describe the samples of a step on one process as plain data.

    Args:
        rank: rank of the process.
        batches: micro-batches, each with the flow-matching loss of its samples (B,).
        dataset_indices: index in the data set by index in the run's sequence of samples; empty for streamed data.
    """
    return [
        {
            "rank": rank,
            "sample_index": index,
            "dataset_index": dataset_indices.get(index),
            "caption": caption,
            "loss": _to_json(loss),
        }
        for batch, losses in batches
        for index, caption, loss in zip(batch["sample_index"], batch["captions"], losses.tolist())
    ]


def write_non_finite_step(path: Path, step: int, grad_norm: float, samples: list[dict[str, Any]]) -> None:
    """Write the samples of a step to a JSON file, with NaN and infinity as strings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"step": step, "grad_norm": _to_json(grad_norm), "samples": samples}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
