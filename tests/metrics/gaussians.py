"""Statistics of features that are at hand all at once."""

from torch import Tensor

from texttok_cli.metrics.statistics import Gaussian, RunningGaussian


def gaussian_of(features: Tensor) -> Gaussian:
    """Mean and covariance of features (n, D)."""
    running = RunningGaussian(features.shape[1])
    running.update(features)
    return running.gaussian()
