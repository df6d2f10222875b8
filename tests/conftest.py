"""Common conditions of all tests: no network, one thread, fixed seeds; and skips for missing hardware."""

import gc
import os
import random
import socket
from collections.abc import Iterator
from typing import Any

NETWORK = os.environ.get("RUN_NETWORK") == "1"
SLOW = os.environ.get("RUN_SLOW") == "1"

# set before torch and the Hugging Face libraries read them at import; child processes inherit them
os.environ["OMP_NUM_THREADS"] = "1"  # one pytest-xdist worker per core; numbers depend on the number of threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or every fork prints a warning
os.environ["HF_HUB_OFFLINE"] = "0" if NETWORK else "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "agg"

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

LOOPBACK = ("localhost", "::1", "0.0.0.0", "::", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests whose marker is not met, with the reason."""
    reasons = {
        "network": None if NETWORK else "needs the Hugging Face Hub: set RUN_NETWORK=1",
        "slow": None if SLOW else "takes minutes: set RUN_SLOW=1",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Collect garbage less often: the millions of objects of the imported libraries take 15% of the time otherwise."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Reset torch.compile before and after a test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start each test from the same random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may use the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fail a test that looks up or connects to another host, even if a library swallows the error."""
    if request.node.get_closest_marker("network"):
        yield []
        return

    attempts: list[str] = []
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: Any) -> None:
        name = host.decode() if isinstance(host, bytes) else host
        if name is None or name in LOOPBACK or name == socket.gethostname() or name.startswith("127."):
            return
        attempts.append(name)
        raise OSError(f"This test tried to reach {name!r}; tests run offline (mark it `network` if it must).")

    def check_address(sock: socket.socket, address: Any) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            check(address[0])

    def guarded_connect(sock: socket.socket, address: Any) -> None:
        check_address(sock, address)
        connect(sock, address)

    def guarded_connect_ex(sock: socket.socket, address: Any) -> int:
        check_address(sock, address)
        return connect_ex(sock, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    yield attempts
    assert not attempts, f"The test tried to reach {sorted(set(attempts))}; tests run offline."
