"""Training in this process, and what it leaves in its folder."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from texttok_cli.config.loader import load_recipe
from texttok_cli.training.loop import Interrupted
from texttok_cli.training.report import Reporter
from texttok_cli.training.session import run_training

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
QUIET = Reporter(lambda _: None, lambda *_: None, lambda _: None)


class Stop(Reporter):
    """Sends this process a signal when a step is done."""

    def __init__(self, step: int, number: int, message: Callable[[str], None] = lambda _: None) -> None:
        def progress(what: str, done: int, total: int, values: dict[str, float]) -> None:
            if what == "training" and done == step:
                os.kill(os.getpid(), number)

        super().__init__(message, progress, lambda _: None)


def train(recipe: Path | str, out: Path, *overrides: str, report: Reporter = QUIET) -> dict[str, torch.Tensor]:
    """The newest training state."""
    run_training(load_recipe(str(recipe), overrides), out, report, offline=True, device="cpu")
    return newest_state(out)


def newest_state(out: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted(path for path in (out / "state").glob("step-*") if not path.suffix)[-1] / "state.safetensors")


def metrics(out: Path, key: str = "loss") -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    different = a.keys() ^ b.keys() or {key for key in a if not torch.equal(a[key], b[key])}
    assert not different, different


def assert_it_goes_on_to_the_bit(recipe: Path, folder: Path) -> None:
    """Of six steps, stopped after three: state, model and log are those of a run that was not stopped."""
    whole = train(recipe, folder / "whole")
    with pytest.raises(Interrupted, match="step 3"):
        train(recipe, folder / "parts", report=Stop(3, signal.SIGTERM))
    torch.manual_seed(123)  # a resumed process begins with another random state
    assert_same_bits(whole, train(recipe, folder / "parts"))
    assert_same_bits(*(load_file(folder / run / "model.safetensors") for run in ("whole", "parts")))
    steps, again = ([(line["step"], line["loss"], line["grad_norm"]) for line in metrics(folder / run)] for run in ("whole", "parts"))
    assert steps == again and [step for step, *_ in steps] == [1, 2, 3, 4, 5, 6], (steps, again)


def launched(recipe: Path, out: Path, **environment: str) -> str:
    """Run in two processes; what they said. Processes that don't come to their end say where they are."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--log-dir", str(out.parent / "log"), "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "texttok_cli", "train", str(recipe), "--out", str(out), "--device", "cpu", "--offline"],
        env=ENVIRONMENT | {"PYTHONFAULTHANDLER": "1"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.send_signal(signal.SIGABRT)
        pytest.fail(f"no end after 300 s:\n{process.communicate()[1]}")
    assert process.returncode == 0, err
    return err
