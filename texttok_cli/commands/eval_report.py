"""The report of `texttok eval`: printed, written as a page, and compared with others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from texttok_cli.errors import DataError, UsageError
from texttok_cli.metrics.protocols import DECLARED

if TYPE_CHECKING:
    from texttok_cli.bench.eval_page import Example
    from texttok_cli.metrics.passes import Pass
    from texttok_cli.metrics.report import MetricComparison, Report
    from texttok_cli.metrics.subject import Subject


def finish(
    report: Report,
    passes: Sequence[Pass],
    *,
    out: Path | None,
    save_stats: Path | None,
    html: Path | None,
    gallery: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Print the report, and write the files that were asked for."""
    from texttok_cli.console import emit
    from texttok_cli.metrics.report import by_samples, save_report

    print_report(report, [one.subject for one in passes], quiet=quiet, as_json=as_json)  # first: no number is lost with a file
    if out is not None:
        save_report(out, report)
    if save_stats is not None:
        _save_statistics(save_stats, passes[0])
    if html is not None:
        from texttok_cli.bench.eval_gallery import pick_examples

        reports = by_samples(report)
        write_page(html, list(map(_name, reports)), reports, pick_examples(passes, each=gallery))
    written = {name: str(path) for name, path in (("out", out), ("html", html)) if path is not None}
    if written and not as_json:  # JSON on stdout is the report alone
        emit(written, as_json=False)


def print_report(report: Report, subjects: Sequence[Subject], *, quiet: bool, as_json: bool) -> None:
    """Say its warnings, and print it: a line a number, or a table of several models."""
    from texttok_cli.console import emit, say
    from texttok_cli.metrics.report import by_samples, compare

    several = len(subjects) > 1
    for result in [] if quiet else report.results:
        of = f"{result.card.samples}: " if several else ""
        for warning in result.warnings:
            say(f"{of}{result.metric}: {warning}")
    if as_json:
        emit(report.model_dump(mode="json"), as_json=True)
        return
    first, summary = subjects[0], dict[str, Any]()
    if several:
        print_table([subject.card["samples"] for subject in subjects], compare(by_samples(report)).rows)
    else:
        summary = {result.metric: result.readable() for result in report.results} | {"of": first.card["samples"]}
    summary |= {"against": first.card["reference"] or "no references", "images": len(first.measured.ids)}
    emit(summary, as_json=False)


def _save_statistics(path: Path, seen: Pass) -> None:
    from texttok_cli.metrics.sources import write_statistics

    samples = seen.evaluator.evidence.samples
    write_statistics(path, {"pool": samples.gaussian("pool"), "spatial": samples.gaussian("spatial")})


def compare_reports(paths: Sequence[Path], html: Path | None, *, as_json: bool) -> None:
    """A table on stdout; on stderr what differs. Exit code 1 if numbers are of unlike protocols, and so don't say which is better."""
    from texttok_cli.console import emit, say
    from texttok_cli.metrics.report import by_samples, compare, load_report

    parts = [(path, by_samples(load_report(path))) for path in paths]
    empty = next((path for path, found in parts if not found), None)
    if empty is not None:
        raise DataError(f"{empty}: holds no numbers; leave it out")
    reports = [part for _, found in parts for part in found]
    if len(reports) < 2:
        raise UsageError(f"--compare {paths[0]}: only one report; name at least two")
    unique = len({path.stem for path in paths}) == len(paths)
    labels = [path.stem if unique else str(path) for path in paths]
    names = [
        label if len(found) == 1 else f"{label}: {_name(part)}" for label, (_, found) in zip(labels, parts, strict=True) for part in found
    ]
    compared = compare(reports)
    rows = compared.rows
    if html is not None:
        write_page(html, names, reports, [])
    if as_json:
        emit({"reports": names, "rows": [_row_json(row) for row in rows], "also_different": compared.also}, as_json=True)
    else:
        print_table(names, rows)
    for row in rows:
        for name, values in row.unlike.items():
            say(f"{row.metric}: different {name}: {' | '.join(map(str, values))}")
    if compared.also:
        say(compared.remark(names))
    unlabelled = [row.metric for row in rows if _labels_unknown(row)]
    if unlabelled:
        say(f"{', '.join(unlabelled)}: how labels were drawn is not known for any of these samples, so it may differ")
    if any(row.unlike for row in rows):
        raise typer.Exit(1)


def print_table(names: Sequence[str], rows: Sequence[MetricComparison]) -> None:
    """A row for each metric, a column for each report."""
    from texttok_cli.console import print_columns

    print_columns([["", *names], *([row.title, *row.cells] for row in rows)])


def write_page(path: Path, names: Sequence[str], reports: Sequence[Report], examples: Sequence[Example]) -> None:
    """The HTML page of some reports of one model each, written atomically."""
    from texttok_cli.bench.eval_page import eval_page
    from texttok_cli.files import write_text

    write_text(path, eval_page(names, reports, examples))


def _name(report: Report) -> str:
    return report.results[0].card.samples


def _labels_unknown(row: MetricComparison) -> bool:
    cards = [result.card for result in row.results if result is not None]
    return len(cards) > 1 and all(card.task == "generation" and (card.labels or DECLARED).endswith(DECLARED) for card in cards)


def _row_json(row: MetricComparison) -> dict[str, Any]:
    values = [None if result is None else result.value for result in row.results]
    return {"metric": row.metric, "values": values, "unlike": sorted(row.unlike)}
