"""What stands between the two halves. A bottleneck turns the tokenizer's output into latents.

Letters: B batch, N latent tokens, D width, d latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Latents:
    """Latent tokens `z` (B, N, d), and the losses a bottleneck asks for by name (none for the continuous one)."""

    z: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


class Continuous(nn.Module):
    """Sec. 3.2: a linear projection to d channels, neither KL nor quantizer."""

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, latent_dim)

    def forward(self, tokens: Tensor) -> Latents:
        """(B, N, D) -> latents (B, N, d)."""
        return Latents(self.proj(tokens))
