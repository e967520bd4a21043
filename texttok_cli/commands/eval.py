"""`texttok eval`: measure a tokenizer or samples, and compare reports."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from texttok_cli.commands.eval_subject import Subject, of_model, of_samples
from texttok_cli.commands.options import (
    BatchSizeOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    OfflineOption,
    OutOption,
    PrecisionOption,
    QuietOption,
)
from texttok_cli.errors import DataError
from texttok_cli.metrics.protocols import PROTOCOLS, Protocol, ProtocolName

if TYPE_CHECKING:
    from texttok_cli.baselines import SDVAE, TinyAutoencoder
    from texttok_cli.inference import Tokenizer
    from texttok_cli.metrics.evaluator import Batch, Evaluator
    from texttok_cli.metrics.processes import Processes
    from texttok_cli.metrics.report import Card, Report, Row

DEFAULT_METRICS = {"reconstruction": ("rfid", "psnr", "ssim"), "generation": ("fid",)}
BASELINE_SIZE = 256
NOTES = ("labels", "seed", "sampler", "steps", "guidance")


def eval_(
    metric: Annotated[str | None, typer.Option(help="Names, separated by commas: rfid,psnr,...; an unknown one lists them all.")] = None,
    protocol: Annotated[ProtocolName | None, typer.Option(help="One of the paper's evaluations: what it measures, and on what.")] = None,
    model: ModelOption = "texttok-32-128",
    size: Annotated[int | None, typer.Option(min=8, help="Side of the images, for --model baseline:NAME=FILE, which takes any.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Images to reconstruct: a folder, manifest or shard; repeatable.")] = None,
    samples: Annotated[str | None, typer.Option(metavar="DIR|NPZ|TAR", help="Samples that are there already, in place of a model.")] = None,
    ref: Annotated[str | None, typer.Option(metavar="DIR|NPZ|TAR", help="What --samples are compared with: images or statistics.")] = None,
    images: Annotated[int | None, typer.Option("--images", "-n", min=2, help="Take so many of --data, at even distances.")] = None,
    captions: Annotated[Path | None, typer.Option(help="A captions.jsonl of --data or --samples.")] = None,
    caption_field: Annotated[str | None, typer.Option(help="Which key of a shard's .json is the caption: measured, longest, ...")] = None,
    no_caption: Annotated[bool, typer.Option("--no-caption", help="Reconstruct with the empty condition, and record that.")] = False,
    split: Annotated[str | None, typer.Option(help="Which split the references are, for the card: train, val.")] = None,
    note: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help=f"For the card: {', '.join(NOTES)}; repeatable.")] = None,
    resize: Annotated[Literal["tf1-bilinear", "clean", "legacy-pytorch"], typer.Option(help="To 299 pixels for FID.")] = "tf1-bilinear",
    inception: Annotated[Path | None, typer.Option(help="The whole Inception's file (for is, ris, gis), if not cached.")] = None,
    clip: Annotated[str, typer.Option(help="open_clip's name of a CLIP.")] = "ViT-B-32-quickgelu",
    clip_weights: Annotated[str, typer.Option(help="Its weights: a local file, or open_clip's tag.")] = "openai",
    save_stats: Annotated[Path | None, typer.Option(metavar="NPZ", help="Write the samples' statistics, as ADM's files.")] = None,
    save_samples: Annotated[Path | None, typer.Option(metavar="NPZ", help="Write the samples as an ADM batch.")] = None,
    compare: Annotated[list[Path] | None, typer.Option(help="Compare reports instead; repeatable.")] = None,
    out: OutOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    batch_size: BatchSizeOption = 32,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure how well images are reconstructed, or how good samples are.

    Without --data and --samples the model reconstructs a small set of pictures that comes with the package. With -o the report
    goes to a file, every number with its protocol card, and the same command goes on where an interrupted run was.
    --compare A.json --compare B.json shows reports side by side; the exit code is 1 if their cards are unlike.
    Under `accelerate launch -m texttok_cli eval ...` the processes share the work.
    """
    from texttok_cli.inference import pick_device
    from texttok_cli.metrics.clip import ClipScorer
    from texttok_cli.metrics.evaluator import Evaluator
    from texttok_cli.metrics.processes import Processes
    from texttok_cli.metrics.registry import check_names, uses_clip

    if compare:
        if out is not None:
            raise DataError(f"-o {out}: --compare writes no file; its table goes to stdout, or as JSON with --json")
        _compare(compare, as_json=json)
        return
    fixed = PROTOCOLS[protocol] if protocol else None
    names = _names(metric, fixed, generated=samples is not None, statistics=save_stats is not None)
    check_names(names)
    processes = Processes()
    where = (processes.device if device in ("auto", "cuda") else None) or str(pick_device(device))
    if fixed is not None and resize != fixed.resize:
        raise DataError(f"--protocol {protocol} resizes by {fixed.resize}: leave out --resize, or the protocol")
    if samples is not None:
        _refuse_with_samples({"--data": data, "--images": images, "--size": size, "--no-caption": no_caption or None})
        subject = of_samples(samples, ref, names, captions=captions, caption_field=caption_field)
    elif ref is not None:
        raise DataError("--ref goes with --samples; a model's references are the images that it reconstructs")
    else:
        subject = of_model(
            *_model(model, size, device=where, precision=precision, offline=offline),
            data,
            names,
            limit=images or (fixed.images if fixed else None),
            captions=captions,
            caption_field=caption_field,
            no_caption=no_caption,
        )
    subject.card = _card(subject, fixed, protocol, split, note or [])
    _check_images_suffice(names, subject, statistics=save_stats is not None)
    evaluator = Evaluator(
        names,
        given=subject.given,
        resize=resize,
        inception=inception,
        clip=ClipScorer(clip, clip_weights, device=where, offline=offline) if uses_clip(names) else None,
        keep=frozenset({"pool", "spatial"} if save_stats else ()),
        device=where,
        offline=offline,
    )
    with _writer(save_samples, subject, processes) as write:
        state = None if out is None or write is not None else out.with_name(f".{out.name}.state-{processes.rank}-of-{processes.size}")
        truncated = _measure(evaluator, subject, processes, state=state, write=write, batch_size=batch_size, quiet=quiet)
    if processes.rank == 0:
        if save_stats is not None:
            _save_statistics(save_stats, evaluator)
        _finish(_report(evaluator, subject, truncated), subject, out, quiet=quiet, as_json=json)
    if state is not None:
        state.unlink(missing_ok=True)


