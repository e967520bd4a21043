"""CoCa (Yu et al., 2022) through open_clip: a captioner that needs no prompt.

Letters: B batch, T text tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texttok_cli.captioners.base import Captioner, CaptionFailed, CaptionInput, Written
from texttok_cli.errors import BackendError
from texttok_cli.metrics.clip import load_open_clip

DEFAULT_NAME, DEFAULT_WEIGHTS = "coca_ViT-L-14", "mscoco_finetuned_laion2b_s13b_b90k"
START, END = 49406, 49407  # open_clip's byte-pair vocabulary
MIN_TOKENS = 5  # with START, before END may come: the default of the network's own `generate`
SPACE_BEFORE_MARK = re.compile(r"\s+(?=[.,;:!?]|'s\b)")  # that vocabulary keeps no trace of whether there was one


class CoCa(Captioner):
    """Captions written greedily. `weights` is a local file, or one of open_clip's tags, which is downloaded."""

    backend = "coca"

    def __init__(self, name: str, weights: str, *, device: torch.device | str = "cpu", offline: bool) -> None:
        import open_clip

        if name not in open_clip.list_models() or not name.startswith("coca") or "roberta" in name:
            raise BackendError(
                f"--model {name}: not a CoCa of open_clip's; it has {', '.join(m for m in open_clip.list_models() if 'coca' in m)}"
            )
        self.network, self.prepare, _ = load_open_clip(name, weights, option="--weights", device=device, offline=offline)
        self.model = f"{name}/{Path(weights).name}"
        self.decode: Any = open_clip.get_tokenizer(name).decode
        self.device = torch.device(device)

    def __call__(self, inputs: Sequence[CaptionInput]) -> list[Written | CaptionFailed]:
        """A caption for each."""
        pixels = torch.stack([self.prepare(given.image) for given in inputs]).to(self.device)
        return [self._read(row) for row in self._generate(pixels).tolist()]

    @torch.no_grad()
    def _generate(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> the most probable next token, again and again, (B, T).

        Written out: the network's own `generate` needs parts of transformers that version 5 no longer has.
        """
        image = self.network(pixels)
        ids = torch.full((len(pixels), 1), START, device=pixels.device)
        ended = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
        for _ in range(self.network.text.context_length - 1):
            out = self.network(pixels, ids, image_latent=image["image_features"], image_embs=image["image_embs"], output_labels=False)
            logits = out["logits"][:, -1]
            if ids.shape[1] < MIN_TOKENS:
                logits[:, END] = -torch.inf
            following = logits.argmax(dim=-1).masked_fill(ended, END)
            ids = torch.cat([ids, following[:, None]], dim=1)
            ended |= following == END
            if ended.all():
                break
        return ids

    def _read(self, ids: list[int]) -> Written:
        text = ids[1:]
        ended = END in text
        words = str(self.decode(text[: text.index(END)] if ended else text))
        return Written(SPACE_BEFORE_MARK.sub("", words).strip(), complete=ended)
