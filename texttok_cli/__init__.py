"""TexTok: language-guided image tokenization.

    from texttok_cli import load_tokenizer

    tokenizer = load_tokenizer()                                   # the bundled one; or a path, or hf://owner/name
    z = tokenizer.encode("img.png", "a red flower in a garden")    # (1, 32, 8)
    image = tokenizer.decode(z, "a red flower in a garden")        # (1, 3, 128, 128) uint8

Names are imported when they are first used, so that `import texttok_cli` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from texttok_cli.captioners.load import load_captioner
    from texttok_cli.captioners.run import write_captions
    from texttok_cli.config.loader import load_recipe
    from texttok_cli.data import open_dataset
    from texttok_cli.errors import TextTokError
    from texttok_cli.generation import Generator, load_generator
    from texttok_cli.inference import Tokenizer, bundled_models, encode_dataset, encode_folder, load_tokenizer
    from texttok_cli.metrics.evaluation import evaluate
    from texttok_cli.tokens import Tokens, load_tokens, save_tokens
    from texttok_cli.training import train

_HOMES = {
    "Generator": "generation",
    "TextTokError": "errors",
    "Tokenizer": "inference",
    "Tokens": "tokens",
    "bundled_models": "inference",
    "encode_dataset": "inference",
    "encode_folder": "inference",
    "evaluate": "metrics.evaluation",
    "load_captioner": "captioners.load",
    "load_generator": "generation",
    "load_recipe": "config.loader",
    "load_tokenizer": "inference",
    "load_tokens": "tokens",
    "open_dataset": "data",
    "save_tokens": "tokens",
    "train": "training",
    "write_captions": "captioners.run",
}
__all__ = [
    "Generator",
    "TextTokError",
    "Tokenizer",
    "Tokens",
    "bundled_models",
    "encode_dataset",
    "encode_folder",
    "evaluate",
    "load_captioner",
    "load_generator",
    "load_recipe",
    "load_tokenizer",
    "load_tokens",
    "open_dataset",
    "save_tokens",
    "train",
    "write_captions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:  # for completion in a notebook
    return sorted([*globals(), *__all__])
