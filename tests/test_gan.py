"""Adversarial losses against closed forms and float64 formulas, and that they train a discriminator."""

import math

import pytest
import torch
import torch.nn.functional as F

from texttok_cli.losses import LeCam, adaptive_weight, discriminator_loss, generator_loss, r1_penalty
from texttok_cli.models.discriminator import Discriminator

REAL, FAKE = [-3.0, -0.5, 0.2, 40.0], [-30.0, -1.5, 0.7, 2.0]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def images(n: int = 3, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_non_saturating_is_minus_log_likelihood() -> None:
    """-log sigmoid(D(real)) - log(1 - sigmoid(D(fake))) for the discriminator, -log sigmoid(D(fake)) for the generator."""
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    expected = sum(softplus(-x) for x in REAL) / 4 + sum(softplus(x) for x in FAKE) / 4
    assert discriminator_loss(real, fake, "non_saturating").item() == pytest.approx(expected, rel=1e-6)
    assert generator_loss(fake, "non_saturating").item() == pytest.approx(sum(softplus(-x) for x in FAKE) / 4, rel=1e-6)
    labels = torch.cat([torch.ones(4), torch.zeros(4)])
    entropy = F.binary_cross_entropy_with_logits(torch.cat([real, fake]), labels)
    torch.testing.assert_close(discriminator_loss(real, fake, "non_saturating"), 2 * entropy)


def test_hinge() -> None:
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    expected = sum(max(0.0, 1 - x) for x in REAL) / 4 + sum(max(0.0, 1 + x) for x in FAKE) / 4
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(expected, rel=1e-6)
    assert generator_loss(fake, "hinge").item() == pytest.approx(-sum(FAKE) / 4, rel=1e-6)


@pytest.mark.parametrize("kind", ["non_saturating", "hinge"])
def test_each_side_is_pushed_its_way(kind: str) -> None:
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    discriminator_loss(real, fake, kind).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake.grad = None
    generator_loss(fake, kind).backward()
    assert (fake.grad < 0).all()


def test_r1_of_a_linear_discriminator_is_its_squared_norm() -> None:
    weight = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    penalty = r1_penalty(lambda x: (x * weight).sum(dim=(1, 2, 3)), images())
    torch.testing.assert_close(penalty, weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_r1_of_a_quadratic_discriminator() -> None:
    """D(x) = a/2 ||x||^2 has gradient a x, so the penalty is a^2 E||x||^2 and its derivative 2 a E||x||^2."""
    a, x = torch.tensor(3.0, requires_grad=True), images()
    energy = x.square().sum(dim=(1, 2, 3)).mean()
    penalty = r1_penalty(lambda x: 0.5 * a * x.square().sum(dim=(1, 2, 3)), x)
    torch.testing.assert_close(penalty, 9 * energy)
    penalty.backward()
    torch.testing.assert_close(a.grad, 6 * energy)
    assert not x.requires_grad


def test_r1_is_float32_within_autocast() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(8, base=4, multipliers=(1, 2))
    plain = r1_penalty(discriminator, images())
    with torch.autocast("cpu", torch.bfloat16):
        assert discriminator(images()).dtype == torch.bfloat16  # so that the next line says something
        assert torch.equal(r1_penalty(discriminator, images()), plain)


def test_lecam_by_hand() -> None:
    lecam = LeCam(decay=0.9)
    real, fake = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -3.0])
    assert lecam(real, fake).item() == pytest.approx(1 / 2 + 9 / 2)  # both means 0: relu(real)^2, relu(-fake)^2
    lecam.update(torch.tensor(2.0), torch.tensor(-1.0))
    lecam.update(torch.tensor(4.0), torch.tensor(-3.0))
    ema_real, ema_fake = 0.9 * 0.2 + 0.1 * 4, 0.9 * -0.1 + 0.1 * -3
    assert lecam.ema_real.item() == pytest.approx(ema_real) and lecam.ema_fake.item() == pytest.approx(ema_fake)
    expected = sum(max(0, x - ema_fake) ** 2 for x in (1, -2)) / 2 + sum(max(0, ema_real - x) ** 2 for x in (0.5, -3)) / 2
    assert lecam(real, fake).item() == pytest.approx(expected)
    assert set(lecam.state_dict()) == {"ema_real", "ema_fake"}


def test_lecam_means_get_no_gradient_and_logits_do() -> None:
    lecam = LeCam(decay=0.999)
    real, fake = torch.ones(2, requires_grad=True), -torch.ones(2).requires_grad_()
    fake.retain_grad()
    lecam.update(real.mean(), fake.mean())
    assert not lecam.ema_real.requires_grad
    lecam(real, fake).backward()
    assert (real.grad > 0).all() and (fake.grad < 0).all()


def test_adaptive_weight_is_the_ratio_of_norms() -> None:
    layer = torch.nn.Linear(3, 2)
    h = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    reconstruction, gan = layer(h).square().mean(), layer(h).sin().sum()
    grads = [torch.autograd.grad(loss, layer.weight, create_graph=True)[0] for loss in (reconstruction, gan)]
    weight = adaptive_weight(*grads)
    norms = [grad.detach().double().square().sum().sqrt().item() for grad in grads]
    assert weight.item() == pytest.approx(norms[0] / (norms[1] + 1e-4), rel=1e-6)
    assert not weight.requires_grad
    assert adaptive_weight(torch.full((3,), 10.0), torch.zeros(3)).item() == 1e4
    assert adaptive_weight(torch.zeros(3), torch.ones(3)).item() == 0


def test_a_discriminator_learns_to_tell_two_distributions_apart() -> None:
    """Non-saturating loss, R1 and LeCAM: noise with vertical stripes from noise with horizontal ones, by fresh samples."""
    torch.manual_seed(0)
    stripes = 0.4 * torch.tensor([0.0, 1.0]).repeat(4)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        noise = 0.6 * torch.rand(2, 16, 3, 8, 8)
        return noise[0] + stripes, noise[1] + stripes[:, None]

    discriminator, lecam = Discriminator(8, base=8, multipliers=(1, 2)), LeCam(decay=0.999)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3, betas=(0.0, 0.99))
    for _ in range(40):
        real, fake = batch()
        real_logits, fake_logits = discriminator(real), discriminator(fake)
        loss = discriminator_loss(real_logits, fake_logits, "non_saturating") + 1e-4 * lecam(real_logits, fake_logits)
        optimizer.zero_grad()
        (loss + 0.1 * r1_penalty(discriminator, real)).backward()
        optimizer.step()
        lecam.update(real_logits.mean(), fake_logits.mean())
    real, fake = batch()
    assert discriminator(real).min() > discriminator(fake).max()
    assert lecam.ema_real > lecam.ema_fake
