"""Where a run tells what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reporter:
    """Callbacks of a run; the command line draws them."""

    message: Callable[[str], None]
    progress: Callable[[str, int, int, dict[str, float]], None]  # what, done, total, newest numbers

    def skipped(self, name: str, reason: str) -> None:
        """Something in the data that can't be used."""
        self.message(f"skipped {name}: {reason}")
