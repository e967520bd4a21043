"""Attention against its formula in float64, by every way that it is computed."""

import pytest
import torch
from torch import nn

from texttok_cli.models import layers
from texttok_cli.models.layers import attend, in_precision


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [24, 40])
@pytest.mark.parametrize(
    ("dtype", "train", "tolerance"),
    [(torch.float32, False, 1e-5), (torch.float32, True, 1e-5), (torch.bfloat16, False, 2e-2), (torch.bfloat16, True, 2e-2)],
)
def test_attention_is_its_formula(
    dtype: torch.dtype, train: bool, tolerance: float, keys: int, masked: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "AMX", amx)
    monkeypatch.setattr(layers, "LONG", 30)  # between 24 x 24 and 24 x 40
    monkeypatch.setattr(layers, "CACHED_SCORES", 24 * keys * 4)  # 4 heads at a time, of 3 x 2: an image's heads are divided
    generator = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(2, 3, length, 16, generator=generator).to(dtype) for length in (24, keys, keys))
    mask = torch.arange(keys) < torch.tensor([[keys], [5]])  # (2, keys)
    scores = q.double() @ k.double().mT / 4
    if masked:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    expected = (scores.softmax(dim=-1) @ v.double()).transpose(1, 2).flatten(2)
    y = attend(q.requires_grad_(train), k, v, mask if masked else None)
    assert y.shape == (2, 24, 48) and y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("amx", [False, True])
def test_padding_changes_no_bit_in_bf16(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "AMX", amx)
    q, k, v = torch.randn(3, 2, 4, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = (torch.arange(8) < 5).expand(2, 8)
    other = [torch.where(mask[:, None, :, None], t, 9.0) for t in (k, v)]
    assert torch.equal(attend(q, k, v, mask), attend(q, *other, mask))


def test_linears_rounded_once_compute_what_autocast_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).requires_grad_(False)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        assert in_precision(model, "fp32")[0].weight.dtype == torch.float32
        after = in_precision(model, "bf16")(x)
    assert [model[i].weight.dtype for i in range(3)] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert torch.equal(before, after)
