"""Where a run tells what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reporter:
    """Callbacks of a run; the command line draws them."""

    message: Callable[[str], None]
    progress: Callable[[str, int, int, dict[str, float]], None]  # what, done, total, newest numbers
    warning: Callable[[str], None]  # what nobody should miss, whichever process says it
    unusable: set[str] = field(default_factory=set)  # names of what was skipped

    def skipped(self, name: str, reason: str) -> None:
        """Something in the data that can't be used; said once."""
        if name not in self.unusable:
            self.unusable.add(name)
            self.warning(f"skipped {name}: {reason.removeprefix(f'{name}: ')}")
