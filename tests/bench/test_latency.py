"""Rows of the latency table on tiny networks: what is run, what is multiplied, what does not fit, and the sums of the paper's columns."""

import gc
import weakref
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import nn

from texttok_cli.bench import generate, latency, networks, task, training
from texttok_cli.bench.latency import PARTS, Part, sums
from texttok_cli.bench.networks import (
    DoesNotFit,
    Where,
    Workload,
    check_fits,
    grid_generator_config,
    materialize,
    rows_of,
    sd_vae_work,
    tokenizer_config,
    weights_bytes,
)
from texttok_cli.bench.plain import plain_reconstruct
from texttok_cli.bench.results import Row, Target
from texttok_cli.bench.task import Task
from texttok_cli.bench.timing import Timer, spread_of
from texttok_cli.commands.bench import PART_NAMES
from texttok_cli.config.loader import load_recipe
from texttok_cli.config.schema import GeneratorConfig, TokenizerConfig
from texttok_cli.diffusion import Sampling, parse_cfg
from texttok_cli.models.condition import Condition
from texttok_cli.models.dit import DiT
from texttok_cli.models.tokenizer import TexTok

CPU = Where(torch.device("cpu"), "fp32")
TINY = {"depth": 2, "width": 32, "heads": 2}


def make_task(**changes: Any) -> Task:
    whole = {
        "where": CPU,
        "timer": Timer(warm_up=0, repeats=1),
        "image_sizes": [256],
        "tokens": [4],
        "batches": [1, 2],
        "generator": "L",
        "sampling": Sampling("ddim", 5, parse_cfg("1.5")),
    }
    return Task(**{**whole, **changes})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of the paper's kinds that are small."""

    def tokenizer(kind: str, tokens: int, image_size: int) -> TokenizerConfig:
        condition = {"source": "caption", "encoder": {"kind": "hash", "dim": 16}} if kind == "TexTok" else {"source": "none"}
        return TokenizerConfig.model_validate(
            {"image_size": image_size, "patch_size": 64, "num_tokens": tokens, "backbone": TINY, "condition": condition}
        )

    def generator(size: str, tokens: int) -> GeneratorConfig:
        return GeneratorConfig.model_validate({"latents": {"kind": "tokens", "num_tokens": tokens}, "backbone": TINY})

    def grid(size: str, image_size: int) -> GeneratorConfig:
        return GeneratorConfig.model_validate({"latents": {"kind": "grid", "size": 8}, "backbone": TINY})

    monkeypatch.setattr(latency, "tokenizer_config", tokenizer)
    monkeypatch.setattr(generate, "generator_config", generator)
    monkeypatch.setattr(generate, "grid_generator_config", grid)


def test_parts_are_the_same_everywhere() -> None:
    assert list(PARTS) == list(get_args(Part)) == list(PART_NAMES)


@pytest.mark.usefixtures("tiny")
def test_each_tokenizer_is_timed_in_each_batch() -> None:
    rows = list(latency._texttok(make_task(), "encode", "TexTok", 4, 256)) + list(
        latency._texttok(make_task(), "decode", "Baseline", 4, 256)
    )
    assert [(row.part, row.system, row.batch) for row in rows] == [
        ("encode", "TexTok-4", 1),
        ("encode", "TexTok-4", 2),
        ("decode", "Baseline-4", 1),
        ("decode", "Baseline-4", 2),
    ]
    assert all(row.seconds is not None and row.seconds.median > 0 and row.times == 1 for row in rows)


@pytest.mark.usefixtures("tiny")
def test_a_few_steps_and_a_part_of_the_batch_stand_for_all_and_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "MAX_CPU_ROWS", 16)  # two images of 2 x 4 tokens
    ran: list[tuple[int, int]] = []
    real = generate.sample

    def counted(dit: DiT, how: Sampling, **options: Any) -> torch.Tensor:
        ran.append((how.steps, len(options["seeds"])))
        return real(dit, how, **options)

    monkeypatch.setattr(generate, "sample", counted)
    once = Timer(warm_up=0, repeats=1)
    monkeypatch.setattr(once, "once", lambda work: (work(), 1.0)[1])
    tokens, grid = list(generate.generation_rows(make_task(sampling=Sampling("ddim", 50, parse_cfg("1.5")), batches=[8], timer=once)))
    assert ran == [(2, 2), (2, 1)]
    assert tokens.seconds is not None and tokens.seconds.median == tokens.times == 25 * 4
    assert "2 steps run" in tokens.note and "2 of 8 images run, multiplied" in tokens.note
    assert (tokens.system, tokens.tokens, tokens.steps) == ("TexTok-4 + DiT-L", 4, 50)
    assert (grid.system, grid.times) == ("SD-VAE-f8 + DiT-L/2", 25 * 8)


