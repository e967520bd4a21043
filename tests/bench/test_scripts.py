"""Scripts of benchmarks/, and the Makefile: what is there already is handed to `texttok train`, which compares recipes, and not skipped."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

from texttok_cli import open_dataset

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(shutil.which("bash") is None, reason="shell scripts")
@pytest.mark.parametrize("val", ["val.tar", ""])
def test_a_finished_run_is_compared_with_the_keys_that_are_given(val: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "texttok-32-256"
    run.mkdir(parents=True)
    (run / "model.safetensors").write_bytes(b"model")
    texttok = tmp_path / "bin" / "texttok"
    texttok.parent.mkdir()
    texttok.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n')
    texttok.chmod(0o755)
    chosen = {"SIZE": "256 512", "TOKENS": "32", "KINDS": "texttok", "TRAIN": "train.tar", "VAL": val}
    environment = {**os.environ, **chosen, "OUT": str(run.parent), "PATH": f"{texttok.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", BENCHMARKS / "sweep.sh", "schedule.steps=7"], check=True, env=environment)
    calls = (tmp_path / "calls").read_text().splitlines()
    keys = f"model.num_tokens=32 data.train=train.tar data.val={val or '[]'} schedule.steps=7"
    assert calls[0] == f"train tokenizer/texttok-32-256 {keys} --out {run}"
    assert [call.split()[0] for call in calls] == (["train", "eval", "train", "eval", "bench"] if val else ["train", "train"])


@pytest.mark.skipif(shutil.which("make") is None, reason="this system has no make")
def test_make_fills_and_uses_its_own_environment_whatever_the_shell_sets(tmp_path: Path) -> None:
    more = tmp_path / "more.mk"
    more.write_text("show: ; @echo $$PYTHONPATH,$$PIP_USER\n")
    command = ["make", "-s", "-f", "Makefile", "-f", str(more), "show"]
    environment = os.environ | {"PYTHONPATH": "elsewhere", "PIP_USER": "1"}
    run = subprocess.run(command, cwd=BENCHMARKS.parent, env=environment, check=True, capture_output=True, text=True)
    assert run.stdout == ",no\n"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_4a_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = load("table4a")
    monkeypatch.setattr(table, "RUNS", tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "model.safetensors").write_bytes(b"model")
    calls: list[tuple[object, ...]] = []

    def texttok(*arguments: object) -> None:
        calls.append(arguments)
        if arguments[0] == "train":
            raise SystemExit("another recipe")

    monkeypatch.setattr(table, "texttok", texttok)
    monkeypatch.setattr(sys, "argv", ["table4a.py", "--train", "a.tar", "--val", "b.tar", "--keys", "schedule.steps=7"])
    with pytest.raises(SystemExit, match="another recipe"):
        table.main()
    assert [call[0] for call in calls] == ["caption", "train"]
    assert "schedule.steps=7" in calls[1] and calls[1][-1] == tmp_path / "none"


@pytest.mark.parametrize("name", ["loader", "step_time"])
def test_scripts_are_made_of_what_there_is(name: str) -> None:
    assert callable(load(name).main)


def test_captions_of_some_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "TEXTTOK_DATA" not in os.environ:
        pytest.skip("TEXTTOK_DATA does not name the folder that holds data/")
    captions = load("captions")
    photos = open_dataset([Path(os.environ["TEXTTOK_DATA"]) / "data" / "photos128-val-0000.tar"], caption_field="measured")
    for index in islice((i for i, item in enumerate(photos.items) if item.class_name in captions.SHARED), 3):
        item = photos.items[index]
        file = tmp_path / "in" / str(item.class_name) / f"{item.id}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photos.read(index))
        file.with_suffix(".txt").write_text(str(item.caption))
    out = tmp_path / "captions.json"
    options = ["--images", "3", "--batch-size", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["captions.py", str(tmp_path / "in"), *options])
    captions.main()
    result = json.loads(out.read_text())
    assert result["classifier"]["n"] == 3 and set(result["captions_per_second"]) == set(captions.OFFLINE)
    assert all(row["failed"] == 0 and row["n"] == 3 for row in result["captions_per_second"].values())
