"""Results merged into Markdown, HTML and plots."""

import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from texttok_cli.bench import report as report_module
from texttok_cli.bench.plots import plot_rfid
from texttok_cli.bench.report import Table, find_results, markdown, page, rfid_by_tokens, target_table, tradeoff_tables, write_report
from texttok_cli.bench.results import LatencyResult, Target, TradeoffResult, save_result
from texttok_cli.errors import DataError
from texttok_cli.metrics.report import Card, Report, Result, save_report

Make = Callable[..., TradeoffResult]


@pytest.fixture
def sweep(tradeoff_result: Make) -> TradeoffResult:
    return tradeoff_result(("B", 50, 8.0, 6.0), ("A", 50, 0.5, 5.0), ("A", 100, 1.0, 4.5), tokens={"B": 256, "A": 32})


def test_everything_is_merged_into_one_page(latency_result: LatencyResult, sweep: TradeoffResult, tmp_path: Path) -> None:
    save_result(tmp_path / "in" / "cpu.json", latency_result)
    save_result(tmp_path / "in" / "deep" / "sweep.json", sweep)
    (tmp_path / "in" / "loader.json").write_text('{"images": 3}')
    (tmp_path / "in" / "points").mkdir()
    (tmp_path / "in" / "points" / "0123.json").write_text("{}")  # a sweep's own points are in its result
    found = find_results([tmp_path / "in"])
    assert (list(found.latency), list(found.tradeoff)) == (["cpu"], ["sweep"])
    assert [path.name for path in found.unknown] == ["loader.json"]
    files = write_report(found, tmp_path / "out")
    assert (
        {path.name for path in files}
        == {"report.md", "report.html", "sweep.png", "sweep.svg"}
        == {p.name for p in (tmp_path / "out").iterdir()}
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| encode | TexTok-32 | 256 | 32 | 4 | - | 1 | 3 to 5 (3) | a \\| b; run time x 8 |" in text
    assert "not measured: needs about 9.6 GB" in text and "![Speed and quality: small](sweep.png)" in text
    assert "| A | 32 | 100 | ddim | 1.5 | 1 | 4.50 | 8 |" in text
    html = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64," in html and "&lt;bf16&gt;" in html and "<bf16>" not in html
    assert "http://" not in html and "https://" not in html and "<script" not in html
    with Image.open(tmp_path / "out" / "sweep.png") as picture:
        assert picture.width > 1000 and len(picture.convert("L").getcolors() or []) > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": []}, "sweep.json: header: no points"),
        ({"tokens": {"A": 32}}, "tokens does not have the series 'B'"),
        (
            {"points": [{"series": "A", "steps": 1, "sampler": "x", "cfg": "1", "seconds_per_image": 1, "fid": float("nan"), "images": 2}]},
            "finite",
        ),
    ],
)
def test_a_sweep_that_can_not_be_drawn_is_one_line(change: dict[str, Any], message: str, sweep: TradeoffResult, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(sweep.model_dump(mode="json") | change))
    with pytest.raises(DataError, match=message):
        find_results([path])


def test_names_that_are_no_unicode_and_missing_versions_are_written(latency_result: LatencyResult, tmp_path: Path) -> None:
    machine = latency_result.machine.model_copy(update={"name": "caf\udce9", "versions": {}})
    save_result(tmp_path / "a.json", latency_result.model_copy(update={"machine": machine}))
    write_report(find_results([tmp_path / "a.json"]), tmp_path / "out")
    assert r"caf\udce9" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no file has such a name")
def test_a_plot_of_a_name_that_is_no_unicode_is_shown(sweep: TradeoffResult, tmp_path: Path) -> None:
    path, out = tmp_path / "caf\udce9 1.json", tmp_path / "out"
    save_result(path, sweep)
    write_report(find_results([path]), out)
    assert "](caf%E9%201.png)" in (out / "report.md").read_text() and (out / "caf\udce9 1.png").is_file()


def test_names_in_other_people_s_results_are_text_and_nothing_else(sweep: TradeoffResult, tmp_path: Path) -> None:
    """No element, link or picture in the Markdown, no mathematics in the plots, and no file outside of the folder."""
    name = "$\\frac{$\n\n<img src=//evil/1.png> [here](//evil) `a` \\| 3 <= 4"
    tokens = {f"$\\x$ {series}": number for series, number in sweep.tokens.items()}
    points = [point.model_copy(update={"series": f"$\\x$ {point.series}"}) for point in sweep.points]
    hostile = sweep.model_copy(update={"name": name, "tokens": tokens, "points": points, "reference": None})
    save_result(tmp_path / "in" / "..json", hostile)
    write_report(find_results([tmp_path / "in"]), tmp_path / "out" / "deep")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json") == [
        *("report.html", "report.md", "result.png", "result.svg")
    ]
    text = (tmp_path / "out" / "deep" / "report.md").read_text()
    shown = r"$\\frac{$  \<img src=//evil/1.png> \[here\](//evil) \`a\` \\\| 3 <= 4"
    assert f"## Speed and quality: {shown}\n" in text and r"| $\\x$ A | 32 |" in text
    assert re.findall(r"(?<!\\)\]\((.*?)\)", text) == ["result.png"]


