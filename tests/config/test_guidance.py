"""The grammar of guidance, and its weights."""

import math

import pytest

from texttok_cli.diffusion import Guidance, parse_cfg
from texttok_cli.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "guidance"),
    [
        ("1.5", Guidance(1.5)),
        ("0", Guidance(0.0)),
        ("1.23456789", Guidance(1.23456789)),
        ("3.8:power-cosine=4", Guidance(3.8, power=4)),
        ("1.8:interval=0,0.7", Guidance(1.8, interval=(0, 0.7))),
        ("6.7:power-cosine=2.5:interval=0.11,1", Guidance(6.7, power=2.5, interval=(0.11, 1))),
        ("1.5:channels=3", Guidance(1.5, channels=3)),
    ],
)
def test_text_and_back(text: str, guidance: Guidance) -> None:
    assert parse_cfg(text) == guidance
    assert str(guidance) == text


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("-1", "the scale is negative"),
        ("", "'' is not a number"),
        ("nan", "is not a number"),
        ("inf", "is not a number"),
        ("2:cosine=4", "'cosine=4' is not understood"),
        ("2:power-cosine", "'' is not a number"),
        ("2:power-cosine=4,5", "is not understood"),
        ("2:power-cosine=4:power-cosine=4", "is not understood"),
        ("2:power-cosine=0", "greater than 0"),
        ("2:interval=0.5", "is not understood"),
        ("2:interval=0.7,0.1", "increasing numbers between 0 and 1"),
        ("2:interval=0,1.5", "increasing numbers between 0 and 1"),
        ("2:channels=0", "a count of at least 1"),
        ("2:channels=1.5", "a count of at least 1"),
    ],
)
def test_bad_text_is_one_line(text: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what) as error:
        parse_cfg(text)
    assert str(error.value).startswith(f"cfg {text!r}: ") and "\n" not in str(error.value)


def test_weights() -> None:
    assert parse_cfg("1.5").weight(0.3) == 1.5
    interval = parse_cfg("1.8:interval=0.1,0.7")
    assert [interval.weight(f) for f in (0.05, 0.1, 0.7, 0.71)] == [1, 1.8, 1.8, 1]
    cosine = parse_cfg("3.8:power-cosine=4")
    assert cosine.weight(1) == 1
    assert cosine.weight(0) == pytest.approx(3.8)
    assert cosine.weight(0.2) == pytest.approx(1 + 2.8 * (1 - math.cos(math.pi * 0.8**4)) / 2)  # RECIPES.md, after MDT
    both = parse_cfg("3.8:power-cosine=4:interval=0.1,0.7")  # the curve, where guidance is at all
    assert [both.weight(f) for f in (0.05, 0.2, 0.8)] == [1, cosine.weight(0.2), 1]
