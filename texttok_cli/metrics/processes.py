"""One process of a run, alone or one of those that `accelerate launch` or torchrun started."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from texttok_cli.errors import DataError
from texttok_cli.metrics.evaluator import Evaluator

T = TypeVar("T")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what every launcher sets


class Processes:
    """Which process this is, and what they tell each other. The launcher says it in the environment; an empty one is of a process alone."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """DataError for an environment that names no process of a run: it would do the share of none, and say nothing."""
        rank, size = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise DataError(f"RANK={rank} and WORLD_SIZE={size} in the environment name no process of a run: unset both, or use a launcher")
        self.rank, self.size = int(rank), int(size)
        missing = [name for name in LAUNCHER if name not in environment]
        if missing and (self.size > 1 or "LOCAL_RANK" in environment):
            there = ", ".join(name for name in LAUNCHER if name not in missing)
            raise DataError(f"the environment has {there}, but not {', '.join(missing)}: unset what is left over, or use a launcher")

    def device(self, asked: str) -> str:
        """The device asked for, or of several processes this one's own GPU. DataError for more processes than GPUs."""
        if self.size == 1 or asked not in ("auto", "cuda") or not torch.cuda.is_available():
            return asked
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise DataError(f"process {local + 1} of this machine has no GPU of its own ({gpus} here): start as many processes as GPUs")
        return f"cuda:{local}"

    def join(self) -> None:
        """Let the processes reach each other. The first to be done waits for the last."""
        if self.size > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=1))

    def merge(self, evaluators: Sequence[Evaluator]) -> None:
        """Bring what all processes found into the first one's evaluators."""
        if self.size == 1:
            return
        self.join()  # over gloo: what was found is on the CPU, wherever it was computed
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object([(evaluator.evidence, evaluator.truncated) for evaluator in evaluators], found)
        for others in (found or [])[1:]:
            for evaluator, (evidence, truncated) in zip(evaluators, others, strict=True):
                evaluator.evidence.merge(evidence)
                if evaluator.clip is not None:
                    evaluator.clip.truncated += truncated

    def share(self, value: T | None) -> T:
        """After `merge`: what the first process has, in all of them."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box)
        assert box[0] is not None
        return box[0]

    def finish(self) -> None:
        """After `join` or `merge`: wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()
