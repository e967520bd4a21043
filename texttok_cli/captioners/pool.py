"""Several calls under way at the same time, each in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from texttok_cli.errors import BackendError

T = TypeVar("T")
R = TypeVar("R")


def concurrently(call: Callable[[T], R], todo: Sequence[T], limit: int) -> Iterator[tuple[int, R]]:
    """The place in `todo` and the result of each call, as they come; at most `limit` run at once. What a call raises is raised here.

    The threads are daemons: an interrupted run does not wait for the calls that are under way.
    """
    waiting: queue.SimpleQueue[tuple[int, T]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, R] | Exception] = queue.SimpleQueue()
    stopped = threading.Event()
    for entry in enumerate(todo):
        waiting.put(entry)

    def work() -> None:
        while not stopped.is_set():
            try:
                place, task = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((place, call(task)))
            except Exception as err:  # raised again below, where somebody hears of it
                done.put(err)

    for _ in range(min(limit, len(todo))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in todo:
            outcome = done.get()
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome
    finally:
        stopped.set()


def in_order(results: Iterator[tuple[int, R]]) -> Iterator[R]:
    """Results by their places, 0, 1, ...; one that waits for an earlier one is not lost if that never comes."""
    waiting: dict[int, R] = {}
    turn = 0
    try:
        for place, result in results:
            waiting[place] = result
            while turn in waiting:
                yield waiting.pop(turn)
                turn += 1
    except (BackendError, KeyboardInterrupt, SystemExit):
        yield from (waiting[place] for place in sorted(waiting))
        raise
