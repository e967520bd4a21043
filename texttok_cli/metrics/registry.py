"""Every metric by name: its exact definition, what it needs, how it comes out of the evidence, and how many images it wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from texttok_cli.data import evenly_spaced
from texttok_cli.errors import DataError, UsageError
from texttok_cli.metrics.distribution import (
    ADM_REFERENCE_LIMIT,
    IS_SPLITS,
    KID_SUBSET_SIZE,
    NEIGHBOURS,
    inception_score_adm,
    inception_score_permuted,
    inception_score_shuffled,
    kid,
    precision_recall,
)
from texttok_cli.metrics.evidence import Evidence, Need
from texttok_cli.metrics.image import SSIM_GAUSSIAN, SSIM_UNIFORM
from texttok_cli.metrics.statistics import frechet_distance

Score = tuple[float, float | None]  # value and, where the rule has one, its spread
Network = Literal["inception", "lpips", "clip", ""]  # whose weights the number depends on


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; `by_image` ones are the mean of a value for each image."""

    rule: str
    compute: Callable[[Evidence], Score]
    needs: frozenset[Need] = frozenset()
    network: Network = ""
    least: int = 1  # there is no number of fewer images
    enough: int = 1  # with fewer images the number is given with a warning
    why: str = ""  # what is wrong with fewer
    by_image: bool = False
    reference: bool = True  # compares with references
    reconstruction: bool = False  # has its meaning between images and their reconstructions alone
    least_side: int = 1  # of the samples, in pixels
    in_order: bool = False  # depends on the order of the samples


def _frechet(name: Literal["pool", "spatial"]) -> Callable[[Evidence], Score]:
    return lambda found: (frechet_distance(found.samples.gaussian(name), found.references.gaussian(name)), None)


def _fid(reconstruction: bool = False) -> Metric:
    why = "covariances of 2,048 features do not have full rank up to 2,048 images, and FID falls with n up to some 50,000"
    rule = "Fréchet distance of pool_3 (2048), unbiased covariances, float64"
    return Metric(rule, _frechet("pool"), frozenset({"pool"}), "inception", 2, 2049, why, reconstruction=reconstruction)


def _inception_score(
    rule: str, score: Callable[[Tensor], Score], *, reconstruction: bool = False, least: int = 1, in_order: bool = False
) -> Metric:
    return Metric(
        rule,
        lambda found: score(found.samples.rows["logits"].in_order()),
        frozenset({"logits"}),
        "inception",
        least,
        50_000,
        "published Inception Scores are of 50,000 images, and fewer give a different number",
        reference=False,
        reconstruction=reconstruction,
        in_order=in_order,
    )


def _precision_recall(which: int) -> Callable[[Evidence], Score]:
    def compute(found: Evidence) -> Score:
        if found.manifolds is None:
            references = found.references.rows["features"].in_order()
            chosen = references[evenly_spaced(len(references), ADM_REFERENCE_LIMIT)]
            found.manifolds = precision_recall(found.samples.rows["features"].in_order(), chosen)
        return found.manifolds[which], None

    return compute


def _manifold(what: str, which: int) -> Metric:
    rule = f"{what}, k = 3, pool_3; at most 10,000 references (of more, every n/10,000th); float32 distances, where ADM's are float16"
    why = "ADM's rule has 10,000 references against 50,000 samples"
    return Metric(rule, _precision_recall(which), frozenset({"features"}), "inception", NEIGHBOURS + 1, 10_000, why)


def _kid(found: Evidence) -> Score:
    return kid(found.samples.rows["features"].in_order(), found.references.rows["features"].in_order())


def _mean(name: str, factor: float = 1.0) -> Callable[[Evidence], Score]:
    return lambda found: (factor * float(found.by_image[name].in_order().double().mean()), None)


def _paired(name: str, rule: str, network: Network = "", *, least_side: int = 1) -> Metric:
    rule = f"{rule}; mean over images"
    return Metric(rule, _mean(name), network=network, by_image=True, reconstruction=True, least_side=least_side)


def _lpips(name: str, rule: str) -> Metric:
    return _paired(name, f"images in [0, 1] as float32; {rule}", "lpips", least_side=32)


def _clip(name: str, rule: str, factor: float) -> Metric:
    return Metric(rule, _mean(name, factor), network="clip", by_image=True, reference=False)


