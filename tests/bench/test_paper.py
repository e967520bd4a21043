"""paper.json against the paper's text, number by number; and what recipes quote of the paper against paper.json."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from texttok_cli.bench import paper
from texttok_cli.config.loader import load_recipe, recipe_names

MARKUP = re.compile(r"<sup>.*?</sup>|</?\w+>| \[\d+\]|\\|\*\*")
# Names that the text spells otherwise than its references do.
MISSPELT = {"TextTok": "TexTok", "DiffT": "DiffiT", "TiTOK": "TiTok", "MAGViT": "MAGVIT", "MDTV2": "MDTv2"}
SIZE_OF = {"a": 256, "b": 512}  # Tables 1 and 2


@pytest.fixture(scope="module")
def text() -> str:
    """The paper without its appendix, as Markdown with tables of tab-separated cells."""
    file = Path(os.environ.get("TEXTTOK_DATA", "")) / "reference/paper.txt"
    if "TEXTTOK_DATA" not in os.environ or not file.is_file():
        pytest.skip("TEXTTOK_DATA does not name the folder that holds reference/paper.txt")
    return file.read_text(encoding="utf-8")


def cells(text: str, begin: str, count: int) -> list[list[str]]:
    """The cells of `count` lines from the one that begins so."""
    for wrong, right in MISSPELT.items():
        text = text.replace(wrong, right)
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(begin))
    return [[MARKUP.sub("", cell).strip() for cell in line.split("\t")] for line in lines[first : first + count]]


def number(cell: str) -> float | None:
    return None if cell == "-" else float(cell)


def test_table_1(text: str) -> None:
    found: dict[str, Any] = {}
    for name, *values in cells(text, "(a) ImageNet 256", 20):
        if not any(values):
            found[name.split()[2].partition("×")[0]] = systems = {}
            continue
        tokens, *scores = values
        system, count = (name, re.split(r" |$", tokens)[0]) if "VAE" in name else name.split()[0].split("-")
        assert tokens in ("", f"{count} (d=4)", f"{count} (d=8)")
        systems.setdefault(system, []).append([int(count), *map(number, scores)])
    assert found == {size: paper.paper()["table1"][size] for size in ("256", "512")}


def test_table_2(text: str) -> None:
    rows, kind = [], ""
    for name, generator, tokenizer, *values in cells(text, "<i>GAN</i>", 33):
        if not generator:
            kind = "TexTok" if name == "Ours" else name
            continue
        both = [cell for cell in values if cell]  # an empty column parts the two sizes
        scores = [[*map(number, half[:4]), None if half[4] == "-" else half[4]] for half in (both[:5], both[5:])]
        small, large = (None if set(half) == {None} else half for half in scores)
        names = [None if cell == "-" else cell for cell in (generator, tokenizer)]
        rows.append({"system": name, "kind": kind, "generator": names[0], "tokenizer": names[1], "256": small, "512": large})
    assert rows == paper.paper()["table2"]["rows"]


def test_table_3(text: str) -> None:
    found: dict[str, Any] = {"Baseline": [], "TexTok": []}
    for name, *scores in cells(text, "Baseline-32\t5.09", 6):
        system, tokens = name.split("-")
        found[system].append([int(tokens), *map(float, scores)])
    assert found == {system: paper.paper()["table3"][system] for system in found}


def test_table_4(text: str) -> None:
    table = paper.paper()["table4"]
    upper = cells(text, "none\t1.49\t20.51\tSmall", 5)
    for letter, column, rows in (("a, text conditioning", 0, 5), ("b, T5 model size", 3, 3), ("c, conditioning architecture", 6, 3)):
        assert {row[column]: [float(cell) for cell in row[column + 1 : column + 3]] for row in upper[:rows]} == table[letter]
    lower = cells(text, "none\t1.49\t20.51\tTexTok-Small", 3)
    assert {row[0]: [float(row[1]), float(row[2])] for row in lower} == table["d, conditioning location"]
    sizes = {
        f"{name.partition('-')[2]} ({layers} layers, {width}, {heads} heads, {parameters})": [float(rfid), float(psnr)]
        for name, layers, width, heads, parameters, rfid, psnr in (row[3:] for row in lower)
    }
    assert sizes == table["e, model size"]


def test_table_5(text: str) -> None:
    found: dict[str, Any] = {"256": {}, "512": {}}
    for name, *seconds in cells(text, "SD-VAE-f8 [37]\t0.047", 9):
        system, tokens = (name, None) if "VAE" in name else name.split("-")
        for size, unnamed, pair in (("256", 1024, seconds[:2]), ("512", 4096, seconds[2:])):
            found[size].setdefault(system, []).append([int(tokens or unnamed), *map(float, pair)])
    assert found == {size: paper.paper()["table5"][size] for size in found}


def test_claims_are_in_the_text(text: str) -> None:
    for claim in paper.paper()["claims"]:
        if not claim["note"].startswith("not a claim of the text"):
            assert re.search(rf"\b{re.escape(str(claim['says']))}\b", text), claim["id"]


# ------------------------------------------------------------------ recipes


def quoted(table: str, letter: str, row: str) -> dict[str, float]:
    """The numbers of a row as a recipe names it, by their columns there."""
    whole = paper.paper()[f"table{table}"]
    if table == "4":
        part = next(rows for name, rows in whole.items() if name.startswith(f"{letter}, "))
        chosen = max((name for name in part if name.partition(" (")[0] in row), key=len)  # XXL has XL in it
        return dict(zip(whole["columns"], part[chosen], strict=True))
    system, _, tokens = row.partition(" + ")[0].partition("-")
    if table == "3":
        return dict(zip(whole["columns"], next(line for line in whole[system] if line[0] == int(tokens)), strict=True))
    if table == "2":
        return {"gFID": paper.fid(row, SIZE_OF[letter])}
    return {name: paper.column("table1", name, system, SIZE_OF[letter])[int(tokens)] for name in ("rFID", "gFID")}


def test_numbers_that_recipes_quote_are_the_paper_s() -> None:
    checked = 0
    for name in recipe_names():
        for part in load_recipe(name).reproduces.split("; "):
            said = re.fullmatch(r"Table (\d)([a-e]?), (.+) \((.+)\)", part)
            if said is None:
                continue
            table, letter, row, numbers = said.groups()
            expected = quoted(table, letter, row)
            for column, value in re.findall(r"(rFID|gFID|FID|CLIP score) ([\d.]+)", numbers):
                assert value == f"{expected[column]:.2f}", f"{name}: {column} {value}"
                checked += 1
    assert checked == 16 + 16 + 8 + 12 + 9  # tokenizers and generators of Table 1, Tables 2, 3 and 4
