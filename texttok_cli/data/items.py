"""What a dataset is: places of images in a fixed order, read by index."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from texttok_cli.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Item:
    """Where one image lies and what is known of it before it is read.

    `id` is unique in its dataset: the path below a folder, a manifest's `id` or `image`, a shard's key, a file's name,
    with the input before it where two inputs hold the same one (see `open_dataset`).
    """

    id: str
    file: str  # its path; a Path takes three times the memory, and there may be millions
    caption: str | None = None
    class_name: str | None = None
    offset: int = 0  # within `file`, for a member of a shard
    size: int | None = None  # bytes; None: the whole file

    @property
    def path(self) -> Path:
        """Of the image file, or of the shard that it is a member of."""
        return Path(self.file)

    @property
    def in_shard(self) -> bool:
        """Whether the image is a member of a shard rather than a file."""
        return self.size is not None


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something in the inputs that is no usable entry, and why."""

    id: str
    reason: str


class PackedItems(Sequence[Item]):
    """Items without their texts, as bytes that processes share.

    Of a list of objects each loader worker would come to hold a copy of its own: whoever looks at an object counts a reference, which
    writes to its page.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        data, self._ends = bytearray(), array("q", [0])
        for item in items:
            data += json.dumps([item.id, item.file, item.offset, item.size]).encode()
            self._ends.append(len(data))
        self._data = bytes(data)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]  # no slices
        index = range(len(self))[index]  # as a list: from the end too
        item_id, file, offset, size = json.loads(self._data[self._ends[index] : self._ends[index + 1]])
        return Item(item_id, file, offset=offset, size=size)


@dataclass(frozen=True)
class Dataset:
    """Images in a fixed order; `skipped` lists what the inputs held that can't be an item. It holds no open file."""

    items: Sequence[Item]
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> bytes:
        """Bytes of one image file. DataError if it has gone or is larger than MAX_FILE_BYTES."""
        data = self.head(index, MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise DataError(f"{self.items[index].id}: larger than {MAX_FILE_BYTES:,} bytes")
        return data

    def head(self, index: int, n: int) -> bytes:
        """At most the first n bytes of one image file. DataError if it has gone."""
        item = self.items[index]
        try:
            with item.path.open("rb") as file:
                file.seek(item.offset)
                return file.read(n if item.size is None else min(item.size, n))
        except OSError as err:
            raise DataError(f"{item.id}: {item.file}: {err.strerror}") from None


def evenly_spaced(n: int, limit: int) -> list[int]:
    """`limit` of n indices, all if there are no more: a data set may be sorted."""
    count = min(n, limit)
    return [i * n // count for i in range(count)]
