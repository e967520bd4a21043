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

from texttok_cli.bench.results import Row
from texttok_cli.bench.subjects import DoesNotFit, Where, check_fits, rows_of, weights_bytes
from texttok_cli.bench.task import Task, Work, joined
from texttok_cli.config.loader import AnyRecipe, load_recipe
from texttok_cli.config.recipe import GeneratorRecipe, TokenizerRecipe
from texttok_cli.config.schema import ClassLabels, GeneratorConfig, TextCondition, TokenizerConfig, Transformer
from texttok_cli.data import Batch, Dataset, TrainLoader, normalize
from texttok_cli.data.latents import LatentLoader, LatentStore
from texttok_cli.diffusion import build_process
from texttok_cli.losses import l2
from texttok_cli.models.condition import Condition
from texttok_cli.models.dit import DiT
from texttok_cli.models.tokenizer import TexTok
from texttok_cli.token_folder import Statistics
from texttok_cli.training.engine import Engine
from texttok_cli.training.generator_task import GeneratorTask
from texttok_cli.training.optim import build_optimizers
from texttok_cli.training.tokenizer_task import TokenizerTask

STATE = 5  # fp32 copies of the weights: themselves, EMA, gradients and two moments
STORED = 2048  # latents in memory that batches are drawn from
# Losses that need weights of others are left out of the steps that are timed; compiling takes longer than timing.
L2_ALONE = ("objective.perceptual=null", "objective.adversarial=null", "training.compile=false")


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
        if isinstance(recipe, GeneratorRecipe):
            wanted = partial(generator_bytes, recipe.model, where=task.where)
            yield from _rows(task, row, recipe.model.latents.sequence_length, wanted, generator_steps)
        else:
            needed = partial(tokenizer_bytes, recipe.model, where=task.where)
            yield from _rows(task, row, rows_of(recipe.model), needed, tokenizer_steps)


Steps = Callable[[str, int, Path, Where], tuple[Work, Work]]


def _rows(task: Task, row: Row, rows: int, needed: Callable[[int], float], steps: Steps) -> Iterator[Row]:
    """A row for each batch size, of images that are `rows` matrix rows each."""
    for batch in task.batches:
        part = task.part_of(batch, rows)
        said = joined(row.note, "forward, backward, optimizer, EMA", f"{part} of {batch} images run, multiplied" if part < batch else "")
        this = row.model_copy(update={"batch": batch, "note": said})
        try:
            check_fits(needed(part), task.where.device)
        except DoesNotFit as err:
            yield this.model_copy(update={"skipped": str(err)})
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield task.timed(this, steps(row.system, part, Path(folder), task.where)[0], times=batch / part)


def tokenizer_bytes(cfg: TokenizerConfig, batch: int, *, where: Where) -> float:
    """Of a training step: weights, EMA, gradients and moments, those of the bare model beside it, and what the backward pass reads."""
    return 2 * STATE * weights_bytes(partial(TexTok, cfg), 4) + 2 * kept_bytes(cfg.backbone, batch, rows_of(cfg), where)


def generator_bytes(cfg: GeneratorConfig, batch: int, *, where: Where) -> float:
    """As `tokenizer_bytes`."""
    return 2 * STATE * weights_bytes(partial(DiT, cfg), 4) + kept_bytes(cfg.backbone, batch, cfg.latents.sequence_length, where)


def kept_bytes(backbone: Transformer, batch: int, rows: int, where: Where) -> float:
    """Upper estimate of what a transformer keeps for its backward pass: 40 vectors a token and block, on a CPU the attention weights."""
    vectors = 40 * rows * backbone.width * where.element
    attention = backbone.heads * rows**2 * (4 + 2 * where.element) if where.device.type == "cpu" else 0
    return backbone.depth * batch * (vectors + attention)


def tokenizer_steps(recipe_name: str, batch: int, folder: Path, where: Where) -> tuple[Work, Work]:
    """The program's training step on random images and text, and a bare forward, backward and optimizer step of an equal model."""
    recipe = load_recipe(recipe_name, [*L2_ALONE, f"training.batch_size={batch}", f"training.precision={where.precision}"])
    assert isinstance(recipe, TokenizerRecipe), recipe_name
    engine = Engine(recipe.training, out=folder, device=where.device.type)
    images, cond = _random_batch(recipe, where)
    task = TokenizerTask(recipe, engine, lambda indices: {"cond": cond}, None)
    whole, steps = Batch(images, torch.arange(batch)), count()
    return lambda: task.step(whole, next(steps)), _bare_step(recipe, images, cond, where)


