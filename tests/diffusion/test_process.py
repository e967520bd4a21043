"""Training losses against the definitions, respacing, and times."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from texttok_cli.config.schema import DDPM, Flow
from texttok_cli.diffusion import Guidance, build_process
from texttok_cli.diffusion.process import DDPMProcess
from texttok_cli.errors import RecipeError


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ddpm_loss_is_the_mse_of_eps_and_the_bound_in_bits() -> None:
    """KL(q(x_{t-1} | x_t, x_0) || p) of two Gaussians, as the distributions' library computes it; at t = 0 the density of x_0."""
    torch.set_default_dtype(torch.float64)
    try:
        betas = torch.linspace(1e-4, 0.02, 1000)
        bars = torch.cumprod(1 - betas, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    x0, noise, eps, place = (normal(4, 6, 3, seed=s) for s in range(4))
    t = torch.tensor([0, 1, 500, 999])
    seen = {}

    def predict(x: Tensor, times: Tensor) -> Tensor:
        seen.update(x=x, times=times)
        return torch.cat([eps, place], dim=2)

    losses = build_process(DDPM()).training_loss(predict, x0, t, noise)
    assert torch.equal(seen["times"], t.float())
    torch.testing.assert_close(losses["mse"], (eps - noise).square().mean(dim=(1, 2)))
    for i, step in enumerate(t.tolist()):
        bar, before, beta = float(bars[step]), float(bars[step - 1]) if step else 1.0, float(betas[step])
        x_t = bar**0.5 * x0[i].double() + (1 - bar) ** 0.5 * noise[i].double()
        torch.testing.assert_close(seen["x"][i], x_t.float())

        def posterior_mean(of: Tensor, x_t: Tensor = x_t, bar: float = bar, before: float = before, beta: float = beta) -> Tensor:
            return (before**0.5 * beta * of + (1 - beta) ** 0.5 * (1 - before) * x_t) / (1 - bar)

        estimate = (x_t - (1 - bar) ** 0.5 * eps[i].double()) / bar**0.5
        first = 1 if step == 0 else step
        smallest = float(betas[first] * (1 - bars[first - 1]) / (1 - bars[first]))
        share = (place[i].double() + 1) / 2
        model = Normal(posterior_mean(estimate), (0.5 * (share * math.log(beta) + (1 - share) * math.log(smallest))).exp())
        truth = Normal(posterior_mean(x0[i].double()), smallest**0.5)
        nats = -model.log_prob(x0[i].double()) if step == 0 else kl_divergence(truth, model)
        assert float(losses["vlb"][i]) == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-4)


def test_the_bound_trains_the_variance_only() -> None:
    output = normal(2, 6, 8, seed=0).requires_grad_()
    losses = build_process(DDPM()).training_loss(
        lambda x, t: output, normal(2, 6, 4, seed=1), torch.tensor([3, 700]), normal(2, 6, 4, seed=2)
    )
    (gradient,) = torch.autograd.grad(losses["vlb"].sum(), output)
    assert torch.equal(gradient[..., :4], torch.zeros(2, 6, 4))
    assert gradient[..., 4:].abs().min() > 0


def test_output_is_split_on_the_channels_of_a_feature_map_too() -> None:
    eps, place, x0, noise = (normal(2, 4, 3, 3, seed=s) for s in range(4))
    t = torch.tensor([10, 20])
    process = build_process(DDPM())
    grid = process.training_loss(lambda x, t: torch.cat([eps, place], dim=1), x0, t, noise)
    last = process.training_loss(lambda x, t: torch.cat([eps, place], dim=1).movedim(1, 3), x0.movedim(1, 3), t, noise.movedim(1, 3))
    for name in ("mse", "vlb"):
        torch.testing.assert_close(grid[name], last[name])


def test_without_a_learned_variance_there_is_no_bound() -> None:
    x0, noise = normal(2, 6, 4, seed=0), normal(2, 6, 4, seed=1)
    losses = build_process(DDPM(learned_sigma=False)).training_loss(lambda x, t: noise, x0, torch.tensor([3, 700]), noise)
    assert losses.keys() == {"mse"}
    assert torch.equal(losses["mse"], torch.zeros(2))


