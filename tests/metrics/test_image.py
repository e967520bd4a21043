"""PSNR and SSIM against scikit-image."""

import math

import numpy as np
import pytest
import torch

from texttok_cli.metrics.image import psnr, ssim, ssim_gaussian


def pair(size: tuple[int, int] = (33, 40)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, 3, *size), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-40, 40, x.shape, generator=generator)
    return x, (x + noise).clamp(0, 255).to(torch.uint8)


def of_each(rule: object, x: torch.Tensor, y: torch.Tensor, **options: object) -> list[float]:
    return [rule(a.numpy(), b.numpy(), **options) for a, b in zip(x, y, strict=True)]  # type: ignore[operator]


def test_psnr_is_scikit_images() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pair()
    np.testing.assert_allclose(psnr(x, y), of_each(metrics.peak_signal_noise_ratio, x, y, data_range=255), rtol=1e-12)
    assert psnr(x, x).tolist() == [math.inf] * 3


def test_ssim_is_scikit_images_default() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pair()
    theirs = of_each(metrics.structural_similarity, x, y, channel_axis=0, data_range=255)
    np.testing.assert_allclose(ssim(x, y), theirs, rtol=1e-9)
    torch.testing.assert_close(ssim(x, x), torch.ones(3, dtype=torch.float64))


def test_ssim_gaussian_is_scikit_images() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, y = pair()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = of_each(metrics.structural_similarity, x, y, channel_axis=0, data_range=255, **options)
    np.testing.assert_allclose(ssim_gaussian(x, y), theirs, rtol=1e-9)
    assert not np.allclose(ssim_gaussian(x, y), ssim(x, y), rtol=1e-4)


def test_an_image_smaller_than_the_window() -> None:
    x, y = pair((6, 40))
    with pytest.raises(ValueError, match="window has 7 pixels"):
        ssim(x, y)
