"""The Space under load: many clients at once, and malformed requests. Run the slow test with -s for its figures."""

import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from space_tools import Answer, call_endpoint, draw_body

SIZE = "32 x 32"


def malformed_request(number: int) -> tuple[str, bytes]:
    """Return an endpoint and a body with one mistake, as a function of `number`."""
    rng = random.Random(number)
    odd = [None, "", "abc", [], {}, [[1]], {"path": "/etc/passwd"}, True, -1, 0, 1e309, 10**30, 2.5, "x" * 5000]
    valid = ["a red circle", "", "pixels", SIZE, "fast", 3, 4.0, 0, 1]
    invalid = {  # position in `valid` -> values that are not accepted there
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
        return "draw", json.dumps({"data": valid[: rng.randrange(9)]}).encode()
    if kind < 0.13:
        return rng.choice(["nothing", "draw_one", "%00", "predict"]), json.dumps({"data": valid}).encode()
    if kind < 0.2:
        comparison = ["a red circle", "", 0, "pixels", "fast", 3, 4.0, "pixels", "fast", 3, 4.0]
        comparison[rng.choice([2, 3, 5, 7, 8, 9, 10])] = rng.choice([None, "abc", [], {}, -1, 1e309])
        return "compare", json.dumps({"data": comparison}).encode()
    position = rng.randrange(9)
    valid[position] = rng.choice(invalid[position])
    return "draw", json.dumps({"data": valid}).encode()


def is_clear_refusal(answer: Answer) -> bool:
    """True if the answer says what was wrong, without internals of the server."""
    internals = any(sign in answer.message for sign in ("Traceback", 'File "', "site-packages", "object at 0x"))
    return answer.kind == "failed" and len(answer.message) > 10 and answer.message != "None" and not internals


def unclear_answers(port: int, count: int) -> list[tuple[str, bytes, Answer]]:
    """Send malformed requests; return those whose answer is not a clear refusal."""
    requests = [malformed_request(number) for number in range(count)]
    answers = [(*request, call_endpoint(port, *request)) for request in requests]
    return [answer for answer in answers if not is_clear_refusal(answer[-1])]


def count_overtaken(answers: list[Answer]) -> int:
    """Count the requests that started after a request that joined later had ended."""
    done = sorted((answer for answer in answers if answer.kind == "answered"), key=lambda answer: answer.joined)
    return sum(
        any(later.ended < answer.started for later in done[place + 1 :] if later.joined > answer.joined + 0.1)
        for place, answer in enumerate(done)
    )


def resident_mb() -> float:
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def run_clients(port: int, clients: int, seconds: float) -> dict[str, Any]:
    """Draw with many clients at once, each one picture after the other; return counts and the growth of memory."""
    answers: list[Answer] = []
    end = time.monotonic() + seconds

    def draw_until_the_end(client: int) -> None:
        turn = 0
        while time.monotonic() < end:
            body = draw_body("a red circle on a white background.", "pixels", 1000 * client + turn)
            answers.append(call_endpoint(port, "draw", body))
            turn += 1
            if answers[-1].kind == "refused":
                time.sleep(1)

    threads = [threading.Thread(target=draw_until_the_end, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 4)
    after_a_quarter = resident_mb()
    for thread in threads:
        thread.join()
    counts = {kind: sum(answer.kind == kind for answer in answers) for kind in ("answered", "refused", "failed")}
    growth = resident_mb() - after_a_quarter
    return {**counts, "overtaken": count_overtaken(answers), "memory_growth_mb": round(growth, 1)}


def test_malformed_requests_are_answered_with_a_sentence(port):
    assert unclear_answers(port, 40) == []
    assert call_endpoint(port, "draw", draw_body("a red cat", "pixels", 0)).kind == "answered"


def test_malformed_requests_are_of_all_kinds():
    requests = [malformed_request(number) for number in range(200)]
    assert len(set(requests)) > 100
    assert {endpoint for endpoint, _ in requests} > {"draw", "compare", "nothing"}


def test_a_clear_refusal_is_told_from_other_answers(port):
    answer = call_endpoint(port, "draw", draw_body("a red cat", "pixels", 0, steps=1))
    assert not is_clear_refusal(answer)
    answer.kind, answer.message = "failed", "Traceback (most recent call last)"
    assert not is_clear_refusal(answer)
    answer.message = "Steps is 900; accepted: whole numbers from 1 to 50."
    assert is_clear_refusal(answer)


def test_four_clients_are_answered_in_order(port):
    figures = run_clients(port, clients=4, seconds=1.0)
    assert figures["failed"] == 0
    assert figures["answered"] >= 4
    assert figures["overtaken"] == 0


@pytest.mark.slow
def test_thirty_two_clients_for_three_minutes(port):
    figures = run_clients(port, clients=32, seconds=180.0)
    print(figures)
    assert figures["failed"] == 0
    assert figures["answered"] > 32
    assert figures["overtaken"] == 0
    assert figures["memory_growth_mb"] < 100
    assert unclear_answers(port, 200) == []
