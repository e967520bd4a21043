"""The trainer: exact resume, bad steps, interruption, several processes, and what a run leaves behind."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate.utils import LoggerType
from PIL import Image
from runs import ENVIRONMENT, QUIET, Stop, assert_it_goes_on_to_the_bit, assert_same_bits, launched, metrics, newest_state, train
from safetensors.torch import load_file

import texttok_cli
from texttok_cli.assets import ASSETS, _in_package
from texttok_cli.checkpoint import read_tokenizer_info
from texttok_cli.config.loader import load_recipe
from texttok_cli.data import TrainLoader, center_crop, open_dataset, to_tensor, to_uint8
from texttok_cli.data.loader import SampleStream
from texttok_cli.errors import CheckpointError, DataError, RecipeError, TrainingError
from texttok_cli.files import alone_in, load_safetensors, save_safetensors, sha256_file
from texttok_cli.metrics.image import psnr, ssim
from texttok_cli.metrics.statistics import RunningGaussian, frechet_distance
from texttok_cli.models.bottleneck import DEAD_USAGE, USAGE_DECAY, code_usage
from texttok_cli.models.discriminator import Discriminator
from texttok_cli.text import load_text_encoder
from texttok_cli.training import session
from texttok_cli.training.conditioning import class_ids
from texttok_cli.training.engine import Engine
from texttok_cli.training.guard import Guard
from texttok_cli.training.loop import Interrupted, _StopSignal
from texttok_cli.training.report import Reporter
from texttok_cli.training.run import RunFolder, optimizer_tensors
from texttok_cli.training.session import run_training
from texttok_cli.training.tokenizer_task import TokenizerTask

RecipeFile = Callable[..., Path]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"precision": "bf16"}},
        {"data": {"workers": 2}},
        {"optimizer": {"kind": "muon"}, "training": {"accumulate": 2, "checkpointing": True}},
        {"model": {"bottleneck": {"kind": "vq", "codes": 16}}},
        {"model": {"bottleneck": {"kind": "kl", "weight": 0.01}}},
    ],
    ids=["fp32", "bf16", "workers", "muon", "vq", "kl"],
)
def test_three_steps_and_three_more_are_six_to_the_bit(recipe_file: RecipeFile, tmp_path: Path, changes: dict) -> None:
    assert_it_goes_on_to_the_bit(recipe_file(**changes), tmp_path)


@pytest.mark.parametrize(
    ("header", "changes", "missing"),
    [
        ({"samples": "all"}, {}, None),
        ({"step": 10**400}, {}, None),
        ({"step": 2}, {}, None),
        ({}, {"model.latent_pos": torch.zeros(1)}, None),
        ({}, {}, "model.latent_pos"),
        ({}, {}, "guard.taken"),
    ],
    ids=["samples", "step", "another step", "shape", "weight", "guard"],
)
def test_a_damaged_state_is_one_line(
    recipe_file: RecipeFile, tmp_path: Path, header: dict, changes: dict[str, torch.Tensor], missing: str | None
) -> None:
    recipe, out = recipe_file(), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(recipe, out, report=Stop(3, signal.SIGTERM))
    state = out / "state/step-00000003/state.safetensors"
    meta, tensors = load_safetensors(state, error=CheckpointError)
    kept = {name: value for name, value in (tensors | changes).items() if name != missing}
    save_safetensors(state, kept, meta | header)
    with pytest.raises(CheckpointError, match=r"^\S*run/state.* is damaged; remove it, or the whole \S*run to start again$"):
        train(recipe, out)


def test_the_state_holds_all_that_the_next_step_depends_on(recipe_file: RecipeFile, tmp_path: Path) -> None:
    state = train(recipe_file(), tmp_path / "run")
    for prefix in ("model.", "ema.", "discriminator.", "lecam.ema_real", "guard.", "optimizer.0.0.exp_avg", "optimizer.1.0.exp_avg"):
        assert any(key.startswith(prefix) for key in state), prefix
    assert state["lecam.ema_real"] != 0


def test_losses_start_when_the_recipe_says(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train(recipe_file(), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert ["gan" in line for line in lines] == [False, False, True, True, True, True]  # start: 2
    r1 = [line.get("d_r1") for line in lines]  # r1_every: 2
    assert r1[:2] == [None, None] and r1[2] == r1[3] != r1[4] == r1[5]
    assert {"logit_gap", "d_lecam", "d_grad_norm", "skipped_steps"} <= lines[-1].keys()


def test_a_run_leaves_a_model_that_encodes(recipe_file: RecipeFile, tmp_path: Path, pictures: Path) -> None:
    from texttok_cli import load_tokenizer

    train(recipe_file(data={"val": [str(pictures)]}, training={"val_images": 2, "grid_images": 4, "val_rfid": True}), tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run" / "model.safetensors", device="cpu")
    z = tokenizer.encode(pictures / "even" / "00.png", "picture number 0")
    assert z.shape == (1, 4, 8)
    assert (tokenizer.model.latent_std > 0).all() and not torch.equal(tokenizer.model.latent_std, torch.ones(8))
    validated = metrics(tmp_path / "run", "val_psnr")
    assert [line["step"] for line in validated] == [6]
    assert 0 < validated[-1]["val_ssim"] < 1
    if _in_package(ASSETS["inception"]) is not None:
        assert validated[-1]["val_rfid"] > 0
    with Image.open(tmp_path / "run" / "grids" / "step-00000006.png") as grid:
        assert grid.size == (4 * 32, 2 * 32)


def test_latent_statistics_are_those_of_all_training_images(recipe_file: RecipeFile, tmp_path: Path, pictures: Path) -> None:
    from texttok_cli import load_tokenizer

    train(recipe_file(training={"weights": "fp32"}), tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run" / "model.safetensors", device="cpu")
    files = sorted(pictures.rglob("*.png"))
    z = tokenizer.encode(files, [file.with_suffix(".txt").read_text() for file in files]).flatten(0, 1).double()
    torch.testing.assert_close(tokenizer.model.latent_mean.double(), z.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokenizer.model.latent_std.double(), z.std(0, correction=0), rtol=1e-4, atol=1e-5)


def test_latent_statistics_are_of_each_image_with_its_own_caption_in_any_batch(recipe_file: RecipeFile, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file()))
    text = load_text_encoder(recipe.model.condition.encoder)
    captions = ["a dog", "a red flower", "", "two cats", "a long road"]
    task = TokenizerTask(
        recipe, Engine(recipe.training, out=tmp_path, device="cpu"), lambda indices: {"cond": text([captions[i] for i in indices])}, None
    )
    with torch.no_grad():
        for parameter in task.ema_model.parameters():  # far enough from the initial near-zeros that captions show
            parameter.add_(0.1 * torch.randn_like(parameter))
        images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
        z = task.ema_model.encode(images / 127.5 - 1, text(captions)).z.flatten(0, 1).double()
    task.set_latent_statistics(SimpleNamespace(images=images[i : i + 2], indices=torch.arange(5)[i : i + 2]) for i in range(0, 5, 2))
    torch.testing.assert_close(task.ema_model.latent_mean.double(), z.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(task.ema_model.latent_std.double(), z.std(0, correction=0), rtol=1e-4, atol=1e-5)


def test_validation_is_of_the_averaged_weights_and_a_mean_over_images(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of batches that are not equally large, and of images as they are stored: in their range."""
    monkeypatch.setattr("texttok_cli.training.tokenizer_task.POOL_DIM", 3)
    recipe = load_recipe(str(recipe_file()), ["model.condition={source: none}", "model.bottleneck={kind: vq, codes: 16}"])

    def condition(indices: Any) -> dict[str, Any]:
        return {"cond": None}

    def distance(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return (real - fake).abs().mean(dim=(1, 2, 3))

    def inception(images: torch.Tensor) -> Any:
        return SimpleNamespace(pool=images.float().mean(dim=(2, 3)))

    task = TokenizerTask(recipe, Engine(recipe.training, out=tmp_path, device="cpu"), condition, distance)
    with torch.no_grad():
        for parameter in task.ema_model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
        images[4] //= 8
        output, latents = task.ema_model(images / 127.5 - 1, None)
    assert output.abs().max() > 1.1
    output = output.clamp(-1, 1)
    pixels, batches = (
        to_uint8(output),
        [SimpleNamespace(images=images[part], indices=torch.arange(5)[part]) for part in (slice(4), slice(4, 5))],
    )
    found = task.validate(condition, batches, inception)  # type: ignore[arg-type]
    sides = []
    for side in (images, pixels):
        sides.append(RunningGaussian(3))
        sides[-1].update(inception(side).pool)
    assert found == pytest.approx(
        {
            "val_psnr": float(psnr(images, pixels).mean()),
            "val_ssim": float(ssim(images, pixels).mean()),
            "val_perceptual": float(distance(images / 255, (output + 1) / 2).mean()),
            **{f"val_{name}": value for name, value in code_usage(latents.codes, 16).items()},
            "val_rfid": frechet_distance(*(side.gaussian() for side in sides)),
        },
        rel=1e-5,
    )
    one = task.validate(condition, batches[1:], inception)  # type: ignore[arg-type]
    assert "val_rfid" not in one and one["val_perceptual"] != pytest.approx(found["val_perceptual"], rel=0.1)


def test_accumulation_equals_one_batch(recipe_file: RecipeFile, tmp_path: Path) -> None:
    for parts in (1, 2):
        train(recipe_file(training={"accumulate": parts}, schedule={"steps": 3}), tmp_path / str(parts))
    for one, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        for key in ("loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-5)


def test_adaptive_weight_scales_the_gan_term(recipe_file: RecipeFile, tmp_path: Path) -> None:
    values = {}
    for adaptive in (False, True):
        train(recipe_file(objective={"adversarial": {"adaptive": adaptive}}, schedule={"steps": 3}), tmp_path / str(adaptive))
        values[adaptive] = metrics(tmp_path / str(adaptive))[2]["gan"]
    assert values[False] > 0 and values[True] > 0 and values[True] != values[False]


# ------------------------------------------------------------------ bad steps


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Makes the l2 loss NaN at some steps."""

    def at(steps: set[int]) -> None:
        honest = TokenizerTask._reconstruction_losses

        def poisoned(self: TokenizerTask, real: Any, fake: Any, step: int) -> dict[str, torch.Tensor]:
            losses = honest(self, real, fake, step)
            return {"l2": losses["l2"] * float("nan")} if step in steps else losses

        monkeypatch.setattr(TokenizerTask, "_reconstruction_losses", poisoned)

    return at


def test_a_nan_step_is_skipped_and_counted(recipe_file: RecipeFile, tmp_path: Path, poison: Callable) -> None:
    poison({3})
    state = train(recipe_file(), tmp_path / "run")
    assert all(value.isfinite().all() for value in state.values())
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [0, 0, 0, 1, 1, 1]
    assert state["optimizer.0.0.step"] == 5  # of six


def test_three_bad_steps_in_a_row_roll_back(
    recipe_file: RecipeFile, tmp_path: Path, poison: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison({2, 3, 4})
    loaded = []
    honest = RunFolder.load_state
    monkeypatch.setattr(RunFolder, "load_state", lambda *given: loaded.append(result := honest(*given)) or result)
    state = train(recipe_file(), tmp_path / "run")
    assert [step for step, _ in loaded] == [0, 2]  # at the start, and after the third bad step
    assert state["optimizer.0.0.step"] == 3 and state["guard.skipped"] == 3


def test_divergence_ends_with_what_to_do(recipe_file: RecipeFile, tmp_path: Path, poison: Callable) -> None:
    poison(set(range(100)))
    with pytest.raises(TrainingError, match=r"diverged at step 3.*lower optimizer.lr"):
        train(recipe_file(), tmp_path / "run")


def test_rolling_back_again_and_again_ends(recipe_file: RecipeFile, tmp_path: Path, poison: Callable) -> None:
    """Also when every roll-back falls on a step that would be saved."""
    poison(set(range(4, 100)))
    with pytest.raises(TrainingError, match=r"rolled back to step \d+ 3 times"):
        train(recipe_file(training={"save_every": 1}, schedule={"steps": 40}), tmp_path / "run")


def test_a_spike_is_a_bad_step_and_leaves_the_running_mean_alone() -> None:
    guard = Guard(spike=3.0)
    assert all(guard.accepts(torch.tensor(norm)) for norm in [0.01] + 98 * [1.0] + [9.0])  # not judged before the mean says something
    guard.typical.fill_(1.0)
    answers = [guard.accepts(torch.tensor(norm)) for norm in (2.0, 2.9, 3.5, 1.0)]
    assert answers == [True, True, False, True]  # the mean is about 1.03 when 3.5 comes
    assert guard.skipped == 1 and not guard.wants_roll_back
    assert not guard.accepts(torch.tensor(1.0), torch.tensor(float("nan")))
    guard.forget_typical()
    assert guard.accepts(torch.tensor(50.0)) and guard.typical == 50


def test_bad_steps_between_good_ones_are_no_reason_to_roll_back() -> None:
    guard, good, bad = Guard(spike=None), torch.tensor(1.0), torch.tensor(float("nan"))
    assert [guard.accepts(norm) for norm in (bad, bad, good, bad, good, bad, bad)] == [False, False, True, False, True, False, False]
    assert not guard.wants_roll_back and guard.skipped == 5
    assert not guard.accepts(bad) and guard.wants_roll_back
    guard.reset(skipped=6)
    assert not guard.wants_roll_back and guard.skipped == 6


def test_a_guard_that_is_saved_goes_on_as_it_would_have() -> None:
    guard, good, bad = Guard(spike=3.0), torch.tensor(2.0), torch.tensor(float("nan"))
    assert [guard.accepts(norm) for norm in (good, bad, bad)] == [True, False, False]
    again = Guard(spike=3.0)
    again.load_state(guard.state())
    assert (again.typical, again.taken, again.skipped) == (2, 1, 2) and not again.wants_roll_back
    assert not again.accepts(bad) and again.wants_roll_back


def test_a_loss_that_starts_late_makes_the_guard_begin_anew(recipe_file: RecipeFile, tmp_path: Path) -> None:
    state = train(recipe_file(objective={"adversarial": {"start": 4}}, schedule={"steps": 6}), tmp_path / "run")
    assert state["guard.taken"] == 2


def test_lazy_r1_is_in_every_line_of_the_log_once_there_is_one(recipe_file: RecipeFile, tmp_path: Path) -> None:
    changes = {"adversarial": {"start": 0, "r1_every": 2}}
    train(recipe_file(objective=changes, schedule={"steps": 4}, training={"log_every": 2}), tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run", "d_r1")] == [2, 4]


def test_a_resumed_discriminator_has_its_moments_in_its_own_memory_format(tmp_path: Path) -> None:
    """Fused Adam refuses another."""
    net = Discriminator(16, base=4, multipliers=(1, 2))
    adam = torch.optim.Adam(net.parameters())
    net(torch.rand(2, 3, 16, 16)).sum().backward()
    adam.step()
    run = RunFolder(tmp_path / "other")
    run.save_state(1, optimizer_tensors([adam]))
    again = torch.optim.Adam(net.parameters())
    run.load_state([again])
    assert any(p.ndim == 4 and p.stride() != p.contiguous().stride() for p in net.parameters())
    for parameter in net.parameters():
        assert {again.state[parameter][name].stride() for name in ("exp_avg", "exp_avg_sq")} == {parameter.stride()}
        assert torch.equal(again.state[parameter]["exp_avg"], adam.state[parameter]["exp_avg"])


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="this system does not tell which files are mapped")
def test_a_resumed_run_does_not_hold_on_to_the_file_of_its_state(tmp_path: Path) -> None:
    """Removed after the next one is saved, it would take disk space until the run ends; Windows would not remove it at all."""
    net = torch.nn.Linear(2, 3)
    adam = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    adam.step()
    run = RunFolder(tmp_path)
    run.save_state(1, optimizer_tensors([adam]))
    again = torch.optim.AdamW(net.parameters())
    run.load_state([again])
    gc.collect()
    assert [state["step"] for state in again.state.values()] == [1, 1]
    assert not [held.path for held in psutil.Process().memory_maps() if str(tmp_path) in held.path]


# ------------------------------------------------------------------ what a person gets wrong, and what breaks


def test_another_recipe_in_the_same_folder_is_refused(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train(recipe_file(), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"optimizer\.lr.*another --out"):
        train(recipe_file(), tmp_path / "run", "optimizer.lr=0.5")


def test_how_a_run_is_carried_out_may_change_when_it_goes_on(recipe_file: RecipeFile, tmp_path: Path, pictures: Path) -> None:
    whole = train(recipe_file(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe_file(), tmp_path / "parts", report=Stop(3, signal.SIGTERM))
    said: list[str] = []
    changes = [f"data.val={pictures}", "data.workers=1", "training.checkpointing=true", "training.log_every=2", "training.save_every=1"]
    parts = train(recipe_file(), tmp_path / "parts", *changes, report=Reporter(said.append, lambda *_: None, pytest.fail))
    assert_same_bits(whole, parts)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [1, 2, 3, 4, 6]
    keys = {change.partition("=")[0] for change in changes}
    (line,) = [line for line in said if "goes on with another" in line]
    assert set(line.partition("another ")[2].split(", ")) == keys
    assert train(recipe_file(), tmp_path / "parts", *changes) and load_recipe(str(tmp_path / "parts" / "recipe.yaml")).data.workers == 1


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package of that name which keeps what it is told."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "wandb.py").write_text(
        "runs, logged = [], []\nlog = lambda values, step: logged.append(step)\nfinish = lambda: None\n"
        "def init(**how):\n    import wandb\n    runs.append(how)\n    return wandb\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])  # what it found when it was imported
    for name in ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def test_a_run_that_goes_on_is_the_same_to_wandb(
    recipe_file: RecipeFile, tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, tracked = recipe_file(), tmp_path / "run", "training.trackers=[wandb]"
    with pytest.raises(Interrupted):
        train(file, out, tracked, report=Stop(3, signal.SIGTERM))
    train(file, out, tracked, "training.log_every=2")
    first, second = wandb.runs
    assert first["id"] == second["id"] and second["resume"] == "allow" and second["allow_val_change"] and second["name"] == "run"
    assert first["config"] == load_recipe(str(file), [tracked]).model_dump(mode="json") and second["config"]["training"]["log_every"] == 2
    assert wandb.logged == [1, 2, 3, 4, 6]
    shutil.rmtree(out / "state")
    (out / "model.safetensors").unlink()
    monkeypatch.setenv("WANDB_NAME", "mine")
    train(file, out, tracked)
    assert wandb.runs[2]["id"] != first["id"] and "name" not in wandb.runs[2], "from the start: another run"


def test_models_of_earlier_steps_are_those_that_a_run_of_so_many_steps_leaves(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """But for the schedule, which is constant here; what is kept changes nothing of the run."""
    constant = "schedule={steps: 6, decay_fraction: 0}"
    whole = train(recipe_file(), tmp_path / "whole", constant)
    assert_same_bits(whole, train(recipe_file(), tmp_path / "kept", constant, "training.export_every=2"))
    train(recipe_file(), tmp_path / "short", constant.replace("6", "4"))
    kept = sorted((tmp_path / "kept" / "models").iterdir())
    assert [file.name for file in kept] == ["step-00000002.safetensors", "step-00000004.safetensors"]
    assert_same_bits(load_file(kept[1]), load_file(tmp_path / "short" / "model.safetensors"))
    trained, short = (read_tokenizer_info(file).header.training for file in (kept[1], tmp_path / "short" / "model.safetensors"))
    assert trained == short and (trained["steps"], trained["images_seen"]) == (4, 16)


def test_a_field_that_is_new_since_a_run_began_does_not_end_it(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train(recipe_file(), tmp_path / "run")
    file = tmp_path / "run" / "recipe.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "checkpointing" not in line))
    train(recipe_file(), tmp_path / "run")
    file.write_text("task: [")
    with pytest.raises(RecipeError, match=r"recipe.yaml: is not a recipe .* another --out"):
        train(recipe_file(), tmp_path / "run")


def test_a_run_does_not_go_on_with_other_data(recipe_file: RecipeFile, tmp_path: Path, pictures: Path) -> None:
    images = shutil.copytree(pictures, tmp_path / "images")
    recipe = recipe_file(data={"train": [str(images)]})
    train(recipe, tmp_path / "run", "training.save_every=1")
    (tmp_path / "run" / "model.safetensors").unlink()  # else the run is finished
    next(images.rglob("*.png")).unlink()
    with pytest.raises(TrainingError, match=r"was trained on \d+ examples, now there are \d+"):
        train(recipe, tmp_path / "run", "training.save_every=1")


def test_a_validation_that_was_cut_off_is_made_when_the_run_goes_on(recipe_file: RecipeFile, tmp_path: Path, pictures: Path) -> None:
    recipe = recipe_file(data={"val": [str(pictures)]})
    train(recipe, tmp_path / "run")
    whole = metrics(tmp_path / "run", "val_psnr")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "val_" not in line))
    (tmp_path / "run" / "model.safetensors").unlink()
    train(recipe, tmp_path / "run")
    assert metrics(tmp_path / "run", "val_psnr") == whole[-1:]


@pytest.mark.parametrize(("flip", "crop"), [(False, "center"), (True, "center"), (False, "random")])
def test_batches_are_drawn_flipped_and_cropped_as_the_recipe_says(
    flip: bool, crop: str, recipe_file: RecipeFile, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """28 images of two epochs: each is the middle of its picture, its mirror image, or another part of it."""
    drawn: list[Any] = []
    monkeypatch.setattr(TokenizerTask, "step", lambda task, batch, step: drawn.append(batch) or {"l2": torch.tensor(0.0)})
    training = {"seed": 5, "batch_size": 14}
    train(recipe_file(data={"flip": flip, "crop": crop}, training=training, schedule={"steps": 2}), tmp_path / "run")
    indices, images = torch.cat([batch.indices for batch in drawn]), torch.cat([batch.images for batch in drawn])
    assert torch.equal(indices, SampleStream(14, 5).indices(0, 28))
    paths = [item.path for item in open_dataset([pictures]).items]
    middles = torch.stack([to_tensor(center_crop(Image.open(paths[i]).convert("RGB"), 32)) for i in indices])
    same, mirrored = ((images == these).flatten(1).all(dim=1) for these in (middles, middles.flip(-1)))
    assert mirrored.any() == flip
    assert (same | mirrored).all() == (crop == "center") and (same.sum() < 28) == (flip or crop == "random")


def test_validation_is_of_images_spread_over_their_own_set_with_their_own_captions(
    recipe_file: RecipeFile, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sorted(pictures.rglob("*.png"))[:5]
    (tmp_path / "val").mkdir()
    for i, path in enumerate(source):
        shutil.copy(path, tmp_path / "val" / f"{i}.png")
        (tmp_path / "val" / f"{i}.txt").write_text(f"validation image {i}")
    seen: dict[str, tuple[list[int], torch.Tensor, Any]] = {}

    def validate(task: TokenizerTask, condition: Any, batches: Any, inception: Any) -> dict[str, float]:
        [batch] = batches
        seen["numbers"] = (batch.indices.tolist(), batch.images, condition(batch.indices.tolist())["cond"])
        return {"val_psnr": 0.0}

    def reconstruct(task: TokenizerTask, condition: Any, batch: Any) -> torch.Tensor:
        seen["grid"] = (batch.indices.tolist(), batch.images, condition(batch.indices.tolist())["cond"])
        return batch.images // 2

    monkeypatch.setattr(TokenizerTask, "validate", validate)
    monkeypatch.setattr(TokenizerTask, "reconstruct_uint8", reconstruct)
    recipe = recipe_file(data={"val": [str(tmp_path / "val")]}, training={"val_images": 3, "grid_images": 2}, schedule={"steps": 1})
    train(recipe, tmp_path / "run")
    chosen = {"numbers": [0, 1, 3], "grid": [0, 2]}
    for name, indices in chosen.items():
        found, images, cond = seen[name]
        originals = torch.stack([to_tensor(center_crop(Image.open(source[i]).convert("RGB"), 32)) for i in indices])
        expected = load_text_encoder(load_recipe(str(recipe)).model.condition.encoder, device="cpu", offline=True)(
            [f"validation image {i}" for i in indices]
        )
        assert found == indices and torch.equal(images, originals) and torch.equal(cond.tokens, expected.tokens)
    with Image.open(tmp_path / "run" / "grids" / "step-00000001.png") as grid:
        drawn = torch.from_numpy(np.array(grid)).permute(2, 0, 1)
    rows = (seen["grid"][1], seen["grid"][1] // 2)
    assert torch.equal(drawn, torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1))


def test_validation_has_no_larger_batches_than_training(
    recipe_file: RecipeFile, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def validate(task: TokenizerTask, condition: Any, batches: Any, inception: Any) -> dict[str, float]:
        sizes.extend(len(batch.images) for batch in batches)
        return {"val_psnr": 0.0}

    monkeypatch.setattr(TokenizerTask, "validate", validate)
    training = {"accumulate": 2, "val_images": 5}
    train(recipe_file(data={"val": [str(pictures)]}, training=training, schedule={"steps": 1}), tmp_path / "run")
    assert sizes == [2, 2, 1]


def test_a_signal_ends_a_validation_with_its_batch(
    recipe_file: RecipeFile, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def validate(task: TokenizerTask, condition: Any, batches: Any, inception: Any) -> dict[str, float]:
        for batch in batches:
            seen.append(len(batch.images))
            os.kill(os.getpid(), signal.SIGTERM)
        return {"val_psnr": 0.0}

    monkeypatch.setattr(TokenizerTask, "validate", validate)
    recipe = recipe_file(data={"val": [str(pictures)]}, training={"accumulate": 2, "val_images": 5}, schedule={"steps": 1})
    with pytest.raises(Interrupted, match="stopped at step 1"):
        train(recipe, tmp_path / "run")
    assert seen == [2] and (tmp_path / "run" / "state" / "step-00000001").is_dir()


def test_signals_to_the_whole_job_leave_the_workers_at_work(pictures: Path) -> None:
    batches = TrainLoader(open_dataset([pictures]), image_size=16, batch_size=2, seed=0, flip=True, workers=2).batches()
    for _ in range(2):  # one of each worker
        next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker, number in product(workers, (signal.SIGTERM, signal.SIGINT)):
        os.kill(int(worker.pid or 0), number)
    for _ in range(20):  # more than was made ready before
        next(batches)


def test_a_signal_that_comes_twice_at_once_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now, arrived = 100.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append(now))
    try:
        with _StopSignal() as stop:
            signal.raise_signal(signal.SIGTERM)
            now = 100.5
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested and not arrived
            now = 105.0
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert arrived == [105.0]


def test_a_finished_run_is_left_alone(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train(recipe_file(), tmp_path / "run")
    model = tmp_path / "run" / "model.safetensors"
    before = model.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "run" / "state")
    assert run_training(load_recipe(str(recipe_file())), tmp_path / "run", QUIET, offline=True, device="cpu") == model
    assert model.stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"schedule\.steps.*another --out"):
        train(recipe_file(), tmp_path / "run", "schedule.steps=9")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_training_from_python_is_what_the_command_does(recipe_file: RecipeFile, tmp_path: Path, pictures: Path) -> None:
    images = shutil.copytree(pictures, tmp_path / "images")
    (images / "odd" / "never.heic").write_bytes(b"")  # can't even be listed as an image
    overrides = [f"data.train={images}", "schedule.steps=2"]
    with pytest.warns(UserWarning, match=r"skipped odd/never.heic: "):
        model = texttok_cli.train(recipe_file(), *overrides, out=tmp_path / "python", device="cpu", offline=True)
    assert model == tmp_path / "python" / "model.safetensors"
    train(recipe_file(), tmp_path / "command", *overrides)
    assert_same_bits(load_file(model), load_file(tmp_path / "command" / "model.safetensors"))


def test_two_runs_do_not_train_in_one_folder_at_once(recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "WORKERS_END", 0)
    with alone_in(tmp_path / "run"):
        with pytest.raises(DataError, match="run: another texttok is writing there"):
            train(recipe_file(), tmp_path / "run")
        assert list((tmp_path / "run").iterdir()) == []


def test_classes_that_are_numbers_keep_them() -> None:
    ids = class_ids([[(str(i), str(i)) for i in (10, 2, 9)]], 3, torch.device("cpu"))
    assert ids[0] == ["2", "9", "10"] and ids[1][0].tolist() == [2, 0, 1]


def test_a_damaged_state_is_named(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train(recipe_file(), tmp_path / "run", "schedule.steps=6")
    (tmp_path / "run" / "model.safetensors").unlink()  # else the run is finished
    file = next((tmp_path / "run" / "state").glob("step-*")) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        train(recipe_file(), tmp_path / "run")


def test_a_full_disk_while_saving_keeps_the_last_state(recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import texttok_cli.training.run as run_module

    honest = run_module.save_safetensors

    def full(path: Path, tensors: Any, header: dict[str, Any]) -> None:
        if header.get("step") == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        honest(path, tensors, header)

    monkeypatch.setattr(run_module, "save_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        train(recipe_file(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    resumed = train(recipe_file(), tmp_path / "run")
    assert_same_bits(resumed, train(recipe_file(), tmp_path / "whole"))


def test_data_that_is_damaged_in_the_middle_of_an_epoch_is_replaced_and_said(
    recipe_file: RecipeFile, tmp_path: Path, pictures: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    (copy / "odd" / "03.png").write_bytes((copy / "odd" / "03.png").read_bytes()[:60])
    (copy / "odd" / "never.heic").write_bytes(b"")  # can't even be listed as an image
    said: list[str] = []
    train(recipe_file(data={"train": [str(copy)]}), tmp_path / "run", report=Reporter(lambda _: None, lambda *_: None, said.append))
    assert len(said) == 2 and said[0].startswith("skipped odd/never.heic: ") and said[1].startswith("skipped odd/03.png: damaged")


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("training.batch_size=5", RecipeError, "batch_size 5"),
        ("training.seed=20250101123456", RecipeError, "training.seed"),
        ("data.train=[]", RecipeError, "data.train is empty"),
        ("data.train=[nowhere.tar]", DataError, "nowhere.tar: no such"),
        ("objective.adversarial.discriminator.multipliers=[1,1,1,1,1,1]", RecipeError, "discriminator"),
        ("model.condition={source: class_embedding, num_classes: 9}", RecipeError, "num_classes is 9"),
    ],
)
def test_mistakes_are_one_line(recipe_file: RecipeFile, tmp_path: Path, override: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        train(recipe_file(training={"accumulate": 2}), tmp_path / "run", override)
    assert "\n" not in str(raised.value)
    assert error is RecipeError or not (tmp_path / "run").exists()  # data is looked for before anything is written


def test_an_environment_that_is_left_over_of_a_launcher_trains_nothing(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DataError, match="RANK=1 and WORLD_SIZE=1 in the environment name no process of a run"):
        train(recipe_file(), tmp_path / "run")


def test_class_embeddings_and_class_text_train(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train(recipe_file(), tmp_path / "a", "model.condition={source: class_embedding, num_classes: 2}", "schedule.steps=2")
    train(recipe_file(), tmp_path / "b", "model.condition.source=class_text", "schedule.steps=2")
    assert "model.classes.weight" in newest_state(tmp_path / "a")


def test_text_cache_gives_the_same_training(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train(recipe_file(), tmp_path / "online", "schedule.steps=2")
    train(recipe_file(), tmp_path / "cached", "schedule.steps=2", "training.text_cache=true")
    for a, b in zip(metrics(tmp_path / "online"), metrics(tmp_path / "cached"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)  # the cache holds fp16
    assert list((tmp_path / "cached" / "text").glob("part-*.safetensors"))


def test_an_image_without_a_caption_is_told_with_a_remedy(recipe_file: RecipeFile, tmp_path: Path, pictures: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(pictures, bare, ignore=shutil.ignore_patterns("*.txt"))
    with pytest.raises(DataError, match=r"even/00\.png: has no caption; .* give them as data\.captions") as raised:
        train(recipe_file(data={"train": [str(bare)]}), tmp_path / "run")
    assert "--" not in str(raised.value)  # `texttok train` has none of the options of `texttok encode`


@pytest.mark.parametrize("where", ["train", "val"])
def test_captions_with_more_words_than_the_recipe_allows_are_refused(
    recipe_file: RecipeFile, tmp_path: Path, pictures: Path, where: str
) -> None:
    """Before the first step, and in a way that the same command with captions that fit goes on in the same folder."""
    fitting = tmp_path / "fitting"
    shutil.copytree(pictures, fitting)
    for caption in fitting.rglob("*.txt"):
        caption.write_text("at most  three ")
    data = {"train": [str(fitting)], "val": [str(fitting)], where: [str(pictures)], "max_words": 3}
    with pytest.raises(DataError) as raised:
        train(recipe_file(data=data), tmp_path / "run")
    assert str(raised.value) == (
        "even/02.png: its caption has 9 words, data.max_words allows 3: make captions with `texttok caption --max-words 3`"
        " and give them as data.captions"
    )
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"id": f"{i:02d}", "caption": "of three words"}) + "\n" for i in range(14)))
    train(recipe_file(data=data), tmp_path / "run", f"data.captions={captions}", "schedule.steps=1")


def test_class_text_has_no_captions_to_count(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train(recipe_file(), tmp_path / "run", "model.condition.source=class_text", "data.max_words=1", "schedule.steps=1")


@pytest.mark.parametrize("cached", ["true", "false"])
def test_captions_that_are_cut_off_are_said_whenever_a_run_begins(recipe_file: RecipeFile, tmp_path: Path, cached: str) -> None:
    """Every third has nine words, for which eight tokens are too few."""
    said: list[str] = []
    recipe, cache = recipe_file(), f"training.text_cache={cached}"
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", cache, report=Stop(2, signal.SIGTERM, said.append))
    train(recipe, tmp_path / "run", cache, report=Reporter(said.append, lambda *_: None, lambda _: None))
    assert [line for line in said if "longer" in line] == 2 * ["longer than 8 text tokens, so the end is cut off: 4 of 14 texts"]
    said.clear()
    wider = "model.condition.encoder.max_tokens=16"
    train(recipe, tmp_path / "wide", cache, wider, "schedule.steps=1", report=Reporter(said.append, lambda *_: None, lambda _: None))
    assert said and not [line for line in said if "longer" in line]


# ------------------------------------------------------------------ real processes

COMMAND = [sys.executable, "-m", "texttok_cli", "train"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(recipe_file: RecipeFile, tmp_path: Path, one_thread: None) -> None:
    """SIGKILL, mostly while a state is being written: every step saves one."""
    recipe = recipe_file(schedule={"steps": 40}, training={"save_every": 1, "log_every": 1})
    whole = train(recipe, tmp_path / "whole")
    command = [*COMMAND, str(recipe), "--out", str(tmp_path / "killed"), "--device", "cpu", "--offline", "--quiet"]
    for wanted in (3, 12):
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while not any(int(path.name[5:13]) >= wanted for path in (tmp_path / "killed" / "state").glob("step-????????")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.003)
        process.kill()
        process.wait()
        assert newest_state(tmp_path / "killed")  # whole, whatever the moment was
    assert_same_bits(train(recipe, tmp_path / "killed"), whole)
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(1, 41))


@pytest.mark.parametrize(
    "changes",
    [{}, {"training": {"accumulate": 2}, "model": {"bottleneck": {"kind": "vq", "codes": 16}}}],
    ids=["plain", "accumulating-vq"],
)
def test_two_processes_train_as_one(recipe_file: RecipeFile, tmp_path: Path, changes: dict) -> None:
    """DDP over gloo with the discriminator, R1 and LeCAM on: losses and gradients as in one process with the same global batch.

    Three steps: R1 is in two of them, LeCAM's means in the last two; a difference in rounding trebles with every further one. They
    start from a model whose codes are in use, as each process draws inputs of its own for dead ones.
    """
    recipe = recipe_file(schedule={"steps": 2}, **{**changes, "training": {**changes.get("training", {}), "weights": "fp32"}})
    train(recipe, tmp_path / "first")
    first = load_file(tmp_path / "first" / "model.safetensors")
    usage = first.get("bottleneck.usage", torch.ones(1))
    assert usage.min() * USAGE_DECAY**3 > DEAD_USAGE, usage
    start = {"start_from": str(tmp_path / "first" / "model.safetensors")}
    changes = {**changes, "training": {**changes.get("training", {}), **start}}
    recipe = recipe_file(schedule={"steps": 3}, objective={"adversarial": {"start": 0}}, **changes)
    train(recipe, tmp_path / "one")
    launched(recipe, tmp_path / "two")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "l2", "gan", "d_gan", "d_lecam", "grad_norm", "d_grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)


def test_a_run_starts_from_a_models_weights(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train(recipe_file(training={"weights": "fp32"}), tmp_path / "first")
    first = tmp_path / "first" / "model.safetensors"
    train(
        recipe_file(), tmp_path / "second", f"training.start_from={first}", "schedule={steps: 1, warmup: 1000}"
    )  # a thousandth of the rate
    a, b = load_file(first), load_file(tmp_path / "second" / "model.safetensors")
    torch.testing.assert_close(a["patch_tokens"], b["patch_tokens"], atol=1e-5, rtol=0)
    assert not torch.equal(a["patch_tokens"], b["patch_tokens"])
    said = read_tokenizer_info(tmp_path / "second" / "model.safetensors").header.training
    assert (said["steps"], said["images_seen"], said["started_from_sha256"]) == (1, 4, sha256_file(first))
    assert "started_from_sha256" not in read_tokenizer_info(first).header.training
    with pytest.raises(RecipeError, match=r"start_from: .*differs in num_tokens"):
        train(recipe_file(), tmp_path / "third", f"training.start_from={first}", "model.num_tokens=5")


@pytest.mark.parametrize("net", ["efficientnet-lite0", "stlpips-alex"])
def test_a_real_perceptual_network_teaches_a_detokenizer(net: str, recipe_file: RecipeFile, tmp_path: Path) -> None:
    if _in_package(ASSETS[net]) is None:
        pytest.skip(f"{ASSETS[net].package} is not installed")
    train(recipe_file(training={"weights": "fp32"}), tmp_path / "first")
    first = tmp_path / "first" / "model.safetensors"
    alone = (f"training.start_from={first}", "training.detokenizer_only=true", "training.weights=fp32", "training.log_every=1")
    train(recipe_file(), tmp_path / "second", *alone, "objective.l2=0", f"objective.perceptual={{net: {net}, weight: 0.5}}")
    losses = [line["perceptual"] for line in metrics(tmp_path / "second")]
    assert len(losses) > 1 and all(0 < loss < 14 for loss in losses)
    a, b = load_file(first), load_file(tmp_path / "second" / "model.safetensors")
    assert not torch.equal(a["to_pixels.weight"], b["to_pixels.weight"]) and torch.equal(a["patch_embed.weight"], b["patch_embed.weight"])


@pytest.mark.parametrize("bottleneck", ["continuous", "vq"])
def test_a_detokenizer_alone_leaves_latents_as_they_are(recipe_file: RecipeFile, tmp_path: Path, bottleneck: str) -> None:
    model = f"model.bottleneck.kind={bottleneck}"
    train(recipe_file(training={"weights": "fp32"}), tmp_path / "first", model)
    first = tmp_path / "first" / "model.safetensors"
    changes = (model, "training.detokenizer_only=true", f"training.start_from={first}", "training.weights=fp32")
    train(recipe_file(), tmp_path / "second", *changes)
    a, b = load_file(first), load_file(tmp_path / "second" / "model.safetensors")
    learned = {name for name in a if not torch.equal(a[name], b[name])}
    assert learned == {name for name in a if name.startswith(("latent_embed", "latent_pos", "patch_tokens", "detokenizer", "to_pixels"))}
    info = read_tokenizer_info(tmp_path / "second" / "model.safetensors")
    assert info.latents_made_by == (info.sha256, sha256_file(first))
    second = tmp_path / "second" / "model.safetensors"
    train(recipe_file(), tmp_path / "again", model, *changes[1:2], f"training.start_from={second}", "training.weights=fp32")
    again = read_tokenizer_info(tmp_path / "again" / "model.safetensors")
    assert again.latents_made_by == (again.sha256, info.sha256, sha256_file(first))
    with pytest.raises(RecipeError, match=r"training\.weights: bf16 would round the tokenizer of"):
        train(recipe_file(), tmp_path / "third", *changes[:-1], "training.weights=bf16")
    train(recipe_file(), tmp_path / "fourth", *changes, "schedule.steps=1", "training.save_every=1")
    (tmp_path / "fourth" / "model.safetensors").unlink()
    train(recipe_file(training={"weights": "fp32", "seed": 5}), tmp_path / "other", model)
    shutil.copy(tmp_path / "other" / "model.safetensors", first)
    with pytest.raises(TrainingError, match=r"is no longer the model that this run started from"):
        train(recipe_file(), tmp_path / "fourth", *changes, "schedule.steps=1", "training.save_every=1")
    with pytest.raises(RecipeError, match=r"name a trained one in training\.start_from"):
        train(recipe_file(), tmp_path / "third", "training.detokenizer_only=true")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compiled_and_resumed_is_the_same_within_rounding(recipe_file: RecipeFile, tmp_path: Path) -> None:
    recipe = recipe_file(training={"compile": True}, schedule={"steps": 4})
    train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted, match="step 2"):
        train(recipe, tmp_path / "parts", report=Stop(2, signal.SIGINT))
    train(recipe, tmp_path / "parts")
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        for key in ("loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)


def test_a_damaged_log_or_state_is_no_traceback(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save_state(3, {"x": torch.zeros(1)})
    (tmp_path / "state" / "step-copy").mkdir()
    good = '{"step": 3, "val_l2": 1}'
    run.metrics_path.write_bytes(b"\n".join([good.encode(), b"[]", b'{"step": null}', b"caf\xe9", b'{"step": 4', b""]))
    assert run.newest_step == 3 and run.validated(3) and not run.validated(4)
    run.rewind_log(3)
    assert run.metrics_path.read_text() == good + "\n"
    save_safetensors(tmp_path / "state" / "step-00000003" / "state.safetensors", {"x": torch.zeros(1)}, {"texttok_state": 1})
    with pytest.raises(CheckpointError, match="step-00000003: is damaged"):
        run.load_state([])
