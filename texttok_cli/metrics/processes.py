"""One process of an evaluation or a sampling run, alone or one of those that `accelerate launch` or torchrun started."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from texttok_cli.errors import DataError
from texttok_cli.files import load_safetensors, save_safetensors
from texttok_cli.metrics.evaluator import Batch, Evaluator, Work

SAVE_EVERY = 60.0  # seconds between saved states


class Processes:
    """Which process this is, and what they tell each other. The launcher says it in the environment."""

    def __init__(self) -> None:
        """DataError for an environment that names no process of a run: it would do the share of none, and say nothing."""
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise DataError(f"RANK={rank} and WORLD_SIZE={size} in the environment name no process of a run: unset both, or use a launcher")
        self.rank, self.size = int(rank), int(size)

    def device(self, asked: str) -> str:
        """The device asked for, or of several processes this one's own GPU. DataError for more processes than GPUs."""
        if self.size == 1 or asked not in ("auto", "cuda") or not torch.cuda.is_available():
            return asked
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise DataError(f"process {local + 1} of this machine has no GPU of its own ({gpus} here): start as many processes as GPUs")
        return f"cuda:{local}"

    def join(self) -> None:
        """Let the processes reach each other. The first to be done waits for the last."""
        if self.size > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=1))

    def merge(self, evaluators: Sequence[Evaluator]) -> list[int]:
        """Bring what all processes found into the first one's evaluators. Returns there how many captions CLIP cut off for each, of all."""
        truncated = [_truncated(evaluator) for evaluator in evaluators]
        if self.size == 1:
            return truncated
        self.join()  # over gloo: what was found is on the CPU, wherever it was computed
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object([(evaluator.evidence, count) for evaluator, count in zip(evaluators, truncated, strict=True)], found)
        for others in (found or [])[1:]:
            for number, (evidence, count) in enumerate(others):
                evaluators[number].evidence.merge(evidence)
                truncated[number] += count
        return truncated

    def finish(self) -> None:
        """After `join` or `merge`: wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def run_pass(
    evaluator: Evaluator,
    work: Work,
    *,
    batch_size: int,
    state: Path | None,
    identity: Mapping[str, Any],
    on_resume: Callable[[int], None],
    on_batch: Callable[[Batch], None],
    more: bool = False,
) -> None:
    """See all of the work; with a `state` file go on from it, and save to it from time to time, and at the end if `more` passes follow.

    `on_resume` learns how many images were seen before. A state of another evaluation (its `identity` differs) is DataError:
    it may hold hours of somebody's work.
    """
    identity = json.loads(json.dumps(identity))  # as it is read again
    done = 0
    if state is not None and state.exists():
        done = _restore(evaluator, state, identity, len(work))
        on_resume(done)
    saved = time.monotonic()
    for batch in work.batches(batch_size, start=done):
        evaluator.update(batch)
        done += len(batch)
        on_batch(batch)
        if state is not None and (time.monotonic() - saved > SAVE_EVERY or (more and done == len(work))):
            header = {"identity": identity, "done": done, "truncated": _truncated(evaluator)}
            save_safetensors(state, evaluator.evidence.state(), header)
            saved = time.monotonic()


def _truncated(evaluator: Evaluator) -> int:
    return 0 if evaluator.clip is None else evaluator.clip.truncated


def _restore(evaluator: Evaluator, state: Path, identity: Mapping[str, Any], images: int) -> int:
    header, tensors = load_safetensors(state, error=DataError)
    if header.get("identity") != identity:
        raise DataError(f"{state}: is the state of another evaluation; remove it to start again, or give this one another -o OUT")
    try:
        evaluator.evidence.load(tensors)
        truncated, done = int(header["truncated"]), int(header["done"])
        if not 0 <= done <= images:
            raise ValueError
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise DataError(f"{state}: is damaged; remove it to start again") from None
    if evaluator.clip is not None:
        evaluator.clip.truncated = truncated
    return done
