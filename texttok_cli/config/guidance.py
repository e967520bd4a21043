"""How strongly the condition is followed at each time: a constant, MDT's power-cosine, an interval, as text in recipes and commands."""

from __future__ import annotations

import math
from dataclasses import dataclass

from texttok_cli.errors import RecipeError

ROUNDING = 1e-9  # of a time's computation, by which an end of an interval must not lose the step that lies on it
GRAMMAR = "give a scale such as 1.5, 3.8:power-cosine=4, 1.8:interval=0,0.7 or 1.5:channels=3"


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance: prediction = unconditional + weight * (conditional - unconditional).

    With `power` p the weight grows from 1 at t = T to the scale s at t = 0: 1 + (s-1) (1 - cos(pi (1 - t/T)^p)) / 2 (MDT).
    Outside `interval` of t/T (Kynkäänniemi et al., 2024; its ends belong to it) it is 1: no guidance.
    `channels` are as many first channels of the latents, None all of them; the others stay conditional. The original DiT's published
    samples are guided on three of four (its forward_with_cfg); TexTok's recipes guide all ([I] ours).
    """

    scale: float = 1.0
    power: float | None = None
    interval: tuple[float, float] | None = None
    channels: int | None = None

    def weight(self, fraction: float) -> float:
        """At the fraction t/T in [0, 1]."""
        if self.interval is not None and not self.interval[0] - ROUNDING <= fraction <= self.interval[1] + ROUNDING:
            return 1.0
        if self.power is None:
            return self.scale
        return 1 + (self.scale - 1) * (1 - math.cos(math.pi * (1 - fraction) ** self.power)) / 2

    def __str__(self) -> str:
        """In the grammar of `parse_cfg`."""
        power = "" if self.power is None else f":power-cosine={self.power:.12g}"
        interval = "" if self.interval is None else f":interval={self.interval[0]:.12g},{self.interval[1]:.12g}"
        channels = "" if self.channels is None else f":channels={self.channels}"
        return f"{self.scale:.12g}{power}{interval}{channels}"


def parse_cfg(text: str) -> Guidance:
    """`SCALE`, then in any order `:power-cosine=POWER`, `:interval=LOW,HIGH`, `:channels=COUNT`. RecipeError for anything else."""
    scale, *options = text.split(":")
    chosen: dict[str, list[float]] = {}
    for option in options:
        name, _, values = option.partition("=")
        expected = {"power-cosine": 1, "interval": 2, "channels": 1}.get(name)
        numbers = [_number(value, text) for value in values.split(",")]
        if expected != len(numbers) or name in chosen:
            raise RecipeError(f"cfg {text!r}: {option!r} is not understood; {GRAMMAR}")
        chosen[name] = numbers
    guidance = Guidance(
        _number(scale, text),
        chosen["power-cosine"][0] if "power-cosine" in chosen else None,
        (chosen["interval"][0], chosen["interval"][1]) if "interval" in chosen else None,
        _count(chosen["channels"][0], text) if "channels" in chosen else None,
    )
    _check(guidance, text)
    return guidance


def _check(guidance: Guidance, text: str) -> None:
    if guidance.scale < 0:
        raise RecipeError(f"cfg {text!r}: the scale is negative; 1 means no guidance")
    if guidance.power is not None and guidance.power <= 0:
        raise RecipeError(f"cfg {text!r}: the power must be greater than 0")
    if guidance.interval is not None and not 0 <= guidance.interval[0] < guidance.interval[1] <= 1:
        raise RecipeError(f"cfg {text!r}: the interval is a range of t/T, two increasing numbers between 0 and 1")


def _number(value: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(f"cfg {text!r}: {value!r} is not a number; {GRAMMAR}")
    return number


def _count(number: float, text: str) -> int:
    if number < 1 or not number.is_integer():
        raise RecipeError(f"cfg {text!r}: channels are a count of at least 1")
    return int(number)
