"""The passes of an evaluation over the images of its subjects, and how they are carried out: by whom, from where, who looks on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from texttok_cli.errors import DataError
from texttok_cli.files import load_safetensors, save_safetensors
from texttok_cli.metrics.evaluator import Batch, Evaluator, Work
from texttok_cli.metrics.processes import Processes
from texttok_cli.metrics.subject import Subject

SAVE_EVERY = 60.0  # seconds between saved states


class Pass:
    """One pass of this process over its share of a subject's images; going through its batches shows them to the evaluator.

    With a `state` file it goes on from what is there, and saves to it from time to time, and at the end if `more` passes follow.
    """

    def __init__(
        self,
        subject: Subject,
        evaluator: Evaluator,
        processes: Processes,
        *,
        batch_size: int,
        state: Path | None,
        more: bool = False,
    ) -> None:
        self.subject, self.evaluator, self.done = subject, evaluator, 0
        references = subject.references if evaluator.evidence.wants_references or subject.paired else None
        shown = (subject.samples, references, subject.paired, subject.captions, subject.reconstruct)
        self._work = Work(*shown, rank=processes.rank, size=processes.size)
        self.images = len(self._work)  # of them all, with those that an interrupted pass has seen
        self._batch_size, self._state, self._more = batch_size, state, more
        self._identity = None if state is None else _identity(self._work, subject, evaluator)

    def resume(self) -> int:
        """Take in what an interrupted pass has seen, and return how many images these are.

        DataError for the state of another evaluation, which may hold hours of somebody's work, and for a damaged one.
        """
        if not self.done and self._state is not None and self._state.exists():
            self._restore(self._state)
        return self.done

    def __iter__(self) -> Iterator[Batch]:
        self.resume()
        saved = time.monotonic()
        for batch in self._work.batches(self._batch_size, start=self.done):
            self.evaluator.update(batch)
            self.done += len(batch)
            yield batch
            if self._state is not None and (time.monotonic() - saved > SAVE_EVERY or (self._more and self.done == self.images)):
                header = {"identity": self._identity, "done": self.done, "truncated": self.evaluator.truncated}
                save_safetensors(self._state, self.evaluator.evidence.state(), header)
                saved = time.monotonic()

    def _restore(self, state: Path) -> None:
        header, tensors = load_safetensors(state, error=DataError)
        if header.get("identity") != self._identity:
            raise DataError(f"{state}: is the state of another evaluation; remove it to start again, or give this one another -o OUT")
        try:
            # Copies: what is read maps the file, which Windows then neither replaces nor removes.
            self.evaluator.evidence.load({name: tensor.clone() for name, tensor in tensors.items()})
            truncated, done = int(header["truncated"]), int(header["done"])
            if not 0 <= done <= self.images:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
            raise DataError(f"{state}: is damaged; remove it to start again") from None
        if self.evaluator.clip is not None:
            self.evaluator.clip.truncated = truncated
        self.done = done


def _identity(work: Work, subject: Subject, evaluator: Evaluator) -> Any:
    """What must be equal for a state to be gone on from, as it is read again."""
    identity = {
        "metrics": evaluator.metrics,
        "needs": sorted(evaluator.needs),
        "networks": evaluator.networks,
        "resize": evaluator.resize,
        "card": subject.card,
        "images": [images.fingerprint() for images in (work.samples, work.references) if images is not None],
        "texts": hashlib.sha256(repr((subject.texts, subject.captions, subject.classes)).encode()).hexdigest(),
    }
    return json.loads(json.dumps(identity))


class Job:
    """How one evaluation is carried out.

        with Job(report=Path("report.json")) as job:
            report = evaluate(["fid"], samples="samples/", references="photos/", job=job)
            save_report(Path("report.json"), report)

    What was seen is kept beside `report` from time to time. After an error or an interruption the same lines go on from there; it
    goes when the block ends well. `processes` share the work if each of them runs these lines (default: this one is alone).
    `track` is given each pass and returns its batches, as `tqdm` does. With `statistics` the evaluators keep what is needed for
    those of the samples, whatever the metrics. Afterwards `passes` are those that were made.
    """

    def __init__(
        self,
        processes: Processes | None = None,
        *,
        report: Path | None = None,
        statistics: bool = False,
        track: Callable[[Pass], Iterable[Batch]] = iter,
    ) -> None:
        self.processes, self.report, self.statistics, self.track = processes or Processes({}), report, statistics, track
        self.passes: list[Pass] = []

    def see(self, subjects: Sequence[Subject], evaluators: Sequence[Evaluator], *, batch_size: int) -> None:
        """See every image of all subjects that falls to this process, one after the other."""
        for number, (subject, evaluator) in enumerate(zip(subjects, evaluators, strict=True), 1):
            state, more = self._state(number), number < len(subjects)
            self.passes.append(Pass(subject, evaluator, self.processes, batch_size=batch_size, state=state, more=more))
            for _ in self.track(self.passes[-1]):
                pass

    def _state(self, number: int) -> Path | None:
        if self.report is None:
            return None
        which = f".{number}" if number > 1 else ""
        return self.report.with_name(f".{self.report.name}{which}.state-{self.processes.rank}-of-{self.processes.size}")

    def __enter__(self) -> Job:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            return
        self.processes.finish()  # the report is written, before which nobody's saved state may go
        for number, _pass in enumerate(self.passes, 1):
            state = self._state(number)
            if state is not None:
                state.unlink(missing_ok=True)
