"""Batches: an exactly repeatable stream for training, and one ordered pass for everything else."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from texttok_cli.data.images import center_crop, load_image, to_tensor
from texttok_cli.data.items import Dataset, PackedItems
from texttok_cli.errors import DataError

MAX_REDRAWS = 100  # unreadable images in a row before training gives up
MAX_THREADS = 16  # that decode images: as many as a GPU that encodes has use for


@dataclass(frozen=True, slots=True)
class Batch:
    """Images uint8 (B, 3, S, S), flipped where the stream says so, and their indices (B,) int64 into the dataset."""

    images: Tensor
    indices: Tensor


class SampleStream:
    """The endless order of training samples: permutations of n, one an epoch, with a flip and a place of the crop for each sample.

    All are functions of (seed, epoch, sample index) alone, so position `p` means the same sample for any batch size,
    number of workers or processes, and after any interruption.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self._epoch = n, seed, -1
        self._order = self._flips = self._crops = torch.empty(0)

    def __getitem__(self, position: int) -> tuple[int, bool, float]:
        """(dataset index, flip, place of the crop in [0, 1)) of the sample at this position."""
        epoch, place = divmod(position, self.n)
        self._enter(epoch)
        index = int(self._order[place])
        return index, bool(self._flips[index]), float(self._crops[index])

    def indices(self, first: int, count: int) -> Tensor:
        """The dataset indices (count,) int64 of the samples from position `first` on."""
        parts = []
        while count:
            epoch, place = divmod(first, self.n)
            self._enter(epoch)
            parts.append(self._order[place : place + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.n, generator=generator)
            self._flips = torch.rand(self.n, generator=generator) < 0.5
            self._crops = torch.rand(self.n, generator=generator)
            self._epoch = epoch

    def substitute(self, position: int, attempt: int) -> int:
        """The dataset index that replaces a damaged image at this position, at the given attempt (1 to MAX_REDRAWS)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position * 101 + attempt)
        return int(torch.randint(self.n, (1,), generator=generator))


def batch_starts(batch_size: int, start: int, rank: int, world_size: int) -> Iterator[int]:
    """Endlessly the position of the first sample of this rank's part of every global batch, from batch number `start` on."""
    return count((start * world_size + rank) * batch_size, world_size * batch_size)


class TrainLoader:
    """Training batches of one process; `damaged` maps the id of each image that could not be read to the reason.

    `batch_size` is this process's; every global batch is split by rank, so the stream does not depend on the number of
    processes. A damaged image is replaced by another, drawn from (seed, position) alone. With `cache` the decoded images
    stay in memory as uint8; with workers each of them holds its own copy, so use it with `workers=0`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        flip: bool,
        random_crop: bool = False,
        workers: int = 0,
        cache: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not len(dataset):
            raise DataError("no training images")
        self.samples = _Samples(dataset, image_size, seed, flip=flip, random_crop=random_crop, cache=cache)
        self.batch_size, self.workers, self.rank, self.world_size = batch_size, workers, rank, world_size
        self.damaged: dict[str, str] = {}

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Endless batches, from global batch number `start` (from 0) on. Leaves torch's global random state alone.

        Raises DataError when MAX_REDRAWS images in a row are unreadable.
        """
        firsts = batch_starts(self.batch_size, start, self.rank, self.world_size)
        loader = DataLoader(
            self.samples,
            batch_sampler=(list(range(first, first + self.batch_size)) for first in firsts),
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else the iterator takes a number from the global one
        )
        for batch, damaged, error in loader:
            self.damaged.update(damaged)
            if batch is None:
                raise DataError(error)
            yield batch


def _ignore_signals(worker: int) -> None:
    """Terminals and schedulers signal all processes of a job: a worker that died of it would end the run before its state is saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True, slots=True)
class _Sample:
    """One image, or None after MAX_REDRAWS failures; `damaged`: reasons by id, in the order they were met."""

    image: Tensor | None
    index: int
    damaged: dict[str, str]


def _collate(samples: list[_Sample]) -> tuple[Batch | None, dict[str, str], str]:
    """(batch, damaged, error). One tensor a batch: each tensor that a worker hands over costs a file descriptor.

    The error is returned, as torch would wrap one raised in a worker in the text of its traceback.
    """
    damaged = {key: reason for sample in samples for key, reason in sample.damaged.items()}
    images = [sample.image for sample in samples if sample.image is not None]
    if len(images) < len(samples):
        return None, damaged, f"{MAX_REDRAWS} training images in a row are unreadable, e.g. {next(iter(damaged.values()))}"
    return Batch(torch.stack(images), torch.tensor([sample.index for sample in samples])), damaged, ""


class _Samples(TorchDataset[_Sample]):
    """Stream position -> decoded, cropped, flipped image."""

    def __init__(self, dataset: Dataset, image_size: int, seed: int, *, flip: bool, random_crop: bool, cache: bool) -> None:
        self.dataset = replace(dataset, items=PackedItems(dataset.items), skipped=[])
        self.image_size, self.flip, self.random_crop = image_size, flip, random_crop
        self.stream = SampleStream(len(dataset), seed)
        self.cache: dict[int, Tensor] | None = {} if cache else None

    def __getitem__(self, position: int) -> _Sample:
        index, flip, place = self.stream[position]
        at = place if self.random_crop else 0.5
        damaged: dict[str, str] = {}
        for attempt in range(1, MAX_REDRAWS + 1):
            try:
                image = self._image(index, at)
            except DataError as err:
                damaged[self.dataset.items[index].id] = str(err)
                index = self.stream.substitute(position, attempt)
            else:
                return _Sample(image.flip(2) if flip and self.flip else image, index, damaged)
        return _Sample(None, index, damaged)

    def _image(self, index: int, at: float) -> Tensor:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        item = self.dataset.items[index]
        image = to_tensor(center_crop(load_image(self.dataset.read(index), name=item.id), self.image_size, at=at))
        if self.cache is not None:
            self.cache[index] = image
        return image


@dataclass(frozen=True, slots=True)
class EvalBatch:
    """Images uint8 (B, 3, S, S), their indices (B,), original sizes (w, h) and the sha256 of each input file's bytes."""

    images: Tensor
    indices: Tensor
    sizes: list[tuple[int, int]]
    input_sha256: list[str]


def decoding_threads() -> int:
    """Threads that read and decode images: as many as there are processors for this process, up to MAX_THREADS."""
    # A scheduler or `taskset` may leave it fewer than there are; Linux alone tells.
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 2
    return min(processors, MAX_THREADS)


def eval_batches(
    dataset: Dataset,
    *,
    image_size: int,
    batch_size: int,
    on_error: Callable[[str, str], None] | None = None,
    indices: Sequence[int] | None = None,
    wanted: Callable[[int, str], bool] | None = None,
) -> Iterator[EvalBatch]:
    """One pass in order, over all items or those `indices`; unreadable images go to `on_error(id, reason)` and are left out.
    Without it the DataError of the first is raised.

    `wanted(index, sha256)` may decline an image by its bytes before it is decoded. Files are read and decoded on
    `decoding_threads()` threads, at most two batches ahead.
    """

    def load(index: int) -> tuple[int, Tensor, tuple[int, int], str] | DataError | None:
        try:
            data = dataset.read(index)
            digest = hashlib.sha256(data).hexdigest()
            if wanted is not None and not wanted(index, digest):
                return None
            image = load_image(data, name=dataset.items[index].id)
            return index, to_tensor(center_crop(image, image_size)), image.size, digest
        except DataError as err:
            return err

    todo = iter(range(len(dataset)) if indices is None else indices)
    ready: list[tuple[int, Tensor, tuple[int, int], str]] = []
    pool = ThreadPoolExecutor(decoding_threads())
    try:
        pending = deque((i, pool.submit(load, i)) for i in islice(todo, 2 * batch_size))
        while pending:
            index, future = pending.popleft()
            pending.extend((i, pool.submit(load, i)) for i in islice(todo, 1))
            loaded = future.result()
            if isinstance(loaded, DataError):
                if on_error is None:
                    raise loaded
                item_id = dataset.items[index].id
                on_error(item_id, str(loaded).removeprefix(f"{item_id}: "))
            elif loaded is not None:
                ready.append(loaded)
            if ready and (len(ready) == batch_size or not pending):
                numbers, images, sizes, digests = zip(*ready, strict=True)
                yield EvalBatch(torch.stack(images), torch.tensor(numbers), list(sizes), list(digests))
                ready = []
    finally:
        pool.shutdown(cancel_futures=True)  # a caller who stops early need not wait for images it won't see
