"""Whether the loader keeps up with the training step: images a second of the loader alone, on real shards.

    python benchmarks/loader.py SHARD... [--size 128] [-o benchmarks/results/loader.json]

Reads, decodes, crops and batches as `texttok train` does, with 0 and 2 workers, nothing kept in memory. Beside it stands the rate
of the step of the recipe tiny/baseline-32-128 as `benchmarks/step_time.py` measured it (its result file, if it is there).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from texttok_cli.bench.timing import Timer
from texttok_cli.bench.training import loader_work
from texttok_cli.data import open_dataset
from texttok_cli.files import write_json

BATCH, WARM_UP, BATCHES = 32, 4, 60
STEP_TIME = Path(__file__).parent / "results" / "step_time.json"


def main() -> None:
    """Time the loader with each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.inputs, caption_field="measured")
    rates = {}
    for workers in (0, 2):
        work = loader_work(dataset, arguments.size, BATCH, workers=workers)
        for _ in range(WARM_UP):
            work()
        # All batches as one run: workers hand over several at once, so the median of single ones is no rate.
        rates[f"{workers} workers"] = BATCH * BATCHES / Timer().once(partial(_repeat, work, BATCHES))
    result: dict[str, object] = {"images": len(dataset), "size": arguments.size, "loader_images_per_s": rates}
    if STEP_TIME.is_file():
        step = BATCH / json.loads(STEP_TIME.read_text())["seconds_a_step"]["baseline-32-128"]
        result |= {"step_images_per_s": step, "loader_over_step": {name: rate / step for name, rate in rates.items()}}
    print(json.dumps(result, indent=1))
    if arguments.out:
        write_json(arguments.out, result)


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


if __name__ == "__main__":
    main()
