"""One pass for all metrics: the same numbers for any batch size, number of processes or interruption; the registry's names."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drawn import DIM, Drawn, FakeClip, FakeInception
from gaussians import gaussian_of

from texttok_cli.assets import ASSETS, _in_package
from texttok_cli.errors import DataError, UsageError
from texttok_cli.files import sha256_tensors
from texttok_cli.losses import build_perceptual
from texttok_cli.metrics import processes as processes_module
from texttok_cli.metrics.evaluator import Batch, Evaluator, Work
from texttok_cli.metrics.image import psnr
from texttok_cli.metrics.inception import Features
from texttok_cli.metrics.processes import LAUNCHER, Processes
from texttok_cli.metrics.protocols import PROTOCOLS
from texttok_cli.metrics.registry import METRICS, check_images, check_names

ALL = ["fid", "sfid", "kid", "is", "is-shuffled", "precision", "recall"]


def scores(work: Work, metrics: list[str], batch_size: int) -> dict[str, float]:
    evaluator = Evaluator(metrics)
    for batch in work.batches(batch_size):
        evaluator.update(batch)
    return {name: value for name, (value, _) in evaluator.compute().items()}


@pytest.fixture
def unpaired() -> Work:
    return Work(Drawn(1100, 0), Drawn(1050, 1), paired=False)


def test_batch_size_and_processes_do_not_matter(fake: None, unpaired: Work) -> None:
    metrics = ["fid", "is", "is-shuffled", "precision", "recall"]
    whole = scores(unpaired, metrics, 512)
    assert all(math.isfinite(value) for value in whole.values()) and whole["fid"] > 0
    parts = []
    for rank in range(3):
        part = Evaluator(metrics)
        for batch in Work(unpaired.samples, unpaired.references, paired=False, rank=rank, size=3).batches(99):
            part.update(batch)
        parts.append(part)
    parts[0].evidence.merge(parts[1].evidence)
    parts[0].evidence.merge(parts[2].evidence)
    merged = parts[0].compute()
    assert parts[0].evidence.samples.n == 1100 and parts[0].evidence.references.n == 1050
    for name, value in whole.items():
        assert merged[name][0] == pytest.approx(value, rel=1e-6), name


def test_every_image_goes_through_the_network_once(fake: None) -> None:
    evaluator = Evaluator(ALL)
    for batch in Work(Drawn(20, 0), Drawn(30, 1), paired=False).batches(8):
        evaluator.update(batch)
    assert isinstance(evaluator.inception, FakeInception) and evaluator.inception.seen == 50


def test_several_models_share_the_references_features(fake: None) -> None:
    """Two processes, two models: each number as if its model had been alone, and every original seen once."""
    metrics = ["fid", "is", "precision", "psnr"]
    originals = Drawn(40, 0)
    made = [lambda images, indices: images // 2, lambda images, indices: 255 - images]
    alone = [scores(Work(None, originals, paired=True, reconstruct=one), metrics, 8) for one in made]
    found, seen = [], []
    for rank in range(2):
        first = Evaluator(metrics)
        evaluators = [first, first.against_the_same()]
        for evaluator, one in zip(evaluators, made, strict=True):
            for batch in Work(None, originals, paired=True, reconstruct=one, rank=rank, size=2).batches(7):
                evaluator.update(batch)
        assert evaluators[1].inception is first.inception and isinstance(first.inception, FakeInception)
        seen.append(first.inception.seen)
        found.append(evaluators)
    assert seen == [60, 60]  # 20 originals and 20 reconstructions of each of two models
    for one, other in zip(*found, strict=True):
        one.evidence.merge(other.evidence)
    for evaluator, expected in zip(found[0], alone, strict=True):
        assert {name: value for name, (value, _) in evaluator.compute().items()} == pytest.approx(expected, rel=1e-6)
    state = found[0][1].evidence.state()
    assert "psnr/values" in state and not any(name.startswith("references/") for name in state)


def test_each_model_counts_the_captions_that_were_cut_off_for_itself() -> None:
    first = Evaluator(["clip-score"], clip=FakeClip())  # type: ignore[arg-type]
    evaluators = [first, first.against_the_same()]
    for evaluator, batch_size in zip(evaluators, (2, 4), strict=True):
        for batch in Work(Drawn(8, 0), None, paired=False, captions=["a caption"] * 8).batches(batch_size):
            evaluator.update(batch)
    assert [evaluator.truncated for evaluator in evaluators] == [4, 2]


@pytest.mark.parametrize("n", [1, 7, 12])
def test_processes_share_all_images_and_none_twice(n: int) -> None:
    work = [Work(Drawn(n, 0), Drawn(5, 1), paired=False, rank=rank, size=4) for rank in range(4)]
    samples = [i for part in work for batch in part.batches(2) if batch.samples is not None for i in batch.indices.tolist()]
    references = [i for part in work for batch in part.batches(2) if batch.references is not None for i in batch.indices.tolist()]
    assert sorted(samples) == list(range(n)) and sorted(references) == list(range(5))
    assert sum(len(part) for part in work) == n + 5


def seen(batches: Iterator[Batch]) -> list[tuple[bool, int]]:
    return [(batch.samples is None, index) for batch in batches for index in batch.indices.tolist()]


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_pass_goes_on_from_any_image(paired: bool, rank: int) -> None:
    """Within the samples, at their end, and within the references."""
    work = Work(Drawn(7, 0), Drawn(7 if paired else 9, 1), paired=paired, rank=rank, size=2)
    whole = seen(work.batches(2))
    assert len(whole) == len(work) == len(set(whole))
    for start in range(len(work) + 1):
        assert seen(work.batches(3, start=start)) == whole[start:]


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("reconstruct", [None, lambda images, indices: images])
def test_every_sample_has_its_own_caption(paired: bool, reconstruct: Any) -> None:
    captions = [f"caption {i}" for i in range(7)]
    work = Work(Drawn(7, 0), Drawn(7, 1), paired=paired, captions=captions, reconstruct=reconstruct if paired else None, rank=1, size=2)
    batches = [batch for batch in work.batches(2) if batch.samples is not None]
    assert [batch.captions for batch in batches] == [["caption 1", "caption 3"], ["caption 5"]]


def test_the_first_process_takes_in_what_each_of_the_others_found_once(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the group's part played: what a process says, and what the first is told."""
    metrics, found = ["fid", "clip-score"], []
    samples, references = Drawn(50, 0), Drawn(45, 1)
    whole = scores(Work(samples, references, paired=False), ["fid"], 10)
    for rank in range(3):
        pair = []
        for number in range(2):
            evaluator = Evaluator(metrics, clip=FakeClip(100**number))  # type: ignore[arg-type]
            for batch in Work(samples, references, paired=False, captions=["a caption"] * 50, rank=rank, size=3).batches(50):
                evaluator.update(batch)
            pair.append(evaluator)
        found.append(pair)
    said: list[Any] = []
    monkeypatch.setattr(processes_module.dist, "init_process_group", lambda *given, **more: None)

    def gather(mine: Any, others: list[Any] | None) -> None:
        said.append(mine)
        if others is not None:
            others[:] = [mine, *said[:-1]]

    monkeypatch.setattr(processes_module.dist, "gather_object", gather)
    for name in LAUNCHER:
        monkeypatch.setenv(name, "3")
    for rank in (1, 2, 0):
        monkeypatch.setenv("RANK", str(rank))
        Processes().merge(found[rank])
    assert [evaluator.truncated for evaluator in found[0]] == [3 * (1 + 1), 3 * (100 + 1)]
    for evaluator in found[0]:
        assert (evaluator.evidence.samples.n, evaluator.evidence.references.n) == (50, 45)
        assert len(evaluator.evidence.by_image["clip-score"].in_order()) == 50
        assert evaluator.compute()["fid"][0] == pytest.approx(whole["fid"], rel=1e-6)


