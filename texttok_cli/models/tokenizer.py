"""TexTok (Sec. 3.2): an image and its text to N latent tokens, and back with the same text.

Letters: B batch, P patches (h*w), N latent tokens, T text tokens, D width, d latent channels, C text width, s patch size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from texttok_cli.config.schema import ClassEmbedding, KLBottleneck, NoCondition, TokenizerConfig, VQBottleneck
from texttok_cli.models.bottleneck import KL, VQ, Bottleneck, Continuous, Latents
from texttok_cli.models.condition import Condition, ConditionedTransformer
from texttok_cli.models.layers import Block


class TexTok(nn.Module):
    """Tokenizer and detokenizer, two ViTs; with `condition: {source: none}` it is the paper's Baseline (w/o text)."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        dim, pixels = cfg.backbone.width, 3 * cfg.patch_size**2
        self.num_patches = cfg.num_patches
        # tokenizer
        self.patch_embed = nn.Linear(pixels, dim)
        self.patch_pos = nn.Parameter(torch.empty(cfg.num_patches, dim))
        self.latent_tokens = nn.Parameter(torch.empty(cfg.num_tokens, dim))
        self.tokenizer = ConditionedTransformer(cfg, "tokenizer")
        self.bottleneck = _bottleneck(cfg)
        # detokenizer
        self.latent_embed = nn.Linear(cfg.latent_dim, dim)
        self.latent_pos = nn.Parameter(torch.empty(cfg.num_tokens, dim))
        self.patch_tokens = nn.Parameter(torch.empty(cfg.num_patches, dim))
        self.detokenizer = ConditionedTransformer(cfg, "detokenizer")
        self.to_pixels = nn.Linear(dim, pixels)
        # class table of Table 4a; text comes from a frozen encoder outside
        self.classes = nn.Embedding(cfg.condition.num_classes, dim) if isinstance(cfg.condition, ClassEmbedding) else None
        # Statistics of the latents over training images, for the generator's door and int8 files.
        self.register_buffer("latent_mean", torch.zeros(cfg.latent_dim))
        self.register_buffer("latent_std", torch.ones(cfg.latent_dim))
        self._init_weights()

    def forward(self, images: Tensor, cond: Condition | None, class_ids: Tensor | None = None) -> tuple[Tensor, Latents]:
        """Images (B, 3, H, W) in [-1, 1] -> their reconstructions, same shape, and latents (B, N, d)."""
        cond = self.resolve(cond, class_ids)
        latents = self.encode(images, cond)
        return self.decode(latents.z, cond), latents

    def encode(self, images: Tensor, cond: Condition | None) -> Latents:
        """Images (B, 3, H, W) in [-1, 1] -> latents z (B, N, d). ValueError for another size or a wrong condition."""
        size = self.cfg.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images are {tuple(images.shape)}, not (B, 3, {size}, {size})")
        self._check(cond)
        patches = self.patch_embed(patchify(images, self.cfg.patch_size)) + self.patch_pos  # (B, P, D)
        queries = self.latent_tokens.expand(len(images), -1, -1)  # (B, N, D)
        x = torch.cat([patches, queries.to(patches.dtype)], dim=1)  # (B, P+N, D)
        keep = slice(self.num_patches, self.num_patches + self.cfg.num_tokens)
        return self.bottleneck(self.tokenizer(x, keep, cond))  # type: ignore[no-any-return]

    def decode(self, z: Tensor, cond: Condition | None) -> Tensor:
        """Latents (B, N, d) -> images (B, 3, H, W), nominally in [-1, 1] (not clamped). ValueError for another shape."""
        if z.shape[1:] != (self.cfg.num_tokens, self.cfg.latent_dim):
            raise ValueError(f"latents are {tuple(z.shape)}, not (B, {self.cfg.num_tokens}, {self.cfg.latent_dim})")
        self._check(cond)
        latents = self.latent_embed(z) + self.latent_pos  # (B, N, D)
        queries = self.patch_tokens.expand(len(z), -1, -1)  # (B, P, D)
        x = torch.cat([queries.to(latents.dtype), latents], dim=1)  # (B, P+N, D)
        x = self.detokenizer(x, slice(0, self.num_patches), cond)  # (B, P, D)
        return unpatchify(self.to_pixels(x), self.cfg.patch_size)

    def resolve(self, cond: Condition | None, class_ids: Tensor | None = None) -> Condition | None:
        """The condition itself; or of class ids (B,) int64 their learned embedding as one token each, (B, 1, D)."""
        if class_ids is None:
            return cond
        if self.classes is None:
            raise ValueError("this model has no class embedding")
        return Condition(self.classes(class_ids)[:, None])

    def set_checkpointing(self, on: bool) -> None:
        """Whether training computes each block but the last again in the backward pass instead of keeping its activations."""
        self.tokenizer.checkpointing = self.detokenizer.checkpointing = on

    def freeze_tokenizer(self) -> None:
        """Let training change the detokenizer alone: the latents of an image stay what they are."""
        self.requires_grad_(False)
        for part in (self.latent_embed, self.detokenizer, self.to_pixels):
            part.requires_grad_(True)
        for table in (self.latent_pos, self.patch_tokens):
            table.requires_grad_(True)

    def block_matrices(self) -> list[nn.Parameter]:
        """The transformer blocks' weight matrices: what Muon orthogonalises."""
        return [p for m in self.modules() if isinstance(m, Block) for p in m.parameters() if p.ndim == 2]

    def _check(self, cond: Condition | None) -> None:
        if isinstance(self.cfg.condition, NoCondition) != (cond is None):
            raise ValueError("a model without condition was given one" if cond is not None else "this model needs a condition")

    def _init_weights(self) -> None:
        scaled = self.cfg.backbone.init == "scaled"
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal(module.weight, module.in_features**-0.5 if scaled else 0.02)
                nn.init.zeros_(module.bias)
        tables = [self.patch_pos, self.latent_tokens, self.latent_pos, self.patch_tokens]
        for table in tables if self.classes is None else [*tables, self.classes.weight]:
            trunc_normal(table, 0.5 if scaled else 0.02)
        if scaled:
            blocks = [m for m in self.modules() if isinstance(m, Block)]
            for linear in [out for block in blocks for out in block.residual_outputs()] + [self.to_pixels]:
                nn.init.zeros_(linear.weight)


def _bottleneck(cfg: TokenizerConfig) -> Bottleneck:
    dim, chosen = cfg.backbone.width, cfg.bottleneck
    if isinstance(chosen, KLBottleneck):
        return KL(dim, cfg.latent_dim, weight=chosen.weight)
    if isinstance(chosen, VQBottleneck):
        return VQ(dim, cfg.latent_dim, codes=chosen.codes, commitment=chosen.commitment, weight=chosen.weight)
    return Continuous(dim, cfg.latent_dim)


def trunc_normal(weight: Tensor, std: float) -> None:
    """Fill with N(0, std) cut at three standard deviations, in place."""
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, P, C*s*s), patches in row-major order."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)  # (B, C, h, s, w, s)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """(B, P, C*s*s) -> (B, C, H, W) of a square image: the inverse of `patchify`."""
    side = int(patches.shape[1] ** 0.5)
    channels = patches.shape[2] // patch_size**2
    x = patches.reshape(len(patches), side, side, channels, patch_size, patch_size)  # (B, h, w, C, s, s)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
