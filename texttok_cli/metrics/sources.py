"""Where evaluated images come from: files and shards, the .npz batches and statistics of ADM's evaluator, or memory.

Letters: n images, B batch, S image side.
"""

from __future__ import annotations

import hashlib
import lzma
import math
import re
import struct
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from texttok_cli.data import Dataset, eval_batches, load_image
from texttok_cli.data.images import MAX_PIXELS
from texttok_cli.errors import DataError
from texttok_cli.files import atomic_path, sha256_file
from texttok_cli.metrics.inception import POOL_DIM, SPATIAL_DIM
from texttok_cli.metrics.statistics import Gaussian

KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # as ADM's VIRTUAL_imagenet*.npz
# What NumPy and zipfile raise for damaged files, by where the damage is: in the archive, in what is packed, in an array's header.
NUMPY_DAMAGED = (
    *(OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(ValueError, TypeError, OverflowError, MemoryError, SyntaxError, tokenize.TokenError, struct.error),
)
MAX_IMAGES = 10_000_000  # of an .npz: zeros are packed a thousand to one, so a small file could name any number
MAX_ARRAY_BYTES = 1 << 27  # of what is read whole, for the same reason: a covariance takes 34 MB, the labels of MAX_IMAGES 80 MB
JPEG = b"\xff\xd8\xff"  # how such a file begins
WIDTHS = {"pool": POOL_DIM, "spatial": SPATIAL_DIM}


class Images(ABC):
    """Images in a fixed order, all S x S; `crop` says how they became so."""

    size: int
    crop: str
    ids: list[str]

    @abstractmethod
    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images with these indices, in this order: indices (B,) int64 and uint8 (B, 3, S, S). DataError for one that can't be read."""

    @abstractmethod
    def identity(self) -> str:
        """Hex digest that is the same for the same images wherever they lie."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that changes if other images stand there; the pixels are not read for it."""


class FileImages(Images):
    """Images of a dataset, by default as they are stored: all square and of one size. With `crop_to` by ADM's rule to that size.

    Raises DataError for a dataset with entries that can't be read; an evaluation is of all images or of none.
    """

    def __init__(self, dataset: Dataset, *, crop_to: int | None = None) -> None:
        if dataset.skipped:
            _refuse(dataset.skipped[0].id, dataset.skipped[0].reason)
        self.dataset, self.stored = dataset, crop_to is None
        self.ids = [item.id for item in dataset.items]
        first = load_image(dataset.read(0), name=self.ids[0])
        self.size = min(first.size) if crop_to is None else crop_to
        self.crop = "as stored" if crop_to is None else f"ADM: BOX halving, BICUBIC, centre {crop_to}"

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Images`."""
        for batch in eval_batches(self.dataset, image_size=self.size, batch_size=batch_size, on_error=_refuse, indices=indices):
            if self.stored:
                self._check_sizes(batch.indices, batch.sizes)
            yield batch.indices, batch.images

    def fingerprint(self) -> str:
        """See `Images`."""
        places = [(item.id, item.file, item.offset, item.size) for item in self.dataset.items]
        return _digest([self.crop, places], {item.path for item in self.dataset.items})

    def identity(self) -> str:
        """See `Images`: of the ids and the files' sizes; reading every byte would cost another pass."""
        sizes = [item.path.stat().st_size if item.size is None else item.size for item in self.dataset.items]
        return hashlib.sha256(repr(list(zip(self.ids, sizes, strict=True))).encode()).hexdigest()

    def jpegs(self) -> int:
        """How many of the images are stored as JPEG, which is lossy."""
        return sum(self.dataset.head(index, len(JPEG)) == JPEG for index in range(len(self.ids)))

    def _check_sizes(self, indices: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
        for index, (width, height) in zip(indices.tolist(), sizes, strict=True):
            if (width, height) != (self.size, self.size):
                raise DataError(
                    f"{self.ids[index]}: is {width} x {height}, and {self.ids[0]} makes {self.size} x {self.size} the size of all;"
                    " samples are measured as they are, so store them square and of one size"
                )


class NpzImages(Images):
    """`arr_0` (n, S, S, 3) uint8 of an .npz, read block by block: the whole array may be larger than memory.

    Raises DataError for a file that holds no such array.
    """

    crop = "as stored"

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_there(path)
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                shape, fortran, dtype = _array_header(file)
                whole = archive.getinfo("arr_0.npy").file_size == file.tell() + math.prod(shape)
        except NUMPY_DAMAGED as err:
            raise DataError(f"{path}: no image batch (arr_0) can be read from it ({_why(err)})") from None
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or 0 in shape:
            raise DataError(f"{path}: arr_0 is {dtype} {shape}, not uint8 (n, S, S, 3)")
        if shape[1] ** 2 > MAX_PIXELS or shape[0] > MAX_IMAGES:
            raise DataError(f"{path}: arr_0 is {shape}, over the limit of {MAX_IMAGES:,} images or of {MAX_PIXELS:,} pixels each")
        if not whole:
            raise DataError(f"{path}: arr_0 does not have the size of uint8 {shape}: damaged or cut short")
        self.size = shape[1]
        self.ids = [str(number) for number in range(shape[0])]

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Images`; the indices must ascend."""
        bytes_each = 3 * self.size**2
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                _array_header(file)
                begin = file.tell()
                for start in range(0, len(indices), batch_size):
                    chosen = list(indices[start : start + batch_size])
                    images = np.stack([self._one(file, begin + index * bytes_each) for index in chosen])
                    yield torch.tensor(chosen), torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        except NUMPY_DAMAGED as err:
            raise DataError(f"{self.path}: damaged or cut short ({_why(err)})") from None

    def fingerprint(self) -> str:
        """See `Images`."""
        return _digest([], {self.path})

    def identity(self) -> str:
        """See `Images`."""
        return sha256_file(self.path)

    def labels(self) -> list[int] | None:
        """The class of each image, if the file says it (`arr_1`, as ADM's samples)."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                found = _array(file, "arr_1")
        except NUMPY_DAMAGED:  # there is none, or something else is called so
            return None
        return found.tolist() if found.shape == (len(self.ids),) else None

    def _one(self, file: IO[bytes], at: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        file.seek(at)
        data = file.read(3 * self.size**2)
        return np.frombuffer(data, np.uint8).reshape(self.size, self.size, 3)


class TensorImages(Images):
    """Uint8 (n, 3, S, S), or an iterable of such batches, all of which are held in memory.

    Raises DataError for tensors of another type or shape, and for none.
    """

    crop = "as stored"

    def __init__(self, images: Tensor | Iterable[Tensor]) -> None:
        batches = [images] if isinstance(images, Tensor) else list(images)
        for batch in batches:
            if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1:] != (3, batches[0].shape[-1], batches[0].shape[-1]):
                raise DataError(f"images are {batch.dtype} {tuple(batch.shape)}, not torch.uint8 (n, 3, S, S) of one size S")
        if not sum(map(len, batches)):
            raise DataError("no image to evaluate")
        self.pixels = torch.cat([batch.cpu() for batch in batches]).contiguous()
        self.size = self.pixels.shape[-1]
        self.ids = [str(number) for number in range(len(self.pixels))]

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Images`."""
        for start in range(0, len(indices), batch_size):
            chosen = torch.tensor(indices[start : start + batch_size])
            yield chosen, self.pixels[chosen]

    def identity(self) -> str:
        """See `Images`."""
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        digest.update(self.pixels.numpy().data)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """See `Images`."""
        return self.identity()


@dataclass(frozen=True)
class Reference:
    """Statistics by kind of features, images, if there are any, and the side of what the statistics are of, if that is known."""

    given: Mapping[str, Gaussian]
    images: Images | None
    size: int | None


def read_npz_reference(path: Path) -> Reference:
    """An .npz of `mu` and `sigma` (and `mu_s`, `sigma_s`), of images (`arr_0`), or of both, as ADM's VIRTUAL files.

    Raises DataError for one that holds neither, or statistics that are damaged.
    """
    _check_there(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            given = {
                kind: _gaussian(path, kind, _array(file, mu), _array(file, sigma), int(_array(file, "n")) if "n" in file else None)
                for kind, (mu, sigma) in KEYS.items()
                if mu in file and sigma in file
            }
            has_images = "arr_0" in file
    except NUMPY_DAMAGED as err:
        raise DataError(f"{path}: not an .npz of statistics or images ({_why(err)})") from None
    if not given and not has_images:
        raise DataError(f"{path}: holds neither statistics (mu, sigma) nor images (arr_0)")
    images, named = NpzImages(path) if has_images else None, re.match(r"VIRTUAL_imagenet(\d+)", path.name)  # ADM's
    return Reference(given, images, images.size if images is not None else int(named[1]) if named else None)


def write_statistics(path: Path, found: Mapping[str, Gaussian]) -> None:
    """Write an .npz of statistics as ADM's evaluator reads it, and `n`, atomically."""
    arrays: dict[str, Any] = {}
    for kind, gaussian in found.items():
        mu, sigma = KEYS[kind]
        arrays |= {mu: gaussian.mean.numpy(), sigma: gaussian.covariance.numpy(), "n": np.array(gaussian.n)}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


@contextmanager
def writing_npz(archive: zipfile.ZipFile, n: int, size: int) -> Iterator[Callable[[Tensor], object]]:
    """Write `arr_0` (n, S, S, 3) uint8 of an .npz by calls with images uint8 (B, 3, S, S), in order; ADM's evaluator reads it."""
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:  # closed after an error too: the archive can't close before it
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)})
        yield lambda images: file.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())


def _digest(parts: Sequence[object], files: set[Path]) -> str:
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(repr([*parts, stamps]).encode()).hexdigest()


def _why(err: Exception) -> str:
    """An error in a line; NumPy's may quote all of a header."""
    return " ".join(str(err).split())[:200] or type(err).__name__


def _check_there(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such file")


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _array(file: Any, name: str) -> Any:
    """A whole array of an open .npz. ValueError for one of over MAX_ARRAY_BYTES, before it is unpacked."""
    size = max((member.file_size for member in file.zip.infolist() if member.filename in (f"{name}.npy", name)), default=0)
    if size > MAX_ARRAY_BYTES:
        raise ValueError(f"{name} takes {size:,} bytes, over the limit of {MAX_ARRAY_BYTES:,}")
    return file[name]


def _gaussian(path: Path, kind: str, mean: Any, covariance: Any, n: int | None) -> Gaussian:
    mean, covariance = np.asarray(mean), np.asarray(covariance)  # a member that is no array comes as bytes
    if any(array.dtype.kind not in "fiu" for array in (mean, covariance)):
        raise DataError(f"{path}: mu and sigma are {mean.dtype} and {covariance.dtype}, not real numbers")
    if n is not None and n < 2:
        raise DataError(f"{path}: its statistics are said to be of {n} images")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path}: mu {mean.shape} and sigma {covariance.shape} don't belong together")
    if len(mean) != WIDTHS[kind]:
        raise DataError(f"{path}: its statistics are of {len(mean)} features, not of the FID protocol's {WIDTHS[kind]}")
    gaussian = Gaussian(torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64)), n)
    if not (gaussian.mean.isfinite().all() and gaussian.covariance.isfinite().all()):
        raise DataError(f"{path}: its statistics are not finite")
    return gaussian


def _refuse(image_id: str, reason: str) -> NoReturn:
    raise DataError(f"{image_id}: {reason}; an evaluation needs every image: fix or remove it")
