"""The main job on a real picture: a photograph and its caption to 32 tokens and back, beside the twin without text.

    python benchmarks/demo.py [OUT]        # `make demo` runs this

Writes OUT (default demo/): coffee.tok.safetensors, coffee.rec.png, and side-by-side.png: what was encoded, what came back.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from texttok_cli import load_tokenizer, load_tokens
from texttok_cli.data import center_crop, load_image, to_tensor
from texttok_cli.main import main as texttok
from texttok_cli.metrics.image import psnr

PHOTO = Path(__file__).parent / "images" / "coffee.png"
CAPTION = "a photo of a cup of coffee on a wooden table, mostly brown and white in the middle, brown towards the edges"


def run(*arguments: str) -> None:
    """A command line as a person types it, in this process; a failure ends the demo."""
    print("$ texttok", *(f'"{a}"' if " " in a else a for a in arguments), flush=True)
    sys.argv = ["texttok", *arguments]
    try:
        texttok()
    except SystemExit as stop:
        if stop.code:
            raise


def main() -> None:
    """Encode, decode, and say what came of it."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    tokens, decoded = out / "coffee.tok.safetensors", out / "coffee.rec.png"
    run("encode", str(PHOTO), "--caption", CAPTION, "-o", str(tokens), "--offline")
    run("decode", str(tokens), "-o", str(decoded), "--offline")

    stored = load_tokens(tokens)
    side = stored.header.image_size
    original = to_tensor(center_crop(load_image(PHOTO.read_bytes(), name=PHOTO.name), side))[None]
    with_text = to_tensor(Image.open(decoded))[None]
    twin = load_tokenizer("baseline-32-128")
    without_text = twin.decode(twin.encode(PHOTO))

    pixels = 3 * side * side
    text = stored.caption_bytes
    ratio, honest_ratio = pixels / stored.token_bytes, pixels / (stored.token_bytes + text)
    print(f"\n{stored.z.shape[1]} tokens of {stored.z.shape[2]} channels: {stored.token_bytes} bytes for {pixels:,} bytes of pixels")
    print(f"compression {ratio:.0f}x, or {honest_ratio:.0f}x with the caption's {text} bytes, which decoding needs too")
    ours, theirs = psnr(original, with_text).item(), psnr(original, without_text).item()
    print(f"PSNR {ours:.2f} dB with text, {theirs:.2f} dB by the twin without text")
    row = torch.cat([original, with_text, without_text], dim=3)[0].permute(1, 2, 0).numpy()
    Image.fromarray(row).resize((6 * side, 2 * side), Image.Resampling.NEAREST).save(out / "side-by-side.png")
    print(f"{out / 'side-by-side.png'}: original, with text, without")


if __name__ == "__main__":
    main()
