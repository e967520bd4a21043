"""Other people's tokenizers, measured as ours are."""

from __future__ import annotations

from pathlib import Path

import torch

from texttok_cli.baselines.sd_vae import SDVAE
from texttok_cli.baselines.taesd import TinyAutoencoder
from texttok_cli.errors import CheckpointError

__all__ = ["BASELINES", "PREFIX", "SDVAE", "TinyAutoencoder", "load_baseline"]

PREFIX = "baseline:"
# Where the weights are published, by name.
BASELINES = {
    "taesd": "madebyollin/taesd",
    "taesdxl": "madebyollin/taesdxl",
    "taesd3": "madebyollin/taesd3",
    "taef1": "madebyollin/taef1",
    "taef2": "madebyollin/taef2",
    "sd-vae": "stabilityai/sd-vae-ft-ema",
}


def load_baseline(model: str, *, device: torch.device | str = "cpu", offline: bool = False) -> TinyAutoencoder | SDVAE:
    """Of `baseline:NAME=FILE`: a .safetensors with diffusers' names, or the folder of NAME_encoder.pth and NAME_decoder.pth;
    for sd-vae a hub name or a local folder.

    CheckpointError or BackendError says what is wrong.
    """
    name, _, path = model.removeprefix(PREFIX).partition("=")
    if name not in BASELINES:
        raise CheckpointError(f"{model}: no such baseline; there are {', '.join(PREFIX + known for known in BASELINES)}")
    if name == "sd-vae":
        return SDVAE(name, path or BASELINES[name], device=device, offline=offline)
    if not path:
        raise CheckpointError(f"{model}: name its weights, {PREFIX}{name}=FILE.safetensors (published as {BASELINES[name]} on the hub)")
    return TinyAutoencoder(name, Path(path), device=device)
