"""What the engine says of one process: parts of a batch, and draws that are a function of seed, step and process."""

from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch

from texttok_cli.config.loader import load_recipe
from texttok_cli.errors import BackendError
from texttok_cli.training.engine import Engine
from texttok_cli.training.loop import Interrupted


@pytest.fixture
def engine(recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., Engine]:
    return lambda *overrides: Engine(load_recipe(str(recipe_file()), overrides).training, out=tmp_path, device="cpu")


def test_processes_that_would_each_train_alone_are_refused(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a launcher on a Mac, which has an accelerator, but none that processes can train on together."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(BackendError, match=r"^2 processes can't train together on \w+: start one, or add --device cpu$"):
        Engine(load_recipe(str(recipe_file()), []).training, out=tmp_path, device="auto")


def test_one_process_trains_on_one_device_and_then_on_another(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = load_recipe(str(recipe_file()), []).training
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with monkeypatch.context() as on_a_mac:
        on_a_mac.setenv("ACCELERATE_TORCH_DEVICE", "mps")
        assert Engine(cfg, out=tmp_path, device="auto").device.type == "mps"
    assert Engine(cfg, out=tmp_path, device="cpu").device.type == "cpu"


def test_fp32_is_not_rounded_by_accelerate(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_gpu(**how: object) -> object:
        torch.backends.cuda.matmul.allow_tf32 = True  # as it does on one for a model that is compiled
        return accelerate.Accelerator(**how)

    monkeypatch.setattr("texttok_cli.training.engine.Accelerator", on_a_gpu)
    engine("training.precision=fp32", "training.compile=true")
    assert torch.backends.cuda.matmul.fp32_precision != "tf32" and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_batch_is_seen_whole_in_equal_parts_and_its_numbers_are_means(parts: int, engine: Callable[..., Engine]) -> None:
    x, seen = torch.arange(12.0) ** 2, []

    def backward(part: slice) -> dict[str, torch.Tensor]:
        seen.append(x[part])
        return {"mean": x[part].mean(), "largest": x[part].max()}

    values = engine().accumulate(torch.nn.Linear(1, 1), 12, parts, backward)
    assert [len(part) for part in seen] == [12 // parts] * parts and torch.equal(torch.cat(seen), x)
    assert float(values["mean"]) == pytest.approx(float(x.mean()))
    assert float(values["largest"]) == pytest.approx(sum(float(part.max()) for part in x.chunk(parts)) / parts)


def test_what_a_step_draws_is_its_own(engine: Callable[..., Engine]) -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        one = engine(f"training.seed={seed}")
        one.rank = rank
        one.seed_step(step)
        return float(torch.rand((), dtype=torch.float64))

    numbers = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 4096) for rank in (0, 1)]
    drawn = [draw(*number) for number in numbers]
    assert len(set(drawn)) == len(numbers) and drawn == [draw(*number) for number in numbers]


def test_what_wraps_the_model_is_gone_when_the_run_leaves_its_process_group(engine: Callable[..., Engine]) -> None:
    """Else DDP may be the last to know the group, and end in a deadlock with gloo's threads."""
    one, model = engine("training.compile=true"), torch.nn.Linear(1, 1)
    wrapped = one.prepare(model, [])
    assert wrapped.training and wrapped._orig_mod is model
    with one.finishing(together=Interrupted):
        assert wrapped.training
    with pytest.raises(ReferenceError):
        wrapped.training  # noqa: B018
