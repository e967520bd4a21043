"""What turns dataset indices into a model's condition during training: nothing, class ids, or text tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from texttok_cli.config.schema import ClassEmbedding, NoCondition, Recipe, TextCondition
from texttok_cli.data import Dataset
from texttok_cli.errors import DataError, RecipeError
from texttok_cli.inference import texts_for
from texttok_cli.text import embed_corpus, estimate_bytes, load_text_encoder
from texttok_cli.training.engine import Engine
from texttok_cli.training.report import Reporter
from texttok_cli.training.tokenizer_task import Conditioner


def build_conditioners(
    recipe: Recipe, datasets: Sequence[Dataset], out: Path, engine: Engine, report: Reporter, offline: bool
) -> list[Conditioner]:
    """For each dataset, what turns indices into the model's condition."""
    cond = recipe.model.condition
    if isinstance(cond, NoCondition):
        return [lambda indices: {"cond": None} for _ in datasets]
    if isinstance(cond, ClassEmbedding):
        return _class_conditioners(cond, datasets, engine.device)
    return _text_conditioners(recipe, cond, datasets, out, engine, report, offline)


def _class_conditioners(cond: ClassEmbedding, datasets: Sequence[Dataset], device: torch.device) -> list[Conditioner]:
    names = sorted({item.class_name for item in datasets[0].items if item.class_name is not None})
    if len(names) != cond.num_classes:
        raise RecipeError(f"model.condition.num_classes is {cond.num_classes}, the training images have {len(names)} classes")
    ids = {name: i for i, name in enumerate(names)}

    def conditioner(dataset: Dataset) -> Conditioner:
        unknown = next((item for item in dataset.items if item.class_name not in ids), None)
        if unknown is not None:
            raise DataError(f"{unknown.id}: class {unknown.class_name!r} is not among the training classes")
        table = torch.tensor([ids[str(item.class_name)] for item in dataset.items], device=device)
        return lambda indices: {"cond": None, "class_ids": table[list(indices)]}

    return [conditioner(dataset) for dataset in datasets]


def _text_conditioners(
    recipe: Recipe, cond: TextCondition, datasets: Sequence[Dataset], out: Path, engine: Engine, report: Reporter, offline: bool
) -> list[Conditioner]:
    encoder = load_text_encoder(cond.encoder, device=engine.device, offline=offline)
    texts = [texts_for(dataset.items, cond) for dataset in datasets]
    embed: Callable[[Sequence[str]], Any] = encoder
    if recipe.training.text_cache:
        corpus = sorted({text for part in texts for text in part})
        size = estimate_bytes(encoder, corpus)
        report.message(f"text cache: {len(corpus):,} captions, {size / 1e9:.2f} GB in {out / 'text'}")

        def on_progress(done: int, total: int) -> None:
            report.progress("embedding captions", done, total, {})

        if engine.is_main:
            embed_corpus(encoder, corpus, out / "text", on_progress=on_progress)
        engine.wait()
        embed = embed_corpus(encoder, corpus, out / "text", on_progress=on_progress)

    def conditioner(part: list[str]) -> Conditioner:
        return lambda indices: {"cond": embed([part[i] for i in indices]).to(engine.device)}

    return [conditioner(part) for part in texts]
