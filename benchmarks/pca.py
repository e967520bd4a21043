"""What a linear code of as many numbers can do: PSNR of principal components, to hold a tokenizer's beside.

    python benchmarks/pca.py --train 'photos128-train-{0000..0009}.tar' --val photos128-val-0000.tar -o benchmarks/results/pca.json

Components of the training images and their mirrored copies at half size (what the first few hundred lose by that is little), by randomised
SVD; reconstructions are scaled up bilinearly. PSNR is the mean of each image's dB over uint8 pixels, as everywhere here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from texttok_cli.data import eval_batches, open_dataset, to_uint8
from texttok_cli.files import write_json
from texttok_cli.metrics.image import psnr

SIZE, HALF = 128, 64
COMPONENTS = (64, 128, 256)  # 256: the numbers in 32 tokens of 8 channels
SPARE = 44  # more directions than are kept make the last of them exact


def main() -> None:
    """Fit, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = torch.cat([halved(images) for images in batches(arguments.train)])  # (n, 3, 64, 64)
    rows = torch.cat([rows, rows.flip(3)]).flatten(1)
    mean = rows.mean(0)
    *_, directions = torch.svd_lowrank(rows.sub_(mean), q=max(COMPONENTS) + SPARE, niter=3)  # (D, q)
    values: dict[int, list[Tensor]] = {count: [] for count in COMPONENTS}
    for images in batches(arguments.val):
        code = (halved(images).flatten(1) - mean) @ directions
        for count, parts in values.items():
            flat = code[:, :count] @ directions[:, :count].T + mean
            again = F.interpolate(flat.view(-1, 3, HALF, HALF), size=SIZE, mode="bilinear")
            parts.append(psnr(images, to_uint8(2 * again - 1)))
    result = {
        "train_images": len(rows) // 2,
        "val_images": sum(map(len, values[COMPONENTS[0]])),
        "psnr_db": {str(count): torch.cat(parts).double().mean().item() for count, parts in values.items()},
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        write_json(arguments.out, result)


def batches(inputs: str) -> Iterator[Tensor]:
    """The images of a data set, uint8 (B, 3, 128, 128)."""
    for batch in eval_batches(open_dataset([inputs]), image_size=SIZE, batch_size=256):
        yield batch.images


def halved(images: Tensor) -> Tensor:
    """uint8 (B, 3, 128, 128) -> float in [0, 1], (B, 3, 64, 64)."""
    return F.avg_pool2d(images.float() / 255, 2)


if __name__ == "__main__":
    main()
