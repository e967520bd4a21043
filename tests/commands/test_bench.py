"""`texttok bench`: what it writes, and a person's mistakes as one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from texttok_cli.bench import latency as latency_module
from texttok_cli.bench import targets as targets_module
from texttok_cli.bench.results import Row, Target
from texttok_cli.bench.task import Task
from texttok_cli.bench.timing import spread_of

Run = Callable[..., Any]
FEW = ("--device", "cpu", "--repeats", 2, "--warm-up", 0)


def test_rows_go_to_stdout_and_to_a_file_with_the_machine(texttok: Run, tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    done = texttok("bench", "latency", "--part", "load", "--batch", "1,4", *FEW, "-o", out)
    assert done.code == 0
    assert "read in order" in done.out and "training loader" in done.out and "random weights" in done.out
    saved = json.loads(out.read_text())
    assert [row["system"] for row in saved["rows"]] == ["read in order", "write", "training loader", "training loader"]
    assert [row["batch"] for row in saved["rows"]][2:] == [1, 4]
    assert all(row["seconds"]["median"] > 0 and row["seconds"]["repeats"] == 2 for row in saved["rows"])
    assert saved["machine"]["device"] == "cpu" and "torch" in saved["machine"]["versions"]


def test_json_is_one_object(texttok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(task: Task, parts: list[str]) -> Iterator[Row]:
        assert (parts, task.image_sizes, task.tokens, task.batches) == (["text", "eval"], [256, 512], [32], [8])
        yield Row(part="text", system="T5-XL", batch=8, seconds=spread_of([4.0]))

    monkeypatch.setattr(latency_module, "latency", rows)
    options = ("--part", "text", "--part", "eval", "--part", "text", "--image-size", "256,512", "--tokens", "32", "--batch", "8")
    done = texttok("bench", "latency", *options, "--json", "--quiet", "--device", "cpu")
    assert done.code == 0 and json.loads(done.out)["rows"][0]["seconds"]["median"] == 4.0
    assert done.err == ""


def test_gpus_that_nothing_runs_on_are_left_alone(texttok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "latency", lambda task, parts: iter([Row(part="text", system="T5-XL")]))
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked.append)
    done = texttok("bench", "latency", "--json", "--quiet", "--device", "cpu")
    assert done.code == 0 and not asked


def test_a_row_is_kept_when_the_next_one_fails(texttok: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(task: Task, parts: list[str]) -> Iterator[Row]:
        yield Row(part="text", system="T5-XL", seconds=spread_of([4.0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(latency_module, "latency", rows)
    out = tmp_path / "cpu.json"
    done = texttok("bench", "latency", "-o", out, "--device", "cpu")
    assert done.code != 0 and "T5-XL" in done.out
    assert [row["system"] for row in json.loads(out.read_text())["rows"]] == ["T5-XL"]
    as_json = texttok("bench", "latency", "--device", "cpu", "--json")
    assert as_json.code != 0 and json.loads(as_json.out)["rows"][0]["system"] == "T5-XL"


def test_targets_are_a_table_of_their_own(texttok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Target(name="tokenizer", reached=0.5, least=0.7), Target(name="start", reached=0.3, most=0.4, unit="s")]
    monkeypatch.setattr(targets_module, "targets", lambda task: iter(found))
    done = texttok("bench", "latency", "--targets", "--device", "cpu")
    lines = [line.split() for line in done.out.splitlines()[2:]]
    assert done.code == 0 and lines[1:] == [["tokenizer", ">=", "0.7", "0.5", "no"], ["start", "<=", "0.4", "s", "0.3", "s", "yes"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--part", "encoding"), "--part encoding: there are text, encode"),
        (("--tokens", "32,x"), "--tokens 32,x: not whole numbers"),
        (("--tokens", "0"), "--tokens 0: must be at least 1"),
        (("--image-size", "128"), "--image-size 128: must be 256 or 512"),
        (("--cfg", "x"), "'x' is not a number"),
        (("--sampler", "euler"), "sampler 'euler' is none of those of a ddpm model: ddpm"),
        (("--steps", "5000"), "at most 1000 steps"),
        (("--tokens", "48"), "tokenizer/texttok-48-256: no such recipe"),
        (("--targets", "--part", "text", "--image-size", "256"), "leave out --part, --image-size"),
        (("--targets", "--sampler", "euler"), "sampler 'euler' is none"),
    ],
)
def test_a_mistake_is_one_line(options: tuple[str, ...], message: str, texttok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And said before anything is timed."""
    monkeypatch.setattr(latency_module, "latency", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(targets_module, "targets", lambda *_: pytest.fail("timed"))
    done = texttok("bench", "latency", *options, "--device", "cpu", "--quiet")
    assert done.code in (1, 2) and message in done.err and done.err.count("\n") == 1


def test_report_merges_and_says_what_it_left_out(texttok: Run, tmp_path: Path) -> None:
    texttok("bench", "latency", "--part", "load", "--batch", "1", *FEW, "-o", tmp_path / "in" / "cpu.json")
    (tmp_path / "in" / "other.json").write_text("{}")
    done = texttok("bench", "report", tmp_path / "in", "-o", tmp_path / "out", "--json")
    assert done.code == 0 and json.loads(done.out)["results"] == 1
    assert "left out, of another kind: other.json" in done.err
    assert "read in order" in (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "in" / "broken.json").write_text("{")
    done = texttok("bench", "report", tmp_path / "in", "-o", tmp_path / "again", "--quiet", "--json")
    assert done.code == 1 and json.loads(done.out)["results"] == 1 and (tmp_path / "again" / "report.html").exists()
    assert done.err == f"left out: {tmp_path / 'in' / 'broken.json'}: not a result (no JSON object)\n"
    assert texttok("bench", "report", tmp_path / "nothing", "-o", tmp_path / "out").err.startswith("texttok: ")


def test_tradeoff_needs_references(texttok: Run, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("{name: a, series: [{name: A, generator: g, steps: 1, sampler: ddim, cfg: 1}]}")
    done = texttok("bench", "tradeoff", spec, "-o", tmp_path / "out")
    assert done.code == 2 and "names no references" in done.err and done.err.count("\n") == 1
