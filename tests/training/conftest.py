"""A tiny recipe with the whole objective, and a folder of pictures with captions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from texttok_cli.data import open_dataset
from texttok_cli.data.texts import texts_for
from texttok_cli.inference import encode_dataset, load_tokenizer
from texttok_cli.token_folder import TokenFolder

TINY: dict = {
    "reproduces": "a test",
    "model": {
        "image_size": 32,
        "patch_size": 8,
        "num_tokens": 4,
        "backbone": {"depth": 2, "width": 32, "heads": 2},
        "condition": {"source": "caption", "encoder": {"kind": "hash", "dim": 16, "max_tokens": 8}},
    },
    "data": {"train": [], "workers": 0},
    "objective": {
        "perceptual": None,
        "adversarial": {"start": 2, "ramp": 2, "r1_every": 2, "lecam": 0.1, "discriminator": {"base": 4, "multipliers": [1, 2]}},
    },
    "optimizer": {"lr": 1e-3},
    "schedule": {"steps": 6, "warmup": 2},
    "training": {"batch_size": 4, "precision": "fp32", "ema": 0.9, "log_every": 1, "save_every": 2, "val_every": 100},
}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen PNGs of 40 x 32 pixels in two classes, each with its caption beside it."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(14):
        path = folder / ("even" if i % 2 == 0 else "odd") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        low = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(low).resize((40, 32), Image.Resampling.BICUBIC).save(path)
        path.with_suffix(".txt").write_text(f"picture number {i}" + " with more words" * (i % 3))
    return folder


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory, pictures: Path, models: Path) -> Callable[..., Path]:
    """Folder of the tokens of those pictures by one of the tiny tokenizers, if asked with their mirrored copies'."""

    def encode(model: str, *, flips: bool = False) -> Path:
        tokenizer = load_tokenizer(models / f"{model}.safetensors", device="cpu")
        dataset = open_dataset([pictures])
        texts = None if tokenizer.text_condition is None else texts_for(dataset.items, tokenizer.text_condition)
        out = tmp_path_factory.mktemp("latents")
        folder = TokenFolder(out, model_name=model, model_sha256=tokenizer.info.sha256, dtype="fp16", shard_size=10)
        for _, tokens in encode_dataset(tokenizer, dataset, texts, flips=flips, batch_size=8, on_error=pytest.fail):
            folder.add(tokens)
        folder.finish()
        return out

    return encode


@pytest.fixture(scope="session")
def store(encoded: Callable[..., Path]) -> Path:
    """Tokens of the pictures and their mirrored copies, by the tiny text tokenizer."""
    return encoded("text", flips=True)


@pytest.fixture
def recipe_file(tmp_path: Path, pictures: Path) -> Callable[..., Path]:
    """Writes the tiny recipe with some sections changed; returns its path."""

    def write(**changes: dict) -> Path:
        recipe = {section: merged(value, changes.pop(section, value)) for section, value in TINY.items()}
        recipe["data"] = merged(recipe["data"], {"train": recipe["data"]["train"] or [str(pictures)]})
        assert not changes
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    def merged(base: object, change: object) -> object:
        if not (isinstance(base, dict) and isinstance(change, dict)):
            return change
        return {**base, **{key: merged(base.get(key), value) for key, value in change.items()}} if change else base

    return write
