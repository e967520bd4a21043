import io
import os
import pickle
import sys
from pathlib import Path

import pytest
from inputs import PNG, captions_of, lines, write

from texttok_cli.data import Skipped, load_image, open_dataset
from texttok_cli.errors import DataError


def test_one_image_with_the_caption_beside_it(tmp_path):
    image = write(tmp_path / "cat.png")
    write(tmp_path / "cat.txt", "\ufeffa cat \n")
    dataset = open_dataset([image])
    assert captions_of(dataset) == {"cat.png": "a cat"}
    assert dataset.read(0) == PNG
    assert not dataset.items[0].in_shard


def test_a_jsonl_manifest(tmp_path):
    write(tmp_path / "data/a.png")
    write(tmp_path / "data/b.png")
    write(tmp_path / "data/b.txt", "beside")
    manifest = lines(
        tmp_path / "list.jsonl",
        {"image": "data/a.png", "caption": "an a", "class": 0, "id": 0},
        "{not json",
        {"caption": "no image"},
        "",
        {"image": "data/b.png", "class": "letters"},
        {"image": "data/gone.png"},
        {"image": "data/a.png", "caption": ["list"]},
    )
    dataset = open_dataset([manifest])
    assert [(i.id, i.caption, i.class_name) for i in dataset.items] == [("0", "an a", "0"), ("data/b.png", "beside", "letters")]
    assert dataset.read(1) == PNG
    assert dataset.skipped == [
        Skipped("list.jsonl:2", "no 'image' in this line"),
        Skipped("list.jsonl:3", "no 'image' in this line"),
        Skipped("list.jsonl:6", "data/gone.png: no such file"),
        Skipped("list.jsonl:7", "caption, class and id must be text"),
    ]


def test_a_csv_manifest(tmp_path):
    image = write(tmp_path / "a.png")
    manifest = write(tmp_path / "list.csv", f'image,class,caption\na.png,7,"red, round"\n{image},,\n')
    items = open_dataset([manifest]).items
    assert [(i.id, i.caption, i.class_name) for i in items] == [("a.png", "red, round", "7"), (str(image), None, None)]


def test_spaces_after_the_commas_of_a_csv_are_no_part_of_it(tmp_path):
    write(tmp_path / "a.png")
    manifest = write(tmp_path / "list.csv", 'image , caption, class\na.png, "red, round", 7\n')
    assert [(i.id, i.caption, i.class_name) for i in open_dataset([manifest]).items] == [("a.png", "red, round", "7")]


def test_a_caption_cut_at_its_comma_is_not_taken(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        write(tmp_path / name)
    table = write(tmp_path / "list.csv", "image,caption\na.png,whole,, \nb.png,a dog, a cat, a bird, a fish\nc.png,\n")
    dataset = open_dataset([table])
    assert captions_of(dataset) == {"a.png": "whole", "c.png": None}
    reason = "5 cells for 2 columns: put captions that hold commas into quotes"
    assert dataset.skipped == [Skipped("list.csv:3", reason)]
    with pytest.raises(DataError, match=rf"list\.csv:3: {reason}$"):
        open_dataset([tmp_path / "a.png"], captions=table)


def test_captions_from_a_csv(tmp_path):
    image = write(tmp_path / "a.png")
    table = write(tmp_path / "c.csv", 'image, caption\na.png, "red, round"\n')
    assert captions_of(open_dataset([image], captions=table)) == {"a.png": "red, round"}


def test_a_csv_without_an_image_column(tmp_path):
    with pytest.raises(DataError, match=r"list\.csv: the header line has no column 'image'"):
        open_dataset([write(tmp_path / "list.csv", "file,caption\na.png,x\n")])


def test_a_list_on_stdin(tmp_path, monkeypatch):
    image = write(tmp_path / "a b.png")
    too_long = "x" * 5000
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{image}\n\n{tmp_path}/gone.png\n{too_long}\n"))
    dataset = open_dataset(["-"])
    assert [item.id for item in dataset.items] == [str(image)]
    assert dataset.skipped == [Skipped(f"{tmp_path}/gone.png", "no such file"), Skipped(too_long, "no such file")]


def test_a_list_on_stdin_is_utf8_whatever_the_locale(tmp_path, monkeypatch):
    """As on Windows, whose tools put a byte order mark before it."""
    image = write(tmp_path / "日本é.png")
    listed = f"{image}\n{image}x\n".encode("utf-8-sig")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed), encoding="cp1252"))
    dataset = open_dataset(["-"])
    assert [item.id for item in dataset.items] == [str(image)] and [entry.id for entry in dataset.skipped] == [f"{image}x"]


