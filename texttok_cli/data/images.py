"""One image: from a file's bytes to pixels, as a viewer would show it, and the ADM crop."""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from texttok_cli.errors import DataError
from texttok_cli.files import atomic_path

MAX_PIXELS = 100_000_000  # refused from the header, before anything is decoded
SAVERS = 4  # threads: compressing PNGs and waiting for the disk

# Pillow knows many more, among them EPS, which it hands to Ghostscript: a program run on what a file says.
Image.init()
KINDS = tuple(kind for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if kind in Image.OPEN)

# What Pillow raises for damaged files, format by format.
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, RuntimeError, struct.error)

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A PNG's transparent grey or colour as 8 bits, by Pillow's name of how pixels of other than 8 bits are stored.
KEYS = {"L;2": lambda key: key * 85, "L;4": lambda key: key * 17, "RGB;16B": lambda key: key >> 8}

# `warnings.catch_warnings` changes the state of the whole process, and images are opened on several threads.
_opening = threading.Lock()


def load_image(data: bytes, *, name: str) -> Image.Image:
    """The bytes of an image file -> RGB as `to_rgb` makes it.

    Raises DataError naming `name` for what is no image, is damaged or cut short, has over MAX_PIXELS pixels, or pixels of
    no agreed range (floating point, 32 bits).
    """
    try:
        image = _open(data)
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image, or in a format that can't be read ({', '.join(KINDS)} can)") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: over the limit of {MAX_PIXELS:,} pixels; scale it down first") from None
    except DAMAGED as err:
        raise _damaged(name, err) from None
    return to_rgb(image, name=name)


def to_rgb(image: Image.Image, *, name: str) -> Image.Image:
    """An opened image -> RGB, 8 bits, upright (EXIF), transparency over white, first frame of an animation.

    Grey of 16 bits is scaled (v / 257), of 12 too; in a TIFF white may be zero. CMYK is converted without a colour profile; EXIF that can't
    be read turns nothing. The transparent colour of a PNG of other than 8 bits is right only if nobody loaded its pixels before.
    Raises DataError as `load_image` does.
    """
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{name}: {image.width:,} x {image.height:,} pixels, over the limit of {MAX_PIXELS:,}; scale it down first")
    try:
        _scale_key(image)
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image, name)
    except DAMAGED as err:
        raise _damaged(name, err) from None
    if orientation not in UPRIGHT:
        return rgb
    upright = rgb.transpose(UPRIGHT[orientation])
    upright.info.clear()  # it still says how the image lay: another call would turn it once more
    return upright


def _damaged(name: str, err: Exception) -> DataError:
    return DataError(f"{name}: damaged or cut short ({' '.join(str(err).split()) or type(err).__name__})")


def _open(data: bytes) -> Image.Image:
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is our limit
        return Image.open(io.BytesIO(data), formats=KINDS)


def _orientation(image: Image.Image) -> object:
    """None also for EXIF that is damaged: the pixels are not, and viewers show them."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except DAMAGED:
        return None


def _scale_key(image: Image.Image) -> None:
    """Of an image that is not loaded yet: Pillow makes 8 bits of a PNG's pixels, but not of the colour that is transparent."""
    key, tiles = image.info.get("transparency"), getattr(image, "tile", [])
    if image.format == "PNG" and key is not None and tiles and (to_8_bits := KEYS.get(tiles[0][3])):
        image.info["transparency"] = tuple(map(to_8_bits, key)) if isinstance(key, tuple) else to_8_bits(key)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_of_16_bits(image, name)
    if image.mode == "La":  # grey times alpha
        image = image.convert("LA")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # a conversion to the same mode would copy it


def _grey_of_16_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale to 8 bits, with alpha if one grey is transparent; Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise DataError(f"{name}: its pixels are floating point or 32-bit numbers, with no agreed range; save it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})  # a TIFF's: here Pillow gives the numbers as they are stored
    white = 4095 if tags.get(ExifTags.Base.BitsPerSample) == (12,) else 65535
    shares = values / np.float32(white)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
        shares = 1 - shares
    grey = Image.fromarray((shares * 255).round().astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def center_crop(image: Image.Image, size: int, *, at: float = 0.5) -> Image.Image:
    """The ADM rule (guided-diffusion, `center_crop_arr`): BOX halving, BICUBIC to the short side, centre crop to size x size.

    Another `at` in [0, 1) takes another part of the longer side: all of them, in equal shares, as `at` goes from 0 to 1.

    Raises DataError for an image so narrow that it would have over MAX_PIXELS pixels before the crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise DataError(f"too narrow ({image.width:,} x {image.height:,} pixels) for a square of {size} x {size}; crop it first")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = _offset(width - size, at), _offset(height - size, at)
    return image.crop((left, top, left + size, top + size))


def _offset(room: int, at: float) -> int:
    return room // 2 if at == 0.5 else int((room + 1) * at)  # the middle as ADM rounds it


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 (3, H, W), contiguous."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """The inverse of `to_tensor`, of pixels on any device."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_png(path: Path, image: Image.Image) -> None:
    """Write a PNG file, atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def save_pngs(paths: Iterable[Path], images: Tensor) -> None:
    """Write uint8 images (B, 3, H, W) as PNG files, several at a time, each atomically."""
    with ThreadPoolExecutor(SAVERS) as savers:
        list(savers.map(save_png, paths, map(to_image, images)))


def normalize(images: Tensor) -> Tensor:
    """uint8, 0..255 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Any float type, [-1, 1], clamped -> uint8, rounding half up: clamp(127.5 x + 128), the rule of DiT's and ADM's samplers."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)
