"""The loop: it knows steps, checkpoints and signals, and nothing of what is being trained."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from texttok_cli.config.recipe import Recipe
from texttok_cli.errors import BackendError, CheckpointError, TrainingError
from texttok_cli.models.devices import out_of_memory
from texttok_cli.training.engine import Engine
from texttok_cli.training.guard import Guard
from texttok_cli.training.optim import lr_scale, set_lr
from texttok_cli.training.report import Reporter
from texttok_cli.training.run import RunFolder, optimizer_tensors

MAX_ROLL_BACKS = 3  # without a newly saved state in between
ONE_REQUEST = 2.0  # seconds

# Of a step: numbers by their names. It may end early once the function that it is given says that the run is to stop.
Validate = Callable[[int, Callable[[], bool]], dict[str, float]]


class Task(Protocol):
    """What the loop asks of a task."""

    optimizers: list[Optimizer]
    guard: Guard

    def step(self, batch: Any, step: int) -> dict[str, Tensor]:
        """One optimizer step on one of the batches it is given."""

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
    validate: Validate,
    export: Callable[[Path, int], None],
    report: Reporter,
) -> None:
    """Train to the recipe's last step, from the newest state in the run folder, and write the model.

    `batches(k)` yields batches from the k-th on; `validate` and `export(path, step)` are called in every process.
    Raises Interrupted after saving when a signal asks to leave, TrainingError when steps stay bad (see Guard) or the state is not
    of this data or not seen by all processes, BackendError without enough memory.
    """
    begin = _resume(task, engine, run)
    missed = begin > 0 and _validates(recipe, begin) and engine.any(engine.is_main and not run.validated(begin))
    try:
        with _StopSignal() as stop:
            if missed and _validate(begin, validate, engine, run, stop):  # the run was cut off between saving and validating
                raise _stopped(begin)
            if _exports(recipe, begin) and engine.any(engine.is_main and not run.model_at(begin).exists()):
                export(run.model_at(begin), begin)
            _steps(recipe, task, engine, run, batches(begin), begin, validate, export, report, stop)
            export(run.model_path, recipe.schedule.steps)
    except RuntimeError as err:
        if not out_of_memory(err):
            raise
        raise BackendError("out of memory: go on with a higher training.accumulate or training.checkpointing=true") from None


def _resume(task: Task, engine: Engine, run: RunFolder) -> int:
    """Take back the newest state, if there is one; the step it is of."""
    # Before anything is loaded: shards are made of it by all processes together.
    if engine.any(run.newest_step != engine.of_main(run.newest_step)):
        raise TrainingError(f"{run.path}: not all processes see the same saved state; it must lie on a file system that all share")
    begin, tensors = run.load_state(task.optimizers)
    if tensors:
        try:
            task.load_state(tensors)
        except (KeyError, RuntimeError) as err:  # a tensor that is missing, or of another shape
            if isinstance(err, RuntimeError) and out_of_memory(err):
                raise
            raise CheckpointError(
                f"{run.state_path}: its state of step {begin} is damaged; remove it, or the whole {run.path} to start again"
            ) from err
    if engine.is_main:
        run.rewind_log(begin)
    return begin


def _steps(
    recipe: Recipe,
    task: Task,
    engine: Engine,
    run: RunFolder,
    stream: Iterator[Any],
    begin: int,
    validate: Validate,
    export: Callable[[Path, int], None],
    report: Reporter,
    stop: _StopSignal,
) -> None:
    cfg, steps = recipe.training, recipe.schedule.steps
    clock, roll_backs = _Clock(begin), 0
    for done, batch in zip(range(begin + 1, steps + 1), stream, strict=False):
        scale = lr_scale(done - 1, recipe.schedule)
        set_lr(task.optimizers, scale)
        values = task.step(batch, done - 1)
        record = {}
        if done % cfg.log_every == 0 or done == steps:
            rate = clock.lap(done) * cfg.batch_size
            record = {"step": done, "images": done * cfg.batch_size, **engine.mean(values), "lr_scale": scale, "images_per_s": rate}
            _log(record, engine, run)
        report.progress("training", done, steps, record)
        rolling_back = task.guard.wants_roll_back
        if rolling_back:
            roll_backs += 1
            _roll_back(task, run, done, roll_backs)
        stopping = engine.any(stop.requested)
        due = done % cfg.save_every == 0 and not rolling_back and task.guard.in_a_row == 0  # weights in doubt don't replace good ones
        if saving := due or stopping or done == steps:
            roll_backs = 0
            _save(done, task, engine, run)
        if stopping and done < steps:
            raise _stopped(done)
        if _validates(recipe, done):
            with clock.paused():
                cut_off = _validate(done, validate, engine, run, stop)
            if cut_off:
                if not saving:
                    _save(done, task, engine, run)
                raise _stopped(done)
        if _exports(recipe, done):
            with clock.paused():
                export(run.model_at(done), done)


def _validates(recipe: Recipe, step: int) -> bool:
    return step % recipe.training.val_every == 0 or step == recipe.schedule.steps


def _exports(recipe: Recipe, step: int) -> bool:
    """Whether a model is kept of this step; that of the last is the run's own."""
    every = recipe.training.export_every
    return every is not None and step % every == 0 and 0 < step < recipe.schedule.steps


