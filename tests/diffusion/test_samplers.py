"""Samplers against diffusers' schedulers, and against Gaussian data, whose exact denoiser and solutions are known."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from texttok_cli.config.schema import DDPM, Flow
from texttok_cli.diffusion import FITTING, SAMPLERS, SampleRng, build_process
from texttok_cli.diffusion.process import DDPMProcess, Denoised, Schedule
from texttok_cli.diffusion.samplers import Denoiser, schedule_for

diffusers = pytest.importorskip("diffusers")

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SHAPE = (4, 3, 3)  # diffusers splits the variance off the second axis


def network(x: Tensor, t: float) -> Tensor:
    """Some smooth prediction of eps (or a velocity)."""
    return 0.9 * x + 0.3 * torch.sin(2 * x + t / 300)


def place(x: Tensor) -> Tensor:
    """Some variance between, and a little beyond, its bounds."""
    return 1.2 * torch.cos(3 * x)


def ours(name: str, schedule: Schedule, noise: Tensor, rng: SampleRng, *, learned: bool) -> Tensor:
    process = DDPMProcess(DDPM())

    def denoise(x: Tensor, i: int) -> Denoised:
        return process.denoised(network(x, schedule.times[i]), place(x) if learned else None, x, schedule, i)

    return SAMPLERS[name](denoise, noise, schedule, rng)


def theirs(scheduler: object, noise: Tensor, *, learned: bool = False, **options: object) -> Tensor:
    x = noise
    for t in scheduler.timesteps:
        output = network(x, float(t))
        x = scheduler.step(torch.cat([output, place(x)], dim=1) if learned else output, t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("steps", [7, 50, 1000])
def test_ddpm_is_diffusers(steps: int, learned: bool) -> None:
    """Respaced: the bounds of the learned variance, and the fixed one, are those of the respaced betas."""
    schedule = build_process(DDPM()).schedule(steps)
    scheduler = diffusers.DDPMScheduler(**LINEAR, variance_type="learned_range" if learned else "fixed_large", clip_sample=False)
    scheduler.set_timesteps(timesteps=[round(t) for t in schedule.times])
    rng = SampleRng([5])
    noise = rng.normal(SHAPE)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(torch.randn(1, *SHAPE, generator=generator), noise)
    expected = theirs(scheduler, noise, learned=learned, generator=generator)
    torch.testing.assert_close(ours("ddpm", schedule, noise, rng, learned=learned), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_is_diffusers(steps: int) -> None:
    """On its own spacing, which only divides evenly."""
    scheduler = diffusers.DDIMScheduler(**LINEAR, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    bars = [DDPMProcess(DDPM()).alpha_bars[t] for t in times] + [1.0]
    alphas, sigmas = tuple(bar**0.5 for bar in bars), tuple((1 - bar) ** 0.5 for bar in bars)
    schedule = Schedule(tuple(times), tuple(t / 1000 for t in times), alphas, sigmas)
    noise = SampleRng([5]).normal(SHAPE)
    torch.testing.assert_close(ours("ddim", schedule, noise, SampleRng([0]), learned=False), theirs(scheduler, noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 8, 50])
def test_dpm_solver_is_diffusers(steps: int) -> None:
    """On its own spacing, the default."""
    schedule = schedule_for("dpm++2m", build_process(DDPM()), steps)
    scheduler = diffusers.DPMSolverMultistepScheduler(**LINEAR, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == [round(t) for t in schedule.times]
    assert schedule.fractions == pytest.approx([t / 1000 for t in schedule.times])  # what guidance goes by
    noise = SampleRng([5]).normal(SHAPE)
    expected = theirs(scheduler, noise)
    torch.testing.assert_close(ours("dpm++2m", schedule, noise, SampleRng([0]), learned=False), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_diffusers(shift: float) -> None:
    process = build_process(Flow(kind="flow", shift=shift))
    schedule = process.schedule(20)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / 20 for i in range(20)])
    assert scheduler.timesteps.tolist() == pytest.approx(schedule.times)
    noise = SampleRng([5]).normal(SHAPE)
    x = SAMPLERS["euler"](
        lambda x, i: process.denoised(network(x, schedule.times[i]), None, x, schedule, i), noise, schedule, SampleRng([0])
    )
    torch.testing.assert_close(x, theirs(scheduler, noise), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ Gaussian data

MEAN, DEVIATION = 0.7, 0.4


def gaussian(schedule: Schedule) -> Denoiser:
    """E[x_0 | x_t] of x_0 ~ N(MEAN, DEVIATION^2), and the log-variance of the true q(x_s | x_t)."""

    def denoise(x: Tensor, i: int) -> Denoised:
        a, s, a_next, s_next = schedule.alphas[i], schedule.sigmas[i], schedule.alphas[i + 1], schedule.sigmas[i + 1]
        total = a**2 * DEVIATION**2 + s**2
        x0 = (a * DEVIATION**2 * x + s**2 * MEAN) / total
        beta = 1 - (a / a_next) ** 2
        variance = beta * s_next**2 / s**2 + (a_next * beta / s**2) ** 2 * DEVIATION**2 * s**2 / total
        return Denoised(x0, torch.tensor(math.log(variance)))

    return denoise


def exact(noise: Tensor, schedule: Schedule) -> Tensor:
    """Where the probability-flow ODE carries x to: the same number of deviations from the mean at every time."""

    def spread(i: int) -> float:
        return math.hypot(schedule.alphas[i] * DEVIATION, schedule.sigmas[i])

    return schedule.alphas[-1] * MEAN + spread(-1) * (noise - schedule.alphas[0] * MEAN) / spread(0)


def even_in_lambda(steps: int) -> Schedule:
    """Variance-preserving, log(alpha/sigma) from -3 to 3: smooth as the steps shrink, where the 1000 timesteps are not."""
    ratios = [math.exp(-3 + 6 * i / steps) for i in range(steps + 1)]
    alphas, sigmas = tuple(r / math.hypot(1, r) for r in ratios), tuple(1 / math.hypot(1, r) for r in ratios)
    return Schedule((0.0,) * steps, (0.0,) * steps, alphas, sigmas)


def flow(steps: int) -> Schedule:
    return build_process(Flow(kind="flow")).schedule(steps)


@pytest.mark.parametrize(
    ("name", "schedule", "order"),
    [("ddim", even_in_lambda, 1), ("dpm++2m", even_in_lambda, 2), ("euler", flow, 1), ("heun", flow, 2)],
)
def test_order_of_convergence(name: str, schedule: object, order: int) -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]
    errors = []
    for steps in (40, 80, 160):
        grid = schedule(steps)
        x = SAMPLERS[name](gaussian(grid), noise, grid, SampleRng([0]))
        errors.append(float((x - exact(noise, grid)).abs().max()))
    assert errors[0] < 0.1
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(found - order) < 0.15 for found in orders), orders


@pytest.mark.parametrize(
    ("name", "steps", "error"), [("ddim", 1000, 4e-3), ("dpm++2m", 999, 6e-4), ("ddim", 50, 0.06), ("dpm++2m", 50, 6e-3)]
)
def test_timesteps_lead_to_the_exact_solution(name: str, steps: int, error: float) -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]
    schedule = schedule_for(name, build_process(DDPM()), steps)
    x = SAMPLERS[name](gaussian(schedule), noise, schedule, SampleRng([0]))
    assert (x - exact(noise, schedule)).abs().max() < error


@pytest.mark.parametrize(("steps", "learned"), [(20, True), (1000, False)])
def test_ancestral_sampling_has_the_datas_distribution(steps: int, learned: bool) -> None:
    """With the true variance in any number of steps; with the fixed one, a bound that all the steps make tight."""
    schedule = build_process(DDPM()).schedule(steps)
    true = gaussian(schedule)
    rng = SampleRng([0])
    x = SAMPLERS["ddpm"](true if learned else lambda x, i: Denoised(true(x, i).x0), rng.normal((20_000,)), schedule, rng)
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * DEVIATION / 20_000**0.5)
    assert float(x.std()) == pytest.approx(DEVIATION, rel=0.03)


def test_every_sampler_goes_with_one_process() -> None:
    assert sorted(name for names in FITTING.values() for name in names) == sorted(SAMPLERS)


def test_a_seed_gives_the_same_noise_in_any_batch() -> None:
    together, alone = SampleRng([3, 11, 4]), SampleRng([11])
    for _ in range(3):
        assert torch.equal(together.normal((5, 2))[1], alone.normal((5, 2))[0])
    assert not torch.equal(SampleRng([3]).normal((5, 2)), SampleRng([4]).normal((5, 2)))
