"""A network that counts its calls, for the tests of the Space."""

import time

import tiny
from diffusers_prx.models.transformer_prx import PRXTransformer2DModel


class Counted(PRXTransformer2DModel):
    """A network that counts its calls, and takes a while for each."""

    seconds = 0.0
    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        time.sleep(self.seconds)
        return super().forward(*args, **kwargs)


def counted(cache, model: str, seconds: float) -> Counted:
    """A counting network in place of the loaded one of a model."""
    pipeline, _ = cache.get(model)
    network = tiny.transformer(cls=Counted, **tiny.PIXEL_SETTINGS)
    network.seconds = seconds
    pipeline.register_modules(transformer=network)
    return network


def rests(network: Counted, within: float = 3.0) -> bool:
    """Whether the network's calls stop, and stay stopped for half a second."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        before = network.calls
        time.sleep(0.5)
        if network.calls == before:
            return True
    return False
