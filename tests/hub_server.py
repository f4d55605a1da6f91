"""A stand-in for the Hugging Face hub on the loopback: the part of its protocol that downloading a model takes.

Requests and answers are those of huggingface_hub 1 and 2: a model's description (``/api/models/NAME``), its list of
files (``.../tree/COMMIT``), and each file (``/NAME/resolve/COMMIT/FILE``), asked for by HEAD and then by GET.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote

_NAME = r"(?P<name>[\w.-]+(?:/[\w.-]+)??)"
_API = re.compile(rf"/api/models/{_NAME}(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_FILE = re.compile(rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_ANSWERS: dict[str, tuple[int, bytes, dict[str, str]]] = {
    "page": (200, b"<html>Please log in.</html>", {"Content-Type": "text/html"}),
    "busy": (429, b"", {"Retry-After": "3600"}),
    "late": (429, b"", {"RateLimit": '"api";r=0;t=3600'}),
    "away": (302, b"", {"Location": "/api/models/tester/hang"}),
    "packed": (200, b"", {"Content-Encoding": "gzip, gzip"}),
}
_IDLE_SECONDS = 20  # a client that says nothing for that long is dropped


@dataclass(frozen=True)
class Request:
    """One request as it came; ``byte_range`` is its Range header."""

    method: str
    path: str
    byte_range: str | None


@dataclass
class _Repository:
    token: str | None
    gated: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # the files of each
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit


class Hub:
    """A hub of its own on a free port of 127.0.0.1, which ends with the ``with`` block.

    Attributes:
        url: for ``HF_ENDPOINT``.
        requests: all that came, in order.
        repositories: by name.
        statuses, cuts, faults: what ``answer_only``, ``cut`` and ``misbehave`` have set.
        stopped: whether connections are refused.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.repositories: dict[str, _Repository] = {}
        self.cuts: dict[tuple[str, str], bool] = {}
        self.statuses: dict[str, int] = {}
        self.faults: dict[str, tuple[str, str]] = {}
        self.stopped = Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def add(
        self, name: str, files: Path | Mapping[str, bytes], *, ref: str = "main", token: str | None = None,
        gated: bool = False,
    ) -> str:  # fmt: skip
        """Publishes a folder's files, or those given, as what a branch or tag of a repository points to.

        Args:
            name: ``owner/name``, or a name alone.
            files: read now, into memory.
            ref: the branch or tag.
            token: who does not show it is kept out: of the whole repository, or of its files if it is gated.
            gated: all may see the list of files, as on the real hub.

        Returns:
            The commit.
        """
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        repository = self.repositories.setdefault(name, _Repository(token, gated))
        commit = _sha1(b"".join(path.encode() + _sha1(content).encode() for path, content in sorted(files.items())))
        repository.commits[commit] = dict(files)
        repository.refs[ref] = commit
        return commit

    def cut(self, name: str, file: str, *, reset: bool = False) -> None:
        """Breaks the connection halfway through the next GET of a file: closed too early, or reset."""
        self.cuts[name, file] = reset

    def answer_only(self, name: str, status: int) -> None:
        """Answers all that concerns a repository with a status, or hangs up without a word if it is 0."""
        self.statuses[name] = status

    def misbehave(self, name: str, where: str, how: str) -> None:
        """Answers badly when a repository's "info", "tree" or "HEAD" or "GET" of a file is asked for.

        Args:
            name: of the repository.
            where: what is answered badly.
            how: "hang" says nothing, "stall" stops in mid body, "drip" sends a byte now and then, "page" a web page,
                "endless" 300 MB of a list, "bomb" the same compressed, "pages" lists that go on elsewhere,
                "busy" and "late" ask to come again in an hour, "away" leads to "tester/hang", "packed" is compressed
                twice.
        """
        self.faults[name] = (where, how)

    def fetched(self, name: str) -> list[str]:
        """The files of a repository that were asked for by GET, in alphabetical order, each as often as it was."""
        matches = (_FILE.fullmatch(request.path) for request in self.requests if request.method == "GET")
        return sorted(match["file"] for match in matches if match and match["name"] == name)

    def ranges(self, name: str, file: str) -> list[str | None]:
        """The Range headers of the GETs of a file, in order."""
        asked = ((_FILE.fullmatch(request.path), request) for request in self.requests if request.method == "GET")
        return [r.byte_range for match, r in asked if match and (match["name"], match["file"]) == (name, file)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that went away is none of the test's business."""


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; HTTP/1.0, so that each has a connection of its own."""

    server: _Server
    timeout = _IDLE_SECONDS

    def log_message(self, *_: Any) -> None:
        """Nothing: the hub keeps its requests itself."""

    def do_HEAD(self) -> None:
        """Answers as GET does, without the body."""
        self._answer()

    def do_GET(self) -> None:
        """Answers a description, a list of files or a file."""
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.hub.requests.append(Request(self.command, unquote(path), self.headers["Range"]))
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        if match is None:
            return self._refuse(404, "EntryNotFound", "Not found")
        parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        status = self.server.hub.statuses.get(parts["name"])
        if status is not None:
            return self._refuse(status, None, "Out of order") if status else None
        where = self.command if "file" in parts else "tree" if parts.get("what") == "tree" else "info"
        faulty, how = self.server.hub.faults.get(parts["name"], ("", ""))
        if where == faulty:
            return self._misbehave(how)
        repository = self.server.hub.repositories.get(parts["name"])
        if repository is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        token = self.headers["Authorization"]
        if token is not None and token != f"Bearer {repository.token}" and repository.token is not None:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        if token is None and repository.token is not None and (not repository.gated or "file" in parts):
            code = "GatedRepo" if repository.gated else "RepoNotFound"
            return self._refuse(401, code, "Access is restricted.\nPlease log in.")
        revision = parts.get("revision", "main")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit]
        if "file" not in parts:
            return self._send_json(_tree(files) if parts.get("what") == "tree" else _info(parts["name"], commit, files))
        if parts["file"] not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        self._send_file(parts["name"], parts["file"], commit, files[parts["file"]])

    def _misbehave(self, how: str) -> None:
        if how in _ANSWERS:
            return self._send(*_ANSWERS[how])
        if how == "pages":
            return self._send(200, b"[]", {"Link": f'<{self.server.hub.url}{self.path}>; rel="next"'})
        if how == "stall":
            self._send(200, bytes(10**6), {"ETag": '"0"', "X-Repo-Commit": "0" * 40}, sent=10)
        if how in ("endless", "bomb"):
            encoding = "gzip" if how == "bomb" else "identity"
            self._send(200, b"", {"Content-Encoding": encoding, "Content-Length": str(2**30)})
            packer = zlib.compressobj(1, wbits=31)
            for _ in range(300):
                self.wfile.write(packer.compress(bytes(10**6)) if how == "bomb" else bytes(10**6))
            return None
        while not self.server.hub.stopped.wait(0.2 if how == "drip" else _IDLE_SECONDS) and how == "drip":
            self.wfile.write(b"H")

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message.splitlines()[0]} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json"} | headers)

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str, file: str, commit: str, content: bytes) -> None:
        headers = {"ETag": f'"{_sha1(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, start, stop = 200, 0, len(content)
        if wanted := _RANGE.fullmatch(self.headers["Range"] or ""):
            status, start = 206, int(wanted[1])
            stop = min(int(wanted[2]) + 1, stop) if wanted[2] else stop
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        reset = self.server.hub.cuts.pop((name, file), None) if self.command == "GET" else None
        if reset is None:
            return self._send(status, content[start:stop], headers)
        self._send(status, content[start:stop], headers, sent=(stop - start) // 2)
        if reset:
            self._reset()

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], sent: int | None = None) -> None:
        """Sends an answer, or its first ``sent`` bytes under the headers of the whole."""
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])

    def _reset(self) -> None:
        """Closes with a reset: what a crashed machine or an impatient router sends."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _info(name: str, commit: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    return {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": path} for path in sorted(files)]}  # fmt: skip


def _tree(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "oid": _sha1(content), "size": len(content), "path": path}
        for path, content in sorted(files.items())
    ]
