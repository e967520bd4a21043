"""A tokenizer between two of the same configuration: every weight (1 - share) of the first's and share of the second's.

Between an l2 model and its continuation by perceptual and adversarial losses this trades PSNR for sharpness without training again
(network interpolation; Wang et al., ESRGAN, 2018, Sec. 3.4). The second must have been trained on from the first by
`training.detokenizer_only`, so that all three share their latents.

    python benchmarks/interpolate.py l2.safetensors gan.safetensors --share 0.8 -o between.safetensors
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from texttok_cli.checkpoint import load_tokenizer_file, save_tokenizer


def main(
    first: Path,
    second: Path,
    share: Annotated[float, typer.Option(min=0, max=1)],
    out: Annotated[Path, typer.Option("--out", "-o")],
) -> None:
    """Write the model between FIRST and SECOND, in bf16."""
    model, info = load_tokenizer_file(first)
    other, continued = load_tokenizer_file(second)
    if continued.header.latents_of not in info.latents_made_by:
        raise SystemExit(f"{second}: is not {first} with its detokenizer trained on")
    theirs = other.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.lerp_(theirs[name], share)
    training = {**continued.header.training, "interpolated": share, "from_sha256": info.sha256, "to_sha256": continued.sha256}
    save_tokenizer(out, model, training=training, latents_of=continued.header.latents_of, dtype=torch.bfloat16)


if __name__ == "__main__":
    typer.run(main)
