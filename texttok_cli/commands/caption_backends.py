"""From the options of `texttok caption` to a captioner or a writer of unseen captions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from texttok_cli.captioners.load import TOKENS_PER_WORD, CaptionerName, load_captioner
from texttok_cli.config import Precision
from texttok_cli.errors import UsageError

if TYPE_CHECKING:
    from texttok_cli.captioners.base import Captioner
    from texttok_cli.captioners.unseen import CaptionBank, Writer

WriterName = Literal["attributes", "lm", "endpoint"]
USERS = {  # of each option that not all captioners and writers heed: those that do
    "--model": ("vlm", "coca", "endpoint", "lm"),
    "--endpoint": ("endpoint",),
    "--concurrency": ("endpoint",),
    "--timeout": ("endpoint",),
    "--retries": ("endpoint",),
    "--weights": ("coca",),
    "--template": ("class-text", "class-measured"),
    "--max-tokens": ("vlm", "endpoint", "lm"),
    "--device-map": ("vlm",),
    "--precision": ("vlm", "lm"),
}
FOR_IMAGES = ("--captioner", "--batch-size")  # not beside --unseen-per-class
FOR_UNSEEN = ("--writer", "--captions", "--avoid", "--seed")  # beside it alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a person asked for."""

    captioner: CaptionerName
    writer: WriterName
    model: str | None
    weights: str | None
    endpoint: str | None
    concurrency: int
    timeout: float
    retries: int
    template: str | None
    max_words: int
    max_tokens: int | None
    device: str
    device_map: str | None
    precision: Precision
    offline: bool

    def check(self, given: Collection[str], *, unseen: bool) -> None:
        """UsageError for an option among the `given` that the chosen backend has no use for, and for one that it lacks."""
        for name in FOR_IMAGES if unseen else FOR_UNSEEN:
            if name in given:
                raise UsageError(f"{name} does not go with --unseen-per-class" if unseen else f"{name} is for --unseen-per-class")
        chosen = self.writer if unseen else self.captioner
        option = "--writer" if unseen else "--captioner"
        for name, users in USERS.items():
            if name in given and chosen not in users:
                raise UsageError(f"{name} is not for {option} {chosen}, but for {' and '.join(users)}")
        if self.model is None and chosen in ("vlm", "endpoint", "lm"):
            raise UsageError(f"{option} {chosen} needs --model")
        if self.endpoint is None and chosen == "endpoint":
            raise UsageError(f"{option} endpoint needs --endpoint URL")
        if self.endpoint is not None and self.offline:
            raise UsageError("--endpoint and --offline exclude each other")

    def load_captioner(self) -> Captioner:
        """The captioner. BackendError if it is not available."""
        return load_captioner(
            self.captioner,
            model=self.model,
            weights=self.weights,
            endpoint=self.endpoint,
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
            template=self.template,
            max_words=self.max_words,
            max_tokens=self.max_tokens,
            device=self.device,
            device_map=self.device_map,
            precision=self.precision,
            offline=self.offline,
        )

    def load_writer(self, bank: CaptionBank, seed: int) -> Writer:
        """The writer of unseen captions. BackendError if it is not available, DataError if the bank's captions don't suit it."""
        from texttok_cli.captioners.unseen import AttributeWriter, LanguageWriter

        if self.writer == "attributes":
            return AttributeWriter(bank, seed=seed, max_words=self.max_words)
        from texttok_cli.captioners.language import LanguageModel, LocalLanguageModel, RemoteLanguageModel
        from texttok_cli.captioners.prompts import load_prompt
        from texttok_cli.models.devices import pick_device
        from texttok_cli.models.layers import DTYPES

        language_model: LanguageModel
        if self.writer == "endpoint":
            from texttok_cli.captioners.client import ChatClient

            client = ChatClient(str(self.endpoint), str(self.model), timeout=self.timeout, retries=self.retries)
            language_model = RemoteLanguageModel(client, concurrency=self.concurrency)
        else:
            where, dtype = pick_device(self.device), DTYPES[self.precision]
            language_model = LocalLanguageModel(str(self.model), device=where, dtype=dtype, offline=self.offline)
        prompt, tokens = load_prompt("unseen", max_words=self.max_words), self.max_tokens or TOKENS_PER_WORD * self.max_words
        return LanguageWriter(bank, language_model, prompt, seed=seed, max_words=self.max_words, max_tokens=tokens)
