import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from texttok_cli.config.schema import TextEncoderConfig
from texttok_cli.errors import BackendError
from texttok_cli.text import TextEncoder, load_text_encoder

transformers = pytest.importorskip("transformers")
if "TEXTTOK_DATA" not in os.environ:
    pytest.skip("TEXTTOK_DATA is not set: no T5 tokenizer", allow_module_level=True)
TOKENIZER = Path(os.environ["TEXTTOK_DATA"]) / "weights" / "t5_tokenizer.json"
TEXTS = ["", "a red car", "a small dog lies on a sofa in the morning light"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole T5 v1.1 (encoder and decoder) of random weights, as it would come from the hub."""
    path = tmp_path_factory.mktemp("t5")
    shape = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 1}
    config = transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **shape)
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(path)
    shutil.copy(TOKENIZER, path / "tokenizer.json")
    return path


def load(folder: Path, **update: object) -> TextEncoder:
    return load_text_encoder(
        TextEncoderConfig.model_validate({"kind": "t5", "name": str(folder), "dim": 32, "max_tokens": 16, **update}), offline=True
    )


def test_every_batch_has_the_full_length_and_a_mask(folder: Path) -> None:
    encoder = load(folder)
    condition = encoder(TEXTS)
    assert condition.tokens.shape == (3, 16, 32) and condition.tokens.dtype == torch.float32
    assert condition.mask is not None and condition.mask.sum(dim=1).tolist() == encoder.lengths(TEXTS)
    assert encoder.lengths([""]) == [1]  # </s>


def test_states_are_those_of_the_whole_model(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt")
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        reference = model.encoder(**inputs).last_hidden_state
    condition = load(folder)(TEXTS)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(condition.tokens[mask], reference[mask], rtol=0, atol=1e-6)


def test_tokens_are_those_of_the_tokenizer_file(folder: Path) -> None:
    from tokenizers import Tokenizer

    file = Tokenizer.from_file(str(TOKENIZER))
    file.no_padding()
    texts = [*TEXTS, "two  spaces, “quotes” and Déjà-vu", "1,024 px; 50% off!"]
    assert load(folder, max_tokens=64).lengths(texts) == [len(file.encode(text)) for text in texts]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_padding_is_inert(folder: Path, precision: str) -> None:
    encoder = load(folder, precision=precision)
    together = encoder(TEXTS)
    assert together.mask is not None and together.tokens.isfinite().all()
    for row, mask, text in zip(together.tokens, together.mask, TEXTS, strict=True):
        torch.testing.assert_close(row[mask], encoder([text]).tokens[0][mask], rtol=0, atol=1e-5)
    longer = load(folder, precision=precision, max_tokens=40)(TEXTS)
    assert longer.mask is not None
    torch.testing.assert_close(longer.tokens[longer.mask], together.tokens[together.mask], rtol=0, atol=1e-5)


def test_truncation_keeps_the_end_token(folder: Path) -> None:
    encoder = load(folder, max_tokens=4)
    assert encoder(["a red car on a hill"]).mask is None and encoder.truncated == 1
    torch.testing.assert_close(encoder(["a red car on a hill"]).tokens, encoder(["a red car"]).tokens)


def test_fp16_is_refused() -> None:
    with pytest.raises(ValidationError, match="precision"):
        TextEncoderConfig.model_validate({"kind": "t5", "name": "google/t5-v1_1-xl", "precision": "fp16"})


def test_fingerprint_is_of_the_weights_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert load(moved).fingerprint == load(folder).fingerprint
    weights = load_file(moved / "model.safetensors")
    weights["encoder.block.1.layer.0.SelfAttention.q.weight"] += 1e-3
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert load(moved).fingerprint != load(folder).fingerprint


def test_another_width_is_refused_before_the_weights_are_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(BackendError, match="is 32 wide, the config says dim 64"):
        load(tmp_path, dim=64)


def test_another_model_is_refused(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(BackendError, match="'bert'"):
        load(tmp_path)


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    part = shutil.copytree(folder, tmp_path / "part")
    weights = load_file(part / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackendError, match=r"missing \(encoder\.block\.1"):
        load(part)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"{ damaged"])
def test_incomplete_and_damaged_folders_are_one_line(name: str, content: bytes | None, folder: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    (bad / name).unlink()
    if content is not None:
        (bad / name).write_bytes(content)
    with pytest.raises(BackendError) as error:
        load(bad)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


def test_a_model_that_is_nowhere_is_one_line() -> None:
    with pytest.raises(BackendError, match=r"neither a folder nor in the hub cache.*--offline") as error:
        load(Path("google/t5-v1_1-there-is-none"))
    assert "\n" not in str(error.value)


def test_the_code_of_a_repository_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the encoder is in a model's file, which may be anybody's."""
    settings = {"model_type": "own", "d_model": 32, "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Own: pass\n")
    asked: list[str] = []

    def say_yes(question: str) -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", say_yes)
    with pytest.raises(BackendError, match="text encoder"):
        load(tmp_path)
    assert not asked and not (tmp_path / "executed").exists()
