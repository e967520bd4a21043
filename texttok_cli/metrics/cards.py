"""What the protocol card of each number says, and what it warns of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from texttok_cli.errors import DataError
from texttok_cli.metrics.distribution import few_classes_a_block
from texttok_cli.metrics.evaluator import Evaluator
from texttok_cli.metrics.protocols import DECLARED, NOT_CHECKED, NOTES, PROTOCOLS, ProtocolName
from texttok_cli.metrics.registry import METRICS
from texttok_cli.metrics.report import Card, Result, captions_sha256, make_result, versions
from texttok_cli.metrics.subject import Subject


def declare(subject: Subject, *, protocol: ProtocolName | None, split: str | None, notes: Mapping[str, str]) -> Subject:
    """The subject, with what is known of it completed by the protocol in its own name, as that is no evidence; `split` and `notes` win
    over both. DataError if it is not what the protocol is about.
    """
    unknown = ("model_sha256", "reference_sha256", "text", "precision", "split", *NOTES)
    card = {**dict.fromkeys(unknown), **subject.card, "protocol": protocol}
    if protocol is not None:
        fixed = PROTOCOLS[protocol]
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
    return replace(subject, card={**card, **notes})


def results_of(subject: Subject, evaluator: Evaluator) -> list[Result]:
    """Every number with its card. DataError as `Evaluator.compute` has it."""
    results = []
    for name, (value, spread) in evaluator.compute().items():
        metric, card = METRICS[name], _card(name, subject, evaluator)
        warnings = _unlike_protocol(subject.card["protocol"], card, reference=metric.reference)
        warnings += _doubts(subject, reference=metric.reference)
        if card.captions_truncated:
            warnings.append(f"{card.captions_truncated:,} of {card.n:,} captions are longer than CLIP reads, so their end was cut off")
        if metric.in_order and subject.classes is not None and few_classes_a_block(subject.classes):
            warnings.append("the samples are sorted by class, so a block of 5,000 has few classes: too low; use is-shuffled")
        results.append(make_result(name, value, spread, card, enough=metric.enough, why=metric.why, also=warnings))
    return results


def _unlike_protocol(protocol: ProtocolName | None, card: Card, *, reference: bool) -> list[str]:
    """Where a card is not what its protocol asks for; the split is that of references."""
    if protocol is None:
        return []
    fixed, warnings = PROTOCOLS[protocol], list[str]()
    if card.n != fixed.images:
        warnings.append(f"{card.n:,} images: protocol {protocol} takes {fixed.images:,}")
    for what, found, wanted in (("split", card.split, fixed.split if reference else None), ("labels", card.labels, fixed.labels)):
        if wanted is not None and found not in (wanted, wanted + DECLARED) and not str(found).endswith(NOT_CHECKED + wanted):
            warnings.append(f"{what}: {found}; protocol {protocol} has: {wanted}")
    return warnings


def _doubts(subject: Subject, *, reference: bool) -> list[str]:
    """What is wrong with the samples whatever the protocol: as they are stored, and if they are compared, beside the `reference`."""
    doubts, size, other = [], subject.measured.size, subject.reference_size
    if subject.jpegs:
        n = len(subject.measured.ids)
        doubts.append(f"{subject.jpegs:,} of {n:,} samples are JPEG files, whose losses are in this number: store samples as PNG")
    if reference and other not in (None, size):
        doubts.append(f"samples of {size} pixels a side against {subject.card['reference']}, which is of {other}")
    return doubts


def _card(name: str, subject: Subject, evaluator: Evaluator) -> Card:
    metric, references = METRICS[name], subject.references if METRICS[name].reference else None
    network, sha256 = evaluator.networks.get(metric.network if metric.network != "lpips" else name, (None, None))
    given = next((subject.given[need] for need in metric.needs if need in subject.given), None)
    n_reference = given.n if given is not None else None if references is None else len(references.ids)
    said = subject.card if metric.reference else {**subject.card, "reference": None, "reference_sha256": None, "split": None}
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
        captions_sha256=captions_sha256(subject.captions) if metric.network == "clip" and subject.captions is not None else None,
        captions_truncated=evaluator.truncated if metric.network == "clip" else None,
        versions=versions(),
    )