@pytest.mark.skipif(os.name == "nt", reason="has no pipes")
def test_a_pipe_in_a_folder_of_results_is_not_waited_for(latency_result: LatencyResult, tmp_path: Path) -> None:
    save_result(tmp_path / "a.json", latency_result)
    os.mkfifo(tmp_path / "b.json")
    assert len(find_results([tmp_path])) == 1


def test_the_paper_stands_beside_ours_in_a_column_of_its_own(sweep: TradeoffResult) -> None:
    points, follows = tradeoff_tables(sweep)
    assert points.columns[-2:] == ["FID", "samples"]
    assert follows.columns == ["", "measured", "the paper's"]
    [speedup, gain] = follows.rows
    assert speedup[1].startswith("16 x (A, 50 steps") and speedup[2] == "14.3 x (256 px), 93.5 x (512 px)"
    assert gain[1].startswith("25 % (A, 100 steps") and gain[2] == "34.0 % (256 px), 46.7 % (512 px)"


@pytest.mark.parametrize(
    ("cfg", "said", "theirs"), [("1", "no guidance", "16.3 % (256 px), 34.3 % (512 px)"), ("2", "guided ones too", "-")]
)
def test_the_paper_s_gain_from_text_stands_beside_an_unguided_one_alone(cfg: str, said: str, theirs: str, tradeoff_result: Make) -> None:
    tokens = {"Baseline-32": 32, "TexTok-32": 32}
    result = tradeoff_result(("Baseline-32", 5, 1.0, 4.0), ("TexTok-32", 5, 1.0, 3.0), tokens=tokens, cfg=cfg, reference=None)
    [[name, ours, beside]] = tradeoff_tables(result)[1].rows
    assert name.startswith("mean gain in FID from text") and name.endswith(said) and (ours, beside) == ("25.0 %", theirs)


def test_a_point_s_cells_and_the_mean_gain_from_text_are_its_own(tradeoff_result: Make) -> None:
    points = [("Baseline-32", 50, 0.5, 10.0), ("TexTok-32", 50, 0.25, 9.0), ("Baseline-64", 50, 1.0, 8.0), ("TexTok-64", 50, 2.0, 6.0)]
    tokens = {"Baseline-32": 32, "TexTok-32": 32, "Baseline-64": 64, "TexTok-64": 64}
    sweep = tradeoff_result(*points, tokens=tokens, reference=None)
    table, follows = tradeoff_tables(sweep)
    assert table.rows[1] == ["TexTok-32", "32", "50", "ddim", "1.5", "0.25", "9.00", "8"]
    assert table.rows[2] == ["Baseline-64", "64", "50", "ddim", "1.5", "1", "8.00", "8"]
    assert [row[1] for row in follows.rows] == ["17.5 %"]


@pytest.mark.parametrize(
    ("changes", "said"), [({}, ""), ({"shared": True}, ", shared with other work (load 0.1)"), ({"clock": "cpu"}, ", processor time")]
)
def test_a_machine_s_load_and_clock_are_said_where_they_are_unusual(
    changes: dict[str, Any], said: str, latency_result: LatencyResult
) -> None:
    machine = latency_result.machine.model_copy(update=changes)
    table = target_table("t", latency_result.model_copy(update={"machine": machine}))
    assert table.remark == f"a processor, 1 thread(s), torch 2.14, 2026-11-24{said}"


