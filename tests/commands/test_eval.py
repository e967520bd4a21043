"""`texttok eval` on the bundled sample set, on data, on samples; protocols, cards, comparisons, and several processes."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_inception import DIM, TinyInception

from texttok_cli import inference
from texttok_cli.checkpoint import save_tokenizer
from texttok_cli.commands.sample_folder import SampleFolder
from texttok_cli.errors import BackendError
from texttok_cli.inference import load_tokenizer
from texttok_cli.metrics import evaluator as evaluator_module
from texttok_cli.metrics import evidence as evidence_module
from texttok_cli.metrics.distribution import few_classes_a_block
from texttok_cli.metrics.image import psnr, ssim
from texttok_cli.metrics.protocols import PROTOCOLS
from texttok_cli.models.tokenizer import TexTok

Draw = Callable[..., Path]
Run = Callable[..., Any]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator_module, "FidInception", TinyInception)
    monkeypatch.setattr("texttok_cli.metrics.sources.WIDTHS", {"pool": DIM, "spatial": DIM})
    for name in ("POOL_DIM", "SPATIAL_DIM"):
        monkeypatch.setattr(evidence_module, name, DIM)


@pytest.fixture
def pictures(draw: Draw, tmp_path: Path) -> Path:
    """Six pictures, not square, with captions."""
    for seed in range(6):
        path = draw(tmp_path / "pictures" / f"{seed}.png", seed, (48, 32))
        path.with_suffix(".txt").write_text(f"a picture of number {seed}")
    return tmp_path / "pictures"


def numbers(outcome: Any) -> dict[str, float]:
    assert outcome.code == 0, outcome.err
    return {result["metric"]: result["value"] for result in json.loads(outcome.out)["results"]}


# ------------------------------------------------------------------ a model


def test_rfid_alone_measures_the_default_model_on_the_bundled_set(texttok: Run, bundled: Path, fake: None) -> None:
    (bundled / f"{inference.DEFAULT_MODEL}.safetensors").write_bytes((bundled / "text.safetensors").read_bytes())
    outcome = texttok("eval", "--metric", "rfid")
    assert outcome.code == 0
    assert "rfid" in outcome.out and "188" in outcome.out and "emoji128-val.tar" in outcome.out
    assert "rfid: 188 samples and 188 references: covariances" in outcome.err


def test_a_model_is_measured_without_files(texttok: Run, models: Path, pictures: Path, tmp_path: Path) -> None:
    model = models / "text.safetensors"
    report = tmp_path / "out/report.json"
    found = numbers(texttok("eval", "--metric", "psnr,ssim", "-m", model, "--data", pictures, "-b", 4, "-o", report, "--json"))
    tokenizer = load_tokenizer(model)
    paths, captions = sorted(pictures.glob("*.png")), [f"a picture of number {i}" for i in range(6)]
    originals = torch.stack([inference._as_batch(path, 32)[0] for path in paths])
    again = tokenizer.decode(tokenizer.encode(originals, captions), captions)
    assert found["psnr"] == pytest.approx(float(psnr(originals, again).mean()), rel=1e-5)
    assert found["ssim"] == pytest.approx(float(ssim(originals, again).mean()), rel=1e-4)
    card = json.loads(report.read_text())["results"][0]["card"]
    assert card["samples"] == "text" and card["model_sha256"] == tokenizer.info.sha256
    assert (card["n"], card["n_reference"], card["size"], card["task"]) == (6, 6, 32, "reconstruction")
    assert card["crop"].startswith("ADM") and card["reference"] == "pictures" and card["text"] == "caption: first caption"
    assert card["network"] is None and card["split"] is None
    assert list(report.parent.iterdir()) == [report]


def test_part_of_the_data_and_the_empty_condition(texttok: Run, models: Path, pictures: Path) -> None:
    outcome = texttok(
        "eval", "--metric", "psnr", "-m", models / "text.safetensors", "--data", pictures, "-n", 3, "--no-caption",
        "--split", "val", "--note", "seed=3", "--json",
    )  # fmt: skip
    card = json.loads(outcome.out)["results"][0]["card"]
    assert (card["n"], card["split"], card["seed"], card["text"]) == (3, "val", "3", "none (--no-caption)")


def test_part_of_the_data_is_evenly_spaced_as_data_lie_sorted_by_class(texttok: Run, models: Path, pictures: Path) -> None:
    options = ("eval", "--metric", "psnr", "-m", models / "plain.safetensors", "--data", pictures, "--json")
    part = texttok(*options, "-n", 2)
    for number in (1, 2, 4, 5):
        (pictures / f"{number}.png").unlink()
    assert json.loads(texttok(*options).out) == json.loads(part.out)


def test_captions_that_the_text_encoder_cuts_off_are_said(texttok: Run, models: Path, pictures: Path) -> None:
    (pictures / "3.txt").write_text("long " * 40)
    options = ("eval", "--metric", "psnr", "--data", pictures, "-m", models / "text.safetensors")
    said = "text: longer than 24 text tokens, so the end is cut off: 1 of 6 texts"
    assert said in texttok(*options).err
    assert texttok(*options, "-m", models / "plain.safetensors").err.count("longer than") == 1
    for quiet in ("--quiet", "--no-caption"):
        assert "longer than" not in texttok(*options, quiet).err


def test_the_paper_reconstructs_the_training_split(texttok: Run, models: Path, pictures: Path, fake: None) -> None:
    options = ("eval", "--protocol", "recon", "--metric", "rfid,psnr", "-m", models / "plain.safetensors", "--json")

    def split(*more: object) -> tuple[str | None, str]:
        outcome = texttok(*options, "--data", pictures, *more)
        card = json.loads(outcome.out)["results"][0]["card"]
        assert (card["protocol"], card["resize"]) == ("recon", "tf1-bilinear")
        return card["split"], outcome.err

    found, said = split()
    assert found == "train, as the protocol has it" and "split" not in said
    found, said = split("--split", "val")
    assert found == "val" and "split: val; protocol recon has: train" in said
    found, said = split("--split", "train")
    assert found == "train" and "split" not in said
    assert "needs --data" in texttok(*options).err


def test_a_protocol_takes_its_number_of_images_of_the_data(
    texttok: Run, models: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROTOCOLS, "recon", replace(PROTOCOLS["recon"], images=4))
    options = ("eval", "--protocol", "recon", "--metric", "psnr", "-m", models / "plain.safetensors", "--data", pictures, "--json")
    whole, fewer, more = texttok(*options), texttok(*options, "-n", 3), texttok(*options, "-n", 5)
    assert [json.loads(outcome.out)["results"][0]["card"]["n"] for outcome in (whole, fewer, more)] == [4, 3, 5]
    assert "protocol recon takes" not in whole.err and "3 images: protocol recon takes 4" in fewer.err
    assert "5 images: protocol recon takes 4" in more.err


@pytest.fixture
def by_class(save_model: Callable[..., Path], tmp_path: Path) -> Path:
    return save_model(tmp_path / "by-class.safetensors", 0, {"source": "class_embedding", "num_classes": 3}, ["red", "green", "blue"])


def shard(path: Path, pictures: Path, classes: list[str | None]) -> Path:
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(classes):
            tar.add(pictures / f"{i}.png", f"{i}.png")
            about = json.dumps({"class": name, "caption": "some"}).encode()
            member = tarfile.TarInfo(f"{i}.json")
            member.size = len(about)
            tar.addfile(member, io.BytesIO(about))
    return path


def test_a_model_on_class_embeddings_is_told_the_images_own_classes(
    texttok: Run, by_class: Path, pictures: Path, fake: None, tmp_path: Path
) -> None:
    names = ["green", "blue", "green", "red", "blue", "green"]
    options = ("eval", "--metric", "psnr,rfid", "-m", by_class, "--json", "--html", tmp_path / "page.html", "--data")
    outcome = texttok(*options, shard(tmp_path / "data.tar", pictures, names))
    tokenizer = load_tokenizer(by_class, device="cpu")
    originals = torch.stack([inference._as_batch(path, 32)[0] for path in sorted(pictures.glob("*.png"))])
    again = tokenizer.decode(tokenizer.encode(originals, names), names)
    assert numbers(outcome)["psnr"] == pytest.approx(float(psnr(originals, again).mean()), rel=1e-5)
    assert json.loads(outcome.out)["results"][0]["card"]["text"] == "class_embedding: the images' classes"
    for name in names:  # the same in folders
        (tmp_path / "folders" / name).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        shutil.copy(pictures / f"{i}.png", tmp_path / "folders" / name)
    assert numbers(texttok(*options, tmp_path / "folders")) == pytest.approx(numbers(outcome), rel=1e-5)
    others = numbers(texttok(*options, shard(tmp_path / "data.tar", pictures, ["red"] * 6)))
    assert all(abs(others[metric] - value) > 1e-3 for metric, value in numbers(outcome).items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "4: has no class: lay images in folders by class"),
        ("pink", "4: class 'pink' is not among the 3 training classes, such as 'red'"),
    ],
)
def test_an_image_of_no_class_of_the_model_is_named(
    wrong: str | None, message: str, texttok: Run, by_class: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("texttok_cli.metrics.passes.Pass", None)  # before anything is computed
    data = shard(tmp_path / "data.tar", pictures, ["red", "red", "blue", "red", wrong, "red"])
    outcome = texttok("eval", "--metric", "psnr", "-m", by_class, "--data", data)
    assert outcome.code == 1 and outcome.err.startswith(f"texttok: {message}") and outcome.err.count("\n") == 1


def test_there_is_no_empty_class(texttok: Run, by_class: Path, pictures: Path, tmp_path: Path) -> None:
    data = shard(tmp_path / "data.tar", pictures, ["red"] * 6)
    outcome = texttok("eval", "--metric", "psnr", "-m", by_class, "--data", data, "--no-caption")
    assert (
        outcome.code and outcome.err == "texttok: by-class: is conditioned on classes and has no empty condition: leave out --no-caption\n"
    )


# ------------------------------------------------------------------ samples


@pytest.fixture
def samples(draw: Draw, tmp_path: Path) -> Path:
    """Six square samples with the pictures' names."""
    for seed in range(6):
        draw(tmp_path / "samples" / f"{seed}.png", seed + 50)
    return tmp_path / "samples"