@pytest.mark.usefixtures("tiny")
def test_few_steps_stand_for_all_by_the_passes_that_guidance_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 steps the last, at t = 0, is in no interval from 0.2 on; of 50 steps 10 are not."""
    once = Timer(warm_up=0, repeats=1)
    monkeypatch.setattr(once, "once", lambda work: (work(), 1.0)[1])
    how = Sampling("ddim", 50, parse_cfg("2:interval=0.2,1"))
    tokens, _ = generate.generation_rows(make_task(sampling=how, batches=[2], timer=once))
    assert tokens.times == (40 * 2 + 10) / (2 + 1)


@pytest.mark.usefixtures("tiny")
def test_what_does_not_fit_is_said_and_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "free_memory", lambda device: int(1e9))  # all of it in reserve
    monkeypatch.setattr(latency, "materialize", lambda *_: pytest.fail("allocated"))
    rows = list(latency._texttok(make_task(), "encode", "Baseline", 4, 256))
    assert [row.seconds for row in rows] == [None, None]
    assert all("1.0 GB are free" in row.skipped for row in rows)
    with pytest.raises(DoesNotFit, match=r"needs about 3\.0 GB"):
        check_fits(3e9, CPU.device)


def test_training_of_the_paper_s_models_asks_for_its_memory_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "free_memory", lambda device: int(8e9))
    rows = list(PARTS["train"](make_task(tokens=[32], batches=[1])))
    assert [row.system for row in rows] == ["tokenizer/texttok-32-256", "tokenizer/baseline-32-256", "generator/dit-l-32-256"]
    assert all(row.seconds is None and (row.image_size, row.tokens, row.batch) == (256, 32, 1) for row in rows)
    # Six copies of 176 M and of 458 M parameters in fp32: 4.2 and 11.0 GB. 24 blocks keep 40 vectors of 768 for each of the tokenizer's
    # 1184 tokens: 3.5 GB.
    needed = [float(row.skipped.split()[2]) for row in rows]
    assert 7.5 < needed[0] < 8 and 11 < needed[2] < 12


def test_a_training_step_s_memory_is_free_before_the_next_one_s_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    built, make = [], training.training_step

    def step(*args: Any) -> Workload:
        work = make(*args)
        built.append(weakref.ref(work))
        return work

    def fits(needed: float, device: torch.device) -> None:
        gc.collect()
        assert not any(work() for work in built)

    row = Row(part="train", system="tiny/class-32-128", image_size=128, batch=1)
    monkeypatch.setattr(training, "recipes", lambda task: [(row, load_recipe(row.system))] * 2)
    monkeypatch.setattr(training, "training_step", step)
    monkeypatch.setattr(task, "check_fits", fits)
    rows = list(PARTS["train"](make_task(batches=[1, 2])))
    assert len(built) == 4 and all(row.seconds is not None for row in rows)


def measured(part: str, system: str, seconds: float, batch: int = 2, **changes: Any) -> Row:
    return Row(part=part, system=system, image_size=256, batch=batch, seconds=spread_of([seconds]), **changes)


def test_the_paper_s_columns_are_sums_of_their_parts() -> None:
    rows = [
        measured("text", "T5-XL", 1.0),
        measured("encode", "TexTok-32", 2.0),
        measured("encode", "Baseline-32", 2.5),
        measured("encode", "SD-VAE-f8", 8.0),
        measured("decode", "TexTok-32", 4.0, times=2.5),
        measured("decode", "Baseline-32", 3.0),
        measured("decode", "TexTok-64", 4.0),
        measured("generate", "TexTok-32 + DiT-L", 10.0, steps=50, times=25),
        measured("generate", "TexTok-64 + DiT-L", 10.0, batch=1),  # its detokenizer was not timed in this batch
        Row(part="generate", system="SD-VAE-f8 + DiT-L/2", image_size=256, skipped="too large"),
    ]
    found = {(row.part, row.system): row for row in sums(rows)}
    totals = {name: row.seconds.median for name, row in found.items() if row.seconds is not None}
    assert totals == {
        ("tokenization", "TexTok-32"): 7.0,
        ("tokenization", "Baseline-32"): 5.5,
        ("generation", "TexTok-32 + DiT-L"): 15.0,
        ("generation", "Baseline-32 + DiT-L"): 13.0,
    }
    assert found["tokenization", "TexTok-32"].times == 2.5  # the largest of its parts
    row = found["generation", "TexTok-32 + DiT-L"]
    assert (row.note, row.times, row.steps, row.seconds_per_image) == ("sum of the medians of generate + decode + text", 25, 50, 7.5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_plain_model_is_the_model(qk_norm: bool) -> None:
    backbone = {**TINY, "qk_norm": qk_norm}
    cfg = {
        "image_size": 32,
        "patch_size": 8,
        "num_tokens": 4,
        "backbone": backbone,
        "condition": {"source": "caption", "encoder": {"kind": "hash", "dim": 16}},
    }
    model = materialize(lambda: TexTok(TokenizerConfig.model_validate(cfg)), CPU)
    cond = Condition(torch.randn(3, 6, 16), torch.arange(6) < torch.tensor([6, 1, 4])[:, None])
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected, _ = model(images, cond)
    torch.testing.assert_close(plain_reconstruct(model, images, cond), expected, atol=1e-5, rtol=1e-4)


def test_materialized_networks_are_random_and_real() -> None:
    network = materialize(lambda: nn.Sequential(nn.Linear(8, 600_000), nn.BatchNorm1d(4)), CPU)
    assert isinstance(network[0], nn.Linear) and isinstance(network[1], nn.BatchNorm1d)
    assert network[0].weight.dtype == torch.float32 and 0.01 < network[0].weight.std() < 0.03
    assert network[1].running_var is not None and network[1].running_var.dtype == torch.float32
    assert network[1].num_batches_tracked == 0
    assert not any(p.requires_grad for p in network.parameters())
    network = materialize(lambda: nn.Sequential(nn.Linear(8, 600_000)), CPU, "bf16")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = network(torch.eye(8))
    assert y.dtype == torch.bfloat16 and 0.01 < y.float().std() < 0.04


def test_the_subjects_are_the_paper_s() -> None:
    """Sec. 4.1 and Table 4e: 176 M parameters; patches of SD-VAE's map at 512 px: 1,024."""
    cfg = tokenizer_config("TexTok", 128, 256)
    assert weights_bytes(lambda: TexTok(cfg), 4) / 4 == pytest.approx(176e6, rel=0.005)
    assert rows_of(cfg) == 1024 + 128 + 128
    assert rows_of(tokenizer_config("Baseline", 32, 512)) == 1024 + 32
    assert grid_generator_config("XL", 512).latents.sequence_length == 1024


