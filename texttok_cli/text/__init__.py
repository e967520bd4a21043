"""Frozen text encoders, and what keeps their embeddings."""

from texttok_cli.text.base import TextEncoder, cut_off, load_text_encoder
from texttok_cli.text.cache import EmbeddingCache
from texttok_cli.text.corpus import embed_corpus, estimate_bytes

__all__ = ["EmbeddingCache", "TextEncoder", "cut_off", "embed_corpus", "estimate_bytes", "load_text_encoder"]
