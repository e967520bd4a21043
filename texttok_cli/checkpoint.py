"""The model file: one `.safetensors` with the schema as JSON in its metadata. Reading it executes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from texttok_cli.config.schema import Config, TokenizerConfig
from texttok_cli.errors import CheckpointError
from texttok_cli.files import load_safetensors, parse_header, read_header, save_safetensors, sha256_file
from texttok_cli.models.tokenizer import TexTok

FORMAT = 1
WEIGHTS = {"F32", "BF16", "F16"}


class ModelHeader(Config):
    """What a model file says of itself."""

    texttok_model: int  # version of this format
    task: Literal["tokenizer"]
    model: TokenizerConfig
    training: dict[str, Any] = Field(default_factory=dict)  # how it came about: recipe, steps, images seen, version


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Identity of a loaded model: its name is the file's stem, never a path."""

    name: str
    sha256: str
    header: ModelHeader


def save_tokenizer(path: Path, model: TexTok, *, training: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write weights in `dtype` (latent statistics stay fp32) and the header, atomically."""
    header = ModelHeader(texttok_model=FORMAT, task="tokenizer", model=model.cfg, training=training)
    tensors = {k: v if k in ("latent_mean", "latent_std") else v.to(dtype) for k, v in model.state_dict().items()}
    save_safetensors(path, tensors, header.model_dump(mode="json"))


def load_tokenizer_file(path: Path, *, device: str | torch.device = "cpu") -> tuple[TexTok, ModelInfo]:
    """The model in fp32, eval mode, and who it is. CheckpointError, one line, for anything that is not a whole model file."""
    meta, infos = read_header(path, error=CheckpointError)
    header = parse_header(meta, ModelHeader, key="texttok_model", version=FORMAT, path=path, error=CheckpointError)
    with torch.device("meta"):
        model = TexTok(header.model)
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: v.shape for k, v in infos.items() if v.dtype in WEIGHTS}
    if expected != found:
        wrong = sorted(k for k in expected.keys() | infos.keys() if expected.get(k) != found.get(k))
        raise CheckpointError(f"{path}: weights don't fit the header, {len(wrong)} tensors differ, first {wrong[0]}")
    _, tensors = load_safetensors(path, error=CheckpointError)
    model.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    model.requires_grad_(False).eval().to(device)
    return model, ModelInfo(path.stem, sha256_file(path), header)
