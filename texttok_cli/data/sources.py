"""Where images lie: files, folders, manifests, webdataset shards, a list on stdin; one random-access list of items for all."""

from __future__ import annotations

import csv
import glob
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from texttok_cli.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Item:
    """Where one image lies and what is known of it before it is read.

    `id` is unique in its dataset: the path below a folder, a manifest's `id` or `image`, a shard's key, a file's name.
    """

    id: str
    path: Path
    caption: str | None = None
    class_name: str | None = None
    offset: int = 0  # within `path`, for a member of a shard
    size: int | None = None  # None: the whole file

    @property
    def in_shard(self) -> bool:
        """Whether the image is a member of a shard rather than a file."""
        return self.size is not None


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something in the inputs that is no usable entry, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """Images in a fixed order, read by index; `skipped` lists what the inputs held that can't be an item."""

    items: list[Item]
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> bytes:
        """Bytes of one image file. DataError if it has gone or is larger than MAX_FILE_BYTES."""
        item = self.items[index]
        try:
            with item.path.open("rb") as file:
                file.seek(item.offset)
                data = file.read(MAX_FILE_BYTES + 1 if item.size is None else item.size)
        except OSError as err:
            raise DataError(f"{item.id}: {err.strerror}") from None
        if len(data) > MAX_FILE_BYTES:
            raise DataError(f"{item.id}: larger than {MAX_FILE_BYTES:,} bytes")
        return data


def open_dataset(inputs: Sequence[str | Path], *, captions: Path | None = None, caption_field: str | None = None) -> Dataset:
    """List the images of all inputs: image files, folders, .jsonl or .csv manifests, .tar shards (globs and {000..127} allowed), `-`.

    `caption_field` names the caption among a shard's .json keys (see `_shard_caption`); `captions` is a captions.jsonl whose
    entries win over what stands beside the images. Nothing is decoded. Raises DataError for an input that is not there, is of
    an unknown kind or holds no image, for an unreadable line of `captions`, and for two images with one id.
    """
    items: list[Item] = []
    skipped: list[Skipped] = []
    for name in inputs:
        for source in _expand(str(name)):
            found = len(items) + len(skipped)
            for entry in _list_source(source, caption_field):
                (items if isinstance(entry, Item) else skipped).append(entry)  # type: ignore[attr-defined]
            if len(items) + len(skipped) == found:
                raise DataError(f"{source}: holds no image")
    twice = [item_id for item_id, n in Counter(item.id for item in items).items() if n > 1]
    if twice:
        raise DataError(f"{twice[0]}: {len(twice)} ids stand for more than one image of these inputs; give a manifest with an id for each")
    if captions is not None:
        items = _with_captions(items, captions)
    return Dataset(items, skipped)


def _expand(name: str) -> list[str]:
    """Braces of numbers and globs -> existing paths, sorted."""
    if name == "-" or Path(name).exists():
        return [name]
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if numbers:
        first, last = numbers.groups()
        values = range(int(first), int(last) + 1)
        return [path for n in values for path in _expand(name.replace(numbers[0], str(n).zfill(len(first)), 1))]
    found = sorted(glob.glob(name))
    if not found:
        raise DataError(f"{name}: no such file or folder")
    return found


def _list_source(source: str, caption_field: str | None) -> Iterator[Item | Skipped]:
    if source == "-":
        return _from_list(sys.stdin)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return _from_shard(path, caption_field)
    if suffix in (".jsonl", ".csv"):
        return _from_manifest(path)
    if suffix in IMAGE_SUFFIXES:
        return iter([Item(path.name, path, _sidecar(path))])
    raise DataError(f"{path}: neither an image, a folder, a manifest (.jsonl, .csv) nor a shard (.tar)")


def _from_list(lines: Iterable[str]) -> Iterator[Item | Skipped]:
    """Paths, one a line; the path as written is the id."""
    for line in lines:
        name = line.rstrip("\n")
        if name:
            path = Path(name)
            yield Item(name, path, _sidecar(path)) if path.is_file() else Skipped(name, "no such file")


def _from_folder(folder: Path) -> Iterator[Item | Skipped]:
    listed = folder / "captions.jsonl"
    captions = dict(_caption_lines(listed)) if listed.is_file() else {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            name = relative.as_posix()
            class_name = relative.parent.as_posix() if len(relative.parts) > 1 else None
            yield Item(name, path, captions.get(name, _sidecar(path)), class_name)


def _from_manifest(path: Path) -> Iterator[Item | Skipped]:
    """Rows with `image` (relative to the manifest) and optionally `id`, `caption`, `class`."""
    for number, row in _rows(path):
        where = f"{path.name}:{number}"
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"]:
            yield Skipped(where, "no 'image' in this line")
            continue
        image = path.parent / row["image"]
        if not image.is_file():
            yield Skipped(where, f"{row['image']}: no such file")
            continue
        texts = [row.get(key) or None for key in ("caption", "class")]
        if any(text is not None and not isinstance(text, str) for text in texts):
            yield Skipped(where, "caption and class must be text")
            continue
        caption, class_name = texts
        yield Item(str(row.get("id") or row["image"]), image, caption or _sidecar(image), class_name)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, row) of a manifest; an unreadable JSON line is None."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file)
                if "image" not in (reader.fieldnames or []):
                    raise DataError(f"{path}: the header line has no column 'image'")
                for row in reader:
                    yield reader.line_num, row
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, _json_or_none(line)
    except (UnicodeDecodeError, csv.Error) as err:
        raise DataError(f"{path}: not readable as text: {err}") from None


