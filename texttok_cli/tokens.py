"""The token file (`*.tok.safetensors`): raw latents with the text and the model they belong to. Reading it executes nothing.

Letters: n images, N latent tokens, d latent channels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from texttok_cli.config.schema import Config
from texttok_cli.errors import TokenFileError
from texttok_cli.files import load_safetensors, parse_header, read_header, save_safetensors, sha256_file, write_json

FORMAT = 1
MAX_IMAGES = 1_000_000
MAX_TEXT = 100_000  # characters of an id or a caption
SUFFIX = ".tok.safetensors"
TokenDtype = Literal["fp16", "fp32", "int8"]
_STORED = {"fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
_NAMES = {"fp16": "F16", "fp32": "F32", "int8": "I8"}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[^/\\]{1,256}$")]  # never a path
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Side = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Channels = Annotated[list[Finite], Field(min_length=1, max_length=4096)]


class TokenHeader(Config):
    """What a token file says of its latents; lists hold one entry an image."""

    texttok_tokens: int  # version of this format
    model_name: Name
    model_sha256: Sha256
    dtype: TokenDtype
    image_size: int = Field(ge=1, le=65536)
    ids: list[Text] = Field(min_length=1, max_length=MAX_IMAGES)
    captions: list[Text] | None  # None: the model takes no text. "": the empty condition
    input_sha256: list[Sha256]  # of the image files' bytes
    original_sizes: list[tuple[Side, Side]]  # (w, h) before the centre crop
    mean: Channels | None = None  # int8 alone: z = mean + 4 std q / 127
    std: Channels | None = None

    @model_validator(mode="after")
    def _lists_agree(self) -> TokenHeader:
        for name in _columns(self):
            if len(getattr(self, name)) != len(self.ids):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self.ids)} images")
        if (self.dtype == "int8") != (self.mean is not None and self.std is not None):
            raise ValueError("mean and std go with dtype int8, and int8 needs both")
        return self


@dataclass(frozen=True)
class Tokens:
    """Latents z (n, N, d) float32, raw (not standardised), and what they belong to."""

    z: Tensor
    header: TokenHeader

    def __post_init__(self) -> None:
        if self.z.ndim != 3 or len(self.z) != len(self.header.ids):
            raise ValueError(f"latents are {tuple(self.z.shape)}, not (n, N, d) of {len(self.header.ids)} images")

    def __len__(self) -> int:
        return len(self.header.ids)

    @property
    def token_bytes(self) -> int:
        """Bytes of the tokens as stored, without any header."""
        return self.z.numel() * _STORED[self.header.dtype].itemsize

    @property
    def caption_bytes(self) -> int:
        """UTF-8 bytes of the captions, which decoding needs too."""
        return sum(len(caption.encode()) for caption in self.header.captions or [])


def save_tokens(path: Path, tokens: Tokens) -> None:
    """Write a token file atomically; z is stored in the header's dtype. TokenFileError if a latent is not finite in it."""
    header, z = tokens.header, tokens.z.float()
    if header.mean is not None and header.std is not None:
        stored = quantize_int8(z, torch.tensor(header.mean), torch.tensor(header.std))
    else:
        stored = z = z.to(_STORED[header.dtype])
    _check_finite(path, z, header.ids)
    save_safetensors(path, {"z": stored}, header.model_dump(mode="json"))


def load_tokens(path: Path) -> Tokens:
    """A token file, every field checked. TokenFileError, one line, for anything that is not a whole token file."""
    header = load_token_header(path)
    _, tensors = load_safetensors(path, error=TokenFileError)
    z = tensors["z"].float()
    if header.mean is not None and header.std is not None:
        z = dequantize_int8(z, torch.tensor(header.mean), torch.tensor(header.std))
    _check_finite(path, z, header.ids)
    return Tokens(z, header)


