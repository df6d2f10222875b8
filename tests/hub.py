"""A stand-in for the Hugging Face Hub: the HTTP calls of huggingface_hub, on this machine, keeping what arrives.

huggingface_hub reads `HF_ENDPOINT` and `HF_HUB_OFFLINE` when it is imported, so what talks to this server is a process
of its own, with `environment()`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

TOKEN, READER = "hf_of_me", "hf_that_may_only_read"
LFS_FROM = 2000  # bytes; the Hub goes by kind and size
REPOSITORY = re.compile(r"/api/(model|dataset|space)s/([\w.-]+/[\w.-]+)(?:/(.*))?")
LFS_BATCH = re.compile(r"/(?:(dataset|space)s/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch")


class Hub(ThreadingHTTPServer):
    """Server with the contents of its repositories.

    Attributes:
        repositories: (type, name) -> path of a file -> bytes.
        created: arguments of `create_repo` by repository.
        objects: large files by sha256, including those without a commit.
        sent: received bytes of large files.
        regular: paths committed as regular files.
        large: paths committed as large files.
        fails_after: number of large files after which others are refused, until the next `create_repo`; None: none are
            refused.
        silent: close the connection instead of refusing.
        refused: True if a file was refused.
        calls: method and path of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.created: dict[tuple[str, str], dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.sent = 0
        self.regular: set[str] = set()
        self.large: set[str] = set()
        self.fails_after: int | None = None
        self.silent = False
        self.refused = False
        self.calls: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Return the environment of a process that uses this server."""
        unset = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        values = {name: value for name, value in os.environ.items() if name not in unset}
        values |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return values if token is None else values | {"HF_TOKEN": token}


class Handler(BaseHTTPRequestHandler):
    """Handler of one request; requests that huggingface_hub does not send are 404."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""

    def answer(self, code: int, body: Any = None, message: str | None = None) -> None:
        content = json.dumps({"error": message} if message else body if body is not None else {}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if message:
            self.send_header("X-Error-Message", message)
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def read(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_one(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        body = self.read()
        with hub.lock:
            hub.calls.append(f"{self.command} {path}")
            if path.startswith("/lfs/") and self.command == "PUT":  # the storage requires no token
                return self.put(path.removeprefix("/lfs/"), body)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if path == "/api/validate-yaml":
                return self.validate(json.loads(body))
            if token not in (TOKEN, READER):
                return self.answer(401, message="Invalid username or password.")
            if path == "/api/whoami-v2":
                role = "write" if token == TOKEN else "read"
                orgs = [{"name": "our-lab", "roleInOrg": "write"}]
                return self.answer(200, {"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": role}}})
            if path == "/api/repos/create":
                return self.create(json.loads(body), token)
            if match := LFS_BATCH.fullmatch(path):
                return self.batch((match[1] or "model", match[2]), json.loads(body))
            if path.startswith("/lfs/verify/"):
                oid, size = json.loads(body)["oid"], json.loads(body)["size"]
                return self.answer(200 if len(hub.objects.get(oid, b"")) == size else 404)
            if match := REPOSITORY.fullmatch(path):
                return self.in_repository((match[1], match[2]), match[3], body, token)
        return self.answer(404, message=f"{self.command} {path} is unknown")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def create(self, request: dict[str, Any], token: str) -> None:
        hub = self.server
        if hub.refused:
            hub.fails_after = None
        namespace = request.get("organization") or "me"
        key = (request.get("type", "model"), f"{namespace}/{request['name']}")
        if namespace not in ("me", "our-lab") or token != TOKEN:
            message = f"You don't have the rights to create a {key[0]} under the namespace {namespace!r}"
            return self.answer(403, message=message)
        prefix = "" if key[0] == "model" else f"{key[0]}s/"
        known = {"url": f"{hub.url}/{prefix}{key[1]}"}
        if key in hub.repositories:
            return self.answer(409, known)
        hub.repositories[key], hub.created[key] = {}, request
        return self.answer(200, known)

    def in_repository(self, key: tuple[str, str], rest: str, body: bytes, token: str) -> None:
        hub = self.server
        files = hub.repositories.get(key)
        if files is None:
            return self.answer(404, message="Repository not found")
        if rest == "auth-check/write":
            return self.answer(200) if token == TOKEN else self.answer(403, message="This token may only read")
        if rest == "preupload/main":
            modes = [self.mode(files, asked) for asked in json.loads(body)["files"]]
            return self.answer(200, {"files": modes})
        if rest == "commit/main":
            return self.commit(key, [json.loads(line) for line in body.splitlines()])
        if rest in (None, "revision/main"):
            return self.answer(200, {"id": key[1], "sha": "0" * 40})
        return self.answer(404, message=f"{rest} is unknown")

    def mode(self, files: dict[str, bytes], asked: dict[str, Any]) -> dict[str, Any]:
        """Return how a file must be uploaded, and the hash of the existing file."""
        large = asked["size"] >= LFS_FROM and not asked["path"].endswith((".md", ".json"))
        existing = files.get(asked["path"])
        oid = None
        if existing is not None:
            git = hashlib.sha1(f"blob {len(existing)}\0".encode() + existing).hexdigest()
            oid = hashlib.sha256(existing).hexdigest() if large else git
        return {
            "path": asked["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": oid,
        }

    def batch(self, key: tuple[str, str], request: dict[str, Any]) -> None:
        hub = self.server
        if key not in hub.repositories:
            return self.answer(404, message="Repository not found")
        objects = []
        for asked in request["objects"]:
            actions = {
                "upload": {"href": f"{hub.url}/lfs/{asked['oid']}"},
                "verify": {"href": f"{hub.url}/lfs/verify/{asked['oid']}"},
            }
            objects.append(asked if asked["oid"] in hub.objects else asked | {"actions": actions})
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str, content: bytes) -> None:
        hub = self.server
        if hub.fails_after is not None and len(hub.objects) >= hub.fails_after:
            hub.refused = True
            if hub.silent:
                self.close_connection = True
                return None
            return self.answer(403, message="the storage is going down")  # 503 would be retried for half a minute
        assert hashlib.sha256(content).hexdigest() == oid
        hub.objects[oid] = content
        hub.sent += len(content)
        return self.answer(200)

    def validate(self, request: dict[str, Any]) -> None:
        """Require the front matter to be a mapping, like the Hub."""
        match = re.match(r"---\n(.*?)\n---\n", request["content"], re.DOTALL)
        if match and not isinstance(yaml.safe_load(match[1]), dict):
            return self.answer(400, {"errors": [{"message": "not a mapping"}], "warnings": []})
        warnings = [] if match else [{"message": "empty or missing yaml metadata in repo card"}]
        return self.answer(200, {"errors": [], "warnings": warnings})

    def commit(self, key: tuple[str, str], lines: list[dict[str, Any]]) -> None:
        hub = self.server
        files = dict(hub.repositories[key])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                hub.regular.add(value["path"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
                hub.large.add(value["path"])
        hub.repositories[key] = files
        self.answer(200, {"commitUrl": f"{hub.url}/{key[1]}/commit/{'1' * 40}", "commitOid": "1" * 40})


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
