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
import handlers
import page_parts
import serving
import settings
import showcase
from model_cache import ModelCache, find_models

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "spaces" / "prx"
SIZE = "32 x 32"
SMALL = "prx-scenes-small"
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


def read_url(port: int, url: str) -> Image.Image:
    """Return the picture that an answer links to."""
    image = Image.open(io.BytesIO(get(port, url.partition(str(port))[2])[1]))
    image.load()
    return image


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def form(*files: bytes, name: str = "files") -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="p.png"\r\n\r\n' % name.encode()
    return b"".join(head + file + b"\r\n" for file in files) + b"--x--\r\n"


def upload_png(port: int, image: Image.Image) -> str:
    """Upload a picture; return its path on the server."""
    status, body = get(port, "/gradio_api/upload?upload_id=x", "POST", form(encoded(image)), FORM)
    assert status == 200, body
    [path] = json.loads(body)
    return path


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
    drawn = read_url(port, pictures[0]["image"]["url"])
    assert diffusers_prx.read_settings(drawn)["seed"] == 5
    pipeline, _ = cache.get("pixels")
    generators = tiny.generators(5, 6)
    expected = pipeline(
        "a red cat", num_inference_steps=3, guidance_scale=3.0, num_images_per_prompt=2, generator=generators
    )
    assert np.array_equal(np.asarray(drawn), np.asarray(expected.images[0]))


def test_the_edit_endpoint_equals_the_pipeline_call(served):
    """Image to image without a painted layer, inpainting with one."""
    port, cache, _ = served
    before = Image.effect_noise((64, 64), 100).convert("RGB")
    layer = Image.new("RGBA", (64, 64))
    layer.paste("red", (0, 0, 32, 64))
    files = [{"path": upload_png(port, image), "meta": {"_type": "gradio.FileData"}} for image in (before, layer)]
    answers = []
    for layers in ([], [files[1]]):
        value = {"background": files[0], "layers": layers, "composite": None}
        data = [value, 0.6, "a red cat", "", "pixels", SIZE, "exact", 3, 3.0, 5, 1]
        answers.append(call_endpoint(port, "edit", json.dumps({"data": data}).encode()))
    assert [answer.kind for answer in answers] == ["answered", "answered"], answers
    whole, part = (read_url(port, answer.data[2]["value"][0]["image"]["url"]) for answer in answers)
    small = before.resize((32, 32), Image.Resampling.BOX)
    mask = layer.getchannel("A").resize((32, 32), Image.Resampling.BOX)
    call = {"prompt": "a red cat", "image": small, "num_inference_steps": 3, "guidance_scale": 3.0}
    pipeline, _ = cache.get("pixels")
    edit = diffusers_prx.PRXPixelImg2ImgPipeline.from_pipe(pipeline)
    expected = edit(**call, strength=0.6, generator=tiny.generators(5)).images[0]
    assert np.array_equal(np.asarray(whole), np.asarray(expected))
    inpaint = diffusers_prx.PRXPixelInpaintPipeline.from_pipe(pipeline)
    expected = inpaint(**call, mask_image=mask, generator=tiny.generators(5)).images[0]
    assert np.array_equal(np.asarray(part), np.asarray(expected))
    assert np.array_equal(np.asarray(part)[:, 16:], np.asarray(small)[:, 16:])


