"""The README's picture: four photographs, what the bundled tokenizer makes of them, and its twin without text.

python benchmarks/gallery.py [OUT.png]        # default benchmarks/results/reconstructions.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from texttok_cli import load_tokenizer
from texttok_cli.data import center_crop, load_image, save_png, to_image, to_tensor
from texttok_cli.metrics.image import psnr

HERE = Path(__file__).parent
CAPTIONS = {
    "coffee.png": "a photo of a cup of coffee on a wooden table, mostly brown and white in the middle, brown towards the edges",
    "chelsea.png": "a photo of a cat, mostly brown and beige in the middle, grey towards the edges, moderately detailed",
    "astronaut.png": "a photo of an astronaut in an orange suit in front of a flag, mostly orange and black in the middle",
    "rocket.jpg": "a photo of a rocket launch at dusk, mostly dark grey in the middle, black towards the edges, dim",
}


def main() -> None:
    """Draw the rows, and print each photograph's PSNR."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results" / "reconstructions.png"
    text, twin = load_tokenizer("texttok-32-128"), load_tokenizer("baseline-32-128")
    size, captions = text.cfg.image_size, list(CAPTIONS.values())
    files = [HERE / "images" / name for name in CAPTIONS]
    originals = torch.stack([to_tensor(center_crop(load_image(file.read_bytes(), name=file.name), size)) for file in files])
    with_text = text.decode(text.encode(originals, captions), captions)
    without = twin.decode(twin.encode(originals))
    for name, a, b in zip(CAPTIONS, psnr(originals, with_text), psnr(originals, without), strict=True):
        print(f"{name}: {a:.2f} dB with text, {b:.2f} dB without")
    rows = [torch.cat(list(row), dim=2) for row in (originals, with_text, without)]  # (3, S, 4S) each
    picture = to_image(torch.cat(rows, dim=1))
    save_png(out, picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST))


if __name__ == "__main__":
    main()
