"""The token file (`*.tok.safetensors`): raw latents or codes with the text and the model they belong to. Reading it executes nothing.

Letters: n images, N latent tokens, d latent channels, K codes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import starmap
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from texttok_cli.config.schema import Config
from texttok_cli.errors import TokenFileError
from texttok_cli.files import load_safetensors, parse_header, read_header, save_safetensors, sha256_file, write_json

FORMAT = 2  # 1 knew neither codes nor classes nor mirrored copies; it is read as a file that has none
MAX_IMAGES = 1_000_000
MAX_TEXT = 100_000  # characters of an id or a caption
SUFFIX = ".tok.safetensors"
LatentDtype = Literal["fp16", "fp32", "int8"]
TokenDtype = Literal["fp16", "fp32", "int8", "int16", "int32"]  # the last two: codes
_STORED = {"fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32}
_NAMES = {"fp16": "F16", "fp32": "F32", "int8": "I8", "int16": "I16", "int32": "I32"}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[^/\\]{1,256}$")]  # never a path
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Side = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Channels = Annotated[list[Finite], Field(min_length=1, max_length=4096)]


class TokenHeader(Config):
    """What a token file says of its tokens; lists hold one entry an image."""

    texttok_tokens: int  # version of this format
    model_name: Name
    model_sha256: Sha256
    dtype: TokenDtype
    codes: int | None = Field(None, ge=2, le=1 << 20)  # K of the codebook that the tokens are indices into; None: they are latents
    image_size: int = Field(ge=1, le=65536)
    ids: list[Text] = Field(min_length=1, max_length=MAX_IMAGES)
    flipped: list[bool]  # the mirrored image was encoded; it has the id of the other
    captions: list[Text] | None  # None: the model takes no text. "": the empty condition
    class_names: list[Text | None] | None = None  # of the data set, if it has classes
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
        if (self.codes is not None or self.dtype in ("int16", "int32")) and (self.codes is None or self.dtype != code_dtype(self.codes)):
            raise ValueError(f"codes {self.codes} and dtype {self.dtype} don't go together")
        return self


def code_dtype(codes: int) -> Literal["int16", "int32"]:
    """How codes of a codebook of this size are stored."""
    return "int16" if codes <= 1 << 15 else "int32"


@dataclass(frozen=True)
class Tokens:
    """Latents z (n, N, d) float32, raw (not standardised), or of a VQ model codes z (n, N) int64; and what they belong to."""

    z: Tensor
    header: TokenHeader

    def __post_init__(self) -> None:
        form = "(n, N, d)" if self.header.codes is None else "(n, N)"
        if self.z.ndim != form.count(",") + 1 or len(self.z) != len(self.header.ids):
            raise ValueError(f"tokens are {tuple(self.z.shape)}, not {form} of {len(self.header.ids)} images")

    def __len__(self) -> int:
        return len(self.header.ids)

    @property
    def token_bytes(self) -> int:
        """Bytes of the tokens as stored, without any header."""
        return self.z.numel() * _STORED[self.header.dtype].itemsize

    @property
    def token_bits(self) -> int:
        """Bits of the tokens: as stored, or of codes what each needs to name one of K."""
        codes = self.header.codes
        return 8 * self.token_bytes if codes is None else self.z.numel() * (codes - 1).bit_length()

    @property
    def caption_bytes(self) -> int:
        """UTF-8 bytes of the captions, which decoding needs too."""
        return sum(len(caption.encode()) for caption in self.header.captions or [])


def save_tokens(path: Path, tokens: Tokens) -> None:
    """Write a token file atomically, in the header's dtype. TokenFileError if a token can't be kept in it."""
    header = tokens.header
    if header.codes is not None:
        _check_codes(path, tokens.z, header)
        stored = tokens.z.to(_STORED[header.dtype])
    elif header.mean is not None and header.std is not None:
        _check_finite(path, tokens.z, header.ids)
        stored = quantize_int8(tokens.z.float(), torch.tensor(header.mean), torch.tensor(header.std))
    else:
        stored = tokens.z.to(_STORED[header.dtype])
        _check_finite(path, stored, header.ids)
    save_safetensors(path, {_tensor_name(header): stored}, header.model_dump(mode="json"))


def load_tokens(path: Path) -> Tokens:
    """A token file, every field checked. TokenFileError, one line, for anything that is not a whole token file."""
    header = load_token_header(path)
    _, tensors = load_safetensors(path, error=TokenFileError)
    if header.codes is not None:
        codes = tensors["codes"].long()
        _check_codes(path, codes, header)
        return Tokens(codes, header)
    z = tensors["z"].float()
    if header.mean is not None and header.std is not None:
        z = dequantize_int8(z, torch.tensor(header.mean), torch.tensor(header.std))
    _check_finite(path, z, header.ids)
    return Tokens(z, header)


def load_token_header(path: Path) -> TokenHeader:
    """The header alone, checked against the file's size and tensors; no token is read."""
    meta, tensors = read_header(path, error=TokenFileError)
    meta = _as_format_2(meta)
    header = parse_header(meta, TokenHeader, key="texttok_tokens", version=FORMAT, path=path, error=TokenFileError)
    name = _tensor_name(header)
    info = tensors.get(name)
    sides = 3 if header.codes is None else 2
    if info is None or len(tensors) != 1 or len(info.shape) != sides or info.shape[0] != len(header.ids) or 0 in info.shape:
        raise TokenFileError(f"{path}: its tensors are not one {name} of {len(header.ids)} images")
    if info.dtype != _NAMES[header.dtype]:
        raise TokenFileError(f"{path}: its tokens are {info.dtype}, its header says {header.dtype}")
    if header.mean is not None and not len(header.mean) == len(header.std or []) == info.shape[2]:
        raise TokenFileError(f"{path}: mean and std are not of its {info.shape[2]} channels")
    return header


