"""From what a person names (files, folders, manifests, shards, a list on stdin) to one dataset."""

from __future__ import annotations

import glob
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from texttok_cli.data.items import IMAGE_SUFFIXES, Dataset, Item, Skipped
from texttok_cli.data.listings import captioned, from_folder, from_list, from_manifest, with_captions
from texttok_cli.data.shards import from_shard
from texttok_cli.errors import DataError

SAMPLE_SET = Path(__file__).parents[1] / "pretrained" / "emoji128-val.tar"  # pictures that come with the package


def open_dataset(
    inputs: str | Path | Sequence[str | Path], *, captions: str | Path | None = None, caption_field: str | None = None
) -> Dataset:
    """List the images of one input or all: image files, folders, .jsonl or .csv manifests, .tar shards (globs and {000..127} allowed), `-`.

    Nothing is decoded. An id that two inputs share gets its input before it: `INPUT/id` (an image file: its path as given).

    `caption_field` names the caption among the keys of a shard's .json: its text, or the first of its list. Three are special:
    None takes `caption`, else the .txt, else the first of `captions`; `longest` the longest of `captions`; `measured` that key,
    or where it is null the last of `captions`. `captions` is a captions.jsonl whose entries win over what stands beside the images.

    What can't be used, such as an image whose NAME.txt is not UTF-8, is in the data set's `skipped`.

    Raises DataError for an input that is not there, is of an unknown kind or holds no image, if no image can be used, for an
    unreadable line of `captions` or if it has no image of these, for an id that stands for two images of one input, and for no
    input at all.
    """
    inputs = [inputs] if isinstance(inputs, str | Path) else inputs
    captions = None if captions is None else Path(captions)
    found: list[tuple[str, Item]] = []
    skipped: list[Skipped] = []
    for source in (source for name in inputs for source in expand(str(name))):
        entries = list(_list_source(source, caption_field))
        if not entries:
            raise DataError(f"{source}: holds no image")
        found += [(source, entry) for entry in entries if isinstance(entry, Item)]
        skipped += [entry for entry in entries if isinstance(entry, Skipped)]
    if skipped and not found:
        raise DataError(f"{inputs[0]}: holds no image that can be used ({skipped[0].id}: {skipped[0].reason})")
    if not found:
        raise DataError("no input: name images, folders, manifests or shards")
    items = _with_unique_ids(found)
    if captions is not None:
        # Without one of their own first, to see that the file is of these images at all.
        named = with_captions([replace(item, caption=None) for item in items], captions)
        if not any(item.caption for item in named):
            raise DataError(f"{captions}: none of its ids is one of these images, such as {items[0].id}")
        items = [item if new.caption is None else new for item, new in zip(items, named, strict=True)]
    return Dataset(items, skipped)


def expand(name: str) -> list[str]:
    """Braces of numbers and globs -> existing paths, sorted."""
    if name == "-" or Path(name).exists():
        return [name]
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if numbers:
        first, last = numbers.groups()
        if int(first) > int(last):
            raise DataError(f"{name}: the range runs backwards; put the smaller number first")
        values = range(int(first), int(last) + 1)
        return [path for n in values for path in expand(name.replace(numbers[0], str(n).zfill(len(first)), 1))]
    found = sorted(glob.glob(name))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not found:
        raise DataError(f"{name}: no such file or folder")
    return found


def _list_source(source: str, caption_field: str | None) -> Iterator[Item | Skipped]:
    if source == "-":
        return from_list(sys.stdin)
    path = Path(source)
    if path.is_dir():
        return from_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return from_shard(path, caption_field)
    if suffix in (".jsonl", ".csv"):
        return from_manifest(path)
    if suffix in IMAGE_SUFFIXES:
        return iter([captioned(Item(path.name, str(path)))])
    raise DataError(f"{path}: neither an image, a folder, a manifest (.jsonl, .csv) nor a shard (.tar)")


def _with_unique_ids(found: list[tuple[str, Item]]) -> list[Item]:
    shared = {item_id for item_id, n in Counter(item.id for _, item in found).items() if n > 1}
    items = [replace(item, id=_id_with_source(source, item)) if item.id in shared else item for source, item in found]
    twice = [item_id for item_id, n in Counter(item.id for item in items).items() if n > 1]
    if twice:
        raise DataError(f"{twice[0]}: {len(twice)} ids are used for more than one image of these inputs; give each image its own id")
    return items


def _id_with_source(source: str, item: Item) -> str:
    return source if item.path == Path(source) and not item.in_shard else f"{source.rstrip('/')}/{item.id}"
