"""The model file: one `.safetensors` with the schema as JSON in its metadata. Reading it executes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from texttok_cli.config.schema import ClassEmbedding, ClassLabels, Config, GeneratorConfig, TokenizerConfig
from texttok_cli.errors import CheckpointError
from texttok_cli.files import Schema, TensorInfo, load_safetensors, parse_header, read_header, save_safetensors, sha256_file
from texttok_cli.models.devices import without_weights
from texttok_cli.models.dit import DiT
from texttok_cli.models.tokenizer import TexTok
from texttok_cli.tokens import Sha256

FORMAT = 1
WEIGHTS = {"F32", "BF16", "F16"}
STATISTICS = ("latent_mean", "latent_std")  # stay fp32
CAPTIONS = "train_captions"


def _listed(value: str | list[str] | None) -> list[str]:
    """Files of before there could be several have one or null."""
    return [value] if isinstance(value, str) else value or []


def _check_by_class(condition: object, **lists: Sequence[object] | None) -> None:
    """ValueError for a list that has not an entry for each class of the condition."""
    number = condition.num_classes if isinstance(condition, ClassLabels | ClassEmbedding) else None
    for name, entries in lists.items():
        if entries is not None and len(entries) != number:
            raise ValueError(f"{name} has {len(entries)} entries, the model {number or 'no'} classes")


class ModelHeader(Config):
    """What a tokenizer's file says of itself."""

    texttok_model: int  # version of this format
    task: Literal["tokenizer"]
    model: TokenizerConfig
    # sha256 of the models whose detokenizer alone was trained on into this one, the latest first: latents of theirs are this one's too.
    latents_of: Annotated[list[Sha256], BeforeValidator(_listed)] = Field(default_factory=list)
    classes: list[str] | None = None  # of a model conditioned on their embeddings, by id; files of before have none
    training: dict[str, Any] = Field(default_factory=dict)  # how it came about: recipe, steps, images seen, version

    @model_validator(mode="after")
    def _classes_are_its_own(self) -> ModelHeader:
        _check_by_class(self.model.condition, classes=self.classes)
        return self


class GeneratorHeader(Config):
    """What a generator's file says of itself."""

    texttok_model: int
    task: Literal["generator"]
    model: GeneratorConfig
    tokenizer_name: str = Field(pattern=r"^[^/\\]{1,256}$")  # whose latents it makes
    tokenizer_sha256: Sha256
    classes: list[str] | None = None  # by id
    class_counts: list[Annotated[int, Field(ge=0)]] | None = None  # training images of each
    training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _lists_are_of_its_classes(self) -> GeneratorHeader:
        _check_by_class(self.model.condition, classes=self.classes, class_counts=self.class_counts)
        if self.class_counts is not None and not any(self.class_counts):
            raise ValueError("class_counts says that no class had a training image")
        return self


def model_name(path: Path) -> str:
    """What a model is called: its file's stem; every run's is model.safetensors, which is called as its folder, or its repository."""
    folder = path.absolute().parent
    if path.stem != "model":
        name = path.stem
    elif folder.parent.name == "snapshots":  # the hub's cache: models--owner--name/snapshots/COMMIT/model.safetensors
        name = folder.parent.parent.name.rpartition("--")[2]
    else:
        name = folder.name or path.stem
    return name.replace("\\", "_")  # in no file that holds the name can it be a path


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Identity of a tokenizer; its name is never a path (see `model_name`)."""

    name: str
    sha256: str
    header: ModelHeader

    @property
    def latents_made_by(self) -> tuple[str, ...]:
        """sha256 of this model, and of those whose latents are this one's too."""
        return (self.sha256, *self.header.latents_of)


@dataclass(frozen=True, slots=True)
class GeneratorInfo:
    """Identity of a generator, and `caption_hash` of each caption it was trained with, (n,) int64 sorted."""

    name: str
    sha256: str
    header: GeneratorHeader
    train_captions: Tensor


