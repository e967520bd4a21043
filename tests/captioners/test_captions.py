"""Lengths, prompts, measured words, captions from what is known, the file, and the pass over a dataset."""

import inspect
import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from texttok_cli.captioners import run
from texttok_cli.captioners.attributes import COLOURS, Attributes, describe, measure, parse
from texttok_cli.captioners.base import CaptionFailed, CaptionInput, Written, limit_words, with_article
from texttok_cli.captioners.endpoint import Endpoint
from texttok_cli.captioners.known import ClassText, Sidecar
from texttok_cli.captioners.load import load_captioner
from texttok_cli.captioners.prompts import load_prompt
from texttok_cli.captioners.store import CaptionLines
from texttok_cli.commands.caption import caption
from texttok_cli.data import load_image, open_dataset
from texttok_cli.errors import BackendError, DataError, TextTokError
from texttok_cli.files import sha256_file

Picture = Callable[..., Image.Image]

# ------------------------------------------------------------------ lengths and prompts


@pytest.mark.parametrize(
    ("text", "most", "expected", "cut"),
    [
        ("one  two\nthree ", 3, "one two three", False),
        ("One two. Three four five six.", 4, "One two.", True),
        ('He said "stop." Then all went on.', 5, 'He said "stop."', True),
        ("One. Two three four, five six", 4, "One. Two three four", True),  # one sentence of a quarter of the words is too little
        ("", 3, "", False),
    ],
)
def test_words_are_limited_at_a_sentence_or_a_word(text: str, most: int, expected: str, cut: bool) -> None:
    assert limit_words(Written(text), most) == (expected, cut)


def test_what_the_model_did_not_finish_loses_its_half_sentence() -> None:
    assert limit_words(Written("A dog runs. It has a", complete=False), 75) == ("A dog runs.", True)
    assert limit_words(Written("A dog runs on the gra", complete=False), 75) == ("A dog runs on the", True)
    assert limit_words(Written("A dog runs.", complete=False), 75) == ("A dog runs.", True)
    assert limit_words(Written("A dog runs on the", complete=False), 3) == ("A dog runs", True)
    assert limit_words(Written("Dogs", complete=False), 75) == ("Dogs", True)


def test_articles() -> None:
    assert [with_article(noun) for noun in ("dog", "apple", "Orange")] == ["a dog", "an apple", "an Orange"]


def test_a_prompt_is_known_by_its_text() -> None:
    long, short = load_prompt("caption", max_words=75), load_prompt("caption", max_words=25)
    assert "at most 75 words" in long.text and "{" not in long.text
    assert long.sha256 != short.sha256 and long.sha256 == load_prompt("caption", max_words=75).sha256
    unseen = load_prompt("unseen", max_words=75)
    filled = unseen.fill(class_name="tulip", number=3, examples="a {number} b")
    assert "tulip" in filled and "a {number} b" in filled  # what is filled in is not filled in again


# ------------------------------------------------------------------ measured words


@pytest.mark.parametrize("name", list(COLOURS))
def test_plain_pictures_have_their_colour(name: str, picture: Picture) -> None:
    found = measure(picture(COLOURS[name]))
    assert (found.middle, found.edge, found.detail) == (name, name, "smooth")


def test_two_colours_edges_and_light(picture: Picture) -> None:
    image = picture(COLOURS["white"], (128, 128))
    image.paste(COLOURS["red"], (20, 20, 108, 80))
    image.paste(COLOURS["navy"], (20, 80, 108, 108))
    assert measure(image) == Attributes("red and navy", "white", "evenly lit", "smooth")
    assert measure(picture(COLOURS["black"])).light == "dark" and measure(picture(COLOURS["white"])).light == "bright"
    assert measure(picture(size=(128, 128))).detail == "finely detailed"


def test_describe_and_parse_are_inverse() -> None:
    attributes = Attributes("red and dark green", "light grey", "evenly lit", "smooth")
    caption = describe("A field, mostly empty. It rains.", attributes)
    assert caption.endswith("It rains, mostly red and dark green in the middle, light grey towards the edges, evenly lit, smooth")
    assert parse(caption) == ("A field, mostly empty. It rains", attributes)
    assert parse("a dog on a chair") is None


