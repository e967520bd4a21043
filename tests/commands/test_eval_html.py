"""The page of `texttok eval`: a table, cards, and the images beside their reconstructions."""

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from texttok_cli.checkpoint import save_tokenizer
from texttok_cli.config.schema import TokenizerConfig
from texttok_cli.data import to_tensor
from texttok_cli.inference import _as_batch, load_tokenizer
from texttok_cli.metrics.image import psnr
from texttok_cli.models.tokenizer import TexTok

Draw = Callable[..., Path]
Run = Callable[..., Any]
CAPTION = "a <b>picture</b> & number"


@pytest.fixture
def pictures(draw: Draw, tmp_path: Path) -> Path:
    for seed in range(8):
        path = draw(tmp_path / "pictures" / f"{seed}.png", seed)
        path.with_suffix(".txt").write_text(f"{CAPTION} {seed}")
    return tmp_path / "pictures"


def images(html: str) -> dict[str, torch.Tensor]:
    """Pixels by what the page says they show, in its order."""
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">', html)
    return {alt: to_tensor(Image.open(io.BytesIO(base64.b64decode(data)))) for data, alt in found}


def test_the_page_shows_what_the_models_make(texttok: Run, models: Path, pictures: Path, tmp_path: Path) -> None:
    page, report = tmp_path / "page.html", tmp_path / "report.json"
    files = [models / "text.safetensors", models / "plain.safetensors"]
    outcome = texttok(
        "eval", "--metric", "ssim", "-m", files[0], "-m", files[1], "--data", pictures, "--html", page, "--gallery", 1, "-o", report
    )
    assert outcome.code == 0, outcome.err
    assert str(page) in outcome.out
    html = page.read_text()
    assert not re.search(r"<script|<link|https?:", html)

    results = {(result["card"]["samples"], result["metric"]): result["value"] for result in json.loads(report.read_text())["results"]}
    assert set(results) == {(name, metric) for name in ("text", "plain") for metric in ("ssim", "psnr")}
    assert all(f"<td>{value:.4f}</td>" in html for value in results.values())
    assert html.count("<details>") == 2 and "scikit-image&#x27;s default" in html and "4 × 8 channels" in html

    tokenizers = [load_tokenizer(file) for file in files]
    originals = torch.stack([_as_batch(path, 32)[0] for path in sorted(pictures.glob("*.png"))])
    captions = [f"{CAPTION} {seed}" for seed in range(8)]
    made = [t.decode(t.encode(originals, texts), texts) for t, texts in zip(tokenizers, (captions, None), strict=True)]
    quality = psnr(originals, made[0])
    order = quality.argsort(descending=True).tolist()
    shown = images(html)
    chosen = [int(alt.partition(".")[0]) for alt in shown if alt.endswith(": original")]
    assert chosen[0] == order[0] and chosen[2] == order[-1] and chosen[1] in order[3:5]
    assert [f"<h3>{rank}</h3>" in html for rank in ("Best", "Median", "Worst")] == [True] * 3
    for number in chosen:
        assert torch.equal(shown[f"{number}.png: original"], originals[number])
        for name, all_made in zip(("text", "plain"), made, strict=True):
            picture = shown[f"{number}.png: by {name}"]
            assert (picture.int() - all_made[number].int()).abs().max() <= 1  # another batch: rounding
            difference = shown[f"{number}.png: difference of {name} from the original, times 4"]
            assert torch.equal(difference.int(), (4 * (picture.int() - originals[number].int()).abs()).clamp(max=255))
        assert f"{quality[number]:.2f} dB" in html
        assert f"a &lt;b&gt;picture&lt;/b&gt; &amp; number {number}" in html
    # Fig. 1's layout: the same number of tokens, without text and then with it, whatever order they were named in.
    assert re.search(r"4 tokens</h4>.*?without text.*?plain.*?with text.*?text", html, re.DOTALL)
    assert "<b>" not in html


def test_codes_are_not_called_channels(texttok: Run, models: Path, pictures: Path, tmp_path: Path) -> None:
    cfg = load_tokenizer(models / "plain.safetensors").cfg.model_dump() | {"bottleneck": {"kind": "vq", "codes": 1024}}
    save_tokenizer(tmp_path / "vq.safetensors", TexTok(TokenizerConfig.model_validate(cfg)), training={})
    page = tmp_path / "page.html"
    outcome = texttok("eval", "--metric", "psnr", "-m", tmp_path / "vq.safetensors", "--data", pictures, "--html", page, "--json", "-q")
    card = json.loads(outcome.out)["results"][0]["card"]
    assert (card["tokens"], card["codes"], card["channels"]) == (4, 1024, None) and "<td>4 of 1,024 codes</td>" in page.read_text()


def test_stored_samples_with_their_originals_and_without(texttok: Run, pictures: Path, tmp_path: Path) -> None:
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(pictures.glob("*.png"))])
    np.savez(tmp_path / "samples.npz", pixels // 2)
    page = tmp_path / "page.html"
    options = ("eval", "--samples", tmp_path / "samples.npz", "--html", page, "--gallery", 2, "-q")
    assert texttok(*options, "--metric", "ssim", "--ref", pictures).code == 0
    shown = images(page.read_text())
    assert len(shown) == 18 and "<h3>Median</h3>" in page.read_text()
    number = next(alt for alt in shown if alt.endswith(": original")).partition(":")[0]
    assert torch.equal(shown[f"{number}: by samples.npz"], shown[f"{number}: original"] // 2)

    class Score:
        name, sha256, truncated = "clip", "0" * 64, 0

        def __init__(self, *args: object, **options: object) -> None: ...

        def cosines(self, images: torch.Tensor, captions: list[str], *, prefixes: list[str]) -> torch.Tensor:
            return torch.ones(len(images), len(prefixes))

    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"id": str(number), "caption": f"{CAPTION} {number}"}) + "\n" for number in range(8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("texttok_cli.metrics.evaluation.ClipScorer", Score)
        outcome = texttok(*options, "--metric", "clip-score", "--captions", captions)
    assert outcome.code == 0, outcome.err
    shown = images(page.read_text())
    assert list(shown) == [f"{number}: by samples.npz" for number in (0, 1, 2, 4, 5, 6)]
    assert "&amp; number 5" in page.read_text() and " dB" not in page.read_text()


def test_reports_are_compared_on_a_page(texttok: Run, models: Path, pictures: Path, tmp_path: Path) -> None:
    paths = []
    for name, n in (("plain", 8), ("other", 4)):
        paths.append(tmp_path / f"{name}.json")
        options = ("--metric", "psnr", "-m", models / f"{name}.safetensors", "--data", pictures, "-n", n)
        assert texttok("eval", *options, "-o", paths[-1], "-q").code == 0
    page = tmp_path / "page.html"
    assert texttok("eval", "--compare", paths[0], "--compare", paths[1], "--html", page).code == 1
    html = page.read_text()
    assert "psnr (differs)" in html and "not comparable, different n: 8 | 4" in html and html.count("<details>") == 2 and "<img" not in html
