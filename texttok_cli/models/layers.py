"""The transformer block: self-attention, optional cross-attention, MLP; pre-norm, as in ViT.

Letters: B batch, L sequence, K kept tokens, T condition tokens, D width, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from texttok_cli.config import Precision
from texttok_cli.config.schema import Transformer
from texttok_cli.errors import BackendError

Model = TypeVar("Model", bound=nn.Module)
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALL = slice(None)
CACHED_SCORES = 2**19  # attention scores that a core's cache holds beside their operands
AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))
# torch.compile's own operators, which have no public name.
PACKS = bool(torch.cpu.get_capabilities().get("avx512_bf16")) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
LONG = 256  # tokens, of queries and of keys


class _RMSNorm(nn.RMSNorm):
    """In fp32 whatever autocast has made of the input, as torch's layer norm is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Attention(nn.Module):
    """Multi-head self-attention; queries may be taken from some tokens only (`keep`), keys and values from all.

    Optional QK-normalisation is an RMSNorm over each head's channels.
    """

    def __init__(self, cfg: Transformer) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.out = nn.Linear(cfg.width, cfg.width)
        self.norm_q, self.norm_k = _qk_norms(cfg)

    def forward(self, x: Tensor, mask: Tensor | None, keep: slice = ALL) -> Tensor:
        """x (B, L, D), mask (B, L) bool of real keys -> (B, K, D) for the K tokens in `keep`."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, L, D) each
        q, k, v = (_split_heads(t, self.heads) for t in (q[:, keep], k, v))  # (B, H, ., E)
        y = attend(self.norm_q(q), self.norm_k(k), v, mask)
        return self.out(y)  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to a condition (Table 4c's alternative to in-context conditioning)."""

    def __init__(self, cfg: Transformer) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.q = nn.Linear(cfg.width, cfg.width)
        self.kv = nn.Linear(cfg.width, 2 * cfg.width)
        self.out = nn.Linear(cfg.width, cfg.width)
        self.norm_q, self.norm_k = _qk_norms(cfg)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, L, D), condition tokens (B, T, D), mask (B, T) -> (B, L, D); a row with no real token adds nothing."""
        return self.read(x, *self.keys_values(tokens), mask)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Condition tokens (B, T, D) -> their keys and values, (B, H, T, E) each, which do not depend on what reads them."""
        k, v = (_split_heads(t, self.heads) for t in self.kv(tokens).chunk(2, dim=-1))
        return self.norm_k(k), v

    def read(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`forward` with the keys and values (B, H, T, E) given."""
        q = self.norm_q(_split_heads(self.q(x), self.heads))  # (B, H, L, E)
        if mask is None:
            return self.out(attend(q, k, v, None))  # type: ignore[no-any-return]
        has_text = mask.any(dim=1, keepdim=True)  # (B, 1)
        # A softmax over no keys is NaN, in the gradient too: such a row attends to its padding and is then dropped.
        y = self.out(attend(q, k, v, mask | ~has_text))
        return torch.where(has_text[..., None], y, torch.zeros((), dtype=y.dtype, device=y.device))


class Block(nn.Module):
    """Pre-norm transformer block; `keep` drops the tokens nobody reads any more (used in the last block)."""

    def __init__(self, cfg: Transformer, *, cross: bool) -> None:
        super().__init__()
        hidden = int(cfg.width * cfg.mlp_ratio)
        self.norm1 = nn.LayerNorm(cfg.width)
        self.attn = Attention(cfg)
        self.norm_cross = nn.LayerNorm(cfg.width) if cross else None
        self.cross = CrossAttention(cfg) if cross else None
        self.norm2 = nn.LayerNorm(cfg.width)
        self.mlp = nn.Sequential(nn.Linear(cfg.width, hidden), nn.GELU(), nn.Linear(hidden, cfg.width))

    def forward(
        self, x: Tensor, mask: Tensor | None, text: Tensor | None = None, text_mask: Tensor | None = None, keep: slice = ALL
    ) -> Tensor:
        """x (B, L, D) with real keys `mask` (B, L), cross-attended tokens `text` (B, T, D) -> (B, K, D)."""
        x = x[:, keep] + self.attn(self.norm1(x), mask, keep)
        if self.cross is not None and self.norm_cross is not None and text is not None:
            x = x + self.cross(self.norm_cross(x), text, text_mask)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def residual_outputs(self) -> list[nn.Linear]:
        """The last linear of each residual branch."""
        branches = [self.attn.out, self.mlp[2]] + ([] if self.cross is None else [self.cross.out])
        return [linear for linear in branches if isinstance(linear, nn.Linear)]


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *context: Tensor | None, checkpointing: bool) -> Tensor:
    """x through the blocks, each given `context` too; with `checkpointing` a backward pass computes them again."""
    again = checkpointing and torch.is_grad_enabled()
    for block in blocks:
        x = checkpoint(block, x, *context, use_reentrant=False) if again else block(x, *context)
    return x


class PackedLinear(nn.Module):
    """A linear layer in bf16 on a CPU, its weight in the order in which oneDNN multiplies: `F.linear` would reorder it in every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) in any floating type -> (..., out) in bf16."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self.weight, self.bias, "none", [], "")
        return y