def test_samples_against_images_against_their_statistics_and_as_a_batch(
    texttok: Run, samples: Path, pictures: Path, fake: None, tmp_path: Path
) -> None:
    """The same number whatever form samples and references have."""
    options = ("--metric", "gfid,sfid", "--json")
    expected = numbers(texttok("eval", *options, "--samples", samples, "--ref", pictures, "--save-samples", tmp_path / "s.npz"))
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (6, 32, 32, 3)
    assert texttok("eval", "--samples", samples, "--save-stats", tmp_path / "stats.npz").code == 0
    reverse = numbers(texttok("eval", *options, "--samples", pictures_of_size_32(pictures), "--ref", tmp_path / "stats.npz"))
    assert reverse["gfid"] == pytest.approx(expected["gfid"], rel=1e-6)  # the distance is symmetric
    batch = texttok("eval", *options, "--samples", tmp_path / "s.npz", "--ref", pictures)
    assert numbers(batch) == pytest.approx(expected, rel=1e-9)
    card = json.loads(batch.out)["results"][0]["card"]
    assert (card["task"], card["samples"], card["uint8"]) == ("generation", "s.npz", "as stored")


def pictures_of_size_32(pictures: Path) -> Path:
    folder = pictures.with_name("cropped")
    folder.mkdir()
    for path in pictures.glob("*.png"):
        from texttok_cli.data import center_crop

        center_crop(Image.open(path), 32).save(folder / path.name)
    return folder


