"""One call on several processes: the branches of guidance on two of them, the same first noise on all of them."""

from typing import Any

import torch
import torch.distributed as dist


def share_noise(latents: torch.Tensor, transformer: Any, guidance_group: Any) -> torch.Tensor:
    """The first process's noise on all that draw these images together; what each drew itself may be another."""
    parallel = getattr(transformer, "_parallel_config", None)
    config = None if parallel is None else parallel.context_parallel_config
    latents = latents.contiguous()
    # from one to the others that share a forward, then to those with the other branch
    for group in (None if config is None else config._ulysses_mesh.get_group(), guidance_group):
        if group is not None:
            dist.broadcast(latents, group=group, group_src=0)
    return latents


def gather_branches(prediction: torch.Tensor, group: Any) -> torch.Tensor:
    """Predictions (2B, C, h, w) of both branches, on both processes, from this one's (B, C, h, w)."""
    branches = [torch.empty_like(prediction) for _ in range(2)]
    dist.all_gather(branches, prediction.contiguous(), group=group)
    return torch.cat(branches)


def take_branch(text: dict[str, Any], index: int, rows: int) -> dict[str, Any]:
    """Of the text of several branches, as arguments of the network, that of one, with `rows` rows of images."""
    own = {"text_context": slice(index, index + 1)}
    rows_of_it = slice(index * rows, (index + 1) * rows)
    return {name: None if value is None else value[own.get(name, rows_of_it)] for name, value in text.items()}
