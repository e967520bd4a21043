"""What the folder of a `texttok sample` says of its images, for the protocol card."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from texttok_cli.errors import DataError
from texttok_cli.files import json_object
from texttok_cli.metrics.protocols import NOT_CHECKED, REFERENCE_CAPTIONS

RUN_SETTINGS, RUN_LINES = "settings.json", "samples.jsonl"
INSIDE = {"png": (RUN_LINES, "images"), "npz": ("samples.npz",)}  # what holds all images of a run, the first as the folder itself
LABELS = {
    "equal": "equally many a class",
    "proportional": "in proportion to the training images of a class",
    "random": "drawn at random, each class as likely",
}


@dataclass(frozen=True)
class SampleRun:
    """Where the samples are, what the card says of them, of a class model the class of each, and each one's caption if all have one."""

    samples: str
    card: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[int] | None = None
    captions: Sequence[str] | None = None

    def prompts_among(self, captions: Sequence[str | None] | None) -> str | None:
        """What the card says of the labels, knowing the `captions` of the references (None: they have none, or one has none).

        Of a class model's samples that is nothing new; of prompts, whether they are all of those captions, in any order.
        """
        listed: str | None = self.card.get("labels")
        if self.captions is None or self.classes is not None:
            return listed
        ours, theirs = _texts(self.captions), _texts(captions or [None])
        if None in theirs:
            return f"{listed}{NOT_CHECKED}{REFERENCE_CAPTIONS}"
        if ours == theirs:
            return REFERENCE_CAPTIONS
        return f"{listed}; captions of {(ours & theirs).total():,} of the {theirs.total():,} references"


def _texts(texts: Sequence[str | None]) -> Counter[str | None]:
    """How often each is there, whatever blanks and line breaks it has: a file of prompts has a line for each."""
    return Counter(None if text is None else " ".join(text.split()) for text in texts)


def sample_run(samples: str) -> SampleRun:
    """Of the folder that `texttok sample` wrote, or of what it wrote there; of anything else nothing is known.

    DataError for a run that is not finished.
    """
    path = Path(samples)
    settings = _run_settings(path)
    folder, inside = (path, None) if settings is not None else (path.parent, path.name)
    settings = settings or _run_settings(folder)
    places = None if settings is None else INSIDE.get(str(settings.get("format")), INSIDE["png"])
    if settings is None or places is None or inside not in (None, *places):
        return SampleRun(samples)
    try:
        lines = (folder / RUN_LINES).read_text(encoding="utf-8").splitlines() if (folder / RUN_LINES).is_file() else []
        about = [json.loads(line) for line in lines]
        seeds = [one["seed"] for one in about]
        classes = [one["class_id"] for one in about if "class_id" in one]
        captions = [one["caption"] for one in about if "caption" in one]
        card = {
            "model_sha256": settings["generator_sha256"],
            "tokenizer_sha256": settings["tokenizer_sha256"],
            "unseen_captions_sha256": settings["captions_sha256"],
            "precision": settings["precision"],
            "labels": LABELS.get(settings["labels"]) or _as_listed(classes, captions),
            "seed": f"{min(seeds, default=None)} to {max(seeds, default=None)}",
            "sampler": settings["sampler"],
            "steps": str(settings["steps"]),
            "guidance": settings["cfg"],
            "guide_sha256": settings["guide_sha256"],
        }
        n = int(settings["images"])
        if not all(isinstance(one, int) for one in classes) or not all(isinstance(one, str) for one in captions):
            raise ValueError("class_id must be a number, caption text")
        if not all(value is None or isinstance(value, str) for value in card.values()):
            raise ValueError("what made the samples must be text")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as err:
        raise DataError(f"{folder}: {RUN_SETTINGS} or {RUN_LINES} is damaged ({type(err).__name__} {err})") from None
    if len(about) < n:
        raise DataError(f"{folder}: {len(about):,} of {n:,} samples are there; run the same `texttok sample` again")
    return SampleRun(
        str(folder / places[0]) if inside is None else samples,
        card,
        classes if len(classes) == len(about) else None,
        captions if len(captions) == len(about) else None,
    )


def _as_listed(classes: Sequence[int], prompts: Sequence[str]) -> str | None:
    """Of --class or --prompt: in words, and a digest by which two lists differ; a class model's captions are no prompts."""
    listed: Sequence[int] | Sequence[str] = classes or prompts
    if not listed:
        return None
    counts = sorted(Counter(listed).items())
    each = {count for _, count in counts}
    of_each = f"{min(each):,}" if len(each) == 1 else f"{min(each):,} to {max(each):,}"
    digest = hashlib.sha256(json.dumps(counts).encode()).hexdigest()
    return f"as listed: {len(counts):,} {'classes' if classes else 'prompts'}, {of_each} of each ({digest[:8]})"


def _run_settings(folder: Path) -> dict[str, Any] | None:
    """Of `texttok sample`; None where there are none, or those of some other program."""
    try:
        settings = json_object((folder / RUN_SETTINGS).read_bytes())
    except OSError:
        return None
    return settings if settings is not None and "generator_sha256" in settings else None
