"""The loop: it knows steps, checkpoints and signals, and nothing of what is being trained."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from texttok_cli.config.schema import Recipe
from texttok_cli.training.engine import Engine
from texttok_cli.training.optim import lr_scale, set_lr
from texttok_cli.training.run import RunFolder


class Task(Protocol):
    """What the loop asks of a task."""

    optimizers: list[Optimizer]

    def step(self, images: Tensor, indices: list[int], step: int) -> dict[str, Tensor]:
        """One optimizer step."""

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take saved tensors back."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state of the last whole step is saved."""


def train(
    recipe: Recipe,
    task: Task,
    engine: Engine,
    run: RunFolder,
    batches: Callable[[int], Iterator[Any]],
    validate: Callable[[], dict[str, float]],
    on_step: Callable[[int, dict[str, float]], None],
) -> int:
    """Train to the recipe's last step, from the newest state in the run folder; returns the step it began at.

    `batches(k)` yields batches with `images` and `indices` from the k-th on. Raises Interrupted after saving when
    a signal asks to leave.
    """
    cfg = recipe.training
    begin, tensors = run.load_state(task.optimizers)
    if tensors:
        task.load_state(tensors)
    if engine.is_main:
        run.rewind_log(begin)
    stop = _StopSignal()
    stream = batches(begin)
    clock, images = time.perf_counter(), 0
    for step in range(begin, recipe.schedule.steps):
        batch = next(stream)
        scale = lr_scale(step, recipe.schedule)
        set_lr(task.optimizers, scale)
        values = task.step(batch.images, batch.indices.tolist(), step)
        done = step + 1
        images += cfg.batch_size
        last = done == recipe.schedule.steps
        if done % cfg.log_every == 0 or last:
            means = engine.mean(values)
            now = time.perf_counter()
            record = {"step": done, "images": done * cfg.batch_size, **means, "lr_scale": scale, "images_per_s": images / (now - clock)}
            clock, images = now, 0
            if engine.is_main:
                run.log(record)
            on_step(done, record)
        else:
            on_step(done, {})
        if done % cfg.save_every == 0 or last or stop.requested:
            if engine.is_main:
                run.save_state(done, task.state(), task.optimizers)
            engine.wait()
        if stop.requested and not last:
            raise Interrupted(f"stopped at step {done}; the same command goes on from there")
        if engine.is_main and (done % cfg.val_every == 0 or last):
            before = time.perf_counter()
            run.log({"step": done, **validate()})
            clock += time.perf_counter() - before
    return begin


class _StopSignal:
    """Remembers that SIGINT or SIGTERM came, so that the step under way ends and is saved; a second one acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number: int, frame: Any) -> None:
        self.requested = True
        for s, handler in self._previous.items():
            signal.signal(s, handler)
