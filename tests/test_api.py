"""`import texttok_cli`: what it offers, and that its documentation's example runs."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import texttok_cli


def test_every_public_name_is_there_and_lazy_homes_agree() -> None:
    assert set(texttok_cli.__all__) == set(texttok_cli._HOMES)
    for name, home in texttok_cli._HOMES.items():
        assert getattr(texttok_cli, name) is getattr(importlib.import_module(f"texttok_cli.{home}"), name)
    with pytest.raises(AttributeError, match="no attribute 'load_tokeniser'"):
        texttok_cli.load_tokeniser  # noqa: B018
    with pytest.raises(ImportError):
        from texttok_cli import nothing  # noqa: F401
    assert {*texttok_cli.__all__, "__version__"} <= set(dir(texttok_cli))


def example() -> str:
    """The indented lines of the package's docstring."""
    return "\n".join(re.findall(r"^    (.*)$", texttok_cli.__doc__ or "", re.MULTILINE))


def test_the_docstrings_example_runs(models: Path, tmp_path: Path, draw: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "img.png", size=(48, 40))
    (tmp_path / "texttok-32-128.safetensors").write_bytes((models / "text.safetensors").read_bytes())
    monkeypatch.setattr("texttok_cli.inference.PRETRAINED", tmp_path)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    assert len(example().splitlines()) == 4  # the import and the three lines
    exec(example(), scope)
    z, image = scope["z"], scope["image"]
    assert isinstance(z, torch.Tensor) and isinstance(image, torch.Tensor)
    assert (z.shape, z.dtype, z.device.type) == ((1, 4, 8), torch.float32, "cpu")
    assert (image.shape, image.dtype, image.device.type) == ((1, 3, 32, 32), torch.uint8, "cpu")


def test_a_data_set_in_a_few_lines(models: Path, tmp_path: Path, draw: Callable[..., Path]) -> None:
    from texttok_cli import encode_dataset, load_tokenizer, load_tokens, open_dataset, save_tokens

    for i in range(3):
        draw(tmp_path / f"{i}.png", seed=i)
    tokenizer = load_tokenizer(models / "plain.safetensors", device="cpu")
    for number, (_, tokens) in enumerate(encode_dataset(tokenizer, open_dataset([tmp_path]), None, batch_size=2, on_error=print)):
        save_tokens(tmp_path / f"{number}.tok.safetensors", tokens)
    assert [len(load_tokens(tmp_path / f"{number}.tok.safetensors")) for number in range(2)] == [2, 1]


def test_every_error_is_a_text_tok_error(models: Path, tmp_path: Path) -> None:
    from texttok_cli import TextTokError, load_tokenizer, load_tokens, open_dataset

    tokenizer = load_tokenizer(models / "plain.safetensors", device="cpu")
    for mistake in (
        lambda: load_tokenizer("nope"),
        lambda: load_tokens(tmp_path / "none"),
        lambda: open_dataset([tmp_path]),
        lambda: tokenizer.encode(tmp_path / "none.png"),
        lambda: tokenizer.decode(torch.zeros(1, 2, 3)),
    ):
        with pytest.raises(TextTokError):
            mistake()
