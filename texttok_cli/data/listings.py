"""Images that are files: in a folder, in a manifest, in a list of paths; and the captions beside them."""

from __future__ import annotations

import csv
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from io import TextIOWrapper
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO

from texttok_cli.data.items import IMAGE_SUFFIXES, Item, Skipped
from texttok_cli.errors import DataError
from texttok_cli.files import json_object

FOREIGN_SUFFIXES = {".heic", ".heif", ".jxl", ".svg", ".eps", ".psd", ".jp2", ".raw", ".dng"}  # images, but not for us
IMAGES = IMAGE_SUFFIXES | FOREIGN_SUFFIXES
LIST_ENCODING = "utf-8-sig"
MAX_TEXT_BYTES = 1 << 20  # of the text that stands beside an image
MAX_DEPTH = 200  # folders in folders; Python itself gives up at some hundreds
NOT_UTF8 = "its name is not UTF-8; rename it"


def from_list(lines: Iterable[str]) -> Iterator[Item | Skipped]:
    """Paths of image files, one a line; the path as written is the id."""
    if isinstance(lines, TextIOWrapper) and lines.encoding != LIST_ENCODING:
        # UTF-8 as all else that is read, also on Windows; other bytes as in file names, or the first line with some would end the list.
        lines.reconfigure(encoding=LIST_ENCODING, errors="surrogateescape")
    for line in lines:
        name = line.rstrip("\r\n")
        if name and not is_utf8(name):
            yield Skipped(ascii(name), NOT_UTF8)
        elif name:
            path = Path(name)
            yield captioned(Item(name, str(path))) if _is_file(path) else Skipped(name, "no such file")


def from_folder(folder: Path) -> Iterator[Item | Skipped]:
    """Images below a folder, sorted by path; hidden ones are left out. The folder an image lies in is its class.

    A link to a folder is followed, under each of its names, unless it leads back to a folder that it lies in.
    """
    items = []
    for entry in _walk(folder):
        if isinstance(entry, Skipped):
            yield entry
        else:
            items.append(entry)
    captions = folder / "captions.jsonl"
    yield from with_captions(items, captions) if captions.is_file() else items


def _walk(folder: Path, below: str = "", around: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Item | Skipped]:
    """The images in `folder/below` and deeper. `around` are the folders it lies in, by device and inode."""
    here = folder / below
    try:
        status = here.stat()
        with os.scandir(here) as listing:
            entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=attrgetter("name"))
    except OSError as err:
        yield Skipped(below or str(folder), f"{err.strerror}")
        return
    if (status.st_dev, status.st_ino) in around:
        yield Skipped(below, "a link to a folder that it lies in")
        return
    if len(around) > MAX_DEPTH:
        yield Skipped(below, f"over {MAX_DEPTH} folders deep")
        return
    names = {entry.name.casefold() for entry in entries}
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        is_folder, is_file = _kind(entry)
        if is_folder:
            yield from _walk(folder, path, around | {(status.st_dev, status.st_ino)})
        elif (found := _found(entry, path, here, names, is_file=is_file)) is not None:
            yield found


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether it is, or links to, a folder or a file. Only links take a look at the disk."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:  # a circle of links, or a way through a closed folder
        return False, False


def _found(entry: os.DirEntry[str], path: str, here: Path, names: set[str], *, is_file: bool) -> Item | Skipped | None:
    """What an entry of the folder `here` that is no folder is to a dataset; `names` are all in that folder, casefolded."""
    stem, dot, ending = entry.name.rpartition(".")
    suffix = (dot + ending).lower() if dot else ""
    if not is_file and entry.is_symlink() and (suffix in IMAGES or not suffix):  # without a suffix: perhaps once to a folder of images
        return Skipped(path, "a link to nothing")
    if suffix not in IMAGES or not is_file:
        return None
    if not is_utf8(path):
        return Skipped(ascii(path), NOT_UTF8)
    if suffix in FOREIGN_SUFFIXES:
        return Skipped(path, foreign(suffix))
    item = Item(path, str(here / entry.name), class_name=path.rpartition("/")[0] or None)
    # The names spare a look for each image that has no text. Casefolded, as A.TXT is A.txt on some disks.
    return captioned(item) if f"{stem}.txt".casefold() in names else item


def foreign(suffix: str) -> str:
    """The reason to skip an image of FOREIGN_SUFFIXES."""
    return f"{suffix} images can't be read; convert it to PNG or JPEG"


