"""Where images come from: files as they are or cropped, ADM's .npz batches and statistics."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussians import gaussian_of

from texttok_cli.data import Dataset, Item, open_dataset
from texttok_cli.errors import DataError
from texttok_cli.metrics import sources
from texttok_cli.metrics.sources import FileImages, NpzImages, TensorImages, read_npz_reference, write_statistics, writing_npz
from texttok_cli.metrics.stored import by_number

Draw = Callable[..., Path]


def batch(n: int = 5, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_adm_batch_is_read_in_parts(save: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "samples.npz", batch())
    found = NpzImages(tmp_path / "samples.npz")
    assert (found.size, found.ids) == (8, ["0", "1", "2", "3", "4"])
    parts = list(found.batches([1, 3, 4], 2))
    assert [indices.tolist() for indices, _ in parts] == [[1, 3], [4]]
    expected = torch.from_numpy(batch()).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat([images for _, images in parts]), expected[[1, 3, 4]])


def test_the_first_image_of_a_batch_is_read_too_and_again(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", batch())
    found = NpzImages(tmp_path / "samples.npz")
    for _ in range(2):
        [(indices, images)] = found.batches([0, 4], 8)
        assert indices.tolist() == [0, 4] and torch.equal(images, torch.from_numpy(batch()).permute(0, 3, 1, 2)[[0, 4]])


def test_a_written_batch_is_numpys(tmp_path: Path) -> None:
    images = torch.from_numpy(batch()).permute(0, 3, 1, 2)
    with zipfile.ZipFile(tmp_path / "samples.npz", "w") as archive, writing_npz(archive, 5, 8) as write:
        write(images[:2])
        write(images[2:])
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], batch())


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["10.png", "9.png", "02.jpg"], ["02.jpg", "9.png", "10.png"]),
        (["10.png", "9.png", "a.png"], None),
        (["10.png", "9.png", "².png"], None),
    ],
)
def test_images_go_by_number_where_all_names_are_numbers(names: list[str], ordered: list[str] | None) -> None:
    dataset = Dataset([Item(name, name) for name in names])
    assert [item.id for item in by_number(dataset).items] == (ordered or names)


@pytest.mark.parametrize("array", [batch()[:0], batch().astype(np.float32), batch()[..., :1], batch()[:, :4], np.asfortranarray(batch())])
def test_other_arrays_are_refused(array: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", array)
    with pytest.raises(DataError, match=r"not uint8 \(n, S, S, 3\)"):
        NpzImages(tmp_path / "samples.npz")


def test_a_damaged_batch_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, batch())
    path.write_bytes(path.read_bytes()[:300])
    for read in (NpzImages, read_npz_reference):
        with pytest.raises(DataError, match=r"samples\.npz") as error:
            read(path)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="holds neither statistics"):
        np.savez(path, other=batch())
        read_npz_reference(path)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of four and two numbers in place of 2,048 and 2,023."""
    monkeypatch.setattr(sources, "WIDTHS", {"pool": 4, "spatial": 2})


def test_statistics_come_back_and_pickles_do_not(tmp_path: Path, narrow: None) -> None:
    path = tmp_path / "stats.npz"
    found = {kind: gaussian_of(torch.randn(9, width)) for kind, width in (("pool", 4), ("spatial", 2))}
    write_statistics(path, found)
    with np.load(path) as file:
        assert set(file) == {"mu", "sigma", "mu_s", "sigma_s", "n"}
    again = read_npz_reference(path)
    assert again.images is None
    for kind, gaussian in found.items():
        assert torch.equal(again.given[kind].mean, gaussian.mean) and torch.equal(again.given[kind].covariance, gaussian.covariance)
        assert again.given[kind].n == 9
    np.savez(path, mu=np.array([print]), sigma=np.eye(1))
    with pytest.raises(DataError, match="of statistics or images"):
        read_npz_reference(path)


