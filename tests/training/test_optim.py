"""Clipping of gradients against torch's."""

import pytest
import torch
from torch import nn

from texttok_cli.training.optim import clip_gradients, gradient_norm


def with_gradients() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 3))
    model[:2](torch.randn(4, 5)).square().sum().backward()  # the last has no gradients
    return model


@pytest.mark.parametrize("share", [None, 2.0, 0.25])
def test_gradients_are_clipped_as_torch_clips_them(share: float | None) -> None:
    ours, theirs, untouched = with_gradients(), with_gradients(), with_gradients()
    norm = gradient_norm(ours.parameters())
    limit = None if share is None else share * float(norm)

    clip_gradients(ours.parameters(), norm, limit)

    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), limit or float("inf")))
    for mine, other, before in zip(*(model[:2].parameters() for model in (ours, theirs, untouched)), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
        assert torch.equal(mine.grad, before.grad) == (share != 0.25)
