"""The passes of `texttok eval` over the images of its subjects, each of which goes on where an interrupted one was."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from texttok_cli.errors import DataError

if TYPE_CHECKING:
    from texttok_cli.metrics.evaluator import Batch, Evaluator
    from texttok_cli.metrics.processes import Processes
    from texttok_cli.metrics.subject import Subject


def states_of(out: Path | None, passes: int, processes: Processes) -> list[Path | None]:
    """Where each pass of this process keeps what it has seen, beside the report."""
    if out is None:
        return [None] * passes
    numbers = ["", *(f".{number}" for number in range(2, passes + 1))]
    return [out.with_name(f".{out.name}{number}.state-{processes.rank}-of-{processes.size}") for number in numbers]


def measure(
    evaluators: Sequence[Evaluator],
    subjects: Sequence[Subject],
    processes: Processes,
    states: Sequence[Path | None],
    *,
    save_samples: Path | None,
    batch_size: int,
    quiet: bool,
) -> None:
    """See every image of all subjects, one after the other, from where their states are; `save_samples` takes the first's samples."""
    with _writer(save_samples, subjects[0], processes) as write:
        for evaluator, subject, state in zip(evaluators, subjects, states, strict=True):
            more = subject is not subjects[-1]
            _measure_one(evaluator, subject, processes, state=state, more=more, write=write, batch_size=batch_size, quiet=quiet)


def _measure_one(
    evaluator: Evaluator,
    subject: Subject,
    processes: Processes,
    *,
    state: Path | None,
    more: bool,
    write: Callable[[Batch], None] | None,
    batch_size: int,
    quiet: bool,
) -> None:
    """See every image of one subject."""
    from texttok_cli.console import progress, say
    from texttok_cli.metrics.evaluator import Work
    from texttok_cli.metrics.processes import run_pass

    references = subject.references if evaluator.evidence.wants_references or subject.paired else None
    work = Work(
        subject.samples, references, subject.paired, subject.captions, subject.reconstruct, rank=processes.rank, size=processes.size
    )
    fingerprints = [images.fingerprint() for images in (subject.samples, references) if images is not None]
    identity = {
        "metrics": evaluator.metrics,
        "needs": sorted(evaluator.needs),
        "networks": evaluator.networks,
        "resize": evaluator.resize,
        "card": subject.card,
        "images": fingerprints,
        "texts": hashlib.sha256(repr((subject.texts, subject.captions)).encode()).hexdigest(),
    }
    if subject.cut_off is not None and processes.rank == 0 and not quiet:
        say(f"{subject.card['samples']}: {subject.cut_off}")
    with progress(quiet=quiet or processes.rank > 0) as bar:
        task = bar.add_task("measuring", total=len(work), note=subject.card["samples"])

        def on_resume(done: int) -> None:
            if not quiet:
                say(f"going on from image {done:,}")
            bar.advance(task, done)

        def on_batch(batch: Batch) -> None:
            if write is not None:
                write(batch)
            bar.advance(task, len(batch))

        run_pass(evaluator, work, batch_size=batch_size, state=state, identity=identity, on_resume=on_resume, on_batch=on_batch, more=more)


@contextmanager
def _writer(path: Path | None, subject: Subject, processes: Processes) -> Iterator[Callable[[Batch], None] | None]:
    """Writes the samples of each batch to an ADM batch; None if that is not asked for."""
    if path is None:
        yield None
        return
    from texttok_cli.files import atomic_path
    from texttok_cli.metrics.sources import NpzWriter

    if processes.size > 1:
        raise DataError("--save-samples: one process writes one file; leave it out, or run without a launcher")
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        writer = NpzWriter(archive, len(subject.measured.ids), subject.measured.size)

        def write(batch: Batch) -> None:
            if batch.samples is not None:
                writer.add(batch.samples)

        try:
            yield write
        finally:  # the archive can't be closed with it open, and would say so instead of what happened
            writer.close()
