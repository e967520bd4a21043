"""What a training step of the bundled twins costs: seconds for a batch, with text and without, in one run.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py [-o benchmarks/results/step_time.json]

Forward, backward and optimizer step of the recipes tiny/texttok-32-128 and tiny/baseline-32-128 on random images and random text
padded to 40 tokens, compiled, bf16; median of the steps after the warm-up. Loading images and text is not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from texttok_cli.config.loader import load_recipe
from texttok_cli.config.schema import TextCondition, TokenizerRecipe
from texttok_cli.models.condition import Condition
from texttok_cli.models.tokenizer import TexTok
from texttok_cli.training.optim import build_optimizers

WARM_UP, STEPS = 3, 15


def main() -> None:
    """Time both twins, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path)
    out = parser.parse_args().out
    steps = {name: _step(load_recipe(f"tiny/{name}")) for name in ("texttok-32-128", "baseline-32-128")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + STEPS):
        for name, step in steps.items():
            before = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - before)
    seconds = {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}
    result = {
        "seconds_a_step": seconds,
        "ratio": seconds["texttok-32-128"] / seconds["baseline-32-128"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "steps": STEPS,
    }
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def _step(recipe: TokenizerRecipe) -> Callable[[], None]:
    torch.manual_seed(0)
    model = TexTok(recipe.model)
    optimizers = build_optimizers(list(model.parameters()), model.block_matrices(), recipe.optimizer)
    compiled = torch.compile(model, dynamic=False)
    n = recipe.training.batch_size
    images = torch.rand(n, 3, recipe.model.image_size, recipe.model.image_size) * 2 - 1
    cond = None
    if isinstance(recipe.model.condition, TextCondition):
        encoder = recipe.model.condition.encoder
        lengths = torch.linspace(encoder.max_tokens // 2, encoder.max_tokens, n).long()  # padded, as captions are
        cond = Condition(torch.randn(n, encoder.max_tokens, encoder.dim), torch.arange(encoder.max_tokens) < lengths[:, None])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = compiled(images, cond)
        (output.float() - images).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
