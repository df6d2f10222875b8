"""The served page, asked by programs: pictures, sentences for errors, no way to other files, an end to the work."""

import asyncio
import http.client
import io
import json
import os
import pickle
import re
import shutil
import sys
import threading
import time
import tracemalloc
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

import httpx
import numpy as np
import pytest
import torch
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from packaging.requirements import Requirement
from PIL import Image

import diffusers_prx
import tiny
from diffusers_prx.models.transformer_prx import PRXTransformer2DModel
from space_tools import counted, rests

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")

import gradio as gr

import app
import page_parts
import serving
from load_space import ask, draw_body, is_clear, load, main, malformed, send_malformed
from model_cache import ModelCache, find_models

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "spaces" / "prx"
SIZE = "32 x 32"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def served(model_folder):
    """A page over the tiny pipelines: its port, its cache, the page itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRX_MODELS", str(model_folder))
        models = find_models()
    cache = ModelCache(models, {})
    page = app.build(models, cache)
    _, url, _ = serving.launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield int(url.rstrip("/").rpartition(":")[2]), cache, page
    page.close()


@pytest.fixture
def port(served):
    return served[0]


def test_the_snippet_of_the_readme_draws(port):
    code = re.search(r"```python\n(.*?)```", (SPACE / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("7860", str(port)).replace('"quickstart"', '"pixels"')
    code = code.replace("client.predict", "answer = client.predict")
    names: dict = {}
    exec(code, names)
    status, _, gallery, about, *_ = names["answer"]
    assert "Done" in status
    assert "32 x 32" in about
    [picture] = gallery["value"] if isinstance(gallery, dict) else gallery
    with Image.open(picture["image"]) as image:
        assert image.size == (32, 32)


def get(port: int, path: str, method: str = "GET", body: bytes = b"", headers: dict | None = None):
    """Status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


class Visitor:
    """A browser's part of gradio's queue: it joins, listens, and can leave or press Stop."""

    def __init__(self, port: int, page, endpoint: str, data: list):
        self.port = port
        self.session = uuid.uuid4().hex
        self.fn_index = next(index for index, fn in page.fns.items() if fn.api_name == endpoint)
        body = {"data": data, "fn_index": self.fn_index, "session_hash": self.session}
        status, text = self.post("queue/join", body)
        assert status == 200, text
        self.event_id = json.loads(text)["event_id"]
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        self.stream = self.connection.getresponse()

    def post(self, path: str, body: dict) -> tuple[int, bytes]:
        return get(self.port, f"/gradio_api/{path}", "POST", json.dumps(body).encode(), JSON)

    def hear(self, message: str) -> dict:
        """Listen until a message of this kind."""
        for line in self.stream:
            if line.startswith(b"data: "):
                heard = json.loads(line[6:])
                if heard["msg"] == message:
                    return heard
        raise AssertionError(f"no {message} came")

    def stop(self) -> None:
        body = {"session_hash": self.session, "fn_index": self.fn_index, "event_id": self.event_id}
        assert self.post("cancel", body)[0] == 200

    def leave(self) -> None:
        self.stream.close()
        self.connection.close()


def slow(steps: int = 50, seed: int = 0) -> list:
    return ["a red cat", "", "pixels", SIZE, "exact", steps, 3.0, seed, 1]


def test_a_program_draws_through_the_page(served):
    port, cache, _ = served
    answer = ask(port, "draw", json.dumps({"data": ["a red cat", "", "pixels", SIZE, "exact", 3, 3.0, 5, 2]}).encode())
    assert answer.kind == "answered", answer.message
    pictures = answer.data[2]["value"]
    assert [picture["caption"] for picture in pictures] == ["Seed 5", "Seed 6"]
    path = pictures[0]["image"]["url"].partition(str(port))[2]
    drawn = np.asarray(Image.open(io.BytesIO(get(port, path)[1])))
    pipeline, _ = cache.get("pixels")
    generators = tiny.generators(5, 6)
    expected = pipeline(
        "a red cat", num_inference_steps=3, guidance_scale=3.0, num_images_per_prompt=2, generator=generators
    )
    assert np.array_equal(drawn, np.asarray(expected.images[0]))


