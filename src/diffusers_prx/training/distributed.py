"""How the networks that a run trains are spread over its processes: copied (DDP), sharded (FSDP2), or sharded within
groups of processes and copied between them (HSDP).

accelerate launches the processes; the sharding is torch's own `fully_shard`, called here. accelerate's FSDP2 plugin is
not used: without an accelerator it is silently ignored, so that a test on the CPU would test DDP; it takes one module
and its optimizer in one call and swaps parameters behind the averages; and what it does on top (precision, gathering,
checkpoints) this package does in its own way. So there is one path, the same on CPU and GPU: what is tested is what
runs.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ..config.training_config import TrainingConfig
from ..techniques.optimizers import WITH_REPEATED_LAYERS


class TrainableModules(nn.Module):
    """Everything that a run trains as one module, which is what DDP and FSDP2 wrap.

    Args:
        modules: transformer, projector and a trained text encoder by their names in `Nets`.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that computes with these modules.

        A step, the validation loss and sampling are each one forward of the whole, whatever of it they use and in
        whatever order: here DDP gets ready for the gradients, and FSDP2 gathers and lets go of weights. What
        `compute` returns must be tensors in tuples, named tuples, lists and dicts for their gradients to be seen.
        """
        return compute(*arguments)


def start_accelerator(cfg: TrainingConfig) -> Accelerator:
    """The processes, precision, accumulation and trackers of a run, through accelerate.

    Raises:
        ValueError: if the tracker is not installed, or see `check_environment`.
    """
    check_environment(cfg)
    accelerator = Accelerator(
        # said here: of processes that torchrun starts without a GPU, each would take itself for the only one
        cpu=not torch.accelerator.is_available(),
        mixed_precision=cfg.mixed_precision,
        # as a plugin: an environment variable would silently be over the plain number
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        log_with=None if cfg.report_to == "none" else cfg.report_to,
        # not before the stacks of a step that does not end are written
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=2 * cfg.step_timeout_seconds))],
        project_config=ProjectConfiguration(project_dir=cfg.output_dir, logging_dir=str(Path(cfg.output_dir, "logs"))),
    )
    if cfg.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"`report_to` is {cfg.report_to}, which is not installed: pip install {cfg.report_to}.")
    return accelerator


def check_environment(cfg: TrainingConfig) -> None:
    """Refuse what accelerate's configuration or the environment asks for and this run would not do.

    `accelerate launch` itself sets precision and compiler to "no" where nobody asked for one: that leaves the choice
    to the run.

    Raises:
        ValueError: with the variable, its value and the setting of the run that takes its place.
    """
    asked = [
        name
        for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
        if _is_set(f"ACCELERATE_USE_{name}")
    ]
    if asked:
        raise ValueError(
            f"accelerate was launched with {', '.join(asked)}, which this script does not use: launch with one of "
            "training/accelerate_configs and give `sharding` full or hybrid instead."
        )
    compiled = "inductor" if cfg.compile else "no"
    steps = sorted({str(stage.gradient_accumulation_steps) for stage in cfg.stage_configs()})
    for variable, accepted, setting in (
        ("MIXED_PRECISION", ["no", cfg.mixed_precision], f"`mixed_precision` is {cfg.mixed_precision}"),
        ("DYNAMO_BACKEND", ["no", compiled], f"`compile` is {cfg.compile}"),
        ("GRADIENT_ACCUMULATION_STEPS", steps[:1] if len(steps) == 1 else [],
         f"`gradient_accumulation_steps` is {', '.join(steps)}"),
    ):  # fmt: skip
        value = os.environ.get(f"ACCELERATE_{variable}", "")
        if value and value.lower() not in accepted:
            flag = setting.partition("`")[2].partition("`")[0]
            raise ValueError(
                f"ACCELERATE_{variable} is {value} in the environment (`accelerate launch` sets it too), but the "
                f"run's {setting}: unset it, and set what you want with `--{flag}`."
            )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def shard_count(cfg: TrainingConfig, processes: int) -> int:
    """Over how many processes one copy of the weights is spread.

    Raises:
        ValueError: for a sharding that this number of processes does not give.
    """
    if cfg.sharding == "none":
        return 1
    if processes == 1:
        raise ValueError(
            f"`sharding` is {cfg.sharding}, but this is a single process, which has nothing to share: launch several "
            "(training/accelerate_configs, torchrun), or leave it out."
        )
    if cfg.sharding == "full":
        return processes
    size = cfg.sharding_size or int(os.environ.get("LOCAL_WORLD_SIZE", 0))  # of a node: accelerate and torchrun say it
    if not 1 < size < processes or processes % size:
        raise ValueError(
            f"`sharding` hybrid spreads copies over {size} processes each (`sharding_size`; none: those of a node), "
            f"but there are {processes}: accepted are divisors of {processes} between 1 and {processes}; for one copy "
            "over all of them say `sharding` full."
        )
    return size


def distribute(trained: TrainableModules, cfg: TrainingConfig, accelerator: Accelerator, idle: bool) -> nn.Module:
    """Make the networks of one process those of all; with `sharding` in place, before there is an optimizer.

    Weights stay float32 and are gathered as such; autocast computes, as everywhere. (FSDP2's own mixed precision would
    gather them in bf16, which is half the traffic, and the weights of norms would be rounded.)

    Args:
        trained: on its device, the same on all processes.
        idle: whether there are steps in which some of the parameters are in no loss.

    Returns:
        What is called in place of `trained`: itself, sharded or not, or DDP's module around it.

    Raises:
        ValueError: see `shard_count`; and if a parameter ends up whole although `sharding` was asked for.
    """
    processes, device = accelerator.num_processes, accelerator.device
    shards = shard_count(cfg, processes)
    if shards == 1:
        if processes == 1:
            return trained
        return DistributedDataParallel(
            trained,
            device_ids=None if device.type == "cpu" else [device],
            find_unused_parameters=idle,  # DDP would wait for their gradients
        )
    if shards == processes:
        mesh = init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device.type, (processes // shards, shards), mesh_dim_names=("replicate", "shard"))
    shard_in_place(trained, mesh)
    whole = [
        name for name, p in trained.named_parameters() if not (isinstance(p, DTensor) and Shard(0) in p.placements)
    ]
    if whole:
        raise ValueError(f"`sharding` is {cfg.sharding}, but these parameters were not sharded: {whole}.")
    return trained


def shard_in_place(trained: TrainableModules, mesh: DeviceMesh) -> None:
    """FSDP2: gather the weights of one repeated layer at a time, those around the layers with their module, and those
    of the projector with the whole."""
    for name, module in trained.named_children():
        if name in WITH_REPEATED_LAYERS:
            for layer in repeated_layers(module):
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # also the root lets go of its weights after a forward, which is not FSDP2's default: after one without a backward
    # (validation) they would stay, and a change of the shards, as back from the averages, would not reach them
    fully_shard(trained, mesh=mesh, reshard_after_forward=True)


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """The layers in the lists of a network, but for lists inside of them."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in repeated_layers(child)]


