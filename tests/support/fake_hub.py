"""The part of the Hugging Face hub's HTTP API that downloads need, on loopback, for one repository."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "team/model"


class FakeHub:
    """A repository with one commit, and what was asked of it.

    Attributes:
        url: The endpoint.
        main: The commit that the branch points to.
        fetched: Bytes sent by file, without those that were only asked about.
    """

    def __init__(self, files: Mapping[str, bytes], gated: bool = False) -> None:
        self.files = dict(files)
        self.gated = gated
        self.main = COMMIT
        self.url = ""
        self.fetched: dict[str, int] = {}

    def info(self, revision: str) -> dict[str, object]:
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
        return {
            "id": REPO,
            "modelId": REPO,
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "tags": [],
        }

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.files.items()
        ]


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer requests until the block is left."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub  # type: ignore[attr-defined]
    server.daemon_threads = False
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use_hub(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask this hub, and keep downloads in a cache of its own."""
    files = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


class Handler(BaseHTTPRequestHandler):
    """Answers for `server.hub`."""

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if match := re.fullmatch(rf"/api/models/{REPO}/revision/([^/]+)", path):
            self.answer_revision(match[1])
        elif re.fullmatch(rf"/api/models/{REPO}/tree/({COMMIT}|{self.hub.main})", path):
            self.send_json(self.hub.tree())
        elif match := re.fullmatch(rf"/{REPO}/resolve/(main|{COMMIT}|{self.hub.main})/(.+)", path):
            self.answer_file(match[2], self.hub.main if match[1] == "main" else match[1])
        else:
            self.refuse(404, "RepoNotFound")

    def answer_revision(self, revision: str) -> None:
        if revision in ("main", COMMIT):
            self.send_json(self.hub.info(revision))
        else:
            self.refuse(404, "RevisionNotFound")

    def answer_file(self, name: str, commit: str) -> None:
        if self.hub.gated:
            self.refuse(403, "GatedRepo")
        elif name not in self.hub.files:
            self.refuse(404, "EntryNotFound")
        else:
            self.send_file(name, self.hub.files[name], commit)

    def send_file(self, name: str, data: bytes, commit: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = data[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None] if asked else data
        if self.command == "GET":
            self.hub.fetched[name] = self.hub.fetched.get(name, 0) + len(part)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if asked:
            headers["Content-Range"] = f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}"
        self.send(206 if asked else 200, part, headers)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: int, reason: str) -> None:
        self.send(code, b"{}", {"X-Error-Code": reason, "X-Error-Message": reason})

    def send(self, code: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
