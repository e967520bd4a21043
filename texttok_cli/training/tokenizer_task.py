"""What one optimizer step of a tokenizer is, how it is validated, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from texttok_cli.checkpoint import save_tokenizer
from texttok_cli.config.recipe import TokenizerRecipe
from texttok_cli.config.schema import VQBottleneck
from texttok_cli.data import Batch, normalize, to_uint8
from texttok_cli.errors import DataError
from texttok_cli.files import below
from texttok_cli.losses import adaptive_weight, l2
from texttok_cli.metrics.image import psnr, ssim
from texttok_cli.metrics.inception import POOL_DIM, FidInception
from texttok_cli.metrics.statistics import RunningGaussian, frechet_distance
from texttok_cli.models.bottleneck import code_usage
from texttok_cli.models.layers import DTYPES
from texttok_cli.models.tokenizer import TexTok
from texttok_cli.token_folder import Statistics
from texttok_cli.training.adversary import Adversary
from texttok_cli.training.conditioning import Conditioner
from texttok_cli.training.engine import Engine
from texttok_cli.training.guard import Guard
from texttok_cli.training.optim import build_optimizers, clip_gradients, gradient_norm

# Two batches of images (B, 3, H, W) in [0, 1] -> their distances (B,).
Distance = Callable[[Tensor, Tensor], Tensor]


class TokenizerTask:
    """Training of a TexTok by l2, perceptual and adversarial losses (Sec. 3.2), with an EMA of its weights."""

    def __init__(
        self,
        recipe: TokenizerRecipe,
        engine: Engine,
        train_condition: Conditioner,
        perceptual: Distance | None,
        start: TexTok | None = None,
    ) -> None:
        torch.manual_seed(recipe.training.seed)  # the initial weights
        self.recipe, self.engine, self.condition, self.perceptual = recipe, engine, train_condition, perceptual
        self.model = TexTok(recipe.model).to(engine.device)
        if start is not None:
            self.model.load_state_dict(start.state_dict())
        self.model.set_checkpointing(recipe.training.checkpointing)
        if recipe.training.detokenizer_only:
            self.model.freeze_tokenizer()
        average = get_ema_multi_avg_fn(recipe.training.ema)  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(self.model, multi_avg_fn=average).eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in self.model.block_matrices() if p.requires_grad]
        self.optimizers: list[Optimizer] = build_optimizers(self.parameters, matrices, recipe.optimizer)
        self.reconstruct = engine.prepare(self.model, self.optimizers)
        self.adversary: Adversary | None = None
        if recipe.objective.adversarial is not None:
            self.adversary = Adversary(recipe.objective.adversarial, recipe.model.image_size, engine)
            self.optimizers.append(self.adversary.optimizer)
        self.guard = Guard(recipe.training.spike)
        late = (recipe.objective.perceptual, recipe.objective.adversarial)
        self.changes = {loss.start for loss in late if loss is not None and loss.start}  # steps at which the objective becomes another

    @property
    def ema_model(self) -> TexTok:
        """The averaged weights as a model."""
        return cast(TexTok, self.ema.module)

    # ------------------------------------------------------------------ a step

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimizer step, unless the guard declines it; returns detached scalars to log."""
        self.engine.seed_step(step)
        if step in self.changes:
            self.guard.forget_typical()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        images, indices, parts = batch.images, batch.indices.tolist(), self.recipe.training.accumulate
        values = self.engine.accumulate(
            self.reconstruct, len(images), parts, lambda part: self._backward(images[part], indices[part], step, 1 / parts)
        )
        values["grad_norm"] = gradient_norm(self.parameters)
        adversary = self._adversary_at(step)
        if adversary is not None:
            values["d_grad_norm"] = adversary.gradient_norm()
        taken = self.guard.accepts(values["grad_norm"], *([values["d_grad_norm"]] if adversary is not None else []))
        if taken:
            clip_gradients(self.parameters, values["grad_norm"], self.recipe.optimizer.grad_clip)
            for optimizer in self.optimizers:
                optimizer.step()
        self.model.bottleneck.finish_step(self.engine.summed, taken=taken and not self.recipe.training.detokenizer_only)
        if taken:
            self.ema.update_parameters(self.model)
        if adversary is not None:
            adversary.finish_step(taken=taken)
        values["skipped_steps"] = self.guard.skipped
        return values

    def _backward(self, images: Tensor, indices: Sequence[int], step: int, share: float) -> dict[str, Tensor]:
        """Add `share` of the gradients of everything that is trained on these images; returns scalars to log."""
        x = normalize(images.to(self.engine.device))
        output, latents = self.reconstruct(x, **self.condition(indices))
        real, fake = (x + 1) / 2, (output.float() + 1) / 2
        losses: dict[str, Tensor] = self._reconstruction_losses(real, fake, step) | latents.losses
        adversary = self._adversary_at(step)
        if adversary is not None:
            gan = adversary.generator_loss(fake)
            weight = adversary.weight(step) * (self._adaptive(losses, gan) if adversary.cfg.adaptive else 1.0)
            losses["gan"] = weight * gan
        loss = torch.stack(list(losses.values())).sum()
        self.engine.backward(share * loss)
        health: dict[str, Tensor] = {} if adversary is None else adversary.backward(real, fake.detach(), step, share)
        return losses | {"loss": loss} | health

    def _adversary_at(self, step: int) -> Adversary | None:
        """The adversary, if there is one and it takes part at this optimizer step."""
        return self.adversary if self.adversary is not None and step >= self.adversary.cfg.start else None

    def _reconstruction_losses(self, real: Tensor, fake: Tensor, step: int) -> dict[str, Tensor]:
        """Weighted losses by name, on images in [0, 1]."""
        objective = self.recipe.objective
        losses = {"l2": objective.l2 * l2(real, fake)}
        if self.perceptual is not None and objective.perceptual is not None and step >= objective.perceptual.start:
            losses["perceptual"] = objective.perceptual.weight * self.perceptual(real, fake).mean()
        return losses

    def _adaptive(self, losses: dict[str, Tensor], gan: Tensor) -> Tensor:
        """VQGAN's factor, from gradients at the last layer, averaged over processes."""
        last = self.model.to_pixels.weight
        total = torch.stack(list(losses.values())).sum()
        of_losses, of_gan = (torch.autograd.grad(value, last, retain_graph=True)[0] for value in (total, gan))
        return self.engine.averaged(adaptive_weight(of_losses, of_gan))

    # ------------------------------------------------------------------ looking at it

    @torch.no_grad()
    def validate(self, condition: Conditioner, batches: Iterable[Any], inception: FidInception | None = None) -> dict[str, float]:
        """Of the EMA weights, means over images: PSNR in dB, SSIM, and the recipe's perceptual distance.

        For VQ also its codes' use, with `inception` also the rFID of these images.
        """
        values: dict[str, list[Tensor]] = {"val_psnr": [], "val_ssim": [], "val_perceptual": []}
        codes: list[Tensor] = []
        seen = (RunningGaussian(POOL_DIM), RunningGaussian(POOL_DIM))
        for batch in batches:
            x = normalize(batch.images.to(self.engine.device))
            output, latents = self._ema_reconstruct(x, condition(batch.indices.tolist()))
            pixels = to_uint8(output).cpu()
            values["val_psnr"].append(psnr(batch.images, pixels))
            values["val_ssim"].append(ssim(batch.images, pixels))
            if self.perceptual is not None:
                values["val_perceptual"].append(self.perceptual((x + 1) / 2, (output.clamp(-1, 1) + 1) / 2).cpu())
            if latents.codes is not None:
                codes.append(latents.codes.cpu())
            if inception is not None:
                for running, images in zip(seen, (batch.images, pixels), strict=True):
                    running.update(inception(images.to(self.engine.device)).pool)
        result = {name: torch.cat(parts).double().mean().item() for name, parts in values.items() if parts}
        bottleneck = self.recipe.model.bottleneck
        if isinstance(bottleneck, VQBottleneck) and codes:
            result |= {f"val_{name}": value for name, value in code_usage(torch.cat(codes), bottleneck.codes).items()}
        if seen[0].n > 1:
            result["val_rfid"] = frechet_distance(*(running.gaussian() for running in seen))
        return result

    @torch.no_grad()
    def reconstruct_uint8(self, condition: Conditioner, batch: Any) -> Tensor:
        """The EMA weights' reconstructions of a batch, uint8 (B, 3, S, S) on the CPU."""
        output, _ = self._ema_reconstruct(normalize(batch.images.to(self.engine.device)), condition(batch.indices.tolist()))
        return to_uint8(output).cpu()

    def _ema_reconstruct(self, x: Tensor, condition: dict[str, Any]) -> tuple[Tensor, Any]:
        with self.engine.autocast():
            output, latents = self.ema_model(x, **condition)
        return output.float(), latents

    @torch.no_grad()
    def set_latent_statistics(self, batches: Iterable[Any]) -> None:
        """Fill the EMA model's per-channel mean and std over all tokens of these training images."""
        model = self.ema_model
        found: Statistics | None = None
        for batch in batches:
            x = normalize(batch.images.to(self.engine.device))
            cond = model.resolve(**self.condition(batch.indices.tolist()))
            part = Statistics.of(model.encode(x, cond).z.cpu())
            found = part if found is None else found.plus(part)
        if found is None:
            raise DataError("none of the training images that the latents' statistics are computed from can be read")
        model.latent_mean.copy_(torch.tensor(found.mean, dtype=torch.float64))
        model.latent_std.copy_(torch.tensor(found.std, dtype=torch.float64))

    # ------------------------------------------------------------------ what it leaves

    def state(self) -> dict[str, Tensor]:
        """Everything but the optimizers that the next step depends on."""
        model = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        ema = {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        return model | ema | self.guard.state() | ({} if self.adversary is None else self.adversary.state())

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for prefix, module in (("model.", self.model), ("ema.", self.ema)):
            module.load_state_dict(below(tensors, prefix))
        self.guard.load_state(tensors)
        if self.adversary is not None:
            self.adversary.load_state(tensors)

    def export(self, path: Path, training: dict[str, Any], latents_of: Sequence[str], classes: Sequence[str] | None) -> None:
        """Write the EMA weights as a model file; `classes` are those that condition it, by id."""
        dtype = DTYPES[self.recipe.training.weights]
        save_tokenizer(path, self.ema_model, training=training, latents_of=latents_of, classes=classes, dtype=dtype)
