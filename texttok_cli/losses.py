"""Losses on images in [0, 1].

Letters: B batch, H and W sides of the image, F channels of a feature map.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from texttok_cli.assets import load_torch_weights, resolve

PerceptualNet = Literal["stlpips-alex", "stlpips-vgg"]

# LPIPS normalises images in [-1, 1] by these.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean over all elements of the squared difference, a scalar."""
    return F.mse_loss(x, y)


class Perceptual(nn.Module):
    """Shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022), frozen.

    Not the LPIPS of Zhang et al. that the paper cites: the weights of that need a download, these come with a package.
    Features of five depths are normalised over channels; their squared differences, weighted by channel, are averaged
    over places and summed over depths. Raises BackendError if the weights are not to be had.
    """

    def __init__(self, net: PerceptualNet, *, offline: bool = False) -> None:
        super().__init__()
        weights = load_torch_weights(resolve(net, offline=offline))
        self.slices = nn.ModuleList(_SLICES[net]())
        convs = [module for module in self.slices.modules() if isinstance(module, nn.Conv2d)]
        trunk = [tensor for name, tensor in weights.items() if name.startswith("net.") and not name.endswith(".filt")]
        for conv, weight, bias in zip(convs, trunk[::2], trunk[1::2], strict=True):
            conv.load_state_dict({"weight": weight, "bias": bias})
        for depth in range(len(self.slices)):
            self.register_buffer(f"head{depth}", weights[f"lin{depth}.model.1.weight"].flatten())  # (F,)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # a quarter less time than NCHW on a CPU

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance (B,) float32 between images (B, 3, H, W) in [0, 1], 32 or more a side; differentiable in both."""
        with torch.autocast(x.device.type, enabled=False):  # float32 whatever the caller computes in
            pairs = zip(self._features(x), self._features(y), strict=True)
            return torch.stack([self._distance(depth, a, b) for depth, (a, b) in enumerate(pairs)]).sum(dim=0)

    def _features(self, images: Tensor) -> list[Tensor]:
        h = ((images.float() * 2 - 1 - self.get_buffer("shift")) / self.get_buffer("scale")).contiguous(memory_format=torch.channels_last)
        features = []
        for part in self.slices:
            h = part(h)
            features.append(h)
        return features

    def _distance(self, depth: int, a: Tensor, b: Tensor) -> Tensor:
        difference = (_unit(a) - _unit(b)).square().mean(dim=(2, 3))  # (B, F)
        return torch.mv(difference, self.get_buffer(f"head{depth}"))


def _unit(features: Tensor) -> Tensor:
    """Features (B, F, H, W) of length 1 over channels. The norm's gradient is 0, not NaN, where all channels are 0."""
    norm: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norm + 1e-10)


class _Blur(nn.Module):
    """Halve the size after a 3 x 3 binomial blur, over borders reflected two deep (shift-tolerant "2k" padding)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, H, W) -> (B, F, (H+1)//2 + 1, (W+1)//2 + 1)."""
        padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
        # [1, 2, 1] / 4 is [1, 1] / 2 twice: two means are several times faster than a convolution by channel on a CPU.
        return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2, stride=2)


def _alex() -> list[nn.Sequential]:
    """AlexNet as ST-LPIPS has it: first convolution with stride 1, blur before the ReLU."""
    return [
        nn.Sequential(nn.Conv2d(3, 64, 11, padding=2), _Blur(), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 1), _Blur(), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 1), _Blur(), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


def _vgg() -> list[nn.Sequential]:
    """VGG16's first 13 layers, a blurred max-pooling before each group but the first."""
    slices, width = [], 3
    for depth, (convs, channels) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
        layers: list[nn.Module] = [] if depth == 0 else [nn.MaxPool2d(2, 1), _Blur()]
        for _ in range(convs):
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
            width = channels
        slices.append(nn.Sequential(*layers))
    return slices


_SLICES = {"stlpips-alex": _alex, "stlpips-vgg": _vgg}
assert set(_SLICES) == set(get_args(PerceptualNet))
