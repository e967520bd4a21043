import sys
from pathlib import Path

import pytest
import torch

from texttok_cli import assets
from texttok_cli.assets import ASSETS, is_offline, load_torch_weights, resolve
from texttok_cli.errors import BackendError
from texttok_cli.files import sha256_file

HERE = Path(__file__)


def one_line(error: pytest.ExceptionInfo[BackendError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def own_asset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An asset called `own`, carried by an installed package of one file that must not be imported."""
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    file = package / "weights.bin"
    file.write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = assets.Asset("own weights", "own-carrier", "carrier/weights.bin", sha256_file(file), 7, "MIT")
    monkeypatch.setitem(ASSETS, "own", entry)
    return file


def test_the_package_is_located_and_not_imported(own_asset: Path) -> None:
    assert resolve("own") == own_asset
    assert "carrier" not in sys.modules


def test_a_path_is_preferred_and_its_hash_checked(own_asset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.bin"
    copy.write_bytes(b"weights")
    assert resolve("own", path=copy) == copy
    copy.write_bytes(b"tampered")
    with pytest.raises(BackendError, match="sha256"):
        resolve("own", path=copy)
    with pytest.raises(BackendError, match="no such file"):
        resolve("own", path=tmp_path / "nowhere.bin")


def test_a_damaged_package_is_an_error(own_asset: Path) -> None:
    resolve("own")
    own_asset.write_bytes(b"damaged")
    with pytest.raises(BackendError) as error:
        resolve("own")
    assert "own-carrier" in one_line(error) and str(own_asset) in one_line(error)


def test_a_file_is_hashed_once(own_asset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve("own")
    monkeypatch.setattr("texttok_cli.files.sha256_file", lambda path: pytest.fail("hashed again"))
    resolve("own")


@pytest.mark.parametrize("name", ["minilm", "stlpips-vgg"])
def test_missing_and_offline_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_in_package", lambda asset: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, filename: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, filename: pytest.fail("the network was asked"))
    with pytest.raises(BackendError) as error:
        resolve(name, offline=True)
    assert 'pip install "texttok[offline]"' in one_line(error)


def test_the_hub_comes_after_its_cache(own_asset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ASSETS["own"]
    monkeypatch.setitem(
        ASSETS,
        "own",
        assets.Asset("own weights", "none", "no_such_module/w.bin", entry.sha256, 7, "MIT", assets.HubFile("me/own", "w.bin")),
    )
    for name in ("HF_HUB_OFFLINE", "TEXTTOK_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, filename: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, filename: asked.append(f"{repo}/{filename}") or str(own_asset))
    assert resolve("own") == own_asset and asked == ["me/own/w.bin"]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, filename: str(own_asset))
    assert resolve("own", offline=True) == own_asset and len(asked) == 1


@pytest.mark.parametrize("error", [ConnectionError, RuntimeError])  # the latter: huggingface-hub 1
def test_no_network_is_one_line(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo: str, filename: str) -> str:
        raise error("Name or service not known")

    for name in ("HF_HUB_OFFLINE", "TEXTTOK_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(assets, "_in_package", lambda asset: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, filename: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(BackendError) as raised:
        resolve("minilm")
    assert "sentence-transformers/all-MiniLM-L6-v2" in one_line(raised) and "texttok[offline]" in one_line(raised)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TEXTTOK_OFFLINE"])
def test_offline_by_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("HF_HUB_OFFLINE", "TEXTTOK_OFFLINE"):
        monkeypatch.delenv(each, raising=False)
    assert not is_offline() and is_offline(True)
    monkeypatch.setenv(name, "1")
    assert is_offline()
    monkeypatch.setenv(name, "0")
    assert not is_offline()


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_installed_packages_carry_what_the_table_says(name: str) -> None:
    if assets._in_package(ASSETS[name]) is None:
        pytest.skip(f"{ASSETS[name].package or 'no package'} carries {name}, and it is not installed")
    path = resolve(name, offline=True)
    if not isinstance(ASSETS[name].hub, assets.TorchFile):  # whose download is another file
        assert path.stat().st_size == ASSETS[name].bytes


def test_a_damaged_download_of_what_a_package_carries_too_is_downloaded_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(assets, "_in_package", lambda asset: None)
    hub = ASSETS["vgg16"].hub
    assert isinstance(hub, assets.TorchFile)
    hub.path.parent.mkdir(parents=True)
    hub.path.write_bytes(b"damaged")
    with pytest.raises(BackendError, match=r"instead of 2ecbe4ce0116 or 397923af...: remove it, or download it again"):
        resolve("vgg16", offline=True)


def test_torch_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(2)}, path)
    assert load_torch_weights(path)["a"].tolist() == [1, 1]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {"a": Evil()}])
def test_other_contents_are_refused_and_not_executed(content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "bad.pth")
    with pytest.raises(BackendError, match=r"bad\.pth"):
        load_torch_weights(Path("bad.pth"))
    assert not Path("executed").exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(9, 9), torch.eye(9).to_sparse(), torch.zeros(9, device="meta")],
    ids=["repeated", "sparse", "meta"],
)
def test_a_tensor_that_is_larger_than_what_is_stored_of_it_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"a": tensor}, tmp_path / "weights.pth")
    with pytest.raises(BackendError, match=r"weights\.pth: its a is larger than what the file holds of it"):
        load_torch_weights(tmp_path / "weights.pth")


def test_what_is_no_weight_file_is_refused(tmp_path: Path) -> None:
    for name, content in (("text.pth", b"hello"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BackendError, match=name):
            load_torch_weights(tmp_path / name)
