"""Files of JSON lines that grow as captions come: what stands in them is not made again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from texttok_cli.data.listings import json_or_none
from texttok_cli.errors import DataError


class CaptionLines:
    """One file, open for appending; a context. `rows` are its lines, also those written before."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        """Every line must have the entries `made_by`, else DataError. A last line that was cut off is taken away."""
        self.path, self.made_by = path, made_by
        self.rows: list[dict[str, Any]] = []
        whole = self._read() if path.is_file() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(whole)
        if self.rows and not self._ends_in_newline(whole):
            self._file.write(b"\n")

    def __enter__(self) -> CaptionLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows, with `made_by` in each; they are in the file when this returns."""
        complete = [{**row, **self.made_by} for row in rows]
        self._file.write("".join(json.dumps(row) + "\n" for row in complete).encode())
        self._file.flush()
        self.rows += complete

    def _read(self) -> int:
        """Fill `rows`; how many bytes of the file are whole lines."""
        data = self.path.read_bytes()
        begin = data.rfind(b"\n") + 1
        whole = len(data) if self._row(data[begin:]) is not None else begin
        for number, line in enumerate(data[:whole].splitlines(), 1):
            row = self._row(line)
            if row is None and line.strip():
                raise DataError(f"{self.path}:{number}: not a JSON line of captions; give another file with -o")
            if row is not None:
                self._check(row)
                self.rows.append(row)
        return whole

    def _row(self, line: bytes) -> dict[str, Any] | None:
        row = json_or_none(line.decode("utf-8", "replace"))
        return row if isinstance(row, dict) else None

    def _check(self, row: Mapping[str, Any]) -> None:
        for key, value in self.made_by.items():
            if row.get(key) != value:
                raise DataError(f"{self.path}: its captions have {key} {row.get(key)}, these would have {value}; give another file with -o")

    def _ends_in_newline(self, size: int) -> bool:
        with self.path.open("rb") as file:
            file.seek(size - 1)
            return file.read() == b"\n"
