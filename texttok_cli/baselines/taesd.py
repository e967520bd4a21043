"""TAESD and its relatives (Ollin Boer Bohan, MIT): tiny convolutional autoencoders, 8 x 8 pixels to one latent.

Letters: B batch, S image side, d latent channels (4; 16 of the SD3 and FLUX.1 ones, 32 of the FLUX.2 one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from texttok_cli.assets import load_torch_weights
from texttok_cli.baselines.base import Baseline, BaselineInfo
from texttok_cli.errors import CheckpointError
from texttok_cli.files import below, sha256_file
from texttok_cli.models.layers import exact_convolutions

HALVES = ("encoder", "decoder")
WIDTH = 64
POOL_WIDTH, POOL_GROUPS = 4 * WIDTH, 4  # of the FLUX.2 one's coarsest blocks


class TinyAutoencoder(Baseline):
    """A loaded autoencoder: images to latents and back, as `Tokenizer` does it; it takes no text and any size that 8 divides.

    `path` is a .safetensors with diffusers' names (AutoencoderTiny), or a folder of the authors' own NAME_encoder.pth and
    NAME_decoder.pth; of any float type. Raises CheckpointError for another, BackendError for a .pth that is none.
    """

    def __init__(self, name: str, path: Path, *, device: torch.device | str) -> None:
        files = [path / f"{name}_{half}.pth" for half in HALVES] if path.is_dir() else [path]
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file}: no such file")
        try:
            weights = [_numbered(load_torch_weights(file)) for file in files] if path.is_dir() else _halves(load_file(path))
            self.encoder, self.decoder = (_filled(*part) for part in zip(HALVES, weights, strict=True))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as err:
            raise CheckpointError(f"{path}: not the weights of a tiny autoencoder ({type(err).__name__})") from None
        self.channels = len(weights[1]["0.weight"][0])
        self.device = torch.device(device)
        for half in (self.encoder, self.decoder):
            half.eval().requires_grad_(False).to(self.device).to(memory_format=torch.channels_last)
        self.info = BaselineInfo(name, "+".join(map(sha256_file, files)))

    @torch.inference_mode()
    def encode(self, images: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """uint8 (B, 3, S, S) -> latents (B, d, S/8, S/8) float32 on the CPU. DataError for a side that 8 does not divide."""
        self.check_size(images)
        with exact_convolutions():
            z: Tensor = self.encoder(_laid_out(images.to(self.device).float() / 255))
        return z.cpu()

    @torch.inference_mode()
    def decode(self, z: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """Latents -> uint8 (B, 3, S, S) on the CPU, rounding half up."""
        pixels = self.decode_float(z)
        return (255 * pixels + 0.5).to(torch.uint8).cpu()

    @torch.inference_mode()
    def decode_float(self, z: Tensor) -> Tensor:
        """Latents -> (B, 3, S, S) float32 in [0, 1]; they are bounded to +-3 first, smoothly, as their authors do."""
        with exact_convolutions():
            pixels: Tensor = self.decoder(_laid_out(3 * torch.tanh(z.to(self.device) / 3)))
        return pixels.clamp(0, 1)


class _Block(nn.Module):
    """Three convolutions around which the input goes; `pool` first adds what its channels say over the whole image."""

    def __init__(self, *, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        widen, narrow = (nn.Conv2d(*widths, 1, bias=False) for widths in ((WIDTH, POOL_WIDTH), (POOL_WIDTH, WIDTH)))
        self.pool = nn.Sequential(widen, nn.GroupNorm(POOL_GROUPS, POOL_WIDTH), nn.ReLU(), narrow) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64, H, W) -> the same shape."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _conv(inputs: int = WIDTH, outputs: int = WIDTH, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


def _encoder(channels: int, *, pool: bool) -> nn.Sequential:
    layers = [_conv(3), _Block()]
    for coarsest in (False, False, True):
        layers += [_conv(stride=2, bias=False), *(_Block(pool=pool and coarsest) for _ in range(3))]
    return nn.Sequential(*layers, _conv(outputs=channels))


def _decoder(channels: int, *, pool: bool) -> nn.Sequential:
    layers = [_conv(channels), nn.ReLU()]
    for coarsest in (True, False, False):
        layers += [*(_Block(pool=pool and coarsest) for _ in range(3)), nn.Upsample(scale_factor=2), _conv(bias=False)]
    return nn.Sequential(*layers, _Block(), _conv(outputs=3))


def _halves(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """A file of both halves, taken apart."""
    return [_numbered(below(tensors, f"{half}.layers.")) for half in HALVES]


def _numbered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers counted from 0: the authors' decoders begin with a clamp, which is number 0 and has no weights."""
    first = min(_layer(name) for name in tensors)
    return {f"{_layer(name) - first}.{name.partition('.')[2]}": tensor.float() for name, tensor in tensors.items()}


def _layer(name: str) -> int:
    return int(name.partition(".")[0])


def _filled(half: str, weights: Mapping[str, Tensor]) -> nn.Sequential:
    pool = any(".pool." in name for name in weights)
    if half == "encoder":
        network = _encoder(len(weights[f"{max(map(_layer, weights))}.weight"]), pool=pool)
    else:
        network = _decoder(weights["0.weight"].shape[1], pool=pool)
    network.load_state_dict(weights)
    return network


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
