"""Files of JSON lines that grow as captions come: what is in them is not made again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from texttok_cli.errors import DataError
from texttok_cli.files import claim, json_object, naming

if TYPE_CHECKING:
    from texttok_cli.captioners.base import Captioner
    from texttok_cli.captioners.unseen import Writer


class CaptionLines:
    """One file, open for appending; a context."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        """Every line must have the entries `made_by`, else DataError. A last line that was cut off is taken away."""
        self.path, self.made_by = path, made_by
        drop_cut_line(path)
        last = self._check_lines()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        claim(path, self._file.fileno())
        if last and not last.endswith(b"\n"):
            self._file.write(b"\n")

    def __enter__(self) -> CaptionLines:
        return self

    def __exit__(self, *_: object) -> None:
        with self._named():
            self._file.close()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows, with `made_by` in each; they are in the file when this returns."""
        complete = [{**row, **self.made_by} for row in rows]
        with self._named():
            self._file.write("".join(json.dumps(row) + "\n" for row in complete).encode())
            self._file.flush()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Its lines, also those written before; read from the file, as a million of them take gigabytes of memory."""
        with self.path.open("rb") as file:
            yield from (row for row in map(_row, file) if row is not None)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise naming(self.path, err) from None

    def _check_lines(self) -> bytes:
        """The last line. DataError for one that can't be read or was not made by the same."""
        line = b""
        if not self.path.is_file():
            return line
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                row = _row(line)
                if (row is None and line.strip()) or (row is not None and not isinstance(row.get("id"), str | int | None)):
                    raise DataError(f"{self.path}:{number}: not a JSON line of captions; give another file with -o")
                if row is not None:
                    self._check(row)
        return line

    def _check(self, row: Mapping[str, Any]) -> None:
        for key, value in self.made_by.items():
            if row.get(key) != value:
                raise DataError(f"{self.path}: its captions have {key} {row.get(key)}, these would have {value}; give another file with -o")


def provenance_of(author: Captioner | Writer, max_words: int) -> dict[str, Any]:
    """What is said of every caption in a file: backend, model, prompt hash, limit of words."""
    return {
        "backend": author.backend,
        "model": author.model,
        "prompt_sha256": None if author.prompt is None else author.prompt.sha256,
        "max_words": max_words,
    }


def drop_cut_line(path: Path) -> bool:
    """Take away the last line of a file of JSON lines if it was cut off, as a kill in the midst of writing leaves it; whether it was.

    A file with other broken lines, or with a last line that is the begin of no JSON object, is left as it is.
    """
    if not path.is_file():
        return False
    whole, last = 0, b""
    with path.open("rb") as file:
        for line in file:
            whole, last = (whole + len(line), b"") if line.endswith(b"\n") else (whole, line)
        if not last.startswith(b"{") or _row(last) is not None:
            return False
        file.seek(0)
        if any(_row(line) is None for line in file if line.strip() and line != last):
            return False
    os.truncate(path, whole)
    return True


def _row(line: bytes) -> dict[str, Any] | None:
    return json_object(line.decode("utf-8", "replace"))
