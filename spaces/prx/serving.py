"""Serving: limits on untrusted requests, and a sentence as the answer to each invalid one."""

import json
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator
from traceback import print_exception
from typing import Any
from urllib.parse import parse_qs

import anyio
import gradio as gr
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from gradio.route_utils import FnIndexInferError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from page_parts import CSS, THEME
from pictures import open_picture

# Two prompts of `settings.MAX_PROMPT` characters are at most 24 KB of JSON (12 bytes for an escaped emoji).
MAX_BODY = 64 * 1024
MAX_UPLOAD = 10 * 1024**2  # bytes of a request with a picture
# Bytes of the uploads within `UPLOAD_SECONDS`, of all visitors together. gradio keeps files so long (`delete_cache`).
MAX_UPLOADED, UPLOAD_SECONDS = 1024**3, 3600.0
# Larger bodies are read up to this size and dropped, so that the sender reads the answer.
MAX_DISCARDED = 16 * 1024**2
# requests of one session without a reader; gradio keeps results until they are read
MAX_UNREAD = 32
MAX_SESSIONS = 2000  # sessions without a reader; gradio keeps the results of as many
MAX_SESSION_HASH = 64  # characters; browsers send 11, gradio's client 36

API = "/gradio_api/"
UPLOAD = API + "upload"
SHARE_IMAGE = "/share.png"  # shown by pages that link to this one
# everything else that the page and its endpoints need; other routes fail on unknown names
POST_ROUTES = ("queue/join", "cancel", "reset", "run", "api", "call")
# routes of gradio that write to the disk, show the traffic, connect to other hosts or never end
BLOCKED_PATHS = (
    "/monitoring",
    *(API + name for name in ("deep_link", "dev/", "monitoring", "proxy=", "stream/", "upload")),
)

UNKNOWN_PATH = "This path takes no requests. Endpoints are /draw, /edit and /compare, see /gradio_api/info."
UNKNOWN_ENDPOINT = "This endpoint does not exist. Endpoints are /draw, /edit and /compare."
INVALID_VALUES = "The values of the request are invalid; /gradio_api/info lists the accepted ones."
TOO_LARGE = "The request is too large; accepted: at most {} bytes."
UPLOAD_FORM = "An upload is a multipart form with one picture in `files`."
MANY_UPLOADS = "There were too many uploads in the last hour. Try again later."
UNKNOWN_FILE = "The request names a file that was not uploaded here."
UNREAD = f"{MAX_UNREAD} results of this session are unread: read /gradio_api/queue/data first."


class Page(gr.Blocks):
    """gr.Blocks that answers invalid requests with a sentence; gradio answers with objects or a missing key.

    Args:
        description: sentence that other pages show with a link to this one.
        share_image: picture that they show, PNG; b"" for none.
        options: passed to gr.Blocks.
    """

    def __init__(self, description: str, share_image: bytes = b"", **options: Any):
        self.description = description
        self.share_image = share_image
        super().__init__(**options)

    def get_config_file(self) -> Any:
        """Return gradio's configuration, with the picture and the sentence of links to the page (Open Graph)."""
        host = os.environ.get("SPACE_HOST")  # set on Hugging Face Spaces; elsewhere the address is relative
        thumbnail = (f"https://{host}" if host else "") + SHARE_IMAGE
        return {**super().get_config_file(), "thumbnail": thumbnail, "simple_description": self.description}

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

    def __init__(self, app: ASGIApp, page: Page):
        self.app = app
        self.page = page
        self._uploads: deque[tuple[float, int]] = deque()  # time and bytes of the uploads within `UPLOAD_SECONDS`
        self._readable = anyio.CapacityLimiter(2)  # pictures that are read at the same time
        self._readers: Counter[str] = Counter()  # session -> open streams of results
        self._unread: OrderedDict[str, int] = OrderedDict()  # session without a stream -> requests since the last one

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                if path == SHARE_IMAGE and self.page.share_image:
                    await Response(self.page.share_image, media_type="image/png")(scope, receive, send)
                    return
                if path.startswith(BLOCKED_PATHS):
                    raise HTTPException(404, UNKNOWN_PATH)
                await self._forward_get(path, scope, receive, send)
                return
            if path.rstrip("/") == UPLOAD:
                body = await read_body(receive, MAX_UPLOAD)
                await self._check_upload(Headers(scope=scope), body)
                scope = {**scope, "query_string": b""}  # gradio keeps a record for each `upload_id`
            elif any(path == API + name or path.startswith(f"{API}{name}/") for name in POST_ROUTES):
                body = await read_body(receive, MAX_BODY)
                self._check_body(path.removeprefix(API).strip("/"), body)
            else:
                raise HTTPException(404, UNKNOWN_PATH)
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

    async def _check_upload(self, headers: Headers, body: bytes) -> None:
        """Refuse a form with anything but one picture.

        Raises:
            HTTPException: with a sentence.
        """
        now = time.monotonic()
        while self._uploads and self._uploads[0][0] < now - UPLOAD_SECONDS:
            self._uploads.popleft()
        if sum(size for _, size in self._uploads) + len(body) > MAX_UPLOADED:
            raise HTTPException(429, MANY_UPLOADS)

        async def stream() -> AsyncGenerator[bytes, None]:
            yield body

        try:
            form = await MultiPartParser(headers, stream(), max_files=1, max_fields=0).parse()
        except (MultiPartException, KeyError, ValueError, UnicodeDecodeError):
            raise HTTPException(400, UPLOAD_FORM) from None
        try:
            files = form.getlist("files")
            if len(form.multi_items()) != 1 or len(files) != 1 or not isinstance(files[0], UploadFile):
                raise HTTPException(400, UPLOAD_FORM)
            await anyio.to_thread.run_sync(open_picture, files[0].file, limiter=self._readable)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        finally:
            await form.close()
        self._uploads.append((now, len(body)))

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
        if names_other_file(values.get("data")):
            raise HTTPException(400, UNKNOWN_FILE)
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


def names_other_file(value: Any) -> bool:
    """True if a JSON value names a file by an address; gradio would fetch it. It checks paths of uploads itself."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if "://" in str(value.get("path")):
                return True
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    return False


async def read_body(receive: Receive, limit: int) -> bytes:
    """Read the body of a request; its Content-Length is not trusted.

    Raises:
        HTTPException: if the body has more than `limit` bytes, or the sender disconnects.
    """
    parts, size, more = [], 0, True
    while more and size <= MAX_DISCARDED:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "The client disconnected.")
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > limit:
            parts.clear()
        else:
            parts.append(part)
    if size > limit:
        raise HTTPException(413, TOO_LARGE.format(limit))
    return b"".join(parts)


async def answer_unknown_endpoint(request: Request, error: Exception) -> JSONResponse:
    """Answer 404; gradio answers 500."""
    return JSONResponse({"detail": UNKNOWN_ENDPOINT}, status_code=404)


async def answer_invalid_values(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 where a route of gradio fails before it calls a function."""
    if not isinstance(error, RequestValidationError):
        print_exception(error)
    return JSONResponse({"detail": INVALID_VALUES}, status_code=400)


def launch(page: Page, **options: Any) -> Any:
    """Serve a page without access to other files, history and monitoring.

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
        max_file_size=MAX_UPLOAD,
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