@pytest.mark.parametrize(("rank", "size"), [("5", "1"), ("5", None), ("x", "2"), ("", "1"), ("-1", "1"), ("0", "-1")])
def test_an_environment_that_names_no_process_is_told(rank: str, size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(DataError, match=r"RANK=.* and WORLD_SIZE=.* in the environment name no process of a run"):
        Processes()


def test_what_is_left_over_of_a_launcher_is_told() -> None:
    whole = {name: "1" if name == "RANK" else "2" for name in LAUNCHER}
    assert (Processes(whole).rank, Processes(whole).size) == (1, 2)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(DataError, match=f"the environment has .*, but not {name}: unset"):
            Processes({key: value for key, value in whole.items() if key != name})
    with pytest.raises(DataError, match="the environment has LOCAL_RANK, but not RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        Processes({"LOCAL_RANK": "0"})
    for harmless in ({}, {"MASTER_ADDR": "here"}, {"RANK": "0", "WORLD_SIZE": "1"}):
        assert Processes(harmless).size == 1


def test_a_reconstruction_is_compared_with_its_original(fake: None) -> None:
    originals = Drawn(9, 0)
    work = Work(None, originals, paired=True, reconstruct=lambda images, indices: images // 2)
    expected = float(psnr(originals.pixels, originals.pixels // 2).mean())
    assert scores(work, ["psnr", "rfid"], 4)["psnr"] == pytest.approx(expected)


def test_given_statistics_take_the_references_place(fake: None) -> None:
    samples, references = Drawn(40, 0), Drawn(50, 1)
    network = FakeInception(resize="", head=False, weights=None, offline=True)
    given = {"pool": gaussian_of(network(references.pixels).pool)}
    evaluator = Evaluator(["gfid"], given=given)
    assert not evaluator.evidence.references.wants_images
    for batch in Work(samples, None, paired=False).batches(16):
        evaluator.update(batch)
    whole = scores(Work(samples, references, paired=False), ["fid"], 16)
    assert evaluator.compute()["gfid"][0] == pytest.approx(whole["fid"], rel=1e-8)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value: float, fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Evaluator(["fid"])
    bad = Features(torch.full((1, DIM), value), torch.zeros(1, DIM), None)
    monkeypatch.setattr(evaluator.inception, "forward", lambda images: bad)
    with pytest.raises(DataError, match="image number 8: its features are not finite"):
        evaluator.update(Batch(torch.tensor([7]), Drawn(1, 0).pixels, None))


def test_too_few_images_are_one_line(fake: None) -> None:
    evaluator = Evaluator(["fid"])
    evaluator.update(Batch(torch.tensor([0]), Drawn(1, 0).pixels, Drawn(1, 1).pixels))
    with pytest.raises(DataError, match="fid: a covariance needs 2 images or more, not 1"):
        evaluator.compute()


def test_unknown_metrics_are_named() -> None:
    with pytest.raises(UsageError, match=r"fidd: no such metric; there are fid, rfid"):
        check_names(["psnr", "fidd"])
    with pytest.raises(UsageError, match="LPIPS has two networks: lpips-alex or lpips-vgg"):
        check_names(["lpips"])


def test_too_few_or_too_small_images_are_told_before_the_pass() -> None:
    check_images(["fid", "psnr"], n=2, n_reference=None, side=4)
    for name, counts, what in (
        ("kid", (1000, 999, 299), "kid: needs 1,000 references or more, and there are 999"),
        ("fid", (1, 50, 299), "fid: needs 2 samples"),
        ("is-shuffled", (9, 0, 299), "is-shuffled: needs 10 samples"),
        ("recall", (9, 3, 299), "recall: needs 4 references"),
        ("ssim-gaussian", (9, 9, 10), "needs images of 11 pixels a side or more, not 10"),
        ("lpips-vgg", (9, 9, 31), "needs images of 32 pixels"),
    ):
        n, n_reference, side = counts
        with pytest.raises(DataError, match=what):
            check_images([name], n=n, n_reference=n_reference, side=side)


def test_the_protocols_name_metrics_that_fit() -> None:
    for protocol in PROTOCOLS.values():
        for name in protocol.metrics:
            assert not (METRICS[name].reconstruction and protocol.task == "generation"), name
    assert {"lpips-vgg", "lpips-alex"} <= set(PROTOCOLS["recon"].metrics)  # the paper does not say which its LPIPS is


@pytest.mark.parametrize("name", ["stlpips-alex", "stlpips-vgg"])
def test_perceptual_distances_are_of_images_in_0_to_1(name: str) -> None:
    if _in_package(ASSETS[name]) is None:
        pytest.skip("stlpips-pytorch is not installed")
    x, y = (torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    evaluator = Evaluator([name], offline=True)
    evaluator.update(Batch(torch.arange(2), y[:2], x[:2]))
    evaluator.update(Batch(torch.arange(2, 3), y[2:], x[2:]))
    expected = build_perceptual(name, offline=True)(x / 255, y / 255).mean()  # type: ignore[arg-type]
    assert evaluator.compute()[name][0] == pytest.approx(float(expected), rel=1e-5)
    assert evaluator.networks == {name: (name, sha256_tensors(build_perceptual(name, offline=True).state_dict().values()))}  # type: ignore[arg-type]
