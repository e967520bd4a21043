"""Embeddings kept in memory, so that a text seen again costs nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from texttok_cli.models.condition import Condition
from texttok_cli.text.base import TextEncoder, pad, unpad

KEPT_TOKENS = 8192
_encoding = threading.Lock()  # of all caches: one of its own could be neither copied nor pickled with its cache


class EmbeddingCache:
    """A text encoder that remembers the texts it saw last: at most `max_bytes` of their states (on the encoder's device).

    At least the last batch is kept, even if larger. The default is KEPT_TOKENS tokens: a thousand class names, or the batch that is
    encoded, mirrored and decoded; captions seldom come again.
    Batches are padded to the longest text's next multiple of 8, also where the encoder itself pads further.
    """

    def __init__(self, encoder: TextEncoder, *, max_bytes: int | None = None) -> None:
        self.encoder = encoder
        self.max_bytes = KEPT_TOKENS * encoder.dim * 4 if max_bytes is None else max_bytes
        self.config, self.max_tokens = encoder.config, encoder.max_tokens
        self._states: OrderedDict[str, Tensor] = OrderedDict()  # (T_i, C), the least recently used first
        self._bytes = 0

    @property
    def truncated(self) -> int:
        """Texts encoded so far that were longer than `max_tokens`; one answered from the cache is not counted again."""
        return self.encoder.truncated

    def __call__(self, texts: Sequence[str]) -> Condition:
        """Token states (B, T, C) float32; see TextEncoder. Threads may call it, one is answered after the other."""
        with _encoding:
            missing = [text for text in dict.fromkeys(texts) if text not in self._states]
            if missing:
                for text, states in zip(missing, unpad(self.encoder(missing)), strict=True):
                    self._states[text] = states
                    self._bytes += states.nbytes
            for text in texts:
                self._states.move_to_end(text)
            condition = pad([self._states[text] for text in texts], self.max_tokens)
            while self._bytes > self.max_bytes and len(self._states) > len(set(texts)):
                _, oldest = self._states.popitem(last=False)
                self._bytes -= oldest.nbytes
            return condition
