"""Mean and covariance of features in one pass, and the Fréchet distance between two of them.

Letters: n images, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D), float64; `n` is None where a file of statistics does not say it."""

    mean: Tensor
    covariance: Tensor
    n: int | None = None


class RunningGaussian:
    """Mean and scatter of features seen so far, float64; two of them merge into that of both sets (Chan et al., 1979).

    Sums are taken about the mean, so that large means cost no digits; order and batch size change rounding only.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor) -> None:
        """Take features (B, D) in."""
        if not len(features):
            return
        x = features.cpu().double()
        mean = x.mean(dim=0)
        self._add(len(x), mean, x - mean)

    def _add(self, n: int, mean: Tensor, centred: Tensor) -> None:
        """In place: a copy of the scatter a batch would cost more than its product."""
        shift = (mean - self.mean) * (self.n * n / (self.n + n)) ** 0.5
        rows = torch.cat([centred, shift[None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean += (mean - self.mean) * (n / (self.n + n))
        self.n += n

    def merge(self, other: RunningGaussian) -> None:
        """Take in what `other` saw."""
        if other.n:
            self.scatter += other.scatter
            self._add(other.n, other.mean, torch.empty(0, len(other.mean), dtype=torch.float64))

    def gaussian(self) -> Gaussian:
        """What was seen. ValueError for fewer than two images."""
        if self.n < 2:
            raise ValueError(f"a covariance needs 2 images or more, not {self.n}")
        return Gaussian(self.mean, self.scatter / (self.n - 1), self.n)

    def state(self) -> dict[str, Tensor]:
        """All of it, to be saved."""
        return {"n": torch.tensor(self.n), "mean": self.mean, "scatter": self.scatter}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state."""
        self.n, self.mean, self.scatter = int(state["n"]), state["mean"], state["scatter"]


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^1/2), the FID of its features.

    With S_a = L L^T the last trace is the sum of the roots of the eigenvalues of L^T S_b L, which is symmetric and so
    never complex; a matrix square root of the product, as others take, is several times slower and can fail where the
    covariances have no full rank. ValueError for statistics of different features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} features")
    root, failed = torch.linalg.cholesky_ex(a.covariance)
    if failed:  # no full rank: from eigenvectors, which take twice as long as all the rest
        values, vectors = torch.linalg.eigh(a.covariance)
        root = vectors * values.clamp_min(0).sqrt()
    product = torch.linalg.eigvalsh(root.T @ b.covariance @ root).clamp_min(0)
    trace = a.covariance.trace() + b.covariance.trace() - 2 * product.sqrt().sum()
    return float(((a.mean - b.mean).square().sum() + trace).clamp_min(0))  # of equal sets rounding may leave less, printed as -0.0000
