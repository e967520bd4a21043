"""Folders of tokens: growth that survives interruptions, repair, an index that says what is there."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokens import MODEL, concatenate, make, make_codes

from texttok_cli import token_folder as module
from texttok_cli.errors import TokenFileError
from texttok_cli.token_folder import Statistics, TokenFolder, read_index, read_shards
from texttok_cli.tokens import Tokens, load_tokens, select


def open_folder(path: Path, **changes: Any) -> TokenFolder:
    return TokenFolder(path, **{"model_name": "tiny", "model_sha256": MODEL, "dtype": "fp32", "shard_size": 4, **changes})


def fill(path: Path, *parts: Tokens) -> TokenFolder:
    folder = open_folder(path)
    for part in parts:
        folder.add(part)
    folder.flush()
    return folder


def everything(path: Path) -> Tokens:
    return concatenate(list(read_shards(path)))


def test_shards_hold_all_in_order(tmp_path: Path) -> None:
    tokens = make(10)
    fill(tmp_path, *(select(tokens, range(i, i + 2)) for i in range(0, 10, 2)))
    assert [shard.images for shard in read_index(tmp_path).shards] == [4, 4, 2]
    again = everything(tmp_path)
    assert again.header == tokens.header and torch.equal(again.z, tokens.z)


def test_batches_of_any_size_wait_as_they_were_when_they_came(tmp_path: Path) -> None:
    """Some longer than a shard, and while others wait; what the caller does with its tensor later is no matter."""
    tokens, folder, first = make(25), open_folder(tmp_path), 0
    for size in (1, 2, 9, 3, 6, 1, 1, 2):
        part = select(tokens, range(first, first + size))
        folder.add(part)
        part.z.zero_()
        first += size
    folder.finish()
    assert [shard.images for shard in read_index(tmp_path).shards] == [12, 9, 4]
    again = everything(tmp_path)
    assert again.header == tokens.header and torch.equal(again.z, tokens.z)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_statistics_are_those_of_all_stored_latents(dtype: str, tmp_path: Path) -> None:
    tokens = make(9, dtype=dtype)
    folder = open_folder(tmp_path, dtype=dtype)
    for i in range(9):
        folder.add(select(tokens, [i]))
    folder.flush()
    index = read_index(tmp_path)
    sums = index.statistics()
    z = everything(tmp_path).z.double().flatten(0, 1)
    mean = torch.tensor(sums.total, dtype=torch.float64) / sums.count
    std = (torch.tensor(sums.squares, dtype=torch.float64) / sums.count - mean**2).sqrt()
    assert sums.count == 36
    assert torch.allclose(mean, z.mean(0), atol=1e-12) and torch.allclose(std, z.std(0, correction=0), atol=1e-12)
    assert index.mean == pytest.approx(mean.tolist()) and index.std == pytest.approx(std.tolist())


def test_a_channel_that_never_varies_has_no_spread_whatever_rounding_says() -> None:
    """The mean of squares may come out below the square of the mean, whose root would be no real number."""
    for n in range(1, 120):
        [std] = Statistics.of(torch.full((1, n, 1), 0.1)).std
        assert isinstance(std, float) and std < 1e-6


def test_the_index_says_whether_the_run_came_to_its_end_and_describes_what_is_there(tmp_path: Path) -> None:
    fill(tmp_path, make(5))
    assert not read_index(tmp_path).complete
    folder = open_folder(tmp_path)  # a run that goes on
    folder.add(make(5, seed=1, first=5))
    folder.finish()
    index = read_index(tmp_path)
    z = everything(tmp_path).z.double().flatten(0, 1)
    assert index.complete and index.mean == pytest.approx(z.mean(0).tolist())
    assert index.std == pytest.approx(z.std(0, correction=0).tolist())
    fill(tmp_path, make(1, first=10))
    assert not read_index(tmp_path).complete


def test_statistics_of_many_images_are_those_of_the_whole() -> None:
    z = torch.randn(600, 3, 8).half()
    found, whole = Statistics.of(z), z.double().flatten(0, 1)
    assert found.count == len(whole)
    torch.testing.assert_close(torch.tensor([found.total, found.squares]).double(), torch.stack([whole.sum(0), whole.square().sum(0)]))


def test_codes_have_no_statistics_and_a_mirrored_copy_is_another_entry(tmp_path: Path) -> None:
    codes = make_codes(4)
    mirrored = Tokens(codes.z.flip(1), codes.header.model_copy(update={"flipped": [True] * 4}))
    folder = open_folder(tmp_path, dtype="int16")
    folder.add(codes)
    folder.add(mirrored)
    folder.finish()
    index = read_index(tmp_path)
    assert (index.mean, index.std, index.statistics()) == (None, None, None)
    again, header = everything(tmp_path), codes.header
    assert torch.equal(again.z, torch.cat([codes.z, mirrored.z])) and again.header.flipped == [False] * 4 + [True] * 4
    resumed = open_folder(tmp_path, dtype="int16")
    assert resumed.has("i0", header.input_sha256[0], header.captions[0], flips=True)
    resumed.add(select(mirrored, [0]))
    resumed.finish()
    assert sorted(zip(everything(tmp_path).header.ids, everything(tmp_path).header.flipped, strict=True)) == [
        (f"i{i}", flipped) for i in range(4) for flipped in (False, True)
    ]


def test_an_image_of_another_class_is_encoded_again(tmp_path: Path) -> None:
    tokens = make(1, class_names=["flower/rose"])
    fill(tmp_path, tokens)
    key = ("i0", tokens.header.input_sha256[0], tokens.header.captions[0])
    assert open_folder(tmp_path).has(*key, "flower/rose") and not open_folder(tmp_path).has(*key, "flower/tulip")


def test_an_index_of_format_1_is_read_and_not_taken_for_complete(tmp_path: Path) -> None:
    fill(tmp_path, make(2)).finish()
    index = json.loads((tmp_path / "index.json").read_text())
    old = {key: value for key, value in index.items() if key not in ("complete", "mean", "std")} | {"texttok_index": 1}
    (tmp_path / "index.json").write_text(json.dumps(old))
    assert not read_index(tmp_path).complete and len(everything(tmp_path)) == 2
    open_folder(tmp_path).finish()
    assert json.loads((tmp_path / "index.json").read_text()) == index


def test_a_folder_opened_again_knows_what_it_has_and_goes_on(tmp_path: Path) -> None:
    fill(tmp_path, make(3))
    again = open_folder(tmp_path)
    header = make(3).header
    assert all(again.has(f"i{i}", header.input_sha256[i], header.captions[i]) for i in range(3))
    assert not again.has("i3", header.input_sha256[0], header.captions[0])
    assert not again.has("i0", header.input_sha256[1], header.captions[0])
    assert not again.has("i0", header.input_sha256[0], "another caption") and not again.has("i0", header.input_sha256[0], None)
    again.add(make(2, first=3))
    again.flush()
    assert everything(tmp_path).header.ids == ["i0", "i1", "i2", "i3", "i4"]


def test_no_caption_and_the_empty_one_are_told_apart(tmp_path: Path) -> None:
    fill(tmp_path, make(1, captions=None))
    digest = make(1).header.input_sha256[0]
    assert open_folder(tmp_path).has("i0", digest, None) and not open_folder(tmp_path).has("i0", digest, "")


def test_tokens_under_a_known_id_take_the_place_of_the_old_ones(tmp_path: Path) -> None:
    fill(tmp_path, make(4), make(4, first=4), make(1, first=8))
    new = [make(1, seed=5, first=first) for first in (1, 8)]  # one of four in its shard, and all of its shard
    assert fill(tmp_path, *new).replaced == {"i1", "i8"}
    assert not fill(tmp_path, new[0]).replaced  # made of the same
    fill(tmp_path, new[1])
    found = everything(tmp_path)
    assert found.header.ids == ["i0", "i2", "i3", "i4", "i5", "i6", "i7", "i1", "i8"]
    old = make(4)
    assert torch.equal(found.z[:3], old.z[[0, 2, 3]]) and torch.equal(found.z[7:], torch.cat([part.z for part in new]))
    index = read_index(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["index.json", *(shard.file for shard in index.shards)])
    assert index.statistics().count == 36
    assert torch.allclose(torch.tensor(index.statistics().total).double(), found.z.double().sum((0, 1)))
    assert open_folder(tmp_path).has("i1", new[0].header.input_sha256[0], new[0].header.captions[0])


def test_an_interruption_between_shard_and_index_loses_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, make(4))

    def stop(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    for again in (make(4, first=4), make(1, seed=5, first=1)):  # new images, and one that replaces
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, "write_json", stop)
            fill(tmp_path, again)
        assert everything(tmp_path).header == make(4).header  # the old state is whole
    fill(tmp_path, make(4, first=4))
    found = everything(tmp_path)
    assert found.header == make(8).header.model_copy(update={"original_sizes": found.header.original_sizes})


def test_a_shard_that_loses_tokens_is_written_again_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(tmp_path)
    for first in (0, 4, 8):
        folder.add(make(4, first=first))
    opened: list[str] = []

    def load(path: Path) -> Tokens:
        opened.append(path.name[:11])
        return load_tokens(path)

    monkeypatch.setattr(module, "load_tokens", load)
    changed = make(1, first=5)
    fill(tmp_path, Tokens(changed.z, changed.header.model_copy(update={"captions": ["another"]})))
    assert opened == ["shard-00003", "shard-00001", "shard-00004"]  # written, taken apart, written without it
    assert [shard.file[:11] for shard in read_index(tmp_path).shards] == ["shard-00000", "shard-00004", "shard-00002", "shard-00003"]
    assert sorted(everything(tmp_path).header.ids) == sorted(f"i{i}" for i in range(12))


def test_numbers_of_shards_go_on_past_five_digits(tmp_path: Path) -> None:
    fill(tmp_path, make(2))
    (tmp_path / "shard-00000.tok.safetensors").rename(tmp_path / "shard-99999.tok.safetensors")
    index = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(index.replace("shard-00000", "shard-99999"))
    fill(tmp_path, make(1, first=2))
    assert [shard.file[:12] for shard in read_index(tmp_path).shards] == ["shard-99999.", "shard-100000"]
    assert everything(tmp_path).header.ids == ["i0", "i1", "i2"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"model_sha256": "cd" * 32}, "holds tokens with model_sha256 abab"), ({"dtype": "int8"}, "holds tokens with dtype fp32, not int8")],
)
def test_a_folder_of_another_model_or_type_is_refused(changes: dict[str, str], reason: str, tmp_path: Path) -> None:
    fill(tmp_path, make(1))
    with pytest.raises(TokenFileError, match=reason):
        open_folder(tmp_path, **changes)


def drop_key(text: str, key: str) -> str:
    value = json.loads(text)
    del value[key]
    return json.dumps(value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "damaged: not a JSON object"),
        (lambda text: "[" * 100_000, "damaged: not a JSON object"),
        (lambda text: "[]", "damaged: not a JSON object"),
        (lambda text: drop_key(text, "texttok_index"), "another kind of file"),
        (lambda text: drop_key(text, "model_sha256"), "model_sha256: Field required"),
        (lambda text: text.replace('"texttok_index": 2', '"texttok_index": 7'), "update texttok"),
        (lambda text: text.replace("shard-00000", "../shard-00000"), "shards.0.file"),
        (lambda text: text.replace('"images": 1', f'"images": {10**30}'), "shards.0.images"),
        (lambda text: json.dumps({**json.loads(text), "shards": 2 * json.loads(text)["shards"]}), "it names a shard twice"),
        (lambda text: text.replace('"total": [', '"total": [0.5,'), "its statistics are not all of the same number of channels"),
        (lambda text: re.sub(r'("squares": \[)[^,]+', r"\g<1>1e9", text), "its mean and std are not those of its shards"),
        (lambda text: re.sub(r'("mean": \[)[^,]+', r"\g<1>9", text), "its mean and std are not those of its shards"),
        (lambda text: text.replace('"total": [', '"total": [1e300,'), "total.0: Input should be less than or equal to"),
        (lambda text: text.replace('"std": [', '"std": [0.5,'), "its statistics are not all of the same number of channels"),
    ],
)
def test_a_damaged_index_is_refused_in_one_line(damage: Callable[[str], str], reason: str, tmp_path: Path) -> None:
    fill(tmp_path, make(1))
    index = tmp_path / "index.json"
    index.write_text(damage(index.read_text()))
    for use in (open_folder, read_index):
        with pytest.raises(TokenFileError) as error:
            use(tmp_path)
        assert str(error.value).startswith(f"{index}: ") and reason in str(error.value) and "\n" not in str(error.value)


def test_a_shard_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, make(4), make(4, first=4))
    second = tmp_path / "shard-00001.tok.safetensors"
    second.write_bytes((tmp_path / "shard-00000.tok.safetensors").read_bytes())
    with pytest.raises(TokenFileError, match=r"is not the shard that index.json names"):
        everything(tmp_path)
    second.unlink()
    with pytest.raises(TokenFileError, match=r"shard-00001.tok.safetensors: no such file"):
        everything(tmp_path)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("damage", [lambda data: None, lambda data: data[:-1], lambda data: b"", lambda data: data[:-1] + b"\x01"])
def test_a_shard_that_is_missing_or_damaged_is_left_out_and_filled_again(
    number: int, damage: Callable[[bytes], bytes | None], tmp_path: Path
) -> None:
    fill(tmp_path, make(4), make(4, first=4)).finish()
    shard = tmp_path / f"shard-{number:05d}.tok.safetensors"
    data = damage(shard.read_bytes())
    shard.unlink() if data is None else shard.write_bytes(data)
    folder, header = open_folder(tmp_path), make(8).header
    there = [folder.has(f"i{i}", header.input_sha256[i], header.captions[i]) for i in range(8)]
    assert there == [i // 4 != number for i in range(8)]
    assert [left_out.file for left_out in folder.dropped] == [shard.name] and folder.ids == {f"i{i}" for i in range(8) if there[i]}
    with pytest.raises(TokenFileError, match=shard.name):  # nothing is changed yet
        everything(tmp_path)
    lost = make(4, first=4 * number)
    folder.add(lost)
    folder.finish()
    again = open_folder(tmp_path)
    assert again.index.complete and not again.dropped and not again.replaced
    assert sorted(everything(tmp_path).header.ids) == header.ids
    assert {path.name for path in tmp_path.iterdir()} == {"index.json", *(shard.file for shard in again.index.shards)}


def test_a_folder_without_its_damaged_shard_is_complete_though_nothing_is_added(tmp_path: Path) -> None:
    fill(tmp_path, make(4), make(4, first=4)).finish()
    (tmp_path / "shard-00000.tok.safetensors").write_bytes(b"")
    open_folder(tmp_path).finish()
    assert read_index(tmp_path).complete and everything(tmp_path).header.ids == ["i4", "i5", "i6", "i7"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "shard-00001.tok.safetensors"]


def test_a_folder_without_an_index_is_no_token_folder(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match=r"not a folder of tokens \(no index.json\)"):
        read_index(tmp_path)
