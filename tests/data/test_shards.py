import json
import tarfile
from collections import Counter

import pytest
from pictures import encoded, picture

from texttok_cli.data import Skipped, load_image, open_dataset
from texttok_cli.data.listings import MAX_TEXT_BYTES
from texttok_cli.errors import DataError

PNG = encoded(picture())


def pairs(n):
    return [member for i in range(n) for member in ((f"{i:03d}.png", encoded(picture(i))), (f"{i:03d}.json", {"caption": f"number {i}"}))]


def test_members_are_read_at_random(make_shard):
    dataset = open_dataset([make_shard(pairs(5))])
    assert [item.id for item in dataset.items] == [f"{i:03d}" for i in range(5)]
    assert [item.caption for item in dataset.items] == [f"number {i}" for i in range(5)]
    for index in (4, 0, 2):
        assert dataset.read(index) == encoded(picture(index))
    assert dataset.items[0].in_shard


def test_texts_and_classes_beside_the_image(make_shard):
    first = [("a.txt", b" from txt\n"), ("a.jpg", PNG), ("a.cls", b"12")]
    others = [("b.webp", PNG), ("b.json", {"class": 0}), ("b.cls", b"5"), ("c.PNG", PNG)]
    items = open_dataset([make_shard([*first, *others])]).items
    assert [(i.id, i.caption, i.class_name) for i in items] == [("a", "from txt", "12"), ("b", None, "0"), ("c", None, None)]


def test_keys_keep_their_folder_and_end_at_the_first_dot(make_shard):
    members = [("./a/b.png", PNG), ("a.x/c.json", {"caption": "c"}), ("a.x/c.png", PNG), ("d.seg.png", PNG), ("._e.png", PNG)]
    assert [(i.id, i.caption) for i in open_dataset([make_shard(members)]).items] == [("a/b", None), ("a.x/c", "c")]


@pytest.mark.parametrize(
    ("field", "info", "caption"),
    [
        (None, {"caption": "own", "captions": ["first"]}, "own"),
        (None, {"captions": ["first", "second"]}, "first"),
        ("captions", {"captions": ["first", "second"]}, "first"),
        ("longest", {"captions": ["a", "the longest", "zebra"]}, "the longest"),
        ("measured", {"captions": ["name"], "measured": "measured words"}, "measured words"),
        ("measured", {"captions": ["name", "name + tags"], "measured": None}, "name + tags"),
        ("measured", {"captions": ["name"]}, "name"),
        ("measured", {}, None),
        ("note", {"note": "by key", "caption": "own"}, "by key"),
        ("note", {"caption": "own"}, None),
        ("captions", {"captions": 5}, None),
        (None, {"captions": "a text, not a list"}, "a text, not a list"),
    ],
)
def test_which_key_is_the_caption(make_shard, field, info, caption):
    assert open_dataset([make_shard([("a.png", PNG), ("a.json", info)])], caption_field=field).items[0].caption == caption


@pytest.mark.parametrize(("info", "caption"), [({"caption": "own", "captions": ["listed"]}, "own"), ({"captions": ["listed"]}, "beside")])
def test_the_txt_comes_after_the_caption_and_before_the_list(make_shard, info, caption):
    assert open_dataset([make_shard([("a.png", PNG), ("a.txt", b"beside"), ("a.json", info)])]).items[0].caption == caption


def test_every_cut_keeps_what_is_whole_and_lists_the_rest(make_shard):
    """Wherever the shard is cut: each image is read exactly with its caption, or listed, or lies behind a listed break."""
    whole = make_shard(pairs(4))
    data = whole.read_bytes()
    ends = [item.offset + (item.size or 0) for item in open_dataset([whole]).items]
    first_caption = data.index(b'number 0"}') + len(b'number 0"}')
    for length in range(600, data.rindex(b"number 3"), 97):
        whole.write_bytes(data[:length])
        if length < first_caption:
            with pytest.raises(DataError, match=r"shard-0000\.tar: holds no image that can be used"):
                open_dataset([whole])
            continue
        dataset = open_dataset([whole])
        for index, item in enumerate(dataset.items):
            assert dataset.read(index) == encoded(picture(int(item.id)))
            assert item.caption == f"number {int(item.id)}"
        assert "unreadable from some point on" in dataset.skipped[-1].reason
        lost = {skipped.id for skipped in dataset.skipped[:-1]}
        begun = sum(end <= length for end in ends)
        assert len(dataset) >= begun - 1
        assert not lost & {item.id for item in dataset.items}


