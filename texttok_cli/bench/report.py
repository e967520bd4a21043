"""Many results as one page: Markdown tables, plots, and an HTML file that holds all of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from urllib.parse import quote

from texttok_cli.bench import html, paper
from texttok_cli.bench.machine import Machine
from texttok_cli.bench.plots import plot_rfid, plot_tradeoff
from texttok_cli.bench.results import KEY, LatencyResult, Row, Target, TradeoffResult, parse_result
from texttok_cli.bench.tradeoff import summarize, text_gain
from texttok_cli.errors import DataError
from texttok_cli.files import read_json_object, write_text
from texttok_cli.metrics.report import MUST_AGREE, Report, Result, load_report

Curves = dict[str, dict[int, list[float]]]  # rFIDs by number of tokens, for each kind of model
MISSING = "-"
MAX_DIGITS = 20  # of a model's number of tokens and size: Python reads none of over 4300, and nothing draws them
SPECIAL = re.compile(r"[\\`|\[\]]|<(?=[a-zA-Z/!?])")  # begins a code, a cell, a link or an element of HTML in Markdown
HOW = ("text", "precision")  # how a model was run, of which there may be several evaluations


@dataclass
class Table:
    """A heading, a remark, columns and rows; and a picture that goes with it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    remark: str = ""
    picture: Path | None = None


@dataclass
class Found:
    """What a set of result files holds."""

    latency: dict[str, LatencyResult] = field(default_factory=dict)  # by the file's stem
    tradeoff: dict[str, TradeoffResult] = field(default_factory=dict)
    evaluations: dict[str, Report] = field(default_factory=dict)
    unknown: list[Path] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)  # a line for each

    def __len__(self) -> int:
        return len(self.latency) + len(self.tradeoff) + len(self.evaluations)


def find_results(inputs: Sequence[Path]) -> Found:
    """Of files, and of all .json within folders. DataError for a named file that is damaged, and for a path that is not there."""
    found = Found()
    for path in sorted({file for given in inputs for file in _files(given)}):
        if path not in inputs and _is_list(path):
            found.unknown.append(path)
            continue
        try:
            _add(found, path)
        except DataError as err:
            if path in inputs:
                raise
            found.damaged.append(str(err))
    return found


def _add(found: Found, path: Path) -> None:
    value = read_json_object(path, kind="result", error=DataError)
    if KEY in value:
        result = parse_result(path, value)
        kind: dict[str, LatencyResult] | dict[str, TradeoffResult] = found.latency if result.kind == "latency" else found.tradeoff
        kind[_free_name(path, kind)] = result  # type: ignore[assignment]
    elif "texttok_report" in value:
        found.evaluations[_free_name(path, found.evaluations)] = load_report(path)
    else:
        found.unknown.append(path)


def _is_list(path: Path) -> bool:
    """Whether a file is JSON and no object: of another kind, where a damaged file may be a result."""
    try:
        return not isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError, OSError):
        return False


def _free_name(path: Path, taken: Container[str]) -> str:
    """The file's stem; where another file has it, with the folder's name before it, and a number if that is taken too.

    Plots are called so: without leading dots, as `.` would be the folder itself.
    """
    stem = path.stem.lstrip(".") or "result"
    names = chain([stem, f"{path.parent.name}-{stem}"], (f"{path.parent.name}-{stem}-{i}" for i in count(2)))
    return next(name for name in names if name not in taken)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = (file for file in path.rglob("*.json") if "points" not in file.relative_to(path).parts)
        return [file for file in found if file.is_file()]  # a pipe or a device would be read for ever
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder of results")
    return [path]


def write_report(found: Found, out: Path) -> list[Path]:
    """Write report.md, report.html and the plots into the folder; returns the files. DataError if there is nothing to report."""
    tables = [*_latency_tables(found), *_tradeoff_tables(found, out), *_evaluation_tables(found, out)]
    if not tables:
        raise DataError("no results to report: give JSON files of `texttok bench latency`, `texttok bench tradeoff` or `texttok eval -o`")
    pages = {"report.md": markdown(tables), "report.html": page(tables)}
    for name, text in pages.items():
        write_text(out / name, text)
    pictures = [table.picture.with_suffix(suffix) for table in tables if table.picture for suffix in (".png", ".svg")]
    return [*(out / name for name in pages), *pictures]


# ------------------------------------------------------------------ tables


def latency_table(title: str, result: LatencyResult) -> Table:
    """Every row of one run."""
    columns = ["part", "system", "px", "tokens", "batch", "steps", "s/image", "quartiles of a batch, s", "note"]
    return Table(
        title, columns, [_latency_cells(row) for row in result.rows], f"{_machine(result.machine)}; {result.precision}; {result.weights}"
    )


