"""`texttok decode`, as a person runs it, and as a hostile token file would have it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_line import one_line
from PIL import Image

from texttok_cli.checkpoint import load_tokenizer_file, save_tokenizer
from texttok_cli.commands.decode import safe_parts
from texttok_cli.errors import TokenFileError
from texttok_cli.files import load_safetensors, save_safetensors, sha256_file
from texttok_cli.inference import load_tokenizer
from texttok_cli.token_folder import TokenFolder
from texttok_cli.tokens import TokenHeader, Tokens, load_tokens, save_tokens

Run = Callable[..., Any]


@pytest.fixture
def decode(texttok: Run, bundled: Path) -> Run:
    return lambda *args: texttok("decode", *args, "--device", "cpu")


@pytest.fixture
def make(models: Path) -> Callable[..., Tokens]:
    """Tokens of the model `text`, one a given id."""
    digest = sha256_file(models / "text.safetensors")

    def tokens(*ids: str, **changes: Any) -> Tokens:
        n = len(ids)
        fields: dict[str, Any] = {
            "texttok_tokens": 2,
            "model_name": "text",
            "model_sha256": digest,
            "dtype": "fp32",
            "image_size": 32,
            "ids": list(ids),
            "flipped": [False] * n,
            "captions": [f"caption of {image_id}" for image_id in ids],
            "input_sha256": [f"{i:064x}" for i in range(n)],
            "original_sizes": [(32, 32)] * n,
        }
        z = torch.randn(n, 4, 8, generator=torch.Generator().manual_seed(n))
        return Tokens(z, TokenHeader(**{**fields, **changes}))

    return tokens


def pngs(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def near(path: Path, expected: torch.Tensor) -> bool:
    """Whether the PNG holds these pixels (3, S, S); batches of another size round a few differently."""
    image = Image.open(path)
    assert image.mode == "RGB" and image.format == "PNG"
    return bool((torch.from_numpy(np.array(image)).permute(2, 0, 1).int() - expected.int()).abs().max() <= 1)


def test_nothing_but_the_token_file_is_needed(texttok: Run, decode: Run, models: Path, tmp_path: Path, draw: Callable[..., Path]) -> None:
    image = draw(tmp_path / "in" / "img.png", size=(48, 40))
    assert texttok("encode", image, "--caption", "a red flower", "--model", "text", "--device", "cpu").code == 0
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "in" / "img.tok.safetensors").rename(alone / "img.tok.safetensors")
    image.unlink()
    run = decode(alone / "img.tok.safetensors", "--json")
    assert run.code == 0 and json.loads(run.out) == {"images": 1, "out": [str(alone / "img.rec.png")]}
    z = load_tokens(alone / "img.tok.safetensors").z
    tokenizer = load_tokenizer(models / "text.safetensors", device="cpu")
    assert near(alone / "img.rec.png", tokenizer.decode(z, "a red flower")[0])
    assert decode(alone / "img.tok.safetensors", "--caption", "a dog", "-o", alone / "dog.png").code == 0
    assert near(alone / "dog.png", tokenizer.decode(z, "a dog")[0]) and not near(alone / "dog.png", tokenizer.decode(z, "a red flower")[0])


def test_a_file_of_several_images_and_batches(decode: Run, make: Callable[..., Tokens], models: Path, tmp_path: Path) -> None:
    tokens = make("x/a.png", "x/a.jpg", "b", "v1.2", "v1.3")
    save_tokens(tmp_path / "set.tok.safetensors", tokens)
    run = decode(tmp_path / "set.tok.safetensors", "--batch-size", 2)
    assert run.code == 0 and run.out.split() == ["images", "5", "out", "beside", "the", "tokens"]
    folder = tmp_path / "set.rec"
    assert pngs(folder) == ["b.png", "v1.2.png", "v1.3.png", "x/a.jpg.png", "x/a.png"]
    expected = load_tokenizer(models / "text.safetensors", device="cpu").decode(tokens.z, tokens.header.captions)
    for name, pixels in zip(["x/a.png", "x/a.jpg.png", "b.png", "v1.2.png", "v1.3.png"], expected, strict=True):
        assert near(folder / name, pixels)


def test_a_folder_of_shards(
    decode: Run, make: Callable[..., Tokens], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokens"
    folder = TokenFolder(path, model_name="text", model_sha256=sha256_file(models / "text.safetensors"), dtype="fp32", shard_size=2)
    for name in ("a.png", "b.png", "sub/a.png"):
        folder.add(make(name))
    folder.flush()
    run = decode(path)
    assert run.code == 0 and f"{path}: its encoding was cut off; these are the 3 images that were done." in run.err
    folder.finish()
    assert decode(path, "--quiet").err == "" and pngs(tmp_path) == [f"tokens.rec/{name}" for name in ("a.png", "b.png", "sub/a.png")]
    assert decode(path, "-o", tmp_path / "out").code == 0 and pngs(tmp_path / "out") == ["a.png", "b.png", "sub/a.png"]
    monkeypatch.chdir(path)
    (tmp_path / "tokens.rec" / "a.png").unlink()
    assert decode(".").code == 0 and pngs(tmp_path / "tokens.rec") == ["a.png", "b.png", "sub/a.png"]


def test_files_of_several_models_in_one_run(decode: Run, make: Callable[..., Tokens], models: Path, tmp_path: Path) -> None:
    save_tokens(tmp_path / "a.tok.safetensors", make("a.png"))
    plain = {"model_name": "plain", "model_sha256": sha256_file(models / "plain.safetensors"), "captions": None}
    save_tokens(tmp_path / "b.tok.safetensors", make("b.png", **plain))
    files = [tmp_path / "a.tok.safetensors", tmp_path / "b.tok.safetensors"]
    assert decode(*files, "-o", tmp_path / "out").code == 0 and pngs(tmp_path) == ["out/a.png", "out/b.png"]
    assert near(tmp_path / "out" / "b.png", load_tokenizer(models / "plain.safetensors", device="cpu").decode(make("b.png").z)[0])
    run = decode(tmp_path / "b.tok.safetensors", "--caption", "a")
    assert run.code == 1 and "plain: takes no captions" in one_line(run.err)


def test_the_wrong_model_is_refused(decode: Run, make: Callable[..., Tokens], tmp_path: Path) -> None:
    file = tmp_path / "a.tok.safetensors"
    save_tokens(file, make("a.png"))
    run = decode(file, "--model", "other")
    assert run.code == 1 and f"{file}: was made with model text" in one_line(run.err) and "not with other" in run.err
    save_tokens(file, make("a.png", model_name="gone", model_sha256="ab" * 32))
    run = decode(file)
    assert run.code == 1 and "made with model gone" in one_line(run.err) and "give its file with --model" in run.err
    assert not pngs(tmp_path)


def test_a_model_with_the_same_latents_decodes(decode: Run, make: Callable[..., Tokens], models: Path, tmp_path: Path) -> None:
    save_tokens(tmp_path / "a.tok.safetensors", make("a.png"))
    model, info = load_tokenizer_file(models / "text.safetensors")
    with torch.no_grad():
        model.to_pixels.bias.add_(0.5)
    save_tokenizer(tmp_path / "brighter.safetensors", model, training={}, latents_of=[info.sha256])
    images = []
    for name in ("text", tmp_path / "brighter.safetensors"):
        run = decode(tmp_path / "a.tok.safetensors", "--model", name, "-o", tmp_path / "a.png")
        assert run.code == 0 and ("are decoded by brighter, which was trained on from it" in run.err) == (name != "text")
        images.append(np.asarray(Image.open(tmp_path / "a.png")).mean())
    assert images[1] > images[0]


def test_a_folder_that_grows_meanwhile_is_one_line(
    decode: Run, make: Callable[..., Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokens(tmp_path / "a.tok.safetensors", make("a.png", "b.png"))
    monkeypatch.setattr("texttok_cli.commands.decode._names", lambda path: ["a.png"])  # what was listed before b.png came
    run = decode(tmp_path / "a.tok.safetensors", "-o", tmp_path / "out")
    assert run.code == 1 and "still being written; run the same command again" in one_line(run.err)


def test_a_model_that_is_not_bundled_is_named(texttok: Run, make: Callable[..., Tokens], models: Path, tmp_path: Path) -> None:
    save_tokens(tmp_path / "a.tok.safetensors", make("a.png"))
    run = texttok("decode", tmp_path / "a.tok.safetensors", "--model", models / "text.safetensors", "--device", "cpu")
    assert run.code == 0 and pngs(tmp_path) == ["a.rec.png"]


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.99])
def test_a_token_file_cut_short_is_one_line(part: float, decode: Run, make: Callable[..., Tokens], tmp_path: Path) -> None:
    file = tmp_path / "a.tok.safetensors"
    save_tokens(file, make("a.png"))
    data = file.read_bytes()
    file.write_bytes(data[: int(part * len(data))])
    run = decode(file)
    assert run.code == 1 and str(file) in one_line(run.err) and run.out == "" and not pngs(tmp_path)


@pytest.mark.parametrize(
    ("ids", "written"),
    [
        (["../../up.png", "b"], ["b.png", "up.png"]),
        (["/etc/abs.png", "b"], ["b.png", "etc/abs.png"]),
        (["..", "b"], ["b.png", "image.png"]),
        (["a/../../../c.png", "b"], ["a/c.png", "b.png"]),
        (["C:\\windows\\d.png", "b"], ["C_/windows/d.png", "b.png"]),
        (["nul\0byte", "line\nbreak?"], ["line_break_.png", "nul_byte.png"]),
        (["///", ""], []),
    ],
)
def test_ids_stay_inside_the_output_folder(
    ids: list[str], written: list[str], decode: Run, make: Callable[..., Tokens], tmp_path: Path
) -> None:
    file = tmp_path / "deep" / "tokens" / "a.tok.safetensors"
    save_tokens(file, make(*ids))
    run = decode(file, "-o", tmp_path / "deep" / "out")
    assert run.code == (len(written) < len(ids))  # two of one name are an error
    assert pngs(tmp_path) == [f"deep/out/{name}" for name in written]


RESERVED = [
    ("aux.png", ["aux_.png"]),
    ("NUL /Com1.tar.gz", ["NUL_", "Com1_.tar.gz"]),
    ("con .png", ["con_ .png"]),
    ("console/com10.png", ["console", "com10.png"]),
]


@pytest.mark.parametrize(
    ("image_id", "parts"), [("a/b.png", ["a", "b.png"]), ("trailing. /x ", ["trailing", "x"]), ("...", ["image"]), *RESERVED]
)
def test_safe_parts(image_id: str, parts: list[str]) -> None:
    assert safe_parts(image_id) == parts


@pytest.mark.skipif(os.name == "nt", reason="needs rights to make links there")
def test_a_link_that_came_with_the_tokens_leads_nowhere_else(decode: Run, make: Callable[..., Tokens], tmp_path: Path) -> None:
    tokens = tmp_path / "a.tok.safetensors"
    save_tokens(tokens, make("sub/deep/x.png", "y.png"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.rec").mkdir()
    (tmp_path / "a.rec" / "sub").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    run = decode(tokens)
    assert run.code == 1 and "a.rec/sub/deep: a link leads out of" in one_line(run.err) and pngs(tmp_path) == []
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere", target_is_directory=True)  # the person's own
    assert decode(tokens, "-o", tmp_path / "out").code == 0
    assert pngs(tmp_path / "elsewhere") == ["sub/deep/x.png", "y.png"]


@pytest.mark.skipif(os.name == "nt", reason="needs rights to make links there")
def test_links_in_a_circle_are_one_line(decode: Run, make: Callable[..., Tokens], tmp_path: Path) -> None:
    save_tokens(tmp_path / "a.tok.safetensors", make("sub/deep/x.png", "y.png"))
    (tmp_path / "a.rec").mkdir()
    (tmp_path / "a.rec" / "sub").symlink_to("sub")
    run = decode(tmp_path / "a.tok.safetensors")
    assert run.code == 1 and "a.rec/sub" in one_line(run.err)


@pytest.mark.skipif(os.name == "nt", reason="needs rights to make links there")
def test_a_link_that_came_since_the_last_run_leads_nowhere_else(decode: Run, make: Callable[..., Tokens], tmp_path: Path) -> None:
    tokens = tmp_path / "a.tok.safetensors"
    save_tokens(tokens, make("sub/x.png", "y.png"))
    assert decode(tokens).code == 0
    (tmp_path / "a.rec" / "sub").rename(tmp_path / "elsewhere")
    (tmp_path / "a.rec" / "sub").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert "a.rec/sub: a link leads out of" in one_line(decode(tokens).err)


def test_an_id_that_stands_three_times_overwrites_nothing(decode: Run, make: Callable[..., Tokens], tmp_path: Path) -> None:
    save_tokens(tmp_path / "a.tok.safetensors", make("a.png", "a.png", "a.png"))
    run = decode(tmp_path / "a.tok.safetensors")
    assert run.code == 1 and "decode them into different folders" in one_line(run.err)


def test_names_that_are_one_file_on_this_disk_are_refused(
    decode: Run, make: Callable[..., Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, images = tmp_path / "a.tok.safetensors", tmp_path / "a.rec"
    save_tokens(file, make("Cat.png", "cat.png"))
    monkeypatch.setattr("texttok_cli.files._ignores_case", lambda folder: folder == images)
    run = decode(file)
    assert run.code == 1 and f"{images / 'cat.png'}: would be written over {images / 'Cat.png'}" in one_line(run.err)
    assert not pngs(tmp_path)
    monkeypatch.setattr("texttok_cli.files._ignores_case", lambda folder: False)
    assert decode(file).code == 0 and pngs(tmp_path) == ["a.rec/Cat.png", "a.rec/cat.png"]


def test_two_files_with_one_id_do_not_overwrite_each_other(decode: Run, make: Callable[..., Tokens], tmp_path: Path) -> None:
    files = [tmp_path / name / "a.tok.safetensors" for name in ("one", "two")]
    for file in files:
        save_tokens(file, make("a.png"))
    run = decode(*files, "-o", tmp_path / "out")
    assert run.code == 1 and "decode them into different folders" in one_line(run.err) and not pngs(tmp_path)
    assert decode(*files).code == 0 and pngs(tmp_path) == ["one/a.rec.png", "two/a.rec.png"]


def test_two_folders_with_an_id_in_common_are_refused_before_anything_is_written(
    decode: Run, make: Callable[..., Tokens], models: Path, tmp_path: Path
) -> None:
    digest = sha256_file(models / "text.safetensors")
    for name, ids in (("one", ("a.png", "b.png")), ("two", ("c.png", "b.png"))):
        folder = TokenFolder(tmp_path / name, model_name="text", model_sha256=digest, dtype="fp32", shard_size=1)
        for image_id in ids:
            folder.add(make(image_id))
    run = decode(tmp_path / "one", tmp_path / "two", "-o", tmp_path / "out")
    assert run.code == 1 and not pngs(tmp_path)
    assert f"{tmp_path / 'two'}: its b.png and an image of {tmp_path / 'one'} are both" in one_line(run.err)
    assert decode(tmp_path / "one", tmp_path / "two").code == 0 and len(pngs(tmp_path)) == 4


def test_the_encoded_image_is_never_overwritten(
    decode: Run, make: Callable[..., Tokens], tmp_path: Path, draw: Callable[..., Path]
) -> None:
    image = draw(tmp_path / "a.png")
    before = image.read_bytes()
    file = tmp_path / "a.tok.safetensors"
    save_tokens(file, make("a.png", input_sha256=[sha256_file(image)]))
    for out in (tmp_path, image):
        run = decode(file, "-o", out)
        assert run.code == 1 and "a.png: is the very image that was encoded" in one_line(run.err)
    assert image.read_bytes() == before
    assert decode(file).code == decode(file).code == 0  # its own a.rec.png may be replaced


def changed(file: Path, change: Callable[[dict[str, Any]], object], z: torch.Tensor | None = None) -> None:
    header, tensors = load_safetensors(file, error=TokenFileError)
    change(header)
    save_safetensors(file, tensors if z is None else {"z": z}, header)


def test_a_header_that_lies_about_its_model_is_one_line(decode: Run, make: Callable[..., Tokens], tmp_path: Path) -> None:
    file = tmp_path / "a.tok.safetensors"
    for change, z in (
        (lambda h: h, torch.zeros(1, 5, 8)),
        (lambda h: h.update(image_size=64), None),
        (lambda h: h.update(captions=None), None),
        (lambda h: h.update(model_name="\x1b[31mred\nname", model_sha256="ab" * 32), None),
    ):
        save_tokens(file, make("a.png"))
        changed(file, change, z)
        run = decode(file)
        assert run.code == 1 and str(file) in one_line(run.err) and "\x1b" not in run.err and not pngs(tmp_path)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["none.tok.safetensors"], "none.tok.safetensors: no such file"),
        (["."], "not a folder of tokens (no index.json)"),
        (["a.tok.safetensors", "-o", "a.jpg"], "name a folder for the 1 image(s), or for one image a .png file"),
        (["a.tok.safetensors", "b.tok.safetensors", "-o", "x.png"], "name a folder for the 2 image(s)"),
        (["a.tok.safetensors", "-o", "b.tok.safetensors"], "b.tok.safetensors: is a file, but -o needs a folder; choose another path"),
        (["a.tok.safetensors", "-o", "b.tok.safetensors/x"], "b.tok.safetensors: is a file, but -o needs a folder"),
        (["text.safetensors"], "another kind of file"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], reason: str, decode: Run, make: Callable[..., Tokens], tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokens(tmp_path / "a.tok.safetensors", make("a.png"))
    save_tokens(tmp_path / "b.tok.safetensors", make("b.png"))
    (tmp_path / "text.safetensors").write_bytes((models / "text.safetensors").read_bytes())
    run = decode(*args)
    assert run.code in (1, 2) and reason in one_line(run.err) and run.out == "" and not pngs(tmp_path)
