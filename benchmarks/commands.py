"""Where each command's time goes: processor seconds of one more image, beside those of the networks alone on tensors.

    OMP_NUM_THREADS=1 python benchmarks/commands.py SHARD [--runs 3] -o benchmarks/results/commands.json

Each command runs on the shard's first 64 and first 192 images; the difference is what an image costs once the program has started,
what is left of the first run its start (`start_s`). The networks run in the commands' batches in this process, in turns with the commands.
Processor seconds, as the kernel counts them for a process and its workers: other work on the machine changes them little. Captions are
the shard's measured ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich import print as show

from texttok_cli import load_generator
from texttok_cli.bench.generate import guided_forward
from texttok_cli.bench.machine import describe
from texttok_cli.bench.networks import Where
from texttok_cli.bench.timing import Timer
from texttok_cli.bench.training import bare_step
from texttok_cli.captioners.classifier import Classifier
from texttok_cli.config.loader import load_recipe
from texttok_cli.data import open_dataset
from texttok_cli.files import write_json
from texttok_cli.metrics.evaluator import Evaluator

FEW, MANY, BATCH = 64, 192, 32
CAPTION_BATCH = 16  # of `caption`
RECIPE = "tiny/texttok-32-128"
STEPS = 25  # of the bundled generator's sampler


def main(shard: Path, out: Annotated[Path, typer.Option("--out", "-o")], runs: int = 3) -> None:
    """Time every command and its networks."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for count in (FEW, MANY):
            _first(shard, count, place / f"{count}.tar")
            _run(place, "encode", f"{count}.tar", "--caption-field", "measured", "-o", f"tokens-{count}")
            _run(place, "decode", f"tokens-{count}", "-o", f"images-{count}")
        alone = networks(place / f"{FEW}.tar")
        seconds: dict[str, dict[str, list[float]]] = {name: {"few": [], "many": [], "alone": []} for name in COMMANDS}
        for run in range(runs):
            for name, command in COMMANDS.items():
                for size, count in (("few", FEW), ("many", MANY)):
                    arguments = [part.format(n=count, steps=count // BATCH) for part in command.split()]
                    seconds[name][size].append(_run(place, *arguments, "-o" if arguments[0] != "train" else "--out", f"out-{run}-{count}"))
                    _remove(place / f"out-{run}-{count}")
                seconds[name]["alone"].append(sum(alone[part]() for part in NETWORKS[name]))
    rows = {name: _row(**measured) for name, measured in seconds.items()}
    show(rows)
    write_json(out, {"machine": describe(torch.device("cpu"), clock="cpu").model_dump(mode="json"), "commands": rows})


COMMANDS = {  # -o OUT is added
    "caption": "caption {n}.tar",
    "encode": "encode {n}.tar --caption-field measured",
    "encode --flips": "encode {n}.tar --caption-field measured --flips",
    "decode": "decode tokens-{n}",
    "eval --model": "eval --metric rfid,psnr,ssim --data {n}.tar --caption-field measured",
    "eval --samples": "eval --metric fid --samples images-{n} --ref {n}.tar",
    "sample --class": "sample --class flower/tulip -n {n}",
    "train": f"train {RECIPE} data.train={{n}}.tar schedule.steps={{steps}} training.val_every=1000",
}
NETWORKS = {
    "caption": ["classifier"],
    "encode": ["text", "encode"],
    "encode --flips": ["text", "encode", "encode"],
    "decode": ["text", "decode"],
    "eval --model": ["text", "encode", "decode", "inception", "inception"],
    "eval --samples": ["inception", "inception"],
    "sample --class": ["text", "denoise", "decode"],
    "train": ["text", "train"],
}


def _row(few: list[float], many: list[float], alone: list[float]) -> dict[str, float]:
    each = [(m - f) / (MANY - FEW) for f, m in zip(few, many, strict=True)]
    start = [f - FEW * e for f, e in zip(few, each, strict=True)]
    share = median(a / e for a, e in zip(alone, each, strict=True))
    return {
        "start_s": median(start),
        "ms_an_image": 1e3 * median(each),
        "networks_ms_an_image": 1e3 * median(alone),
        "networks_share": share,
    }


# ------------------------------------------------------------------ the commands


def _first(shard: Path, count: int, into: Path) -> None:
    """A shard of the first `count` samples of two files each."""
    with tarfile.open(shard) as source, tarfile.open(into, "w") as target:
        for member in source.getmembers()[: 2 * count]:
            target.addfile(member, source.extractfile(member))


def _run(folder: Path, *arguments: str) -> float:
    """Processor seconds of `texttok ARGUMENTS` in the folder, its workers' included."""
    with (folder / "said.txt").open("w+") as said:
        command = [sys.executable, "-m", "texttok_cli", *arguments, "--device", "cpu", "--offline", "--quiet"]
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(arguments)}: failed\n{(folder / 'said.txt').read_text()}")
    return usage.ru_utime + usage.ru_stime


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


# ------------------------------------------------------------------ the networks


def networks(shard: Path) -> dict[str, Callable[[], float]]:
    """Processor seconds an image of each network on a batch of tensors, by its name."""
    dataset = open_dataset([str(shard)], caption_field="measured")
    captions = [str(item.caption) for item in dataset.items]
    generator = load_generator("class-32-128", device="cpu", offline=True)
    tokenizer = generator.tokenizer
    assert tokenizer.text is not None
    encoder, model = tokenizer.text.encoder, tokenizer.model
    batches = cycle([captions[:BATCH], captions[BATCH:]])
    images = torch.rand(BATCH, 3, 128, 128) * 2 - 1
    cond = encoder(captions[:BATCH])
    z = model.encode(images, cond).z
    classifier, inception = Classifier(offline=True).network, Evaluator(["fid"], offline=True).inception
    assert inception is not None
    where = Where(torch.device("cpu"), "fp32")
    forward = guided_forward(generator.dit, BATCH, where)
    step = bare_step(load_recipe(RECIPE, ["training.precision=bf16"]), Where(torch.device("cpu"), "bf16"))
    uint8, square = torch.randint(0, 256, (BATCH, 3, 128, 128), dtype=torch.uint8), torch.rand(CAPTION_BATCH, 3, 224, 224)
    works: dict[str, Callable[[], object]] = {
        "text": lambda: encoder(next(batches)),
        "encode": lambda: model.encode(images, cond),
        "decode": lambda: model.decode(z, cond),
        "classifier": lambda: classifier(square),
        "inception": lambda: inception(uint8),
        "denoise": lambda: [forward() for _ in range(STEPS)],
    }
    timer = Timer(clock="cpu", repeats=3)
    works = {name: torch.inference_mode()(work) for name, work in works.items()} | {"train": step}

    def timed(name: str) -> Callable[[], float]:
        return lambda: timer.measure(works[name]).median / (CAPTION_BATCH if name == "classifier" else BATCH)

    return {name: timed(name) for name in works}


if __name__ == "__main__":
    typer.run(main)
