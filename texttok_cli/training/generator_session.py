"""A generator's training run from its recipe: latents, conditions, task, loop.

Letters: n images, B batch, N latent tokens, d latent channels, S image size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texttok_cli.checkpoint import ModelInfo, load_generator_file, load_tokenizer_file, read_tokenizer_info, save_generator
from texttok_cli.config.recipe import GeneratorRecipe
from texttok_cli.config.schema import PromptCondition, TextCondition, TokenLatents
from texttok_cli.data import evenly_spaced, to_uint8
from texttok_cli.data.latents import LatentBatch, LatentLoader, LatentStore
from texttok_cli.data.sources import expand
from texttok_cli.diffusion import FITTING, Sampling, parse_cfg, sample
from texttok_cli.errors import RecipeError
from texttok_cli.inference import find_model
from texttok_cli.models.dit import DiT
from texttok_cli.models.layers import DTYPES
from texttok_cli.models.tokenizer import TexTok
from texttok_cli.text import load_text_encoder
from texttok_cli.training.conditioning import Conditioner, class_conditioner, class_ids, text_conditioners
from texttok_cli.training.engine import Engine
from texttok_cli.training.generator_task import GeneratorTask
from texttok_cli.training.loop import Interrupted, train
from texttok_cli.training.report import Reporter
from texttok_cli.training.run import RunFolder, begin, check_start, history

GRID_STEPS, GRID_CFG = 50, "1.5"  # how the samples of a validation are drawn: the recipe's own 250 steps would take five times as long
VALIDATION_BATCH = 256
ONLY_CLASS = "image"  # of a model with one class, where images have none


def train_generator(recipe: GeneratorRecipe, out: Path, report: Reporter, *, offline: bool, device: str) -> Path:
    """Train a generator as the recipe says; see `run_training`."""
    run = RunFolder(out)
    engine = Engine(recipe.training, out=out, device=device, sharding=True)
    file, tokenizer = _tokenizer(recipe, offline)
    stores = [
        LatentStore.open([Path(path) for name in part for path in expand(name)], made_by=tokenizer.latents_made_by)
        for part in (recipe.data.train, recipe.data.val)
        if part
    ]
    run.samples = len(stores[0])
    report.message(f"latents of {len(stores[0]):,} training images, {len(stores[1]) if len(stores) > 1 else 0:,} for validation")
    if not begin(run, recipe, engine, report):
        return run.model_path
    known = _conditions(recipe, tokenizer, stores, out, engine, report, offline)
    start = _start(recipe, tokenizer, known.classes, report, offline)
    task = GeneratorTask(recipe, engine, known.conditioners[0], stores[0].statistics, None if start is None else start[0])
    loader = LatentLoader(
        stores[0],
        batch_size=engine.batch_size,
        seed=recipe.training.seed,
        device=engine.device,
        rank=engine.rank,
        world_size=engine.world_size,
    )
    stores[0] = replace(stores[0], z=loader.z)  # lets go of the machine's copy of what lies on the device
    if engine.sharded:
        report.message(f"weights split over {engine.world_size} processes (FSDP2), {engine.gathered_parts} parts, gathered in turn")
    if not loader.resident:
        report.message("the latents stay in CPU memory: they would use too much GPU memory")
    preview: _Preview | None = None
    if len(stores) > 1 and recipe.training.grid_images and engine.is_main:
        preview = _Preview(recipe, engine, stores[1], known.conditioners[1], load_tokenizer_file(file, device=engine.device)[0], offline)

    def validate(step: int, stopping: Callable[[], bool]) -> dict[str, float]:
        if len(stores) == 1:
            return {}
        dit = task.averaged()  # of shards in all processes
        if not engine.is_main:
            return {}
        if preview is not None:
            run.save_grid(step, preview.reconstructions, preview.draw(dit))
        batches = _ordered(stores[1], recipe.training.val_latents, engine.device)
        return task.validate(dit, known.conditioners[1], takewhile(lambda _: not stopping(), batches))

    def export(path: Path, step: int) -> None:
        dit = task.averaged()  # of shards in all processes
        if engine.is_main:
            save_generator(
                path,
                dit,
                tokenizer_name=tokenizer.name,
                tokenizer_sha256=tokenizer.sha256,
                classes=known.classes,
                class_counts=known.class_counts,
                train_captions=known.captions,
                training=history(recipe, step, None if start is None else start[1]),
                dtype=DTYPES[recipe.training.weights],
            )

    with engine.finishing(together=Interrupted):
        train(recipe, task, engine, run, loader.batches, validate, export, report)
    return run.model_path


def _tokenizer(recipe: GeneratorRecipe, offline: bool) -> tuple[Path, ModelInfo]:
    """The tokenizer whose latents these are. RecipeError for data that isn't named and a tokenizer that the model does not fit."""
    if recipe.data.tokenizer is None or not recipe.data.train:
        key = "data.tokenizer" if recipe.data.train else "data.train"
        raise RecipeError(
            f"{key} is empty: name folders of tokens and their tokenizer, e.g. data.train=latents data.tokenizer=texttok-32-128"
        )
    file = find_model(recipe.data.tokenizer, offline=offline)
    info = read_tokenizer_info(file)
    theirs, latents, condition = info.header.model, recipe.model.latents, recipe.model.condition
    if isinstance(latents, TokenLatents) and (latents.num_tokens, latents.latent_dim) != (theirs.num_tokens, theirs.latent_dim):
        raise RecipeError(
            f"model.latents are {latents.num_tokens} tokens of {latents.latent_dim} channels, those of {info.name}"
            f" {theirs.num_tokens} of {theirs.latent_dim}"
        )
    if (
        isinstance(condition, PromptCondition)
        and isinstance(theirs.condition, TextCondition)
        and condition.encoder != theirs.condition.encoder
    ):
        raise RecipeError(
            f"model.condition.encoder is not that of {info.name} ({theirs.condition.encoder.model_dump()}): one embedding serves"
            " the generator and the detokenizer"
        )
    return file, info


