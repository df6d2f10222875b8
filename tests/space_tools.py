"""Helpers for the tests of the Space: a transformer that counts its calls, and a client of the two endpoints."""

import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any

import tiny
from diffusers_prx.models.transformer_prx import PRXTransformer2DModel

TIMEOUT = 300.0  # seconds without a message; gradio sends heartbeats


class CountingTransformer(PRXTransformer2DModel):
    """A transformer that counts its calls and sleeps in each."""

    seconds_per_call = 0.0
    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        time.sleep(self.seconds_per_call)
        return super().forward(*args, **kwargs)


def count_calls(cache, model: str, seconds_per_call: float) -> CountingTransformer:
    """Replace the transformer of a loaded model by a counting one."""
    pipeline, _ = cache.get(model)
    transformer = tiny.transformer(cls=CountingTransformer, **tiny.PIXEL_SETTINGS)
    transformer.seconds_per_call = seconds_per_call
    pipeline.register_modules(transformer=transformer)
    return transformer


def becomes_idle(transformer: CountingTransformer, within: float = 3.0) -> bool:
    """True if there is no call for half a second, before `within` seconds have passed."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        before = transformer.calls
        time.sleep(0.5)
        if transformer.calls == before:
            return True
    return False


@dataclass
class Answer:
    """The outcome of one call. Times are in seconds of `time.monotonic`.

    Args:
        kind: "answered", "refused" (the queue is full) or "failed".
        message: error message.
        joined: when the server accepted the call.
        started: when the first event of the call arrived.
        ended: when the last one arrived.
        data: returned values.
    """

    kind: str
    message: str = ""
    joined: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    data: list[Any] = field(default_factory=list)


def call_endpoint(port: int, endpoint: str, body: bytes) -> Answer:
    """Call an endpoint of the page and wait for its result."""
    path = f"/gradio_api/call/{endpoint}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            return Answer("refused" if response.status == 503 else "failed", text, ended=time.monotonic())
        answer = Answer("failed", "the stream ended early", time.monotonic())
        connection.request("GET", f"{path}/{json.loads(text)['event_id']}")
        event = ""
        for line in connection.getresponse():
            name, _, value = line.decode().strip().partition(": ")
            if name == "event":
                event = value
                if event != "heartbeat" and not answer.started:
                    answer.started = time.monotonic()
            elif name == "data" and event == "complete":
                answer.kind, answer.message, answer.data = "answered", "", json.loads(value)
            elif name == "data" and event == "error":
                answer.message = str((json.loads(value) or {}).get("error"))
        answer.ended = time.monotonic()
        return answer
    finally:
        connection.close()


def draw_body(prompt: str, model: str, seed: int, steps: int = 10) -> bytes:
    return json.dumps({"data": [prompt, "", model, "32 x 32", "fast", steps, 4.0, seed, 1]}).encode()
