"""`texttok_cli.evaluate`: from samples, or a model and images, to a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from texttok_cli.config import Resize
from texttok_cli.errors import UsageError
from texttok_cli.metrics.cards import declare, results_of
from texttok_cli.metrics.clip import ClipScorer
from texttok_cli.metrics.evaluator import Evaluator
from texttok_cli.metrics.passes import Job
from texttok_cli.metrics.protocols import CLIP_NAME, CLIP_WEIGHTS, NOTES, PROTOCOLS, ProtocolName
from texttok_cli.metrics.reconstructions import Autoencoder, open_reconstructions
from texttok_cli.metrics.registry import check_names, uses_clip
from texttok_cli.metrics.report import Report
from texttok_cli.metrics.stored import Source, open_stored
from texttok_cli.metrics.subject import Subject
from texttok_cli.models.devices import pick_device


def evaluate(
    metrics: str | Sequence[str],
    *,
    samples: Source | None = None,
    references: Source | None = None,
    model: Autoencoder | Sequence[Autoencoder] | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    images: int | None = None,
    size: int | None = None,
    captions: str | Path | None = None,
    caption_field: str | None = None,
    no_caption: bool = False,
    protocol: ProtocolName | None = None,
    split: str | None = None,
    notes: Mapping[str, str] | None = None,
    resize: Resize = "tf1-bilinear",
    inception: str | Path | None = None,
    clip: str = CLIP_NAME,
    clip_weights: str = CLIP_WEIGHTS,
    batch_size: int = 32,
    device: str = "auto",
    offline: bool = False,
    job: Job | None = None,
) -> Report:
    """Measure samples, or what models reconstruct of images: every number with its protocol card.

    `metrics` are as `texttok eval --metric` has them, a list or "fid,psnr". What they measure is either

    - `samples`: a folder, manifest, shard or .npz batch of ADM's form, as they are stored: square and of one size S; or uint8
      tensors (n, 3, S, S), 0 to 255, one or an iterable of batches, which are held in memory. They are compared with `references`:
      the same (files are cropped to S by ADM's rule), or an .npz of their statistics. Metrics of pairs (psnr, ...) compare each
      sample with the reference of its name; if either is an .npz or a tensor, of its position. Or
    - `model`, a `Tokenizer` or several: what it makes of the images of `data` (folders, manifests, shards; None: a small set that
      comes with the package), cropped to its size; to `size` if it takes any. `images` is how many at most, evenly spaced.

    `captions` is a captions.jsonl and `caption_field` the key of a shard's .json for what conditions the model, or CLIP compares
    samples with; `no_caption` is the empty condition. A model on class embeddings takes the images' classes, which have the names of
    training. `protocol`, `split` and `notes` (labels, seed, sampler, steps, guidance) are for the card. `resize`, `inception` (the
    whole network's file), `clip` and `clip_weights` are about the networks that measure. `job` resumes, shares and watches long
    evaluations.

    The report's `results` are in the order of the metrics, one model after the other. Each has `metric`, `value` (a float, None
    where it is not finite), `spread` (None where the rule has none), `card` and `warnings`.

    Raises UsageError for an unknown metric and for arguments that don't go together, DataError for images that can't be read, are
    too few or don't match; BackendError for a device or weights that are not available.
    """
    job = job or Job()
    metrics = metrics.split(",") if isinstance(metrics, str) else metrics
    check_names(metrics)
    unknown = next((key for key in notes or {} if key not in NOTES), None)
    if unknown is not None:
        raise UsageError(f"notes: {unknown!r} is not one of {', '.join(NOTES)}")
    fixed = PROTOCOLS[protocol] if protocol else None
    if fixed is not None and resize != fixed.resize:
        raise UsageError(f"--protocol {protocol} resizes by {fixed.resize}: leave out --resize, or the protocol")
    if isinstance(model, str | Path):
        raise UsageError(f"model: {str(model)!r} is a name; give what load_tokenizer({str(model)!r}) returns")
    models = [] if model is None else list(model) if isinstance(model, Sequence) else [model]
    if (samples is None) == (not models) or (references if samples is None else data) is not None:
        raise UsageError("evaluate takes samples and their references, or a model and its data")
    where = pick_device(job.processes.device(device))
    listed = None if captions is None else Path(captions)
    opened: list[Subject]
    if samples is not None:
        opened = [open_stored(samples, references, metrics, captions=listed, caption_field=caption_field)]
    else:
        opened = open_reconstructions(
            models,
            [data] if isinstance(data, str | Path) else data,
            metrics,
            size=size,
            limit=images or (fixed.images if fixed else None),
            captions=listed,
            caption_field=caption_field,
            no_caption=no_caption,
        )
    subjects = [declare(subject, protocol=protocol, split=split, notes=notes or {}) for subject in opened]
    for subject in subjects:
        subject.check(metrics, statistics=job.statistics)
    first = Evaluator(
        metrics,
        given=subjects[0].given,
        resize=resize,
        inception=None if inception is None else Path(inception),
        clip=ClipScorer(clip, clip_weights, device=where, offline=offline) if uses_clip(metrics) else None,
        keep=frozenset({"pool", "spatial"} if job.statistics else ()),
        device=where,
        offline=offline,
    )
    evaluators = [first, *(first.against_the_same() for _ in subjects[1:])]
    job.see(subjects, evaluators, batch_size=batch_size)
    job.processes.merge(evaluators)
    found = zip(subjects, evaluators, strict=True)
    report = None if job.processes.rank else Report(results=[result for one in found for result in results_of(*one)])
    return job.processes.share(report)