def test_statistics_that_can_not_be_are_refused(tmp_path: Path, narrow: None) -> None:
    path = tmp_path / "stats.npz"
    for mean, covariance, what in (
        (np.zeros(3), np.eye(2), "don't belong"),
        (np.full(4, np.nan), np.eye(4), "not finite"),
        (np.zeros(3), np.eye(3), "of 3 features"),
    ):
        np.savez(path, mu=mean, sigma=covariance)
        with pytest.raises(DataError, match=what):
            read_npz_reference(path)


@pytest.mark.parametrize(
    "header", ["{'descr': '|u1'", "(" * 5000, "if x:\n  a\n b\n", "{'descr': '|u1', 'fortran_order': False, 'shape': (10**9, 9)}"]
)
@pytest.mark.parametrize("member", ["arr_0", "mu"])
def test_a_damaged_header_is_one_short_line(member: str, header: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in (member, "sigma"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(DataError) as error:
        read_npz_reference(tmp_path / "a.npz")
    assert str(error.value).startswith(f"{tmp_path}/a.npz: ") and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_member_that_is_no_array_a_huge_count_and_a_kind_of_packing_are_one_line(tmp_path: Path, narrow: None) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", b"junk")
        archive.writestr("sigma.npy", b"junk")
    with pytest.raises(DataError, match=r"mu and sigma are \|S4 and \|S4, not real numbers"):
        read_npz_reference(path)
    np.savez(path, mu=np.zeros(4) + 1j, sigma=np.eye(4))
    with pytest.raises(DataError, match="complex128 and float64, not real numbers"):
        read_npz_reference(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(DataError, match="don't belong together"):
        read_npz_reference(path)
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), n=-5)
    with pytest.raises(DataError, match="are said to be of -5 images"):
        read_npz_reference(path)
    np.savez(path, mu=np.ones(4, ">f8"), sigma=np.eye(4, dtype=np.float32), n=8)  # of another machine
    assert read_npz_reference(path).given["pool"].mean.tolist() == [1, 1, 1, 1]
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), n=np.inf)
    with pytest.raises(DataError, match=r"not an \.npz of statistics or images"):
        read_npz_reference(path)
    np.savez(path, arr_0=batch())
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 6] = 255  # the version of zip that is needed
    path.write_bytes(data)
    with pytest.raises(DataError, match="no image batch"):
        NpzImages(path)


def test_samples_are_taken_as_they_are_and_originals_cropped(draw: Draw, tmp_path: Path) -> None:
    for seed in range(2):
        draw(tmp_path / f"{seed}.png", seed)
    found = FileImages(open_dataset([tmp_path]))
    assert (found.size, found.crop) == (32, "as stored")
    assert [images.shape for _, images in found.batches([0, 1], 8)] == [(2, 3, 32, 32)]
    draw(tmp_path / "2.png", 2, (48, 32))
    with pytest.raises(DataError, match=r"2\.png: is 48 x 32"):
        list(FileImages(open_dataset([tmp_path])).batches([0, 1, 2], 8))
    cropped = FileImages(open_dataset([tmp_path]), crop_to=16)
    assert [images.shape for _, images in cropped.batches([0, 1, 2], 8)] == [(3, 3, 16, 16)]
    assert "16" in cropped.crop


def test_an_evaluation_is_of_all_images_or_of_none(draw: Draw, tmp_path: Path) -> None:
    draw(tmp_path / "0.png")
    draw(tmp_path / "1.png", 1, part=0.5)
    with pytest.raises(DataError, match=r"1\.png.*fix or remove"):
        list(FileImages(open_dataset([tmp_path])).batches([0, 1], 8))


