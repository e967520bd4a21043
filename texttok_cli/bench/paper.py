"""The paper's own numbers (benchmarks/paper.json), to be shown beside ours and never as ours."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from texttok_cli.bench.curves import Point

SIZES = (256, 512)
SD_VAE = "SD-VAE-f8"
# Table 2's FIDs are of DiT-XL, Table 5's seconds of DiT-L at steps that are not stated: Fig. 4's own points are not tabulated.
POINTS_CAPTION = "the paper's: FID of Table 2 (DiT-XL, guided), seconds of Table 5 (DiT-L, TPUv6e)"


@cache
def paper() -> dict[str, Any]:
    """The whole file, from the wheel or the source checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "paper.json"
    path = inside if inside.is_file() else package.parents[1] / "benchmarks" / "paper.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def column(table: str, name: str, system: str, size: int) -> dict[int, float]:
    """A column of Table 1 or 5 for one system: number of tokens -> value; values that are not given are left out."""
    whole = paper()[table]
    index = whole["columns"].index(name)
    return {row[0]: row[index] for row in whole[str(size)][system] if row[index] is not None}


def fid(system: str, size: int) -> float:
    """FID in Table 2."""
    row = next(row for row in paper()["table2"]["rows"] if row["system"] == system)
    return float(row[str(size)][0])


def points(size: int) -> dict[str, list[Point]]:
    """Speed and quality of TexTok + DiT-XL and of the original DiT-XL/2, as far as the tables have them (POINTS_CAPTION)."""
    seconds = column("table5", "generation", "TexTok", size)
    ours = [Point(f"TexTok-{n}", seconds[n], fid(f"TexTok-{n} + DiT-XL", size)) for n in sorted(seconds)]
    [reference] = column("table5", "generation", SD_VAE, size).values()
    return {"TexTok + DiT-XL": ours, f"{SD_VAE} + DiT-XL/2": [Point("DiT-XL/2", reference, fid("DiT-XL/2", size))]}
