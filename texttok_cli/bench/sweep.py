"""A sweep of a spec's settings: images sampled and timed, and scored by FID's protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from texttok_cli.bench.machine import describe
from texttok_cli.bench.results import PaperSize, PointResult, TradeoffResult
from texttok_cli.bench.systems import System, open_system
from texttok_cli.bench.timing import Timer
from texttok_cli.bench.tradeoff import PointStore, Score, Series, Setting, Spec, measure_point, settings
from texttok_cli.config import Precision
from texttok_cli.data import open_dataset
from texttok_cli.diffusion import plan_sampling
from texttok_cli.errors import DataError, RecipeError
from texttok_cli.files import sha256_file
from texttok_cli.metrics.inception import NETWORK, POOL_DIM, FidInception
from texttok_cli.metrics.registry import METRICS
from texttok_cli.metrics.sources import FileImages, read_npz_reference
from texttok_cli.metrics.statistics import Gaussian, RunningGaussian, frechet_distance

OnPoint = Callable[[int, int, str], None]  # points done, points in all, what was done last


def sweep(
    spec: Spec,
    ref: str,
    out: Path,
    *,
    device: torch.device,
    precision: Precision,
    offline: bool = False,
    paper_size: PaperSize = 256,
    on_point: OnPoint,
) -> TradeoffResult:
    """Measure every point of the spec that is not in OUT/points yet, against the references `ref`.

    Raises DataError, RecipeError, CheckpointError or BackendError for what a person can mend.
    """
    machine = describe(device, clock="wall")
    network = FidInception(offline=offline).to(device)
    references = _References(ref, network, device)
    opener: Opener = partial(open_system, images=spec.images, seed=spec.seed, device=device, precision=precision, offline=offline)
    tokens: dict[str, int] = {}
    identities: dict[str, Mapping[str, object]] = {}
    for series in spec.series:
        tokens[series.name], identities[series.name] = _look(series, opener)
    store, timer = PointStore(out / "points"), Timer(device)
    common = {
        "reference": references.identity,
        "images": spec.images,
        "batch_size": spec.batch_size,
        "seed": spec.seed,
        "precision": precision,
        "machine": [machine.device, machine.name, machine.threads],
    }
    total = sum(len(settings(series)) for series in spec.series)
    on_point(0, total, "")

    def measure(system: System, setting: Setting) -> PointResult:
        score = _score(network, device, references.at(system.image_size))
        return measure_point(setting, system.sample, score, timer, images=spec.images, batch_size=spec.batch_size)

    points: list[PointResult] = []
    for series in spec.series:
        identity = {**common, **identities[series.name], "labels": series.labels}
        for point in _points(series, opener, store, identity, measure):
            points.append(point)
            on_point(len(points), total, f"{series.name}, {point.steps} steps: FID {point.fid:.2f}")
    return TradeoffResult(
        name=spec.name,
        machine=machine,
        reference=spec.reference,
        protocol=_protocol(spec, network, references, precision),
        tokens=tokens,
        points=points,
        paper_size=paper_size,
    )


Opener = Callable[[Series], System]


def _look(series: Series, opener: Opener) -> tuple[int, Mapping[str, object]]:
    """Tokens and identity of a system, which is opened and let go of.

    So what is not available, and a setting that it can't take, is reported before hours are spent on others.
    """
    system = opener(series)
    try:
        for setting in settings(series):
            plan_sampling(system.config, setting.sampling, by_null=True)
    except RecipeError as err:
        raise RecipeError(f"{series.name}: {err}") from None
    return system.tokens, system.identity


def _points(
    series: Series, opener: Opener, store: PointStore, identity: dict[str, object], measure: Callable[[System, Setting], PointResult]
) -> Iterator[PointResult]:
    """All of one series, whose system is opened if a point is missing, and is gone with the last one: the next may need its memory."""
    system: System | None = None
    for setting in settings(series):
        point = store.load(setting, identity)
        if point is None:
            system = system or opener(series)
            point = measure(system, setting)
            store.save(setting, identity, point)
        yield point


def _protocol(spec: Spec, network: FidInception, references: _References, precision: str) -> dict[str, str | int | float | None]:
    """Of the FIDs, as a report's card has it."""
    return {
        "rule": METRICS["fid"].rule,
        "network": NETWORK,
        "network_sha256": network.sha256,
        "resize": network.resize,
        "reference": references.name,
        "reference_sha256": references.identity,
        "n": spec.images,
        "n_reference": references.count,
        "seed": spec.seed,
        "labels": ", ".join(dict.fromkeys("prompts" if series.prompts else series.labels for series in spec.series)),
        "batch": spec.batch_size,
        "precision": precision,
    }


class _References:
    """Statistics of the reference images at a size, computed when first asked for; or those of an .npz."""

    def __init__(self, ref: str, network: FidInception, device: torch.device) -> None:
        self.network, self.device, self.name = network, device, Path(ref).name
        self.by_size: dict[int, Gaussian] = {}
        self.given: Gaussian | None = None
        if ref.endswith(".npz"):
            self.given = read_npz_reference(Path(ref)).given.get("pool")
            if self.given is None:
                raise DataError(f"{ref}: holds no statistics (mu, sigma)")
            self.identity, self.count = sha256_file(Path(ref)), self.given.n
        else:
            self.dataset = open_dataset([ref])
            self.identity, self.count = FileImages(self.dataset).identity(), len(self.dataset)
            if self.count < 2:
                raise DataError(f"{ref}: holds one image; an FID needs 2 references or more")

    def at(self, size: int) -> Gaussian:
        """Of the references cropped to this size by ADM's rule."""
        if self.given is not None:
            return self.given
        if size not in self.by_size:
            images = FileImages(self.dataset, crop_to=size)
            self.by_size[size] = _statistics(self.network, self.device, images.batches(range(len(images.ids)), 32))
        return self.by_size[size]


def _score(network: FidInception, device: torch.device, reference: Gaussian) -> Score:
    def fid(batches: Iterator[tuple[Sequence[int], Tensor]]) -> float:
        return frechet_distance(_statistics(network, device, batches), reference)

    return fid


def _statistics(network: FidInception, device: torch.device, batches: Iterable[tuple[object, Tensor]]) -> Gaussian:
    """Of the features of numbered images."""
    running = RunningGaussian(POOL_DIM)
    for _, images in batches:
        running.update(network(images.to(device)).pool)
    return running.gaussian()