def from_manifest(path: Path) -> Iterator[Item | Skipped]:
    """Rows with `image` (relative to the manifest) and optionally `id`, `caption`, `class`."""
    for number, row, fault in _rows(path, errors="surrogateescape"):
        where = f"{path.name}:{number}"
        if fault:
            yield Skipped(where, fault)
            continue
        if row is None or not isinstance(row.get("image"), str) or not row["image"]:
            yield Skipped(where, "no 'image' in this line")
            continue
        image = path.parent / row["image"]
        # An id or a class may be a number, 0 among them.
        item_id, caption, class_name = (None if row.get(key) in (None, "") else row[key] for key in ("id", "caption", "class"))
        if not is_utf8(f"{row['image']}{item_id}{caption}{class_name}"):
            yield Skipped(where, "not UTF-8 text; rename or rewrite it as UTF-8")
        elif not _is_file(image):
            yield Skipped(where, f"{row['image']}: no such file")
        elif not isinstance(caption, str | None) or not all(isinstance(v, str | int | None) for v in (item_id, class_name)):
            yield Skipped(where, "caption, class and id must be text")
        else:
            label = None if class_name is None else str(class_name)
            item = Item(row["image"] if item_id is None else str(item_id), str(image), caption, label)
            yield item if caption and caption.strip() else captioned(item)


def captioned(item: Item) -> Item | Skipped:
    """The item with the caption in NAME.txt beside its image, if there is one; without a caption it would be another item."""
    file = item.path.with_suffix(".txt")
    try:
        status = file.stat()
        if stat.S_ISDIR(status.st_mode):
            return replace(item, caption=None)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_TEXT_BYTES:  # a pipe or a device would be read for ever
            return Skipped(item.id, f"its caption {file} is no file, or one of over {MAX_TEXT_BYTES:,} bytes")
        return replace(item, caption=file.read_text(encoding="utf-8-sig").strip() or None)
    except (FileNotFoundError, NotADirectoryError):
        return replace(item, caption=None)
    except OSError as err:
        return Skipped(item.id, f"{file}: {err.strerror}")
    except UnicodeDecodeError:
        return Skipped(item.id, f"its caption {file} is not UTF-8 text; rewrite it as UTF-8")


def with_captions(items: list[Item], path: Path) -> list[Item]:
    """Items with the captions of a captions.jsonl, found by id or, where only one item has it, by file name or stem.

    Raises DataError for a file that is not there or a line that can't be read.
    """
    captions = read_captions(path)
    by_id = all(item.id in captions for item in items)  # then nobody asks for file names, which take a while for a million
    sharing = Counter(() if by_id else (alias for item in items for alias in {Path(item.id).name, Path(item.id).stem}))

    def caption_of(item: Item) -> str | None:
        if item.id in captions:
            return captions[item.id]
        file = Path(item.id)
        return next((captions[key] for key in (file.name, file.stem) if key in captions and sharing[key] == 1), item.caption)

    return [replace(item, caption=caption_of(item)) for item in items]


def read_captions(path: Path) -> dict[str, str]:
    """A captions.jsonl: captions by id. DataError for a file that is not there or a line that can't be read."""
    return dict(caption_lines(path))


def _is_file(path: Path) -> bool:
    """Also of a name that no file can have, such as one too long: Path.is_file raises an error for it."""
    return os.path.isfile(path)  # noqa: PTH113


def is_utf8(text: str) -> bool:
    """Whether a file's name or a text can be written down: bytes that are no UTF-8 arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def caption_lines(path: Path) -> Iterator[tuple[str, str]]:
    """A captions.jsonl: (id, caption) line by line. DataError for a file that is not there or a line that can't be read."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    for number, row, fault in _rows(path):
        if fault:
            raise DataError(f"{path}:{number}: {fault}")
        row = row or {}
        key = row.get("id", row.get("image"))
        if isinstance(key, int):
            key = str(key)
        if not isinstance(key, str) or not isinstance(row.get("caption"), str):
            raise DataError(f"{path}:{number}: not a line of the form " + '{"id": ..., "caption": ...}')
        if not is_utf8(key + row["caption"]):
            raise DataError(f"{path}:{number}: its id or caption is not Unicode text; rewrite it as UTF-8")
        if row["caption"].strip():  # a blank one is none, as an empty NAME.txt is
            yield key, row["caption"]


def _rows(path: Path, *, errors: str = "strict") -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """(line number, row, what is wrong with it) of a .csv or else .jsonl; a line that is no JSON object is the row None."""
    try:
        with path.open(encoding="utf-8-sig", errors=errors, newline="") as file:
            if path.suffix.lower() == ".csv":
                yield from _csv_rows(path, file)
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, json_object(line), ""
    except (UnicodeDecodeError, csv.Error) as err:
        raise DataError(f"{path}: not readable as text: {err}") from None


def _csv_rows(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any], str]]:
    reader = csv.DictReader(file, skipinitialspace=True)
    reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or []]
    if "image" not in columns:
        raise DataError(f"{path}: the header line has no column 'image'")
    for row in reader:
        more = row.pop(None, [])  # cells past the header; blank ones are the commas that spreadsheets put at the end
        wrong = any(cell.strip() for cell in more)
        cells = f"{len(columns) + len(more)} cells for {len(columns)} columns"
        yield reader.line_num, row, f"{cells}: put captions that hold commas into quotes" if wrong else ""
