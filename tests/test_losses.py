import sys
import types
from typing import Any, get_args

import pytest
import torch

from texttok_cli.assets import ASSETS, _in_package
from texttok_cli.config.schema import PerceptualLoss
from texttok_cli.losses import Perceptual, PerceptualNet, l2

NETS = get_args(PerceptualNet)
if any(_in_package(ASSETS[net]) is None for net in NETS):
    pytest.skip("stlpips-pytorch is not installed", allow_module_level=True)


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def perceptual(net: PerceptualNet) -> Perceptual:
    return Perceptual(net, offline=True)


@pytest.fixture
def theirs(net: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's own network. It imports two libraries that it does not use."""
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):
        module = types.ModuleType(name)
        setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    stlpips = pytest.importorskip("stlpips_pytorch.stlpips")
    return stlpips.LPIPS(net=net.removeprefix("stlpips-"), variant="shift_tolerant", verbose=False)


def pair(size: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, size, size, generator=generator), torch.rand(2, 3, size, size, generator=generator)


def test_the_schema_names_the_same_networks() -> None:
    assert get_args(PerceptualLoss.model_fields["net"].annotation) == NETS


def test_l2_is_the_mean_square() -> None:
    x, y = pair(8)
    torch.testing.assert_close(l2(x, y), ((x - y) ** 2).mean())


@pytest.mark.parametrize("size", [64, 65, 128])
def test_distance_and_gradient_are_the_packages(size: int, perceptual: Perceptual, theirs: Any) -> None:
    x, y = pair(size)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = perceptual(ours_x, y)
    reference = theirs(theirs_x, y, normalize=True).flatten()
    assert ours.shape == (2,)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)
    ours.sum().backward()
    reference.sum().backward()
    assert ours_x.grad is not None and theirs_x.grad is not None
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-3, atol=1e-4 * theirs_x.grad.abs().max().item())


def test_it_is_frozen(perceptual: Perceptual) -> None:
    assert not perceptual.training
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())


def test_distance_grows_with_the_change(perceptual: Perceptual) -> None:
    x, y = pair(64)
    near, far = perceptual(x, x + 0.05 * (y - x)), perceptual(x, x + 0.5 * (y - x))
    assert torch.equal(perceptual(x, x), torch.zeros(2))
    assert (near > 0).all() and (near < far).all()


def test_gradient_is_finite_where_features_are_equal_or_zero(perceptual: Perceptual) -> None:
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    perceptual(x, torch.zeros(1, 3, 64, 64)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_autocast_does_not_change_it(perceptual: Perceptual) -> None:
    x, y = pair(64)
    plain = perceptual(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = perceptual(x, y)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain)
