"""Something quick in the place of InceptionV3, for tests of what is done with its features."""

import torch

from texttok_cli.metrics.inception import Features

DIM = 16  # in the place of 2048 and 2023


class TinyInception(torch.nn.Module):
    """Features that are linear in some pixels, of any size of image."""

    sha256 = "0" * 64

    def __init__(self, *, resize: str = "tf1-bilinear", head: bool = False, weights: object = None, offline: bool) -> None:
        super().__init__()
        self.resize = resize
        self.matrix = torch.randn(192, DIM, generator=torch.Generator().manual_seed(0))

    def forward(self, images: torch.Tensor) -> Features:
        pool = images[:, :, :8, :8].float().flatten(1) @ self.matrix / 255
        return Features(pool, pool, pool)
