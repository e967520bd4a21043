"""What is compared does the same work, and a ratio that can't be had here does not end the run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from texttok_cli.bench import program, targets
from texttok_cli.bench.results import Target
from texttok_cli.bench.subjects import DoesNotFit, Where
from texttok_cli.bench.training import bare_step, timed_recipe, training_step
from texttok_cli.errors import BackendError

PARTS = ("_tokenizer", "_sampler", "_equal_steps", "_training", "_evaluation", "start", "memory")


def test_a_part_that_can_t_be_measured_is_said_and_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(error: Exception | None) -> object:
        def found(task: object) -> Iterator[Target]:
            yield Target(name="a number", reached=1.0)
            if error is not None:
                raise error

        return found

    errors = [None, DoesNotFit("needs 9 GB"), None, BackendError("no weights"), None, None, None]
    for name, error in zip(PARTS, errors, strict=True):
        monkeypatch.setattr(targets, name, part(error))
    found = list(targets.targets(None))  # type: ignore[arg-type]
    assert sum(target.reached == 1.0 for target in found) == len(PARTS)
    assert [(target.name, target.note) for target in found if target.reached is None] == [
        ("sampler", "needs 9 GB"),
        ("training", "no weights"),
    ]


def test_the_bare_step_trains_as_the_program_s_does(tmp_path: Path) -> None:
    """Equal losses in the first steps: the same model, batch and update."""
    where = Where(torch.device("cpu"), "fp32")
    recipe = timed_recipe("tiny/texttok-32-128", 2, where)
    whole, bare = training_step(recipe, tmp_path, where), bare_step(recipe, where)
    losses = [(float(whole()["l2"]), float(bare())) for _ in range(3)]  # type: ignore[index, arg-type]
    assert [ours for ours, _ in losses] == pytest.approx([theirs for _, theirs in losses], rel=1e-4)
    assert losses[2][0] < 0.99 * losses[0][0]


def test_the_generator_s_bare_step_is_of_the_same_model(tmp_path: Path) -> None:
    """Times and noise are others, so the losses are only near; zero-initialised, the first is that of predicting no noise, 1."""
    where = Where(torch.device("cpu"), "fp32")
    recipe = timed_recipe("tiny/class-32-128", 16, where)
    whole, bare = training_step(recipe, tmp_path, where), bare_step(recipe, where)
    values, loss = whole(), bare()
    assert float(values["mse"]) == pytest.approx(1, abs=0.05)  # type: ignore[index]
    assert float(loss) == pytest.approx(float(values["loss"]), rel=0.3)  # type: ignore[index, arg-type]
    assert float(bare()) < float(loss)  # type: ignore[arg-type]


def test_a_program_that_fails_is_no_time() -> None:
    with pytest.raises(BackendError, match="failed: exit code 3"):
        program._seconds("-c", "raise SystemExit(3)")
    with pytest.raises(BackendError, match=r"failed: .*no weights$") as caught:
        program._seconds("-c", "raise OSError('no weights')")
    assert "\n" not in str(caught.value)
    with pytest.raises(BackendError, match=r"failed: none\.png: "):  # the program's own line, without a traceback of ours behind it
        program._peak("encode", "none.png", "--quiet")
