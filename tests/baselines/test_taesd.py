"""Tiny autoencoders with their real weights: the Kodak PSNRs, and `texttok eval` measuring one as it does ours."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from texttok_cli.baselines import load_baseline
from texttok_cli.data import to_tensor
from texttok_cli.errors import BackendError, CheckpointError, DataError

# Mean PSNR (dB) over 24 images of 256 x 256, floats clamped to [0, 1], as measured with diffusers' own class.
KODAK = {
    "taesd": ("taesd.safetensors", 23.55),
    "taesdxl": ("taesd_xl.safetensors", 23.11),
    "taesd3": ("taesd_3.safetensors", 27.07),
    "taef1": ("taesd_f.safetensors", 25.59),
    "taef2": (".", 28.58),  # the folder of taef2_encoder.pth and taef2_decoder.pth
}


@pytest.fixture(scope="module")
def shared() -> Path:
    if "TEXTTOK_DATA" not in os.environ:
        pytest.skip("TEXTTOK_DATA does not name the folder that holds weights/ and data/kodak/")
    return Path(os.environ["TEXTTOK_DATA"])


def kodak(folder: Path) -> torch.Tensor:
    """Short side to 256 by LANCZOS, centre crop; uint8 (24, 3, 256, 256)."""
    images = []
    for path in sorted(folder.glob("*.png")):
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        left, top = (image.width - 256) // 2, (image.height - 256) // 2
        images.append(to_tensor(image.crop((left, top, left + 256, top + 256))))
    return torch.stack(images)


@pytest.mark.parametrize("name", ["taesd", "taesd3", "taef2"])  # one of each number of channels; 20 s each on a slow core
def test_kodak(name: str, shared: Path) -> None:
    file, expected = KODAK[name]
    model = load_baseline(f"baseline:{name}={shared / 'weights' / file}")
    images = kodak(shared / "data/kodak")
    assert len(images) == 24
    values = []
    for x in images.split(4):
        error = (model.decode_float(model.encode(x)) - x / 255).square().flatten(1).mean(dim=1)
        values.append(-10 * torch.log10(error))
    assert float(torch.cat(values).mean()) == pytest.approx(expected, abs=0.05)


@pytest.fixture
def weights(shared: Path) -> Path:
    return shared / "weights/taesd.safetensors"


def test_eval_measures_a_baseline_as_ours(texttok: Callable[..., Any], weights: Path, draw: Callable[..., Path], tmp_path: Path) -> None:
    for seed in range(3):
        draw(tmp_path / "pictures" / f"{seed}.png", seed, (40, 32))
    options = ("eval", "--metric", "psnr", "--model", f"baseline:taesd={weights}", "--data", tmp_path / "pictures", "--json", "-q")
    outcome = texttok(*options, "--size", 32)
    assert outcome.code == 0, outcome.err
    (result,) = json.loads(outcome.out)["results"]
    assert result["value"] > 15
    card = result["card"]
    assert (card["samples"], card["size"], card["n"], card["text"]) == ("taesd", 32, 3, None)
    assert texttok(*options, "--size", 36).err.startswith("texttok: taesd: takes images whose sides are multiples of 8")


def test_pixels_round(weights: Path) -> None:
    model = load_baseline(f"baseline:taesd={weights}")
    x = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    z = model.encode(x)
    assert z.shape == (1, 4, 2, 2)
    assert torch.equal(model.decode(z), (255 * model.decode_float(z)).add(0.5).floor().to(torch.uint8))
    with pytest.raises(DataError, match="multiples of 8"):
        model.encode(x[..., :12])


def test_mistakes_are_one_line(weights: Path, tmp_path: Path) -> None:
    part = {name: tensor for name, tensor in load_file(weights).items() if name != "encoder.layers.0.weight"}
    save_file(part, tmp_path / "part.safetensors")
    (tmp_path / "other").write_bytes(b"something else")
    broken, mixed = tmp_path / "broken", tmp_path / "mixed"
    for folder, files in ((broken, {"encoder": None, "decoder": None}), (mixed, {"encoder": "encoder", "decoder": "encoder"})):
        folder.mkdir()
        for half, source in files.items():
            data = b"something else" if source is None else (weights.parent / f"taef2_{source}.pth").read_bytes()
            (folder / f"taesd_{half}.pth").write_bytes(data)
    for model, what in (
        ("baseline:none", "there are baseline:taesd, baseline:taesdxl"),
        ("baseline:taesd", r"baseline:taesd=FILE\.safetensors \(published as madebyollin/taesd"),
        (f"baseline:taesd={tmp_path}/nothing", "no such file"),
        (f"baseline:taesd={tmp_path}/other", "not the weights"),
        (f"baseline:taesd={tmp_path}/part.safetensors", "not the weights"),
        (f"baseline:taef2={tmp_path}", r"taef2_encoder\.pth: no such file"),
        (f"baseline:taef1={weights.parent}", r"taef1_encoder\.pth: no such file"),
        (f"baseline:taesd={broken}", r"taesd_encoder\.pth: not a file of PyTorch weights"),
        (f"baseline:taesd={mixed}", "not the weights"),
    ):
        with pytest.raises((CheckpointError, BackendError), match=what) as error:
            load_baseline(model)
        assert "\n" not in str(error.value)