def gather_full_module(module: Any) -> Any:
    """A module as it is on a single process, on the CPU; a collective for one that is sharded.

    Args:
        module: transformer or text encoder, with a `config`; one that is not sharded is returned itself.
    """
    sharded: Any = module if isinstance(module, FSDPModule) else None
    if sharded is None:
        return module
    weights = {name: p.detach().full_tensor().cpu() for name, p in sharded.named_parameters()}
    original: Any = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
    make = getattr(original, "from_config", original)  # diffusers', or a constructor of transformers
    new = make(sharded.config)
    for name, settings in getattr(sharded, "peft_config", {}).items():
        new.add_adapter(settings, name)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            parameter.data = weights.pop(name)
    assert not weights, f"{sorted(weights)} have no place in a new {original.__name__}"
    return new.train(sharded.training)


def norm_of_clipped(accelerator: Accelerator, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip gradients to a norm over all of them, wherever their shards lie. Returns their norm before that, which is
    the same on every process."""
    norm: Any = accelerator.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def split_evenly(items: Sequence[Any], rank: int, processes: int) -> list[tuple[int, Any]]:
    """What one of several processes does of some things: as many as every other, each with its place. Where they do
    not come out even, the last thing is done by several."""
    rounds = -(-len(items) // processes)
    places = [min(place, len(items) - 1) for place in range(rank, rounds * processes, processes)]
    return [(place, items[place]) for place in places]


class ObjectCommunicator:
    """Small messages between the processes over the CPU, in a group of their own: messages of two threads in one group
    would be taken for each other's. To be made by all processes in the same order."""

    def __init__(self, accelerator: Accelerator, timeout_seconds: float):
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        timeout = timedelta(seconds=timeout_seconds)
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout) if self.size > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def maximum(self, values: Sequence[float]) -> list[float]:
        """The largest that any process gave, value by value."""
        largest = torch.tensor(values, dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest.tolist()

    def merge(self, part: dict[Any, Any]) -> dict[Any, Any]:
        """The dicts of all processes as one."""
        return {key: value for given in self.gather(part) for key, value in given.items()}
