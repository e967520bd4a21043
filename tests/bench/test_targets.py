"""What is compared does the same work, and a ratio that can't be had here does not end the run."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from texttok_cli.bench import generate, program, targets
from texttok_cli.bench.networks import DoesNotFit, Where
from texttok_cli.bench.results import Target
from texttok_cli.bench.task import Task
from texttok_cli.bench.timing import Spread, spread_of
from texttok_cli.bench.training import bare_step, timed_recipe, training_step
from texttok_cli.diffusion import Sampling, parse_cfg
from texttok_cli.errors import BackendError
from texttok_cli.metrics.inception import FidInception

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
        program._resident("encode", "none.png", "--quiet")


def test_memory_of_a_run_is_seen_from_its_start_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "texttok_cli"  # in the place of the program: it holds 200 MB more in its second half
    stand_in.mkdir()
    (stand_in / "__init__.py").touch()
    (stand_in / "__main__.py").write_text("import time\ntime.sleep(1.5)\nmore = bytearray(b'x') * 200_000_000\ntime.sleep(1.5)\n")
    monkeypatch.chdir(tmp_path)
    seen = program._resident()
    half = len(seen) // 2
    assert len(seen) > 6 and median(seen[half + 2 :]) - median(seen[: half - 1]) == pytest.approx(200, rel=0.05)


# ------------------------------------------------------------------ ratios, on a machine that takes as long as a test says


class Clockwork:
    """A timer that runs nothing: `turns` are what it finds one after the other, `cost` says how long a work takes."""

    repeats, clock = 3, "wall"

    def __init__(self, *turns: dict[str, list[float]], cost: Callable[[Any], float] = lambda work: 0.5) -> None:
        self.turns, self.cost = list(turns), cost

    def in_turns(self, works: Mapping[str, object]) -> dict[str, list[float]]:
        found = self.turns.pop(0)
        assert found.keys() == works.keys()
        return found

    def measure(self, work: Any) -> Spread:
        return spread_of([self.cost(work)])


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Target]]:
    """What a part finds by such a timer on a device; meta stands for a GPU."""
    for module in (targets, generate):
        monkeypatch.setattr(module, "check_fits", lambda *needed: None)

    def run(part: Callable[[Task], Iterator[Target]], timer: Clockwork, device: str) -> dict[str, Target]:
        monkeypatch.setattr(targets, "Timer", lambda *given, **more: timer)
        where = Where(torch.device(device), "bf16")
        task = Task(where, timer, [512], [32], [8, 4], "XL", Sampling("ddim", 50, parse_cfg("1.5")))  # type: ignore[arg-type]
        return {target.name: target for target in part(task)}

    return run


def test_the_tokenizer_s_rate_is_compared_with_the_rate_of_products_in_the_same_turn(
    reached: Callable[..., dict[str, Target]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "count_flops", lambda cfg: (-1, 3e11))  # encode and decode of one image
    seconds = {"ours": [2.0, 40.0, 3.0], "plain fp32": [8.0, 80.0, 9.0], "bf16": [0.5, 8.0, 0.3], "fp32": [1.0, 5.0, 2.0]}
    found = reached(targets._tokenizer, Clockwork(seconds), "meta")
    flops = 2 * 32 * (1024 + 32 + 128) * 12 * 768**2  # of a block's four linear layers on 32 images
    assert found["matmul rate, bf16"].reached == pytest.approx(flops / 0.5 / 1e9)
    assert found["matmul rate, fp32"].reached == pytest.approx(flops / 2 / 1e9)
    share = median(32 * 3e11 / ours / (flops / product) for ours, product in zip(seconds["ours"], seconds["bf16"], strict=True))
    assert found["tokenizer over the bf16 matmul rate"].reached == pytest.approx(share)
    assert found["tokenizer over a straightforward one"].reached == 3  # 4, 2 and 3 times as fast
    assert found["tokenizer, encode + decode"].reached == pytest.approx(32 / 3)


def test_the_sampler_s_share_is_what_a_run_takes_above_its_forward_passes(
    reached: Callable[..., dict[str, Target]], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [{"sample": [11.0, 60.0, 9.0], "forward": [0.2, 1.0, 0.3]}, {"sample": [8.0], "forward": [0.1]}]
    assert reached(targets._sampler, Clockwork(*both), "meta").popitem()[1].reached == pytest.approx(60)
    monkeypatch.setattr(targets, "untrained_dit", lambda cfg, where: None)  # half a minute's worth of weights
    for name in ("guided_forward", "guided_sampling"):
        monkeypatch.setattr(targets, name, lambda *given: None)
    found = reached(targets._sampler, Clockwork({"sample": [11.0, 60.0, 9.0], "forward": [2.5, 12.0, 2.5]}), "cpu")
    assert found["sampler over the bare forward"].reached == pytest.approx(10)  # 4 steps
    both = [{"sample": [60.0], "forward": [1.0]}, {"sample": [60.0], "forward": [1.0]}]
    assert reached(targets._sampler, Clockwork(*both), "mps")["sampler over the bare forward"].reached == pytest.approx(20)  # 50 steps
    monkeypatch.setattr(targets, "captured", lambda work: work)
    assert "sampler over the captured forward" in reached(targets._sampler, Clockwork(*both), "cuda")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_generation_at_equal_steps_is_of_one_image_from_the_first_step_to_its_pixels(
    device: str, reached: Callable[..., dict[str, Target]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part of a batch and of the steps is run: 2 s a step and 3 s to decode for TexTok, 20 s and 11 s for SD-VAE."""
    monkeypatch.setattr(targets, "untrained_dit", lambda cfg, where: cfg.latents.kind)
    monkeypatch.setattr(targets, "guided_sampling", lambda kind, batch, how, where: {"tokens": 2, "grid": 20}[kind] * batch * how.steps)
    monkeypatch.setattr(targets, "sd_vae_work", lambda part, size, where: lambda batch: 11 * batch)
    decoded = {"cpu": 3, "meta": 32}[device]  # 4,096 rows of matrices are 3 images
    monkeypatch.setattr(targets, "texttok_work", lambda half, cfg, where: {decoded: 3 * decoded}.__getitem__)
    found = reached(targets._equal_steps, Clockwork(cost=lambda work: work), device)
    theirs, begin = 250 * 20 + 11, "TexTok-32 + DiT-XL over SD-VAE + DiT-XL/2, "
    assert found[f"{begin}250 steps each"].reached == pytest.approx(theirs / (250 * 2 + 3))
    assert found[f"{begin}50 steps against 250"].reached == pytest.approx(theirs / (50 * 2 + 3))
    assert found[f"{begin}20 steps of a second-order multistep solver against 250"].reached == pytest.approx(theirs / (20 * 2 + 3))
    assert found["TexTok-32 + DiT-XL, one guided step, 512 px"].reached == pytest.approx(2)
    assert found["SD-VAE + DiT-XL/2, one guided step, 512 px"].reached == pytest.approx(20)