def load_token_header(path: Path) -> TokenHeader:
    """The header alone, checked against the file's size and tensors; no latent is read."""
    meta, tensors = read_header(path, error=TokenFileError)
    header = parse_header(meta, TokenHeader, key="texttok_tokens", version=FORMAT, path=path, error=TokenFileError)
    info = tensors.get("z")
    if info is None or len(tensors) != 1 or len(info.shape) != 3 or info.shape[0] != len(header.ids) or 0 in info.shape:
        raise TokenFileError(f"{path}: its tensors are not one z of {len(header.ids)} images")
    if info.dtype != _NAMES[header.dtype]:
        raise TokenFileError(f"{path}: its tokens are {info.dtype}, its header says {header.dtype}")
    if header.mean is not None and not len(header.mean) == len(header.std or []) == info.shape[2]:
        raise TokenFileError(f"{path}: mean and std are not of its {info.shape[2]} channels")
    return header


def quantize_int8(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """round(127 clip((z - mean) / (4 std), -1, 1)); z (..., d), mean and std (d,)."""
    # A channel that never varied has std 0, and only its mean to say: 0 / tiny, not 0 / 0.
    scale = (4 * std).clamp_min(torch.finfo(std.dtype).tiny)
    return (127 * ((z - mean) / scale).clamp(-1, 1)).round().to(torch.int8)


def dequantize_int8(q: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The inverse of `quantize_int8`, within 4 std / 254 of what was not clipped."""
    return mean + 4 * std * q.float() / 127


def _check_finite(path: Path, z: Tensor, ids: Sequence[str]) -> None:
    bad = (~z.flatten(1).isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise TokenFileError(f"{path}: the tokens of {ids[int(bad[0])]} hold a value that is not finite or too large for the dtype")


# ------------------------------------------------------------------ many images: shards and index.json


class Statistics(Config):
    """Per-channel sums over tokens, in float64; those of two sets of tokens add up."""

    count: int = Field(ge=1)  # tokens, n*N
    total: Channels
    squares: Channels

    @staticmethod
    def of(z: Tensor) -> Statistics:
        """Of the latents z (n, N, d)."""
        flat = z.double().flatten(0, 1)  # (n*N, d)
        return Statistics(count=len(flat), total=flat.sum(0).tolist(), squares=flat.square().sum(0).tolist())

    def plus(self, other: Statistics) -> Statistics:
        """Of both sets."""
        total = [a + b for a, b in zip(self.total, other.total, strict=True)]
        squares = [a + b for a, b in zip(self.squares, other.squares, strict=True)]
        return Statistics(count=self.count + other.count, total=total, squares=squares)


class Shard(Config):
    """One file of a token folder; the statistics are of the latents as stored."""

    file: str = Field(pattern=r"^shard-\d{5}\.tok\.safetensors$")
    images: int = Field(ge=1)
    sha256: Sha256
    statistics: Statistics


class TokenIndex(Config):
    """index.json of a token folder."""

    texttok_index: int = FORMAT
    model_name: Name
    model_sha256: Sha256
    dtype: TokenDtype
    shards: list[Shard] = Field(default_factory=list)

    def statistics(self) -> Statistics:
        """Of all shards, of which there must be one."""
        return reduce(Statistics.plus, (shard.statistics for shard in self.shards))


class TokenFolder:
    """A folder of token shards that grows shard by shard; what is in it when a run is cut off stays.

    Raises TokenFileError for a folder that holds tokens of another model or dtype, or a damaged index.
    """

    def __init__(self, path: Path, *, model_name: str, model_sha256: str, dtype: TokenDtype, shard_size: int = 4096) -> None:
        self.path, self.shard_size = path, shard_size
        self.index = TokenIndex(model_name=model_name, model_sha256=model_sha256, dtype=dtype)
        self._there: dict[str, tuple[str, str | None]] = {}  # id -> (input sha256, caption) of what the shards hold
        self._waiting: list[Tokens] = []
        if (path / "index.json").exists():
            self._resume(read_index(path))

    def has(self, image_id: str, input_sha256: str, caption: str | None) -> bool:
        """Whether the tokens of this image with this caption are there."""
        return self._there.get(image_id) == (input_sha256, caption)

    def add(self, tokens: Tokens) -> None:
        """Take tokens of some images, in the place of what is there under their ids; a shard is written whenever enough have come."""
        self._waiting.append(tokens)
        if sum(map(len, self._waiting)) >= self.shard_size:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a shard, then the index that names it; shards it replaced are deleted last."""
        if not self._waiting:
            return
        tokens = concatenate(self._waiting)
        before = self.index.shards
        replaced = self._there.keys() & set(tokens.header.ids)
        number = 1 + max((int(shard.file[6:11]) for shard in before), default=-1)
        written = self._write(tokens, number)
        shards = [*(self._without(replaced, number + 1) if replaced else before), written]
        self.index = self.index.model_copy(update={"shards": shards})
        write_json(self.path / "index.json", self.index.model_dump(mode="json"))
        for shard in before:
            if shard not in shards:
                (self.path / shard.file).unlink(missing_ok=True)
        self._note(tokens.header)
        self._waiting = []

    def _without(self, ids: set[str], number: int) -> Iterator[Shard]:
        """The shards without these images; one that held any is written anew, under a number from `number` on."""
        for place, shard in enumerate(self.index.shards):
            tokens = load_tokens(self.path / shard.file)
            kept = [i for i, image_id in enumerate(tokens.header.ids) if image_id not in ids]
            if len(kept) == len(tokens):
                yield shard
            elif kept:
                yield self._write(select(tokens, kept), number + place)

    def _write(self, tokens: Tokens, number: int) -> Shard:
        path = self.path / f"shard-{number:05d}{SUFFIX}"
        save_tokens(path, tokens)
        statistics = Statistics.of(load_tokens(path).z)
        return Shard(file=path.name, images=len(tokens), sha256=sha256_file(path), statistics=statistics)

    def _note(self, header: TokenHeader) -> None:
        captions: Sequence[str | None] = header.captions or [None] * len(header.ids)
        self._there.update(zip(header.ids, zip(header.input_sha256, captions, strict=True), strict=True))

    def _resume(self, found: TokenIndex) -> None:
        for key in ("model_sha256", "dtype"):
            ours, theirs = getattr(self.index, key), getattr(found, key)
            if ours != theirs:
                raise TokenFileError(f"{self.path}: holds tokens with {key} {theirs[:12]}, not {ours[:12]}; choose another --out")
        self.index = found
        for shard in found.shards:
            self._note(load_token_header(self.path / shard.file))


def read_index(folder: Path) -> TokenIndex:
    """index.json of a token folder, checked. TokenFileError names what is wrong."""
    path = folder / "index.json"
    if not path.is_file():
        raise TokenFileError(f"{folder}: not a folder of tokens (no index.json)")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise TokenFileError(f"{path}: damaged: not a JSON object; delete it and encode again")
    return parse_header(value, TokenIndex, key="texttok_index", version=FORMAT, path=path, error=TokenFileError)


def read_shards(folder: Path) -> Iterator[Tokens]:
    """The shards of a folder in order. TokenFileError for one that is missing or not as the index says."""
    for shard in read_index(folder).shards:
        path = folder / shard.file
        tokens = load_tokens(path)
        if len(tokens) != shard.images or sha256_file(path) != shard.sha256:
            raise TokenFileError(f"{path}: is not the shard that index.json names; encode again into an empty folder")
        yield tokens


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """Tokens of one model and dtype, one after the other."""
    columns = {name: [value for part in parts for value in getattr(part.header, name)] for name in _columns(parts[0].header)}
    return Tokens(torch.cat([part.z for part in parts]), parts[0].header.model_copy(update=columns))


def select(tokens: Tokens, chosen: Sequence[int]) -> Tokens:
    """Some of the images, by index."""
    columns = {name: [getattr(tokens.header, name)[i] for i in chosen] for name in _columns(tokens.header)}
    return Tokens(tokens.z[list(chosen)], tokens.header.model_copy(update=columns))


def _columns(header: TokenHeader) -> list[str]:
    """The fields with an entry an image."""
    return [name for name in ("ids", "captions", "input_sha256", "original_sizes") if getattr(header, name) is not None]
