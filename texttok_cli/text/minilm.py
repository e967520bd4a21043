"""all-MiniLM-L6-v2, the default text encoder: small, and to be had without a network."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from texttok_cli.assets import resolve
from texttok_cli.config.schema import TextEncoderConfig
from texttok_cli.errors import BackendError
from texttok_cli.text.transformer import TransformerEncoder

# In the file, but no part of the token states: the pooler reads [CLS] only, position_ids is a range.
UNUSED = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}


def load_minilm(config: TextEncoderConfig, *, device: torch.device | str = "cpu", offline: bool = False) -> TransformerEncoder:
    """All-MiniLM-L6-v2's token states (384 wide). Raises BackendError if it is not to be had or the config asks for another shape."""
    bert = BertConfig.from_json_file(resolve("minilm-config", offline=offline))
    if config.dim != bert.hidden_size:
        raise BackendError(f"text encoder minilm: is {bert.hidden_size} wide, the config says dim {config.dim}: set dim={bert.hidden_size}")
    if config.max_tokens > bert.max_position_embeddings:
        limit = bert.max_position_embeddings
        raise BackendError(f"text encoder minilm: takes at most {limit} tokens, the config says max_tokens {config.max_tokens}: lower it")
    weights = load_file(resolve("minilm", offline=offline))
    model = BertModel(bert, add_pooling_layer=False)
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name not in UNUSED})
    tokenizer = Tokenizer.from_file(str(resolve("minilm-tokenizer", offline=offline)))
    return TransformerEncoder(config, model, tokenizer, device=device, fixed_length=False, pad_id=bert.pad_token_id)
