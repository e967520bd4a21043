"""The latent store: what it takes and refuses, and the order of its batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from texttok_cli.data.latents import LatentBatch, LatentLoader, LatentStore, fits
from texttok_cli.data.loader import SampleStream
from texttok_cli.errors import DataError, TokenFileError
from texttok_cli.token_folder import TokenFolder, read_index
from texttok_cli.tokens import TokenHeader, Tokens

MODEL, OTHER = "ab" * 32, "cd" * 32


def make(first: int, n: int, **changes: Any) -> Tokens:
    """Images called i0, i1, ... whose latents (n, 4, 3) are their numbers."""
    numbers = range(first, first + n)
    fields: dict[str, Any] = {
        "texttok_tokens": 2,
        "model_name": "tiny",
        "model_sha256": MODEL,
        "dtype": "fp16",
        "image_size": 32,
        "ids": [f"i{i}" for i in numbers],
        "flipped": [False] * n,
        "captions": [f"about {i}" for i in numbers],
        "class_names": ["even" if i % 2 == 0 else None for i in numbers],
        "input_sha256": [f"{i:064x}" for i in numbers],
        "original_sizes": [(32, 32)] * n,
    }
    z = torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(n, 4, 3).contiguous()
    return Tokens(z, TokenHeader(**{**fields, **changes}))


def write(path: Path, *parts: Tokens, complete: bool = True) -> Path:
    header = parts[0].header
    folder = TokenFolder(path, model_name="tiny", model_sha256=header.model_sha256, dtype=header.dtype, shard_size=4)
    for part in parts:
        folder.add(part)
    if complete:
        folder.finish()
    else:
        folder.flush()
    return path


def open_store(*folders: Path) -> LatentStore:
    return LatentStore.open(folders, made_by=[MODEL])


def test_several_folders_are_one_store_in_their_order(tmp_path: Path) -> None:
    store = open_store(write(tmp_path / "a", make(0, 4), make(4, 4)), write(tmp_path / "b", make(8, 2, captions=None, class_names=None)))
    assert store.z.shape == (10, 4, 3) and store.z.dtype == torch.float16
    assert store.z[:, 0, 0].tolist() == list(range(10)) and store.ids == [f"i{i}" for i in range(10)]
    assert store.captions[7:] == ["about 7", None, None] and store.class_names[6:] == ["even", None, None, None]
    flat = store.z.double().flatten(0, 1)
    assert store.statistics.mean == pytest.approx(flat.mean(0).tolist())
    assert store.statistics.std == pytest.approx(flat.std(0, correction=0).tolist())


@pytest.mark.parametrize(("dtype", "kept"), [("fp32", torch.float32), ("int8", torch.float16)])
def test_latents_are_kept_as_stored(dtype: str, kept: torch.dtype, tmp_path: Path) -> None:
    scale = {"mean": [2.0] * 3, "std": [1.0] * 3} if dtype == "int8" else {}
    folder = write(tmp_path / "a", make(0, 4, dtype=dtype, **scale))
    assert open_store(folder).z.dtype == kept
    assert open_store(write(tmp_path / "b", make(4, 2)), folder).z.dtype == kept  # none is rounded for the company of fp16


def test_texts_are_those_of_the_files_or_of_a_list(tmp_path: Path) -> None:
    store = open_store(write(tmp_path / "a", make(0, 2)), write(tmp_path / "b", make(2, 2, captions=None)))
    with pytest.raises(DataError, match="i2: its tokens have no caption"):
        store.texts()
    (tmp_path / "c.jsonl").write_text('{"id": "i2", "caption": "two"}\n{"id": "i3", "caption": "three"}\n{"id": "i0", "caption": "zero"}\n')
    assert store.texts(tmp_path / "c.jsonl") == ["zero", "about 1", "two", "three"]


def test_a_mirrored_copy_shares_the_texts_of_the_other(tmp_path: Path) -> None:
    store = open_store(
        write(tmp_path / "a", make(0, 2, captions=["long", "other"]), make(0, 2, flipped=[True] * 2, captions=["long", "other"]))
    )
    assert store.captions == ["long", "other"] * 2 and store.class_names == ["even", None] * 2
    assert store.captions[0] is store.captions[2] and store.ids[1] is store.ids[3]


def test_what_is_not_whole_or_not_of_the_tokenizer_is_refused(tmp_path: Path) -> None:
    codes = Tokens(torch.zeros(2, 4, dtype=torch.int64), make(0, 2).header.model_copy(update={"dtype": "int16", "codes": 8}))
    whole = write(tmp_path / "whole", make(0, 4))
    cases = {
        write(tmp_path / "other", make(0, 2, model_sha256=OTHER)): "holds tokens of tiny .sha256 cdcdcdcdcdcd",
        write(tmp_path / "cut", make(0, 2), complete=False): "its encoding was cut off",
        write(tmp_path / "codes", codes): "holds codes of a VQ model",
    }
    for folder, reason in cases.items():
        with pytest.raises(DataError, match=reason) as error:
            open_store(whole, folder)
        assert "\n" not in str(error.value)
    shard = whole / read_index(whole).shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(TokenFileError, match="cut short"):
        open_store(whole)
    shard.unlink()
    with pytest.raises(TokenFileError, match="no such file"):
        open_store(whole)


def test_no_memory_is_taken_for_images_that_an_index_makes_up(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", make(0, 4))
    index = json.loads((whole / "index.json").read_text())
    [shard] = index["shards"]
    index["shards"] += [{**shard, "file": f"shard-{i:05d}.tok.safetensors", "images": 1_000_000} for i in range(1, 5001)]
    (whole / "index.json").write_text(json.dumps(index))
    with pytest.raises(TokenFileError, match=r"index\.json names 5,000,000,004 images, more than its shards hold"):
        open_store(whole)


def take(loader: LatentLoader, n: int, start: int = 0) -> list[LatentBatch]:
    batches = loader.batches(start)
    return [next(batches) for _ in range(n)]


def test_batches_follow_the_stream_of_samples_wherever_they_begin(tmp_path: Path) -> None:
    store = open_store(write(tmp_path, make(0, 10)))
    loader = LatentLoader(store, batch_size=4, seed=7, device=torch.device("cpu"))
    batches = take(loader, 6)
    stream = SampleStream(10, 7)
    assert stream.indices(3, 25).tolist() == [stream[position][0] for position in range(3, 28)]  # over two epochs' ends
    assert [i for batch in batches for i in batch.indices.tolist()] == [stream[position][0] for position in range(24)]
    assert sorted(i for batch in batches for i in batch.indices.tolist())[:4] == [0, 0, 1, 1]  # 24 positions are two epochs and more
    for batch in batches:
        assert batch.z.dtype == torch.float32 and batch.z[:, 2, 1].tolist() == batch.indices.tolist()
    resumed = take(loader, 2, start=4)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(batches[4:], resumed, strict=True))


def test_processes_share_every_global_batch(tmp_path: Path) -> None:
    store = open_store(write(tmp_path, make(0, 10)))
    alone = take(LatentLoader(store, batch_size=6, seed=1, device=torch.device("cpu")), 4)
    ranks = [take(LatentLoader(store, batch_size=3, seed=1, device=torch.device("cpu"), rank=rank, world_size=2), 4) for rank in (0, 1)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(whole.z, torch.cat([part.z for part in parts]))


def test_latents_take_a_quarter_of_what_is_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    gpu = torch.device("cuda")
    assert fits(250, gpu) and not fits(251, gpu) and fits(10**12, torch.device("cpu"))
