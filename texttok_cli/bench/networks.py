"""What is timed: networks of the paper's sizes with random weights (time does not depend on their values), and what they need.

Letters: B batch, N latent tokens, T text tokens, C width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from texttok_cli.bench.machine import free_memory
from texttok_cli.config import Precision
from texttok_cli.config.schema import GeneratorConfig, TokenizerConfig
from texttok_cli.models.condition import Condition
from texttok_cli.models.devices import without_weights
from texttok_cli.models.layers import autocast, in_precision
from texttok_cli.models.tokenizer import TexTok

T5_OF_SIZE = {256: "XL", 512: "XXL"}  # Sec. 4.1
T5_WIDTH = {"XL": 2048, "XXL": 4096}
TEXT_TOKENS = 128  # Sec. 4.1
PATCH_OF_SIZE = {256: 8, 512: 16}
SAMPLE_SIDE = 128  # of the pictures that come with the package
RESERVE = 1e9  # bytes that the rest of the program and of the machine may want meanwhile

Network = TypeVar("Network", bound=nn.Module)
Kind = Literal["TexTok", "Baseline"]
Half = Literal["encode", "decode"]
Workload = Callable[[], object]


class DoesNotFit(Exception):
    """More memory than there is; the message says how much."""


@dataclass(frozen=True)
class Where:
    """Device and arithmetic of a run."""

    device: torch.device
    precision: Precision

    def inference(self, work: Workload) -> Workload:
        """The work as models are run: in the precision, without gradients."""

        @torch.inference_mode()
        def run() -> object:
            with autocast(self.device, self.precision):
                return work()

        return run

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return 2 if self.precision == "bf16" else 4


def tokenizer_config(kind: Kind, tokens: int, image_size: int) -> TokenizerConfig:
    """The paper's tokenizer, size B, as its recipes have it."""
    condition: dict[str, object] = {"source": "none"}
    if kind == "TexTok":
        t5 = T5_OF_SIZE[image_size]
        encoder = {"kind": "t5", "name": f"google/t5-v1_1-{t5.lower()}", "dim": T5_WIDTH[t5], "max_tokens": TEXT_TOKENS}
        condition = {"source": "caption", "encoder": encoder}
    return TokenizerConfig.model_validate(
        {"image_size": image_size, "patch_size": PATCH_OF_SIZE[image_size], "num_tokens": tokens, "condition": condition}
    )


def generator_config(size: str, tokens: int) -> GeneratorConfig:
    """A class-conditional DiT on N tokens."""
    return GeneratorConfig.model_validate({"latents": {"kind": "tokens", "num_tokens": tokens}, "backbone": size})


def grid_generator_config(size: str, image_size: int) -> GeneratorConfig:
    """The original DiT with patch 2 on SD-VAE's latents."""
    return GeneratorConfig.model_validate({"latents": {"kind": "grid", "size": image_size // 8}, "backbone": size})


def rows_of(cfg: TokenizerConfig) -> int:
    """Tokens in each block's sequence for one image: patches, latents, and text."""
    text = TEXT_TOKENS if cfg.condition.source != "none" else 0
    return cfg.num_patches + cfg.num_tokens + text


def text_states(cfg: TokenizerConfig, batch: int, where: Where) -> Condition | None:
    """Random text tokens (B, T, C), all of them real."""
    if cfg.condition.source != "caption":
        return None
    return Condition(torch.randn(batch, TEXT_TOKENS, cfg.condition.encoder.dim, device=where.device))


def weights_bytes(build: Callable[[], nn.Module], element: int) -> int:
    """Bytes of a network's weights, without allocating them."""
    with without_weights():
        return sum(p.numel() for p in build().parameters()) * element


def forward_bytes(rows: int, width: int, element: int) -> int:
    """Upper estimate of a transformer's activations in a forward pass: some 16 vectors a token at once (q, k, v, hidden, residual)."""
    return 16 * rows * width * element


def convolution_bytes(batch: int, image_size: int) -> int:
    """Upper estimate of SD-VAE's activations in fp32: three maps of 256 channels at full resolution."""
    return batch * image_size**2 * 256 * 4 * 3


def check_fits(needed: float, device: torch.device) -> None:
    """DoesNotFit if so many bytes are not free on the device."""
    free = free_memory(device)
    if needed + RESERVE > free:
        raise DoesNotFit(f"needs about {needed / 1e9:.1f} GB and 1 GB in reserve, {free / 1e9:.1f} GB are free")


def materialize(build: Callable[[], Network], where: Where, precision: Precision = "fp32") -> Network:
    """A network for inference on the device, its weights and buffers random, in values that repeat: drawing gigabytes takes longer
    than timing them."""
    with without_weights():
        network = in_precision(build(), precision)  # never as large as in fp32
    network.to_empty(device=where.device)
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            _fill(tensor)
        else:
            tensor.zero_()
    return in_precision(network, precision).eval().requires_grad_(False)


@torch.no_grad()
def _fill(tensor: Tensor) -> None:
    flat = tensor.view(-1)
    values = torch.randn(min(1 << 20, len(flat)), device=tensor.device, dtype=tensor.dtype) * 0.02
    for start in range(0, len(flat), len(values)):
        part = flat[start : start + len(values)]
        part.copy_(values[: len(part)])


def texttok_work(half: Half, cfg: TokenizerConfig, where: Where) -> Callable[[int], Workload]:
    """A tokenizer of ours, and by the number of images what a half of it does."""
    model = materialize(lambda: TexTok(cfg), where, where.precision)

    def work(batch: int) -> Workload:
        cond = text_states(cfg, batch, where)
        images = torch.rand(batch, 3, cfg.image_size, cfg.image_size, device=where.device) * 2 - 1
        z = torch.randn(batch, cfg.num_tokens, cfg.latent_dim, device=where.device)
        return where.inference(lambda: model.encode(images, cond) if half == "encode" else model.decode(z, cond))

    return work


def sd_vae_work(half: Half, image_size: int, where: Where) -> Callable[[int], Workload]:
    """SD-VAE, and by the number of images what a half of it does. BackendError without diffusers."""
    from texttok_cli.baselines.sd_vae import untrained_sd_vae

    model: Any = materialize(untrained_sd_vae, where)

    def work(batch: int) -> Workload:
        images = torch.rand(batch, 3, image_size, image_size, device=where.device) * 2 - 1
        z = torch.randn(batch, 4, image_size // 8, image_size // 8, device=where.device)
        return where.inference(lambda: model.encode(images).latent_dist.mode() if half == "encode" else model.decode(z).sample)

    return work
