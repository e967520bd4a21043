"""Attention against its formula in float64, by every way that it is computed."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from texttok_cli.config.schema import Backbone
from texttok_cli.models import layers
from texttok_cli.models.layers import Attention, CrossAttention, attend, in_precision


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


@pytest.mark.parametrize("packs", [False, True])
def test_linears_rounded_once_compute_what_autocast_does(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if packs and not layers.PACKS:
        pytest.skip("this CPU has no bf16 instructions to pack weights for")
    monkeypatch.setattr(layers, "PACKS", packs)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 32, bias=False)).requires_grad_(False)
    x = torch.randn(3, 20, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        assert in_precision(model, "fp32")[0].weight.dtype == torch.float32
        after = in_precision(model, "bf16")(x)
        assert torch.equal(after, in_precision(model, "bf16")(x))
    assert [model[i].weight.dtype for i in range(3)] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert [isinstance(model[i], nn.Linear) for i in (0, 2)] == [not packs] * 2
    assert torch.equal(before, after)


def normalised(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """An RMSNorm over the last axis, in float32."""
    return x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


@pytest.mark.parametrize("kind", [Attention, CrossAttention])
def test_queries_and_keys_are_normalised_by_head_where_asked(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, heads, width = kind(Backbone(depth=1, width=32, heads=2, qk_norm=True)), 2, 16
    with torch.no_grad():
        module.norm_q.weight.uniform_(0.5, 3)
        module.norm_k.weight.uniform_(0.5, 3)
    x, other = 5 * torch.randn(2, 6, 32), torch.randn(2, 4, 32)
    if isinstance(module, Attention):
        q, k, v = module.qkv(x).chunk(3, dim=-1)
        y = module(x, None)
    else:
        q, (k, v) = module.q(x), module.kv(other).chunk(2, dim=-1)
        y = module(x, other, None)
    q, k, v = (t.unflatten(-1, (heads, width)).transpose(1, 2) for t in (q, k, v))
    scores = normalised(q, module.norm_q.weight) @ normalised(k, module.norm_k.weight).mT / width**0.5
    expected = module.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


def test_that_norm_is_in_float32_under_autocast() -> None:
    norm = Attention(Backbone(depth=1, width=32, heads=2, qk_norm=True)).norm_q
    x = torch.randn(2, 2, 6, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, normalised(x, norm.weight))


def test_convolutions_that_measure_are_not_rounded_whatever_the_program_asked_for() -> None:
    code = """
import torch
from texttok_cli.models.layers import exact_convolutions

conv = torch.backends.cudnn.conv

def check():
    before = conv.fp32_precision
    with exact_convolutions():
        torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1))
        assert conv.fp32_precision == "ieee" and torch.backends.cudnn.enabled and torch.backends.cudnn.deterministic
    assert conv.fp32_precision == before

torch.backends.cudnn.deterministic = True
check()
torch.backends.fp32_precision = "tf32"
check()
conv.fp32_precision = "ieee"
check()
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # these settings are of the whole process
