"""bf16 attention on a CPU: torch's fused kernel against `layers._attention_by_heads`, and both against a matmul of a block's size.

    OMP_NUM_THREADS=1 python benchmarks/attention.py [-o benchmarks/results/attention.json]

Processor time of one thread, in turns; shapes are batch, heads, tokens, channels of a head.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from texttok_cli.bench.machine import describe
from texttok_cli.bench.timing import Timer
from texttok_cli.models.layers import _attention_by_heads

SHAPES = {
    "TexTok-B/32, 256 px, 128 text tokens": (1, 12, 1184, 64),
    "the same, batch 8": (8, 12, 1184, 64),
    "texttok-32-128": (32, 4, 136, 64),
    "DiT-XL, 32 tokens": (2, 16, 32, 72),
}


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    timer, rows = Timer("cpu", clock="cpu"), {}
    x, weight = torch.randn(1024, 768, dtype=torch.bfloat16), torch.randn(3072, 768, dtype=torch.bfloat16)
    for name, (batch, heads, tokens, width) in SHAPES.items():
        qkv = torch.randn(batch, tokens, 3 * heads * width, dtype=torch.bfloat16).chunk(3, dim=-1)
        q, k, v = (part.view(batch, tokens, heads, width).transpose(1, 2) for part in qkv)
        works = {
            "fused": partial(F.scaled_dot_product_attention, q, k, v),
            "by_heads": partial(_attention_by_heads, q, k, v, None),
            "matmul": partial(F.linear, x, weight),
        }
        with torch.inference_mode():
            seconds = timer.in_turns(works)
        flops = 4 * batch * heads * tokens**2 * width
        rates = {work: (2 * 1024 * 768 * 3072 if work == "matmul" else flops) / median(seconds[work]) / 1e9 for work in works}
        rows[name] = {"shape": [batch, heads, tokens, width], "gflop_per_s": rates}
        print(name, {work: round(rate) for work, rate in rates.items()})
    if arguments.out:
        record = {"machine": describe(torch.device("cpu"), clock="cpu").model_dump(), "rows": rows}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
