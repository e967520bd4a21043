"""Metrics of an image against its reconstruction.

Letters: B batch, H and W sides of the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_UNIFORM = 7
SSIM_GAUSSIAN, SSIM_SIGMA = 11, 1.5
LUMINANCE, CONTRAST = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,) float64; both (B, 3, H, W) uint8.

    A set's PSNR is the mean of these. Equal images give inf.
    """
    error = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / error)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """scikit-image's default structural similarity of each image, (B,) float64; both (B, 3, H, W) uint8.

    7 x 7 means with the sample covariance, over whole windows only, by channel; data range 255. ValueError for a side below 7.
    """
    weights = torch.full((SSIM_UNIFORM,), 1 / SSIM_UNIFORM, dtype=torch.float64)
    pixels = SSIM_UNIFORM**2
    return _ssim(images, others, weights, unbias=pixels / (pixels - 1))


def ssim_gaussian(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity as Wang et al. (2004): 11 x 11 Gaussian of sigma 1.5, population covariance, whole windows only.

    Of each image, (B,) float64, by channel; both (B, 3, H, W) uint8, data range 255. ValueError for a side below 11.
    """
    offsets = torch.arange(SSIM_GAUSSIAN, dtype=torch.float64) - SSIM_GAUSSIAN // 2
    weights = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    return _ssim(images, others, weights / weights.sum(), unbias=1)


def _ssim(images: Tensor, others: Tensor, weights: Tensor, *, unbias: float) -> Tensor:
    """Mean over windows (separable, `weights` a side) and channels."""
    if min(images.shape[-2:]) < len(weights):
        raise ValueError(f"images are {tuple(images.shape)}: SSIM's window has {len(weights)} pixels a side")
    x, y = images.double().flatten(0, 1)[:, None], others.double().flatten(0, 1)[:, None]  # (B*3, 1, H, W)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = unbias * (mean(x * x) - mean_x**2), unbias * (mean(y * y) - mean_y**2)
    covariance = unbias * (mean(x * y) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + LUMINANCE) / (mean_x**2 + mean_y**2 + LUMINANCE)
    structure = (2 * covariance + CONTRAST) / (variance_x + variance_y + CONTRAST)
    return (luminance * structure).view(len(images), -1).mean(dim=1)
