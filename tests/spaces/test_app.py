"""The served page over HTTP: pictures, error messages, file access, limits, and the end of canceled work."""

import asyncio
import http.client
import io
import json
import pickle
import re
import shutil
import sys
import threading
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
from space_tools import becomes_idle, call_endpoint, count_calls, draw_body

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")

import gradio as gr

import app
import page_parts
import serving
from model_cache import ModelCache

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "spaces" / "prx"
SIZE = "32 x 32"
JSON = {"Content-Type": "application/json"}


def test_the_readme_snippet_draws(port):
    code = re.search(r"```python\n(.*?)```", (SPACE / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("7860", str(port)).replace('"quickstart"', '"pixels"')
    code = code.replace("client.predict", "answer = client.predict")
    names: dict = {}
    exec(code, names)
    status, _, gallery, settings, *_ = names["answer"]
    assert "Done" in status
    assert "32 x 32" in settings
    [picture] = gallery["value"] if isinstance(gallery, dict) else gallery
    with Image.open(picture["image"]) as image:
        assert image.size == (32, 32)


def get(port: int, path: str, method: str = "GET", body: bytes = b"", headers: dict | None = None):
    """Return status and body of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    status, body = response.status, response.read()
    connection.close()
    return status, body


class Visitor:
    """A client of gradio's queue, like a browser: it joins, listens, leaves or presses Stop."""

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

    def wait_for(self, kind: str) -> dict:
        """Read the stream until a message of this kind."""
        for line in self.stream:
            if line.startswith(b"data: "):
                message = json.loads(line[6:])
                if message["msg"] == kind:
                    return message
        raise AssertionError(f"the stream ended without {kind}")

    def stop(self) -> None:
        body = {"session_hash": self.session, "fn_index": self.fn_index, "event_id": self.event_id}
        assert self.post("cancel", body)[0] == 200

    def leave(self) -> None:
        self.stream.close()
        self.connection.close()


def draw_data(steps: int = 50, seed: int = 0) -> list:
    return ["a red cat", "", "pixels", SIZE, "exact", steps, 3.0, seed, 1]


def test_the_draw_endpoint_equals_the_pipeline_call(served):
    port, cache, _ = served
    data = ["a red cat", "", "pixels", SIZE, "exact", 3, 3.0, 5, 2]
    answer = call_endpoint(port, "draw", json.dumps({"data": data}).encode())
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


def test_the_compare_endpoint_draws_both_sides(port):
    data = ["a red cat", "", 3, "pixels", "exact", 3, 3.0, "latents", "fast", 4, 2.0]
    answer = call_endpoint(port, "compare", json.dumps({"data": data}).encode())
    assert answer.kind == "answered", answer.message
    status, first, first_settings, second, second_settings = answer.data
    assert "Done." in status
    assert "<img" in first
    assert "<img" in second
    assert first != second
    assert "exact, 3 steps" in first_settings
    assert "fast, 4 steps" in second_settings
    assert "seed=3" in first_settings
    assert "seed=3" in second_settings


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../etc/passwd", "/proc/self/environ", "{space}/app.py", "{models}/pixels/model_index.json"],
)
def test_other_files_cannot_be_read(port, model_folder, path):
    path = path.format(space=SPACE, models=model_folder)
    for prefix in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/gradio_api/stream/"):
        for spelled in (path, path.replace("/", "%2F"), path.replace("/", "%252F")):
            status, body = get(port, prefix + spelled)
            assert status >= 400 or b"<html" in body[:200].lower(), (prefix, spelled)
            assert b"root:" not in body
            assert b"_class_name" not in body


def refusal_status(response: tuple[int, bytes]) -> int:
    """Return the status of a refusal, after checking that its JSON body holds a sentence."""
    status, body = response
    values = json.loads(body)
    message = values.get("detail") or values.get("error")
    assert isinstance(message, str), body
    assert re.fullmatch("[A-Z0-9`].{15,}", message), body
    return status


FORM = {"Content-Type": "multipart/form-data; boundary=x"}
FILE = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%d.txt"\r\n\r\nx\r\n'


@pytest.mark.parametrize("path", ["upload", "upload?upload_id=1", "component_server", "process_recording"])
def test_uploads_are_refused(port, path):
    for count in (1, 900):
        body = b"".join(FILE % number for number in range(count)) + b"--x--\r\n"
        assert refusal_status(get(port, f"/gradio_api/{path}", "POST", body, FORM)) == 404


@pytest.mark.parametrize(
    "path",
    [
        "/monitoring", "/monitoring/", "/monitoring/summary", "/monitoring/key", "/gradio_api/dev/reload",
        "/gradio_api/deep_link?session_hash=s", "/gradio_api/%64eep_link?session_hash=s", "/gradio_api/proxy=http://x",
        "/gradio_api/upload_progress?upload_id=x", "/gradio_api/stream/a/b/1/playlist-file",
    ],
)  # fmt: skip
def test_unneeded_routes_are_blocked(port, path):
    assert refusal_status(get(port, path)) == 404


def limited_app(page=None):
    """Return the middleware around an application that records bodies, and the list of these."""
    received: list[bytes] = []

    async def echo(scope, receive, send):
        received.append((await receive())["body"])
        await JSONResponse({})(scope, receive, send)

    return serving.RequestLimits(echo, page or SimpleNamespace(fns={})), received


def post_parts(app, path: str, parts) -> tuple[int, bytes]:
    """Send a body in parts, without a Content-Length; return status and body of the response."""
    rest, sent = iter(parts), []

    async def receive():
        part = next(rest, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_the_size_of_a_body_is_counted_not_trusted():
    limited, received = limited_app()
    largest = b'{"data": ["%s"]}' % (b"x" * (serving.MAX_BODY - 14))
    assert len(largest) == serving.MAX_BODY
    for sent in ([largest], [largest[:1000], b"", largest[1000:]]):
        assert post_parts(limited, "/gradio_api/call/draw", sent)[0] == 200
        assert received.pop() == largest
    for sent in ([largest + b" "], [largest, b" "], [largest, b"", *[b"x" * 2**16] * 100]):
        assert refusal_status(post_parts(limited, "/gradio_api/call/draw", sent)) == 413
    assert received == []


def test_a_large_body_is_dropped_while_it_is_read():
    limited, _ = limited_app()
    tracemalloc.start()
    try:
        status, _ = post_parts(limited, "/gradio_api/queue/join", (b"x" * 2**20 for _ in range(40)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert status == 413
    assert peak < 5 * 2**20


def test_gradio_keeps_nothing_of_a_large_body(served):
    port, _, page = served
    text = "x" * 3_000_000 + "\N{GRINNING FACE}"
    body = {"data": [text, text, *draw_data()[2:]], "fn_index": 2, "session_hash": "long"}
    for ascii_only in (True, False):
        sent = json.dumps(body, ensure_ascii=ascii_only).encode()
        assert refusal_status(get(port, "/gradio_api/queue/join", "POST", sent, JSON)) == 413
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
def test_an_invalid_join_is_refused(served, change):
    port, _, _ = served
    body = {"data": draw_data(), "fn_index": 2, "session_hash": "abc"} | change
    response = get(port, "/gradio_api/queue/join", "POST", json.dumps(body).encode(), JSON)
    assert refusal_status(response) in (400, 404)


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
def test_an_invalid_request_is_refused(port, path, body):
    assert 400 <= refusal_status(get(port, f"/gradio_api/{path}", "POST", body, JSON)) < 500


def test_every_function_refuses_invalid_values(served):
    port, _, page = served
    for index, function in page.fns.items():
        for value in ("zzz", 99, None, [], {}, {"path": "/etc/passwd"}):
            for count in {0, len(function.inputs)}:
                body = {"data": [value] * count, "fn_index": index, "session_hash": "odd", "event_data": value}
                response = get(port, "/gradio_api/run/predict", "POST", json.dumps(body).encode(), JSON)
                assert response[0] == 200 or refusal_status(response) in (400, 404), (function.name, value)


def test_unread_results_are_bounded(served):
    """gradio keeps the results of a session until they are read."""
    _, _, page = served
    limited, received = limited_app(page)
    client = TestClient(limited)
    index = next(index for index, fn in page.fns.items() if fn.api_name == "draw")
    body = {"data": [], "fn_index": index, "session_hash": "unread"}
    joins = [client.post("/gradio_api/queue/join", json=body).status_code for _ in range(serving.MAX_UNREAD + 2)]
    assert joins == [200] * serving.MAX_UNREAD + [429] * 2
    assert len(received) == serving.MAX_UNREAD
    assert client.post("/gradio_api/queue/join", json=body | {"session_hash": "another"}).status_code == 200


def test_a_session_with_a_reader_is_not_limited(served):
    _, _, page = served
    index = next(index for index, fn in page.fns.items() if fn.api_name == "draw")
    body = {"data": [], "fn_index": index, "session_hash": "read"}
    statuses: list[int] = []

    async def join_while_reading(scope, receive, send):
        if scope["path"] == "/gradio_api/queue/data":
            inner = httpx.AsyncClient(transport=httpx.ASGITransport(limited), base_url="http://test")
            async with inner:
                for _ in range(serving.MAX_UNREAD + 2):
                    statuses.append((await inner.post("/gradio_api/queue/join", json=body)).status_code)
        await JSONResponse({})(scope, receive, send)

    limited = serving.RequestLimits(join_while_reading, page)
    TestClient(limited).get("/gradio_api/queue/data", params={"session_hash": "read"})
    assert statuses == [200] * (serving.MAX_UNREAD + 2)
    assert not limited._readers


def test_analytics_and_history_are_off(served):
    port, _, page = served
    assert page.analytics_enabled is False
    assert page.allowed_paths == []
    config = json.loads(get(port, "/config")[1])
    assert config["analytics_enabled"] is False
    assert page.run_history is False


def test_stop_ends_the_work_within_one_step(served):
    port, cache, page = served
    transformer = count_calls(cache, "pixels", 0.1)
    visitor = Visitor(port, page, "draw", draw_data())
    while "Step 2" not in str(visitor.wait_for("process_generating")["output"]["data"]):
        pass
    visitor.stop()
    calls_at_stop = transformer.calls
    assert becomes_idle(transformer)
    assert transformer.calls <= calls_at_stop + 1
    assert calls_at_stop < 40
    visitor.leave()


def test_a_disconnect_ends_the_work(served):
    port, cache, page = served
    transformer = count_calls(cache, "pixels", 0.1)
    visitor = Visitor(port, page, "draw", draw_data())
    visitor.wait_for("process_generating")
    visitor.leave()
    assert becomes_idle(transformer)
    assert transformer.calls < 40


def test_a_disconnect_while_waiting_removes_the_request(served):
    port, cache, page = served
    transformer = count_calls(cache, "pixels", 0.1)
    busy = [Visitor(port, page, "draw", draw_data(20)) for _ in range(2)]
    for visitor in busy:
        visitor.wait_for("process_generating")
    waiting = Visitor(port, page, "draw", draw_data(50))
    waiting.leave()
    for visitor in busy:
        assert visitor.wait_for("process_completed")["success"]
        visitor.leave()
    assert becomes_idle(transformer)
    assert transformer.calls == 40


def test_a_full_queue_refuses_and_keeps_its_order(served, monkeypatch):
    port, cache, page = served
    transformer = count_calls(cache, "pixels", 0.1)
    released = threading.Event()  # no step ends before it is set, so that the queue fills

    class Blocked(type(transformer)):
        def forward(self, *args, **kwargs):
            assert released.wait(60)
            return super().forward(*args, **kwargs)

    transformer.__class__ = Blocked
    order: list[int] = []  # seeds, in the order of drawing; clients may be notified late

    def recorded_draw(request, cache):
        order.append(request.seed)
        return original_draw(request, cache)

    original_draw = app.draw
    monkeypatch.setattr(app, "draw", recorded_draw)
    steps = [3, 3, 10, 10] + [1] * (app.QUEUE_SIZE - 2)
    visitors = [Visitor(port, page, "draw", draw_data(steps[seed], seed)) for seed in range(2)]
    for visitor in visitors:
        visitor.wait_for("process_starts")
    visitors += [Visitor(port, page, "draw", draw_data(steps[seed], seed)) for seed in range(2, len(steps))]
    status, message = get(port, "/gradio_api/call/draw", "POST", draw_body("x", "pixels", 1000), JSON)
    released.set()
    for visitor in visitors:
        assert visitor.wait_for("process_completed")["success"]
        visitor.leave()
    assert status == 503
    assert "Queue is full" in message.decode()
    assert sorted(order) == list(range(len(steps)))
    assert all(abs(place - seed) <= 1 for place, seed in enumerate(order)), order  # two start at a time


def test_links_fill_the_page(served):
    _, _, page = served
    request = app.parse_request(dict(zip(app.REQUEST_FIELDS, draw_data())), {"pixels": (SIZE,)}, [])
    (opening,) = (fn for fn in page.fns.values() if getattr(fn.fn, "__name__", "") == "open_link")

    opened = SimpleNamespace(query_params=dict(parse_qsl(request.link()[1:])))
    linked, status, *values = opening.fn(opened)
    assert (linked, status) == ("yes", "")
    assert values[0] == "a red cat"
    assert values[3].value == SIZE
    opened.query_params = {"prompt": "<b>", "steps": "900"}
    linked, status, *values = opening.fn(opened)
    assert linked == ""
    assert "Steps is 900" in status


def test_user_text_is_escaped():
    bad = '<img src=x onerror="alert(1)">'
    request = app.Request(bad, bad, bad, SIZE, "exact", 1, 1.0, 0)
    html = page_parts.settings_table(request) + page_parts.status_line(bad)
    assert "<img" not in html
    assert 'onerror="' not in html
    assert "<" not in str(app.to_user_error(ValueError(bad)).message)


@pytest.mark.parametrize("error", [RuntimeError("secret"), OSError("/secret/path"), KeyError("secret")])
def test_internal_errors_are_logged_and_not_shown(error, capsys):
    shown = app.to_user_error(error)
    assert "secret" not in shown.message
    assert shown.message.endswith(".")
    assert "secret" in capsys.readouterr().err


def test_errors_of_gradio_stay_unchanged():
    """gr.Error is a ValueError whose text is a quoted repr."""
    error = gr.Error("You have used up <b>your time</b>.", title="ZeroGPU quota exceeded")
    assert app.to_user_error(error) is error
    assert error.message == "You have used up <b>your time</b>."


def test_loras_have_controls_on_both_tabs(cache):
    page = app.build(cache.models, ModelCache(cache.models, {"style": Path("style.safetensors")}))
    inputs = {fn.api_name: fn.inputs for fn in page.fns.values()}
    assert len(inputs["draw"]) == len(app.REQUEST_FIELDS)
    assert [control.label for control in inputs["draw"][-2:]] == ["LoRA", "LoRA weight"]
    assert [control.label for control in inputs["compare"][-2:]] == ["LoRA (second)", "LoRA weight (second)"]
    assert len(inputs["compare"]) == 15


def zero_gpu(duration):
    """Imitate ZeroGPU's decorator in this process: requests and errors are pickled, and of errors other than gr.Error
    only the class name arrives."""

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
def test_zero_gpu_loads_models_before_the_page_is_served(model_folder, monkeypatch, zero):
    """ZeroGPU has CUDA on the main thread only; elsewhere models are loaded on first use."""
    loaded: list[tuple[str, bool]] = []  # model, and True if on this thread
    served: list = []
    main_thread = threading.get_ident()

    class RecordingCache(ModelCache):
        def _load(self, model):
            loaded.append((model, threading.get_ident() == main_thread))
            return super()._load(model)

    def launch(page):
        assert len(loaded) == (2 if zero else 0)
        served.append((page, serving.launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")[1]))

    monkeypatch.setenv("PRX_MODELS", str(model_folder))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setattr(app, "GPU", zero_gpu if zero else None)
    monkeypatch.setattr(app, "ModelCache", RecordingCache)
    monkeypatch.setattr(app, "CAPACITY", 1)  # ZeroGPU keeps all models all the same
    monkeypatch.setattr(app, "launch", launch)
    app.main()
    [(page, url)] = served
    port = int(url.rstrip("/").rpartition(":")[2])
    for model in ("pixels", "latents", "pixels"):
        answer = call_endpoint(port, "draw", draw_body("a red cat", model, 0, steps=2))
        assert answer.kind == "answered", answer.message
    page.close()
    assert sorted(loaded) == [("latents", zero), ("pixels", zero)]


def test_zero_gpu_skips_a_model_that_cannot_be_loaded(model_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(model_folder, tmp_path / "models")
    for file in (tmp_path / "models" / "latents" / "transformer").glob("*.safetensors"):
        file.write_bytes(b"no weights")
    served: list = []
    monkeypatch.setenv("PRX_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setattr(app, "GPU", zero_gpu)
    monkeypatch.setattr(app, "launch", served.append)
    app.main()
    assert f"Skipped {tmp_path / 'models' / 'latents'}: " in capsys.readouterr().out
    (dropdown,) = (block for block in served[0].blocks.values() if getattr(block, "label", "") == "Model")
    assert [name for name, _ in dropdown.choices] == ["pixels"]


class Failing(PRXTransformer2DModel):
    """A transformer that raises `error` in every call."""

    error: Exception

    def forward(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize("zero", [True, False])
def test_worker_errors_arrive_as_the_same_sentence(cache, monkeypatch, zero):
    transformer = tiny.transformer(cls=Failing, **tiny.PIXEL_SETTINGS)
    cache.get("pixels")[0].register_modules(transformer=transformer)
    monkeypatch.setattr(app, "GPU", zero_gpu if zero else None)
    page = app.build(cache.models, cache)
    drawing = next(fn.fn for fn in page.fns.values() if fn.api_name == "draw")
    for error in (torch.OutOfMemoryError("secret"), ValueError("6 and 5 do\nnot fit"), RuntimeError("secret")):
        transformer.error = error
        with pytest.raises(gr.Error) as raised:
            list(drawing(*draw_data()))
        assert raised.value.message == app.to_user_error(error).message
        assert raised.value.title == "Not drawn"


def test_a_page_without_models_explains_how_to_get_one():
    page = app.build({}, ModelCache({}, {}))
    (text,) = (block for block in page.blocks.values() if isinstance(block, gr.Markdown))
    assert "make quickstart" in text.value


def test_requested_gpu_time_grows_with_the_work():
    small = app.Request("x", "", "m", "512 x 512", "exact", 28, 1.0, 0)
    assert 15 < app.seconds_needed(small) < app.seconds_needed(replace(small, guidance_scale=2.0))
    assert app.seconds_needed(replace(small, steps=50, images=4, size="2048 x 2048")) == 120


def test_front_matter_and_requirements_agree_with_the_package():
    front = dict(re.findall(r"^(\w+): (.+)$", (SPACE / "README.md").read_text().split("---")[1], re.MULTILINE))
    assert front["sdk"] == "gradio"
    assert (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    lines = [line.partition(" #")[0].strip() for line in (SPACE / "requirements.txt").read_text().splitlines()]
    requirements = {Requirement(line).name: Requirement(line) for line in lines if line and not line.startswith("#")}
    assert requirements["diffusers-prx"].specifier.contains(diffusers_prx.__version__)
    (declared,) = re.findall(r'"(gradio>=.*?)"', (ROOT / "pyproject.toml").read_text())
    assert Requirement(declared).specifier.contains(front["sdk_version"])