def test_an_evaluation_s_row_says_its_number_images_references_and_warnings(drawn: list[Any], tmp_path: Path) -> None:
    one, other = rfid("mine", 12.3456, n=5000), rfid("texttok-32-256", 9.0, text="caption: first caption", precision="bf16")
    later = rfid("texttok-32-256", 8.123456, model_sha256="another", text="caption: first caption", precision="bf16")
    one.warnings.append("few images")
    save_report(tmp_path / "in" / "a.json", Report(results=[one, other, later]))
    (tmp_path / "out").mkdir()
    write_report(find_results([tmp_path / "in"]), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| report | samples | text | precision | metric | value | n | references | warnings |" in text
    assert "| a | mine | - | - | rfid | 12.35 | 5,000 | val | few images |" in text
    assert "| a | texttok-32-256 | caption: first caption | bf16 | rfid | 9 | 8 | val |  |" in text
    assert "| texttok, 256 px | 9, 8.123 |" in text


def test_a_reference_that_nobody_reaches_is_said(tradeoff_result: Make) -> None:
    _, follows = tradeoff_tables(tradeoff_result(("B", 50, 0.1, 1.0), ("A", 50, 0.5, 5.0), tokens={"B": 256, "A": 32}))
    assert [row[1] for row in follows.rows] == ["no setting reaches it"] * 2


@pytest.mark.parametrize(
    ("target", "cells"),
    [
        (Target(name="a", reached=0.69, least=0.7), [">= 0.7", "0.69", "no"]),
        (Target(name="a", reached=0.3, most=0.4, unit="s"), ["<= 0.4 s", "0.3 s", "yes"]),
        (Target(name="a", reached=123.456, unit="GFLOP/s"), ["- GFLOP/s", "123.5 GFLOP/s", "-"]),
        (Target(name="a", reached=None, most=1, note="why"), ["<= 1", "-", "-"]),
    ],
)
def test_a_target_is_met_or_not(target: Target, cells: list[str], latency_result: LatencyResult) -> None:
    table = target_table("t", latency_result.model_copy(update={"targets": [target]}))
    assert table.rows[0][1:4] == cells


def rfid(samples: str, value: float, **card: Any) -> Result:
    """An rFID with a card that says no more than it must."""
    said: dict[str, Any] = dict.fromkeys(Card.model_fields)
    said |= {"rule": "rfid", "task": "reconstruction", "samples": samples, "size": 256, "uint8": "rounded", "n": 8, "versions": {}}
    said |= {"model_sha256": samples, "reference": "val", "resize": "tf1-bilinear"}
    return Result(metric="rfid", value=value, card=Card.model_validate(said | card))


def test_models_named_as_the_recipes_are_make_a_curve() -> None:
    values = {"texttok-32-128": 9.0, "texttok-64-128": 7.0, "baseline-32-128": 10.0, "mine": 1.0, "texttok-²-128": 2.0}
    values["texttok-" + "9" * 5000 + "-128"] = 3.0
    found = rfid_by_tokens([rfid(name, value) for name, value in values.items()])
    assert found == {"texttok, 128 px": {32: [9.0], 64: [7.0]}, "baseline, 128 px": {32: [10.0]}}


def test_a_second_model_of_the_same_name_does_not_replace_the_first() -> None:
    first, second = rfid("texttok-32-256", 9.0), rfid("texttok-32-256", 8.0, model_sha256="another")
    assert rfid_by_tokens([first, second, first]) == {"texttok, 256 px": {32: [9.0, 8.0]}}


def test_models_run_in_several_ways_have_a_curve_for_each() -> None:
    """A kind that was run in one way alone needs no name for it."""
    ways = [("caption: first caption", "fp32"), ("none (--no-caption)", "fp32"), ("caption: first caption", "bf16")]
    results = [
        rfid(f"texttok-{tokens}-128", value + tokens, text=text, precision=precision)
        for tokens in (32, 64)
        for value, (text, precision) in enumerate(ways)
    ]
    assert rfid_by_tokens([*results[:2], *results[3:5], rfid("baseline-32-128", 10.0, precision="fp32")]) == {
        "texttok, 128 px, caption: first caption": {32: [32.0], 64: [64.0]},
        "texttok, 128 px, none (--no-caption)": {32: [33.0], 64: [65.0]},
        "baseline, 128 px": {32: [10.0]},
    }
    assert list(rfid_by_tokens([results[0], results[2]])) == ["texttok, 128 px, fp32", "texttok, 128 px, bf16"]
    assert list(rfid_by_tokens(results))[2] == "texttok, 128 px, caption: first caption, bf16"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], int]]:
    """(file, curves, image size) of each plot of rFID, which is not drawn."""
    calls: list[tuple[str, dict[str, Any], int]] = []

    def plot(curves: dict[str, Any], path: Path, *, caption: str, image_size: int) -> list[Path]:
        calls.append((path.name, curves, image_size))
        path.with_suffix(".png").write_bytes(b"PNG")
        return [path.with_suffix(".png")]

    monkeypatch.setattr(report_module, "plot_rfid", plot)
    return calls


