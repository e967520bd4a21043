"""The generator's trainer: from tokens on disk to a generator file, exact resume, two processes, what a person gets wrong."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import Stop, assert_it_goes_on_to_the_bit, launched, metrics, newest_state, train
from safetensors.torch import load_file

from texttok_cli.checkpoint import caption_hash, load_generator_file
from texttok_cli.config.loader import load_recipe
from texttok_cli.data import Dataset, open_dataset
from texttok_cli.data.latents import LatentBatch, LatentStore
from texttok_cli.data.loader import SampleStream
from texttok_cli.data.texts import texts_for
from texttok_cli.diffusion import Sampling, build_process
from texttok_cli.errors import DataError, RecipeError, TextTokError
from texttok_cli.files import sha256_file
from texttok_cli.inference import encode_dataset, encode_folder, load_tokenizer
from texttok_cli.models.condition import Condition
from texttok_cli.token_folder import Statistics, TokenFolder
from texttok_cli.training import generator_session
from texttok_cli.training.conditioning import class_conditioner
from texttok_cli.training.engine import Engine
from texttok_cli.training.generator_task import GeneratorTask, with_dropped
from texttok_cli.training.loop import Interrupted

# As `accelerate launch --use_fsdp --fsdp_version 2` sets it for what it starts.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
RecipeFile = Callable[..., Path]
TEXT = {"source": "text", "dropout": 0.5, "null_tokens": 4, "encoder": {"kind": "hash", "dim": 16, "max_tokens": 24}}
TINY: dict[str, Any] = {
    "task": "generator",
    "reproduces": "a test",
    "model": {
        "latents": {"kind": "tokens", "num_tokens": 4, "latent_dim": 8},
        "backbone": {"depth": 2, "width": 32, "heads": 2},
        "condition": {"source": "class", "num_classes": 2, "dropout": 0.5},
        "process": {"kind": "ddpm"},
    },
    "optimizer": {"lr": 1e-3},
    "schedule": {"steps": 6, "warmup": 2},
    "training": {"batch_size": 4, "precision": "fp32", "ema": 0.9, "log_every": 1, "save_every": 2, "val_every": 100, "grid_images": 2},
}


@pytest.fixture
def recipe_file(tmp_path: Path, store: Path, models: Path) -> RecipeFile:
    """Writes the tiny recipe with some sections' keys changed; returns its path."""

    def write(**changes: dict[str, Any]) -> Path:
        recipe = {**TINY, "data": {"train": [str(store)], "tokenizer": str(models / "text.safetensors")}}
        recipe = {section: {**value, **changes.get(section, {})} if isinstance(value, dict) else value for section, value in recipe.items()}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"precision": "bf16"}, "optimizer": {"kind": "muon", "lr": 1e-3}},
        {"model": {"condition": TEXT}, "training": {"accumulate": 2, "checkpointing": True}},
        {"model": {"process": {"kind": "flow"}}},
    ],
    ids=["class", "bf16-muon", "text", "flow"],
)
def test_three_steps_and_three_more_are_six_to_the_bit(recipe_file: RecipeFile, tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {section: {**TINY[section], **value} for section, value in changes.items()}
    assert_it_goes_on_to_the_bit(recipe_file(**changes), tmp_path)


def test_a_run_leaves_a_generator_that_knows_what_it_was_trained_on(
    recipe_file: RecipeFile, tmp_path: Path, store: Path, models: Path
) -> None:
    found = f"{str(store)[:-1]}[{str(store)[-1]}]"  # a pattern that only the store fits
    recipe = recipe_file(data={"train": found, "val": [str(store)]}, training={**TINY["training"], "val_every": 3, "val_latents": 10})
    state = train(recipe, tmp_path / "run")
    dit, info = load_generator_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(value, state[f"ema.{name}"]) for name, value in dit.named_parameters())
    assert not torch.equal(state["ema.embed.weight"], state["model.embed.weight"])
    header = info.header
    assert (header.tokenizer_name, header.tokenizer_sha256) == ("text", sha256_file(models / "text.safetensors"))
    assert (header.classes, header.class_counts) == (["even", "odd"], [7, 7])
    assert header.training["images_seen"] == 24
    latents = LatentStore.open([store], made_by=[header.tokenizer_sha256])
    assert info.train_captions.tolist() == sorted({caption_hash(str(text)) for text in latents.captions})
    flat = latents.z.double().flatten(0, 1)
    torch.testing.assert_close(dit.latent_mean.double(), flat.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dit.latent_std.double(), flat.std(0, correction=0), rtol=1e-5, atol=1e-6)
    assert [line["step"] for line in metrics(tmp_path / "run", "val_mse")] == [3, 6]
    assert {"val_vlb", "val_mse"} <= metrics(tmp_path / "run", "val_mse")[0].keys()
    with Image.open(tmp_path / "run" / "grids" / "step-00000006.png") as grid:
        assert grid.size == (2 * 32, 2 * 32)


