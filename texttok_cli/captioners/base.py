"""What a captioner is, and how long a caption may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from texttok_cli.captioners.prompts import Prompt
from texttok_cli.data import to_rgb
from texttok_cli.errors import DataError

SENTENCE_ENDS = (".", "!", "?")
THOUGHTS, END_OF_THOUGHTS = "<think>", "</think>"  # what Qwen's, DeepSeek's, GLM's and most other reasoning models put around them
CLOSING = "\"')]»”’"  # may follow the end of a sentence


class CaptionFailed(DataError):
    """One image for which there is no caption, and why; the others go on."""


@dataclass(frozen=True, slots=True)
class CaptionInput:
    """An image to be captioned, made RGB and upright, and what is known of it: its class and the caption beside it.

    DataError for what is no PIL image, and as `texttok_cli.data.to_rgb` raises it.
    """

    image: Image.Image
    class_name: str | None = None
    caption: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.image, Image.Image):
            raise DataError(f"{type(self.image).__name__}: is not a PIL image")
        object.__setattr__(self, "image", to_rgb(self.image, name="a PIL image"))


@dataclass(frozen=True, slots=True)
class Written:
    """What a captioner wrote; not `complete` if its limit of tokens stopped it."""

    text: str
    complete: bool = True


def without_thoughts(written: Written, *, begun: bool = False) -> Written:
    """What a model says behind the thoughts that it writes down first, if it does; `begun` if its prompt ends in their begin.

    CaptionFailed if it came to nothing else.
    """
    _, mark, answer = written.text.rpartition(END_OF_THOUGHTS)
    if mark and answer.strip():
        return Written(answer.strip(), written.complete)
    if mark or begun or written.text.lstrip().startswith(THOUGHTS):
        limit = "" if written.complete else " within the token limit; raise --max-tokens, or take a model that does not think"
        raise CaptionFailed(f"only thoughts{limit}")
    return written


class Captioner(Protocol):
    """Images to texts. `model` and `prompt` say what they depend on besides the image, None where there is no such thing."""

    backend: str
    model: str | None = None
    prompt: Prompt | None = None
    concurrency: int = 0  # calls that may run at the same time, each with one image; 0: batches, one after the other

    def __call__(self, inputs: Sequence[CaptionInput]) -> list[Written | CaptionFailed]:
        """A text for each of them, or why there is none. BackendError for what would stop every other image too."""


def limit_words(written: Written, max_words: int) -> tuple[str, bool]:
    """The text with single spaces and at most `max_words` words, and whether it was cut.

    It is cut behind its last whole sentence if that keeps at least half of the words, else behind a word.
    """
    words = written.text.split()
    if written.complete and len(words) <= max_words:
        return " ".join(words), False
    kept = words[:max_words]
    ends = [place for place, word in enumerate(kept, 1) if word.rstrip(CLOSING).endswith(SENTENCE_ENDS)]
    if ends and ends[-1] >= len(kept) / 2:
        return " ".join(kept[: ends[-1]]), True
    if len(words) <= max_words:  # stopped by the limit of tokens, perhaps within the last word
        kept = kept[:-1] or kept
    return " ".join(kept).rstrip(",;:-–—"), True


def with_article(noun: str) -> str:
    """`a dog`, `an apple`."""
    return f"{'an' if noun[:1].lower() in set('aeiou') else 'a'} {noun}"