@dataclass(frozen=True)
class _Known:
    """What is known of the images: a condition for each data set, and what the generator's file says of the training images."""

    conditioners: list[Conditioner]
    classes: list[str] | None
    class_counts: list[int] | None
    captions: set[str]


def _conditions(
    recipe: GeneratorRecipe,
    tokenizer: ModelInfo,
    stores: Sequence[LatentStore],
    out: Path,
    engine: Engine,
    report: Reporter,
    offline: bool,
) -> _Known:
    condition = recipe.model.condition
    reads_text = isinstance(tokenizer.header.model.condition, TextCondition)
    if recipe.data.captions is not None and (reads_text or not isinstance(condition, PromptCondition)):
        raise RecipeError(
            "data.captions: is for a text-to-image model on tokens of a model without text; for others encode again with those captions"
        )
    if isinstance(condition, PromptCondition):
        overrides = None if recipe.data.captions is None else Path(recipe.data.captions)
        texts = [store.texts(overrides) for store in stores]
        cache = recipe.training.text_cache
        conditioners = text_conditioners(condition.encoder, texts, out, engine, report, cache=cache, offline=offline)
        return _Known(conditioners, None, None, set(texts[0]))
    names = [store.class_names for store in stores]
    if condition.num_classes == 1 and not any(names[0]):  # an unconditional model
        names = [[ONLY_CLASS] * len(part) for part in names]
    named = [list(zip(store.ids, part, strict=True)) for store, part in zip(stores, names, strict=True)]
    classes, ids = class_ids(named, condition.num_classes, engine.device)
    counts = Counter(name for name, flipped in zip(names[0], stores[0].flipped, strict=True) if not flipped)
    captions = {caption for caption in stores[0].captions if caption is not None}
    return _Known([class_conditioner(part) for part in ids], classes, [counts[name] for name in classes], captions)


def _start(
    recipe: GeneratorRecipe, tokenizer: ModelInfo, classes: list[str] | None, report: Reporter, offline: bool
) -> tuple[dict[str, Tensor], str] | None:
    """The weights that the run begins with and the sha256 of their model, if the recipe names one.

    Classes keep the embeddings of their names; one that the model does not know begins as its unconditional one.
    """
    name = recipe.training.start_from
    if name is None:
        return None
    dit, info = load_generator_file(find_model(name, offline=offline))
    theirs, weights, said = info.header.model, dit.state_dict(), ""
    if classes is not None and info.header.classes is not None and classes != info.header.classes:
        theirs = theirs.model_copy(update={"condition": theirs.condition.model_copy(update={"num_classes": len(classes)})})
        rows = {known: row for row, known in enumerate(info.header.classes)}
        weights["classes.weight"] = weights["classes.weight"][[*(rows.get(each, -1) for each in classes), -1]]
        said = f"{sum(each in rows for each in classes)} of {len(classes)} classes are among those of {name}"
    check_start(name, theirs, recipe.model, same_tokenizer=info.header.tokenizer_sha256 in tokenizer.latents_made_by)
    if said:
        report.message(said)
    return weights, info.sha256


def _ordered(store: LatentStore, limit: int, device: torch.device) -> Iterator[LatentBatch]:
    """At most `limit` latents of a store, evenly spread, in order."""
    for indices in torch.split(torch.tensor(evenly_spaced(len(store), limit)), VALIDATION_BATCH):
        yield LatentBatch(store.z[indices].to(device).float(), indices)


class _Preview:
    """Samples under the conditions of some validation images, to be seen below the tokenizer's `reconstructions` of those."""

    def __init__(
        self, recipe: GeneratorRecipe, engine: Engine, store: LatentStore, condition: Conditioner, tokenizer: TexTok, offline: bool
    ) -> None:
        chosen = evenly_spaced(len(store), recipe.training.grid_images)
        self.recipe, self.tokenizer = recipe, tokenizer
        self.condition: dict[str, Any] = condition(chosen)
        self.text = self.condition.get("cond")  # one embedding serves both
        source = tokenizer.cfg.condition
        if not isinstance(source, TextCondition):
            self.text = None
        elif self.text is None:  # embedded once, so that a large encoder needn't stay in memory
            encoder = load_text_encoder(source.encoder, device=engine.device, offline=offline)
            self.text = encoder([str(store.captions[i]) for i in chosen]).to(engine.device)
        self.reconstructions = self._decode(store.z[chosen].to(engine.device).float())

    def draw(self, dit: DiT) -> Tensor:
        """The samples, uint8 (B, 3, S, S), of the same seeds at every call."""
        process = self.recipe.model.process
        steps = min(GRID_STEPS, process.timesteps) if process.kind == "ddpm" else GRID_STEPS
        how = Sampling(FITTING[process.kind][0], steps, parse_cfg(GRID_CFG if self.recipe.model.condition.dropout else "1"))
        seeds, precision = range(len(self.reconstructions)), self.recipe.training.precision
        return self._decode(sample(dit, how, seeds=seeds, precision=precision, **self.condition))

    @torch.no_grad()
    def _decode(self, z: Tensor) -> Tensor:
        return to_uint8(self.tokenizer.decode(z, self.text)).cpu()
