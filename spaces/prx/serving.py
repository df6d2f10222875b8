"""Serving: limits on untrusted requests, and a sentence as the answer to each invalid one."""

import json
from collections import Counter, OrderedDict
from traceback import print_exception
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from gradio.route_utils import FnIndexInferError
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from page_parts import CSS, THEME

# Two prompts of `settings.MAX_PROMPT` characters are at most 24 KB of JSON (12 bytes for an escaped emoji).
MAX_BODY = 64 * 1024
# Larger bodies are read up to this size and dropped, so that the sender reads the answer.
MAX_DISCARDED = 16 * 1024**2
# requests of one session without a reader; gradio keeps results until they are read
MAX_UNREAD = 32
MAX_SESSIONS = 2000  # sessions without a reader; gradio keeps the results of as many
MAX_SESSION_HASH = 64  # characters; browsers send 11, gradio's client 36

API = "/gradio_api/"
# everything that the page and its two endpoints need; other routes take uploads, or fail on unknown names
POST_ROUTES = ("queue/join", "cancel", "reset", "run", "api", "call")
# routes of gradio that write to the disk, show the traffic, connect to other hosts or never end
BLOCKED_PATHS = (
    "/monitoring",
    *(API + name for name in ("deep_link", "dev/", "monitoring", "proxy=", "stream/", "upload")),
)

UNKNOWN_PATH = "This path takes no requests. Endpoints are /draw and /compare, see /gradio_api/info."
UNKNOWN_ENDPOINT = "This endpoint does not exist. Endpoints are /draw and /compare."
INVALID_VALUES = "The values of the request are invalid; /gradio_api/info lists the accepted ones."
TOO_LARGE = f"The request is too large; accepted: at most {MAX_BODY} bytes."
UNREAD = f"{MAX_UNREAD} results of this session are unread: read /gradio_api/queue/data first."


class Page(gr.Blocks):
    """gr.Blocks that answers invalid requests with a sentence; gradio answers with objects or a missing key."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        needed = len(block_fn.inputs)
        if len(inputs) < needed:
            raise gr.Error(f"`data` has {len(inputs)} values; accepted: {needed}.", print_exception=False)

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await super().process_api(*args, **kwargs)
        except gr.Error as error:
            error.print_exception = False  # the sender reads it
            raise
        except Exception as error:
            print_exception(error)
            raise gr.Error(INVALID_VALUES, print_exception=False) from None


class RequestLimits:
    """ASGI middleware that refuses invalid requests before gradio reads or keeps any of them.

    Args:
        app: wrapped application.
        page: page that it serves.
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks):
        self.app = app
        self.page = page
        self._readers: Counter[str] = Counter()  # session -> open streams of results
        self._unread: OrderedDict[str, int] = OrderedDict()  # session without a stream -> requests since the last one

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                if path.startswith(BLOCKED_PATHS):
                    raise HTTPException(404, UNKNOWN_PATH)
                await self._forward_get(path, scope, receive, send)
                return
            if not any(path == API + name or path.startswith(f"{API}{name}/") for name in POST_ROUTES):
                raise HTTPException(404, UNKNOWN_PATH)
            body = await read_body(receive)
            self._check_body(path.removeprefix(API).strip("/"), body)
        except HTTPException as error:
            await JSONResponse({"detail": error.detail}, error.status_code)(scope, receive, send)
            return
        message: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_again() -> Message:
            nonlocal message
            if message is None:
                return await receive()  # the disconnect
            first, message = message, None
            return first

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 500:
                message["status"] = 400  # `run` answers invalid requests with 500
            await send(message)

        await self.app(scope, receive_again, send_on if path.startswith((f"{API}run/", f"{API}api/")) else send)

    def _check_body(self, path: str, body: bytes) -> None:
        """Refuse a body that gradio would keep, or fail on.

        Raises:
            HTTPException: with a sentence.
        """
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            raise HTTPException(400, "The body of the request is not JSON.") from None
        if not isinstance(values, dict):
            raise HTTPException(400, "The body of the request is not a JSON object.")
        index = values.get("fn_index")
        function = self.page.fns.get(index) if type(index) is int else None
        if (index is not None or path in ("queue/join", "cancel")) and function is None:
            raise HTTPException(404, "`fn_index` is not a function of this page. Reload the page.")
        if function is not None and path != "cancel" and function.fn is None:
            raise HTTPException(404, "`fn_index` is a function that runs in the browser only.")
        session = values.get("session_hash")
        if session is not None and path.startswith("call/"):  # results are read by event id, not by session
            raise HTTPException(400, "`session_hash` is not accepted here: leave it out.")
        if session is not None and not (
            isinstance(session, str) and session.isascii() and 0 < len(session) <= MAX_SESSION_HASH
        ):
            raise HTTPException(400, f"`session_hash` is invalid; accepted: 1 to {MAX_SESSION_HASH} ASCII characters.")
        if path == "queue/join" and session is not None and not self._readers[session]:
            unread = self._unread.pop(session, 0)
            self._unread[session] = min(unread + 1, MAX_UNREAD)
            if len(self._unread) > MAX_SESSIONS:
                self._unread.popitem(last=False)
            if unread >= MAX_UNREAD:
                raise HTTPException(429, UNREAD)

    async def _forward_get(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a GET request; count it as a reader of its session while it runs."""
        session = None
        if path.rstrip("/") == f"{API}queue/data":
            session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [None])[0]
        if session is None:
            await self.app(scope, receive, send)
            return
        self._unread.pop(session, None)
        self._readers[session] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._readers[session] -= 1
            if not self._readers[session]:
                del self._readers[session]


async def read_body(receive: Receive) -> bytes:
    """Read the body of a request; its Content-Length is not trusted.

    Raises:
        HTTPException: if the body has more than `MAX_BODY` bytes, or the sender disconnects.
    """
    parts, size, more = [], 0, True
    while more and size <= MAX_DISCARDED:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "The client disconnected.")
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > MAX_BODY:
            parts.clear()
        else:
            parts.append(part)
    if size > MAX_BODY:
        raise HTTPException(413, TOO_LARGE)
    return b"".join(parts)


async def answer_unknown_endpoint(request: Request, error: Exception) -> JSONResponse:
    """Answer 404; gradio answers 500."""
    return JSONResponse({"detail": UNKNOWN_ENDPOINT}, status_code=404)


async def answer_invalid_values(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 where a route of gradio fails before it calls a function."""
    if not isinstance(error, RequestValidationError):
        print_exception(error)
    return JSONResponse({"detail": INVALID_VALUES}, status_code=400)


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Serve a page without access to other files, uploads, history and monitoring.

    Args:
        page: page to serve.
        options: passed to gr.Blocks.launch.
    """
    value_errors = (RequestValidationError, KeyError, TypeError, ValueError, AttributeError, IndexError)
    handlers = {FnIndexInferError: answer_unknown_endpoint, **dict.fromkeys(value_errors, answer_invalid_values)}
    return page.launch(
        theme=THEME,
        css=CSS,
        allowed_paths=[],
        max_file_size=1,
        run_history=False,
        ssr_mode=False,
        show_error=True,
        enable_monitoring=False,
        state_session_capacity=300,  # gradio's client makes a session per request
        footer_links=["api"],
        app_kwargs={
            "exception_handlers": handlers,
            "middleware": [Middleware(RequestLimits, page=page)],
        },
        **options,
    )
