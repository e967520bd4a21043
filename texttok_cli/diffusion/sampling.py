"""Latents drawn from a generator: the network, guidance and a sampler put together.

Letters: B batch, N tokens, d latent channels, S side of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from texttok_cli.config import Precision
from texttok_cli.config.guidance import Guidance, parse_cfg
from texttok_cli.config.schema import FITTING, GeneratorConfig
from texttok_cli.diffusion.process import Denoised, Process, Schedule, build_process, split_output
from texttok_cli.diffusion.samplers import SAMPLERS, Denoiser, SampleRng, schedule_for
from texttok_cli.errors import RecipeError

if TYPE_CHECKING:
    from texttok_cli.models.condition import Condition
    from texttok_cli.models.dit import DiT
    from texttok_cli.models.prepared import PreparedDiT


@dataclass(frozen=True, slots=True)
class Sampling:
    """How latents are drawn."""

    sampler: str
    steps: int
    guidance: Guidance

    @staticmethod
    def asked(model: GeneratorConfig, sampler: str | None, steps: int | None, cfg: str | None) -> Sampling:
        """Of a model; what is None is as its file says. RecipeError for a cfg that can't be read."""
        own, default = model.sampling, FITTING[model.process.kind][0]
        guidance = parse_cfg(own.cfg if cfg is None else cfg)
        return Sampling(sampler or own.sampler or default, own.steps if steps is None else steps, guidance)


@torch.no_grad()
def sample(
    dit: DiT,
    how: Sampling,
    *,
    seeds: Sequence[int],
    class_ids: Tensor | None = None,
    cond: Condition | None = None,
    guide: DiT | None = None,
    precision: Precision = "fp32",
) -> Tensor:
    """Raw latents (B, N, d), of a feature map (B, d, S, S), float32 on the model's device: one of each seed.

    `class_ids` (B,) or `cond` (B, T, C) are on that device. With `guide`, a weaker model of the same kind, guidance goes away
    from its conditional prediction instead of from the null condition's (autoguidance, Karras et al., 2024).
    `precision` is the networks'; the latents stay float32. Raises RecipeError for a sampler that isn't the process's,
    a number of steps it can't take and a guide of another kind.
    """
    if guide is not None:
        _check_guide(dit, guide)
    process, schedule, weights = plan_sampling(dit.cfg, how, by_null=guide is None)
    device = dit.latent_mean.device
    rng = SampleRng(seeds, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        times = torch.tensor(schedule.times, device=device)
        guided = any(weight != 1 for weight in weights)
        network = dit.prepare(times, class_ids, cond, null=guided and guide is None)
        other = guide.prepare(times, class_ids, cond, null=False) if guide is not None and guided else None
        denoise = _denoiser(network, other, process, schedule, weights, how.guidance.channels)
        x = SAMPLERS[how.sampler](denoise, rng.normal(dit.latent_shape), schedule, rng)
    return dit.destandardize(x)


def plan_sampling(cfg: GeneratorConfig, how: Sampling, *, by_null: bool) -> tuple[Process, Schedule, list[float]]:
    """The model's process, its schedule and the guidance's weight at each step.

    Raises RecipeError for a sampler that isn't the process's, a number of steps it can't take, and guidance by the null condition
    of a model that never saw it, or of more channels than there are.
    """
    kind = cfg.process.kind
    if how.sampler not in FITTING[kind]:
        raise RecipeError(f"sampler {how.sampler!r} is none of those of a {kind} model: {', '.join(FITTING[kind])}")
    process = build_process(cfg.process)
    schedule = schedule_for(how.sampler, process, how.steps)
    weights = [how.guidance.weight(fraction) for fraction in schedule.fractions]
    if by_null and cfg.condition.dropout == 0 and any(weight != 1 for weight in weights):
        raise RecipeError("guidance: the model never saw the null condition (its condition.dropout is 0); sample with cfg 1, or a guide")
    if (how.guidance.channels or 0) > cfg.latents.channels:
        raise RecipeError(f"guidance: channels={how.guidance.channels}, but the model's latents have {cfg.latents.channels}")
    return process, schedule, weights


def _denoiser(
    network: PreparedDiT, other: PreparedDiT | None, process: Process, schedule: Schedule, weights: Sequence[float], channels: int | None
) -> Denoiser:
    """The guided network as what samplers call. Where the weight is 1 only the conditional pass runs."""

    def denoise(x: Tensor, i: int) -> Denoised:
        weight = weights[i]
        if weight == 1:
            return process.denoised(*split_output(network(x, i).float(), x), x, schedule, i)
        if other is None:
            output, reference = network(x, i, null=True).float().chunk(2)
        else:
            output, reference = network(x, i).float(), other(x, i).float()
        prediction, variance = split_output(output, x)  # the variance stays the conditional one
        baseline, _ = split_output(reference, x)
        guided = baseline + weight * (prediction - baseline)
        if channels is not None:
            axis = 1 if x.ndim == 4 else -1  # (B, d, S, S) or (B, N, d)
            guided = torch.cat([guided.narrow(axis, 0, channels), prediction.narrow(axis, channels, x.shape[axis] - channels)], axis)
        return process.denoised(guided, variance, x, schedule, i)

    return denoise


def _check_guide(dit: DiT, guide: DiT) -> None:
    """RecipeError unless both see the same latents, process and conditions, however they were trained."""
    training_only = {"dropout", "null_tokens", "learned_sigma", "time", "shift"}
    for part in ("latents", "process", "condition"):
        ours, theirs = (getattr(model.cfg, part).model_dump(exclude=training_only) for model in (dit, guide))
        if ours != theirs:
            raise RecipeError(f"guide: its {part} is {theirs}, the generator's {ours}; it must be a generator of the same kind")
    if not (torch.equal(dit.latent_mean, guide.latent_mean) and torch.equal(dit.latent_std, guide.latent_std)):
        raise RecipeError("guide: it was trained on latents with other statistics; both must be trained on the same ones")
