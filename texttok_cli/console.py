"""What a person sees: messages and progress on stderr, results on stdout (as JSON where asked)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

# emoji: else a file called :cat:.png would be shown under another name
stdout = Console(soft_wrap=True, highlight=False, emoji=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def say(message: str) -> None:
    """One line to stderr."""
    stderr.print(one_line(message), markup=False)


def one_line(message: str) -> str:
    """Control characters written out: a file's name or header may hold line breaks and terminal escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def emit(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The command's result to stdout: one JSON object, or a line for each entry (not a table of Rich's, which cuts long paths)."""
    if as_json:
        print(json.dumps(result))
        return
    width = max(map(len, result))
    for key, value in result.items():
        stdout.print(Text.assemble((key.replace("_", " ").ljust(width), "bold"), "  ", one_line(_readable(value))))


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Rows of as many cells each to stdout, aligned. Whole lines: Rich's tables are no wider than the terminal, and cut names."""
    shown = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        stdout.print(Text("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()))


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """Progress bars on stderr with rate and time left; none when quiet. In a narrow terminal the bar and the note give way."""
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _Rate(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _Note(),
    ]
    with Progress(*columns, console=stderr, disable=quiet, transient=False) as bar:
        try:
            yield bar
        finally:
            nothing = not any(task.completed for task in bar.tasks)
            bar.live.transient = nothing  # what went wrong before anything was done stands alone, without a bar at 0
            bar.disable |= nothing  # Rich would end bars that never were with an empty line


class _Rate(ProgressColumn):
    """Finished items a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


class _Note(ProgressColumn):
    """What else there is to say, on one line."""

    def render(self, task: Task) -> Text:
        return Text(one_line(task.fields["note"]), no_wrap=True, overflow="ellipsis")


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
