"""T5 v1.1 and Flan-T5 encoders, the paper's text encoders (Sec. 4.1: XL at 256 px, XXL at 512 px, 128 tokens)."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, T5Config, T5EncoderModel
from transformers.utils import logging

from texttok_cli.assets import is_offline
from texttok_cli.config.schema import TextEncoderConfig
from texttok_cli.errors import BackendError
from texttok_cli.models.layers import DTYPES
from texttok_cli.text.transformer import TransformerEncoder


class _States(nn.Module):
    """T5's encoder as `TransformerEncoder` calls it: it returns the states of the last layer alone."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Token ids and mask of real ones (B, T) -> states of the last layer (B, T, C)."""
        states: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states


def load_t5(config: TextEncoderConfig, *, device: torch.device | str, offline: bool) -> TransformerEncoder:
    """A T5 encoder by hub name or local folder (`config.name`), every batch padded to `config.max_tokens`.

    Precision is fp32 or bf16: in fp16 T5's feed-forward layers overflow. The hub is asked for what is not cached, unless
    offline. Raises BackendError if the model is not available, is not a T5, is incomplete or has another width than `config.dim`.
    """
    name = str(config.name)
    local = is_offline(offline)
    try:
        # First what is small, so that a wrong name or width shows before gigabytes are loaded. The name may be a model file's: without a
        # word on the code of a repository transformers would ask whether to run it.
        shape = AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        _check_shape(name, shape, config.dim)
        tokenizer = _load_tokenizer(name, local=local, embeddings=shape.vocab_size)
        model, report = T5EncoderModel.from_pretrained(
            name, config=shape, dtype=DTYPES[config.precision], local_files_only=local, weights_only=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:  # the hub's errors are OSErrors too
        raise BackendError(_not_found(name, offline=local, error=error)) from error
    if report["missing_keys"]:
        raise BackendError(
            f"text encoder {name}: weights are missing ({sorted(report['missing_keys'])[0]}, ...): is the T5 model complete?"
        )
    return TransformerEncoder(config, _States(model), tokenizer, device=device, pad_id=shape.pad_token_id, fixed_length=True)


def _check_shape(name: str, shape: AutoConfig, dim: int) -> None:
    if shape.model_type != "t5":
        raise BackendError(f"text encoder {name}: is a {shape.model_type!r} model, not a T5 (v1.1 or Flan)")
    if shape.d_model != dim:
        raise BackendError(f"text encoder {name}: is {shape.d_model} wide, the config says dim {dim}: set dim={shape.d_model}")


def _load_tokenizer(name: str, *, local: bool, embeddings: int) -> Tokenizer:
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("tokenizer.json", "spiece.model")):
        raise BackendError(_not_found(name, offline=local))
    help_ = "it takes a whole tokenizer.json, or a whole spiece.model and `pip install --upgrade sentencepiece protobuf`"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn at length of what the error says, and recommend a library that doesn't help
    try:
        loaded = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # tokenizers' own are no narrower; google/t5-v1_1-* have only spiece.model, which other libraries read
        raise BackendError(f"text encoder {name}: its tokenizer can't be read: {help_}") from error
    finally:
        logging.set_verbosity(verbosity)
    tokenizer: Tokenizer = loaded.backend_tokenizer
    if 2 * tokenizer.get_vocab_size() < embeddings:  # for want of a vocabulary transformers makes one up, of some 100 entries
        raise BackendError(f"text encoder {name}: its tokenizer has no vocabulary: {help_}")
    return tokenizer


def _not_found(name: str, *, offline: bool, error: object = "") -> str:
    if Path(name).is_dir():
        return f"text encoder {name}: the folder needs a whole config.json, model.safetensors and tokenizer.json"
    if offline:
        return f"text encoder {name}: neither a folder nor in the hub cache: give a local folder as its name, or run once without --offline"
    reason = str(error).partition("\n")[0]
    return f"text encoder {name}: not a folder, and not found on the hub; check the name and the network, or give a local folder ({reason})"


# T5 v1.1's encoders: width, width of the gated feed-forward, layers, heads of 64 channels.
T5_SIZES = {"XL": (2048, 5120, 24, 32), "XXL": (4096, 10240, 24, 64)}


def untrained_t5(size: str) -> nn.Module:
    """T5 v1.1's encoder of this size as it comes into being, on torch's default device: to plan with and to time."""
    width, hidden, layers, heads = T5_SIZES[size]
    shape = T5Config(d_model=width, d_ff=hidden, num_layers=layers, num_heads=heads, d_kv=64, feed_forward_proj="gated-gelu")
    return _States(T5EncoderModel(shape)).eval().requires_grad_(False)
