"""How images reach the 299 x 299 pixels that the FID network takes: three protocols, which give three different FIDs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from texttok_cli.config import Resize

SIZE = 299


def tf1_bilinear(images: Tensor) -> Tensor:
    """TensorFlow 1's bilinear, inside the graph that ADM's evaluator runs: no half-pixel centres, no antialiasing.

    uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299), 0..255.
    """
    x = images.float()
    for dim in (3, 2):
        side = x.shape[dim]
        position = torch.arange(SIZE, device=x.device) * torch.tensor(side / SIZE)
        low = position.long()
        high = (low + 1).clamp_max(side - 1)
        weight = (position - low).view((-1, 1) if dim == 2 else (1, -1))
        a, b = x.index_select(dim, low), x.index_select(dim, high)
        x = a + (b - a) * weight
    return x


def clean(images: Tensor) -> Tensor:
    """clean-fid's: Pillow's bicubic (antialiased) on floats by channel, clipped. Shapes as `tf1_bilinear`."""
    channels = images.flatten(0, 1).cpu().numpy().astype(np.float32)
    resized = [np.asarray(Image.fromarray(channel).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).clamp(0, 255).view(len(images), 3, SIZE, SIZE).to(images.device)


def legacy_pytorch(images: Tensor) -> Tensor:
    """pytorch-fid's and clean-fid's `legacy_pytorch`: bilinear, half-pixel centres, no antialiasing. Shapes as `tf1_bilinear`."""
    return F.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", align_corners=False)


RESIZES: dict[Resize, Callable[[Tensor], Tensor]] = {"tf1-bilinear": tf1_bilinear, "clean": clean, "legacy-pytorch": legacy_pytorch}
