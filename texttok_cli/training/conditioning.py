"""What turns indices of training examples into a model's condition: nothing, class ids, or text tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texttok_cli.config.recipe import TokenizerRecipe
from texttok_cli.config.schema import ClassEmbedding, NoCondition, TextEncoderConfig
from texttok_cli.data import Dataset
from texttok_cli.data.labels import ids_among
from texttok_cli.data.texts import check_words, texts_for
from texttok_cli.errors import RecipeError
from texttok_cli.text import cut_off, embed_corpus, estimate_bytes, load_text_encoder
from texttok_cli.training.engine import Engine
from texttok_cli.training.report import Reporter

# Indices into a data set -> the condition of those examples, as the keyword arguments of the model's forward.
Conditioner = Callable[[Sequence[int]], dict[str, Any]]

NO_CAPTION_REMEDY = (
    "the recipe's model is conditioned on text: make captions with `texttok caption` and give them as data.captions,"
    " or train the twin without text (a recipe called baseline)"
)


def build_conditioners(
    recipe: TokenizerRecipe, datasets: Sequence[Dataset], out: Path, engine: Engine, report: Reporter, offline: bool
) -> tuple[list[Conditioner], list[str] | None]:
    """For each dataset, what turns indices into a tokenizer's condition; and of one conditioned on classes their names by id."""
    cond = recipe.model.condition
    if isinstance(cond, NoCondition):
        return [lambda indices: {"cond": None} for _ in datasets], None
    if isinstance(cond, ClassEmbedding):
        named = [[(item.id, item.class_name) for item in dataset.items] for dataset in datasets]
        classes, ids = class_ids(named, cond.num_classes, engine.device)
        return [class_conditioner(part, cond=None) for part in ids], classes
    field = recipe.data.caption_field
    texts = [texts_for(dataset.items, cond, caption_field=field, remedy=NO_CAPTION_REMEDY) for dataset in datasets]
    if cond.source == "caption" and recipe.data.max_words is not None:
        for dataset, part in zip(datasets, texts, strict=True):
            check_words(dataset.items, part, recipe.data.max_words)
    return text_conditioners(cond.encoder, texts, out, engine, report, cache=recipe.training.text_cache, offline=offline), None


def class_ids(named: Sequence[Sequence[tuple[str, str | None]]], num_classes: int, device: torch.device) -> tuple[list[str], list[Tensor]]:
    """Of data sets' (id, class name) pairs, training first: the classes, ids being ranks, and the ids (n,) of each set's examples.

    Classes are in the order of their names, or of their numbers if all are numbers: `.cls` files keep theirs.

    RecipeError if the training set has another number of classes, DataError as `ids_among`.
    """
    names = {name for _, name in named[0] if name is not None}
    classes = sorted(names, key=(lambda name: (int(name), name)) if all(name.isdecimal() for name in names) else None)
    if not classes:
        raise RecipeError(
            f"model.condition.num_classes is {num_classes}, but the training images have no classes: lay them in folders by class, or name"
            " it as `class` in a shard or manifest; a generator with num_classes 1 needs none"
        )
    if len(classes) != num_classes:
        raise RecipeError(f"model.condition.num_classes is {num_classes}, the training images have {len(classes)} classes")
    return classes, [torch.tensor(ids_among(classes, part), device=device) for part in named]


def class_conditioner(ids: Tensor, **others: Any) -> Conditioner:
    """Class ids (n,) as a condition, beside other arguments that are the same for all."""
    return lambda indices: {**others, "class_ids": ids[list(indices)]}


def text_conditioners(
    cfg: TextEncoderConfig,
    texts: Sequence[Sequence[str]],
    out: Path,
    engine: Engine,
    report: Reporter,
    *,
    cache: bool,
    offline: bool,
) -> list[Conditioner]:
    """For each data set's texts the encoder's token states; with `cache` all are embedded once, to `out`/text.

    What the encoder does not read to its end is said here, before the first step: later a resumed run would not know of all of it.
    """
    encoder = load_text_encoder(cfg, device=engine.device, offline=offline)
    cut = cut_off(encoder, (text for part in texts for text in part)) if engine.is_main else None
    if cut is not None:
        report.message(cut)
    embed: Callable[[Sequence[str]], Any] = encoder
    if cache:
        corpus = sorted({text for part in texts for text in part})
        size = estimate_bytes(encoder, corpus)
        report.message(f"text cache: {len(corpus):,} captions, {size / 1e9:.2f} GB in {out / 'text'}")

        def on_progress(done: int, total: int) -> None:
            report.progress("embedding captions", done, total, {})

        if engine.is_main:
            embed_corpus(encoder, corpus, out / "text", on_progress=on_progress)
        engine.wait()
        embed = embed_corpus(encoder, corpus, out / "text", on_progress=on_progress)

    def conditioner(part: Sequence[str]) -> Conditioner:
        return lambda indices: {"cond": embed([part[i] for i in indices]).to(engine.device)}

    return [conditioner(part) for part in texts]
