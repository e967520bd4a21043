"""`texttok eval`: measure tokenizers or samples, and compare reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from texttok_cli.commands.eval_checks import check_comparing, check_one_model, check_targets, check_used
from texttok_cli.commands.eval_progress import show
from texttok_cli.commands.eval_report import compare_reports, finish
from texttok_cli.commands.options import (
    BatchSizeOption,
    CaptionFieldOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    OfflineOption,
    OutOption,
    PrecisionOption,
    QuietOption,
    given_options,
)
from texttok_cli.config import DEFAULT_MODEL, Precision, Resize
from texttok_cli.errors import UsageError
from texttok_cli.metrics.protocols import CLIP_NAME, CLIP_WEIGHTS, NOTES, PROTOCOLS, Protocol, ProtocolName

if TYPE_CHECKING:
    from texttok_cli.metrics.evaluator import Batch
    from texttok_cli.metrics.reconstructions import Autoencoder

DEFAULT_METRICS = {"reconstruction": ("rfid", "psnr", "ssim"), "generation": ("fid",)}


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
    samples: Annotated[str | None, typer.Option(metavar="DIR|NPZ|TAR", help="Existing samples, such as those of `texttok sample`.")] = None,
    ref: Annotated[str | None, typer.Option(metavar="DIR|NPZ|TAR", help="What --samples are compared with: images or statistics.")] = None,
    images: Annotated[int | None, typer.Option("--images", "-n", min=2, help="Use only this many images of --data, evenly spaced.")] = None,
    captions: Annotated[Path | None, typer.Option(help="A captions.jsonl of --data or --samples.")] = None,
    caption_field: CaptionFieldOption = None,
    no_caption: Annotated[bool, typer.Option("--no-caption", help="Reconstruct with the empty condition, and record that.")] = False,
    split: Annotated[str | None, typer.Option(help="Which split the references are, for the card: train, val.")] = None,
    note: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help=f"For the card: {', '.join(NOTES)}; repeatable.")] = None,
    resize: Annotated[Resize, typer.Option(help="To 299 pixels for FID.")] = "tf1-bilinear",
    inception: Annotated[Path | None, typer.Option(help="The whole Inception's file (for is, ris, gis), if not cached.")] = None,
    clip: Annotated[str, typer.Option(help="open_clip's name of a CLIP.")] = CLIP_NAME,
    clip_weights: Annotated[str, typer.Option(help="Its weights: a local file, or open_clip's tag.")] = CLIP_WEIGHTS,
    save_stats: Annotated[Path | None, typer.Option(metavar="NPZ", help="Write the samples' statistics, as ADM's files.")] = None,
    save_samples: Annotated[Path | None, typer.Option(metavar="NPZ", help="Write the samples as an ADM batch.")] = None,
    compare: Annotated[list[Path] | None, typer.Option(help="Compare reports instead; repeatable, and takes globs in quotes.")] = None,
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
    comes with the package. With -o the report goes to a file, every number with its protocol card, and the same command resumes an
    interrupted run. --compare A.json --compare B.json shows reports side by side and says where their cards differ; the exit code is
    1 if that is in what was measured (the images, how they were cropped, the network, ...), so that the numbers can't be compared.
    Under `accelerate launch -m texttok_cli eval ...` the processes share the work.
    """
    from texttok_cli.data.sources import expand
    from texttok_cli.metrics.evaluation import evaluate
    from texttok_cli.metrics.passes import Job, Pass
    from texttok_cli.metrics.processes import Processes
    from texttok_cli.models.devices import pick_device

    given = given_options(context)
    if compare:
        check_comparing(given)
        check_targets({"--html": html})
        compare_reports([Path(path) for name in compare for path in expand(str(name))], html, as_json=json)
        return
    fixed = PROTOCOLS[protocol] if protocol else None
    names = _names(metric, fixed, generated=samples is not None, statistics=save_stats is not None, page=html is not None)
    check_used(given, names, fixed)
    check_targets({"-o": out, "--save-stats": save_stats, "--save-samples": save_samples, "--html": html})
    notes, processes = _notes(note or []), Processes()
    if len(model or []) > 1:
        check_one_model(given)
    if save_samples is not None and processes.size > 1:
        raise UsageError("--save-samples: one process writes one file; leave it out, or run without a launcher")
    where = str(pick_device(processes.device(device)))
    models = None if samples is not None else _load_models(model, device=where, precision=precision, offline=offline)

    def track(seeing: Pass) -> Iterator[Batch]:
        return show(seeing, first=processes.rank == 0, quiet=quiet, save_samples=save_samples)

    kept = None if save_samples else out  # a file of samples can't be gone on with
    with Job(processes, report=kept, statistics=save_stats is not None, track=track) as job:
        report = evaluate(
            names,
            samples=samples,
            references=ref,
            model=models,
            data=data,
            images=images,
            size=size,
            captions=captions,
            caption_field=caption_field,
            no_caption=no_caption,
            protocol=protocol,
            split=split,
            notes=notes,
            resize=resize,
            inception=inception,
            clip=clip,
            clip_weights=clip_weights,
            batch_size=batch_size,
            device=where,
            offline=offline,
            job=job,
        )
        if processes.rank == 0:
            finish(report, job.passes, out=out, save_stats=save_stats, html=html, gallery=gallery, quiet=quiet, as_json=json)


# ------------------------------------------------------------------ what was asked for


def _names(metric: str | None, fixed: Protocol | None, *, generated: bool, statistics: bool, page: bool) -> list[str]:
    """The metrics, checked; a page's images are chosen by their PSNR, so it brings that along wherever there are pairs."""
    from texttok_cli.metrics.registry import check_names, uses_pairs

    if metric is not None:
        names = list(dict.fromkeys(name.strip() for name in metric.split(",") if name.strip()))
        if not names:
            raise UsageError("--metric: names no metric")
    elif fixed is not None:
        names = list(fixed.metrics)
    else:
        names = [] if statistics else list(DEFAULT_METRICS["generation" if generated else "reconstruction"])
    check_names(names)
    return [*names, "psnr"] if page and "psnr" not in names and (not generated or uses_pairs(names)) else names


def _notes(notes: Sequence[str]) -> dict[str, str]:
    found = {}
    for entry in notes:
        key, _, value = entry.partition("=")
        if key not in NOTES or not value:
            raise UsageError(f"--note {entry}: not KEY=VALUE with a key among {', '.join(NOTES)}")
        found[key] = value
    return found


def _load_models(models: Sequence[str] | None, *, device: str, precision: Precision, offline: bool) -> list[Autoencoder]:
    """The tokenizers and baselines, all different; None is the bundled default."""
    from texttok_cli.baselines import PREFIX, load_baseline
    from texttok_cli.inference import load_tokenizer

    loaded: list[Autoencoder] = []
    for name in models or [DEFAULT_MODEL]:
        if not name.startswith(PREFIX):
            loaded.append(load_tokenizer(name, device=device, precision=precision, offline=offline))
        elif precision != "fp32":
            raise UsageError(f"{name}: baselines compute in fp32 only; leave out --precision")
        else:
            loaded.append(load_baseline(name, device=device, offline=offline))
        if loaded[-1].info.sha256 in [model.info.sha256 for model in loaded[:-1]]:
            raise UsageError(f"--model {name}: is given twice")
    return loaded
