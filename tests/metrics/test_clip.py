"""CLIP scores of a small randomly initialised open_clip model against the formula, and how its weights are found."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_cache
import pytest
import torch
from PIL import Image

from texttok_cli.errors import BackendError
from texttok_cli.metrics.clip import HESSEL_PREFIX, ClipScorer, as_trained, find_weights
from texttok_cli.metrics.evaluator import Batch, Evaluator
from texttok_cli.metrics.protocols import CLIP_NAME, CLIP_WEIGHTS

open_clip = pytest.importorskip("open_clip")
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
CAPTIONS = ["a red apple", "a photograph of two very small dogs on a long wooden table in the evening sun"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty whatever this machine has in its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("clip")
    import json

    (folder / "tiny-clip.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    path = folder / "tiny.pt"
    torch.save(open_clip.create_model("tiny-clip").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def scorer(weights: Path) -> ClipScorer:
    return ClipScorer("tiny-clip", str(weights), offline=True)


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def formula(weights: Path, prefix: str, **how: Any) -> torch.Tensor:
    """cos(E_image(x), E_text(t)) with open_clip's own model, preprocessing and tokens."""
    model, _, prepare = open_clip.create_model_and_transforms("tiny-clip", pretrained=str(weights), **how)
    model.eval()
    x = torch.stack([prepare(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images()])
    text = model.encode_text(open_clip.get_tokenizer("tiny-clip")([prefix + caption for caption in CAPTIONS]))
    return torch.nn.functional.cosine_similarity(model.encode_image(x), text)


def test_both_scores_are_their_formulas(scorer: ClipScorer, weights: Path) -> None:
    evaluator = Evaluator(["clip-score", "clipscore-hessel"], clip=scorer)
    evaluator.update(Batch(torch.tensor([0, 1]), images(), None, CAPTIONS))
    scores = evaluator.compute()
    plain, prefixed = formula(weights, ""), formula(weights, HESSEL_PREFIX)
    assert scores["clip-score"][0] == pytest.approx(100 * float(plain.mean()), rel=1e-4)
    assert scores["clipscore-hessel"][0] == pytest.approx(2.5 * float(prefixed.clamp_min(0).mean()), rel=1e-4)
    assert not torch.allclose(plain, prefixed, atol=1e-3)


def test_a_score_below_zero_counts_as_it_is_or_as_zero(scorer: ClipScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "cosines", lambda *args, prefixes: torch.tensor([[0.5, 0.5], [-0.3, -0.3]]))
    evaluator = Evaluator(["clip-score", "clipscore-hessel"], clip=scorer)
    evaluator.update(Batch(torch.tensor([0, 1]), images(), None, CAPTIONS))
    assert evaluator.compute()["clip-score"][0] == pytest.approx(10)
    assert evaluator.compute()["clipscore-hessel"][0] == pytest.approx(0.625)


def test_captions_that_do_not_fit_are_counted(weights: Path) -> None:
    scorer = ClipScorer("tiny-clip", str(weights), offline=True)
    eleven = " ".join(["dog"] * 10)  # with begin and end twelve tokens, which just fit
    scorer.cosines(images()[:1].expand(4, -1, -1, -1), [*CAPTIONS, eleven, f"{eleven} dog"])
    assert scorer.truncated == 2


def test_the_published_prefix_stands_before_the_caption_and_takes_its_room(scorer: ClipScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Hessel et al.'s own code puts it: with a space."""
    read: list[str] = []
    honest = scorer.tokenize
    monkeypatch.setattr(scorer, "tokenize", lambda texts, **how: read.extend(texts) or honest(texts, **how))
    monkeypatch.setattr(scorer.tokenize, "context_length", honest.context_length, raising=False)
    monkeypatch.setattr(scorer, "truncated", 0)
    evaluator = Evaluator(["clipscore-hessel"], clip=scorer)
    evaluator.update(Batch(torch.tensor([0, 1]), images(), None, ["a red apple", " ".join(["dog"] * 8)]))
    assert set(read) == {"A photo depicts a red apple", "A photo depicts dog dog dog dog dog dog dog dog"}
    assert scorer.truncated == 1  # ten words just fit


class Words:
    """A tokenizer as Hugging Face's in open_clip: a token a word, an end token, cut or padded to the length."""

    context_length = 6

    def __init__(self, pad: int, *, end: int = 1, last: int | None = None) -> None:
        self.tokenizer, self.end, self.last = SimpleNamespace(pad_token_id=pad), [end], [] if last is None else [last]

    def __call__(self, texts: list[str], context_length: int) -> torch.Tensor:
        room = context_length - len(self.last)
        rows = [[10 + len(word) for word in text.split()][: room - 1] + self.end for text in texts]
        return torch.tensor([row + [self.tokenizer.pad_token_id] * (room - len(row)) + self.last for row in rows])


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (Words(pad=1), 5),  # SigLIP, of T5: pads with its end token
        (Words(pad=0), 5),  # SigLIP 2, of Gemma
        (Words(pad=0, end=2, last=3), 4),  # CLIPS: the class token comes after the padding
    ],
)
def test_padding_is_what_the_tokenizer_calls_so(tokenizer: Words, words: int, scorer: ClipScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "tokenize", tokenizer)
    cut = [scorer._overflows(" ".join(["dog"] * n)) for n in range(1, 9)]
    assert cut == [n > words for n in range(1, 9)]


GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def test_weights_of_a_tag_get_the_network_and_images_they_were_trained_with(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"plain": {}, "quick": {"quick_gelu": True}, "grey": GREY}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {tag: {"url": tag, **config} for tag, config in tags.items()})
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", lambda config: str(weights))
    for name in ("HF_HUB_OFFLINE", "TEXTTOK_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    grey = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    wanted = {
        "plain": formula(weights, ""),
        "quick": formula(weights, "", force_quick_gelu=True),
        "grey": formula(weights, "", **grey),
    }
    for tag, cosines in wanted.items():
        assert torch.allclose(ClipScorer("tiny-clip", tag).cosines(images(), CAPTIONS)[:, 0], cosines, atol=1e-6), tag
        assert all(other is cosines or not torch.allclose(other, cosines, atol=1e-4) for other in wanted.values())


def test_a_local_file_gets_what_all_tags_of_its_model_want(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"a": GREY, "b": {**GREY, "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", tags)
    cosines = ClipScorer("tiny-clip", str(weights), offline=True).cosines(images(), CAPTIONS)[:, 0]
    assert torch.allclose(cosines, formula(weights, "", image_mean=(0.5,) * 3, image_std=(0.5,) * 3), atol=1e-6)
    monkeypatch.setitem(tags, "c", {"mean": (0.0, 0.0, 0.0)})
    with pytest.raises(BackendError, match=r"tiny.pt: weights of tiny-clip differ in how they take images.* give a tag \(a, b, c\)"):
        ClipScorer("tiny-clip", str(weights), offline=True)


def test_quick_gelu_is_that_of_the_published_weights(weights: Path) -> None:
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "RN50", "ViT-B-32-quickgelu"):
        assert as_trained(name, "openai")["force_quick_gelu"], name
    for name, of in (("ViT-B-32", "laion2b_s34b_b79k"), ("ViT-B-32", str(weights)), ("ViT-B-16-SigLIP", "webli")):
        assert not as_trained(name, of)["force_quick_gelu"], name
    assert as_trained("RN50", str(weights))["force_quick_gelu"]  # as all that are published


def test_the_default_is_the_network_clipscore_was_published_with_and_nothing_in_it_is_random(scorer: ClipScorer) -> None:
    assert (CLIP_NAME, CLIP_WEIGHTS) == ("ViT-B-32-quickgelu", "openai")
    assert not any(module.training for module in scorer.model.modules())


def test_missing_weights_are_one_line(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no such model"):
        ClipScorer("no-clip", str(weights))
    with pytest.raises(BackendError, match="neither a file nor a tag of tiny-clip"):
        ClipScorer("tiny-clip", "openai")
    with pytest.raises(BackendError, match=r"--offline: name a local file with --clip-weights"):
        ClipScorer(offline=True)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"something else")
    with pytest.raises(BackendError, match=r"--clip-weights .*broken.pt: could not be loaded as weights of tiny-clip"):
        ClipScorer("tiny-clip", str(broken))


@pytest.mark.parametrize("variable", ["TEXTTOK_OFFLINE", "HF_HUB_OFFLINE"])
def test_nothing_is_downloaded_where_the_environment_says_offline(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", lambda config: pytest.fail("a download"))
    monkeypatch.setenv(variable, "1")
    with pytest.raises(BackendError, match=r"nor downloaded with --offline: name a local file with --clip-weights"):
        ClipScorer()


@pytest.mark.parametrize(
    ("where", "name", "better"),
    [
        ("somebody/tiny/", "open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("somebody/tiny/pytorch_model.bin", "pytorch_model.bin", "pytorch_model.safetensors"),
    ],
)
def test_weights_that_are_cached_need_no_network(
    where: str, name: str, better: str, weights: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several files the one that open_clip would take."""
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"tag": {"hf_hub": where}})
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", lambda config: pytest.fail("the network was asked"))
    with pytest.raises(BackendError, match=r"^weights tiny-clip/tag: not cached, nor downloaded with --offline: name a local file"):
        ClipScorer("tiny-clip", "tag", offline=True)
    cached = hub_cache.put(cache, "somebody/tiny", name, weights)
    found = ClipScorer("tiny-clip", "tag", offline=True).cosines(images(), CAPTIONS)[:, 0]
    torch.testing.assert_close(found, formula(weights, ""), rtol=1e-5, atol=1e-6)
    assert find_weights("tiny-clip", "tag", option="--clip-weights", offline=False) == cached
    both = hub_cache.put(cache, "somebody/tiny", better, weights)
    assert find_weights("tiny-clip", "tag", option="--clip-weights", offline=True) == both