def _tensor_name(header: TokenHeader) -> str:
    return "z" if header.codes is None else "codes"


def _as_format_2(meta: dict[str, Any]) -> dict[str, Any]:
    if meta.get("texttok_tokens") != 1 or not isinstance(meta.get("ids"), list):
        return meta
    return {**meta, "texttok_tokens": 2, "codes": None, "flipped": [False] * len(meta["ids"]), "class_names": None}


def quantize_int8(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """round(127 clip((z - mean) / (4 std), -1, 1)); z (..., d), mean and std (d,)."""
    # A channel that never varied has std 0, and only its mean to say: 0 / tiny, not 0 / 0.
    scale = (4 * std).clamp_min(torch.finfo(std.dtype).tiny)
    return (127 * ((z - mean) / scale).clamp(-1, 1)).round().to(torch.int8)


def dequantize_int8(q: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The inverse of `quantize_int8`, within 4 std / 254 of what was not clipped."""
    return mean + 4 * std * q.float() / 127


def _check_codes(path: Path, codes: Tensor, header: TokenHeader) -> None:
    assert header.codes is not None
    bad = (~((codes >= 0) & (codes < header.codes)).all(1)).nonzero().flatten()
    if len(bad):
        raise TokenFileError(f"{path}: the codes of {header.ids[int(bad[0])]} are not all in 0 to {header.codes - 1}")


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

    @property
    def mean(self) -> list[float]:
        """Of each channel."""
        return [total / self.count for total in self.total]

    @property
    def std(self) -> list[float]:
        """Of each channel, over all tokens (no correction)."""
        return [max(0.0, squares / self.count - mean**2) ** 0.5 for squares, mean in zip(self.squares, self.mean, strict=True)]


class Shard(Config):
    """One file of a token folder; the statistics are of the latents as stored (None: codes)."""

    file: str = Field(pattern=r"^shard-\d{5}\.tok\.safetensors$")
    images: int = Field(ge=1)
    sha256: Sha256
    statistics: Statistics | None


class TokenIndex(Config):
    """index.json of a token folder."""

    texttok_index: int = FORMAT
    model_name: Name
    model_sha256: Sha256
    dtype: TokenDtype
    complete: bool = False  # whether the run that wrote last came to its end
    mean: Channels | None = None  # of each channel of all latents
    std: Channels | None = None
    shards: list[Shard] = Field(default_factory=list)

    def statistics(self) -> Statistics | None:
        """Of all latents; None for codes or an empty folder."""
        parts = [shard.statistics for shard in self.shards if shard.statistics is not None]
        return reduce(Statistics.plus, parts) if parts else None

    def with_shards(self, shards: Sequence[Shard], *, complete: bool) -> TokenIndex:
        """The index of these shards."""
        index = self.model_copy(update={"shards": list(shards), "complete": complete})
        statistics = index.statistics()
        mean, std = (None, None) if statistics is None else (statistics.mean, statistics.std)
        return index.model_copy(update={"mean": mean, "std": std})


# Which tokens of a folder: an image's id, and whether they are of its mirrored copy.
Key = tuple[str, bool]


class TokenFolder:
    """A folder of token shards that grows shard by shard; what is in it when a run is cut off stays.

    A shard that is missing or damaged is left out of it. Raises TokenFileError for a folder that holds tokens of another
    model or dtype, or a damaged index.
    """

    def __init__(self, path: Path, *, model_name: str, model_sha256: str, dtype: TokenDtype, shard_size: int = 4096) -> None:
        self.path, self.shard_size = path, shard_size
        self.index = TokenIndex(model_name=model_name, model_sha256=model_sha256, dtype=dtype)
        self.dropped: list[Shard] = []  # left out: missing or damaged
        self.replaced: set[str] = set()  # ids whose tokens gave way to those of another image, caption or class
        self._there: dict[Key, bytes] = {}  # -> `_made_of`, of what the shards hold
        self._waiting: list[TokenHeader] = []
        # Their tokens, in one buffer that is kept: a small tensor a batch would stay in the heap among the model's large ones,
        # and leave ever less room between them (measured: 250 MB more by the time a shard is full).
        self._buffer: Tensor | None = None
        if (path / "index.json").exists():
            self._resume(read_index(path))

    @property
    def ids(self) -> set[str]:
        """Of all images that the shards hold."""
        return {image_id for image_id, _ in self._there}

    def has(self, image_id: str, input_sha256: str, caption: str | None, class_name: str | None = None, *, flipped: bool = False) -> bool:
        """Whether the tokens of this image with this caption and class are there."""
        return self._there.get((image_id, flipped)) == _made_of(input_sha256, caption, class_name)

    def add(self, tokens: Tokens) -> None:
        """Take tokens of some images, in the place of what is there of them; a shard is written whenever enough have come."""
        first = sum(len(header.ids) for header in self._waiting)
        end = first + len(tokens)
        if self._buffer is None or end > len(self._buffer):
            there = [] if self._buffer is None else [self._buffer[:first]]
            self._buffer = torch.cat([*there, tokens.z.new_empty(self.shard_size + len(tokens) - first, *tokens.z.shape[1:])])
        self._buffer[first:end] = tokens.z
        self._waiting.append(tokens.header)
        if end >= self.shard_size:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a shard, then the index that names it."""
        if self._buffer is None or not self._waiting:
            return
        header = _joined(self._waiting)
        tokens = Tokens(self._buffer[: len(header.ids)], header)
        before = self.index.shards
        replaced = self._there.keys() & set(_keys(tokens.header))
        number = 1 + max((int(shard.file[6:11]) for shard in before), default=-1)
        written = self._write(tokens, number)
        shards = [*(self._without(replaced, number + 1) if replaced else before), written]
        self._note(tokens.header)  # before they are in the index: interrupted here, the next flush replaces this shard
        self._save_index(self.index.with_shards(shards, complete=False))
        self._waiting = []

    def finish(self) -> None:
        """Write what is waiting, and that nothing more is to come."""
        self.flush()
        if self.index.shards and not self.index.complete:
            self._save_index(self.index.with_shards(self.index.shards, complete=True))

    def _save_index(self, index: TokenIndex) -> None:
        """Write it; shards that it no longer names are deleted last."""
        before = {shard.file for shard in (*self.index.shards, *self.dropped)}
        write_json(self.path / "index.json", index.model_dump(mode="json"))
        self.index = index
        for file in before - {shard.file for shard in index.shards}:
            (self.path / file).unlink(missing_ok=True)

    def _without(self, keys: set[Key], number: int) -> Iterator[Shard]:
        """The shards without these tokens; one that held any is written anew, under a number from `number` on."""
        for place, shard in enumerate(self.index.shards):
            header = load_token_header(self.path / shard.file)
            kept = [i for i, key in enumerate(_keys(header)) if key not in keys]
            if len(kept) == len(header.ids):
                yield shard
            elif kept:
                yield self._write(select(load_tokens(self.path / shard.file), kept), number + place)

    def _write(self, tokens: Tokens, number: int) -> Shard:
        path = self.path / f"shard-{number:05d}{SUFFIX}"
        save_tokens(path, tokens)
        statistics = None if tokens.header.codes is not None else Statistics.of(load_tokens(path).z)
        return Shard(file=path.name, images=len(tokens), sha256=sha256_file(path), statistics=statistics)

    def _note(self, header: TokenHeader) -> None:
        nothing: Sequence[str | None] = [None] * len(header.ids)
        made_of = zip(header.input_sha256, header.captions or nothing, header.class_names or nothing, strict=True)
        new = dict(zip(_keys(header), starmap(_made_of, made_of), strict=True))
        self.replaced.update(key[0] for key, digest in new.items() if self._there.get(key, digest) != digest)
        self._there.update(new)

    def _resume(self, found: TokenIndex) -> None:
        for key in ("model_sha256", "dtype"):
            ours, theirs = getattr(self.index, key), getattr(found, key)
            if ours != theirs:
                raise TokenFileError(f"{self.path}: holds tokens with {key} {theirs[:12]}, not {ours[:12]}; choose another --out")
        kept = []
        for shard in found.shards:
            path = self.path / shard.file
            try:
                header = load_token_header(path)
                _check_named(path, header, shard)
            except TokenFileError:
                self.dropped.append(shard)
            else:
                self._note(header)
                kept.append(shard)
        self.index = found.with_shards(kept, complete=found.complete and not self.dropped)


def _made_of(input_sha256: str, caption: str | None, class_name: str | None) -> bytes:
    """A digest of what tokens were made of: shorter than its parts, and a large folder has many."""
    return hashlib.blake2b(json.dumps([input_sha256, caption, class_name]).encode(), digest_size=16).digest()


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
    if value.get("texttok_index") == 1:
        value["texttok_index"] = FORMAT  # it has nothing of what came with 2, and is not known to be complete
    return parse_header(value, TokenIndex, key="texttok_index", version=FORMAT, path=path, error=TokenFileError)


def read_shards(folder: Path) -> Iterator[Tokens]:
    """The shards of a folder in order. TokenFileError for one that is missing or not as the index says."""
    for shard in read_index(folder).shards:
        path = folder / shard.file
        tokens = load_tokens(path)
        _check_named(path, tokens.header, shard)
        yield tokens


def _check_named(path: Path, header: TokenHeader, shard: Shard) -> None:
    if len(header.ids) != shard.images or sha256_file(path) != shard.sha256:
        raise TokenFileError(f"{path}: is not the shard that index.json names; run the same `texttok encode` again to repair it")


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """Tokens of one model and dtype, one after the other."""
    return Tokens(torch.cat([part.z for part in parts]), _joined([part.header for part in parts]))


def select(tokens: Tokens, chosen: Sequence[int]) -> Tokens:
    """Some of the images, by index."""
    columns = {name: [getattr(tokens.header, name)[i] for i in chosen] for name in _columns(tokens.header)}
    return Tokens(tokens.z[list(chosen)], tokens.header.model_copy(update=columns))


def _joined(headers: Sequence[TokenHeader]) -> TokenHeader:
    columns = {name: [value for header in headers for value in getattr(header, name)] for name in _columns(headers[0])}
    return headers[0].model_copy(update=columns)


def _columns(header: TokenHeader) -> list[str]:
    """The fields with an entry an image."""
    names = ("ids", "flipped", "captions", "class_names", "input_sha256", "original_sizes")
    return [name for name in names if getattr(header, name) is not None]


def _keys(header: TokenHeader) -> list[Key]:
    return list(zip(header.ids, header.flipped, strict=True))
