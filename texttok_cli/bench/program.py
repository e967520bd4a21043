"""The command line as a person meets it: how long it takes to start, and how its memory grows."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from PIL import Image

from texttok_cli.bench.results import Target
from texttok_cli.bench.task import Task
from texttok_cli.bench.timing import median_ratio, spread_of
from texttok_cli.errors import BackendError

RUNS = 5
SIDE = 128
HUSHED = ("--offline", "--quiet")
# Numbers of images in the two folders. FEW is ten batches: after those, threads, buffers and heap have the size that they keep.
# One batch alone would peak lower, as no images of later batches are read ahead while its own are encoded. MANY is two shards and
# part of a third.
FEW, MANY = 320, 10_000
# What encoding one image can't do without.
BARE = """
import torch, tokenizers, safetensors.torch
from texttok_cli.assets import resolve
from texttok_cli.inference import find_model
safetensors.torch.load_file(find_model("texttok-32-128"))
safetensors.torch.load_file(resolve("minilm", offline=True))
"""
# The command line in this process, and then the most memory that it had.
PEAK = """
import pathlib, resource, sys
from texttok_cli.main import main
sys.argv = ["texttok", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    if stop.code:
        raise
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = pathlib.Path("/proc/self/status")
if status.exists():  # Linux: getrusage's counts what the parent had when it started this process
    peak = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
print(peak, file=sys.stderr)
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
            encode = [
                "encode",
                str(photo),
                "--caption",
                "a grey ramp",
                "-o",
                f"{folder}/{run}.tok.safetensors",
                "--device",
                device,
                *HUSHED,
            ]
            seconds["encode"].append(_seconds("-m", "texttok_cli", *encode))
            seconds["bare"].append(_seconds("-c", BARE))
    warm = {name: values[1:] for name, values in seconds.items()}
    note = f"{median(warm['encode']):.2f} s; against importing torch and tokenizers and reading both weight files; {RUNS} runs, wall clock"
    reached = median_ratio(warm["encode"], warm["bare"])
    yield Target(name="encoding one image over imports and reading", reached=reached, most=1.3, unit="x", note=note)


def memory(task: Task) -> Iterator[Target]:
    """Peak memory of encoding a folder of many images over that of a folder of few."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (FEW, MANY):
            images = Path(folder) / str(count)
            images.mkdir()
            for number in range(count):
                Image.new("RGB", (SIDE, SIDE), (number % 256, number // 256, 0)).save(images / f"{number:06}.png")
            peaks[count] = _peak("encode", str(images), "-o", f"{folder}/tokens-{count}", "--model", "baseline-32-128", *HUSHED)
    note = f"baseline-32-128, {MANY:,} images against {FEW}: {peaks[MANY] / 1e3:.0f} and {peaks[FEW] / 1e3:.0f} MB (Linux)"
    yield Target(name="peak memory of encoding, many images over few", reached=peaks[MANY] / peaks[FEW], most=1.05, unit="x", note=note)


def _seconds(*arguments: str) -> float:
    """Of a process of this Python."""
    before = time.perf_counter()
    _run(*arguments)
    return time.perf_counter() - before


def _peak(*arguments: str) -> int:
    """Most memory of `texttok ARGUMENTS`, in the system's unit (kB on Linux)."""
    return int(_run("-c", PEAK, *arguments).split()[-1])


def _run(*arguments: str) -> str:
    """What a process of this Python writes to stderr. BackendError with the last line of that if it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BackendError(f"a process to be timed failed: {said[-1].removeprefix('texttok: ')}")
    return done.stderr