def save_tokenizer(
    path: str | Path,
    model: TexTok,
    *,
    training: dict[str, Any],
    latents_of: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights in `dtype` (latent statistics stay fp32) and the header, atomically.

    `model.latent_mean` and `model.latent_std` (d,), of the latents of training images, are the caller's to fill: int8 token files go by
    them, and cut off what is over 4 deviations. `classes` are the names by id of a model on class embeddings. CheckpointError for a
    model that was changed for inference (precision bf16).
    """
    header = ModelHeader(
        texttok_model=FORMAT,
        task="tokenizer",
        model=model.cfg,
        latents_of=list(latents_of),
        classes=None if classes is None else list(classes),
        training=training,
    )
    without = {"classes"} if classes is None else None  # any texttok reads such a file, also one that knows no classes
    weights = _weights(Path(path), model, lambda: TexTok(header.model), dtype)
    save_safetensors(Path(path), weights, header.model_dump(mode="json", exclude=without))


def save_generator(
    path: str | Path,
    dit: DiT,
    *,
    tokenizer_name: str,
    tokenizer_sha256: str,
    classes: Sequence[str] | None,
    class_counts: Sequence[int] | None,
    train_captions: Iterable[str],
    training: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights in `dtype` (latent statistics stay fp32), what tokenizer, classes and captions they belong to, atomically."""
    header = GeneratorHeader(
        texttok_model=FORMAT,
        task="generator",
        model=dit.cfg,
        tokenizer_name=tokenizer_name,
        tokenizer_sha256=tokenizer_sha256,
        classes=None if classes is None else list(classes),
        class_counts=None if class_counts is None else list(class_counts),
        training=training,
    )
    hashes = torch.tensor(sorted({caption_hash(text) for text in train_captions}), dtype=torch.int64)
    weights = _weights(Path(path), dit, lambda: DiT(header.model), dtype)
    save_safetensors(Path(path), {**weights, CAPTIONS: hashes}, header.model_dump(mode="json"))


def caption_hash(text: str) -> int:
    """The first 8 bytes of the caption's sha256 as a signed number: enough to tell whether a caption was trained on."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def load_tokenizer_file(path: Path, *, device: str | torch.device = "cpu") -> tuple[TexTok, ModelInfo]:
    """The model in fp32, eval mode, and who it is. CheckpointError, one line, for anything that is not a whole tokenizer file."""
    header, infos = _header(path, ModelHeader, "tokenizer")
    with without_weights():
        model = TexTok(header.model)
    _fill(model, path, infos, extra={})
    model.to(device)
    return model, ModelInfo(model_name(path), sha256_file(path), header)


def read_tokenizer_info(path: Path) -> ModelInfo:
    """Who a tokenizer is, without its weights. CheckpointError as `load_tokenizer_file`."""
    return ModelInfo(model_name(path), sha256_file(path), _header(path, ModelHeader, "tokenizer")[0])


def find_tokenizer_file(paths: Sequence[Path], sha256: str) -> Path | None:
    """Of these files the tokenizer of this hash, or else one that reads the same latents (see ModelHeader); others may be anything."""
    return next((path for path in paths if sha256_file(path) == sha256), None) or next(
        (path for path in paths if sha256 in _latents_of(path)), None
    )


def _latents_of(path: Path) -> list[str]:
    try:
        return read_tokenizer_info(path).header.latents_of
    except CheckpointError:
        return []


def read_generator_header(path: Path) -> GeneratorHeader:
    """What a generator says of itself, without its weights. CheckpointError as `load_generator_file`."""
    return _header(path, GeneratorHeader, "generator")[0]


def load_generator_file(path: Path, *, device: str | torch.device = "cpu") -> tuple[DiT, GeneratorInfo]:
    """The generator in fp32, eval mode, and who it is. CheckpointError, one line, for anything that is not a whole generator file."""
    header, infos = _header(path, GeneratorHeader, "generator")
    captions = infos.get(CAPTIONS)
    if captions is None or captions.dtype != "I64" or len(captions.shape) != 1:
        raise CheckpointError(f"{path}: its {CAPTIONS} are missing or not a list of hashes")
    with without_weights():
        model = DiT(header.model)
    tensors = _fill(model, path, infos, extra={CAPTIONS: captions.shape})
    model.to(device)
    return model, GeneratorInfo(model_name(path), sha256_file(path), header, tensors[CAPTIONS])


def _header(path: Path, schema: type[Schema], task: Literal["tokenizer", "generator"]) -> tuple[Schema, dict[str, TensorInfo]]:
    """What a model of this task says of itself, and its tensors. CheckpointError for a whole model of the other one too."""
    meta, infos = read_header(path, error=CheckpointError)
    found = meta.get("task")
    if found in ("tokenizer", "generator") and found != task:
        raise CheckpointError(f"{path}: is a {found}, but a {task} is needed")
    return parse_header(meta, schema, key="texttok_model", version=FORMAT, path=path, error=CheckpointError), infos


def _weights(path: Path, model: nn.Module, build: Callable[[], nn.Module], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a file holds of a model, under the names of one newly built. CheckpointError if it has others: nothing could read it."""
    # torch.compile's wrappers stand before the names.
    weights = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    with without_weights():
        named = build().state_dict().keys()
    if named != weights.keys():
        wrong = min(named ^ weights.keys())
        raise CheckpointError(f"{path}: the model can't be saved: it was changed for inference ({wrong}); load it with precision fp32")
    return {name: value if name in STATISTICS else value.to(dtype) for name, value in weights.items()}


def _fill(model: nn.Module, path: Path, infos: Mapping[str, TensorInfo], *, extra: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Give a model on the meta device the file's weights as fp32, frozen, in eval mode; returns all tensors of the file.

    CheckpointError unless its tensors are exactly the model's and those in `extra`, by name and shape.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {**shapes, **extra}
    found = {name: info.shape if info.dtype in WEIGHTS or name in extra else None for name, info in infos.items()}
    if expected != found:
        wrong = sorted({name for name, _ in expected.items() ^ found.items()})
        raise CheckpointError(f"{path}: weights don't fit the header, {len(wrong)} tensors differ, first {wrong[0]}")
    _, tensors = load_safetensors(path, error=CheckpointError)
    bad = next((name for name in shapes if not tensors[name].isfinite().all()), None)
    if bad is not None:
        raise CheckpointError(f"{path}: damaged: its {bad} holds a value that is not finite")
    model.load_state_dict({name: tensors[name].float() for name in shapes}, assign=True)
    model.requires_grad_(False).eval()
    return tensors
