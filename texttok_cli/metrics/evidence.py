"""What a pass over images leaves behind: sums, kept features and values by image. It merges, and can be saved.

Letters: n images, B batch, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Literal

import torch
from torch import Tensor

from texttok_cli.errors import DataError
from texttok_cli.files import below
from texttok_cli.metrics.inception import POOL_DIM, SPATIAL_DIM, Features
from texttok_cli.metrics.statistics import Gaussian, RunningGaussian

Need = Literal["pool", "spatial", "features", "logits"]


class Rows:
    """A value or a vector for each image, whatever order they came in; `ndim` is 2 for vectors."""

    def __init__(self, ndim: int = 1) -> None:
        self._ndim = ndim
        self._indices: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, indices: Tensor, values: Tensor) -> None:
        """Values (B, ...) of the images with these indices (B,)."""
        self._indices.append(indices)
        self._values.append(values.cpu())

    def merge(self, other: Rows) -> None:
        """Take in the rows of `other`, which are of other images."""
        self._indices += other._indices
        self._values += other._values

    def in_order(self) -> Tensor:
        """All of them (n, ...) by index."""
        return torch.cat(self._values)[torch.cat(self._indices).argsort()]

    def state(self) -> dict[str, Tensor]:
        """All of it, to be saved; empty if there is nothing."""
        return {"indices": torch.cat(self._indices), "values": torch.cat(self._values)} if self._indices else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state. ValueError for one that is not of as many rows as indices."""
        if state:
            indices, values = state["indices"], state["values"]
            if indices.dtype != torch.int64 or indices.ndim != 1 or values.ndim != self._ndim or len(values) != len(indices):
                raise ValueError("rows and indices don't go together")
            self._indices, self._values = [indices], [values]


class Side:
    """The samples or the references: as much of their features as the metrics at hand need.

    `given` holds statistics that a file brought, instead of what would be summed up.
    """

    def __init__(self, needs: Set[Need], given: Mapping[str, Gaussian] | None = None) -> None:
        self.n = 0
        self.given = dict(given or {})
        dims = {"pool": POOL_DIM, "spatial": SPATIAL_DIM}
        self.sums = {name: RunningGaussian(dim) for name, dim in dims.items() if name in needs and name not in self.given}
        self.rows = {name: Rows(ndim=2) for name in ("features", "logits") if name in needs}

    @property
    def wants_images(self) -> bool:
        """Whether there is anything to be learnt from images."""
        return bool(self.sums or self.rows)

    def update(self, indices: Tensor, features: Features) -> None:
        """Take in a batch. DataError for an image whose features are not finite."""
        bad = (~features.pool.isfinite().all(dim=1)).nonzero().flatten()
        if len(bad):
            raise DataError(f"image number {int(indices[bad[0]]) + 1}: its features are not finite")
        found = {"pool": features.pool, "spatial": features.spatial, "features": features.pool, "logits": features.logits}
        for name, running in self.sums.items():
            running.update(found[name])  # type: ignore[arg-type]  # pool and spatial are always there
        for name, rows in self.rows.items():
            assert found[name] is not None, "the network has no head"
            rows.add(indices, found[name])  # type: ignore[arg-type]
        self.n += len(indices)

    def gaussian(self, name: Literal["pool", "spatial"]) -> Gaussian:
        """The statistics of one kind of features."""
        return self.given[name] if name in self.given else self.sums[name].gaussian()

    def merge(self, other: Side) -> None:
        """Take in what another process saw."""
        self.n += other.n
        for name, running in self.sums.items():
            running.merge(other.sums[name])
        for name, rows in self.rows.items():
            rows.merge(other.rows[name])

    def state(self) -> dict[str, Tensor]:
        """All of it, to be saved."""
        return {"n": torch.tensor(self.n), **_prefixed(self._parts())}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state."""
        self.n = int(state["n"])
        for name, part in self._parts().items():
            part.load(below(state, f"{name}/"))

    def _parts(self) -> dict[str, RunningGaussian | Rows]:
        return {**self.sums, **self.rows}


class Evidence:
    """Both sides, and values by image (`psnr`, `lpips-vgg`, ...) under their names.

    `borrowed` references belong to another evidence, which sees, merges and saves them.
    """

    def __init__(self, samples: Side, references: Side, names: Set[str], *, borrowed: bool = False) -> None:
        self.samples, self.references, self.borrowed = samples, references, borrowed
        self.by_image = {name: Rows() for name in sorted(names)}
        self.manifolds: tuple[float, float] | None = None  # precision and recall, which come out of one computation

    @property
    def wants_references(self) -> bool:
        """Whether the features of references have to be seen."""
        return self.references.wants_images and not self.borrowed

    def merge(self, other: Evidence) -> None:
        """Take in what another process found about other images."""
        self.samples.merge(other.samples)
        if not self.borrowed:
            self.references.merge(other.references)
        for name, rows in self.by_image.items():
            rows.merge(other.by_image[name])

    def state(self) -> dict[str, Tensor]:
        """All of it, to be saved."""
        return _prefixed(self._parts())

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state."""
        for name, part in self._parts().items():
            part.load(below(state, f"{name}/"))

    def _parts(self) -> dict[str, Side | Rows]:
        return {"samples": self.samples, **({} if self.borrowed else {"references": self.references}), **self.by_image}


def _prefixed(parts: Mapping[str, RunningGaussian | Rows | Side]) -> dict[str, Tensor]:
    return {f"{name}/{key}": tensor for name, part in parts.items() for key, tensor in part.state().items()}
