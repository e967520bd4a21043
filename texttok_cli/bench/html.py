"""Self-contained HTML pages: one file with its style and pictures inside, no script, nothing from a network.

    page("Evaluation", table(["model", "psnr"], [["texttok", "23.1"]]), details("Card", definitions({"n": 188})))

A plain `str` is text and is escaped; what is HTML already is an `Html`, which only these functions make.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("page.css")


class Html(str):
    """Text that is HTML: nothing in it is left to be escaped."""

    __slots__ = ()


def page(title: str, *parts: Html) -> str:
    """The whole document."""
    style = Html(STYLE.read_text(encoding="utf-8"))
    head = [
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", style),
    ]
    body = element("main", element("h1", title), *parts)
    return f'<!doctype html>\n<html lang="en">{element("head", *head)}{element("body", body)}</html>\n'


def element(tag: str, *children: object, **attributes: str) -> Html:
    """`<tag name="value">children</tag>`; the attribute `class` is given as `css`."""
    named = "".join(f' {"class" if name == "css" else name}="{escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{named}>{''.join(map(_escaped, children))}</{tag}>\n")


def heading(words: str) -> Html:
    """Of a section."""
    return element("h2", words)


def paragraph(words: object) -> Html:
    """A sentence or more."""
    return element("p", words)


def bullets(lines: Iterable[object]) -> Html:
    """A list."""
    return element("ul", *(element("li", line) for line in lines))


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table that scrolls sideways on a narrow screen; the first column names the rows."""
    head = element("tr", *(element("th", name, scope="col") for name in header))
    body = [element("tr", element("th", first, scope="row"), *(element("td", value) for value in rest)) for first, *rest in rows]
    return element("div", element("table", element("thead", head), element("tbody", *body)), css="scroll")


def details(summary: str, *children: Html) -> Html:
    """What unfolds at a click on its summary."""
    return element("details", element("summary", summary), *children)


def definitions(entries: Mapping[str, object]) -> Html:
    """Names, and what they stand for."""
    return element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in entries.items()))


def figure(image: Html, *captions: object) -> Html:
    """A picture with lines of text below it."""
    below = [element("figcaption", *(element("div", line) for line in captions))] if captions else []
    return element("figure", image, *below)


def picture(data: bytes, alt: str) -> Html:
    """A PNG file's bytes, as a part of the page; `alt` says what it shows."""
    return Html(f'<img src="data:image/png;base64,{b64encode(data).decode()}" alt="{escape(alt)}">')


def _escaped(part: object) -> str:
    return part if isinstance(part, Html) else escape(str(part))
