"""What a text encoder is, and the padding that all of them share.

Letters: B batch, T text tokens, C width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from texttok_cli.config.schema import TextEncoderConfig
from texttok_cli.models.condition import Condition

# Lengths of padded batches are multiples of this, so that there are few different ones (compiled models, allocator).
LENGTH_STEP = 8
LOOKED_AT = 10_000  # texts whose length is looked at before a long job: a few seconds


class TextEncoder(Protocol):
    """A frozen text encoder: texts to token states."""

    config: TextEncoderConfig
    dim: int  # C
    max_tokens: int  # longest T
    fingerprint: str  # hash of all that the states depend on; the same on every machine
    truncated: int  # texts so far that were longer than max_tokens

    def __call__(self, texts: Sequence[str]) -> Condition:
        """Token states (B, T, C) float32 of the texts, on the encoder's device, without gradient; "" has its end token(s).

        Texts longer than `max_tokens` lose their end, not the closing special token.
        """

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, after truncation; runs the tokenizer only."""

    def cuts(self, text: str) -> bool:
        """Whether the text is longer than `max_tokens`; runs the tokenizer only."""


def load_text_encoder(config: TextEncoderConfig, *, device: torch.device | str = "cpu", offline: bool = False) -> TextEncoder:
    """The encoder a config names, on `device`. Raises BackendError if its weights are not available or don't fit the config."""
    # One import a kind: transformers takes seconds, and only two of them need it.
    if config.kind == "hash":
        from texttok_cli.text.hashed import HashEncoder

        return HashEncoder(config, device=device)
    if config.kind == "t5":
        from texttok_cli.text.t5 import load_t5

        return load_t5(config, device=device, offline=offline)
    from texttok_cli.text.minilm import load_minilm

    return load_minilm(config, device=device, offline=offline)


def cut_off(encoder: TextEncoder, texts: Iterable[str], *, limit: int = LOOKED_AT) -> str | None:
    """What a person should know of texts that the encoder does not read to their end; None if there are none.

    Each different text counts once. Of more than `limit` as many, evenly spread, are looked at, and that is said.
    """
    unique = list(dict.fromkeys(texts))
    seen = min(len(unique), limit)
    # One at a time: batches start threads, and loader workers that are forked after that make the tokenizer complain.
    cut = sum(encoder.cuts(unique[i * len(unique) // seen]) for i in range(seen))
    if not cut:
        return None
    of = f"{seen:,} texts" + (f" looked at ({len(unique):,} in all)" if seen < len(unique) else "")
    return f"longer than {encoder.max_tokens} text tokens, so the end is cut off: {cut:,} of {of}"


def padded_length(longest: int, max_tokens: int) -> int:
    """Length of a batch whose longest text has `longest` tokens: the next multiple of 8, at most `max_tokens`."""
    return min(-(-longest // LENGTH_STEP) * LENGTH_STEP, max_tokens)


def real_tokens(lengths: Sequence[int], padded: int, device: torch.device | str) -> Tensor | None:
    """Mask (B, padded), True where a token is real; None if all are."""
    if min(lengths) == padded:
        return None
    return (torch.arange(padded) < torch.tensor(lengths)[:, None]).to(device)


def pad(states: Sequence[Tensor], max_tokens: int) -> Condition:
    """States (T_i, C) of several texts as one condition (B, T, C), zero where padded; T as `padded_length` says."""
    lengths = [len(state) for state in states]
    padded = padded_length(max(lengths), max_tokens)
    tokens = states[0].new_zeros(len(states), padded, states[0].shape[-1])  # (B, T, C)
    for row, state in zip(tokens, states, strict=True):
        row[: len(state)] = state
    return Condition(tokens, real_tokens(lengths, padded, tokens.device))


def unpad(condition: Condition) -> list[Tensor]:
    """The inverse of `pad`: copies of the real tokens (T_i, C) of each text."""
    if condition.mask is None:
        return [row.clone() for row in condition.tokens]
    lengths = condition.mask.sum(dim=1).tolist()
    return [row[:length].clone() for row, length in zip(condition.tokens, lengths, strict=True)]
