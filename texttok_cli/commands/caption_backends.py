"""From the options of `texttok caption` to a captioner or a writer of unseen captions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from texttok_cli.config import Precision
from texttok_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from texttok_cli.captioners.base import Captioner
    from texttok_cli.captioners.client import ChatClient
    from texttok_cli.captioners.unseen import CaptionBank, Writer

CaptionerName = Literal["classifier", "class-text", "class-measured", "sidecar", "vlm", "coca", "endpoint"]
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
TOKENS_PER_WORD = 4  # generous in any language: whole captions are wanted, the limit of words is kept afterwards


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a person asked for; the defaults are those of `texttok caption`."""

    captioner: CaptionerName = "classifier"
    writer: WriterName = "attributes"
    model: str | None = None
    weights: str | None = None
    endpoint: str | None = None
    concurrency: int = 8
    timeout: float = 60
    retries: int = 5
    template: str | None = None
    max_words: int = 75
    max_tokens: int | None = None
    device: str = "auto"
    device_map: str | None = None
    precision: Precision = "fp32"
    offline: bool = False

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
        if self.template is not None and "{}" not in self.template:
            raise UsageError(f"--template {self.template!r}: has no {{}} for the class")

    def load_captioner(self) -> Captioner:
        """The captioner. BackendError if it is not available."""
        if self.captioner == "sidecar":
            from texttok_cli.captioners.known import Sidecar

            return Sidecar()
        if self.captioner in ("class-text", "class-measured"):
            from texttok_cli.captioners.known import ClassText

            return ClassText(self.template, measured=self.captioner == "class-measured")
        if self.captioner == "classifier":
            from texttok_cli.captioners.classifier import Classifier

            return Classifier(device=self._device(), offline=self.offline)
        if self.captioner == "coca":
            from texttok_cli.captioners.coca import DEFAULT_NAME, DEFAULT_WEIGHTS, CoCa

            return CoCa(self.model or DEFAULT_NAME, self.weights or DEFAULT_WEIGHTS, device=self._device(), offline=self.offline)
        return self._load_prompted()

    def _load_prompted(self) -> Captioner:
        from texttok_cli.captioners.endpoint import Endpoint
        from texttok_cli.captioners.prompts import load_prompt

        prompt = load_prompt("caption", max_words=self.max_words)
        if self.captioner == "endpoint":
            return Endpoint(self._client(), prompt, max_tokens=self._tokens(), concurrency=self.concurrency)
        from texttok_cli.captioners.vlm import VisionLanguageModel

        return VisionLanguageModel(
            str(self.model),
            prompt,
            max_tokens=self._tokens(),
            device=self._device(),
            device_map=self.device_map,
            dtype=self._dtype(),
            offline=self.offline,
        )

    def load_writer(self, bank: CaptionBank, seed: int) -> Writer:
        """The writer of unseen captions. BackendError if it is not available, DataError if the bank's captions don't suit it."""
        from texttok_cli.captioners.unseen import AttributeWriter, LanguageWriter

        if self.writer == "attributes":
            return AttributeWriter(bank, seed=seed, max_words=self.max_words)
        from texttok_cli.captioners.language import LanguageModel, LocalLanguageModel, RemoteLanguageModel
        from texttok_cli.captioners.prompts import load_prompt

        language_model: LanguageModel
        if self.writer == "endpoint":
            language_model = RemoteLanguageModel(self._client(), concurrency=self.concurrency)
        else:
            language_model = LocalLanguageModel(str(self.model), device=self._device(), dtype=self._dtype(), offline=self.offline)
        prompt = load_prompt("unseen", max_words=self.max_words)
        return LanguageWriter(bank, language_model, prompt, seed=seed, max_words=self.max_words, max_tokens=self._tokens())

    def provenance_of(self, author: Captioner | Writer) -> dict[str, Any]:
        """What is said of every caption in a file: backend, model, prompt hash, limit of words."""
        return {
            "backend": author.backend,
            "model": author.model,
            "prompt_sha256": None if author.prompt is None else author.prompt.sha256,
            "max_words": self.max_words,
        }

    def _tokens(self) -> int:
        return self.max_tokens or TOKENS_PER_WORD * self.max_words

    def _client(self) -> ChatClient:
        from texttok_cli.captioners.client import ChatClient

        return ChatClient(str(self.endpoint), str(self.model), timeout=self.timeout, retries=self.retries)

    def _device(self) -> torch.device:
        from texttok_cli.models.devices import pick_device

        return pick_device(self.device)

    def _dtype(self) -> torch.dtype:
        from texttok_cli.models.layers import DTYPES

        return DTYPES[self.precision]
