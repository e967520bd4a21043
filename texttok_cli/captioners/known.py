"""Captions from what is known of an image without looking at what it shows: its class, or the text beside it."""

from __future__ import annotations

from collections.abc import Sequence

from texttok_cli.captioners.attributes import describe, measure
from texttok_cli.captioners.base import Captioner, CaptionFailed, CaptionInput, Written
from texttok_cli.captioners.prompts import Prompt
from texttok_cli.data.labels import CLASS_TEXT, class_text
from texttok_cli.errors import DataError, UsageError


class ClassText(Captioner):
    """The class in a template (Table 4a, "class text"); with `measured` also colours, brightness and detail."""

    def __init__(self, template: str | None = None, *, measured: bool = False) -> None:
        """`template` has a {} for the last part of the class's name, else UsageError; None is the one that tokenizers use."""
        if template is not None and "{}" not in template:
            raise UsageError(f"--template {template!r}: has no {{}} for the class")
        self.backend = "class-measured" if measured else "class-text"
        self.template, self.measured = template or CLASS_TEXT, measured
        self.prompt = Prompt("template", None, self.template)

    def __call__(self, inputs: Sequence[CaptionInput]) -> list[Written | CaptionFailed]:
        """A caption for each that has a class."""
        return [self._caption(given) for given in inputs]

    def _caption(self, given: CaptionInput) -> Written | CaptionFailed:
        if given.class_name is None:
            return CaptionFailed("has no class")
        try:
            text = class_text(given.class_name, self.template)
        except DataError as err:
            return CaptionFailed(str(err))
        return Written(describe(text, measure(given.image)) if self.measured else text)


class Sidecar(Captioner):
    """The text that stands beside an image already: NAME.txt, a manifest's or shard's caption."""

    backend = "sidecar"

    def __call__(self, inputs: Sequence[CaptionInput]) -> list[Written | CaptionFailed]:
        """The caption of each that has one."""
        return [CaptionFailed("has no text beside it") if each.caption is None else Written(each.caption) for each in inputs]