def target_table(title: str, result: LatencyResult) -> Table:
    """Ratios against their targets, of one run."""
    return Table(title, ["ratio", "target", "reached", "met", "note"], [_target_cells(t) for t in result.targets], _machine(result.machine))


def _latency_tables(found: Found) -> list[Table]:
    tables = []
    for name, result in found.latency.items():
        if result.rows:
            tables.append(latency_table(f"Latency: {name}", result))
        if result.targets:
            tables.append(target_table(f"Targets: {name}", result))
    return tables


def _latency_cells(row: Row) -> list[str]:
    shown = [row.image_size, row.tokens, row.batch, row.steps]
    start = [row.part, row.system, *(MISSING if value is None else str(value) for value in shown)]
    if row.seconds is None or row.seconds_per_image is None:
        return [*start, MISSING, MISSING, f"not measured: {row.skipped}"]
    note = row.note + (f"; run time x {row.times:.3g}" if row.times > 1 else "")
    return [*start, f"{row.seconds_per_image:.4g}", f"{row.seconds.low:.4g} to {row.seconds.high:.4g} ({row.seconds.repeats})", note]


def _target_cells(target: Target) -> list[str]:
    bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", target.least), ("<=", target.most)) if bound is not None]
    reached = MISSING if target.reached is None else f"{target.reached:.4g}"
    met = {None: MISSING, True: "yes", False: "no"}[target.met]
    unit = f" {target.unit}" if target.unit else ""
    return [target.name, (" and ".join(bounds) or MISSING) + unit, reached + unit, met, target.note]


def tradeoff_tables(result: TradeoffResult) -> list[Table]:
    """The points of one sweep, and what follows from them beside what the paper says."""
    rows = [
        [
            p.series,
            str(result.tokens[p.series]),
            str(p.steps),
            p.sampler,
            p.cfg,
            f"{p.seconds_per_image:.4g}",
            f"{p.fid:.2f}",
            f"{p.images:,}",
        ]
        for p in result.points
    ]
    remark = f"{_machine(result.machine)}; FID: {', '.join(f'{k} {v}' for k, v in result.protocol.items() if v is not None)}"
    columns = ["series", "tokens", "steps", "sampler", "cfg", "s/image", "FID", "samples"]
    tables = [Table(f"Speed and quality: {result.name}", columns, rows, remark)]
    summary, gain = summarize(result), text_gain(result)
    claims = {claim["id"]: f"{claim['says']} {claim['unit']}" for claim in paper.paper()["claims"]}
    follows = []
    if summary is not None:
        for name, comparison, unit, theirs in (
            ("times faster at no worse FID", summary.speedup, "x", "iso-fid-speedup"),
            ("lower FID at no more time", summary.gain, "%", "iso-time-gain"),
        ):
            ours = "no setting reaches it" if comparison is None else f"{comparison.value:.3g} {unit} ({comparison.chosen.name})"
            follows.append([name, ours, f"{claims[f'{theirs}-256']} (256 px), {claims[f'{theirs}-512']} (512 px)"])
    if gain is not None:
        theirs = f"{claims['gfid-256-mean']} (256 px), {claims['gfid-512-mean']} (512 px)"
        of = "best of all settings, guided ones too" if gain.guided else "no guidance"
        follows.append([f"mean gain in FID from text, {of}", f"{gain.value:.1f} %", MISSING if gain.guided else theirs])
    if follows:
        against = f"against {result.reference}" if result.reference else "of the pairs with and without text"
        tables.append(Table(f"{result.name}: {against}", ["", "measured", "the paper's"], follows))
    return tables


def _tradeoff_tables(found: Found, out: Path) -> list[Table]:
    tables = []
    for name, result in found.tradeoff.items():
        made = tradeoff_tables(result)
        made[0].picture = plot_tradeoff(result, out / name)[0]
        tables += made
    return tables


def _evaluation_tables(found: Found, out: Path) -> list[Table]:
    if not found.evaluations:
        return []
    rows = []
    for name, report in found.evaluations.items():
        for result in report.results:
            value = MISSING if result.value is None else f"{result.value:.4g}"
            card = result.card
            how = [getattr(card, field) or MISSING for field in HOW]
            measured = [result.metric, value, f"{card.n:,}", card.reference or MISSING, "; ".join(result.warnings)]
            rows.append([name, card.samples, *how, *measured])
    table = Table("Evaluations", ["report", "samples", *HOW, "metric", "value", "n", "references", "warnings"], rows)
    return [table, *_rfid_tables([result for report in found.evaluations.values() for result in report.results], out)]