def _validate(step: int, validate: Validate, engine: Engine, run: RunFolder, stop: _StopSignal) -> bool:
    """Whether a signal cut it off: on a large set it may take longer than a scheduler waits. The resumed run does it again."""
    validated = validate(step, lambda: stop.requested)
    if validated and not stop.requested:
        _log({"step": step, **validated}, engine, run)
    return engine.any(stop.requested)


def _save(step: int, task: Task, engine: Engine, run: RunFolder) -> None:
    state = engine.gathered(task.state() | optimizer_tensors(task.optimizers))
    if engine.is_main:
        run.save_state(step, state)
    engine.wait()


def _stopped(step: int) -> Interrupted:
    return Interrupted(f"stopped at step {step}; the same command resumes from there")


def _log(record: dict[str, float], engine: Engine, run: RunFolder) -> None:
    if engine.is_main:
        run.log(record)
        engine.track(record, int(record["step"]))


def _roll_back(task: Task, run: RunFolder, step: int, times: int) -> None:
    """Take weights and optimizers from the newest saved state; the schedule and the data go on, past what did the harm."""
    skipped = int(task.guard.skipped)
    saved, tensors = run.load_state(task.optimizers)
    if not tensors or times > MAX_ROLL_BACKS:
        why = "no state is saved yet" if not tensors else f"rolled back to step {saved} {MAX_ROLL_BACKS} times"
        raise TrainingError(f"{run.path}: diverged at step {step}: gradients not finite or too large, and {why}; lower optimizer.lr")
    task.load_state(tensors)
    task.guard.reset(skipped)


class _Clock:
    """Steps a second since the last lap, pauses left out."""

    def __init__(self, step: int) -> None:
        self._step, self._since = step, time.perf_counter()

    def lap(self, step: int) -> float:
        now = time.perf_counter()
        rate = (step - self._step) / (now - self._since)
        self._step, self._since = step, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before


class _StopSignal:
    """Remembers that SIGINT or SIGTERM came, so that the step under way ends and is saved; a later one acts at once.

    One that follows within ONE_REQUEST seconds is the same request: schedulers signal every process, and torchrun passes its own on.
    """

    def __init__(self) -> None:
        self._requested_at: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignal:
        self._previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    @property
    def requested(self) -> bool:
        """Whether the run is to stop."""
        return self._requested_at is not None

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at = now
        elif now - self._requested_at > ONE_REQUEST:
            self.__exit__()
            signal.raise_signal(number)
