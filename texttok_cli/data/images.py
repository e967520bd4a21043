"""One image: from a file's bytes to pixels, as a viewer would show it, and the ADM crop."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from texttok_cli.errors import DataError

MAX_PIXELS = 100_000_000  # refused from the header, before anything is decoded

# What PIL raises for damaged files, format by format.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error, MemoryError)


def load_image(data: bytes, *, name: str) -> Image.Image:
    """The bytes of an image file -> RGB, 8 bits, upright (EXIF), transparency over white, first frame of an animation.

    Raises DataError naming `name` for what is no image, is damaged or cut short, or has over MAX_PIXELS pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is our limit
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{name}: {width:,} x {height:,} pixels, over the limit of {MAX_PIXELS:,}; scale it down first")
            image.load()
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image, or of a kind that can't be read") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except DAMAGED as err:
        raise DataError(f"{name}: damaged or cut short ({' '.join(str(err).split())})") from None
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: PIL's own conversion clips at 255
        grey = np.asarray(image).astype(np.float64)
        scale = 257.0 if image.mode.startswith("I") else 1 / 255 if grey.max(initial=0) <= 1 else 1.0
        image = Image.fromarray((grey / scale).round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The ADM rule (guided-diffusion, `center_crop_arr`): BOX halving, BICUBIC to the short side, centre crop to size x size."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1], clamped -> uint8, rounding half up: clamp(127.5 x + 128), the rule of DiT and ADM's samplers."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
