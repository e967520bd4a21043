"""`texttok sample`, as a person runs it, interrupts it and mistypes it."""

import errno
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from one_line import one_line
from PIL import Image
from tiny_generator import BY_CLASS, BY_TEXT, CLASSES, save_tiny_generator

from texttok_cli.commands import sample_folder
from texttok_cli.commands.sample import Labels, sample
from texttok_cli.data import images, open_dataset
from texttok_cli.files import sha256_file
from texttok_cli.generation import Generator
from texttok_cli.metrics.sample_run import LABELS
from texttok_cli.metrics.sources import NpzImages, writing_npz

Run = Callable[..., Any]
FAST = ("--steps", "2", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def generators(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with generators of each kind beside their tokenizer."""
    folder = tmp_path_factory.mktemp("generators")
    text = Path(shutil.copy(models / "text.safetensors", folder))
    save_tiny_generator(folder / "class.safetensors", text, BY_CLASS, captions=["this rose"], class_counts=[1, 1, 2, 4])
    rows = [{"class": name, "caption": f"{look} {name.partition('/')[2]}"} for name in CLASSES for look in ("this", "that")]
    (folder / "class.captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_generator(folder / "prompt.safetensors", text, BY_TEXT)
    return folder


@pytest.fixture
def by_class(texttok: Run, generators: Path) -> Run:
    return lambda *args: texttok("sample", "--model", generators / "class.safetensors", *FAST, *args)


@pytest.fixture
def by_text(texttok: Run, generators: Path) -> Run:
    return lambda *args: texttok("sample", "--model", generators / "prompt.safetensors", *FAST, *args)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def pixels(folder: Path) -> np.ndarray[Any, Any]:
    return np.stack([np.array(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))]).astype(int)


def near(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.shape == b.shape and bool(np.abs(a.astype(int) - b.astype(int)).max() <= 1)


def test_classes_to_a_folder(by_class: Run, generators: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = by_class("--class", "rose", "--class", "0", "-n", "3", "--seed", "7", "--cfg", "2:interval=0,0.7", "--json", "-o", out)
    assert run.code == 0, run.err
    result = json.loads(run.out)
    assert (result["images"], result["out"], result["model"]) == (6, str(out), "class")
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "images", "samples.jsonl", "settings.json"]
    rows = lines(out)
    assert [row["image"] for row in rows] == [f"images/{i:06d}.png" for i in range(6)]
    assert [row["class"] for row in rows] == ["flower/rose"] * 3 + ["animal/cat"] * 3
    assert [row["seed"] for row in rows] == list(range(7, 13))
    assert rows[0]["caption"] in ("this rose", "that rose")
    assert {key: rows[0][key] for key in ("class_id", "sampler", "steps", "cfg", "labels")} == {
        "class_id": 2,
        "sampler": "ddpm",
        "steps": 2,
        "cfg": "2:interval=0,0.7",
        "labels": None,
    }
    assert rows[0]["generator_sha256"] == sha256_file(generators / "class.safetensors")
    assert rows[0]["tokenizer_sha256"] == sha256_file(generators / "text.safetensors")
    grid = np.array(Image.open(out / "grid.png"))
    assert grid.shape == (64, 96, 3)  # a class a row
    assert np.array_equal(grid[32:, 64:], np.array(Image.open(out / "images" / "000005.png")))
    leaked = [row for row in rows if row.get("leaked")]
    assert all((row["caption"] == "this rose") == (row in leaked) for row in rows)


@pytest.mark.parametrize(("args", "shape"), [(["-n", 3], (64, 64, 3)), (["--labels", "equal", "-n", 12], (96, 128, 3))])
def test_the_grid_of_one_run_of_images_is_as_square_as_can_be(
    args: list[Any], shape: tuple[int, ...], by_class: Run, tmp_path: Path
) -> None:
    chosen = [] if "--labels" in args else ["--class", "rose"]
    assert by_class(*chosen, *args, "--steps", 2, "-o", tmp_path / "out").code == 0
    assert np.array(Image.open(tmp_path / "out" / "grid.png")).shape == shape


def test_the_classes_are_listed(by_class: Run, by_text: Run) -> None:
    assert by_class("--list-classes").out.splitlines() == CLASSES
    assert json.loads(by_class("--list-classes", "--json").out) == {"classes": CLASSES}
    assert "prompt.safetensors: names no classes" in by_text("--list-classes").err


@pytest.mark.parametrize(
    ("form", "size", "message"), [("EPS", (32, 32), "not an image"), ("PNG", (64, 16), "is 64 x 16, not 32 x 32; remove it")]
)
def test_images_of_another_program_in_the_folder_are_not_taken_for_ours(
    form: str, size: tuple[int, int], message: str, by_class: Run, tmp_path: Path
) -> None:
    """An EPS would be run by Ghostscript."""
    out = tmp_path / "out"
    by_class("--class", "rose", "-n", "3", "-o", out)
    (out / "grid.png").unlink()
    planted = out / "images" / "000001.png"
    Image.new("RGB", size).save(planted, form)
    if form == "EPS":
        planted.write_bytes(planted.read_bytes() + sample_folder.PNG_END)
    assert f"{planted}: {message}" in one_line(by_class("--class", "rose", "-n", "3", "-o", out).err)


def test_listed_classes_move_no_cursor(texttok: Run, generators: Path, tmp_path: Path) -> None:
    file = save_tiny_generator(tmp_path / "g.safetensors", generators / "text.safetensors", BY_CLASS, classes=["a\nb", "\x1b[2J", "c", "d"])
    assert texttok("sample", "--model", file, "--list-classes").out == "a\\nb\n\\x1b[2J\nc\nd\n"


def test_samples_need_a_place(by_class: Run) -> None:
    done = by_class("--class", "rose")
    assert done.code == 2 and "--out" in done.err


def test_samples_are_a_manifest_of_what_was_asked_for(by_text: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n  a red boat  \n")
    assert by_text("--prompt", "a dog", "--prompts", prompts, "-o", tmp_path / "out").code == 0
    dataset = open_dataset([tmp_path / "out" / "samples.jsonl"])
    assert [item.caption for item in dataset.items] == ["a dog", "a cat", "a red boat"]
    again = tmp_path / "again"  # from the captions of these samples
    assert by_text("--prompts", tmp_path / "out" / "samples.jsonl", "-o", again).code == 0
    assert near(pixels(again), pixels(tmp_path / "out"))


def test_a_single_image_again_by_its_seed(by_text: Run, tmp_path: Path) -> None:
    assert by_text("--prompt", "a dog", "-n", "5", "-b", "3", "-o", tmp_path / "five").code == 0
    assert by_text("--prompt", "a dog", "--seed", lines(tmp_path / "five")[3]["seed"], "-o", tmp_path / "one").code == 0
    assert near(pixels(tmp_path / "one")[0], pixels(tmp_path / "five")[3])


def test_npz_as_adm_reads_it(by_class: Run, tmp_path: Path) -> None:
    args = ("--labels", "proportional", "-n", "8")
    assert by_class(*args, "--format", "npz", "-o", tmp_path / "npz").code == 0
    assert by_class(*args, "-o", tmp_path / "png").code == 0
    assert sorted(path.name for path in (tmp_path / "npz").iterdir()) == ["grid.png", "samples.jsonl", "samples.npz", "settings.json"]
    with np.load(tmp_path / "npz" / "samples.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and near(file["arr_0"], pixels(tmp_path / "png"))
        assert file["arr_1"].tolist() == [row["class_id"] for row in lines(tmp_path / "png")]
        assert sorted(file["arr_1"].tolist()) == [0, 1, 2, 2, 3, 3, 3, 3]
    assert NpzImages(tmp_path / "npz" / "samples.npz").ids == [row["id"] for row in lines(tmp_path / "npz")]
    assert lines(tmp_path / "npz")[0]["labels"] == "proportional"
    again = by_class(*args, "--format", "npz", "-o", tmp_path / "npz", "--json")
    assert again.code == 0 and json.loads(again.out)["already_there"] == 8


def test_labels_at_random_are_of_the_seeds_alone(by_class: Run, tmp_path: Path) -> None:
    """So a run goes on, is made larger, or is made in other batches without any image changing its class."""
    args = ("--labels", "random")
    assert by_class(*args, "-n", "9", "-o", tmp_path / "nine").code == 0
    assert by_class(*args, "-n", "3", "-b", "2", "--seed", "6", "-o", tmp_path / "last").code == 0
    whole, last = lines(tmp_path / "nine"), lines(tmp_path / "last")
    assert [row["class_id"] for row in whole[6:]] == [row["class_id"] for row in last] and whole[0]["labels"] == "random"
    assert len({row["class_id"] for row in whole}) > 1
    assert near(pixels(tmp_path / "nine")[6:], pixels(tmp_path / "last"))


def test_every_rule_for_labels_has_its_words_on_the_card() -> None:
    assert set(get_args(Labels)) == set(LABELS)


def fail_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: BaseException) -> None:
    generate, done = Generator.generate, []

    def failing(self: Generator, *args: Any) -> Any:
        if len(done) == batches:
            raise error
        done.append(0)
        return generate(self, *args)

    monkeypatch.setattr(Generator, "generate", failing)


@pytest.mark.parametrize("format_", ["png", "npz"])
def test_an_interrupted_run_goes_on(format_: str, by_class: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--class", "rose", "-n", "7", "--format", format_)
    assert by_class(*args, "-b", "3", "-o", tmp_path / "whole").code == 0
    with monkeypatch.context() as patch:
        fail_after(patch, 1, KeyboardInterrupt())
        assert by_class(*args, "-b", "3", "-o", tmp_path / "cut").code != 0
    assert len(lines(tmp_path / "cut")) == 3 and len(pixels(tmp_path / "cut")) == 3
    made = []
    generate = Generator.generate
    monkeypatch.setattr(Generator, "generate", lambda self, requests, how: (made.extend(requests), generate(self, requests, how))[1])
    run = by_class(*args, "-b", "2", "-o", tmp_path / "cut", "--json")
    assert run.code == 0 and json.loads(run.out)["already_there"] == 3 and len(made) == 4
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert near(np.array(Image.open(tmp_path / "cut" / "grid.png")), np.array(Image.open(tmp_path / "whole" / "grid.png")))
    assert not list((tmp_path / "cut").rglob("*.tmp"))


def test_a_full_disk_loses_nothing(by_class: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--class", "rose", "-n", "6", "-b", "2", "--format", "npz", "-o", tmp_path / "out")
    save = images.save_png

    def full(path: Path, image: Any) -> None:
        if path.name == "000003.png":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(images, "save_png", full)
        run = by_class(*args)
    assert run.code == 1 and "No space left on device" in one_line(run.err)
    assert {row["id"] for row in lines(tmp_path / "out")} == {"0", "1", "2"}
    with monkeypatch.context() as patch:  # and full again while the one file is put together

        def no_room(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        @contextmanager
        def writing(*where: Any) -> Iterator[Callable[..., None]]:
            with writing_npz(*where):
                yield no_room

        patch.setattr(sample_folder, "writing_npz", writing)
        assert "No space left on device" in one_line(by_class(*args).err)
    assert not (tmp_path / "out" / "samples.npz").exists() and len(pixels(tmp_path / "out")) == 6
    assert by_class(*args).code == 0
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["arr_0"].shape == (6, 32, 32, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--cfg", "3"), "holds samples with cfg 1.5, not 3; choose another -o OUT"),
        (("-n", "3"), "holds samples with images 2, not 3; choose another -o OUT"),
        (("--seed", "1"), "holds samples with seed 0, not 1"),
        (("--class", "cat", "-n", "1"), "holds samples with classes or prompts"),
        (("--format", "npz"), "holds samples with format png, not npz"),
    ],
)
def test_another_run_does_not_mix_in(change: tuple[str, ...], message: str, by_class: Run, tmp_path: Path) -> None:
    assert by_class("--class", "rose", "-n", "2", "-o", tmp_path / "out").code == 0
    before = pixels(tmp_path / "out")
    run = by_class("--class", "rose", "-n", "2", *change, "-o", tmp_path / "out")
    assert run.code == 1 and message in one_line(run.err)
    assert np.array_equal(pixels(tmp_path / "out"), before)


def test_another_prompt_does_not_mix_in(by_text: Run, tmp_path: Path) -> None:
    assert by_text("--prompt", "a red rose", "-o", tmp_path / "out").code == 0
    run = by_text("--prompt", "a blue rose", "-o", tmp_path / "out")
    assert run.code == 1 and "holds samples with classes or prompts" in one_line(run.err)


def test_another_kind_of_device_does_not_mix_in(by_class: Run, tmp_path: Path) -> None:
    """It draws other noise; a folder that does not say where its images were made goes on."""
    args, file = ("--class", "rose", "-n", "2", "-o", tmp_path / "out"), tmp_path / "out" / "settings.json"
    assert by_class(*args).code == 0
    settings = json.loads(file.read_text())
    assert settings.pop("device") == "cpu"
    file.write_text(json.dumps({**settings, "device": "cuda"}))
    assert "holds samples with device cuda, not cpu; choose another -o OUT" in one_line(by_class(*args).err)
    file.write_text(json.dumps(settings))
    (tmp_path / "out" / "images" / "000001.png").unlink()
    assert by_class(*args).code == 0 and len(pixels(tmp_path / "out")) == 2


def test_leaked_captions_are_reported(by_class: Run, tmp_path: Path) -> None:
    run = by_class("--class", "rose", "-n", "8", "--json", "-o", tmp_path / "out")
    leaked = [row for row in lines(tmp_path / "out") if row.get("leaked")]
    assert 0 < len(leaked) < 8 and {row["caption"] for row in leaked} == {"this rose"}
    assert json.loads(run.out)["with_leaked_captions"] == len(leaked)
    assert f"training data: {len(leaked)} of the 8 images" in run.err


def test_processes_share_the_work(generators: Path, tmp_path: Path, by_class: Run) -> None:
    args = ["--class", "rose", "--class", "cat", "-n", "3", "-b", "2"]
    assert by_class(*args, "-o", tmp_path / "one").code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "texttok_cli", "sample", "--model", generators / "class.safetensors", *FAST, *args, "--json"]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    own = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    runs = [
        subprocess.Popen([*command, "-o", tmp_path / "two"], env=common | one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for one in own
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert json.loads(outputs[0][0])["images"] == 6 and outputs[1][0] == ""
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    assert near(pixels(tmp_path / "two"), pixels(tmp_path / "one"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--class", "crane"], "class 'crane' is ambiguous: animal/crane or machine/crane"),
        (["--class", "roses"], "no class 'roses': did you mean flower/rose?"),
        (["--class", "4"], "class 4: the ids are 0 to 3"),
        (["--prompt", "a cat"], "class: is a class model (4 classes): give it classes, not prompts"),
        (["--class", "rose", "--steps", "0"], "steps 0: sampling takes at least 1 step"),
        (["--class", "rose", "--steps", "1001"], "at most 1000 steps"),
        (["--class", "rose", "--cfg", "-1"], "cfg '-1': the scale is negative"),
        (["--class", "rose", "--sampler", "heun"], "sampler 'heun' is none of those of a ddpm model: ddpm, ddim, dpm++2m"),
        (["--class", "rose", "--tokenizer", "plain"], "makes the latents of tokenizer text"),
        (["--class", "rose", "--prompt", "a"], "--class and --prompt(s) exclude each other"),
        ([], "nothing to sample: give --class, --prompt or --prompts, or --labels"),
        (["--prompts", "none.txt"], "none.txt: no such file"),
        (["--class", "rose", "--captions", "none.jsonl"], "none.jsonl: no such file"),
        (["--class", "rose", "--seed", "4294967296"], "a seed is a whole number from 0 to 4294967295"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(args: list[str], message: str, by_class: Run, bundled: Path, tmp_path: Path) -> None:
    run = by_class(*args, "-o", tmp_path / "out")
    assert run.code in (1, 2) and message in one_line(run.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sampler", "heun"], "sampler 'heun' is none of those of a ddpm model"),
        (["--steps", "1001"], "at most 1000 steps"),
        (["--cfg", "-1"], "cfg '-1': the scale is negative"),
        (["--cfg", "1", "--guide", "missing"], "--guide missing: would not be used"),
    ],
)
def test_how_to_sample_is_checked_before_models_are_loaded(args: list[str], message: str, by_class: Run, tmp_path: Path) -> None:
    run = by_class("--class", "rose", "--tokenizer", "missing", *args, "-o", tmp_path / "out")
    assert run.code in (1, 2) and message in one_line(run.err)


def test_a_model_is_sampled_as_its_file_says_unless_told_otherwise(texttok: Run, generators: Path, tmp_path: Path) -> None:
    own = {"sampler": "ddim", "steps": 3, "cfg": "1"}
    save_tiny_generator(tmp_path / "own.safetensors", generators / "text.safetensors", BY_CLASS, sampling=own)
    captions = shutil.copy(generators / "class.captions.jsonl", tmp_path / "own.captions.jsonl")
    common = ("--class", "rose", "--tokenizer", generators / "text.safetensors", "--captions", captions, "--device", "cpu", "--quiet")

    def made_by(name: str, *args: object) -> dict[str, Any]:
        run = texttok("sample", "--model", tmp_path / "own.safetensors", *common, *args, "-o", tmp_path / name)
        assert run.code == 0, run.err
        return {key: lines(tmp_path / name)[0][key] for key in own}

    assert made_by("own") == own
    assert made_by("told", "--steps", 2, "--cfg", "3:power-cosine=4") == {"sampler": "ddim", "steps": 2, "cfg": "3:power-cosine=4"}
    assert made_by("sampler", "--sampler", "ddpm") == {**own, "sampler": "ddpm"}
    guided = ("--guide", generators / "class.safetensors")
    assert made_by("guided", *guided, "--cfg", "2")["cfg"] == "2"
    for model, args in (("own", []), ("class", ["--cfg", "1.0"])):
        file = (tmp_path if model == "own" else generators) / f"{model}.safetensors"
        run = texttok("sample", "--model", file, *common, *guided, *args, "-o", tmp_path / "none")
        assert run.code == 2 and "class.safetensors: would not be used, as cfg 1 means no guidance" in one_line(run.err)
    assert not (tmp_path / "none").exists()


def test_what_text_models_do_not_take(by_text: Run, tmp_path: Path) -> None:
    for args in (["--class", "cat"], ["--labels", "equal"]):
        run = by_text(*args, "-o", tmp_path / "out")
        assert run.code == 1 and "prompt: is a text-to-image model: give it prompts" in one_line(run.err)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "empty.txt: holds no prompt" in one_line(by_text("--prompts", empty, "-o", tmp_path / "out").err)


@pytest.mark.parametrize(("args", "name"), [(["--class", "cat"], "class-32-128"), (["--prompt", "a cat"], "t2i-32-128")])
def test_no_generator_is_bundled(args: list[str], name: str, texttok: Run, bundled: Path, tmp_path: Path) -> None:
    run = texttok("sample", *args, "-o", tmp_path / "out", *FAST)
    assert run.code == 1 and f"({name} is missing)" in one_line(run.err) and "--model" in run.err


def test_a_folder_of_something_else_is_left_alone(by_class: Run, tmp_path: Path) -> None:
    (tmp_path / "out" / "images").mkdir(parents=True)
    run = by_class("--class", "cat", "-o", tmp_path / "out")
    assert run.code == 1 and "no settings.json" in one_line(run.err)
    assert "-o names a folder" in one_line(by_class("--class", "cat", "-o", tmp_path / "out.npz").err)
    (tmp_path / "file").touch()
    assert "is a file" in one_line(by_class("--class", "cat", "-o", tmp_path / "file").err)


def test_an_image_that_was_cut_is_made_again(by_class: Run, tmp_path: Path) -> None:
    args = ("--class", "cat", "-n", "3", "-o", tmp_path)
    assert by_class(*args).code == 0
    image = tmp_path / "images" / "000001.png"
    whole = image.read_bytes()
    for cut in (b"", whole[:-5]):
        image.write_bytes(cut)
        assert by_class(*args).code == 0 and image.read_bytes() == whole


def test_a_damaged_npz_is_not_taken_for_done(by_class: Run, tmp_path: Path) -> None:
    args = ("--class", "cat", "-n", "3", "--format", "npz", "-o", tmp_path)
    assert by_class(*args).code == 0
    file = tmp_path / "samples.npz"
    file.write_bytes(file.read_bytes()[:500])
    run = by_class(*args)
    assert run.code == 1 and "remove it to make its images again" in one_line(run.err)
    np.savez(file, np.zeros((2, 8, 8, 3), np.uint8))
    assert "holds 2 images, not 3; remove it" in one_line(by_class(*args).err)
    (tmp_path / "settings.json").write_text("[" * 100_000)
    assert "settings.json: damaged" in one_line(by_class(*args).err)


def test_command_and_api_have_the_same_defaults() -> None:
    command, api = (inspect.signature(function).parameters for function in (sample, Generator.sample))
    assert all(command[name].default == api[name].default for name in ("steps", "cfg", "sampler", "batch_size"))
