"""One call on several processes: equal initial noise, and one branch of guidance on each of two processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..compat import ulysses_group


def share_noise(latents: torch.Tensor, transformer: Any, guidance_group: ProcessGroup | None) -> torch.Tensor:
    """Return the first process's noise on all processes that draw the same images; each may have drawn its own."""
    parallel = getattr(transformer, "_parallel_config", None)
    config = None if parallel is None else parallel.context_parallel_config
    # first among the processes that share a forward, then to those with the other branch
    groups = [None if config is None else ulysses_group(config), guidance_group]
    for group in filter(None, groups):
        latents = latents.clone(memory_format=torch.contiguous_format)  # keep the caller's tensor as it is
        dist.broadcast(latents, group=group, group_src=0)
    return latents


def gather_branches(prediction: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Return the predictions (2B, C, h, w) of both branches, from (B, C, h, w) of one branch on each process."""
    branches = [torch.empty_like(prediction) for _ in range(2)]
    dist.all_gather(branches, prediction.contiguous(), group=group)
    return torch.cat(branches)
