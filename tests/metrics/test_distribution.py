"""Inception Score, KID, precision and recall against torch-fidelity given the same features, and against closed forms."""

import math

import numpy as np
import pytest
import torch

from texttok_cli.metrics.distribution import (
    few_classes_a_block,
    inception_score_adm,
    inception_score_permuted,
    inception_score_shuffled,
    kid,
    precision_recall,
)
from texttok_cli.metrics.evidence import Evidence, Side
from texttok_cli.metrics.registry import METRICS


def features(n: int, dim: int = 16, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


# ------------------------------------------------------------------ Inception Score


def test_shuffled_score_is_torch_fidelitys() -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric
    logits = 3 * features(103, 20)
    expected = theirs(logits)
    assert inception_score_shuffled(logits) == pytest.approx((expected["inception_score_mean"], expected["inception_score_std"]), rel=1e-12)


def test_adm_score_is_that_of_consecutive_blocks() -> None:
    """Written out as in ADM's evaluator: preds[i : i + block], the last one short."""
    logits = (3 * features(25, 20)).double()
    preds = logits.softmax(dim=1).numpy()
    scores = []
    for i in range(0, 25, 10):
        part = preds[i : i + 10]
        kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        scores.append(np.exp(np.mean(np.sum(kl, 1))))
    assert len(scores) == 3
    assert inception_score_adm(logits, block=10) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_order_matters_to_adms_rule_as_its_name_says() -> None:
    logits = 50 * torch.eye(4).repeat_interleave(10, dim=0)  # sorted by class
    mixed = logits[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    assert inception_score_adm(logits, block=10)[0] == pytest.approx(1)
    assert inception_score_adm(mixed, block=40)[0] == pytest.approx(4)


def test_reconstructions_of_a_sorted_data_set_are_scored_in_blocks_of_all_classes() -> None:
    logits = 50 * torch.eye(4).repeat_interleave(500, dim=0)
    score, spread = inception_score_permuted(logits, block=500)
    assert score == pytest.approx(4, rel=0.02) and 0 < spread < 0.1
    assert inception_score_permuted(logits, block=500) == (score, spread)
    order = torch.from_numpy(np.random.RandomState(2020).permutation(2000))  # as the rule says
    assert inception_score_adm(logits[order], block=500) == (score, spread)
    found = Evidence(Side({"logits"}), Side(set()), set())
    blocks = 50 * torch.eye(4).repeat_interleave(2500, dim=0)
    found.samples.rows["logits"].add(torch.arange(10_000), blocks)
    assert METRICS["ris"].compute(found)[0] == pytest.approx(4, rel=0.01)
    assert METRICS["is"].compute(found)[0] == pytest.approx(2)
    assert "permutation" in METRICS["ris"].rule and "seed 2020" in METRICS["ris"].rule


def test_order_by_class_is_seen() -> None:
    classes = [number // 10 for number in range(100)]
    assert few_classes_a_block(classes, block=20) and not few_classes_a_block(classes, block=100)
    mixed = [classes[i] for i in np.random.RandomState(0).permutation(100)]
    assert not few_classes_a_block(mixed, block=20) and not few_classes_a_block([7] * 100, block=20)
    assert few_classes_a_block([f"{number // 10}" for number in range(100)], block=90)  # of the short block at the end
    assert not few_classes_a_block([*range(10), 0, 1], block=10)  # nor has a short block room for more
    assert not few_classes_a_block(list(range(100)), block=20)  # each class once: any order is as good


def test_fewer_samples_than_parts() -> None:
    with pytest.raises(ValueError, match="9 samples can't be split into 10"):
        inception_score_shuffled(features(9))


# ------------------------------------------------------------------ KID


def test_kid_of_whole_sets_is_torch_fidelitys() -> None:
    module = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = features(60), features(60, seed=1, shift=0.3)
    expected = module.kid_features_to_metric(y, x, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kid(y, x, subsets=1, subset_size=60)[0] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-5)


def test_kid_of_subsets_has_the_mean_of_the_whole_and_is_repeatable() -> None:
    x, y = features(200), features(200, seed=1, shift=0.5)
    mean, spread = kid(x, y, subset_size=50)
    assert (mean, spread) == kid(x, y, subset_size=50)
    assert mean == pytest.approx(kid(x, y, subsets=1, subset_size=200)[0], abs=4 * spread / math.sqrt(100))
    with pytest.raises(ValueError, match="subsets of 1000 images can't be drawn from 200"):
        kid(x, y)


# ------------------------------------------------------------------ precision and recall


@pytest.mark.parametrize("block", [7, 2048])
def test_precision_recall_are_torch_fidelitys(block: int) -> None:
    module = pytest.importorskip("torch_fidelity.metric_prc")
    samples, references = 0.8 * features(150), features(120, seed=1, shift=0.1)
    expected = module.prc_features_to_metric(samples, references, verbose=False)
    precision, recall = precision_recall(samples, references, block=block)
    assert 0.1 < expected["precision"] < 1 and expected["precision"] != expected["recall"]  # so that a swap would show
    assert (precision, recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    assert precision_recall(samples + 1000, references + 1000, block=block) == pytest.approx((precision, recall), abs=0.02)


def test_a_ball_has_its_border() -> None:
    assert precision_recall(torch.ones(1, 2).expand(5, 2), torch.ones(1, 2).expand(6, 2)) == (1.0, 1.0)  # radius 0, distance 0


def test_a_narrow_set_is_precise_and_a_wide_one_recalls() -> None:
    references = features(100, 2)
    assert precision_recall(0.01 * features(100, 2, seed=1), references) == (1.0, pytest.approx(0, abs=0.1))
    assert precision_recall(references, references) == (1.0, 1.0)


def test_precision_recall_of_real_photographs(real_features: torch.Tensor) -> None:
    module = pytest.importorskip("torch_fidelity.metric_prc")
    samples, references = real_features[::2], real_features[1::2]
    expected = module.prc_features_to_metric(samples, references, verbose=False)
    found = precision_recall(samples, references)
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=2 / 1050)


def test_too_few_for_neighbours() -> None:
    with pytest.raises(ValueError, match="3 neighbours can't be found among 3"):
        precision_recall(features(3), features(10))