def test_adms_reference_gives_statistics_and_its_images_the_manifold(texttok: Run, samples: Path, fake: None, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    statistics = {"mu": np.zeros(DIM), "sigma": np.eye(DIM), "mu_s": np.zeros(DIM), "sigma_s": np.eye(DIM)}
    np.savez(tmp_path / "virtual.npz", images, **statistics)
    outcome = texttok(
        "eval", "--protocol", "adm-class", "--metric", "gfid,precision", "--samples", samples, "--ref", tmp_path / "virtual.npz", "--json"
    )
    assert outcome.code == 0, outcome.err
    cards = {result["metric"]: result["card"] for result in json.loads(outcome.out)["results"]}
    assert cards["gfid"]["n_reference"] is None and cards["precision"]["n_reference"] == 9
    # Nobody said how labels were drawn, or that a file of this name is ADM's: the card says whose word it is.
    assert cards["gfid"]["labels"] == "equally many a class, as the protocol has it"
    assert cards["gfid"]["split"] == "train (ADM's VIRTUAL batch), as the protocol has it"
    (tmp_path / "virtual.npz").rename(tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    options = ("eval", "--protocol", "adm-class", "--metric", "gfid", "--ref", tmp_path / "VIRTUAL_imagenet256_labeled.npz", "--json")
    outcome = texttok(*options, "--samples", samples, "--note", "labels=equally many a class")
    assert json.loads(outcome.out)["results"][0]["card"]["split"].startswith("train") and "protocol adm-class" in outcome.err
    assert "split" not in outcome.err and "labels" not in outcome.err


def test_a_card_names_of_the_references_only_what_its_number_is_of(texttok: Run, samples: Path, fake: None, tmp_path: Path) -> None:
    """FID is of their statistics, however their images were cropped, and an Inception Score of no references."""
    np.savez(tmp_path / "ref.npz", np.zeros((9, 32, 32, 3), np.uint8), mu=np.zeros(DIM), sigma=np.eye(DIM))
    options = ("--metric", "gfid,precision,gis", "--split", "train", "--json")
    outcome = texttok("eval", *options, "--samples", samples, "--ref", tmp_path / "ref.npz")
    cards = [result["card"] for result in json.loads(outcome.out)["results"]]
    said = [(card["crop"], card["reference"], card["split"], card["reference_sha256"] is not None) for card in cards]
    assert said == [(None, "ref.npz", "train", True), ("as stored", "ref.npz", "train", True), (None, None, None, False)]


def test_adms_protocol_needs_both_of_adms_statistics(texttok: Run, samples: Path, fake: None, tmp_path: Path) -> None:
    np.savez(tmp_path / "fid.npz", mu=np.zeros(DIM), sigma=np.eye(DIM))
    for references in (samples, tmp_path / "fid.npz"):
        outcome = texttok("eval", "--protocol", "adm-class", "--metric", "gfid", "--samples", samples, "--ref", references)
        assert outcome.code == 1 and "its references are ADM's VIRTUAL_imagenet" in outcome.err


@pytest.mark.parametrize(
    ("name", "images"), [("VIRTUAL_imagenet512.npz", False), ("VIRTUAL_imagenet64_labeled.npz", False), ("other.npz", True)]
)
def test_samples_of_another_size_than_the_references_are_told(
    name: str, images: bool, texttok: Run, samples: Path, fake: None, tmp_path: Path
) -> None:
    """By the name of ADM's file, or by the images in one; references of images are cropped to the samples' size."""
    held = {"mu": np.zeros(DIM), "sigma": np.eye(DIM)} | ({"arr_0": np.zeros((4, 64, 64, 3), np.uint8)} if images else {})
    np.savez(tmp_path / name, **held)
    size = 512 if "512" in name else 64
    outcome = texttok("eval", "--metric", "gfid,gis", "--samples", samples, "--ref", tmp_path / name)
    assert outcome.code == 0 and f"gfid: samples of 32 pixels a side against {name}, which is of {size}" in outcome.err
    assert outcome.err.count("pixels a side") == 1  # an Inception Score is of no references
    same = tmp_path / "VIRTUAL_imagenet32.npz"
    np.savez(same, mu=np.zeros(DIM), sigma=np.eye(DIM))
    assert "pixels a side" not in texttok("eval", "--metric", "gfid", "--samples", samples, "--ref", same).err


def test_samples_in_jpeg_files_are_told(texttok: Run, samples: Path, pictures: Path, fake: None, tmp_path: Path) -> None:
    """By what is in the files: the loss is in the number, which is not comparable with one of PNG files."""
    options = ("eval", "--metric", "gfid", "--ref", pictures, "--json", "--samples")
    whole = texttok(*options, samples)
    assert "JPEG" not in whole.err + whole.out
    for number in (1, 2):
        Image.open(samples / f"{number}.png").save(samples / f"{number}.jpg")
        (samples / f"{number}.png").unlink()
    (samples / "2.jpg").rename(samples / "2.png")  # whatever it is called
    (samples / "3.png").rename(samples / "3.jpg")
    outcome = texttok(*options, samples)
    assert "gfid: 2 of 6 samples are JPEG files" in outcome.err
    assert json.loads(outcome.out)["results"][0]["card"]["uint8"] == "as stored, 2 of them as JPEG (lossy)"
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for path in sorted(samples.iterdir()):
            shard.add(path, path.name)
    assert json.loads(texttok(*options, tmp_path / "shard.tar").out)["results"][0]["card"]["uint8"].endswith("2 of them as JPEG (lossy)")


def test_pairs_are_found_by_name(texttok: Run, samples: Path, pictures: Path) -> None:
    found = numbers(texttok("eval", "--metric", "psnr", "--samples", samples, "--ref", pictures, "--json"))
    one = numbers(texttok("eval", "--metric", "psnr", "--samples", samples / "0.png", "--ref", pictures, "--json"))
    assert 0 < found["psnr"] != one["psnr"] > 0
    (samples / "0.png").rename(samples / "other.png")
    outcome = texttok("eval", "--metric", "psnr", "--samples", samples, "--ref", pictures)
    assert outcome.code == 1 and "other.png: no reference with that name" in outcome.err


def test_a_pair_is_found_whatever_the_ending_but_is_one_alone(texttok: Run, draw: Draw, samples: Path, pictures: Path) -> None:
    options = ("eval", "--metric", "psnr", "--samples", samples, "--ref", pictures, "--json")
    before = numbers(texttok(*options))
    (samples / "0.png").rename(samples / "0.PNG")
    assert numbers(texttok(*options)) == pytest.approx(before)
    draw(pictures / "0.JPG", 9)
    outcome = texttok(*options)
    assert outcome.code == 1 and "0: two references differ only in file extension" in outcome.err


@pytest.mark.parametrize(
    ("shape", "what"),
    [((5, 32, 32, 3), "6 samples and 5 references"), ((6, 16, 16, 3), "samples of 32 and references of 16 pixels a side")],
)
def test_pairs_by_position_are_equally_many_and_equally_large(
    shape: tuple[int, ...], what: str, texttok: Run, samples: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "originals.npz", np.zeros(shape, np.uint8))
    outcome = texttok("eval", "--metric", "psnr", "--samples", samples, "--ref", tmp_path / "originals.npz")
    assert outcome.code in (1, 2) and what in outcome.err


def test_a_folder_against_an_npz_goes_by_number(texttok: Run, draw: Draw, tmp_path: Path) -> None:
    """As an .npz against a folder does: its images have positions alone, and 10.png is the eleventh."""
    for seed in range(12):
        draw(tmp_path / "samples" / f"{seed}.png", seed)
    pixels = [np.asarray(Image.open(tmp_path / "samples" / f"{seed}.png")) for seed in range(12)]
    np.savez(tmp_path / "originals.npz", np.stack(pixels))
    options = ("eval", "--metric", "ssim", "--json")
    assert numbers(texttok(*options, "--samples", tmp_path / "samples", "--ref", tmp_path / "originals.npz")) == {"ssim": 1.0}
    assert numbers(texttok(*options, "--samples", tmp_path / "originals.npz", "--ref", tmp_path / "samples")) == {"ssim": 1.0}


MADE_BY = {
    "sampler": "ddim", "steps": 50, "cfg": "1.5", "labels": None, "generator_sha256": "e" * 64, "tokenizer_sha256": "f" * 64,
    "captions_sha256": None, "guide_sha256": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_samples_of_texttok_sample_say_how_they_were_made(kind: str, texttok: Run, pictures: Path, fake: None, tmp_path: Path) -> None:
    """The run's folder, or its images alone: the same number, and a card that nobody had to write."""
    made_by = MADE_BY | {"labels": "proportional"}
    run = SampleFolder(tmp_path / "run", 6, {"format": kind, "images": 6, "precision": "fp32", **made_by})
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    run.add(range(4), images[:4])
    run.record(lambda i: {"seed": 7 + i, **made_by})
    options = ("eval", "--metric", "gfid", "--ref", pictures, "--json", "--samples")
    assert "4 of 6 samples are there" in texttok(*options, tmp_path / "run").err
    run.add(range(4, 6), images[4:])
    run.record(lambda i: {"seed": 7 + i, **made_by})
    run.finish(labels=[0] * 6, columns=3)
    whole = texttok(*options, tmp_path / "run")
    alone = texttok(*options, tmp_path / "run" / ("images" if kind == "png" else "samples.npz"), "--note", "labels=random")
    assert numbers(whole) == numbers(alone)
    card, other = (json.loads(outcome.out)["results"][0]["card"] for outcome in (whole, alone))
    assert (card["sampler"], card["steps"], card["guidance"], card["seed"], card["precision"]) == ("ddim", "50", "1.5", "7 to 12", "fp32")
    assert card["model_sha256"] == other["model_sha256"] == "e" * 64 and card["samples"] == "run"
    assert card["labels"].startswith("in proportion") and other["labels"] == "random"
    (tmp_path / "run/settings.json").write_text("{}")  # another program's
    assert json.loads(texttok(*options, next((tmp_path / "run").glob("[is]*[sz]"))).out)["results"][0]["card"]["sampler"] is None


def run_of(folder: Path, classes: list[int], **changes: object) -> Path:
    """What `texttok sample --class ...` leaves, of random images."""
    settings = {"format": "png", "images": len(classes), "precision": "fp32", **MADE_BY, **changes}
    run = SampleFolder(folder, len(classes), settings)
    size = (len(classes), 3, 32, 32)
    run.add(range(len(classes)), torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    run.record(lambda i: {"seed": i, "class_id": classes[i]})
    run.finish(labels=classes, columns=2)
    return folder


def test_what_else_lies_in_a_run_is_not_of_that_run(texttok: Run, pictures: Path, fake: None, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [0, 1, 2, 3])
    options = ("eval", "--metric", "gfid", "--ref", pictures, "--json", "--samples")

    def seed(samples: Path) -> str | None:
        found: str | None = json.loads(texttok(*options, samples).out)["results"][0]["card"]["seed"]
        return found

    (run / "images").rename(run / "blurred")
    assert seed(run / "blurred") is None
    (run / "blurred").rename(run / "images")
    assert seed(run / "images") == seed(run / "samples.jsonl") == seed(run) == "0 to 3"


def test_listed_classes_are_not_called_equally_many(texttok: Run, samples: Path, fake: None, tmp_path: Path) -> None:
    """Nor are two lists alike, or samples alike of which nothing is known."""
    statistics = {"mu": np.zeros(DIM), "sigma": np.eye(DIM), "mu_s": np.zeros(DIM), "sigma_s": np.eye(DIM)}
    np.savez(tmp_path / "VIRTUAL_imagenet.npz", **statistics)
    reports = []
    folders = [run_of(tmp_path / f"run{number}", classes) for number, classes in enumerate(([3, 3, 5, 5], [3, 3, 5, 5], [3, 3, 6, 6]))]
    for number, folder in enumerate([*folders, samples, samples]):
        reports.append(tmp_path / f"{number}.json")
        options = ("--protocol", "adm-class", "--metric", "gfid", "--ref", tmp_path / "VIRTUAL_imagenet.npz", "--samples", folder)
        outcome = texttok("eval", *options, "-o", reports[-1])
        assert outcome.code == 0, outcome.err
        labels = json.loads(reports[-1].read_text())["results"][0]["card"]["labels"]
        if folder == samples:
            assert labels == "equally many a class, as the protocol has it"
        else:
            assert labels.startswith("as listed: 2 classes, 2 of each (") and f"labels: {labels}; protocol adm-class" in outcome.err
    alike, unlike, unknown = (
        texttok("eval", "--compare", reports[one], "--compare", reports[other]) for one, other in ((0, 1), (0, 2), (3, 4))
    )
    assert alike.code == 0 and "labels" not in alike.err
    assert unlike.code == 1 and "gfid: different labels: as listed" in unlike.err
    assert unknown.code == 0 and "gfid: how labels were drawn is not known for any of these samples" in unknown.err


def test_labels_at_random_are_not_the_protocol_s(texttok: Run, fake: None, tmp_path: Path) -> None:
    """They are ADM's and DiT's, and give another number."""
    statistics = {"mu": np.zeros(DIM), "sigma": np.eye(DIM), "mu_s": np.zeros(DIM), "sigma_s": np.eye(DIM)}
    np.savez(tmp_path / "VIRTUAL_imagenet.npz", **statistics)
    options = ("eval", "--protocol", "adm-class", "--metric", "gfid", "--ref", tmp_path / "VIRTUAL_imagenet.npz", "--samples")
    drawn, equal = (texttok(*options, run_of(tmp_path / rule, [0, 1, 1, 3], labels=rule)) for rule in ("random", "equal"))
    assert "labels: drawn at random, each class as likely; protocol adm-class has: equally many a class" in drawn.err
    assert "labels" not in equal.err


def run_of_prompts(folder: Path, prompts: list[str]) -> Path:
    """What `texttok sample --prompts ...` leaves."""
    run = SampleFolder(folder, len(prompts), {"format": "png", "images": len(prompts), "precision": "fp32", **MADE_BY})
    run.add(range(len(prompts)), torch.zeros(len(prompts), 3, 32, 32, dtype=torch.uint8))
    run.record(lambda i: {"seed": i, "caption": prompts[i]})
    run.finish(labels=None, columns=2)
    return folder


def test_prompts_are_told_apart(texttok: Run, samples: Path, fake: None, tmp_path: Path) -> None:
    run = run_of_prompts(tmp_path / "run", ["number 0", "number 1"])
    outcome = texttok("eval", "--metric", "gfid", "--ref", samples, "--json", "--samples", run)
    labels = json.loads(outcome.out)["results"][0]["card"]["labels"]
    assert labels.startswith("as listed: 2 prompts, 1 of each (")
    assert labels.endswith("; not checked whether they are captions of the references' split")  # these references have none


def test_prompts_are_compared_with_the_references_captions(texttok: Run, pictures: Path, fake: None, tmp_path: Path) -> None:
    """In any order; where there are no captions to compare with the card says so, and only another list is warned of."""
    np.savez(tmp_path / "stats.npz", mu=np.zeros(DIM), sigma=np.eye(DIM))
    captions = [f"a picture of number {i}" for i in range(6)]
    (pictures / "5.txt").write_text("a picture  of\nnumber 5\n")  # of two lines, which a file of prompts can't have

    def labels(name: str, prompts: list[str], ref: Path, *more: str) -> tuple[str, bool]:
        folder = tmp_path / name if (tmp_path / name).exists() else run_of_prompts(tmp_path / name, prompts)
        outcome = texttok("eval", "--protocol", "t2i", "--metric", "fid", "--ref", ref, "--samples", folder, "--json", *more)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)["results"][0]["card"]["labels"], "labels: " in outcome.err

    assert labels("all", captions[::-1], pictures) == ("captions of the references' split", False)
    assert labels("all", [], pictures, "--note", "labels=from memory") == ("from memory", True)
    for found, warned in (labels("all", [], tmp_path / "stats.npz"), labels("other", ["a", "b"], tmp_path / "stats.npz")):
        assert found.endswith("; not checked whether they are captions of the references' split") and not warned
    some, warned = labels("some", [*captions[:3], captions[0], "another"], pictures)
    assert some.startswith("as listed: 4 prompts, 1 to 2 of each (") and warned
    assert some.endswith("; captions of 3 of the 6 references")
    (pictures / "5.txt").unlink()
    assert "not checked" in labels("all", [], pictures)[0]


def test_the_references_captions_are_those_of_the_field(texttok: Run, pictures: Path, fake: None, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "val.tar", "w") as shard:
        for number in range(3):
            info = tmp_path / "info.json"
            info.write_text(json.dumps({"caption": f"short {number}", "long": f"a long one, {number}"}))
            shard.add(pictures / f"{number}.png", f"{number}.png")
            shard.add(info, f"{number}.json")
    run = run_of_prompts(tmp_path / "run", [f"a long one, {number}" for number in range(3)])
    options = ("eval", "--metric", "fid", "--ref", tmp_path / "val.tar", "--samples", run)
    assert "labels: as listed" in texttok(*options, "--protocol", "t2i").err
    assert "labels: " not in texttok(*options, "--protocol", "t2i", "--caption-field", "long").err
    assert "--caption-field says what CLIP compares" in texttok(*options, "--caption-field", "long").err  # nothing would be compared


def test_classes_are_no_prompts(texttok: Run, pictures: Path, fake: None, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [0, 1, 2, 3])
    outcome = texttok("eval", "--protocol", "t2i", "--metric", "fid", "--ref", pictures, "--samples", run)
    assert "labels: as listed: 4 classes" in outcome.err and "of the 6 references" not in outcome.err


def test_cards_tell_apart_what_made_the_samples(texttok: Run, samples: Path, fake: None, tmp_path: Path) -> None:
    changes = ({}, {"guide_sha256": "1" * 64}, {"tokenizer_sha256": "2" * 64}, {"captions_sha256": "3" * 64})
    cards = []
    for number, change in enumerate(changes):
        run = run_of(tmp_path / f"{number}" / "run", [0, 1, 2, 3], **change)
        outcome = texttok("eval", "--metric", "gfid", "--ref", samples, "--json", "--samples", run)
        cards.append(json.loads(outcome.out)["results"][0]["card"])
    names = ("guide_sha256", "tokenizer_sha256", "unseen_captions_sha256")
    assert [cards[0][name] for name in names] == [None, "f" * 64, None]
    assert [cards[i][name] for i, name in enumerate(names, 1)] == ["1" * 64, "2" * 64, "3" * 64]


class FakeClip:
    """Says of a pair how bright the image is, over the length of its caption."""

    name, sha256, truncated = "fake", "0" * 64, 0

    def __init__(self, *_: object, **__: object) -> None: ...

    def cosines(self, images: torch.Tensor, captions: list[str], *, prefixes: tuple[str, ...]) -> torch.Tensor:
        return torch.tensor(
            [[image.float().mean() / 255 / len(text)] * len(prefixes) for image, text in zip(images, captions, strict=True)]
        )


def test_clip_reads_the_captions_of_a_run_in_an_npz(texttok: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does those of the same run in PNG files."""
    monkeypatch.setattr("texttok_cli.metrics.evaluation.ClipScorer", FakeClip)
    outcomes = []
    for kind in ("png", "npz"):
        run = SampleFolder(tmp_path / kind / "run", 12, {"format": kind, "images": 12, "precision": "fp32", **MADE_BY})
        run.add(range(12), torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
        run.record(lambda i: {"seed": i, "caption": "a" * (i + 1)})
        run.finish(labels=None, columns=4)
        outcomes.append(texttok("eval", "--metric", "clip-score", "--samples", run.path, "--json"))
    assert outcomes[0].code == outcomes[1].code == 0, outcomes[1].err
    assert outcomes[0].out == outcomes[1].out
    without = run_of(tmp_path / "without", [0, 1], format="npz")
    assert "give --captions" in texttok("eval", "--metric", "clip-score", "--samples", without).err


def test_the_card_tells_captions_apart_that_clip_compared_with(texttok: Run, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in the number, which is not comparable with one of others."""
    monkeypatch.setattr("texttok_cli.metrics.evaluation.ClipScorer", FakeClip)
    found = []
    for caption in ("a dog", "a dog", "a cat"):
        for sample in samples.glob("*.png"):
            sample.with_suffix(".txt").write_text(caption)
        outcome = texttok("eval", "--metric", "clip-score,ssim", "--samples", samples, "--ref", samples, "--json")
        clip, pairs = (result["card"]["captions_sha256"] for result in json.loads(outcome.out)["results"])
        assert pairs is None
        found.append(clip)
    assert None not in found and found[0] == found[1] != found[2]


def test_captions_that_clip_cuts_off_are_said(texttok: Run, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("texttok_cli.metrics.evaluation.ClipScorer", FakeClip)
    for sample in samples.glob("*.png"):
        sample.with_suffix(".txt").write_text("a caption")
    options = ("eval", "--metric", "clip-score", "--samples", samples, "--json")
    before = texttok(*options)
    assert before.code == 0 and "longer than CLIP reads" not in before.err
    monkeypatch.setattr(FakeClip, "truncated", 2)
    outcome = texttok(*options)
    said = "2 of 6 captions are longer than CLIP reads, so their end was cut off"
    assert said in outcome.err and json.loads(outcome.out)["results"][0]["warnings"][-1] == said


def test_the_networks_that_measure_are_those_that_were_asked_for(
    texttok: Run, samples: Path, fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    class Inception(TinyInception):
        def __init__(self, **how: Any) -> None:
            asked.append(how)
            super().__init__(**how)

    class Clip(FakeClip):
        def __init__(self, *which: str, device: object, offline: bool) -> None:
            asked.append((*which, offline))

    monkeypatch.setattr(evaluator_module, "FidInception", Inception)
    monkeypatch.setattr("texttok_cli.metrics.evaluation.ClipScorer", Clip)
    for sample in samples.glob("*.png"):
        sample.with_suffix(".txt").write_text("a caption")
    options = ("eval", "--metric", "fid,clip-score", "--samples", samples, "--ref", samples, "--json")
    outcomes = [texttok(*options)]
    own = ("--inception", tmp_path / "whole.pth", "--clip", "RN50", "--clip-weights", "yfcc15m", "--resize", "clean", "--offline")
    outcomes.append(texttok(*options, *own))
    assert asked == [
        ("ViT-B-32-quickgelu", "openai", False),
        {"resize": "tf1-bilinear", "head": False, "weights": None, "offline": False},
        ("RN50", "yfcc15m", True),
        {"resize": "clean", "head": True, "weights": tmp_path / "whole.pth", "offline": True},  # the file is of the whole network
    ]
    for outcome, resize in zip(outcomes, ("tf1-bilinear", "clean"), strict=True):
        cards = [result["card"] for result in json.loads(outcome.out)["results"]]
        said = [(card["network"], card["network_sha256"], card["resize"]) for card in cards]
        assert said == [("inception-v3 of 2015-12-05", "0" * 64, resize), ("fake", "0" * 64, None)]


def test_inception_scores_of_blocks_of_one_class_are_warned_of(texttok: Run, fake: None, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6000, 8, 8, 3), dtype=np.uint8)
    classes = np.arange(6000) // 600
    options = ("eval", "--metric", "gis,is,is-shuffled", "--json", "--samples")
    said = []
    for name, labels in (("sorted", classes), ("mixed", np.arange(6000) % 10), ("scores", classes[:, None] / 10)):
        np.savez(tmp_path / f"{name}.npz", pixels, labels)
        outcome = texttok(*options, tmp_path / f"{name}.npz")
        warnings = {result["metric"]: result["warnings"] for result in json.loads(outcome.out)["results"]}
        said.append([sum("sorted by class" in warning for warning in warnings[metric]) for metric in ("gis", "is", "is-shuffled")])
    assert said == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_samples_are_not_called_sorted_where_the_class_of_some_is_unknown(
    texttok: Run, draw: Draw, fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(few_classes_a_block.__kwdefaults__, "block", 3)
    for seed in range(12):
        draw(tmp_path / "samples" / "abcd"[seed // 3] / f"{seed}.png", seed)
    options = ("eval", "--metric", "gis", "--samples", tmp_path / "samples")
    assert "sorted by class" in texttok(*options).err
    draw(tmp_path / "samples" / "last.png", 12)  # in no class's folder
    outcome = texttok(*options)
    assert outcome.code == 0 and "sorted by class" not in outcome.err


def test_numbers_are_printed_before_files_are_written(texttok: Run, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "page.html")

    monkeypatch.setattr("texttok_cli.commands.eval_report.write_page", full)
    report = tmp_path / "report.json"
    outcome = texttok("eval", "--metric", "psnr", "--samples", samples, "--ref", samples, "--html", tmp_path / "page.html", "-o", report)
    assert outcome.code == 1 and "not finite" in outcome.out and "No space left" in outcome.err and report.exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("-o", "{samples}"), "samples: is a folder; name a file in it"),
        (("--html", "{samples}/0.png/page.html"), "0.png is not a folder"),
        (("--save-stats", "{samples}/0.png/new/s.npz"), "0.png is not a folder"),
        (("--save-samples", "{samples}"), "--save-samples"),
        (("--html", "{samples}/x", "-o", "{samples}/y/../x"), "--html"),
    ],
)
def test_files_that_can_not_be_written_are_told_at_once(
    options: tuple[str, ...], what: str, texttok: Run, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("texttok_cli.metrics.passes.Pass", None)
    outcome = texttok("eval", "--metric", "psnr", "--samples", samples, "--ref", samples, *(o.format(samples=samples) for o in options))
    assert outcome.code == 2 and outcome.err.startswith("texttok: ") and what in outcome.err and outcome.err.count("\n") == 1


def test_a_folder_that_may_not_be_written_to(texttok: Run, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # whoever runs the tests may be root
    outcome = texttok("eval", "--metric", "psnr", "--samples", samples, "--ref", samples, "-o", tmp_path / "new/report.json")
    assert outcome.code == 2 and f"{tmp_path} can't be written to" in outcome.err


def test_equal_images_have_no_finite_psnr(texttok: Run, samples: Path) -> None:
    outcome = texttok("eval", "--metric", "psnr,ssim", "--samples", samples, "--ref", samples)
    assert outcome.code == 0 and "not finite" in outcome.out and "some images equal their originals" in outcome.err


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--metric", "fidd"), "fidd: no such metric; there are fid, rfid"),
        (("--metric", "lpips"), "LPIPS has two networks"),
        (("--metric", "fid", "--samples", "{samples}"), "fid: needs references"),
        (("--metric", "psnr", "--samples", "{samples}"), "give images with --ref"),
        (("--metric", "fid", "--ref", "{pictures}"), "--ref goes with --samples"),
        (("--metric", "gfid", "--model", "{models}/plain.safetensors"), "and these are reconstructions: take rfid"),
        (("--metric", "psnr,gis", "--samples", "{samples}", "--ref", "{samples}"), "and these are reconstructions: take ris"),
        (("--metric", "clip-score", "--samples", "{samples}", "--clip-weights", "none"), "0.png: has no caption"),
        (("--metric", "fid", "--samples", "{pictures}", "--ref", "{samples}"), "is 48 x 32"),
        (("--metric", "psnr", "--samples", "{samples}", "--ref", "{samples}", "--note", "colour=red"), "not KEY=VALUE with a key among"),
        (("--protocol", "t2i", "--metric", "psnr", "--samples", "{samples}", "--ref", "{samples}"), "is about generation"),
        (("--protocol", "recon", "--metric", "fid", "--samples", "{samples}", "--ref", "{samples}"), "is about reconstruction"),
        (("--metric", "psnr", "--samples", "{samples}", "--ref", "{nothing}"), "no such file"),
        (("--metric", "psnr,kid", "--samples", "{samples}", "--ref", "{samples}"), "kid: needs 1,000 samples or more"),
        (("--metric", "is", "--samples", "{samples}", "--offline"), "InceptionV3 (FID) weights with the 1008-way head"),
        (("--compare", "{nothing}"), "nothing: no such file"),
        (("--metric", "psnr", "--resize", "clean"), "--resize is about InceptionV3, which none of these metrics uses"),
        (("--metric", "psnr", "--inception", "x.pth"), "--inception is about InceptionV3"),
        (("--metric", "psnr", "--clip", "ViT-B-32"), "--clip says which CLIP is used"),
        (("--metric", "psnr", "--clip-weights", "openai"), "--clip-weights says which CLIP is used"),  # the default, but asked for
        (("--metric", "psnr", "--gallery", "3"), "--gallery is about the page that --html writes"),
        (("--samples", "{samples}", "--ref", "{samples}", "--captions", "x.jsonl"), "--captions says what CLIP compares samples with"),
        (("--samples", "{samples}", "--ref", "{samples}", "--precision", "bf16"), "--precision is about what a model"),
        (("--compare", "a.json", "--compare", "b.json", "--metric", "psnr"), "--metric does not go with --compare"),
        (("--compare", "a.json", "--compare", "b.json", "-m", "x"), "--model does not go with --compare"),
        (("--compare", "a.json", "--compare", "b.json", "--data", "x"), "--data does not go with --compare"),
        (("--compare", "a.json", "--compare", "b.json", "-o", "x.json"), "--out does not go with --compare"),
        (("--samples", "{samples}", "--ref", "{samples}", "-n", "3"), "--images is about what a model reconstructs"),
        (("--protocol", "t2i", "--samples", "{samples}", "--ref", "{samples}", "--resize", "clean"), "resizes by tf1-bilinear"),
        (("--metric", "psnr", "--model", "{models}/plain.safetensors", "--captions", "x.jsonl"), "plain: takes no captions"),
        (("--metric", "psnr", "--model", "{models}/text.safetensors", "--captions", "x.jsonl", "--no-caption"), "exclude each other"),
        (("--samples", "{samples}/0.png", "--save-stats", "{nothing}.npz"), "--save-stats: a covariance needs 2 images or more"),
        (("--metric", "psnr", "--model", "{models}/plain.safetensors", "--size", "64"), "plain takes images of 32 pixels only"),
        (("--samples", "{samples}", "--ref", "{samples}", "--model", "text"), "--model is about what a model reconstructs"),
        (("--metric", "psnr", "-m", "{models}/plain.safetensors", "-m", "{models}/plain.safetensors"), "plain.safetensors: is given twice"),
        (
            ("--metric", "psnr", "-m", "{models}/plain.safetensors", "-m", "{models}/text.safetensors", "--save-samples", "{nothing}.npz"),
            "--save-samples is of one model's images",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    options: tuple[str, ...],
    what: str,
    texttok: Run,
    models: Path,
    samples: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    places = {"samples": samples, "pictures": pictures, "nothing": tmp_path / "nothing", "models": models}
    outcome = texttok("eval", *(option.format(**places) for option in options), "-q")
    assert outcome.code in (1, 2) and outcome.out == ""
    assert outcome.err.startswith("texttok: ") and what in outcome.err and outcome.err.count("\n") == 1


# ------------------------------------------------------------------ comparing


def test_reports_are_compared_and_unlike_ones_marked(texttok: Run, models: Path, pictures: Path, tmp_path: Path) -> None:
    def measure(name: str, *options: object) -> Path:
        out = tmp_path / f"{name}.json"
        numbers(
            texttok("eval", "--metric", "psnr", "-m", models / f"{name}.safetensors", "--data", pictures, "-o", out, "--json", *options)
        )
        return out

    plain, text = measure("plain"), measure("text")
    assert "plain.json: only one report; name at least two" in texttok("eval", "--compare", plain).err
    (tmp_path / "empty.json").write_text(json.dumps({"texttok_report": 1, "results": []}))
    empty = texttok("eval", "--compare", plain, "--compare", tmp_path / "empty.json", "--compare", text)
    assert empty.code == 1 and "empty.json: holds no numbers" in empty.err
    alike = texttok("eval", "--compare", plain, "--compare", text)
    assert texttok("eval", "--compare", tmp_path / "[pt]*.json").out == alike.out
    for folder, report in (("one", plain), ("two", text)):  # of the same name: their folders tell them apart
        (tmp_path / folder).mkdir()
        shutil.copy(report, tmp_path / folder / "r.json")
    reports = json.loads(texttok("eval", "--compare", tmp_path / "*" / "r.json", "--json").out)["reports"]
    assert reports == [str(tmp_path / "one" / "r.json"), str(tmp_path / "two" / "r.json")]
    assert alike.code == 0 and "plain" in alike.out and "psnr" in alike.out and "differ" not in alike.out + alike.err
    other = measure("other", "-n", 4)
    unlike = texttok("eval", "--compare", plain, "--compare", other)
    assert unlike.code == 1 and "psnr (differs)" in unlike.out and "psnr: different n: 6 | 4" in unlike.err
    (row,) = json.loads(texttok("eval", "--compare", plain, "--compare", other, "--json").out)["rows"]
    assert row["metric"] == "psnr" and len(row["values"]) == 2 and set(row["unlike"]) == {"n", "n_reference", "reference_sha256"}


def test_how_a_model_was_run_is_said_where_it_differs(texttok: Run, models: Path, pictures: Path, tmp_path: Path) -> None:
    """Such numbers may be compared, so the exit code is 0."""
    options = ("eval", "--metric", "psnr", "-m", models / "text.safetensors", "--data", pictures)
    reports = {"captions": (), "none": ("--no-caption",), "bf16": ("--precision", "bf16")}
    for name, how in reports.items():
        assert texttok(*options, *how, "-o", tmp_path / f"{name}.json").code == 0
    files = [option for name in reports for option in ("--compare", tmp_path / f"{name}.json")]
    compared = texttok("eval", *files, "--html", tmp_path / "page.html")
    line = (
        "also different: text: caption: first caption (captions, bf16) | none (--no-caption) (none);"
        " precision: fp32 (captions, none) | bf16 (bf16)"
    )
    assert compared.code == 0 and compared.err == f"{line}\n" and line in (tmp_path / "page.html").read_text()
    assert "differs" not in compared.out
    also = json.loads(texttok("eval", *files, "--json").out)["also_different"]
    first, none = "caption: first caption", "none (--no-caption)"
    assert also == {"text": [first, none, first], "precision": ["fp32", "fp32", "bf16"]}


# ------------------------------------------------------------------ several models


def test_several_models_are_one_table_and_one_report(texttok: Run, models: Path, pictures: Path, tmp_path: Path, fake: None) -> None:
    """Each number is the one of that model alone; the report holds them one after the other, and comparing takes it apart."""
    options = ("eval", "--metric", "psnr,rfid", "--data", pictures)
    alone = [numbers(texttok(*options, "-m", models / f"{name}.safetensors", "--json")) for name in ("plain", "text")]
    out = tmp_path / "twins.json"
    both = texttok(*options, "-m", models / "plain.safetensors", "-m", models / "text.safetensors", "-o", out)
    assert both.code == 0 and len(both.out.splitlines()) == 6
    assert all(word in both.out.splitlines()[0] for word in ("plain", "text")) and f"{alone[1]['psnr']:.4f}" in both.out
    assert "plain: rfid: 6 samples" in both.err and "text: rfid: 6 samples" in both.err
    results = json.loads(out.read_text())["results"]
    assert [(result["card"]["samples"], result["metric"]) for result in results] == [
        ("plain", "psnr"), ("plain", "rfid"), ("text", "psnr"), ("text", "rfid")
    ]  # fmt: skip
    assert [result["value"] for result in results] == pytest.approx(
        [alone[0]["psnr"], alone[0]["rfid"], alone[1]["psnr"], alone[1]["rfid"]]
    )
    assert [(card["tokens"], card["channels"], card["text"]) for card in (results[0]["card"], results[2]["card"])] == [
        (4, 8, None), (4, 8, "caption: first caption")
    ]  # fmt: skip
    compared = texttok("eval", "--compare", out)
    assert compared.code == 0 and "twins: plain" in compared.out and "twins: text" in compared.out


def test_a_second_model_goes_on_where_it_was(
    texttok: Run, models: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one's pass, which was whole, is not done again."""
    options = ("eval", "--metric", "psnr", "-m", models / "plain.safetensors", "-m", models / "text.safetensors", "--data", pictures)
    options = (*options, "-b", 2, "--json", "-o", tmp_path / "out/report.json")
    decode, seen = inference.Tokenizer.decode, []

    def stop(self: inference.Tokenizer, *args: Any) -> torch.Tensor:
        seen.append(self.info.name)
        if len(seen) == 5:
            raise BackendError("the machine went away")
        return decode(self, *args)

    monkeypatch.setattr(inference.Tokenizer, "decode", stop)
    monkeypatch.setattr("texttok_cli.metrics.passes.SAVE_EVERY", 0)
    assert texttok(*options).code == 1
    second = texttok(*options)
    assert second.code == 0 and "going on from image 6" in second.err and "going on from image 2" in second.err
    assert seen == ["plain"] * 3 + ["text"] * 4
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


def test_models_of_other_sizes_are_refused(texttok: Run, models: Path, pictures: Path, tmp_path: Path) -> None:
    cfg = load_tokenizer(models / "plain.safetensors").cfg.model_copy(update={"image_size": 64})
    save_tokenizer(tmp_path / "large.safetensors", TexTok(cfg), training={})
    outcome = texttok(
        "eval", "--metric", "psnr", "-m", models / "plain.safetensors", "-m", tmp_path / "large.safetensors", "--data", pictures
    )
    assert outcome.code == 1 and "plain takes images of 32 pixels and large of 64" in outcome.err


# ------------------------------------------------------------------ several processes


def test_two_processes_find_what_one_does(models: Path, pictures: Path, tmp_path: Path) -> None:
    twins = ["-m", models / "text.safetensors", "-m", models / "plain.safetensors"]
    command = ["eval", "--metric", "psnr,ssim", *twins, "--data", pictures, "-b", "2", "-q", "--html", tmp_path / "page.html", "-o"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--log-dir", str(tmp_path), "--nproc-per-node", "2"]
    found = []
    for number, launcher in enumerate(([], launch)):
        out = tmp_path / f"{number}.json"
        arguments = [sys.executable, *launcher, "-m", "texttok_cli", *map(str, command), str(out)]
        subprocess.run(arguments, check=True, env=environment, capture_output=True)
        found.append(json.loads(out.read_text()))
    assert len(found[0]["results"]) == 4
    for one, two in zip(found[0]["results"], found[1]["results"], strict=True):
        assert one["value"] == pytest.approx(two["value"], rel=1e-6) and one["card"] == two["card"]


def test_an_interrupted_run_goes_on(texttok: Run, models: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("texttok_cli.metrics.passes.SAVE_EVERY", 0)
    options = ("eval", "--metric", "psnr", "-m", models / "text.safetensors", "--data", pictures, "-b", 2, "--json", "-o")
    whole = numbers(texttok(*options, tmp_path / "whole.json"))
    decode, calls = inference.Tokenizer.decode, []

    def stop(self: inference.Tokenizer, *args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise BackendError("the machine went away")
        return decode(self, *args)

    out, state = tmp_path / "report.json", tmp_path / ".report.json.state-0-of-1"
    with monkeypatch.context() as patch:
        patch.setattr(inference.Tokenizer, "decode", stop)
        assert texttok(*options, out).code == 1
    assert state.exists() and not out.exists()
    assert "is the state of another evaluation" in texttok(*options, out, "--no-caption").err
    second = texttok(*options, out)
    assert "going on from image 4" in second.err
    assert numbers(second) == whole and out.exists() and not state.exists()


def test_a_state_of_other_files_is_refused(
    texttok: Run, models: Path, pictures: Path, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("texttok_cli.metrics.passes.SAVE_EVERY", 0)
    options = ("eval", "--metric", "psnr", "-m", models / "text.safetensors", "--data", pictures, "-b", 2, "-o", tmp_path / "report.json")
    draw(pictures / "5.png", 5, part=0.5)
    damaged = texttok(*options)
    assert damaged.code == 1 and "5.png: damaged or cut short" in damaged.err and "fix or remove it" in damaged.err
    draw(pictures / "5.png", 5)
    assert "is the state of another evaluation" in texttok(*options).err


def test_a_state_of_other_classes_is_refused(
    texttok: Run, by_class: Path, pictures: Path, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("texttok_cli.metrics.passes.SAVE_EVERY", 0)
    draw(pictures / "5.png", 5, part=0.5)
    manifest = tmp_path / "data.jsonl"
    options = ("eval", "--metric", "psnr", "-m", by_class, "--data", manifest, "-b", 2, "-o", tmp_path / "report.json")
    for name, told in (("red", "5.png: damaged"), ("red", "5.png: damaged"), ("blue", "is the state of another evaluation")):
        rows = ({"image": str(pictures / f"{i}.png"), "class": name} for i in range(6))
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert told in texttok(*options).err
