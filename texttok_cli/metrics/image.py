"""Metrics of an image against its reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,) float64; both (B, 3, H, W) uint8.

    A set's PSNR is the mean of these. Equal images give inf.
    """
    error = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / error)
