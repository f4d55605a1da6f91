"""Ends the requests to a hub that does not answer, sends almost nothing, or sends without end.

huggingface_hub asks for a model's description without a time limit, tries again for minutes, and reads any answer
into memory. Here its requests have limits by way of the hooks of its HTTP client.
"""

from __future__ import annotations

import re
import time
from threading import Event, Thread, get_ident
from typing import Any

from minopt.config import MOST_TEXT_BYTES

_LEAST_BYTES_PER_SECOND = 1000  # a telephone line has more
_MOST_ANSWERS = 100  # descriptions and lists of files
_MOST_ANSWER_BYTES = 10_000_000  # of them all; a list of 1000 files has 0.4 MB
_MOST_EXPANSION = 1000  # of what comes compressed
_MOST_SECONDS_TO_WAIT = 10  # before another try, where the hub asks for it
_LOOK_SECONDS = 0.02
_TRY_LATER = (408, 429, 500, 502, 503, 504)
_IS_TEXT = re.compile(r"/resolve/.*\.(json|txt)$")


class HubWatch:
    """Watches the requests of huggingface_hub's client within a ``with`` block.

    A request has ``HF_HUB_ETAG_TIMEOUT`` seconds to connect and for each wait, or ``HF_HUB_DOWNLOAD_TIMEOUT`` where
    huggingface_hub sets that. One that has brought almost nothing for three times as long, retries included, is ended.

    Attributes:
        asked: whether there was a request.
        answered: whether the hub has described the model or listed its files.
        files_asked: whether a file was asked for.
        reason: why requests were ended, if they were.
    """

    def __init__(self) -> None:
        from huggingface_hub import constants, get_session

        self.asked = self.answered = self.files_asked = False
        self.reason: str | None = None
        self._timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
        self._limit = 3 * max(self._timeout, float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
        self._calls: dict[int, _Call] = {}  # the last one of each thread
        self._answers: list[Any] = []
        self._client, self._ended = get_session(), Event()
        self._thread = Thread(target=self._look, daemon=True)

    def __enter__(self) -> HubWatch:
        self._client.event_hooks["request"].append(self._on_request)
        self._client.event_hooks["response"].append(self._on_response)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        from huggingface_hub import close_session

        self._ended.set()
        self._thread.join()
        self._client.event_hooks["request"].remove(self._on_request)
        self._client.event_hooks["response"].remove(self._on_response)
        if self.reason is not None:
            close_session()  # what comes next has a new client

    def _on_request(self, request: Any) -> None:
        given = request.extensions.get("timeout", {})
        limits = {kind: given.get(kind) or self._timeout for kind in ("connect", "read", "write", "pool")}
        if request.method == "HEAD":  # after a first one that fails, huggingface_hub waits 60 seconds for each
            limits["read"] = min(limits["read"], self._timeout)
        request.extensions = {**request.extensions, "timeout": limits}
        if _is_description(request):
            request.headers["Accept-Encoding"] = "identity"
        self.asked = True
        self.files_asked |= "/resolve/" in request.url.path
        what = request.method, str(request.url), request.headers.get("Range")
        call = self._calls.get(get_ident())
        if call is None or call.what != what:  # a retry goes on with the time of the first try
            call = self._calls[get_ident()] = _Call(what)
        call.response = None

    def _on_response(self, response: Any) -> None:
        if get_ident() in self._calls:
            self._calls[get_ident()].response = response
        if _is_description(response.request) or response.status_code >= 400:
            self._answers.append(response)
            self.answered |= response.status_code < 400
        wait = re.search(r"\bt=(\d+)", f"t={response.headers.get('Retry-After')} {response.headers.get('RateLimit')}")
        if response.status_code in _TRY_LATER and wait is not None and int(wait[1][:9]) > _MOST_SECONDS_TO_WAIT:
            self._end(f"status {response.status_code}, it asks to wait {wait[1][:9]} seconds")
            raise ConnectionError(self.reason)  # which is not tried again

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            reason = self._trouble()
            if reason is not None:
                return self._end(reason)

    def _end(self, reason: str) -> None:
        self.reason = reason
        self._client.close()  # what waits on it fails, and what would be asked next

    def _trouble(self) -> str | None:
        """What is wrong with the requests on their way, if anything."""
        if len(self._answers) > _MOST_ANSWERS or sum(map(_size, self._answers)) > _MOST_ANSWER_BYTES:
            return "its list of files has no end"
        now = time.monotonic()
        for call in list(self._calls.values()):
            response = call.response
            received = 0 if response is None else response.num_bytes_downloaded
            if received - call.seen >= _LEAST_BYTES_PER_SECOND * self._limit:
                call.seen, call.since = received, now
            elif now - call.since > self._limit and (response is None or not response.is_closed):
                return f"almost nothing has come for {self._limit:g} seconds"
            if response is not None and _size(response) > _most_bytes(response):
                return f"{response.request.url.path.rpartition('/')[2]} is larger than {MOST_TEXT_BYTES:,} bytes"
        return None


class _Call:
    """A request: since when it has brought nothing to speak of, and the bytes before that."""

    def __init__(self, what: object) -> None:
        self.what, self.since, self.seen = what, time.monotonic(), 0
        self.response: Any = None


def _is_description(request: Any) -> bool:
    """Of a model or of its files; a token for large files has an address there too, and one is asked for a file."""
    return "/api/models/" in request.url.path and "/xet-" not in request.url.path


def _size(response: Any) -> int:
    """At least the bytes of a body, as far as they have come."""
    return response.num_bytes_downloaded * (_MOST_EXPANSION if "Content-Encoding" in response.headers else 1)


def _most_bytes(response: Any) -> float:
    """Of a file whose end the hub does not tell, or which is a text."""
    known = "Content-Length" in response.headers and not _IS_TEXT.search(response.request.url.path)
    return float("inf") if known else MOST_TEXT_BYTES
