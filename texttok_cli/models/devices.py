"""Where to compute."""

from __future__ import annotations

import torch

from texttok_cli.errors import BackendError


def pick_device(device: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu. BackendError for a device this machine or build does not have."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if has[name])
    if not has.get(device.partition(":")[0], False):
        raise BackendError(f"--device {device}: not available here; use --device cpu")
    return torch.device(device)
