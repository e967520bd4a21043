"""One pass over images for all metrics at once: every image goes through each network once.

Letters: n images, B batch, S image side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from texttok_cli.config import Resize
from texttok_cli.errors import DataError
from texttok_cli.files import sha256_tensors
from texttok_cli.losses import build_perceptual
from texttok_cli.metrics.clip import HESSEL_PREFIX, ClipScorer
from texttok_cli.metrics.evidence import Evidence, Need, Side
from texttok_cli.metrics.image import psnr, ssim, ssim_gaussian
from texttok_cli.metrics.inception import NETWORK, FidInception
from texttok_cli.metrics.registry import METRICS, Score, check_names
from texttok_cli.metrics.sources import Images
from texttok_cli.metrics.statistics import Gaussian
from texttok_cli.models.layers import exact_convolutions

PIXELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim, "ssim-gaussian": ssim_gaussian}
PREFIXES = {"clip-score": "", "clipscore-hessel": HESSEL_PREFIX}


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples, originals, or samples with their originals: uint8 (B, 3, S, S), with their indices (B,)."""

    indices: Tensor
    samples: Tensor | None
    references: Tensor | None
    captions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.indices)


class Evaluator:
    """The networks that some metrics need, and what they have seen so far.

    `given` are statistics of the references, which then need not be seen; `keep` names what is wanted of the samples even
    if no metric needs it. Raises UsageError for an unknown metric, BackendError if a network's weights are not available.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        *,
        given: Mapping[str, Gaussian] | None = None,
        resize: Resize = "tf1-bilinear",
        inception: Path | None = None,
        clip: ClipScorer | None = None,
        keep: Set[Need] = frozenset(),
        device: torch.device | str = "cpu",
        offline: bool = False,
    ) -> None:
        check_names(metrics)
        self.metrics, self.resize, self.device, self.clip = list(metrics), resize, torch.device(device), clip
        chosen = [METRICS[name] for name in metrics]
        self.needs = needs = {need for metric in chosen for need in metric.needs} | keep
        compared = {need for metric in chosen if metric.reference for need in metric.needs}
        self.evidence = Evidence(Side(needs), Side(compared, given), {name for name in metrics if METRICS[name].by_image})
        head = "logits" in needs or inception is not None  # a file given by its path is the whole network's
        self.inception = FidInception(resize=resize, head=head, weights=inception, offline=offline).to(self.device) if needs else None
        nets = [name for name in metrics if METRICS[name].network == "lpips"]
        self.perceptual: dict[str, nn.Module] = {name: build_perceptual(name, offline=offline).to(self.device) for name in nets}  # type: ignore[arg-type]
        # Name and sha256 of the weights of every network in use: `inception`, `clip`, and the perceptual ones by their metric.
        self.networks = self._networks()

    def against_the_same(self) -> Evaluator:
        """One for other samples. It shares the networks and the references, whose features only this one sees."""
        other = copy(self)
        other.clip = copy(self.clip)  # it counts the captions of its samples
        other.evidence = Evidence(Side(self.needs), self.evidence.references, set(self.evidence.by_image), borrowed=True)
        return other

    def update(self, batch: Batch) -> None:
        """Take in a batch. DataError for an image whose Inception features are not finite."""
        samples = None if batch.samples is None else batch.samples.to(self.device)
        references = None if batch.references is None else batch.references.to(self.device)
        found = self.evidence
        seen = ((found.samples, samples, found.samples.wants_images), (found.references, references, found.wants_references))
        for side, images, wanted in seen:
            if images is not None and wanted:
                assert self.inception is not None
                side.update(batch.indices, self.inception(images))
        if samples is not None and references is not None:
            for name, values in self._compared(references, samples).items():
                found.by_image[name].add(batch.indices, values)
        if samples is not None and self.clip is not None:
            for name, values in self._fit(samples, batch.captions).items():
                found.by_image[name].add(batch.indices, values)

    @torch.no_grad()
    def _compared(self, references: Tensor, samples: Tensor) -> dict[str, Tensor]:
        pair = references.cpu(), samples.cpu()  # float64, which not every device has
        values = {name: rule(*pair) for name, rule in PIXELS.items() if name in self.metrics}
        with exact_convolutions():
            return values | {name: net(references.float() / 255, samples.float() / 255) for name, net in self.perceptual.items()}

    def _fit(self, samples: Tensor, captions: Sequence[str] | None) -> dict[str, Tensor]:
        assert self.clip is not None and captions is not None
        names = [name for name in PREFIXES if name in self.metrics]
        cosines = self.clip.cosines(samples, captions, prefixes=[PREFIXES[name] for name in names])
        values = dict(zip(names, cosines.unbind(dim=1), strict=True))
        if "clipscore-hessel" in values:
            values["clipscore-hessel"] = 2.5 * values["clipscore-hessel"].clamp_min(0)
        return values

    def _networks(self) -> dict[str, tuple[str, str]]:
        found = {name: (name, sha256_tensors(net.state_dict().values())) for name, net in self.perceptual.items()}
        if self.inception is not None:
            found["inception"] = (NETWORK, self.inception.sha256)
        if self.clip is not None:
            found["clip"] = (self.clip.name, self.clip.sha256)
        return found

    @property
    def truncated(self) -> int:
        """How many captions CLIP could not read to their end."""
        return 0 if self.clip is None else self.clip.truncated

    def compute(self) -> dict[str, Score]:
        """Every metric: its value, and its spread if its rule has one. DataError for sets that are too small to have one."""
        scores = {}
        for name in self.metrics:
            try:
                scores[name] = METRICS[name].compute(self.evidence)
            except ValueError as err:
                raise DataError(f"{name}: {err}") from None
        return scores


# ------------------------------------------------------------------ what is to be seen


@dataclass(frozen=True)
class Work:
    """What one process of `size` has to see, in an order that never changes: so it can go on after any batch.

    Pairs if samples and references belong together (`reconstruct` then makes the samples of the references); else first
    the samples, then the references. Every image falls to exactly one process, and none twice.
    """

    samples: Images | None
    references: Images | None
    paired: bool
    captions: Sequence[str] | None = None  # of the samples
    reconstruct: Callable[[Tensor, Sequence[int]], Tensor] | None = None  # uint8 (B, 3, S, S) and indices -> the same shape
    rank: int = 0
    size: int = 1

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self._parts())

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[Batch]:
        """Batches from image number `start` of this process on. The last batch of the samples and of the references may be short."""
        for kind, indices in self._parts():
            yield from kind(indices[start:], batch_size)
            start = max(0, start - len(indices))

    def _parts(self) -> list[tuple[Callable[[range, int], Iterator[Batch]], range]]:
        if self.paired:
            assert self.references is not None
            return [(self._pairs, range(self.rank, len(self.references.ids), self.size))]
        sides = ((self._samples, self.samples), (self._references, self.references))
        return [(kind, range(self.rank, len(images.ids), self.size)) for kind, images in sides if images is not None]

    def _pairs(self, indices: range, batch_size: int) -> Iterator[Batch]:
        assert self.references is not None
        originals = self.references.batches(indices, batch_size)
        if self.reconstruct is not None:
            for chosen, images in originals:
                yield Batch(chosen, self.reconstruct(images, chosen.tolist()), images, self._texts(chosen))
            return
        assert self.samples is not None
        for (chosen, samples), (_, images) in zip(self.samples.batches(indices, batch_size), originals, strict=True):
            yield Batch(chosen, samples, images, self._texts(chosen))

    def _samples(self, indices: range, batch_size: int) -> Iterator[Batch]:
        assert self.samples is not None
        for chosen, images in self.samples.batches(indices, batch_size):
            yield Batch(chosen, images, None, self._texts(chosen))

    def _references(self, indices: range, batch_size: int) -> Iterator[Batch]:
        assert self.references is not None
        for chosen, images in self.references.batches(indices, batch_size):
            yield Batch(chosen, None, images)

    def _texts(self, chosen: Tensor) -> list[str] | None:
        return None if self.captions is None else [self.captions[index] for index in chosen.tolist()]
