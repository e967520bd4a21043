"""Unseen captions: none that an image has, and drawn as often as the training captions have what they say."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from served import Handler, Served, fails, says

from texttok_cli.captioners.attributes import Attributes, describe, parse
from texttok_cli.captioners.base import CaptionFailed
from texttok_cli.captioners.client import ChatClient
from texttok_cli.captioners.language import LocalLanguageModel, RemoteLanguageModel
from texttok_cli.captioners.pool import in_order
from texttok_cli.captioners.prompts import load_prompt
from texttok_cli.captioners.unseen import EXAMPLES, FRUITLESS, AttributeWriter, CaptionBank, LanguageWriter, same, unseen_captions
from texttok_cli.errors import BackendError, DataError

Draw = Callable[..., Path]

PROMPT = load_prompt("unseen", max_words=75)


def caption(middle: str = "red", edge: str = "white", light: str = "dim", detail: str = "smooth", head: str = "a photo of a tulip") -> str:
    return describe(head, Attributes(middle, edge, light, detail))


def tulips() -> list[str]:
    """All combinations of 3 x 3 x 2 x 2 attributes but some, red and white far more often than others."""
    values = (
        [("red", 6), ("blue", 2), ("pink", 1)],
        [("white", 6), ("grey", 2), ("black", 1)],
        ["dim", "dark"],
        ["smooth", "finely detailed"],
    )
    found = []
    for middle, often in values[0]:
        for edge, also in values[1]:
            for light in values[2]:
                for detail in values[3]:
                    if hash_of(middle, edge, light, detail) % 3:
                        found += [caption(middle, edge, light, detail)] * often * also
    return found


def hash_of(*words: str) -> int:
    return sum(map(ord, "".join(words)))


def test_new_combinations_of_known_attributes() -> None:
    bank = CaptionBank({"flower/tulip": tulips()}, [])
    written = AttributeWriter(bank, seed=0, max_words=75).write("flower/tulip", 5, [])
    assert len({same(text) for text in written}) == 5
    assert not {same(text) for text in written} & {same(text) for text in tulips()}
    known = [parse(text) for text in tulips()]
    for text in written:
        head, attributes = parse(text) or ("", None)
        assert head == "a photo of a tulip" and attributes is not None
        assert all(value in {found[1][i] for found in known if found} for i, value in enumerate(attributes))
    assert written == AttributeWriter(bank, seed=0, max_words=75).write("flower/tulip", 5, [])
    assert written != AttributeWriter(bank, seed=1, max_words=75).write("flower/tulip", 5, [])


def test_frequent_attributes_are_frequent() -> None:
    bank = CaptionBank({"c": tulips()}, [])
    first = Counter(
        parse(text)[1].middle  # type: ignore[index]
        for seed in range(200)
        for text in AttributeWriter(bank, seed=seed, max_words=75).write("c", 1, [])
    )
    assert first["red"] > first["blue"] > first["pink"] > 0


def test_evaluation_captions_and_what_is_there_are_left_out_and_a_short_class_is_not_padded() -> None:
    training = {"c": [caption("red", "white"), caption("red", "grey"), caption("blue", "white"), caption("blue", "black")]}
    # Of red/blue x white/grey/black the pairs red-black and blue-grey stand together nowhere.
    everything = AttributeWriter(CaptionBank(training), seed=0, max_words=75).write("c", 10, [])
    assert everything == []
    other = {**training, "d": [caption("red", "black", "dark"), caption("blue", "grey", "dark")]}
    everything = AttributeWriter(CaptionBank(other), seed=0, max_words=75).write("c", 10, [])
    assert sorted(everything) == sorted([caption("red", "black"), caption("blue", "grey")]), "a pair is known from another class"
    evaluated = CaptionBank(other, [caption("red", "black").upper() + "."])
    assert AttributeWriter(evaluated, seed=0, max_words=75).write("c", 10, []) == [caption("blue", "grey")]
    assert AttributeWriter(evaluated, seed=0, max_words=75).write("c", 10, [caption("blue", "grey")]) == []


def test_captions_of_another_class_are_taken_too() -> None:
    training = {"c": [caption("red", "white"), caption("blue", "grey")], "d": [caption("red", "grey"), caption("blue", "white", "dark")]}
    assert AttributeWriter(CaptionBank(training), seed=0, max_words=75).write("c", 5, []) == [caption("blue", "white")]


def test_a_limit_of_words_holds() -> None:
    written = AttributeWriter(CaptionBank({"c": tulips()}), seed=0, max_words=16).write("c", 50, [])
    assert written and all(len(text.split()) <= 16 for text in written) and any(len(text.split()) == 16 for text in written)


def test_captions_without_attributes_are_told() -> None:
    with pytest.raises(DataError, match=r"class c: a caption without measured attributes \('a dog on a chair'\)"):
        AttributeWriter(CaptionBank({"c": ["a dog on a chair"]}), seed=0, max_words=75)


def test_only_classes_that_want_some_are_written() -> None:
    bank = CaptionBank({"b": tulips(), "a": tulips()})
    there = {"a": [caption("red", "white", "dim", "x"), caption("red", "white", "dim", "y")], "b": [caption("red", "white", "dim", "z")]}
    found = dict(unseen_captions(AttributeWriter(bank, seed=0, max_words=75), bank, 2, there))
    assert list(found) == ["b"] and len(found["b"]) == 1


# ------------------------------------------------------------------ by a language model


@pytest.fixture
def writer(endpoint: Served, fast: None) -> Callable[..., LanguageWriter]:
    def make(captions: list[str], evaluation: list[str], max_words: int = 75) -> LanguageWriter:
        model = RemoteLanguageModel(ChatClient(endpoint.url, "m", retries=0), concurrency=1)
        return LanguageWriter(
            CaptionBank({"flower/tulip": captions}, evaluation), model, PROMPT, seed=0, max_words=max_words, max_tokens=300
        )

    return make


def test_what_a_language_model_copies_is_thrown_away(writer: Callable[..., LanguageWriter], endpoint: Served) -> None:
    endpoint.plan = [
        says('1. A red tulip.\n2) "two tulips in a vase"\n\n- a Field  of tulips\n* a tulip at night\n'),
        says("two tulips in a vase\nthree tulips\nfour tulips\n"),
    ]
    made = writer(["a red tulip", "a yellow tulip"], ["a field of tulips."]).write("flower/tulip", 3, [])
    assert made == ["two tulips in a vase", "a tulip at night", "three tulips"]
    first, second = (request["body"]["messages"][0]["content"] for request in endpoint.requests)
    assert '"tulip"' in first and "Write 3 new captions" in first and "a red tulip\n" in first + "\n" and "a yellow tulip" in first
    assert "Write 1 new captions" in second and "a field of tulips" not in first


def test_few_examples_are_shown_and_long_captions_cut(writer: Callable[..., LanguageWriter], endpoint: Served) -> None:
    endpoint.plan = [says("One two three four five six.")]
    assert writer([f"caption {i}" for i in range(40)], [], max_words=4).write("flower/tulip", 1, []) == ["One two three four"]
    assert endpoint.requests[0]["body"]["messages"][0]["content"].count("\ncaption ") == EXAMPLES


def test_an_answer_that_was_cut_ends_at_a_sentence_or_a_word(writer: Callable[..., LanguageWriter], endpoint: Served) -> None:
    endpoint.plan = [says("A red tulip in a\nA tulip stands. It has a", reason="length")]
    assert writer(["x"], []).write("flower/tulip", 2, []) == ["A red tulip in a", "A tulip stands."]
    endpoint.plan = [says("two tulips in a va", reason="length")]
    assert writer(["x"], []).write("flower/tulip", 1, []) == ["two tulips in a"]


def test_several_classes_are_asked_for_at_a_time(endpoint: Served, texttok: Callable[..., Any], draw: Draw, tmp_path: Path) -> None:
    """By the command: no more than --concurrency, and written class by class although the first answer comes last."""
    images = [draw(tmp_path / "photos" / name / "0.png", seed=i).relative_to(tmp_path / "photos") for i, name in enumerate("abcdef")]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"id": str(image), "caption": f"a photo of {image.parent}"}) + "\n" for image in images))
    under_way: list[str] = []
    most: list[int] = []

    def answer(handler: Handler, number: int) -> None:
        asked = endpoint.requests[number]["body"]["messages"][0]["content"]
        name = asked.partition('class, "')[2][0]
        under_way.append(name)
        most.append(len(under_way))
        time.sleep(1 if name == "a" else 0.1)
        under_way.remove(name)
        says(f"another {name}")(handler, number)

    endpoint.plan = [answer]
    args = ("--writer", "endpoint", "--endpoint", endpoint.url, "--model", "m", "--concurrency", 3, "--unseen-per-class", 1)
    run = texttok("caption", tmp_path / "photos", "--captions", captions, *args, "-o", tmp_path / "u.jsonl", "--quiet")
    assert run.code == 0 and 1 < max(most) <= 3
    rows = [json.loads(line) for line in (tmp_path / "u.jsonl").read_text().splitlines()]
    assert [(row["class"], row["caption"]) for row in rows] == [(name, f"another {name}") for name in "abcdef"]


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), BackendError("no such model")])
def test_what_waits_for_an_earlier_answer_is_not_lost(reason: BaseException) -> None:
    def results() -> Iterator[tuple[int, str]]:
        yield from [(1, "b"), (0, "a"), (4, "e"), (3, "d")]
        raise reason

    seen: list[str] = []
    with pytest.raises(type(reason)):
        seen.extend(in_order(results()))
    assert seen == ["a", "b", "d", "e"]


def test_a_class_stays_short_after_some_fruitless_requests(writer: Callable[..., LanguageWriter], endpoint: Served) -> None:
    endpoint.plan = [fails(500), says("a red tulip\na blue tulip")]
    assert writer(["a red tulip"], []).write("flower/tulip", 3, []) == ["a blue tulip"]
    assert len(endpoint.requests) == FRUITLESS + 1


def test_many_captions_take_several_requests_each_of_few_tokens(writer: Callable[..., LanguageWriter], endpoint: Served) -> None:
    """As of an endpoint that writes up to 4,096 tokens, and of every ten captions gives nine."""

    def answer(handler: Handler, number: int) -> None:
        fits = endpoint.requests[number]["body"]["max_tokens"] <= 4096
        texts = "\n".join(f"tulip {number} {i}" for i in range(9))
        (says(texts) if fits else fails(400))(handler, number)

    endpoint.plan = [answer]
    assert len(writer(["x"], []).write("flower/tulip", 50, [])) == 50
    assert [request["body"]["max_tokens"] for request in endpoint.requests] == [3000] * 5 + [1500]
    assert "Write 5 new captions" in endpoint.requests[-1]["body"]["messages"][0]["content"]


def test_a_local_language_model_writes_too(tmp_path: Path) -> None:
    model = LocalLanguageModel(str(tiny_models.language_model(tmp_path / "lm")), offline=True)
    made = LanguageWriter(CaptionBank({"c": ["w1 w2"]}), model, PROMPT, seed=0, max_words=5, max_tokens=20).write("c", 2, [])
    assert len(made) == 2 and all(0 < len(text.split()) <= 5 for text in made)
    assert issubclass(CaptionFailed, DataError) and json.dumps(made)
