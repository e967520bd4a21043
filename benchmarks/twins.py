"""The bundled tokenizer against its twin without text: PSNR and perceptual distances on held-out images, paired image by image.

    python benchmarks/twins.py SHARD_OR_FOLDER... [-o benchmarks/results/twins.json]

Prints, and writes as JSON, for each input and metric: n, both means, and the mean and standard error of the paired difference.
The perceptual distances of VGG16, which cost far more than the models, are taken of every fourth image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

import texttok_cli
from texttok_cli.config.recipe import LpipsNet
from texttok_cli.data import Dataset, EvalBatch, eval_batches, open_dataset
from texttok_cli.data.texts import texts_for
from texttok_cli.files import write_json
from texttok_cli.inference import Tokenizer
from texttok_cli.losses import Perceptual
from texttok_cli.metrics.image import psnr

MODELS = ("texttok-32-128", "baseline-32-128")
EVERY: Final[dict[LpipsNet, int]] = {"lpips-alex": 1, "lpips-vgg": 4, "stlpips-vgg": 4}  # of how many images one is measured


def main() -> None:
    """Measure every input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    tokenizers = [texttok_cli.load_tokenizer(name) for name in MODELS]
    result = {
        "models": {t.info.name: {"sha256": t.info.sha256, **t.info.header.training} for t in tokenizers},
        "precision": "fp32",
        "sets": {Path(name).stem: measure(open_dataset([name], caption_field="measured"), tokenizers) for name in arguments.inputs},
    }
    print(json.dumps(result["sets"], indent=1))
    if arguments.out:
        write_json(arguments.out, result)


def measure(dataset: Dataset, tokenizers: list[Tokenizer]) -> dict[str, object]:
    """All metrics of both models on one data set."""
    networks = {net: Perceptual(net) for net in EVERY}
    values: dict[str, list[list[Tensor]]] = {metric: [[], []] for metric in ("psnr_db", *EVERY)}
    for batch, outputs in _reconstructions(dataset, tokenizers):
        for i, output in enumerate(outputs):
            values["psnr_db"][i].append(psnr(batch.images, output))
            for net, distance in networks.items():
                chosen = batch.indices % EVERY[net] == 0
                if chosen.any():
                    with torch.no_grad():
                        values[net][i].append(distance(batch.images[chosen] / 255, output[chosen] / 255).double())
    return {metric: _compared(*(torch.cat(parts) for parts in both)) for metric, both in values.items()}


def _compared(text: Tensor, none: Tensor) -> dict[str, float]:
    difference = text - none
    return {
        "n": len(difference),
        MODELS[0]: text.mean().item(),
        MODELS[1]: none.mean().item(),
        "difference": difference.mean().item(),
        "standard_error": (difference.std() / len(difference) ** 0.5).item(),
    }


def _reconstructions(dataset: Dataset, tokenizers: list[Tokenizer]) -> Iterator[tuple[EvalBatch, list[Tensor]]]:
    """Batches with what each model makes of them, uint8."""
    for batch in eval_batches(dataset, image_size=tokenizers[0].cfg.image_size, batch_size=32):
        items = [dataset.items[i] for i in batch.indices.tolist()]
        outputs = []
        for tokenizer in tokenizers:
            captions = texts_for(items, tokenizer.text_condition) if tokenizer.text_condition else None
            outputs.append(tokenizer.decode(tokenizer.encode(batch.images, captions), captions))
        yield batch, outputs


if __name__ == "__main__":
    main()
