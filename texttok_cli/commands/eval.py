"""`texttok eval`: measure tokenizers or samples, and compare reports."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from texttok_cli.commands.eval_checks import (
    check_comparing,
    check_images_suffice,
    check_one_model,
    check_targets,
    check_used,
)
from texttok_cli.commands.eval_gallery import pick_examples
from texttok_cli.commands.eval_report import compare_reports, make_report, print_report, print_written, write_page
from texttok_cli.commands.eval_subject import Subject, load_models, of_models, of_samples
from texttok_cli.commands.options import (
    BatchSizeOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    OfflineOption,
    OutOption,
    PrecisionOption,
    QuietOption,
    given_options,
)
from texttok_cli.errors import DataError
from texttok_cli.metrics.protocols import DECLARED, PROTOCOLS, Protocol, ProtocolName

if TYPE_CHECKING:
    from texttok_cli.metrics.evaluator import Batch, Evaluator
    from texttok_cli.metrics.processes import Processes

DEFAULT_METRICS = {"reconstruction": ("rfid", "psnr", "ssim"), "generation": ("fid",)}
NOTES = ("labels", "seed", "sampler", "steps", "guidance")


def eval_(
    context: typer.Context,
    metric: Annotated[str | None, typer.Option(help="Names, separated by commas: rfid,psnr,...; an unknown one lists them all.")] = None,
    protocol: Annotated[ProtocolName | None, typer.Option(help="One of the paper's evaluations: what it measures, and on what.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="M", help="As `texttok encode` takes it, or baseline:NAME=FILE; repeatable."),
    ] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Side of the images, if every --model is a baseline, which takes any.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Images to reconstruct: a folder, manifest or shard; repeatable.")] = None,
    samples: Annotated[str | None, typer.Option(metavar="DIR|NPZ|TAR", help="Samples that are there, as of `texttok sample`.")] = None,
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
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page: table, cards, and images by their PSNR.")] = None,
    gallery: Annotated[int, typer.Option(min=1, help="How many best, median and worst images --html shows, each.")] = 3,
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

    Without --model it is the bundled texttok-32-128; without --data and --samples it reconstructs a small set of pictures that
    comes with the package. With -o the report goes to a file, every number with its protocol card, and the same command goes on
    where an interrupted run was. --compare A.json --compare B.json shows reports side by side; the exit code is 1 if their
    cards are unlike. Under `accelerate launch -m texttok_cli eval ...` the processes share the work.
    """
    from texttok_cli.inference import DEFAULT_MODEL, pick_device
    from texttok_cli.metrics.clip import ClipScorer
    from texttok_cli.metrics.evaluator import Evaluator
    from texttok_cli.metrics.processes import Processes
    from texttok_cli.metrics.registry import uses_clip
    from texttok_cli.metrics.report import save_report

    given = given_options(context)
    if compare:
        check_comparing(given)
        check_targets({"--html": html})
        compare_reports(compare, html, as_json=json)
        return
    fixed = PROTOCOLS[protocol] if protocol else None
    if fixed is not None and resize != fixed.resize:
        raise DataError(f"--protocol {protocol} resizes by {fixed.resize}: leave out --resize, or the protocol")
    names = _names(metric, fixed, generated=samples is not None, statistics=save_stats is not None, page=html is not None)
    check_used(given, names)
    check_targets({"-o": out, "--save-stats": save_stats, "--save-samples": save_samples, "--html": html})
    processes = Processes()
    where = (processes.device if device in ("auto", "cuda") else None) or str(pick_device(device))
    if samples is not None:
        subjects = [of_samples(samples, ref, names, captions=captions, caption_field=caption_field)]
    else:
        subjects = of_models(
            load_models(model or [DEFAULT_MODEL], device=where, precision=precision, offline=offline),
            size,
            data,
            names,
            limit=images or (fixed.images if fixed else None),
            captions=captions,
            caption_field=caption_field,
            no_caption=no_caption,
        )
    if len(subjects) > 1:
        check_one_model(given)
    for subject in subjects:
        subject.card = _card(subject, fixed, protocol, split, note or [])
        check_images_suffice(names, subject, statistics=save_stats is not None)
    first = Evaluator(
        names,
        given=subjects[0].given,
        resize=resize,
        inception=inception,
        clip=ClipScorer(clip, clip_weights, device=where, offline=offline) if uses_clip(names) else None,
        keep=frozenset({"pool", "spatial"} if save_stats else ()),
        device=where,
        offline=offline,
    )
    evaluators = [first, *(first.against_the_same() for _ in subjects[1:])]
    states = _states(None if save_samples else out, len(subjects), processes)
    with _writer(save_samples, subjects[0], processes) as write:
        for evaluator, subject, state in zip(evaluators, subjects, states, strict=True):
            more = subject is not subjects[-1]
            _measure(evaluator, subject, processes, state=state, more=more, write=write, batch_size=batch_size, quiet=quiet)
    truncated = processes.merge(evaluators)
    if processes.rank == 0:
        report = make_report(evaluators, subjects, truncated)
        print_report(report, subjects, quiet=quiet, as_json=json)  # first: whatever can't be written, no number is lost
        if out is not None:
            save_report(out, report)
        if save_stats is not None:
            _save_statistics(save_stats, first)
        if html is not None:
            write_page(html, report, pick_examples(evaluators, subjects, each=gallery))
        print_written({"out": out, "html": html}, as_json=json)
    processes.finish()
    for state in states:
        if state is not None:
            state.unlink(missing_ok=True)