def test_the_shards_captions_have_this_form(real_shards: list[Path]) -> None:
    """And our words are theirs more often than chance: their palette and thresholds are not published."""
    dataset = open_dataset(real_shards, caption_field="measured")
    same = []
    for i in range(0, len(dataset), 20):
        known = parse(str(dataset.items[i].caption))
        assert known is not None and describe(*known) == dataset.items[i].caption
        ours = measure(Image.open(io.BytesIO(dataset.read(i))).convert("RGB"))
        same.append([a == b for a, b in zip(ours, known[1], strict=True)])
    middle, edge, light, detail = np.mean(same, axis=0)
    assert middle > 0.3 and edge > 0.6 and light > 0.9 and detail > 0.9


# ------------------------------------------------------------------ from what is known


def test_class_text_and_sidecar(picture: Picture) -> None:
    subjects = [CaptionInput(picture((200, 30, 30)), "flower/tulip", "two tulips"), CaptionInput(picture())]
    plain, failed = ClassText()(subjects)
    assert plain == Written("a photo of a tulip") and isinstance(failed, CaptionFailed)
    measured = ClassText("a {} ({})", measured=True)(subjects)[0]
    assert measured == Written("a tulip (tulip), mostly red in the middle, red towards the edges, dark, smooth")
    beside, failed = Sidecar()(subjects)
    assert beside == Written("two tulips") and "no text beside it" in str(failed)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK", "I;16"])
def test_a_picture_of_any_mode_is_captioned_as_its_file_is(mode: str, picture: Picture) -> None:
    image = Image.new(mode, (40, 30), 40_000) if mode == "I;16" else picture((200, 30, 30)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    given, expected = CaptionInput(image, "tulip"), CaptionInput(load_image(buffer.getvalue(), name="its file"), "tulip")
    assert given.image.mode == "RGB" and given.image.tobytes() == expected.image.tobytes()
    captioner = ClassText(measured=True)
    assert captioner([given]) == captioner([expected]) != captioner([CaptionInput(picture(), "tulip")])


def test_a_loaded_picture_is_upright_already(picture: Picture) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    picture(size=(40, 30)).save(buffer, "PNG", exif=exif)
    assert CaptionInput(load_image(buffer.getvalue(), name="x")).image.size == CaptionInput(Image.open(buffer)).image.size == (30, 40)


def test_what_is_no_picture_is_named() -> None:
    with pytest.raises(DataError, match="str: is not a PIL image"):
        CaptionInput("img.png")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="a PIL image: its pixels are floating point"):
        CaptionInput(Image.new("F", (4, 4)))


# ------------------------------------------------------------------ by name


def test_a_captioner_by_its_name(picture: Picture) -> None:
    for name in ("class-text", "class-measured", "sidecar"):
        captioner = load_captioner(name)
        (written,) = captioner([CaptionInput(picture(), "tulip", "beside")])
        assert captioner.backend == name and isinstance(written, Written)
    served = load_captioner("endpoint", model="m", endpoint="http://localhost:1/v1", max_words=20, concurrency=3)
    assert isinstance(served, Endpoint) and (served.model, served.concurrency, served.max_tokens) == ("m", 3, 80)
    assert served.prompt == load_prompt("caption", max_words=20)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["clip"], "clip: no such captioner; there are classifier, class-text, .*, endpoint"),
        (["vlm"], "vlm: this captioner needs a model"),
        (["endpoint"], "endpoint: this captioner needs a model"),
        (["endpoint", {"model": "m"}], "not an address such as http://localhost:8000/v1"),
        (["class-text", {"template": "a thing"}], "has no {} for the class"),
        (["classifier", {"device": "abacus"}], "not available here"),
    ],
)
def test_no_such_captioner(given: list[Any], said: str) -> None:
    name, options = given[0], dict(*given[1:])
    with pytest.raises(TextTokError, match=said):
        load_captioner(name, **options)


def test_the_defaults_are_those_of_the_command() -> None:
    command = inspect.signature(caption).parameters
    ours = {**inspect.signature(load_captioner).parameters, **inspect.signature(run.write_captions).parameters}
    ours["captioner"] = ours.pop("name")
    assert all(parameter.default == command[name].default for name, parameter in ours.items() if name in command.keys() - {"out"})
    assert set(ours) - set(command) == {"dataset", "on_error", "on_progress"}


