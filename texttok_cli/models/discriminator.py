"""The discriminator of tokenizer training (Sec. 4.1: StyleGAN's, about 24 M parameters).

Letters: B batch, H and W sides of the image, C channels of a level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky ReLU, as in StyleGAN


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator in MAGVIT's form: no minibatch statistics, no equalised learning rate.

    A 3 x 3 convolution from RGB to base * multipliers[0] channels; for each multiplier a block that halves the size and
    ends at base * multiplier channels; a 3 x 3 convolution; two linear layers. With base 128 that is 24.19 M parameters
    for [1, 2, 4, 4, 4, 4] at 256 px and 24.08 M for [0.5, 1, 2, 4, 4, 4, 4] at 512 px, both ending at 4 x 4. (MAGVIT's
    own code starts from `base` channels whatever the multipliers: 24.23 M at 512 px; its configs halve by plain means of
    2 x 2, where StyleGAN's discriminator and this one blur.) Images are independent of each other, and everything is
    twice differentiable, as R1 needs. Raises ValueError if the size can't be halved that often.
    """

    def __init__(self, image_size: int, *, base: int, multipliers: tuple[float, ...]) -> None:
        super().__init__()
        halvings = len(multipliers)
        if image_size % 2**halvings:
            raise ValueError(
                f"{halvings} multipliers halve the image {halvings} times, and {image_size} is not a multiple of {2**halvings}"
            )
        channels = [int(base * multiplier) for multiplier in multipliers]
        if min(channels) < 1:
            raise ValueError(f"base {base} times multiplier {min(multipliers):g} leaves no channel")
        last, side = channels[-1], image_size // 2**halvings
        self.from_rgb = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(_Block(a, b) for a, b in zip([channels[0], *channels], channels, strict=False))
        self.conv = nn.Conv2d(last, last, 3, padding=1)
        self.hidden = nn.Linear(last * side**2, last)
        self.logit = nn.Linear(last, 1)
        for module in self.modules():  # as MAGVIT
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.to(memory_format=torch.channels_last)  # a tenth less time than NCHW for R1 on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B,), higher for real ones."""
        h = _act(self.from_rgb(images.contiguous(memory_format=torch.channels_last)))
        for block in self.blocks:
            h = block(h)
        h = _act(self.conv(h)).flatten(1)
        return self.logit(_act(self.hidden(h)))[:, 0]  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Two 3 x 3 convolutions with a blurred halving between them, beside a blurred 1 x 1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/2, W/2)."""
        h = _act(self.conv2(_halve(_act(self.conv1(x)))))
        return (h + self.shortcut(_halve(x))) * 0.5**0.5  # type: ignore[no-any-return]


def _halve(x: Tensor) -> Tensor:
    """Every second pixel after StyleGAN2's filter [1, 3, 3, 1] / 8, which is a mean of neighbours three times over: with a convolution
    by channel a GAN step takes twice as long on a GPU."""
    return F.avg_pool2d(F.avg_pool2d(F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 2, stride=1), 2, stride=1), 2)


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)
