"""Every metric of Inception's features comes out of the right evidence by its rule, whatever order the images came in."""

import inspect

import numpy as np
import pytest
import torch

from texttok_cli.metrics import distribution, evidence, registry
from texttok_cli.metrics.distribution import inception_score_adm, inception_score_permuted, inception_score_shuffled, kid, precision_recall
from texttok_cli.metrics.evidence import Evidence, Side
from texttok_cli.metrics.inception import POOL_DIM, SPATIAL_DIM, Features
from texttok_cli.metrics.registry import METRICS

POOL, SPATIAL = 16, 12
NEEDS = {"pool", "spatial", "features", "logits"}


def features(n: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    widths = (POOL, SPATIAL, 20)
    return Features(*(torch.randn(n, width, generator=generator) * (1 + 0.3 * seed) + 0.2 * seed for width in widths))


def seen(found: Features) -> Side:
    """In three batches, the last images first."""
    side = Side(NEEDS)
    for indices in reversed(torch.arange(len(found.pool)).split(50)):
        assert found.logits is not None
        side.update(indices, Features(found.pool[indices], found.spatial[indices], found.logits[indices]))
    return side


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> tuple[Features, Features, Evidence]:
    """Features of 130 samples, of 110 references, and both as evidence with a value by image."""
    monkeypatch.setattr(evidence, "POOL_DIM", POOL)
    monkeypatch.setattr(evidence, "SPATIAL_DIM", SPATIAL)
    monkeypatch.setitem(kid.__kwdefaults__, "subsets", 3)
    monkeypatch.setitem(kid.__kwdefaults__, "subset_size", 50)
    samples, references = features(130, 1), features(110, 2)
    found = Evidence(seen(samples), seen(references), {"clip-score", "clipscore-hessel", "psnr"})
    for name, rows in found.by_image.items():
        rows.add(torch.arange(3), torch.tensor([0.1, 0.2, 0.6]) * len(name))
    return samples, references, found


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = a.double().numpy(), b.double().numpy()
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root))


def test_distances_are_between_samples_and_references(sides: tuple[Features, Features, Evidence]) -> None:
    samples, references, found = sides
    for name in ("fid", "rfid", "gfid"):
        assert METRICS[name].compute(found) == (pytest.approx(frechet(samples.pool, references.pool), rel=1e-6), None)
    assert METRICS["sfid"].compute(found)[0] == pytest.approx(frechet(samples.spatial, references.spatial), rel=1e-6)
    assert METRICS["kid"].compute(found) == pytest.approx(kid(samples.pool, references.pool))


def test_precision_and_recall_take_every_nth_of_many_references(
    sides: tuple[Features, Features, Evidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, references, found = sides
    monkeypatch.setattr(registry, "ADM_REFERENCE_LIMIT", 40)
    expected = precision_recall(samples.pool, references.pool[[i * 110 // 40 for i in range(40)]])
    assert expected[0] != expected[1]
    assert (METRICS["precision"].compute(found)[0], METRICS["recall"].compute(found)[0]) == expected


def test_each_inception_score_has_its_rule(sides: tuple[Features, Features, Evidence], monkeypatch: pytest.MonkeyPatch) -> None:
    samples, _, found = sides
    for rule in (inception_score_adm, inception_score_permuted):  # blocks of less than all, so that their order matters
        monkeypatch.setitem(rule.__kwdefaults__, "block", 30)
    scores = {rule: rule(samples.logits) for rule in (inception_score_adm, inception_score_permuted, inception_score_shuffled)}
    assert len({value for value, _ in scores.values()}) == 3
    for name, rule in (
        ("is", inception_score_adm),
        ("gis", inception_score_adm),
        ("ris", inception_score_permuted),
        ("is-shuffled", inception_score_shuffled),
    ):
        assert METRICS[name].compute(found) == pytest.approx(scores[rule])


def test_values_by_image_are_averaged_in_their_unit(sides: tuple[Features, Features, Evidence]) -> None:
    *_, found = sides
    for name, factor in (("clip-score", 100), ("clipscore-hessel", 1), ("psnr", 1)):
        assert METRICS[name].compute(found)[0] == pytest.approx(factor * len(name) * 0.3)


def test_the_numbers_of_the_rules_are_those_that_count() -> None:
    assert f"{distribution.KID_SUBSETS} random subsets of {distribution.KID_SUBSET_SIZE:,} (seed 0)" in METRICS["kid"].rule
    assert f"at most {distribution.ADM_REFERENCE_LIMIT:,} references" in METRICS["precision"].rule
    assert f"k = {distribution.NEIGHBOURS}," in METRICS["recall"].rule
    assert f"blocks of {distribution.ADM_IS_BLOCK:,} " in METRICS["is"].rule
    assert f"{distribution.IS_SPLITS} parts of a permutation (seed {distribution.IS_SEED})" in METRICS["is-shuffled"].rule
    defaults = {name: parameter.default for name, parameter in inspect.signature(kid).parameters.items()}
    assert (defaults["subsets"], defaults["subset_size"]) == (100, 1000)
    assert registry.ADM_REFERENCE_LIMIT == 10_000


def test_a_number_of_fewer_images_than_its_rule_is_about_is_warned_of() -> None:
    """Ranks of covariances, KID's subsets, ADM's references, and what is published."""
    enough = {"fid": POOL_DIM + 1, "sfid": SPATIAL_DIM + 1, "kid": distribution.KID_SUBSET_SIZE, "psnr": 1, "clip-score": 1}
    enough |= dict.fromkeys(("precision", "recall"), distribution.ADM_REFERENCE_LIMIT) | dict.fromkeys(("is", "is-shuffled"), 50_000)
    for twin, name in (("rfid", "fid"), ("gfid", "fid"), ("ris", "is"), ("gis", "is")):
        enough[twin] = enough[name]
    assert {name: METRICS[name].enough for name in enough} == enough
    assert all(metric.why for metric in METRICS.values() if metric.enough > metric.least)