def test_flow_loss_is_the_mse_of_the_velocity() -> None:
    x0, noise, velocity = (normal(2, 6, 4, seed=s) for s in range(3))
    t = torch.tensor([0.25, 0.75])

    def predict(x: Tensor, times: Tensor) -> Tensor:
        torch.testing.assert_close(x, torch.stack([0.75 * x0[0] + 0.25 * noise[0], 0.25 * x0[1] + 0.75 * noise[1]]))
        assert times.tolist() == [250, 750]
        return velocity

    losses = build_process(Flow(kind="flow")).training_loss(predict, x0, t, noise)
    torch.testing.assert_close(losses["mse"], (velocity - noise + x0).square().mean(dim=(1, 2)))


def test_times_are_drawn_as_the_recipe_says() -> None:
    def draw(cfg: DDPM | Flow) -> Tensor:
        return build_process(cfg).sample_times(20_000, torch.Generator().manual_seed(0))

    steps = draw(DDPM())
    assert steps.dtype == torch.int64 and steps.min() == 0 and steps.max() == 999
    assert float(steps.double().mean()) == pytest.approx(499.5, abs=10)
    uniform, lognormal = draw(Flow(kind="flow", time="uniform")), draw(Flow(kind="flow"))
    assert float(uniform.var()) == pytest.approx(1 / 12, rel=0.03)
    assert float(lognormal.logit().var()) == pytest.approx(1, rel=0.03)
    assert torch.equal(steps, draw(DDPM()))


def test_another_number_of_timesteps_ends_in_the_same_noise() -> None:
    for timesteps in (100, 250, 4000):
        assert DDPMProcess(DDPM(timesteps=timesteps)).alpha_bars[-1] < 1e-4
    with pytest.raises(ValidationError, match="timesteps 20 are too few"):
        DDPM(timesteps=20)


def test_another_number_of_timesteps_keeps_the_models_times() -> None:
    times = []
    build_process(DDPM(timesteps=100)).training_loss(
        lambda x, t: times.append(t) or x, torch.zeros(2, 1, 1), torch.tensor([0, 99]), torch.zeros(2, 1, 1)
    )
    assert times[0].tolist() == [0, 990]
    assert build_process(DDPM(timesteps=100)).schedule(100).times[0] == 990


def test_respacing_keeps_original_times_and_both_ends() -> None:
    process = build_process(DDPM())
    assert process.schedule(4).times == (999, 666, 333, 0)
    assert process.schedule(1).times == (999,)
    assert process.schedule(1000).times == tuple(range(999, -1, -1))
    schedule = process.schedule(250)
    assert len(set(schedule.times)) == 250 and len(schedule.alphas) == 251
    assert (schedule.alphas[-1], schedule.sigmas[-1]) == (1, 0)
    assert schedule.fractions[0] == 0.999
    assert all(a**2 + s**2 == pytest.approx(1) for a, s in zip(schedule.alphas, schedule.sigmas, strict=True))


def test_flow_times_shift_towards_the_noise() -> None:
    assert build_process(Flow(kind="flow")).schedule(4).sigmas == (1, 0.75, 0.5, 0.25, 0)
    shifted = build_process(Flow(kind="flow", shift=3)).schedule(4)
    assert shifted.sigmas == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    assert shifted.times == pytest.approx((1000, 900, 750, 500))
    assert shifted.fractions == pytest.approx((1, 0.9, 0.75, 0.5))  # what guidance goes by is shifted too


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [10, 20, 50, 250])
def test_steps_on_the_ends_of_an_interval_are_guided(steps: int, shift: float) -> None:
    """Times are rounded: 1 - 45/50 is less than 0.1."""
    fractions = build_process(Flow(kind="flow", shift=shift)).schedule(steps).fractions
    for i in range(1, steps):
        end = shift * i / (steps + (shift - 1) * i)
        for interval in ((end, 1.0), (0.0, end)):
            guided = [Guidance(2, interval=interval).weight(fraction) == 2 for fraction in fractions]
            assert guided[steps - i] and sum(guided) == (steps - i + 1 if interval[1] == 1 else i)


@pytest.mark.parametrize("cfg", [DDPM(timesteps=30), Flow(kind="flow")])
def test_steps_out_of_range_are_one_line(cfg: DDPM | Flow) -> None:
    for steps in (0, -3) if isinstance(cfg, Flow) else (0, 31):
        with pytest.raises(RecipeError, match=f"steps {steps}: ") as error:
            build_process(cfg).schedule(steps)
        assert "\n" not in str(error.value)
