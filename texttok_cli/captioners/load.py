"""A captioner by its name. Free of torch until one is loaded: the command line reads the names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from texttok_cli.config import Precision
from texttok_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from texttok_cli.captioners.base import Captioner

CaptionerName = Literal["classifier", "class-text", "class-measured", "sidecar", "vlm", "coca", "endpoint"]
TOKENS_PER_WORD = 4  # generous in any language: whole captions are wanted, the limit of words is kept afterwards


def load_captioner(
    name: CaptionerName = "classifier",
    *,
    model: str | Path | None = None,
    weights: str | Path | None = None,
    endpoint: str | None = None,
    concurrency: int = 8,
    timeout: float = 60,
    retries: int = 5,
    template: str | None = None,
    max_words: int = 75,
    max_tokens: int | None = None,
    device: str | torch.device = "auto",
    device_map: str | None = None,
    precision: Precision = "fp32",
    offline: bool = False,
) -> Captioner:
    """The captioner of `texttok caption --captioner NAME`, whose options these are; those of other captioners play no part.

    `write_captions` takes it through a dataset. Images of your own are captioned by calling it, a batch at a time:
    `captioner([CaptionInput(image) for image in images])` (`texttok_cli.captioners.base`) gives for each a Written with its
    `text`, or a CaptionFailed that says why there is none.

    `max_words` is what a model with a prompt is asked for; `write_captions` cuts at its own, and should be given the same.

    Raises UsageError for a name that there is not and a model that is missing, BackendError for what is not available.
    """
    if name not in get_args(CaptionerName):
        raise UsageError(f"{name}: no such captioner; there are {', '.join(get_args(CaptionerName))}")
    if model is None and name in ("vlm", "endpoint"):
        raise UsageError(f"{name}: this captioner needs a model")
    if name in ("sidecar", "class-text", "class-measured"):
        from texttok_cli.captioners.known import ClassText, Sidecar

        return Sidecar() if name == "sidecar" else ClassText(template, measured=name == "class-measured")
    from texttok_cli.captioners.prompts import load_prompt
    from texttok_cli.models.devices import pick_device
    from texttok_cli.models.layers import DTYPES

    prompt, tokens = load_prompt("caption", max_words=max_words), max_tokens or TOKENS_PER_WORD * max_words
    if name == "endpoint":
        from texttok_cli.captioners.client import ChatClient
        from texttok_cli.captioners.endpoint import Endpoint

        client = ChatClient(str(endpoint), str(model), timeout=timeout, retries=retries)
        return Endpoint(client, prompt, max_tokens=tokens, concurrency=concurrency)
    where = pick_device(device)
    if name == "classifier":
        from texttok_cli.captioners.classifier import Classifier

        return Classifier(device=where, offline=offline)
    if name == "coca":
        from texttok_cli.captioners.coca import DEFAULT_NAME, DEFAULT_WEIGHTS, CoCa

        return CoCa(str(model or DEFAULT_NAME), str(weights or DEFAULT_WEIGHTS), device=where, offline=offline)
    from texttok_cli.captioners.vlm import VisionLanguageModel

    dtype = DTYPES[precision]
    return VisionLanguageModel(str(model), prompt, max_tokens=tokens, device=where, device_map=device_map, dtype=dtype, offline=offline)
