"""A TexTok the straightforward way, to see what ours gains: fp32, attention written out, every token computed in every block.

Letters: B batch, L sequence, D width, H heads, E width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from texttok_cli.models.condition import Condition, ConditionedTransformer
from texttok_cli.models.layers import Block
from texttok_cli.models.tokenizer import TexTok, patchify, unpatchify


@torch.inference_mode()
def plain_reconstruct(model: TexTok, images: Tensor, cond: Condition | None) -> Tensor:
    """What `model` makes of images (B, 3, H, W), by the paper's description; for text in context or none."""
    tokens = model.cfg.num_tokens
    patches = model.patch_embed(patchify(images, model.cfg.patch_size)) + model.patch_pos
    x = torch.cat([patches, model.latent_tokens.expand(len(images), -1, -1)], dim=1)
    x = _transformer(model.tokenizer, x, cond)[:, model.num_patches : model.num_patches + tokens]
    z = model.bottleneck(x).z
    x = torch.cat([model.patch_tokens.expand(len(z), -1, -1), model.latent_embed(z) + model.latent_pos], dim=1)
    x = _transformer(model.detokenizer, x, cond)[:, : model.num_patches]
    return unpatchify(model.to_pixels(x), model.cfg.patch_size)


def _transformer(half: ConditionedTransformer, x: Tensor, cond: Condition | None) -> Tensor:
    mask = None
    if half.project is not None and cond is not None:
        text = half.project(cond)
        if text.mask is not None:
            mask = torch.cat([text.mask.new_ones(x.shape[:2]), text.mask], dim=1)[:, None, None]  # (B, 1, 1, L)
        x = torch.cat([x, text.tokens], dim=1)
    for block in half.blocks:
        x = _block(block, x, mask)
    return half.norm(x)  # type: ignore[no-any-return]


def _block(block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    assert isinstance(block, Block)
    heads = block.attn.heads
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in block.attn.qkv(block.norm1(x)).chunk(3, dim=-1))  # (B, H, L, E)
    q, k = block.attn.norm_q(q), block.attn.norm_k(k)
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B, H, L, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    y = (F.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
    x = x + block.attn.out(y)
    return x + block.mlp(block.norm2(x))  # type: ignore[no-any-return]
