"""The policy on bad steps: a gradient that is not finite, or far larger than usual, is not applied."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROLL_BACK_AFTER = 3  # bad steps in a row
DECAY = 0.99  # of the running mean of gradient norms
SETTLED = 100  # steps of an unchanged objective after which the mean says what is usual


class Guard:
    """Decides whether a step is taken, from gradient norms that are the same in every process, so that all decide alike."""

    def __init__(self, spike: float | None) -> None:
        self.spike = spike
        self.typical = torch.zeros(())  # running mean of the norms of steps taken
        self.taken = torch.zeros((), dtype=torch.int64)  # how many steps are in it
        self.skipped = torch.zeros((), dtype=torch.int64)  # bad steps so far
        self.in_a_row = 0

    def accepts(self, norm: Tensor, *others: Tensor) -> bool:
        """Whether to take a step of this gradient norm, and of others that must be finite. Waits for the device.

        Updates the counters: a step that is taken enters the running mean and ends the bad steps in a row; a bad one is counted.
        """
        value, *rest = (float(n) for n in (norm, *others))
        typical = float(self.typical)
        too_large = self.spike is not None and self.taken >= SETTLED and value > self.spike * typical
        if too_large or not all(map(math.isfinite, (value, *rest))):
            self.in_a_row += 1
            self.skipped += 1
            return False
        self.in_a_row = 0
        self.typical.fill_(DECAY * typical + (1 - DECAY) * value if self.taken else value)
        self.taken += 1
        return True

    def forget_typical(self) -> None:
        """From here on the objective is another."""
        self.taken.zero_()

    @property
    def wants_roll_back(self) -> bool:
        """Whether so many steps in a row were bad that the weights themselves are in doubt."""
        return self.in_a_row >= ROLL_BACK_AFTER

    def reset(self, skipped: int) -> None:
        """After a roll-back: the count of skipped steps goes on, their row has ended."""
        self.skipped.fill_(skipped)
        self.in_a_row = 0

    def state(self) -> dict[str, Tensor]:
        """What decides on the next step."""
        counts = {"guard.taken": self.taken.clone(), "guard.skipped": self.skipped.clone(), "guard.in_a_row": torch.tensor(self.in_a_row)}
        return {"guard.typical": self.typical.clone(), **counts}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.typical.copy_(tensors["guard.typical"])
        self.taken.copy_(tensors["guard.taken"])
        self.skipped.copy_(tensors["guard.skipped"])
        self.in_a_row = int(tensors["guard.in_a_row"])
