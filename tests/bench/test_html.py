"""Self-contained pages: what is text stays text, and nothing is loaded from elsewhere."""

import re
from html.parser import HTMLParser

from texttok_cli.bench.html import bullets, definitions, details, figure, heading, page, paragraph, picture, table

VOID = {"meta", "img"}
EVIL = "<script>alert('x')</script> & \"q\" </td>"


class Outline(HTMLParser):
    """Tags that are open, checked to be closed in order; and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def outline(html: str) -> Outline:
    found = Outline()
    found.feed(html)
    assert found.open == []
    return found


def test_every_text_is_escaped() -> None:
    parts = [
        heading(EVIL),
        paragraph(EVIL),
        bullets([EVIL]),
        table([EVIL, EVIL], [[EVIL, EVIL]]),
        details(EVIL, definitions({EVIL: EVIL})),
        figure(picture(b"PNG", EVIL), EVIL),
    ]
    found = outline(page(EVIL, *parts))
    assert "script" not in found.seen
    assert found.texts.count(EVIL) == 13  # title and h1 among them
    assert ("alt", EVIL) in found.attributes


def test_a_page_needs_nothing_else() -> None:
    html = page("A page", figure(picture(b"\x00\x01", "dots")))
    found = outline(html)
    assert ("src", "data:image/png;base64,AAE=") in found.attributes and ("charset", "utf-8") in found.attributes
    assert not {"link", "script", "iframe"} & set(found.seen)
    assert not re.search(r"url\(|@import|https?:", html)
    assert ("name", "viewport") in found.attributes and "prefers" not in html and "color-scheme: light dark" in html
