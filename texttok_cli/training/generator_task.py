"""What one optimizer step of a generator is, how it is validated, and what it leaves behind.

Letters: B this process's batch, N latent tokens, d latent channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from texttok_cli.config.recipe import GeneratorRecipe
from texttok_cli.config.schema import ClassLabels, GeneratorConfig, TokenLatents
from texttok_cli.data.latents import LatentBatch
from texttok_cli.diffusion import build_process
from texttok_cli.errors import RecipeError
from texttok_cli.models.devices import without_weights
from texttok_cli.models.dit import DiT
from texttok_cli.token_folder import Statistics
from texttok_cli.training.conditioning import Conditioner
from texttok_cli.training.engine import Engine
from texttok_cli.training.guard import Guard
from texttok_cli.training.optim import build_optimizers, clip_gradients, gradient_norm
from texttok_cli.training.sharding import split_like, whole

VALIDATION_SEED = 0  # of the times and noise that every validation has


class GeneratorTask:
    """Training of a DiT on latents by its process's loss, with classes or captions dropped at random, and an EMA of its weights."""

    def __init__(
        self,
        recipe: GeneratorRecipe,
        engine: Engine,
        condition: Conditioner,
        statistics: Statistics,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`statistics` are of the raw latents. RecipeError for what only a tokenizer, or only one process, can have."""
        if not isinstance(recipe.model.latents, TokenLatents):
            raise RecipeError("model.latents: texttok trains generators on tokens; of a feature map it reads the original DiT's weights")
        if engine.sharded and recipe.optimizer.kind == "muon":
            raise RecipeError("optimizer.kind muon orthogonalises whole matrices, FSDP2 splits them: use adamw")
        self.recipe, self.engine, self.condition = recipe, engine, condition
        self.process = build_process(recipe.model.process)
        torch.manual_seed(recipe.training.seed)  # the initial weights
        self.model = DiT(recipe.model).to(engine.device)
        if start is not None:
            self.model.load_state_dict(start)
        # [I] LightningDiT: the paper does not say whether its latents are standardised.
        self.model.latent_mean.copy_(torch.tensor(statistics.mean))
        self.model.latent_std.copy_(torch.tensor([std or 1.0 for std in statistics.std]))  # a channel that never varies stays as it is
        self.model.set_checkpointing(recipe.training.checkpointing)
        self.optimizers: list[Optimizer] = build_optimizers(list(self.model.parameters()), self.model.block_matrices(), recipe.optimizer)
        self.predict = engine.prepare(self.model, self.optimizers)
        self.parameters = dict(self.model.named_parameters())  # by now, under FSDP2, shards
        self.ema = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.guard = Guard(recipe.training.spike)

    # ------------------------------------------------------------------ a step

    def step(self, batch: LatentBatch, step: int) -> dict[str, Tensor]:
        """One optimizer step, unless the guard declines it; returns detached scalars to log."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        x0, indices, parts = self.model.standardize(batch.z), batch.indices.tolist(), self.recipe.training.accumulate
        t, noise, drop = self._draw(x0, step)

        def backward(part: slice) -> dict[str, Tensor]:
            condition = with_dropped(self.condition(indices[part]), drop[part], self.recipe.model)
            with self.engine.autocast():  # FSDP2's wrapper, unlike DDP's, doesn't bring it along
                losses = self._losses(self.predict, x0[part], t[part], noise[part], condition)
            loss = torch.stack(list(losses.values())).sum()
            self.engine.backward(loss / parts)
            return losses | {"loss": loss}

        values = self.engine.accumulate(self.predict, len(x0), parts, backward)
        values["grad_norm"] = whole(gradient_norm(self.parameters.values()))
        if self.guard.accepts(values["grad_norm"]):
            clip_gradients(self.parameters.values(), values["grad_norm"], self.recipe.optimizer.grad_clip)
            for optimizer in self.optimizers:
                optimizer.step()
            self._move_ema()
        values["skipped_steps"] = self.guard.skipped
        return values

    def _draw(self, x0: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Times (B,), noise (B, N, d) and which conditions to drop (B,) bool.

        Functions of (seed, step, place in the global batch): the same for any number of processes, and no state to save.
        """
        first, size = self.engine.rank * len(x0), self.engine.world_size * len(x0)
        generator = torch.Generator(x0.device).manual_seed(self.recipe.training.seed * 1_000_003 + step)
        t = self.process.sample_times(size, generator)
        noise = torch.randn(size, *x0.shape[1:], generator=generator, device=x0.device)
        drop = torch.rand(size, generator=generator, device=x0.device) < self.recipe.model.condition.dropout
        mine = slice(first, first + len(x0))
        return t[mine], noise[mine], drop[mine]

    def _losses(self, predict: Any, x0: Tensor, t: Tensor, noise: Tensor, condition: dict[str, Any]) -> dict[str, Tensor]:
        """Means over the batch, by name."""
        losses = self.process.training_loss(lambda x, time: predict(x, time, **condition), x0, t, noise)
        return {name: values.mean() for name, values in losses.items()}

    @torch.no_grad()
    def _move_ema(self) -> None:
        # As DiT: it begins at the initial weights.
        torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - self.recipe.training.ema)

    # ------------------------------------------------------------------ looking at it

    def averaged(self) -> DiT:
        """The EMA weights as a model; every process has to call it."""
        with without_weights():
            dit = DiT(self.recipe.model)
        weights = {name: whole(value) for name, value in self.ema.items()}
        statistics = {"latent_mean": self.model.latent_mean, "latent_std": self.model.latent_std}
        dit.load_state_dict({**weights, **statistics}, assign=True)
        return dit.to(self.engine.device).eval().requires_grad_(False)

    @torch.no_grad()
    def validate(self, dit: DiT, condition: Conditioner, batches: Iterable[LatentBatch]) -> dict[str, float]:
        """Means over images of the losses of a model at times and with noise that are the same at every call."""
        totals: dict[str, float] = {}
        seen = 0
        generator = torch.Generator(self.engine.device).manual_seed(VALIDATION_SEED)
        for batch in batches:
            x0 = dit.standardize(batch.z)
            t = self.process.sample_times(len(x0), generator)
            noise = torch.randn(x0.shape, generator=generator, device=x0.device)
            with self.engine.autocast():
                losses = self._losses(dit, x0, t, noise, condition(batch.indices.tolist()))
            totals = {name: totals.get(name, 0.0) + float(value) * len(x0) for name, value in losses.items()}
            seen += len(x0)
        return {f"val_{name}": total / seen for name, total in totals.items()}

    # ------------------------------------------------------------------ what it leaves

    def state(self) -> dict[str, Tensor]:
        """Everything but the optimizers that the next step depends on."""
        model = {f"model.{name}": value.detach() for name, value in self.parameters.items()}
        return model | {f"ema.{name}": value for name, value in self.ema.items()} | self.guard.state()

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        targets: dict[str, Tensor] = {f"model.{name}": value for name, value in self.parameters.items()}
        for key, target in (targets | {f"ema.{name}": value for name, value in self.ema.items()}).items():
            target.copy_(split_like(tensors[key], target))
        self.guard.load_state(tensors)


def with_dropped(condition: dict[str, Any], drop: Tensor, cfg: GeneratorConfig) -> dict[str, Any]:
    """A condition with some rows (B,) replaced by the null class, or marked to be replaced by the null tokens."""
    if isinstance(cfg.condition, ClassLabels):
        return {"class_ids": torch.where(drop, cfg.condition.num_classes, condition["class_ids"])}
    return {**condition, "drop": drop}
