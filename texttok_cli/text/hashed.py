"""A text encoder without weights, for tests: every word at every place has its own random vector."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from texttok_cli.config.schema import TextEncoderConfig
from texttok_cli.models.condition import Condition
from texttok_cli.text.base import pad

END = "</s>"


class HashEncoder:
    """Words, split at spaces, and an end token; each a unit-variance vector seeded by the word and its position."""

    def __init__(self, config: TextEncoderConfig, *, device: torch.device | str = "cpu") -> None:
        self.config, self.dim, self.max_tokens, self.device = config, config.dim, config.max_tokens, device
        self.fingerprint = hashlib.sha256(f"hash {config.dim} {config.max_tokens}".encode()).hexdigest()[:16]
        self.truncated = 0

    def __call__(self, texts: Sequence[str]) -> Condition:
        """Token states (B, T, dim) float32; see TextEncoder."""
        self.truncated += sum(map(self.cuts, texts))
        return pad([self._states(text) for text in texts], self.max_tokens).to(self.device)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, after truncation."""
        return [len(self._words(text)) for text in texts]

    def cuts(self, text: str) -> bool:
        """Whether the text has no place for its end token left."""
        return len(text.split()) >= self.max_tokens

    def _words(self, text: str) -> list[str]:
        return [*text.split()[: self.max_tokens - 1], END]

    def _states(self, text: str) -> Tensor:
        return torch.stack([_vector(f"{position} {word}", self.dim) for position, word in enumerate(self._words(text))])


def _vector(key: str, dim: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(dim, dtype=np.float32))
