"""DiT (Peebles & Xie, 2023) on TexTok's tokens or on a feature map, class-conditional or text-to-image.

Letters: B batch, N tokens, d latent channels, D width, T text tokens, M null tokens, C text width, S side of a feature map.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from texttok_cli.config.schema import DDPM, ClassLabels, GeneratorConfig, GridLatents, PromptCondition, TokenLatents, Transformer
from texttok_cli.models.condition import Condition, ConditionProjection
from texttok_cli.models.layers import Attention, CrossAttention, run_blocks
from texttok_cli.models.prepared import PreparedDiT
from texttok_cli.models.tokenizer import patchify, trunc_normal, unpatchify

FREQUENCIES = 256  # numbers that describe a time: half of them cosines, half sines
MAX_PERIOD = 10_000


class DiT(nn.Module):
    """Predicts what the process asks for (eps or velocity, and where learned the variance) of noisy, standardised latents.

    Every block is modulated by time (and class) through adaLN-Zero; text enters by a cross-attention layer after the
    self-attention of each block (Sec. 4.1, following PixArt), whose output projection starts at zero.
    """

    _no_split_modules = ("DiTBlock",)  # as transformers' models say it: what FSDP gathers at once

    latent_mean: Tensor
    latent_std: Tensor
    positions: Tensor

    def __init__(self, cfg: GeneratorConfig) -> None:
        super().__init__()
        self.cfg = cfg
        latents, cond, dim = cfg.latents, cfg.condition, cfg.backbone.width
        channels, self.latent_shape = latents.channels, latents.shape
        self.patch_size = latents.patch_size if isinstance(latents, GridLatents) else None
        features = channels * (self.patch_size or 1) ** 2
        predictions = 2 if isinstance(cfg.process, DDPM) and cfg.process.learned_sigma else 1
        self.embed = nn.Linear(features, dim)
        self.time = TimeEmbedding(dim)
        # The last row is the null class.
        self.classes = nn.Embedding(cond.num_classes + 1, dim) if isinstance(cond, ClassLabels) else None
        self.project = ConditionProjection(cond.encoder.dim, dim) if isinstance(cond, PromptCondition) else None
        self.null_tokens = nn.Parameter(torch.empty(cond.null_tokens, dim)) if isinstance(cond, PromptCondition) else None
        self.blocks = nn.ModuleList(DiTBlock(cfg.backbone, cross=isinstance(cond, PromptCondition)) for _ in range(cfg.backbone.depth))
        self.final_norm = _plain_norm(dim)
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.to_output = nn.Linear(dim, predictions * features)
        self.checkpointing = False  # compute each block but the last again in the backward pass
        # Computed, not stored: real even while the weights are built on the meta device, and never rounded in a file.
        self.register_buffer("positions", _positions(latents, dim), persistent=False)
        # Statistics of the tokenizer's latents, one number a channel.
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self._channel_shape = (channels,) if self.patch_size is None else (channels, 1, 1)
        self._init_weights()

    def forward(
        self, x: Tensor, t: Tensor, class_ids: Tensor | None = None, cond: Condition | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """Noisy latents at times t (B,) in [0, 1000) -> predictions of the same shape; with learned sigma twice the channels.

        x is (B, N, d), of a feature map (B, d, S, S). A class model takes class_ids (B,) int64, of which `num_classes` is the
        null class; a text model takes cond (B, T, C) and may take drop (B,) bool, True where the null tokens replace it.
        ValueError for other shapes and for a condition that the model doesn't take.
        """
        self._check(x, class_ids, cond, drop)
        c = self.modulator(t, class_ids)  # (B, D)
        text = None if cond is None else self._text(cond, drop)
        text_tokens, text_mask = (None, None) if text is None else (text.tokens, text.mask)
        *blocks, last = self.blocks
        h = run_blocks(blocks, self.tokens(x), c, text_tokens, text_mask, checkpointing=self.checkpointing)  # (B, N, D)
        return self.output(last(h, c, text_tokens, text_mask), self.final_modulation(c)[:, None])

    def prepare(self, times: Tensor, class_ids: Tensor | None = None, cond: Condition | None = None, *, null: bool) -> PreparedDiT:
        """This model for one batch at the times (steps,), with what doesn't depend on the latents computed once.

        `null` asks for the null condition too. ValueError for a condition that the model doesn't take.
        """
        self._check_condition(class_ids, cond, None)
        return PreparedDiT(self, times, class_ids, cond, null=null)

    def standardize(self, z: Tensor) -> Tensor:
        """Raw latents, as in files, -> mean 0 and deviation 1 in each channel."""
        return (z - self.latent_mean.view(self._channel_shape)) / self.latent_std.view(self._channel_shape)

    def destandardize(self, x: Tensor) -> Tensor:
        """The inverse of `standardize`."""
        return x * self.latent_std.view(self._channel_shape) + self.latent_mean.view(self._channel_shape)

    def set_checkpointing(self, on: bool) -> None:
        """Whether training computes each block but the last again in the backward pass instead of keeping its activations."""
        self.checkpointing = on

    def block_matrices(self) -> list[nn.Parameter]:
        """The weight matrices that act on tokens in the blocks, for Muon; the modulations, which act on the condition, are none."""
        return [p for name, p in self.blocks.named_parameters() if p.ndim == 2 and "modulation" not in name]

    # ---- parts that `forward` and PreparedDiT share

    def modulator(self, t: Tensor, class_ids: Tensor | None) -> Tensor:
        """What all modulations are linear in: times (B,) and, of a class model, ids (B,) -> (B, D)."""
        c = self.time(t)
        if self.classes is not None:
            c = c + self.classes(class_ids)
        return F.silu(c)

    def tokens(self, x: Tensor) -> Tensor:
        """Latents -> tokens (B, N, D) with their positions."""
        h: Tensor = self.embed(x if self.patch_size is None else patchify(x, self.patch_size))
        return h + self.positions.to(h.device)  # a move for a model on the meta device only; float32 carries the sum under autocast

    def output(self, h: Tensor, modulation: Tensor) -> Tensor:
        """Tokens (B, N, D), modulation (B, 1, 2D) -> prediction in the latents' layout."""
        y: Tensor = self.to_output(_modulate(self.final_norm(h), *modulation.chunk(2, dim=-1)))
        return y if self.patch_size is None else unpatchify(y, self.patch_size)

    def _text(self, cond: Condition, drop: Tensor | None) -> Condition:
        """Projected text tokens, in dropped rows the null tokens: (B, max(T, M), D)."""
        assert self.project is not None and self.null_tokens is not None
        text: Condition = self.project(cond)
        if drop is None:
            return text
        batch, num_text, _ = text.tokens.shape
        num_null = len(self.null_tokens)
        length = max(num_text, num_null)
        mask = text.tokens.new_ones(batch, num_text, dtype=torch.bool) if text.mask is None else text.mask
        mask = F.pad(mask, (0, length - num_text))
        null_mask = torch.arange(length, device=mask.device) < num_null
        tokens = F.pad(text.tokens, (0, 0, 0, length - num_text))
        null = F.pad(self.null_tokens, (0, 0, 0, length - num_null)).to(tokens)
        return Condition(torch.where(drop[:, None, None], null, tokens), torch.where(drop[:, None], null_mask, mask))

    def _check(self, x: Tensor, class_ids: Tensor | None, cond: Condition | None, drop: Tensor | None) -> None:
        if x.shape[1:] != self.latent_shape:
            raise ValueError(f"latents are {tuple(x.shape)}, not (B, {', '.join(map(str, self.latent_shape))})")
        self._check_condition(class_ids, cond, drop)

    def _check_condition(self, class_ids: Tensor | None, cond: Condition | None, drop: Tensor | None) -> None:
        if self.classes is not None and (class_ids is None or cond is not None or drop is not None):
            raise ValueError("a class-conditional model takes class ids and nothing else")
        if self.classes is None and (cond is None or class_ids is not None):
            raise ValueError("a text-to-image model takes text tokens and no class ids")

    def _init_weights(self) -> None:
        """As DiT: Xavier-uniform linears, N(0, 0.02) embeddings, and zeros where a block or the output begins as nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in self.time.linears():
            nn.init.normal_(linear.weight, std=0.02)
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)
        if self.null_tokens is not None:
            trunc_normal(self.null_tokens, 0.02)
        zeros = [self.final_modulation, self.to_output]
        for linear in zeros + [z for block in self.blocks if isinstance(block, DiTBlock) for z in block.zeros()]:
            nn.init.zeros_(linear.weight)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to text where there is one, and MLP, the first and last modulated by adaLN-Zero."""

    def __init__(self, cfg: Transformer, *, cross: bool) -> None:
        super().__init__()
        dim, hidden = cfg.width, int(cfg.width * cfg.mlp_ratio)
        self.norm1 = _plain_norm(dim)
        self.attn = Attention(cfg)
        # PixArt reads the text with unnormalised tokens; a norm without weights bounds its queries at no parameter's cost.
        self.norm_cross = _plain_norm(dim) if cross else None
        self.cross = CrossAttention(cfg) if cross else None
        self.norm2 = _plain_norm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Tokens x (B, N, D), modulator c (B, D), text (B, T, D) with its mask (B, T) -> (B, N, D)."""
        cross = self.cross
        read = None if cross is None or text is None else lambda q: cross(q, text, text_mask)
        return self.run(x, self.modulation(c)[:, None], read)

    def run(self, x: Tensor, modulation: Tensor, read: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Tokens (B, N, D), modulation (B, 1, 6D), and how normalised tokens read the text -> (B, N, D)."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)  # (B, 1, D) each
        x = x + gate_attn * self.attn(_modulate(self.norm1(x), shift_attn, scale_attn), None)
        if self.norm_cross is not None and read is not None:
            x = x + read(self.norm_cross(x))
        return x + gate_mlp * self.mlp(_modulate(self.norm2(x), shift_mlp, scale_mlp))  # type: ignore[no-any-return]

    def zeros(self) -> list[nn.Linear]:
        """The linears that begin as zero."""
        return [self.modulation] + ([] if self.cross is None else [self.cross.out])


class TimeEmbedding(nn.Module):
    """A time's cosines and sines at geometrically spaced frequencies, through an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * frequencies  # (B, half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))  # type: ignore[no-any-return]

    def linears(self) -> list[nn.Linear]:
        """The two layers."""
        return [layer for layer in self.mlp if isinstance(layer, nn.Linear)]


def _plain_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _positions(latents: TokenLatents | GridLatents, dim: int) -> Tensor:
    """Fixed sines and cosines (N, D) on the CPU: of a token's number; of a patch half its column's, half its row's."""
    if isinstance(latents, TokenLatents):
        return _sines(torch.arange(latents.num_tokens, device="cpu"), dim)
    side = latents.size // latents.patch_size
    rows, columns = torch.arange(side, device="cpu").repeat_interleave(side), torch.arange(side, device="cpu").repeat(side)
    return torch.cat([_sines(columns, dim // 2), _sines(rows, dim // 2)], dim=1)


def _sines(numbers: Tensor, dim: int) -> Tensor:
    """(N,) -> (N, dim), sines first."""
    half = dim // 2
    frequencies = MAX_PERIOD ** -(torch.arange(half, dtype=torch.float64, device="cpu") / half)
    angles = numbers[:, None].double() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
