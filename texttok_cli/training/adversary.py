"""The discriminator's side of tokenizer training: its network, its optimizer, LeCAM's running means.

Letters: B batch, H and W sides of the image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from texttok_cli.config.recipe import AdversarialLoss
from texttok_cli.errors import RecipeError
from texttok_cli.files import below
from texttok_cli.losses import LeCam, discriminator_loss, generator_loss, r1_penalty
from texttok_cli.models.discriminator import Discriminator
from texttok_cli.training.engine import Engine
from texttok_cli.training.optim import gradient_norm, with_base_lr


class Adversary:
    """A StyleGAN discriminator trained with LeCAM (Sec. 3.2, following MAGVIT-v2) and R1 ([I] MAGVIT: the paper does not name it).

    It is neither compiled nor wrapped: R1 is of second order, which neither DDP nor torch.compile supports; its
    gradients are averaged over processes explicitly.
    """

    def __init__(self, cfg: AdversarialLoss, image_size: int, engine: Engine) -> None:
        self.cfg, self.engine = cfg, engine
        net = cfg.discriminator
        try:
            self.discriminator = Discriminator(image_size, base=net.base, multipliers=tuple(net.multipliers)).to(engine.device)
        except ValueError as err:
            raise RecipeError(f"objective.adversarial.discriminator: {err}") from None
        self.lecam = LeCam(decay=cfg.lecam_decay).to(engine.device)
        self.parameters: list[nn.Parameter] = list(self.discriminator.parameters())
        adam = torch.optim.Adam(self.parameters, lr=net.lr, betas=net.betas, fused=engine.device.type == "cuda")
        self.optimizer = with_base_lr(adam)
        self._r1: dict[str, Tensor] = {}  # as it was last, for the log: its steps and the logged ones may never coincide
        self._logits = torch.zeros(2, device=engine.device)  # means of D(real) and D(fake) in the step under way

    def weight(self, step: int) -> float:
        """The generator's weight at an optimizer step from `start` on: it rises over `ramp` steps to `weight`."""
        return self.cfg.weight * min(1.0, (step - self.cfg.start + 1) / max(1, self.cfg.ramp))

    def generator_loss(self, fake: Tensor) -> Tensor:
        """What the tokenizer is charged for images (B, 3, H, W) in [0, 1], unweighted; no gradient reaches the discriminator."""
        self.discriminator.requires_grad_(False)
        with self.engine.autocast():
            logits = self.discriminator(fake)
        self.discriminator.requires_grad_(True)
        return generator_loss(logits.float(), self.cfg.kind)

    def backward(self, real: Tensor, fake: Tensor, step: int, share: float) -> dict[str, Tensor]:
        """Add `share` of the discriminator's gradient on these images, both (B, 3, H, W) in [0, 1]; returns scalars to log."""
        if self.cfg.r1 and step % self.cfg.r1_every == 0:
            # By itself and first: its graph, of second order and in fp32, is larger than that of the logits; no GPU need hold both.
            penalty = self.cfg.r1 * self.cfg.r1_every * r1_penalty(self.discriminator, real)
            (share * penalty).backward()  # type: ignore[no-untyped-call]
            self._r1 = {"d_r1": penalty.detach()}
        with self.engine.autocast():
            logits = self.discriminator(torch.cat([real, fake]))
        real_logits, fake_logits = logits.float().chunk(2)
        losses = {"d_gan": discriminator_loss(real_logits, fake_logits, self.cfg.kind)}
        if self.cfg.lecam:
            losses["d_lecam"] = self.cfg.lecam * self.lecam(real_logits, fake_logits)
        (share * torch.stack(list(losses.values())).sum()).backward()  # type: ignore[no-untyped-call]
        means = torch.stack([real_logits.mean(), fake_logits.mean()]).detach()
        self._logits += share * means
        return losses | self._r1 | {"logit_gap": means[0] - means[1]}

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradients, averaged over processes by this call."""
        self.engine.average_gradients(self.parameters)
        return gradient_norm(self.parameters)

    def finish_step(self, *, taken: bool) -> None:
        """Move LeCAM's means, once an optimizer step and by the logits of all processes, if the step was taken."""
        if taken:
            real, fake = self.engine.averaged(self._logits)
            self.lecam.update(real, fake)
        self._logits.zero_()

    def state(self) -> dict[str, Tensor]:
        """Weights and LeCAM's means."""
        net = {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        return net | {f"lecam.{k}": v for k, v in self.lecam.state_dict().items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        modules: tuple[tuple[str, nn.Module], ...] = (("discriminator.", self.discriminator), ("lecam.", self.lecam))
        for prefix, module in modules:
            module.load_state_dict(below(tensors, prefix))
