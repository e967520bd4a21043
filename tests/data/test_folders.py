import errno
import os
from pathlib import Path

import pytest
from inputs import PNG, captions_of, lines, write

from texttok_cli.data import Skipped, open_dataset
from texttok_cli.data.listings import MAX_TEXT_BYTES
from texttok_cli.errors import DataError


def test_a_folder_is_listed_recursively_in_order(tmp_path):
    for name in ("b.JPG", "c.jfif", "a/2.png", "a/1.webp", "a/deep/x.gif", ".hidden.png", ".git/y.png", "notes.md", "a/1.txt"):
        write(tmp_path / name, "one" if name.endswith("txt") else PNG)
    dataset = open_dataset([str(tmp_path)])
    assert [item.id for item in dataset.items] == ["a/1.webp", "a/2.png", "a/deep/x.gif", "b.JPG", "c.jfif"]
    assert [item.class_name for item in dataset.items] == ["a", "a", "a/deep", None, None]
    assert [item.caption for item in dataset.items] == ["one", None, None, None, None]
    assert dataset.skipped == []


def test_a_folder_is_sorted_by_the_parts_of_its_paths(tmp_path):
    """Token folders and runs that are gone on with depend on this order."""
    for name in ("a-b/1.png", "a.b/x/1.png", "a/x/1.png", "a/1.png", "a.png", "a/x.png", "A/1.png", "a b/1.png", "é/1.png"):
        write(tmp_path / name)
        write((tmp_path / name).with_suffix(".txt"), f"of {name}")
    items = open_dataset([tmp_path]).items
    paths = sorted(tmp_path.rglob("*.png"))
    assert [item.path for item in items] == paths
    assert [item.id for item in items] == [path.relative_to(tmp_path).as_posix() for path in paths]
    assert all(item.caption == f"of {item.id}" for item in items)


def test_links_to_folders_are_followed_under_each_of_their_names(tmp_path):
    write(tmp_path / "elsewhere/deep/x.png")
    write(tmp_path / "elsewhere/deep/x.txt", "linked")
    write(tmp_path / "set/a.png")
    for name in ("cats", "dogs"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "set/b.png").symlink_to(tmp_path / "set/a.png")
    dataset = open_dataset([tmp_path / "set"])
    assert captions_of(dataset) == {"a.png": None, "b.png": None, "cats/deep/x.png": "linked", "dogs/deep/x.png": "linked"}
    assert [item.class_name for item in dataset.items] == [None, None, "cats/deep", "dogs/deep"]
    assert dataset.skipped == []


def test_links_in_a_circle_and_to_nothing_are_skipped(tmp_path):
    write(tmp_path / "a/b/x.png")
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "own.png").symlink_to(tmp_path / "own.png")
    (tmp_path / "photos").symlink_to(tmp_path / "unmounted")
    (tmp_path / "notes.md").symlink_to(tmp_path / "nowhere.md")
    dataset = open_dataset([tmp_path])
    assert [item.id for item in dataset.items] == ["a/b/x.png"]
    assert dataset.skipped == [
        Skipped("a/b/up", "a link to a folder that it lies in"),
        Skipped("gone.png", "a link to nothing"),
        Skipped("own.png", "a link to nothing"),
        Skipped("photos", "a link to nothing"),
    ]


def test_a_folder_that_can_not_be_listed_is_skipped(tmp_path, monkeypatch):
    for name in ("a/1.png", "shut/2.png"):
        write(tmp_path / name)

    def refuse(path, scandir=os.scandir):
        if Path(path).name == "shut":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read what chmod closes
    dataset = open_dataset([tmp_path])
    assert [item.id for item in dataset.items] == ["a/1.png"]
    assert dataset.skipped == [Skipped("shut", "Permission denied")]
    with pytest.raises(DataError, match=r"shut: holds no image that can be used \(.*shut: Permission denied\)"):
        open_dataset([tmp_path / "shut"])


def test_a_folder_is_listed_without_a_look_at_each_file(tmp_path, monkeypatch):
    for number in range(5):
        write(tmp_path / "a" / f"{number}.png")
    looks = []
    monkeypatch.setattr(Path, "stat", lambda path, stat=Path.stat, **how: looks.append(path.name) or stat(path, **how))
    monkeypatch.setattr(Path, "read_text", lambda path, **how: pytest.fail(f"{path} was opened"))
    assert len(open_dataset([tmp_path])) == 5
    assert not [name for name in looks if name.endswith((".png", ".txt"))]


def test_a_folder_named_like_a_caption_is_none(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "a.txt/b.png")
    assert captions_of(open_dataset([tmp_path])) == {"a.png": None, "a.txt/b.png": None}


@pytest.mark.skipif(os.name == "nt", reason="has neither pipes nor /dev/zero")
def test_what_would_be_read_for_ever_is_no_caption(tmp_path):
    for name in ("pipe", "zero", "long", "short"):
        write(tmp_path / f"{name}.png")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    write(tmp_path / "long.txt", "a" * (MAX_TEXT_BYTES + 1))
    write(tmp_path / "short.txt", "a" * MAX_TEXT_BYTES)
    dataset = open_dataset([tmp_path])
    assert list(captions_of(dataset)) == ["short.png"]
    assert [(entry.id, entry.reason.partition(" is ")[2]) for entry in dataset.skipped] == [
        (f"{name}.png", "no file, or one of over 1,048,576 bytes") for name in ("long", "pipe", "zero")
    ]


def test_folders_in_folders_end_somewhere(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / ("d/" * 200) / "b.png")
    write(tmp_path / ("d/" * 201) / "c.png")
    dataset = open_dataset([tmp_path])
    assert [item.path.name for item in dataset.items] == ["a.png", "b.png"]
    assert [(entry.id.count("d"), entry.reason) for entry in dataset.skipped] == [(201, "over 200 folders deep")]


def test_a_folder_names_the_images_it_can_not_read(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "phone.HEIC")
    assert [skipped.id for skipped in open_dataset([tmp_path]).skipped] == ["phone.HEIC"]


def test_the_captions_file_of_a_folder_wins_over_sidecars(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "a.txt", "sidecar")
    write(tmp_path / "b/c.png")
    lines(tmp_path / "captions.jsonl", {"id": "a.png", "caption": "listed"}, {"image": "b/c.png", "caption": "also"})
    assert captions_of(open_dataset([tmp_path])) == {"a.png": "listed", "b/c.png": "also"}


def test_a_name_that_is_not_utf8_is_skipped(tmp_path):
    (tmp_path / "good.png").write_bytes(PNG)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.png")).write_bytes(PNG)
    dataset = open_dataset([tmp_path])
    assert [item.id for item in dataset.items] == ["good.png"]
    assert "not UTF-8" in dataset.skipped[0].reason
