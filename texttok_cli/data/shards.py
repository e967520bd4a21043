"""Webdataset shards: KEY.jpg with KEY.json / KEY.txt / KEY.cls beside it in a .tar, indexed once and read at random."""

from __future__ import annotations

import re
import tarfile
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from texttok_cli.data.items import IMAGE_SUFFIXES, Item, Skipped
from texttok_cli.data.listings import FOREIGN_SUFFIXES, IMAGES, MAX_TEXT_BYTES, foreign, is_utf8
from texttok_cli.files import json_object

TEXT_SUFFIXES = {".json", ".txt", ".cls"}
# A ValueError: a number in an extended header; Overflow and Memory: its size; Recursion: thousands of such headers on end.
TAR_DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError)
NOT_NORMAL = re.compile(r"/(?:[/.]|\Z)")  # where PurePosixPath, slow for millions, has more to do than to drop a "./" in front


@dataclass(slots=True)
class _Index:
    """What a pass over the headers found: images by key, texts by key and suffix."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and size; a TarInfo takes a kilobyte
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    unusable: list[tuple[str, Skipped]] = field(default_factory=list)  # by key: what looks like an image, but is none for us
    broken: str = ""  # why nothing more could be read, if so


def from_shard(path: Path, caption_field: str | None) -> Iterator[Item | Skipped]:
    """Images of a shard in its order; only headers and texts are read. What a cut or damaged shard has lost is Skipped."""
    index = _scan(path)
    file, size = str(path), path.stat().st_size  # one string for all items
    last = next(reversed(index.images), None)
    not_text = f"its caption or class in {path.name} is not Unicode text; rewrite it as UTF-8"
    for key, (offset, length) in index.images.items():
        texts = index.texts.get(key, {})
        info = json_object(texts[".json"]) if ".json" in texts else {}
        if not is_utf8(key):
            yield Skipped(ascii(key), f"its name in {path.name} is not UTF-8; rename it")
        elif offset + length > size:
            yield Skipped(key, f"{path.name} is cut short within this image")
        elif index.broken and not texts and (index.texts or key == last):
            yield Skipped(key, f"{path.name} is cut short after this image, where its caption may have been")
        elif info is None:
            yield Skipped(key, f"its .json in {path.name} is damaged")
        elif not isinstance(info.get("class"), str | int | None):
            yield Skipped(key, f"its class in {path.name} must be text")
        else:
            class_name = info["class"] if "class" in info else texts.get(".cls")
            caption = _caption(info, texts.get(".txt"), caption_field)
            item = Item(key, file, caption, None if class_name in (None, "") else str(class_name), offset, length)
            yield item if is_utf8(f"{item.caption}{item.class_name}") else Skipped(key, not_text)
    yield from index.skipped
    # Beside an image of the same key they are other fields of that sample, such as a mask in KEY.mask.png.
    yield from (entry for key, entry in index.unusable if key not in index.images)
    if index.broken:
        yield Skipped(path.name, f"unreadable from some point on: {index.broken}")


def _scan(path: Path) -> _Index:
    index = _Index()
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as shard:
                for member in shard:
                    if shard.offset < member.offset_data:  # tarfile would read the same headers again, for ever
                        raise tarfile.ReadError(f"the header of {member.name} has a negative size")
                    _note(index, shard, file, member)
                    shard.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                index.broken = _lost_end(file, shard.offset)
        except TAR_DAMAGED as err:
            index.broken = str(err) or type(err).__name__
    return index


def _note(index: _Index, shard: tarfile.TarFile, file: BinaryIO, member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name).as_posix() if NOT_NORMAL.search(member.name) else member.name.removeprefix("./")
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")  # webdataset: a key ends at the first dot of the last path component
    suffix = dot + suffix.lower()
    if not stem:  # a hidden file
        return
    key = folder + slash + stem
    if fault := _fault(member, suffix, suffix[suffix.rfind(".") :]):
        index.unusable.append((key, Skipped(member.name, fault)))
    elif not member.isfile():
        return
    elif suffix in IMAGE_SUFFIXES:
        if key in index.images:
            index.skipped.append(Skipped(member.name, f"{key} is already the key of another image in this shard"))
        index.images.setdefault(key, (member.offset_data, member.size))
    elif suffix in TEXT_SUFFIXES:
        data = b"" if member.size > MAX_TEXT_BYTES else _content(shard, file, member)
        index.texts.setdefault(key, {})[suffix] = data.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape").strip()


def _content(shard: tarfile.TarFile, file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    if member.issparse() and (parts := shard.extractfile(member)):
        return parts.read()
    file.seek(member.offset_data)  # it is mostly in the file's buffer by now, and extractfile's object costs more than the reading
    data = file.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _fault(member: tarfile.TarInfo, suffix: str, kind: str) -> str:
    """Why a member can't be used though it looks like an image by the last part of its suffix, `kind`; else ""."""
    if kind not in IMAGES or not (member.isfile() or member.issym() or member.islnk()):
        return ""
    if not member.isfile():
        return "a link, not a file: write shards with tar --hard-dereference --dereference"
    if member.issparse():
        return "stored in parts: write shards without tar --sparse"
    if kind in FOREIGN_SUFFIXES:
        return foreign(kind)
    return "" if suffix == kind else "its key ends at the first dot: rename it"


def _lost_end(file: BinaryIO, end: int) -> str:
    """Why the headers stop at byte `end`, if not at the archive's end mark: there tarfile stops without a word."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        return "it has no end mark, so it may be cut short"
    return f"the header at byte {end:,} is damaged or cut short" if block.strip(b"\0") or len(block) < tarfile.BLOCKSIZE else ""


def _caption(info: Mapping[str, Any], txt: str | None, caption_field: str | None) -> str | None:
    """The caption that `caption_field` names among the .json's keys, as `open_dataset` says."""
    listed = _texts(info.get("captions"))
    if caption_field is None:
        return next(iter([*_texts(info.get("caption")), *_texts(txt), *listed]), None)
    if caption_field == "longest":
        return max(listed, key=len, default=None)
    if caption_field == "measured":
        return next(iter([*_texts(info.get("measured")), *listed[-1:]]), None)
    return next(iter(_texts(info.get(caption_field))), None)


def _texts(value: Any) -> list[str]:
    """The non-empty texts in a JSON value that is a text or a list of them."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text]
