"""Training steps as they are timed: the program's own, and bare ones of the same models.

Letters: B batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice, product
from pathlib import Path

import torch
from torch import Tensor

from texttok_cli.bench.networks import Where, Workload, rows_of, weights_bytes
from texttok_cli.bench.results import Row
from texttok_cli.bench.task import Task, joined
from texttok_cli.config.loader import AnyRecipe, load_recipe
from texttok_cli.config.recipe import GeneratorRecipe, TokenizerRecipe
from texttok_cli.config.schema import ClassLabels, GeneratorConfig, TextCondition, TokenizerConfig, Transformer
from texttok_cli.data import Batch, Dataset, TrainLoader, normalize
from texttok_cli.data.latents import LatentLoader, LatentStore
from texttok_cli.diffusion import build_process
from texttok_cli.losses import l2
from texttok_cli.models.condition import Condition
from texttok_cli.models.dit import DiT
from texttok_cli.models.layers import DTYPES, autocast, fused_is_faster
from texttok_cli.models.tokenizer import TexTok
from texttok_cli.token_folder import Statistics
from texttok_cli.training.engine import Engine
from texttok_cli.training.generator_task import GeneratorTask
from texttok_cli.training.optim import build_optimizers
from texttok_cli.training.tokenizer_task import TokenizerTask

STATE = 6  # fp32 copies of the weights: themselves, EMA, gradients, two moments, and what the optimizer computes from them
STORED = 2048  # latents in memory that batches are drawn from


def recipes(task: Task) -> Iterator[tuple[Row, AnyRecipe]]:
    """What the steps are of, each with its row, which has no time yet. RecipeError for one that does not come with texttok."""
    for size, tokens in product(task.image_sizes, task.tokens):
        for name, note in (
            (f"tokenizer/texttok-{tokens}-{size}", "l2 alone"),
            (f"tokenizer/baseline-{tokens}-{size}", "l2 alone"),
            (f"generator/dit-{task.generator.lower()}-{tokens}-{size}", "latents in memory"),
        ):
            yield Row(part="train", system=name, image_size=size, tokens=tokens, note=note), load_recipe(name)


def training_rows(task: Task) -> Iterator[Row]:
    """A step of the paper's tokenizers, by l2 alone, and of their generators. On a CPU a part of a batch may stand for all of it."""
    for row, recipe in recipes(task):
        yield from _rows(task, row, recipe.model)


def _rows(task: Task, row: Row, cfg: TokenizerConfig | GeneratorConfig) -> Iterator[Row]:
    rows = cfg.latents.sequence_length if isinstance(cfg, GeneratorConfig) else rows_of(cfg)
    row = row.model_copy(update={"note": joined(row.note, "forward, backward, optimizer, EMA")})
    with tempfile.TemporaryDirectory() as folder:

        def work(batch: int) -> Workload:  # a model of its own, which is gone before the next batch's
            return training_step(timed_recipe(row.system, batch, task.where), Path(folder), task.where)

        yield from task.time_batches(row, rows, 0, partial(step_bytes, cfg, where=task.where), lambda: work)


def step_bytes(cfg: TokenizerConfig | GeneratorConfig, batch: int, *, where: Where) -> float:
    """Of a training step: weights, EMA, gradients and moments, and what the backward pass reads."""
    if isinstance(cfg, GeneratorConfig):
        return STATE * weights_bytes(partial(DiT, cfg), 4) + kept_bytes(cfg.backbone, batch, cfg.latents.sequence_length, where)
    return STATE * weights_bytes(partial(TexTok, cfg), 4) + 2 * kept_bytes(cfg.backbone, batch, rows_of(cfg), where)


def kept_bytes(backbone: Transformer, batch: int, rows: int, where: Where) -> float:
    """Upper estimate of what a transformer keeps for its backward pass: 40 vectors a token and block, and the attention weights where a
    CPU writes attention out."""
    fused = where.device.type != "cpu" or fused_is_faster(DTYPES[where.precision], rows, rows, training=True)
    vectors = 40 * rows * backbone.width * where.element
    attention = 0 if fused else backbone.heads * rows**2 * (4 + 2 * where.element)
    return backbone.depth * batch * (vectors + attention)


def timed_recipe(name: str, batch: int, where: Where) -> AnyRecipe:
    """The recipe of this name with batches of so many images, not compiled: that takes longer than timing. Of a tokenizer's losses only
    l2, as the others need weights of others."""
    alone = ["objective.perceptual=null", "objective.adversarial=null"] if isinstance(load_recipe(name), TokenizerRecipe) else []
    return load_recipe(name, [*alone, "training.compile=false", f"training.batch_size={batch}", f"training.precision={where.precision}"])


