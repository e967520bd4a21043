"""TAESD and its relatives (Ollin Boer Bohan, MIT): tiny convolutional autoencoders, 8 x 8 pixels to one latent.

Letters: B batch, S image side, d latent channels (4; 16 of the SD3 and FLUX.1 ones).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from texttok_cli.baselines.base import Baseline, BaselineInfo
from texttok_cli.errors import CheckpointError
from texttok_cli.files import sha256_file

WIDTH = 64


class TinyAutoencoder(Baseline):
    """A loaded autoencoder: images to latents and back, as `Tokenizer` does it; it takes no text and any size that 8 divides.

    The file is a .safetensors with diffusers' names (AutoencoderTiny), of any float type. Raises CheckpointError for another.
    """

    def __init__(self, name: str, path: Path, *, device: torch.device | str = "cpu") -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            tensors = load_file(path)
            self.encoder, self.decoder = (_filled(part, tensors) for part in ("encoder", "decoder"))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as err:
            raise CheckpointError(f"{path}: not the weights of a tiny autoencoder ({type(err).__name__})") from None
        self.device = torch.device(device)
        for half in (self.encoder, self.decoder):
            half.eval().requires_grad_(False).to(self.device).to(memory_format=torch.channels_last)
        self.info = BaselineInfo(name, sha256_file(path))

    @torch.inference_mode()
    def encode(self, images: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """uint8 (B, 3, S, S) -> latents (B, d, S/8, S/8) float32 on the CPU. DataError for a side that 8 does not divide."""
        self.check_size(images)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
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
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pixels: Tensor = self.decoder(_laid_out(3 * torch.tanh(z.to(self.device) / 3)))
        return pixels.clamp(0, 1)


class _Block(nn.Module):
    """Three convolutions around which the input goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64, H, W) -> the same shape."""
        return torch.relu(self.conv(x) + x)


def _conv(inputs: int = WIDTH, outputs: int = WIDTH, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


def _encoder(channels: int) -> nn.Sequential:
    halved = [layer for _ in range(3) for layer in (_conv(stride=2, bias=False), _Block(), _Block(), _Block())]
    return nn.Sequential(_conv(3), _Block(), *halved, _conv(outputs=channels))


def _decoder(channels: int) -> nn.Sequential:
    doubled = [layer for _ in range(3) for layer in (_Block(), _Block(), _Block(), nn.Upsample(scale_factor=2), _conv(bias=False))]
    return nn.Sequential(_conv(channels), nn.ReLU(), *doubled, _Block(), _conv(outputs=3))


def _filled(part: str, tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """One half with its weights, which follow each other in the file's numbers as in the network."""
    names = sorted((name for name in tensors if name.startswith(f"{part}.")), key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    kernels = [tensors[name].float() for name in names if name.endswith(".weight")]
    half = _encoder(len(kernels[-1])) if part == "encoder" else _decoder(kernels[0].shape[1])
    convs = [module for module in half.modules() if isinstance(module, nn.Conv2d)]
    biases = iter([tensors[name].float() for name in names if name.endswith(".bias")])
    for conv, kernel in zip(convs, kernels, strict=True):
        conv.load_state_dict({"weight": kernel} | ({} if conv.bias is None else {"bias": next(biases)}))
    return half


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
