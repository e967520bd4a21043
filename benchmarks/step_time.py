"""What a training step of the bundled twins costs: seconds for a batch, with text and without, in one run.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py [-o benchmarks/results/step_time.json]

Forward, backward and optimizer step of the recipes tiny/texttok-32-128 and tiny/baseline-32-128 on random images and random text
padded to 40 tokens, compiled, bf16; median of the steps after the warm-up. Loading images and text is not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from texttok_cli.bench.networks import Where
from texttok_cli.bench.timing import Timer
from texttok_cli.bench.training import bare_step
from texttok_cli.config.loader import load_recipe
from texttok_cli.files import write_json

WARM_UP, STEPS = 3, 15


def main() -> None:
    """Time both twins, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path)
    out = parser.parse_args().out
    where = Where(torch.device("cpu"), "bf16")
    steps = {name: bare_step(load_recipe(f"tiny/{name}"), where) for name in ("texttok-32-128", "baseline-32-128")}
    times = Timer(where.device, warm_up=WARM_UP, repeats=STEPS).in_turns(steps)
    seconds = {name: statistics.median(values) for name, values in times.items()}
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
        write_json(out, result)


if __name__ == "__main__":
    main()
