"""Any image-text-to-text or image-to-text model through transformers' Auto classes: Qwen-VL, LLaVA, PaliGemma, Florence-2, BLIP, GIT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from texttok_cli.assets import is_offline
from texttok_cli.captioners.base import THOUGHTS, Captioner, CaptionFailed, CaptionInput, Written, without_thoughts
from texttok_cli.captioners.prompts import Prompt
from texttok_cli.errors import BackendError
from texttok_cli.models.devices import out_of_memory

# What models without a chat template are told. Those trained on set tasks get the one for a long caption (of PaliGemma:
# ai.google.dev/gemma/docs/paligemma/prompt-system-instructions); BLIP-2 gets the form its paper has for questions, InstructBLIP
# the instruction alone. Not here are BLIP, GIT and the like: they would take a text for the begin of the caption.
TEXTS = {
    "florence2": "<MORE_DETAILED_CAPTION>",
    "paligemma": "<image>describe en",
    "blip-2": "Question: {prompt} Answer:",
    "instructblip": "{prompt}",
}


class VisionLanguageModel(Captioner):
    """A local model. It gets the prompt in its chat template or in its own form, the task that it knows, or the image alone."""

    backend = "vlm"

    def __init__(
        self,
        name: str,
        prompt: Prompt,
        *,
        max_tokens: int,
        device: torch.device | str = "cpu",
        device_map: str | None = None,
        dtype: torch.dtype = torch.float32,
        offline: bool = False,
    ) -> None:
        """`name` is a folder or a repository of the hub; with `device_map` (auto, ...) accelerate spreads the weights over devices."""
        from transformers import AutoModelForImageTextToText

        placed = {} if device_map is None else {"device_map": device_map}
        # The code of a hub repository is never run; without a word on it transformers would stop and ask.
        local = {"local_files_only": is_offline(offline), "trust_remote_code": False}
        with loading(f"--model {name}: not a captioning model that can be loaded"):
            self.processor: Any = _Processor.load(name, local)
            model = pretrained(AutoModelForImageTextToText, name, dtype=dtype, **placed, **local)
        if getattr(self.processor.whole, "num_query_tokens", 0) is None:  # of BLIP-2's kind, from before the image had places in the text
            raise BackendError(f"--model {name}: its processor has no num_query_tokens, so the image would get lost: use a newer revision")
        self.network: Any = model.eval().requires_grad_(False) if placed else model.eval().requires_grad_(False).to(device)
        self.model = called(name)
        self.max_tokens = max_tokens
        self._text, self.prompt = _told(self.processor.whole, model.config.model_type, prompt)

    def __call__(self, inputs: Sequence[CaptionInput]) -> list[Written | CaptionFailed]:
        """A caption for each, written greedily and in one batch. BackendError if the device's memory is too small for it."""
        try:
            return self._write([given.image for given in inputs])
        except RuntimeError as err:
            if not out_of_memory(err):
                raise
            raise BackendError(f"{self.model}: out of memory with {len(inputs)} images at once; use a smaller --batch-size") from None
        except ValueError as err:  # how processors refuse an image, say a very narrow one: the others must not lose their captions
            if len(inputs) == 1:
                return [CaptionFailed(f"the model's processor refuses it: {' '.join(str(err).split())}")]
            return [self([given])[0] for given in inputs]

    @torch.no_grad()
    def _write(self, images: Sequence[Image.Image]) -> list[Written | CaptionFailed]:
        inputs = self.processor.inputs(images, self._text).to(self.network.device, self.network.dtype)
        ids = self.network.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_tokens)
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(ids[:, : asked.shape[1]], asked):  # a decoder alone repeats the prompt
            ids = ids[:, asked.shape[1] :]
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rows = zip(texts, ids.tolist(), strict=True)
        return [self._answer(Written(text.strip(), complete=ended(self.network, row, self.max_tokens))) for text, row in rows]

    def _answer(self, written: Written) -> Written | CaptionFailed:
        try:
            return without_thoughts(written, begun=(self._text or "").rstrip().endswith(THOUGHTS))
        except CaptionFailed as err:
            return err


class _Processor:
    """What turns images and text into a model's inputs; an encoder-decoder of two parts has one for each of them."""

    def __init__(self, whole: Any, tokenizer: Any) -> None:
        self.whole, self.tokenizer = whole, tokenizer

    @classmethod
    def load(cls, name: str, local: Mapping[str, bool]) -> _Processor:
        from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

        if AutoConfig.from_pretrained(name, **local).model_type == "vision-encoder-decoder":
            return cls(AutoImageProcessor.from_pretrained(name, **local), AutoTokenizer.from_pretrained(name, **local))
        whole = AutoProcessor.from_pretrained(name, **local)
        whole.tokenizer.padding_side = "left"  # what is written follows the prompt
        if whole.tokenizer.pad_token is None:
            whole.tokenizer.pad_token = whole.tokenizer.eos_token
        return cls(whole, whole.tokenizer)

    def inputs(self, images: Sequence[Image.Image], text: str | None) -> Any:
        if text is None:
            return self.whole(images=list(images), return_tensors="pt")
        start = self.tokenizer.bos_token
        # A chat template writes the start token out: the tokenizer must not put a second one before it.
        once = {"add_special_tokens": False} if start is not None and text.startswith(start) else {}
        return self.whole(images=[[image] for image in images], text=[text] * len(images), padding=True, return_tensors="pt", **once)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """A foreign model is loaded without transformers' own progress bar, and whatever fails is one BackendError about `what`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError, TypeError, SafetensorError, UnpicklingError) as err:
        raise BackendError(f"{what}: {' '.join(str(err).split())[:200]}") from err


def pretrained(kind: Any, name: str, **how: Any) -> Any:
    """A model through one of transformers' Auto classes, its weights never unpickled. BackendError if some of them are missing."""
    model, report = kind.from_pretrained(name, weights_only=True, output_loading_info=True, **how)
    if report["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise BackendError(f"--model {name}: weights are missing ({sorted(report['missing_keys'])[0]}, ...): is the model complete?")
    return model


def called(name: str) -> str:
    """What a model is recorded as: a repository of the hub, or the name of a folder without the place of it."""
    return Path(name).name if Path(name).exists() else name


def _told(processor: Any, model_type: str, prompt: Prompt) -> tuple[str | None, Prompt | None]:
    """The text that a model gets beside an image, if any, and what is recorded as its prompt."""
    if getattr(processor, "chat_template", None) is not None:
        return _chat(processor, prompt), prompt
    form = TEXTS.get(model_type)
    if form is None:
        return None, None
    return form.replace("{prompt}", prompt.text), prompt if "{prompt}" in form else Prompt("task", None, form)


def _chat(processor: Any, prompt: Prompt) -> str:
    content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text


def ended(network: Any, written: Sequence[int], max_tokens: int) -> bool:
    """Whether a model that may write `max_tokens` tokens came to an end with these, the first of which may be its start token."""
    config = network.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return len(written) < max_tokens or not {*ends, config.pad_token_id}.isdisjoint(written[1:])
