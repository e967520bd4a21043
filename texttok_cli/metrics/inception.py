"""InceptionV3 as the FID protocol has it (TensorFlow's graph of 2015-12-05), batch normalisation folded into the convolutions.

Letters: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from texttok_cli.assets import load_script_weights, load_torch_weights, resolve
from texttok_cli.config import Resize
from texttok_cli.files import sha256_file
from texttok_cli.metrics.resize import RESIZES
from texttok_cli.models.layers import exact_convolutions

BN_EPS = 1e-3
SPATIAL_CHANNELS = 7  # ADM's evaluator keeps the first 7 channels of its layer mixed_6/conv:0
POOL_DIM, SPATIAL_DIM = 2048, 17 * 17 * SPATIAL_CHANNELS
NETWORK = "inception-v3 of 2015-12-05"


@dataclass(frozen=True, slots=True)
class Features:
    """What the network says of B images, float32."""

    pool: Tensor  # (B, 2048) pool_3
    spatial: Tensor  # (B, 2023) Mixed_6d branch1x1 after ReLU, first 7 channels; order (row, column, channel) as in ADM's statistics
    logits: Tensor | None  # (B, 1008) without the bias, as ADM and torch-fidelity have them; None for weights without the head


class FidInception(nn.Module):
    """The frozen network, in float32 whatever the caller computes in. Raises BackendError if the weights are not available.

    `head` asks for logits, which need the whole network's file as torch-fidelity and pytorch-fid publish it (`weights`: its
    path, else cached or downloaded); the file that comes with a package ends at pool_3. `sha256` is of the file in use.
    """

    def __init__(self, *, resize: Resize = "tf1-bilinear", head: bool = False, weights: Path | None = None, offline: bool = False) -> None:
        super().__init__()
        self.resize = resize
        self.stem, self.mixed_6d, self.rest = _stem(), _mixed_17(160), _rest()
        path = resolve("inception-logits" if head else "inception", path=weights, offline=offline)
        self.sha256 = sha256_file(path)
        tensors = load_torch_weights(path) if head else load_script_weights(path)
        # (1008, 2048), used on the CPU and in double precision: TF32 is a switch of the whole process, and MPS has no float64.
        self.head = tensors["fc.weight"].double() if head else None
        _fill([module for module in self.modules() if isinstance(module, nn.Conv2d)], _folded(tensors, _WHOLE if head else _PACKAGED))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, H, W)."""
        with torch.autocast(images.device.type, enabled=False), exact_convolutions():
            x = (RESIZES[self.resize](images) - 128) / 128
            h = self.stem(x.contiguous(memory_format=torch.channels_last))  # (B, 768, 17, 17)
            branches = [branch(h) for branch in self.mixed_6d]
            spatial = branches[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            pool = self.rest(torch.cat(branches, dim=1)).mean(dim=(2, 3))
            logits = None if self.head is None else (pool.cpu().double() @ self.head.T).float()
        return Features(pool, spatial, logits)


# ------------------------------------------------------------------ weights

# Where a convolution's kernel and its normalisation's scale, shift, mean and variance stand; TensorFlow's has no scale.
_PACKAGED = (".weight", None, ".beta", ".mean", ".var")
_WHOLE = (".conv.weight", ".bn.weight", ".bn.bias", ".bn.running_mean", ".bn.running_var")


def _folded(tensors: Mapping[str, Tensor], suffixes: tuple[str, str | None, str, str, str]) -> list[tuple[Tensor, Tensor]]:
    """Kernel and bias of every convolution with its normalisation in them, in the file's order, which is the graph's."""
    kernel, scale, shift, mean, var = suffixes
    folded = []
    for name in (name.removesuffix(mean) for name in tensors if name.endswith(mean)):
        factor = (tensors[name + var].double() + BN_EPS).rsqrt()
        if scale is not None:
            factor = factor * tensors[name + scale].double()
        bias = tensors[name + shift].double() - tensors[name + mean].double() * factor
        folded.append((tensors[name + kernel].double() * factor[:, None, None, None], bias))
    return folded


def _fill(convs: list[nn.Conv2d], folded: list[tuple[Tensor, Tensor]]) -> None:
    for conv, (kernel, bias) in zip(convs, folded, strict=True):
        conv.load_state_dict({"weight": kernel, "bias": bias})


# ------------------------------------------------------------------ layers, in the order of the graph


class _Branches(nn.ModuleList):
    """Every branch sees the input; their channels come one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, sum of the branches' channels, H', W')."""
        return torch.cat([branch(x) for branch in self], dim=1)


def _conv(inputs: int, outputs: int, size: int | tuple[int, int] = 1, *, stride: int = 1, pad: bool = True) -> nn.Sequential:
    height, width = (size, size) if isinstance(size, int) else size
    padding = ((height - 1) // 2, (width - 1) // 2) if pad else 0
    return nn.Sequential(nn.Conv2d(inputs, outputs, (height, width), stride, padding), nn.ReLU(inplace=True))


def _convs(inputs: int, *layers: tuple[int, int | tuple[int, int]]) -> nn.Sequential:
    """Convolutions of (channels, size), one after the other."""
    widths = [inputs, *(channels for channels, _ in layers)]
    return nn.Sequential(*(_conv(width, channels, size) for width, (channels, size) in zip(widths, layers, strict=False)))


def _pooled(inputs: int, outputs: int, *, largest: bool = False) -> nn.Sequential:
    # TensorFlow's mean leaves the border's padding out.
    pool = nn.MaxPool2d(3, 1, 1) if largest else nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    return nn.Sequential(pool, _conv(inputs, outputs))


def _stem() -> nn.Sequential:
    """To Mixed_6c."""
    return nn.Sequential(
        _conv(3, 32, 3, stride=2, pad=False),
        _conv(32, 32, 3, pad=False),
        _conv(32, 64, 3),
        nn.MaxPool2d(3, 2),
        _conv(64, 80),
        _conv(80, 192, 3, pad=False),
        nn.MaxPool2d(3, 2),
        *(_mixed_35(inputs, pooled) for inputs, pooled in ((192, 32), (256, 64), (288, 64))),
        _Branches([_conv(288, 384, 3, stride=2, pad=False), _halved(288, 64, (96, 3), last=96), nn.MaxPool2d(3, 2)]),
        *(_mixed_17(width) for width in (128, 160)),
    )


def _rest() -> nn.Sequential:
    """From Mixed_6e."""
    return nn.Sequential(
        _mixed_17(192),
        _Branches([_halved(768, 192, last=320), _halved(768, 192, (192, (1, 7)), (192, (7, 1)), last=192), nn.MaxPool2d(3, 2)]),
        _mixed_8(1280),
        # The graph pools the largest here, though the paper of Inception says the mean.
        _mixed_8(2048, largest=True),
    )


def _halved(inputs: int, width: int, *layers: tuple[int, int | tuple[int, int]], last: int) -> nn.Sequential:
    """1 x 1, `layers`, and a 3 x 3 of stride 2 without padding."""
    channels = layers[-1][0] if layers else width
    return nn.Sequential(_convs(inputs, (width, 1), *layers), _conv(channels, last, 3, stride=2, pad=False))


def _mixed_35(inputs: int, pooled: int) -> _Branches:
    five, threes = _convs(inputs, (48, 1), (64, 5)), _convs(inputs, (64, 1), (96, 3), (96, 3))
    return _Branches([_conv(inputs, 64), five, threes, _pooled(inputs, pooled)])


def _mixed_17(width: int) -> _Branches:
    once = _convs(768, (width, 1), (width, (1, 7)), (192, (7, 1)))
    twice = _convs(768, (width, 1), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7)))
    return _Branches([_conv(768, 192), once, twice, _pooled(768, 192)])


def _mixed_8(inputs: int, *, largest: bool = False) -> _Branches:
    once = nn.Sequential(_conv(inputs, 384), _forked())
    twice = nn.Sequential(_convs(inputs, (448, 1), (384, 3)), _forked())
    return _Branches([_conv(inputs, 320), once, twice, _pooled(inputs, 192, largest=largest)])


def _forked() -> _Branches:
    return _Branches([_conv(384, 384, (1, 3)), _conv(384, 384, (3, 1))])
