"""The latents of a whole data set in memory: what a generator trains on.

Letters: n images, B batch, N latent tokens, d latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from texttok_cli.data.listings import read_captions
from texttok_cli.data.loader import SampleStream, batch_starts
from texttok_cli.errors import DataError, TokenFileError
from texttok_cli.token_folder import Statistics, TokenIndex, read_index, read_shards

MAX_SHARE = 0.25  # of a GPU's free memory that latents may take; the rest is for the training


@dataclass(frozen=True)
class LatentStore:
    """Raw latents z (n, N, d), fp16 unless stored as fp32, with what is known of each image; `statistics` are of all of them."""

    z: Tensor
    ids: list[str]
    flipped: list[bool]
    class_names: list[str | None]
    captions: list[str | None]
    statistics: Statistics

    @staticmethod
    def open(folders: Sequence[str | Path], *, made_by: Sequence[str]) -> LatentStore:
        """Read folders that `texttok encode DATASET -o FOLDER` wrote with a tokenizer of one of these sha256.

        Raises TokenFileError for a folder that is none or is damaged, DataError for one of another tokenizer, of codes, or
        whose encoding was cut off.
        """
        indices = {folder: read_index(folder) for folder in map(Path, folders)}
        for folder, index in indices.items():
            _check(folder, index, made_by)
        dtype = torch.float32 if any(index.dtype == "fp32" for index in indices.values()) else torch.float16
        z, filled = torch.empty(0), 0
        ids: list[str] = []
        flipped: list[bool] = []
        class_names: list[str | None] = []
        captions: list[str | None] = []
        for part in (part for folder in indices for part in read_shards(folder)):
            if not filled:  # whole at once: parts put together at the end would take twice the memory
                z = torch.empty(_images(indices, part.z[0].numel()), *part.z.shape[1:], dtype=dtype)
            if part.z.shape[1:] != z.shape[1:]:
                raise DataError(f"{', '.join(map(str, folders))}: hold latents of several shapes, so not from one tokenizer; encode again")
            z[filled : filled + len(part)] = part.z
            filled += len(part)
            once: dict[str, str] = {}  # a mirrored copy has the id, class and caption of the other: a gigabyte for ImageNet
            ids += [once.setdefault(text, text) for text in part.header.ids]
            flipped += part.header.flipped
            for known, new in ((class_names, part.header.class_names), (captions, part.header.captions)):
                known += [None if text is None else once.setdefault(text, text) for text in new or [None] * len(part)]
        found = [statistics for index in indices.values() if (statistics := index.statistics()) is not None]
        if len(found) < len(indices) or any(len(statistics.mean) != z.shape[-1] for statistics in found):
            raise DataError(
                f"{', '.join(map(str, folders))}: index.json has no statistics of its tokens; encode again into an empty folder"
            )
        return LatentStore(z, ids, flipped, class_names, captions, reduce(Statistics.plus, found))

    def __len__(self) -> int:
        return len(self.z)

    def texts(self, overrides: Path | None = None) -> list[str]:
        """The caption of each image, of a captions.jsonl where that has its id. DataError names an image without one, and a file
        that has none of the images."""
        override = {} if overrides is None else read_captions(overrides)
        if overrides is not None and not override.keys() & set(self.ids):
            raise DataError(f"{overrides}: none of its ids is one of these images, such as {self.ids[0]}")
        texts = [override.get(image_id, caption) for image_id, caption in zip(self.ids, self.captions, strict=True)]
        missing = next((image_id for image_id, text in zip(self.ids, texts, strict=True) if text is None), None)
        if missing is not None:
            raise DataError(f"{missing}: its tokens have no caption: encode with a text model, or give data.captions=FILE.jsonl")
        return [str(text) for text in texts]


def _images(indices: Mapping[Path, TokenIndex], numbers: int) -> int:
    """How many images the folders hold, of so many numbers each. TokenFileError for a folder whose files are too small for them."""
    for folder, index in indices.items():
        images = sum(shard.images for shard in index.shards)
        there = sum(path.stat().st_size for shard in index.shards if (path := folder / shard.file).is_file())
        if images * numbers > there:  # a number takes a byte or more
            raise TokenFileError(f"{folder}: index.json names {images:,} images, more than its shards hold; encode again")
    return sum(shard.images for index in indices.values() for shard in index.shards)


def _check(folder: Path, index: TokenIndex, made_by: Sequence[str]) -> None:
    if index.model_sha256 not in made_by:
        raise DataError(
            f"{folder}: holds tokens of {index.model_name} (sha256 {index.model_sha256[:12]}...), not of the tokenizer that"
            f" data.tokenizer names ({made_by[0][:12]}...); encode again with that one"
        )
    if not index.shards or not index.complete:
        raise DataError(f"{folder}: its encoding was cut off; run the same `texttok encode` again to complete it")
    if index.mean is None:
        raise DataError(f"{folder}: holds codes of a VQ model; this generator needs continuous latents")


@dataclass(frozen=True, slots=True)
class LatentBatch:
    """Raw latents z (B, N, d) float32 on the training device, and their indices (B,) int64 into the store, on the CPU."""

    z: Tensor
    indices: Tensor


class LatentLoader:
    """Training batches of one process, in the order that images have in tokenizer training: a function of (seed, epoch).

    `batch_size` is this process's; every global batch is split by rank, so the stream does not depend on the number of
    processes. The latents lie on the device unless that is a GPU of which they would take over MAX_SHARE of the free memory.
    """

    def __init__(self, store: LatentStore, *, batch_size: int, seed: int, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        self.stream = SampleStream(len(store), seed)
        self.batch_size, self.rank, self.world_size, self.device = batch_size, rank, world_size, device
        self.resident = fits(store.z.nbytes, device)
        self.z = store.z.to(device) if self.resident else store.z

    def batches(self, start: int = 0) -> Iterator[LatentBatch]:
        """Endless batches, from global batch number `start` (from 0) on."""
        for first in batch_starts(self.batch_size, start, self.rank, self.world_size):
            indices = self.stream.indices(first, self.batch_size)
            z = self.z[indices.to(self.z.device)]  # (B, N, d)
            yield LatentBatch(z.to(self.device).float(), indices)


def fits(size: int, device: torch.device) -> bool:
    """Whether latents of `size` bytes stay on a device in training: at most MAX_SHARE of free GPU memory; always true on other devices."""
    return device.type != "cuda" or size <= MAX_SHARE * torch.cuda.mem_get_info(device)[0]
