"""A pass of `texttok eval` on the screen, and its samples to a file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from texttok_cli.metrics.evaluator import Batch
    from texttok_cli.metrics.passes import Pass
    from texttok_cli.metrics.sources import Images


def show(seeing: Pass, *, first: bool, quiet: bool, save_samples: Path | None) -> Iterator[Batch]:
    """The batches of a pass, with progress on stderr (of the `first` process); `save_samples` takes the samples as an ADM batch."""
    from texttok_cli.console import progress, say

    name, cut_off = seeing.subject.card["samples"], seeing.subject.cut_off
    if cut_off is not None and first and not quiet:
        say(f"{name}: {cut_off}")
    with _writer(save_samples, seeing.subject.measured) as write, progress(quiet=quiet or not first) as bar:
        task = bar.add_task("measuring", total=seeing.images, note=name)
        if seeing.resume():
            if not quiet:
                say(f"going on from image {seeing.done:,}")
            bar.advance(task, seeing.done)
        for batch in seeing:
            if batch.samples is not None:
                write(batch.samples)
            bar.advance(task, len(batch))
            yield batch


@contextmanager
def _writer(path: Path | None, images: Images) -> Iterator[Callable[[Tensor], object]]:
    if path is None:
        yield lambda samples: None
        return
    from texttok_cli.files import atomic_path
    from texttok_cli.metrics.sources import writing_npz

    n, size = len(images.ids), images.size
    with atomic_path(path) as file, zipfile.ZipFile(file, "w") as archive, writing_npz(archive, n, size) as write:
        yield write
