"""Seconds of every part of the pipeline (Table 5 and more), each apart, and summed up as the paper's two columns."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Literal

import torch
from PIL import Image
from torch import nn

from texttok_cli.bench.generate import generation_rows
from texttok_cli.bench.networks import (
    PATCH_OF_SIZE,
    SAMPLE_SIDE,
    T5_OF_SIZE,
    T5_WIDTH,
    TEXT_TOKENS,
    Half,
    Kind,
    Workload,
    convolution_bytes,
    forward_bytes,
    generator_config,
    materialize,
    rows_of,
    sd_vae_work,
    texttok_work,
    tokenizer_config,
    weights_bytes,
)
from texttok_cli.bench.paper import SD_VAE
from texttok_cli.bench.results import Row
from texttok_cli.bench.task import Task
from texttok_cli.bench.timing import spread_of
from texttok_cli.bench.training import loader_work, recipes, training_rows
from texttok_cli.data import SAMPLE_SET, eval_batches, open_dataset, to_image
from texttok_cli.data.loader import decoding_threads
from texttok_cli.diffusion import plan_sampling
from texttok_cli.errors import BackendError
from texttok_cli.metrics.inception import POOL_DIM, FidInception
from texttok_cli.metrics.statistics import RunningGaussian, frechet_distance
from texttok_cli.models.tokenizer import TexTok

Part = Literal["text", "encode", "decode", "generate", "load", "train", "eval", "caption"]
KINDS: tuple[Kind, ...] = ("TexTok", "Baseline")


def check(task: Task, parts: Sequence[Part]) -> None:
    """RecipeError for a sampling that can't be and a recipe that there is not, before anything is timed."""
    if "generate" in parts:
        plan_sampling(generator_config(task.generator, task.tokens[0]), task.sampling, by_null=True)
    if "train" in parts:
        for _ in recipes(task):
            pass


def latency(task: Task, parts: Sequence[Part]) -> Iterator[Row]:
    """A row for every part, system, size and batch that the task asks for; what does not fit into memory is a row that says so."""
    rows: list[Row] = []
    for part in parts:
        for row in PARTS[part](task):
            rows.append(row)
            yield row
    yield from sums(rows)


# ------------------------------------------------------------------ models


def _text(task: Task) -> Iterator[Row]:
    from texttok_cli.text.t5 import untrained_t5

    for size in task.image_sizes:
        name = T5_OF_SIZE[size]
        row = Row(part="text", system=f"T5-{name}", image_size=size, tokens=TEXT_TOKENS, note="bf16 weights, 128 tokens, all real")
        network = partial(untrained_t5, name)

        def activations(batch: int, width: int = T5_WIDTH[name]) -> float:
            return forward_bytes(batch * TEXT_TOKENS, width, 2)

        def build(network: Callable[[], nn.Module] = network) -> Callable[[int], Workload]:
            encoder = materialize(lambda: network().bfloat16(), task.where)

            def work(batch: int) -> Workload:
                ids = torch.randint(0, 32_000, (batch, TEXT_TOKENS), device=task.where.device)
                return torch.inference_mode()(lambda: encoder(ids, None))

            return work

        yield from task.time_batches(row, TEXT_TOKENS, weights_bytes(network, 2), activations, build)


def _tokenizer(part: Half) -> Callable[[Task], Iterator[Row]]:
    def rows(task: Task) -> Iterator[Row]:
        for size, tokens, kind in product(task.image_sizes, task.tokens, KINDS):
            yield from _texttok(task, part, kind, tokens, size)
        for size in task.image_sizes:
            yield from _sd_vae(task, part, size)

    return rows


def _texttok(task: Task, part: Half, kind: Kind, tokens: int, size: int) -> Iterator[Row]:
    cfg, where = tokenizer_config(kind, tokens, size), task.where
    row = Row(
        part=part, system=f"{kind}-{tokens}", image_size=size, tokens=tokens, note=f"patch {PATCH_OF_SIZE[size]}, {rows_of(cfg)} tokens"
    )

    def activations(batch: int) -> float:
        return forward_bytes(batch * rows_of(cfg), cfg.backbone.width, where.element)

    weights = weights_bytes(lambda: TexTok(cfg), 4)
    yield from task.time_batches(row, rows_of(cfg), weights, activations, partial(texttok_work, part, cfg, where))