def test_numbers_of_unlike_protocols_are_in_plots_of_their_own(drawn: list[Any], tmp_path: Path) -> None:
    results = {
        "a": rfid("texttok-32-256", 9.0),
        "b": rfid("texttok-64-256", 7.0),
        "c": rfid("texttok-128-256", 5.0, resize="clean"),
        "d": rfid("texttok-32-512", 6.0, size=512),
    }
    for name, result in results.items():
        save_report(tmp_path / "in" / f"{name}.json", Report(results=[result]))
    (tmp_path / "out").mkdir()
    write_report(find_results([tmp_path / "in"]), tmp_path / "out")
    assert drawn == [
        ("rfid", {"texttok, 256 px": {32: [9.0], 64: [7.0]}}, 256),
        ("rfid-2", {"texttok, 256 px": {128: [5.0]}}, 256),
        ("rfid-3", {"texttok, 512 px": {32: [6.0]}}, 512),
    ]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "as they differ in size 256, resize clean" in text and "| texttok, 256 px | 9 | 7 |" in text


@pytest.mark.parametrize(("size", "beside"), [(512, 512), (256, 256), (128, 256)])
def test_the_paper_s_table_is_that_of_the_models_size(size: int, beside: int, tmp_path: Path) -> None:
    curves = {f"texttok, {size} px": {32: [9.0, 8.0], 64: [7.0]}}
    [_, svg] = plot_rfid(curves, tmp_path / "rfid", caption="8 images", image_size=size)
    assert f"Table 1, ImageNet {beside} x {beside}" in svg.read_text()  # matplotlib names each text in a comment


def test_a_sweep_is_drawn_again_with_the_same_panel(tradeoff_result: Make, tmp_path: Path) -> None:
    save_result(tmp_path / "sweep.json", tradeoff_result(("A", 50, 0.5, 5.0), tokens={"A": 32}, paper_size=512))
    write_report(find_results([tmp_path / "sweep.json"]), tmp_path / "out")
    assert "ImageNet 512 x 512" in (tmp_path / "out" / "sweep.svg").read_text()


def test_what_is_damaged_is_one_line_and_within_a_folder_leaves_the_rest(latency_result: LatencyResult, tmp_path: Path) -> None:
    whole = latency_result.model_dump(mode="json")
    lines = {
        json.dumps(whole | {"rows": [{"system": "A"}]}): "header.rows.0.part: Field required",
        json.dumps(whole | {"texttok_bench": 2}): "texttok_bench is 2, this texttok reads 1; update texttok",
        json.dumps({"texttok_report": 1}): "header.results: Field required",
        "{": "not a result (no JSON object)",
    }
    save_result(tmp_path / "cpu.json", latency_result)
    for i, text in enumerate(lines):
        (tmp_path / f"{i}.json").write_text(text)
    found = find_results([tmp_path])
    assert (list(found.latency), found.unknown) == (["cpu"], [])
    assert found.damaged == [f"{tmp_path / f'{i}.json'}: {line}" for i, line in enumerate(lines.values())]
    for i, line in enumerate(lines.values()):
        with pytest.raises(DataError, match=re.escape(line)):
            find_results([tmp_path, tmp_path / f"{i}.json"])


def test_nothing_to_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_results([tmp_path / "none"])
    with pytest.raises(DataError, match="no results"):
        write_report(find_results([tmp_path]), tmp_path)


def test_a_list_is_left_out_of_a_folder_and_refused_by_name(latency_result: LatencyResult, tmp_path: Path) -> None:
    save_result(tmp_path / "cpu.json", latency_result)
    (tmp_path / "list.json").write_text("[1]")
    found = find_results([tmp_path])
    assert (list(found.latency), [path.name for path in found.unknown]) == (["cpu"], ["list.json"])
    with pytest.raises(DataError, match="no JSON object"):
        find_results([tmp_path, tmp_path / "list.json"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(value: float, latency_result: LatencyResult, tmp_path: Path) -> None:
    result = latency_result.model_dump(mode="json")
    result["targets"][0]["reached"] = value
    (tmp_path / "a.json").write_text(json.dumps(result))
    with pytest.raises(DataError, match=r"header\.targets\.0\.reached: Input should be a finite number"):
        find_results([tmp_path / "a.json"])


def test_pages_of_nothing_but_text_need_no_picture(latency_result: LatencyResult) -> None:
    tables = [target_table("t", latency_result)]
    assert r"| share | >= 0.7 | 0.8 | yes | \<bf16> |" in markdown(tables)
    assert "| a b \\| c |" in markdown([Table("t", ["n"], [["a\nb | c"]])])
    assert "<img" not in page(tables)