def test_two_ways_are_compared(port):
    data = ["a red cat", "", 3, "pixels", "exact", 3, 3.0, "latents", "fast", 4, 2.0]
    answer = ask(port, "compare", json.dumps({"data": data}).encode())
    assert answer.kind == "answered", answer.message
    status, first, about_first, second, about_second = answer.data
    assert "Done." in status
    assert "<img" in first
    assert "<img" in second
    assert first != second
    assert "exact, 3 steps" in about_first
    assert "fast, 4 steps" in about_second
    assert "seed=3" in about_first
    assert "seed=3" in about_second


def test_each_of_many_malformed_requests_is_a_sentence(port):
    figures = send_malformed(port, "pixels", SIZE, 40)
    assert figures["unclear"] == []
    assert figures["a_right_one_after_them"] == "answered"


def test_the_malformed_requests_are_of_all_kinds():
    """Or the test above would test less than it says; a right request is no clear refusal."""
    kinds = [malformed(number, "pixels", SIZE) for number in range(200)]
    assert len(set(kinds)) > 100
    assert {endpoint for endpoint, _ in kinds} > {"draw", "compare", "nothing"}


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../etc/passwd", "/proc/self/environ", "{space}/app.py", "{models}/pixels/model_index.json"],
)
def test_no_file_outside_can_be_read(port, model_folder, path):
    path = path.format(space=SPACE, models=model_folder)
    for prefix in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/gradio_api/stream/"):
        for spelled in (path, path.replace("/", "%2F"), path.replace("/", "%252F")):
            status, body = get(port, prefix + spelled)
            assert status >= 400 or b"<html" in body[:200].lower(), (prefix, spelled)
            assert b"root:" not in body
            assert b"_class_name" not in body


def sentence(answer: tuple[int, bytes]) -> tuple[int, str]:
    """Status and sentence of a refusal, as JSON has it."""
    status, body = answer
    values = json.loads(body)
    said = values.get("detail") or values.get("error")
    assert isinstance(said, str), body
    assert re.fullmatch("[A-Z0-9`].{15,}", said), body
    return status, said


FORM = {"Content-Type": "multipart/form-data; boundary=x"}
FILE = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%d.txt"\r\n\r\nx\r\n'


@pytest.mark.parametrize("path", ["upload", "upload?upload_id=1", "component_server", "process_recording"])
def test_nothing_can_be_uploaded(port, path):
    for count in (1, 900):
        body = b"".join(FILE % number for number in range(count)) + b"--x--\r\n"
        assert sentence(get(port, f"/gradio_api/{path}", "POST", body, FORM))[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/monitoring", "/monitoring/", "/monitoring/summary", "/monitoring/key", "/gradio_api/dev/reload",
        "/gradio_api/deep_link?session_hash=s", "/gradio_api/%64eep_link?session_hash=s", "/gradio_api/proxy=http://x",
        "/gradio_api/upload_progress?upload_id=x", "/gradio_api/stream/a/b/1/playlist-file",
    ],
)  # fmt: skip
def test_what_only_gradio_needs_is_off(port, path):
    assert sentence(get(port, path))[0] == 404


def limits(page=None):
    """The middleware around an application that answers with the body it was given."""
    received: list[bytes] = []

    async def echo(scope, receive, send):
        received.append((await receive())["body"])
        await JSONResponse({})(scope, receive, send)

    return serving.RequestLimits(echo, page or SimpleNamespace(fns={})), received


