"""`texttok encode`, as a person runs it."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_line import one_line
from PIL import Image
from tiny_tokens import concatenate

from texttok_cli import inference
from texttok_cli.errors import DataError
from texttok_cli.files import alone_in, sha256_file
from texttok_cli.inference import Tokenizer, load_tokenizer
from texttok_cli.token_folder import read_index, read_shards
from texttok_cli.tokens import load_tokens

Run = Callable[..., Any]
WAIT = "wait until it has ended, or choose another -o"
Draw = Callable[..., Path]


@pytest.fixture
def encode(texttok: Run, bundled: Path) -> Run:
    """`texttok encode ... --model text`, on the CPU."""
    return lambda *args, model="text": texttok("encode", *args, "--model", model, "--device", "cpu")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that went through the model, call by call."""
    seen: list[int] = []
    real = Tokenizer.encode

    def counting(self: Tokenizer, images: Any, captions: Any = None) -> Any:
        seen.append(len(images))
        return real(self, images, captions)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    return seen


def folder_of(draw: Draw, path: Path, n: int, *, damaged: int = 0) -> Path:
    """n pictures with sidecars, the last `damaged` of them cut short."""
    for i in range(n):
        draw(path / f"{i:03d}.png", seed=i, size=(48, 40), part=0.5 if i >= n - damaged else 1)
        (path / f"{i:03d}.txt").write_text(f"picture {i}")
    return path


# ------------------------------------------------------------------ where tokens go


def test_one_image_with_its_caption_is_written_beside_it(encode: Run, draw: Draw, tmp_path: Path, models: Path) -> None:
    image = draw(tmp_path / "img.png")
    run = encode(image, "--caption", "a red flower", "--dtype", "fp32")
    assert run.code == 0 and "img.tok.safetensors" in run.out
    tokens = load_tokens(tmp_path / "img.tok.safetensors")
    expected = load_tokenizer(models / "text.safetensors", device="cpu").encode(image, "a red flower")
    assert (tokens.z - expected).abs().max() < 1e-5
    header = tokens.header
    assert (header.ids, header.captions, header.original_sizes) == (["img.png"], ["a red flower"], [(32, 32)])
    assert (header.model_name, header.model_sha256) == ("text", sha256_file(models / "text.safetensors"))
    assert header.input_sha256 == [sha256_file(image)]


@pytest.mark.parametrize("spelling", ["img.png", "./img.png", "../here/img.png"])
def test_an_image_may_be_named_in_any_way(spelling: str, encode: Run, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "here" / "img.png")
    monkeypatch.chdir(tmp_path / "here")
    assert encode(spelling, "--caption", "a").code == 0
    assert load_tokens(tmp_path / "here" / "img.tok.safetensors").header.ids == ["img.png"]


@pytest.mark.parametrize(("out", "file"), [("t.safetensors", "t.safetensors"), ("new/deep", "new/deep/img.tok.safetensors")])
def test_out_is_a_file_or_a_folder(out: str, file: str, encode: Run, draw: Draw, tmp_path: Path) -> None:
    image = draw(tmp_path / "img.png")
    assert encode(image, "--caption", "a", "-o", tmp_path / out).code == 0
    assert len(load_tokens(tmp_path / file)) == 1
    assert not (tmp_path / "img.tok.safetensors").exists()


def test_several_images_take_their_sidecars(encode: Run, draw: Draw, tmp_path: Path) -> None:
    folder = folder_of(draw, tmp_path / "in", 3)
    run = encode(*sorted(folder.glob("*.png")), "--json")
    assert run.code == 0
    assert json.loads(run.out)["out"] == [str(folder / f"{i:03d}.tok.safetensors") for i in range(3)]
    assert [load_tokens(folder / f"{i:03d}.tok.safetensors").header.captions for i in range(3)] == [[f"picture {i}"] for i in range(3)]


