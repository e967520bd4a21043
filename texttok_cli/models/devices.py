"""Where to compute."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from texttok_cli.errors import BackendError

# How torch says so of MPS (altogether; for one tensor), of the CPU (Linux, macOS; Windows) and of a GPU that is full already, where CUDA
# and its libraries need some for themselves: RuntimeErrors of no type of their own.
NO_MEMORY = re.compile(
    "MPS backend out of memory|Invalid buffer size|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|CUDA error: out of memory|Cuda failure( \d+)? 'out of memory'|CU(BLAS|DNN)_STATUS_\w*ALLOC\w*_FAILED"
)


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` takes cuda, then mps, then cpu. BackendError for a device this machine or build does not have."""
    device = str(device)
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if has[name])
    kind, colon, number = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not has.get(kind, False) or (colon and number not in map(str, range(count))):
        raise BackendError(f"--device {device}: not available here; use --device cpu")
    return torch.device(device)


def out_of_memory(err: RuntimeError) -> bool:
    """Whether it says that a device has not enough memory; torch.OutOfMemoryError is raised for tensors of CUDA alone."""
    return isinstance(err, torch.OutOfMemoryError) or NO_MEMORY.search(str(err)) is not None


@contextmanager
def without_weights() -> Iterator[None]:
    """What is built in the block lies on the meta device: shapes alone, to be counted or to be given a file's weights."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Leaves out `normal_`: to draw numbers for a meta tensor, which holds none, torch imports its compiler, a second's work."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.init.normal_:
            return (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
