"""What a measurement was made on, and how fast it multiplies matrices."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from texttok_cli.bench.timing import Clock
from texttok_cli.config.schema import Config
from texttok_cli.metrics.report import versions

BUSY_LOAD = 0.5  # processes that wanted a core, on average over the last minute, before we began


class Machine(Config):
    """The machine and the software of a run. It says no name and no path of the machine."""

    device: str  # cpu, cuda, mps
    name: str  # of the processor or GPU
    threads: int  # that torch computes with
    cores: int  # of the processor, as the system counts them
    memory_GB: float  # of the device
    load: float  # processes that wanted a core during the minute before
    shared: bool  # whether others computed here at that time
    clock: Clock
    system: str
    date: str  # UTC
    versions: dict[str, str]


def describe(device: torch.device, *, clock: Clock) -> Machine:
    """This machine, as it is now: call it before anything is computed, or the load is one's own."""
    load = psutil.getloadavg()[0]
    return Machine(
        device=device.type,
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        threads=torch.get_num_threads(),
        cores=os.cpu_count() or 1,
        memory_GB=round(_total_memory(device) / 1e9, 1),
        load=round(load, 2),
        shared=load > BUSY_LOAD,
        clock=clock,
        system=f"{platform.system()} {platform.machine()}",
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        versions=versions() | {"transformers": version("transformers")},
    )


def processor() -> str:
    """The processor's name with what it can do for matrices, as torch sees it."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")
    extra = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    return ", ".join([found, torch.backends.cpu.get_cpu_capability(), *extra])


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return int(psutil.virtual_memory().total)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had there, once what is free but kept for reuse is given back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc's; it keeps gigabytes
    if trim is not None:
        trim(0)
    return int(psutil.virtual_memory().available)


Product = tuple[int, int, int]  # rows, inputs, outputs of a linear layer


def block_products(rows: int, width: int) -> list[Product]:
    """The four linear layers of a transformer block on `rows` tokens, its hidden layer 4 times as wide."""
    hidden = 4 * width
    return [(rows, width, 3 * width), (rows, width, width), (rows, width, hidden), (rows, hidden, width)]


def products(shapes: Sequence[Product], dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], None], int]:
    """Work that multiplies matrices of these shapes one after the other, and its FLOPs (a multiply-add is 2)."""
    pairs = [
        (torch.randn(rows, inputs, device=device, dtype=dtype), torch.randn(outputs, inputs, device=device, dtype=dtype))
        for rows, inputs, outputs in shapes
    ]

    @torch.inference_mode()
    def work() -> None:
        for x, weight in pairs:
            F.linear(x, weight)

    return work, sum(2 * rows * inputs * outputs for rows, inputs, outputs in shapes)
