"""What one latency run is asked for, and how a row of it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from texttok_cli.bench.networks import DoesNotFit, Where, Workload, check_fits
from texttok_cli.bench.results import Row
from texttok_cli.bench.timing import Timer
from texttok_cli.diffusion import Sampling

# On a CPU time is proportional to the rows of the matrices once there are some thousands: a part of a longer batch is run.
MAX_CPU_ROWS = 4096


@dataclass(frozen=True)
class Task:
    """Which systems, sizes and batches, and on what."""

    where: Where
    timer: Timer
    image_sizes: Sequence[int]
    tokens: Sequence[int]
    batches: Sequence[int]
    generator: str  # DiT's size: L or XL
    sampling: Sampling

    def timed(self, row: Row, work: Workload, *, times: float = 1.0, repeats: int | None = None) -> Row:
        """The row with the time of `work`, multiplied by `times` and by what the row is a multiple of already."""
        times *= row.times
        return row.model_copy(update={"seconds": self.timer.measure(work, repeats=repeats).scaled(times), "times": times})

    def part_of(self, batch: int, rows: int) -> int:
        """How many images of a batch are run at once, each of so many matrix rows."""
        return batch if self.where.device.type != "cpu" else max(1, min(batch, MAX_CPU_ROWS // rows))

    def time_batches(
        self, row: Row, rows: int, weights: float, activations: Callable[[int], float], build: Callable[[], Callable[[int], Workload]]
    ) -> Iterator[Row]:
        """A row for each batch size, of a network of so many bytes, each image of which is so many matrix rows.

        Nothing is allocated (`build()`) before it is known to fit. On a CPU a part of a batch may stand for all of it.
        """
        work_of: Callable[[int], Workload] | None = None
        for batch in self.batches:
            part = self.part_of(batch, rows)
            this = row.model_copy(update={"batch": batch})
            try:
                check_fits(activations(part) + (weights if work_of is None else 0), self.where.device)
            except DoesNotFit as err:
                yield this.model_copy(update={"skipped": str(err)})
                continue
            if work_of is None:
                work_of = build()
            if part < batch:
                this = this.model_copy(update={"note": joined(row.note, f"{part} of {batch} images run, multiplied")})
            yield self.timed(this, work_of(part), times=batch / part)


def joined(*notes: str) -> str:
    """Several notes as one."""
    return "; ".join(filter(None, notes))
