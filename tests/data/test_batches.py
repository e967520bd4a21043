"""Batches of images: which sample comes when, flipped and cropped how, for training and for one ordered pass."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from texttok_cli.data import Dataset, TrainLoader, center_crop, eval_batches, evenly_spaced, load_image, open_dataset, to_tensor
from texttok_cli.data.items import Item, PackedItems
from texttok_cli.data.loader import MAX_THREADS, Batch, SampleStream, decoding_threads

SIDE = 16
Make = Callable[..., Path]


def cropped(dataset: Dataset, index: int, at: float = 0.5) -> torch.Tensor:
    return to_tensor(center_crop(load_image(dataset.read(index), name="x"), SIDE, at=at))


def take(
    dataset: Dataset, n: int, *, start: int = 0, batch_size: int = 4, seed: int = 3, flip: bool = True, **others: object
) -> list[Batch]:
    batches = TrainLoader(dataset, image_size=SIDE, batch_size=batch_size, seed=seed, flip=flip, **others).batches(start)
    return [next(batches) for _ in range(n)]


def test_order_flips_and_crops_are_functions_of_seed_epoch_and_sample() -> None:
    """As a generator of (seed, epoch) draws them, so that a run goes on in the order it began with whatever the version."""
    n, seed = 50, 7
    stream = SampleStream(n, seed)
    for epoch in (0, 2, 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(n, generator=generator).tolist()
        flips, crops = torch.rand(n, generator=generator) < 0.5, torch.rand(n, generator=generator)
        expected = [(i, bool(flips[i]), float(crops[i])) for i in order]
        assert [stream[epoch * n + place] for place in range(n)] == expected


def test_epochs_and_seeds_have_orders_flips_and_crops_of_their_own() -> None:
    n = 1000
    seen: list[list[tuple[int, bool, float]]] = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        stream = SampleStream(n, seed)
        samples = [stream[epoch * n + place] for place in range(n)]
        by_index = sorted(samples)
        assert [index for index, _, _ in by_index] == list(range(n)) != [index for index, _, _ in samples]
        assert 0.44 < sum(flip for _, flip, _ in samples) / n < 0.56
        assert 0.46 < sum(crop for _, _, crop in samples) / n < 0.54
        for others in seen:
            assert 0.4 < sum(a[1] == b[1] for a, b in zip(by_index, others, strict=True)) / n < 0.6
            assert sum(a[2] == b[2] for a, b in zip(by_index, others, strict=True)) < 5
        seen.append(by_index)


def test_training_images_are_flipped_and_cropped_as_the_stream_says(make_folder: Make) -> None:
    dataset, stream = open_dataset([make_folder(5)]), SampleStream(5, 3)
    wanted = [stream[position] for position in range(12)]
    assert {flip for _, flip, _ in wanted} == {False, True}
    for flips, crops in ((True, True), (True, False), (False, True), (False, False)):
        images = torch.cat([batch.images for batch in take(dataset, 3, flip=flips, random_crop=crops)])
        for image, (index, flip, place) in zip(images, wanted, strict=True):
            expected = cropped(dataset, index, place if crops else 0.5)
            assert torch.equal(image, expected.flip(-1) if flip and flips else expected)
    fresh, kept = (torch.cat([batch.images for batch in take(dataset, 3, cache=cache)]) for cache in (False, True))
    assert torch.equal(fresh, kept)  # over two epochs and more


def test_processes_share_every_global_batch_and_a_later_start_goes_on(make_folder: Make) -> None:
    dataset = open_dataset([make_folder(7)])
    alone = take(dataset, 5, batch_size=6)
    parts = [take(dataset, 5, batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    for whole, *shares in zip(alone, *parts, strict=True):
        assert torch.equal(whole.indices, torch.cat([share.indices for share in shares]))
        assert torch.equal(whole.images, torch.cat([share.images for share in shares]))
    for size in (1, 3):
        later = [take(dataset, 2, batch_size=6 // size, start=3, rank=rank, world_size=size) for rank in range(size)]
        for whole, *shares in zip(alone[3:], *later, strict=True):
            assert torch.equal(whole.images, torch.cat([share.images for share in shares]))


def test_a_damaged_image_gives_way_to_another_drawn_for_its_place(make_folder: Make) -> None:
    """By (seed, place) alone: the same in batches of any size, and not one and the same image for every damaged one."""
    damaged = (1, 2, 4, 6)
    dataset, stream = open_dataset([make_folder(9, damaged=damaged)]), SampleStream(9, 3)
    indices = torch.cat([batch.indices for batch in take(dataset, 27, batch_size=2)]).tolist()
    assert indices == torch.cat([batch.indices for batch in take(dataset, 6, batch_size=9)]).tolist()
    wanted = [stream[position][0] for position in range(54)]
    assert [i for i, w in zip(indices, wanted, strict=True) if w not in damaged] == [w for w in wanted if w not in damaged]
    instead = [i for i, w in zip(indices, wanted, strict=True) if w in damaged]
    assert set(instead) == set(range(9)) - set(damaged)
    ours, theirs = ([SampleStream(9, seed).substitute(place, 1) for place in range(20)] for seed in (3, 4))
    assert ours != theirs


def test_one_pass_is_in_order_and_leaves_out_what_is_damaged_or_not_wanted(make_folder: Make) -> None:
    folder = make_folder(8, damaged=(2,))
    dataset = open_dataset([folder])
    said: list[tuple[str, str]] = []
    digests = {hashlib.sha256(dataset.read(i)).hexdigest(): i for i in range(8)}

    def wanted(index: int, digest: str) -> bool:
        assert digests[digest] == index
        return index != 5

    batches = list(eval_batches(dataset, image_size=SIDE, batch_size=3, on_error=lambda name, why: said.append((name, why)), wanted=wanted))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 3], [4, 6, 7]]
    for batch in batches:
        assert batch.sizes == [(40, 30)] * 3 and [digests[digest] for digest in batch.input_sha256] == batch.indices.tolist()
        assert torch.equal(batch.images, torch.stack([cropped(dataset, i) for i in batch.indices.tolist()]))
    [(name, why)] = said
    assert name == "02.png" and why.startswith("damaged")
    [chosen] = eval_batches(dataset, image_size=SIDE, batch_size=3, on_error=lambda *_: None, indices=[7, 0, 3])
    assert chosen.indices.tolist() == [7, 0, 3]


def test_some_of_many_are_taken_at_even_distances():
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 4) == [0, 1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells which processors a process may use")
@pytest.mark.parametrize(("processors", "threads"), [({3}, 1), ({0, 5, 6}, 3), (set(range(64)), MAX_THREADS)])
def test_there_are_as_many_threads_as_processors_that_may_be_used(
    processors: set[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the machine that others have don't count."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: processors)
    assert decoding_threads() == threads


def test_packed_items_are_the_items_without_texts() -> None:
    items = [Item("a\0b", "/x/a.png", "caption", "class"), Item("ü\udcff", "/x/t.tar", None, None, 1 << 40, 17), Item("", "c")]
    packed = PackedItems(items)
    assert list(packed) == [replace(item, caption=None, class_name=None) for item in items]
    assert len(packed) == 3
    assert packed[-1] == packed[2]
    for outside in (3, -4):
        with pytest.raises(IndexError):
            packed[outside]


def test_images_are_read_in_the_data_sets_own_way(make_folder: Make) -> None:
    class LastFirst(Dataset):
        def head(self, index: int, n: int) -> bytes:
            return super().head(len(self) - 1 - index, n)

    own = LastFirst(open_dataset([make_folder(5)]).items)
    [batch] = take(own, 1, flip=False)
    for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
        assert torch.equal(image, cropped(own, index))
