"""Scripts of benchmarks/: what is there already is handed to `texttok train`, which compares recipes, and not skipped."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from texttok_cli.checkpoint import load_tokenizer_file, save_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(shutil.which("bash") is None, reason="shell scripts")
@pytest.mark.parametrize("script", ["table1.sh", "sweep.sh"])
def test_a_finished_run_is_compared_with_the_keys_that_are_given(script: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "texttok-32-256"
    run.mkdir(parents=True)
    (run / "model.safetensors").write_bytes(b"model")
    texttok = tmp_path / "bin" / "texttok"
    texttok.parent.mkdir()
    texttok.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    texttok.chmod(0o755)
    chosen = {"SIZES": "256", "SIZE": "256", "TOKENS": "32", "KINDS": "texttok", "TRAIN": "train.tar", "VAL": "val.tar"}
    environment = {**os.environ, **chosen, "OUT": str(run.parent), "PATH": f"{texttok.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", BENCHMARKS / script, "schedule.steps=7"], check=True, env=environment)
    first, *_ = (tmp_path / "calls").read_text().splitlines()
    fixed = "model.num_tokens=32 " if script == "sweep.sh" else ""
    assert first == f"train tokenizer/texttok-32-256 {fixed}data.train=train.tar data.val=val.tar schedule.steps=7 --out {run}"


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


def test_between_two_models_are_the_means_of_their_weights(models: Path, tmp_path: Path) -> None:
    script, first, second, between = load("interpolate"), models / "text.safetensors", tmp_path / "second.safetensors", tmp_path / "between"
    model, info = load_tokenizer_file(first)
    before = model.to_pixels.bias.clone()
    with torch.no_grad():
        model.to_pixels.bias.add_(1)
    save_tokenizer(second, model, training={}, latents_of=info.sha256)
    script.main(first, second, 0.25, between)
    found, said = load_tokenizer_file(between)
    torch.testing.assert_close(found.to_pixels.bias, before + 0.25, atol=0.01, rtol=0)  # bf16
    assert said.header.latents_of == info.sha256
    with pytest.raises(SystemExit, match=r"is not .* with its detokenizer trained on"):
        script.main(models / "other.safetensors", second, 0.25, between)
