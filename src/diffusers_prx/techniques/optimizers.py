"""Optimizers and learning-rate schedules: AdamW alone, or with Muon for the matrices of the repeated layers."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LRScheduler
from torch.profiler import record_function
from transformers import get_constant_schedule_with_warmup, get_wsd_schedule

from ..config.training_config import TrainingConfig
from ..models.transformer_prx import PRXAttention

# trainable modules whose repeated layers, those in an nn.ModuleList, have matrices for Muon
WITH_REPEATED_LAYERS = ("transformer", "text_encoder")

# coefficients a, b, c of a x + b x^3 + c x^5, one row per step
ITERATIONS = {
    # https://kellerjordan.github.io/posts/muon, as in PyTorch: singular values of 0.002 to 1 become 0.68 to 1.2
    "newton_schulz": ((3.4445, -4.7750, 2.0315),) * 5,
    # The polynomial closest to 1 in every step (Polar Express, arXiv 2505.16932), for singular values of 0.001 to 1,
    # which become 0.85 to 1.12. All but the last allow for values that are 1% too large by rounding.
    "polar_express": (
        (8.205160414005572, -22.901934987056045, 16.46072491018031),
        (4.0663951599427755, -2.861154086755142, 0.5183995226694741),
        (3.90959490443791, -2.823351735039511, 0.5250369769390014),
        (3.2855640171986162, -2.415301959635945, 0.48529406552790855),
        (2.300652019954817, -1.6689039845747489, 0.418807311952567),
    ),
}
NEWTON_SCHULZ_STEPS = 5  # of both
NEWTON_SCHULZ_EPS = 1e-7
# Elements that one rank orthogonalizes at a time: 128 MiB in bf16, and a few times that in temporary tensors.
ROUND_ELEMENTS = 64 * 2**20


def orthogonalize(matrices: list[torch.Tensor], iteration: str = "newton_schulz") -> list[torch.Tensor]:
    """Return the nearest semi-orthogonal matrices, roughly: all singular values become about 0.7 to 1.2.

    Five steps of a quintic iteration in the type of the matrices. Matrices of equal shape, also transposed, are
    processed as one batch.

    Args:
        matrices: (rows, columns) each, of any shapes; not modified.
        iteration: `newton_schulz` (https://kellerjordan.github.io/posts/muon), or `polar_express` (arXiv 2505.16932),
            which takes the same time and brings the singular values to 0.85 to 1.12.

    Returns:
        New matrices of the same shapes, type and order. A matrix of zeros stays zero.

    Example:
        >>> (update,) = orthogonalize([gradient])
    """
    wide = [matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
    indices_by_shape = defaultdict(list)
    for index, matrix in enumerate(wide):
        indices_by_shape[matrix.shape].append(index)
    results: dict[int, torch.Tensor] = {}
    for batch in indices_by_shape.values():
        x = torch.stack([wide[index] for index in batch])  # (n, short, long)
        x /= x.norm(dim=(1, 2), keepdim=True).clamp(min=NEWTON_SCHULZ_EPS)  # singular values are at most 1
        for a, b, c in ITERATIONS[iteration]:
            gram = x @ x.mT  # (n, short, short)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # (n, short, long)
        results |= zip(batch, x)
    return [results[n].mT if matrix.shape[0] > matrix.shape[1] else results[n] for n, matrix in enumerate(matrices)]


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Number of multiplications and additions of `orthogonalize` for one matrix."""
    short, long = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * (4 * short**2 * long + 2 * short**3)


def update_scale(rows: int, columns: int, adjust_lr_fn: str) -> float:
    """Return the factor of the learning rate for one matrix.

    Args:
        rows: rows of the matrix.
        columns: columns of the matrix.
        adjust_lr_fn: `match_rms_adamw` gives the update the usual root mean square of AdamW's (arXiv 2502.16982), so
            that one learning rate serves both. `original` is the factor of https://kellerjordan.github.io/posts/muon.
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


@dataclass(frozen=True)
class Layout:
    """Distribution of weights: the rows are sharded over `shards`, and each shard is replicated over `replicas`.

    None stands for a group of this process alone.
    """

    shards: dist.ProcessGroup | None
    replicas: dist.ProcessGroup | None

    @classmethod
    def of(cls, parameter: torch.Tensor) -> "Layout":
        """Return the layout of a parameter: local, replicated by DDP, or sharded by FSDP2 on a 1-D or 2-D mesh.

        Raises:
            ValueError: for a sharding that is not by rows over one dimension of the mesh.
        """
        if not isinstance(parameter, DTensor):
            return cls(None, dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)
        mesh, placements = parameter.device_mesh, parameter.placements
        shards = [mesh.get_group(n) for n, placement in enumerate(placements) if placement == Shard(0)]
        replicas = [mesh.get_group(n) for n, placement in enumerate(placements) if placement == Replicate()]
        if len(shards) > 1 or len(replicas) > 1 or len(shards) + len(replicas) < len(placements):
            raise ValueError(
                f"Muon got a parameter with placements {placements}; accepted: rows sharded over one dimension of the "
                "mesh and replicated over another, as FSDP2 does."
            )
        return cls(*(groups[0] if groups else None for groups in (shards, replicas)))


@dataclass(frozen=True)
class MuonWeight:
    """Weight during one step of Muon: the rows of this rank (all rows if it is not sharded).

    Args:
        values: (rows of this rank, columns), the weight.
        gradient: (rows of this rank, columns).
        momentum: (rows of this rank, columns).
        rows: rows of the whole weight.
        columns: columns of the whole weight.
        settings: parameter group of the weight.
    """

    values: torch.Tensor
    gradient: torch.Tensor
    momentum: torch.Tensor
    rows: int
    columns: int
    settings: dict[str, Any]

    @property
    def stacked(self) -> int:
        """Number of matrices that the weight holds, one below the other."""
        return self.settings["stacked"]

    @property
    def flops(self) -> int:
        return self.stacked * newton_schulz_flops(self.rows // self.stacked, self.columns)

    def rows_by_shard(self, shards: int) -> list[int]:
        """Number of rows of every shard. FSDP2 gives the last shards fewer rows than the others, or none."""
        most = -(-self.rows // shards)
        return [max(0, min(most, self.rows - shard * most)) for shard in range(shards)]

    def shard_shape(self, shard: int, shards: int) -> tuple[int, ...]:
        return self.rows_by_shard(shards)[shard], self.columns

    def nesterov_direction(self, dtype: torch.dtype) -> torch.Tensor:
        """Gradient interpolated towards the momentum, always a new tensor."""
        return self.gradient.lerp(self.momentum, self.settings["momentum"]).to(dtype)

    def apply(self, update: torch.Tensor) -> None:
        settings = self.settings
        scale = update_scale(self.rows // self.stacked, self.columns, settings["adjust_lr_fn"])
        self.values.add_(update, alpha=-settings["lr"] * scale)


def balance_across_ranks(weights: Iterable[MuonWeight], ranks: int) -> list[list[list[MuonWeight]]]:
    """Assign weights to ranks so that all ranks have about the same work: rounds of one list per rank.

    The most expensive weights come first, each for the rank with the least work so far. The result depends on the
    shapes alone and is the same on every rank. A round has at most `ROUND_ELEMENTS` and one weight per rank, which
    bounds the memory of a step.
    """
    work = [(0, rank) for rank in range(ranks)]  # a heap
    elements: Counter[int] = Counter()
    rounds: dict[int, list[list[MuonWeight]]] = defaultdict(lambda: [[] for _ in range(ranks)])
    for weight in sorted(weights, key=lambda weight: weight.flops, reverse=True):  # keeps equal shapes together
        flops, rank = work[0]
        heapq.heapreplace(work, (flops + weight.flops, rank))
        rounds[elements[rank] // ROUND_ELEMENTS][rank].append(weight)
        elements[rank] += weight.rows * weight.columns
    return [rounds[number] for number in sorted(rounds)]


def group_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks in a group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Rank of this process in a group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unflatten(flat: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Split the beginning of a flat tensor into consecutive tensors of the given shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes)]


def exchange(
    tensors: list[list[torch.Tensor]],
    shapes: list[list[tuple[int, ...]]],
    group: dist.ProcessGroup | None,
    empty: torch.Tensor,
) -> list[list[torch.Tensor]]:
    """Send `tensors[n]` to rank n of a group, and receive tensors of `shapes[n]` from it.

    Args:
        tensors: tensors to send, by rank.
        shapes: shapes to receive, by rank.
        group: ranks that exchange.
        empty: tensor without elements that has the type and device of all others.

    Returns:
        The received tensors by rank.
    """
    if group is None:
        return tensors
    sent = torch.cat([empty, *(tensor.flatten() for of_rank in tensors for tensor in of_rank)])
    sent_sizes = [sum(tensor.numel() for tensor in of_rank) for of_rank in tensors]
    received_sizes = [sum(math.prod(shape) for shape in of_rank) for of_rank in shapes]
    received = empty.new_empty(sum(received_sizes))
    dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=group)
    return [unflatten(flat, of_rank) for flat, of_rank in zip(received.split(received_sizes), shapes)]


def gather(
    tensors: list[torch.Tensor],
    shapes: list[list[tuple[int, ...]]],
    group: dist.ProcessGroup | None,
    empty: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Send `tensors` to all ranks of a group, and yield tensors of `shapes[n]` from rank n, in the order of ranks.

    It uses broadcasts instead of an all-gather: the ranks' tensors differ in size and are often empty, and only the
    tensors of one rank are in memory at a time.

    Args:
        tensors: tensors of this rank.
        shapes: shapes of the tensors by rank.
        group: ranks that send.
        empty: tensor without elements that has the type and device of all others.
    """
    if group is None:
        yield from tensors
        return
    for rank, of_rank in enumerate(shapes):
        if rank == dist.get_rank(group):
            flat = torch.cat([empty, *(tensor.flatten() for tensor in tensors)])
        else:
            flat = empty.new_empty(sum(math.prod(shape) for shape in of_rank))
        if flat.numel():
            dist.broadcast(flat, group=group, group_src=rank)
        yield from unflatten(flat, of_rank)


class MuonAdamW(Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) and AdamW in one optimizer with two kinds of parameter groups.

    Groups of kind `muon` hold 2-D weights. Their update is that of `torch.optim.Muon` with Nesterov momentum and
    without weight decay. A weight can stack several matrices (`stacked`, 3 for a fused QKV projection); each is
    updated by itself. Groups of kind `adamw` are updated by PyTorch's own AdamW function.

    The update is the same on one process, under DDP and under FSDP2 (DTensor parameters with rows sharded over a 1-D
    mesh, or replicated and sharded over a 2-D one): Newton-Schulz always sees whole matrices. The matrices are
    distributed by cost over all ranks that hold them, so that no rank repeats another's work. Parameters that are not
    DTensors must be replicated over all processes of the default group, and all ranks must have gradients for the same
    parameters. Momentum is sharded like its parameter.

    Traffic per step, in the type of Newton-Schulz: under DDP every rank receives all matrices once, in bfloat16 a
    quarter of what the all-reduce of float32 gradients moves. Under FSDP2 on N ranks every rank sends and receives
    twice 1/N of the matrices: rows to the rank that orthogonalizes, and rows of the result back. Replicas of shards
    divide the matrices too, and then send each other the results, as under DDP.

    Args:
        groups: parameter groups, each with `params` and `kind` (`muon` or `adamw`). They may override the values
            below, and muon groups may set `stacked` (default 1).
        lr: learning rate of all groups.
        momentum: Muon's momentum in [0, 1).
        adjust_lr_fn: `match_rms_adamw` or `original`, see `update_scale`; by the shape of a single stacked matrix.
        newton_schulz_dtype: type in which matrices are orthogonalized and sent; bfloat16 as in PyTorch.
        iteration: polynomials of the orthogonalization, see `orthogonalize`.
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        weight_decay: AdamW's weight decay.

    Attributes:
        orthogonalized (`int`): number of matrices that this rank orthogonalized in the last step.

    Raises:
        ValueError: for another `kind` or `adjust_lr_fn`, or a muon parameter that does not hold `stacked` matrices.
            The first step raises it for an unsupported sharding.

    Example:
        >>> groups = [{"kind": "muon", "params": [linear.weight]}, {"kind": "adamw", "params": [linear.bias]}]
        >>> optimizer = MuonAdamW(groups, lr=1e-3)
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        adjust_lr_fn: str = "match_rms_adamw",
        newton_schulz_dtype: torch.dtype = torch.bfloat16,
        iteration: str = "newton_schulz",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if iteration not in ITERATIONS:
            raise ValueError(f"`iteration` is {iteration!r}; accepted: {', '.join(ITERATIONS)}.")
        self.newton_schulz_dtype, self.iteration = newton_schulz_dtype, iteration
        self.orthogonalized = 0
        self.defaults_of_kind: dict[str, dict[str, Any]] = {
            "muon": {"momentum": momentum, "adjust_lr_fn": adjust_lr_fn, "stacked": 1},
            "adamw": {"betas": betas, "eps": eps, "weight_decay": weight_decay},
        }
        super().__init__(groups, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        kind = param_group.get("kind")
        if kind not in self.defaults_of_kind:
            raise ValueError(f"`kind` of a parameter group is {kind!r}; accepted: {list(self.defaults_of_kind)}.")
        group = self.defaults_of_kind[kind] | param_group
        super().add_param_group(group)
        if kind == "adamw":
            return
        if group["adjust_lr_fn"] not in ("match_rms_adamw", "original"):
            raise ValueError(f"`adjust_lr_fn` is {group['adjust_lr_fn']!r}; accepted: match_rms_adamw, original.")
        for parameter in group["params"]:
            if parameter.ndim != 2 or parameter.shape[0] % group["stacked"]:
                raise ValueError(
                    f"Muon got a parameter of shape {tuple(parameter.shape)} in a group with `stacked` "
                    f"{group['stacked']}; accepted: 2-D, with a number of rows that is a multiple of `stacked`."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.orthogonalized = 0
        weights: dict[Layout, list[MuonWeight]] = defaultdict(list)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["kind"] == "adamw":
                self._adamw(parameters, group)
                continue
            with record_function("MuonAdamW.momentum"):
                for parameter in parameters:
                    weights[Layout.of(parameter)].append(self._update_momentum(parameter, group))
        for layout, of_layout in weights.items():
            for by_rank in balance_across_ranks(of_layout, group_size(layout.replicas) * group_size(layout.shards)):
                self._muon(by_rank, layout)
        return loss

    def _adamw(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["step"] = torch.tensor(0.0, dtype=torch.float32)  # on the CPU, like PyTorch's
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],  # for AMSGrad
            [state["step"] for state in states],
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _update_momentum(self, parameter: torch.Tensor, group: dict[str, Any]) -> MuonWeight:
        """Update the momentum and return the weight. It is elementwise: every rank does it for its part."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        weight = MuonWeight(
            values=local_part(parameter),
            gradient=local_part(parameter.grad),
            momentum=local_part(state["momentum_buffer"]),
            rows=parameter.shape[0],
            columns=parameter.shape[1],
            settings=group,
        )
        weight.momentum.lerp_(weight.gradient, 1 - group["momentum"])
        return weight

    def _muon(self, by_rank: list[list[MuonWeight]], layout: Layout) -> None:
        """Update weights. Rank n of the layout (counted replica by replica) orthogonalizes `by_rank[n]`."""
        shard, shards = group_rank(layout.shards), group_size(layout.shards)
        by_replica = [by_rank[first : first + shards] for first in range(0, len(by_rank), shards)]
        of_replica = by_replica[group_rank(layout.replicas)]
        own = of_replica[shard]
        empty = next(chain(*by_rank)).values.new_empty(0, dtype=self.newton_schulz_dtype)

        with record_function("MuonAdamW.exchange"):  # send the rows of each weight to the rank that orthogonalizes it
            sent = [[weight.nesterov_direction(empty.dtype) for weight in of_rank] for of_rank in of_replica]
            shapes = [[weight.shard_shape(n, shards) for weight in own] for n in range(shards)]
            whole = [torch.cat(blocks) for blocks in zip(*exchange(sent, shapes, layout.shards, empty))]
        with record_function("MuonAdamW.newton_schulz"):
            matrices = [matrix for weight, rows in zip(own, whole) for matrix in rows.chunk(weight.stacked)]
            orthogonal = iter(orthogonalize(matrices, self.iteration))
            self.orthogonalized += len(matrices)
            whole = [torch.cat([next(orthogonal) for _ in range(weight.stacked)]) for weight in own]
        with record_function("MuonAdamW.exchange"):  # return the rows to the ranks of this replica
            split = [rows.split(weight.rows_by_shard(shards)) for weight, rows in zip(own, whole)]
            sent = [[blocks[n] for blocks in split] for n in range(shards)]
            shapes = [[weight.shard_shape(shard, shards) for weight in of_rank] for of_rank in of_replica]
            updates = list(chain(*exchange(sent, shapes, layout.shards, empty)))
        with record_function("MuonAdamW.update"):
            shapes = [[weight.shard_shape(shard, shards) for weight in chain(*replica)] for replica in by_replica]
            for weight, update in zip(chain(*by_rank), gather(updates, shapes, layout.replicas, empty), strict=True):
                weight.apply(update)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the optimizer updates, by name: all of a module, or those of its adapter."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def muon_weights(modules: Mapping[str, nn.Module], fused: bool) -> dict[torch.Tensor, int]:
    """Select the weights for Muon: those of linear layers in the repeated layers of transformer and text encoder.

    Args:
        modules: trainable modules by name.
        fused: True treats PRX's fused projections as one matrix each. False treats the one for query, key and value as
            three matrices and the text's one for key and value as two.

    Returns:
        The number of matrices that each weight stacks.
    """
    found: dict[torch.Tensor, int] = {}
    for name in WITH_REPEATED_LAYERS:
        parts = list(modules[name].modules()) if name in modules else []
        repeated = chain.from_iterable(part.modules() for part in parts if isinstance(part, nn.ModuleList))
        found |= {part.weight: 1 for part in repeated if isinstance(part, nn.Linear)}
        for part in parts:
            if isinstance(part, PRXAttention) and not fused:
                found |= {part.img_qkv_proj.weight: 3, part.txt_kv_proj.weight: 2}
    return found


def build_optimizer(cfg: TrainingConfig, modules: Mapping[str, nn.Module]) -> Optimizer:
    """Build AdamW over all trainable parameters, or `MuonAdamW` with the groups of `muon_weights`.

    Args:
        cfg: run configuration.
        modules: trainable modules by name: `transformer`, `text_encoder`, and others, which AdamW always updates.

    Example:
        >>> optimizer = build_optimizer(cfg, {"transformer": transformer})
    """
    parameters = [p for module in modules.values() for p in trainable_parameters(module).values()]
    adamw_settings: dict[str, Any] = {
        "lr": cfg.learning_rate,
        "betas": (cfg.adam_beta1, cfg.adam_beta2),
        "eps": cfg.adam_epsilon,
        "weight_decay": cfg.adam_weight_decay,
    }
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **adamw_settings)
    stacked = muon_weights(modules, cfg.muon_fused)
    groups: list[dict[str, Any]] = [
        {"kind": "muon", "stacked": count, "params": [p for p in parameters if stacked.get(p) == count]}
        for count in sorted(set(stacked.values()))
    ]
    groups.append({"kind": "adamw", "params": [p for p in parameters if p not in stacked]})
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, parameters)), "every trainable parameter is in exactly one group"
    return MuonAdamW(
        [group for group in groups if group["params"]],
        **adamw_settings,
        momentum=cfg.muon_momentum,
        adjust_lr_fn=cfg.muon_adjust_lr_fn,
        newton_schulz_dtype=torch.float32 if cfg.muon_newton_schulz_dtype == "fp32" else torch.bfloat16,
        iteration=cfg.muon_iteration,
    )


def build_lr_scheduler(cfg: TrainingConfig, optimizer: Optimizer, step: int = 0) -> LRScheduler:
    """Build a schedule of a linear warm-up, a constant part and a decay to zero.

    Call its `step()` once per optimizer step, on every process.

    Args:
        cfg: run configuration.
        optimizer: optimizer whose learning rates it sets.
        step: number of completed steps of the stage. The schedule is a function of it and has no saved state.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = cfg.learning_rate
    if cfg.lr_scheduler == "constant":
        return get_constant_schedule_with_warmup(optimizer, cfg.warmup_steps, last_epoch=step - 1)
    decay_steps = cfg.lr_decay_steps or cfg.max_train_steps - cfg.warmup_steps
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=cfg.warmup_steps,
        num_decay_steps=decay_steps,
        num_training_steps=cfg.max_train_steps,
        decay_type=cfg.lr_scheduler,
        last_epoch=step - 1,
    )
