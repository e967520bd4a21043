"""An example's condition is its own, in whatever order it is asked for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from texttok_cli.config.schema import TextCondition, TokenizerConfig
from texttok_cli.errors import DataError, RecipeError
from texttok_cli.models.condition import Condition
from texttok_cli.text import load_text_encoder
from texttok_cli.training.conditioning import class_conditioner, class_ids, text_conditioners
from texttok_cli.training.report import Reporter

TEXTS = [["a red flower", "a dog", "two very small blue birds", "a dog"], ["a cat", "a red flower"]]
TINY = {"image_size": 32, "patch_size": 8, "num_tokens": 4, "backbone": {"depth": 1, "width": 16, "heads": 2}}
CONDITION = {"source": "caption", "encoder": {"kind": "hash", "dim": 16, "max_tokens": 8}}


def rows(cond: Condition) -> list[torch.Tensor]:
    """The tokens of each text, without padding."""
    mask = torch.ones(cond.tokens.shape[:2], dtype=torch.bool) if cond.mask is None else cond.mask
    return [tokens[real].float() for tokens, real in zip(cond.tokens, mask, strict=True)]


@pytest.mark.parametrize("cache", [False, True])
def test_each_index_has_the_tokens_of_its_own_set_s_text(cache: bool, tmp_path: Path) -> None:
    condition = TokenizerConfig.model_validate({**TINY, "condition": CONDITION}).condition
    assert isinstance(condition, TextCondition)
    engine: Any = SimpleNamespace(device=torch.device("cpu"), is_main=True, wait=lambda: None)
    quiet = Reporter(lambda _: None, lambda *_: None, lambda _: None)
    found = text_conditioners(condition.encoder, TEXTS, tmp_path, engine, quiet, cache=cache, offline=True)
    encode = load_text_encoder(condition.encoder, device=torch.device("cpu"), offline=True)
    for conditioner, texts, indices in zip(found, TEXTS, ([2, 0, 3, 1], [1, 0]), strict=True):
        for ours, index in zip(rows(conditioner(indices)["cond"]), indices, strict=True):
            torch.testing.assert_close(ours, *rows(encode([texts[index]])), rtol=1e-2, atol=1e-2)  # a cache holds fp16


def test_each_index_has_its_own_set_s_class() -> None:
    named = [[("a", "dog"), ("b", "cat"), ("c", "emu")], [("d", "emu"), ("e", "cat")]]
    classes, ids = class_ids(named, 3, torch.device("cpu"))
    assert classes == ["cat", "dog", "emu"]
    assert [class_conditioner(part)([1, 0])["class_ids"].tolist() for part in ids] == [[0, 1], [0, 2]]


@pytest.mark.parametrize(
    ("name", "message"), [("cow", "e: class 'cow' is not among the 2 training classes, such as 'cat'"), (None, "e: has no class: lay ")]
)
def test_an_image_of_no_training_class_is_named(name: str | None, message: str) -> None:
    with pytest.raises(DataError) as raised:
        class_ids([[("a", "dog"), ("b", "cat")], [("d", "dog"), ("e", name)]], 2, torch.device("cpu"))
    assert str(raised.value).startswith(message)


def test_images_without_classes_are_said() -> None:
    with pytest.raises(RecipeError, match="num_classes is 2, but the training images have no classes: lay them in folders"):
        class_ids([[("a", None), ("b", None)]], 2, torch.device("cpu"))


def test_classes_that_are_numbers_keep_their_order() -> None:
    """As `.cls` files of shards have them: as text, 10 would come before 9 and every later id be another class."""
    classes, [ids] = class_ids([[(name, name) for name in ("10", "9", "100", "2")]], 4, torch.device("cpu"))
    assert classes == ["2", "9", "10", "100"] and ids.tolist() == [2, 1, 3, 0]
