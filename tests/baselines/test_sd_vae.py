"""SD-VAE through diffusers: a small one of the same class with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from texttok_cli.baselines import load_baseline
from texttok_cli.errors import BackendError, CheckpointError, DataError
from texttok_cli.files import sha256_file

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sd-vae")
    blocks = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4  # three halvings: f8
    diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, **blocks).save_pretrained(path)
    return path


def test_it_is_diffusers_forward_with_the_posteriors_mean(folder: Path) -> None:
    ours = load_baseline(f"baseline:sd-vae={folder}")
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    images = torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = theirs.encode(images.float() / 127.5 - 1).latent_dist.mean
        pixels = theirs.decode(z).sample
    torch.testing.assert_close(ours.encode(images), z)
    assert ours.encode(images).shape == (2, 4, 4, 5)
    expected = (pixels.clamp(-1, 1) * 127.5 + 128).clamp(0, 255).floor()
    assert (ours.decode(z).float() - expected).abs().max() <= 1  # a value at the edge of a rounding
    assert ours.info.sha256 == sha256_file(folder / "diffusion_pytorch_model.safetensors")


def test_eval_measures_it_as_ours(texttok: Callable[..., Any], folder: Path, draw: Callable[..., Path], tmp_path: Path) -> None:
    for seed in range(3):
        draw(tmp_path / "in" / f"{seed}.png", seed)
    options = ["--model", f"baseline:sd-vae={folder}", "--metric", "psnr", "--data", str(tmp_path / "in"), "--size", "32", "--json"]
    outcome = texttok("eval", *options)
    assert outcome.code == 0, outcome.err
    assert '"samples": "sd-vae"' in outcome.out


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="multiples of 8"):
        load_baseline(f"baseline:sd-vae={folder}").encode(torch.zeros(1, 3, 30, 32, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="the folder needs"):
        load_baseline(f"baseline:sd-vae={tmp_path}")
    with pytest.raises(BackendError, match="neither a folder nor available") as error:
        load_baseline("baseline:sd-vae=nobody/nothing", offline=True)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="not a diffusers AutoencoderKL"):
        load_baseline(f"baseline:sd-vae={tmp_path}")