def _rfid_tables(results: Sequence[Result], out: Path) -> list[Table]:
    """Numbers that may be compared, each set of them as a table and a plot of its own."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        if result.metric == "rfid":
            groups.setdefault(tuple(getattr(result.card, name) for name in MUST_AGREE), []).append(result)
    curves = {protocol: rfid_by_tokens(group) for protocol, group in groups.items()}
    drawn = [protocol for protocol in groups if curves[protocol]]
    tables = []
    for number, protocol in enumerate(drawn, 1):
        card = groups[protocol][0].card
        unlike = [name for name, values in zip(MUST_AGREE, zip(*drawn, strict=True), strict=True) if len(set(values)) > 1]
        said = ", ".join(f"{name} {getattr(card, name)}" for name in unlike)
        name, caption = "rfid" if number == 1 else f"rfid-{number}", f"{card.n:,} images of {card.reference}, {card.size} px"
        [picture, *_] = plot_rfid(curves[protocol], out / name, caption=caption, image_size=card.size)
        remark = f"apart from the other plots of rFID, as they differ in {said}" if said else ""
        tables.append(_curve_table(f"rFID by number of tokens: {caption}", curves[protocol], remark, picture))
    return tables


def _curve_table(title: str, curves: Curves, remark: str, picture: Path) -> Table:
    tokens = sorted({n for curve in curves.values() for n in curve})
    rows = [[name, *(", ".join(f"{value:.4g}" for value in curve.get(n, [])) or MISSING for n in tokens)] for name, curve in curves.items()]
    return Table(title, ["models", *map(str, tokens)], rows, remark, picture)


def rfid_by_tokens(results: Sequence[Result]) -> Curves:
    """Of models called KIND-TOKENS-SIZE, as the recipes are: rFIDs by number of tokens for each KIND-SIZE.

    Several models of one name, as of two runs, are several values. Where models of one kind were run in several ways, say with captions
    and without, each way has a curve of its own.
    """
    kinds: dict[str, dict[tuple[str | None, ...], dict[int, list[float]]]] = {}
    measured = ((r.card, tuple(getattr(r.card, field) for field in HOW), r.value) for r in results)
    once = dict.fromkeys((card.samples, card.model_sha256, how, value) for card, how, value in measured)  # a number may be in two reports
    for name, _, how, value in once:
        kind, _, rest = name.partition("-")
        tokens, _, size = rest.partition("-")
        if tokens.isdecimal() and size.isdecimal() and len(rest) < MAX_DIGITS and value is not None:
            kinds.setdefault(f"{kind}, {size} px", {}).setdefault(how, {}).setdefault(int(tokens), []).append(value)
    curves: Curves = {}
    for kind, ways in kinds.items():
        unlike = [len(set(values)) > 1 for values in zip(*ways, strict=True)]
        for how, curve in ways.items():
            said = [value or MISSING for value, differs in zip(how, unlike, strict=True) if differs]
            curves[", ".join([kind, *said])] = curve
    return curves


def _machine(machine: Machine) -> str:
    shared = f", shared with other work (load {machine.load})" if machine.shared else ""
    clock = ", processor time" if machine.clock == "cpu" else ""
    return f"{machine.name}, {machine.threads} thread(s), torch {machine.versions.get('torch', MISSING)}, {machine.date}{shared}{clock}"


# ------------------------------------------------------------------ pages


def markdown(tables: Sequence[Table]) -> str:
    """All tables as GitHub's Markdown; pictures by their names."""
    parts = ["# Results"]
    for table in tables:
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        text = "\n".join("| " + " | ".join(map(_literal, line)) + " |" for line in lines)
        title = _literal(table.title)
        picture = f"![{title}]({quote(os.fsencode(table.picture.name))})" if table.picture else ""
        parts += [part for part in (f"## {title}", _literal(table.remark), picture, text) if part]
    return "\n\n".join(parts) + "\n"


def _literal(text: str) -> str:
    """One line that Markdown shows as it is: names of files, models and machines may hold anything."""
    return SPECIAL.sub(r"\\\g<0>", " ".join(text.splitlines()))


def page(tables: Sequence[Table]) -> str:
    """One HTML file that asks for no other: the style and the pictures are in it."""
    return html.page("texttok: results", *(part for table in tables for part in _section(table)))


def _section(table: Table) -> Iterator[html.Html]:
    yield html.heading(table.title)
    if table.remark:
        yield html.paragraph(table.remark)
    if table.picture:
        yield html.figure(html.picture(table.picture.read_bytes(), table.title))
    yield html.table(table.columns, table.rows)
