"""A T5 as google/t5-v1_1-* lie on the hub: spiece.model alone, and weights as pytorch_model.bin."""

import importlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from texttok_cli.config.schema import TextEncoderConfig
from texttok_cli.errors import BackendError
from texttok_cli.text import load_text_encoder
from texttok_cli.text.transformer import TransformerEncoder

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: no spiece.model can be made")
pytest.importorskip("google.protobuf", reason="protobuf is not installed: transformers can't read spiece.model")

THINGS = ["a red car on a hill", "two small dogs, one asleep", "an old boat in the morning light", "seven green apples: a still life"]
WRITTEN = ["two  spaces, “quotes” and Déjà-vu", "ﬁne ｆｕｌｌ ½ ①", "line\nbreak\ttab", "a\u0301 \ufeff zero\u200bwidth", "日本 🦊"]
TEXTS = ["", " ", *THINGS, *WRITTEN]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5-v1_1")
    model = io.BytesIO()
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}  # as in T5's
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(THINGS * 8),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **special,
    )
    (path / "spiece.model").write_bytes(model.getvalue())
    extra = [f"<extra_id_{i}>" for i in range(100)]
    tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 100, "additional_special_tokens": extra}
    (path / "tokenizer_config.json").write_text(json.dumps(tokens))
    shape = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 1}
    config = transformers.T5Config(vocab_size=256, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **shape)
    config.save_pretrained(path)
    torch.manual_seed(0)
    torch.save(transformers.T5ForConditionalGeneration(config).state_dict(), path / "pytorch_model.bin")
    return path


def load(folder: Path, max_tokens: int = 64) -> TransformerEncoder:
    config = TextEncoderConfig.model_validate({"kind": "t5", "name": str(folder), "dim": 32, "max_tokens": max_tokens})
    encoder = load_text_encoder(config, offline=True)
    assert isinstance(encoder, TransformerEncoder)
    return encoder


def test_tokens_are_sentencepieces_and_the_end(hub: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(hub / "spiece.model"))
    encoder = load(hub)
    for text in TEXTS:
        assert encoder.tokenizer.encode(text).ids == [*reference.encode(text), 1], text


def test_padding_is_masked_and_inert(hub: Path) -> None:
    encoder = load(hub)
    condition = encoder(TEXTS)
    assert condition.tokens.shape == (len(TEXTS), 64, 32) and condition.mask is not None
    assert condition.mask.sum(dim=1).tolist() == encoder.lengths(TEXTS)
    assert encoder.truncated == 0
    alone = encoder(TEXTS[2:3])
    assert alone.mask is not None
    torch.testing.assert_close(alone.tokens[alone.mask], condition.tokens[2:3][alone.mask], rtol=0, atol=1e-5)


def test_truncation_is_counted_and_keeps_the_end(hub: Path) -> None:
    encoder, reference = load(hub, max_tokens=6), sentencepiece.SentencePieceProcessor(model_file=str(hub / "spiece.model"))
    assert encoder.tokenizer.encode(THINGS[0]).ids == [*reference.encode(THINGS[0])[:5], 1]
    encoder(["", THINGS[0], THINGS[1]])
    assert encoder.truncated == 2


def test_a_missing_library_is_one_line_that_names_the_command(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def lacking(*_: object) -> None:
        raise ImportError("requires the SentencePiece library")

    monkeypatch.setattr(importlib.import_module("transformers.convert_slow_tokenizer"), "requires_backends", lacking)
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # what transformers tries next
    with pytest.raises(BackendError, match=r"pip install --upgrade sentencepiece protobuf") as error:
        load(hub)
    assert str(hub) in str(error.value) and "\n" not in str(error.value)
    assert "tiktoken" not in "".join(capfd.readouterr()).lower()


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_vocabulary_that_is_cut_off_is_not_made_up(part: float, hub: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(hub, tmp_path / "bad")
    whole = (hub / "spiece.model").read_bytes()
    (bad / "spiece.model").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(BackendError, match=r"whole spiece\.model") as error:
        load(bad)
    assert "\n" not in str(error.value)
