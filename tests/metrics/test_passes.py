"""A pass that was interrupted goes on from what it kept, and a job cleans up after itself when all went well."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from drawn import Drawn, FakeClip, FakeInception

from texttok_cli.errors import DataError
from texttok_cli.files import load_safetensors, save_safetensors
from texttok_cli.metrics.evaluator import Evaluator
from texttok_cli.metrics.evidence import Rows
from texttok_cli.metrics.passes import Job, Pass
from texttok_cli.metrics.processes import Processes
from texttok_cli.metrics.subject import Subject

ALONE = Processes({})


class Interrupted(Exception):
    pass


def drawn(n: int = 40, n_reference: int = 40, *, paired: bool = False, of: object = "a", **known: Any) -> Subject:
    task = "reconstruction" if paired else "generation"
    return Subject(task, Drawn(n, 0), Drawn(n_reference, 1), {"of": of}, paired, **known)  # type: ignore[arg-type]


def finished(one: Pass, *, stop_at: int | None = None) -> list[int]:
    """The sizes of the batches that came; the pass is interrupted when number `stop_at` has."""
    sizes = []
    for batch in one:
        sizes.append(len(batch))
        if len(sizes) == stop_at:
            raise Interrupted
    return sizes


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every batch."""
    monkeypatch.setattr("texttok_cli.metrics.passes.SAVE_EVERY", 0)


@pytest.mark.parametrize("paired", [True, False])
def test_an_interrupted_pass_goes_on(paired: bool, fake: None, saving: None, tmp_path: Path) -> None:
    metrics = ["fid", "is", "precision", *(["psnr"] if paired else [])]

    def run(of: object, *, state: Path | None = tmp_path / "state") -> Pass:
        return Pass(drawn(paired=paired, of=of), Evaluator(metrics), ALONE, batch_size=8, state=state)

    whole = run("a", state=None)
    finished(whole)
    with pytest.raises(Interrupted):
        finished(run(("a", 1)), stop_at=3)
    with pytest.raises(DataError, match="is the state of another evaluation"):
        finished(run("b"))
    second = run(("a", 1))
    assert second.resume() == 16
    assert 16 + sum(finished(second)) == second.images == second.done  # the third batch was seen, and not saved
    for name, (value, _) in whole.evaluator.compute().items():
        assert second.evaluator.compute()[name][0] == pytest.approx(value, rel=1e-8), name


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="this system does not tell which files are mapped")
def test_a_resumed_pass_does_not_hold_on_to_the_file_of_its_state(fake: None, saving: None, tmp_path: Path) -> None:
    """Windows would refuse to write the next one over it."""

    def run() -> Pass:
        return Pass(drawn(), Evaluator(["fid", "precision"]), ALONE, batch_size=8, state=tmp_path / "state")

    with pytest.raises(Interrupted):
        finished(run(), stop_at=3)
    second = run()
    assert second.resume() == 16
    assert not [held.path for held in psutil.Process().memory_maps() if str(tmp_path) in held.path]


@pytest.mark.parametrize("stop_at", [2, 7])  # within the samples and within the references
def test_a_resumed_pass_counts_its_images_and_cut_captions_as_one_that_was_not_interrupted(
    stop_at: int, fake: None, saving: None, tmp_path: Path
) -> None:
    def run() -> Pass:
        evaluator = Evaluator(["fid", "clip-score"], clip=FakeClip())  # type: ignore[arg-type]
        return Pass(drawn(10, 9, captions=["a caption"] * 10), evaluator, ALONE, batch_size=2, state=tmp_path / "state")

    with pytest.raises(Interrupted):
        finished(run(), stop_at=stop_at)
    second = run()
    finished(second)
    found = second.evaluator.evidence
    assert (found.samples.n, found.references.n, second.evaluator.truncated) == (10, 9, 5)


OTHERS: dict[str, dict[str, Any]] = {
    "another metric": {"metrics": ["gfid"]},
    "other features": {"keep": {"spatial"}},
    "another resize": {"resize": "clean"},
    "another network": {"sha256": "1" * 64},
    "other images": {"fingerprint": "drawn anew"},
    "other captions": {"captions": ["another caption"] * 8},
    "another condition": {"texts": ["another caption"] * 8},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_is_not_gone_on_from_with_what_would_give_other_numbers(
    other: str, fake: None, saving: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(
        *, metrics: tuple[str, ...] = ("fid",), sha256: str = "0" * 64, fingerprint: str = "drawn", resize: Any = "legacy-pytorch",
        keep: Any = frozenset(), captions: Any = ("a caption",) * 8, texts: Any = ("a caption",) * 8,
    ) -> Pass:  # fmt: skip
        monkeypatch.setattr(FakeInception, "sha256", sha256)
        monkeypatch.setattr(Drawn, "fingerprint", lambda images: fingerprint)
        subject, evaluator = drawn(8, 8, captions=captions, texts=texts), Evaluator(metrics, resize=resize, keep=keep)
        return Pass(subject, evaluator, ALONE, batch_size=4, state=tmp_path / "state")

    with pytest.raises(Interrupted):
        finished(run(), stop_at=2)
    with pytest.raises(DataError, match="is the state of another evaluation"):
        run(**OTHERS[other]).resume()
    assert run().resume() == 4


@pytest.mark.parametrize("change", [{"done": "x"}, {"done": 10**6}, {"done": None}, {"done": float("inf")}])
def test_a_damaged_state_is_one_line(change: dict[str, object], fake: None, tmp_path: Path) -> None:
    state = tmp_path / "state"

    def run() -> None:
        finished(Pass(drawn(8, 8), Evaluator(["fid"]), ALONE, batch_size=8, state=state, more=True))

    run()
    header, tensors = load_safetensors(state, error=DataError)
    for damaged in (({**header, **change}, tensors), (header, {"x": torch.zeros(1)})):
        save_safetensors(state, damaged[1], damaged[0])
        with pytest.raises(DataError, match="state: is damaged; remove it to start again"):
            run()


@pytest.mark.parametrize("values", [torch.zeros(7), torch.zeros(1, 8)])
def test_a_state_of_other_rows_than_images_is_damaged(values: torch.Tensor) -> None:
    rows = Rows()
    with pytest.raises(ValueError, match="don't go together"):
        rows.load({"indices": torch.arange(8), "values": values})
    for indices in (torch.arange(8.0), torch.arange(8)[:, None]):
        with pytest.raises(ValueError, match="don't go together"):
            rows.load({"indices": indices, "values": torch.arange(8.0)})
    rows.load({"indices": torch.arange(8), "values": torch.arange(8.0)})
    assert rows.in_order().tolist() == list(range(8))


def test_what_a_job_keeps_goes_only_when_all_went_well(fake: None, saving: None, tmp_path: Path) -> None:
    report = tmp_path / "report.json"

    def run(error: Exception | None) -> int:
        with Job(report=report) as job:
            job.see([drawn(), drawn(of="b")], [Evaluator(["fid"]), Evaluator(["fid"])], batch_size=30)
            if error is not None:
                raise error
        assert [one.done for one in job.passes] == [80, 80]
        return len(job.passes)

    with pytest.raises(Interrupted):
        run(Interrupted())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".report.json.2.state-0-of-1", ".report.json.state-0-of-1"]
    assert run(None) == 2
    assert not list(tmp_path.iterdir())
