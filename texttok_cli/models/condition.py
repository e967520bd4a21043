"""What a model is told about an image besides its pixels: the one conditioning type, and how it enters a transformer.

Letters: B batch, T text tokens, C width of the text encoder, D width of the transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from texttok_cli.config.schema import ClassEmbedding, NoCondition, TokenizerConfig
from texttok_cli.models.layers import Block, run_blocks


@dataclass(frozen=True, slots=True)
class Condition:
    """Tokens `(B, T, C)` that condition a model, and which of them are real.

    `mask` is `(B, T)` bool, True where a token is real; None says that every token is, so a batch without padding
    runs without a mask and without asking the device.
    """

    tokens: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device | str) -> Condition:
        """The same condition on another device."""
        return Condition(self.tokens.to(device), None if self.mask is None else self.mask.to(device))


class ConditionProjection(nn.Module):
    """Sec. 3.2: text embeddings -> text tokens of the transformer's width; each half owns one.

    Padding is filled with zeros by `where` before anything is computed of it, so that not even a NaN in it gets out;
    the caller masks the same tokens as keys.
    """

    def __init__(self, cond_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(cond_dim, dim)

    def forward(self, cond: Condition) -> Condition:
        """Condition of width C -> condition of width D, mask unchanged."""
        tokens = cond.tokens
        if cond.mask is not None:
            tokens = torch.where(cond.mask[..., None], tokens, torch.zeros((), dtype=tokens.dtype, device=tokens.device))
        return Condition(self.proj(tokens), cond.mask)


class ConditionedTransformer(nn.Module):
    """One half's ViT, and the only place that decides how a condition enters it and whether it does (Table 4c, 4d)."""

    def __init__(self, cfg: TokenizerConfig, half: Literal["tokenizer", "detokenizer"]) -> None:
        super().__init__()
        backbone, cond = cfg.backbone, cfg.condition
        self.project, cross = None, False
        if not isinstance(cond, NoCondition) and cond.where in ("both", half):
            cond_dim = backbone.width if isinstance(cond, ClassEmbedding) else cond.encoder.dim
            self.project, cross = ConditionProjection(cond_dim, backbone.width), cond.mode == "cross_attention"
        self.in_context = not cross
        self.blocks = nn.ModuleList(Block(backbone, cross=cross) for _ in range(backbone.depth))
        self.norm = nn.LayerNorm(backbone.width)
        self.checkpointing = False  # compute each block but the last again in the backward pass

    def forward(self, x: Tensor, keep: slice, cond: Condition | None) -> Tensor:
        """Tokens x (B, L, D) and the condition (B, T, C) -> the tokens in `keep`, normalised, (B, K, D).

        Only the kept tokens are read afterwards, so the last block computes no others.
        """
        mask = text = text_mask = None
        if self.project is not None:
            assert cond is not None  # TexTok has checked it
            projected = self.project(cond)
            if self.in_context:
                mask = _extend_mask(projected.mask, x)
                x = torch.cat([x, projected.tokens.to(x.dtype)], dim=1)  # (B, L+T, D)
            else:
                text, text_mask = projected.tokens, projected.mask
        *blocks, last = self.blocks
        x = run_blocks(blocks, x, mask, text, text_mask, checkpointing=self.checkpointing)
        return self.norm(last(x, mask, text, text_mask, keep))  # type: ignore[no-any-return]


def _extend_mask(text_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Key mask (B, L+T) of L real tokens followed by the text tokens; None stays None."""
    if text_mask is None:
        return None
    return torch.cat([text_mask.new_ones(x.shape[:2]), text_mask], dim=1)
