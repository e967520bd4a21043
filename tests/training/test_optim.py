"""Clipping of gradients against torch's, the rate by step, and which optimizer takes which parameter."""

import math

import pytest
import torch
from torch import nn

from texttok_cli.config.recipe import OptimizerConfig, ScheduleConfig
from texttok_cli.training.optim import build_optimizers, clip_gradients, gradient_norm, lr_scale, set_lr


def with_gradients() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 3))
    model[:2](torch.randn(4, 5)).square().sum().backward()  # the last has no gradients
    return model


@pytest.mark.parametrize("share", [None, 2.0, 0.25])
def test_gradients_are_clipped_as_torch_clips_them(share: float | None) -> None:
    ours, theirs, untouched = with_gradients(), with_gradients(), with_gradients()
    norm = gradient_norm(ours.parameters())
    limit = None if share is None else share * float(norm)

    clip_gradients(ours.parameters(), norm, limit)

    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), limit or float("inf")))
    for mine, other, before in zip(*(model[:2].parameters() for model in (ours, theirs, untouched)), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
        assert torch.equal(mine.grad, before.grad) == (share != 0.25)


def test_the_rate_rises_stays_and_falls_as_the_recipe_says() -> None:
    rise, stay = [0.25, 0.5, 0.75, 1.0], [1.0] * 4
    falls = {
        "linear": [1 - i / 12 for i in range(12)],
        "cosine": [math.cos(math.pi * i / 24) ** 2 for i in range(12)],  # half of 1 + cos is the square of the half angle's
    }
    for decay, fall in falls.items():
        schedule = ScheduleConfig(steps=20, warmup=4, decay=decay, decay_fraction=0.6)  # type: ignore[arg-type]
        assert [lr_scale(step, schedule) for step in range(20)] == pytest.approx(rise + stay + fall)
    whole = ScheduleConfig(steps=16, warmup=4)  # a decay of all steps begins once the rate has risen
    assert [lr_scale(step, whole) for step in range(16)] == pytest.approx(rise + falls["cosine"])
    assert [lr_scale(step, ScheduleConfig(steps=3, decay_fraction=0)) for step in range(3)] == [1.0] * 3


def test_the_matrices_are_muon_s_and_all_else_is_adamw_s_each_at_its_own_rate() -> None:
    model = with_gradients()
    matrices = [model[0].weight, model[1].weight]
    cfg = OptimizerConfig(kind="muon", lr=1e-3, betas=(0.5, 0.7), weight_decay=0.1, muon_lr=0.03, muon_momentum=0.8)
    muon, adamw = build_optimizers(list(model.parameters()), matrices, cfg)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    [first], [second] = muon.param_groups, adamw.param_groups
    assert [id(p) for p in first["params"]] == [id(p) for p in matrices]
    assert {id(p) for p in second["params"]} == {id(p) for p in model.parameters()} - {id(p) for p in matrices}
    assert (first["lr"], first["momentum"], first["weight_decay"]) == (0.03, 0.8, 0.1)
    assert (second["lr"], second["betas"], second["weight_decay"]) == (1e-3, (0.5, 0.7), 0.1)
    for scale in (0.5, 0.25):  # of the rate at the start, not of the last one
        set_lr([muon, adamw], scale)
        assert (first["lr"], second["lr"]) == (0.03 * scale, 1e-3 * scale)


@pytest.mark.parametrize(("kind", "expected"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw_take_all_parameters(kind: str, expected: type) -> None:
    model = with_gradients()
    [optimizer] = build_optimizers(
        list(model.parameters()),
        [model[0].weight],
        OptimizerConfig(kind=kind, lr=2e-3, betas=(0.2, 0.9), weight_decay=0.3),  # type: ignore[arg-type]
    )
    [group] = optimizer.param_groups
    assert type(optimizer) is expected and len(group["params"]) == 6
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-3, (0.2, 0.9), 0.3)
