"""Captions of a class that no training image has, for the detokenizer of generated images (Sec. 3.2, 4.1).

Two ways to write them: measured attributes in new combinations, or a language model that has read some of the class's captions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Protocol

from texttok_cli.captioners.attributes import Attributes, describe, parse
from texttok_cli.captioners.base import CaptionFailed, Written, limit_words
from texttok_cli.captioners.language import LanguageModel
from texttok_cli.captioners.pool import concurrently, in_order
from texttok_cli.captioners.prompts import Prompt
from texttok_cli.errors import DataError

MOST_DRAWS = 20_000  # a class: what has not come up by then is rarer than 1 in some thousand of its images
EXAMPLES = 12  # training captions that a language model reads
MOST_ASKED = 10  # captions in one request to a language model: many endpoints refuse to write more than some 4,000 tokens
FRUITLESS = 4  # requests for one class that may bring nothing new
NUMBERING = re.compile(r"\s*(?:[-*•]|\d+[.):])\s*")


class CaptionBank:
    """Training captions by class, every one as often as images have it, and all captions that must not be used again."""

    def __init__(self, captions: Mapping[str, Sequence[str]], evaluation: Sequence[str] = ()) -> None:
        self.by_class = dict(sorted(captions.items()))
        self._taken = {same(caption) for group in [*captions.values(), evaluation] for caption in group}

    def has(self, caption: str) -> bool:
        """Whether a training or evaluation image has this caption, up to case, spaces and the last full stop."""
        return same(caption) in self._taken


class Writer(Protocol):
    """Makes unseen captions; `backend`, `model`, `prompt` and `concurrency` (of classes) as of a captioner."""

    backend: str
    model: str | None = None
    prompt: Prompt | None = None
    concurrency: int = 0
    failure: str | None = None  # why the last attempt that failed did

    def write(self, class_name: str, number: int, there: Sequence[str]) -> list[str]:
        """Up to `number` captions of the class that are neither in the bank nor among `there`, nor twice in the list."""


def unseen_captions(writer: Writer, bank: CaptionBank, number: int, there: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, list[str]]]:
    """For every class of the bank that has fewer than `number` captions in `there`: the new ones, as many as could be made."""
    known = {name: there.get(name, []) for name in bank.by_class}
    wanting = [name for name in bank.by_class if len(known[name]) < number]

    def write(class_name: str) -> tuple[str, list[str]]:
        return class_name, writer.write(class_name, number - len(known[class_name]), known[class_name])

    yield from in_order(concurrently(write, wanting, writer.concurrency)) if writer.concurrency else map(write, wanting)


class AttributeWriter(Writer):
    """What is shown, main colours, edge, brightness and detail, each drawn as often as the class's training captions have it.

    A combination is taken if no caption of the bank has it, and any two of its attributes stand together in some training
    caption, of whatever class: white edges in the dark do not.
    """

    backend = "attributes"

    def __init__(self, bank: CaptionBank, *, seed: int, max_words: int) -> None:
        """DataError if the captions of a class are not of the form that `captioners.attributes` writes."""
        self.bank, self.seed, self.max_words = bank, seed, max_words
        self._parsed = {name: [_parsed(name, caption) for caption in captions] for name, captions in bank.by_class.items()}
        self._pairs = {pair for group in self._parsed.values() for _, attributes in group for pair in _pairs(attributes)}

    def write(self, class_name: str, number: int, there: Sequence[str]) -> list[str]:
        """The same for the same seed, class and bank."""
        rng = random.Random(f"{self.seed} {class_name}")
        examples = self._parsed[class_name]
        taken = {same(caption) for caption in there}
        found: list[str] = []
        for _ in range(MOST_DRAWS):
            if len(found) == number:
                break
            head = rng.choice(examples)[0]
            attributes = Attributes(*(rng.choice(examples)[1][i] for i in range(len(Attributes._fields))))
            caption = describe(head, attributes)
            new = same(caption) not in taken and not self.bank.has(caption) and len(caption.split()) <= self.max_words
            if new and self._pairs.issuperset(_pairs(attributes)):
                taken.add(same(caption))
                found.append(caption)
        return found


class LanguageWriter(Writer):
    """A language model that reads training captions of the class and writes others; what it copies is thrown away."""

    def __init__(
        self, bank: CaptionBank, language_model: LanguageModel, prompt: Prompt, *, seed: int, max_words: int, max_tokens: int
    ) -> None:
        """`max_tokens` is for one caption."""
        self.bank, self.language_model, self.seed = bank, language_model, seed
        self.max_words, self.max_tokens = max_words, max_tokens
        self.backend, self.concurrency = language_model.backend, language_model.concurrency
        self.model, self.prompt, self._fill = language_model.model, prompt, prompt.fill

    def write(self, class_name: str, number: int, there: Sequence[str]) -> list[str]:
        """Asks until there are enough, or FRUITLESS requests have failed or brought nothing new."""
        taken = {same(caption) for caption in there}
        found: list[str] = []
        turn = fruitless = 0
        while len(found) < number and fruitless < FRUITLESS:
            before = len(found)
            rng = random.Random(f"{self.seed} {class_name} {len(there)} {turn}")
            for caption in self._round(class_name, min(number - before, MOST_ASKED), rng):
                if len(found) < number and same(caption) not in taken and not self.bank.has(caption):
                    taken.add(same(caption))
                    found.append(caption)
            turn += 1
            fruitless += len(found) == before
        return found

    def _round(self, class_name: str, number: int, rng: random.Random) -> list[str]:
        examples = sorted(set(self.bank.by_class[class_name]))
        shown = "\n".join(rng.sample(examples, min(EXAMPLES, len(examples))))
        text = self._fill(number=number, class_name=class_name.rpartition("/")[2], examples=shown)
        try:
            answer = self.language_model.write(text, max_tokens=self.max_tokens * number, seed=rng.getrandbits(31))
        except CaptionFailed as err:
            self.failure = str(err)
            return []
        texts = []
        for line in answer.text.splitlines(keepends=True):
            whole = answer.complete or line.endswith("\n")  # an answer that was cut is so in its last line
            plain = NUMBERING.sub("", line, count=1).strip().strip('"')
            texts.append(limit_words(Written(plain, whole), self.max_words)[0])
        return [text for text in texts if text]


def same(caption: str) -> str:
    """What two captions have in common that differ by case, spaces or the last full stop only."""
    return " ".join(caption.casefold().split()).rstrip(".")


def _parsed(class_name: str, caption: str) -> tuple[str, Attributes]:
    found = parse(caption)
    if found is None:
        raise DataError(
            f"class {class_name}: a caption without measured attributes ({caption[:60]!r}): caption the images with --captioner"
            " class-measured or classifier first, use --caption-field measured, or let a language model write: --writer"
        )
    return found


def _pairs(attributes: Attributes) -> set[tuple[Any, ...]]:
    return set(combinations(enumerate(attributes), 2))
