"""Language models that write captions without an image: a local one, or one behind an endpoint."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from texttok_cli.assets import is_offline
from texttok_cli.captioners.base import THOUGHTS, Written, without_thoughts
from texttok_cli.captioners.client import ChatClient
from texttok_cli.captioners.vlm import called, ended, loading, pretrained


class LanguageModel(Protocol):
    """A text to another text."""

    backend: str
    model: str
    concurrency: int  # calls that may run at the same time; 0: one after the other

    def write(self, text: str, *, max_tokens: int, seed: int) -> Written:
        """The model's answer; another seed may give another one."""


class RemoteLanguageModel:
    """A model behind an endpoint; it draws its random numbers itself, so the seed plays no part."""

    backend = "endpoint"

    def __init__(self, client: ChatClient, *, concurrency: int) -> None:
        self.client, self.model, self.concurrency = client, client.model, concurrency

    def write(self, text: str, *, max_tokens: int, seed: int) -> Written:
        """The answer. CaptionFailed or BackendError as `ChatClient.complete` raises them."""
        return self.client.complete(text, max_tokens=max_tokens)


class LocalLanguageModel:
    """A causal language model through transformers; a chat template is used where there is one."""

    backend = "language-model"
    concurrency = 0

    def __init__(self, name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, offline: bool) -> None:
        """`name` is a folder or a repository of the hub. BackendError if it can't be loaded."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        local = {"local_files_only": is_offline(offline), "trust_remote_code": False}
        with loading(f"--model {name}: not a language model that can be loaded"):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, **local)
            network = pretrained(AutoModelForCausalLM, name, dtype=dtype, **local)
        self.network: Any = network.to(device).eval()
        self.model = called(name)

    @torch.no_grad()
    def write(self, text: str, *, max_tokens: int, seed: int) -> Written:
        """The answer, drawn from the model's distribution. CaptionFailed if it is thoughts alone."""
        if self.tokenizer.chat_template is not None:
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=self.tokenizer.chat_template is None).to(self.network.device)
        device = self.network.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # by default it takes all GPUs, and warns of that
            torch.manual_seed(seed)
            ids = self.network.generate(**inputs, do_sample=True, max_new_tokens=max_tokens)
        answer = ids[0, inputs["input_ids"].shape[1] :]
        said = str(self.tokenizer.decode(answer, skip_special_tokens=True))
        return without_thoughts(Written(said, ended(self.network, answer.tolist(), max_tokens)), begun=text.rstrip().endswith(THOUGHTS))
