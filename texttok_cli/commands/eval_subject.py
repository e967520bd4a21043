"""What `texttok eval` measures: a model and the images it reconstructs, or samples and their references."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from texttok_cli.commands.eval_pairs import by_number, check_pairs, match_by_name
from texttok_cli.commands.eval_run import SampleRun, sample_run
from texttok_cli.config import Precision
from texttok_cli.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from texttok_cli.baselines import SDVAE, TinyAutoencoder
    from texttok_cli.data import Dataset
    from texttok_cli.inference import Tokenizer
    from texttok_cli.metrics.sources import FileImages, Images, NpzImages
    from texttok_cli.metrics.statistics import Gaussian

Model: TypeAlias = "Tokenizer | TinyAutoencoder | SDVAE"
SAMPLE_SET = "emoji128-val.tar"  # comes with the package
BASELINE_SIZE = 256


@dataclass
class Subject:
    """Images to measure, and what a protocol card says of them."""

    task: Literal["reconstruction", "generation"]
    samples: Images | None
    references: Images | None
    card: dict[str, Any]
    paired: bool
    given: Mapping[str, Gaussian] = field(default_factory=dict)
    captions: Sequence[str] | None = None  # what samples are compared with
    texts: Sequence[str] | None = None  # what the model is conditioned on
    reconstruct: Callable[[Tensor, Sequence[int]], Tensor] | None = None
    classes: Sequence[Hashable] | None = None  # of the samples in their order, where each one's is known
    jpegs: int = 0  # of the samples
    reference_size: int | None = None  # side of the images that statistics are of, where it is known
    cut_off: str | None = None  # what to say of `texts` that the model's text encoder does not read to their end

    @property
    def measured(self) -> Images:
        """Whose number is n: the samples, or the images that are reconstructed."""
        images = self.references if self.samples is None else self.samples
        assert images is not None
        return images


def load_models(models: Sequence[str] | None, *, device: str, precision: Precision, offline: bool) -> list[Model]:
    """The tokenizers and baselines, all different; None is the bundled default."""
    from texttok_cli.baselines import PREFIX, load_baseline
    from texttok_cli.inference import DEFAULT_MODEL, load_tokenizer

    loaded: list[Model] = []
    for name in models or [DEFAULT_MODEL]:
        if not name.startswith(PREFIX):
            loaded.append(load_tokenizer(name, device=device, precision=precision, offline=offline))
        elif precision != "fp32":
            raise DataError(f"{name}: baselines compute in fp32 only; leave out --precision")
        else:
            loaded.append(load_baseline(name, device=device, offline=offline))
        if loaded[-1].info.sha256 in [model.info.sha256 for model in loaded[:-1]]:
            raise DataError(f"--model {name}: is given twice")
    return loaded


def of_models(
    models: Sequence[Model],
    size: int | None,
    data: Sequence[str] | None,
    metrics: Sequence[str],
    *,
    limit: int | None,
    captions: Path | None,
    caption_field: str | None,
    no_caption: bool,
) -> list[Subject]:
    """Images of `data` (None: the sample set of the package), cropped by ADM's rule, and what each model reconstructs of them.

    The side of the crop is the models' own; baselines take the others', or `size`.
    """
    from texttok_cli.data import open_dataset
    from texttok_cli.data.texts import texts_for
    from texttok_cli.inference import PRETRAINED
    from texttok_cli.metrics.registry import uses_clip
    from texttok_cli.metrics.sources import FileImages

    clip = uses_clip(metrics)
    if no_caption and captions is not None and not clip:
        raise DataError("--captions and --no-caption exclude each other")
    if captions is not None and not clip and all(model.text_condition is None for model in models):
        raise DataError(f"{models[0].info.name}: takes no captions, and no metric reads them: leave out --captions")
    side = _common_size(models, size)
    dataset = _evenly(open_dataset(data or [PRETRAINED / SAMPLE_SET], captions=captions, caption_field=caption_field), limit)
    originals = FileImages(dataset, crop_to=side)
    common: dict[str, Any] = {
        "reference": _names(data or [SAMPLE_SET]),
        "reference_sha256": originals.identity(),
        "uint8": "rounds half up",
    }
    if not data:
        common["split"] = "val"
    compared = _captions(dataset) if clip else None
    subjects = []
    for model in models:
        condition = model.text_condition
        texts = None
        if condition is not None:
            texts = [""] * len(dataset) if no_caption else texts_for(dataset.items, condition, caption_field=caption_field)
        source = "none (--no-caption)" if no_caption else _caption_source(captions, caption_field)
        card = (
            common
            | _latents(model, side)
            | {
                "samples": model.info.name,
                "model_sha256": model.info.sha256,
                "text": None if condition is None else source if no_caption else f"{condition.source}: {source}",
                "precision": model.precision,
            }
        )
        subject = Subject("reconstruction", None, originals, card, paired=True, captions=compared, texts=texts)
        subject.reconstruct, subject.cut_off = _reconstruction(model, texts), _cut_off(model, texts)
        subjects.append(subject)
    return subjects


def _common_size(models: Sequence[Model], size: int | None) -> int:
    """The side of the images that all models are measured on; DataError names two that differ."""
    from texttok_cli.inference import Tokenizer

    own = [(model.info.name, model.cfg.image_size) for model in models if isinstance(model, Tokenizer)]
    if not own:
        return size or BASELINE_SIZE
    name, side = own[0]
    if size not in (None, side):
        raise DataError(f"--size {size}: {name} takes images of {side} pixels only")
    for other, other_side in own[1:]:
        if other_side != side:
            raise DataError(
                f"{name} takes images of {side} pixels and {other} of {other_side}: measure them separately, and --compare the reports"
            )
    return side


def _latents(model: Model, side: int) -> dict[str, Any]:
    """What the card says of the tokens that an image with this side becomes."""
    from texttok_cli.baselines.base import FACTOR
    from texttok_cli.inference import Tokenizer

    if not isinstance(model, Tokenizer):
        return {"tokens": (side // FACTOR) ** 2, "channels": model.channels}
    kind = {"channels": model.cfg.latent_dim} if model.num_codes is None else {"codes": model.num_codes}
    return {"tokens": model.cfg.num_tokens, **kind}


def _reconstruction(model: Model, texts: Sequence[str] | None) -> Callable[[Tensor, Sequence[int]], Tensor]:
    def reconstruct(images: Tensor, indices: Sequence[int]) -> Tensor:
        chosen = None if texts is None else [texts[index] for index in indices]
        return model.decode(model.encode(images, chosen), chosen)

    return reconstruct


def _cut_off(model: Model, texts: Sequence[str] | None) -> str | None:
    from texttok_cli.inference import Tokenizer
    from texttok_cli.text import cut_off

    if texts is None or not isinstance(model, Tokenizer) or model.text is None:
        return None
    return cut_off(model.text.encoder, texts)


def of_samples(samples: str, ref: str | None, metrics: Sequence[str], *, captions: Path | None, caption_field: str | None) -> Subject:
    """Samples as they are stored, and references: statistics, or images cropped by ADM's rule to the samples' size.

    Of the folder that `texttok sample` wrote the card learns how they were made. If a metric compares pairs, each sample belongs
    to the reference of its name (of its position, if either is an .npz).
    """
    from texttok_cli.data import open_dataset
    from texttok_cli.files import sha256_file
    from texttok_cli.metrics.registry import uses_clip, uses_pairs
    from texttok_cli.metrics.sources import FileImages, read_npz_reference

    paired = uses_pairs(metrics)
    run = sample_run(samples)
    card = {**run.card, "samples": _names([samples]), "reference": _names([ref]) if ref else None, "uint8": "as stored"}
    numbered = paired and ref is not None and ref.endswith(".npz")
    found, classes, texts = _stored(run, numbered=numbered, compared=uses_clip(metrics), captions=captions, caption_field=caption_field)
    if texts is not None:
        card["text"] = f"compared with the samples: {_caption_source(captions, caption_field)}"
    task: Literal["reconstruction", "generation"] = "reconstruction" if paired else "generation"
    jpegs = found.jpegs() if isinstance(found, FileImages) else 0
    if jpegs:
        card["uint8"] = f"as stored, {jpegs:,} of them as JPEG (lossy)"
    subject = Subject(task, found, None, card, paired, captions=texts, classes=classes, jpegs=jpegs)
    theirs: Sequence[str | None] | None = None
    if ref is not None and ref.endswith(".npz"):
        reference = read_npz_reference(Path(ref))
        subject.references, subject.given, subject.reference_size = reference.images, reference.given, reference.size
    elif ref is not None:
        dataset = open_dataset([ref], caption_field=caption_field)
        subject.references = FileImages(match_by_name(dataset, found) if paired else dataset, crop_to=found.size)
        theirs = [item.caption for item in dataset.items]
    card["labels"] = run.prompts_among(theirs)
    if subject.given:
        card["reference_sha256"] = sha256_file(Path(str(ref)))
    elif subject.references is not None:
        card["reference_sha256"] = subject.references.identity()
    if paired:
        check_pairs(subject.samples, subject.references, ref)
    return subject


def _stored(
    run: SampleRun, *, numbered: bool, compared: bool, captions: Path | None, caption_field: str | None
) -> tuple[NpzImages | FileImages, Sequence[Hashable] | None, Sequence[str] | None]:
    """The samples (by their numbers, if so), the class of each where all have one, and their captions if these are `compared`."""
    from texttok_cli.data import open_dataset
    from texttok_cli.metrics.sources import FileImages, NpzImages

    found: NpzImages | FileImages
    if run.samples.endswith(".npz"):
        found = NpzImages(Path(run.samples))
        classes: Sequence[Hashable] | None = found.labels()
        texts = _captions_of_npz(found, captions, run.captions) if compared else None
    else:
        opened = open_dataset([run.samples], captions=captions, caption_field=caption_field)
        dataset = by_number(opened) if numbered else opened
        found = FileImages(dataset)
        classes = [item.class_name for item in dataset.items]
        texts = _captions(dataset) if compared else None
    if classes is not None and None in classes:
        classes = None
    return found, classes if run.classes is None else run.classes, texts


def _evenly(dataset: Dataset, limit: int | None) -> Dataset:
    n = len(dataset)
    if limit is None or n <= limit:
        return dataset
    return type(dataset)([dataset.items[i * n // limit] for i in range(limit)], dataset.skipped)


def _captions(dataset: Dataset) -> list[str]:
    without = next((item.id for item in dataset.items if item.caption is None), None)
    if without is not None:
        raise DataError(f"{without}: has no caption to compare it with; give --captions FILE.jsonl")
    return [item.caption or "" for item in dataset.items]


def _captions_of_npz(samples: Images, captions: Path | None, own: Sequence[str] | None) -> Sequence[str]:
    """Of a captions.jsonl whose ids are positions, from 0; else the run's `own`."""
    from texttok_cli.data import Dataset, Item
    from texttok_cli.data.listings import with_captions

    if captions is None:
        if own is None:
            raise DataError("samples in an .npz have no captions: give --captions FILE.jsonl whose ids are their positions, from 0")
        return own
    return _captions(Dataset(with_captions([Item(position, str(captions)) for position in samples.ids], captions)))


def _caption_source(captions: Path | None, caption_field: str | None) -> str:
    return captions.name if captions else caption_field or "first caption"


def _names(sources: Sequence[str]) -> str:
    """The last part of each path: a report names what was measured, not where it lay."""
    return ", ".join(Path(source).name for source in sources)
