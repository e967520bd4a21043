"""How latents become noise: the training losses, and the schedule and meaning of the predictions when sampling.

x_t = alpha_t x_0 + sigma_t eps. Letters: B batch, T training timesteps. A model is told a time in [0, 1000).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from texttok_cli.config.schema import DDPM, Flow
from texttok_cli.errors import RecipeError

MODEL_TIMES = 1000  # what a model's time runs to, whatever the process

Predict = Callable[[Tensor, Tensor], Tensor]  # x_t and the model's times (B,) to the raw output


@dataclass(frozen=True, slots=True)
class Denoised:
    """What a sampler needs: the estimate of x_0 and, where learned, the log-variance of the step to the next time."""

    x0: Tensor
    log_variance: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """The times of one sampling run from noise to data, as Python numbers: nothing in the loop asks the device.

    `alphas` and `sigmas` have one entry more than there are steps: the end, 1 and 0.
    """

    times: tuple[float, ...]  # the model's, in [0, 1000]
    fractions: tuple[float, ...]  # t/T in [0, 1], what guidance goes by
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]

    def without_last(self) -> Schedule:
        """Without its last time: the step from the one before goes straight to the data."""
        return Schedule(self.times[:-1], self.fractions[:-1], (*self.alphas[:-2], 1.0), (*self.sigmas[:-2], 0.0))


class DDPMProcess:
    """Gaussian diffusion with linear betas and eps-prediction, its variance learned between two bounds or fixed.

    Loss as in DiT's public code: MSE of eps, plus with a learned variance the term of the variational bound in bits per
    dimension with eps detached, unweighted, so that it trains the variance only (Nichol & Dhariwal, 2021). At t = 0 that
    code takes the likelihood of 8-bit pixels; latents have no such bins, here it is the Gaussian's density.
    """

    def __init__(self, cfg: DDPM) -> None:
        self.cfg = cfg
        scale = 1000 / cfg.timesteps  # as ADM's linear schedule: any number of steps ends in the same noise
        betas = torch.linspace(scale * cfg.beta_start, scale * cfg.beta_end, cfg.timesteps, dtype=torch.float64)
        bars = torch.cumprod(1 - betas, dim=0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
        posterior = betas * (1 - before) / (1 - bars)
        posterior[0] = posterior[1]  # the true one is 0, whose logarithm is of no use
        # How far the posterior's mean moves for one unit of error in eps.
        reach = betas / ((1 - bars) * (1 - betas)).sqrt()
        self._table = torch.stack([bars.sqrt(), (1 - bars).sqrt(), posterior.log(), betas.log(), reach]).float()  # (5, T)
        self.alpha_bars: list[float] = bars.tolist()  # alpha_t^2

    def sample_times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Timesteps (B,) int64, uniform, on the generator's device."""
        return torch.randint(self.cfg.timesteps, (batch,), generator=generator, device=generator.device)

    def training_loss(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses (B,) at timesteps t (B,) int64: "mse", and "vlb" where the variance is learned; their sum is to be minimised."""
        if self._table.device != x0.device:
            self._table = self._table.to(x0.device)
        columns = self._table[:, t].view(5, -1, *[1] * (x0.ndim - 1))
        alpha, sigma, log_min, log_max, reach = columns  # (B, 1, ...) each
        output = predict(alpha * x0 + sigma * noise, t * (MODEL_TIMES / self.cfg.timesteps))
        eps, variance = split_output(output.float(), x0)
        losses = {"mse": _mean((eps - noise).square())}
        if variance is not None:
            log_variance = _between(variance, log_min, log_max)
            gap = (reach * (eps.detach() - noise)).square() * (-log_variance).exp()
            divergence = log_variance - log_min - 1 + (log_min - log_variance).exp() + gap
            density = math.log(2 * math.pi) + log_variance + gap
            first = (t == 0).view_as(alpha)
            losses["vlb"] = _mean(0.5 * torch.where(first, density, divergence)) / math.log(2)
        return losses

    def schedule(self, steps: int) -> Schedule:
        """Evenly respaced timesteps, the last and the first among them. RecipeError for fewer than 1 or more than T."""
        count = self.cfg.timesteps
        if steps > count:
            raise RecipeError(f"steps {steps}: the process has {count} timesteps, so at most {count} steps")
        _at_least_one(steps)
        chosen = [round(i * (count - 1) / (steps - 1)) for i in reversed(range(steps))] if steps > 1 else [count - 1]
        bars = [self.alpha_bars[t] for t in chosen] + [1.0]
        return Schedule(
            times=tuple(t * MODEL_TIMES / count for t in chosen),
            fractions=tuple(t / count for t in chosen),
            alphas=tuple(math.sqrt(bar) for bar in bars),
            sigmas=tuple(math.sqrt(1 - bar) for bar in bars),
        )

    def denoised(self, prediction: Tensor, variance: Tensor | None, x: Tensor, schedule: Schedule, i: int) -> Denoised:
        """Of eps and the variance's place between its bounds at step i. The bounds are those of the respaced step; x_0 is not clipped."""
        x0 = (x - schedule.sigmas[i] * prediction) / schedule.alphas[i]
        if variance is None or schedule.sigmas[i + 1] == 0:
            return Denoised(x0)
        beta = 1 - (schedule.alphas[i] / schedule.alphas[i + 1]) ** 2
        posterior = beta * (schedule.sigmas[i + 1] / schedule.sigmas[i]) ** 2
        return Denoised(x0, _between(variance, math.log(posterior), math.log(beta)))


class FlowProcess:
    """The straight path alpha = 1 - t, sigma = t with velocity eps - x_0 (flow matching; SiT's linear interpolant)."""

    def __init__(self, cfg: Flow) -> None:
        self.cfg = cfg

    def sample_times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Times (B,) in (0, 1), uniform or lognormal, on the generator's device."""
        draw = torch.rand if self.cfg.time == "uniform" else torch.randn
        t = draw(batch, generator=generator, device=generator.device)
        return t if self.cfg.time == "uniform" else t.sigmoid()

    def training_loss(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Loss "mse" (B,) of the velocity at times t (B,) in [0, 1]."""
        sigma = t.view(-1, *[1] * (x0.ndim - 1))
        output = predict((1 - sigma) * x0 + sigma * noise, MODEL_TIMES * t)
        return {"mse": _mean((output.float() - (noise - x0)).square())}

    def schedule(self, steps: int) -> Schedule:
        """Evenly spaced times from 1 to 0, shifted towards the noise. RecipeError for fewer than 1."""
        _at_least_one(steps)
        shift = self.cfg.shift
        even = [1 - i / steps for i in range(steps + 1)]
        t = [shift * u / (1 + (shift - 1) * u) for u in even]
        return Schedule(
            times=tuple(MODEL_TIMES * u for u in t[:-1]),
            fractions=tuple(t[:-1]),
            alphas=tuple(1 - u for u in t),
            sigmas=tuple(t),
        )

    def denoised(self, prediction: Tensor, variance: Tensor | None, x: Tensor, schedule: Schedule, i: int) -> Denoised:
        """Of the velocity at step i."""
        return Denoised(x - schedule.sigmas[i] * prediction)


Process = DDPMProcess | FlowProcess


def build_process(cfg: DDPM | Flow) -> Process:
    """The process that a generator's section describes."""
    return DDPMProcess(cfg) if isinstance(cfg, DDPM) else FlowProcess(cfg)


def split_output(output: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """A model's output -> prediction and variance, halves of the axis on which it is twice as long as `like`; else it alone."""
    for axis in range(1, like.ndim):
        if output.shape[axis] == 2 * like.shape[axis]:
            prediction, variance = output.chunk(2, dim=axis)
            return prediction, variance
    return output, None


def _between(place: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """A place in [-1, 1], which a model may leave, between two logarithms."""
    return low + (place + 1) / 2 * (high - low)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)  # (B, ...) -> (B,)


def _at_least_one(steps: int) -> None:
    if steps < 1:
        raise RecipeError(f"steps {steps}: sampling takes at least 1 step")
