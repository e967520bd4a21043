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
from texttok_cli.config.schema import Recipe
from texttok_cli.data import normalize, to_uint8
from texttok_cli.losses import Perceptual, l2
from texttok_cli.metrics.image import psnr
from texttok_cli.models.tokenizer import TexTok
from texttok_cli.training.engine import Engine
from texttok_cli.training.optim import build_optimizers

# Indices into a dataset -> `cond` and `class_ids` of those images, as TexTok.forward takes them.
Conditioner = Callable[[Sequence[int]], dict[str, Any]]


class TokenizerTask:
    """l2 + perceptual training of a TexTok (Sec. 3.2) with an EMA of its weights."""

    def __init__(self, recipe: Recipe, engine: Engine, train_condition: Conditioner, perceptual: Perceptual | None) -> None:
        torch.manual_seed(recipe.training.seed)  # the initial weights
        self.recipe, self.engine, self.condition = recipe, engine, train_condition
        self.model = TexTok(recipe.model).to(engine.device)
        average = get_ema_multi_avg_fn(recipe.training.ema)  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(self.model, multi_avg_fn=average)
        self.perceptual = perceptual.to(engine.device) if perceptual is not None else None
        self.parameters = list(self.model.parameters())
        self.optimizers: list[Optimizer] = build_optimizers(self.parameters, self.model.block_matrices(), recipe.optimizer)
        self.reconstruct = engine.prepare(self.model)

    @property
    def ema_model(self) -> TexTok:
        """The averaged weights as a model."""
        return cast(TexTok, self.ema.module)

    def step(self, images: Tensor, indices: Sequence[int], step: int) -> dict[str, Tensor]:
        """One optimizer step on uint8 images (B, 3, S, S); returns detached scalars to log."""
        x = normalize(images.to(self.engine.device))
        output, latents = self.reconstruct(x, **self.condition(indices))
        losses = self._losses(x, output.float(), step) | latents.losses
        loss = torch.stack(list(losses.values())).sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.engine.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.grad_clip or float("inf"))
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.update_parameters(self.model)
        return {name: value.detach() for name, value in losses.items()} | {"loss": loss.detach(), "grad_norm": norm}

    def _losses(self, x: Tensor, output: Tensor, step: int) -> dict[str, Tensor]:
        """Weighted losses by name, on images in [0, 1]."""
        objective = self.recipe.objective
        real, fake = (x + 1) / 2, (output + 1) / 2
        losses = {"l2": objective.l2 * l2(real, fake)}
        if self.perceptual is not None and objective.perceptual is not None and step >= objective.perceptual.start:
            losses["perceptual"] = objective.perceptual.weight * self.perceptual(real, fake).mean()
        return losses

    @torch.no_grad()
    def validate(self, condition: Conditioner, batches: Iterable[Any]) -> dict[str, float]:
        """PSNR in dB and, where the recipe has one, perceptual distance of the EMA weights, means over the images."""
        values: dict[str, list[Tensor]] = {"val_psnr": [], "val_perceptual": []}
        model = self.ema_model
        for batch in batches:
            x = normalize(batch.images.to(self.engine.device))
            with self.engine.accelerator.autocast():
                output, _ = model(x, **condition(batch.indices.tolist()))
            values["val_psnr"].append(psnr(batch.images, to_uint8(output.float()).cpu()))
            if self.perceptual is not None:
                values["val_perceptual"].append(self.perceptual((x + 1) / 2, (output.float().clamp(-1, 1) + 1) / 2))
        return {name: torch.cat(parts).double().mean().item() for name, parts in values.items() if parts}

    @torch.no_grad()
    def set_latent_statistics(self, batches: Iterable[Any]) -> None:
        """Fill the EMA model's per-channel mean and std over all tokens of these training images."""
        model = self.ema_model
        total = torch.zeros(2, self.recipe.model.latent_dim, dtype=torch.float64)
        count = 0
        for batch in batches:
            x = normalize(batch.images.to(self.engine.device))
            cond = model.resolve(**self.condition(batch.indices.tolist()))
            z = model.encode(x, cond).z.double().flatten(0, 1).cpu()  # (B*N, d)
            total += torch.stack([z.sum(0), z.square().sum(0)])
            count += len(z)
        mean = total[0] / count
        model.latent_mean.copy_(mean)
        model.latent_std.copy_((total[1] / count - mean**2).sqrt())

    def state(self) -> dict[str, Tensor]:
        """Everything but the optimizers that the next step depends on."""
        model = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        return model | {f"ema.{k}": v for k, v in self.ema.state_dict().items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for prefix, module in (("model.", self.model), ("ema.", self.ema)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    def export(self, path: Path, training: dict[str, Any]) -> None:
        """Write the EMA weights as a model file."""
        dtype = torch.bfloat16 if self.recipe.training.weights == "bf16" else torch.float32
        save_tokenizer(path, self.ema_model, training=training, dtype=dtype)