def test_an_image_that_is_cut_short_is_listed_though_its_caption_is_there(make_shard):
    shard = make_shard([("a.json", {"caption": "a"}), ("a.png", PNG), ("b.json", {"caption": "b"}), ("b.png", PNG)])
    shard.write_bytes(shard.read_bytes()[: shard.read_bytes().rindex(PNG) + len(PNG) // 2])
    dataset = open_dataset([shard])
    assert [item.id for item in dataset.items] == ["a"]
    assert dataset.skipped[0] == Skipped("b", "shard-0000.tar is cut short within this image")


def test_a_damaged_header_in_the_middle_is_not_the_end_in_silence(make_shard):
    shard = make_shard(pairs(4))
    data = bytearray(shard.read_bytes())
    start = data.index(b"002.png")
    data[start : start + 200] = b"\xff" * 200
    shard.write_bytes(data)
    dataset = open_dataset([shard])
    assert [item.id for item in dataset.items] == ["000", "001"]
    assert "damaged" in dataset.skipped[-1].reason


def test_a_number_that_is_none_in_an_extended_header_is_not_the_end_of_the_run(make_shard):
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    body = b"27 GNU.sparse.map=x,y,z,ab\n"
    header.size = len(body)
    shard = make_shard(pairs(2))
    end = shard.read_bytes().index(b"\0" * 1024, shard.read_bytes().rindex(b"001.json") + 1024)
    shard.write_bytes(
        shard.read_bytes()[:end] + header.tobuf() + body.ljust(512, b"\0") + tarfile.TarInfo("002.png").tobuf() + b"\0" * 1024
    )
    dataset = open_dataset([shard])
    assert [item.id for item in dataset.items] == ["000", "001"] and "unreadable from some point on" in dataset.skipped[-1].reason


def with_header_at_the_end(shard, *blocks):
    """The shard with these bytes in place of its end mark."""
    data = shard.read_bytes()
    end = data.index(b"\0" * 1024, data.rindex(b"001.json") + 1024)
    shard.write_bytes(data[:end] + b"".join(blocks) + b"\0" * 1024)
    return shard


def sized(name, size, kind=tarfile.REGTYPE):
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([sized("002.bin", -512)], "negative size"),  # its next header would be itself
        ([sized("002.png", -512)], "negative size"),
        ([sized("pax", 1 << 70, tarfile.XHDTYPE)], "unreadable"),
        ([sized("pax", 1 << 61, tarfile.XHDTYPE)], "unreadable"),
        ([sized("name", 4, tarfile.GNUTYPE_LONGNAME), b"abc".ljust(512, b"\0")] * 5000, "unreadable"),
    ],
    ids=["negative", "negative of an image", "beyond 64 bits", "beyond memory", "five thousand on end"],
)
def test_a_hostile_header_ends_the_shard_but_not_the_run(make_shard, blocks, reason):
    dataset = open_dataset([with_header_at_the_end(make_shard(pairs(2)), *blocks)])
    assert [item.id for item in dataset.items] == ["000", "001"] and reason in dataset.skipped[-1].reason


def test_damaged_json_and_a_second_image_are_listed(make_shard):
    members = [("a.png", PNG), ("a.json", b"{cut"), ("b.png", PNG), ("b.jpg", PNG), ("b.json", {}), ("c.png", PNG), ("c.json", b"[1]")]
    dataset = open_dataset([make_shard(members)])
    assert [item.id for item in dataset.items] == ["b"]
    assert [skipped.id for skipped in dataset.skipped] == ["a", "c", "b.jpg"]


def test_what_looks_like_an_image_but_is_none_for_us_is_listed(make_shard):
    unseen = [("clip.mp4", b"x"), ("depth.npy", b"x"), ("__index__", b"x"), ("lost.txt", b"x"), ("._a.png", PNG), (".DS_Store", b"x")]
    shard = make_shard([("a.png", PNG), ("img.v2.png", PNG), ("phone.HEIC", b"x"), *unseen])
    with tarfile.open(shard, "a") as tar:
        for name, kind in (
            ("hard.png", tarfile.LNKTYPE),
            ("soft.jpg", tarfile.SYMTYPE),
            ("soft.txt", tarfile.SYMTYPE),
            ("d.png", tarfile.DIRTYPE),
        ):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "a.png"
            tar.addfile(header)
    dataset = open_dataset([shard])
    assert [item.id for item in dataset.items] == ["a"]
    link = "a link, not a file: write shards with tar --hard-dereference --dereference"
    assert dataset.skipped == [
        Skipped("img.v2.png", "its key ends at the first dot: rename it"),
        Skipped("phone.HEIC", ".heic images can't be read; convert it to PNG or JPEG"),
        Skipped("hard.png", link),
        Skipped("soft.jpg", link),
    ]


