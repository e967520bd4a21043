"""The loop with a task that only notes what it is asked: rates, batches and numbers by step, what is saved, and what a run goes on with."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import QUIET

from texttok_cli.config.loader import load_recipe
from texttok_cli.errors import BackendError, TrainingError
from texttok_cli.training import loop
from texttok_cli.training.engine import Engine
from texttok_cli.training.guard import Guard
from texttok_cli.training.run import RunFolder

SCALES = [0.5, 1.0, 1.0, 0.5 + 2**0.5 / 4, 0.5, 0.5 - 2**0.5 / 4]  # two steps of warm-up, then a cosine over four


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = staticmethod(time.monotonic)


class Noting:
    """A task whose steps take 2 s each, that has one number as its state, and whose gradients are bad at some steps."""

    def __init__(self, clock: Clock, *, bad: Callable[[int], bool] = lambda step: False, fail_at: int | None = None) -> None:
        self.clock, self.bad, self.fail_at = clock, bad, fail_at
        self.weight, self.guard = torch.nn.Parameter(torch.zeros(2)), Guard(spike=None)
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD([self.weight], lr=0.1, momentum=0.5)]
        self.optimizers[0].param_groups[0]["base_lr"] = 0.1
        self.steps: list[tuple[int, int, float]] = []
        self.number = 0

    def step(self, batch: int, step: int) -> dict[str, torch.Tensor]:
        if step == self.fail_at:
            raise ConnectionError
        self.clock.now += 2
        self.steps.append((batch, step, self.optimizers[0].param_groups[0]["lr"]))
        if self.guard.accepts(torch.tensor(float("nan") if self.bad(step) else 1.0)):
            self.number += 1
        return {"loss": torch.tensor(10.0 * step)}

    def state(self) -> dict[str, torch.Tensor]:
        return {"number": torch.tensor(self.number)}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        self.number = int(tensors["number"])


@pytest.fixture
def train(recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Trains a noting task; the task, the lines of the log, and the steps whose state was saved."""
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)

    def run(*overrides: str, export_fails: bool = False, signal_at: int | None = None, **how: Any) -> SimpleNamespace:
        recipe = load_recipe(str(recipe_file()), ["training.log_every=2", "training.val_every=3", *overrides])
        folder, engine, task = RunFolder(tmp_path), Engine(recipe.training, out=tmp_path, device="cpu"), Noting(clock, **how)
        saved: list[int] = []
        honest = folder.save_state
        monkeypatch.setattr(folder, "save_state", lambda step, tensors: saved.append(step) or honest(step, tensors))

        def batches(start: int) -> Iterator[int]:
            return count(start)

        def validate(step: int, stopping: Callable[[], bool]) -> dict[str, float]:
            clock.now += 1000
            if step == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
                assert stopping()
            return {"val_psnr": float(step)}

        def export(path: Path, step: int) -> None:
            if export_fails:
                raise ConnectionError
            clock.now += 1000
            path.parent.mkdir(exist_ok=True)
            path.write_text(str(step))
            found.exported.append((path.relative_to(tmp_path).as_posix(), step))

        found = SimpleNamespace(task=task, saved=saved, exported=[], lines=[])
        with suppress(ConnectionError, loop.Interrupted):
            loop.train(recipe, task, engine, folder, batches, validate, export, QUIET)
        found.lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return found

    return run


def test_a_step_has_its_rate_and_its_batch_and_the_log_has_both_with_the_time_of_training_alone(train: Callable[..., Any]) -> None:
    found = train()
    assert [(batch, step) for batch, step, _ in found.task.steps] == [(i, i) for i in range(6)]
    assert [rate for *_, rate in found.task.steps] == pytest.approx([0.1 * scale for scale in SCALES])
    numbers = [line for line in found.lines if "loss" in line]
    expected = [
        {"step": done, "images": 4 * done, "loss": 10 * (done - 1), "lr_scale": SCALES[done - 1], "images_per_s": 4 / 2}
        for done in (2, 4, 6)
    ]
    assert [line.keys() for line in numbers] == [line.keys() for line in expected]
    for line, wanted in zip(numbers, expected, strict=True):
        assert line == pytest.approx(wanted)
    assert [line for line in found.lines if "loss" not in line] == [{"step": n, "val_psnr": n} for n in (3, 6)]
    assert found.saved == [2, 4, 6]
    assert found.exported == [("model.safetensors", 6)]