# ------------------------------------------------------------------ the file

MADE_BY = {"backend": "b", "max_words": 75}


def test_lines_are_there_at_once_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "captions.jsonl"
    with CaptionLines(path, MADE_BY) as lines:
        lines.add([{"id": "a", "caption": "é"}])
        assert json.loads(path.read_text()) == {"id": "a", "caption": "é", **MADE_BY}
        lines.add([{"id": "b", "caption": "B"}])
    with CaptionLines(path, MADE_BY) as lines:
        assert [row["id"] for row in lines.rows()] == ["a", "b"]


@pytest.mark.parametrize("keep", range(1, 60, 7))
def test_a_line_that_was_cut_off_is_written_anew(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    with CaptionLines(path, MADE_BY) as lines:
        lines.add([{"id": "a", "caption": "A"}])
    first = path.read_bytes()
    path.write_bytes(first + first[:keep])
    with CaptionLines(path, MADE_BY) as lines:
        assert [row["id"] for row in lines.rows()] == ["a"]
        lines.add([{"id": "b", "caption": "B"}])
    assert path.read_bytes().startswith(first) and [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_a_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"id": "a", **MADE_BY}))
    with CaptionLines(path, MADE_BY) as lines:
        lines.add([{"id": "b"}])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_captions_of_other_settings_or_no_captions_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"id": "a", "backend": "b", "max_words": 25}) + "\n")
    with pytest.raises(DataError, match="have max_words 25, these would have 75; give another file with -o"):
        CaptionLines(path, MADE_BY)
    path.write_text("not JSON\nmore\n")
    with pytest.raises(DataError, match=r"captions.jsonl:1: not a JSON line"):
        CaptionLines(path, MADE_BY)
    assert path.read_text() == "not JSON\nmore\n"
    path.write_text('{"id": ["a"]}\n')
    with pytest.raises(DataError, match=r"captions\.jsonl:1: not a JSON line"):
        CaptionLines(path, MADE_BY)
    for whole in ('{"id": 1}\nmore\n{"id"', "a note without a last newline"):  # not what a kill in the midst of writing leaves
        path.write_text(whole)
        with pytest.raises(DataError, match="not a JSON line"):
            CaptionLines(path, {})
        assert path.read_text() == whole


# ------------------------------------------------------------------ the pass


class Fake:
    """Says how large an image is; refuses every third, writes nothing of every fifth."""

    backend, model, prompt = "fake", None, None

    def __init__(self, concurrency: int = 0) -> None:
        self.concurrency, self.calls, self.threads = concurrency, [], set()

    def __call__(self, subjects: Sequence[CaptionInput]) -> list[Written | CaptionFailed]:
        self.calls.append(len(subjects))
        self.threads.add(threading.current_thread())
        time.sleep(0.01)
        return [self._one(subject.image.width) for subject in subjects]

    def _one(self, width: int) -> Written | CaptionFailed:
        return CaptionFailed("refused") if width % 3 == 0 else Written("" if width % 5 == 0 else f"{width} wide")


@pytest.mark.parametrize("concurrency", [0, 1, 4])
def test_every_image_has_an_outcome(concurrency: int, tmp_path: Path, draw: Callable[..., Path]) -> None:
    for i in range(10, 19):
        draw(tmp_path / f"{i}.png", size=(i, 8), part=0.5 if i == 17 else 1)
    fake = Fake(concurrency)
    parts = list(run.caption_dataset(fake, open_dataset([tmp_path]), range(9), batch_size=4))
    found = {index: outcome for part in parts for index, outcome, _ in part}
    assert sorted(found) == list(range(9))
    assert {index: sha256 for part in parts for index, _, sha256 in part} == {i: sha256_file(tmp_path / f"{i + 10}.png") for i in range(9)}
    texts = [outcome.text if isinstance(outcome, Written) else str(outcome) for _, outcome in sorted(found.items())]
    assert texts[:7] == ["the model wrote nothing", "11 wide", "refused", "13 wide", "14 wide", "refused", "16 wide"]
    assert "damaged or cut short" in texts[7] and texts[8] == "refused"
    assert fake.calls == ([4, 3, 1] if concurrency == 0 else [1] * 8)
    assert len(fake.threads) == max(concurrency, 1)


