"""What a folder of samples says of itself, where that is damaged."""

import json
from pathlib import Path

import pytest

from texttok_cli.errors import DataError
from texttok_cli.metrics.sample_run import sample_run

SETTINGS = {
    **dict.fromkeys(("captions_sha256", "guide_sha256", "labels")),
    **dict.fromkeys(("generator_sha256", "tokenizer_sha256"), "0" * 64),
    "format": "png",
    "images": 1,
    "precision": "fp32",
    "sampler": "ddim",
    "steps": 2,
    "cfg": "1",
}
LINE = {"id": "000000", "seed": 0, "class_id": 5, "caption": "a cat"}


def written(folder: Path, settings: dict[str, object], line: str) -> str:
    (folder / "settings.json").write_text(json.dumps(SETTINGS | settings))
    (folder / "samples.jsonl").write_text(line + "\n")
    return str(folder)


def test_a_whole_run_is_known(tmp_path: Path) -> None:
    run = sample_run(written(tmp_path, {}, json.dumps(LINE)))
    assert (run.classes, run.captions, run.card["sampler"]) == ([5], ["a cat"], "ddim")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"images": "x"}, json.dumps(LINE)),
        ({"images": float("inf")}, json.dumps(LINE)),
        ({"sampler": ["ddim"]}, json.dumps(LINE)),
        ({}, json.dumps(LINE | {"caption": 5})),
        ({"labels": "equal"}, json.dumps(LINE | {"class_id": [5]})),
        ({}, "[" * 100_000),
    ],
    ids=["images", "infinite", "sampler", "caption", "class", "nested"],
)
def test_a_damaged_run_is_one_line(tmp_path: Path, settings: dict[str, object], line: str) -> None:
    with pytest.raises(DataError, match=r"settings\.json or samples\.jsonl is damaged"):
        sample_run(written(tmp_path, settings, line)).prompts_among(["a cat"])
