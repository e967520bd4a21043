"""Captions from a model behind an OpenAI-compatible endpoint: vLLM, Gemini's compatible one (the paper used Gemini), others."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from texttok_cli.captioners.base import Captioner, CaptionFailed, CaptionInput, Written
from texttok_cli.captioners.client import ChatClient
from texttok_cli.captioners.prompts import Prompt

MAX_SIDE = 1024  # pixels; larger images are scaled down, which is what the models do to them
JPEG_QUALITY = 95


class Endpoint(Captioner):
    """A vision model over HTTP; one image a request, several requests at a time."""

    backend = "endpoint"

    def __init__(self, client: ChatClient, prompt: Prompt, *, max_tokens: int, concurrency: int) -> None:
        self.client, self.max_tokens, self.concurrency = client, max_tokens, concurrency
        self.model, self.prompt, self.text = client.model, prompt, prompt.text

    def __call__(self, inputs: Sequence[CaptionInput]) -> list[Written | CaptionFailed]:
        """A caption for each, or why there is none."""
        return [self._caption(given.image) for given in inputs]

    def _caption(self, image: Image.Image) -> Written | CaptionFailed:
        content: list[dict[str, Any]] = [{"type": "text", "text": self.text}, {"type": "image_url", "image_url": {"url": _data_url(image)}}]
        try:
            return self.client.complete(content, max_tokens=self.max_tokens)
        except CaptionFailed as err:
            return err


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
