"""bf16 attention on a CPU: torch's fused kernel against the formula as `layers` writes it out, and both against a matmul of a block's size.

    OMP_NUM_THREADS=1 python benchmarks/attention.py [-o benchmarks/results/attention.json]

Processor time of one thread, in turns; shapes are batch, heads, tokens, channels of a head. `layers.fused_is_faster` decides by
what this finds: without AMX the formula, with AMX the kernel, in training for many tokens only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from texttok_cli.bench.machine import describe
from texttok_cli.bench.timing import Timer
from texttok_cli.files import write_json
from texttok_cli.models.layers import _attention_by_heads, _explicit_attention

SHAPES = {
    "TexTok-B/32, 256 px, 128 text tokens": (1, 12, 1184, 64),
    "the same, batch 8": (8, 12, 1184, 64),
    "texttok-32-128": (32, 4, 136, 64),
    "DiT-XL, 32 tokens": (2, 16, 32, 72),
}
TRAINED = {
    "TexTok-B/32, 256 px, 128 text tokens, forward and backward": (1, 12, 1184, 64),
    "256 tokens, forward and backward": (8, 12, 256, 64),
    "texttok-32-128, forward and backward": (32, 4, 136, 64),
}


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    timer, rows = Timer("cpu", clock="cpu"), {}
    x, weight = torch.randn(1024, 768, dtype=torch.bfloat16), torch.randn(3072, 768, dtype=torch.bfloat16)
    for name, (batch, heads, tokens, width) in (SHAPES | TRAINED).items():
        training = name in TRAINED
        qkv = torch.randn(batch, tokens, 3 * heads * width, dtype=torch.bfloat16, requires_grad=training).chunk(3, dim=-1)
        q, k, v = (part.view(batch, tokens, heads, width).transpose(1, 2) for part in qkv)
        works: dict[str, Callable[[], Any]] = {"fused": partial(F.scaled_dot_product_attention, q, k, v)}
        if training:
            works["explicit"] = partial(_explicit_attention, q, k, v, None)
            works = {work: partial(_backward, forward, [q, k, v]) for work, forward in works.items()}
        else:
            works["by_heads"] = partial(_attention_by_heads, q, k, v, None)
        works["matmul"] = partial(F.linear, x, weight)
        with torch.inference_mode(not training):
            seconds = timer.in_turns(works)
        flops = (12 if training else 4) * batch * heads * tokens**2 * width
        rates = {work: (2 * 1024 * 768 * 3072 if work == "matmul" else flops) / median(seconds[work]) / 1e9 for work in works}
        rows[name] = {"shape": [batch, heads, tokens, width], "gflop_per_s": rates}
        print(name, {work: round(rate) for work, rate in rates.items()})
    if arguments.out:
        record = {"machine": describe(torch.device("cpu"), clock="cpu").model_dump(), "rows": rows}
        write_json(arguments.out, record)


def _backward(forward: Callable[[], Any], inputs: list[Tensor]) -> None:
    torch.autograd.grad(forward().sum(), inputs)


if __name__ == "__main__":
    main()
