"""Write a tiny randomly initialised generator on the latents of a tokenizer's file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from texttok_cli.checkpoint import save_generator
from texttok_cli.config.schema import GeneratorConfig
from texttok_cli.files import sha256_file
from texttok_cli.models.dit import DiT

CLASSES = ["animal/cat", "animal/crane", "flower/rose", "machine/crane"]
BY_CLASS = {"source": "class", "num_classes": len(CLASSES)}
BY_TEXT = {"source": "text", "encoder": {"kind": "hash", "dim": 16, "max_tokens": 24}}
LATENTS = {"kind": "tokens", "num_tokens": 4, "latent_dim": 8}


def save_tiny_generator(
    path: Path,
    tokenizer: Path,
    condition: dict[str, Any],
    *,
    seed: int = 0,
    classes: Sequence[str] | None = CLASSES,
    class_counts: Sequence[int] | None = None,
    captions: Sequence[str] = (),
    **config: Any,
) -> Path:
    """`captions`: those that it is said to have been trained on."""
    torch.manual_seed(seed)
    backbone = {"depth": 2, "width": 32, "heads": 2}
    cfg = GeneratorConfig.model_validate({"latents": LATENTS, "backbone": backbone, "condition": condition, **config})
    dit = DiT(cfg).eval()
    with torch.no_grad():  # far enough from the initial zeros that every input shows in the output
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        dit.latent_mean.copy_(torch.linspace(-0.1, 0.1, 8))
        dit.latent_std.copy_(torch.linspace(0.2, 0.6, 8))
    save_generator(
        path,
        dit,
        tokenizer_name=tokenizer.stem,
        tokenizer_sha256=sha256_file(tokenizer),
        classes=list(classes) if classes is not None and condition["source"] == "class" else None,
        class_counts=class_counts,
        train_captions=captions,
        training={},
    )
    return path
