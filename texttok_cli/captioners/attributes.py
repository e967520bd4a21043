"""Words measured from pixels: the main colours of the middle, the colour at the edges, brightness, detail.

They say what varies within a class, in the form that the captions of the training data have:
"..., mostly red and brown in the middle, white towards the edges, dim, moderately detailed".
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 128  # images are measured at this size; the thresholds below hold for it
EDGE = 16  # pixels from the border that are the edge
MIDDLE = 32  # pixels from the border where the middle begins
SECOND_COLOUR = 0.16  # share of the middle from which on a second colour is named

# Typical values (RGB) of the 21 colour words of the training data's captions; a pixel has the word it is nearest to.
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (15, 15, 15),
    "dark grey": (70, 70, 70),
    "grey": (128, 128, 128),
    "light grey": (190, 190, 190),
    "white": (245, 245, 245),
    "red": (200, 30, 30),
    "dark red": (110, 25, 25),
    "orange": (235, 130, 30),
    "yellow": (235, 215, 50),
    "olive": (110, 105, 40),
    "green": (50, 150, 50),
    "dark green": (25, 70, 30),
    "light green": (150, 215, 130),
    "teal": (30, 130, 130),
    "light blue": (150, 195, 230),
    "blue": (40, 80, 190),
    "navy": (25, 30, 80),
    "purple": (120, 50, 140),
    "pink": (235, 150, 170),
    "brown": (120, 75, 45),
    "beige": (215, 195, 160),
}
PALETTE = np.array(list(COLOURS.values()), np.float32)  # (21, 3)
# Upper limits, fitted to those captions: of the mean luma, and of the mean difference of neighbours in a row.
BRIGHTNESS = ((81.0, "dark"), (125.0, "dim"), (185.0, "evenly lit"), (256.0, "bright"))
DETAIL = ((4.1, "smooth"), (14.5, "moderately detailed"), (256.0, "finely detailed"))
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601

_FORM = re.compile(
    r"(?P<head>.*), mostly (?P<middle>[a-z ]+?) in the middle, (?P<edge>[a-z ]+?) towards the edges,"
    r" (?P<light>[a-z ]+), (?P<detail>[a-z ]+)",
    re.DOTALL,
)


class Attributes(NamedTuple):
    """What is measured; `middle` names one colour or two, as in "red and brown"."""

    middle: str
    edge: str
    light: str
    detail: str


def measure(image: Image.Image) -> Attributes:
    """The attributes of an RGB image of any size, in the centred square that a tokenizer sees of it."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX, box=square), np.float32)
    luma = pixels @ LUMA
    ring = np.ones((SIDE, SIDE), bool)
    ring[EDGE:-EDGE, EDGE:-EDGE] = False
    middle = _colours(pixels[MIDDLE:-MIDDLE, MIDDLE:-MIDDLE].reshape(-1, 3))
    named = [name for name, share in middle[:2] if name == middle[0][0] or share >= SECOND_COLOUR]
    return Attributes(
        " and ".join(named),
        _colours(pixels[ring])[0][0],
        _word(float(luma.mean()), BRIGHTNESS),
        _word(float(np.abs(np.diff(luma, axis=1)).mean()), DETAIL),
    )


def describe(head: str, attributes: Attributes) -> str:
    """A caption: what is shown, then its attributes."""
    middle, edge, light, detail = attributes
    return f"{head.rstrip('.')}, mostly {middle} in the middle, {edge} towards the edges, {light}, {detail}"


def parse(caption: str) -> tuple[str, Attributes] | None:
    """The inverse of `describe`; None for a caption of another form."""
    found = _FORM.fullmatch(caption)
    if found is None:
        return None
    return found["head"], Attributes(found["middle"], found["edge"], found["light"], found["detail"])


def _colours(pixels: NDArray[np.float32]) -> list[tuple[str, float]]:
    """Colour words of pixels (n, 3) with their shares, the most frequent first."""
    # The nearest: |x - c|^2 without |x|^2, which is the same for all colours.
    nearest = ((PALETTE**2).sum(axis=1) - 2 * pixels @ PALETTE.T).argmin(axis=1)
    shares = np.bincount(nearest, minlength=len(PALETTE)) / len(pixels)
    names = list(COLOURS)
    return [(names[i], float(shares[i])) for i in np.argsort(-shares, kind="stable")]


def _word(value: float, limits: tuple[tuple[float, str], ...]) -> str:
    return next(word for limit, word in limits if value < limit)
