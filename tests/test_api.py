"""`import texttok_cli`: what it offers, and that its documentation's example runs."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import texttok_cli


def test_every_public_name_is_there_and_lazy_homes_agree() -> None:
    assert set(texttok_cli.__all__) == set(texttok_cli._HOMES)
    for name, home in texttok_cli._HOMES.items():
        assert getattr(texttok_cli, name) is getattr(importlib.import_module(f"texttok_cli.{home}"), name)
    with pytest.raises(AttributeError, match="no attribute 'load_tokeniser'"):
        texttok_cli.load_tokeniser  # noqa: B018
    with pytest.raises(ImportError):
        from texttok_cli import nothing  # noqa: F401
    assert {*texttok_cli.__all__, "__version__"} <= set(dir(texttok_cli))


def test_a_script_that_uses_it_is_type_checked_against_it() -> None:
    assert (Path(texttok_cli.__file__).parent / "py.typed").is_file()


def example() -> str:
    """The indented lines of the package's docstring."""
    return "\n".join(re.findall(r"^    (.*)$", texttok_cli.__doc__ or "", re.MULTILINE))


def test_the_docstrings_example_runs(models: Path, tmp_path: Path, draw: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "img.png", size=(48, 40))
    (tmp_path / "texttok-32-128.safetensors").write_bytes((models / "text.safetensors").read_bytes())
    monkeypatch.setattr("texttok_cli.inference.PRETRAINED", tmp_path)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    assert len(example().splitlines()) == 4  # the import and the three lines
    exec(example(), scope)
    z, image = scope["z"], scope["image"]
    assert isinstance(z, torch.Tensor) and isinstance(image, torch.Tensor)
    assert (z.shape, z.dtype, z.device.type) == ((1, 4, 8), torch.float32, "cpu")
    assert (image.shape, image.dtype, image.device.type) == ((1, 3, 32, 32), torch.uint8, "cpu")


def test_a_data_set_in_a_few_lines(models: Path, tmp_path: Path, draw: Callable[..., Path]) -> None:
    from texttok_cli import encode_dataset, load_tokenizer, load_tokens, open_dataset, save_tokens

    for i in range(3):
        draw(tmp_path / f"{i}.png", seed=i)
    tokenizer = load_tokenizer(models / "plain.safetensors", device="cpu")
    for number, (_, tokens) in enumerate(encode_dataset(tokenizer, open_dataset([tmp_path]), None, batch_size=2, on_error=print)):
        save_tokens(tmp_path / f"{number}.tok.safetensors", tokens)
    assert [len(load_tokens(tmp_path / f"{number}.tok.safetensors")) for number in range(2)] == [2, 1]