@pytest.mark.parametrize(("size", "billions"), [("XL", 1.22), ("XXL", 4.76)])
def test_t5_s_encoders_have_their_sizes(size: str, billions: float) -> None:
    from texttok_cli.text.t5 import untrained_t5

    build: Callable[[], nn.Module] = lambda: untrained_t5(size)  # noqa: E731
    assert weights_bytes(build, 1) / 1e9 == pytest.approx(billions, abs=0.005)


def test_sd_vae_has_its_size_and_shapes() -> None:
    from texttok_cli.baselines.sd_vae import untrained_sd_vae

    assert weights_bytes(untrained_sd_vae, 1) == pytest.approx(83.65e6, rel=0.001)  # 84 M, Table 2
    assert sd_vae_work("decode", 64, CPU)(1)().shape == (1, 3, 64, 64)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("tiny")
def test_each_half_is_timed_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("encode", "decode"):
        monkeypatch.setattr(TexTok, name, lambda *_, name=name: ran.append(name))
        list(latency._texttok(make_task(batches=[1]), name, "TexTok", 4, 256))
    assert ran == ["encode", "decode"]


@pytest.mark.usefixtures("tiny")
def test_a_guided_forward_has_every_sample_under_its_class_and_under_the_null_class() -> None:
    given: list[torch.Tensor] = []
    dit = generate.untrained_dit(generate.generator_config("L", 4), CPU)
    dit.forward = lambda x, t, ids: given.extend((x, ids))  # type: ignore[assignment, func-returns-value]
    generate.guided_forward(dit, 3, CPU)()
    assert len(given[0]) == 6 and given[1].tolist() == [0, 1, 2, 1000, 1000, 1000]


def test_a_part_of_a_training_batch_stands_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "MAX_CPU_ROWS", 2 * 224)
    once, ran = Timer(warm_up=0, repeats=1), []
    monkeypatch.setattr(once, "once", lambda work: 1.0)
    row = Row(part="train", system="tiny/texttok-32-128", image_size=128)  # 64 patches, 32 latents; 128 text tokens
    monkeypatch.setattr(training, "recipes", lambda task: [(row, load_recipe(row.system))])

    def step(recipe: Any, *_: object) -> None:
        ran.append(recipe.training.batch_size)

    monkeypatch.setattr(training, "training_step", step)
    [row] = PARTS["train"](make_task(batches=[8], timer=once))
    assert ran == [2] and row.seconds is not None
    assert (row.seconds.median, row.times, row.seconds_per_image) == (4.0, 4.0, 0.5)


def test_a_target_is_met_on_its_side_of_each_bound() -> None:
    cases = [
        (0.7, None, 0.7, True),
        (0.7, None, 0.6, False),
        (None, 10, 10, True),
        (None, 10, 11, False),
        (None, None, 1, None),
        (1, 2, None, None),
    ]
    for least, most, reached, met in cases:
        assert Target(name="x", least=least, most=most, reached=reached).met is met
