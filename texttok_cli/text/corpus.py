"""The embeddings of a training set's captions on disk: made once, in parts, and memory-mapped when read.

A folder belongs to one encoder (its fingerprint). Every part is a safetensors file with the states
of n texts one after the other: `tokens` (sum T, C), `offsets` (n+1,) into them, `texts` (n, 32) the texts' sha256.
A part is written whole or not at all and named by what it holds, so an interrupted run goes on where it stopped, and
captions that come later are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from texttok_cli.errors import DataError
from texttok_cli.files import read_header, save_safetensors
from texttok_cli.models.condition import Condition
from texttok_cli.text.base import TextEncoder, pad, unpad

FORMAT = 1
HASH_BYTES = 32
BATCH = 64  # texts encoded at once
PART_BYTES = 64 * 2**20  # written at once, so at most this much is lost by an interruption: about ten seconds of encoding


class CorpusEmbeddings:
    """Token states of the texts in a folder that `embed_corpus` wrote; called as the encoder is.

    `header` is what every part must have in its own header: format, encoder, precision and dtype. `max_tokens` is the
    encoder's longest text, and the most that a batch is padded to. Raises DataError for a part that `add_part` refuses.
    """

    def __init__(self, folder: Path, *, max_tokens: int, header: dict[str, Any]) -> None:
        self.folder, self.max_tokens = folder, max_tokens
        self.header = header
        self._index: dict[bytes, tuple[Tensor, int, int]] = {}  # text's hash -> tokens of its part, begin, end
        for path in sorted(folder.glob("part-*.safetensors")):
            self.add_part(path)

    def __contains__(self, text: str) -> bool:
        return _text_hash(text) in self._index

    def __call__(self, texts: Sequence[str]) -> Condition:
        """Token states (B, T, C) float32 on the CPU, padded to the longest text's next multiple of 8.

        Raises DataError for a text that was not embedded.
        """
        return pad([self._states(text) for text in texts], self.max_tokens)

    def add_part(self, path: Path) -> None:
        """Map one more part. Raises DataError if it is damaged or was made by another encoder."""
        header, infos = read_header(path, error=DataError)
        if header != self.header or set(infos) != {"tokens", "offsets", "texts"}:
            raise DataError(f"{path}: stale cache: made by another text encoder or setting; delete {self.folder} or choose another folder")
        part = load_file(path)  # maps the file; pages are read when they are used
        offsets, hashes = part["offsets"].tolist(), part["texts"].numpy().tobytes()
        for i, (begin, end) in enumerate(pairwise(offsets)):
            self._index[hashes[i * HASH_BYTES : (i + 1) * HASH_BYTES]] = (part["tokens"], begin, end)

    def _states(self, text: str) -> Tensor:
        entry = self._index.get(_text_hash(text))
        if entry is None:
            raise DataError(f"{self.folder}: no embedding of the caption {text[:60]!r}: embed the captions again")
        tokens, begin, end = entry
        return tokens[begin:end].float()


def embed_corpus(
    encoder: TextEncoder, texts: Iterable[str], folder: Path, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> CorpusEmbeddings:
    """Embed every different text into `folder`, unless it is there already, and open the folder.

    `on_progress(done, total)` counts different texts, after every batch. Interrupted, it goes on where it stopped. Raises
    DataError if the folder holds embeddings of another encoder, or damaged ones.
    """
    header = {"format": FORMAT, "kind": "text embeddings", "encoder": encoder.fingerprint, "precision": encoder.config.precision}
    corpus = CorpusEmbeddings(folder, max_tokens=encoder.max_tokens, header=header | {"dtype": "fp16"})
    unique = list(dict.fromkeys(texts))
    missing = [text for text in unique if text not in corpus]
    done = len(unique) - len(missing)
    names: list[str] = []
    states: list[Tensor] = []
    for batch in _batches(encoder, missing):
        names += batch
        states += [_stored(state, folder) for state in unpad(encoder(batch))]
        done += len(batch)
        if sum(state.nbytes for state in states) >= PART_BYTES or done == len(unique):
            corpus.add_part(_write_part(folder, names, states, corpus.header))
            names, states = [], []
        on_progress(done, len(unique))
    return corpus


def estimate_bytes(encoder: TextEncoder, texts: Iterable[str]) -> int:
    """Bytes that `embed_corpus` will write for these texts into an empty folder (file headers left out)."""
    lengths = encoder.lengths(list(dict.fromkeys(texts)))
    return sum(lengths) * encoder.dim * 2 + len(lengths) * (HASH_BYTES + 8)


def _batches(encoder: TextEncoder, texts: list[str]) -> Iterator[list[str]]:
    """Batches of texts of like length, so that little is padding."""
    if not texts:
        return
    lengths = encoder.lengths(texts)
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    for start in range(0, len(order), BATCH):
        yield [texts[i] for i in order[start : start + BATCH]]


def _stored(state: Tensor, folder: Path) -> Tensor:
    """In fp16, whose mantissa has three more bits than bf16's; states after a final norm are far below its maximum, 65,504."""
    stored = state.to("cpu", torch.float16)
    if not stored.isfinite().all():
        raise DataError(f"{folder}: token states do not fit into fp16: set training.text_cache=false")
    return stored


def _write_part(folder: Path, texts: Sequence[str], states: Sequence[Tensor], header: dict[str, Any]) -> Path:
    hashes = b"".join(_text_hash(text) for text in texts)
    tensors = {
        "tokens": torch.cat(list(states)),  # (sum T, C)
        "offsets": torch.tensor([0, *accumulate(len(state) for state in states)]),
        "texts": torch.frombuffer(bytearray(hashes), dtype=torch.uint8).reshape(-1, HASH_BYTES),
    }
    path = folder / f"part-{hashlib.sha256(hashes).hexdigest()[:16]}.safetensors"
    save_safetensors(path, tensors, header)
    return path


def _text_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
