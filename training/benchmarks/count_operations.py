"""Count the operations that a training step launches and the values that the host reads in it; needs no GPU.

The counter follows the tensors that would be on the device: everything that depends on weights, images or noise. Only
operations on these count, views do not. A CPU divides some operations that a GPU has as one kernel, such as RMS norm.

Example:
    python training/benchmarks/count_operations.py --optimizer muon
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from diffusers_prx.compat import TorchDispatchMode, tree_leaves
from diffusers_prx.config.training_config import TrainingConfig
from diffusers_prx.training.networks import new_text_encoder, train_tokenizer
from diffusers_prx.training.rng import StepRandom, normal_from_words
from diffusers_prx.training.run import Run
from diffusers_prx.training.setup import set_up_run
from diffusers_prx.training.trainer import enter_stage, micro_step, optimizer_step

CARD_TEMPLATE = Path(__file__).resolve().parents[2] / "model_cards" / "template.md"
# operations of which the host reads a value, or the size of the result
READING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"}
READING |= {"repeat_interleave", "_unique2", "unique_dim", "unique_consecutive"}
READING_METHODS = {"tolist", "numpy", "cpu", "__array__"}
NO_KERNEL = {"_unsafe_view", "_reshape_alias", "alias", "detach", "lift_fresh"}


class DeviceOperations(TorchDispatchMode):
    """Count operations on tensors that depend on the given ones, and note what the host reads of them.

    Attributes:
        counts: number of operations by name.
        reads: names of the operations with which the host read values.
    """

    def __init__(self, sources: Iterable[torch.Tensor]):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.reads: list[str] = []
        self.on_device = WeakTensorKeyDictionary()
        self._add(sources)

    def _add(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self.on_device[tensor] = True

    def holds(self, values: Any) -> bool:
        """True if any tensor in nested values would be on the device."""
        return any(isinstance(value, torch.Tensor) and value in self.on_device for value in tree_leaves(values))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        reads = self.holds((args, kwargs))
        if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.reads += ["index by a mask"] if reads else []
        elif name in READING and reads:
            self.reads.append(name)
        result = func(*args, **(kwargs or {}))
        if reads or name in ("randn", "rand", "bernoulli"):
            self._add(tree_leaves(result))
            self.counts[name] += not (func.is_view or name in NO_KERNEL)
        return result


class DeviceReads(TorchFunctionMode):
    """Note the methods that read values without an operation."""

    def __init__(self, operations: DeviceOperations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READING_METHODS and self.operations.holds(args[:1]):
            self.operations.reads.append(name)
        return func(*args, **(kwargs or {}))


def count_steps(run: Run, steps: int) -> list[tuple[DeviceOperations, DeviceOperations]]:
    """Train some steps, and count those of the micro-batches and those of the optimizer in each."""
    stage, counted, outputs = run.stages[0], [], []
    lr_scheduler = enter_stage(run, stage)
    weights = [*run.trained.parameters(), *run.nets.text_encoder.parameters()]
    operations = DeviceOperations(weights)
    for batch in stage.training_batches(0, 0, 1, run.accelerator.device):
        operations._add(batch.values())
        with DeviceReads(operations), operations:
            outputs.append((batch, micro_step(run, stage, batch)))
        if not run.accelerator.sync_gradients:
            continue
        update = DeviceOperations([*weights, *operations.on_device])
        with DeviceReads(update), update:
            optimizer_step(run, stage, lr_scheduler, outputs)
        counted.append((operations, update))
        run.state.step += 1
        if len(counted) == steps:
            break
        operations, outputs = DeviceOperations(weights), []
    return counted


def set_up(folder: Path, batch_size: int, **changes: Any) -> Run:
    """Make a run of the baseline with PRX-1.2B's 16 blocks and narrow layers."""
    tokenizer = train_tokenizer(["a large red circle on a white background."] * 20, 300, 48)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "intermediate_size": 32, "query_pre_attn_scalar": 8}
    new_text_encoder(sizes, tokenizer).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "text_encoder")
    transformer = {"patch_size": 8, "hidden_size": 32, "num_heads": 2, "depth": 16, "axes_dim": [8, 8]}
    settings: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "dataset_name": "scenes",
        "resolution": 32,
        "transformer_config": transformer,
        "text_encoder_name_or_path": str(folder / "text_encoder"),
        "max_sequence_length": 48,
        "train_batch_size": batch_size,
        "max_train_steps": 4,
        "mixed_precision": "bf16",
        "use_ema": True,
        "ema_update_every": 1,
        "report_to": "none",
    }
    return set_up_run(TrainingConfig(**settings | changes), CARD_TEMPLATE)


def count_draws(batch_size: int) -> int:
    """Count the operations on an accelerator that draw the noise of a batch."""
    rng = StepRandom(0, 0, range(batch_size))
    with DeviceOperations([rng.samples]) as operations:
        normal_from_words(rng._words("noise", rng.samples, 3 * 32 * 32))
    return operations.counts.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = set_up(Path(folder), args.batch_size, optimizer=args.optimizer)
        step, update = count_steps(run, 2)[-1]
        run.unlock()
    drawn = step.counts["randn"]  # one per sample on a CPU
    print("| part | operations | values read by the host |\n|---|---|---|")
    print(f"| noise, on an accelerator | {count_draws(args.batch_size)} | 0 |")
    print(f"| forward and backward | {step.counts.total() - drawn} | {len(step.reads)} |")
    print(f"| clipping, {args.optimizer}, average | {update.counts.total()} | {len(update.reads)} |")
    print(f"\nmost frequent: {step.counts.most_common(12)}, {update.counts.most_common(8)}")
    print(f"reads: {dict(Counter(step.reads + update.reads))}")


if __name__ == "__main__":
    main()