def test_a_folder_gives_shards_in_another(encode: Run, draw: Draw, tmp_path: Path) -> None:
    folder = folder_of(draw, tmp_path / "in", 5)
    run = encode(folder, "-o", tmp_path / "out", "--batch-size", 2)
    assert run.code == 0
    tokens = concatenate(list(read_shards(tmp_path / "out")))
    assert tokens.header.ids == [f"{i:03d}.png" for i in range(5)]
    assert tokens.header.captions == [f"picture {i}" for i in range(5)]
    assert not list(folder.glob("*.safetensors"))


def test_captions_jsonl_wins_over_sidecars(encode: Run, draw: Draw, tmp_path: Path) -> None:
    folder = folder_of(draw, tmp_path / "in", 2)
    (tmp_path / "c.jsonl").write_text('{"id": "001.png", "caption": "from the file"}\n')
    assert encode(folder, "--captions", tmp_path / "c.jsonl", "-o", tmp_path / "out").code == 0
    assert concatenate(list(read_shards(tmp_path / "out"))).header.captions == ["picture 0", "from the file"]


def test_a_list_on_stdin(encode: Run, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(draw, tmp_path / "in", 2)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{folder / '000.png'}\n{folder / '001.png'}\n"))
    assert encode("-", "-o", tmp_path / "out").code == 0
    assert read_index(tmp_path / "out").shards[0].images == 2


# ------------------------------------------------------------------ captions


def test_a_text_model_without_a_caption_names_the_ways_out(encode: Run, draw: Draw, tmp_path: Path) -> None:
    run = encode(draw(tmp_path / "img.png"))
    assert run.code == 1 and run.out == "" and "img.png: has no caption" in one_line(run.err)
    for way in ("--caption", "`texttok caption`", "--no-caption", "--model baseline-32-128"):
        assert way in run.err


def test_no_caption_is_recorded_as_the_empty_one(encode: Run, draw: Draw, tmp_path: Path) -> None:
    image = draw(tmp_path / "img.png")
    (tmp_path / "img.txt").write_text("not to be used")
    assert encode(image, "--no-caption").code == 0
    assert load_tokens(tmp_path / "img.tok.safetensors").header.captions == [""]


def test_the_twin_takes_and_records_no_caption(encode: Run, draw: Draw, tmp_path: Path) -> None:
    folder = folder_of(draw, tmp_path / "in", 1)
    assert encode(folder / "000.png", model="plain").code == 0
    assert load_tokens(folder / "000.tok.safetensors").header.captions is None
    for option in (["--caption", "a"], ["--captions", folder / "c.jsonl"]):
        (folder / "c.jsonl").write_text('{"id": "000.png", "caption": "a"}\n')
        run = encode(folder / "000.png", *option, model="plain")
        assert run.code == 2 and "plain: takes no captions" in one_line(run.err)


def test_one_caption_for_several_images_is_an_error(encode: Run, draw: Draw, tmp_path: Path) -> None:
    folder = folder_of(draw, tmp_path / "in", 2)
    for inputs in ([folder / "000.png", folder / "001.png"], [folder, "-o", tmp_path / "out"]):
        run = encode(*inputs, "--caption", "a")
        assert run.code == 2 and "--caption is for one image, these inputs hold 2; give --captions FILE.jsonl" in one_line(run.err)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("options", [["--caption", "a", "--no-caption"], ["--caption", "a", "--captions", "c.jsonl"]])
def test_ways_to_caption_exclude_each_other(options: list[str], encode: Run, draw: Draw, tmp_path: Path) -> None:
    run = encode(draw(tmp_path / "img.png"), *options)
    assert run.code == 2 and "exclude each other" in one_line(run.err)


def test_a_caption_cut_off_by_the_text_encoder_is_said(encode: Run, draw: Draw, tmp_path: Path) -> None:
    run = encode(draw(tmp_path / "img.png"), "--caption", "long " * 40)
    assert run.code == 0 and "longer than 24 text tokens, so the end was cut off: 1 captions" in run.err


# ------------------------------------------------------------------ what is printed


def test_json_is_all_of_stdout_and_the_ratios_are_right(encode: Run, draw: Draw, tmp_path: Path) -> None:
    run = encode(draw(tmp_path / "img.png", size=(48, 40)), "--caption", "caf\u00e9", "--json")
    result = json.loads(run.out)
    assert result == {
        "out": [str(tmp_path / "img.tok.safetensors")],
        "model": "text",
        "images": 1,
        "tokens_per_image": 4,
        "token_bytes_per_image": 64,  # 4 tokens of 8 fp16 numbers
        "compression": 3 * 32 * 32 / 64,
        "compression_with_captions": 3 * 32 * 32 / (64 + 5),
    }
    assert "not square, so the centre was taken: 1 of 1 images" in run.err


def test_a_square_image_is_not_said_to_be_cropped_and_quiet_is_quiet(encode: Run, draw: Draw, tmp_path: Path) -> None:
    assert "square" not in encode(draw(tmp_path / "square.png"), "--caption", "a").err
    assert encode(draw(tmp_path / "wide.png", size=(48, 40)), "--caption", "a", "--quiet").err == ""


# ------------------------------------------------------------------ again, and interrupted


def test_a_file_is_written_anew_only_if_something_changed(encode: Run, draw: Draw, tmp_path: Path, forwards: list[int]) -> None:
    image, file = draw(tmp_path / "img.png"), tmp_path / "img.tok.safetensors"

    def changed(*options: object, model: str = "text") -> bool:
        del forwards[:]
        before = file.read_bytes() if file.exists() else b""
        run = encode(image, *options, "--json", model=model)
        assert run.code == 0 and json.loads(run.out)["out"] == [str(file)]
        assert json.loads(run.out)["images"] == len(forwards) == 1 - json.loads(run.out).get("already_there", 0)
        return file.read_bytes() != before

    assert changed("--caption", "a")
    assert not changed("--caption", "a")
    assert changed("--caption", "b") and not changed("--caption", "b")
    assert changed("--no-caption") and not changed("--no-caption")
    assert changed("--caption", "b", "--dtype", "int8")
    assert changed("--caption", "b", model="other")
    assert changed(model="plain") and not changed(model="plain")
    draw(image, seed=9)
    assert changed(model="plain")
    file.write_bytes(file.read_bytes()[:-1])  # damaged
    assert changed(model="plain") and len(load_tokens(file)) == 1


def test_a_folder_is_gone_through_again_for_what_changed_alone(encode: Run, draw: Draw, tmp_path: Path, forwards: list[int]) -> None:
    folder, out = folder_of(draw, tmp_path / "in", 4), tmp_path / "out"
    assert encode(folder, "-o", out).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    del forwards[:]
    run = encode(folder, "-o", out, "--json")
    assert forwards == [] and {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert json.loads(run.out) == {"out": str(out), "model": "text", "images": 0, "already_there": 4}
    (folder / "001.txt").write_text("another caption")
    draw(folder / "002.png", seed=77)
    draw(folder / "004.png", seed=4)
    (folder / "004.txt").write_text("new")
    run = encode(folder, "-o", out, "--json")
    assert forwards == [3] and json.loads(run.out)["already_there"] == 2
    header = concatenate(list(read_shards(out))).header
    found = dict(zip(header.ids, header.captions, strict=True))
    assert len(header.ids) == 5 and found["001.png"] == "another caption" and found["004.png"] == "new"
    assert dict(zip(header.ids, header.input_sha256, strict=True))["002.png"] == sha256_file(folder / "002.png")


def test_a_folder_of_another_model_is_left_alone(encode: Run, draw: Draw, tmp_path: Path) -> None:
    folder, out = folder_of(draw, tmp_path / "in", 1), tmp_path / "out"
    encode(folder, "-o", out)
    before = (out / "index.json").read_bytes()
    run = encode(folder, "-o", out, model="other")
    assert run.code == 1 and "holds tokens with model_sha256" in one_line(run.err) and "choose another --out" in run.err
    assert (out / "index.json").read_bytes() == before


def test_images_under_ids_that_the_folder_has_are_counted_and_so_are_those_of_other_runs(
    encode: Run, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("p1/a.png", "p1/b.png", "p2/a.png")):
        draw(tmp_path / name, seed=i)

    def run(*args: str) -> tuple[dict[str, Any], str]:
        ended = encode(*args, "--no-caption", "-o", "tk", "--json")
        assert ended.code == 0
        told = [line for line in ended.err.splitlines() if " in tk: " in line]
        result = json.loads(ended.out)
        assert len(told) == ("replaced" in result) + ("other_images" in result)
        return {key: result.get(key, 0) for key in ("images", "already_there", "replaced", "other_images")}, "\n".join(told)

    counts = {"images": 2, "already_there": 0, "replaced": 0, "other_images": 0}
    assert run("p1/") == (counts, "")
    found, told = run("p2/")
    assert found == counts | {"images": 1, "replaced": 1, "other_images": 1}
    replaced, others = told.splitlines()
    assert (
        replaced.startswith("replaced in tk: the tokens of 1 image(s) that had the same id") and "such as a.png; to keep both," in replaced
    )
    assert others.startswith("also in tk: the tokens of 1 image(s) that are not among these inputs, such as b.png; they stay")
    assert "replaced" in encode("p1/", "--no-caption", "-o", "tk").out  # back again, as text
    found, told = run("p1/", "p2/")
    assert found == counts | {"already_there": 1, "other_images": 1} and "such as a.png; they stay" in told
    again = encode("p1/", "p2/", "--no-caption", "-o", "tk", "--json")
    assert json.loads(again.out)["same_under_other_ids"] == 1 and "of these, 1 are the same pictures as inputs under other ids" in again.err
    assert run("p1/", "p2/", "--flips")[0] == counts | {"images": 3, "other_images": 1}  # encoded again, from the same
    quiet = encode("p2/", "--no-caption", "-o", "tk", "--quiet", "--json")
    assert quiet.err == "" and json.loads(quiet.out)["other_images"] == 3


def test_the_tokens_of_another_picture_of_the_same_name_are_not_replaced_in_silence(encode: Run, draw: Draw, tmp_path: Path) -> None:
    for i in range(2):
        draw(tmp_path / f"{i}" / "a.png", seed=i)
    out = tmp_path / "tk"
    assert "replaced" not in encode(tmp_path / "0" / "a.png", "--caption", "one", "-o", out).err
    assert "replaced" not in encode(tmp_path / "0" / "a.png", "--caption", "another", "-o", out).err  # of the same picture
    run = encode(tmp_path / "1" / "a.png", "--caption", "another", "-o", out, "--json")
    assert json.loads(run.out)["replaced"] == 1
    assert (
        "replaced: the tokens of 1 other picture(s) that had the same file name, such as a.png; to keep both, choose another -o" in run.err
    )
    draw(tmp_path / "2" / "a.png", seed=2, part=0.5)
    assert "replaced" not in json.loads(encode(tmp_path / "2" / "a.png", "--caption", "c", "-o", out, "--json").out)  # it can't be read


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_two_runs_do_not_write_into_one_folder_at_once(encode: Run, draw: Draw, tmp_path: Path) -> None:
    folder, out = folder_of(draw, tmp_path / "in", 2), tmp_path / "out"
    with alone_in(out):
        run = encode(folder, "-o", out)
        assert run.code == 1 and one_line(run.err) == f"texttok: {out}: another texttok is writing there; {WAIT}\n"
        assert list(out.iterdir()) == []
    assert encode(folder, "-o", out).code == 0


@pytest.mark.parametrize("keep", [0, 0.5, None])
def test_a_folder_with_a_damaged_or_missing_shard_is_repaired_by_the_same_command(
    keep: float | None, encode: Run, texttok: Run, draw: Draw, tmp_path: Path
) -> None:
    folder, out = folder_of(draw, tmp_path / "in", 3), tmp_path / "out"
    assert encode(folder, "-o", out).code == 0
    shard = out / "shard-00000.tok.safetensors"
    whole = shard.read_bytes()
    shard.unlink() if keep is None else shard.write_bytes(whole[: int(keep * len(whole))])
    refused = texttok("decode", out, "-o", tmp_path / "images", "--device", "cpu")
    assert refused.code == 1 and str(shard) in one_line(refused.err) and not (tmp_path / "images").exists()
    run = encode(folder, "-o", out, "--json", "--quiet")
    assert run.code == 0 and json.loads(run.out)["images"] == 3 and "other_images" not in json.loads(run.out)
    assert run.err.startswith(f"{out}: 1 shard(s) missing or damaged, such as {shard.name}; of the 3 image(s) in there")
    assert run.err.count("\n") == 1 and shard.read_bytes() == whole and read_index(out).complete
    assert encode(folder, "-o", out, "--quiet").err == ""


def test_ctrl_c_in_a_folder_loses_nothing(
    encode: Run, draw: Draw, tmp_path: Path, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = folder_of(draw, tmp_path / "in", 9), tmp_path / "out"
    counting, calls = Tokenizer.encode, iter(range(100))

    def interrupted(self: Tokenizer, images: Any, captions: Any = None) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return counting(self, images, captions)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", interrupted)
        run = encode(folder, "-o", out, "--batch-size", 2)
    assert run.code != 0 and "Traceback" not in run.err and forwards == [2, 2]
    assert concatenate(list(read_shards(out))).header.ids == [f"{i:03d}.png" for i in range(4)]
    run = encode(folder, "-o", out, "--batch-size", 2, "--json")
    assert run.code == 0 and json.loads(run.out)["already_there"] == 4 and forwards == [2, 2, 2, 2, 1]
    assert concatenate(list(read_shards(out))).header.ids == [f"{i:03d}.png" for i in range(9)]


# ------------------------------------------------------------------ damage


def test_ten_damaged_of_sixty_are_skipped_counted_and_listed(encode: Run, draw: Draw, tmp_path: Path) -> None:
    folder, out = folder_of(draw, tmp_path / "in", 60, damaged=10), tmp_path / "out"
    for there in (0, 50):  # and again
        run = encode(folder, "-o", out, "--json", "--quiet")
        result = json.loads(run.out)
        assert run.code == 1 and result["failed"] == 10
        assert (result["images"], result.get("already_there", 0)) == (50 - there, there)
        assert [line.split(":")[0] for line in run.err.splitlines()] == [f"skipped {i:03d}.png" for i in range(50, 60)]
    assert concatenate(list(read_shards(out))).header.ids == [f"{i:03d}.png" for i in range(50)]


def test_an_image_whose_caption_is_not_utf8_is_skipped(encode: Run, draw: Draw, tmp_path: Path) -> None:
    images = [draw(tmp_path / "in" / f"{name}.png") for name in "ab"]
    for image, caption in zip(images, (b"caf\xe9", b"a flower"), strict=True):
        image.with_suffix(".txt").write_bytes(caption)
    for inputs in (images[0].parent,), images:
        run = encode(*inputs, "-o", tmp_path / f"out{len(inputs)}", "--json", "--quiet")
        result = json.loads(run.out)
        assert (run.code, result["images"], result["failed"]) == (1, 1, 1)
        assert run.err == f"skipped a.png: its caption {images[0].with_suffix('.txt')} is not UTF-8 text; rewrite it as UTF-8\n"
    run = encode(images[0], "-o", tmp_path / "one")
    assert run.code == 1 and run.err.startswith("texttok: ") and "a.txt is not UTF-8 text" in run.err and run.err.count("\n") == 1


def test_nothing_but_damaged_images(encode: Run, draw: Draw, tmp_path: Path) -> None:
    folder = folder_of(draw, tmp_path / "in", 2, damaged=2)
    run = encode(folder, "-o", tmp_path / "out", "--json", "--quiet")
    assert run.code == 1 and json.loads(run.out) == {"out": str(tmp_path / "out"), "model": "text", "images": 0, "failed": 2}
    run = encode(folder / "000.png", "--json", "--quiet")
    assert run.code == 1 and json.loads(run.out)["out"] == [] and run.err.startswith("skipped 000.png: damaged or cut short")


def test_a_huge_picture_is_refused_from_its_header(encode: Run, tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data)
    run = encode(tmp_path / "bomb.png", "--caption", "a", "--quiet")
    assert run.code == 1 and run.err.count("\n") == 1
    assert run.err.startswith("skipped bomb.png: over the limit of 100,000,000 pixels; scale it down first")


def test_names_with_line_breaks_and_escapes_stay_one_line(encode: Run, draw: Draw, tmp_path: Path) -> None:
    image = draw(tmp_path / "a\n\x1b[31mb.png", part=0.5)
    run = encode(image, "--caption", "a", "--quiet")
    assert run.code == 1 and run.err.startswith("skipped a\\n\\x1b[31mb.png: ") and run.err.count("\n") == 1


def test_token_files_that_are_one_on_this_disk_are_refused(
    encode: Run, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, out = draw(tmp_path / "a" / "Cat.png"), draw(tmp_path / "b" / "cat.png"), tmp_path / "out"
    monkeypatch.setattr("texttok_cli.files._ignores_case", lambda folder: folder == out)
    run = encode(one, other, "-o", out, "--no-caption")
    assert run.code == 1 and f"{out / 'cat.tok.safetensors'}: would be written over {out / 'Cat.tok.safetensors'}" in run.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["none.png"], "none.png: no such file or folder"),
        (["in"], "name the folder for its tokens with -o OUT"),
        (["in", "-o", "x.safetensors"], "the tokens of a data set go into a folder"),
        (["in/000.png", "in/001.png", "-o", "x.safetensors"], "is one file, and there are 2 images; name a folder"),
        (["in/000.png", "other/000.png", "-o", "out"], "would be written for two of the images"),
        (["in/000.png", "--captions", "none.jsonl"], "none.jsonl: no such file"),
        (["in/000.png", "-o", "in/000.txt"], "in/000.txt: is a file, but -o needs a folder; choose another path"),
        (["in", "-o", "in/000.txt/x"], "in/000.txt: is a file, but -o needs a folder; choose another path"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], reason: str, encode: Run, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(draw, tmp_path / "in", 2)
    folder_of(draw, tmp_path / "other", 1)
    monkeypatch.chdir(tmp_path)
    run = encode(*args, "--quiet")
    assert run.code in (1, 2) and reason in one_line(run.err) and run.out == ""
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_wrong_model_is_one_line(encode: Run, draw: Draw, tmp_path: Path) -> None:
    image = draw(tmp_path / "img.png")
    assert "nope: no such model; bundled are other, plain, text" in one_line(encode(image, "--caption", "a", model="nope").err)
    (tmp_path / "m.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    run = encode(image, "--caption", "a", model=str(tmp_path / "m.safetensors"))
    assert run.code == 1 and "not a safetensors file" in one_line(run.err)


def test_the_default_model_is_the_bundled_one(
    texttok: Run, draw: Draw, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "texttok-32-128.safetensors").write_bytes((models / "text.safetensors").read_bytes())
    monkeypatch.setattr(inference, "PRETRAINED", tmp_path / "pretrained")
    assert texttok("encode", draw(tmp_path / "img.png"), "--caption", "a").code == 0
    assert load_tokens(tmp_path / "img.tok.safetensors").header.model_name == "texttok-32-128"


# ------------------------------------------------------------------ classes, mirrored copies, codes


def test_a_data_set_is_encoded_with_its_classes_and_if_asked_with_its_mirrored_images(
    encode: Run, draw: Draw, tmp_path: Path, models: Path, forwards: list[int]
) -> None:
    for name in ("cat", "dog"):
        folder_of(draw, tmp_path / "in" / name, 2)
    out = tmp_path / "out"
    assert encode(tmp_path / "in", "-o", out).code == 0
    run = encode(tmp_path / "in", "-o", out, "--flips", "--dtype", "fp16", "--json")  # the other half is still to come
    assert json.loads(run.out)["images"] == json.loads(run.out)["mirrored"] == 4
    tokens = concatenate(list(read_shards(out)))
    header = tokens.header
    assert header.ids == ["cat/000.png", "cat/001.png", "dog/000.png", "dog/001.png"] * 2
    assert header.flipped == [False] * 4 + [True] * 4 and header.class_names == ["cat", "cat", "dog", "dog"] * 2
    tokenizer = load_tokenizer(models / "text.safetensors", device="cpu")
    with Image.open(tmp_path / "in" / "dog" / "001.png") as image:
        mirrored = tokenizer.encode([image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)], "picture 1")
    assert (tokens.z[7] - mirrored[0]).abs().max() < 2e-2 < (tokens.z[7] - tokens.z[3]).abs().max()
    index = read_index(out)
    assert index.complete and index.mean == pytest.approx(tokens.z.double().mean((0, 1)).tolist())
    del forwards[:]
    assert json.loads(encode(tmp_path / "in", "-o", out, "--flips", "--json").out)["already_there"] == 4 and forwards == []


def test_an_interrupted_folder_is_not_complete(encode: Run, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = folder_of(draw, tmp_path / "in", 2), tmp_path / "out"
    real, calls = Tokenizer.encode, iter(range(9))

    def once(self: Tokenizer, images: Any, captions: Any = None) -> Any:
        if next(calls):
            raise KeyboardInterrupt
        return real(self, images, captions)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", once)
        encode(folder, "-o", out, "--batch-size", 1)
    assert [shard.images for shard in read_index(out).shards] == [1] and not read_index(out).complete
    assert encode(folder, "-o", out).code == 0 and read_index(out).complete


def test_flips_are_for_data_sets(encode: Run, draw: Draw, tmp_path: Path) -> None:
    run = encode(draw(tmp_path / "img.png"), "--caption", "a", "--flips")
    assert run.code == 2 and "--flips is for a data set" in one_line(run.err)


def test_a_vq_models_tokens_are_its_codes_and_decode_looks_them_up(
    texttok: Run, draw: Draw, tmp_path: Path, save_model: Callable[..., Path]
) -> None:
    model = save_model(tmp_path / "vq.safetensors", 0, {"source": "none"}, bottleneck={"kind": "vq", "codes": 100})
    image = draw(tmp_path / "img.png")
    run = texttok("encode", image, "--model", model, "--device", "cpu", "--json")
    result = json.loads(run.out)
    assert (result["token_bytes_per_image"], result["token_bits_per_image"]) == (8, 28)  # 4 codes: int16, and 7 bits name one of 100
    assert result["compression"] == 8 * 3 * 32 * 32 / 28
    tokens = load_tokens(tmp_path / "img.tok.safetensors")
    assert (tokens.header.dtype, tokens.header.codes, tokens.z.shape) == ("int16", 100, (1, 4))
    tokenizer = load_tokenizer(model, device="cpu")
    assert torch.equal(tokenizer.lookup(tokens.z), tokenizer.encode(image)) and torch.equal(tokenizer.encode_codes(image), tokens.z)
    assert texttok("decode", tmp_path / "img.tok.safetensors", "--model", model, "--device", "cpu").code == 0
    with Image.open(tmp_path / "img.rec.png") as decoded:
        pixels = torch.from_numpy(np.array(decoded)).permute(2, 0, 1)
    assert torch.equal(pixels, tokenizer.decode(tokenizer.encode(image))[0])
    refused = texttok("encode", image, "--model", model, "--device", "cpu", "--dtype", "fp16")
    assert refused.code == 1 and "its tokens are codes, whole numbers: leave out --dtype fp16" in one_line(refused.err)
    for code in (100, -1):
        with pytest.raises(DataError, match="its codes are 0 to 99"):
            tokenizer.lookup(torch.tensor([[code, 0, 0, 0]]))


def test_mirrored_copies_are_decoded_under_names_of_their_own(encode: Run, texttok: Run, draw: Draw, tmp_path: Path) -> None:
    encode(folder_of(draw, tmp_path / "in", 1), "-o", tmp_path / "out", "--flips")
    assert texttok("decode", tmp_path / "out", "-o", tmp_path / "back", "--device", "cpu").code == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["000.mirrored.png", "000.png"]
