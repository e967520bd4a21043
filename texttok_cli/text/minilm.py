"""all-MiniLM-L6-v2, the default text encoder: small, and available without a network.

Letters: B batch, T text tokens, C width, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from texttok_cli.assets import resolve
from texttok_cli.config.schema import TextEncoderConfig
from texttok_cli.errors import BackendError
from texttok_cli.text.transformer import TransformerEncoder

# In the file, but no part of the token states: the pooler reads [CLS] only, position_ids is a range.
UNUSED = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}


class MiniLM(nn.Module):
    """A BERT encoder (post-norm, learned positions) around the tensors of its weight file.

    Written out because importing transformers' takes longer than torch and everything else together.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, layers: int, heads: int, eps: float) -> None:
        super().__init__()
        self.layers, self.heads, self.eps = layers, heads, eps
        for name, tensor in weights.items():
            if name not in UNUSED:
                self.register_buffer(_attribute(name), tensor)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Token ids and mask of real ones (B, T) -> states of the last layer (B, T, C)."""
        keys = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, T)
        positions = self._get("embeddings.position_embeddings.weight")[: ids.shape[1]]
        segment = self._get("embeddings.token_type_embeddings.weight")[0]
        x = self._norm("embeddings.LayerNorm", F.embedding(ids, self._get("embeddings.word_embeddings.weight")) + segment + positions)
        for layer in range(self.layers):
            name = f"encoder.layer.{layer}"
            x = self._norm(f"{name}.attention.output.LayerNorm", x + self._attention(f"{name}.attention", x, keys))
            hidden = F.gelu(self._linear(f"{name}.intermediate.dense", x))
            x = self._norm(f"{name}.output.LayerNorm", x + self._linear(f"{name}.output.dense", hidden))
        return x

    def _attention(self, name: str, x: Tensor, keys: Tensor | None) -> Tensor:
        q, k, v = (
            self._linear(f"{name}.self.{part}", x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
            for part in ("query", "key", "value")
        )  # (B, H, T, C/H)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self._linear(f"{name}.output.dense", mixed.transpose(1, 2).flatten(2))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._get(f"{name}.weight"), self._get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._get(f"{name}.weight"), self._get(f"{name}.bias"), self.eps)

    def _get(self, name: str) -> Tensor:
        return self.get_buffer(_attribute(name))


def load_minilm(config: TextEncoderConfig, *, device: torch.device | str, offline: bool) -> TransformerEncoder:
    """All-MiniLM-L6-v2's token states (384 wide). Raises BackendError if it is not available or the config asks for another shape."""
    bert = json.loads(resolve("minilm-config", offline=offline).read_text(encoding="utf-8"))
    width, longest = bert["hidden_size"], bert["max_position_embeddings"]
    if config.dim != width:
        raise BackendError(f"text encoder minilm: is {width} wide, the config says dim {config.dim}: set dim={width}")
    if config.max_tokens > longest:
        raise BackendError(f"text encoder minilm: takes at most {longest} tokens, the config says max_tokens {config.max_tokens}: lower it")
    weights = load_file(resolve("minilm", offline=offline))
    model = MiniLM(weights, layers=bert["num_hidden_layers"], heads=bert["num_attention_heads"], eps=bert["layer_norm_eps"])
    tokenizer = Tokenizer.from_file(str(resolve("minilm-tokenizer", offline=offline)))
    return TransformerEncoder(config, model, tokenizer, device=device, pad_id=bert["pad_token_id"], fixed_length=False)


def _attribute(name: str) -> str:
    return name.replace(".", "_")  # a module's attributes have no dots