def test_a_fingerprint_changes_with_the_images(draw: Draw, tmp_path: Path) -> None:
    draw(tmp_path / "0.png")
    before = FileImages(open_dataset([tmp_path])).fingerprint()
    assert FileImages(open_dataset([tmp_path])).fingerprint() == before
    assert FileImages(open_dataset([tmp_path]), crop_to=16).fingerprint() != before
    os.utime(tmp_path / "0.png", (1, 1))  # as of another picture whose file has as many bytes
    later = FileImages(open_dataset([tmp_path])).fingerprint()
    draw(tmp_path / "0.png", 5)
    os.utime(tmp_path / "0.png", (1, 1))
    assert len({before, later, FileImages(open_dataset([tmp_path])).fingerprint()}) == 3


def test_an_identity_says_which_image_has_which_size(draw: Draw, tmp_path: Path) -> None:
    """It is the same wherever the folder lies, and not if two images swap places."""
    found = set()
    for folder, (first, second) in (("one", (8, 16)), ("copy", (8, 16)), ("swapped", (16, 8))):
        draw(tmp_path / folder / "a.png", size=(first, first))
        draw(tmp_path / folder / "b.png", size=(second, second))
        found.add(FileImages(open_dataset([tmp_path / folder]), crop_to=8).identity())
    assert len(found) == 2


def test_arrays_that_a_small_file_blows_up_are_not_unpacked(tmp_path: Path, narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_ARRAY_BYTES", 10_000)
    path = tmp_path / "stats.npz"
    np.savez_compressed(path, mu=np.zeros(4), sigma=np.zeros((100, 100)))
    with pytest.raises(DataError, match="sigma takes 80,128 bytes, over the limit of 10,000"):
        read_npz_reference(path)
    np.savez_compressed(path, arr_0=batch(), arr_1=np.zeros(10_000, np.int64))
    assert NpzImages(path).labels() is None
    np.savez_compressed(path, arr_0=batch(), arr_1=np.arange(5))
    assert NpzImages(path).labels() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("read", [NpzImages, read_npz_reference])
def test_a_file_that_is_not_there_is_not_called_damaged(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / "none.npz")
    assert str(caught.value) == f"{tmp_path / 'none.npz'}: no such file"


def test_tensors_are_images_too_in_one_or_several() -> None:
    images = torch.from_numpy(batch()).permute(0, 3, 1, 2)
    whole, parts = TensorImages(images), TensorImages(part for part in images.split(2))
    assert (whole.size, whole.ids) == (8, ["0", "1", "2", "3", "4"]) and whole.identity() == parts.identity()
    assert TensorImages(images[:4]).fingerprint() != whole.fingerprint() == parts.fingerprint()
    for found in (whole, parts):
        [(first, some), (second, rest)] = found.batches([1, 3, 4], 2)
        assert (first.tolist(), second.tolist()) == ([1, 3], [4]) and torch.equal(torch.cat([some, rest]), images[[1, 3, 4]])


@pytest.mark.parametrize("shapes", [[(3, 8, 8)], [(2, 1, 8, 8)], [(2, 3, 8, 4)], [(2, 3, 8, 8), (2, 3, 4, 4)]])
def test_tensors_of_other_shapes_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(DataError, match=r"not torch.uint8 \(n, 3, S, S\) of one size S"):
        TensorImages(torch.zeros(shape, dtype=torch.uint8) for shape in shapes)


def test_floats_and_nothing_are_no_images() -> None:
    with pytest.raises(DataError, match=r"images are torch.float32 \(2, 3, 8, 8\), not torch.uint8"):
        TensorImages(torch.zeros(2, 3, 8, 8))
    for nothing in ([], torch.zeros(0, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(DataError, match="no image to evaluate"):
            TensorImages(nothing)


@pytest.mark.parametrize("shape", [(10_000_001, 1, 1, 3), (1, 10_001, 10_001, 3)])
def test_a_batch_that_a_small_file_only_claims_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with zipfile.ZipFile(tmp_path / "samples.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with pytest.raises(DataError, match=r"samples\.npz: arr_0 is .*, over the limit of 10,000,000 images"):
        NpzImages(tmp_path / "samples.npz")
