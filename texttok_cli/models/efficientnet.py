"""EfficientNet-Lite0 (Tan and Le, 2019; the Lite variant: no squeeze-and-excitation, ReLU6), an ImageNet classifier.

Letters: B batch.
"""

from __future__ import annotations

import re
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from texttok_cli.assets import load_torch_weights, resolve

IMAGE_SIZE = 224
# Stages: expansion of the channels, kernel, stride, channels, blocks.
STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1))
# Each convolution's batch normalisation, by their names in the network and in a block.
NORMS = (("conv_stem", "bn0"), ("conv_head", "bn1"), ("expand_conv", "bn0"), ("depthwise_conv", "bn1"), ("project_conv", "bn2"))
STEM, HEAD, CLASSES = 32, 1280, 1000
BN_EPS = 1e-3  # TensorFlow's, with which it was trained


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's `same` padding: of an odd number of pixels, the larger part goes right and below.

    It has no bias until its normalisation is folded in.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, out, ceil(H/stride), ceil(W/stride))."""
        height, width = (_padding(side, self.kernel_size[0], self.stride[0]) for side in x.shape[-2:])
        return super().forward(F.pad(x, (*width, *height)))


class Block(nn.Module):
    """Inverted residual: expand, filter each channel, project."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.skips = stride == 1 and channels == out
        if expansion > 1:
            self.expand_conv, self.bn0 = SameConv(channels, hidden, 1), nn.BatchNorm2d(hidden, BN_EPS)
        self.expands = expansion > 1
        self.depthwise_conv, self.bn1 = SameConv(hidden, hidden, kernel, stride, groups=hidden), nn.BatchNorm2d(hidden, BN_EPS)
        self.project_conv, self.bn2 = SameConv(hidden, out, 1), nn.BatchNorm2d(out, BN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, out, H/stride, W/stride)."""
        hidden = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        hidden = F.relu6(self.bn1(self.depthwise_conv(hidden)))
        hidden = self.bn2(self.project_conv(hidden))
        out: Tensor = x + hidden if self.skips else hidden
        return out


class EfficientNetLite0(nn.Module):
    """The network, with the names of modules that its weight file has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = SameConv(3, STEM, 3, 2), nn.BatchNorm2d(STEM, BN_EPS)
        blocks, channels = [], STEM
        for expansion, kernel, stride, out, repeats in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, out, expansion, kernel, stride if i == 0 else 1))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = SameConv(channels, HEAD, 1), nn.BatchNorm2d(HEAD, BN_EPS)
        self.fc = nn.Linear(HEAD, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Pixels (B, 3, 224, 224) from 0 to 255 -> logits (B, 1000)."""
        logits: Tensor = self.fc(F.relu6(self.bn1(self.conv_head(self.features(images)[-1]))).mean(dim=(2, 3)))
        return logits

    def features(self, images: Tensor) -> list[Tensor]:
        """Pixels (B, 3, 224, 224) from 0 to 255 -> what each of the seven stages leaves: (B, 16, 112, 112) to (B, 320, 7, 7)."""
        x = F.relu6(self.bn0(self.conv_stem((images.to(self.fc.weight.dtype) - 127) / 128)))
        stages, blocks = [], iter(self.blocks)
        for *_, repeats in STAGES:
            for block in islice(blocks, repeats):
                x = block(x)
            stages.append(x)
        return stages


def load_efficientnet(*, device: torch.device | str = "cpu", offline: bool) -> EfficientNetLite0:
    """With its ImageNet weights, frozen, the normalisations folded. Raises BackendError if they are not available."""
    weights = load_torch_weights(resolve("efficientnet-lite0", offline=offline))
    model = EfficientNetLite0()
    model.load_state_dict({re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in weights.items()})  # the file's begin with _
    _fold_norms(model.eval())
    return model.requires_grad_(False).to(memory_format=torch.channels_last).to(device)


def _fold_norms(model: EfficientNetLite0) -> None:
    """Put every batch normalisation into the convolution before it: the same values up to rounding, in less time."""
    for module in [model, *model.blocks]:
        for conv, norm in NORMS:
            if hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())


def _padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2
