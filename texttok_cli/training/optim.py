"""Optimizers and the learning rate as a function of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from texttok_cli.config.recipe import OptimizerConfig, ScheduleConfig


def build_optimizers(parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter], cfg: OptimizerConfig) -> list[Optimizer]:
    """The optimizers of a model; `matrices` are the hidden weight matrices among its parameters.

    kind muon: Muon (Jordan et al. 2024, torch.optim.Muon: momentum orthogonalised by Newton-Schulz) for the matrices
    and AdamW for all else.
    """
    fused = parameters[0].is_cuda
    if cfg.kind == "muon":
        muon = torch.optim.Muon(matrices, lr=cfg.muon_lr, momentum=cfg.muon_momentum, weight_decay=cfg.weight_decay)
        chosen = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in chosen]
        adamw = torch.optim.AdamW(rest, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=fused)
        return [with_base_lr(muon), with_base_lr(adamw)]
    kind = torch.optim.Adam if cfg.kind == "adam" else torch.optim.AdamW
    return [with_base_lr(kind(parameters, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=fused))]


def with_base_lr(optimizer: Optimizer) -> Optimizer:
    """The optimizer, every group of which keeps its rate at scale 1 in `base_lr`."""
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def lr_scale(step: int, cfg: ScheduleConfig) -> float:
    """Factor in [0, 1] on every learning rate at optimizer step `step` (0 is the first)."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    begin = max(cfg.warmup, round(cfg.steps * (1 - cfg.decay_fraction)))
    if step < begin:
        return 1.0
    progress = (step - begin) / max(1, cfg.steps - begin)
    return 0.5 * (1 + math.cos(math.pi * progress)) if cfg.decay == "cosine" else 1 - progress


def set_lr(optimizers: Sequence[Optimizer], scale: float) -> None:
    """Set every group's rate to `scale` times its base."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group["base_lr"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global 2-norm of the gradients, a scalar; of shards one that is to be made whole."""
    return get_total_norm(_gradients(parameters))


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float | None) -> None:
    """Scale gradients of this global norm down to the limit where it is above. Waits for the device.

    torch's clip_grad_norm_ never waits, and so multiplies every gradient at every step, nearly always by 1.
    """
    if limit is not None and norm > limit:
        torch._foreach_mul_(_gradients(parameters), limit / float(norm))


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
