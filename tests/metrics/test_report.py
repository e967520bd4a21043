"""Reports: what is written, what is warned of, and which cards can't be compared."""

import json
import math
from pathlib import Path

import pytest

from texttok_cli.errors import DataError
from texttok_cli.metrics.report import (
    MAY_DIFFER,
    MUST_AGREE,
    Card,
    Report,
    by_samples,
    captions_sha256,
    compare,
    load_report,
    make_result,
    save_report,
    versions,
)

BASE = {
    "rule": "a rule",
    "protocol": None,
    "task": "reconstruction",
    "samples": "model-a",
    "model_sha256": "a" * 64,
    "reference": "photos",
    "reference_sha256": "c" * 64,
    "split": "val",
    "size": 128,
    "crop": "ADM",
    "uint8": "rounds",
    "resize": "tf1-bilinear",
    "network": "inception",
    "network_sha256": "b" * 64,
    "n": 188,
    "n_reference": 188,
    "text": None,
    "captions_truncated": None,
    "captions_sha256": "d" * 64,
    "labels": None,
    "seed": None,
    "sampler": None,
    "steps": None,
    "guidance": None,
    "precision": "fp32",
}


def report(value: float = 1.5, *, enough: int = 2, **changes: object) -> Report:
    card = Card.model_validate({**BASE, "versions": versions(), **changes})
    return Report(results=[make_result("rfid", value, None, card, enough=enough, why="too few")])


def test_a_report_comes_back(tmp_path: Path) -> None:
    save_report(tmp_path / "a.json", report())
    assert load_report(tmp_path / "a.json") == report()
    assert load_report(tmp_path / "a.json").results[0].card.versions.keys() == {"texttok", "python", "torch", "numpy", "pillow"}


def test_a_report_of_before_what_else_made_the_samples_was_recorded(tmp_path: Path) -> None:
    save_report(tmp_path / "a.json", report())
    written = json.loads((tmp_path / "a.json").read_text())
    for name in ("guide_sha256", "tokenizer_sha256", "unseen_captions_sha256"):
        assert written["results"][0]["card"].pop(name) is None
    (tmp_path / "a.json").write_text(json.dumps(written))
    assert load_report(tmp_path / "a.json") == report()


def test_small_sets_are_warned_of() -> None:
    assert report(enough=188).results[0].warnings == []
    assert report(enough=189).results[0].warnings == ["188 samples and 188 references: too few"]
    assert report(enough=189, n=500, n_reference=None).results[0].warnings == []


def test_a_report_of_several_models_is_taken_apart() -> None:
    parts = [report(), report(2.5, model_sha256="c" * 64), report(3.5, samples="model-b")]
    whole = Report(results=[result for part in parts for result in part.results])
    assert by_samples(whole) == parts and by_samples(parts[0]) == parts[:1] and by_samples(Report(results=[])) == []


def test_captions_are_the_same_in_any_order_and_as_often_as_they_are_there() -> None:
    assert captions_sha256(["a", "b", "a"]) == captions_sha256(["b", "a", "a"])
    assert len({captions_sha256(captions) for captions in (["a", "b"], ["a", "b", "a"], ["ab"], ["a", "B"])}) == 4


def test_numbers_are_readable() -> None:
    result = report(23.45678).results[0]
    assert result.readable() == "23.4568"
    assert result.model_copy(update={"spread": 0.5}).readable() == "23.4568 ± 0.5000"
    assert report(math.nan).results[0].readable() == "not finite"


def test_what_is_not_finite_is_no_number(tmp_path: Path) -> None:
    save_report(tmp_path / "a.json", report(math.inf))
    text = (tmp_path / "a.json").read_text()
    assert "Infinity" not in text and json.loads(text)["results"][0]["value"] is None
    assert load_report(tmp_path / "a.json").results[0].warnings == ["not finite: some images equal their originals"]


def test_reports_of_another_model_are_alike() -> None:
    compared = compare([report(), report(2.5, samples="model-b", model_sha256="c" * 64, tokens=64)])
    (row,) = compared.rows
    assert [result.value for result in row.results if result] == [1.5, 2.5]
    assert row.unlike == compared.also == {}


@pytest.mark.parametrize("field", MUST_AGREE)
def test_what_was_measured_must_agree(field: str) -> None:
    other = {"task": "generation"}.get(field, 7 if isinstance(BASE[field], int) else "other")
    compared = compare([report(), report(**{field: other})])
    assert compared.rows[0].unlike == {field: [BASE[field], other]} and compared.also == {}


@pytest.mark.parametrize("field", MAY_DIFFER)
def test_how_the_model_was_run_may_differ_but_is_said(field: str) -> None:
    """Of whoever says nothing it does not apply, or is not known."""
    compared = compare([report(**{field: value}) for value in ("one", "other", None, "one")])
    assert compared.rows[0].unlike == {} and compared.also == {field: ["one", "other", None, "one"]}
    assert compared.remark(["a", "b", "c", "d"]) == f"also different: {field}: one (a, d) | other (b)"
    assert compare([report(**{field: value}) for value in ("one", None)]).also == {}


def test_other_versions_are_said() -> None:
    other = report(versions={**versions(), "torch": "3.0"})
    assert compare([report(), other]).also == {"versions.torch": [versions()["torch"], "3.0"]}


def test_of_every_field_it_is_decided_whether_it_may_differ() -> None:
    which_model = {"samples", "model_sha256", "tokenizer_sha256", "tokens", "channels", "codes"}
    decided = [*MUST_AGREE, *MAY_DIFFER, "versions", *which_model, "protocol", "captions_truncated"]
    assert sorted(decided) == sorted(Card.model_fields)


def test_a_metric_that_one_report_lacks() -> None:
    compared = compare([report(), Report(results=[])])
    (row,) = compared.rows
    assert compared.also == {} and row.results[1] is None and row.unlike == {}


@pytest.mark.parametrize(("content", "what"), [("[]", "not a report"), ("{}", "another kind of file"), ("{", "not a report")])
def test_other_files_are_one_line(content: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=what):
        load_report(path)
    with pytest.raises(DataError, match=r"b\.json: No such file"):
        load_report(tmp_path / "b.json")
