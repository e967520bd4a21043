"""Tokens of a model that there is not, for tests of the files that hold them."""

from collections.abc import Sequence
from typing import Any

import torch

from texttok_cli.tokens import TokenHeader, Tokens, joined

MODEL = "ab" * 32
MEAN, STD = [0.5, -1.0, 0.0], [1.0, 0.25, 2.0]


def make(n: int = 2, *, seed: int = 0, first: int = 0, **changes: Any) -> Tokens:
    """n images called i0, i1, ... with latents (n, 4, 3)."""
    z = torch.randn(n, 4, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor(STD) + torch.tensor(MEAN)
    if changes.get("dtype") == "int8":
        changes = {"mean": MEAN, "std": STD, **changes}
    fields: dict[str, Any] = {
        "texttok_tokens": 2,
        "model_name": "tiny",
        "model_sha256": MODEL,
        "dtype": "fp32",
        "image_size": 32,
        "ids": [f"i{first + i}" for i in range(n)],
        "flipped": [False] * n,
        "captions": [f"a caf\u00e9 \u732b {first + i}" for i in range(n)],
        "input_sha256": [f"{seed * 1000 + first + i:064x}" for i in range(n)],
        "original_sizes": [(40, 30 + i) for i in range(n)],
    }
    return Tokens(z, TokenHeader(**{**fields, **changes}))


def make_codes(n: int = 2, *, codes: int = 1000, dtype: str = "int16") -> Tokens:
    """Codes (n, 4) of a codebook, the first and the last among them."""
    z = torch.randint(codes, (n, 4), generator=torch.Generator().manual_seed(0))
    z[0, :2] = torch.tensor([0, codes - 1])
    return Tokens(z, make(n).header.model_copy(update={"dtype": dtype, "codes": codes}))


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """Tokens of one model and dtype, one after the other."""
    return Tokens(torch.cat([part.z for part in parts]), joined([part.header for part in parts]))
