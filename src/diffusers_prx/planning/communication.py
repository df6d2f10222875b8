"""Communication between the GPUs of a run: what each optimizer step sends, and how long it takes at least."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..config.training_config import TrainingConfig
from ..techniques.optimizers import MuonWeight, balance_across_ranks, muon_weights
from ..training.networks import Nets
from .gpus import GPU

STRATEGIES = ("ddp", "fsdp2", "hsdp")  # copies; shards over all GPUs; shards within a node and copies across nodes


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run and the way weights are distributed over them.

    Args:
        gpu: data of the GPU model.
        num_gpus: number of GPUs, N; one process each.
        gpus_per_node: number of GPUs that share the fast links of a node.
        strategy: one of `STRATEGIES`.
        utilization: share of the peak FLOP/s, in (0, 1].
        price_per_hour: US dollars per GPU.
    """

    gpu: GPU
    num_gpus: int
    gpus_per_node: int
    strategy: str
    utilization: float
    price_per_hour: float

    @property
    def strategies(self) -> list[str]:
        """Strategies that this cluster supports: sharding needs several GPUs, `hsdp` several whole nodes."""
        several_nodes = self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node == 0
        supported = {"ddp": True, "fsdp2": self.num_gpus > 1, "hsdp": several_nodes}
        return [name for name in STRATEGIES if supported[name]]

    def shards(self, strategy: str) -> int:
        """Return the number of GPUs over which weights are sharded."""
        return {"ddp": 1, "fsdp2": self.num_gpus, "hsdp": min(self.num_gpus, self.gpus_per_node)}[strategy]

    def peak_flops(self, cfg: TrainingConfig) -> float:
        """Return the peak FLOP/s of one GPU in the precision of a run."""
        return 1e12 * (self.gpu.bf16_tflops if cfg.mixed_precision != "no" else self.gpu.float32_tflops)


@dataclass(frozen=True)
class Transfer:
    """One collective operation of an optimizer step.

    Args:
        content: tensors that are sent.
        kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `broadcast`.
        ranks: size of a process group.
        bytes_sent: bytes that each GPU sends per step, with the ring algorithm where there is a choice.
        across_nodes: True if every rank of a group is on another node.
    """

    content: str
    kind: str
    ranks: int
    bytes_sent: float
    across_nodes: bool = False

    def seconds(self, cluster: Cluster) -> float:
        """Return the seconds at the full speed of otherwise idle links."""
        link, network = 1e9 * cluster.gpu.link_gb_per_s, 1e9 * cluster.gpu.network_gb_per_s
        if self.across_nodes:
            return self.bytes_sent / network
        if self.ranks <= cluster.gpus_per_node:
            return self.bytes_sent / link
        if self.kind == "all-to-all":
            share_across = (self.ranks - cluster.gpus_per_node) / (self.ranks - 1)
            return max(self.bytes_sent * share_across / network, self.bytes_sent * (1 - share_across) / link)
        # a ring passes through every node once, and NCCL makes one ring per network card
        return self.bytes_sent / min(link, cluster.gpus_per_node * network)


def step_transfers(nets: Nets, cfg: TrainingConfig, num_gpus: int, shards: int) -> list[Transfer]:
    """Return the transfers of one optimizer step, without a few scalars.

    DDP reduces float32 gradients once per step. FSDP2 gathers float32 weights for every forward and every backward
    pass, and scatters gradients after every backward pass, which are also summed over its groups.

    Args:
        nets: networks of the run, on fake tensors.
        cfg: settings of the stage.
        num_gpus: number of GPUs.
        shards: number of GPUs over which weights are sharded; 1: DDP.
    """
    trained = nets.trainable(cfg)
    replicas = num_gpus // shards
    weight_bytes = sum(weight.nbytes for module in trained.values() for weight in module.parameters())
    passes = 1 if shards == 1 else cfg.gradient_accumulation_steps
    transfers = []
    if shards > 1:
        share = ring_share(shards)
        transfers.append(Transfer("weights", "all-gather", shards, 2 * passes * weight_bytes * share))
        transfers.append(Transfer("gradients", "reduce-scatter", shards, passes * weight_bytes * share))
    if replicas > 1:
        reduced = 2 * passes * weight_bytes / shards * ring_share(replicas)
        transfers.append(Transfer("gradients", "all-reduce", replicas, reduced, shards > 1))
    if cfg.optimizer == "muon":
        transfers += muon_transfers(cfg, trained, shards, replicas)[0]
    return transfers


def ring_share(ranks: int) -> float:
    """Return the share of a tensor that each rank sends in a ring all-gather or reduce-scatter."""
    return (ranks - 1) / ranks


def muon_transfers(
    cfg: TrainingConfig, trained: Mapping[str, nn.Module], shards: int, replicas: int
) -> tuple[list[Transfer], int]:
    """Return the transfers of `MuonAdamW` in one step, and the most bytes of updates that a rank gathers at a time.

    Args:
        cfg: settings of the run.
        trained: trained networks.
        shards: number of GPUs over which weights are sharded.
        replicas: number of copies of the shards.
    """
    element_bytes = 2 if cfg.muon_newton_schulz_dtype != "fp32" else 4
    weights = [
        MuonWeight(w, w, w, w.shape[0], w.shape[1], {"stacked": stacked})
        for w, stacked in muon_weights(trained, cfg.muon_fused).items()
    ]
    exchanged, gathered = [0] * (shards * replicas), [0] * shards
    largest_gather = 0
    for weights_by_rank in balance_across_ranks(weights, shards * replicas):
        by_replica = [weights_by_rank[first : first + shards] for first in range(0, len(weights_by_rank), shards)]
        for shard in range(shards):
            # elements in this shard's rows of the weights that each replica orthogonalizes
            rows = [sum(_elements(weights, shard, shards) for weights in replica) for replica in by_replica]
            gathered[shard] += sum(rows)
            largest_gather = max(largest_gather, *rows)
            for index, replica in enumerate(by_replica):
                local = _elements(replica[shard], shard, shards)
                assigned = sum(w.rows * w.columns for w in replica[shard])
                # sends its rows of other ranks' weights, and the results of its own weights back
                exchanged[index * shards + shard] += rows[index] - local + assigned - local
    transfers = []
    if shards > 1:
        transfers.append(Transfer("Muon's matrices", "all-to-all", shards, element_bytes * max(exchanged)))
    if replicas > 1:
        broadcast = element_bytes * max(gathered) * ring_share(replicas)
        transfers.append(Transfer("Muon's updates", "broadcast", replicas, broadcast, shards > 1))
    return transfers, element_bytes * largest_gather if replicas > 1 else 0


def _elements(weights: Iterable[MuonWeight], shard: int, shards: int) -> int:
    """Return the number of elements that a shard has of some weights."""
    return sum(w.rows_by_shard(shards)[shard] * w.columns for w in weights)
