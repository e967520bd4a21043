"""The prompts that language models get: versioned, in one file, known by their hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

PROMPTS = Path(__file__).with_name("prompts.yaml")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for captions of at most so many words; what depends on the class is filled in at each use."""

    name: str
    version: int | None  # None: a person's own text
    text: str

    @property
    def sha256(self) -> str:
        """Hex digest of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, **values: object) -> str:
        """The text with `{name}` replaced by each value; other braces stay as they are."""
        text = self.text
        for name, value in values.items():
            text = text.replace("{" + name + "}", str(value))
        return text


def load_prompt(name: Literal["caption", "unseen"], *, max_words: int) -> Prompt:
    """One of the prompts in prompts.yaml."""
    entry = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))[name]
    prompt = Prompt(name, entry["version"], entry["text"])
    return replace(prompt, text=prompt.fill(max_words=max_words))