def training_step(recipe: AnyRecipe, folder: Path, where: Where) -> Workload:
    """The program's step: of a tokenizer on random images and text, of a class-conditional generator on the next latents in memory."""
    return _generator_step(recipe, folder, where) if isinstance(recipe, GeneratorRecipe) else _tokenizer_step(recipe, folder, where)


def bare_step(recipe: AnyRecipe, where: Where) -> Workload:
    """Forward, backward and optimizer of an equal model: of a tokenizer by l2 alone on the same images and text, compiled if the recipe
    says so; of a generator on latents, classes, times and noise that are known beforehand."""
    model, loss = _generator_loss(recipe, where) if isinstance(recipe, GeneratorRecipe) else _tokenizer_loss(recipe, where)
    optimizers = build_optimizers(list(model.parameters()), model.block_matrices(), recipe.optimizer)

    def step() -> Tensor:
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def _tokenizer_step(recipe: TokenizerRecipe, folder: Path, where: Where) -> Workload:
    engine = Engine(recipe.training, out=folder, device=where.device.type)
    images, cond = _random_batch(recipe, where)
    task = TokenizerTask(recipe, engine, lambda indices: {"cond": cond}, None)
    whole, steps = Batch(images, torch.arange(len(images))), count()
    return lambda: task.step(whole, next(steps))


def _tokenizer_loss(recipe: TokenizerRecipe, where: Where) -> tuple[TexTok, Callable[[], Tensor]]:
    images, cond = _random_batch(recipe, where)
    torch.manual_seed(recipe.training.seed)  # as the task's
    model = TexTok(recipe.model).to(where.device)
    network = torch.compile(model, dynamic=False) if recipe.training.compile else model

    def loss() -> Tensor:
        x = normalize(images.to(where.device))
        with autocast(where.device, where.precision):
            output, _ = network(x, cond)
        return l2((x + 1) / 2, (output.float() + 1) / 2)

    return model, loss


def _random_batch(recipe: TokenizerRecipe, where: Where) -> tuple[Tensor, Condition | None]:
    """Images uint8 (B, 3, H, W), and text tokens (B, T, C) of different lengths, as captions are: half of the longest to the longest."""
    cfg, batch = recipe.model, recipe.training.batch_size
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8, generator=rng)
    if not isinstance(cfg.condition, TextCondition):
        return images, None
    longest, width = cfg.condition.encoder.max_tokens, cfg.condition.encoder.dim
    lengths = torch.linspace(longest // 2, longest, batch).long()
    return images, Condition(torch.randn(batch, longest, width, generator=rng), torch.arange(longest) < lengths[:, None]).to(where.device)


def loader_work(dataset: Dataset, image_size: int, batch: int, *, workers: int = 0) -> Workload:
    """The training loader's next batch of these images."""
    loader = TrainLoader(dataset, image_size=image_size, batch_size=batch, seed=0, flip=True, workers=workers)
    batches = loader.batches()
    return lambda: list(islice(batches, 1))


def _generator_step(recipe: GeneratorRecipe, folder: Path, where: Where) -> Workload:
    engine = Engine(recipe.training, out=folder, device=where.device.type)
    z, class_ids = _random_latents(recipe, STORED, where)
    nothing: list[str | None] = [None] * STORED
    store = LatentStore(z.half(), [str(i) for i in range(STORED)], [False] * STORED, nothing, nothing, Statistics.of(z))
    task = GeneratorTask(recipe, engine, lambda indices: {"class_ids": class_ids[list(indices)]}, store.statistics)
    batches, steps = LatentLoader(store, batch_size=recipe.training.batch_size, seed=0, device=where.device).batches(), count()
    return lambda: task.step(next(batches), next(steps))


def _generator_loss(recipe: GeneratorRecipe, where: Where) -> tuple[DiT, Callable[[], Tensor]]:
    x0, class_ids = _random_latents(recipe, recipe.training.batch_size, where)
    x0 = x0.to(where.device)
    torch.manual_seed(recipe.training.seed)  # as the task's
    model, process = DiT(recipe.model).to(where.device), build_process(recipe.model.process)
    t, noise = process.sample_times(len(x0), torch.Generator(where.device).manual_seed(0)), torch.randn_like(x0)

    def predict(x: Tensor, time: Tensor) -> Tensor:
        with autocast(where.device, where.precision):
            output: Tensor = model(x, time, class_ids)
        return output

    def loss() -> Tensor:
        return torch.stack([values.mean() for values in process.training_loss(predict, x0, t, noise).values()]).sum()

    return model, loss


def _random_latents(recipe: GeneratorRecipe, count: int, where: Where) -> tuple[Tensor, Tensor]:
    """Standardised latents (count, ...) on the CPU, and their classes (count,)."""
    assert isinstance(recipe.model.condition, ClassLabels)
    z = torch.randn(count, *recipe.model.latents.shape)
    return z, torch.randint(0, recipe.model.condition.num_classes, (count,), device=where.device)
