"""Where `texttok sample` puts images: a folder that grows image by image, and holds what is needed to go on and to check it.

OUT/images/000000.png ...   or, as ADM's evaluator reads them, OUT/samples.npz: arr_0 uint8 (n, S, S, 3), arr_1 labels
OUT/grid.png                the first images
OUT/samples.jsonl           a line an image: how it was made; also a manifest and a captions file
OUT/settings.json           what all images have in common: another run must agree with it to go on
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from texttok_cli.data import load_image, save_png, save_pngs, to_tensor
from texttok_cli.errors import DataError, UsageError
from texttok_cli.files import atomic_path, check_can_be_folder, json_object, write_json
from texttok_cli.metrics.sources import NpzImages, writing_npz

if TYPE_CHECKING:
    from torch import Tensor

GRID_IMAGES = 64
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class SampleFolder:
    """The images 0 to n-1 of one run; several processes may fill it, each with its share."""

    def __init__(self, path: Path, n: int, settings: Mapping[str, Any]) -> None:
        """`settings` hold `format`. DataError for a folder that holds something else, or images made with other settings."""
        self.path, self.n, self.settings = path, n, json.loads(json.dumps(settings))
        self.images, self.npz, self.grid = path / "images", path / "samples.npz", path / "grid.png"
        self._settings_file = path / "settings.json"
        self._check()
        self._there = set(range(n)) if self.npz.exists() else {i for i in range(n) if _is_whole(self.image(i))}

    def image(self, i: int) -> Path:
        """Where image i is, or until the .npz is written will be."""
        return self.images / f"{i:06d}.png"

    def missing(self) -> list[int]:
        """The images that are still to be made."""
        return [i for i in range(self.n) if i not in self._there]

    def add(self, numbers: Sequence[int], images: Tensor) -> None:
        """Write uint8 (B, 3, S, S); when this is cut off, each image is there whole or not at all."""
        if not self.begun:
            write_json(self._settings_file, self.settings)
        save_pngs(map(self.image, numbers), images)
        self._there.update(numbers)

    @property
    def begun(self) -> bool:
        """Whether anything was written, in this run or before."""
        return self._settings_file.exists()

    def record(self, about: Callable[[int], Mapping[str, Any]]) -> None:
        """samples.jsonl: what `about` says of each image that is there, of this process or another."""
        self._there.update(i for i in self.missing() if _is_whole(self.image(i)))
        with atomic_path(self.path / "samples.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            for i in sorted(self._there):
                place = {} if self.settings["format"] == "npz" else {"image": self.image(i).relative_to(self.path).as_posix()}
                file.write(json.dumps({"id": self._id(i), **place, **about(i)}) + "\n")

    def finish(self, *, labels: Sequence[int] | None, columns: int) -> None:
        """The grid, and of format npz the one file instead of the many. DataError unless all images are there."""
        if self.missing():
            raise DataError(f"{self.path}: {len(self.missing()):,} images are missing; all processes must write to the same folder")
        if not self.npz.exists():
            self._draw_grid(columns)
            if self.settings["format"] == "npz":
                self._write_npz(labels)
        if self.settings["format"] == "npz" and self.images.exists():
            shutil.rmtree(self.images)

    def _id(self, i: int) -> str:
        """As `texttok eval` calls the image."""
        return str(i) if self.settings["format"] == "npz" else self.image(i).stem

    def _check(self) -> None:
        check_can_be_folder(self.path, else_name="")
        if self.path.suffix in (".npz", ".png"):
            raise UsageError(f"{self.path}: -o names a folder; with --format npz it will hold samples.npz")
        if not self.begun:
            if self.images.exists() or self.npz.exists():
                raise DataError(f"{self.path}: holds images that are not known to be of this run (no settings.json): choose another -o OUT")
            return
        found = json_object(self._settings_file.read_bytes())
        if found is None:
            raise DataError(f"{self._settings_file}: damaged; choose another -o OUT")
        found.setdefault("device", self.settings.get("device"))  # older folders do not say it
        for key in self.settings | found:
            ours, theirs = self.settings.get(key), found.get(key)
            if ours != theirs:
                name = key.replace("_", " ")
                raise DataError(f"{self.path}: holds samples with {name} {_short(theirs)}, not {_short(ours)}; choose another -o OUT")
        if self.npz.exists():
            self._check_npz()

    def _check_npz(self) -> None:
        try:
            there = len(NpzImages(self.npz).ids)
        except DataError as err:
            raise DataError(f"{err}; remove it to make its images again") from None
        if there != self.n:
            raise DataError(f"{self.npz}: holds {there:,} images, not {self.n:,}; remove it to make its images again")

    def _open(self, i: int, size: int | None = None) -> Image.Image:
        """An image that was there before may be of another program: DataError unless it can be read, and is of this size."""
        path = self.image(i)
        image = load_image(path.read_bytes(), name=str(path))
        if size is not None and image.size != (size, size):
            raise DataError(f"{path}: is {image.width} x {image.height}, not {size} x {size}; remove it to make it again")
        return image

    def _draw_grid(self, columns: int) -> None:
        size = self._open(0).width
        images = [self._open(i, size) for i in range(min(self.n, GRID_IMAGES))]
        columns = min(columns, len(images))
        grid = Image.new("RGB", (columns * size, math.ceil(len(images) / columns) * size), "white")
        for i, image in enumerate(images):
            grid.paste(image, (i % columns * size, i // columns * size))
        save_png(self.grid, grid)

    def _write_npz(self, labels: Sequence[int] | None) -> None:
        size = self._open(0).width
        with atomic_path(self.npz) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with writing_npz(archive, self.n, size) as write:
                for i in range(self.n):
                    write(to_tensor(self._open(i, size))[None])
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.array(labels, dtype=np.int64))


def _is_whole(path: Path) -> bool:
    """Whether a PNG is there to its end: one that another program cut or emptied is made again."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), 2)
            return file.read() == PNG_END
    except OSError:
        return False


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