@pytest.mark.parametrize(
    "picture",
    [
        None, {}, "x", {"background": None}, {"background": {"path": "/etc/passwd"}},
        {"background": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}},
        {"background": {"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}}},
        {"background": {"path": "{models}/gray.png", "meta": {"_type": "gradio.FileData"}}},
        {"background": {"path": "{models}/gray.png"}},
    ],
)  # fmt: skip
def test_an_edit_reads_uploaded_pictures_only(port, model_folder, picture):
    GRAY.save(model_folder / "gray.png")
    data = [picture, 0.6, "a red cat", "", "pixels", SIZE, "exact", 3, 3.0, 5, 1]
    body = json.dumps({"data": data}).replace("{models}", str(model_folder))
    answer = call_endpoint(port, "edit", body.encode())
    assert answer.kind == "failed"
    assert "root:" not in answer.message


def test_the_compare_endpoint_draws_both_sides(port):
    data = ["a red cat", "", 3, "pixels", "exact", 3, 3.0, "latents", "fast", 4, 2.0]
    answer = call_endpoint(port, "compare", json.dumps({"data": data}).encode())
    assert answer.kind == "answered", answer.message
    status, _, slider, table = answer.data
    assert "times as fast" in status
    left, right = (read_url(port, picture["url"]) for picture in slider["value"])
    assert left.size == right.size == (32, 32)
    assert left.tobytes() != right.tobytes()
    assert "Best, 3 steps</td><td>Fast, 4 steps" in table
    assert "pixels</td><td>latents" in table
    assert "<td>3</td><td>3</td>" in table  # the seed
    assert table.count(" seconds</td>") == 2


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
GRAY = Image.new("L", (8, 8))


@pytest.mark.parametrize("path", ["component_server", "process_recording", "upload/x"])
def test_other_routes_for_files_are_closed(port, path):
    assert refusal_status(get(port, f"/gradio_api/{path}", "POST", form(encoded(GRAY)), FORM)) == 404


@pytest.mark.parametrize(
    "body",
    [
        form(), form(b""), form(b"text"), form(b"<svg/>"), form(encoded(GRAY)[:-30]), form(encoded(GRAY, "GIF")),
        form(encoded(GRAY, "TIFF")), form(encoded(GRAY), encoded(GRAY)), form(encoded(GRAY), name="file"),
        form(encoded(Image.new("1", (5000, 4000)))), b"x", b"",
        form(encoded(GRAY)).replace(b"--x--", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--'),
    ],
)  # fmt: skip
def test_an_upload_that_is_not_one_picture_is_refused(port, body):
    assert refusal_status(get(port, "/gradio_api/upload", "POST", body, FORM)) == 400
    assert refusal_status(get(port, "/gradio_api/upload", "POST", body, JSON)) == 400


def test_size_and_number_of_uploads_are_limited(monkeypatch):
    limited, received = limited_app()
    monkeypatch.setattr(serving, "MAX_UPLOADED", 2 * len(form(encoded(GRAY))))
    client = TestClient(limited)
    assert client.post("/gradio_api/upload", content=b"x" * (serving.MAX_UPLOAD + 1), headers=FORM).status_code == 413
    assert client.post("/gradio_api/upload", content=form(b"text"), headers=FORM).status_code == 400
    answers = [client.post("/gradio_api/upload", content=form(encoded(GRAY)), headers=FORM) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert received == [form(encoded(GRAY))] * 2
    monkeypatch.setattr(serving, "UPLOAD_SECONDS", -1.0)  # an hour later
    assert client.post("/gradio_api/upload", content=form(encoded(GRAY)), headers=FORM).status_code == 200


def test_links_to_the_page_show_what_it_draws(model_folder, tmp_path, monkeypatch):
    """Open Graph: title and sentence of the card, and a picture of its examples."""
    shutil.copytree(model_folder / "pixels", tmp_path / "shapes")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "shapes" / "red.png")
    (tmp_path / "shapes" / "README.md").write_text(
        "---\ndemo:\n  title: Red <b>\n  description: It draws red.\nwidget:\n"
        "- {text: red, output: {url: red.png}}\n- {text: no, output: {url: ../../x.png}}\n- {text: none}\n---\n"
    )
    monkeypatch.setenv("PRX_MODELS", str(tmp_path))
    monkeypatch.setenv("SPACE_HOST", "me-prx.hf.space")
    models = find_models()
    assert showcase.read_showcase(models["shapes"]).examples == (("red", str(tmp_path / "shapes" / "red.png")),)
    page = app.build(models, ModelCache(models, {}))
    _, url, _ = serving.launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    port = int(url.rstrip("/").rpartition(":")[2])
    html = get(port, "/")[1].decode()
    picture = get(port, "/share.png")
    page.close()
    metas = dict(re.findall(r'<meta\s+property="og:(\w+)"\s+content="([^"]*)"', html))
    assert (metas["title"], metas["description"]) == ("Red &lt;b&gt;", "It draws red.")
    assert metas["image"] == "https://me-prx.hf.space/share.png"
    assert Image.open(io.BytesIO(picture[1])).getpixel((170, 150)) == (255, 0, 0)
    assert "<b>" not in page_parts.header(showcase.read_showcase(models["shapes"]))


def test_a_model_without_a_card_has_no_examples(cache, capsys):
    shown = showcase.read_showcase(cache.models["pixels"])
    assert shown.examples == ()
    assert "pixels" in shown.title
    assert "pixels" in capsys.readouterr().out


def test_a_dropped_picture_restores_its_settings(served, tmp_path, monkeypatch):
    _, cache, page = served
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (restore,) = (fn.fn for fn in page.fns.values() if getattr(fn.fn, "__name__", "") == "restore")
    pipeline, _ = cache.get("pixels")
    drawn = pipeline("a dog", num_inference_steps=2, guidance_scale=2.0, generator=tiny.generators(7)).images[0]
    diffusers_prx.save_with_settings(drawn, tmp_path / "dog.png")
    status, prompt, _, model, _, preset, steps, guidance, seed, _, keep = restore(str(tmp_path / "dog.png"))
    assert "your picture" in status
    assert (prompt, model, preset.value, steps, guidance, seed, keep) == ("a dog", "pixels", "exact", 2, 2.0, 7, True)
    GRAY.save(tmp_path / "gray.png")
    GRAY.save(tmp_path.parent / "gray.png")
    for file in ("gray.png", "missing.png", "../gray.png"):
        status, *values = restore(str(tmp_path / file))
        assert "could not be restored" in status
        assert len(values) == 10


def test_the_enhance_button_is_there_with_a_language_model_only(cache):
    def enhancer(prompts):
        return [f"{prompt}, in detail" * 90 for prompt in prompts]

    for given in (None, enhancer):
        page = app.build(cache.models, cache, given)
        (button,) = (block for block in page.blocks.values() if getattr(block, "value", "") == "Enhance the prompt")
        assert button.visible == (given is not None)
    (enhance,) = (fn.fn for fn in page.fns.values() if getattr(fn.fn, "__name__", "") == "enhance")
    caption, status = enhance("a cat")
    assert caption.startswith("a cat, in detail")
    assert len(caption) == settings.MAX_PROMPT
    assert "cut" in status
    with pytest.raises(gr.Error, match="prompt"):
        enhance(" ")


def test_errors_of_the_language_model_are_a_sentence(cache, capsys):
    """Its window has 64 tokens, fewer than the template."""
    enhancer = diffusers_prx.PromptEnhancer(tiny.language_model(), tiny.tokenizer(max_length=64))
    page = app.build(cache.models, cache, enhancer)
    (enhance,) = (fn.fn for fn in page.fns.values() if getattr(fn.fn, "__name__", "") == "enhance")
    with pytest.raises(gr.Error, match=r"^'Rewriting the prompt failed.*log"):
        enhance("a cat")
    assert "IndexError" in capsys.readouterr().err


def test_the_comparison_opens_on_a_drawn_pair(cache, monkeypatch):
    """Of the model and its student, if there is one; else on a sentence."""
    monkeypatch.setenv("PRX_MODELS", str(ROOT / "model_cards"))
    models = find_models()
    for known in (models, cache.models):
        page = app.build(known, ModelCache(known, {}))
        (slider,) = (block for block in page.blocks.values() if isinstance(block, gr.ImageSlider))
        hint = " ".join(str(block.value) for block in page.blocks.values() if isinstance(block, gr.HTML))
        if known is models:
            folders = [Path(file).parent.parent.name for file in showcase.read_showcase(models[SMALL]).compared[1:]]
            assert folders == [SMALL, "prx-scenes-turbo"]
            assert slider.visible
            assert "Best, 28 steps. Right: Fast, 4 steps" in hint
        else:
            assert not slider.visible
            assert "right Fast, 14 steps" in hint


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

    def recorded_draw(request, cache, edit):
        order.append(request.seed)
        return original_draw(request, cache, edit)

    original_draw = handlers.draw
    monkeypatch.setattr(handlers, "draw", recorded_draw)
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
    request = settings.parse_request(dict(zip(handlers.REQUEST_FIELDS, draw_data())), {"pixels": (SIZE,)}, [])
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
    request = settings.Request(bad, bad, bad, SIZE, "exact", 1, 1.0, 0)
    html = page_parts.settings_table(request) + page_parts.status_line(bad)
    assert "<img" not in html
    assert 'onerror="' not in html
    assert "<" not in str(handlers.to_user_error(ValueError(bad)).message)


@pytest.mark.parametrize("error", [RuntimeError("secret"), OSError("/secret/path"), KeyError("secret")])
def test_internal_errors_are_logged_and_not_shown(error, capsys):
    shown = handlers.to_user_error(error)
    assert "secret" not in shown.message
    assert shown.message.endswith(".")
    assert "secret" in capsys.readouterr().err


def test_errors_of_gradio_stay_unchanged():
    """gr.Error is a ValueError whose text is a quoted repr."""
    error = gr.Error("You have used up <b>your time</b>.", title="ZeroGPU quota exceeded")
    assert handlers.to_user_error(error) is error
    assert error.message == "You have used up <b>your time</b>."


def test_loras_have_controls_on_both_tabs(cache):
    page = app.build(cache.models, ModelCache(cache.models, {"style": Path("style.safetensors")}))
    inputs = {fn.api_name: fn.inputs for fn in page.fns.values()}
    assert len(inputs["draw"]) == len(handlers.REQUEST_FIELDS)
    assert [control.label for control in inputs["draw"][-2:]] == ["LoRA", "LoRA weight"]
    assert [control.label for control in inputs["compare"][-2:]] == ["LoRA (right)", "LoRA weight (right)"]
    assert len(inputs["compare"]) == 15


def zero_gpu(duration):
    """Imitate ZeroGPU's decorator in this process: requests and errors are pickled, and of errors other than gr.Error
    only the class name arrives."""

    def decorate(task):
        def call(*arguments):
            assert duration(*arguments) > 0
            try:
                yield from task(*pickle.loads(pickle.dumps(arguments)))
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
        assert raised.value.message == handlers.to_user_error(error).message
        assert raised.value.title == "Not drawn"


def test_a_page_without_models_explains_how_to_get_one():
    page = app.build({}, ModelCache({}, {}))
    (text,) = (block for block in page.blocks.values() if isinstance(block, gr.Markdown))
    assert "make quickstart" in text.value


def test_requested_gpu_time_grows_with_the_work():
    small = settings.Request("x", "", "m", "512 x 512", "exact", 28, 1.0, 0)
    assert 15 < handlers.seconds_needed(small) < handlers.seconds_needed(replace(small, guidance_scale=2.0))
    assert handlers.seconds_needed(replace(small, steps=50, images=4, size="2048 x 2048")) == 120


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