@pytest.mark.parametrize("concurrency", [0, 3])
def test_what_stops_every_image_is_raised_and_the_threads_end(
    concurrency: int, tmp_path: Path, draw: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(30):
        draw(tmp_path / f"{i:02d}.png", size=(8, 8))
    fake = Fake(concurrency)

    def refuse(width: int) -> Written:
        raise BackendError("no such model")

    monkeypatch.setattr(fake, "_one", refuse)
    with pytest.raises(BackendError, match="no such model"):
        list(run.caption_dataset(fake, open_dataset([tmp_path]), range(30), batch_size=1))
    time.sleep(0.1)
    assert len(fake.calls) < 30 and not any(thread.is_alive() for thread in fake.threads - {threading.main_thread()})


def wide(folder: Path, draw: Callable[..., Path], widths: Sequence[int]) -> Path:
    for width in widths:
        draw(folder / f"{width}.png", size=(width, 8))
    return folder


@pytest.mark.parametrize("concurrency", [0, 3])
def test_a_file_of_captions_grows_by_what_is_missing(concurrency: int, tmp_path: Path, draw: Callable[..., Path]) -> None:
    out, failed, progress = tmp_path / "c.jsonl", [], []

    def write() -> run.Captioned:
        failed.clear()
        progress.clear()
        return run.write_captions(
            Fake(concurrency),
            open_dataset(tmp_path / "in"),
            str(out),
            max_words=1,
            batch_size=2,
            on_error=lambda *why: failed.append(why),
            on_progress=lambda *done: progress.append(done),
        )

    wide(tmp_path / "in", draw, [11, 12, 13])
    assert write() == run.Captioned(out, written=2, cut=2, already_there=0)
    assert failed == [("12.png", "refused")] and progress == [(done, 3) for done in ((1, 2, 3) if concurrency else (2, 3))]
    first = out.read_bytes()
    wide(tmp_path / "in", draw, [14])
    assert write() == run.Captioned(out, written=1, cut=1, already_there=2)
    assert failed == [("12.png", "refused")] and progress == [(done, 4) for done in ((1, 2, 3, 4) if concurrency else (1, 2, 4))]
    assert out.read_bytes().startswith(first)
    assert json.loads(out.read_text().splitlines()[-1]) == {
        "id": "14.png",
        "caption": "14",
        "words": 1,
        "input_sha256": sha256_file(tmp_path / "in" / "14.png"),
        "cut": True,
        "backend": "fake",
        "model": None,
        "prompt_sha256": None,
        "max_words": 1,
    }


def test_an_image_without_a_caption_ends_it_unless_somebody_is_told(tmp_path: Path, draw: Callable[..., Path]) -> None:
    dataset, out = open_dataset(wide(tmp_path / "in", draw, [11, 12, 13])), tmp_path / "c.jsonl"
    with pytest.raises(DataError, match=r"\A12\.png: refused\Z"):
        run.write_captions(Fake(), dataset, out)
    assert len(out.read_text().splitlines()) == 2, "its batch is not lost"


def test_an_id_is_no_text_of_a_class(picture: Picture) -> None:
    names = ["n01440764", "train/n01440764", "207", "fish/207"]
    told = ClassText()([CaptionInput(picture(), name) for name in names])
    assert [str(failed) for failed in told] == [
        f"class {name}: is an id, not a word; name the classes in a manifest's `class`" for name in names
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error, CaptionLines(tmp_path / "c.jsonl", {}) as lines:
        lines.add([{"id": "a"}])
    assert error.value.filename == str(tmp_path / "c.jsonl")


def test_two_runs_do_not_write_into_one_file_at_once(tmp_path: Path) -> None:
    with CaptionLines(tmp_path / "c.jsonl", {}), pytest.raises(DataError, match=r"c\.jsonl: another texttok is writing there"):
        CaptionLines(tmp_path / "c.jsonl", {})
    CaptionLines(tmp_path / "c.jsonl", {}).__exit__()
