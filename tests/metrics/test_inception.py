"""The FID network and its resizes against clean-fid, torch-fidelity and torchmetrics' documented numbers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from gaussians import gaussian_of

from texttok_cli.assets import ASSETS, resolve
from texttok_cli.config import Resize
from texttok_cli.data import eval_batches, open_dataset
from texttok_cli.errors import BackendError
from texttok_cli.files import sha256_file
from texttok_cli.metrics.distribution import kid
from texttok_cli.metrics.inception import FidInception
from texttok_cli.metrics.resize import RESIZES
from texttok_cli.metrics.statistics import frechet_distance


def images(n: int = 2, size: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ resizes


def test_the_resizes_are_those_of_the_option() -> None:
    assert set(RESIZES) == set(get_args(Resize))


@pytest.mark.parametrize("size", [40, 299, 400])
def test_tf1_is_torch_fidelitys(size: int) -> None:
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    x = images(size=size)
    assert torch.equal(RESIZES["tf1-bilinear"](x), theirs(x.float(), size=(299, 299), align_corners=False))


@pytest.mark.parametrize("size", [40, 400])
@pytest.mark.parametrize(("ours", "mode"), [("clean", "clean"), ("legacy-pytorch", "legacy_pytorch")])
def test_resizes_are_clean_fids(ours: Resize, mode: str, size: int) -> None:
    resizer = pytest.importorskip("cleanfid.resize").build_resizer(mode)
    x = images(size=size)
    theirs = np.stack([resizer(image.permute(1, 2, 0).numpy()) for image in x])
    torch.testing.assert_close(RESIZES[ours](x), torch.from_numpy(theirs).permute(0, 3, 1, 2), rtol=0, atol=1e-4)


# ------------------------------------------------------------------ network


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def script() -> Any:
    with pytest.warns((FutureWarning, DeprecationWarning)):  # by the version of torch
        return torch.jit.load(resolve("inception", offline=True), map_location="cpu")


@torch.no_grad()
@pytest.mark.parametrize("name", get_args(Resize))
def test_pool_is_the_packages_own(name: Resize, network: FidInception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "resize", name)
    x = images(size=64)
    assert_close(network(x).pool, script()((RESIZES[name](x) - 128) / 128))


def test_real_photographs_have_clean_fids_features(photos: Path, network: FidInception, monkeypatch: pytest.MonkeyPatch) -> None:
    """clean-fid's whole path (its resizer, its batches, its normalisation) around the package's network."""
    resizer = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    wrapper = pytest.importorskip("cleanfid.inception_torchscript").InceptionV3W
    theirs = wrapper.__new__(wrapper)
    torch.nn.Module.__init__(theirs)
    theirs.layers, theirs.resize_inside = script(), False
    batch = next(eval_batches(open_dataset([photos]), image_size=128, batch_size=4, on_error=lambda name, why: None))
    resized = np.stack([resizer(image.permute(1, 2, 0).numpy()).transpose(2, 0, 1) for image in batch.images])
    monkeypatch.setattr(network, "resize", "clean")
    with torch.no_grad():
        assert_close(network(batch.images).pool, theirs(torch.from_numpy(resized)))


@pytest.fixture
def whole(whole_weights: Path, monkeypatch: pytest.MonkeyPatch) -> FidInception:
    asset = dataclasses.replace(ASSETS["inception-logits"], sha256=sha256_file(whole_weights)[:8])
    monkeypatch.setitem(ASSETS, "inception-logits", asset)
    return FidInception(head=True, weights=whole_weights)


def test_all_features_are_torch_fidelitys(whole: FidInception, whole_weights: Path, network: FidInception) -> None:
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    theirs = extractor("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(whole_weights))
    seen: list[torch.Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = images()
    pool, logits = theirs(x)
    ours = whole(x)
    assert_close(ours.pool, pool)
    assert ours.logits is not None
    assert_close(ours.logits, logits)
    # ADM: mixed_6/conv:0[..., :7] of a channels-last tensor, flattened
    assert_close(ours.spatial, seen[0].permute(0, 2, 3, 1)[..., :7].reshape(2, 2023))
    assert_close(network(x).pool, pool)
    assert network(x).logits is None and network.sha256 == ASSETS["inception"].sha256


def test_autocast_does_not_change_it(network: FidInception) -> None:
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x).pool
    assert mixed.dtype == torch.float32 and torch.equal(mixed, network(x).pool)


def test_batch_size_does_not_matter(network: FidInception) -> None:
    x = images(3)
    assert_close(torch.cat([network(x[:1]).pool, network(x[1:]).pool]), network(x).pool)


def test_missing_head_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(BackendError) as error:
        FidInception(head=True, offline=True)
    assert "torch-fidelity/releases" in str(error.value) and "\n" not in str(error.value)
    other = tmp_path / "other.pth"
    other.write_bytes(b"something else")
    with pytest.raises(BackendError, match="instead of 6726825d"):
        FidInception(head=True, weights=other)


# ------------------------------------------------------------------ torchmetrics' documentation


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The images of its examples for FID and KID, two times 100: drawn after a seed and after a network's random start."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    monkeypatch.setattr(extractor, "load_state_dict", lambda self, state: None)
    torch.save({}, tmp_path / "none.pth")
    torch.manual_seed(42)
    extractor("inception", ["64"], feature_extractor_weights_path=str(tmp_path / "none.pth"))
    ranges = ((0, 200), (100, 255))
    return torch.cat([torch.randint(low, high, (100, 3, 299, 299), dtype=torch.uint8) for low, high in ranges])


@torch.no_grad()
def test_fid_64_is_as_torchmetrics_documents(network: FidInception, documented: torch.Tensor) -> None:
    features = torch.cat([network.stem[:4]((x.float() - 128) / 128).mean(dim=(2, 3)) for x in documented.split(20)])
    assert frechet_distance(gaussian_of(features[:100]), gaussian_of(features[100:])) == pytest.approx(12.6388, abs=5e-5)


def test_kid_2048_is_as_torchmetrics_documents(network: FidInception, documented: torch.Tensor, kept: Callable[..., torch.Tensor]) -> None:
    features = kept("documented", lambda: torch.cat([network(x).pool for x in documented.split(20)]))
    mean, spread = kid(features[100:], features[:100], subset_size=50)
    # 0.0312 and 0.0025 there, over other random subsets of the same 100: the mean is off by some spread / sqrt(subsets)
    assert mean == pytest.approx(0.0312, abs=6e-4)
    assert spread == pytest.approx(0.0025, abs=6e-4)