def test_other_fields_of_a_sample_that_has_its_image_are_no_images(make_shard):
    dataset = open_dataset([make_shard([("a.mask.png", PNG), ("a.png", PNG), ("a.svg", b"x"), ("a.json", {"caption": "a"})])])
    assert [(item.id, item.caption) for item in dataset.items] == [("a", "a")]
    assert dataset.skipped == []


def test_a_text_or_name_that_is_not_unicode_is_skipped_alone(make_shard):
    half = "half \ud83d"
    texts = [("b.png", PNG), ("b.json", {"caption": half}), ("c.png", PNG), ("c.json", {"class": half}), ("d\udcff.png", PNG)]
    unused = [("e.png", PNG), ("e.json", {"caption": "e", "captions": [half]})]
    latin = [("f.png", PNG), ("f.txt", b"caf\xe9"), ("g.png", PNG), ("g.json", b'{"caption": "caf\xe9"}')]
    dataset = open_dataset([make_shard([("a.png", PNG), *texts, *unused, *latin])])
    assert [item.id for item in dataset.items] == ["a", "e"]
    reason = "its caption or class in shard-0000.tar is not Unicode text; rewrite it as UTF-8"
    assert dataset.skipped == [
        Skipped("b", reason),
        Skipped("c", reason),
        Skipped(r"'d\udcff'", "its name in shard-0000.tar is not UTF-8; rename it"),
        Skipped("f", reason),
        Skipped("g", reason),
    ]


def test_a_byte_order_mark_is_no_part_of_a_text(make_shard):
    texts = [("a.png", PNG), ("a.txt", b"\xef\xbb\xbfone"), ("b.png", PNG), ("b.json", b'\xef\xbb\xbf{"caption": "two"}')]
    assert [item.caption for item in open_dataset([make_shard(texts)]).items] == ["one", "two"]


def test_a_class_that_is_no_text_is_listed(make_shard):
    dataset = open_dataset([make_shard([("a.png", PNG), ("b.png", PNG), ("b.json", {"class": {"name": "x"}})])])
    assert dataset.skipped == [Skipped("b", "its class in shard-0000.tar must be text")]


def test_a_sparse_member_is_listed_and_never_read_as_its_neighbours_bytes(make_shard):
    shard = make_shard([("a.png", PNG), ("b.png", PNG)])
    data = bytearray(shard.read_bytes())
    data[156:157] = tarfile.GNUTYPE_SPARSE
    data[386:410] = b"%011o\0%011o\0" % (0, len(PNG))  # all of it, from its begin
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    shard.write_bytes(data)
    dataset = open_dataset([shard])
    assert [item.id for item in dataset.items] == ["b"]
    assert dataset.skipped == [Skipped("a.png", "stored in parts: write shards without tar --sparse")]


def test_a_text_of_absurd_size_is_not_read(make_shard):
    members = [("a.png", PNG), ("a.json", b" " * MAX_TEXT_BYTES + b"{}"), ("b.png", PNG)]
    dataset = open_dataset([make_shard(members)])
    assert [item.id for item in dataset.items] == ["b"]
    assert dataset.skipped[0].id == "a"


@pytest.mark.parametrize("content", [b"", b"not a tar at all " * 100, bytes(2048)])
def test_what_is_no_shard_is_an_error(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tar: holds no image"):
        open_dataset([path])


def test_the_photos_are_as_their_readme_says(real_data):
    dataset = open_dataset([real_data / "photos128-val-0000.tar"], caption_field="measured")
    assert len(dataset) == 1661
    assert dataset.skipped == []
    assert all(item.caption and item.class_name for item in dataset.items)
    assert {load_image(dataset.read(index), name="x").size for index in range(0, 1661, 50)} == {(128, 128)}


def test_emoji_have_no_measured_caption_but_name_and_tags(real_data):
    shard = real_data / "emoji128-val-0000.tar"
    measured, named, longest = (open_dataset([shard], caption_field=field) for field in ("measured", "captions", "longest"))
    assert len(measured) == 188
    longer = Counter(str(m.caption).startswith(str(n.caption)) for m, n in zip(measured.items, named.items, strict=True))
    assert longer == {True: 188}
    assert [item.caption for item in measured.items] == [item.caption for item in longest.items]


def test_a_pattern_over_the_training_shards(real_data):
    dataset = open_dataset([f"{real_data}/emoji128-train-{{0000..0001}}.tar"])
    assert len(dataset) == 3117
    assert json.loads(json.dumps([item.id for item in dataset.items])) == [item.id for item in dataset.items]
