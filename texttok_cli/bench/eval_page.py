"""The page of an evaluation: a table of models, every number's protocol card, and images beside what was made of them.

Letters: S image side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from typing import Any

from torch import Tensor

from texttok_cli.bench.html import Html, bullets, definitions, details, element, figure, heading, page, paragraph, picture, table
from texttok_cli.data import to_image
from texttok_cli.metrics.report import Card, Comparison, MetricComparison, Report, Result, compare

DIFFERENCE_FACTOR = 4  # a difference of 64 of 255 levels is white
TILE_PIXELS = (168, 256)  # least and greatest width of an image on a wide screen


@dataclass(frozen=True, slots=True)
class Made:
    """What one model made of an image, uint8 (3, S, S), and its PSNR in dB; or a sample, of which less is known."""

    name: str
    tokens: int | None
    has_text: bool | None
    image: Tensor
    psnr: float | None


@dataclass(frozen=True, slots=True)
class Example:
    """An image of the gallery, original uint8 (3, S, S); `place` is its rank: best, median or worst."""

    place: str
    id: str
    caption: str | None
    original: Tensor | None
    made: Sequence[Made]


def eval_page(names: Sequence[str], reports: Sequence[Report], examples: Sequence[Example]) -> str:
    """HTML of reports of one model (or set of samples) each, under these names."""
    compared = compare(reports)
    parts = [
        _numbers(names, reports, compared.rows),
        bullets(_remarks(names, reports, compared)),
        heading("Protocol cards"),
        *(_cards(name, report.results) for name, report in zip(names, reports, strict=True)),
        *_gallery(examples),
    ]
    return page("texttok eval: " + ", ".join(names), *parts)


# ------------------------------------------------------------------ numbers and cards


def _numbers(names: Sequence[str], reports: Sequence[Report], rows: Sequence[MetricComparison]) -> Html:
    header = ["", "tokens", *(row.title for row in rows), "n", "text"]
    columns = [row.cells for row in rows]
    body = []
    for place, (name, report) in enumerate(zip(names, reports, strict=True)):
        card = report.results[0].card
        text = card.text or ("" if card.tokens is None else "none")
        body.append([name, _tokens(card), *(column[place] for column in columns), f"{card.n:,}", text])
    return table(header, body)


def _tokens(card: Card) -> str:
    if card.tokens is None:
        return ""
    if card.codes is not None:
        return f"{card.tokens:,} of {card.codes:,} codes"
    return f"{card.tokens:,}" if card.channels is None else f"{card.tokens:,} × {card.channels:,} channels"


def _remarks(names: Sequence[str], reports: Sequence[Report], compared: Comparison) -> list[str]:
    """What a reader of the table must know: warnings that several models share once, and where cards differ."""
    warned: dict[str, list[str]] = {}
    for name, report in zip(names, reports, strict=True):
        for result in report.results:
            for warning in result.warnings:
                warned.setdefault(f"{result.metric}: {warning}", []).append(name)
    unlike = [
        f"{row.metric}: not comparable, different {key}: {' | '.join(map(str, found))}"
        for row in compared.rows
        for key, found in row.unlike.items()
    ]
    also = [compared.remark(names)] if compared.also else []
    return unlike + also + [line if len(of) == len(names) else f"{line} ({', '.join(of)})" for line, of in warned.items()]


def _cards(name: str, results: Sequence[Result]) -> Html:
    """What all numbers of one model have in common, then what each has of its own."""
    cards = [result.card.model_dump(mode="json", exclude_none=True) for result in results]
    common = {key: value for key, value in cards[0].items() if all(card.get(key) == value for card in cards)}
    own = [{key: value for key, value in card.items() if key not in common} for card in cards]
    parts = [element("h3", result.metric) + definitions(_plain(entries)) for result, entries in zip(results, own, strict=True)]
    return details(name, definitions(_plain(common)), *map(Html, parts))


def _plain(entries: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key, value in entries.items():
        shown = ", ".join(f"{name} {version}" for name, version in value.items()) if isinstance(value, dict) else str(value)
        found[key.replace("_", " ")] = shown
    return found


# ------------------------------------------------------------------ images


def _gallery(examples: Sequence[Example]) -> Iterator[Html]:
    if not examples:
        return
    yield heading("Images")
    if examples[0].original is not None:
        yield paragraph(
            f"Chosen by the PSNR of {examples[0].made[0].name}. Below each image: its absolute difference from the original,"
            f" times {DIFFERENCE_FACTOR}; black is no difference."
        )
    side = examples[0].made[0].image.shape[-1]
    width = min(max(side, TILE_PIXELS[0]), TILE_PIXELS[1])
    for place, group in groupby(examples, key=lambda example: example.place):
        if place:
            yield element("h3", place)
        yield element("div", *map(_example, group), css="examples", style=f"--tile: {width}px")


def _example(example: Example) -> Html:
    """Fig. 1's layout: the original, then by the number of tokens what was made without and with text."""
    tiles = []
    if example.original is not None:
        tiles.append(_box("original", [figure(_image(example.original, f"{example.id}: original"))]))
    made = sorted(example.made, key=lambda one: (one.tokens or 0, one.has_text or False))
    for tokens, group in groupby(made, key=lambda one: one.tokens):
        title = f"{tokens:,} tokens" if tokens is not None else "" if example.original is None else "samples"
        tiles.append(_box(title, [_tile(example, one) for one in group]))
    lines = [element("small", example.id), *([paragraph(example.caption)] if example.caption else [])]
    return element("div", *lines, element("div", *tiles, css="row"), css="example")


def _box(title: str, tiles: Sequence[Html]) -> Html:
    return element("div", *([element("h4", title)] if title else []), element("div", *tiles, css="tiles"))


def _tile(example: Example, made: Made) -> Html:
    image = _image(made.image, f"{example.id}: by {made.name}")
    if example.original is None:
        return figure(image)
    difference = (DIFFERENCE_FACTOR * (made.image.int() - example.original.int()).abs()).clamp(max=255).byte()
    below = _image(difference, f"{example.id}: difference of {made.name} from the original, times {DIFFERENCE_FACTOR}")
    text = {True: "with text", False: "without text", None: "sample"}[made.has_text]
    return figure(Html(image + below), element("strong", text), made.name, f"{made.psnr:.2f} dB")


def _image(pixels: Tensor, alt: str) -> Html:
    """Uint8 (3, S, S) as a PNG: nothing is lost that a reader may want to see."""
    buffer = BytesIO()
    to_image(pixels).save(buffer, "PNG", optimize=True)
    return picture(buffer.getvalue(), alt)
