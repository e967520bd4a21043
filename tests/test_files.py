"""Files: whole or not there; headers checked before anything is allocated."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from texttok_cli import files
from texttok_cli.errors import DataError, TextTokError, TokenFileError
from texttok_cli.files import (
    META_KEY,
    alone_in,
    atomic_path,
    load_safetensors,
    parse_header,
    read_header,
    save_safetensors,
    sha256_tensors,
    write_json,
    write_text,
)


def raw(tensors: dict[str, object], data: bytes = b"", meta: object = None) -> bytes:
    header = json.dumps({"__metadata__": {META_KEY: "{}"} if meta is None else meta, **tensors}).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(begin: int, end: int, *shape: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folders_made_for_nothing_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for folder in ("mine", "runs/a", "runs/b"):
        with pytest.raises(DataError), alone_in(tmp_path / folder):
            if folder == "runs/b":
                (tmp_path / folder / "recipe.yaml").touch()
            raise DataError("no such file")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["mine", "runs", "runs/b", "runs/b/recipe.yaml"]
    with alone_in(tmp_path / "mine" / "deep"):
        assert names(tmp_path / "mine") == ["deep"]
    assert names(tmp_path / "mine") == []


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half of the ne")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"old": 1} and names(tmp_path) == ["a.json"]
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1} and names(tmp_path) == ["a.json"]


def test_an_error_names_the_file_that_it_is_about(tmp_path: Path) -> None:
    for name, named in ((None, str(tmp_path / "a")), ("elsewhere", "elsewhere")):
        with pytest.raises(OSError, match="No space") as error, atomic_path(tmp_path / "a"):
            raise OSError(28, "No space left on device", name)
        assert error.value.filename == named


def test_a_file_name_of_other_bytes_is_written_escaped(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "caf\u00e9 \udcff.png")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "caf\u00e9 \\udcff.png"


def test_whether_case_counts_is_asked_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "to" / "be" / "made"
    (tmp_path / "a").touch()
    ignores = (tmp_path / "A").exists()
    assert files._ignores_case(folder) is files._ignores_case(tmp_path) is ignores and names(tmp_path) == ["a"]
    honest = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: honest(path.with_name(path.name.lower())))
    assert files._ignores_case(folder)
    files.check_distinct([folder / "a", folder / "b", tmp_path / "A", folder / "a"])
    for one, other in (("cat.png", "Cat.PNG"), ("caf\u00e9", "cafe\u0301"), ("Stra\u00dfe", "STRASSE")):
        with pytest.raises(DataError, match=f"{other}: would be written over .*{one}, as on this disk"):
            files.check_distinct([folder / one, folder / other])


def test_a_file_gets_the_rights_the_umask_gives(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a", {"z": torch.zeros(2)}, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_is_an_os_error_that_leaves_the_old_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"z": torch.zeros(4)}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_safetensors(path, {"z": torch.ones(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(load_safetensors(path, error=TokenFileError)[1]["z"], torch.zeros(4)) and names(tmp_path) == [path.name]


def test_tensors_and_header_come_back_and_bytes_repeat(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(2, 3), "a": torch.arange(5, dtype=torch.int8), "none": torch.zeros(0, 4), "scalar": torch.tensor(2.0)}
    header = {"text": 'caf\u00e9 \u732b "quoted" \n', "list": [1, None, 2.5]}
    save_safetensors(tmp_path / "a", tensors, header)
    found, read = load_safetensors(tmp_path / "a", error=TokenFileError)
    assert found == header and read.keys() == tensors.keys() and all(torch.equal(read[k], tensors[k]) for k in tensors)
    save_safetensors(tmp_path / "b", dict(reversed(tensors.items())), header)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_header_that_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_HEADER_BYTES", 20_000)
    save_safetensors(tmp_path / "a", {"z": torch.zeros(1)}, {"text": "x" * 17_000})
    read_header(tmp_path / "a", error=TokenFileError)
    with pytest.raises(TextTokError, match="its header would have over 20,000 bytes"):
        save_safetensors(tmp_path / "b", {"z": torch.zeros(1)}, {"text": "\u732b" * 3_000})
    assert names(tmp_path) == ["a"]


WHOLE = raw({"z": entry(0, 8, 2)}, bytes(8))
HOSTILE = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x10\0\0", "not a safetensors file"),
    "a pickle": (pickle.dumps({"z": [0.0] * 1000}), "not a safetensors file"),
    "a zip, as torch.save writes": (b"PK\x03\x04" + bytes(200), "not a safetensors file"),
    "over the header limit": ((100_000_001).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "cut within the header": (WHOLE[:30], "cut short within its header"),
    "cut within the data": (WHOLE[:-1], "cut short: holds"),
    "appended": (WHOLE + b"!", "has something appended"),
    "no JSON": ((4).to_bytes(8, "little") + b"\xff{]}", "header is damaged"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "header is damaged"),
    "nested": ((200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995, "header is damaged"),
    "overlap": (raw({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, bytes(12)), "header is damaged"),
    "twice the same bytes": (raw({"a": entry(0, 8, 2), "b": entry(0, 8, 2)}, bytes(8)), "header is damaged"),
    "a hole": (raw({"a": entry(0, 8, 2), "b": entry(12, 20, 2)}, bytes(20)), "header is damaged"),
    "begins late": (raw({"a": entry(4, 12, 2)}, bytes(12)), "header is damaged"),
    "shape and bytes differ": (raw({"a": entry(0, 8, 3)}, bytes(8)), "header is damaged"),
    "negative sides": (raw({"a": entry(0, 4, -1, -1)}, bytes(4)), "header is damaged"),
    "begins below zero": (raw({"a": entry(-4, 4, 2)}, bytes(4)), "header is damaged"),
    "a terabyte": (raw({"a": entry(0, 4 << 40, 1 << 40)}, bytes(8)), "cut short: holds"),
    "beyond 64 bits": (raw({"a": entry(0, 0, 1 << 63, 0)}), "header is damaged"),
    "a fraction": (raw({"a": entry(0, 4, 1.0)}, bytes(4)), "header is damaged"),
    "a million sides": (raw({"a": entry(0, 4, *[1 << 47] * 1_000_000)}, bytes(4)), "header is damaged"),
    "offsets of a fraction": (raw({"a": entry(0.5, 10**400, 1)}, bytes(4)), "header is damaged"),  # type: ignore[arg-type]
    "an unknown type": (raw({"a": entry(0, 4, 1, dtype="C64")}, bytes(4)), "header is damaged"),
    "not ours": (raw({"a": entry(0, 4, 1)}, bytes(4), meta={"format": "pt"}), "not written by texttok"),
    "our header no object": (raw({}, meta={META_KEY: "3"}), "not written by texttok"),
    "our header no JSON": (raw({}, meta={META_KEY: "{"}), "header is damaged"),
    "metadata no object": (raw({}, meta=META_KEY), "header is damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_or_lying_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, reason = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(TokenFileError, match=reason) as error:
        load_safetensors(path, error=TokenFileError)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_what_the_library_reads_more_strictly_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    twice = json.dumps({"__metadata__": {META_KEY: "{}"}, "a": entry(0, 4, 1)})[:-1] + ', "a": ' + json.dumps(entry(0, 4, True)) + "}"
    path.write_bytes(len(twice).to_bytes(8, "little") + twice.encode() + bytes(4))
    with pytest.raises(TokenFileError, match="not a safetensors file: "):
        load_safetensors(path, error=TokenFileError)


def test_a_missing_file_and_a_folder_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(TokenFileError, match="no such file"):
            read_header(path, error=TokenFileError)


class Small(BaseModel, extra="forbid"):
    kind: int
    n: int


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"n": 1}, "a: another kind of file (no 'kind' in its header)"),
        ({"kind": 3, "n": 1}, "a: kind is 3, this texttok reads 2; update texttok"),
        ({"kind": 2}, "a: header.n: Field required"),
        ({"kind": 2, "n": 1, "x" * 1000: 1}, f"a: header.{'x' * 393}..."),
        ({"kind": 2, "n": "x"}, "a: header.n: Input should be a valid integer, unable to parse string as an integer"),
    ],
)
def test_headers_are_parsed_or_refused_in_one_line(header: dict[str, object], reason: str) -> None:
    with pytest.raises(TokenFileError) as error:
        parse_header(header, Small, key="kind", version=2, path=Path("a"), error=TokenFileError)
    assert str(error.value) == reason
    assert parse_header({"kind": 2, "n": 5}, Small, key="kind", version=2, path=Path("a"), error=TokenFileError).n == 5


def test_the_hash_of_tensors_is_of_their_values_in_order() -> None:
    x, y = torch.randn(2, 3, 4, 4), torch.tensor(1.5, dtype=torch.bfloat16)
    expected = hashlib.sha256(x.numpy().tobytes() + y.view(torch.uint16).numpy().tobytes()).hexdigest()
    assert sha256_tensors([x.to(memory_format=torch.channels_last), y]) == expected
    assert sha256_tensors([y, x]) != expected
