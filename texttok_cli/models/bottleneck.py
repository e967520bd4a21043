"""What stands between the two halves. A bottleneck turns the tokenizer's output into latents.

Letters: B batch, N latent tokens, D width, d latent channels, K codes, M tokens of a batch (B*N), X dead codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A tensor of one process to its sum over all processes.
SumOverProcesses = Callable[[Tensor], Tensor]

USAGE_DECAY = 0.95  # a step, of the running usage. [I] ours
DEAD_USAGE = 0.1  # of uniform usage: what is left after 45 steps of no use, as 0.95^45 < 0.1. [I] ours
SEARCH_TOKENS = 4096  # tokens compared with all codes at once, which bounds the memory


@dataclass(frozen=True, slots=True)
class Latents:
    """Latent tokens `z` (B, N, d), the weighted losses a bottleneck asks for by name, and for VQ the `codes` (B, N) int64."""

    z: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    codes: Tensor | None = None


class Bottleneck(nn.Module):
    """What all bottlenecks have in common."""

    def finish_step(self, total: SumOverProcesses, *, taken: bool = True) -> None:
        """Called once after an optimizer step (`taken`: it was not skipped). Nothing to do unless there are statistics."""


class Continuous(Bottleneck):
    """Sec. 3.2: a linear projection to d channels, neither KL nor quantizer."""

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, latent_dim)

    def forward(self, tokens: Tensor) -> Latents:
        """(B, N, D) -> latents (B, N, d)."""
        return Latents(self.proj(tokens))


class KL(Bottleneck):
    """A diagonal Gaussian as in latent diffusion (Rombach et al., 2022): sampled in training, its mean in evaluation.

    The loss "kl" is `weight` times the divergence from N(0, 1), summed over tokens and channels, averaged over the batch. Theirs
    stands beside reconstruction losses summed over pixels; beside ours, means, the same weight counts for as many times more.
    """

    def __init__(self, dim: int, latent_dim: int, *, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.proj = nn.Linear(dim, 2 * latent_dim)

    def forward(self, tokens: Tensor) -> Latents:
        """(B, N, D) -> latents (B, N, d) float32."""
        mean, logvar = self.proj(tokens).float().chunk(2, dim=-1)  # (B, N, d) each
        logvar = logvar.clamp(-30, 20)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean) if self.training else mean
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2))  # (B,)
        return Latents(z, {"kl": self.weight * divergence.mean()})


class VQ(Bottleneck):
    """Vector quantisation with l2-normalised codes and inputs (as ViT-VQGAN), straight-through, dead codes restarted.

    The loss "vq" is `weight` times (codebook loss + `commitment` times commitment loss), means over all elements.
    `usage` (K,) is the running share of tokens by code, 1 for uniform use; what a step adds waits for `finish_step`,
    so between steps everything is in the parameters and buffers. At first all codes are dead, so that the first step puts them
    where inputs are: from random directions few are ever used, and a detokenizer that always reads the same codes learns nothing.
    """

    usage: Tensor

    def __init__(self, dim: int, latent_dim: int, *, codes: int, commitment: float, weight: float) -> None:
        super().__init__()
        self.commitment, self.weight = commitment, weight
        self.proj = nn.Linear(dim, latent_dim)
        self.codebook = nn.Parameter(F.normalize(torch.randn(codes, latent_dim), dim=-1))
        self.register_buffer("usage", torch.zeros(codes))
        self._counts: Tensor | None = None  # (K,) of the step under way
        self._inputs: Tensor | None = None  # (M, d) of its latest forward pass

    def forward(self, tokens: Tensor) -> Latents:
        """(B, N, D) -> latents (B, N, d) float32 of length 1, exactly `lookup(codes)`, and codes (B, N)."""
        z = F.normalize(self.proj(tokens).float(), dim=-1)  # (B, N, d)
        codes = self._nearest(z.detach().flatten(0, 1)).view(z.shape[:-1])  # (B, N)
        if self.training:
            self._observe(z.detach().flatten(0, 1), codes)
        quantized = self.lookup(codes)  # (B, N, d)
        loss = F.mse_loss(quantized, z.detach()) + self.commitment * F.mse_loss(z, quantized.detach())
        # The gradient passes as if nothing had been quantised; z - z is 0 exactly, so the value is the code's.
        return Latents(quantized.detach() + (z - z.detach()), {"vq": self.weight * loss}, codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, N) int64 -> latents (B, N, d) float32 of length 1."""
        return F.normalize(self.codebook[codes], dim=-1)

    @torch.no_grad()
    def finish_step(self, total: SumOverProcesses, *, taken: bool = True) -> None:
        """Move the running usage by what all processes counted since the last call, and restart dead codes.

        Every process calls it, and ends with the same codebook. It draws from torch's random state, which has to differ
        between processes: what a resumed run draws is the caller's to seed, as for everything random in a step.
        """
        counts, inputs = self._counts, self._inputs
        self._counts = self._inputs = None
        if counts is None or inputs is None or not taken:
            return
        counts = total(counts)
        self.usage.lerp_(counts * (len(counts) / counts.sum()), 1 - USAGE_DECAY)
        self._restart(inputs, total)

    def _nearest(self, z: Tensor) -> Tensor:
        """Of inputs (M, d) of length 1 the codes (M,) with the greatest cosine, in float32 whatever the caller computes in."""
        device = "cpu" if z.is_meta else z.device.type  # autocast knows no meta device, on which FLOPs are counted
        with torch.no_grad(), torch.autocast(device, enabled=False):
            directions = F.normalize(self.codebook, dim=-1).T  # (d, K)
            return torch.cat([(part @ directions).argmax(dim=-1) for part in torch.split(z, SEARCH_TOKENS)])

    def _observe(self, inputs: Tensor, codes: Tensor) -> None:
        counts = torch.zeros_like(self.usage).index_add_(0, codes.flatten(), torch.ones_like(inputs[:, 0]))
        self._counts = counts if self._counts is None else self._counts + counts
        self._inputs = inputs

    def _restart(self, inputs: Tensor, total: SumOverProcesses) -> None:
        """Put dead codes where inputs of this step are.

        The only exchange between processes is a sum, so it must be made of one process's input: each of W processes offers an
        input for a dead code with chance 1/W, and the code takes the sum only if exactly one of them offered. Otherwise the code
        waits for the next step. With W = 1 every dead code is restarted at once.
        """
        dead = (self.usage < DEAD_USAGE).nonzero()[:, 0]  # (X,), the same everywhere
        if not len(dead):
            return
        here = torch.ones(len(dead), 1, device=inputs.device)
        chosen = inputs[torch.randint(len(inputs), (len(dead),), device=inputs.device)]  # (X, d)
        offered = torch.rand_like(here) * total(here) < 1  # (X, 1)
        offers = total(torch.cat([chosen, here], dim=1) * offered)  # (X, d+1)
        once = offers[:, -1] == 1
        self.codebook[dead[once]] = offers[once, :-1]
        self.usage[dead[once]] = 1


def code_usage(codes: Tensor, num_codes: int) -> dict[str, float]:
    """How codes (any shape, int64) use a codebook: `code_usage`, the share of it that occurs, and `code_perplexity`, exp(entropy)."""
    share = torch.bincount(codes.flatten(), minlength=num_codes).double() / codes.numel()
    return {"code_usage": (share > 0).double().mean().item(), "code_perplexity": torch.special.entr(share).sum().exp().item()}
