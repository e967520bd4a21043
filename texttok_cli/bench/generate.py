"""Latent generation as it is timed: DiTs with random weights, their sampler, and their bare forward pass.

Letters: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch.nn.attention import sdpa_kernel

from texttok_cli.bench.networks import (
    Where,
    Workload,
    check_fits,
    forward_bytes,
    generator_config,
    grid_generator_config,
    materialize,
    weights_bytes,
)
from texttok_cli.bench.paper import SD_VAE
from texttok_cli.bench.results import Row
from texttok_cli.bench.task import Task, joined
from texttok_cli.config.schema import ClassLabels, GeneratorConfig
from texttok_cli.diffusion import Sampling, plan_sampling, sample
from texttok_cli.models.dit import DiT
from texttok_cli.models.prepared import RECORDABLE

MEASURED_STEPS = {"cpu": 2, "cuda": 50}  # of a run, of all its steps


def generation_rows(task: Task) -> Iterator[Row]:
    """TexTok's tokens with a DiT (the Baseline's generator is the same network), and SD-VAE's map with a DiT of patch 2."""
    for size in task.image_sizes:
        systems = [(f"TexTok-{n} + DiT-{task.generator}", generator_config(task.generator, n)) for n in task.tokens]
        systems.append((f"{SD_VAE} + DiT-{task.generator}/2", grid_generator_config(task.generator, size)))
        for name, cfg in systems:
            yield from _rows(task, name, cfg, size)


def _rows(task: Task, name: str, cfg: GeneratorConfig, size: int) -> Iterator[Row]:
    where, how = task.where, task.sampling
    passes = 1 if str(how.guidance) == "1" else 2
    rows = passes * cfg.latents.sequence_length
    part = replace(how, steps=min(how.steps, MEASURED_STEPS.get(where.device.type, how.steps)))
    note = joined(
        f"{how.sampler}, cfg {how.guidance}, weights in {where.precision}", f"{part.steps} steps run" if part.steps < how.steps else ""
    )
    # Guidance may leave steps unguided, and another share of few steps than of many.
    times = _network_passes(cfg, how) / _network_passes(cfg, part)
    row = Row(part="generate", system=name, image_size=size, tokens=cfg.latents.num_vectors, steps=how.steps, note=note, times=times)

    def activations(batch: int) -> float:
        return forward_bytes(batch * rows, cfg.backbone.width, 4)

    def build() -> Callable[[int], Workload]:
        dit = untrained_dit(cfg, where)
        return lambda batch: guided_sampling(dit, batch, part, where)

    yield from task.time_batches(row, rows, weights_bytes(partial(DiT, cfg), where.element), activations, build)


def _network_passes(cfg: GeneratorConfig, how: Sampling) -> int:
    *_, weights = plan_sampling(cfg, how, by_null=True)
    return sum(1 if weight == 1 else 2 for weight in weights)


def untrained_dit(cfg: GeneratorConfig, where: Where) -> DiT:
    """With its weights in the precision that it computes in. DoesNotFit before anything is allocated."""
    check_fits(weights_bytes(partial(DiT, cfg), where.element), where.device)
    return materialize(lambda: DiT(cfg), where, where.precision)


def guided_sampling(dit: DiT, batch: int, how: Sampling, where: Where) -> Workload:
    """A whole sampling run of a batch, each sample of another class."""
    class_ids = _classes(dit, batch, where)
    return lambda: sample(dit, how, seeds=range(batch), class_ids=class_ids, precision=where.precision)


def guided_forward(dit: DiT, batch: int, where: Where) -> Workload:
    """One forward pass of B samples under their class and B under the null class."""
    class_ids = _classes(dit, batch, where)
    both = torch.cat([class_ids, torch.full_like(class_ids, _num_classes(dit))])
    x = torch.randn(2 * batch, *dit.latent_shape, device=where.device)
    t = torch.full((2 * batch,), 500, device=where.device)
    return where.inference(lambda: dit(x, t, both))


def captured(work: Workload) -> Workload:
    """On a GPU: the work recorded as a CUDA graph, which launches all of its kernels at once."""
    graph = torch.cuda.CUDAGraph()
    with sdpa_kernel(RECORDABLE):
        work()
        with torch.cuda.graph(graph):
            work()
    return graph.replay


def _classes(dit: DiT, batch: int, where: Where) -> torch.Tensor:
    return torch.arange(batch, device=where.device) % _num_classes(dit)


def _num_classes(dit: DiT) -> int:
    assert isinstance(dit.cfg.condition, ClassLabels)
    return dit.cfg.condition.num_classes
