"""A chat-completions endpoint on this machine that behaves as each test wants it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

Answer = Callable[["Handler", int], None]


class Handler(BaseHTTPRequestHandler):
    """Answers request number i (from 0) as the plan says, the last entry for all that follow."""

    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        endpoint: Served = self.server.endpoint
        with endpoint.lock:
            number = len(endpoint.requests)
            endpoint.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
        endpoint.plan[min(number, len(endpoint.plan) - 1)](self, number)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclass
class Served:
    url: str
    plan: list[Answer] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def says(text: str, reason: str = "stop", headers: dict[str, str] | None = None) -> Answer:
    """A completion."""
    body = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}
    return lambda handler, number: handler.send(200, json.dumps(body).encode(), headers)


def fails(status: int, text: str = "", headers: dict[str, str] | None = None) -> Answer:
    return lambda handler, number: handler.send(status, text.encode(), headers)


def raw(body: bytes, length: int | None = None) -> Answer:
    """Any bytes with status 200; a larger Content-Length than they have is a connection that was cut."""
    return lambda handler, number: handler.send(200, body, length=length)
