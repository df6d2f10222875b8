"""Serve the page to strangers: limits on what they may send, and a sentence for every request that does not fit."""

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
# A larger body is read to its end, and not kept, so that its sender gets an answer; up to this size.
MAX_DISCARDED = 16 * 1024**2
# Requests of one session whose results nobody reads. gradio keeps the results until somebody does.
MAX_UNREAD = 32
MAX_SESSIONS = 2000  # sessions whose unread requests are counted; gradio keeps the results of as many
MAX_SESSION_NAME = 64  # characters; browsers send 11, gradio's client 36

API = "/gradio_api/"
# All that the page and its two endpoints need. Other routes of gradio take uploads, or fail on unknown names.
POSTED = ("queue/join", "cancel", "reset", "run", "api", "call")
# Routes of gradio that write to the disk, show the traffic, ask other hosts or never end.
NOT_READ = (
    "/monitoring",
    *(API + name for name in ("deep_link", "dev/", "monitoring", "proxy=", "stream/", "upload")),
)

NO_SUCH_PATH = "There is nothing here that takes requests; there are /draw and /compare: see /gradio_api/info."
NO_SUCH_ENDPOINT = "There is no such endpoint; there are /draw and /compare."
NOT_FITTING = "The values of the request do not fit what it asks for; /gradio_api/info says what is accepted."
TOO_LARGE = f"The request has more than {MAX_BODY} bytes, which is more than any picture needs."
UNREAD = f"{MAX_UNREAD} requests of this session have results that nobody reads: read /gradio_api/queue/data first."


class Page(gr.Blocks):
    """A page that answers a sentence where gradio would print the objects it expects, or the name of a missing key."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        needed = len(block_fn.inputs)
        if len(inputs) < needed:
            raise gr.Error(f"{len(inputs)} values came; {needed} are needed.", print_exception=False)

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await super().process_api(*args, **kwargs)
        except gr.Error as error:
            error.print_exception = False  # the fault of the request, whose sender reads the sentence
            raise
        except Exception as error:
            print_exception(error)
            raise gr.Error(NOT_FITTING, print_exception=False) from None


class RequestLimits:
    """ASGI middleware that refuses a request, in a sentence, before gradio reads or keeps any of it.

    Args:
        app: the application behind it.
        page: the page that it serves; its functions are the ones that can be asked for.
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks):
        self.app = app
        self.page = page
        self._readers: Counter[str] = Counter()  # sessions -> open streams of results
        self._unread: OrderedDict[str, int] = OrderedDict()  # sessions without one -> requests since

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                if path.startswith(NOT_READ):
                    raise HTTPException(404, NO_SUCH_PATH)
                await self._serve_reader(path, scope, receive, send)
                return
            if not any(path == API + name or path.startswith(f"{API}{name}/") for name in POSTED):
                raise HTTPException(404, NO_SUCH_PATH)
            body = await read_body(receive)
            self._check(path.removeprefix(API).strip("/"), body)
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
                message["status"] = 400  # `run` answers its sentences so; they tell of the request, not of the server
            await send(message)

        await self.app(scope, receive_again, send_on if path.startswith((f"{API}run/", f"{API}api/")) else send)

    def _check(self, path: str, body: bytes) -> None:
        """Raise `HTTPException` for a body that gradio would keep, or fail on."""
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            raise HTTPException(400, "The body of the request is not JSON.") from None
        if not isinstance(values, dict):
            raise HTTPException(400, "The body of the request is not a JSON object.")
        index = values.get("fn_index")
        function = self.page.fns.get(index) if type(index) is int else None
        if (index is not None or path in ("queue/join", "cancel")) and function is None:
            raise HTTPException(404, "The page has no such function: `fn_index` is unknown. Reload the page.")
        if function is not None and path != "cancel" and function.fn is None:
            raise HTTPException(404, "This function of the page runs in the browser: `fn_index` is another.")
        session = values.get("session_hash")
        if session is not None and path.startswith("call/"):  # who calls reads by the event, not by a session
            raise HTTPException(400, "A call takes no `session_hash`: leave it out.")
        if session is not None and not (
            isinstance(session, str) and session.isascii() and 0 < len(session) <= MAX_SESSION_NAME
        ):
            raise HTTPException(400, f"`session_hash` is not a text of 1 to {MAX_SESSION_NAME} ASCII characters.")
        if path == "queue/join" and session is not None and not self._readers[session]:
            unread = self._unread.pop(session, 0)
            self._unread[session] = min(unread + 1, MAX_UNREAD)
            if len(self._unread) > MAX_SESSIONS:
                self._unread.popitem(last=False)
            if unread >= MAX_UNREAD:
                raise HTTPException(429, UNREAD)

    async def _serve_reader(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; note the session whose results it reads while it does."""
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
    """Return the body of a request, whatever length it states.

    Raises:
        HTTPException: it has more than `MAX_BODY` bytes (the rest is read and dropped), or the sender went away.
    """
    parts, size, more = [], 0, True
    while more and size <= MAX_DISCARDED:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "The sender went away.")
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > MAX_BODY:
            parts.clear()
        else:
            parts.append(part)
    if size > MAX_BODY:
        raise HTTPException(413, TOO_LARGE)
    return b"".join(parts)


async def no_such_endpoint(request: Request, error: Exception) -> JSONResponse:
    """Answer an unknown name, which would be an error inside the server, 500."""
    return JSONResponse({"detail": NO_SUCH_ENDPOINT}, status_code=404)


async def not_fitting(request: Request, error: Exception) -> JSONResponse:
    """Answer a request on which a route of gradio failed before it reached a function."""
    if not isinstance(error, RequestValidationError):
        print_exception(error)
    return JSONResponse({"detail": NOT_FITTING}, status_code=400)


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Serve a page: no file outside of it can be read, nothing can be uploaded, no history is kept."""
    unfit = (RequestValidationError, KeyError, TypeError, ValueError, AttributeError, IndexError)
    return page.launch(
        theme=THEME,
        css=CSS,
        allowed_paths=[],
        max_file_size=1,
        run_history=False,
        ssr_mode=False,
        show_error=True,
        enable_monitoring=False,
        state_session_capacity=300,  # a program makes a new session with each request
        footer_links=["api"],
        app_kwargs={
            "exception_handlers": {FnIndexInferError: no_such_endpoint, **dict.fromkeys(unfit, not_fitting)},
            "middleware": [Middleware(RequestLimits, page=page)],
        },
        **options,
    )