def test_a_path_may_be_a_string(models: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a notebook names a file or folder, and one input needs no list."""
    from texttok_cli import encode_dataset, evaluate, load_tokenizer, load_tokens, open_dataset, save_tokens
    from texttok_cli.checkpoint import save_tokenizer
    from texttok_cli.metrics.report import load_report, save_report

    monkeypatch.chdir(tmp_path)
    Path("captions.jsonl").write_text('{"id": "0.png", "caption": "zero"}\n')
    dataset = open_dataset("pictures", captions="captions.jsonl")
    assert [item.caption for item in dataset.items] == ["zero", *(f"number {i}" for i in range(1, 5))]
    save_tokenizer("model.safetensors", load_tokenizer(models / "plain.safetensors").model, training={})
    tokenizer = load_tokenizer("model.safetensors")
    (_, tokens), *_ = encode_dataset(tokenizer, dataset, None, batch_size=5, on_error=print)
    save_tokens("all.tok.safetensors", tokens)
    assert load_tokens("all.tok.safetensors").header == tokens.header
    report = evaluate(["psnr"], model=tokenizer, data="pictures")
    save_report("report.json", report)
    assert load_report("report.json") == report


def test_a_folder_of_tokens_is_what_the_command_writes(
    models: Path, pictures: Path, tmp_path: Path, texttok: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three lines; the second time there is nothing to do, for the command neither."""
    from texttok_cli import encode_folder, load_tokenizer, open_dataset

    tokenizer, dataset = load_tokenizer(models / "text.safetensors", device="cpu"), open_dataset(pictures)
    captions = [str(item.caption) for item in dataset.items]
    ours = encode_folder(tokenizer, dataset, captions, tmp_path / "ours", flips=True, batch_size=2)
    given = ("encode", pictures, "-m", models / "text.safetensors", "--flips", "-b", 2, "--device", "cpu", "--json", "-o")
    texttok(*given, tmp_path / "theirs")
    names = sorted(path.name for path in ours.iterdir())
    assert names == ["index.json", "shard-00000.tok.safetensors"]
    assert all((ours / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes() for name in names)
    monkeypatch.setattr(tokenizer, "encode", None)
    encode_folder(tokenizer, dataset, captions, ours, flips=True)
    assert json.loads(texttok(*given, ours).out)["already_there"] == 5


@pytest.fixture
def pictures(tmp_path: Path, draw: Callable[..., Path]) -> Path:
    """Five, with captions."""
    for i in range(5):
        draw(tmp_path / f"pictures/{i}.png", seed=i).with_suffix(".txt").write_text(f"number {i}")
    return tmp_path / "pictures"


def test_captions_are_what_the_command_writes(
    pictures: Path, tmp_path: Path, texttok: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from texttok_cli import load_captioner, open_dataset, write_captions

    monkeypatch.chdir(tmp_path)
    captioner = load_captioner("class-measured")
    done = write_captions(captioner, open_dataset(pictures.parent), "ours.jsonl")
    given = ("caption", pictures.parent, "--captioner", "class-measured", "--json", "-o")
    texttok(*given, "theirs.jsonl")
    assert done.written == 5 and done.path.read_bytes() == Path("theirs.jsonl").read_bytes()
    before = done.path.read_bytes()
    assert write_captions(captioner, open_dataset(pictures.parent), "ours.jsonl").already_there == 5
    assert json.loads(texttok(*given, "ours.jsonl").out)["already_there"] == 5 and done.path.read_bytes() == before
    found = open_dataset(pictures.parent, captions="ours.jsonl")
    assert all(str(item.caption).startswith("a photo of a pictures, mostly ") for item in found.items)


def test_a_captioner_is_called_on_pictures() -> None:
    from PIL import Image

    from texttok_cli import load_captioner
    from texttok_cli.captioners.base import CaptionFailed, CaptionInput, Written

    images = [Image.new(mode, (64, 48)) for mode in ("RGB", "RGBA", "L")]
    outcomes = load_captioner("class-measured")([CaptionInput(image, "tulip") for image in images] + [CaptionInput(images[0])])
    assert [type(outcome) for outcome in outcomes] == [Written, Written, Written, CaptionFailed]


def test_evaluate_is_what_the_command_does(models: Path, pictures: Path, tmp_path: Path, texttok: Callable[..., Any]) -> None:
    """Of models, and of samples: the same report, whether it is returned, printed or written."""
    from texttok_cli import evaluate, load_tokenizer

    names = ("text", "plain")
    tokenizers = [load_tokenizer(models / f"{name}.safetensors") for name in names]
    reports = [
        evaluate(["psnr", "ssim"], model=tokenizers, data=pictures, images=4, split="val", notes={"seed": "3"}),
        evaluate(["ssim"], samples=pictures, references=str(pictures)),
    ]
    twins = [option for name in names for option in ("-m", models / f"{name}.safetensors")]
    options = [("--metric", "psnr,ssim", *twins, "--data", pictures, "-n", 4, "--split", "val", "--note", "seed=3")]
    options.append(("--metric", "ssim", "--samples", pictures, "--ref", pictures))
    for report, given in zip(reports, options, strict=True):
        outcome = texttok("eval", *given, "--json", "-o", tmp_path / "report.json")
        assert report.model_dump(mode="json") == json.loads(outcome.out) == json.loads((tmp_path / "report.json").read_text())
    assert [(result.card.samples, result.metric, result.card.n) for result in reports[0].results] == [
        (name, metric, 4) for name in names for metric in ("psnr", "ssim")
    ]
    assert [result.value for result in reports[1].results] == [1.0] and reports[1].results[0].card.reference == "pictures"


def test_evaluate_takes_tensors_for_files(models: Path, pictures: Path) -> None:
    """As a training loop has them: one tensor, or batches of what makes them."""
    from texttok_cli import evaluate, load_tokenizer
    from texttok_cli.data import load_image, to_tensor

    tokenizer, captions = load_tokenizer(models / "text.safetensors"), [f"number {i}" for i in range(5)]
    paths = sorted(pictures.glob("*.png"))
    originals = torch.stack([to_tensor(load_image(path.read_bytes(), name=path.name)) for path in paths])
    made = tokenizer.decode(tokenizer.encode(originals, captions), captions)
    (expected,) = evaluate(["psnr"], model=tokenizer, data=pictures).results
    for references in (originals, pictures):
        (result,) = evaluate(["psnr"], samples=(batch for batch in made.split(2)), references=references).results
        assert result.value == pytest.approx(expected.value, rel=1e-6) and (result.card.samples, result.card.n) == ("tensors", 5)
    (stored,) = evaluate(["psnr"], samples=pictures, references=made).results
    assert stored.value == pytest.approx(expected.value, rel=1e-6) and stored.card.reference == "tensors"


def test_one_metric_and_one_override_need_no_list(tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    report = texttok_cli.evaluate("psnr,ssim", samples=image, references=image + 1, device="cpu")
    assert [result.metric for result in report.results] == ["psnr", "ssim"]
    (tmp_path / "mine.yaml").write_text("extends: tiny/texttok-32-128\n")
    recipe = texttok_cli.load_recipe(tmp_path / "mine.yaml", "model.num_tokens=16")
    assert recipe == texttok_cli.load_recipe("tiny/texttok-32-128", ["model.num_tokens=16"])


def test_one_image_has_a_psnr_and_nothing_to_warn_of() -> None:
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    (result,) = texttok_cli.evaluate(["psnr"], samples=image, references=image + 1, device="cpu").results
    assert result.value == pytest.approx(48.13, abs=0.01) and result.warnings == []


def test_every_error_is_a_text_tok_error(models: Path, tmp_path: Path) -> None:
    from texttok_cli import TextTokError, evaluate, load_tokenizer, load_tokens, open_dataset

    tokenizer = load_tokenizer(models / "plain.safetensors", device="cpu")
    for mistake in (
        lambda: load_tokenizer("nope"),
        lambda: load_tokens(tmp_path / "none"),
        lambda: open_dataset([tmp_path]),
        lambda: tokenizer.encode(tmp_path / "none.png"),
        lambda: tokenizer.decode(torch.zeros(1, 2, 3)),
        lambda: evaluate(["fidd"], model=tokenizer),
        lambda: evaluate(["psnr"]),
        lambda: evaluate(["psnr"], model="texttok-32-128", data=tmp_path),
        lambda: evaluate(["psnr"], model=tokenizer, references=tmp_path),
        lambda: evaluate(["psnr"], model=tokenizer, samples=tmp_path),
        lambda: evaluate(["psnr"], model=tokenizer, notes={"colour": "red"}),
        lambda: evaluate(["psnr"], samples=torch.zeros(2, 3, 8, 8), references=tmp_path),
        lambda: evaluate(["rfid"], model=tokenizer, protocol="recon", resize="clean"),
    ):
        with pytest.raises(TextTokError):
            mistake()