def _sd_vae(task: Task, part: Half, size: int) -> Iterator[Row]:
    from texttok_cli.baselines.sd_vae import untrained_sd_vae

    row = Row(part=part, system=SD_VAE, image_size=size, tokens=(size // 8) ** 2)

    try:
        weights = weights_bytes(untrained_sd_vae, 4)
    except BackendError as err:
        yield skipped(row, str(err))
        return
    yield from task.time_batches(
        row, size**2, weights, lambda batch: convolution_bytes(batch, size), partial(sd_vae_work, part, size, task.where)
    )


# ------------------------------------------------------------------ host and metrics


def _load(task: Task) -> Iterator[Row]:
    dataset = open_dataset([SAMPLE_SET])
    note = f"PNG of {SAMPLE_SIDE} px out of a shard"

    def read() -> None:
        for _ in eval_batches(dataset, image_size=SAMPLE_SIDE, batch_size=32):
            pass

    row = Row(
        part="load",
        system="read in order",
        image_size=SAMPLE_SIDE,
        batch=len(dataset),
        note=f"{note}, {decoding_threads()} threads, with sha256",
    )
    yield task.timed(row, read)
    images = torch.cat([batch.images for batch in eval_batches(dataset, image_size=SAMPLE_SIDE, batch_size=32)])
    pictures = list(map(to_image, images))

    def write() -> None:
        for picture in pictures:
            picture.save(io.BytesIO(), format="PNG")

    yield task.timed(Row(part="load", system="write", image_size=SAMPLE_SIDE, batch=len(pictures), note="PNG, to memory"), write)
    for batch in task.batches:
        row = Row(part="load", system="training loader", image_size=SAMPLE_SIDE, batch=batch, note=f"{note}, random order, no workers")
        yield task.timed(row, loader_work(dataset, SAMPLE_SIDE, batch))


def _eval(task: Task) -> Iterator[Row]:
    row = Row(part="eval", system="Inception features", note="uint8 to pool_3, fp32")
    try:
        network = FidInception(offline=True).to(task.where.device)
    except BackendError as err:
        yield skipped(row, str(err))
        return
    for size, batch in product(task.image_sizes, task.batches):
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=task.where.device)
        yield task.timed(row.model_copy(update={"image_size": size, "batch": batch}), lambda images=images: network(images))  # type: ignore[misc]
    features = torch.randn(POOL_DIM + 1, POOL_DIM)
    running = RunningGaussian(POOL_DIM)
    rows = 512
    note = f"{rows} features of {POOL_DIM} into mean and covariance"
    yield task.timed(Row(part="eval", system="statistics", batch=rows, note=note), lambda: running.update(features[:rows]))
    running.update(features)
    mine, other = running.gaussian(), replace(running.gaussian(), covariance=torch.eye(POOL_DIM, dtype=torch.float64))
    yield task.timed(
        Row(part="eval", system="Fréchet distance", note=f"{POOL_DIM} features"), lambda: frechet_distance(mine, other), repeats=1
    )


def _caption(task: Task) -> Iterator[Row]:
    from texttok_cli.captioners.base import CaptionInput
    from texttok_cli.captioners.classifier import Classifier

    row = Row(
        part="caption", system="classifier", image_size=SAMPLE_SIDE, note="EfficientNet-Lite0 in fp32 and words measured from the pixels"
    )
    try:
        captioner = Classifier(device=task.where.device, offline=True)
    except BackendError as err:
        yield skipped(row, str(err))
        return
    for batch in task.batches:
        inputs = [CaptionInput(Image.effect_noise((SAMPLE_SIDE, SAMPLE_SIDE), 64).convert("RGB"))] * batch
        yield task.timed(row.model_copy(update={"batch": batch}), lambda inputs=inputs: captioner(inputs))  # type: ignore[misc]


def skipped(row: Row, reason: str) -> Row:
    """The row without a time, and why."""
    return row.model_copy(update={"skipped": reason})


PARTS: dict[Part, Callable[[Task], Iterator[Row]]] = {
    "text": _text,
    "encode": _tokenizer("encode"),
    "decode": _tokenizer("decode"),
    "generate": generation_rows,
    "load": _load,
    "train": training_rows,
    "eval": _eval,
    "caption": _caption,
}


# ------------------------------------------------------------------ the paper's two columns


def sums(rows: Sequence[Row]) -> Iterator[Row]:
    """Tokenization (text, encode, decode) and generation (text, generate, decode) where every part was measured, as Table 5 has them.

    The Baseline's generator is TexTok's: the same network on as many tokens.
    """
    found = {(row.part, row.system, row.image_size, row.batch): row for row in rows if row.seconds is not None}
    for row in found.values():
        if row.part == "encode":
            yield from _sum(found, row, row.system, "tokenization")
        elif row.part == "generate":
            tokenizer, _, generator = row.system.partition(" + ")
            for name in dict.fromkeys([tokenizer, tokenizer.replace("TexTok", "Baseline")]):
                yield from _sum(found, row.model_copy(update={"system": f"{name} + {generator}"}), name, "generation")


Found = dict[tuple[str, str, int | None, int], Row]


def _sum(found: Found, row: Row, tokenizer: str, name: str) -> Iterator[Row]:
    needed = [("decode", tokenizer)]
    if tokenizer.startswith("TexTok") and row.image_size is not None:
        needed.append(("text", f"T5-{T5_OF_SIZE[row.image_size]}"))
    parts = [row, *(found.get((part, system, row.image_size, row.batch)) for part, system in needed)]
    whole = [part for part in parts if part is not None and part.seconds is not None]
    if len(whole) < len(parts):
        return
    total = sum(part.seconds.median for part in whole if part.seconds is not None)
    note = f"sum of the medians of {' + '.join(part.part for part in whole)}"
    times = max(part.times for part in whole)
    yield row.model_copy(update={"part": name, "seconds": spread_of([total]), "note": note, "times": times})
