"""A frozen transformer with its tokenizer as a text encoder: what MiniLM and T5 have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor, nn

from texttok_cli.config.schema import TextEncoderConfig
from texttok_cli.models.condition import Condition
from texttok_cli.models.layers import DTYPES
from texttok_cli.text.base import padded_length, real_tokens

DIGEST_VALUES = 1024


class TransformerEncoder:
    """Token states of a transformer's last layer, before any pooling.

    `model` takes token ids (B, T) and the mask of the real ones (B, T), or None, and returns states (B, T, C); it is
    frozen here and put on `device` in the config's precision. `fixed_length` pads every batch to `max_tokens` instead
    of to its longest text.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        device: torch.device | str,
        fixed_length: bool,
        pad_id: int,
    ) -> None:
        self.config, self.dim, self.max_tokens, self.device = config, config.dim, config.max_tokens, device
        self.fixed_length, self.pad_id, self.truncated = fixed_length, pad_id, 0
        tokenizer.enable_truncation(config.max_tokens)
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False).to(device=device, dtype=DTYPES[config.precision])
        self.fingerprint = _fingerprint(config, self.model, tokenizer)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Condition:
        """Token states (B, T, C) float32; see TextEncoder."""
        encodings: list[Encoding] = self.tokenizer.encode_batch(list(texts))
        self.truncated += sum(bool(encoding.overflowing) for encoding in encodings)
        lengths = [len(encoding) for encoding in encodings]
        padded = self.max_tokens if self.fixed_length else padded_length(max(lengths), self.max_tokens)
        ids = torch.full((len(texts), padded), self.pad_id)
        for row, encoding in zip(ids, encodings, strict=True):
            row[: len(encoding)] = torch.tensor(encoding.ids)
        mask = real_tokens(lengths, padded, self.device)
        return Condition(self._states(ids.to(self.device), mask), mask)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, after truncation."""
        return [len(encoding) for encoding in self.tokenizer.encode_batch(list(texts))]

    def cuts(self, text: str) -> bool:
        """Whether the text is longer than `max_tokens`."""
        return bool(self.tokenizer.encode(text).overflowing)

    def _states(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        # The config's precision, not the caller's: the states must not depend on who asks for them.
        with torch.autocast(ids.device.type, enabled=False):
            states: Tensor = self.model(ids, mask)
        return states.float()


def _fingerprint(config: TextEncoderConfig, model: nn.Module, tokenizer: Tokenizer) -> str:
    """16 hex digits of kind, weights, vocabulary, longest text and precision, wherever the files lie.

    Of each tensor some evenly spaced values are taken: no training step leaves them alone, and 20 GB of T5 are not read through.
    """
    digest = hashlib.sha256(f"{config.kind} {config.max_tokens} {config.precision}".encode())
    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.flatten()[:: max(1, tensor.numel() // DIGEST_VALUES)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
