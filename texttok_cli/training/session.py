"""A training run from its recipe: data, text, task, loop. What `texttok train` calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from texttok_cli import __version__
from texttok_cli.config.schema import ClassEmbedding, NoCondition, Recipe, TextCondition
from texttok_cli.data import Dataset, TrainLoader, eval_batches, open_dataset
from texttok_cli.errors import DataError, RecipeError
from texttok_cli.inference import texts_for
from texttok_cli.losses import Perceptual
from texttok_cli.text import embed_corpus, estimate_bytes, load_text_encoder
from texttok_cli.training.engine import Engine
from texttok_cli.training.loop import train
from texttok_cli.training.run import RunFolder
from texttok_cli.training.tokenizer_task import Conditioner, TokenizerTask

STATISTICS_IMAGES = 10_000  # training images behind the per-channel latent statistics


@dataclass(frozen=True)
class Reporter:
    """Where a run tells what it does; the command line draws it."""

    message: Callable[[str], None]
    progress: Callable[[str, int, int, dict[str, float]], None]  # what, done, total, newest numbers


def run_training(recipe: Recipe, out: Path, report: Reporter, *, offline: bool = False, cpu: bool = False) -> Path:
    """Train a tokenizer as the recipe says, in folder `out`, from where an earlier run there stopped; returns the model file.

    Raises RecipeError, DataError, CheckpointError, BackendError for what a person can mend, Interrupted after a signal.
    """
    run = RunFolder(out)
    engine = Engine(recipe.training, cpu=cpu)
    train_set, val_set = _open(recipe, recipe.data.train), _open(recipe, recipe.data.val) if recipe.data.val else None
    report.message(f"{len(train_set):,} training images, {len(val_set) if val_set else 0:,} for validation")
    if engine.is_main:
        run.open(recipe)
    engine.wait()
    conditioners = _conditioners(recipe, [train_set, *([val_set] if val_set else [])], out, engine, report, offline)
    perceptual = Perceptual(recipe.objective.perceptual.net, offline=offline) if recipe.objective.perceptual else None
    task = TokenizerTask(recipe, engine, conditioners[0], perceptual)
    loader = TrainLoader(
        train_set,
        image_size=recipe.model.image_size,
        batch_size=engine.batch_size,
        seed=recipe.training.seed,
        flip=recipe.data.flip,
        workers=recipe.data.workers,
        cache=recipe.data.cache,
        rank=engine.rank,
        world_size=engine.world_size,
    )

    def ordered(dataset: Dataset, limit: int) -> Any:
        """At most `limit` images, spread evenly over the dataset, which may be sorted."""
        chosen = range(0, len(dataset), -(-len(dataset) // limit))
        return eval_batches(dataset, image_size=recipe.model.image_size, batch_size=64, indices=chosen, on_error=_say(report))

    def validate() -> dict[str, float]:
        if val_set is None:
            return {}
        return task.validate(conditioners[1], ordered(val_set, recipe.training.val_images))

    steps = recipe.schedule.steps
    train(recipe, task, engine, run, loader.batches, validate, lambda step, values: report.progress("training", step, steps, values))
    for name, reason in loader.damaged.items():
        report.message(f"skipped {name}: {reason}")
    if engine.is_main:
        task.set_latent_statistics(ordered(train_set, STATISTICS_IMAGES))
        images = steps * recipe.training.batch_size
        task.export(run.model_path, {"reproduces": recipe.reproduces, "steps": steps, "images_seen": images, "texttok": __version__})
    return run.model_path


def _open(recipe: Recipe, inputs: list[str]) -> Dataset:
    if not inputs:
        raise RecipeError("data.train is empty: name images, folders or shards, e.g. data.train='[shards/train-{000..127}.tar]'")
    captions = Path(recipe.data.captions) if recipe.data.captions else None
    return open_dataset(inputs, captions=captions, caption_field=recipe.data.caption_field)


def _say(report: Reporter) -> Callable[[str, str], None]:
    return lambda name, reason: report.message(f"skipped {name}: {reason}")


def _conditioners(
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