def bare_tokenizer_step(recipe: TokenizerRecipe, where: Where) -> Work:
    """Forward, backward and optimizer on random images and text by l2 alone, of a model that is compiled if the recipe says so."""
    return _bare_step(recipe, *_random_batch(recipe, where), where)


def _bare_step(recipe: TokenizerRecipe, images: Tensor, cond: Condition | None, where: Where) -> Work:
    torch.manual_seed(recipe.training.seed)  # as the task's
    model = TexTok(recipe.model).to(where.device)
    optimizers = build_optimizers(list(model.parameters()), model.block_matrices(), recipe.optimizer)
    network = torch.compile(model, dynamic=False) if recipe.training.compile else model

    def step() -> Tensor:
        x = normalize(images.to(where.device))
        with where.autocast():
            output, _ = network(x, cond)
        loss = l2((x + 1) / 2, (output.float() + 1) / 2)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _random_batch(recipe: TokenizerRecipe, where: Where) -> tuple[Tensor, Condition | None]:
    """Images uint8 (B, 3, H, W), and text tokens (B, T, C) of different lengths, as captions are: half of the longest to the longest."""
    cfg, batch = recipe.model, recipe.training.batch_size
    images = torch.randint(0, 256, (batch, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8)
    if not isinstance(cfg.condition, TextCondition):
        return images, None
    longest, width = cfg.condition.encoder.max_tokens, cfg.condition.encoder.dim
    lengths = torch.linspace(longest // 2, longest, batch).long()
    return images, Condition(torch.randn(batch, longest, width), torch.arange(longest) < lengths[:, None]).to(where.device)


def loader_work(dataset: Dataset, image_size: int, batch: int, *, workers: int = 0) -> Work:
    """The training loader's next batch of these images."""
    loader = TrainLoader(dataset, image_size=image_size, batch_size=batch, seed=0, flip=True, workers=workers)
    batches = loader.batches()
    return lambda: list(islice(batches, 1))


def generator_steps(recipe_name: str, batch: int, folder: Path, where: Where) -> tuple[Work, Work]:
    """The program's step of a class-conditional generator on the next batch of latents in memory, and a bare one of an equal model.

    The bare step knows its latents, classes, times and noise beforehand.
    """
    recipe = load_recipe(recipe_name, ["training.compile=false", f"training.batch_size={batch}", f"training.precision={where.precision}"])
    assert isinstance(recipe, GeneratorRecipe) and isinstance(recipe.model.condition, ClassLabels), recipe_name
    engine = Engine(recipe.training, out=folder, device=where.device.type)
    z = torch.randn(STORED, *DiT(recipe.model).latent_shape)
    nothing: list[str | None] = [None] * STORED
    store = LatentStore(z.half(), [str(i) for i in range(STORED)], [False] * STORED, nothing, nothing, Statistics.of(z))
    class_ids = torch.randint(0, recipe.model.condition.num_classes, (STORED,), device=where.device)
    task = GeneratorTask(recipe, engine, lambda indices: {"class_ids": class_ids[list(indices)]}, store.statistics)
    batches, steps = LatentLoader(store, batch_size=batch, seed=0, device=where.device).batches(), count()
    return lambda: task.step(next(batches), next(steps)), _bare_generator_step(recipe, z[:batch].to(where.device), class_ids[:batch], where)


def _bare_generator_step(recipe: GeneratorRecipe, x0: Tensor, class_ids: Tensor, where: Where) -> Work:
    torch.manual_seed(recipe.training.seed)  # as the task's
    model, process = DiT(recipe.model).to(where.device), build_process(recipe.model.process)
    optimizers = build_optimizers(list(model.parameters()), model.block_matrices(), recipe.optimizer)
    t, noise = process.sample_times(len(x0), torch.Generator(where.device).manual_seed(0)), torch.randn_like(x0)

    def predict(x: Tensor, time: Tensor) -> Tensor:
        with where.autocast():
            output: Tensor = model(x, time, class_ids)
        return output

    def step() -> Tensor:
        loss = torch.stack([values.mean() for values in process.training_loss(predict, x0, t, noise).values()]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
