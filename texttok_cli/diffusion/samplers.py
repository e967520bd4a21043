"""From noise to data: pure functions of a denoiser, the noise, a schedule and a source of further noise.

Step i goes from time i of the schedule to time i + 1; x_t = alpha_t x_0 + sigma_t eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from texttok_cli.diffusion.process import DDPMProcess, Denoised, Process, Schedule
from texttok_cli.errors import RecipeError

Denoiser = Callable[[Tensor, int], Denoised]  # x_t and i


class SampleRng:
    """Standard normal noise, each sample's from its own seed: sample i is the same in any batch (on one kind of device)."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """The next draw of every sample, (B, *shape) float32."""
        return torch.stack([torch.randn(*shape, generator=g, device=self.device) for g in self._generators])


Sampler = Callable[[Denoiser, Tensor, Schedule, SampleRng], Tensor]


def ddpm(denoise: Denoiser, noise: Tensor, schedule: Schedule, rng: SampleRng) -> Tensor:
    """Ancestral sampling (Ho et al., 2020): the posterior q(x_s | x_t, x_0), its variance the denoiser's or else the step's beta."""
    x = noise
    for i, (alpha, sigma, alpha_s, sigma_s) in enumerate(_steps(schedule)):
        estimate = denoise(x, i)
        ratio = alpha / alpha_s
        beta = 1 - ratio**2
        x = (alpha_s * beta * estimate.x0 + ratio * sigma_s**2 * x) / sigma**2
        if sigma_s > 0:
            deviation = math.sqrt(beta) if estimate.log_variance is None else (0.5 * estimate.log_variance).exp()
            x = x + deviation * rng.normal(x.shape[1:])
    return x


def ddim(denoise: Denoiser, noise: Tensor, schedule: Schedule, rng: SampleRng) -> Tensor:
    """Deterministic (Song et al., 2021, eta = 0): the same eps at the next time. Of the straight path this is Euler's step."""
    x = noise
    for i, (alpha, sigma, alpha_s, sigma_s) in enumerate(_steps(schedule)):
        x0 = denoise(x, i).x0
        x = alpha_s * x0 + sigma_s / sigma * (x - alpha * x0)
    return x


def dpm_solver(denoise: Denoiser, noise: Tensor, schedule: Schedule, rng: SampleRng) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2): x_0 extrapolated in lambda = log(alpha / sigma) from the last two estimates.

    The last step, on which lambda is infinite, returns its estimate of x_0.
    """
    x, x0_before, h_before = noise, None, 0.0
    for i, (alpha, sigma, alpha_s, sigma_s) in enumerate(_steps(schedule)):
        x0 = denoise(x, i).x0
        if sigma_s == 0:
            return alpha_s * x0
        h = math.log(alpha_s / sigma_s) - math.log(alpha / sigma)
        slope = 0.0 if x0_before is None else (x0 - x0_before) * (h / (2 * h_before))
        x = sigma_s / sigma * x - alpha_s * math.expm1(-h) * (x0 + slope)
        x0_before, h_before = x0, h
    return x


def heun(denoise: Denoiser, noise: Tensor, schedule: Schedule, rng: SampleRng) -> Tensor:
    """Heun's second-order steps along the straight path, the last one, where the velocity is not defined by x_0, Euler's."""
    x = noise
    for i, (_, t, _, s) in enumerate(_steps(schedule)):
        velocity = (x - denoise(x, i).x0) / t
        ahead = x + (s - t) * velocity
        if s == 0:
            return ahead
        x = x + (s - t) / 2 * (velocity + (ahead - denoise(ahead, i + 1).x0) / s)
    return x


def schedule_for(sampler: str, process: Process, steps: int) -> Schedule:
    """The times at which a sampler takes so many steps. RecipeError for a number that the process can't take.

    DPM-Solver++ leaves out the first timestep, as diffusers' default spacing does: half of lambda's range lies between it and its
    neighbour, and an extrapolation so far ahead costs more than all other steps together.
    """
    schedule = process.schedule(steps)
    if sampler != "dpm++2m":
        return schedule
    assert isinstance(process, DDPMProcess)
    timesteps = len(process.alpha_bars)
    if steps == timesteps:
        raise RecipeError(f"steps {steps}: dpm++2m leaves out the first of the process's {timesteps} timesteps, so at most {timesteps - 1}")
    return process.schedule(steps + 1).without_last()


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "dpm++2m": dpm_solver, "euler": ddim, "heun": heun}


def _steps(schedule: Schedule) -> list[tuple[float, float, float, float]]:
    """alpha and sigma of each step's begin and end."""
    alphas, sigmas = schedule.alphas, schedule.sigmas
    return list(zip(alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:], strict=True))
