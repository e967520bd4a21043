from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from texttok_cli.config.schema import TextEncoderConfig
from texttok_cli.errors import DataError
from texttok_cli.models.condition import Condition
from texttok_cli.text import corpus as corpus_module
from texttok_cli.text import embed_corpus, estimate_bytes
from texttok_cli.text.hashed import HashEncoder

CONFIG = TextEncoderConfig(kind="hash", dim=16, max_tokens=12)
TEXTS = [" ".join(f"word{i}" for i in range(n % 9)) + f" {n}" for n in range(40)] + [""]


class Interrupted(HashEncoder):
    """Stops like Ctrl-C after some batches."""

    def __init__(self, batches: int) -> None:
        super().__init__(CONFIG)
        self.batches = batches

    def __call__(self, texts: Sequence[str]) -> Condition:
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        return super().__call__(texts)


@pytest.fixture
def encoder() -> HashEncoder:
    return HashEncoder(CONFIG)


def test_it_answers_as_the_encoder_to_fp16s_rounding(encoder: HashEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "BATCH", 8)
    embedded = embed_corpus(encoder, [*TEXTS, *TEXTS], tmp_path)
    assert len(embedded._index) == len(TEXTS)  # each once
    for batch in (TEXTS[5:9], [""], ["", TEXTS[8], ""]):
        ours, reference = embedded(batch), encoder(batch)
        assert (ours.mask is None) == (reference.mask is None)
        assert ours.mask is None or reference.mask is None or torch.equal(ours.mask, reference.mask)
        assert ours.tokens.dtype == torch.float32
        torch.testing.assert_close(ours.tokens, reference.tokens, rtol=2**-11, atol=1e-6)


def test_made_once_and_then_only_read(encoder: HashEncoder, tmp_path: Path) -> None:
    embed_corpus(encoder, TEXTS, tmp_path)
    again = embed_corpus(Interrupted(0), TEXTS, tmp_path)
    assert torch.allclose(again(TEXTS).tokens, encoder(TEXTS).tokens, rtol=1e-3)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "BATCH", 8)
    monkeypatch.setattr(corpus_module, "PART_BYTES", 1)  # a part a batch
    with pytest.raises(KeyboardInterrupt):
        embed_corpus(Interrupted(3), TEXTS, tmp_path)
    progress: list[tuple[int, int]] = []
    embedded = embed_corpus(Interrupted(3), TEXTS, tmp_path, on_progress=lambda *at: progress.append(at))
    assert [done for done, _ in progress] == [32, 40, 41] and {total for _, total in progress} == {41}
    assert torch.allclose(embedded(TEXTS).tokens, HashEncoder(CONFIG)(TEXTS).tokens, rtol=1e-3)
    assert not list(tmp_path.glob("*.tmp"))


def test_later_captions_are_added(encoder: HashEncoder, tmp_path: Path) -> None:
    embed_corpus(encoder, TEXTS[:20], tmp_path)
    embedded = embed_corpus(encoder, TEXTS, tmp_path)
    assert len(embedded._index) == len(TEXTS)  # each once and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("update", [{"max_tokens": 11}, {"dim": 8}])
def test_another_encoders_folder_is_stale(update: dict[str, int], encoder: HashEncoder, tmp_path: Path) -> None:
    embed_corpus(encoder, TEXTS, tmp_path)
    with pytest.raises(DataError, match=r"stale cache.*delete"):
        embed_corpus(HashEncoder(CONFIG.model_copy(update=update)), TEXTS, tmp_path)


def test_a_damaged_part_is_named(encoder: HashEncoder, tmp_path: Path) -> None:
    embed_corpus(encoder, TEXTS, tmp_path)
    (part,) = tmp_path.iterdir()
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(DataError, match=f"{part.name}.*cut short"):
        embed_corpus(encoder, TEXTS, tmp_path)


def test_an_unknown_caption_is_named(encoder: HashEncoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a zebra"):
        embed_corpus(encoder, TEXTS, tmp_path)(["a zebra"])


def test_states_too_large_for_fp16_are_refused(tmp_path: Path) -> None:
    class Large(HashEncoder):
        def __call__(self, texts: Sequence[str]) -> Condition:
            condition = super().__call__(texts)
            return Condition(condition.tokens * 1e6, condition.mask)

    with pytest.raises(DataError, match="fp16"):
        embed_corpus(Large(CONFIG), TEXTS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_estimate_is_the_size(encoder: HashEncoder, tmp_path: Path) -> None:
    embed_corpus(encoder, TEXTS, tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    estimate = estimate_bytes(encoder, [*TEXTS, *TEXTS])
    assert 0 <= written - estimate < 1000  # the header
