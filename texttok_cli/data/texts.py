"""The texts of images; and those that come without: prompts, and unseen captions by class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from texttok_cli.config.schema import TextCondition
from texttok_cli.data.items import Item
from texttok_cli.data.labels import class_text
from texttok_cli.data.listings import is_utf8
from texttok_cli.errors import DataError
from texttok_cli.files import json_object, sha256_file

NO_CAPTION_HELP = (
    "this model is conditioned on text: give --captions (encode also takes --caption), make captions with `texttok caption`,"
    " use --no-caption, or take the twin without text (--model baseline-32-128)"
)


def texts_for(items: Sequence[Item], cond: TextCondition, *, caption_field: str | None = None, remedy: str = NO_CAPTION_HELP) -> list[str]:
    """The text of each image: its caption, or its class put into a template.

    DataError names an image that has none with the remedy (for a shard item: with another `caption_field`), and an image whose class is
    a WordNet id instead of text.
    """
    return [_text_of(item, cond, caption_field, remedy) for item in items]


def check_words(items: Sequence[Item], captions: Sequence[str], limit: int) -> None:
    """DataError names the first image whose caption has more than `limit` words, counted as `texttok caption` does."""
    for item, caption in zip(items, captions, strict=True):
        words = len(caption.split())
        if words > limit:
            raise DataError(
                f"{item.id}: its caption has {words:,} words, data.max_words allows {limit:,}: make captions with"
                f" `texttok caption --max-words {limit}` and give them as data.captions"
            )


def _text_of(item: Item, cond: TextCondition, caption_field: str | None, remedy: str) -> str:
    if cond.source == "class_text" and item.class_name is not None:
        try:
            return class_text(item.class_name)
        except DataError as err:
            raise DataError(f"{item.id}: {err}") from None
    if item.caption is None and item.in_shard and caption_field is not None:
        where = f"{item.id}: its .json has no caption under {caption_field!r}"
        raise DataError(f"{where}; name another key with --caption-field or data.caption_field")
    if item.caption is None:
        raise DataError(f"{item.id}: has no caption; {remedy}")
    return item.caption


class UnseenCaptions:
    """Captions by class for the detokenizer, made so that no training image has them (Sec. 3.2)."""

    def __init__(self, path: Path) -> None:
        """Read lines of {"class": ..., "caption": ...}. DataError for a file or line that can't be read."""
        self.path = path
        self._of: dict[str, list[str]] = {}
        for where, line in _lines(path):
            row = json_object(line) or {}
            name, caption = row.get("class"), row.get("caption")
            if not isinstance(name, str) or not isinstance(caption, str) or not caption:
                raise DataError(f"{where}: not a line of the form " + '{"class": ..., "caption": ...}')
            if not is_utf8(caption):
                raise DataError(f"{where}: its caption is not Unicode text; rewrite it as UTF-8")
            self._of.setdefault(name, []).append(caption)
        self.sha256 = sha256_file(path)

    def draw(self, class_name: str, seed: int) -> str:
        """The same of a class for the same seed and list. DataError for a class without captions."""
        if class_name not in self._of:
            raise DataError(f"{self.path}: has no caption of class {class_name}; `texttok caption --unseen-per-class` makes some")
        digest = hashlib.sha256(f"{seed} {class_name}".encode()).digest()
        captions = self._of[class_name]
        return captions[int.from_bytes(digest[:8], "big") % len(captions)]


def read_prompts(path: Path) -> list[str]:
    """One a line; of a .jsonl file the `caption` of each line. DataError for a file without any and a line that can't be read."""
    prompts = []
    for where, line in _lines(path):
        row = json_object(line) if path.suffix.lower() == ".jsonl" else {"caption": line.strip()}
        if row is None or not isinstance(row.get("caption"), str):
            raise DataError(f"{where}: not a line of the form " + '{"caption": ...}')
        prompts.append(row["caption"])
    if not prompts:
        raise DataError(f"{path}: holds no prompt")
    return prompts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of each line that isn't blank."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not readable as UTF-8 text") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line
