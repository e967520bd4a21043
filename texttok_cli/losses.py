"""Losses of tokenizer training, on images in [0, 1]."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from texttok_cli.assets import load_torch_weights, resolve

PerceptualName = Literal["stlpips-alex", "stlpips-vgg"]


def l2(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference over all elements, a scalar; any equal shapes, [0, 1]."""
    return (images - others).square().mean()


class Perceptual(nn.Module):
    """Shift-tolerant LPIPS (Ghildyal and Liu 2022): weighted squared distance of unit-normalised deep features. Frozen.

    Not classic LPIPS: its values are not comparable to those. Raises BackendError if the weights are not to be had.
    """

    def __init__(self, net: PerceptualName, *, offline: bool = False) -> None:
        super().__init__()
        weights = load_torch_weights(resolve(net, offline=offline))
        self.slices = _alexnet() if net == "stlpips-alex" else _vgg16()
        state = {k.removeprefix("net.slice"): v for k, v in weights.items() if k.startswith("net.") and not k.endswith(".filt")}
        # The package numbers slices from 1 and layers through all slices; ours keep its layer names.
        self.slices.load_state_dict({f"{int(k[0]) - 1}{k[1:]}": v for k, v in state.items()})
        for name in ("shift", "scale"):
            self.register_buffer(name, weights[f"scaling_layer.{name}"])
        for i in range(5):
            self.register_buffer(f"head{i}", weights[f"lin{i}.model.1.weight"])
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], H and W at least 32 -> distances (B,), float32 whatever the autocast."""
        with torch.autocast(images.device.type, enabled=False):
            x = torch.cat([images, others]).float()
            x = (2 * x - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
            distance = torch.zeros(len(images), device=x.device)
            for i, part in enumerate(self.slices):
                x = part(x)
                a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
                distance = distance + F.conv2d((a - b).square(), self.get_buffer(f"head{i}")).mean((1, 2, 3))
        return distance


class BlurPool(nn.Module):
    """Binomial 3 x 3 blur at stride 2 after reflecting two pixels on each side (Zhang 2019, as ST-LPIPS pads)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, (H + 3) // 2, (W + 3) // 2)."""
        row = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
        kernel = torch.outer(row, row).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def _alexnet() -> nn.ModuleList:
    """AlexNet's features with stride 1 first, blurred down-sampling, and the blur before the first ReLU."""
    return _numbered(
        [
            [nn.Conv2d(3, 64, 11, padding=2), BlurPool(), nn.ReLU()],
            [nn.MaxPool2d(3, stride=1), BlurPool(), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()],
            [nn.MaxPool2d(3, stride=1), BlurPool(), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
            [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
            [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()],
        ]
    )


def _vgg16() -> nn.ModuleList:
    """VGG16's features with blurred down-sampling."""
    slices: list[list[nn.Module]] = []
    width = 3
    for i, (channels, convs) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        layers: list[nn.Module] = [nn.MaxPool2d(2, stride=1), BlurPool()] if i else []
        for _ in range(convs):
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
            width = channels
        slices.append(layers)
    return _numbered(slices)


def _numbered(slices: list[list[nn.Module]]) -> nn.ModuleList:
    """Slices whose layers are named by their number in the whole network."""
    parts, number = nn.ModuleList(), 0
    for layers in slices:
        part = nn.Sequential()
        for layer in layers:
            part.add_module(str(number), layer)
            number += 1
        parts.append(part)
    return parts
