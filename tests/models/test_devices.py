"""Where to compute: the best there is, and what is not there."""

import subprocess
import sys

import pytest
import torch

from texttok_cli.errors import BackendError
from texttok_cli.models.devices import out_of_memory, pick_device


def test_auto_is_the_fastest_device_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert pick_device("auto").type == expected


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device(torch.device("cpu")) == torch.device("cpu")
    for device in ("cuda", "mps", "tpu"):
        with pytest.raises(BackendError, match=f"--device {device}: not available here"):
            pick_device(device)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device(device)) for device in ("cuda", "cuda:1", "cpu:0")] == ["cuda", "cuda:1", "cpu:0"]
    for device in ("cuda:2", "cuda:-1", "cuda:", "cuda:one", "cuda:01", "cpu:1"):
        with pytest.raises(BackendError, match=f"--device {device}: not available here"):
            pick_device(device)


def test_every_device_says_in_its_own_way_that_memory_is_out() -> None:
    with pytest.raises(RuntimeError) as of_cpu:
        torch.empty(10**15)
    texts = (
        "MPS backend out of memory (MPS allocated: 8.89 GB, other allocations: 172.98 MB, max allowed: 9.07 GB)",
        "Invalid buffer size: 20.93 GiB",
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes.",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "NCCL error ... ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
    )
    for err in (of_cpu.value, torch.OutOfMemoryError("CUDA out of memory."), *map(RuntimeError, texts)):
        assert out_of_memory(err)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))


def test_shapes_without_weights_do_not_bring_torchs_compiler() -> None:
    code = """
import sys
from torch import nn
from texttok_cli.models.devices import without_weights

with without_weights():
    table = nn.Embedding(3, 4)
    nn.init.normal_(table.weight, std=0.02)
print(table.weight.device, tuple(table.weight.shape), "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "meta (3, 4) False"
