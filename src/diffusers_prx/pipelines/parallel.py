"""One call on several processes: the branches of guidance on two of them, the same first noise on all of them."""

from typing import Any

import torch
import torch.distributed as dist

from ..compat import ulysses_group


def share_noise(latents: torch.Tensor, transformer: Any, guidance_group: Any) -> torch.Tensor:
    """The first process's noise on all that draw these images together; what each drew itself may be another."""
    parallel = getattr(transformer, "_parallel_config", None)
    config = None if parallel is None else parallel.context_parallel_config
    # from one to the others that share a forward, then to those with the other branch
    groups = [None if config is None else ulysses_group(config), guidance_group]
    for group in filter(None, groups):
        latents = latents.clone(memory_format=torch.contiguous_format)  # the caller's own stay as they are
        dist.broadcast(latents, group=group, group_src=0)
    return latents


def gather_branches(prediction: torch.Tensor, group: Any) -> torch.Tensor:
    """Predictions (2B, C, h, w) of both branches, on both processes, from this one's (B, C, h, w)."""
    branches = [torch.empty_like(prediction) for _ in range(2)]
    dist.all_gather(branches, prediction.contiguous(), group=group)
    return torch.cat(branches)


def take_branch(text: dict[str, Any], index: int, rows: int) -> dict[str, Any]:
    """Of the text of two branches, as arguments of the network, that of one, with `rows` rows of images."""
    given = {name: value for name, value in text.items() if value is not None}
    parts = {name: len(value) // 2 if name == "text_context" else rows for name, value in given.items()}
    return {name: given[name][index * count : (index + 1) * count] for name, count in parts.items()}