_IS_ADM = "mean over consecutive blocks of 5,000 in the samples' order, logits of 1008 classes without bias (ADM)"
METRICS: dict[str, Metric] = {
    "fid": _fid(),
    "rfid": _fid(reconstruction=True),
    "gfid": _fid(),
    "sfid": Metric(
        "Fréchet distance of Mixed_6d branch1x1 after ReLU (ADM's mixed_6/conv:0), first 7 channels, 17 x 17 x 7",
        _frechet("spatial"),
        frozenset({"spatial"}),
        "inception",
        2,
        2024,
        "covariances of 2,023 features do not have full rank up to 2,023 images",
    ),
    "kid": Metric(
        "unbiased MMD^2, kernel (x.y/2048 + 1)^3, 100 random subsets of 1,000 (seed 0), mean and spread",
        _kid,
        frozenset({"features"}),
        "inception",
        KID_SUBSET_SIZE,
        KID_SUBSET_SIZE,
    ),
    "is": _inception_score(_IS_ADM, inception_score_adm, in_order=True),
    # Not ADM's blocks: data sets lie sorted by class, and blocks of few classes score far too low.
    "ris": _inception_score(
        "mean over blocks of 5,000 of a permutation (NumPy's RandomState, seed 2020), logits of 1008 classes without bias",
        inception_score_permuted,
        reconstruction=True,
    ),
    "gis": _inception_score(_IS_ADM, inception_score_adm, in_order=True),
    "is-shuffled": _inception_score(
        "mean over 10 parts of a permutation (seed 2020), logits of 1008 classes without bias (torch-fidelity)",
        inception_score_shuffled,
        least=IS_SPLITS,
    ),
    "precision": _manifold("share of samples within the references' manifold", 0),
    "recall": _manifold("share of references within the samples' manifold", 1),
    "psnr": _paired("psnr", "dB of each uint8 image, 10 log10(255^2 / MSE over pixels and channels)"),
    "ssim": _paired(
        "ssim", "scikit-image's default: 7 x 7 uniform, sample covariance, uint8 RGB by channel, data range 255", least_side=SSIM_UNIFORM
    ),
    "ssim-gaussian": _paired(
        "ssim-gaussian",
        "Wang et al.: 11 x 11 Gaussian, sigma 1.5, population covariance, uint8 RGB by channel, data range 255",
        least_side=SSIM_GAUSSIAN,
    ),
    "lpips-alex": _lpips("lpips-alex", "LPIPS v0.1 (alex)"),
    "lpips-vgg": _lpips("lpips-vgg", "LPIPS v0.1 (vgg)"),
    "stlpips-alex": _lpips("stlpips-alex", "shift-tolerant LPIPS, not LPIPS (alex)"),
    "stlpips-vgg": _lpips("stlpips-vgg", "shift-tolerant LPIPS, not LPIPS (vgg)"),
    "clip-score": _clip("clip-score", "100 cos(image, caption), no prefix, not clamped; mean over images", 100),
    "clipscore-hessel": _clip("clipscore-hessel", "2.5 max(cos(image, 'A photo depicts ' + caption), 0); mean over images", 1),
}

# Of metrics whose names say that the samples are generated, those that take their place for reconstructions.
OF_RECONSTRUCTIONS = {"gfid": "rfid", "gis": "ris"}


def uses_clip(names: Iterable[str]) -> bool:
    """Whether any of the metrics compares samples with captions."""
    return any(METRICS[name].network == "clip" for name in names)


def uses_inception(names: Iterable[str]) -> bool:
    """Whether any of the metrics is of InceptionV3's features."""
    return any(METRICS[name].network == "inception" for name in names)


def uses_pairs(names: Iterable[str]) -> bool:
    """Whether any of the metrics is between images and their own reconstructions."""
    return any(METRICS[name].reconstruction for name in names)


def check_names(names: Iterable[str]) -> None:
    """UsageError for a name that is no metric, with what there is; `lpips` alone is not one, as its network must be named."""
    for name in names:
        if name not in METRICS:
            hint = "; LPIPS has two networks: lpips-alex or lpips-vgg; stlpips-vgg is its shift-tolerant form" if name == "lpips" else ""
            raise UsageError(f"{name}: no such metric; there are {', '.join(METRICS)}{hint}")


def check_images(names: Iterable[str], *, n: int, n_reference: int | None, side: int) -> None:
    """DataError for a metric that has no number of so few samples or references (None: not counted) or so small ones."""
    for name in names:
        metric = METRICS[name]
        for count, what in ((n, "samples"), (n_reference if metric.reference else None, "references")):
            if count is not None and count < metric.least:
                raise DataError(f"{name}: needs {metric.least:,} {what} or more, and there are {count:,}")
        if side < metric.least_side:
            raise DataError(f"{name}: needs images of {metric.least_side} pixels a side or more, not {side}")
