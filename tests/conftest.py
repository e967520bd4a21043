"""A tiny randomly initialised TexTok with its twin without text, small pictures, and the command line run in this process."""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from texttok_cli import inference
from texttok_cli.checkpoint import save_tokenizer
from texttok_cli.config.schema import TokenizerConfig
from texttok_cli.main import main
from texttok_cli.models.tokenizer import TexTok

TINY = {"image_size": 32, "patch_size": 8, "num_tokens": 4, "latent_dim": 8, "backbone": {"depth": 2, "width": 32, "heads": 2}}
TEXT = {"source": "caption", "encoder": {"kind": "hash", "dim": 16, "max_tokens": 24}}


def _save(path: Path, seed: int, condition: dict[str, object], classes: Sequence[str] | None = None, **config: object) -> Path:
    torch.manual_seed(seed)
    model = TexTok(TokenizerConfig.model_validate({**TINY, "condition": condition, **config})).eval()
    with torch.no_grad():  # far enough from the initial near-zeros that every input shows in the output
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.latent_mean.copy_(torch.linspace(-0.1, 0.1, 8))
        model.latent_std.copy_(torch.linspace(0.2, 0.6, 8))
    save_tokenizer(path, model, training={}, classes=classes)
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.safetensors, plain.safetensors (its twin without text) and other.safetensors (another with text)."""
    folder = tmp_path_factory.mktemp("models")
    _save(folder / "text.safetensors", 0, TEXT)
    _save(folder / "other.safetensors", 1, TEXT)
    _save(folder / "plain.safetensors", 0, {"source": "none"})
    return folder


@pytest.fixture
def save_model() -> Callable[..., Path]:
    """Write a tiny model: (path, seed, condition, names of its classes, other sections of its configuration)."""
    return _save


@pytest.fixture
def bundled(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny models in the place of the bundled ones."""
    monkeypatch.setattr(inference, "PRETRAINED", models)
    return models


@pytest.fixture
def draw() -> Callable[..., Path]:
    """Write a smooth picture, another for each seed: the whole file, or the first part of its bytes."""

    def write(path: Path, seed: int = 0, size: tuple[int, int] = (32, 32), part: float = 1) -> Path:
        small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue()[: int(part * buffer.tell())])
        return path

    return write


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def texttok(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `texttok ARGS...` through main()."""

    def run(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["texttok", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Outcome(int(end.value.code or 0), *capsys.readouterr())

    return run
