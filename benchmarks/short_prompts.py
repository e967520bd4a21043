"""Captions as short as what people type, made of the long ones of photos128 and emoji128: `a photo of a red T-shirt`, `red T-shirt`.

    texttok caption SHARD... --captioner sidecar --caption-field measured -o measured.captions.jsonl
    python benchmarks/short_prompts.py measured.captions.jsonl -o short.captions.jsonl

A photograph's caption says what it is of, then its measured colours. One of four kinds is made of it, by a hash of its id: what it is
of; that with the first colour as an adjective; the colour and the noun alone; what it is of and the colour, as in the long one. Of a
drawing, the name is kept, of every other one without `a 3D emoji of`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated

import typer

from texttok_cli.files import atomic_path

PHOTO = re.compile(r"a photo of (?P<article>a pair of |a piece of |an? |)(?P<noun>.+)")
COLOUR = re.compile(r", mostly (?P<colour>[a-z ]+?)(?: and [a-z ]+)? in the middle")
EMOJI = "a 3D emoji of "


def short(caption: str, kind: int) -> str:
    """One of the four kinds (0 to 3) of a long caption."""
    if caption.startswith(EMOJI):
        name = re.split(r": (?!.*skin tone)", caption.removeprefix(EMOJI), maxsplit=1)[0]
        return name if kind % 2 else EMOJI + name
    measured, head = COLOUR.search(caption), caption.partition(", mostly ")[0]
    photo = PHOTO.fullmatch(head)
    if measured is None or photo is None or kind == 0:
        return head
    colour, article, noun = measured["colour"], photo["article"], photo["noun"]
    if kind == 1:
        if article in ("a ", "an "):
            article = "an " if colour[0] in "aeiou" else "a "
        return f"a photo of {article}{colour} {noun}"
    return f"{colour} {noun.removesuffix(' laid out')}" if kind == 2 else f"{head}, mostly {colour}"


def main(captions: Path, out: Annotated[Path, typer.Option("--out", "-o")]) -> None:
    """A line with `id` and `caption` for each of CAPTIONS."""
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in captions.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            kind = hashlib.sha256(row["id"].encode()).digest()[0] % 4
            file.write(json.dumps({"id": row["id"], "caption": short(row["caption"], kind)}) + "\n")
    print(out)


if __name__ == "__main__":
    typer.run(main)
