"""The command line as a person meets it: how long it takes to start, and how its memory grows."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil
from PIL import Image

from texttok_cli.bench.results import Target
from texttok_cli.bench.task import Task
from texttok_cli.bench.timing import median_ratio, spread_of
from texttok_cli.errors import BackendError

RUNS = 5
SIDE = 128
HUSHED = ("--offline", "--quiet")
IMAGES = 10_000  # in the folder that memory is measured on: two shards of tokens and part of a third
# What encoding one image can't do without.
BARE = """
import torch, tokenizers, safetensors.torch
from texttok_cli.assets import resolve
from texttok_cli.inference import find_model
safetensors.torch.load_file(find_model("texttok-32-128"))
safetensors.torch.load_file(resolve("minilm", offline=True))
"""


def start(task: Task) -> Iterator[Target]:
    """How long a person waits for the help, and for the tokens of one image."""
    runs = spread_of([_seconds("-m", "texttok_cli", "--help") for _ in range(RUNS + 1)][1:])
    yield Target(name="texttok --help", reached=runs.median, most=0.4, unit="s", note=f"median of {RUNS}, wall clock")
    device = task.where.device.type
    seconds: dict[str, list[float]] = {"encode": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.png"
        Image.linear_gradient("L").convert("RGB").save(photo)
        for run in range(RUNS + 1):
            encode = ("encode", str(photo), "--caption", "a grey ramp", "-o", f"{folder}/{run}.tok.safetensors")
            seconds["encode"].append(_seconds("-m", "texttok_cli", *encode, "--device", device, *HUSHED))
            seconds["bare"].append(_seconds("-c", BARE))
    warm = {name: values[1:] for name, values in seconds.items()}
    note = f"{median(warm['encode']):.2f} s; against importing torch and tokenizers and reading both weight files; {RUNS} runs, wall clock"
    reached = median_ratio(warm["encode"], warm["bare"])
    yield Target(name="encoding one image over imports and reading", reached=reached, most=1.3, unit="x", note=note)


def memory(task: Task) -> Iterator[Target]:
    """Resident memory while a folder is encoded: whether it still grows in the last quarter of the run.

    Medians of quarters, as the peak of a run is its luckless moment: the allocator's ups and downs are several percent, and a run
    that lasts longer meets higher ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for number in range(IMAGES):
            Image.new("RGB", (SIDE, SIDE), (number % 256, number // 256, 0)).save(images / f"{number:06}.png")
        seen = _resident("encode", str(images), "-o", f"{folder}/tokens", "--model", "baseline-32-128", *HUSHED)
    quarter = len(seen) // 4
    second, last = median(seen[quarter : 2 * quarter]), median(seen[3 * quarter :])
    note = f"baseline-32-128, {IMAGES:,} images: medians of {second:.0f} and {last:.0f} MB, at most {max(seen):.0f} MB"
    yield Target(name="memory in the last quarter of encoding over the second", reached=last / second, most=1.05, unit="x", note=note)


def _seconds(*arguments: str) -> float:
    """Of a process of this Python. BackendError if it fails."""
    before = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    took = time.perf_counter() - before
    _check_done(done.returncode, done.stderr)
    return took


def _resident(*arguments: str) -> list[float]:
    """MB that `texttok ARGUMENTS` holds, five times a second from its start to its end. BackendError if it fails."""
    seen: list[float] = []
    with tempfile.TemporaryFile() as said:
        process = psutil.Popen([sys.executable, "-m", "texttok_cli", *arguments], stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            with suppress(psutil.ZombieProcess):  # it ended since
                seen.append(process.memory_info().rss / 1e6)
            time.sleep(0.2)
        said.seek(0)
        _check_done(process.returncode, said.read().decode())
    return seen


def _check_done(code: int, said: str) -> None:
    """BackendError with the last line that a process said, if it failed."""
    if code:
        last = (said.strip().splitlines() or [f"exit code {code}"])[-1]
        raise BackendError(f"a process to be timed failed: {last.removeprefix('texttok: ')}")