def test_the_loss_falls(recipe_file: RecipeFile, tmp_path: Path, store: Path) -> None:
    recipe = recipe_file(
        data={"val": [str(store)]},
        training={**TINY["training"], "batch_size": 28, "grid_images": 0, "ema": 0.5, "val_every": 1000, "save_every": 1000},
        schedule={"steps": 150, "warmup": 0},
        optimizer={"kind": "muon", "lr": 3e-3},
    )
    train(recipe, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert lines[0]["mse"] == pytest.approx(1, abs=0.2)  # a DiT begins with zeros: the noise's own variance
    assert metrics(tmp_path / "run", "val_mse")[-1]["val_mse"] < 0.75


def test_what_is_dropped_is_a_function_of_the_step_and_as_much_as_asked(recipe_file: RecipeFile, tmp_path: Path, store: Path) -> None:
    recipe = load_recipe(str(recipe_file()), ["model.condition.dropout=0.25", "training.batch_size=8192"])
    latents = LatentStore.open([store], made_by=[sha256_file(Path(recipe.data.tokenizer))])
    task = GeneratorTask(recipe, Engine(recipe.training, out=tmp_path, device="cpu"), lambda indices: {}, latents.statistics)
    x0 = torch.zeros(8192, 4, 8)
    first, again, other = task._draw(x0, 5), task._draw(x0, 5), task._draw(x0, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert first[2].double().mean() == pytest.approx(0.25, abs=0.02)
    ids = with_dropped({"class_ids": torch.tensor([0, 1, 1])}, torch.tensor([True, False, True]), recipe.model)["class_ids"]
    assert ids.tolist() == [2, 1, 2]


def test_the_step_is_the_loss_of_the_process_on_standardised_latents(recipe_file: RecipeFile, tmp_path: Path, store: Path) -> None:
    """Against the formula written out: MSE of eps on x_t of the standardised latents, for one batch and no dropout."""
    recipe = load_recipe(str(recipe_file()), ["model.condition.dropout=0", "model.process.learned_sigma=false"])
    latents = LatentStore.open([store], made_by=[sha256_file(Path(recipe.data.tokenizer))])
    ids = torch.tensor([0, 1, 1, 0])
    task = GeneratorTask(recipe, Engine(recipe.training, out=tmp_path, device="cpu"), lambda i: {"class_ids": ids}, latents.statistics)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    z = latents.z[:4].float()
    x0 = (z - torch.tensor(latents.statistics.mean)) / torch.tensor(latents.statistics.std)
    t, noise, _ = task._draw(x0, 0)
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].float().view(-1, 1, 1)
    expected = (task.model(bars.sqrt() * x0 + (1 - bars).sqrt() * noise, t.float(), ids) - noise).square().mean()
    values = task.step(LatentBatch(z, torch.arange(4)), 0)
    assert float(values["loss"]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_channel_that_never_varies_is_only_centred(recipe_file: RecipeFile, tmp_path: Path) -> None:
    z = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
    z[..., 3] = 0.25
    recipe, condition = load_recipe(str(recipe_file())), class_conditioner(torch.tensor([0, 1, 1, 0]))
    task = GeneratorTask(recipe, Engine(recipe.training, out=tmp_path, device="cpu"), condition, Statistics.of(z))
    assert not task.model.standardize(z)[..., 3].any()
    assert task.step(LatentBatch(z, torch.arange(4)), 0)["loss"].isfinite()
    assert torch.equal(task.model.destandardize(torch.zeros(4, 4, 8))[..., 3], z[..., 3])


@pytest.fixture
def make_task(recipe_file: RecipeFile, tmp_path: Path, store: Path) -> Callable[..., Any]:
    """A task whose weights are away from their initial zeros, what gives conditions by index, and the latents."""

    def make(condition: dict[str, Any], *overrides: str) -> tuple[GeneratorTask, Callable[..., dict[str, Any]], LatentStore]:
        recipe = load_recipe(str(recipe_file(model={**TINY["model"], "condition": condition})), overrides)
        latents = LatentStore.open([store], made_by=[sha256_file(Path(recipe.data.tokenizer))])
        generator = torch.Generator().manual_seed(1)
        ids, states = torch.arange(len(latents)) % 2, torch.randn(len(latents), 6, 16, generator=generator)

        def known(indices: Sequence[int]) -> dict[str, Any]:
            chosen = list(indices)
            return {"cond": Condition(states[chosen])} if condition["source"] == "text" else {"class_ids": ids[chosen]}

        task = GeneratorTask(recipe, Engine(recipe.training, out=tmp_path, device="cpu"), known, latents.statistics)
        with torch.no_grad():
            for parameter in task.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return task, known, latents

    return make


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("condition", [TINY["model"]["condition"], TEXT], ids=["class", "text"])
def test_a_step_has_the_whole_batchs_gradient_in_any_number_of_parts(make_task: Callable[..., Any], condition: dict, parts: int) -> None:
    """Draws of (seed, step), each example's own condition, all losses, one clipping; then the average moves a tenth of the way."""
    task, known, latents = make_task(condition, "training.seed=7", f"training.accumulate={parts}", "optimizer.grad_clip=0.01")
    indices = torch.tensor([5, 2, 8, 3])
    z, model = latents.z[indices].float(), deepcopy(task.model)
    generator = torch.Generator().manual_seed(7 * 1_000_003 + 5)
    t = torch.randint(1000, (4,), generator=generator)
    noise, drop = torch.randn(4, 4, 8, generator=generator), torch.rand(4, generator=generator) < 0.5
    assert 0 < drop.sum() < 4
    given = known(indices.tolist())
    given = {**given, "drop": drop} if "cond" in given else {"class_ids": torch.where(drop, 2, given["class_ids"])}
    x0 = (z - torch.tensor(latents.statistics.mean)) / torch.tensor(latents.statistics.std)
    losses = build_process(task.recipe.model.process).training_loss(lambda x, time: model(x, time, **given), x0, t, noise)
    loss = losses["mse"].mean() + losses["vlb"].mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    before = {name: value.clone() for name, value in task.ema.items()}
    values = task.step(LatentBatch(z, indices), 5)
    assert float(values["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert float(values["mse"]) == pytest.approx(float(losses["mse"].mean().detach()), rel=1e-4)
    assert float(values["grad_norm"]) == pytest.approx(float(norm), rel=1e-3) and norm > 0.01
    variance, expected = (
        task.model.to_output.weight.grad[8:],
        gradients["to_output.weight"][8:] * 0.01 / norm,
    )  # far smaller than the others
    torch.testing.assert_close(variance / expected.norm(), expected / expected.norm(), rtol=1e-2, atol=1e-3)
    for name, parameter in task.model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name] * 0.01 / norm, rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(task.ema[name], 0.9 * before[name] + 0.1 * parameter.detach(), rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_moves_neither_weights_nor_average(make_task: Callable[..., Any]) -> None:
    task, _, latents = make_task(TINY["model"]["condition"])
    before = {name: value.clone() for name, value in task.state().items() if not name.startswith("guard.")}
    values = task.step(LatentBatch(torch.full_like(latents.z[:4].float(), torch.nan), torch.arange(4)), 0)
    assert int(values["skipped_steps"]) == 1
    assert all(torch.equal(task.state()[name], value) for name, value in before.items())


def test_validation_is_the_mean_over_images_at_the_same_times_and_noise(make_task: Callable[..., Any]) -> None:
    task, known, latents = make_task(TINY["model"]["condition"])
    batches = [LatentBatch(latents.z[i].float(), i) for i in (torch.tensor([0, 3, 6]), torch.tensor([1]))]
    model, generator, expected = task.averaged(), torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for batch in batches:
            x0 = (batch.z - torch.tensor(latents.statistics.mean)) / torch.tensor(latents.statistics.std)
            t, given = torch.randint(1000, (len(x0),), generator=generator), known(batch.indices.tolist())
            noise, process = torch.randn(x0.shape, generator=generator), build_process(task.recipe.model.process)
            expected.append(process.training_loss(lambda x, time, given=given: model(x, time, **given), x0, t, noise))
    for _ in range(2):
        found = task.validate(model, known, batches)
        assert found.keys() == {"val_mse", "val_vlb"}
        for name in ("mse", "vlb"):
            assert found[f"val_{name}"] == pytest.approx(float(torch.cat([losses[name] for losses in expected]).mean()), rel=1e-4)


def test_weights_begin_with_the_seed_and_the_average_with_them(make_task: Callable[..., Any]) -> None:
    tasks = [make_task(TINY["model"]["condition"], f"training.seed={seed}")[0] for seed in (1, 1, 2)]
    begun = [task.ema["embed.weight"] for task in tasks]
    assert torch.equal(begun[0], begun[1]) and not torch.equal(begun[0], begun[2])


@pytest.mark.parametrize("condition", [{"source": "class", "num_classes": 2, "dropout": 1.0}, {**TEXT, "dropout": 1.0}])
def test_what_is_dropped_trains_the_null_condition_alone(
    recipe_file: RecipeFile, tmp_path: Path, store: Path, condition: dict[str, Any]
) -> None:
    recipe = load_recipe(str(recipe_file(model={"condition": condition})))
    latents = LatentStore.open([store], made_by=[sha256_file(Path(recipe.data.tokenizer))])
    known: dict[str, Any] = {"class_ids": torch.tensor([0, 1, 1, 0])}
    if condition["source"] == "text":
        known = {"cond": Condition(torch.randn(4, 6, 16))}
    task = GeneratorTask(recipe, Engine(recipe.training, out=tmp_path, device="cpu"), lambda i: known, latents.statistics)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    task.step(LatentBatch(latents.z[:4].float(), torch.arange(4)), 0)
    if condition["source"] == "text":
        assert task.model.null_tokens.grad.abs().sum() > 0 and not task.model.project.proj.weight.grad.any()
    else:
        assert task.model.classes.weight.grad.abs().sum(dim=1).gt(0).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("data.train=[]", RecipeError, "data.train is empty"),
        ("data.tokenizer=null", RecipeError, "data.tokenizer is empty"),
        ("data.tokenizer={models}/other.safetensors", DataError, "holds tokens of text .* not of the tokenizer that data.tokenizer names"),
        ("data.train=[{models}]", TextTokError, r"no index\.json"),
        ("model.latents.num_tokens=5", RecipeError, "model.latents are 5 tokens of 8 channels, those of text 4 of 8"),
        ("model.latents={kind: grid, size: 4, channels: 8}", RecipeError, "trains generators on tokens"),
        ("model.condition.num_classes=3", RecipeError, "num_classes is 3, the training images have 2 classes"),
        ("model.condition={source: text, encoder: {kind: hash, dim: 8}}", RecipeError, "one embedding serves the generator and"),
        ("training.start_from={models}/text.safetensors", TextTokError, "is a tokenizer, but a generator is needed"),
    ],
)
def test_mistakes_are_one_line(
    recipe_file: RecipeFile, tmp_path: Path, models: Path, override: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        train(recipe_file(), tmp_path / "run", override.replace("{models}", str(models)))
    assert "\n" not in str(raised.value)


def test_a_run_starts_from_a_generators_weights(recipe_file: RecipeFile, tmp_path: Path) -> None:
    train(recipe_file(), tmp_path / "first")
    first = tmp_path / "first" / "model.safetensors"
    train(recipe_file(), tmp_path / "second", f"training.start_from={first}", "schedule={steps: 1, warmup: 100000}")
    a, b = load_file(first), load_file(tmp_path / "second" / "model.safetensors")
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)  # all of them
    assert load_generator_file(tmp_path / "second" / "model.safetensors")[1].header.training["started_from_sha256"] == sha256_file(first)


def test_classes_that_a_start_knows_keep_their_embeddings(recipe_file: RecipeFile, tmp_path: Path, pictures: Path, models: Path) -> None:
    train(recipe_file(), tmp_path / "first")
    for path in pictures.rglob("*.png"):  # of the classes even and odd
        kind = "odd" if path.parent.name == "odd" else "big" if int(path.stem) > 6 else "zoo"
        target = tmp_path / "pictures" / kind / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        shutil.copy(path.with_suffix(".txt"), target.with_suffix(".txt"))
    tokenizer, dataset = load_tokenizer(models / "text.safetensors", device="cpu"), open_dataset(tmp_path / "pictures")
    assert tokenizer.text_condition is not None
    encode_folder(tokenizer, dataset, texts_for(dataset.items, tokenizer.text_condition), tmp_path / "latents")
    data = {"train": [str(tmp_path / "latents")], "tokenizer": str(models / "text.safetensors")}
    model = {**TINY["model"], "condition": {**TINY["model"]["condition"], "num_classes": 3}}
    recipe = recipe_file(data=data, model=model, schedule={"steps": 1, "warmup": 100000})
    said: list[str] = []
    start = f"training.start_from={tmp_path / 'first/model.safetensors'}"
    train(recipe, tmp_path / "second", start, report=Stop(100, signal.SIGTERM, said.append))
    assert any(line.startswith("1 of 3 classes are among those of") for line in said)
    (a, first), (b, second) = (load_generator_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert (first.header.classes, second.header.classes) == (["even", "odd"], ["big", "odd", "zoo"])
    assert a.classes is not None and b.classes is not None
    torch.testing.assert_close(b.classes.weight, a.classes.weight[[2, 1, 2, 2]], atol=1e-6, rtol=0)  # the last is without a class
    torch.testing.assert_close(b.embed.weight, a.embed.weight, atol=1e-6, rtol=0)


def test_how_a_model_is_sampled_is_in_its_file_and_no_part_of_its_training(recipe_file: RecipeFile, tmp_path: Path) -> None:
    out = tmp_path / "first"
    with pytest.raises(Interrupted):
        train(recipe_file(), out, report=Stop(2, signal.SIGTERM))
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written["model"].pop("sampling") == {"sampler": None, "steps": 50, "cfg": "1.5"}
    (out / "recipe.yaml").write_text(yaml.safe_dump(written))  # as one of before there was the section: the run goes on
    train(recipe_file(), out, "model.sampling={steps: 250, cfg: 1}")
    sampling = load_generator_file(out / "model.safetensors")[0].cfg.sampling
    assert (sampling.sampler, sampling.steps, sampling.cfg) == (None, 250, "1")
    start = f"training.start_from={out / 'model.safetensors'}"
    train(recipe_file(), tmp_path / "second", start)
    with pytest.raises(RecipeError, match=r"differs in model\.sampling\.steps\)"):
        train(recipe_file(), tmp_path / "second", start, "model.sampling.steps=2")


def test_a_twin_without_text_takes_prompts_from_a_list(
    encoded: Callable[..., Path], recipe_file: RecipeFile, tmp_path: Path, models: Path
) -> None:
    plain = encoded("plain")
    data = {"train": [str(plain)], "tokenizer": str(models / "plain.safetensors")}
    recipe = recipe_file(model={**TINY["model"], "condition": TEXT}, data=data, schedule={"steps": 1})
    with pytest.raises(DataError, match=r"its tokens have no caption"):
        train(recipe, tmp_path / "without")
    captions = tmp_path / "captions.jsonl"
    ids = LatentStore.open([plain], made_by=[sha256_file(models / "plain.safetensors")]).ids
    captions.write_text("".join(json.dumps({"id": image_id, "caption": f"about {image_id}"}) + "\n" for image_id in ids))
    train(recipe, tmp_path / "with", f"data.captions={captions}")
    _, info = load_generator_file(tmp_path / "with" / "model.safetensors")
    assert info.train_captions.tolist() == sorted(caption_hash(f"about {image_id}") for image_id in ids)


# ------------------------------------------------------------------ which images, under which conditions


@pytest.fixture
def store_of(tmp_path: Path, models: Path, pictures: Path) -> Callable[..., Path]:
    """Folder of the tokens of some of the pictures, of which the first seven are `even` and the others `odd`, with other captions."""

    def encode(name: str, chosen: Sequence[int]) -> Path:
        tokenizer = load_tokenizer(models / "text.safetensors", device="cpu")
        items = open_dataset([pictures]).items
        dataset, texts = Dataset([items[i] for i in chosen]), [f"{name} {i}" for i in chosen]
        folder = TokenFolder(tmp_path / name, model_name="text", model_sha256=tokenizer.info.sha256, dtype="fp16", shard_size=100)
        for _, tokens in encode_dataset(tokenizer, dataset, texts, batch_size=100, on_error=pytest.fail):
            folder.add(tokens)
        folder.finish()
        return tmp_path / name

    return encode


def test_validation_is_of_images_spread_over_their_own_set_under_their_own_conditions(
    recipe_file: RecipeFile, store_of: Callable[..., Path], tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = store_of("val", [0, 1, 7, 2, 8, 9])
    seen: list[tuple[list[int], torch.Tensor, list[int]]] = []

    def validate(task: GeneratorTask, dit: Any, condition: Any, batches: Any) -> dict[str, float]:
        seen.extend((batch.indices.tolist(), batch.z, condition(batch.indices.tolist())["class_ids"].tolist()) for batch in batches)
        return {"val_mse": 0.0}

    monkeypatch.setattr(GeneratorTask, "validate", validate)
    training = {**TINY["training"], "val_latents": 3, "grid_images": 0}
    train(recipe_file(data={"val": [str(validation)]}, training=training, schedule={"steps": 1}), tmp_path / "run")
    z = LatentStore.open([validation], made_by=[sha256_file(models / "text.safetensors")]).z.float()
    [(indices, latents, classes)] = seen
    assert indices == [0, 2, 4] and torch.equal(latents, z[[0, 2, 4]]) and classes == [0, 1, 1]


def test_a_signal_ends_a_validation_with_its_batch(
    recipe_file: RecipeFile, store_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def validate(task: GeneratorTask, dit: Any, condition: Any, batches: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        seen.extend(len(batch.z) for batch in batches)
        return {"val_mse": 0.0}

    monkeypatch.setattr(GeneratorTask, "validate", validate)
    data, training = {"val": [str(store_of("val", range(6)))]}, {**TINY["training"], "grid_images": 0}
    with pytest.raises(Interrupted, match="stopped at step 1"):
        train(recipe_file(data=data, training=training, schedule={"steps": 1}), tmp_path / "run")
    assert seen == []


def test_the_file_knows_captions_class_counts_and_statistics_of_the_training_images_alone(
    recipe_file: RecipeFile, store_of: Callable[..., Path], tmp_path: Path, models: Path
) -> None:
    data = {"train": [str(store_of("train", range(9)))], "val": [str(store_of("val", range(5, 14)))]}
    training = {**TINY["training"], "grid_images": 0}
    latents = LatentStore.open([Path(data["train"][0])], made_by=[sha256_file(models / "text.safetensors")]).z.double().flatten(0, 1)
    for name, condition in (("class", TINY["model"]["condition"]), ("text", TEXT)):
        recipe = recipe_file(data=data, training=training, schedule={"steps": 1}, model={**TINY["model"], "condition": condition})
        train(recipe, tmp_path / name)
        dit, info = load_generator_file(tmp_path / name / "model.safetensors")
        torch.testing.assert_close(dit.latent_mean.double(), latents.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dit.latent_std.double(), latents.std(0, correction=0), rtol=1e-5, atol=1e-6)
        assert info.train_captions.tolist() == sorted(caption_hash(f"train {i}") for i in range(9))
        counts = (["even", "odd"], [7, 2]) if name == "class" else (None, None)
        assert (info.header.classes, info.header.class_counts) == counts


def test_one_class_needs_no_names(recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in no folder of a class: an unconditional generator."""
    read = LatentStore.open
    nameless = staticmethod(lambda *of, **how: replace(found := read(*of, **how), class_names=[None] * len(found)))
    monkeypatch.setattr(LatentStore, "open", nameless)
    train(recipe_file(schedule={"steps": 1}), tmp_path / "run", "model.condition={num_classes: 1, dropout: 0}")
    header = load_generator_file(tmp_path / "run" / "model.safetensors")[1].header
    assert (header.classes, header.class_counts) == (["image"], [14])
    monkeypatch.setattr(
        LatentStore, "open", staticmethod(lambda *of, **how: replace(found := read(*of, **how), class_names=["cat"] * len(found)))
    )
    train(recipe_file(schedule={"steps": 1}), tmp_path / "named", "model.condition={num_classes: 1, dropout: 0}")
    assert load_generator_file(tmp_path / "named" / "model.safetensors")[1].header.classes == ["cat"]
    monkeypatch.setattr(LatentStore, "open", nameless)
    with pytest.raises(RecipeError, match=r"the training images have no classes: .* a generator with num_classes 1 needs none"):
        train(recipe_file(), tmp_path / "other")


def test_the_file_s_weights_are_as_precise_as_asked(recipe_file: RecipeFile, tmp_path: Path) -> None:
    state = train(recipe_file(), tmp_path / "run", "training.weights=bf16", "schedule.steps=1")
    stored = load_file(tmp_path / "run" / "model.safetensors")["embed.weight"]
    assert stored.dtype == torch.bfloat16 and torch.equal(stored, state["ema.embed.weight"].bfloat16())


def test_batches_are_drawn_by_the_recipe_s_seed(recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    honest = GeneratorTask.step
    monkeypatch.setattr(GeneratorTask, "step", lambda task, batch, n: drawn.extend(batch.indices.tolist()) or honest(task, batch, n))
    for seed in (5, 6):
        drawn.clear()
        train(recipe_file(), tmp_path / str(seed), f"training.seed={seed}", "schedule.steps=3")
        assert drawn == SampleStream(28, seed).indices(0, 12).tolist()


@pytest.mark.parametrize(("dropout", "cfg"), [(0.5, "1.5"), (0.0, "1")])
def test_a_preview_has_the_conditions_of_its_images_and_guidance_if_there_can_be_some(
    dropout: float,
    cfg: str,
    recipe_file: RecipeFile,
    store_of: Callable[..., Path],
    tmp_path: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Sampling, list[int], list[int]]] = []

    def sample(dit: Any, how: Sampling, *, seeds: Sequence[int], class_ids: torch.Tensor, precision: str) -> torch.Tensor:
        asked.append((how, list(seeds), class_ids.tolist()))
        return torch.zeros(len(seeds), 4, 8)

    monkeypatch.setattr(generator_session, "sample", sample)
    validation = store_of("val", [8, 1, 9, 2])  # of which the first and the third are drawn
    recipe = recipe_file(
        data={"val": [str(validation)]},
        model={**TINY["model"], "condition": {**TINY["model"]["condition"], "dropout": dropout}},
        training={**TINY["training"], "val_every": 1},
        schedule={"steps": 2},
    )
    train(recipe, tmp_path / "run")
    assert len(asked) == 2 and asked[0] == asked[1]
    how, seeds, classes = asked[0]
    assert (how.steps, str(how.guidance), seeds, classes) == (50, cfg, [0, 1], [1, 1])
    tokenizer = load_tokenizer(models / "text.safetensors", device="cpu")
    z = LatentStore.open([validation], made_by=[tokenizer.info.sha256]).z.float()
    rows = [tokenizer.decode(latents, ["val 8", "val 9"]) for latents in (z[[0, 2]], torch.zeros(2, 4, 8))]
    with Image.open(tmp_path / "run" / "grids" / "step-00000002.png") as grid:
        drawn = torch.from_numpy(np.array(grid)).permute(2, 0, 1)
    assert (drawn.int() - torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).int()).abs().max() <= 1


# ------------------------------------------------------------------ real processes


def assert_trained_alike(one: Path, two: Path, steps: int) -> None:
    lines = metrics(one), metrics(two)
    assert len(lines[0]) == len(lines[1]) == steps
    for a, b in zip(*lines, strict=True):
        for key in ("loss", "mse", "vlb", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one(recipe_file: RecipeFile, tmp_path: Path) -> None:
    recipe = recipe_file(training={**TINY["training"], "accumulate": 2})
    train(recipe, tmp_path / "one")
    launched(recipe, tmp_path / "two")
    assert_trained_alike(tmp_path / "one", tmp_path / "two", steps=6)


def test_two_processes_with_split_weights_train_as_one(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """FSDP2 over gloo, from a state that one process saved; what it leaves is whole, as if one had gone on."""
    recipe = recipe_file(training={**TINY["training"], "accumulate": 2}, optimizer={"lr": 1e-3, "grad_clip": 0.5})
    whole = train(recipe, tmp_path / "one")
    with pytest.raises(Interrupted, match="step 2"):
        train(recipe, tmp_path / "two", report=Stop(2, signal.SIGTERM))
    said = launched(recipe, tmp_path / "two", **FSDP2)
    parts = re.search(r"weights split over 2 processes \(FSDP2\), (\d+) parts", said)
    assert parts is not None and int(parts[1]) >= 3  # its two blocks, and the rest, of which Accelerate may take the end apart
    assert_trained_alike(tmp_path / "one", tmp_path / "two", steps=6)
    state = newest_state(tmp_path / "two")
    assert state.keys() == whole.keys() and any(key.startswith("optimizer.0.") for key in state)
    for key in whole:
        torch.testing.assert_close(state[key], whole[key], rtol=1e-4, atol=1e-5)


def test_split_weights_compute_in_bf16_as_asked(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """Times and latents stay fp32: rounded to bf16 they would change the losses by far more than the matmuls do."""
    recipe = recipe_file(training={**TINY["training"], "precision": "bf16"})
    train(recipe, tmp_path / "one")
    launched(recipe, tmp_path / "two", **FSDP2)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert b["mse"] == pytest.approx(a["mse"], rel=1e-3), a["step"]
    assert newest_state(tmp_path / "two")["model.embed.weight"].dtype == torch.float32
