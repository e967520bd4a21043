"""What the folder of a `texttok sample` says of its images, for the protocol card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from texttok_cli.errors import DataError

RUN_SETTINGS, RUN_LINES = "settings.json", "samples.jsonl"
LABELS = {"equal": "equally many a class", "proportional": "in proportion to the training images of a class"}


def sample_run(samples: str) -> tuple[str, dict[str, Any]]:
    """The samples themselves in the folder that `texttok sample` wrote, and what the card says of them; else `samples`, and nothing.

    DataError for a run that is not finished.
    """
    runs = {path: settings for path in (Path(samples).parent, Path(samples)) if (settings := _run_settings(path)) is not None}
    if not runs:
        return samples, {}
    folder, settings = runs.popitem()
    try:
        lines = (folder / RUN_LINES).read_text(encoding="utf-8").splitlines() if (folder / RUN_LINES).is_file() else []
        seeds = [json.loads(line)["seed"] for line in lines]
        card = {
            "model_sha256": settings["generator_sha256"],
            "precision": settings["precision"],
            "labels": LABELS.get(settings["labels"]),
            "seed": f"{min(seeds, default=None)} to {max(seeds, default=None)}",
            "sampler": settings["sampler"],
            "steps": str(settings["steps"]),
            "guidance": settings["cfg"],
        }
        n, inside = settings["images"], "samples.npz" if settings["format"] == "npz" else RUN_LINES
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(f"{folder}: {RUN_SETTINGS} or {RUN_LINES} is damaged ({type(err).__name__} {err})") from None
    if len(lines) < n:
        raise DataError(f"{folder}: {len(lines):,} of {n:,} samples are there; run the same `texttok sample` again")
    return str(folder / inside) if folder == Path(samples) else samples, card


def _run_settings(folder: Path) -> dict[str, Any] | None:
    """Of `texttok sample`; None where there are none, or those of some other program."""
    try:
        settings = json.loads((folder / RUN_SETTINGS).read_bytes())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and "generator_sha256" in settings else None
