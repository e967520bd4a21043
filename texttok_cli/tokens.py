"""The token file (`*.tok.safetensors`): raw latents with the text and the model they belong to. Reading it executes nothing.

Letters: n images, N latent tokens, d latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from texttok_cli.config.schema import Config
from texttok_cli.errors import TokenFileError
from texttok_cli.files import load_safetensors, read_header, save_safetensors, sha256_file, write_json

FORMAT = 1
MAX_IMAGES = 1_000_000
SUFFIX = ".tok.safetensors"
TokenDtype = Literal["fp16", "fp32", "int8"]
_STORED = {"fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
_NAMES = {"fp16": "F16", "fp32": "F32", "int8": "I8"}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=100_000)]
Channels = Annotated[list[float], Field(min_length=1, max_length=4096)]


class TokenHeader(Config):
    """What a token file says of its latents; lists hold one entry an image."""

    texttok_tokens: int  # version of this format
    model_name: str = Field(max_length=256)  # never a path
    model_sha256: Sha256
    dtype: TokenDtype
    image_size: int = Field(ge=1, le=65536)
    ids: list[Text] = Field(min_length=1, max_length=MAX_IMAGES)
    captions: list[Text] | None  # None: the model takes no text. "": the empty condition
    input_sha256: list[Sha256]  # of the image files' bytes
    original_sizes: list[tuple[int, int]]  # (w, h) before the centre crop
    mean: Channels | None = None  # int8 alone: z = mean + 4 std q / 127
    std: Channels | None = None

    @model_validator(mode="after")
    def _lists_agree(self) -> TokenHeader:
        for name in ("captions", "input_sha256", "original_sizes"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.ids)} images")
        if (self.dtype == "int8") != (self.mean is not None and self.std is not None):
            raise ValueError("mean and std go with dtype int8, and int8 needs both")
        return self


@dataclass(frozen=True)
class Tokens:
    """Latents z (n, N, d) float32, raw (not standardised), and what they belong to."""

    z: Tensor
    header: TokenHeader

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
    """Write a token file atomically; z is stored in the header's dtype. TokenFileError if a latent is not finite."""
    header, z = tokens.header, tokens.z.float()
    _check_finite(path, z, header.ids)
    if header.mean is not None and header.std is not None:
        z = quantize_int8(z, torch.tensor(header.mean), torch.tensor(header.std))
    save_safetensors(path, {"z": z.to(_STORED[header.dtype])}, header.model_dump(mode="json"))


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
    version = meta.get("texttok_tokens")
    if version is None:
        raise TokenFileError(f"{path}: a texttok file, but not of tokens")
    if version != FORMAT:
        raise TokenFileError(f"{path}: token format {version}, this texttok reads {FORMAT}; update texttok")
    try:
        header = TokenHeader.model_validate(meta)
    except ValidationError as err:
        first = err.errors()[0]
        raise TokenFileError(f"{path}: header: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
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
    return (127 * ((z - mean) / (4 * std)).clamp(-1, 1)).round().to(torch.int8)


def dequantize_int8(q: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The inverse of `quantize_int8`, within 4 std / 254 of what was not clipped."""
    return mean + 4 * std * q.float() / 127


def _check_finite(path: Path, z: Tensor, ids: Sequence[str]) -> None:
    bad = (~z.flatten(1).isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise TokenFileError(f"{path}: the tokens of {ids[int(bad[0])]} hold a value that is not finite")


# ------------------------------------------------------------------ many images: shards and index.json


class Shard(Config):
    """One file of a token folder."""

    file: str = Field(pattern=r"^shard-\d{5}\.tok\.safetensors$")
    images: int = Field(ge=1)
    sha256: Sha256


class Statistics(Config):
    """Per-channel sums over all tokens of a folder, in float64; sums of shards add up."""

    count: int = 0  # tokens, n*N
    total: list[float] = Field(default_factory=list)
    squares: list[float] = Field(default_factory=list)

    def plus(self, z: Tensor) -> Statistics:
        """With the latents z (n, N, d) added."""
        flat = z.double().flatten(0, 1)
        total, squares = flat.sum(0), flat.square().sum(0)
        if self.count:
            total, squares = total + torch.tensor(self.total).double(), squares + torch.tensor(self.squares).double()
        return Statistics(count=self.count + len(flat), total=total.tolist(), squares=squares.tolist())


class TokenIndex(Config):
    """index.json of a token folder."""

    texttok_index: int = FORMAT
    model_name: str
    model_sha256: Sha256
    dtype: TokenDtype
    shards: list[Shard] = Field(default_factory=list)
    statistics: Statistics = Statistics()


class TokenFolder:
    """A folder of token shards that grows shard by shard; what is in it when a run is cut off stays."""

    def __init__(self, path: Path, *, model_name: str, model_sha256: str, dtype: TokenDtype, shard_size: int = 4096) -> None:
        self.path, self.shard_size = path, shard_size
        self.index = TokenIndex(model_name=model_name, model_sha256=model_sha256, dtype=dtype)
        self.done: set[tuple[str, str, str | None]] = set()  # (id, input sha256, caption) of what is there
        self._waiting: list[Tokens] = []
        if (path / "index.json").exists():
            self._resume(read_index(path))

    def add(self, tokens: Tokens) -> None:
        """Take tokens of some images; a shard is written whenever enough have come."""
        self._waiting.append(tokens)
        if sum(map(len, self._waiting)) >= self.shard_size:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a shard, and then the index that names it."""
        if not self._waiting:
            return
        tokens = concatenate(self._waiting)
        name = f"shard-{len(self.index.shards):05d}{SUFFIX}"
        save_tokens(self.path / name, tokens)
        shard = Shard(file=name, images=len(tokens), sha256=sha256_file(self.path / name))
        changes: dict[str, Any] = {"shards": [*self.index.shards, shard], "statistics": self.index.statistics.plus(tokens.z)}
        self.index = self.index.model_copy(update=changes)
        write_json(self.path / "index.json", self.index.model_dump(mode="json"))
        self._waiting = []

    def _resume(self, found: TokenIndex) -> None:
        for key in ("model_sha256", "dtype"):
            ours, theirs = getattr(self.index, key), getattr(found, key)
            if ours != theirs:
                raise TokenFileError(f"{self.path}: holds tokens with {key} {theirs[:12]}, not {ours[:12]}; choose another --out")
        self.index = found
        for shard in found.shards:
            header = load_token_header(self.path / shard.file)
            captions: Sequence[str | None] = header.captions or [None] * len(header.ids)
            self.done.update(zip(header.ids, header.input_sha256, captions, strict=True))


def read_index(folder: Path) -> TokenIndex:
    """index.json of a token folder, checked. TokenFileError names what is wrong."""
    path = folder / "index.json"
    if not path.is_file():
        raise TokenFileError(f"{folder}: not a folder of tokens (no index.json)")
    try:
        return TokenIndex.model_validate_json(path.read_bytes())
    except ValidationError as err:
        first = err.errors()[0]
        raise TokenFileError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


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
    first = parts[0].header
    lists: dict[str, Any] = {
        name: [value for part in parts for value in getattr(part.header, name)] for name in ("ids", "input_sha256", "original_sizes")
    }
    if first.captions is not None:
        lists["captions"] = [caption for part in parts for caption in part.header.captions or []]
    return Tokens(torch.cat([part.z for part in parts]), first.model_copy(update=lists))


def select(tokens: Tokens, chosen: slice) -> Tokens:
    """Some of the images."""
    header = tokens.header
    lists: dict[str, Any] = {
        name: getattr(header, name)[chosen]
        for name in ("ids", "input_sha256", "original_sizes", "captions")
        if getattr(header, name) is not None
    }
    return replace(tokens, z=tokens.z[chosen], header=header.model_copy(update=lists))
