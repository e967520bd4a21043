"""One optimizer step against the paper's objective (Sec. 3.2) written out: every term with its weight, and every gradient."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from texttok_cli.config.loader import load_recipe
from texttok_cli.data import Batch
from texttok_cli.training.engine import Engine
from texttok_cli.training.tokenizer_task import TokenizerTask

CLIP = 0.01
CHANGES = [
    "model.condition={source: none}",
    "objective.l2=2",
    "objective.perceptual={net: stlpips-alex, weight: 0.3}",
    "objective.adversarial.weight=0.7",
    "objective.adversarial.start=1",
    "objective.adversarial.ramp=4",
    "objective.adversarial.r1=3",
    "objective.adversarial.r1_every=2",
    "objective.adversarial.lecam=0.5",
    "objective.adversarial.lecam_decay=0.75",
    "objective.adversarial.discriminator.lr=3e-3",
    "objective.adversarial.discriminator.betas=[0.3, 0.8]",
    f"optimizer.grad_clip={CLIP}",
]


def distance(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """A stand-in for the perceptual network: (B, 3, H, W) twice -> (B,)."""
    return (real - fake).abs().mean(dim=(1, 2, 3))


@pytest.fixture
def step(recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """A task, copies of its networks from before, images in [-1, 1], and what the step numbered so said."""

    def run(number: int, *more: str) -> tuple[TokenizerTask, Any, Any, torch.Tensor, dict[str, torch.Tensor]]:
        recipe = load_recipe(str(recipe_file()), [*CHANGES, *more])
        task = TokenizerTask(recipe, Engine(recipe.training, out=tmp_path, device="cpu"), lambda indices: {"cond": None}, distance)
        assert task.adversary is not None
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in [*task.model.parameters(), *task.adversary.discriminator.parameters()]:
                parameter.add_(0.1 * torch.randn_like(parameter))
            task.adversary.lecam.ema_real.fill_(0.4)
            task.adversary.lecam.ema_fake.fill_(-0.3)
        model, discriminator = deepcopy(task.model), deepcopy(task.adversary.discriminator)
        images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        values = task.step(Batch(images, torch.arange(4)), number)
        return task, model, discriminator, images / 127.5 - 1, values

    return run


def again(x: torch.Tensor) -> Batch:
    """Those images in [-1, 1] as a batch."""
    return Batch(((x + 1) * 127.5).round().to(torch.uint8), torch.arange(len(x)))


def test_every_term_has_its_weight_and_every_gradient_its_side(step: Callable[..., Any]) -> None:
    task, model, discriminator, x, values = step(2)  # the second of the ramp's four steps, and one of R1's
    real = ((x + 1) / 2).requires_grad_()
    fake = (model(x, None)[0] + 1) / 2
    l2, perceptual = 2 * (real - fake).square().mean(), 0.3 * (real - fake).abs().mean()
    gan = 0.7 * 2 / 4 * F.softplus(-discriminator(fake)).mean()
    d_real, d_fake = discriminator(real), discriminator(fake.detach())
    d_gan = F.softplus(-d_real).mean() + F.softplus(d_fake).mean()
    d_lecam = 0.5 * ((d_real + 0.3).relu().square().mean() + (0.4 - d_fake).relu().square().mean())
    (slope,) = torch.autograd.grad(d_real.sum(), real, create_graph=True)
    d_r1 = 3 * 2 * slope.square().sum(dim=(1, 2, 3)).mean()
    expected = {"l2": l2, "perceptual": perceptual, "gan": gan, "d_gan": d_gan, "d_lecam": d_lecam, "d_r1": d_r1}
    expected |= {"loss": l2 + perceptual + gan, "logit_gap": d_real.mean() - d_fake.mean()}
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value.detach(), rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")

    learned = dict(discriminator.named_parameters())
    gradients = torch.autograd.grad(d_gan + d_lecam + d_r1, list(learned.values()))
    for (name, parameter), gradient in zip(task.adversary.discriminator.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(l2 + perceptual + gan, weights)
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    torch.testing.assert_close(values["grad_norm"], norm, rtol=1e-3, atol=0.0)
    assert norm > CLIP
    for parameter, gradient in zip(task.parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * CLIP / norm, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_what_the_step_leaves(parts: int, step: Callable[..., Any]) -> None:
    task, model, discriminator, x, _ = step(2, f"training.accumulate={parts}")
    (group,) = task.adversary.optimizer.param_groups
    assert (group["lr"], tuple(group["betas"])) == (3e-3, (0.3, 0.8))
    with torch.no_grad():
        fake = (model(x, None)[0] + 1) / 2
        means = discriminator((x + 1) / 2).mean(), discriminator(fake).mean()
    torch.testing.assert_close(task.adversary.lecam.ema_real, 0.75 * torch.tensor(0.4) + 0.25 * means[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(task.adversary.lecam.ema_fake, 0.75 * torch.tensor(-0.3) + 0.25 * means[1], rtol=1e-4, atol=1e-6)
    # Adam's first step goes by the rate, whatever the gradient is.
    for ours, before in ((task.model, model), (task.adversary.discriminator, discriminator)):
        moved = max(float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), before.parameters(), strict=True))
        assert moved == pytest.approx(3e-3 if before is discriminator else 1e-3, rel=0.01)
    averaged = dict(task.ema_model.named_parameters())
    assert all(torch.equal(averaged[name], parameter) for name, parameter in task.model.named_parameters())  # the first is a copy


def test_the_adversary_s_weight_rises_over_its_ramp_and_stays(step: Callable[..., Any]) -> None:
    task, *_ = step(0)
    assert task.adversary is not None
    assert [task.adversary.weight(number) for number in range(1, 8)] == pytest.approx([0.7 / 4, 0.7 / 2, 0.7 * 3 / 4, *[0.7] * 4])


def test_a_second_step_moves_the_averages_by_their_decays(step: Callable[..., Any]) -> None:
    task, _, _, x, _ = step(2, "training.ema=0.6")
    first, discriminator = deepcopy(task.ema_model), deepcopy(task.adversary.discriminator)
    ema_real = task.adversary.lecam.ema_real.clone()
    task.step(again(x), 3)
    for averaged, before, now in zip(task.ema_model.parameters(), first.parameters(), task.model.parameters(), strict=True):
        torch.testing.assert_close(averaged, 0.6 * before + 0.4 * now)
    assert not torch.equal(first.to_pixels.weight, task.model.to_pixels.weight)
    with torch.no_grad():
        mean = discriminator((x + 1) / 2).mean()
    torch.testing.assert_close(task.adversary.lecam.ema_real, 0.75 * ema_real + 0.25 * mean, rtol=1e-4, atol=1e-6)


def test_the_seed_decides_on_the_initial_weights(step: Callable[..., Any]) -> None:
    one, same, other = (step(0, f"training.seed={seed}")[1].patch_embed.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_perceptual_loss_that_starts_late_makes_the_guard_begin_anew(step: Callable[..., Any]) -> None:
    late = "objective.perceptual={net: stlpips-alex, weight: 0.3, start: 1}"
    task, _, _, x, values = step(0, late, "objective.adversarial.start=9")
    assert "perceptual" not in values and task.guard.taken == 1
    assert task.step(again(x), 1)["perceptual"] > 0 and task.guard.taken == 1
    task.step(again(x), 2)
    assert task.guard.taken == 2


def test_the_adaptive_weight_is_the_other_losses_gradient_over_the_adversary_s(step: Callable[..., Any]) -> None:
    _, model, discriminator, x, values = step(2, "objective.adversarial.adaptive=true")
    real, fake = (x + 1) / 2, (model(x, None)[0] + 1) / 2
    others = 2 * (real - fake).square().mean() + 0.3 * (real - fake).abs().mean()
    gan = F.softplus(-discriminator(fake)).mean()
    slopes = [torch.autograd.grad(value, model.to_pixels.weight, retain_graph=True)[0].norm() for value in (others, gan)]
    expected = 0.7 * 2 / 4 * slopes[0] / (slopes[1] + 1e-4) * gan
    torch.testing.assert_close(values["gan"], expected.detach(), rtol=1e-3, atol=1e-6)


def test_a_step_whose_discriminator_s_gradient_is_bad_leaves_all_as_it_was(
    step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _, _, x, _ = step(2, "model.bottleneck={kind: vq, codes: 16}")
    assert task.adversary is not None
    before = {name: value.clone() for name, value in task.state().items()}
    monkeypatch.setattr(task.adversary, "gradient_norm", lambda: torch.tensor(float("nan")))
    task.step(again(x.flip(0)), 3)
    after = task.state()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"guard.skipped", "guard.in_a_row"}


def test_between_the_steps_of_r1_there_is_none(step: Callable[..., Any]) -> None:
    *_, values = step(3)
    assert "d_r1" not in values and values["gan"] > 0


def test_before_the_start_there_is_no_adversary(step: Callable[..., Any]) -> None:
    task, _, discriminator, _, values = step(0)
    assert not {"gan", "d_gan", "d_lecam", "d_r1", "logit_gap"} & values.keys()
    for ours, before in zip(task.adversary.discriminator.parameters(), discriminator.parameters(), strict=True):
        assert torch.equal(ours, before)
