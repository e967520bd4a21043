"""TexTok: language-guided image tokenization."""

__version__ = "0.1.0"
