"""A training run from its recipe: data, text, task, loop. What `texttok train` calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path

import torch

from texttok_cli.checkpoint import ModelInfo, load_tokenizer_file
from texttok_cli.config.loader import AnyRecipe
from texttok_cli.config.recipe import GeneratorRecipe, TokenizerRecipe
from texttok_cli.data import Dataset, EvalBatch, TrainLoader, eval_batches, evenly_spaced, open_dataset
from texttok_cli.errors import BackendError, RecipeError, TrainingError
from texttok_cli.files import alone_in
from texttok_cli.inference import find_model
from texttok_cli.losses import build_perceptual
from texttok_cli.metrics.inception import FidInception
from texttok_cli.metrics.processes import Processes
from texttok_cli.models.tokenizer import TexTok
from texttok_cli.training.conditioning import Conditioner, build_conditioners
from texttok_cli.training.engine import Engine
from texttok_cli.training.generator_session import train_generator
from texttok_cli.training.loop import Interrupted, train
from texttok_cli.training.report import Reporter
from texttok_cli.training.run import RunFolder, begin, check_start, history
from texttok_cli.training.tokenizer_task import TokenizerTask

WORKERS_END = 10  # seconds that loader workers of a killed run may take to see it, twice torch's
STATISTICS_IMAGES = 10_000  # training images behind the per-channel latent statistics


def run_training(recipe: AnyRecipe, out: Path, report: Reporter, *, offline: bool, device: str) -> Path:
    """Train what the recipe says, in folder `out`, from where an earlier run there stopped; returns the model file.

    Raises RecipeError, DataError, CheckpointError, BackendError, TrainingError for what a person can mend, Interrupted after
    a signal.
    """
    with alone_in(out, patience=WORKERS_END) if Processes().rank == 0 else nullcontext():  # the processes of a run share the folder
        if isinstance(recipe, GeneratorRecipe):
            return train_generator(recipe, out, report, offline=offline, device=device)
        return _train_tokenizer(recipe, out, report, offline=offline, device=device)


def _train_tokenizer(recipe: TokenizerRecipe, out: Path, report: Reporter, *, offline: bool, device: str) -> Path:
    run = RunFolder(out)
    engine = Engine(recipe.training, out=out, device=device)
    train_set, val_set = _open(recipe, recipe.data.train), _open(recipe, recipe.data.val) if recipe.data.val else None
    if engine.is_main:
        for entry in [*train_set.skipped, *(val_set.skipped if val_set else [])]:
            report.skipped(entry.id, entry.reason)
    run.samples = len(train_set)
    report.message(f"{len(train_set):,} training images, {len(val_set) if val_set else 0:,} for validation")
    if not begin(run, recipe, engine, report):
        return run.model_path
    conditioners, classes = build_conditioners(recipe, [train_set, *([val_set] if val_set else [])], out, engine, report, offline)
    start = _start(recipe, offline)
    task = _task(recipe, engine, conditioners[0], None if start is None else start[0], offline)
    inception = _inception(engine, report) if recipe.training.val_rfid and val_set is not None and engine.is_main else None
    loader = TrainLoader(
        train_set,
        image_size=recipe.model.image_size,
        batch_size=engine.batch_size,
        seed=recipe.training.seed,
        flip=recipe.data.flip,
        random_crop=recipe.data.crop == "random",
        workers=recipe.data.workers,
        cache=recipe.data.cache,
        rank=engine.rank,
        world_size=engine.world_size,
    )

    def ordered(dataset: Dataset, limit: int, batch_size: int = 64) -> Iterator[EvalBatch]:
        chosen = evenly_spaced(len(dataset), limit)
        return eval_batches(dataset, image_size=recipe.model.image_size, batch_size=batch_size, indices=chosen, on_error=report.skipped)

    def validate(step: int, stopping: Callable[[], bool]) -> dict[str, float]:
        if val_set is None or not engine.is_main:
            return {}
        grid = recipe.training.grid_images
        if grid:
            first = next(ordered(val_set, grid, grid), None)
            if first is not None:
                run.save_grid(step, first.images, task.reconstruct_uint8(conditioners[1], first))
        # No larger than a training step's, so that what makes room for those makes room for these.
        at_once = min(64, engine.batch_size // recipe.training.accumulate)
        batches = ordered(val_set, recipe.training.val_images, at_once)
        return task.validate(conditioners[1], takewhile(lambda _: not stopping(), batches), inception)

    def export(path: Path, step: int) -> None:
        if not engine.is_main:
            return
        latents_of: list[str] = []
        if start is not None and recipe.training.detokenizer_only:
            _check_frozen(task.model, start[0], start[1].name)
            latents_of = list(start[1].latents_made_by)
        else:
            task.set_latent_statistics(ordered(train_set, STATISTICS_IMAGES))
        task.export(path, history(recipe, step, None if start is None else start[1].sha256), latents_of, classes)

    try:
        with engine.finishing(together=Interrupted):
            train(recipe, task, engine, run, loader.batches, validate, export, report)
    finally:
        for name, reason in loader.damaged.items():
            report.skipped(name, reason)
    return run.model_path


def _check_frozen(model: TexTok, start: TexTok, name: str) -> None:
    """TrainingError unless the frozen weights are those of `start`: the file of that name may have changed since a run began."""
    theirs = start.state_dict()
    if not all(p.requires_grad or torch.equal(p.cpu(), theirs[key]) for key, p in model.named_parameters()):
        raise TrainingError(f"training.start_from: {name} is no longer the model that this run started from; restore that one")


def _inception(engine: Engine, report: Reporter) -> FidInception | None:
    """The features of rFID if their weights are here; a run does not fail for want of a number to watch."""
    try:
        return FidInception(offline=True).to(engine.device)
    except BackendError as err:
        report.message(f"validation without rFID: {err}")
        return None


def _open(recipe: TokenizerRecipe, inputs: list[str]) -> Dataset:
    if not inputs:
        raise RecipeError("data.train is empty: name images, folders or shards, e.g. data.train='shards/train-{000..127}.tar'")
    captions = Path(recipe.data.captions) if recipe.data.captions else None
    return open_dataset(inputs, captions=captions, caption_field=recipe.data.caption_field)


def _task(recipe: TokenizerRecipe, engine: Engine, condition: Conditioner, start: TexTok | None, offline: bool) -> TokenizerTask:
    cfg = recipe.objective.perceptual
    perceptual = None if cfg is None else build_perceptual(cfg.net, offline=offline).to(engine.device)
    return TokenizerTask(recipe, engine, condition, perceptual, start)


def _start(recipe: TokenizerRecipe, offline: bool) -> tuple[TexTok, ModelInfo] | None:
    """The model that the run begins with, if the recipe names one."""
    name = recipe.training.start_from
    if name is None:
        return None
    model, info = load_tokenizer_file(find_model(name, offline=offline))
    check_start(name, info.header.model, recipe.model)
    stays = recipe.training.detokenizer_only
    if stays and recipe.training.weights == "bf16" and not all(torch.equal(p, p.bfloat16().float()) for p in model.parameters()):
        raise RecipeError(f"training.weights: bf16 would round the tokenizer of {name}, which is to stay as it is: set it to fp32")
    return model, info
