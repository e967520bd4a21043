"""Losses against independent computations."""

import sys
import types

import pytest
import torch

from texttok_cli.losses import Perceptual, l2

pytest.importorskip(
    "stlpips_pytorch", reason="the package that carries the ST-LPIPS weights is not installed: pip install 'texttok[offline]'"
)


@pytest.fixture(scope="module", params=["alex", "vgg"])
def pair(request: pytest.FixtureRequest) -> tuple[Perceptual, torch.nn.Module]:
    """Ours, and the package's own network, whose unused imports (a debugger, a printer) are stood in for."""
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):
        if name not in sys.modules:
            module = types.ModuleType(name)
            setattr(module, attribute, None)
            sys.modules[name] = module
    from stlpips_pytorch import stlpips

    theirs = stlpips.LPIPS(net=request.param, variant="shift_tolerant", verbose=False)
    return Perceptual(f"stlpips-{request.param}"), theirs


@pytest.mark.parametrize("size", [64, 128])
def test_perceptual_equals_the_package(pair: tuple[Perceptual, torch.nn.Module], size: int) -> None:
    ours, theirs = pair
    x, y = torch.rand(2, 3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y), theirs(x, y, normalize=True).flatten(), rtol=1e-5, atol=1e-7)


def test_perceptual_is_frozen_differentiable_and_fp32_under_autocast(pair: tuple[Perceptual, torch.nn.Module]) -> None:
    ours, _ = pair
    assert not any(p.requires_grad for p in ours.parameters())
    x, y = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = ours(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x, y), plain)
    x.requires_grad_()
    ours(x, y).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert torch.equal(ours(y, y), torch.zeros(1))


def test_l2_is_the_mean_over_all_elements() -> None:
    x, y = torch.rand(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sum((a - b) ** 2 for a, b in zip(x.double().flatten().tolist(), y.double().flatten().tolist(), strict=True)) / x.numel()
    assert l2(x, y).item() == pytest.approx(expected, rel=1e-6)