def test_training_is_compared_with_bare_steps_and_with_its_loader(
    reached: Callable[..., dict[str, Target]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("training_step", "bare_step"):
        monkeypatch.setattr(targets, name, lambda *given: None)
    tokenizer, generator = {"whole": [12.0, 60.0, 10.0], "bare": [10.0, 40.0, 8.0]}, {"whole": [1.1], "bare": [1.0]}
    found = reached(targets._training, Clockwork(tokenizer, generator), "cpu")
    assert found["tokenizer's training step over a bare one"].reached == pytest.approx(25)
    assert found["loader over the training step"].reached == pytest.approx(24)  # a batch is loaded in half a second
    assert found["DiT's training step over a bare one"].reached == pytest.approx(10)


def test_an_evaluation_s_share_is_what_inception_alone_would_take(
    reached: Callable[..., dict[str, Target]], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = SimpleNamespace(inception=FidInception.__new__(FidInception))
    monkeypatch.setattr(targets, "Evaluator", lambda *given, **more: network)
    monkeypatch.setattr(targets, "POOL_DIM", 8)
    turns = {"whole": [10.0, 50.0, 4.0], "bare": [8.0, 45.0, 3.0]}, {"ours": [2.0], "sqrtm": [9.0]}
    found = reached(targets._evaluation, Clockwork(*turns), "cpu")
    assert found["evaluation over bare Inception"].reached == pytest.approx(80)
    assert found["Fréchet distance over scipy's sqrtm"].reached == 4.5
    assert found["statistics"].reached == 2048
