"""Files that are whole or not there, and safetensors that are checked before anything is allocated."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import normalize

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from texttok_cli.errors import DataError, TextTokError

META_KEY = "texttok"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_SIDE = 1 << 48  # of a shape; torch counts in 64 bits
MAX_SIDES = 64  # torch's own limit
MAX_SAID = 400  # characters of a header's fault
# Bytes of one element of the types we write.
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

Schema = TypeVar("Schema", bound=BaseModel)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` that takes its place when the block ends well, and is gone when it does not.

    An OSError of the block that names no file, as those of a full disk, names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask gives; safetensors makes its own file, closed to others
        yield temporary
        temporary.chmod(mode)
        with temporary.open("r+b") as written:  # Windows flushes only what may be written
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as err:
        raise naming(path, err) from None
    finally:
        temporary.unlink(missing_ok=True)


def naming(path: Path, err: OSError) -> OSError:
    """The error itself if it names a file, else one of the same kind that names `path`: writing and flushing name none."""
    return err if err.filename is not None else OSError(err.errno, err.strerror, str(path))


@contextmanager
def alone_in(folder: Path, *, patience: float = 0) -> Iterator[None]:
    """Make the folder if need be, and keep other processes that ask for the same out while the block runs.

    Folders that were made and hold nothing at the end, as after a mistake in what was asked for, are removed.
    DataError if a process is still in after `patience` seconds: workers of one that was killed take some to end.
    Where there are no locks (Windows, some network file systems) nothing keeps them out.
    """
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if os.name != "nt":
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            claim(folder, descriptor, patience=patience)
        stack.callback(_remove_empty, made)
        yield


def _remove_empty(folders: Iterable[Path]) -> None:
    with suppress(OSError):  # from the first on that holds something
        for folder in folders:
            folder.rmdir()


def claim(path: Path, descriptor: int, *, patience: float = 0) -> None:
    """Keep other processes that claim the same file or folder out until the descriptor is closed, where there are locks.

    DataError if one is still in after `patience` seconds.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if patience > 0:
            time.sleep(0.5)
            claim(path, descriptor, patience=patience - 0.5)
            return
        raise DataError(f"{path}: another texttok is writing there; wait until it has ended, or choose another -o") from None
    except (ImportError, OSError):
        return  # Windows; a file system without locks


def check_can_be_folder(path: Path, *, else_name: str) -> None:
    """DataError if a file stands where `path` or a folder above it has to be one; `else_name` says what -o may be besides a folder."""
    file = next((part for part in (path, *path.parents) if part.is_file()), None)
    if file is not None:
        raise DataError(f"{file}: is a file, but -o needs a folder; choose another path{else_name}")


def check_distinct(paths: Iterable[Path]) -> None:
    """DataError if two of these paths, which are to be written, would be one file: on most disks of macOS case does not count."""
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(normalize("NFC", str(path)).casefold(), path)
        if other != path and _ignores_case(path.parent):
            raise DataError(f"{path}: would be written over {other}, as on this disk upper and lower case are the same; choose another -o")


def _ignores_case(folder: Path) -> bool:
    """Whether names that differ in case alone are one file in a folder, or where it will be made."""
    there = next(part for part in (folder, *folder.parents) if part.is_dir())
    with tempfile.NamedTemporaryFile(prefix=".texttok-", dir=there) as file:
        lower = Path(file.name)
        return lower.with_name(lower.name.upper()).exists()


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically; a file's name in it may be no UTF-8, which is then escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_tensors(tensors: Iterable[Tensor]) -> str:
    """Hex digest of the tensors' bytes, one after the other, whichever file or device they come from."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and one JSON header atomically; the same content gives the same bytes.

    Raises OSError if it can't be written, and TextTokError for a header that could not be read again.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    own = json.dumps(header)
    # It becomes a JSON string within the file's header, next to at most some hundred bytes a tensor.
    if len(json.dumps(own)) + 1000 * (len(whole) + 1) > MAX_HEADER_BYTES:
        raise TextTokError(f"{path}: its header would have over {MAX_HEADER_BYTES:,} bytes; put fewer or shorter texts into one file")
    with atomic_path(path) as temporary:
        try:
            save_file(whole, temporary, metadata={META_KEY: own})
        except SafetensorError as err:  # a full disk, for one
            raise OSError(errno.EIO, str(err), str(path)) from None


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
        end = _end_of_data(entry["data_offsets"] for entry in header.values())
        own = json.loads(meta[META_KEY]) if META_KEY in meta else None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise error(f"{path}: not a safetensors file: its header is damaged") from None
    if not isinstance(own, dict):
        raise error(f"{path}: a safetensors file, but not written by texttok (no {META_KEY!r} in its header)")
    expected = 8 + length + end
    if size != expected:
        what = "cut short" if size < expected else "has something appended"
        raise error(f"{path}: {what}: holds {size:,} bytes, its header says {expected:,}")
    return own, infos


def load_safetensors(path: Path, *, error: type[TextTokError]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our JSON header and the tensors, on the CPU. Raises `error` as `read_header` does."""
    meta, _ = read_header(path, error=error)
    try:
        return meta, load_file(path)
    except SafetensorError as err:  # it reads more strictly than Python's JSON: a key that stands twice, for one
        raise error(f"{path}: not a safetensors file: {' '.join(str(err).split())}") from None


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """The object of a JSON text, or None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_json_object(path: Path, *, kind: str, error: type[TextTokError]) -> dict[str, Any]:
    """A file's JSON object. `error`, one line that says what `kind` of file was wanted, for anything else."""
    try:
        value = json_object(path.read_bytes())
    except OSError as err:
        raise error(f"{path}: {err.strerror}") from None
    if value is None:
        raise error(f"{path}: not a {kind} (no JSON object)")
    return value


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with the prefix, without it: a part's own state out of a flat one."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def parse_header(
    header: Mapping[str, Any], schema: type[Schema], *, key: str, version: int, path: Path, error: type[TextTokError]
) -> Schema:
    """A file's JSON header as `schema`, whose field `key` holds the version of the format.

    Raises `error`, one line, for another kind or version and for the first field that is wrong.
    """
    found = header.get(key)
    if found is None:
        raise error(f"{path}: another kind of file (no {key!r} in its header)")
    if found != version:
        raise error(f"{path}: {key} is {str(found)[:20]}, this texttok reads {version}; update texttok")
    try:
        return schema.model_validate(header)
    except ValidationError as err:
        first = err.errors()[0]
        where = ["header", *map(str, first["loc"])]
        said = f"{'.'.join(where)}: {first['msg'].removeprefix('Value error, ')}"  # both repeat what the file says, of any length
        raise error(f"{path}: {said if len(said) <= MAX_SAID else f'{said[:MAX_SAID]}...'}") from None


def _tensor_info(entry: Mapping[str, Any]) -> TensorInfo:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    # A product of a million sides would take hours, and floats don't subtract from every integer.
    if len(shape) > MAX_SIDES or not (isinstance(begin, int) and isinstance(end, int)):
        raise ValueError
    elements = 1
    for side in shape:
        if not isinstance(side, int) or not 0 <= side < MAX_SIDE:
            raise ValueError
        elements *= side
    if end - begin != elements * DTYPE_BYTES[entry["dtype"]]:
        raise ValueError
    return TensorInfo(entry["dtype"], shape)


def _end_of_data(offsets: Iterable[tuple[int, int]]) -> int:
    """Where the last tensor ends. ValueError unless they lie one after the other, from 0 on."""
    last = 0
    for begin, end in sorted(offsets):
        if begin != last or end < begin:
            raise ValueError
        last = end
    return last