def test_a_path_on_stdin_that_is_not_utf8_is_skipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (b"b\xff.png", b"ok.png"):
        write(Path(os.fsdecode(name)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"b\xff.png\nok.png\n"), encoding="utf-8"))
    dataset = open_dataset(["-"])
    assert [item.id for item in dataset.items] == ["ok.png"]
    assert dataset.skipped == [Skipped(r"'b\udcff.png'", "its name is not UTF-8; rename it")]
    with pytest.raises(DataError, match=r"^-: holds no image$"):  # it has been read
        open_dataset(["-"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.jsonl", b'{"image": "ok.png"}\n{"image": "b\xff.png"}\n{"image": "ok.png", "id": "\\udcff"}\n'),
        ("m.csv", b"image,caption\nb\xff.png,\nok.png,\nok.png,caf\xe9\n"),
    ],
    ids=["jsonl", "csv"],
)
def test_lines_of_a_manifest_that_are_not_utf8_are_skipped(tmp_path, name, content):
    for image in (b"b\xff.png", b"ok.png"):
        write(tmp_path / os.fsdecode(image))
    dataset = open_dataset([write(tmp_path / name, content)])
    assert [item.id for item in dataset.items] == ["ok.png"]
    assert [skipped.reason for skipped in dataset.skipped] == ["not UTF-8 text; rename or rewrite it as UTF-8"] * 2


def test_braces_and_globs(tmp_path, make_shard):
    for number in range(3):
        make_shard([(f"k{number}.png", PNG)], name=f"s-000{number}.tar")
    ids = ["k0", "k1", "k2"]
    assert [item.id for item in open_dataset([f"{tmp_path}/s-{{0000..0002}}.tar"]).items] == ids
    assert [item.id for item in open_dataset([f"{tmp_path}/*.tar"]).items] == ids
    assert [item.id for item in open_dataset([f"{tmp_path}/s-{{0001..0002}}.tar", f"{tmp_path}/s-0000.tar"]).items] == ["k1", "k2", "k0"]
    with pytest.raises(DataError, match=r"s-0003\.tar: no such file or folder$"):
        open_dataset([f"{tmp_path}/s-{{0000..0003}}.tar"])


def test_a_range_that_runs_backwards_is_an_error(tmp_path, make_shard):
    make_shard([("k.png", PNG)], name="x-3.tar")
    captions = lines(tmp_path / "c.jsonl", {"id": "k", "caption": "a k"})
    with pytest.raises(DataError, match=r"x-\{5\.\.2\}\.tar: the range runs backwards"):
        open_dataset([f"{tmp_path}/x-{{5..2}}.tar"], captions=captions)


def test_no_input_is_an_error():
    with pytest.raises(DataError, match="no input: name images, folders"):
        open_dataset([])


