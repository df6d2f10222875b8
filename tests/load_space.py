"""Load test of the demo: many clients at once, and malformed requests.

    make demo &                                                  # or python spaces/prx/app.py
    python tests/load_space.py --model quickstart --size '32 x 32' --pid $!

`--clients` clients request images for `--seconds`, one after the other; a client that is refused because the queue is
full waits a second. Then `--malformed` requests follow that are wrong in one value. The last line is JSON: numbers of
answered, refused and failed requests, waiting times, violations of the order of arrival, memory of the server
(`--pid`, on Linux) after the first quarter and at the end, and every answer to a malformed request that is not a clear
sentence. It contacts this machine only.
"""

import argparse
import http.client
import json
import random
import statistics
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
API = "/gradio_api/call"
PROMPT = "a red circle on a white background."
TIMEOUT = 300.0  # seconds without a sign of life (gradio's heartbeats are one)


@dataclass
class Answer:
    """Result of one request. Times are in seconds of one clock; `started` is the time of the first event."""

    kind: str  # answered, refused (the queue is full), or failed
    message: str = ""  # error
    joined: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    data: list[Any] = field(default_factory=list)


def ask(port: int, endpoint: str, body: bytes) -> Answer:
    """Send one request and wait for its end."""
    connection = http.client.HTTPConnection(HOST, port, timeout=TIMEOUT)
    try:
        connection.request("POST", f"{API}/{endpoint}", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            return Answer("refused" if response.status == 503 else "failed", text, ended=time.monotonic())
        joined = time.monotonic()
        connection.request("GET", f"{API}/{endpoint}/{json.loads(text)['event_id']}")
        answer = Answer("failed", "the stream ended early", joined)
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


def draw_body(prompt: str, model: str, size: str, seed: int, steps: int = 10) -> bytes:
    return json.dumps({"data": [prompt, "", model, size, "fast", steps, 4.0, seed, 1]}).encode()


def malformed(number: int, model: str, size: str) -> tuple[str, bytes]:
    """Return the endpoint and the body of a malformed request, chosen by a number."""
    rng = random.Random(number)
    odd = [None, "", "abc", [], {}, [[1]], {"path": "/etc/passwd"}, True, -1, 0, 1e309, 10**30, 2.5, "x" * 5000]
    right = ["a red circle", "", model, size, "fast", 3, 4.0, 0, 1]
    wrong = {  # position -> values that are refused
        0: [None, "", "   ", 7, [], {}, "x" * 1001, "\ud800"],
        1: [7, [1], {"a": 1}, "x" * 1001, True],
        2: ["../../etc", "/etc/passwd", "<script>alert(1)</script>", *odd],
        3: ["1 x 1", "99999 x 99999", "32x32", "-32 x 32", *odd],
        4: ["slow", "EXACT", *odd],
        5: [51, "3", *[value for value in odd if value is not True]],
        6: [0.99, 15.1, "4", *[value for value in odd if value not in (True, 2.5)]],
        7: [2**31, "0", *[value for value in odd if value not in (0, True)]],
        8: [5, "1", *[value for value in odd if value is not True]],
    }
    kind = rng.random()
    if kind < 0.05:
        return "draw", rng.choice([b"", b"{", b"[]", b"null", b'{"data": 3}', b'{"data": "abc"}', b"\xff\xfe"])
    if kind < 0.1:
        return "draw", json.dumps({"data": right[: rng.randrange(9)]}).encode()
    if kind < 0.13:
        return rng.choice(["nothing", "draw_one", "%00", "predict"]), json.dumps({"data": right}).encode()
    if kind < 0.2:
        both = ["a red circle", "", 0, model, "fast", 3, 4.0, model, "fast", 3, 4.0]
        both[rng.choice([2, 3, 5, 7, 8, 9, 10])] = rng.choice([None, "abc", [], {}, -1, 1e309])
        return "compare", json.dumps({"data": both}).encode()
    position = rng.randrange(9)
    right[position] = rng.choice(wrong[position])
    return "draw", json.dumps({"data": right}).encode()


def is_clear(answer: Answer) -> bool:
    """True if an answer explains the error without internals of the server."""
    text = answer.message
    has_internals = any(sign in text for sign in ("Traceback", 'File "', "site-packages", "object at 0x"))
    return answer.kind == "failed" and len(text) > 10 and text != "None" and not has_internals


def broken_order(answers: list[Answer]) -> int:
    """Return how many requests were overtaken by one that came clearly later and ended before they started."""
    done = sorted((answer for answer in answers if answer.kind == "answered"), key=lambda answer: answer.joined)
    return sum(
        any(later.ended < answer.started for later in done[index + 1 :] if later.joined > answer.joined + 0.1)
        for index, answer in enumerate(done)
    )


def memory_mb(pid: int | None) -> float | None:
    if pid is None:
        return None
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def load(port: int, model: str, size: str, clients: int, seconds: float, pid: int | None = None) -> dict[str, Any]:
    """Return the results of many clients at once."""
    answers: list[Answer] = []
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        for turn in range(10**6):
            if time.monotonic() > end:
                return
            answer = ask(port, "draw", draw_body(PROMPT, model, size, 1000 * number + turn))
            answers.append(answer)
            if answer.kind == "refused":
                time.sleep(1)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 4)
    early = memory_mb(pid)
    for thread in threads:
        thread.join()
    kinds = {kind: sum(answer.kind == kind for answer in answers) for kind in ("answered", "refused", "failed")}
    waits = [answer.ended - answer.joined for answer in answers if answer.kind == "answered"] or [float("nan")]
    return {
        "clients": clients,
        "seconds": seconds,
        **kinds,
        "failures": sorted({answer.message for answer in answers if answer.kind == "failed"})[:5],
        "median_seconds": round(statistics.median(waits), 2),
        "longest_seconds": round(max(waits), 2),
        "overtaken": broken_order(answers),
        "memory_mb_after_a_quarter": early,
        "memory_mb_at_the_end": memory_mb(pid),
    }


def send_malformed(port: int, model: str, size: str, count: int) -> dict[str, Any]:
    """Return the results of malformed requests, and of a valid one after them."""
    unclear = []
    for number in range(count):
        endpoint, body = malformed(number, model, size)
        answer = ask(port, endpoint, body)
        if not is_clear(answer):
            unclear.append({"endpoint": endpoint, "body": repr(body[:200]), **asdict(answer)})
    after = ask(port, "draw", draw_body(PROMPT, model, size, 0))
    return {"malformed": count, "unclear": unclear, "a_right_one_after_them": after.kind}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--model", default="quickstart", help="Name of a model on the page.")
    parser.add_argument("--size", default="32 x 32", help="Size as on the page.")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--malformed", type=int, default=200)
    parser.add_argument("--pid", type=int, help="Process id of the server, to measure its memory.")
    args = parser.parse_args(argv)
    # loads the model and starts the threads of the server before memory is measured
    ask(args.port, "draw", draw_body(PROMPT, args.model, args.size, 0))
    figures = load(args.port, args.model, args.size, args.clients, args.seconds, args.pid)
    print(json.dumps(figures | send_malformed(args.port, args.model, args.size, args.malformed)))


if __name__ == "__main__":
    main()