# ------------------------------------------------------------------ what was asked for


def _names(metric: str | None, fixed: Protocol | None, *, generated: bool, statistics: bool, page: bool) -> list[str]:
    """The metrics, checked; a page's images are chosen by their PSNR, so it brings that along wherever there are pairs."""
    from texttok_cli.metrics.registry import check_names, uses_pairs

    if metric is not None:
        names = list(dict.fromkeys(name.strip() for name in metric.split(",") if name.strip()))
        if not names:
            raise DataError("--metric: names no metric")
    elif fixed is not None:
        names = list(fixed.metrics)
    else:
        names = [] if statistics else list(DEFAULT_METRICS["generation" if generated else "reconstruction"])
    check_names(names)
    return [*names, "psnr"] if page and "psnr" not in names and (not generated or uses_pairs(names)) else names


def _card(subject: Subject, fixed: Protocol | None, protocol: str | None, split: str | None, notes: Sequence[str]) -> dict[str, Any]:
    """What is known of the samples, completed by the protocol in its own name, as that is no evidence; --split and --note win over both."""
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
        if fixed.reference and str(card["reference"]).startswith(fixed.reference):
            card["split"] = fixed.split
        card["split"] = card["split"] or fixed.split + DECLARED
        card["labels"] = card["labels"] or (fixed.labels and fixed.labels + DECLARED)
    if split is not None:
        card["split"] = split
    for entry in notes:
        key, _, value = entry.partition("=")
        if key not in NOTES or not value:
            raise DataError(f"--note {entry}: not KEY=VALUE with a key among {', '.join(NOTES)}")
        card[key] = value
    return card


# ------------------------------------------------------------------ the passes


def _states(out: Path | None, passes: int, processes: Processes) -> list[Path | None]:
    """Where each pass of this process keeps what it has seen, beside the report."""
    if out is None:
        return [None] * passes
    numbers = ["", *(f".{number}" for number in range(2, passes + 1))]
    return [out.with_name(f".{out.name}{number}.state-{processes.rank}-of-{processes.size}") for number in numbers]


def _measure(
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


def _save_statistics(path: Path, evaluator: Evaluator) -> None:
    from texttok_cli.metrics.sources import write_statistics

    samples = evaluator.evidence.samples
    write_statistics(path, {"pool": samples.gaussian("pool"), "spatial": samples.gaussian("spatial")})
