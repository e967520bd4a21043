"""A folder of tokens: shards (`shard-00000.tok.safetensors`, ...) and an `index.json` that names them.

Letters: n images, N latent tokens, d latent channels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import count, starmap
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor

from texttok_cli.config.schema import Config
from texttok_cli.errors import TokenFileError
from texttok_cli.files import alone_in, json_object, parse_header, sha256_file, write_json
from texttok_cli.tokens import (
    FORMAT,
    MAX_IMAGES,
    SUFFIX,
    Channels,
    Name,
    Sha256,
    TokenDtype,
    TokenHeader,
    Tokens,
    joined,
    load_token_header,
    load_tokens,
    save_tokens,
    select,
)


class Statistics(Config):
    """Per-channel sums over tokens, in float64; those of two sets of tokens add up."""

    count: int = Field(ge=1)  # tokens, n*N
    total: Channels
    squares: Channels

    @staticmethod
    def of(z: Tensor) -> Statistics:
        """Of the latents z (n, N, d)."""
        total = squares = z.new_zeros(z.shape[-1], dtype=torch.float64)
        for part in torch.split(z, 256):  # all of a shard in float64 would take more memory than the rest of its writing
            flat = part.double().flatten(0, 1)  # (tokens, d)
            total, squares = total + flat.sum(0), squares + flat.square().sum(0)
        return Statistics(count=len(z) * z.shape[1], total=total.tolist(), squares=squares.tolist())

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

    file: str = Field(pattern=r"^shard-\d{5,12}\.tok\.safetensors$")
    images: int = Field(ge=1, le=MAX_IMAGES)
    sha256: Sha256
    statistics: Statistics | None

    @property
    def number(self) -> int:
        """In the order of writing; not all numbers are taken."""
        return int(self.file[len("shard-") :].partition(".")[0])


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

    @model_validator(mode="after")
    def _shards_agree(self) -> TokenIndex:
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("it names a shard twice")
        parts = [shard.statistics for shard in self.shards if shard.statistics is not None]
        lists = [values for part in parts for values in (part.total, part.squares)]
        lists += [values for values in (self.mean, self.std) if values is not None]
        if len({len(values) for values in lists}) > 1:
            raise ValueError("its statistics are not all of the same number of channels")
        whole = self.statistics()
        if whole is not None and not (_same(self.mean, whole.mean) and _same(self.std, whole.std)):
            raise ValueError("its mean and std are not those of its shards; encode again into an empty folder")
        return self

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


def _same(found: list[float] | None, sums: list[float]) -> bool:
    return found is None or all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6) for a, b in zip(found, sums, strict=True))


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
        self._keys_of: dict[str, frozenset[Key]] = {}  # by shard's file
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

    def same_as(self, ids: set[str]) -> set[str]:
        """Other ids with tokens made of the same picture, caption and class as those of one of `ids`."""
        theirs = {digest for (image_id, _), digest in self._there.items() if image_id in ids}
        return {image_id for (image_id, _), digest in self._there.items() if image_id not in ids and digest in theirs}

    def has(self, image_id: str, input_sha256: str, caption: str | None, class_name: str | None = None, *, flips: bool = False) -> bool:
        """Whether the tokens of this image with this caption and class are there, with `flips` those of its mirrored copy too."""
        made_of = _made_of(input_sha256, caption, class_name)
        return all(self._there.get((image_id, flipped)) == made_of for flipped in ((False, True) if flips else (False,)))

    def add(self, tokens: Tokens) -> None:
        """Take tokens of some images, instead of what is there of them; a shard is written whenever enough have come."""
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
        header = joined(self._waiting)
        tokens = Tokens(self._buffer[: len(header.ids)], header)
        before = self.index.shards
        keys = _keys(header)
        replaced = self._there.keys() & set(keys)
        numbers = count(1 + max((shard.number for shard in before), default=-1))
        written = self._write(tokens, keys, next(numbers))
        shards = [*(self._without(replaced, numbers) if replaced else before), written]
        self._note(header, keys)  # before they are in the index: interrupted here, the next flush replaces this shard
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
            self._keys_of.pop(file, None)

    def _without(self, keys: set[Key], numbers: Iterator[int]) -> Iterator[Shard]:
        """The shards without these tokens; one that held any is written again, under the next of the numbers."""
        for shard in self.index.shards:
            if keys.isdisjoint(self._keys_of[shard.file]):
                yield shard
                continue
            tokens = load_tokens(self.path / shard.file)
            kept = {i: key for i, key in enumerate(_keys(tokens.header)) if key not in keys}
            if kept:
                yield self._write(select(tokens, list(kept)), kept.values(), next(numbers))

    def _write(self, tokens: Tokens, keys: Collection[Key], number: int) -> Shard:
        path = self.path / f"shard-{number:05d}{SUFFIX}"
        save_tokens(path, tokens)
        self._keys_of[path.name] = frozenset(keys)
        statistics = None if tokens.header.codes is not None else Statistics.of(load_tokens(path).z)
        return Shard(file=path.name, images=len(tokens), sha256=sha256_file(path), statistics=statistics)

    def _note(self, header: TokenHeader, keys: Sequence[Key]) -> None:
        nothing: Sequence[str | None] = [None] * len(header.ids)
        made_of = zip(header.input_sha256, header.captions or nothing, header.class_names or nothing, strict=True)
        new = dict(zip(keys, starmap(_made_of, made_of), strict=True))
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
                keys = _keys(header)
                self._note(header, keys)
                self._keys_of[shard.file] = frozenset(keys)
                kept.append(shard)
        self.index = found.with_shards(kept, complete=found.complete and not self.dropped)


@contextmanager
def writing(path: Path, *, model_name: str, model_sha256: str, dtype: TokenDtype) -> Iterator[TokenFolder]:
    """A folder that no other process writes to meanwhile: finished after the block, or if that was cut off, written as far as it came.

    Raises as TokenFolder does, and DataError while another process writes there.
    """
    with alone_in(path):
        folder = TokenFolder(path, model_name=model_name, model_sha256=model_sha256, dtype=dtype)
        try:
            yield folder
        except BaseException:
            folder.flush()
            raise
        folder.finish()


def _made_of(input_sha256: str, caption: str | None, class_name: str | None) -> bytes:
    """A digest of what tokens were made of: shorter than its parts, and a large folder has many."""
    return hashlib.blake2b(json.dumps([input_sha256, caption, class_name]).encode(), digest_size=16).digest()


def read_index(folder: Path) -> TokenIndex:
    """index.json of a token folder, checked. TokenFileError names what is wrong."""
    path = folder / "index.json"
    if not path.is_file():
        raise TokenFileError(f"{folder}: not a folder of tokens (no index.json)")
    value = json_object(path.read_bytes())
    if value is None:
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


def _keys(header: TokenHeader) -> list[Key]:
    return list(zip(header.ids, header.flipped, strict=True))
