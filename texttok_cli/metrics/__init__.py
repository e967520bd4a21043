"""Metrics by the field's protocols.

    from texttok_cli.metrics import Evaluator, FileImages, Work

    evaluator = Evaluator(["fid", "precision", "recall"])
    for batch in Work(FileImages(samples), FileImages(references, crop_to=256), paired=False).batches(64):
        evaluator.update(batch)
    evaluator.compute()                       # {"fid": (12.3, None), ...}: value, and its spread where the rule has one

Names are imported when they are first used, so that the command line does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from texttok_cli.metrics.clip import ClipScorer
    from texttok_cli.metrics.distribution import inception_score_adm, inception_score_shuffled, kid, precision_recall
    from texttok_cli.metrics.evaluator import Batch, Evaluator, Work
    from texttok_cli.metrics.image import psnr, ssim, ssim_gaussian
    from texttok_cli.metrics.inception import FidInception
    from texttok_cli.metrics.registry import METRICS
    from texttok_cli.metrics.report import compare, load_report
    from texttok_cli.metrics.sources import FileImages, NpzImages, read_npz_reference
    from texttok_cli.metrics.statistics import RunningGaussian, frechet_distance

_HOMES = {
    "METRICS": "registry",
    "Batch": "evaluator",
    "ClipScorer": "clip",
    "Evaluator": "evaluator",
    "FidInception": "inception",
    "FileImages": "sources",
    "NpzImages": "sources",
    "RunningGaussian": "statistics",
    "Work": "evaluator",
    "compare": "report",
    "frechet_distance": "statistics",
    "inception_score_adm": "distribution",
    "inception_score_shuffled": "distribution",
    "kid": "distribution",
    "load_report": "report",
    "precision_recall": "distribution",
    "psnr": "image",
    "read_npz_reference": "sources",
    "ssim": "image",
    "ssim_gaussian": "image",
}
__all__ = [
    "METRICS",
    "Batch",
    "ClipScorer",
    "Evaluator",
    "FidInception",
    "FileImages",
    "NpzImages",
    "RunningGaussian",
    "Work",
    "compare",
    "frechet_distance",
    "inception_score_adm",
    "inception_score_shuffled",
    "kid",
    "load_report",
    "precision_recall",
    "psnr",
    "read_npz_reference",
    "ssim",
    "ssim_gaussian",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
