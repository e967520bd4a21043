"""What other people's autoencoders have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from texttok_cli.errors import DataError

FACTOR = 8  # pixels a side for one latent


@dataclass(frozen=True, slots=True)
class BaselineInfo:
    """Identity of a loaded baseline."""

    name: str
    sha256: str


class Baseline:
    """Base of them: they take no text, compute in fp32, and take any size that 8 divides."""

    image_size: ClassVar[None] = None
    text: ClassVar[None] = None
    text_condition: ClassVar[None] = None
    classes: ClassVar[None] = None
    precision: ClassVar[str] = "fp32"
    info: BaselineInfo
    channels: int  # of a latent

    def token_counts(self, side: int) -> dict[str, int]:
        """Of an image with this side: the number of tokens, and of channels in each."""
        return {"tokens": (side // FACTOR) ** 2, "channels": self.channels}

    def check_size(self, images: Tensor) -> None:
        """DataError for images (B, 3, H, W) with a side that 8 does not divide."""
        if images.shape[2] % FACTOR or images.shape[3] % FACTOR:
            raise DataError(f"{self.info.name}: takes images whose sides are multiples of {FACTOR}, not {tuple(images.shape[2:])}")
