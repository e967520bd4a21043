"""Scores of a set of features: Inception Score, kernel distance, precision and recall.

Letters: n samples, m references, D feature dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

ADM_IS_BLOCK = 5000
ADM_REFERENCE_LIMIT = 10_000  # images of the reference that precision and recall see in ADM's evaluator
NEIGHBOURS = 3
IS_SPLITS, IS_SEED = 10, 2020  # torch-fidelity's
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


def inception_score_adm(logits: Tensor, *, block: int = ADM_IS_BLOCK) -> tuple[float, float]:
    """ADM's rule: mean and spread (population) of the scores of consecutive blocks in the order given, the last one short.

    Logits (n, 1008) without bias. Samples sorted by class make each block see few classes, which caps the score.
    """
    return _mean_and_spread(_block_score(part) for part in torch.split(logits.double(), block))


def inception_score_permuted(logits: Tensor, *, block: int = ADM_IS_BLOCK) -> tuple[float, float]:
    """ADM's blocks of a fixed permutation: for images that lie in an order of their own, as those of a data set."""
    return inception_score_adm(_permuted(logits), block=block)


def few_classes_a_block(classes: Sequence[Hashable], *, block: int = ADM_IS_BLOCK) -> bool:
    """Whether samples with these classes, in this order, give ADM's rule a block with less than half of what a random order would."""
    n, counts = len(classes), Counter(classes).values()
    blocks = [classes[start : start + block] for start in range(0, n, block)]
    return any(2 * len(set(part)) < sum(1 - (1 - count / n) ** len(part) for count in counts) for part in blocks)


def inception_score_shuffled(logits: Tensor) -> tuple[float, float]:
    """torch-fidelity's rule: mean and spread of the scores of IS_SPLITS parts of a fixed permutation (NumPy's legacy generator).

    ValueError for fewer samples than parts.
    """
    n = len(logits)
    if n < IS_SPLITS:
        raise ValueError(f"{n} samples can't be split into {IS_SPLITS} parts")
    shuffled = _permuted(logits).double()
    return _mean_and_spread(_block_score(shuffled[i * n // IS_SPLITS : (i + 1) * n // IS_SPLITS]) for i in range(IS_SPLITS))


def _permuted(logits: Tensor) -> Tensor:
    """The rows in an order that is the same for the same number of them (NumPy's legacy generator)."""
    return logits[torch.from_numpy(np.random.RandomState(IS_SEED).permutation(len(logits)))]


def _block_score(logits: Tensor) -> Tensor:
    """exp E KL(p(y|x) || p(y)), a scalar."""
    log_p = logits.log_softmax(dim=1)
    log_marginal = log_p.logsumexp(dim=0) - np.log(len(logits))
    score: Tensor = (log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp()
    return score


def kid(samples: Tensor, references: Tensor, *, subset_size: int = KID_SUBSET_SIZE, subsets: int = KID_SUBSETS) -> tuple[float, float]:
    """Kernel Inception distance (Binkowski et al., 2018): mean and spread of the unbiased MMD^2 of random subsets.

    Features (n, D) and (m, D), kernel (x.y / D + 1)^3. ValueError for fewer images than a subset has.
    """
    if min(len(samples), len(references)) < subset_size:
        raise ValueError(f"subsets of {subset_size} images can't be drawn from {min(len(samples), len(references))}")
    generator = torch.Generator().manual_seed(0)

    def drawn(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset_size]].double()

    return _mean_and_spread(_mmd2(drawn(references), drawn(samples)) for _ in range(subsets))


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of equally many x and y (m, D), a scalar: no point is compared with itself."""
    m, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    def without_diagonal(k: Tensor) -> Tensor:
        return k.sum() - k.trace()

    return (without_diagonal(kernel(x, x)) + without_diagonal(kernel(y, y))) / (m * (m - 1)) - 2 * kernel(x, y).mean()


def precision_recall(samples: Tensor, references: Tensor, *, block: int = 2048) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019) of features (n, D) and (m, D).

    Precision: the share of samples that lie within a ball of the references, recall the reverse; a ball reaches to its
    centre's k-th nearest neighbour, itself not counted. Distances of `block` x `block` pairs are in memory at a time.
    ValueError for sets of no more than NEIGHBOURS images.
    """
    if min(len(samples), len(references)) <= NEIGHBOURS:
        raise ValueError(f"{NEIGHBOURS} neighbours can't be found among {min(len(samples), len(references))} images")
    # About a common point: the squares of distances are differences of squares, which large means would blur.
    centre = references.mean(dim=0, keepdim=True)
    samples, references = samples.float() - centre, references.float() - centre
    sample_balls = _radii(samples, block)
    reference_balls = _radii(references, block)
    return _covered(samples, references, reference_balls, block), _covered(references, samples, sample_balls, block)


def _radii(centres: Tensor, block: int) -> Tensor:
    """Distance (m,) of each centre to its k-th nearest other one."""
    radii = []
    for rows in torch.split(centres, block):
        nearest = torch.empty(len(rows), 0)
        for columns in torch.split(centres, block):  # itself is among them, at distance 0: the k + 1 nearest are kept
            found = torch.cat([nearest, torch.cdist(rows, columns).cpu()], dim=1)
            nearest = found.topk(min(NEIGHBOURS + 1, found.shape[1]), dim=1, largest=False).values
        radii.append(nearest.amax(dim=1))
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    """The share of `points` within the ball of any centre."""
    inside = 0
    for rows in torch.split(points, block):
        found = torch.zeros(len(rows), dtype=torch.bool)
        for columns, reach in zip(torch.split(centres, block), torch.split(radii, block), strict=True):
            found |= (torch.cdist(rows, columns).cpu() <= reach).any(dim=1)
        inside += int(found.sum())
    return inside / len(points)


def _mean_and_spread(scores: Iterable[Tensor]) -> tuple[float, float]:
    values = torch.stack(list(scores))
    return float(values.mean()), float(values.std(correction=0))
