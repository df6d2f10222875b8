"""Operations of a training step, and values that the host reads in it."""

import pytest
import torch
from training.benchmarks.count_operations import DeviceOperations, DeviceReads, count_draws


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index by a mask"),
    ],
)
def test_reads_of_device_tensors_are_found(read, name):
    on_device, on_host = torch.ones(3), torch.ones(3)
    operations = DeviceOperations([on_device])
    with DeviceReads(operations), operations:
        read(on_host)
        assert operations.reads == []
        assert operations.counts.total() == 0
        doubled = (2 * on_device).view(3)
        read(doubled)
    assert operations.reads == [name]
    assert operations.counts["mul"] == 1
    assert operations.counts["view"] == 0


def test_noise_takes_the_same_operations_for_any_batch():
    assert count_draws(2) == count_draws(7) < 100