# ------------------------------------------------------------------ what was asked for


def _refuse_with_samples(options: Mapping[str, object | None]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise DataError(f"{given[0]} is about what a model reconstructs; it does not go with --samples")


def _model(
    model: str, size: int | None, *, device: str, precision: Literal["fp32", "bf16"], offline: bool
) -> tuple[Tokenizer | TinyAutoencoder | SDVAE, int]:
    """The tokenizer or baseline, and the side of the images it is measured on."""
    if model.startswith("baseline:"):
        from texttok_cli.baselines import load_baseline

        if precision != "fp32":
            raise DataError(f"{model}: baselines compute in fp32 only; leave out --precision")
        return load_baseline(model, device=device, offline=offline), size or BASELINE_SIZE
    from texttok_cli.inference import load_tokenizer

    tokenizer = load_tokenizer(model, device=device, precision=precision, offline=offline)
    if size not in (None, tokenizer.cfg.image_size):
        raise DataError(f"--size {size}: {tokenizer.info.name} takes images of {tokenizer.cfg.image_size} pixels only")
    return tokenizer, tokenizer.cfg.image_size


def _names(metric: str | None, fixed: Protocol | None, *, generated: bool, statistics: bool) -> list[str]:
    if metric is not None:
        return list(dict.fromkeys(name.strip() for name in metric.split(",") if name.strip()))
    if fixed is not None:
        return list(fixed.metrics)
    if statistics:
        return []
    return list(DEFAULT_METRICS["generation" if generated else "reconstruction"])


def _card(subject: Subject, fixed: Protocol | None, protocol: str | None, split: str | None, notes: Sequence[str]) -> dict[str, Any]:
    """What is known of the samples; --split and --note win over what the protocol says of both."""
    card = dict.fromkeys(("model_sha256", "reference_sha256", "text", "precision", "split", *NOTES)) | subject.card | {"protocol": protocol}
    if fixed is not None:
        if fixed.task != subject.task:
            needed = "--samples" if fixed.task == "generation" else "a model, or metrics of pairs"
            raise DataError(f"--protocol {protocol} is about {fixed.task}: it goes with {needed}")
        if protocol == "adm-class" and not {"pool", "spatial"} <= subject.given.keys():
            raise DataError(
                "--protocol adm-class: its references are ADM's VIRTUAL_imagenet*.npz with their statistics: name it with --ref"
            )
        if subject.task == "reconstruction" and card["split"] is not None:
            raise DataError(f"--protocol {protocol} needs --data: the sample set that comes with the package is not the paper's")
        card |= {"split": fixed.split, "labels": fixed.labels}
    if split is not None:
        card["split"] = split
    for entry in notes:
        key, _, value = entry.partition("=")
        if key not in NOTES or not value:
            raise DataError(f"--note {entry}: not KEY=VALUE with a key among {', '.join(NOTES)}")
        card[key] = value
    return card


def _check_images_suffice(names: Sequence[str], subject: Subject, *, statistics: bool) -> None:
    """Every metric must have what it needs, before anything is computed."""
    from texttok_cli.metrics.registry import METRICS, check_images

    for name in names:
        metric = METRICS[name]
        missing = {need for need in metric.needs if need not in subject.given} if metric.reference else set()
        if metric.reference and subject.references is None and (missing or not metric.needs):
            if subject.given:
                raise DataError(f"{name}: {subject.card['reference']} has not the statistics it needs, and no images")
            raise DataError(f"{name}: needs references: name their images, or for fid and sfid their statistics, with --ref")
    if statistics and len(subject.measured.ids) < 2:
        raise DataError("--save-stats: a covariance needs 2 images or more")
    counted = None if subject.references is None else len(subject.references.ids)
    check_images(names, n=len(subject.measured.ids), n_reference=counted, side=subject.measured.size)


# ------------------------------------------------------------------ the pass


def _measure(
    evaluator: Evaluator,
    subject: Subject,
    processes: Processes,
    *,
    state: Path | None,
    write: Callable[[Batch], None] | None,
    batch_size: int,
    quiet: bool,
) -> int:
    """See every image; returns how many captions CLIP could not read to their end."""
    from texttok_cli.console import progress, say
    from texttok_cli.metrics.evaluator import Work
    from texttok_cli.metrics.processes import run_pass

    references = subject.references if evaluator.evidence.references.wants_images or subject.paired else None
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
    with progress(quiet=quiet or processes.rank > 0) as bar:
        task = bar.add_task("measuring", total=len(work), note="")

        def on_resume(done: int) -> None:
            if not quiet:
                say(f"going on from image {done:,}")
            bar.advance(task, done)

        def on_batch(batch: Batch) -> None:
            if write is not None:
                write(batch)
            bar.advance(task, len(batch))

        run_pass(evaluator, work, batch_size=batch_size, state=state, identity=identity, on_resume=on_resume, on_batch=on_batch)
    return processes.merge(evaluator)


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


def _save_statistics(path: Path, evaluator: Evaluator) -> None:
    from texttok_cli.metrics.sources import write_statistics

    samples = evaluator.evidence.samples
    write_statistics(path, {"pool": samples.gaussian("pool"), "spatial": samples.gaussian("spatial")})


# ------------------------------------------------------------------ the report


def _report(evaluator: Evaluator, subject: Subject, truncated: int) -> Report:
    from texttok_cli.metrics.registry import METRICS
    from texttok_cli.metrics.report import Report, make_result

    results = []
    protocol = subject.card["protocol"]
    wanted = None if protocol is None else PROTOCOLS[protocol].images
    for name, (value, spread) in evaluator.compute().items():
        card = _result_card(name, evaluator, subject, truncated)
        result = make_result(name, value, spread, card, enough=METRICS[name].enough, why=METRICS[name].why)
        if wanted is not None and card.n != wanted:
            warning = f"{card.n:,} images: protocol {protocol} is of {wanted:,}"
            result = result.model_copy(update={"warnings": [*result.warnings, warning]})
        results.append(result)
    return Report(results=results)


def _result_card(name: str, evaluator: Evaluator, subject: Subject, truncated: int) -> Card:
    from texttok_cli.metrics.registry import METRICS
    from texttok_cli.metrics.report import Card, versions

    metric, references = METRICS[name], subject.references if METRICS[name].reference else None
    network, sha256 = evaluator.networks.get(metric.network if metric.network != "lpips" else name, (None, None))
    given = next((subject.given[need] for need in metric.needs if need in subject.given), None)
    n_reference = given.n if given is not None else None if references is None else len(references.ids)
    said = subject.card if metric.reference else subject.card | dict.fromkeys(("reference", "reference_sha256", "split"))
    return Card(
        **said,
        rule=metric.rule,
        task=subject.task,
        size=subject.measured.size,
        crop=None if references is None or given is not None else references.crop,
        resize=evaluator.resize if metric.network == "inception" else None,
        network=network,
        network_sha256=sha256,
        n=len(subject.measured.ids),
        n_reference=n_reference,
        captions_truncated=truncated if metric.network == "clip" else None,
        versions=versions(),
    )


def _finish(report: Report, subject: Subject, out: Path | None, *, quiet: bool, as_json: bool) -> None:
    from texttok_cli.console import emit, say
    from texttok_cli.metrics.report import save_report

    if out is not None:
        save_report(out, report)
    for result in report.results:
        for warning in result.warnings:
            if not quiet:
                say(f"{result.metric}: {warning}")
    if as_json:
        emit(report.model_dump(mode="json"), as_json=True)
        return
    summary: dict[str, Any] = {result.metric: _readable(result.value, result.spread) for result in report.results}
    summary |= {"of": subject.card["samples"], "against": subject.card["reference"] or "no references", "images": len(subject.measured.ids)}
    emit(summary | ({"out": str(out)} if out is not None else {}), as_json=False)


def _readable(value: float | None, spread: float | None) -> str:
    number = "not finite" if value is None else f"{value:.4f}"
    return number if spread is None else f"{number} ± {spread:.4f}"


def _compare(paths: Sequence[Path], *, as_json: bool) -> None:
    """A table on stdout; on stderr what is unlike. Exit code 1 then, as such numbers don't say which is better."""
    from texttok_cli.console import emit, say
    from texttok_cli.metrics.report import compare, load_report

    if len(paths) < 2:
        raise DataError(f"--compare {paths[0]}: one report alone; give --compare twice or more")
    rows = compare([load_report(path) for path in paths])
    if as_json:
        emit({"reports": [str(path) for path in paths], "rows": [_row_json(row) for row in rows]}, as_json=True)
    else:
        _print_table(paths, rows)
    for row in rows:
        for name, values in row.unlike.items():
            say(f"{row.metric}: unlike {name}: {' | '.join(map(str, values))}")
    if any(row.unlike for row in rows):
        raise typer.Exit(1)


def _row_json(row: Row) -> dict[str, Any]:
    values = [None if result is None else result.value for result in row.results]
    return {"metric": row.metric, "values": values, "unlike": sorted(row.unlike)}


def _print_table(paths: Sequence[Path], rows: Sequence[Row]) -> None:
    from rich.table import Table
    from rich.text import Text

    from texttok_cli.console import stdout

    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name in ("", *(path.stem for path in paths)):
        table.add_column(Text(name))
    for row in rows:
        values = ["" if result is None else _readable(result.value, result.spread) for result in row.results]
        table.add_row(Text(row.metric + (" (unlike)" if row.unlike else "")), *map(Text, values))
    stdout.print(table)
