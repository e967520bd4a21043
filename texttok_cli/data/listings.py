"""Images that are files: in a folder, in a manifest, in a list of paths; and the captions beside them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from texttok_cli.data.items import IMAGE_SUFFIXES, Item, Skipped
from texttok_cli.errors import DataError

FOREIGN_SUFFIXES = {".heic", ".heif", ".jxl", ".svg", ".eps", ".psd", ".jp2", ".raw", ".dng"}  # images, but not for us
NOT_UTF8 = "its name is not UTF-8; rename it"


def from_list(lines: Iterable[str]) -> Iterator[Item | Skipped]:
    """Paths of image files, one a line; the path as written is the id."""
    if isinstance(lines, TextIOWrapper) and lines.errors != "surrogateescape":
        lines.reconfigure(errors="surrogateescape")  # as in file names, or the first line of other bytes would end the list
    for line in lines:
        name = line.rstrip("\r\n")
        if name and not _is_utf8(name):
            yield Skipped(ascii(name), NOT_UTF8)
        elif name:
            path = Path(name)
            yield Item(name, str(path), sidecar(path)) if path.is_file() else Skipped(name, "no such file")


def from_folder(folder: Path) -> Iterator[Item | Skipped]:
    """Images below a folder, sorted by path; hidden ones are left out. The folder an image lies in is its class."""
    items = []
    for path in sorted(folder.rglob("*")):
        relative, suffix = path.relative_to(folder), path.suffix.lower()
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        if suffix in IMAGE_SUFFIXES and not _is_utf8(relative.as_posix()):
            yield Skipped(ascii(relative.as_posix()), NOT_UTF8)
        elif suffix in FOREIGN_SUFFIXES:
            yield Skipped(relative.as_posix(), f"{suffix} images can't be read; convert it to PNG or JPEG")
        elif suffix in IMAGE_SUFFIXES:
            class_name = relative.parent.as_posix() if len(relative.parts) > 1 else None
            items.append(Item(relative.as_posix(), str(path), sidecar(path), class_name))
    captions = folder / "captions.jsonl"
    yield from with_captions(items, captions) if captions.is_file() else items


def from_manifest(path: Path) -> Iterator[Item | Skipped]:
    """Rows with `image` (relative to the manifest) and optionally `id`, `caption`, `class`."""
    for number, row in _rows(path, errors="surrogateescape"):
        where = f"{path.name}:{number}"
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"]:
            yield Skipped(where, "no 'image' in this line")
            continue
        image = path.parent / row["image"]
        # An id or a class may be a number, 0 among them.
        item_id, caption, class_name = (None if row.get(key) in (None, "") else row[key] for key in ("id", "caption", "class"))
        if not _is_utf8(f"{row['image']}{item_id}{caption}{class_name}"):
            yield Skipped(where, "not UTF-8 text; rename or rewrite it as UTF-8")
        elif not image.is_file():
            yield Skipped(where, f"{row['image']}: no such file")
        elif not isinstance(caption, str | None) or not all(isinstance(v, str | int | None) for v in (item_id, class_name)):
            yield Skipped(where, "caption, class and id must be text")
        else:
            label = None if class_name is None else str(class_name)
            text = caption if caption and caption.strip() else sidecar(image)
            yield Item(row["image"] if item_id is None else str(item_id), str(image), text, label)


def sidecar(path: Path) -> str | None:
    """The caption in NAME.txt beside the image."""
    file = path.with_suffix(".txt")
    if not file.is_file():
        return None
    try:
        return file.read_text(encoding="utf-8-sig").strip() or None
    except UnicodeDecodeError:
        raise DataError(f"{file}: not readable as UTF-8 text") from None


def with_captions(items: list[Item], path: Path) -> list[Item]:
    """Items with the captions of a captions.jsonl, found by id or, where only one item has it, by file name or stem.

    Raises DataError for a file that is not there or a line that can't be read.
    """
    captions = read_captions(path)
    sharing = Counter(alias for item in items for alias in {Path(item.id).name, Path(item.id).stem})

    def caption_of(item: Item) -> str | None:
        for key in (item.id, Path(item.id).name, Path(item.id).stem):
            if key in captions and (key == item.id or sharing[key] == 1):
                return captions[key]
        return item.caption

    return [replace(item, caption=caption_of(item)) for item in items]


def read_captions(path: Path) -> dict[str, str]:
    """A captions.jsonl: captions by id. DataError for a file that is not there or a line that can't be read."""
    return dict(caption_lines(path))


def _is_utf8(name: str) -> bool:
    """Whether a file's name or a text can be written down: bytes that are no UTF-8 arrive as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def json_or_none(text: str) -> Any:
    """The value of a JSON text, or None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def caption_lines(path: Path) -> Iterator[tuple[str, str]]:
    """A captions.jsonl: (id, caption) line by line. DataError for a file that is not there or a line that can't be read."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    for number, row in _rows(path):
        key = row.get("id", row.get("image")) if isinstance(row, dict) else None
        if isinstance(key, int):
            key = str(key)
        if not isinstance(key, str) or not isinstance(row.get("caption"), str):
            raise DataError(f"{path}:{number}: not a line of the form " + '{"id": ..., "caption": ...}')
        if row["caption"].strip():  # a blank one is none, as an empty NAME.txt is
            yield key, row["caption"]


def _rows(path: Path, *, errors: str = "strict") -> Iterator[tuple[int, Any]]:
    """(line number, row) of a .csv or else .jsonl; an unreadable JSON line is None."""
    try:
        with path.open(encoding="utf-8-sig", errors=errors, newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file)
                if "image" not in (reader.fieldnames or []):
                    raise DataError(f"{path}: the header line has no column 'image'")
                for row in reader:
                    yield reader.line_num, row
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, json_or_none(line)
    except (UnicodeDecodeError, csv.Error) as err:
        raise DataError(f"{path}: not readable as text: {err}") from None
