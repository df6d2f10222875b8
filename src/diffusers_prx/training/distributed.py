"""Distribution of the trainable networks over processes: copies (DDP), shards (FSDP2), or shards within groups (HSDP).

accelerate launches the processes; `fully_shard` of torch shards the networks. accelerate's FSDP2 plugin is not used:
it is silently ignored on a CPU, so tests there would test DDP, and it replaces parameters that the moving averages
refer to.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

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

T = TypeVar("T")


class TrainableModules(nn.Module):
    """All trainable networks as one module, for DDP and FSDP2.

    Args:
        modules: trainable networks by their names in `Nets`.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that computes with these modules.

        A training step, the validation loss and sampling are one forward pass each, in which DDP prepares the
        gradients and FSDP2 gathers weights. DDP and FSDP2 find tensors with gradients in tuples, lists and dicts.
        """
        return compute(*arguments)


def start_accelerator(cfg: TrainingConfig) -> Accelerator:
    """Make the accelerator of a run: processes, precision and trackers.

    Raises:
        ValueError: the tracker is not installed, or see `check_environment`.
    """
    check_environment(cfg)
    accelerator = Accelerator(
        # explicit, because without it processes of torchrun on a CPU would each run alone
        cpu=not torch.accelerator.is_available(),
        mixed_precision=cfg.mixed_precision,
        # a plugin, because an environment variable would silently override a number
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        log_with=None if cfg.report_to == "none" else cfg.report_to,
        # later than the watchdog, which prints the stack traces of a hanging step
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=2 * cfg.step_timeout_seconds))],
        project_config=ProjectConfiguration(project_dir=cfg.output_dir, logging_dir=str(Path(cfg.output_dir, "logs"))),
    )
    if cfg.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"`report_to` is {cfg.report_to}, which is not installed: run `pip install {cfg.report_to}`.")
    return accelerator


def check_environment(cfg: TrainingConfig) -> None:
    """Validate that the environment and accelerate's configuration do not contradict the run.

    `accelerate launch` sets precision and compiler to "no" by default, which is accepted with any setting.

    Raises:
        ValueError: a variable requests something else than the settings.
    """
    unsupported = [
        name
        for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
        if _is_set(f"ACCELERATE_USE_{name}")
    ]
    if unsupported:
        raise ValueError(
            f"accelerate was launched with {', '.join(unsupported)}, which this script does not support: launch with "
            "one of training/accelerate_configs and pass `--sharding full` or hybrid."
        )
    steps = sorted({str(stage.gradient_accumulation_steps) for stage in cfg.stage_configs()})
    requirements: list[tuple[str, str, str, list[str]]] = [
        ("MIXED_PRECISION", "mixed_precision", cfg.mixed_precision, ["no", cfg.mixed_precision]),
        ("DYNAMO_BACKEND", "compile", str(cfg.compile), ["no", "inductor"] if cfg.compile else ["no"]),
        (
            "GRADIENT_ACCUMULATION_STEPS",
            "gradient_accumulation_steps",
            ", ".join(steps),
            steps if len(steps) == 1 else [],
        ),
    ]
    for variable, setting, setting_value, accepted in requirements:
        value = os.environ.get(f"ACCELERATE_{variable}", "")
        if value and value.lower() not in accepted:
            raise ValueError(
                f"The environment variable ACCELERATE_{variable} is {value} (`accelerate launch` may set it), but "
                f"`{setting}` is {setting_value}: unset the variable, and pass `--{setting}`."
            )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def shard_count(cfg: TrainingConfig, processes: int) -> int:
    """Return the number of processes that share one copy of the weights.

    Raises:
        ValueError: the number of processes does not allow the sharding.
    """
    if cfg.sharding == "none":
        return 1
    if processes == 1:
        raise ValueError(
            f"`sharding` is {cfg.sharding}, but there is a single process: launch several with accelerate or torchrun "
            "(see training/accelerate_configs), or remove it."
        )
    if cfg.sharding == "full":
        return processes
    size = cfg.sharding_size or int(os.environ.get("LOCAL_WORLD_SIZE", 0))  # set by accelerate and torchrun
    if not 1 < size < processes or processes % size:
        raise ValueError(
            f"`sharding_size` is {size} (default: the processes of one machine), but must be a divisor of the "
            f"{processes} processes between 1 and {processes}. For one copy over all of them, pass `--sharding full`."
        )
    return size


def distribute(
    trained: TrainableModules, cfg: TrainingConfig, accelerator: Accelerator, has_unused: bool
) -> nn.Module:
    """Wrap the trainable networks in DDP, or shard them in place, before the optimizer is made.

    Weights stay float32 and are gathered as float32. FSDP2's own mixed precision would halve the traffic, but round
    the weights of norms to bf16.

    Args:
        trained: trainable networks on their device, the same on all processes.
        cfg: configuration of the run.
        accelerator: accelerator of the run.
        has_unused: True if any step leaves trainable parameters unused.

    Returns:
        Module to call instead of `trained`.

    Raises:
        ValueError: see `shard_count`; or a parameter was not sharded.
    """
    processes, device = accelerator.num_processes, accelerator.device
    shards = shard_count(cfg, processes)
    if shards == 1:
        if processes == 1:
            return trained
        return DistributedDataParallel(
            trained,
            device_ids=None if device.type == "cpu" else [device],
            find_unused_parameters=has_unused,  # DDP would wait for their gradients
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
    """Shard with FSDP2, so that the weights of one repeated layer at a time are gathered."""
    for name, module in trained.named_children():
        if name in WITH_REPEATED_LAYERS:
            for layer in repeated_layers(module):
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # the root must release its gathered weights too, unlike FSDP2's default: after a validation they would stay, and
    # hide changes of the shards when the averages are swapped out
    fully_shard(trained, mesh=mesh, reshard_after_forward=True)


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers in the outermost module lists of a network."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in repeated_layers(child)]


def gather_full_module(module: Any) -> Any:
    """Return a sharded module as a complete one on the CPU; all processes must call this.

    Args:
        module: transformer or text encoder with a `config`; returned unchanged if it is not sharded.
    """
    sharded: Any = module if isinstance(module, FSDPModule) else None
    if sharded is None:
        return module
    weights = {name: p.detach().full_tensor().cpu() for name, p in sharded.named_parameters()}
    original: Any = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))
    make = getattr(original, "from_config", original)  # a method of diffusers models; transformers has the constructor
    new = make(sharded.config)
    for name, settings in getattr(sharded, "peft_config", {}).items():
        new.add_adapter(settings, name)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            parameter.data = weights.pop(name)
    assert not weights, f"{sorted(weights)} have no place in a new {original.__name__}"
    return new.train(sharded.training)


def clip_gradients(accelerator: Accelerator, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip gradients by their total norm over all shards, and return the norm before clipping."""
    norm: torch.Tensor = accelerator.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def split_evenly(items: Sequence[T], rank: int, processes: int) -> list[tuple[int, T]]:
    """Return (index, item) pairs for one process; every process gets the same number.

    If the items do not divide evenly, several processes get the last one.
    """
    rounds = -(-len(items) // processes)
    indices = [min(index, len(items) - 1) for index in range(rank, rounds * processes, processes)]
    return [(index, items[index]) for index in indices]


class ObjectCommunicator:
    """Exchange of small Python objects between processes, over the CPU.

    Each communicator has its own process group, because threads that share a group would receive each other's
    messages. All processes must make their communicators in the same order.

    Args:
        accelerator: accelerator of the run.
        timeout_seconds: time limit of an exchange.

    Example:
        >>> ObjectCommunicator(accelerator, 60).gather(accelerator.process_index)
    """

    def __init__(self, accelerator: Accelerator, timeout_seconds: float):
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        timeout = timedelta(seconds=timeout_seconds)
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout) if self.size > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def maximum(self, values: Sequence[float]) -> list[float]:
        """Return the elementwise maximum over all processes."""
        largest = torch.tensor(values, dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest.tolist()

    def merge(self, part: dict[Any, Any]) -> dict[Any, Any]:
        """Merge the dicts of all processes."""
        return {key: value for given in self.gather(part) for key, value in given.items()}