def post_parts(app, path: str, parts) -> tuple[int, bytes]:
    """Status and body of the answer to a body that arrives in parts, whatever its headers state."""
    rest, sent = iter(parts), []

    async def receive():
        part = next(rest, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_a_body_is_counted_while_it_is_read():
    """A sender may state no length, or a wrong one."""
    limited, received = limits()
    largest = b'{"data": ["%s"]}' % (b"x" * (serving.MAX_BODY - 14))
    assert len(largest) == serving.MAX_BODY
    for sent in ([largest], [largest[:1000], b"", largest[1000:]]):
        assert post_parts(limited, "/gradio_api/call/draw", sent)[0] == 200
        assert received.pop() == largest
    for sent in ([largest + b" "], [largest, b" "], [largest, b"", *[b"x" * 2**16] * 100]):
        assert sentence(post_parts(limited, "/gradio_api/call/draw", sent))[0] == 413
    assert received == []


def test_a_long_body_is_not_kept():
    limited, _ = limits()
    tracemalloc.start()
    try:
        status, _ = post_parts(limited, "/gradio_api/queue/join", (b"x" * 2**20 for _ in range(40)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert status == 413
    assert peak < 5 * 2**20


def test_what_is_too_long_is_not_kept_by_the_page(served):
    port, _, page = served
    text = "x" * 3_000_000 + "\N{GRINNING FACE}"
    body = {"data": [text, text, *slow()[2:]], "fn_index": 2, "session_hash": "long"}
    for ascii_only in (True, False):
        sent = json.dumps(body, ensure_ascii=ascii_only).encode()
        assert sentence(get(port, "/gradio_api/queue/join", "POST", sent, JSON))[0] == 413
    assert "long" not in page.state_holder


@pytest.mark.parametrize(
    "change",
    [
        {"fn_index": -1}, {"fn_index": 999}, {"fn_index": 10**30}, {"fn_index": True}, {"fn_index": None},
        {"fn_index": "2"}, {"fn_index": 2.5}, {"fn_index": [2]}, {"session_hash": 3}, {"session_hash": ""},
        {"session_hash": "x" * 65}, {"session_hash": "\ud800"}, {"session_hash": None}, {"data": None},
        {"data": "abc"},
    ],
)  # fmt: skip
def test_a_join_that_does_not_fit_is_a_sentence(served, change):
    port, _, _ = served
    body = {"data": slow(), "fn_index": 2, "session_hash": "abc"} | change
    status, _ = sentence(get(port, "/gradio_api/queue/join", "POST", json.dumps(body).encode(), JSON))
    assert status in (400, 404)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("queue/join", b"[" * 60_000), ("queue/join", b"\xff"), ("queue/join", b"[]"), ("queue/join", b""),
        ("cancel", b"{}"), ("reset", b"{}"), ("call/draw", b"{}"), ("call/nothing", b'{"data": []}'),
        ("call/draw", b'{"data": [], "session_hash": "abc"}'), ("call/v2/draw", b"{}"),
        ("call/v2/draw", b'{"color": 3}'), ("call/v2/nothing", b"{}"), ("run/draw", b'{"data": []}'),
        ("run/nothing", b'{"data": []}'), ("vibe-edit", b"{}"), ("nothing", b"{}"), ("stream/x", b"{}"),
    ],
)  # fmt: skip
def test_a_request_that_does_not_fit_is_a_sentence(port, path, body):
    assert 400 <= sentence(get(port, f"/gradio_api/{path}", "POST", body, JSON))[0] < 500


def test_every_function_of_the_page_answers_nonsense_in_a_sentence(served):
    port, _, page = served
    for index, function in page.fns.items():
        for value in ("zzz", 99, None, [], {}, {"path": "/etc/passwd"}):
            for count in {0, len(function.inputs)}:
                body = {"data": [value] * count, "fn_index": index, "session_hash": "odd", "event_data": value}
                answer = get(port, "/gradio_api/run/predict", "POST", json.dumps(body).encode(), JSON)
                assert answer[0] == 200 or sentence(answer)[0] in (400, 404), (function.name, value)


def test_results_that_nobody_reads_are_bounded(served):
    """gradio keeps what a session asked for until somebody reads it."""
    _, _, page = served
    limited, received = limits(page)
    client = TestClient(limited)
    index = next(index for index, fn in page.fns.items() if fn.api_name == "draw")
    body = {"data": [], "fn_index": index, "session_hash": "unread"}
    joins = [client.post("/gradio_api/queue/join", json=body).status_code for _ in range(serving.MAX_UNREAD + 2)]
    assert joins == [200] * serving.MAX_UNREAD + [429] * 2
    assert len(received) == serving.MAX_UNREAD
    assert client.post("/gradio_api/queue/join", json=body | {"session_hash": "another"}).status_code == 200


def test_who_reads_may_ask_again(served):
    _, _, page = served
    index = next(index for index, fn in page.fns.items() if fn.api_name == "draw")
    body = {"data": [], "fn_index": index, "session_hash": "read"}
    answers: list[int] = []

    async def joins_while_it_is_read(scope, receive, send):
        if scope["path"] == "/gradio_api/queue/data":
            inner = httpx.AsyncClient(transport=httpx.ASGITransport(limited), base_url="http://test")
            async with inner:
                for _ in range(serving.MAX_UNREAD + 2):
                    answers.append((await inner.post("/gradio_api/queue/join", json=body)).status_code)
        await JSONResponse({})(scope, receive, send)

    limited = serving.RequestLimits(joins_while_it_is_read, page)
    TestClient(limited).get("/gradio_api/queue/data", params={"session_hash": "read"})
    assert answers == [200] * (serving.MAX_UNREAD + 2)
    assert not limited._readers


def test_the_page_asks_no_other_host_and_keeps_no_history(served):
    port, _, page = served
    assert page.analytics_enabled is False
    assert page.allowed_paths == []
    config = json.loads(get(port, "/config")[1])
    assert config["analytics_enabled"] is False
    assert page.run_history is False


def test_stop_ends_the_work_within_a_step(served):
    port, cache, page = served
    network = counted(cache, "pixels", 0.1)
    visitor = Visitor(port, page, "draw", slow())
    while "Step 2" not in str(visitor.hear("process_generating")["output"]["data"]):
        pass
    visitor.stop()
    seen = network.calls
    assert rests(network)
    assert network.calls <= seen + 1
    assert seen < 40
    visitor.leave()


def test_who_goes_away_frees_the_work(served):
    port, cache, page = served
    network = counted(cache, "pixels", 0.1)
    visitor = Visitor(port, page, "draw", slow())
    visitor.hear("process_generating")
    visitor.leave()
    assert rests(network)
    assert network.calls < 40


def test_who_goes_away_while_waiting_is_not_drawn(served):
    port, cache, page = served
    network = counted(cache, "pixels", 0.1)
    busy = [Visitor(port, page, "draw", slow(20)) for _ in range(2)]
    for visitor in busy:
        visitor.hear("process_generating")
    waiting = Visitor(port, page, "draw", slow(50))
    waiting.leave()
    for visitor in busy:
        assert visitor.hear("process_completed")["success"]
        visitor.leave()
    assert rests(network)
    assert network.calls == 40


def test_a_full_queue_refuses_and_keeps_its_order(served, monkeypatch):
    port, cache, page = served
    network = counted(cache, "pixels", 0.1)
    held = threading.Event()  # until it is set no step ends, so that none of the waiting has its turn

    class Held(type(network)):
        def forward(self, *args, **kwargs):
            assert held.wait(60)
            return super().forward(*args, **kwargs)

    network.__class__ = Held
    order: list[int] = []  # of the drawing: who listens may hear of it late

    def seen(request, cache):
        order.append(request.seed)
        return app_draw(request, cache)

    app_draw = app.draw
    monkeypatch.setattr(app, "draw", seen)
    steps = [3, 3, 10, 10] + [1] * (app.QUEUE_SIZE - 2)
    visitors = [Visitor(port, page, "draw", slow(steps[seed], seed)) for seed in range(2)]
    for visitor in visitors:
        visitor.hear("process_starts")
    visitors += [Visitor(port, page, "draw", slow(steps[seed], seed)) for seed in range(2, len(steps))]
    status, said = get(port, "/gradio_api/call/draw", "POST", draw_body("x", "pixels", SIZE, 1000), JSON)
    held.set()
    for visitor in visitors:
        assert visitor.hear("process_completed")["success"]
        visitor.leave()
    assert status == 503
    assert "Queue is full" in said.decode()
    assert sorted(order) == list(range(len(steps)))
    assert all(abs(place - seed) <= 1 for place, seed in enumerate(order)), order  # two begin at a time


def test_links_fill_the_page(served):
    _, _, page = served
    request = app.check_request(dict(zip(app.FIELDS, slow())), {"pixels": (SIZE,)}, [])
    (opening,) = (fn for fn in page.fns.values() if getattr(fn.fn, "__name__", "") == "open_link")

    asked = SimpleNamespace(query_params=dict(parse_qsl(request.link()[1:])))
    linked, status, *values = opening.fn(asked)
    assert (linked, status) == ("yes", "")
    assert values[0] == "a red cat"
    assert values[3].value == SIZE
    asked.query_params = {"prompt": "<b>", "steps": "900"}
    linked, status, *values = opening.fn(asked)
    assert linked == ""
    assert "Steps: 900 came" in status


def test_what_people_write_is_escaped():
    bad = '<img src=x onerror="alert(1)">'
    request = app.Request(bad, bad, bad, SIZE, "exact", 1, 1.0, 0)
    shown = page_parts.details(request) + page_parts.said(bad)
    assert "<img" not in shown
    assert 'onerror="' not in shown
    assert "<" not in str(app.as_sentence(ValueError(bad)).message)


@pytest.mark.parametrize("error", [RuntimeError("secret"), OSError("/secret/path"), KeyError("secret")])
def test_errors_of_ours_say_nothing_of_the_inside(error, capsys):
    said = app.as_sentence(error)
    assert "secret" not in said.message
    assert said.message.endswith(".")
    assert "secret" in capsys.readouterr().err  # but the log does


def test_a_sentence_stays_as_it_is():
    """gradio's error is a ValueError whose text is a quoted repr."""
    error = gr.Error("You have used up <b>your time</b>.", title="ZeroGPU quota exceeded")
    assert app.as_sentence(error) is error
    assert error.message == "You have used up <b>your time</b>."


def test_a_lora_is_a_choice_where_there_is_one(cache):
    """Each value of a request has its control then, on both pages."""
    page = app.build(cache.models, ModelCache(cache.models, {"style": Path("style.safetensors")}))
    inputs = {fn.api_name: fn.inputs for fn in page.fns.values()}
    assert len(inputs["draw"]) == len(app.FIELDS)
    assert [control.label for control in inputs["draw"][-2:]] == ["LoRA", "LoRA weight"]
    assert [control.label for control in inputs["compare"][-2:]] == ["LoRA (second)", "LoRA weight (second)"]
    assert len(inputs["compare"]) == 15


def zero_gpu(duration):
    """ZeroGPU's decorator, but for the GPU and the process: requests and errors go to and fro pickled, and of an error
    that is not gradio's only the class arrives."""

    def decorate(task):
        def call(request):
            assert duration(request) > 0
            try:
                yield from task(pickle.loads(pickle.dumps(request)))
            except gr.Error as error:
                raise pickle.loads(pickle.dumps(error)) from None
            except Exception as error:
                raise gr.Error(type(error).__name__) from None

        return call

    return decorate


@pytest.mark.parametrize("zero", [True, False])
def test_on_zero_gpu_models_are_loaded_before_the_page_is_served(model_folder, monkeypatch, zero):
    """There CUDA can be used on the main thread alone; elsewhere a model is loaded when it is asked for."""
    loaded: list[tuple[str, bool]] = []  # the model, and whether it was on this thread
    served: list = []
    this = threading.get_ident()

    class Seen(ModelCache):
        def _load(self, model):
            loaded.append((model, threading.get_ident() == this))
            return super()._load(model)

    def launch(page):
        assert len(loaded) == (2 if zero else 0)
        served.append((page, serving.launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")[1]))

    monkeypatch.setenv("PRX_MODELS", str(model_folder))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setattr(app, "GPU", zero_gpu if zero else None)
    monkeypatch.setattr(app, "ModelCache", Seen)
    monkeypatch.setattr(app, "CAPACITY", 1)  # what was loaded has to stay, however many there are
    monkeypatch.setattr(app, "launch", launch)
    app.main()
    [(page, url)] = served
    for model in ("pixels", "latents", "pixels"):
        answer = ask(int(url.rstrip("/").rpartition(":")[2]), "draw", draw_body("a red cat", model, SIZE, 0, steps=2))
        assert answer.kind == "answered", answer.message
    page.close()
    assert sorted(loaded) == [("latents", zero), ("pixels", zero)]


def test_on_zero_gpu_a_model_that_cannot_be_loaded_is_left_out(model_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(model_folder, tmp_path / "models")
    for file in (tmp_path / "models" / "latents" / "transformer").glob("*.safetensors"):
        file.write_bytes(b"no weights")
    served: list = []
    monkeypatch.setenv("PRX_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setattr(app, "GPU", zero_gpu)
    monkeypatch.setattr(app, "launch", served.append)
    app.main()
    assert f"Left out {tmp_path / 'models' / 'latents'}: " in capsys.readouterr().out
    (choice,) = (block for block in served[0].blocks.values() if getattr(block, "label", "") == "Model")
    assert [name for name, _ in choice.choices] == ["pixels"]


class Failing(PRXTransformer2DModel):
    """A network that raises `error` in every call."""

    error: Exception

    def forward(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize("zero", [True, False])
def test_an_error_of_a_worker_is_the_same_sentence(cache, monkeypatch, zero):
    network = tiny.transformer(cls=Failing, **tiny.PIXEL_SETTINGS)
    cache.get("pixels")[0].register_modules(transformer=network)
    monkeypatch.setattr(app, "GPU", zero_gpu if zero else None)
    page = app.build(cache.models, cache)
    drawing = next(fn.fn for fn in page.fns.values() if fn.api_name == "draw")
    for error in (torch.OutOfMemoryError("secret"), ValueError("6 and 5 do\nnot fit"), RuntimeError("secret")):
        network.error = error
        with pytest.raises(gr.Error) as raised:
            list(drawing(*slow()))
        assert raised.value.message == app.as_sentence(error).message
        assert raised.value.title == "Not drawn"


def test_without_a_model_the_page_says_how_to_get_one():
    page = app.build({}, ModelCache({}, {}))
    (text,) = (block for block in page.blocks.values() if isinstance(block, gr.Markdown))
    assert "make quickstart" in text.value


def test_time_on_a_gpu_grows_with_the_work():
    small = app.Request("x", "", "m", "512 x 512", "exact", 28, 1.0, 0)
    assert 15 < app.seconds_needed(small) < app.seconds_needed(replace(small, guidance_scale=2.0))
    assert app.seconds_needed(replace(small, steps=50, images=4, size="2048 x 2048")) == 120


def test_the_spaces_files_fit_each_other():
    """The front matter names what is there; gradio's version is one that the demo extra allows."""
    front = dict(re.findall(r"^(\w+): (.+)$", (SPACE / "README.md").read_text().split("---")[1], re.MULTILINE))
    assert front["sdk"] == "gradio"
    assert (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    lines = [line.partition(" #")[0].strip() for line in (SPACE / "requirements.txt").read_text().splitlines()]
    requirements = {Requirement(line).name: Requirement(line) for line in lines if line and not line.startswith("#")}
    assert requirements["diffusers-prx"].specifier.contains(diffusers_prx.__version__)
    (declared,) = re.findall(r'"(gradio>=.*?)"', (ROOT / "pyproject.toml").read_text())
    assert Requirement(declared).specifier.contains(front["sdk_version"])


def test_the_load_script_sees_what_is_unclear(port):
    """A right request is answered: `is_clear` has to call that unclear, and an inner error too."""
    answer = ask(port, "draw", draw_body("a red cat", "pixels", SIZE, 0, steps=1))
    assert not is_clear(answer)
    answer.kind, answer.message = "failed", "Traceback (most recent call last)"
    assert not is_clear(answer)
    answer.message = "Steps: 900 came; a whole number is accepted."
    assert is_clear(answer)


def test_a_short_load(served, capsys):
    port, _, _ = served
    figures = load(port, "pixels", SIZE, clients=4, seconds=1.0)
    assert figures["failed"] == 0
    assert figures["answered"] >= 4
    assert figures["overtaken"] == 0
    main(["--port", str(port), "--model", "pixels", "--clients", "2", "--seconds", "0.2", "--malformed", "2"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == 0


@pytest.mark.slow
def test_thirty_two_people_for_three_minutes(served):
    port, _, _ = served
    begin = time.monotonic()
    figures = load(port, "pixels", SIZE, clients=32, seconds=180.0, pid=os.getpid())
    assert time.monotonic() - begin > 180
    assert figures["failed"] == 0, figures
    assert figures["answered"] > 32
    assert figures["overtaken"] == 0
    assert figures["memory_mb_at_the_end"] < figures["memory_mb_after_a_quarter"] + 100, figures
    assert send_malformed(port, "pixels", SIZE, 200)["unclear"] == []