def test_a_run_that_was_cut_off_goes_on_at_the_saved_step_with_its_batch_and_its_log(train: Callable[..., Any]) -> None:
    every = ("training.log_every=1", "training.save_every=4")
    assert train(*every, fail_at=5).saved == [4]
    found = train(*every)
    assert [(batch, step) for batch, step, _ in found.task.steps] == [(4, 4), (5, 5)] and found.task.number == 6
    assert [rate for *_, rate in found.task.steps] == pytest.approx([0.1 * scale for scale in SCALES[4:]])
    assert [line["step"] for line in found.lines] == [1, 2, 3, 3, 4, 5, 6, 6]  # validated twice
    assert [line["images_per_s"] for line in found.lines if "loss" in line] == pytest.approx([2] * 6)


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_cuts_a_validation_off_and_the_next_run_makes_it(train: Callable[..., Any], step: int) -> None:
    every = ("training.log_every=1", "training.save_every=2")
    found = train(*every, signal_at=step)
    assert found.saved[-1] == step == found.task.number and found.exported == []
    assert [line["step"] for line in found.lines if "val_psnr" in line] == [3] * (step > 3)
    found = train(*every, signal_at=step)  # as it goes on, too
    assert (found.task.steps, found.saved, found.exported) == ([], [], [])
    found = train(*every)
    assert [line["step"] for line in found.lines if "val_psnr" in line] == [3, 6]
    assert [line["step"] for line in found.lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert found.task.number == 6 and found.exported == [("model.safetensors", 6)]


def test_models_of_earlier_steps_are_kept_as_asked_also_one_whose_writing_was_cut_off(train: Callable[..., Any]) -> None:
    every = ("training.export_every=2", "training.save_every=2", "training.log_every=1")
    assert train(*every, export_fails=True).exported == []
    found = train(*every)
    assert [step for _, step, _ in found.task.steps] == [2, 3, 4, 5]
    of_step = "models/step-{:08d}.safetensors"
    assert found.exported == [(of_step.format(2), 2), (of_step.format(4), 4), ("model.safetensors", 6)]
    assert [line["images_per_s"] for line in found.lines if "loss" in line] == pytest.approx([2] * 6)  # of training alone


def test_weights_after_a_bad_step_do_not_replace_saved_ones(train: Callable[..., Any]) -> None:
    found = train("training.save_every=1", bad=lambda step: step in (1, 3))
    assert found.saved == [1, 3, 5, 6]


def test_rolling_back_is_allowed_again_once_a_state_was_saved(train: Callable[..., Any]) -> None:
    """Five times in all: batches and steps go on, and the state is that of before each three bad steps."""
    found = train("training.save_every=1", "schedule.steps=30", bad=lambda step: step % 6 > 2)
    assert [(batch, step) for batch, step, _ in found.task.steps] == [(i, i) for i in range(30)]
    assert found.task.number == 15 and found.task.guard.skipped == 15
    assert found.saved == [*(step for step in range(1, 30) if (step - 1) % 6 < 3), 30]


def test_a_roll_back_is_to_the_newest_saved_weights(train: Callable[..., Any]) -> None:
    found = train("training.save_every=2", "schedule.steps=8", bad=lambda step: 2 < step < 6)
    assert found.task.number == 2 + 2  # of steps 0 and 1, which were saved, and of 6 and 7
    assert found.saved == [2, 8]


def test_three_roll_backs_without_a_new_state_are_all(train: Callable[..., Any]) -> None:
    with pytest.raises(TrainingError, match=r"diverged at step 13: .* rolled back to step 1 3 times"):
        train("training.save_every=1", "schedule.steps=30", bad=lambda step: step > 0)


def test_a_device_without_memory_is_no_damaged_state(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On MPS torch raises a plain RuntimeError, as it does for a tensor of another shape."""
    train("schedule.steps=2")

    def fail(self: Noting, *given: object) -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 8.89 GB)")

    monkeypatch.setattr(Noting, "load_state", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train("schedule.steps=2")
    monkeypatch.setattr(Noting, "load_state", lambda self, tensors: None)
    monkeypatch.setattr(Noting, "step", fail)
    with pytest.raises(BackendError, match="out of memory: go on with a higher"):
        train("schedule.steps=3")
