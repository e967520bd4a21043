"""Images that no file holds, and networks that see thousands of them in no time."""

from collections.abc import Sequence

import torch

from texttok_cli.metrics.inception import Features
from texttok_cli.metrics.sources import TensorImages

DIM = 32  # in the place of 2048 and 2023


class FakeInception(torch.nn.Module):
    """Features that are linear in the pixels."""

    sha256 = "0" * 64

    def __init__(self, *, resize: str, head: bool, weights: object, offline: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(48, dim, generator=generator) / 48**0.5 for dim in (DIM, DIM, 1008)]
        self.seen = 0

    def forward(self, images: torch.Tensor) -> Features:
        self.seen += len(images)
        x = images.float().flatten(1) / 255
        return Features(*(x @ weight for weight in self.weights))


class Drawn(TensorImages):
    """n images of 4 x 4 random pixels."""

    def __init__(self, n: int, seed: int) -> None:
        super().__init__(torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))


class FakeClip:
    """Scores that are 0, and a caption cut off in every batch."""

    name, sha256 = "clip", "0" * 64

    def __init__(self, truncated: int = 0) -> None:
        self.truncated = truncated

    def cosines(self, images: torch.Tensor, captions: Sequence[str], *, prefixes: Sequence[str]) -> torch.Tensor:
        self.truncated += 1
        return torch.zeros(len(images), len(prefixes))
