"""Files that are whole or not there, and safetensors that are checked before anything is allocated."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from texttok_cli.errors import TextTokError

META_KEY = "texttok"
MAX_HEADER_BYTES = 100_000_000
# Bytes of one element of the types we write.
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` that takes its place when the block ends well, and is gone when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask gives; safetensors makes its own file, closed to others
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and one JSON header atomically; the same content gives the same bytes."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(whole, temporary, metadata={META_KEY: json.dumps(header)})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type (safetensors' name) and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path, *, error: type[TextTokError]) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Our JSON header and what tensors the file holds, after checking that the file is whole; no tensor is read.

    Raises `error`, one line, for anything that is not a complete safetensors file written by texttok.
    """
    if not path.is_file():
        raise error(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER_BYTES:
            raise error(f"{path}: not a safetensors file")
        if length > size - 8:
            raise error(f"{path}: not a safetensors file, or cut short within its header")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        meta = header.pop("__metadata__", {})
        infos = {name: _tensor_info(entry) for name, entry in header.items()}
        ends = [entry["data_offsets"][1] for entry in header.values()]
        own = json.loads(meta[META_KEY]) if META_KEY in meta else None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise error(f"{path}: not a safetensors file: its header is damaged") from None
    if not isinstance(own, dict):
        raise error(f"{path}: a safetensors file, but not written by texttok (no {META_KEY!r} in its header)")
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = "cut short" if size < expected else "has something appended"
        raise error(f"{path}: {what}: holds {size:,} bytes, its header says {expected:,}")
    return own, infos


def load_safetensors(path: Path, *, error: type[TextTokError]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our JSON header and the tensors, on the CPU. Raises `error` as `read_header` does."""
    meta, _ = read_header(path, error=error)
    return meta, load_file(path)


def _tensor_info(entry: Mapping[str, Any]) -> TensorInfo:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    elements = 1
    for side in shape:
        if not isinstance(side, int) or side < 0:
            raise ValueError
        elements *= side
    if not 0 <= begin <= end or end - begin != elements * DTYPE_BYTES[entry["dtype"]]:
        raise ValueError
    return TensorInfo(entry["dtype"], shape)
