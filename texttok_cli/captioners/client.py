"""An OpenAI-compatible chat-completions endpoint over HTTP: deadlines, retries with back-off, rate limits."""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import IO, Any

from texttok_cli.captioners.base import CaptionFailed, Written, without_thoughts
from texttok_cli.data.listings import is_utf8
from texttok_cli.errors import BackendError

KEY_VARIABLE = "TEXTTOK_API_KEY"  # nobody else's: a key is sent to the endpoint it was set for, and to no other
MAX_ANSWER_BYTES = 1 << 20
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
REFUSED = {401: "the key was not accepted", 402: "no credit is left", 403: "access was denied", 404: "no such address or model"}
NO_CREDIT = "insufficient_quota"  # OpenAI's code of a 429 that does not pass
LIMIT, NEWER_LIMIT = "max_tokens", "max_completion_tokens"  # most endpoints know the first alone, OpenAI's reasoning models the second
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds; doubled from try to try
LONGEST_WAIT = 300.0  # seconds that an endpoint may ask us to wait before the run gives up
DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d*)?)s)?(?:(\d+(?:\.\d*)?)ms)?")  # as in 6m0s and 120ms


class _TryAgain(Exception):
    """A failure that may pass; `unreachable` is whether nobody answered."""

    def __init__(self, reason: str, *, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


class _OtherLimit(CaptionFailed):
    """The endpoint wants the limit of tokens under its newer name."""


class ChatClient:
    """One model behind one endpoint. Safe to call from several threads: when one is told to wait, all of them do."""

    def __init__(self, endpoint: str, model: str, *, timeout: float = 60, retries: int = 5) -> None:
        """`endpoint` as in https://host/v1; the key, if it needs one, is in the environment variable TEXTTOK_API_KEY."""
        self.url, self.model, self.timeout, self.retries = _url(endpoint), model, timeout, retries
        self._key, self._limit = _key(), LIMIT
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._not_before = 0.0  # time.monotonic()

    def complete(self, content: str | Sequence[Mapping[str, Any]], *, max_tokens: int) -> Written:
        """The answer to one message. CaptionFailed if it can't be had for this one, BackendError if for no other either."""
        for attempt in range(self.retries + 1):
            self._wait()
            try:
                return _answer(self._ask(content, max_tokens))
            except _TryAgain as err:
                if attempt == self.retries:
                    raise self._given_up(err) from None
                # Also if the endpoint asked for less, as Retry-After: 0 does; what is left of more, _wait waits.
                time.sleep(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _ask(self, content: str | Sequence[Mapping[str, Any]], max_tokens: int) -> bytes:
        """One request, with the limit of tokens under the name that this endpoint knows it by."""
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        limit = self._limit
        try:
            return self._send(json.dumps({**body, limit: max_tokens}).encode())
        except _OtherLimit:
            if limit == NEWER_LIMIT:
                raise
        answer = self._send(json.dumps({**body, NEWER_LIMIT: max_tokens}).encode())
        self._limit = NEWER_LIMIT
        return answer

    def _given_up(self, err: _TryAgain) -> Exception:
        reason = f"{err} ({self.retries + 1} tries)"
        return BackendError(f"{self.url}: {reason}") if err.unreachable else CaptionFailed(reason)

    def _wait(self) -> None:
        """Sleep until requests may be sent again. BackendError if that is longer than LONGEST_WAIT."""
        if (left := self._not_before - time.monotonic()) > LONGEST_WAIT:
            raise BackendError(f"{self.url}: asks us to wait {left:,.0f} s; rerun the same command after that to continue")
        while (left := self._not_before - time.monotonic()) > 0:
            time.sleep(left)

    def _send(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "texttok"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                answer = _read(response, deadline)
                self._hold_back(_seconds_until_reset(response.headers))
                return answer
        except urllib.error.HTTPError as err:
            with err:
                raise self._refused(err, _head_of(err, deadline)) from None
        except TimeoutError:
            raise _TryAgain(f"no answer within {self.timeout:g} s") from None
        except (OSError, HTTPException) as err:
            cause = err.reason if isinstance(err, urllib.error.URLError) else err
            if isinstance(cause, TimeoutError):
                raise _TryAgain(f"no answer within {self.timeout:g} s") from None
            # A URLError: the connection did not come about at all.
            reset = isinstance(cause, ConnectionResetError | BrokenPipeError)
            unreachable = isinstance(err, urllib.error.URLError) and not reset
            raise _TryAgain(f"no connection ({_reason(cause)})", unreachable=unreachable) from None

    def _refused(self, err: urllib.error.HTTPError, body: str) -> Exception:
        """What an HTTP status means: for all images, for this one, or for now."""
        if self._key:  # before it is cut: half a key is none to look for
            body = body.replace(self._key, "***")
        said = " ".join(body.split())[:200]
        what = f"HTTP {err.code}" + (f": {said}" if said else "")
        code = 402 if err.code == 429 and NO_CREDIT in body else err.code
        if code in REFUSED or 300 <= code < 400:
            why = REFUSED.get(code, "it redirects; give the address it redirects to")
            return BackendError(f"{self.url}: {why} ({what}); the key is read from {KEY_VARIABLE}")
        if code not in RETRIED:
            return _OtherLimit(what) if NEWER_LIMIT in body else CaptionFailed(what)
        self._hold_back(_seconds_asked(err.headers))
        return _TryAgain(what)

    def _hold_back(self, seconds: float | None) -> None:
        """Let no thread send a request for so many seconds (None: no pause is asked for); `_wait` sleeps it off."""
        if seconds is None:
            return
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection would take the key and the images to somebody else."""

    def redirect_request(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str) -> None:
        return None


def _url(endpoint: str) -> str:
    parts = urllib.parse.urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BackendError(f"--endpoint {endpoint}: not an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise BackendError(f"--endpoint: give an address without user, password or ?query; the key is read from {KEY_VARIABLE}")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/chat/completions') else path + '/chat/completions'}"


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise BackendError(f"{KEY_VARIABLE}: holds a character that no key has")
    return key


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """The whole answer, up to the deadline: the socket's own timeout starts again with every byte."""
    parts: list[bytes] = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if sum(map(len, parts)) > MAX_ANSWER_BYTES:
            raise CaptionFailed(f"an answer of over {MAX_ANSWER_BYTES:,} bytes")
    return b"".join(parts)


def _head_of(err: urllib.error.HTTPError, deadline: float) -> str:
    """The begin of what an error says of itself, as far as that arrives in time."""
    said = b""
    with suppress(OSError, HTTPException):
        while len(said) < 1000 and time.monotonic() < deadline and (part := err.read1(1000)):
            said += part
    return said[:1000].decode("utf-8", "replace")


def _answer(data: bytes) -> Written:
    try:
        choice = json.loads(data)["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise _TryAgain("an answer that is not a chat completion, or was cut short") from None
    if reason == "content_filter":
        raise CaptionFailed("the endpoint's content filter held the answer back")
    if isinstance(content, list):  # in parts, as some endpoints answer
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str) or not content.strip():
        if reason == "length":  # spent on thoughts that are not shown
            raise CaptionFailed("no answer within the token limit; raise --max-tokens")
        raise _TryAgain("an empty answer")
    if not is_utf8(content):  # half of an emoji, say: no file of captions that holds it could be read
        raise CaptionFailed("the answer is not Unicode text")
    return without_thoughts(Written(content.strip(), complete=reason != "length"))


def _seconds_asked(headers: Message) -> float | None:
    """How long an error asks us to wait: Retry-After in seconds or as a date, else the rate limit's reset."""
    milliseconds, after = _number(headers.get("retry-after-ms")), headers.get("retry-after")
    if milliseconds is not None:
        return milliseconds / 1000
    if (seconds := _number(after)) is not None:
        return seconds
    try:
        return max(parsedate_to_datetime(after or "").timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):  # no date either
        return _seconds_until_reset(headers)


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"\s*\d+(\.\d*)?\s*", text) else None


def _seconds_until_reset(headers: Message) -> float | None:
    """The time until there is room again for requests and tokens, if there is none left (x-ratelimit-*)."""
    waits = []
    for kind in ("requests", "tokens"):
        found = DURATION.fullmatch(headers.get(f"x-ratelimit-reset-{kind}", "") or "")
        if headers.get(f"x-ratelimit-remaining-{kind}") == "0" and found is not None and any(found.groups()):
            hours, minutes, seconds, milliseconds = (float(part or 0) for part in found.groups())
            waits.append(3600 * hours + 60 * minutes + seconds + milliseconds / 1000)
    return max(waits, default=None)


def _reason(cause: object) -> str:
    return (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
