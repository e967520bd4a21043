"""Running statistics against NumPy, Fréchet distances against closed forms, clean-fid and torch-fidelity."""

import time

import numpy as np
import pytest
import torch
from gaussians import gaussian_of

from texttok_cli.metrics.statistics import Gaussian, RunningGaussian, frechet_distance


def features(n: int, dim: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + 100


def running(*parts: torch.Tensor) -> RunningGaussian:
    found = RunningGaussian(parts[0].shape[1])
    for part in parts:
        found.update(part)
    return found


def test_batches_and_order_do_not_matter() -> None:
    x = features(101)
    for parts in ([x], x.split(7), x.flip(0).split(50), [x[:0], *x.split(1)]):
        found = running(*parts).gaussian()
        assert found.n == 101
        np.testing.assert_allclose(found.mean, x.double().mean(dim=0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-11)


def test_merging_is_seeing_all() -> None:
    x = features(60)
    ours, other = running(x[:25]), running(x[25:])
    ours.merge(RunningGaussian(12))
    ours.merge(other)
    torch.testing.assert_close(ours.gaussian().covariance, gaussian_of(x).covariance, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.gaussian().mean, gaussian_of(x).mean)


def test_a_saved_state_goes_on() -> None:
    x = features(30)
    again = RunningGaussian(12)
    again.load(running(x[:10]).state())
    again.update(x[10:])
    assert torch.equal(again.gaussian().covariance, running(x[:10], x[10:]).gaussian().covariance)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="2 images or more, not 1"):
        gaussian_of(features(1))


def test_distance_of_known_gaussians() -> None:
    a = Gaussian(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double())
    b = Gaussian(torch.tensor([1.0, 2.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0])).double())
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, b) == pytest.approx(9 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)


def test_distance_without_full_rank_is_finite_and_symmetric() -> None:
    a, b = gaussian_of(features(5)), gaussian_of(features(6, seed=1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_equal_sets_are_no_less_than_zero_apart() -> None:
    same = [gaussian_of(features(50, seed=seed)) for seed in range(10)]
    assert all(0 <= frechet_distance(one, one) < 1e-6 for one in same)


def test_statistics_of_different_features_are_refused() -> None:
    with pytest.raises(ValueError, match="12 and of 8"):
        frechet_distance(gaussian_of(features(20)), gaussian_of(features(20, 8)))


def test_fid_of_real_photographs_is_clean_fids_and_torch_fidelitys(real_features: torch.Tensor) -> None:
    """Over 2,048 images a side, and two halves without full rank; and several times faster than scipy's matrix root."""
    clean = pytest.importorskip("cleanfid.fid").frechet_distance
    fidelity = pytest.importorskip("torch_fidelity.metric_fid").fid_statistics_to_metric
    generator = torch.Generator().manual_seed(0)
    shuffled = real_features[torch.randperm(2100, generator=generator)[:2060]]
    other = 1.02 * shuffled + 0.02 * torch.randn(shuffled.shape, generator=generator).abs()
    full = gaussian_of(real_features), gaussian_of(other)
    halves = gaussian_of(real_features[:1050]), gaussian_of(real_features[1050:])
    arrays = [{"mu": g.mean.numpy(), "sigma": g.covariance.numpy()} for g in (*full, *halves)]

    began = time.process_time()
    ours = frechet_distance(*full)
    seconds = time.process_time() - began
    began = time.process_time()
    theirs = clean(arrays[0]["mu"], arrays[0]["sigma"], arrays[1]["mu"], arrays[1]["sigma"])
    assert seconds < (time.process_time() - began) / 2  # 3.4 times here when it was measured, 6 for the halves
    assert ours == pytest.approx(theirs, rel=1e-6)
    metric = fidelity(arrays[2], arrays[3], verbose=False)
    assert frechet_distance(*halves) == pytest.approx(metric["frechet_inception_distance"], rel=1e-5)