def test_a_name_with_glob_characters_is_a_name_first(tmp_path):
    assert len(open_dataset([write(tmp_path / "a[1].png")])) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.png", None, "gone.png: no such file or folder"),
        ("a.pdf", b"x", "a.pdf: neither an image, a folder, a manifest"),
        ("empty/readme.md", b"x", "empty: holds no image"),
        ("empty.jsonl", b"\n", "empty.jsonl: holds no image"),
        ("bad.jsonl", b"{}", r"bad.jsonl: holds no image that can be used \(bad.jsonl:1: no 'image'"),
        ("latin.jsonl", b'{"image": "\xe9.png"}', r"latin.jsonl: holds no image that can be used \(latin.jsonl:1: not UTF-8 text"),
    ],
)
def test_an_input_that_can_not_be_used_is_one_line(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset([tmp_path / (name if "/" not in name else name.split("/", maxsplit=1)[0])])
    assert "\n" not in str(caught.value)


def test_ids_that_two_inputs_share_get_the_input_before_them(tmp_path, make_shard, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one/x.png", "two/x.png", "two/y.png"):
        write(tmp_path / name)
    assert [item.id for item in open_dataset(["one/", "two"]).items] == ["one/x.png", "two/x.png", "y.png"]
    assert [item.id for item in open_dataset(["one/x.png", "two/x.png"]).items] == ["one/x.png", "two/x.png"]
    for shard in ("a.tar", "b.tar"):
        make_shard([("key.png", PNG)], name=shard)
    assert [item.id for item in open_dataset(["a.tar", "b.tar"]).items] == ["a.tar/key", "b.tar/key"]


def test_an_id_twice_in_one_input_is_an_error(tmp_path):
    write(tmp_path / "a.png")
    manifest = lines(tmp_path / "m.jsonl", {"image": "a.png", "caption": "one"}, {"image": "a.png", "caption": "two"})
    with pytest.raises(DataError, match=r"a\.png: 1 ids are used for more than one image.*its own id"):
        open_dataset([manifest])


def test_captions_override_by_id_and_by_unambiguous_stem(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/2.png", "3.png"):
        write(tmp_path / "set" / name)
        write((tmp_path / "set" / name).with_suffix(".txt"), "beside")
    listed = {"a/1.png": "by id", "1": "ambiguous", "2": "by stem", "3.png": "by name", "nowhere": "unused"}
    captions = lines(tmp_path / "captions.jsonl", *({"id": key, "caption": text} for key, text in listed.items()))
    assert captions_of(open_dataset([tmp_path / "set"], captions=captions)) == {
        "3.png": "by name",
        "a/1.png": "by id",
        "b/1.png": "beside",
        "b/2.png": "by stem",
    }


@pytest.mark.parametrize("line", ["{broken", "[]", '{"id": "a"}', '{"caption": "x"}', '{"id": "a", "caption": null}'])
def test_an_unreadable_line_of_captions_names_file_and_line(tmp_path, line):
    image = write(tmp_path / "a.png")
    captions = lines(tmp_path / "c.jsonl", {"id": "a.png", "caption": "fine"}, line)
    with pytest.raises(DataError, match=r"c\.jsonl:2: not a line of the form"):
        open_dataset([image], captions=captions)


@pytest.mark.parametrize("line", [r'{"id": "a", "caption": "half \ud83d"}', r'{"id": "\udcff", "caption": "x"}'])
def test_half_a_character_in_captions_names_file_and_line(tmp_path, line):
    image = write(tmp_path / "a.png")
    captions = lines(tmp_path / "c.jsonl", {"id": "a.png", "caption": "fine"}, line)
    with pytest.raises(DataError, match=r"c\.jsonl:2: its id or caption is not Unicode text"):
        open_dataset([image], captions=captions)


def test_an_image_whose_caption_is_not_utf8_is_skipped(tmp_path, monkeypatch):
    images = [write(tmp_path / "set" / name) for name in ("a.png", "b.png")]
    write(tmp_path / "set" / "a.txt", b"caf\xe9")
    write(tmp_path / "set" / "b.txt", "fine")
    manifest = lines(tmp_path / "m.jsonl", {"image": "set/a.png"}, {"image": "set/b.png"})
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{image}\n" for image in images)))
    for inputs in ([tmp_path / "set"], [manifest], ["-"], images):
        dataset = open_dataset(inputs)
        assert list(captions_of(dataset).values()) == ["fine"]
        assert [entry.reason for entry in dataset.skipped] == [
            f"its caption {images[0].with_suffix('.txt')} is not UTF-8 text; rewrite it as UTF-8"
        ]
    with pytest.raises(DataError, match=r"a\.png: holds no image that can be used \(a\.png: its caption .*a\.txt is not UTF-8"):
        open_dataset(images[:1])
    manifest = lines(tmp_path / "m.jsonl", {"image": "set/a.png", "caption": "its own"})
    assert captions_of(open_dataset([manifest])) == {"set/a.png": "its own"}


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_caption_is_none(tmp_path, blank):
    write(tmp_path / "a.png")
    write(tmp_path / "b.png")
    write(tmp_path / "b.txt", "beside")
    captions = lines(tmp_path / "c.jsonl", {"id": "a.png", "caption": "fine"}, {"id": "b", "caption": blank})
    assert captions_of(open_dataset([tmp_path], captions=captions)) == {"a.png": "fine", "b.png": "beside"}
    (tmp_path / "b.txt").unlink()
    assert captions_of(open_dataset([tmp_path], captions=captions)) == {"a.png": "fine", "b.png": None}
    manifest = lines(tmp_path / "m.jsonl", {"image": "b.png", "caption": blank})
    assert captions_of(open_dataset([manifest])) == {"b.png": None}


def test_an_unreadable_captions_file_of_other_bytes_is_an_error(tmp_path):
    captions = write(tmp_path / "c.jsonl", b'{"id": "a.png", "caption": "caf\xe9"}')
    with pytest.raises(DataError, match=r"c\.jsonl: not readable as text"):
        open_dataset([write(tmp_path / "a.png")], captions=captions)


def test_captions_of_other_images_are_refused(tmp_path):
    write(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("beside")
    captions = lines(tmp_path / "c.jsonl", {"id": "train/a", "caption": "meant for it"})
    with pytest.raises(DataError, match=r"c\.jsonl: none of its ids is one of these images, such as a\.png"):
        open_dataset([tmp_path / "set"], captions=captions)


def test_captions_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"c\.jsonl: no such file"):
        open_dataset([write(tmp_path / "a.png")], captions=tmp_path / "c.jsonl")


def test_a_dataset_survives_pickling_and_notices_a_file_that_has_gone(tmp_path):
    image = write(tmp_path / "a.png")
    dataset = pickle.loads(pickle.dumps(open_dataset([image])))
    assert load_image(dataset.read(0), name="a").size == (40, 30)
    image.unlink()
    with pytest.raises(DataError, match=r"^a\.png: .*No such file"):
        dataset.read(0)
