"""Ends requests to a hub that does not answer, sends almost nothing, or sends without end.

huggingface_hub sets no time limit for some requests, retries for minutes, and reads answers of any size into memory.
The hooks of its HTTP client set limits here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Thread, get_ident
from typing import Any

from minopt.config import MOST_TEXT_BYTES

_LEAST_BYTES_PER_SECOND = 1000  # a telephone line has more
_MOST_LIST_BYTES = MOST_TEXT_BYTES // 2  # of all pages together; 1000 files take 400,000
_BYTES_PER_PAGE = _MOST_LIST_BYTES // 100  # added to the size of each page: at most 100 pages, even if empty
_MOST_SECONDS_TO_WAIT = 10  # before a retry, if the hub asks for it
_LOOK_SECONDS = 0.02
_RETRIED = (408, 429, 500, 502, 503, 504)  # huggingface_hub repeats the request after these statuses
_IS_LIST = re.compile(r"/api/models/(?!.*/xet-)")  # a model's description or its files; xet- is a token for one file
_IS_TEXT = re.compile(r"/api/models/|\.(json|txt)$")


@dataclass
class _Call:
    """What one thread asks for. Redirects and retries belong to it."""

    since: float = field(default_factory=time.monotonic)  # the time limit counts from here
    seen: int = 0  # bytes of the answer that had come by then
    response: Any = None
    done: bool = False  # the answer has come to its end, and is not a request to ask again


class HubWatch:
    """Watches all requests of huggingface_hub within a ``with`` block.

    A single wait takes at most ``HF_HUB_ETAG_TIMEOUT`` or ``HF_HUB_DOWNLOAD_TIMEOUT`` seconds. A request that brings
    almost nothing for three times as long, retries included, is ended.

    Raises:
        ConnectionError: at the end of the block, if a request was ended. The message is the reason.
    """

    def __init__(self) -> None:
        from huggingface_hub import constants

        self._reason: str | None = None
        self._timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
        self._longest_wait = max(self._timeout, float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
        self._calls: dict[int, _Call] = {}  # the last one of each thread
        self._list_bytes = 0
        self._client: Any = None
        self._finished, self._thread = Event(), Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._hook()
        self._thread.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from huggingface_hub import close_session

        self._finished.set()
        self._thread.join()
        self._client.event_hooks["request"].remove(self._on_request)
        self._client.event_hooks["response"].remove(self._on_response)
        if self._reason is not None:
            close_session()  # the next request gets a new client
            if isinstance(error, Exception):
                raise ConnectionError(self._reason) from None

    def _hook(self) -> None:
        """Watches the current client. huggingface_hub makes a new one if it could not connect."""
        from huggingface_hub import get_session

        client = get_session()
        if client is not self._client:
            self._client = client
            client.event_hooks["request"].append(self._on_request)
            client.event_hooks["response"].append(self._on_response)

    def _on_request(self, request: Any) -> None:
        if self._reason is not None:
            raise ConnectionError(self._reason)
        given = request.extensions.get("timeout", {})
        kinds = ("connect", "read", "write", "pool")
        limits = {kind: min(given.get(kind) or self._timeout, self._longest_wait) for kind in kinds}
        request.extensions = {**request.extensions, "timeout": limits}
        if request.headers.get("Accept-Encoding") != "identity":
            request.headers["Accept-Encoding"] = "gzip"
        call = self._calls.get(get_ident())
        if call is None or call.done:
            call = self._calls[get_ident()] = _Call()
        call.response, call.seen = None, 0

    def _on_response(self, response: Any) -> None:
        waits = f"t={response.headers.get('Retry-After')} {response.headers.get('RateLimit')}"
        seconds = max(map(int, re.findall(r"\bt\s*=\s*(\d{1,9})", waits)), default=0)
        if response.status_code in _RETRIED and seconds > _MOST_SECONDS_TO_WAIT:
            raise self._end(f"status {response.status_code}, it asks to wait {seconds} seconds")
        encoding = response.headers.get("Content-Encoding", "")
        if "," in encoding or encoding.strip().lower() in ("br", "zstd"):  # a few bytes of these can fill the memory
            raise self._end("its answer is compressed in a way that was not asked for")
        call = self._calls.setdefault(get_ident(), _Call())
        call.response = response
        response.iter_bytes = partial(self._body, call, response.iter_bytes)  # read() calls it too

    def _body(self, call: _Call, iter_bytes: Any, chunk_size: int | None = None) -> Iterator[bytes]:
        """The decoded bytes of an answer, up to the limit of its kind. Weights of a known length have no limit."""
        response, size = call.response, 0
        path, headers = response.request.url.path, response.headers
        has_length = "Content-Length" in headers and "Content-Encoding" not in headers
        is_limited = _IS_TEXT.search(path) or not has_length or response.status_code >= 400
        is_list = _IS_LIST.search(path)
        self._list_bytes += _BYTES_PER_PAGE if is_list else 0
        for chunk in iter_bytes(chunk_size):
            size += len(chunk)
            self._list_bytes += len(chunk) if is_list else 0
            if self._list_bytes > _MOST_LIST_BYTES:
                raise self._end("its list of files has no end")
            if is_limited and size > MOST_TEXT_BYTES:
                raise self._end(f"{path.rpartition('/')[2]} is larger than {MOST_TEXT_BYTES:,} bytes")
            yield chunk
        is_followed = response.has_redirect_location and response.request.method == "GET"
        call.done = not is_followed and response.status_code not in _RETRIED

    def _look(self) -> None:
        limit = 3 * self._longest_wait
        while not self._finished.wait(_LOOK_SECONDS):
            self._hook()
            now = time.monotonic()
            for call in list(self._calls.values()):
                response = call.response
                received = 0 if response is None else response.num_bytes_downloaded
                if received - call.seen >= _LEAST_BYTES_PER_SECOND * limit:
                    call.since, call.seen = now, received
                elif now - call.since > limit and (response is None or not response.is_closed):
                    self._end(f"almost nothing has come for {limit:g} seconds")

    def _end(self, reason: str) -> ConnectionError:
        """Ends all requests: those under way fail when their connection is closed, and later ones are refused."""
        self._reason = self._reason or reason
        self._client.close()
        return ConnectionError(self._reason)