def in_precision(model: Model, precision: Precision) -> Model:
    """The model itself, for bf16 with its linear layers rounded once, as autocast would round them again in every call, and packed on
    a CPU that can.

    For inference alone, on the model's device: what it computes under autocast, or on inputs in bf16, does not change.
    BackendError for another precision than these: nothing else would say that it is not computed in.
    """
    if precision not in DTYPES:
        raise BackendError(f"precision {precision!r}: there are {' and '.join(DTYPES)}")
    for module in list(model.modules()) if precision == "bf16" else ():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                packs = PACKS and child.weight.device.type == "cpu"
                setattr(module, name, PackedLinear(child.to(torch.bfloat16)) if packs else child.to(torch.bfloat16))
    return model


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a model computes in this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Within it cuDNN's convolutions don't round float32 to TF32, their default: what is measured would depend on the machine."""
    # Not by cudnn.flags: it gives way to, and may fail with, what a program says by these newer names, and undoes its `deterministic`.
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention: q (B, H, L, E), k and v (B, H, S, E), mask (B, S) of real keys -> (B, L, H*E)."""
    key_mask = None if mask is None else mask[:, None, None, :]
    if q.device.type != "cpu" or fused_is_faster(v.dtype, q.shape[2], k.shape[2], training=q.requires_grad):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
    else:
        y = (_explicit_attention if q.requires_grad else _attention_by_heads)(q, k, v, key_mask)
    return y.transpose(1, 2).flatten(2)


def fused_is_faster(dtype: torch.dtype, queries: int, keys: int, *, training: bool) -> bool:
    """Whether torch's kernel is faster on this CPU than the formula written out, as benchmarks/attention.py measures it.

    In bf16 it needs AMX for that, and its backward pass many tokens as well.
    """
    if dtype != torch.bfloat16:
        return True
    if training:
        return AMX and queries * keys >= LONG**2
    return AMX or torch.compiler.is_compiling()  # which would unroll the loop over heads


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The formula itself, for training in bf16 on a CPU."""
    scores = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).float()  # (B, H, L, S); softmax in fp32 under autocast
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights: Tensor = scores.softmax(dim=-1)
    return weights.to(v.dtype) @ v


def _attention_by_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The formula for some heads at a time, for bf16 on a CPU without AMX: two matmuls whose scores stay in the cache. Scores are
    rounded to bf16, as in training; the softmax itself adds up in fp32."""
    batch, heads, length, _ = q.shape
    group = max(1, CACHED_SCORES // (length * k.shape[2]))
    parts = [torch.split(t.flatten(0, 1), group) for t in (q * q.shape[-1] ** -0.5, k, v)]
    masks = [None] * len(parts[0]) if mask is None else torch.split((~mask).expand(-1, heads, -1, -1).flatten(0, 1), group)
    outputs = []
    for q_part, k_part, v_part, dropped in zip(*parts, masks, strict=True):
        scores = q_part @ k_part.transpose(-2, -1)
        if dropped is not None:
            scores = scores.masked_fill(dropped, float("-inf"))
        outputs.append(scores.softmax(dim=-1) @ v_part)
    return torch.cat(outputs).view(batch, heads, length, -1)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)  # (B, L, D) -> (B, H, L, E)


def _qk_norms(cfg: Transformer) -> tuple[nn.Module, nn.Module]:
    if not cfg.qk_norm:
        return nn.Identity(), nn.Identity()
    size = cfg.width // cfg.heads
    return _RMSNorm(size, eps=1e-6), _RMSNorm(size, eps=1e-6)