def _from_shard(path: Path, caption_field: str | None) -> Iterator[Item | Skipped]:
    """Members KEY.jpg with KEY.json / KEY.txt / KEY.cls beside them; only headers and texts are read."""
    images: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, dict[str, bytes]] = {}
    broken = ""
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as shard:
                for member in shard:
                    key, _, suffix = member.name.partition(".") if "/" not in member.name else _split_member(member.name)
                    if not member.isfile():
                        continue
                    if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                        images[key] = member
                    elif suffix in ("json", "txt", "cls"):
                        file_object = shard.extractfile(member)
                        texts.setdefault(key, {})[suffix] = file_object.read() if file_object else b""
        except (tarfile.TarError, OSError, EOFError) as err:
            broken = str(err) or type(err).__name__
    size = path.stat().st_size
    for key, member in images.items():
        if member.offset_data + member.size > size:
            yield Skipped(key, f"{path.name} is cut short within this image")
            continue
        info = _json_or_none(texts.get(key, {}).get("json", b"{}").decode("utf-8", "replace"))
        if not isinstance(info, dict):
            yield Skipped(key, f"its .json in {path.name} is damaged")
            continue
        caption = _shard_caption(info, texts.get(key, {}), caption_field)
        yield Item(key, path, caption, _class_of(info, texts.get(key, {})), member.offset_data, member.size)
    if broken:
        yield Skipped(path.name, f"unreadable from some point on: {broken}")


def _split_member(name: str) -> tuple[str, str, str]:
    """`a/b.c.jpg` -> ("a/b", ".", "c.jpg"): a webdataset key ends at the first dot of the last path component."""
    folder, _, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return f"{folder}/{key}", dot, suffix


def _shard_caption(info: Mapping[str, Any], texts: Mapping[str, bytes], caption_field: str | None) -> str | None:
    """The caption that `caption_field` names among the .json's keys.

    None: `caption`, else the .txt, else the first of `captions`. `longest`: the longest of `captions`. `measured`: that key, or where
    it is null the last of `captions` (emoji: name and tags). Any other key: its text, or the first of its list.
    """
    listed = [text for text in info.get("captions") or [] if isinstance(text, str)]
    if caption_field is None:
        value = info.get("caption") or texts.get("txt", b"").decode("utf-8", "replace").strip() or (listed[0] if listed else None)
    elif caption_field == "longest":
        value = max(listed, key=len, default=None)
    elif caption_field == "measured":
        value = info.get("measured") or (listed[-1] if listed else None)
    else:
        value = info.get(caption_field)
        value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) and value else None


def _class_of(info: Mapping[str, Any], texts: Mapping[str, bytes]) -> str | None:
    value = info.get("class", texts.get("cls", b"").decode("utf-8", "replace").strip() or None)
    return None if value is None else str(value)


def _sidecar(path: Path) -> str | None:
    """The caption in NAME.txt beside the image."""
    file = path.with_suffix(".txt")
    if not file.is_file():
        return None
    try:
        return file.read_text(encoding="utf-8-sig").strip() or None
    except UnicodeDecodeError:
        raise DataError(f"{file}: not readable as UTF-8 text") from None


def _caption_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(id, caption) of a captions.jsonl. DataError names an unreadable line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    for number, row in _rows(path):
        key = row.get("id", row.get("image")) if isinstance(row, dict) else None
        if not isinstance(key, str) or not isinstance(row.get("caption"), str):
            raise DataError(f"{path}:{number}: not a line of the form " + '{"id": ..., "caption": ...}')
        yield key, row["caption"]


def _with_captions(items: list[Item], path: Path) -> list[Item]:
    """Items with the file's captions, found by id or, where only one image has it, by name or stem."""
    captions = dict(_caption_lines(path))
    stems = Counter(stem for item in items for stem in {Path(item.id).name, Path(item.id).stem})

    def caption_of(item: Item) -> str | None:
        for key in (item.id, Path(item.id).name, Path(item.id).stem):
            if key in captions and (key == item.id or stems[key] == 1):
                return captions[key]
        return item.caption

    return [replace(item, caption=caption_of(item)) for item in items]


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
