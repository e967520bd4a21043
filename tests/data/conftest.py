"""Small pictures and shards made on the spot; real data where TEXTTOK_DATA names it."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import encoded, picture


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder of n pictures 00.png, 01.png, ...; those in `damaged` are cut in half."""

    def make(n: int, *, damaged: tuple[int, ...] = (), size: tuple[int, int] = (40, 30)) -> Path:
        folder = tmp_path / f"pictures-{n}"
        folder.mkdir()
        for number in range(n):
            data = encoded(picture(number, size))
            (folder / f"{number:02d}.png").write_bytes(data[: len(data) // 2] if number in damaged else data)
        return folder

    return make


@pytest.fixture
def make_shard(tmp_path: Path) -> Callable[..., Path]:
    """A shard with the given members (name, content; a dict becomes JSON)."""

    def make(members: list[tuple[str, bytes | dict[str, object]]], name: str = "shard-0000.tar") -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w") as shard:
            for member, content in members:
                data = json.dumps(content).encode() if isinstance(content, dict) else content
                header = tarfile.TarInfo(member)
                header.size = len(data)
                shard.addfile(header, io.BytesIO(data))
        return path

    return make


@pytest.fixture
def real_data() -> Path:
    if "TEXTTOK_DATA" not in os.environ:
        pytest.skip("TEXTTOK_DATA does not name the folder that holds data/")
    return Path(os.environ["TEXTTOK_DATA"]) / "data"
