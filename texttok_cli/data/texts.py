"""Texts that come without images: prompts, and unseen captions by class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from texttok_cli.data.listings import json_or_none
from texttok_cli.errors import DataError
from texttok_cli.files import sha256_file


class UnseenCaptions:
    """Captions by class for the detokenizer, made so that no training image has them (Sec. 3.2)."""

    def __init__(self, path: Path) -> None:
        """Read lines of {"class": ..., "caption": ...}. DataError for a file or line that can't be read."""
        self.path = path
        self._of: dict[str, list[str]] = {}
        for where, line in _lines(path):
            row = json_or_none(line)
            name, caption = (row.get("class"), row.get("caption")) if isinstance(row, dict) else (None, None)
            if not isinstance(name, str) or not isinstance(caption, str) or not caption:
                raise DataError(f"{where}: not a line of the form " + '{"class": ..., "caption": ...}')
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
        row = json_or_none(line) if path.suffix.lower() == ".jsonl" else {"caption": line.strip()}
        if not isinstance(row, dict) or not isinstance(row.get("caption"), str):
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
